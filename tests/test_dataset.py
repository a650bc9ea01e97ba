"""Lab conversion, soft-encoding, and the square crops for training."""

import numpy as np
import paddle
import pytest
from skimage import color, data

from dataset import (
    ColorizationDataset,
    EpochSampler,
    lab_to_rgb,
    list_images,
    rgb_to_lab,
    rgb_to_lightness,
    soft_encode,
    to_uint8,
)
from utils import load_ab_bins

# Square crops


def test_random_crops_depend_only_on_seed_epoch_and_index(image_folder):
    def crop(index=0, epoch=0, seed=0):
        dataset = ColorizationDataset(list_images(image_folder), 64, 48, augment=True, seed=seed)
        dataset.epoch = epoch
        return dataset[index][0]

    assert crop().shape == (3, 48, 48) and crop().dtype == np.uint8
    assert np.array_equal(crop(), crop())
    assert not np.array_equal(crop(), crop(epoch=1)) and not np.array_equal(crop(), crop(seed=1))


def test_random_crops_are_mirrored_half_of_the_time(image_folder):
    path = list_images(image_folder)[0]  # a square image, which has one crop
    dataset = ColorizationDataset([path], 64, 64, augment=True)
    plain = ColorizationDataset([path], 64, 64)[0][0]
    intact = []
    for dataset.epoch in range(40):
        crop = dataset[0][0]
        intact.append(np.array_equal(crop, plain))
        assert intact[-1] or np.array_equal(crop, plain[:, :, ::-1])
    assert 10 < sum(intact) < 30


def test_unreadable_image_is_reported_and_replaced(image_folder, capsys):
    paths = [str(image_folder / "missing.png"), *list_images(image_folder)]
    crop, unreadable = ColorizationDataset(paths, 64, 48, augment=True)[0]
    assert unreadable >= 1 and crop.std() > 10
    assert f"skipped {paths[0]}: no such file" in capsys.readouterr().err


def test_crop_is_gray_if_no_image_can_be_read(tmp_path):
    crop, unreadable = ColorizationDataset([str(tmp_path / "missing.jpg")], 64, 48)[0]
    assert unreadable > 1 and (crop == crop[0, 0, 0]).all()


# Lab


@pytest.fixture(scope="module")
def grid():
    """Return all combinations of 52 levels per channel, including 0 and 255: uint8 [1, 3, 140608, 1]."""
    levels = np.arange(0, 256, 5, dtype=np.uint8)
    return np.stack(np.meshgrid(levels, levels, levels)).reshape(1, 3, -1, 1)


def reference_lab(rgb):
    return color.rgb2lab(rgb, channel_axis=1)


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_rgb_to_lab_agrees_with_scikit_image(grid, dtype):
    colors = grid if dtype == "uint8" else (grid / 255).astype(dtype)
    assert np.abs(rgb_to_lab(paddle.to_tensor(colors)).numpy() - reference_lab(grid)).max() < 0.01


def test_lightness_and_hue_of_out_of_gamut_colors_are_kept():
    """At the largest chroma but 1/64: the smallest step is 1/128. Clipping moves L by up to 30."""
    lab = np.stack(np.meshgrid(np.arange(5, 100, 5), np.arange(-110, 111, 11), np.arange(-110, 111, 11)))
    lab = lab.reshape(1, 3, -1, 1).astype(np.float32)
    clipped = reference_lab(lab_to_rgb(paddle.to_tensor(lab)).numpy())
    outside = lab[:, :, np.abs(clipped - lab).max(axis=(0, 1, 3)) > 0.5]
    found = reference_lab(lab_to_rgb(paddle.to_tensor(outside), keep_lightness=True).numpy())
    chroma = np.hypot(found[:, 1], found[:, 2])
    turned = np.angle((found[:, 1] + 1j * found[:, 2]) / (outside[:, 1] + 1j * outside[:, 2]), deg=True)
    assert np.abs(found[:, 0] - outside[:, 0]).max() < 0.2 and np.abs(turned)[chroma > 5].max() < 1
    more = outside.copy()
    more[:, 1:] *= (chroma / np.hypot(outside[:, 1], outside[:, 2]) + 1 / 64)[:, None]
    clipped = reference_lab(lab_to_rgb(paddle.to_tensor(more)).numpy())
    assert (np.abs(clipped - more).max(axis=1) > 0.1).mean() > 0.99


