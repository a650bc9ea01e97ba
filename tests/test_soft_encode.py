"""Compare soft-encoding and the nearest neighbors behind it with brute force in float64."""

from support.neighbors import Lookup

import numpy as np
import paddle
import pytest
from conftest import random_rgb

from dataset import rgb_to_lab, soft_encode
from utils import load_ab_bins


@pytest.fixture(scope="module")
def ab_bins():
    return load_ab_bins()


def brute_force(ab, bins, neighbors, sigma):
    """Return squared distances to all bins [M, Q], the nearest bins and their weights [M, neighbors] of ab [M, 2]."""
    squared = ((ab[:, None].astype(np.float64) - bins.astype(np.float64)) ** 2).sum(axis=2)
    nearest = np.argsort(squared, axis=1, kind="stable")[:, :neighbors]
    d2 = np.take_along_axis(squared, nearest, axis=1)
    weights = np.exp(-(d2 - d2[:, :1]) / (2 * sigma**2))
    return squared, nearest, weights / weights.sum(axis=1, keepdims=True)


def encode(ab, ab_bins, **settings):
    """Return indices and weights [M, neighbors] of ab [M, 2], encoded as a map of one row."""
    indices, weights = soft_encode(paddle.to_tensor(ab.T[None, :, None].astype(np.float32)), ab_bins, **settings)
    return indices.numpy()[0, :, 0].T, weights.numpy()[0, :, 0].T


def colors(kind, bins):
    random = np.random.default_rng(0)
    if kind == "in gamut":
        return rgb_to_lab(paddle.to_tensor(random_rgb(20_000))).numpy()[:, 1:, 0, 0]
    if kind == "bin centers":
        return bins
    if kind == "the hull's edge and beyond":
        angle = random.uniform(0, 2 * np.pi, 20_000)
        return (random.uniform(80, 127, 20_000) * np.stack([np.cos(angle), np.sin(angle)])).T
    return random.uniform(-128, 128, (20_000, 2))


@pytest.mark.parametrize("neighbors", [1, 5, 10])
@pytest.mark.parametrize("kind", ["in gamut", "bin centers", "the hull's edge and beyond", "anywhere"])
def test_neighbors_and_weights_agree_with_brute_force(kind, neighbors, ab_bins):
    ab = colors(kind, ab_bins.numpy()).astype(np.float32)
    indices, weights = encode(ab, ab_bins, neighbors=neighbors)
    squared, expected, expected_weights = brute_force(ab, ab_bins.numpy(), neighbors, 5.0)
    # Of two bins at one distance either is right: compare distances, and demand that no bin comes twice.
    found = np.take_along_axis(squared, indices, axis=1)
    np.testing.assert_allclose(found, np.take_along_axis(squared, expected, axis=1), rtol=1e-5, atol=2e-3)
    assert all(len(set(row)) == neighbors for row in indices)
    np.testing.assert_allclose(weights, expected_weights, atol=1e-5)


def test_indices_without_ties_agree_with_brute_force(ab_bins):
    ab = colors("in gamut", None)
    squared, expected, _ = brute_force(ab, ab_bins.numpy(), 6, 5.0)
    gaps = np.diff(np.take_along_axis(squared, expected, axis=1), axis=1)
    clear = (gaps > 1e-2).all(axis=1)
    assert clear.mean() > 0.9
    assert np.array_equal(encode(ab, ab_bins)[0][clear], expected[clear, :5])


def test_weights_agree_with_brute_force_for_any_sigma(ab_bins):
    ab = colors("in gamut", None)[:100]
    for sigma in (1.0, 20.0):
        np.testing.assert_allclose(
            encode(ab, ab_bins, sigma=sigma)[1], brute_force(ab, ab_bins.numpy(), 5, sigma)[2], atol=1e-5
        )


def test_encoded_batch_has_the_documented_shapes_and_types(ab_bins):
    indices, weights = soft_encode(paddle.zeros([3, 2, 7, 4]), ab_bins)
    assert indices.shape == weights.shape == [3, 5, 7, 4]
    assert (indices.dtype, weights.dtype) == (paddle.int64, paddle.float32)


def test_each_position_is_encoded_independently(ab_bins):
    ab = np.random.default_rng(1).uniform(-90, 90, (2, 2, 3, 5)).astype(np.float32)
    indices, _ = soft_encode(paddle.to_tensor(ab), ab_bins, neighbors=1)
    for n, y, x in np.ndindex(2, 3, 5):
        distances = np.hypot(*(ab_bins.numpy() - ab[n, :, y, x]).T)
        assert distances[int(indices[n, 0, y, x])] == pytest.approx(distances.min(), abs=1e-3)


@pytest.mark.parametrize("k", [1, 3, 40])
def test_lookup_takes_centers_anywhere_in_the_plane(k):
    random = np.random.default_rng(2)
    centers = random.normal(0, 150, (40, 2)).astype(np.float32)  # many of them beyond the lookup grid
    points = random.uniform(-128, 128, (5000, 2)).astype(np.float32)
    indices, squared = (x.numpy() for x in Lookup(paddle.to_tensor(centers), k).nearest(paddle.to_tensor(points)))
    expected = np.sort(((points[:, None].astype(np.float64) - centers) ** 2).sum(axis=2), axis=1)[:, :k]
    np.testing.assert_allclose(squared, expected, rtol=1e-5, atol=1e-2)
    np.testing.assert_allclose(((points[:, None] - centers[indices]) ** 2).sum(axis=2), expected, rtol=1e-5, atol=1e-2)
    assert all(len(set(row)) == k for row in indices)
