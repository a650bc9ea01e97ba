"""The lookup grid finds the same neighbors as brute force in float64."""

from support.neighbors import Lookup

import numpy as np
import paddle
import pytest

RANDOM = np.random.default_rng(2)
CENTERS = {  # the ab bins are part of such a grid, and many points have the same distance from two of them
    "grid": np.stack(np.meshgrid(np.arange(-90, 100, 10), np.arange(-110, 110, 10)), axis=-1).reshape(-1, 2),
    "anywhere": RANDOM.normal(0, 150, (40, 2)),  # many of them beyond the lookup grid
}


@pytest.mark.parametrize("k", [1, 5, 40])
@pytest.mark.parametrize("kind", CENTERS)
def test_lookup_agrees_with_brute_force(kind, k):
    centers = CENTERS[kind].astype(np.float32)
    points = np.concatenate([RANDOM.uniform(-128, 128, (5000, 2)), centers.clip(-128, 128)]).astype(np.float32)
    indices, squared = (x.numpy() for x in Lookup(paddle.to_tensor(centers), k).nearest(paddle.to_tensor(points)))
    expected = np.sort(((points[:, None].astype(np.float64) - centers) ** 2).sum(axis=2), axis=1)[:, :k]
    np.testing.assert_allclose(squared, expected, rtol=1e-5, atol=1e-2)
    np.testing.assert_allclose(((points[:, None] - centers[indices]) ** 2).sum(axis=2), expected, rtol=1e-5, atol=1e-2)
    assert all(len(set(row)) == k for row in indices)
