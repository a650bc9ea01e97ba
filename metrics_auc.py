"""Compute the area under the curve of color errors (AuC) of colorized images (Section 3.1 of the paper).

    python metrics_auc.py --image_dir DIR                      compare ./result with the originals in DIR
    python metrics_auc.py --image_dir DIR --gray               gray baseline (ab = 0); needs no results
    python metrics_auc.py --image_dir DIR --random             random baseline: the ab of a different image

The AuC is the area under the share of pixels whose ab error is at most t, for t = 0 … 150, divided by 150. All pixels
of all images are pooled, weighted in three ways:

    raw              equally; gray scores 89.1% on ImageNet in the paper
    rebalanced       by the rarity of the ground-truth color in the prior (lambda = 0). Gray scores 58.0% with
                     ImageNet's prior and 49.46% on 780 images with the bundled one, which gives a few rare bins most of
                     the weight
    macro            by the rarity of the ground-truth color in the test set: the mean over the ab bins that occur

Also reported: chroma, the mean of hypot(a, b) over all pixels; colorfulness (Hasler and Süsstrunk 2003) and the PSNR of
RGB values, both averaged over images (the PSNR without exact copies, for which it is infinite).

Images are paired by their path without its suffix. Results are compared with the whole original; square crops, as
`test.py --load_size 224 --crop_size 224` writes, with the same crop of the original.

Prints these values for the results and for gray, and writes auc.json, auc.csv (per image), auc.txt (the counts behind
the curve) and auc.png (the curve) to --save_path. With --gray and --random the names begin with gray_ and random_.
"""

import math
import os
import sys
import warnings
from functools import partial

from support import cli
from support.cpu import available_cores, keep_freed_memory, use_all_cores
from support.files import atomic_path, full_path, prepare_results, provenance, sha256, write_csv, write_json
from support.folders import pair_at_random, pair_images
from support.images import InvalidImageError, crop_resized, open_rgb
from support.workers import parallel_map

import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from skimage.color import lab2rgb, rgb2xyz, xyz2lab
from skimage.metrics import peak_signal_noise_ratio

from dataset import COLORING, RECORDS, read_rgb
from utils import MAX_THRESHOLD, PRIOR, auc, error_histogram, load_ab_bins, load_prior, rebalancing_weights

KINDS = ("raw", "rebalanced", "macro")  # of the AuC
VERSIONS = ("colored", "gray", "true")  # of each image
GRAY = "gray (ab = 0)"
AREAS = auc(np.eye(MAX_THRESHOLD + 2))  # contribution of one pixel to the AuC, by its column in `error_histogram`

# Tables make the conversions twice as fast as rgb2lab and lab2rgb. Gray's Y is the linear value of its three channels.
LINEAR = rgb2xyz(np.arange(256)[:, None].repeat(3, axis=1) / 255)[:, 1].astype(np.float32)
TO_XYZ = rgb2xyz(np.eye(3)).astype(np.float32)
GRAY_LEVELS = np.rint(255 * lab2rgb(np.arange(10001)[:, None] / 100 * (1, 0, 0)))[:, 0].astype(np.uint8)  # by 100 L

# -------------------------------------------------------------------------------------------------
# One pair of images (in a worker process: NumPy, Pillow and scikit-image only)


