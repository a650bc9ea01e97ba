"""From files to targets: finding and reading images, Lab conversion, soft-encoding of ab, datasets.

The functions on colors take and return Paddle tensors, a batch at a time, on whatever device they
are. The datasets run in the worker processes of a `DataLoader`: they only decode, resize and crop
(Pillow, NumPy) and hand on uint8.
"""

import os
import sys
from functools import cache, lru_cache

from support.cli import UserError, note
from support.images import InvalidImageError, crop_resized, list_images, named_images, open_rgb, read_rgb  # noqa: F401

import numpy as np
import paddle
from paddle.io import DistributedBatchSampler

# -------------------------------------------------------------------------------------------------
# Color: sRGB (IEC 61966-2-1) and CIE Lab, D65 white, 2 degree observer

RGB_TO_XYZ = ((0.412453, 0.357580, 0.180423), (0.212671, 0.715160, 0.072169), (0.019334, 0.119193, 0.950227))
XYZ_TO_RGB = tuple(map(tuple, np.linalg.inv(RGB_TO_XYZ).tolist()))
WHITE = (0.95047, 1.0, 1.08883)
DELTA = 6 / 29  # where the cube root of CIE Lab turns linear


def rgb_to_lab(rgb):
    """[N, 3, H, W], uint8 or float in [0, 1] -> float32 [N, 3, H, W]: L in [0, 100], a and b within [-110, 110]."""
    xyz = _mix(RGB_TO_XYZ, _linear(rgb))
    fx, fy, fz = (_lab_curve(channel / white) for channel, white in zip(xyz, WHITE))
    return paddle.stack([116 * fy - 16, 500 * (fx - fy), 200 * (fy - fz)], axis=1)


def rgb_to_lightness(rgb):
    """The L of `rgb_to_lab` alone, at a third of the cost: [N, 3, H, W] -> float32 [N, 1, H, W]."""
    (y,) = _mix(RGB_TO_XYZ[1:2], _linear(rgb))
    return (116 * _lab_curve(y) - 16).unsqueeze(1)


def lab_to_rgb(lab):
    """float32 [N, 3, H, W] Lab -> float32 [N, 3, H, W] sRGB in [0, 1]; out-of-gamut values are clipped."""
    return _transfer(_lab_to_linear(lab))


def to_uint8(rgb):
    """float in [0, 1] -> uint8, rounded."""
    return (rgb * 255 + 0.5).astype("uint8")


def photograph_lightness(rgb):
    """`rgb_to_lightness` of one photograph: uint8 array [H, W, 3] -> float32 tensor [1, 1, H, W].

    NumPy looks tables up in a tenth of the time that Paddle takes on the CPU.
    """
    table = _linear_table().numpy()
    y = sum(np.float32(share) * table.take(rgb[..., channel]) for channel, share in enumerate(RGB_TO_XYZ[1]))
    return (116 * _lab_curve(paddle.to_tensor(y)) - 16).unsqueeze([0, 1])


def lab_to_photograph(lab):
    """`to_uint8(lab_to_rgb(lab))` of one photograph, likewise: [1, 3, H, W] -> uint8 array [H, W, 3].

    The table has so many steps that one sample in a hundred comes out one higher or lower.
    """
    steps = (_lab_to_linear(lab) * (2**16 - 1) + 0.5).astype("int32")
    return _srgb_table().take(steps[0].transpose([1, 2, 0]).numpy())


def _lab_to_linear(lab):
    """Lab -> linear RGB [N, 3, H, W], clipped to [0, 1]."""
    lightness, a, b = lab.unbind(axis=1)
    fy = (lightness + 16) / 116
    f = (fy + a / 500, fy, fy - b / 200)
    xyz = [white * _inverse_lab_curve(channel) for channel, white in zip(f, WHITE)]
    return paddle.stack(_mix(XYZ_TO_RGB, xyz), axis=1).clip(0, 1)


def _transfer(rgb):
    root = paddle.exp(paddle.log(rgb.clip(min=0.0031308)) / 2.4)
    return paddle.where(rgb > 0.0031308, 1.055 * root - 0.055, 12.92 * rgb)


@cache
def _srgb_table():
    """Linear light in 2^16 steps -> sRGB, uint8."""
    return to_uint8(_transfer(paddle.arange(2**16, dtype="float32") / (2**16 - 1))).numpy()


def _linear(rgb):
    """The three channels [N, H, W] with the sRGB transfer curve undone."""
    if rgb.dtype == paddle.uint8:
        linear = paddle.gather(_linear_table(), rgb.flatten().astype("int32")).reshape(rgb.shape)
    else:
        linear = _undo_transfer(rgb.astype("float32"))
    return linear.unbind(axis=1)


