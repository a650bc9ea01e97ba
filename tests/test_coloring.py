"""`test.py`: results, their sizes, formats and records."""

import json
import os
from functools import partial
from types import SimpleNamespace

from support import sheets
from support.checkpoints import load_checkpoint, save_checkpoint, save_safetensors
from support.cli import EXIT_SKIPPED
from support.folders import pair_images as pair
from support.inference import fold_batch_norm, temporary_folder

import numpy as np
import paddle
import pytest
from conftest import SmallNetwork, bundled_image, upsample_by_scipy
from PIL import Image
from skimage import color

import colorizer
import test
from dataset import COLORING, RECORDS, lab_to_rgb, rgb_to_lab, to_uint8
from utils import annealed_mean, load_ab_bins


def pair_images(originals, results):
    return pair(originals, results, COLORING, RECORDS)


def pixels(path):
    return np.asarray(Image.open(path))


def largest_difference(one, other):
    return np.abs(np.subtract(one, other, dtype=int)).max()


def test_results_keep_the_subfolder_and_size_of_their_images(colorize_files, tmp_path, image_folder):
    nested = tmp_path / "in"
    for i, path in enumerate(sorted(image_folder.iterdir())):
        (nested / f"class {i}").mkdir(parents=True)
        os.link(path, nested / f"class {i}" / path.name)
    code, result = colorize_files(nested)
    assert code == 0
    for path in nested.rglob("*.png"):
        assert pixels(result / path.relative_to(nested)).shape == pixels(path).shape
    assert len(list(result.rglob("*.png"))) == 4


def test_result_keeps_the_lightness_of_its_image(colorize_files, image_folder):
    _, result = colorize_files(image_folder, "--temperature", 1000)
    for path in image_folder.iterdir():
        before, after = (color.rgb2lab(pixels(p))[..., 0] for p in (path, result / path.name))
        assert np.abs(before - after).mean() < 0.5  # colors out of gamut are clipped, which moves L a little


def test_result_equals_step_by_step_computation(colorize_files, small_checkpoint, tmp_path):
    """The image is large enough to be converted in two strips."""
    image = bundled_image("coffee").resize((480, 320))
    assert colorizer.STRIP_PIXELS < 480 * 320
    image.save(tmp_path / "coffee.png")
    _, result = colorize_files("coffee.png", "--load_size", 64)
    small = np.asarray(image.resize((96, 64), Image.Resampling.BILINEAR))
    network = SmallNetwork()
    network.set_state_dict(load_checkpoint(small_checkpoint))
    network.eval()
    with paddle.no_grad():
        lightness = rgb_to_lab(paddle.to_tensor(small.transpose(2, 0, 1)[None]))[:, :1]
        ab = annealed_mean(network(lightness - 50), load_ab_bins())
    full = rgb_to_lab(paddle.to_tensor(np.asarray(image).transpose(2, 0, 1)[None]))
    ab = paddle.to_tensor(upsample_by_scipy(ab[0].numpy(), *full.shape[2:])[None].astype(np.float32))
    expected = to_uint8(lab_to_rgb(paddle.concat([full[:, :1], ab], axis=1)))[0].transpose([1, 2, 0]).numpy()
    assert largest_difference(pixels(result / "coffee.png"), expected) <= 1


def test_batch_size_does_not_change_results(colorize_files, image_folder):
    _, single = colorize_files(image_folder, "--batch_size", 1, result="single")
    _, batches = colorize_files(image_folder, "--batch_size", 3, "--num_workers", 1, result="batches")
    for path in image_folder.iterdir():
        assert largest_difference(pixels(single / path.name), pixels(batches / path.name)) <= 1


def test_batch_of_large_images_ends_early():
    image = SimpleNamespace(width=5000, height=4000)  # 20 megapixels
    items = [test.Item("a.png", "a.png", image, np.zeros([8, 8, 3], np.uint8))] * 5
    assert [len(batch) for batch in test.batches(items, 8)] == [2, 2, 1]