def test_colors_in_gamut_do_not_depend_on_keeping_lightness(grid):
    lab = rgb_to_lab(paddle.to_tensor(grid))
    assert np.array_equal(lab_to_rgb(lab, keep_lightness=True), lab_to_rgb(lab))


def test_8_bit_colors_are_restored_from_lab():
    """All of green and blue, every fifth level of red."""
    green_blue = np.stack(np.meshgrid(np.arange(256), np.arange(256), indexing="ij")).astype(np.uint8)
    for red in range(0, 256, 5):
        rgb = paddle.to_tensor(np.stack([np.full_like(green_blue[0], red), *green_blue])[None])
        assert bool((to_uint8(lab_to_rgb(rgb_to_lab(rgb))) == rgb).all())


def test_rgb_to_lightness_equals_first_channel_of_lab():
    rgb = paddle.to_tensor(np.ascontiguousarray(data.coffee()[None, ::4, ::4].transpose(0, 3, 1, 2)))
    assert np.array_equal(rgb_to_lightness(rgb).numpy()[:, 0], rgb_to_lab(rgb).numpy()[:, 0])


# Soft-encoding


@pytest.mark.parametrize(("neighbors", "sigma"), [(5, 5.0), (10, 3.0), (1, 20.0)])
def test_soft_encoding_agrees_with_brute_force_at_each_position(neighbors, sigma):
    ab = np.random.default_rng(0).uniform(-60, 60, (2, 2, 30, 50)).astype(np.float32)
    indices, weights = soft_encode(paddle.to_tensor(ab), load_ab_bins(), neighbors, sigma)
    assert (indices.dtype, weights.dtype) == (paddle.int64, paddle.float32)
    bins = load_ab_bins().numpy().astype(np.float64)[None, :, :, None, None]
    squared = ((ab[:, None] - bins) ** 2).sum(axis=2)  # [N, Q, h, w]
    nearest = np.sort(squared, axis=1)[:, :neighbors]
    # Of two bins at one distance either is right, so distances are compared.
    found = np.take_along_axis(squared, indices.numpy(), axis=1)
    np.testing.assert_allclose(found, nearest, rtol=1e-5, atol=2e-3)
    expected = np.exp((nearest[:, :1] - nearest) / (2 * sigma**2))
    np.testing.assert_allclose(weights.numpy(), expected / expected.sum(axis=1, keepdims=True), atol=1e-5)


# Sampler


def test_dataset_keeps_paths_of_any_bytes(tmp_path):
    paths = [str(tmp_path / "é\udcff\n.png"), "b.png", ""]
    dataset = ColorizationDataset(paths, 40, 32)
    assert [dataset.path(i) for i in range(len(dataset))] == paths


def test_image_order_does_not_depend_on_the_number_of_processes():
    """Each image appears once per epoch, except for those that do not fill a batch."""

    def batches(rank, count, skip=0, epoch=0):
        sampler = EpochSampler(range(37), 12 // count, num_replicas=count, rank=rank)
        sampler.begin(1, epoch, skip)
        assert len(sampler) == 3
        return list(sampler)

    whole = batches(0, 1)
    assert len({i for batch in whole for i in batch}) == 36
    for count in (2, 3, 4):
        shares = [batches(rank, count) for rank in range(count)]
        assert [sum((share[i] for share in shares), []) for i in range(3)] == whole
    assert batches(0, 1, skip=2) == whole[2:] and batches(0, 1, skip=3) == []
    assert batches(0, 1, epoch=1) != whole
