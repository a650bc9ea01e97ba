"""Lab conversion, against scikit-image."""

import numpy as np
import paddle
import pytest
from skimage import color, data

from dataset import lab_to_rgb, rgb_to_lab, rgb_to_lightness, to_uint8


def channels_first(image):
    return np.ascontiguousarray(image.reshape(-1, 1, 1, 3).transpose(0, 3, 1, 2))


def channels_last(tensor):
    return tensor.numpy().transpose(0, 2, 3, 1).reshape(-1, 3)


@pytest.fixture(scope="module")
def grid():
    """Return all combinations of 52 levels per channel, including 0 and 255: uint8 [140608, 3]."""
    levels = np.arange(0, 256, 5)
    return np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(-1, 3).astype(np.uint8)


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_rgb_to_lab_agrees_with_scikit_image(grid, dtype):
    colors = grid if dtype == "uint8" else grid / 255.0
    lab = channels_last(rgb_to_lab(paddle.to_tensor(channels_first(colors).astype(dtype))))
    assert np.abs(lab - color.rgb2lab(colors[None])[0]).max() < 0.01


def test_lab_to_rgb_agrees_with_scikit_image_within_the_gamut(grid):
    lab = color.rgb2lab(grid[None])[0]
    rgb = channels_last(lab_to_rgb(paddle.to_tensor(channels_first(lab).astype(np.float32))))
    assert np.abs(rgb - color.lab2rgb(lab[None])[0]).max() < 1 / 512


def test_lab_to_rgb_clips_out_of_gamut_colors():
    lab = paddle.to_tensor(np.array([[100, 110, 110], [0, -110, 110], [50, 110, -110]], np.float32)[:, :, None, None])
    rgb = lab_to_rgb(lab).numpy()
    assert np.isfinite(rgb).all() and rgb.min() >= 0 and rgb.max() <= 1


def test_every_8_bit_color_is_restored_from_lab():
    green_blue = np.stack(np.meshgrid(np.arange(256), np.arange(256), indexing="ij")).astype(np.uint8)
    for red in range(0, 256, 8):
        planes = [np.stack([np.full_like(green_blue[0], r), *green_blue]) for r in range(red, red + 8)]
        rgb = paddle.to_tensor(np.stack(planes))
        assert bool((to_uint8(lab_to_rgb(rgb_to_lab(rgb))) == rgb).all())


def test_rgb_to_lightness_equals_first_channel_of_lab():
    rgb = paddle.to_tensor(np.ascontiguousarray(data.coffee()[None, ::4, ::4].transpose(0, 3, 1, 2)))
    assert np.array_equal(rgb_to_lightness(rgb).numpy()[:, 0], rgb_to_lab(rgb).numpy()[:, 0])