def test_network_input_keeps_the_aspect_ratio_in_multiples_of_8():
    assert colorizer.network_size(500, 375, 256) == (344, 256)
    assert colorizer.network_size(375, 500, 256) == (256, 344)
    assert colorizer.network_size(50, 50, 256) == (256, 256)
    assert colorizer.network_size(10_000, 10, 256) == (2048, 256)  # squeezed, so that memory is bounded
    assert colorizer.network_size(3, 3, 4) == (8, 8)


def test_crop_size_flag_gives_center_crops(colorize_files, image_folder):
    _, result = colorize_files(image_folder, "--load_size", 72, "--crop_size", 64)
    for path in result.rglob("*.png"):
        assert pixels(path).shape == (64, 64, 3)
    whole = color.rgb2lab(np.asarray(Image.open(image_folder / "rocket.png").resize((108, 72), Image.BILINEAR)))
    left = (whole.shape[1] - 64) // 2
    crop = color.rgb2lab(pixels(result / "rocket.png"))[..., 0]
    assert np.abs(crop - whole[4:68, left : left + 64, 0])[1:-1, 1:-1].mean() < 1


def test_images_with_names_of_any_bytes_are_colorized_and_recorded(colorize_files, tmp_path, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    for name in (b"caf\xe9.png", "猫.png".encode(), b"a\nb.png", b"-rf.png", b"a b.png"):
        Image.new("RGB", (16, 16), "gray").save(os.fsdecode(os.path.join(os.fsencode(folder), name)))
    code, result = colorize_files(folder)
    assert code == 0
    written = set(os.listdir(os.fsencode(result))) - {b"coloring.json", b"coloring.jsonl"}
    assert written == set(os.listdir(os.fsencode(folder)))
    assert colorize_files(folder, "--skip_existing")[0] == 0 and "all are up to date" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("existing", "used"),
    [
        (("19", "latest", "20"), "19"),
        (("3", "latest", "best"), "latest"),
        (("9", "10", "best"), "10"),
        (("official",), "official"),
    ],
)
def test_without_load_model_the_preferred_checkpoint_of_the_folder_is_used(
    colorize_files, small_checkpoint, image_folder, tmp_path, capsys, existing, used
):
    weights = small_checkpoint.rename(tmp_path / "weights")
    for name in existing:
        os.link(weights, small_checkpoint.with_name(f"epoch_{name}_model.pdparams"))
    assert colorize_files(image_folder / "coffee.png")[0] == 0
    printed = capsys.readouterr()
    path = small_checkpoint.with_name(f"epoch_{used}_model.pdparams")
    assert printed.out.splitlines()[-1].endswith(f"colorized with {path} in float32")
    assert ("no --load_model" in printed.err and used in printed.err) == (used != "19")


def test_missing_checkpoint_lists_the_existing_ones(colorize_files, small_checkpoint, image_folder, error_message):
    coffee, models = image_folder / "coffee.png", small_checkpoint.parent
    latest = small_checkpoint.rename(models / "epoch_latest_model.pdparams")
    assert "available: --load_model latest" in error_message(colorize_files, coffee, "--load_model", 19)
    best = latest.rename(models / "epoch_best_model.pdparams")
    os.link(best, models / "epoch_norebal_model.pdparams")
    assert "available: --load_model best, norebal" in error_message(colorize_files, coffee)  # neither is preferred
    for path in models.iterdir():
        path.unlink()
    message = error_message(colorize_files, coffee, "--load_model", 19)
    assert all(word in message for word in ("train.py", "small", "official"))
    assert error_message(colorize_files, coffee, "--load_model", "x.pdparams") == "x.pdparams: no such checkpoint"


