"""Area under the curve of color errors (AuC) of colored images, raw and rebalanced (Section 3.1 of the paper).

    python metrics_auc.py --imgs_dir DIR                       the images in ./result against the true ones in DIR
    python metrics_auc.py --imgs_dir DIR --gray                the gray baseline (ab = 0), which needs no results

For each pixel the distance of the predicted from the true color in the ab plane; the share of pixels within t, for
t = 0 … 150; the area under that curve, divided by 150. All pixels of all images are pooled, in three ways:

    raw              every pixel counts the same; gray alone scores 89.1% on ImageNet
    rebalanced       a pixel counts by the rarity of its true color in the prior (lambda = 0); gray scores 58.0%
    rebalanced_own   the same, rarity being that among the true images themselves: the mean over the bins that occur.
                     A prior from other images can give a few bins that it has hardly seen most of the weight.

Images are paired by their path without its suffix. Colored images of the true one's size are compared as they are;
squares, as `test.py --load_size 224 --crop_size 224` makes them, with the same square of the true image.

Prints a line for the colored images and one for gray, and writes auc.json, auc.csv (each image), auc.txt (the counts
behind the curve) and auc.png (the curve) into --save_path; with --gray the names begin with gray_.
"""

import argparse
import csv
import os
import sys
from functools import cache, partial
from pathlib import Path

from support.cli import EXIT_SKIPPED, HelpFormatter, UserError, check_at_least, check_crop, note, note_some, printable
from support.cpu import available_cores, use_all_cores
from support.files import atomic_path, atomic_text, make_folder, provenance, read_json, sha256, write_json
from support.processes import parallel_map

import numpy as np
import paddle
from matplotlib.figure import Figure

from dataset import (
    COLORING,
    InvalidImageError,
    crop_resized,
    image_size,
    list_images,
    open_rgb,
    pair_images,
    read_rgb,
    relative_path,
    rgb_to_lab,
)
from utils import MAX_THRESHOLD, RESOURCES, auc, first_threshold, load_ab_bins, load_prior, rebalancing_weights

KINDS = ("raw", "rebalanced", "rebalanced_own")
GRAY = "gray (ab = 0)"

# -------------------------------------------------------------------------------------------------
# Colors and their weights, prepared once

STEP, REACH = 10, 11  # the ab bins lie on a grid of 10, from -110 to 110
SIDE = 2 * REACH + 1  # of the grid, in points
ERRORS = MAX_THRESHOLD + 2  # classes of an error: within 0 … 150, and beyond


@cache
def ab_of_every_color():
    """The ab of all 256^3 colors as a + ib, complex64 [2^24], by the color as a number 0xRRGGBB.

    128 MB that all processes share, and a second to make: looking a pixel up costs a third of computing it. Complex
    numbers, because a distance is then one fast `np.abs`, and a look-up fetches both a and b.
    """
    levels = np.arange(256, dtype=np.uint8)
    table = np.empty((256, 256, 256, 2), np.float32)
    for reds in np.split(levels, 16):
        rgb = np.stack(np.meshgrid(reds, levels, levels, indexing="ij"), axis=1)  #    [16, 3, 256, 256]
        table[reds] = rgb_to_lab(paddle.to_tensor(rgb))[:, 1:].transpose([0, 2, 3, 1]).numpy()
    return table.view(np.complex64).ravel()


def weight_of_every_cell(ab_bins, bin_weights):
    """The weight of the bin nearest to each point of the ab grid, float64 [23 * 23].

    For an sRGB color the nearest point of the grid is a bin, and so the nearest bin: rounding finds it.
    """
    points = np.arange(-REACH, REACH + 1) * STEP
    grid = np.stack(np.meshgrid(points, points, indexing="ij"), axis=-1).reshape(-1, 1, 2)
    nearest = ((grid - ab_bins) ** 2).sum(axis=2).argmin(axis=1)
    return bin_weights.astype(np.float64)[nearest]


def nearest_cell(ab):
    """The point of the ab grid nearest to each color, complex64 [M] -> int64 [M]."""
    a, b = np.rint(ab.view(np.float32) / STEP).reshape(-1, 2).T
    return ((a + REACH) * SIDE + (b + REACH)).astype(np.int64)


# -------------------------------------------------------------------------------------------------
# One pair of images (in a worker process: NumPy and Pillow alone)

shared = {}  # the table: a global, so that it need not be sent to a worker with every pair


def share(ab_table):
    shared["ab_table"] = ab_table


def look_up_ab(rgb):
    """uint8 [H, W, 3] -> a + ib, complex64 [H * W]."""
    red, green, blue = rgb.reshape(-1, 3).T
    return np.take(shared["ab_table"], (red.astype(np.int32) << 8 | green) << 8 | blue)


