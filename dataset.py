"""From files to training targets: Lab conversion, soft-encoding of ab, datasets.

The color functions take and return batches of Paddle tensors on any device. The datasets run in the worker processes of
a `DataLoader`: they decode, resize and crop (Pillow, NumPy) and return uint8.
"""

import os

from support import folders
from support.cli import note
from support.images import InvalidImageError, crop_resized, open_rgb, read_rgb  # noqa: F401  `read_rgb` for callers
from support.neighbors import Lookup

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle.io import DistributedBatchSampler

# -------------------------------------------------------------------------------------------------
# Color: sRGB (IEC 61966-2-1) and CIE Lab, D65 white, 2 degree observer

RGB_TO_XYZ = ((0.412453, 0.357580, 0.180423), (0.212671, 0.715160, 0.072169), (0.019334, 0.119193, 0.950227))
XYZ_TO_RGB = tuple(map(tuple, np.linalg.inv(RGB_TO_XYZ).tolist()))
WHITE = (0.95047, 1.0, 1.08883)
DELTA = 6 / 29  # below it the cube root of CIE Lab continues as its tangent
ROUNDING = 1e-4  # by which linear RGB of a color in gamut may leave [0, 1]
CHROMA_STEPS = 0.5 ** np.arange(1, 8, dtype=np.float32)  # of the bisection, as shares


def rgb_to_lab(rgb):
    """Convert sRGB, uint8 or float in [0, 1], to Lab: [N, 3, H, W] -> float32 [N, 3, H, W].

    L is in [0, 100]; a and b are within [-110, 110].
    """
    xyz = _mix(RGB_TO_XYZ, _linear(rgb))
    fx, fy, fz = (_lab_curve(channel / white) for channel, white in zip(xyz, WHITE))
    return paddle.concat([116 * fy - 16, 500 * (fx - fy), 200 * (fy - fz)], axis=1)


def rgb_to_lightness(rgb):
    """Convert sRGB to the L of `rgb_to_lab` alone, in a third of the time: [N, 3, H, W] -> float32 [N, 1, H, W]."""
    (y,) = _mix(RGB_TO_XYZ[1:2], _linear(rgb))
    return 116 * _lab_curve(y) - 16


def lab_to_rgb(lab, keep_lightness=False):
    """Convert Lab to sRGB in [0, 1].

    Args:
        lab (Tensor): float32 [N, 3, H, W].
        keep_lightness (bool): Reduce the chroma of out-of-gamut colors until they are in gamut, which keeps their
            lightness and hue, instead of clipping their channels.

    Returns:
        Tensor: float32 [N, 3, H, W].
    """
    channels = lab.split(3, axis=1)
    linear = _lab_to_linear(*channels)
    if keep_lightness:
        linear = _in_gamut(*channels, linear)
    linear = paddle.concat(linear, axis=1).clip(0, 1)
    # The curve lies below the line from where it begins.
    curve = 1.055 * _power(linear.clip(min=0.0031308), 1 / 2.4) - 0.055
    return paddle.minimum(12.92 * linear, curve)


def _lab_to_linear(lightness, a, b):
    """Convert Lab to linear RGB, which is in [0, 1] within the gamut of sRGB: three channels of any shape, each."""
    fy = (lightness + 16) / 116
    f = (fy + a / 500, fy, fy - b / 200)
    return _mix(XYZ_TO_RGB, [white * _inverse_lab_curve(channel) for channel, white in zip(f, WHITE)])