def test_size_and_temperature_default_to_those_in_the_checkpoint(colorize_files, small_checkpoint, image_folder):
    wide = small_checkpoint.with_name("epoch_wide_model.safetensors")
    save_safetensors(load_checkpoint(small_checkpoint), wide, {"load_size": "40", "temperature": "0.7"})
    written = []
    for flags, size, temperature in (((), 40, 0.7), (("--load_size", 64, "--temperature", 0.1), 64, 0.1)):
        _, result = colorize_files(image_folder / "coffee.png", "--load_model", "wide", *flags, result=f"at_{size}")
        made_by = json.loads((result / "coloring.json").read_text())
        assert (made_by["load_size"], made_by["temperature"]) == (size, temperature)
        written.append(pixels(result / "coffee.png"))
    colorize = colorizer.Colorizer(wide, precision="float32")
    assert np.array_equal(colorize(image_folder / "coffee.png"), written[0])
    assert np.array_equal(colorize(image_folder / "coffee.png", 0.1, 64), written[1])


def test_compare_flag_writes_contact_sheets_next_to_the_results(colorize_files, image_folder):
    _, result = colorize_files(image_folder, "--compare", result="result/")  # with a separator at its end
    assert len(list(result.rglob("*.png"))) == 4
    sheet = pixels(result.with_name("result_compare") / "sheet_001.png")
    assert sheet.shape[1] > 3 * 320 and sheet.std() > 10


def test_contact_sheet_shows_names_of_any_length_and_script():
    images = [Image.new("RGB", size) for size in ((320, 200), (180, 240), (320, 240))]
    names = ("", "a", "é/猫.ж", "long " * 100)
    drawn = [np.asarray(sheets.contact_sheet([(name, images)], test.COLUMNS)) for name in names]
    shape = (sheets.HEAD + 240 + sheets.FOOT, 3 * (320 + sheets.MARGIN) + sheets.MARGIN, 3)
    assert {sheet.shape for sheet in drawn} == {shape}
    written = [(sheet[sheets.HEAD + 240 :] < 200).sum() for sheet in drawn]
    assert 0 == written[0] < written[1] < written[2] < written[3]
    margins = drawn[3][sheets.HEAD + 240 :, [*range(sheets.MARGIN - 2), *range(2 - sheets.MARGIN, 0)]]
    assert (margins == 255).all()
    for size in ((8, 8), (3000, 20)):  # small ones are enlarged
        thumbnail = sheets.fit(Image.new("RGB", size))
        assert thumbnail.height == 240 or thumbnail.width == 320


@pytest.mark.parametrize(("installed", "used"), [("DejaVu Serif", "DejaVu Serif"), ("no such font", "DejaVu Sans")])
def test_east_asian_names_use_an_installed_font(monkeypatch, installed, used):
    """DejaVu Serif, which matplotlib bundles, stands for a font with East Asian characters."""
    monkeypatch.setattr(sheets, "EAST_ASIAN", (installed,))
    families = [sheets.font(14, text).getname()[0] for text in ("旅行/a", "커피", "é/ж")]
    assert families == [used, used, "DejaVu Sans"]


# Records of where results came from


@pytest.fixture
def write_image(tmp_path):
    """Write a small gradient from a gray level to white. Return its path."""

    def write(name, level=100):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.linspace(level, 255, 16 * 24, dtype=np.uint8).reshape(16, 24)).save(path)
        return path

    return write


def lowest_lightness(path):
    return color.rgb2lab(pixels(path))[..., 0].min()


def test_skip_existing_colorizes_missing_results_and_those_of_other_settings(colorize_files, write_image, capsys):
    for name in "abc":
        write_image(f"in/{name}.png")
    _, result = colorize_files("in", "--max_samples", 2)
    assert sorted(path.name for path in result.glob("*.png")) == ["a.png", "b.png"]

    def times_after(*flags):
        capsys.readouterr()
        colorize_files("in", *flags, "--skip_existing")
        return [(result / f"{name}.png").stat().st_mtime_ns for name in "abc"], capsys.readouterr().out

    before = (result / "a.png").stat().st_mtime_ns
    first, printed = times_after()
    assert ": 1 image colorized" in printed and first[0] == before
    colorize_files("in", "--temperature", 1, "--max_samples", 1)
    second, printed = times_after("--temperature", 1)
    assert ": 2 images colorized" in printed and all(a != b for a, b in zip(first, second))
    assert json.loads((result / "coloring.json").read_text())["temperature"] == 1
    assert "0 images colorized, all are up to date" in times_after("--temperature", 1)[1]


