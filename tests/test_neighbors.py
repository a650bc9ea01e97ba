"""The lookup grid finds the same neighbors as brute force in float64."""

from support.neighbors import Lookup

import numpy as np
import paddle
import pytest


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
