"""`test.py`: photographs in, colored photographs out."""

import json
import os

from support import sheets
from support.checkpoints import load_checkpoint, save_checkpoint, save_safetensors
from support.cli import EXIT_SKIPPED
from support.inference import fold_batch_norm

import numpy as np
import paddle
import pytest
from conftest import SmallNetwork, upsampled
from PIL import Image
from skimage import color, data

import colorizer
import test
from dataset import lab_to_rgb, rgb_to_lab, to_uint8
from pretrained import load_network
from utils import annealed_mean, load_ab_bins

EXACT = ("--precision", "float32")  # the tests compare with what is computed in other ways


@pytest.fixture
def run(tmp_path, small_network):
    """Colors with a random small network. Returns the exit code and the folder of results."""
    paddle.seed(0)
    network = SmallNetwork()
    save_checkpoint(network.state_dict(), tmp_path / "model" / "epoch_19_model.pdparams")

    def run(images, *flags, result="result"):
        where = ["--model_path", str(tmp_path / "model"), "--result_path", str(tmp_path / result), *EXACT]
        return test.main(test.parse_args([str(images), *where, *map(str, flags)])), tmp_path / result

    run.network = network
    return run


def pixels(path):
    return np.asarray(Image.open(path))


def test_every_photograph_keeps_its_place_and_its_size(run, tmp_path, photographs):
    nested = tmp_path / "in"
    for i, path in enumerate(sorted(photographs.iterdir())):
        (nested / f"class {i}").mkdir(parents=True)
        os.link(path, nested / f"class {i}" / path.name)
    code, result = run(nested)
    assert code == 0
    for path in nested.rglob("*.png"):
        assert pixels(result / path.relative_to(nested)).shape == pixels(path).shape
    assert len(list(result.rglob("*.png"))) == 4


def test_lightness_stays_the_photographs_own(run, photographs):
    _, result = run(photographs, "--temperature", 1000)
    for path in photographs.iterdir():
        before, after = (color.rgb2lab(pixels(p))[..., 0] for p in (path, result / path.name))
        assert np.abs(before - after).mean() < 0.5  # colors out of gamut are clipped, which moves L a little


def test_a_result_is_the_networks_ab_upsampled_bilinearly(run, photographs):
    """Step by step, without strips, batches and threads."""
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


def test_strips_and_batches_change_nothing(run, photographs, monkeypatch):
    _, whole = run(photographs, "--batch_size", 1, result="whole")
    monkeypatch.setattr(colorizer, "STRIP_PIXELS", 700)
    monkeypatch.setattr(test, "PIXELS_AHEAD", 20_000)
    _, strips = run(photographs, "--batch_size", 3, "--num_workers", 1, result="strips")
    for path in photographs.iterdir():
        assert np.abs(pixels(whole / path.name).astype(int) - pixels(strips / path.name)).max() <= 1


def test_the_network_sees_the_aspect_in_multiples_of_8():
    assert colorizer.network_size(500, 375, 256) == (344, 256)
    assert colorizer.network_size(375, 500, 256) == (256, 344)
    assert colorizer.network_size(50, 50, 256) == (256, 256)
    assert colorizer.network_size(10_000, 10, 256) == (2048, 256)  # squeezed, so that memory is bounded
    assert colorizer.network_size(3, 3, 4) == (8, 8)


def test_squares_as_papers_evaluate(run, photographs):
    _, result = run(photographs, "--load_size", 72, "--crop_size", 64)
    for path in result.rglob("*.png"):
        assert pixels(path).shape == (64, 64, 3)
    gray_photo = color.rgb2lab(np.asarray(Image.open(photographs / "rocket.png").resize((108, 72), Image.BILINEAR)))
    left = (gray_photo.shape[1] - 64) // 2
    own = color.rgb2lab(pixels(result / "rocket.png"))[..., 0]
    assert np.abs(own - gray_photo[4:68, left : left + 64, 0])[1:-1, 1:-1].mean() < 1


def test_temperature_makes_colors_duller(run, photographs):
    chroma = []
    for temperature in (0.01, 1):
        _, result = run(photographs / "coffee.png", "--temperature", temperature)
        chroma.append(np.hypot(*color.rgb2lab(pixels(result / "coffee.png"))[..., 1:].transpose(2, 0, 1)).mean())
    assert chroma[0] > chroma[1] + 5


def test_gray_alpha_palette_cmyk_16_bit_and_turned_photographs(run, tmp_path):
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


def test_a_file_that_cannot_be_read_costs_a_line_and_the_exit_code(run, tmp_path, photographs, capsys):
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