@pytest.mark.parametrize("change", ["source", "result", "record", "format"])
def test_skip_existing_colorizes_again_when_a_file_or_its_record_changed(colorize_files, write_image, capsys, change):
    _, result = colorize_files(write_image("in/a.png"))
    flags = ("--skip_existing",)
    if change == "source":
        write_image("in/a.png", 50)
    elif change == "result":
        os.utime(result / "a.png", ns=(0, 0))
    elif change == "record":
        records = result / "coloring.jsonl"
        records.write_text(records.read_text()[:-9])  # a kill cut it short
    else:
        flags += ("--format", "jpg")
    for done in (1, 0):
        colorize_files("in", *flags)
        assert f": {done} image" in capsys.readouterr().out.splitlines()[-1]


def test_result_of_another_source_is_not_overwritten(colorize_files, write_image, capsys):
    a, b = write_image("a/x.png", 20), write_image("b/x.png", 200)
    _, result = colorize_files(a)
    code, _ = colorize_files(b)
    assert code == EXIT_SKIPPED and lowest_lightness(result / "x.png") < 20
    printed = capsys.readouterr()
    assert printed.err == f"skipped {b}: {result}/x.png is the result of {a}; choose another --result_path\n"
    assert printed.out.splitlines()[-1].endswith("0 images colorized, 1 skipped")
    assert colorize_files(b, "--skip_existing")[0] == 0 and lowest_lightness(result / "x.png") > 70
    assert colorize_files(b)[0] == 0  # now it is the result of b


def test_result_without_a_record_is_overwritten(colorize_files, write_image):
    _, result = colorize_files(write_image("a/x.png", 20))
    (result / "coloring.jsonl").unlink()
    assert colorize_files(write_image("b/x.png", 200))[0] == 0 and lowest_lightness(result / "x.png") > 70


def test_records_pair_results_with_their_images(colorize_files, write_image, capsys):
    jpg = write_image("in/p.jpg", 20)
    _, result = colorize_files("in")
    bmp = write_image("in/p.bmp", 200)  # takes the name p from now on
    (pair,), left_out = pair_images("in", result)
    assert pair[1:] == (os.path.join("in", jpg.name), str(result / "p.png")) and list(left_out) == ["no result"]
    colorize_files("in", "--skip_existing")
    pairs, left_out = pair_images("in", result)
    assert {x[1]: x[2] for x in pairs} == {
        os.path.join("in", bmp.name): str(result / "p.png"),
        os.path.join("in", jpg.name): str(result / "p.jpg.png"),
    }
    assert not left_out and "by name" not in capsys.readouterr().err


def test_images_that_were_moved_are_paired_by_name_with_one_note(colorize_files, write_image, tmp_path, capsys):
    for name in ("x/a.png", "b.png"):
        write_image(f"in/{name}")
    _, result = colorize_files("in")
    (tmp_path / "in").rename(tmp_path / "moved")
    capsys.readouterr()
    pairs, left_out = pair_images("moved", result)
    assert [x[0] for x in pairs] == ["b", "x/a"] and not left_out
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"{result}: 2 images paired by name, without a record of the original"


def test_several_files_with_colliding_names_all_get_results(colorize_files, write_image):
    _, result = colorize_files(tuple(write_image(name) for name in ("x.tif.png", "x.png", "x.tif")))
    assert sorted(path.name for path in result.glob("*.png")) == ["x.png", "x.tif.png", "x.tif.png.png"]


def test_folder_in_place_of_a_result_skips_one_image(colorize_files, write_image, tmp_path, capsys):
    for name in "ab":
        write_image(f"in/{name}.jpg")
    (tmp_path / "result" / "a.png").mkdir(parents=True)
    code, result = colorize_files("in")
    assert code == EXIT_SKIPPED and (result / "b.png").is_file()
    assert capsys.readouterr().err.startswith(f"skipped in{os.sep}a.jpg: {result}/a.png is a folder")