def _undo_transfer(rgb):
    return paddle.where(rgb > 0.04045, ((rgb + 0.055) / 1.055) ** 2.4, rgb / 12.92)


@cache
def _linear_table():
    return _undo_transfer(paddle.arange(256, dtype="float32") / 255)


def _mix(matrix, channels):
    # Written out, because a matrix product may run in TF32 on a GPU: three digits are not enough here.
    return [m0 * channels[0] + m1 * channels[1] + m2 * channels[2] for m0, m1, m2 in matrix]


def _lab_curve(t):
    # The cube root, and below DELTA^3 its tangent there: the sum of both, each clipped to where it holds, because
    # `where` takes longer. exp(log(t) / 3), because Paddle's `pow` takes four times as long on the CPU.
    root = paddle.exp(paddle.log(t.clip(min=DELTA**3)) / 3)
    return root + (t.clip(max=DELTA**3) - DELTA**3) / (3 * DELTA**2)


def _inverse_lab_curve(f):
    above = f.clip(min=DELTA)
    return (above * above * above + (3 * DELTA**2) * (f.clip(max=DELTA) - DELTA)).clip(min=0)


def targets(rgb):
    """uint8 [N, 3, H, W] -> lightness [N, 1, H, W] and the ab to predict [N, 2, H/4, W/4].

    ab at a quarter of the resolution is every 4th pixel, as in the authors' graph.
    """
    return rgb_to_lightness(rgb), rgb_to_lab(rgb[:, :, ::4, ::4])[:, 1:]


# -------------------------------------------------------------------------------------------------
# Soft-encoding of ab (Section 2.2 of the paper)

AB_LIMIT = 128  # `soft_encode` is exact for |a|, |b| up to here; sRGB stays within 110
CELL_SIDE = 2  # of the cells of the look-up grid, in ab units


def soft_encode(ab, ab_bins, neighbors=5, sigma=5.0):
    """Each color as a distribution over its nearest bins, weighted by a Gaussian of the distance.

    ab [N, 2, h, w], ab_bins [Q, 2] -> indices int64 [N, neighbors, h, w] of bins, nearest first, and
    weights float32 [N, neighbors, h, w], proportional to exp(-d^2 / 2 sigma^2), which sum to 1.

    The neighbors are exact. A color looks up the few bins that can be among the nearest of its cell
    of the ab plane, and only those are compared.
    """
    bin_table, a_table, b_table = _candidate_tables(ab_bins, neighbors)
    a, b = (x.reshape([-1, 1]) for x in ab.unbind(axis=1))  #                                [M, 1]
    row, column = (((x + AB_LIMIT) / CELL_SIDE).floor().clip(0, _cells() - 1).astype("int32") for x in (a, b))
    cell = (row * _cells() + column).flatten()  #                                               [M]
    offset_a, offset_b = paddle.gather(a_table, cell) - a, paddle.gather(b_table, cell) - b
    squared = offset_a * offset_a + offset_b * offset_b  #                                   [M, K]
    squared, order = paddle.topk(squared, neighbors, axis=1, largest=False)
    indices = paddle.take_along_axis(paddle.gather(bin_table, cell), order, axis=1)
    # Relative to the nearest: far from every bin all exponentials would underflow to 0 / 0.
    weights = paddle.exp((squared[:, :1] - squared) / (2 * sigma**2))
    weights = weights / weights.sum(axis=1, keepdim=True)

    def to_map(x):
        return x.reshape([ab.shape[0], *ab.shape[2:], neighbors]).transpose([0, 3, 1, 2])

    return to_map(indices), to_map(weights)


def _cells():
    return 2 * AB_LIMIT // CELL_SIDE


@lru_cache(maxsize=8)  # by the identity of the tensor `ab_bins`: load it once
def _candidate_tables(ab_bins, neighbors):
    """For every cell the bins that are among the nearest of some color in it.

    Their numbers, int64 [cells, K], and their coordinates a and b, float32 [cells, K].

    A bin is one if its distance from the cell's nearest point is at most the `neighbors`-th smallest of the bins'
    distances from the cell's farthest points. Rows are filled up with bins at infinity.
    """
    bins = ab_bins.numpy().astype(np.float64)
    if not 1 <= neighbors <= len(bins):
        raise UserError(f"the number of neighbors must be from 1 to {len(bins)}, not {neighbors}")
    centers = np.arange(_cells()) * CELL_SIDE + CELL_SIDE / 2 - AB_LIMIT
    a_offset = np.abs(centers[:, None] - bins[:, 0])[:, None, :]  #                  [cells, 1, Q]
    b_offset = np.abs(centers[:, None] - bins[:, 1])[None, :, :]  #                  [1, cells, Q]
    half = CELL_SIDE / 2
    nearest = np.hypot((a_offset - half).clip(0), (b_offset - half).clip(0)).reshape(-1, len(bins))
    farthest = np.hypot(a_offset + half, b_offset + half).reshape(-1, len(bins))
    bound = np.partition(farthest, neighbors - 1, axis=1)[:, neighbors - 1 : neighbors]
    possible = nearest <= bound + 1e-3  # the margin covers float32's rounding of the distances
    width = possible.sum(axis=1).max()
    indices = np.argsort(~possible, axis=1, kind="stable")[:, :width]  # the possible ones first
    coordinates = bins[indices].astype(np.float32)
    coordinates[~np.take_along_axis(possible, indices, axis=1)] = 1e9
    return tuple(map(paddle.to_tensor, (indices, coordinates[..., 0], coordinates[..., 1])))