def test_names_that_differ_in_the_suffix_alone_both_get_results(run, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    Image.new("RGB", (16, 16), "gray").save(folder / "a.jpg")
    Image.new("RGB", (24, 16), "gray").save(folder / "a.png")
    _, result = run(folder)
    assert pixels(result / "a.png").shape == (16, 16, 3) and pixels(result / "a.png.png").shape == (16, 24, 3)


def test_names_of_any_bytes(run, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for name in (b"caf\xe9.png", "猫.png".encode(), b"a\nb.png", b"-rf.png", b"a b.png"):
        Image.new("RGB", (16, 16), "gray").save(os.fsdecode(os.path.join(os.fsencode(folder), name)))
    code, result = run(folder)
    assert code == 0 and set(os.listdir(os.fsencode(result))) - {b"coloring.json"} == set(
        os.listdir(os.fsencode(folder))
    )


def test_max_samples_and_skip_existing(run, photographs, capsys):
    _, result = run(photographs, "--max_samples", 2)
    assert [p.name for p in sorted(result.glob("*.png"))] == ["astronaut.png", "chelsea.png"]
    before = (result / "astronaut.png").stat().st_mtime_ns
    run(photographs, "--skip_existing")
    assert len(list(result.glob("*.png"))) == 4 and (result / "astronaut.png").stat().st_mtime_ns == before
    assert "2 images colored" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("there", "taken"),
    [
        (("19", "latest", "20"), "19"),
        (("3", "latest", "best"), "latest"),
        (("9", "10", "best"), "10"),
        (("official",), "official"),
    ],
)
def test_without_a_name_the_checkpoint_is_the_one_that_a_user_expects(run, photographs, tmp_path, capsys, there, taken):
    weights = (tmp_path / "model" / "epoch_19_model.pdparams").rename(tmp_path / "weights")
    for name in there:
        os.link(weights, tmp_path / "model" / f"epoch_{name}_model.pdparams")
    assert run(photographs / "coffee.png")[0] == 0
    said = capsys.readouterr()
    assert said.out.splitlines()[-1].endswith(f"colored with {tmp_path}/model/epoch_{taken}_model.pdparams in float32")
    assert (f"no --load_model: taking {taken}" in said.err) == (taken != "19")


def test_a_name_that_was_given_is_taken_at_its_word(run, photographs, tmp_path, stopped):
    def message(*flags):
        return stopped(lambda x: run(photographs / "coffee.png", *x), flags)

    models = tmp_path / "model"
    (models / "epoch_19_model.pdparams").rename(models / "epoch_latest_model.pdparams")
    assert "there are: --load_model latest" in message("--load_model", 19)
    (models / "epoch_latest_model.pdparams").rename(models / "epoch_best_model.pdparams")
    os.link(models / "epoch_best_model.pdparams", models / "epoch_norebal_model.pdparams")
    assert "there are: --load_model best, norebal" in message()  # which of the two, nobody can tell
    for path in models.iterdir():
        path.unlink()
    for word in ("train.py", "small", "official"):
        assert word in message("--load_model", 19)
    assert message("--load_model", "x/model.pdparams") == "x/model.pdparams: no such checkpoint"


def test_a_checkpoint_says_at_which_short_side_it_wants_its_photographs(run, photographs, tmp_path):
    state = load_checkpoint(tmp_path / "model" / "epoch_19_model.pdparams")
    save_safetensors(state, tmp_path / "model" / "epoch_wide_model.safetensors", {"load_size": "40"})
    for flags, size in (((), 40), (("--load_size", 64), 64)):
        _, result = run(photographs / "coffee.png", "--load_model", "wide", *flags, result=f"at_{size}")
        assert json.loads((result / "coloring.json").read_text())["load_size"] == size


def test_compare_writes_sheets_beside_the_results(run, photographs):
    _, result = run(photographs, "--compare")
    assert len(list(result.glob("*.png"))) == 4
    sheet = pixels(result.with_name("result_compare") / "sheet_001.png")
    assert sheet.shape[1] > 3 * 320 and sheet.std() > 10


def test_a_sheet_names_its_photographs_whatever_their_names():
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
    for rgb in ((8, 8), (3000, 20)):  # small ones are enlarged
        pixels = np.zeros((*rgb, 3), np.uint8)
        assert all(
            240 in x.size or 320 in x.size for x in test.thumbnails(test.Photograph("", "", 0, 0, pixels, None, pixels))
        )


def test_east_asian_names_are_in_one_of_the_systems_fonts(monkeypatch):
    def family(text):
        return sheets.font(14, text).getname()[0]

    monkeypatch.setattr(sheets, "EAST_ASIAN", ("DejaVu Serif",))  # stands for one, as matplotlib brings it along
    assert [family(text) for text in ("旅行/a", "커피", "é/ж")] == ["DejaVu Serif", "DejaVu Serif", "DejaVu Sans"]
    monkeypatch.setattr(sheets, "EAST_ASIAN", ("none that there is",))
    assert family("旅行") == "DejaVu Sans"


def test_results_inside_the_folder_are_not_colored_again(run, tmp_path, photographs):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.png").write_bytes((photographs / "coffee.png").read_bytes())
    run(folder, "--compare", result="in/result")
    run(folder, "--compare", result="in/result")
    assert sorted(p.name for p in folder.rglob("*.png")) == ["a.png", "a.png", "sheet_001.png"]


# The fast way beside the plain one


def photograph(width, height, count=1):
    image = Image.fromarray(data.coffee()).resize((width, height))
    rgb = paddle.to_tensor(np.stack([np.asarray(image).transpose(2, 0, 1)] * count))
    return rgb_to_lab(rgb)[:, :1] - 50


def test_the_exported_network_colors_as_the_plain_one_at_any_size(trained, capsys):
    plain = colorizer.eager_predictor(load_network(trained), "float32")
    fast, _ = colorizer.make_predictor(trained, "float32")
    assert "slower way" not in capsys.readouterr().err
    for size in ((64, 64), (120, 72), (72, 120, 3), (8, 8), (64, 64)):
        lightness = photograph(*size)
        assert np.abs(fast(lightness, 0.38).numpy() - plain(lightness, 0.38).numpy()).max() < 0.01


def test_bf16_changes_colors_little(trained, capsys):
    (exact, _), (bf16, _) = colorizer.make_predictor(trained, "float32"), colorizer.make_predictor(trained, "bf16")
    lightness = photograph(120, 72)
    assert np.abs(exact(lightness, 0.38).numpy() - bf16(lightness, 0.38).numpy()).mean() < 0.5


@pytest.mark.parametrize(
    "supported, paddles, precision",
    [(True, "3.3.1", "bf16"), (True, "3.0.0", "bf16"), (True, "2.6.2", "float32"), (False, "3.3.1", "float32")],
)
def test_auto_is_bf16_where_it_can_be(supported, paddles, precision, run, photographs, monkeypatch, capsys):
    monkeypatch.setattr(paddle.base.core, "supports_bfloat16_fast_performance", lambda: supported)
    monkeypatch.setattr(paddle, "__version__", paddles)
    monkeypatch.setattr(colorizer, "engine_predictor", lambda *_: lambda x, _: paddle.zeros([1, 2, 64, 64]))
    code, result = run(photographs / "coffee.png", "--precision", "auto", "--crop_size", 256)
    assert code == 0 and capsys.readouterr().out.strip().endswith(f"epoch_19_model.pdparams in {precision}")
    assert json.loads((result / "coloring.json").read_text())["precision"] == precision


def test_batch_norm_is_folded_without_changing_what_is_computed():
    network = SmallNetwork()
    network(25 * paddle.randn([2, 1, 32, 32]))  # statistics that are not 0 and 1
    network.eval()
    x = 25 * paddle.randn([1, 1, 24, 40])
    before = network(x)
    fold_batch_norm(network)
    assert not any(isinstance(layer, paddle.nn.BatchNorm2D) for layer in network.sublayers())
    np.testing.assert_allclose(network(x), before, rtol=1e-4, atol=1e-4)
    assert not network(x).stop_gradient  # which a `no_grad` that is left wrongly would bring


def test_the_export_is_kept_and_renewed_when_the_checkpoint_changes(run, tmp_path, photographs):
    coffee = photographs / "coffee.png"
    _, result = run(coffee)
    stamp = tmp_path / "model" / "epoch_19_model.exported" / "stamp"
    before, made = pixels(result / "coffee.png"), stamp.stat().st_mtime_ns
    run(coffee)
    assert stamp.stat().st_mtime_ns == made
    paddle.seed(7)
    save_checkpoint(SmallNetwork().state_dict(), tmp_path / "model" / "epoch_19_model.pdparams")
    run(coffee)
    assert stamp.stat().st_mtime_ns != made and not np.array_equal(pixels(result / "coffee.png"), before)


def test_without_the_engine_the_plain_way_serves_and_says_so(run, photographs, monkeypatch, capsys):
    def missing(*_):
        raise RuntimeError("no such engine")

    _, fast = run(photographs / "coffee.png", result="fast")
    monkeypatch.setattr(colorizer, "engine_predictor", missing)
    code, plain = run(photographs / "coffee.png", result="plain")
    assert code == 0 and capsys.readouterr().err.count("slower way") == 1
    assert np.abs(pixels(fast / "coffee.png").astype(int) - pixels(plain / "coffee.png")).max() <= 1


# What the user can get wrong


def test_mistakes_give_one_line(run, tmp_path, photographs, stopped):
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    coffee = photographs / "coffee.png"

    def message(images, *flags, **settings):
        return stopped(lambda _: run(images, *flags, **settings), None)

    assert "missing: no such file" in message(tmp_path / "missing")
    assert "empty: no images" in message(tmp_path / "empty")
    assert "there are: --load_model 19" in message(coffee, "--load_model", 7)
    assert "multiple of 8" in message(coffee, "--crop_size", 100)
    assert "larger than --load_size" in message(coffee, "--crop_size", 512)
    assert "cannot be written" in message(coffee, result="file/result")
    assert "overwrite" in message(coffee, result=photographs)


def test_a_checkpoint_by_its_path(run, tmp_path, photographs):
    code, _ = run(photographs / "coffee.png", "--load_model", tmp_path / "model" / "epoch_19_model.pdparams")
    assert code == 0


def test_checkpoints_that_do_not_fit(run, tmp_path, photographs, stopped):
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