def _in_gamut(lightness, a, b, linear):
    """Return `linear`, the linear RGB of Lab colors, with the largest chroma of each color that is in gamut."""
    # NumPy takes a fifth of the time per operation, and there are few such colors.
    outside = paddle.to_tensor(np.flatnonzero(_is_outside(linear).numpy()))  #                    [K]
    if not len(outside):
        return linear
    lightness, a, b = (paddle.gather(channel.flatten(), outside).numpy() for channel in (lightness, a, b))
    share = np.zeros_like(a)  # of the chroma
    for step in CHROMA_STEPS:  # bisection; the gray of a lightness is in gamut
        more = share + step
        share = np.where(_is_outside(_lab_to_linear(lightness, more * a, more * b)), share, more)
    inside = map(paddle.to_tensor, _lab_to_linear(lightness, share * a, share * b))
    return [paddle.scatter(x.flatten(), outside, new).reshape(x.shape) for x, new in zip(linear, inside)]


def _is_outside(linear):
    red, green, blue = ((channel < -ROUNDING) | (channel > 1 + ROUNDING) for channel in linear)
    return red | green | blue


def to_uint8(rgb):
    """Round float values in [0, 1] to uint8 in [0, 255]."""
    return (rgb * 255 + 0.5).astype("uint8")


def _linear(rgb):
    """Undo the sRGB transfer curve: [N, 3, H, W] -> three channels, each float32 [N, 1, H, W]."""
    if rgb.dtype == paddle.uint8:  # twice as fast by looking up the 256 levels
        levels = _undo_transfer(paddle.arange(256, dtype="float32") / 255)
        linear = paddle.gather(levels, rgb.flatten().astype("int32")).reshape(rgb.shape)
    else:
        linear = _undo_transfer(rgb.astype("float32"))
    return linear.split(3, axis=1)


def _undo_transfer(rgb):
    return paddle.where(rgb > 0.04045, ((rgb + 0.055) / 1.055) ** 2.4, rgb / 12.92)


def _mix(matrix, channels):
    # Written out, because a matrix product may run in TF32 on a GPU: three digits are too few here.
    return [m0 * channels[0] + m1 * channels[1] + m2 * channels[2] for m0, m1, m2 in matrix]


def _lab_curve(t):
    # The tangent lies above the cube root; `clip` keeps the root at DELTA below DELTA^3.
    return paddle.minimum(_power(t.clip(min=DELTA**3), 1 / 3), t / (3 * DELTA**2) + 4 / 29)


def _inverse_lab_curve(f):
    cube = f.clip(min=DELTA)
    return (cube * cube * cube + 3 * DELTA**2 * (f - cube)).clip(min=0)


def _power(x, exponent):
    return paddle.exp(exponent * paddle.log(x))  # on the CPU twice as fast as Paddle's own power


def targets(rgb):
    """Split images into the network's input and the colors to predict.

    Args:
        rgb (Tensor): uint8 [N, 3, H, W].

    Returns:
        tuple[Tensor, Tensor]: Lightness, float32 [N, 1, H, W] in [0, 100], and ab, float32 [N, 2, H/4, W/4]: that of
        every 4th pixel, as in the authors' graph.
    """
    return rgb_to_lightness(rgb), rgb_to_lab(rgb[:, :, ::4, ::4])[:, 1:]


# -------------------------------------------------------------------------------------------------
# Soft-encoding of ab (Section 2.1)


def soft_encode(ab, ab_bins, neighbors=5, sigma=5.0, lookup=None):
    """Encode each color as a distribution over its nearest bins, with weights proportional to exp(-d^2 / 2 sigma^2).

    Args:
        ab (Tensor): float32 [N, 2, h, w], within ±128.
        ab_bins (Tensor): float32 [Q, 2].
        neighbors (int): Number of bins K; the paper uses 5.
        sigma (float): Standard deviation of the Gaussian in ab units; the paper uses 5.
        lookup (Lookup): `Lookup(ab_bins, neighbors)`, if it was made before; making it takes about 0.15 s.

    Returns:
        tuple[Tensor, Tensor]: Indices of the bins, int64 [N, K, h, w], nearest first, and their weights, float32
        [N, K, h, w]; they sum to 1 over K.
    """
    n, _, h, w = ab.shape
    lookup = lookup or Lookup(ab_bins, neighbors)
    indices, squared = lookup.nearest(ab.transpose([0, 2, 3, 1]).reshape([-1, 2]))  #        [N * h * w, K]
    weights = F.softmax(-squared / (2 * sigma**2), axis=1)
    return tuple(x.reshape([n, h, w, neighbors]).transpose([0, 3, 1, 2]) for x in (indices, weights))


