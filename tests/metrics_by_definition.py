"""The metrics in float64, computed from their definitions with scikit-image and SciPy, for comparison."""

import numpy as np
import paddle
import paddle.nn.functional as F
from scipy.spatial import cKDTree
from skimage.color import lab2rgb, rgb2lab

from utils import load_ab_bins, load_prior, rebalancing_weights


def image_ab(image):
    """Return the ab of an image's pixels, [M, 2]."""
    return rgb2lab(image)[..., 1:].reshape(-1, 2)


def nearest_bins(ab):
    return cKDTree(load_ab_bins().numpy()).query(ab)[1]


def auc_by_definition(true_ab, predicted_ab, bins):
    """Return raw, rebalanced and macro AuC of the pixels of all images; `bins` are those nearest to `true_ab`."""
    distance = np.linalg.norm(true_ab - predicted_ab, axis=1)
    inverse_prior = rebalancing_weights(load_prior(), lam=0).numpy().astype(np.float64)
    inverse_count = 1 / np.bincount(bins, minlength=313).clip(1)
    result = []
    for weights in (np.ones(len(bins)), inverse_prior[bins], inverse_count[bins]):
        curve = [weights[distance <= t].sum() / weights.sum() for t in range(151)]
        result.append(sum((curve[t] + curve[t + 1]) / 2 for t in range(150)) / 150)
    return result


def as_gray(image):
    """Return the image with ab = 0, uint8."""
    return (lab2rgb(rgb2lab(image) * (1, 0, 0)) * 255).round().astype(np.uint8)


def paper_colorfulness(image):
    """Hasler and Süsstrunk 2003, section 7."""
    red, green, blue = image.reshape(-1, 3).astype(np.float64).T
    rg, yb = red - green, 0.5 * (red + green) - blue
    sigma = np.sqrt(np.var(rg) + np.var(yb))
    mu = np.sqrt(np.mean(rg) ** 2 + np.mean(yb) ** 2)
    return sigma + 0.3 * mu


def classify(rgb):
    """Return random mixtures of the colors in an 8x8 grid, instead of a classifier: [N, 3, H, W] -> [N, 1000]."""
    weights = np.random.default_rng(0).normal(size=(3 * 8 * 8, 1000)).astype(np.float32)
    return F.adaptive_avg_pool2d(rgb, 8).flatten(1) @ paddle.to_tensor(weights)
