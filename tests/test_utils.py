"""Compare weights, loss, annealed mean and AuC with dense NumPy in float64; test small helpers."""

import io

import numpy as np
import paddle
import pytest
from conftest import upsample_by_scipy
from PIL import Image

from dataset import targets
from utils import (
    annealed_mean,
    auc,
    entropy,
    error_histogram,
    load_ab_bins,
    load_prior,
    position_weight,
    rebalancing_weights,
    soft_cross_entropy,
    upsample_ab,
)

RANDOM = np.random.default_rng(0)


# Rebalancing weights


@pytest.mark.parametrize("lam", [0, 0.5, 1])
def test_rebalancing_weights_follow_equation_4(lam):
    prior = load_prior().numpy().astype(np.float64)
    raw = 1 / ((1 - lam) * prior + lam / 313)
    weights = rebalancing_weights(load_prior(), lam).numpy()
    np.testing.assert_allclose(weights, raw / (prior * raw).sum(), rtol=1e-5)
    assert (prior * weights).sum() == pytest.approx(1, abs=1e-6)
    assert lam < 1 or weights == pytest.approx(1, rel=1e-6)


def test_prior_with_zeros_gives_finite_weights():
    prior = np.zeros(313, np.float32)
    prior[100:110] = 0.1
    weights = rebalancing_weights(paddle.to_tensor(prior), lam=0).numpy()
    assert np.isfinite(weights).all() and (weights * prior).sum() == pytest.approx(1, abs=1e-6)


def header(shape):
    """Return the beginning of a .npy file."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<f8", "fortran_order": False, "shape": shape})
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (header((312,)) + bytes(8 * 312), "a prior has shape (313,), not (312,)"),
        (header((313,)) + np.full(313, np.nan).tobytes(), "must be finite, non-negative and not all zero"),
        (header((313,)) + bytes(8 * 313), "must be finite, non-negative and not all zero"),
        (header((313,)) + np.r_[-1.0, np.ones(312)].tobytes(), "must be finite, non-negative and not all zero"),
        (header((2 * 10**12,)) + bytes(8 * 313), "not a .npy file of numbers"),
        (b"313 numbers", "not a .npy file of numbers"),
    ],
    ids=["length", "NaN", "zero", "negative", "terabytes", "text"],
)
def test_unusable_prior_raises_user_error(tmp_path, error_message, content, message):
    (tmp_path / "prior.npy").write_bytes(content)
    assert message in error_message(load_prior, tmp_path / "prior.npy")
    assert "is a directory" in error_message(load_prior, tmp_path)


def test_position_weight_agrees_with_a_loop_over_positions():
    """Equation 3: the weight of the nearest bin; 0 in an image whose ab all lie within ±5."""
    indices, ab = RANDOM.integers(0, 313, (3, 5, 4, 6)), RANDOM.uniform(-40, 40, (3, 2, 4, 6)).astype(np.float32)
    ab[1] = ab[1].clip(-5, 5)  # gray
    ab[2] = ab[2].clip(-5.5, 5)  # just not
    bin_weights = RANDOM.random(313).astype(np.float32)
    expected = np.zeros((3, 4, 6))
    for n, i, j in np.ndindex(3, 4, 6):
        expected[n, i, j] = 0 if np.abs(ab[n]).max() <= 5 else bin_weights[indices[n, 0, i, j]]
    v = position_weight(*map(paddle.to_tensor, (indices, ab, bin_weights)))
    assert v.dtype == paddle.float32 and np.array_equal(v.numpy(), expected.astype(np.float32))
    assert (expected[1] == 0).all() and (expected[[0, 2]] > 0).all()


# Loss


def sparse_targets(n, h, w, k=5, bins=313):
    """Random indices (distinct at each position) and weights, and the same as a dense float64 map."""
    indices = RANDOM.random((n, bins, h, w)).argsort(axis=1)[:, :k]
    weights = RANDOM.dirichlet(np.ones(k), (n, h, w)).transpose(0, 3, 1, 2)
    dense = np.zeros((n, bins, h, w))
    np.put_along_axis(dense, indices, weights, axis=1)
    return paddle.to_tensor(indices), paddle.to_tensor(weights.astype(np.float32)), dense


def test_cross_entropy_equals_that_of_the_dense_target():
    indices, weights, dense = sparse_targets(2, 6, 5)
    logits = (30 * RANDOM.standard_normal((2, 313, 6, 5))).astype(np.float32)
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    log_probabilities = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    expected = -(dense * log_probabilities).sum(axis=1)
    cross_entropy = soft_cross_entropy(paddle.to_tensor(logits), indices, weights)
    assert cross_entropy.shape == [2, 6, 5]
    np.testing.assert_allclose(cross_entropy.numpy(), expected, rtol=1e-5, atol=1e-5)


def test_entropy_agrees_with_dense_target():
    _, weights, dense = sparse_targets(1, 3, 3)
    expected = -(dense * np.log(np.maximum(dense, 1e-300))).sum(axis=1)
    np.testing.assert_allclose(entropy(weights).numpy(), expected, rtol=1e-5, atol=1e-6)


# Annealed mean


def test_annealed_mean_is_the_expectation_under_the_softmax():
    logits = 5 * RANDOM.standard_normal((2, 313, 3, 4))
    scaled = np.exp((logits - logits.max(axis=1, keepdims=True)) / 0.2)
    expected = np.einsum("nqhw,qc->nchw", scaled / scaled.sum(axis=1, keepdims=True), load_ab_bins().numpy())
    ab = annealed_mean(paddle.to_tensor(logits.astype(np.float32)), load_ab_bins(), 0.2)
    np.testing.assert_allclose(ab.numpy(), expected, atol=1e-3)


# AuC


# The curve is 0 below the first whole t within reach and 1 from there on.
@pytest.mark.parametrize(
    ("distance", "area"), [(0, 1), (0.5, 149.5 / 150), (1, 149.5 / 150), (150, 0.5 / 150), (150.01, 0), (400, 0)]
)
def test_auc_of_a_constant_distance_equals_the_area_by_hand(distance, area):
    histogram = error_histogram(np.full((30, 40), distance))
    assert auc(histogram) == pytest.approx([area], abs=1e-12) and histogram.sum() == 1200


def test_histograms_of_bins_agree_with_counting_and_add_up():
    distance, bins = RANDOM.uniform(0, 170, (20, 25)), RANDOM.integers(0, 7, (20, 25))
    histogram = error_histogram(distance[:8], bins[:8], 7) + error_histogram(distance[8:], bins[8:], 7)
    expected = [[((bins == q) & (distance <= t)).sum() for t in range(151)] for q in range(7)]
    assert histogram.cumsum(axis=1)[:, :151].tolist() == expected
    assert histogram.sum(axis=1).tolist() == np.bincount(bins.ravel()).tolist()


# Upsampling

RED, BLUE = (190, 60, 60), (60, 60, 190)


def true_ab(image, size):
    """Return a perfect network's prediction for the image resized to `size`: [2, h/4, w/4]."""
    return targets(
        paddle.to_tensor(np.asarray(image.resize(size, Image.Resampling.BILINEAR)).transpose(2, 0, 1)[None])
    )[1][0]


@pytest.mark.parametrize("height, width", [(24, 40), (241, 400), (7, 11), (1, 1)])
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


def test_color_edge_stays_within_one_input_pixel():
    scale, (width, height) = 3.75, (480, 120)  # of the image; the network's input is 128x32
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
