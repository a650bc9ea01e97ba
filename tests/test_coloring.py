"""`test.py`: results, their sizes, formats and records."""

import json
import os
from functools import partial

from support import sheets
from support.checkpoints import load_checkpoint, save_checkpoint, save_safetensors
from support.cli import EXIT_SKIPPED
from support.images import pair_images
from support.inference import fold_batch_norm, temporary_folder

import numpy as np
import paddle
import pytest
from conftest import SmallNetwork, upsampled
from PIL import Image
from skimage import color, data

import colorizer
import test
from dataset import lab_to_rgb, rgb_to_lab, to_uint8
from utils import annealed_mean, load_ab_bins

EXACT = ("--precision", "float32")  # the tests compare with what is computed in other ways


@pytest.fixture
def run(tmp_path, small_network, monkeypatch):
    """Run test.py with a random small network. Returns the exit code and the folder of results."""
    paddle.seed(0)
    network = SmallNetwork()
    save_checkpoint(network.state_dict(), tmp_path / "model" / "epoch_19_model.pdparams")

    monkeypatch.chdir(tmp_path)

    def run(images, *flags, result="result"):
        where = ["--model_path", str(tmp_path / "model"), "--result_path", os.path.join(tmp_path, result), *EXACT]
        images = images if isinstance(images, tuple) else (images,)
        return test.main(test.parse_args([*map(str, images), *where, *map(str, flags)])), tmp_path / result

    run.network = network
    return run


def pixels(path):
    return np.asarray(Image.open(path))


def test_results_keep_the_subfolder_and_size_of_their_images(run, tmp_path, photographs):
    nested = tmp_path / "in"
    for i, path in enumerate(sorted(photographs.iterdir())):
        (nested / f"class {i}").mkdir(parents=True)
        os.link(path, nested / f"class {i}" / path.name)
    code, result = run(nested)
    assert code == 0
    for path in nested.rglob("*.png"):
        assert pixels(result / path.relative_to(nested)).shape == pixels(path).shape
    assert len(list(result.rglob("*.png"))) == 4


def test_result_keeps_the_lightness_of_its_image(run, photographs):
    _, result = run(photographs, "--temperature", 1000)
    for path in photographs.iterdir():
        before, after = (color.rgb2lab(pixels(p))[..., 0] for p in (path, result / path.name))
        assert np.abs(before - after).mean() < 0.5  # colors out of gamut are clipped, which moves L a little


def test_result_equals_step_by_step_computation(run, photographs):
    _, result = run(photographs / "coffee.png", "--load_size", 64)
    image = Image.open(photographs / "coffee.png")
    small = np.asarray(image.resize((96, 64), Image.Resampling.BILINEAR))
    run.network.eval()
    with paddle.no_grad():
        lightness = rgb_to_lab(paddle.to_tensor(small.transpose(2, 0, 1)[None]))[:, :1]
        ab = annealed_mean(run.network(lightness - 50), load_ab_bins())
    full = rgb_to_lab(paddle.to_tensor(np.asarray(image).transpose(2, 0, 1)[None]))
    ab = paddle.to_tensor(upsampled(ab[0].numpy(), *full.shape[2:])[None].astype(np.float32))
    expected = to_uint8(lab_to_rgb(paddle.concat([full[:, :1], ab], axis=1)))[0].transpose([1, 2, 0]).numpy()
    assert np.abs(pixels(result / "coffee.png").astype(int) - expected).max() <= 1


def test_strips_and_batches_do_not_change_results(run, photographs, monkeypatch):
    _, whole = run(photographs, "--batch_size", 1, result="whole")
    monkeypatch.setattr(colorizer, "STRIP_PIXELS", 700)
    monkeypatch.setattr(test, "PIXELS_AHEAD", 20_000)
    _, strips = run(photographs, "--batch_size", 3, "--num_workers", 1, result="strips")
    for path in photographs.iterdir():
        assert np.abs(pixels(whole / path.name).astype(int) - pixels(strips / path.name)).max() <= 1