def read_pair(true_path, colored_path, load_size=None, crop_size=None):
    """The true and the colored image, uint8 [H, W, 3], of one size; the latter is None without a path.

    Raises InvalidImageError when one cannot be read, or their sizes cannot be reconciled.
    """
    colored = read_rgb(colored_path) if colored_path else None
    if crop_size is None and (colored is None or colored.shape[1::-1] == image_size(true_path)):
        return read_rgb(true_path), colored
    height, width = (crop_size, crop_size) if colored is None else colored.shape[:2]
    load_size = load_size or width
    if height != width or width > load_size or crop_size not in (None, width):
        raise InvalidImageError(colored_path, f"{width}x{height} does not go with {_wanted(true_path, crop_size)}")
    return crop_resized(open_rgb(true_path, least_side=load_size), load_size, width), colored


def _wanted(true_path, crop_size):
    return f"--crop_size {crop_size}" if crop_size else "the true image's {}x{}".format(*image_size(true_path))


def count_errors(paths, load_size=None, crop_size=None):
    """How many pixels of a pair have which true color and which error: for the colored image, and for gray.

    Each is (what occurs, as cell * 152 + error; how often). Returns an InvalidImageError instead of raising it, so
    that the other pairs go on.
    """
    try:
        true, colored = read_pair(*paths, load_size, crop_size)
    except InvalidImageError as error:
        return error
    true_ab = look_up_ab(true)
    if colored is None:
        (gray,) = tally(true_ab, 0)
        return gray, gray
    return tuple(tally(true_ab, look_up_ab(colored), 0))


def tally(true_ab, *predicted_ab):
    """Of each prediction, complex64 [M] or 0 (gray): what occurs, as cell * 152 + error, and how often."""
    classes = nearest_cell(true_ab) * ERRORS
    return [_occurrences(classes + first_threshold(np.abs(true_ab - ab))) for ab in predicted_ab]


def _occurrences(classes):
    counts = np.bincount(classes)
    occurring = np.flatnonzero(counts)
    return occurring, counts[occurring]


# -------------------------------------------------------------------------------------------------
# What is written


def histograms(classes, counts, cell_weights):
    """What `count_errors` counted as histograms of errors (as `utils.error_histogram`), a row for each of the weights.

    cell_weights: list of [23 * 23] -> float64 [len(cell_weights), 152].
    """
    cells, errors = np.divmod(classes, ERRORS)
    return np.stack([np.bincount(errors, counts * weights[cells], ERRORS) for weights in cell_weights])


def own_weights(counts):
    """The inverse of how often each cell occurs: int64 [23 * 23 * 152] -> float64 [23 * 23], 1 where it does not."""
    return 1 / counts.reshape(-1, ERRORS).sum(axis=1).clip(min=1)


def curves(histograms):
    """[K, 152] -> the share of pixels, or weight, within t = 0 … 150, [K, 151]."""
    return histograms.cumsum(axis=1)[:, :-1] / histograms.sum(axis=1, keepdims=True)


def figures(histograms):
    """{"auc_raw", "auc_rebalanced", "auc_rebalanced_own"} of [3, 152]."""
    return {f"auc_{kind}": auc(histogram) for kind, histogram in zip(KINDS, histograms)}


def write_csv(rows, path):
    with atomic_text(path) as file:
        writer = csv.writer(file)
        writer.writerow(("image", "pixels", "auc_raw", "auc_rebalanced", "gray_auc_raw", "gray_auc_rebalanced"))
        writer.writerows((name, pixels, *(f"{area:.6f}" for area in areas)) for name, pixels, areas in rows)


def write_counts(histograms, path):
    """The 151 counts and the total, of [3, 152]."""
    within = histograms[0].cumsum()[:-1]
    with atomic_text(path) as file:
        file.write("# t, pixels whose ab is within t of the true one, their share: raw, rebalanced, rebalanced_own\n")
        for t, (count, shares) in enumerate(zip(within, curves(histograms).T)):
            file.write(f"{t:3d} {count:14.0f} " + " ".join(f"{share:.8f}" for share in shares) + "\n")
        file.write(f"total {histograms[0].sum():12.0f}\n")


def plot(results, path):
    """The curves of {name: histograms [3, 152]}; gray dashed."""
    figure = Figure(figsize=(7, 5.5), layout="constrained")
    axes = figure.subplots()
    for name, histograms in results.items():
        style = "--" if name == GRAY else "-"
        for kind, color, histogram, curve in zip(KINDS, ("C0", "C1", "C2"), histograms, curves(histograms)):
            label = f"{name}, {kind.replace('_', ', ')}: {auc(histogram):.2%}"
            axes.plot(100 * curve, style, color=color, label=label)
    axes.set(xlim=(0, MAX_THRESHOLD), ylim=(0, 100), xlabel="distance in ab", ylabel="pixels within it (%)")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=len(results), title="AuC")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


