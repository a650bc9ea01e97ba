"""Area under the curve of color errors (AuC) of colored images, raw and rebalanced (Section 3.1 of the paper).

    python metrics_auc.py --imgs_dir DIR                       the images in ./result against the true ones in DIR
    python metrics_auc.py --imgs_dir DIR --gray                the gray baseline (ab = 0), which needs no results

For each pixel the distance of the predicted from the true color in the ab plane; the share of pixels within t, for
t = 0 … 150; the area under that curve, divided by 150. It asks how near the colors are on the whole, which is not how
vivid they are: gray alone scores about 89% on ImageNet. Rebalanced, a pixel counts by the rarity of its true color
(lambda = 0), and gray falls to about 58%. All pixels of all images are pooled.

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

import numpy as np
import paddle
from matplotlib.figure import Figure

from dataset import (
    InvalidImageError,
    crop_resized,
    list_images,
    open_rgb,
    pair_images,
    read_rgb,
    relative_path,
    rgb_to_lab,
)
from utils import (
    EXIT_SKIPPED,
    MAX_THRESHOLD,
    RESOURCES,
    UserError,
    atomic_path,
    atomic_text,
    auc,
    available_cores,
    check_at_least,
    first_threshold,
    load_ab_bins,
    load_prior,
    note,
    note_some,
    parallel_map,
    printable,
    provenance,
    rebalancing_weights,
    sha256,
    use_all_cores,
    write_json,
)

KINDS = ("raw", "rebalanced")

# -------------------------------------------------------------------------------------------------
# Colors and their weights, prepared once

STEP, REACH = 10, 11  # the ab bins lie on a grid of 10, from -110 to 110


@cache
def ab_of_every_color():
    """The ab of all 256^3 colors, float32 [2^24, 2], by the color as a number 0xRRGGBB.

    128 MB that all processes share, and a second to make: looking a pixel up costs a third of computing it.
    """
    levels = np.arange(256, dtype=np.uint8)
    table = np.empty((256, 256, 256, 2), np.float32)
    for reds in np.split(levels, 16):
        rgb = np.stack(np.meshgrid(reds, levels, levels, indexing="ij"), axis=1)  #    [16, 3, 256, 256]
        table[reds] = rgb_to_lab(paddle.to_tensor(rgb))[:, 1:].transpose([0, 2, 3, 1]).numpy()
    return table.reshape(-1, 2)


def weight_of_every_cell(ab_bins, bin_weights):
    """The weight of the bin nearest to each point of the ab grid, float64 [23 * 23].

    For an sRGB color the nearest point of the grid is a bin, and so the nearest bin: rounding finds it.
    """
    points = np.arange(-REACH, REACH + 1) * STEP
    grid = np.stack(np.meshgrid(points, points, indexing="ij"), axis=-1).reshape(-1, 1, 2)
    nearest = ((grid - ab_bins) ** 2).sum(axis=2).argmin(axis=1)
    return bin_weights.astype(np.float64)[nearest]


def cell(ab):
    """The point of the ab grid nearest to each color, float32 [2, M] -> int64 [M]."""
    a, b = np.rint(ab / STEP) + REACH
    return (a * (2 * REACH + 1) + b).astype(np.int64)


# -------------------------------------------------------------------------------------------------
# One image (in a worker process: NumPy and Pillow alone)

shared = {}  # what every worker has: the two tables


def share(ab_table, cell_weights):
    shared.update(ab_table=ab_table.view(np.complex64)[:, 0], cell_weights=cell_weights)  # a and b in one look-up


def look_up_ab(rgb):
    """uint8 [H, W, 3] -> float32 [2, H * W]."""
    red, green, blue = rgb.reshape(-1, 3).T
    color = (red.astype(np.int32) << 8 | green) << 8 | blue
    return np.take(shared["ab_table"], color).view(np.float32).reshape(-1, 2).T


def read_pair(true_path, colored_path, load_size=None, crop_size=None):
    """The true and the colored image, uint8 [H, W, 3], of one size; the latter is None without a path.

    Raises InvalidImageError when one cannot be read, or their sizes cannot be reconciled.
    """
    colored = read_rgb(colored_path) if colored_path else None
    height, width = colored.shape[:2] if colored_path else (crop_size or load_size,) * 2
    with open_rgb(true_path) as true:
        if not (load_size or crop_size) and (colored is None or (width, height) == true.size):
            return np.asarray(true), colored
        if height != width or crop_size not in (None, width) or (load_size or width) < width:
            raise InvalidImageError(colored_path, f"{width}x{height} does not go with {_wanted(true, crop_size)}")
        return crop_resized(true, load_size or width, width), colored


def _wanted(true, crop_size):
    return f"--crop_size {crop_size}" if crop_size else f"the true image's {true.width}x{true.height}"


def error_histograms(paths, load_size=None, crop_size=None):
    """Of one pair: float64 [2, 2, 152], (the colored image, gray) by (raw, rebalanced) as `error_histogram` gives them.

    Returns an InvalidImageError instead of raising it, so that the others go on.
    """
    try:
        true, colored = read_pair(*paths, load_size, crop_size)
    except InvalidImageError as error:
        return error
    true_ab = look_up_ab(true)
    weights = shared["cell_weights"][cell(true_ab)]
    gray = both_histograms(0, true_ab, weights)
    return np.stack([gray if colored is None else both_histograms(look_up_ab(colored), true_ab, weights), gray])


def both_histograms(predicted_ab, true_ab, weights):
    """float64 [2, 152]: `utils.error_histogram` without and with weights, the distances computed once."""
    first = first_threshold(predicted_ab, true_ab)
    return np.stack([np.bincount(first, w, MAX_THRESHOLD + 2) for w in (None, weights)])


# -------------------------------------------------------------------------------------------------
# What is written


def curves(histograms):
    """[..., 152] -> the share of pixels, or weight, within t = 0 … 150, [..., 151]."""
    return histograms.cumsum(axis=-1)[..., :-1] / histograms.sum(axis=-1, keepdims=True)


def figures(histograms):
    """{"auc_raw", "auc_rebalanced"} of histograms [2, 152]."""
    return {f"auc_{kind}": auc(histogram) for kind, histogram in zip(KINDS, histograms)}


def write_csv(rows, path):
    with atomic_text(path) as file:
        writer = csv.writer(file)
        writer.writerow(
            ("image", "pixels", *(f"auc_{kind}" for kind in KINDS), *(f"gray_auc_{kind}" for kind in KINDS))
        )
        for name, histograms in rows:
            areas = [f"{auc(histogram):.6f}" for histogram in histograms.reshape(4, -1)]
            writer.writerow((name, int(histograms[0, 0].sum()), *areas))


def write_counts(histograms, path):
    """The 151 counts and the total, of histograms [2, 152]."""
    within = histograms[0].cumsum()[:-1]
    with atomic_text(path) as file:
        file.write("# t, pixels whose ab is within t of the true one, their share, their rebalanced share\n")
        for t, (count, raw, rebalanced) in enumerate(zip(within, *curves(histograms))):
            file.write(f"{t:3d} {count:14.0f} {raw:.8f} {rebalanced:.8f}\n")
        file.write(f"total {histograms[0].sum():12.0f}\n")


def plot(histograms, only_gray, path):
    """The curves of histograms [2, 2, 152]; gray dashed."""
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    for name, style, pair in zip(("colored", "gray"), ("-", "--"), histograms):
        if name == "colored" and only_gray:
            continue
        for kind, color, histogram in zip(KINDS, ("tab:blue", "tab:orange"), pair):
            axes.plot(100 * curves(histogram), style, color=color, label=f"{name}, {kind}: AuC {auc(histogram):.2%}")
    axes.set(xlim=(0, MAX_THRESHOLD), ylim=(0, 100), xlabel="distance in ab", ylabel="pixels within it (%)")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


# -------------------------------------------------------------------------------------------------
# Command line


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description="Area under the curve of ab errors of colored images, raw and rebalanced.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument_group("images").add_argument
    add("--imgs_dir", required=True, help="folder of the true images, nested or flat")
    add("--results_dir", default="./result", help="folder of the colored images, laid out the same (test.py)")
    add("--gray", action="store_true", help="evaluate gray (ab = 0) instead of --results_dir")
    add("--load_size", type=int, help="compare squares: short side of the true image before the crop, in pixels")
    add("--crop_size", type=int, help="compare squares: side of the center crop, in pixels")

    add = parser.add_argument_group("metric").add_argument
    add("--prior", help="file of 313 probabilities that tells how rare a color is, instead of the shipped prior")

    add = parser.add_argument_group("machine and output").add_argument
    add("--num_workers", type=int, default=available_cores(), help="processes that compare; 0: none but this one")
    add("--save_path", default="./metrics", help="folder for auc.json, auc.csv, auc.txt and auc.png")
    return parser.parse_args(argv)


def main(args):
    check_at_least(args, num_workers=0, load_size=1, crop_size=1)
    if args.load_size and args.crop_size and args.crop_size > args.load_size:
        raise UserError(f"--crop_size {args.crop_size}: larger than --load_size {args.load_size}")
    use_all_cores()
    prior_path = args.prior or RESOURCES / "prior_probs.npy"
    cell_weights = weight_of_every_cell(load_ab_bins().numpy(), rebalancing_weights(load_prior(prior_path), 0).numpy())

    # Which images, and which are left out
    if args.gray:
        pairs, left_out = [(relative_path(path, args.imgs_dir), path, None) for path in list_images(args.imgs_dir)], {}
    else:
        pairs, left_out = pair_images(args.imgs_dir, args.results_dir)
    for problem, names in left_out.items():
        note_some(problem, names)

    # Compare, pair by pair; what is kept of a pair are 4 x 152 numbers
    compare = partial(error_histograms, load_size=args.load_size, crop_size=args.crop_size)
    setup = (share, ab_of_every_color(), cell_weights)
    rows, total = [], 0
    results = parallel_map(compare, [paths for _, *paths in pairs], args.num_workers, "comparing", setup)
    for (name, *_), histograms in zip(pairs, results):
        if isinstance(histograms, InvalidImageError):
            note(f"skipped {histograms}")
            left_out.setdefault("unreadable, or of another size", []).append(name)
        else:
            rows.append((name, histograms))
            total = total + histograms
    if not rows:
        raise UserError(f"{printable(args.imgs_dir)}: none of its {len(pairs)} images could be compared")

    # Write and tell
    base = os.path.join(args.save_path, "gray_auc" if args.gray else "auc")
    colored, gray = total
    summary = {
        **figures(colored),
        "gray": figures(gray),
        "images": len(rows),
        "pixels": int(gray[0].sum()),
        "true_images": printable(os.path.abspath(args.imgs_dir)),
        "colored_images": "gray (ab = 0)" if args.gray else printable(os.path.abspath(args.results_dir)),
        "load_size": args.load_size,
        "crop_size": args.crop_size,
        "prior": {"file": printable(prior_path), "sha256": sha256(prior_path)},
        "left_out": {problem: [printable(name) for name in names] for problem, names in left_out.items()},
        **provenance(),
    }
    write_json(summary, base + ".json")
    write_csv(rows, base + ".csv")
    write_counts(colored, base + ".txt")
    plot(total, args.gray, base + ".png")
    for name, pair in (("gray (ab = 0)", gray),) if args.gray else (("colored", colored), ("gray (ab = 0)", gray)):
        print(f"{name:13s}  AuC raw {auc(pair[0]):.2%}  rebalanced {auc(pair[1]):.2%}")
    print(f"{len(rows)} images, {gray[0].sum():.0f} pixels; rarity by {printable(prior_path)}")
    print(f"written: {printable(base)}.json, .csv, .txt, .png")
    return EXIT_SKIPPED if left_out else 0


if __name__ == "__main__":
    sys.exit(main(parse_args()))