def test_network_input_keeps_the_aspect_in_multiples_of_8():
    assert colorizer.network_size(500, 375, 256) == (344, 256)
    assert colorizer.network_size(375, 500, 256) == (256, 344)
    assert colorizer.network_size(50, 50, 256) == (256, 256)
    assert colorizer.network_size(10_000, 10, 256) == (2048, 256)  # squeezed, so that memory is bounded
    assert colorizer.network_size(3, 3, 4) == (8, 8)


def test_crop_size_gives_center_crops(run, photographs):
    _, result = run(photographs, "--load_size", 72, "--crop_size", 64)
    for path in result.rglob("*.png"):
        assert pixels(path).shape == (64, 64, 3)
    gray_photo = color.rgb2lab(np.asarray(Image.open(photographs / "rocket.png").resize((108, 72), Image.BILINEAR)))
    left = (gray_photo.shape[1] - 64) // 2
    own = color.rgb2lab(pixels(result / "rocket.png"))[..., 0]
    assert np.abs(own - gray_photo[4:68, left : left + 64, 0])[1:-1, 1:-1].mean() < 1


def test_higher_temperature_lowers_chroma_of_a_random_network(run, photographs):
    chroma = []
    for temperature in (0.01, 1):
        _, result = run(photographs / "coffee.png", "--temperature", temperature)
        chroma.append(np.hypot(*color.rgb2lab(pixels(result / "coffee.png"))[..., 1:].transpose(2, 0, 1)).mean())
    assert chroma[0] > chroma[1] + 5


def test_gray_alpha_palette_cmyk_16_bit_and_rotated_images_are_colorized(run, tmp_path):
    coffee = Image.fromarray(data.coffee()[::8, ::8])  # 75 x 50
    folder = tmp_path / "kinds"
    folder.mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    coffee.convert("L").save(folder / "gray.png")
    coffee.convert("RGBA").save(folder / "alpha.png")
    coffee.quantize(32).save(folder / "palette.png")
    coffee.convert("CMYK").save(folder / "cmyk.jpg")
    Image.fromarray(np.asarray(coffee.convert("L")).astype(np.uint16) * 257).save(folder / "16bit.tif")
    coffee.save(folder / "turned.jpg", exif=exif)
    for suffix in ("bmp", "webp", "ppm"):
        coffee.save(folder / f"{suffix}.{suffix}")
    code, result = run(folder)
    assert code == 0
    assert {p.stem for p in result.glob("*.png")} == {p.stem for p in folder.iterdir()}
    for path in result.rglob("*.png"):
        assert pixels(path).shape == ((75, 50, 3) if path.stem == "turned" else (50, 75, 3))


