"""`Colorizer`: the same results as test.py for files, Pillow images and arrays, also from several threads."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from support.checkpoints import save_checkpoint
from support.regions import geodesic_distance, region_weights

import numpy as np
import paddle
import pytest
from conftest import ROOT, bundled_image, upsample_by_scipy
from PIL import Image
from skimage.color import lab2rgb, rgb2lab
from skimage.transform import resize
from small_network import SmallNetwork

import colorizer
from dataset import rgb_to_lab
from pretrained import load_network


def test_network_input_keeps_the_aspect_ratio_in_multiples_of_8():
    assert colorizer.network_size(500, 375, 256) == (344, 256)
    assert colorizer.network_size(375, 500, 256) == (256, 344)
    assert colorizer.network_size(50, 50, 256) == (256, 256)
    assert colorizer.network_size(10_000, 10, 256) == (2048, 256)  # squeezed, so that memory is bounded
    assert colorizer.network_size(3, 3, 4) == (8, 8)


def test_path_image_and_array_give_the_pixels_of_test_py(colorize_files, small_checkpoint, image_folder):
    coffee = image_folder / "coffee.png"
    _, result = colorize_files(coffee, "--temperature", 0.2)
    written, image = np.asarray(Image.open(result / "coffee.png")), Image.open(coffee)
    for weights in (small_checkpoint, "19", None):
        colorize = colorizer.Colorizer(weights, model_path=small_checkpoint.parent, precision="float32")
        for source in (coffee, str(coffee), image, image.convert("RGBA"), np.asarray(image)):
            colored = colorize(source, temperature=0.2)
            assert colored.mode == "RGB" and np.array_equal(colored, written)


def test_threads_get_the_colors_of_their_own_images(small_checkpoint, image_folder):
    colorize = colorizer.Colorizer(small_checkpoint, precision="float32")
    paths = sorted(image_folder.iterdir()) * 8
    expected = [np.asarray(colorize(path, load_size=64)) for path in paths[:4]] * 8
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda path: np.asarray(colorize(path, load_size=64)), paths))
    assert [np.array_equal(a, b) for a, b in zip(results, expected)] == [True] * len(paths)


def test_size_and_temperature_default_to_those_in_the_checkpoint(small_checkpoint, image_folder):
    entries = {"load_size": np.array(40), "temperature": np.array(0.7)}
    save_checkpoint({**SmallNetwork().state_dict(), **entries}, small_checkpoint)
    colorize = colorizer.Colorizer(small_checkpoint)
    assert (colorize.load_size, colorize.temperature) == (40, 0.7)
    coffee = image_folder / "coffee.png"
    assert np.array_equal(colorize(coffee), colorize(coffee, 0.7, 40))
    assert not np.array_equal(colorize(coffee), colorize(coffee, 0.1, 64))


def test_weights_are_read_once_and_nothing_is_left_next_to_them_or_in_the_temporary_folder(
    small_checkpoint, image_folder, tmp_path, monkeypatch
):
    opened, original = [], Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: opened.append(path) or original(path))
    (temporary := tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    colorizer.Colorizer(small_checkpoint)(image_folder / "coffee.png")
    assert opened.count(small_checkpoint) == 1
    assert os.listdir(small_checkpoint.parent) == [small_checkpoint.name] and not os.listdir(temporary)


FORK = """
import faulthandler, os, sys
sys.path.insert(0, sys.argv[1])
import colorizer
import numpy as np

image = np.random.default_rng(0).integers(0, 256, (500, 600, 3), np.uint8)  # joined in three strips
colorize = colorizer.Colorizer("small", precision="float32")
expected = np.asarray(colorize(image))
if (child := os.fork()) == 0:
    faulthandler.dump_traceback_later(30, exit=True)  # if it hangs
    os._exit(not np.array_equal(colorize(image), expected))
assert os.waitpid(child, 0)[1] == 0
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are not forked")
def test_used_colorizer_works_in_a_forked_process():
    """In a program of its own: what other tests leave behind in Paddle's threads need not survive a fork."""
    subprocess.run([sys.executable, "-W", "ignore", "-c", FORK, str(ROOT)], check=True)