def test_patterns_that_the_shell_did_not_expand_are_expanded(colorize_files, write_image):
    for name in ("in/a1.png", "in/a2.png", "in/b.png", "in/[x].png"):
        write_image(name)
    _, result = colorize_files(("in/a*.png", "in/[x].png"))
    assert sorted(path.name for path in result.glob("*.png")) == ["[x].png", "a1.png", "a2.png"]


# Reading, the network and writing


def test_images_are_opened_once_and_written_in_the_order_of_their_names(colorize_files, write_image, monkeypatch):
    for name, angle in zip("abcd", (0, 90, 0, 90)):
        path = write_image(f"in/{name}.png")
        Image.open(path).rotate(angle, expand=True).save(path)
    opened, original = [], Image.open
    monkeypatch.setattr(
        Image, "open", lambda path, *args, **settings: opened.append(path) or original(path, *args, **settings)
    )
    _, result = colorize_files("in")
    assert [os.path.basename(path) for path in opened] == ["a.png", "b.png", "c.png", "d.png"]
    records = [json.loads(line) for line in (result / "coloring.jsonl").read_text().splitlines() if line]
    assert [record["result"]["path"] for record in records] == ["a.png", "b.png", "c.png", "d.png"]


def test_threads_read_ahead_by_a_limited_number_of_pixels():
    started = []

    def jobs():
        for i in range(20):
            started.append(i)
            yield test.PIXELS_AHEAD // 4, partial(int, i)

    with test.background_threads(2) as pool:
        for i, result in enumerate(test.in_threads(pool, jobs())):
            assert result == i and len(started) - i <= 5  # four, and the next, which waits


def predict_ab(predict, width, height, count=1):
    """Return the predicted ab of copies of an image at a size."""
    rgb = np.asarray(bundled_image("coffee").resize((width, height))).transpose(2, 0, 1)
    lightness = rgb_to_lab(paddle.to_tensor(np.stack([rgb] * count)))[:, :1] - 50
    return annealed_mean(predict(lightness), load_ab_bins()).numpy()


def test_engine_equals_eager_mode_at_any_size(cic_checkpoint, capsys):
    eager = colorizer.eager_predictor(cic_checkpoint, "float32")
    engine, _ = colorizer.make_predictor(cic_checkpoint, "float32")
    assert "slower way" not in capsys.readouterr().err
    for size in ((64, 64), (120, 72), (72, 120, 3), (8, 8), (64, 64)):
        assert np.abs(predict_ab(engine, *size) - predict_ab(eager, *size)).max() < 0.01


def test_bf16_changes_predicted_ab_little(cic_checkpoint):
    exact, bf16 = (colorizer.make_predictor(cic_checkpoint, name)[0] for name in ("float32", "bf16"))
    assert np.abs(predict_ab(exact, 120, 72) - predict_ab(bf16, 120, 72)).mean() < 0.5


@pytest.mark.parametrize(
    ("supported", "paddles", "precision"),
    [(True, "3.3.1", "bf16"), (True, "3.0.0", "bf16"), (True, "2.6.2", "float32"), (False, "3.3.1", "float32")],
)
def test_auto_precision_is_bf16_where_the_cpu_supports_it(
    supported, paddles, precision, colorize_files, image_folder, monkeypatch, capsys
):
    monkeypatch.setattr(paddle.base.core, "supports_bfloat16_fast_performance", lambda: supported)
    monkeypatch.setattr(paddle, "__version__", paddles)
    monkeypatch.setattr(colorizer, "engine_predictor", lambda *_: lambda x: paddle.zeros([1, 313, 16, 16]))
    code, result = colorize_files(image_folder / "coffee.png", "--precision", "auto", "--crop_size", 64)
    assert code == 0 and capsys.readouterr().out.strip().endswith(f"epoch_19_model.pdparams in {precision}")
    assert json.loads((result / "coloring.json").read_text())["precision"] == precision


