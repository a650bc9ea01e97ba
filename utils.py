"""The method's equations, named and numbered as in the paper.

Class rebalancing (Section 2.2), the loss (Section 2.1), the annealed mean (Section 2.3) and the area under the curve
of color errors (Section 3.1). All are pure functions on Paddle tensors; those for the AuC take NumPy arrays.
"""

from pathlib import Path

from support.cli import UserError, report_os_errors

import numpy as np
import paddle
import paddle.nn.functional as F

RESOURCES = Path(__file__).resolve().parent / "resources"
PRIOR = RESOURCES / "prior_probs.npy"

# -------------------------------------------------------------------------------------------------
# Class rebalancing (Section 2.2)


def load_ab_bins():
    """Return the centers of the 313 ab bins in their published order, float32 [313, 2]."""
    return paddle.to_tensor(np.load(RESOURCES / "pts_in_hull.npy").astype(np.float32))


def load_prior(path=None):
    """Load how often each ab bin occurs.

    Args:
        path (str | Path): A .npy file of 313 non-negative numbers. Default: the bundled prior.

    Returns:
        Tensor: float32 [313]; sums to 1.

    Raises:
        UserError: If the file cannot be read or does not contain such numbers.
    """
    path = path or PRIOR
    try:
        with report_os_errors(f"{path}: cannot be read as a prior"):
            numbers = np.lib.format.open_memmap(path, mode="r")  # mapped: the header may declare terabytes
        if numbers.shape != (bins := len(load_ab_bins()),):
            raise UserError(f"{path}: a prior has shape ({bins},), not {numbers.shape}")
        prior = numbers.astype(np.float64)
    except (ValueError, EOFError, TypeError) as error:
        raise UserError(f"{path}: cannot be read as a prior: not a .npy file of numbers") from error
    if not (prior.min() >= 0 and 0 < prior.sum() < np.inf):  # NaN fails, too
        raise UserError(f"{path}: a prior's numbers must be finite, non-negative and not all zero")
    return paddle.to_tensor((prior / prior.sum()).astype(np.float32))


def rebalancing_weights(prior, lam=0.5):
    """Compute each ab bin's loss weight (Eq. 4): w = 1 / ((1 - lam) * prior + lam / Q), scaled to sum(prior * w) = 1.

    Args:
        prior (Tensor): float32 [Q]. Probability of each ab bin; sums to 1.
        lam (float): Share of the uniform distribution mixed into the prior, in [0, 1]. 1 disables rebalancing; the
            paper uses 0.5. With 0, bins of zero probability get the weight of the rarest bin that occurs.

    Returns:
        Tensor: float32 [Q].
    """
    p = prior.numpy().astype(np.float64)
    mixed = (1 - lam) * p + lam / len(p)
    w = 1 / np.maximum(mixed, mixed[mixed > 0].min())
    return paddle.to_tensor((w / (p * w).sum()).astype(np.float32))


GRAY_AB = 5  # an image whose ab values all lie within ±5 counts as gray


def is_gray(ab):
    """Return which images have no ab value over 5 in absolute value: [N, 2, h, w] -> bool [N]."""
    return ab.abs().max(axis=[1, 2, 3]) <= GRAY_AB


def position_weight(indices, ab, bin_weights):
    """Look up v of Eq. 3, the weight of each position in the loss: that of its nearest ab bin, or 0 in a gray image.

    Args:
        indices (Tensor): int64 [N, K, h, w]. Bins of each position, nearest first.
        ab (Tensor): float32 [N, 2, h, w]. Ground-truth ab.
        bin_weights (Tensor): float32 [Q]. Result of `rebalancing_weights`.

    Returns:
        Tensor: float32 [N, h, w].
    """
    return bin_weights[indices[:, 0]] * (~is_gray(ab)).astype("float32").reshape([-1, 1, 1])


# -------------------------------------------------------------------------------------------------
# Loss (Section 2.1)


def soft_cross_entropy(logits, indices, weights):
    """Compute the cross-entropy between logits and sparse soft targets at each position (Eq. 2 without v).

    -sum_q Z_q log softmax(x)_q = log(sum_q exp x_q) - sum_q Z_q x_q. Gradients flow to `logits` only.

    Args:
        logits (Tensor): float32 [N, Q, h, w].
        indices (Tensor): int64 [N, K, h, w]. The target's K bins, distinct at each position (see `soft_encode`).
        weights (Tensor): float32 [N, K, h, w]. Their probabilities; they sum to 1 over K.

    Returns:
        Tensor: float32 [N, h, w], in nats.
    """
    chosen = paddle.take_along_axis(logits, indices, axis=1)  #                             [N, K, h, w]
    return paddle.logsumexp(logits, axis=1) - (weights * chosen).sum(axis=1)