def test_unreadable_file_is_reported_and_changes_the_exit_code(run, tmp_path, photographs, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    whole = (photographs / "coffee.png").read_bytes()
    (folder / "a.png").write_bytes(whole)
    (folder / "b.png").write_bytes(whole[: len(whole) // 2])
    (folder / "c.png").write_bytes(b"")
    (folder / "d.png").write_bytes(whole)
    code, result = run(folder)
    assert code == EXIT_SKIPPED
    assert {p.name for p in result.glob("*.png")} == {"a.png", "d.png"}
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 2 and "b.png" in lines[0] + lines[1] and "c.png: empty file" in lines[0] + lines[1]


def test_names_that_differ_only_in_their_suffix_both_get_results(run, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    Image.new("RGB", (16, 16), "gray").save(folder / "a.jpg")
    Image.new("RGB", (24, 16), "gray").save(folder / "a.png")
    _, result = run(folder)
    assert pixels(result / "a.png").shape == (16, 16, 3) and pixels(result / "a.png.png").shape == (16, 24, 3)


def test_names_of_any_bytes(run, tmp_path, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    for name in (b"caf\xe9.png", "猫.png".encode(), b"a\nb.png", b"-rf.png", b"a b.png"):
        Image.new("RGB", (16, 16), "gray").save(os.fsdecode(os.path.join(os.fsencode(folder), name)))
    code, result = run(folder)
    assert code == 0
    written = set(os.listdir(os.fsencode(result))) - {b"coloring.json", b"coloring.jsonl"}
    assert written == set(os.listdir(os.fsencode(folder)))
    assert run(folder, "--skip_existing")[0] == 0 and "all are up to date" in capsys.readouterr().out


def test_max_samples_and_skip_existing(run, photographs, capsys):
    _, result = run(photographs, "--max_samples", 2)
    assert [p.name for p in sorted(result.glob("*.png"))] == ["astronaut.png", "chelsea.png"]
    before = (result / "astronaut.png").stat().st_mtime_ns
    run(photographs, "--skip_existing")
    assert len(list(result.glob("*.png"))) == 4 and (result / "astronaut.png").stat().st_mtime_ns == before
    assert "2 images colorized" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("there", "taken"),
    [
        (("19", "latest", "20"), "19"),
        (("3", "latest", "best"), "latest"),
        (("9", "10", "best"), "10"),
        (("official",), "official"),
    ],
)
def test_default_checkpoint(run, photographs, tmp_path, capsys, there, taken):
    weights = (tmp_path / "model" / "epoch_19_model.pdparams").rename(tmp_path / "weights")
    for name in there:
        os.link(weights, tmp_path / "model" / f"epoch_{name}_model.pdparams")
    assert run(photographs / "coffee.png")[0] == 0
    said = capsys.readouterr()
    assert said.out.splitlines()[-1].endswith(
        f"colorized with {tmp_path}/model/epoch_{taken}_model.pdparams in float32"
    )
    assert ("no --load_model" in said.err and taken in said.err) == (taken != "19")


def test_missing_checkpoint_lists_those_that_exist(run, photographs, tmp_path, stopped):
    def message(*flags):
        return stopped(lambda x: run(photographs / "coffee.png", *x), flags)

    models = tmp_path / "model"
    (models / "epoch_19_model.pdparams").rename(models / "epoch_latest_model.pdparams")
    assert "available: --load_model latest" in message("--load_model", 19)
    (models / "epoch_latest_model.pdparams").rename(models / "epoch_best_model.pdparams")
    os.link(models / "epoch_best_model.pdparams", models / "epoch_norebal_model.pdparams")
    assert "available: --load_model best, norebal" in message()  # which of the two, nobody can tell
    for path in models.iterdir():
        path.unlink()
    for word in ("train.py", "small", "official"):
        assert word in message("--load_model", 19)
    assert message("--load_model", "x/model.pdparams") == "x/model.pdparams: no such checkpoint"


def test_size_and_temperature_are_those_of_the_checkpoint_unless_they_are_given(run, photographs, tmp_path):
    state = load_checkpoint(tmp_path / "model" / "epoch_19_model.pdparams")
    wide = tmp_path / "model" / "epoch_wide_model.safetensors"
    save_safetensors(state, wide, {"load_size": "40", "temperature": "0.7"})
    written = []
    for flags, size, temperature in (((), 40, 0.7), (("--load_size", 64, "--temperature", 0.1), 64, 0.1)):
        _, result = run(photographs / "coffee.png", "--load_model", "wide", *flags, result=f"at_{size}")
        made_by = json.loads((result / "coloring.json").read_text())
        assert (made_by["load_size"], made_by["temperature"]) == (size, temperature)
        written.append(pixels(result / "coffee.png"))
    colorize = colorizer.Colorizer(wide, precision="float32")
    assert np.array_equal(colorize(photographs / "coffee.png"), written[0])
    assert np.array_equal(colorize(photographs / "coffee.png", 0.1, 64), written[1])


def test_compare_writes_contact_sheets_next_to_the_results(run, photographs):
    _, result = run(photographs, "--compare", result="result/")  # with a separator at its end
    assert len(list(result.rglob("*.png"))) == 4
    sheet = pixels(result.with_name("result_compare") / "sheet_001.png")
    assert sheet.shape[1] > 3 * 320 and sheet.std() > 10


def test_contact_sheet_draws_any_name():
    images = [Image.new("RGB", size) for size in ((320, 200), (180, 240), (320, 240))]
    drawn = [
        np.asarray(sheets.contact_sheet([(name, images)], test.COLUMNS)) for name in ("", "a", "é/猫.ж", "long " * 100)
    ]
    assert {sheet.shape for sheet in drawn} == {
        (sheets.HEAD + 240 + sheets.FOOT, 3 * (320 + sheets.MARGIN) + sheets.MARGIN, 3)
    }
    written = [(sheet[sheets.HEAD + 240 :] < 200).sum() for sheet in drawn]
    assert 0 == written[0] < written[1] < written[2] < written[3]
    margins = drawn[3][sheets.HEAD + 240 :, [*range(sheets.MARGIN - 2), *range(2 - sheets.MARGIN, 0)]]
    assert (margins == 255).all()
    for size in ((8, 8), (3000, 20)):  # small ones are enlarged
        thumbnail = sheets.fit(Image.new("RGB", size))
        assert thumbnail.height == 240 or thumbnail.width == 320


def test_east_asian_names_use_a_font_of_the_system(monkeypatch):
    def family(text):
        return sheets.font(14, text).getname()[0]

    monkeypatch.setattr(sheets, "EAST_ASIAN", ("DejaVu Serif",))  # one that matplotlib bundles
    assert [family(text) for text in ("旅行/a", "커피", "é/ж")] == ["DejaVu Serif", "DejaVu Serif", "DejaVu Sans"]
    monkeypatch.setattr(sheets, "EAST_ASIAN", ("no such font",))
    assert family("旅行") == "DejaVu Sans"


def test_results_inside_the_folder_are_not_colorized_again(run, tmp_path, photographs):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.png").write_bytes((photographs / "coffee.png").read_bytes())
    run(folder, "--compare", result="in/result")
    run(folder, "--compare", result="in/result")
    assert sorted(p.name for p in folder.rglob("*.png")) == ["a.png", "a.png", "sheet_001.png"]


# Records of where results came from


@pytest.fixture
def photo(tmp_path):
    """Write a small image. Return its path."""

    def photo(name, level=100):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.linspace(level, 255, 16 * 24, dtype=np.uint8).reshape(16, 24)).save(path)
        return path

    return photo


def lightness(path):
    return color.rgb2lab(np.asarray(Image.open(path).convert("RGB")))[..., 0].min()


def test_skip_existing_colorizes_again_with_other_settings(run, photo, capsys):
    for name in "abc":
        photo(f"in/{name}.png")
    _, result = run("in")
    first = [path.stat().st_mtime_ns for path in sorted(result.glob("*.png"))]
    run("in", "--temperature", 1, "--max_samples", 1)
    capsys.readouterr()
    run("in", "--temperature", 1, "--skip_existing")
    assert ": 2 images colorized" in capsys.readouterr().out
    assert all(a != b for a, b in zip(first, [path.stat().st_mtime_ns for path in sorted(result.glob("*.png"))]))
    assert json.loads((result / "coloring.json").read_text())["temperature"] == 1
    run("in", "--temperature", 1, "--skip_existing")
    assert "0 images colorized, all are up to date" in capsys.readouterr().out


@pytest.mark.parametrize("change", ["source", "result", "record", "format"])
def test_skip_existing_colorizes_again_when_a_file_or_its_record_changed(run, photo, capsys, change):
    _, result = run(photo("in/a.png"))
    flags = ("--skip_existing",)
    if change == "source":
        photo("in/a.png", 50)
    elif change == "result":
        os.utime(result / "a.png", ns=(0, 0))
    elif change == "record":
        records = result / "coloring.jsonl"
        records.write_text(records.read_text()[:-9])  # a kill cut it short
    else:
        flags += ("--format", "jpg")
    for done in (1, 0):
        run("in", *flags)
        assert f": {done} image" in capsys.readouterr().out.splitlines()[-1]


def test_result_of_another_source_is_not_overwritten(run, photo, capsys):
    a, b = photo("a/photo.png", 20), photo("b/photo.png", 200)
    _, result = run(a)
    code, _ = run(b)
    assert code == EXIT_SKIPPED and lightness(result / "photo.png") < 20
    said = capsys.readouterr()
    assert said.err.splitlines() == [
        f"skipped {b}: {result}/photo.png is the result of {a}; choose another --result_path"
    ]
    assert said.out.splitlines()[-1].endswith("0 images colorized, 1 skipped")
    assert run(b, "--skip_existing")[0] == 0 and lightness(result / "photo.png") > 70  # its own
    assert run(b)[0] == 0


def test_result_without_a_record_is_overwritten(run, photo):
    _, result = run(photo("a/photo.png", 20))
    (result / "coloring.jsonl").unlink()
    assert run(photo("b/photo.png", 200))[0] == 0 and lightness(result / "photo.png") > 70


def test_records_pair_results_with_their_images(run, photo, capsys):
    jpg = photo("in/p.jpg", 20)
    _, result = run("in")
    bmp = photo("in/p.bmp", 200)  # takes the name p from now on
    (pair,), left_out = pair_images("in", result)
    assert pair[1:] == (os.path.join("in", jpg.name), str(result / "p.png")) and list(left_out) == ["no colored image"]
    run("in", "--skip_existing")
    pairs, left_out = pair_images("in", result)
    assert {x[1]: x[2] for x in pairs} == {
        os.path.join("in", bmp.name): str(result / "p.png"),
        os.path.join("in", jpg.name): str(result / "p.jpg.png"),
    }
    assert not left_out and "by name" not in capsys.readouterr().err


def test_images_that_were_moved_are_paired_by_name_with_one_note(run, photo, tmp_path, capsys):
    for name in ("x/a.png", "b.png"):
        photo(f"in/{name}")
    _, result = run("in")
    (tmp_path / "in").rename(tmp_path / "moved")
    capsys.readouterr()
    pairs, left_out = pair_images("moved", result)
    assert [x[0] for x in pairs] == ["b", "x/a"] and not left_out
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"{result}: 2 images paired by name, without a record of the original"


def test_no_name_is_lost_among_several_files(run, photo, tmp_path):
    names = (photo("x.tif.png"), "x.png", "x.tif")
    for name in names[1:]:
        photo(name)
    _, result = run(names)
    assert sorted(path.name for path in result.glob("*.png")) == ["x.png", "x.tif.png", "x.tif.png.png"]


def test_a_folder_in_place_of_a_result_skips_one_image(run, photo, tmp_path, capsys):
    for name in "ab":
        photo(f"in/{name}.jpg")
    (tmp_path / "result" / "a.png").mkdir(parents=True)
    code, result = run("in")
    assert code == EXIT_SKIPPED and (result / "b.png").is_file()
    assert capsys.readouterr().err.startswith(f"skipped in{os.sep}a.jpg: {result}/a.png is a folder")


def test_patterns_that_the_shell_did_not_expand(run, photo):
    for name in ("in/a1.png", "in/a2.png", "in/b.png", "in/[x].png"):
        photo(name)
    _, result = run(("in/a*.png", "in/[x].png"))
    assert sorted(path.name for path in result.glob("*.png")) == ["[x].png", "a1.png", "a2.png"]


# Reading, the network and writing


def test_images_are_read_once_and_written_in_order_of_names(run, photo, monkeypatch):
    for name, angle in zip("abcd", (0, 90, 0, 90)):
        path = photo(f"in/{name}.png")
        Image.open(path).rotate(angle, expand=True).save(path)
    opened, original = [], Image.open
    monkeypatch.setattr(
        Image, "open", lambda path, *args, **settings: opened.append(path) or original(path, *args, **settings)
    )
    _, result = run("in")
    assert [os.path.basename(path) for path in opened] == ["a.png", "b.png", "c.png", "d.png"]
    records = [json.loads(line) for line in (result / "coloring.jsonl").read_text().splitlines() if line]
    assert [record["result"]["path"] for record in records] == ["a.png", "b.png", "c.png", "d.png"]


def test_threads_stay_within_the_pixels_ahead():
    taken = []

    def jobs():
        for i in range(20):
            taken.append(i)
            yield test.PIXELS_AHEAD // 4, partial(int, i)

    with test.background_threads(2) as pool:
        for i, result in enumerate(test.in_threads(pool, jobs())):
            assert result == i and len(taken) - i <= 5  # four, and the next, which waits


def photograph(width, height, count=1):
    image = Image.fromarray(data.coffee()).resize((width, height))
    rgb = paddle.to_tensor(np.stack([np.asarray(image).transpose(2, 0, 1)] * count))
    return rgb_to_lab(rgb)[:, :1] - 50


def predicted(predict, lightness):
    return annealed_mean(predict(lightness), load_ab_bins()).numpy()


def test_engine_equals_eager_mode_at_any_size(trained, capsys):
    eager = colorizer.eager_predictor(trained, "float32")
    engine, _ = colorizer.make_predictor(trained, "float32")
    assert "slower way" not in capsys.readouterr().err
    for size in ((64, 64), (120, 72), (72, 120, 3), (8, 8), (64, 64)):
        assert np.abs(predicted(engine, photograph(*size)) - predicted(eager, photograph(*size))).max() < 0.01


def test_bf16_changes_colors_little(trained):
    (exact, _), (bf16, _) = colorizer.make_predictor(trained, "float32"), colorizer.make_predictor(trained, "bf16")
    lightness = photograph(120, 72)
    assert np.abs(predicted(exact, lightness) - predicted(bf16, lightness)).mean() < 0.5


@pytest.mark.parametrize(
    ("supported", "paddles", "precision"),
    [(True, "3.3.1", "bf16"), (True, "3.0.0", "bf16"), (True, "2.6.2", "float32"), (False, "3.3.1", "float32")],
)
def test_auto_is_bf16_where_the_cpu_supports_it(supported, paddles, precision, run, photographs, monkeypatch, capsys):
    monkeypatch.setattr(paddle.base.core, "supports_bfloat16_fast_performance", lambda: supported)
    monkeypatch.setattr(paddle, "__version__", paddles)
    monkeypatch.setattr(colorizer, "engine_predictor", lambda *_: lambda x: paddle.zeros([1, 313, 64, 64]))
    code, result = run(photographs / "coffee.png", "--precision", "auto", "--crop_size", 256)
    assert code == 0 and capsys.readouterr().out.strip().endswith(f"epoch_19_model.pdparams in {precision}")
    assert json.loads((result / "coloring.json").read_text())["precision"] == precision


def test_bf16_on_a_gpu_without_it_prints_one_line_and_computes_in_float32(monkeypatch, capsys):
    monkeypatch.setattr(paddle, "get_device", lambda: "gpu:0")
    monkeypatch.setattr(colorizer, "eager_predictor", lambda checkpoint, precision: precision)
    for generation, precision in ((7, "float32"), (8, "bf16")):
        monkeypatch.setattr(paddle.device.cuda, "get_device_capability", lambda generation=generation: (generation, 0))
        assert colorizer.make_predictor("checkpoint", "bf16") == (precision, precision)
        assert capsys.readouterr().err.count("bf16: not supported") == (precision == "float32")


def test_folded_batch_norm_computes_the_same():
    network = SmallNetwork()
    network(25 * paddle.randn([2, 1, 32, 32]))  # statistics other than 0 and 1
    network.eval()
    x = 25 * paddle.randn([1, 1, 24, 40])
    before = network(x)
    fold_batch_norm(network)
    assert not any(isinstance(layer, paddle.nn.BatchNorm2D) for layer in network.sublayers())
    np.testing.assert_allclose(network(x), before, rtol=1e-4, atol=1e-4)
    assert not network(x).stop_gradient  # gradients are not disabled afterwards


def test_nothing_is_left_next_to_the_checkpoint_or_in_the_temporary_folder(run, tmp_path, photographs, monkeypatch):
    (tmp_path / "猫").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "猫"))  # Paddle writes to it as well
    run(photographs / "coffee.png")
    assert os.listdir(tmp_path / "model") == ["epoch_19_model.pdparams"] and not os.listdir(tmp_path / "猫")


def test_temporary_folder_is_ascii_on_windows(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "猫"))
    monkeypatch.setenv("PUBLIC", str(tmp_path))
    with temporary_folder() as folder:
        assert os.path.dirname(folder) == str(tmp_path)