def bins_on_grid(ab_bins):
    """Return the index of the ab bin at each point (10 (i - 11), 10 (j - 11)) of the grid: [313, 2] -> [23, 23]."""
    grid = np.full((23, 23), -1)  # -1 is never used: the grid point nearest to an sRGB color is always a bin
    grid[tuple(ab_bins.T.astype(int) // 10 + 11)] = np.arange(len(ab_bins))
    return grid


def read_pair(true_path, colored_path, load_size=None, crop_size=None):
    """Read an original and its result in one size, both uint8 [H, W, 3]; the result is None if it has no path.

    Raises InvalidImageError if one cannot be read or their sizes do not match.
    """
    if crop_size:
        true = crop_resized(open_rgb(true_path, least_side=load_size), load_size, crop_size)
    else:
        true = read_rgb(true_path)
    colored = read_rgb(colored_path) if colored_path else None
    if colored is not None and colored.shape != true.shape:
        problem = "does not have the original's size (square crops need --load_size and --crop_size)"
        raise InvalidImageError(colored_path, problem)
    return true, colored


def compare(pair, grid, load_size=None, crop_size=None, random=False):
    """Compare an original with its result: count its pixels by bin and error, and sum up the other quantities.

    Args:
        pair (tuple): Name, path of the original, and path of the result. If it is None, gray takes its place.
        grid (ndarray): Result of `bins_on_grid`.
        load_size (int): Size of the original's shorter side before the crop.
        crop_size (int): Side of the compared square crops. Without it, whole images are compared.
        random (bool): The second path is another original, whose ab is to be taken.

    Returns:
        tuple[ndarray, dict]: Number of pixels by bin and error, uint32 [2, 313, 152], for the result and for gray, and
        the image's sums by name, those of VERSIONS in this order.

    Raises:
        InvalidImageError: If a file cannot be read or their sizes do not match.
    """
    _, true_path, other_path = pair
    true, colored = read_pair(true_path, None if random else other_path, load_size, crop_size)
    true_lab = to_lab(true)
    true_ab = true_lab[..., 1:]
    gray = np.broadcast_to(GRAY_LEVELS[np.rint(100 * true_lab[..., :1]).astype(int)], true.shape)
    if random:
        other = open_rgb(other_path).resize(true.shape[1::-1], Image.Resampling.BILINEAR)
        colored_ab = to_lab(np.asarray(other))[..., 1:]
        colored = with_ab(true_lab, colored_ab)
    elif colored is None:
        colored_ab, colored = np.zeros_like(true_ab), gray
    else:
        colored_ab = to_lab(colored)[..., 1:]

    a, b = np.moveaxis(np.rint(true_ab / 10).astype(int), -1, 0) + 11
    bins, true_chroma = grid[a, b], length(true_ab)
    errors = (length(true_ab - colored_ab), true_chroma)  # of the result and of gray
    counts = np.stack([error_histogram(distance, bins, grid.max() + 1) for distance in errors])
    with np.errstate(divide="ignore"):  # an exact copy has an infinite PSNR
        ratios = [peak_signal_noise_ratio(true, rgb, data_range=255) for rgb in (colored, gray)]
    psnr = np.array([*ratios, np.inf])
    return counts.astype(np.uint32), {
        "images": 1,
        "pixels": bins.size,
        "areas": np.float32([*(counts @ AREAS), counts[0].sum(axis=1)]),  #      [3, 313]; the original has no error
        "chroma": (length(colored_ab).sum(), 0, true_chroma.sum()),
        "colorfulness": (colorfulness(colored), 0, colorfulness(true)),
        "psnr": np.where(np.isinf(psnr), 0, psnr),
        "not_copies": np.isfinite(psnr),
    }


def to_lab(rgb):
    """Convert uint8 [H, W, 3] to Lab, float32 [H, W, 3]."""
    return xyz2lab(LINEAR[rgb] @ TO_XYZ)


def with_ab(lab, ab):
    """Return an image's L with other ab as uint8 [H, W, 3]; out-of-gamut values are clipped."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-image warns about out-of-gamut values
        return np.rint(255 * lab2rgb(np.concatenate([lab[..., :1], ab], axis=-1))).astype(np.uint8)


def length(ab):
    """Return hypot(a, b): [..., 2] -> [...]."""
    return np.hypot(ab[..., 0], ab[..., 1])


def colorfulness(rgb):
    """Compute the colorfulness M3 of Hasler and Süsstrunk (2003) of uint8 [..., 3].

    The spread of the opponent colors red - green and (red + green) / 2 - blue, plus 0.3 times their mean's length: 0
    for gray, 33 for "moderately colorful", 109 for "extremely colorful".
    """
    red, green, blue = np.moveaxis(rgb.astype(np.float32), -1, 0)
    opponents = red - green, (red + green) / 2 - blue
    spread, mean = math.hypot(*(x.std() for x in opponents)), math.hypot(*(x.mean() for x in opponents))
    return spread + 0.3 * mean


# -------------------------------------------------------------------------------------------------
# All images


def measure(pairs, num_workers=0, **settings):
    """Compare originals with their results.

    Args:
        pairs (list): Name, path of the original, and path of the result (None for gray) of each image.
        num_workers (int): Number of worker processes.
        settings: `load_size`, `crop_size` and `random` of `compare`.

    Returns:
        tuple[dict, ndarray]: The sums of each image that can be compared (result of `compare`) by the image's name, and
        the number of all their pixels by bin and error, int64 [2, 313, 152], for the results and for gray. Other images
        are reported on stderr.

    Raises:
        UserError: If no image can be compared.
    """
    keep_freed_memory()
    job = partial(compare, grid=bins_on_grid(load_ab_bins().numpy()), **settings)
    images, totals = {}, 0
    for i, (counts, sums) in parallel_map(job, pairs, num_workers, "comparing"):
        totals = totals + counts.astype(np.int64)
        images[pairs[i][0]] = sums
    if not images:
        raise cli.UserError(f"none of the {len(pairs)} images can be compared")
    return images, totals


def stack(images):
    """Stack the sums of N images: [{name: [...]}] -> {name: [N, ...]}."""
    return {name: np.array([sums[name] for sums in images]) for name in images[0]}


def pool(sums, times):
    """Sum over images, the i-th of which counts times[b, i] times: {name: [N, ...]}, [B, N] -> {name: [B, ...]}."""
    return {name: np.tensordot(times, values, axes=1) for name, values in sums.items()}


def evaluate(sums, bin_weights):
    """Compute every quantity from the sums of images: {name: [N, ...]}, [313] -> {version: {quantity: [N]}}."""
    areas, pixels = np.moveaxis(sums["areas"], 1, 0), sums["areas"][:, VERSIONS.index("true")]
    with np.errstate(invalid="ignore"):  # the PSNR is NaN if all are exact copies
        found = {
            "auc_raw": areas.sum(axis=2) / pixels.sum(axis=1),
            "auc_rebalanced": areas @ bin_weights / (pixels @ bin_weights),
            "auc_macro": (areas / pixels.clip(min=1)).sum(axis=2) / (pixels > 0).sum(axis=1),
            "chroma": sums["chroma"].T / sums["pixels"],
            "colorfulness": sums["colorfulness"].T / sums["images"],
            "psnr": sums["psnr"].T / sums["not_copies"].T,
        }
    return {version: {x: values[i] for x, values in found.items()} for i, version in enumerate(VERSIONS)}


def curves(counts, bin_weights):
    """Compute the share of pixels within t, by KINDS, from counts by bin and error: [313, 152] -> [3, 151]."""
    macro_weights = 1 / counts.sum(axis=1).clip(min=1)
    histograms = np.stack([np.ones_like(bin_weights), bin_weights, macro_weights]) @ counts  #      [3, 152]
    return histograms.cumsum(axis=1)[:, :-1] / histograms.sum(axis=1, keepdims=True)


def describe_prior(path):
    return {"file": cli.printable(path), "sha256": sha256(path)}


def inverse_prior(path):
    """Return the weights of the rebalanced AuC, float64 [313], from the file of a prior."""
    return rebalancing_weights(load_prior(path), lam=0).numpy().astype(np.float64)


# -------------------------------------------------------------------------------------------------
# Output files


def write_images(names, sums, bin_weights, path):
    """Write the values of each image as CSV; headings for gray and for the original begin with "gray" and "true"."""
    values = evaluate(sums, bin_weights)
    errors, colors = ("auc_raw", "auc_rebalanced", "psnr"), ("chroma", "colorfulness")
    parts = (("", "colored", errors), ("gray_", "gray", errors), ("", "colored", colors), ("true_", "true", colors))
    columns = {"image": names, "pixels": sums["pixels"]}
    for prefix, version, quantities in parts:
        for x in quantities:
            columns[prefix + x] = [f"{value:.6f}" for value in values[version][x]]
    write_csv(columns, path)


def write_counts(counts, colored, gray, path):
    """Write the 151 counts and the total of [313, 152], and the curves [3, 151] of the results and of gray."""
    *within, total = counts.sum(axis=0).cumsum()
    table = np.stack([range(MAX_THRESHOLD + 1), within, *colored, *gray], axis=1)
    header = f"# t, pixels with an ab error of at most t, share: {', '.join(KINDS)}; the same for gray"
    with atomic_path(path) as temporary:
        np.savetxt(temporary, table, "%3d %14d" + " %.8f" * 6, header=header, footer=f"total {total:12d}", comments="")


def plot(results, path):
    """Plot the curves of {name: [3, 151]}, one panel for each of KINDS; gray is dashed."""
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    for i, axes in enumerate(figure.subplots(1, 3, sharey=True)):
        for name, shares in results.items():
            style = {"linestyle": "--", "color": "0.5"} if name == GRAY else {}
            area = auc(np.diff(shares[i], prepend=0, append=1))
            axes.plot(100 * shares[i], label=f"{name}: {area:.2%}", **style)
        axes.set(xlim=(0, MAX_THRESHOLD), ylim=(0, 100), xlabel="ab error t", title=KINDS[i])
        axes.grid(alpha=0.3)
        axes.legend(title="AuC", loc="best")
    figure.axes[0].set_ylabel("share of (weighted) pixels within t (%)")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)


def print_values(title, colored, gray, true):
    for name, values in ((title, colored), (GRAY, gray)):
        print(f"{name:13s}  AuC " + "  ".join(f"{kind} {values[f'auc_{kind}']:.2%}" for kind in KINDS))
    compared = "  ".join(f"{x} {colored[x]:.2f} (true {true[x]:.2f})" for x in ("chroma", "colorfulness"))
    psnr, gray_psnr = (values["psnr"] or math.inf for values in (colored, gray))
    print(f"{compared}  PSNR {psnr:.2f} dB (gray {gray_psnr:.2f})")


# -------------------------------------------------------------------------------------------------
# Command line


def parse_args(argv=None):
    parser = cli.Parser(description="Compute the area under the curve of ab errors of colorized images.")
    group = parser.add_argument_group("images")
    add = group.add_argument
    add("--image_dir", "--imgs_dir", required=True, help="folder of the originals, nested or flat")
    add("--result_path", "--results_dir", default="./result", help="folder of the results (test.py), same layout")
    add("--crop_size", type=cli.SIDE, help="compare center crops of this side (default: as in the results' records)")
    add("--load_size", type=cli.SIDE, help="shorter side before the crop, as given to test.py")
    add = partial(group.add_mutually_exclusive_group().add_argument, dest="baseline", action="store_const")
    add("--gray", const="gray", help="evaluate gray (ab = 0) instead of results")
    add("--random", const="random", help="evaluate the ab of a random other original instead of results")

    add = parser.add_argument_group("metric").add_argument
    add("--prior", default=PRIOR, help="file of 313 probabilities of the ab bins")
    add("--seed", type=cli.SEED, default=0, help="seed of --random")

    add = parser.add_argument_group("machine and output").add_argument
    add("--num_workers", type=cli.WORKERS, default=available_cores(), help="worker processes; 0: compare in this one")
    add("--save_path", default="./metrics", help="folder for auc.json, .csv, .txt and .png")
    return parser.parse_args(argv)


def square_size(coloring):
    """Return load_size and crop_size from the description of results; both are None unless these are square crops."""
    crops = coloring and coloring.get("crop_size")
    return {x: coloring[x] if crops else None for x in ("load_size", "crop_size")}


def main(args):
    cli.check_crop(args)
    if bool(args.load_size) != bool(args.crop_size):
        raise cli.UserError("--load_size and --crop_size: give both or neither")
    use_all_cores()
    bin_weights = inverse_prior(args.prior)
    colored_dir = None if args.baseline else args.result_path
    pairs, left_out, coloring = pair_images(args.image_dir, colored_dir, COLORING, RECORDS)
    if args.baseline == "random":
        pairs = pair_at_random(pairs, args.seed)
    sizes = square_size(vars(args) if args.crop_size else coloring)
    title = {"gray": GRAY, "random": "random ab"}.get(args.baseline, "colored")
    subject = {"true_images": full_path(args.image_dir), "colored_images": full_path(colored_dir) or title}
    base = os.path.join(args.save_path, f"{args.baseline}_auc" if args.baseline else "auc")
    prepare_results(f"{base}.json", subject)

    # Compare
    images, counts = measure(pairs, args.num_workers, random=args.baseline == "random", **sizes)
    names, sums = list(images), stack([*images.values()])
    if failed := sorted({name for name, *_ in pairs} - {*names}):
        left_out["unreadable, or of another size"] = failed
    pooled = evaluate(pool(sums, np.ones((1, len(names)))), bin_weights)
    values = {v: {x: None if np.isnan(y[0]) else float(y[0]) for x, y in found.items()} for v, found in pooled.items()}
    colored, gray, true = (values[version] for version in VERSIONS)
    colored_curves, gray_curves = (curves(x, bin_weights) for x in counts)

    # Write and print
    summary = {
        **colored,
        "colorfulness_difference": colored["colorfulness"] - true["colorfulness"],
        "gray": gray,
        "true": {x: true[x] for x in ("chroma", "colorfulness")},
        "images": len(names),
        "pixels": int(counts[0].sum()),
        **subject,
        "coloring": coloring,
        **sizes,
        "seed": args.seed if args.baseline == "random" else None,
        "prior": describe_prior(args.prior),
        "left_out": left_out,
        **provenance(),
    }
    write_json(summary, f"{base}.json")
    write_images(names, sums, bin_weights, f"{base}.csv")
    write_counts(counts[0], colored_curves, gray_curves, f"{base}.txt")
    plot({title: colored_curves, GRAY: gray_curves}, f"{base}.png")
    print_values(title, colored, gray, true)
    print(f"{cli.counted(len(names), 'image')}, {summary['pixels']} pixels; rebalanced by {cli.printable(args.prior)}")
    print(f"written: {cli.printable(base)}.json, .csv, .txt, .png")
    return cli.EXIT_SKIPPED if left_out else 0


if __name__ == "__main__":
    sys.exit(cli.run_script(main, parse_args, cli.AT_THE_END))
