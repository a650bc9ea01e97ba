"""`support/regions.py`: distances along paths that avoid edges, and the weights of a region."""

import heapq
from itertools import product

from support.regions import END, geodesic_distance, region_weights

import numpy as np
from scipy.ndimage import gaussian_filter, sobel
from skimage import data


def test_step_edge_stops_the_region():
    gray = np.full((60, 80), 0.2)
    gray[:, 40:] = 1
    weights = region_weights(geodesic_distance(gray, 0.25, 0.5), reach=0.5)
    assert (weights[:, :36] == 1).all() and (weights[:, 44:] == 0).all()


def test_distance_is_that_of_dijkstra():
    gray = data.camera()[60:120:3, 180:270:3] / 255  # [20, 30]
    smooth = gaussian_filter(gray, 1.5, mode="nearest")
    cost = 1 / 30 + np.hypot(sobel(smooth, 0), sobel(smooth, 1)) / 8  # sobel is 8 times the slope per pixel
    best, queue = np.full(gray.shape, np.inf), [(0.0, 10, 15)]
    while queue:
        length, i, j = heapq.heappop(queue)
        if length < best[i, j]:
            best[i, j] = length
            for k, m in product(range(max(i - 1, 0), min(i + 2, 20)), range(max(j - 1, 0), min(j + 2, 30))):
                step = np.hypot(k - i, m - j) * (cost[i, j] + cost[k, m]) / 2
                heapq.heappush(queue, (length + step, k, m))
    np.testing.assert_allclose(geodesic_distance(gray, 15.5 / 30, 10.5 / 20), best, rtol=1e-6)


def test_weights_are_one_up_to_the_reach_and_zero_from_its_end():
    distance = np.linspace(0, 1, 1001)
    weights = region_weights(distance, 0.4)
    assert (weights[distance <= 0.4] == 1).all() and (weights[distance >= END * 0.4] == 0).all()
    assert (np.diff(weights) <= 0).all() and np.abs(np.diff(weights)).max() < 0.01


def test_weights_are_monotonic_in_the_reach():
    distance = geodesic_distance(data.camera()[::4, ::4] / 255, 0.4, 0.3)
    smaller, larger = region_weights(distance, 0.2), region_weights(distance, 0.5)
    assert (larger >= smaller).all() and (larger > smaller).any()


def test_place_at_the_last_edge_of_any_shape_is_valid():
    for shape in ((1, 1), (1, 400), (400, 1)):
        distance = geodesic_distance(np.zeros(shape), 1, 1)
        assert distance.shape == shape and distance[-1, -1] == 0
