"""`test.py`: results, their sizes, formats and records."""

import json
import os

from support.checkpoints import load_checkpoint, save_checkpoint, save_safetensors
from support.inference import fold_batch_norm, temporary_folder

import numpy as np
import paddle
import pytest
from conftest import SmallNetwork, bundled_image
from PIL import Image

import colorizer
from dataset import rgb_to_lab
from utils import annealed_mean, load_ab_bins


def test_network_input_keeps_the_aspect_ratio_in_multiples_of_8():
    assert colorizer.network_size(500, 375, 256) == (344, 256)
    assert colorizer.network_size(375, 500, 256) == (256, 344)
    assert colorizer.network_size(50, 50, 256) == (256, 256)
    assert colorizer.network_size(10_000, 10, 256) == (2048, 256)  # squeezed, so that memory is bounded
    assert colorizer.network_size(3, 3, 4) == (8, 8)


def pixels(path):
    return np.asarray(Image.open(path))


def largest_difference(one, other):
    return np.abs(np.subtract(one, other, dtype=int)).max()


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


# Reading, the network and writing


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
