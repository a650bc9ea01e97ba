"""`Colorizer`: one way from a photograph to the colored one, whoever asks."""

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


def test_a_path_an_image_and_an_array_give_what_test_py_writes(checkpoint, photographs, tmp_path):
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
def test_the_logits_give_ab_at_any_temperature(checkpoint, photographs, monkeypatch, eager):
    """So that who moves the temperature need not run the network again."""
    if eager:
        monkeypatch.setattr(colorizer, "engine_predictor", lambda *_: 1 / 0)
    colorize = colorizer.Colorizer(checkpoint)
    logits = colorize.logits(photographs / "coffee.png", load_size=64)
    assert logits.shape == [1, 313, 16, 24]
    seen = colorizer.as_seen(Image.open(photographs / "coffee.png"), 64)
    for temperature in (0.05, 0.38, 1):
        ab = annealed_mean(logits, load_ab_bins(), temperature)
        assert np.abs(ab.numpy() - colorize.predict_ab(seen[None], temperature).numpy()).max() < 0.01


def test_errors_are_the_ones_that_are_documented(checkpoint, tmp_path):
    with pytest.raises(UserError, match="no such checkpoint"):
        colorizer.Colorizer("7", model_path=checkpoint.parent)
    (tmp_path / "text.jpg").write_text("no image")
    with pytest.raises(InvalidImageError, match=r"text.jpg: not an image"):
        colorizer.Colorizer(checkpoint)(tmp_path / "text.jpg")