def entropy(weights):
    """Return the entropy of soft targets, a lower bound of their cross-entropy: [N, K, h, w] -> [N, h, w], in nats."""
    return -(weights * paddle.log(weights.clip(min=1e-30))).sum(axis=1)


# -------------------------------------------------------------------------------------------------
# Point estimate (Section 2.3)

TEMPERATURE = 0.38  # the paper's compromise between the mode (0) and the mean (1)


def annealed_mean(logits, ab_bins, temperature=TEMPERATURE):
    """Compute the expected ab under softmax(logits / temperature) (Eq. 5).

    Args:
        logits (Tensor): [N, Q, h, w].
        ab_bins (Tensor): float32 [Q, 2].
        temperature (float): Greater than 0. 1 gives the mean, values toward 0 the mode of the distribution.

    Returns:
        Tensor: ab, float32 [N, 2, h, w].
    """
    logits = logits.astype("float32").transpose([0, 2, 3, 1])  #    [N, h, w, Q]: Paddle's softmax is fast along the end
    probabilities = F.softmax(logits / temperature, axis=-1)
    return paddle.matmul(probabilities, ab_bins).transpose([0, 3, 1, 2])  #                 [N, 2, h, w]


STRIDE = 4  # input pixels per position: position (i, j) belongs to pixel (4i, 4j), as the training targets do


def upsample_ab(ab, height, width, top=0, rows=None, stride=STRIDE):
    """Upsample the network's ab bilinearly to an image's size.

    Pixels beyond the outermost positions take the color of the nearest position.

    Args:
        ab (Tensor): float32 [..., h, w].
        height (int): Height of the image in pixels.
        width (int): Width of the image in pixels.
        top (int): First row to compute.
        rows (int): Number of rows to compute. Default: all from `top` on.
        stride (int): 4 for the network's output; 1 if the values belong to the centers of a smaller image's pixels.

    Returns:
        Tensor: float32 [..., rows, width].
    """
    rows = height - top if rows is None else min(rows, height - top)
    left, right, across = _neighbors(ab.shape[-1], width, 0, width, stride)
    above, below, down = _neighbors(ab.shape[-2], height, top, rows, stride)
    first, last = int(above[0]), int(below[-1])  # a strip of the image needs few rows of positions
    ab = ab[..., first : last + 1, :]
    wide = paddle.lerp(ab.index_select(left, -1), ab.index_select(right, -1), across)  #      [..., used, width]
    return paddle.lerp(wide.index_select(above - first, -2), wide.index_select(below - first, -2), down.unsqueeze(1))


def _neighbors(positions, pixels, first, count, stride):
    """Return, along one side, the two positions around each of `count` pixels and the weight of the second one."""
    share = (np.arange(first, first + count) + 0.5) / pixels  # image and network input have the same edges
    place = ((stride * positions * share - 0.5) / stride).clip(0, positions - 1)  # input pixel 0 is centered at 0.5
    before = np.floor(place).astype(np.int64)
    after = np.minimum(before + 1, positions - 1)
    return tuple(map(paddle.to_tensor, (before, after, (place - before).astype(np.float32))))


# -------------------------------------------------------------------------------------------------
# Area under the curve of color errors (Section 3.1)

MAX_THRESHOLD = 150


def error_histogram(distance, bins=0, number=1):
    """Count the pixels of each ab bin whose ab error first lies within the threshold t, for t = 0 … 150.

    Args:
        distance (ndarray): [...]. Distance between predicted and ground-truth ab of each pixel.
        bins (ndarray): int64 [...]. Ab bin of each pixel's ground truth. Default: all pixels are counted as one bin.
        number (int): Number of bins.

    Returns:
        ndarray: int64 [number, 152]; the last column counts errors beyond 150. Histograms of several images add up, and
        a weighted histogram is the sum of its rows, times the bins' weights.
    """
    classes = MAX_THRESHOLD + 2
    first = np.ceil(distance).clip(max=MAX_THRESHOLD + 1).astype(np.int64)  # 151 for distances beyond 150
    cells = bins * classes + first
    return np.bincount(cells.ravel(), minlength=number * classes).reshape(number, classes)


def auc(histogram):
    """Integrate the share of pixels within t over t = 0 … 150 by the trapezoidal rule, divided by 150.

    Args:
        histogram (ndarray): [..., 152], see `error_histogram`.

    Returns:
        ndarray: float64 [...], in [0, 1].
    """
    shares = np.cumsum(histogram, axis=-1)[..., :-1] / np.sum(histogram, axis=-1, keepdims=True)
    return (shares[..., :-1] + shares[..., 1:]).mean(axis=-1) / 2
