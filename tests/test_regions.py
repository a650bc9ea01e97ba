"""`support/regions.py`: distances along paths that avoid edges, and the weights of a region."""

from support.regions import END, geodesic_distance, region_weights

import numpy as np
import pytest


def test_distance_is_the_share_of_the_longer_side_plus_the_steps_on_the_way():
    gray = np.full((60, 80), 0.2)
    flat = geodesic_distance(gray, 0.25, 0.5)
    assert (flat[30, 20], flat[30, 60], flat[50, 40]) == pytest.approx((0, 0.5, np.hypot(20, 20) / 80))
    gray[:, 40:] = 1
    distance = geodesic_distance(gray, 0.25, 0.5)
    assert distance[30, 60] == pytest.approx(0.5 + 0.8)
    weights = region_weights(distance, reach=0.5)  # the step stops the region
    assert (weights[:, :36] == 1).all() and (weights[:, 44:] == 0).all()


def test_noise_hardly_lengthens_paths():
    gray = np.random.default_rng(0).normal(0.2, 0.05, (60, 80))
    assert geodesic_distance(gray, 0.25, 0.5)[30, 60] < 0.7  # 1.2 if it were not smoothed


def test_weights_are_one_up_to_the_reach_and_zero_from_its_end():
    distance = np.linspace(0, 1, 1001)
    weights = region_weights(distance, 0.4)
    assert (weights[distance <= 0.4] == 1).all() and (weights[distance >= END * 0.4] == 0).all()
    assert (np.diff(weights) <= 0).all() and np.abs(np.diff(weights)).max() < 0.01
    assert (region_weights(distance, 0.5) >= weights).all()  # monotonic in the reach, too


def test_place_at_the_last_edge_of_any_shape_is_valid():
    for shape in ((1, 1), (1, 400), (400, 1)):
        distance = geodesic_distance(np.zeros(shape), 1, 1)
        assert distance.shape == shape and distance[-1, -1] == 0