def test_network_that_predicts_ab_gives_its_output_and_has_no_temperature(ab_checkpoint, image_folder):
    colorize = colorizer.Colorizer(ab_checkpoint, precision="float32")
    inputs = colorizer.network_input(Image.open(image_folder / "coffee.png"), 64)[None]
    network = load_network(ab_checkpoint)
    network.eval()
    lightness = rgb_to_lab(paddle.to_tensor(inputs.transpose(0, 3, 1, 2)))[:, :1]
    expected = network(lightness - 50).numpy()
    assert np.abs(colorize.predict_ab(inputs).numpy() - expected).max() < 1e-3
    with pytest.raises(ValueError, match="temperature: does not apply to .*epoch_ab_model.pdparams"):
        colorize(image_folder / "coffee.png", temperature=0.38)


def test_wrong_argument_raises_a_value_error(small_checkpoint):
    colorize = colorizer.Colorizer(small_checkpoint, precision="float32")
    for wrong in (
        *({"temperature": x} for x in (float("nan"), 0, "a", [1])),
        *({"load_size": x} for x in (0, 64.5, 10**9)),
        *({"image": x} for x in (np.zeros((0, 8, 3), np.uint8), b"x" * 10**6, Image.new("RGB", (0, 8)))),
    ):
        with pytest.raises(ValueError, match=".") as error:
            colorize(**{"image": np.zeros((8, 8, 3), np.uint8), **wrong})
        assert len(str(error.value)) < 200


# -------------------------------------------------------------------------------------------------
# Corrections

ORANGE = colorizer.Correction(0.3, 0.8, (40, 50), 0.3)  # a place on the astronaut's suit


@pytest.fixture
def astronaut():
    """Return an image of 200x160 pixels and a smooth predicted ab for it."""
    ab = np.random.default_rng(0).normal(0, 8, [2, 12, 15])
    return bundled_image("astronaut").resize((200, 160)), paddle.to_tensor(ab.astype(np.float32))


def test_no_correction_changes_nothing(astronaut):
    image, ab = astronaut
    expected = np.asarray(colorizer.colored(image, ab))
    assert np.array_equal(colorizer.colored(image, ab, corrections=[], saturation=1), expected)


def test_corrections_are_those_of_scikit_image(astronaut):
    """Later corrections lie over earlier ones; ab is the weighted mean of what was there and the chosen color."""
    image, ab = astronaut
    corrections = [ORANGE, colorizer.Correction(0.8, 0.1, (-20, 10), 0.5), ORANGE._replace(ab=(0, -30), reach=0.1)]
    lab = rgb2lab(np.asarray(image))
    gray = rgb2lab(np.asarray(image.resize((320, 256), Image.Resampling.BILINEAR)))[..., 0] / 100
    expected = upsample_by_scipy(ab, 160, 200)
    for across, down, color, reach in corrections:
        weights = resize(region_weights(geodesic_distance(gray, across, down), reach), (160, 200), order=1, mode="edge")
        expected = (1 - weights) * expected + weights * np.reshape(color, [2, 1, 1])
    lab[..., 1:] = 0.8 * expected.transpose([1, 2, 0])
    rgb = 255 * lab2rgb(lab)
    result = np.asarray(colorizer.colored(image, ab, corrections, saturation=0.8))
    in_gamut = ((rgb > 0) & (rgb < 255)).all(axis=-1)
    assert in_gamut.mean() > 0.8 and np.abs(result - rgb)[in_gamut].mean() < 0.6


def test_colorizer_applies_corrections_given_as_plain_tuples(small_checkpoint, image_folder):
    colorize, coffee = colorizer.Colorizer(small_checkpoint), image_folder / "coffee.png"
    (ab,) = colorize.predict_ab(colorizer.network_input(Image.open(coffee), 64)[None])
    expected = colorizer.colored(Image.open(coffee), ab, [ORANGE], 0.5)
    assert np.array_equal(colorize(coffee, corrections=[(0.3, 0.8, (40, 50), 0.3)], saturation=0.5), expected)


def test_corrections_and_saturation_out_of_range_are_refused(astronaut):
    nan = float("nan")
    for wrong in ({"across": -0.1}, {"across": nan}, {"down": 1.1}, {"ab": (0, 200)}, {"ab": (nan, 0)}, {"reach": 0}):
        with pytest.raises(ValueError, match="out of range"):
            colorizer.colored(*astronaut, [ORANGE._replace(**wrong)])
    for saturation in (-0.1, nan, float("inf"), "a"):
        with pytest.raises(ValueError, match="saturation"):
            colorizer.colored(*astronaut, saturation=saturation)