# -------------------------------------------------------------------------------------------------
# Files

COLORING = "coloring.json"  # describes how the results in its folder were made; such a folder is no input
RECORDS = "coloring.jsonl"  # from which image each of them was made


def list_images(root):
    """Return the sorted paths of the images in the folder `root` and its subfolders; [root] if it is a file.

    Results of test.py are left out. Raises UserError when `root` does not exist or contains no images.
    """
    return folders.list_images(root, COLORING)


def named_images(*roots):
    """Return the images in folders and files as {name: path}, as `support.folders.named_images`."""
    return folders.named_images(roots, COLORING)


# -------------------------------------------------------------------------------------------------
# Datasets

ATTEMPTS = 9  # images that are tried in place of an unreadable one, including itself


class ColorizationDataset(paddle.io.Dataset):
    """Square crops for training and validation.

    An item is (crop, broken): uint8 [3, crop_size, crop_size] and the number of files that could not be read, int64.
    Each of these is reported on stderr and replaced by a random other image.

    Args:
        paths (list[str]): Image files.
        load_size (int): The shorter side is resized to this many pixels before the crop.
        crop_size (int): Side of the crop in pixels.
        augment (bool): Take random crops, half of them mirrored, instead of center crops. They depend on `seed`,
            `epoch` and the item's index only, so a resumed run, or one with more processes, draws the same.
        seed (int): Seed of the random crops.
    """

    def __init__(self, paths, load_size, crop_size, augment=False, seed=0):
        super().__init__()
        # One array: a worker process that reads a list of a million strings would copy all of it.
        self.paths = np.array([os.fsencode(path) for path in paths])
        self.load_size, self.crop_size = load_size, crop_size
        self.augment, self.seed, self.epoch = augment, seed, 0

    def __len__(self):
        return len(self.paths)

    def path(self, index):
        """Return the path of the index-th image."""
        return os.fsdecode(self.paths[index])

    def __getitem__(self, index):
        random = np.random.default_rng((self.seed, self.epoch, index))
        for broken in range(ATTEMPTS):
            try:
                return self._crop(self.path(index), random), np.int64(broken)
            except InvalidImageError as error:
                note(f"skipped {error}")
            index = int(random.integers(len(self)))
        return np.full((3, self.crop_size, self.crop_size), 128, np.uint8), np.int64(ATTEMPTS)  # gray: its loss is 0

    def _crop(self, path, random):
        image = open_rgb(path, least_side=self.load_size)
        if not self.augment:
            return crop_resized(image, self.load_size, self.crop_size).transpose(2, 0, 1)
        across, down, mirror = random.random(3)
        crop = crop_resized(image, self.load_size, self.crop_size, across, down)
        return (crop[:, ::-1] if mirror < 0.5 else crop).transpose(2, 0, 1)


class EpochSampler(DistributedBatchSampler):
    """Random batches of the whole dataset, divided among the processes, from any batch of any epoch on.

    The order depends on seed and epoch only. Each process takes its part of every batch. (Paddle's own order depends
    on the number of processes.)
    """

    def begin(self, seed, epoch, skip):
        """Set the epoch to draw next and the number of its batches to skip."""
        self.seed, self.epoch, self.skip = seed, epoch, skip

    def __iter__(self):
        order = np.random.default_rng((self.seed, self.epoch)).permutation(len(self.dataset))
        for batch in range(self.skip, len(self)):
            start = (batch * self.nranks + self.local_rank) * self.batch_size
            yield order[start : start + self.batch_size].tolist()

    def __len__(self):
        """Return the number of full batches per epoch."""
        return len(self.dataset) // (self.batch_size * self.nranks)
