"""The method's mathematics: the ab bins, their prior and weights (Section 2.2 of the paper), the loss, the annealed
mean and its way back to the pixels (Sections 2.1 and 2.3), the area under the curve of errors (Section 3.1).

Pure functions on Paddle tensors (the AuC: on NumPy arrays).
"""

from pathlib import Path

from support.cli import UserError

import numpy as np
import paddle

RESOURCES = Path(__file__).resolve().parent / "resources"
TEMPERATURE = 0.38  # of the annealed mean: the paper's compromise between vivid (0) and dull (1)

# -------------------------------------------------------------------------------------------------
# Bins, prior, weights (Section 2.2 of the paper)


def load_ab_bins():
    """The centers of the 313 ab bins, in the published order: float32 [313, 2]."""
    return paddle.to_tensor(np.load(RESOURCES / "pts_in_hull.npy").astype(np.float32))


def load_prior(path=None):
    """The distribution of colors over the bins, float32 [313], sums to 1; by default the shipped one.

    Raises UserError when the file is no array of 313 finite, non-negative numbers with a positive sum.
    """
    path = path or RESOURCES / "prior_probs.npy"
    try:
        with open(path, "rb") as file:
            prior = np.lib.format.read_array(file, allow_pickle=False).astype(np.float64)
    except OSError as error:
        raise UserError(f"{path}: cannot be read as a prior: {error.strerror.lower()}") from error
    except (ValueError, EOFError, TypeError) as error:
        raise UserError(f"{path}: cannot be read as a prior: no .npy file of numbers") from error
    if prior.shape != (bins := len(load_ab_bins()),):
        raise UserError(f"{path}: a prior has the shape ({bins},), this has {prior.shape}")
    if not (np.isfinite(prior).all() and (prior >= 0).all() and prior.sum() > 0):
        raise UserError(f"{path}: a prior's numbers are finite, non-negative and not all zero")
    return paddle.to_tensor((prior / prior.sum()).astype(np.float32))


def rebalancing_weights(prior, lam=0.5):
    """The weight of each bin in the loss (Eq. 4): w = 1 / ((1 - lam) prior + lam / Q), scaled to sum(prior * w) = 1.

    prior float32 [Q] -> float32 [Q]. `lam` in [0, 1]: 1 weights all bins alike, 0 fully by rarity.
    A bin that never occurs is given the weight of the rarest one that does.
    """
    if not 0 <= lam <= 1:
        raise UserError(f"lambda (--gamma) lies in [0, 1], not at {lam}")
    p = prior.numpy().astype(np.float64)
    mixed = (1 - lam) * p + lam / len(p)
    weights = 1 / np.maximum(mixed, mixed[mixed > 0].min())
    return paddle.to_tensor((weights / (p * weights).sum()).astype(np.float32))


GRAY_AB = 5  # an image whose ab all stay within this teaches no color


def is_gray(ab):
    """Which images have no ab over 5 in absolute value: [N, 2, h, w] -> bool [N]."""
    return ab.abs().max(axis=[1, 2, 3]) <= GRAY_AB


# -------------------------------------------------------------------------------------------------


def position_weight(indices, ab, bin_weights):
    """v of Eq. 3: how much each position counts in the loss. 0 everywhere in a gray image.

    indices int64 [N, K, h, w] of the bins of each position, nearest first; ab [N, 2, h, w], its true color;
    bin_weights [Q], from `rebalancing_weights` -> float32 [N, h, w].
    """
    nearest = indices[:, 0]
    v = paddle.gather(bin_weights, nearest.flatten()).reshape(nearest.shape)
    return v * (~is_gray(ab)).astype("float32").reshape([-1, 1, 1])


# -------------------------------------------------------------------------------------------------
# Loss and point estimate


def soft_cross_entropy(logits, indices, weights):
    """Cross-entropy with a soft target that is given by its few non-zero entries (Eq. 2, without v).

    logits [N, Q, h, w]; indices int64 and weights float32 [N, K, h, w] as `soft_encode` returns them
    (weights sum to 1, the indices of a position differ) -> float32 [N, h, w], nats per position.
    Gradients reach the logits only.
    """
    return _SoftCrossEntropy.apply(logits, indices, weights)


class _SoftCrossEntropy(paddle.autograd.PyLayer):
    """-sum_k w_k log p_k = log(sum_q exp x_q) - sum_k w_k x_k, whose gradient is softmax minus target.

    By hand, because nothing of the logits' size is then kept but the logits; and Paddle's own log_softmax along
    axis 1 is some thirty times slower on the CPU, its cross_entropy cut off at 64 nats there.
    """

    @staticmethod
    def forward(ctx, logits, indices, weights):
        peak = logits.max(axis=1, keepdim=True)
        log_sum = (logits - peak).exp_().sum(axis=1, keepdim=True).log() + peak  #          [N, 1, h, w]
        ctx.save_for_backward(logits, indices, weights, log_sum)
        chosen = paddle.take_along_axis(logits, indices, axis=1)  #                         [N, K, h, w]
        return log_sum.squeeze(1) - (weights * chosen).sum(axis=1)

    @staticmethod
    def backward(ctx, gradient):
        logits, indices, weights, log_sum = ctx.saved_tensor()
        result = (logits - log_sum).exp_()  #                                               [N, Q, h, w]
        result = paddle.put_along_axis(result, indices, -weights, axis=1, reduce="add")
        return result.multiply_(gradient.unsqueeze(1))


