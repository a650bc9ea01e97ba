"""`Colorizer`: the same results as test.py for files, Pillow images and arrays, also from several threads."""

import re
from concurrent.futures import ThreadPoolExecutor

from support.checkpoints import save_checkpoint
from support.cli import UserError
from support.images import InvalidImageError

import numpy as np
import paddle
import pytest
from PIL import Image
from small_network import SmallNetwork

import colorizer
import test
from utils import annealed_mean, load_ab_bins


@pytest.fixture
def checkpoint(tmp_path, small_network):
    paddle.seed(0)
    path = tmp_path / "model" / "epoch_19_model.pdparams"
    save_checkpoint(SmallNetwork().state_dict(), path)
    return path


def test_path_image_and_array_give_the_pixels_of_test_py(checkpoint, photographs, tmp_path):
    coffee = photographs / "coffee.png"
    where = ["--model_path", str(checkpoint.parent), "--result_path", str(tmp_path / "result")]
    assert test.main(test.parse_args([str(coffee), *where, "--temperature", "0.2"])) == 0
    written = np.asarray(Image.open(tmp_path / "result" / "coffee.png"))
    image = Image.open(coffee)
    for weights in (checkpoint, "19", None):
        colorize = colorizer.Colorizer(weights, model_path=checkpoint.parent)
        for photograph in (coffee, str(coffee), image, image.convert("RGBA"), np.asarray(image)):
            colored = colorize(photograph, temperature=0.2)
            assert colored.mode == "RGB" and np.array_equal(colored, written)


@pytest.mark.parametrize("eager", [False, True])
def test_annealed_mean_of_logits_equals_predicted_ab(checkpoint, photographs, monkeypatch, eager):
    if eager:
        monkeypatch.setattr(colorizer, "engine_predictor", lambda *_: 1 / 0)
    colorize = colorizer.Colorizer(checkpoint)
    logits = colorize.logits(photographs / "coffee.png", load_size=64)
    assert logits.shape == [1, 313, 16, 24]
    seen = colorizer.network_input(Image.open(photographs / "coffee.png"), 64)
    for temperature in (0.05, 0.38, 1):
        ab = annealed_mean(logits, load_ab_bins(), temperature)
        assert np.abs(ab.numpy() - colorize.predict_ab(seen[None], temperature).numpy()).max() < 0.01


def test_documented_errors(checkpoint, tmp_path):
    with pytest.raises(UserError, match="no such checkpoint"):
        colorizer.Colorizer("7", model_path=checkpoint.parent)
    (tmp_path / "text.jpg").write_text("no image")
    with pytest.raises(InvalidImageError, match=r"text.jpg: not an image"):
        colorizer.Colorizer(checkpoint)(tmp_path / "text.jpg")
    colorize = colorizer.Colorizer(checkpoint)
    for array in (np.zeros((8, 8), np.uint8), np.zeros((8, 8, 4), np.uint8), np.zeros((8, 8, 3), np.float32)):
        with pytest.raises(ValueError, match=rf"uint8 \[H, W, 3\], not {array.dtype} {re.escape(str([*array.shape]))}"):
            colorize(array)
    with pytest.raises(UserError, match="photo.xyz: its suffix must be one of png, jpg"):
        colorizer.save(Image.new("RGB", (8, 8)), tmp_path / "photo.xyz")


def test_suffix_jpeg_writes_a_jpeg(tmp_path):
    colorizer.save(Image.new("RGB", (8, 8)), tmp_path / "x.jpeg")
    assert Image.open(tmp_path / "x.jpeg").format == "JPEG"


def test_threads_get_the_colors_of_their_own_images(checkpoint, photographs):
    colorize = colorizer.Colorizer(checkpoint, precision="float32")
    paths = sorted(photographs.iterdir()) * 8
    expected = [np.asarray(colorize(path, load_size=64)) for path in paths[:4]] * 8
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda path: np.asarray(colorize(path, load_size=64)), paths))
    assert [np.array_equal(a, b) for a, b in zip(results, expected)] == [True] * len(paths)