@pytest.mark.parametrize(("generation", "precision"), [(7, "float32"), (8, "bf16")])
def test_bf16_on_a_gpu_without_it_prints_one_line_and_computes_in_float32(
    generation, precision, pretend_device, small_checkpoint, capsys
):
    pretend_device("gpu:0", generation, 0)
    assert colorizer.make_predictor(small_checkpoint, "bf16")[1] == precision
    assert capsys.readouterr().err.count("bf16: not supported") == (precision == "float32")


def test_folded_batch_norm_does_not_change_the_output():
    network = SmallNetwork()
    network(25 * paddle.randn([2, 1, 32, 32]))  # statistics other than 0 and 1
    network.eval()
    x = 25 * paddle.randn([1, 1, 24, 40])
    before = network(x)
    fold_batch_norm(network)
    assert not any(isinstance(layer, paddle.nn.BatchNorm2D) for layer in network.sublayers())
    np.testing.assert_allclose(network(x), before, rtol=1e-4, atol=1e-4)
    assert not network(x).stop_gradient  # gradients are not disabled afterwards


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """Make an empty folder for temporary files, those of Paddle, too."""
    (tmp_path / "猫").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "猫"))
    return tmp_path / "猫"


def test_run_leaves_nothing_next_to_the_checkpoint_or_in_the_temporary_folder(
    colorize_files, small_checkpoint, image_folder, temporary
):
    colorize_files(image_folder / "coffee.png")
    assert os.listdir(small_checkpoint.parent) == [small_checkpoint.name] and not os.listdir(temporary)


def test_temporary_folder_has_an_ascii_name_on_windows(tmp_path, temporary, monkeypatch):
    monkeypatch.setenv("PUBLIC", str(tmp_path))
    with temporary_folder() as folder:
        assert os.path.dirname(folder) == str(tmp_path)


@pytest.mark.parametrize("has_engine", [True, False])
def test_results_are_the_same_without_the_engine(colorize_files, image_folder, monkeypatch, capsys, has_engine):
    """The engine fails, or Paddle was built without oneDNN."""
    coffee = image_folder / "coffee.png"
    expected = pixels(colorize_files(coffee)[1] / "coffee.png")
    monkeypatch.setattr(colorizer, "engine_predictor", lambda *_: 1 / 0)
    monkeypatch.setattr("support.inference.has_engine", lambda: has_engine)
    code, result = colorize_files(coffee)
    assert code == 0 and largest_difference(pixels(result / "coffee.png"), expected) <= 1
    assert capsys.readouterr().err.count("slower way") == has_engine


def test_last_line_reports_how_long_the_weights_were_trained(colorize_files, small_checkpoint, image_folder, capsys):
    trained = {"load_size": np.array(64), "epoch": np.array(0), "step": np.array(3)}
    save_checkpoint({**load_checkpoint(small_checkpoint), **trained}, small_checkpoint)
    colorize_files(image_folder / "coffee.png")
    assert capsys.readouterr().out.endswith("epoch_19_model.pdparams (epoch 0, 3 steps) in float32\n")


# Usage errors


def test_usage_errors_print_one_line(colorize_files, tmp_path, image_folder, error_message):
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    coffee = image_folder / "coffee.png"
    assert "missing: no such file" in error_message(colorize_files, tmp_path / "missing")
    assert "empty: no images" in error_message(colorize_files, tmp_path / "empty")
    assert "multiple of 8" in error_message(colorize_files, coffee, "--crop_size", 100)
    assert "larger than --load_size" in error_message(colorize_files, coffee, "--crop_size", 512)
    assert "cannot be written" in error_message(colorize_files, coffee, result="file/result")
    os.link(coffee, tmp_path / "COFFEE.png")  # the same file by another name, as on a case-insensitive disk
    assert "overwrite" in error_message(colorize_files, coffee, "--output", tmp_path / "COFFEE.png")