def entropy(weights):
    """Of soft targets [N, K, h, w] -> [N, h, w], in nats: what the cross-entropy cannot fall below."""
    return -(weights * paddle.log(weights.clip(min=1e-30))).sum(axis=1)


def annealed_mean(logits, ab_bins, temperature=0.38):  # a literal: an exported program cannot look a name up
    """The expected ab under softmax(logits / temperature) (Eq. 5).

    logits [N, Q, h, w], ab_bins [Q, 2] -> ab [N, 2, h, w]. The temperature is > 0: 1 is the mean
    (dull), toward 0 the mode (vivid, but patchy).
    """
    scaled = logits.astype("float32") / temperature  #                                  [N, Q, h, w]
    flat = scaled.flatten(2)  #                                                           [N, Q, hw]
    likelihood = paddle.exp(flat - flat.max(axis=1, keepdim=True))
    # A softmax along axis 1 is slow on the CPU; the division by the sum can follow the expectation.
    ab = paddle.matmul(ab_bins, likelihood, transpose_x=True) / likelihood.sum(axis=1, keepdim=True)  # [N, 2, hw]
    # Not the logits' shape: an exported program would bring them into another layout to ask for it.
    return ab.reshape([scaled.shape[0], 2, *scaled.shape[2:]])


STRIDE = 4  # in pixels of the network's input: its output at (i, j) is the color of pixel (4i, 4j), as its targets were


def upsample_ab(ab, height, width, top=0, rows=None):
    """The network's ab brought bilinearly to a photograph of height x width pixels that fills its input.

    ab [..., h, w] -> [..., rows, width]: `rows` rows from `top` on, by default all. Beyond the outermost positions
    their color goes on.
    """
    rows = height - top if rows is None else min(rows, height - top)
    down, across = _interpolation(ab.shape[-2], height, top, rows), _interpolation(ab.shape[-1], width, 0, width)
    used = np.flatnonzero(down.any(axis=0))  # a strip of a large photograph needs few of the network's rows
    used = slice(used[0], used[-1] + 1)
    wide = paddle.matmul(ab[..., used, :], paddle.to_tensor(across), transpose_y=True)  #    [..., used, width]
    return paddle.matmul(paddle.to_tensor(down[:, used]), wide)


def _interpolation(cells, pixels, first, count):
    """Along one side: how much each of the network's positions counts at each of `count` pixels: [count, cells].

    Pillow resizes a photograph edge to edge: its pixel p, of `pixels`, has its middle at the share
    (p + 0.5) / pixels of the network's input as well.
    """
    share = (np.arange(first, first + count) + 0.5) / pixels
    in_network = STRIDE * cells * share - 0.5  # 0 is the middle of the input's first pixel
    position = (in_network / STRIDE).clip(0, cells - 1)
    before, pixel = np.floor(position).astype(np.int64), np.arange(count)
    weights = np.zeros((count, cells + 1), np.float32)
    weights[pixel, before], weights[pixel, before + 1] = 1 - (position - before), position - before
    return weights[:, :cells]


# -------------------------------------------------------------------------------------------------
# Area under the curve of color errors (Section 3.1)

MAX_THRESHOLD = 150


def first_threshold(distance):
    """The smallest whole t that each distance (NumPy, any shape) lies within, int64; 151 beyond 150."""
    return np.ceil(distance).clip(max=MAX_THRESHOLD + 1).astype(np.int64)


def error_histogram(predicted_ab, true_ab, weights=None):
    """How many pixels (or how much weight) first lie within the threshold t, for t = 0 … 150.

    predicted_ab, true_ab [2, …] NumPy arrays, weights [...] or None -> float64 [152]; the last entry
    is what lies farther off than 150. Histograms of several images add up.
    """
    distance = np.hypot(*(np.asarray(predicted_ab) - np.asarray(true_ab)).reshape(2, -1))
    weights = None if weights is None else np.asarray(weights).ravel()
    return np.bincount(first_threshold(distance), weights, MAX_THRESHOLD + 2).astype(np.float64)


def auc(histogram):
    """Area under "share of pixels within t" over t = 0 … 150, by trapezoids, divided by 150: in [0, 1]."""
    shares = np.cumsum(histogram)[: MAX_THRESHOLD + 1] / np.sum(histogram)
    return float((shares[:-1] + shares[1:]).mean() / 2)
