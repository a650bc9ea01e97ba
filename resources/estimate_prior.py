"""Estimate the prior: how often each of the 313 ab bins occurs in a folder of images.

    python resources/estimate_prior.py --image_dir DIR                   writes ./prior_probs.npy
    python train.py --image_dir DIR --prior prior_probs.npy              trains with it

The prior is the mean, over all pixels, of each color's distribution over the bins (a Gaussian with sigma 5 over all
bins), after one pixel is added to every bin. Images are resized to 256x256, so that each has the same weight. Gray
images and unreadable files are left out and counted.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from support import cli
from support.cpu import use_all_cores
from support.files import atomic_path, make_folder
from support.images import open_rgb
from support.workers import default_workers, parallel_map

import numpy as np
import paddle
from PIL import Image

from dataset import list_images, rgb_to_lab
from utils import is_gray, load_ab_bins

SIZE = 256
CHUNK = 4096  # cells that are encoded together
AB_LIMIT = 128  # colors are counted for ab within ±AB_LIMIT; sRGB stays within 110
CELLS_PER_UNIT = 4  # colors are counted in cells of a quarter unit of ab, then encoded from their centers
CELLS = 2 * AB_LIMIT * CELLS_PER_UNIT  # on each axis


def read_square(path):
    """Read a whole image, resized to uint8 [SIZE, SIZE, 3]."""
    return np.asarray(open_rgb(path, least_side=SIZE).resize((SIZE, SIZE), Image.Resampling.BILINEAR))


def count_colors(ab):
    """Count the colors in each cell of the ab plane: ab [2, H, W] -> int64 [CELLS * CELLS]."""
    a, b = np.floor((ab + AB_LIMIT) * CELLS_PER_UNIT).astype(np.int64).reshape(2, -1)
    return np.bincount(a * CELLS + b, minlength=CELLS * CELLS)


def encode_counts(counts, ab_bins, sigma):
    """Return the mean distribution of the counted colors over the bins: [CELLS * CELLS], [Q, 2] -> float64 [Q]."""
    occupied = np.flatnonzero(counts)
    total = np.zeros(len(ab_bins))
    for part in np.array_split(occupied, len(occupied) // CHUNK + 1):
        centers = (np.stack(np.divmod(part, CELLS), axis=1) + 0.5) / CELLS_PER_UNIT - AB_LIMIT
        squared = ((centers[:, None] - ab_bins) ** 2).sum(axis=2)
        weights = np.exp((squared.min(axis=1, keepdims=True) - squared) / (2 * sigma**2))
        total += counts[part] @ (weights / weights.sum(axis=1, keepdims=True))
    # Add one pixel to every bin: a bin that does not occur in a small dataset is rare, not impossible. Without it, the
    # Gaussian's far tail (1e-15) would give weights of 1e12 for lambda = 0.
    return (total + 1) / (total + 1).sum()


def parse_args(argv=None):
    parser = cli.Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--image_dir", required=True, help="folder of images, nested or flat")
    parser.add_argument("--output", default="prior_probs.npy", help="output file")
    parser.add_argument("--sigma", type=cli.number(1e-3, 1e3), default=5.0, help="sigma of the Gaussian in ab units")
    parser.add_argument("--num_workers", type=cli.WORKERS, default=min(2, default_workers()), help="worker processes")
    return parser.parse_args(argv)


def main(args):
    use_all_cores()
    paths = list_images(args.image_dir)
    make_folder(Path(args.output).parent)
    counts, used, gray = 0, 0, 0
    for _, square in parallel_map(read_square, paths, args.num_workers, "counting"):
        ab = rgb_to_lab(paddle.to_tensor(square.transpose(2, 0, 1)[None]))[:, 1:]
        if is_gray(ab):
            gray += 1
        else:
            used += 1
            counts = counts + count_colors(ab.numpy()[0])
    unreadable = len(paths) - used - gray
    left_out = f"{gray} gray, {unreadable} unreadable"
    if not used:
        raise cli.UserError(f"{args.image_dir}: no color image among {len(paths)} files ({left_out})")
    prior = encode_counts(counts, load_ab_bins().numpy().astype(np.float64), args.sigma)
    with atomic_path(args.output) as temporary, open(temporary, "wb") as file:
        np.save(file, prior)
    print(f"{cli.printable(args.output)}: from {used} color images; left out: {left_out}")
    return cli.EXIT_SKIPPED if unreadable else 0


if __name__ == "__main__":
    sys.exit(cli.run_script(main, parse_args, cli.AT_THE_END))
