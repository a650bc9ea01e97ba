"""Test that ab of position (i, j) is placed at pixel (4i, 4j) of the network's input."""

import subprocess
import sys

import numpy as np
import paddle
import paddle.nn.functional as F
import pytest
from conftest import BUNDLED_IMAGES, ROOT, upsample_by_scipy
from PIL import Image
from skimage import data

from colorizer import network_size
from dataset import rgb_to_lab, targets
from utils import upsample_ab

RED, BLUE = (190, 60, 60), (60, 60, 190)


def channels_first(image):
    return paddle.to_tensor(np.asarray(image).transpose(2, 0, 1)[None])


def true_ab(image, size):
    """Return a perfect network's prediction for the image resized to `size`: [2, h/4, w/4]."""
    return targets(channels_first(image.resize(size, Image.Resampling.BILINEAR)))[1][0]


def mean_error(ab, image):
    return float(((ab - rgb_to_lab(channels_first(image))[0, 1:]) ** 2).sum(axis=0).sqrt().mean())


@pytest.mark.parametrize("height, width", [(24, 40), (89, 149), (241, 400), (7, 11), (1, 1)])
def test_upsampling_agrees_with_scipy(height, width):
    ab = np.random.default_rng(0).uniform(-100, 100, (2, 6, 10)).astype(np.float32)
    found = upsample_ab(paddle.to_tensor(ab), height, width).numpy()
    assert found.shape == (2, height, width)
    assert np.abs(found - upsample_by_scipy(ab, height, width)).max() < 1e-3


def test_upsampling_in_strips_or_batches_gives_the_same_ab():
    ab = paddle.to_tensor(np.random.default_rng(0).uniform(-100, 100, (3, 2, 6, 10)).astype(np.float32))
    whole = upsample_ab(ab, 89, 149).numpy()
    assert np.allclose(whole[1], upsample_ab(ab[1], 89, 149).numpy(), atol=1e-4)
    strips = [upsample_ab(ab, 89, 149, top, 20).numpy() for top in range(0, 89, 20)]
    assert np.allclose(np.concatenate(strips, axis=2), whole, atol=1e-4)


def test_upsampling_keeps_the_color_of_each_position_at_its_pixel():
    ab = paddle.to_tensor(np.random.default_rng(0).uniform(-100, 100, (2, 6, 10)).astype(np.float32))
    assert np.allclose(upsample_ab(ab, 24, 40)[:, ::4, ::4].numpy(), ab.numpy(), atol=1e-4)


@pytest.mark.parametrize("shape", [(1, 2_000_000), (2_000_000, 1)])
def test_very_long_image_needs_little_memory(shape):
    """A dense matrix [pixels, positions] would take 1.5 GB."""
    code = (
        "import resource, sys, support, paddle; from utils import upsample_ab; ab = paddle.zeros([2, 192, 192]);"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; upsample_ab(ab, *map(int, sys.argv[1:]));"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)"
    )
    command = [sys.executable, "-c", code, *map(str, shape)]
    megabytes = float(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)
    assert megabytes < 500


@pytest.mark.parametrize("short_side", [64, 256])
@pytest.mark.parametrize("name", BUNDLED_IMAGES)
def test_ground_truth_is_restored_better_than_from_4x4_block_centers(name, short_side):
    image = Image.fromarray(getattr(data, name)())  # sides of 300 to 640, not multiples of the network's input size
    ab = true_ab(image, network_size(*image.size, short_side))
    by_blocks = F.interpolate(ab.unsqueeze(0), size=[image.height, image.width], mode="bilinear")[0]
    assert mean_error(upsample_ab(ab, image.height, image.width), image) < 0.9 * mean_error(by_blocks, image)


@pytest.mark.parametrize("scale", [1, 3.7, 10])
def test_color_edge_stays_within_one_input_pixel(scale):
    width, height = round(128 * scale), round(32 * scale)  # the network's input is 128x32
    displacements = []
    for edge in range(61, 65):  # in network pixels: at each place between two positions of its output, at 60 and 64
        pixels = np.full((height, width, 3), RED, np.uint8)
        pixels[:, (column := round(edge * scale)) :] = BLUE
        b = upsample_ab(true_ab(Image.fromarray(pixels), (128, 32)), height, width)[1, height // 2].numpy()
        middle = (b[0] + b[-1]) / 2
        after = np.argmax(b < middle)
        crossing = after - (middle - b[after]) / (b[after - 1] - b[after]) + 0.5  # counted as `column` is
        displacements.append((crossing - column) / scale)
    assert np.abs(displacements[1:3]).max() <= 1
    assert abs(np.mean(displacements)) <= 0.1  # an edge anywhere moves by up to 1.5, as targets are every 4th pixel