# -------------------------------------------------------------------------------------------------
# Command line


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description="Area under the curve of ab errors of colored images, raw and rebalanced.",
        formatter_class=HelpFormatter,
    )
    add = parser.add_argument_group("images").add_argument
    add("--imgs_dir", required=True, help="folder of the true images, nested or flat")
    add("--results_dir", default="./result", help="folder of the colored images, laid out the same (test.py)")
    add("--gray", action="store_true", help="evaluate gray (ab = 0) instead of --results_dir")
    add(
        "--crop_size",
        type=int,
        help="compare center squares of so many pixels (default: if the results are squares, their size)",
    )
    add(
        "--load_size", type=int, help="short side in pixels before that crop, as given to test.py (default: the crop's)"
    )

    add = parser.add_argument_group("metric").add_argument
    add("--prior", help="file of 313 probabilities that tells how rare a color is (default: the shipped prior)")

    add = parser.add_argument_group("machine and output").add_argument
    add("--num_workers", type=int, default=available_cores(), help="processes that compare; 0: none but this one")
    add("--save_path", default="./metrics", help="folder for auc.json, auc.csv, auc.txt and auc.png")
    return parser.parse_args(argv)


def main(args):
    check_at_least(args, num_workers=0, load_size=1, crop_size=1)
    check_crop(args)
    if args.gray and args.load_size and not args.crop_size:
        raise UserError("--load_size without --crop_size changes nothing for --gray")
    use_all_cores()
    prior_path = args.prior or RESOURCES / "prior_probs.npy"
    bin_weights = rebalancing_weights(load_prior(prior_path), lam=0).numpy()
    weights = [np.ones(SIDE * SIDE), weight_of_every_cell(load_ab_bins().numpy(), bin_weights)]

    # Which images, and which are left out
    if args.gray:
        pairs, left_out = [(relative_path(path, args.imgs_dir), path, None) for path in list_images(args.imgs_dir)], {}
    else:
        pairs, left_out = pair_images(args.imgs_dir, args.results_dir)
    for problem, names in left_out.items():
        note_some(problem, names)
    make_folder(args.save_path)

    # Compare, pair by pair
    compare = partial(count_errors, load_size=args.load_size, crop_size=args.crop_size)
    setup = (share, ab_of_every_color())
    rows, totals = [], np.zeros((2, SIDE * SIDE * ERRORS), np.int64)  # of the colored images and of gray
    results = parallel_map(compare, [paths for _, *paths in pairs], args.num_workers, "comparing", setup)
    for (name, *_), counted in zip(pairs, results):
        if isinstance(counted, InvalidImageError):
            note(f"skipped {counted}")
            left_out.setdefault("unreadable, or of another size", []).append(name)
            continue
        for total, (classes, counts) in zip(totals, counted):
            total[classes] += counts
        areas = [auc(histogram) for classes_counts in counted for histogram in histograms(*classes_counts, weights)]
        rows.append((name, counted[0][1].sum(), areas))
    if not rows:
        raise UserError(f"{printable(args.imgs_dir)}: none of its {len(pairs)} images could be compared")
    weights.append(own_weights(totals[0]))
    pooled = [histograms(np.arange(total.size), total, weights) for total in totals]
    results = {GRAY: pooled[1]} if args.gray else {"colored": pooled[0], GRAY: pooled[1]}

    # Write and tell
    pixels = int(totals[0].sum())
    summary = {
        **figures(pooled[0]),
        "gray": figures(pooled[1]),
        "images": len(rows),
        "pixels": pixels,
        "true_images": printable(os.path.abspath(args.imgs_dir)),
        "colored_images": GRAY if args.gray else printable(os.path.abspath(args.results_dir)),
        "coloring": read_json(Path(args.results_dir) / COLORING) if not args.gray else None,
        "load_size": args.load_size,
        "crop_size": args.crop_size,
        "prior": {"file": printable(prior_path), "sha256": sha256(prior_path)},
        "left_out": {problem: [printable(name) for name in names] for problem, names in left_out.items()},
        **provenance(),
    }
    base = os.path.join(args.save_path, "gray_auc" if args.gray else "auc")
    write_json(summary, base + ".json")
    write_csv(rows, base + ".csv")
    write_counts(pooled[0], base + ".txt")
    plot(results, base + ".png")
    for name, three in results.items():
        areas = "  ".join(f"{kind} {auc(histogram):.2%}" for kind, histogram in zip(KINDS, three))
        print(f"{name:13s}  AuC {areas}")
    print(f"{len(rows)} images, {pixels} pixels; rebalanced by {printable(prior_path)}")
    print(f"written: {printable(base)}.json, .csv, .txt, .png")
    return EXIT_SKIPPED if left_out else 0


if __name__ == "__main__":
    sys.exit(main(parse_args()))