# -------------------------------------------------------------------------------------------------
# Datasets

MAX_REPLACEMENTS = 8


class ColorizationDataset(paddle.io.Dataset):
    """Squares of photographs for the network to color.

    In training (`augment`) the square is a random one, mirrored half of the time; otherwise the
    center. What is drawn depends on `seed`, `epoch` and the index alone, not on the worker, the process or
    what came before, so that a resumed run, or one spread over more processes, sees the same.

    An item is (uint8 [3, crop_size, crop_size], int64 broken). A file that cannot be read costs a line on
    standard error and another image takes its place; `broken` counts the files that failed.
    """

    def __init__(self, paths, load_size, crop_size, augment=False, seed=0):
        super().__init__()
        # One string of bytes: a worker process that touches a list of a million strings copies it all.
        encoded = [os.fsencode(path) for path in paths]
        self.paths, self.ends = b"".join(encoded), np.cumsum([len(path) for path in encoded])
        self.load_size, self.crop_size = load_size, crop_size
        self.augment, self.seed, self.epoch = augment, seed, 0

    def __len__(self):
        return len(self.ends)

    def path(self, index):
        return os.fsdecode(self.paths[self.ends[index - 1] if index else 0 : self.ends[index]])

    def __getitem__(self, index):
        random = np.random.default_rng((self.seed, self.epoch, index))
        broken = 0
        while True:
            try:
                return self._square(self.path(index), random), np.int64(broken)
            except InvalidImageError as error:
                print(f"skipped {error}", file=sys.stderr, flush=True)
            broken += 1
            if broken > MAX_REPLACEMENTS:  # a gray image: it teaches nothing (its weight is 0)
                return np.full((3, self.crop_size, self.crop_size), 128, np.uint8), np.int64(broken)
            index = int(random.integers(len(self)))

    def _square(self, path, random):
        image = open_rgb(path, least_side=self.load_size)
        if not self.augment:
            return crop_resized(image, self.load_size, self.crop_size).transpose(2, 0, 1)
        across, down, mirror = random.random(3)
        square = crop_resized(image, self.load_size, self.crop_size, across, down)
        return (square[:, ::-1] if mirror < 0.5 else square).transpose(2, 0, 1)


class ClassificationDataset(paddle.io.Dataset):
    """Center squares of images for a classifier.

    An item is (uint8 [3, crop_size, crop_size], whether the file could be read).
    """

    def __init__(self, paths, load_size, crop_size):
        super().__init__()
        self.paths, self.load_size, self.crop_size = paths, load_size, crop_size

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        try:
            image = open_rgb(self.paths[index], least_side=self.load_size)
        except InvalidImageError as error:
            note(f"skipped {error}")
            return np.zeros((3, self.crop_size, self.crop_size), np.uint8), False
        return crop_resized(image, self.load_size, self.crop_size).transpose(2, 0, 1), True


class EpochSampler(DistributedBatchSampler):
    """Random batches of the whole set, shared out among the processes, from anywhere in any epoch.

    The order follows from seed and epoch alone, whatever the number of processes: each takes its part of every
    batch. (Paddle's own order depends on their number, as it fills the set up to a multiple of it beforehand.)
    """

    def begin(self, seed, epoch, skip):
        self.seed, self.epoch, self.skip = seed, epoch, skip

    def __iter__(self):
        order = np.random.default_rng((self.seed, self.epoch)).permutation(len(self.dataset))
        for batch in range(self.skip, len(self)):
            start = (batch * self.nranks + self.local_rank) * self.batch_size
            yield order[start : start + self.batch_size].tolist()

    def __len__(self):
        """Batches in an epoch; the few images that do not fill one wait for the next epoch."""
        return len(self.dataset) // (self.batch_size * self.nranks)