def test_without_the_engine_results_are_the_same(run, photographs, monkeypatch, capsys):
    coffee = photographs / "coffee.png"
    expected = pixels(run(coffee)[1] / "coffee.png").astype(int)
    monkeypatch.setattr(colorizer, "engine_predictor", lambda *_: 1 / 0)
    for has_engine in (True, False):  # False: Paddle was built without oneDNN
        monkeypatch.setattr("support.inference.has_engine", lambda has_engine=has_engine: has_engine)
        code, result = run(coffee)
        assert code == 0 and np.abs(pixels(result / "coffee.png") - expected).max() <= 1
        assert capsys.readouterr().err.count("slower way") == has_engine


def test_last_line_says_how_far_the_weights_were_trained(run, photographs, monkeypatch, capsys):
    monkeypatch.setattr(test, "checkpoint_info", lambda _: {"epoch": 0, "step": 3})
    run(photographs / "coffee.png")
    assert capsys.readouterr().out.endswith("epoch_19_model.pdparams (epoch 0, 3 steps) in float32\n")


# Usage errors


def test_usage_errors_are_one_line(run, tmp_path, photographs, stopped):
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    coffee = photographs / "coffee.png"

    def message(images, *flags, **settings):
        return stopped(lambda _: run(images, *flags, **settings), None)

    assert "missing: no such file" in message(tmp_path / "missing")
    assert "empty: no images" in message(tmp_path / "empty")
    assert "available: --load_model 19" in message(coffee, "--load_model", 7)
    assert "multiple of 8" in message(coffee, "--crop_size", 100)
    assert "larger than --load_size" in message(coffee, "--crop_size", 512)
    assert "cannot be written" in message(coffee, result="file/result")
    assert "contains input images" in message(coffee, result=photographs)
    os.link(coffee, tmp_path / "COFFEE.png")  # the same file by another name, as on a case-insensitive disk
    assert "overwrite" in message(coffee, "--output", tmp_path / "COFFEE.png")


def test_checkpoint_by_its_path(run, tmp_path, photographs):
    code, _ = run(photographs / "coffee.png", "--load_model", tmp_path / "model" / "epoch_19_model.pdparams")
    assert code == 0


def test_checkpoints_that_do_not_fit_are_refused(run, tmp_path, photographs, stopped):
    path = tmp_path / "model" / "epoch_19_model.pdparams"
    whole = path.read_bytes()

    def message():
        return stopped(lambda _: run(photographs / "coffee.png"), None)

    path.write_bytes(whole[: len(whole) // 2])
    assert "not a readable checkpoint" in message()
    save_checkpoint(paddle.nn.Linear(2, 2).state_dict(), path)
    assert "another network" in message()
    state = run.network.state_dict()
    state["head.bias"] = state["head.bias"] * float("nan")
    save_checkpoint(state, path)
    assert "not finite" in message() and "head.bias" in message()
