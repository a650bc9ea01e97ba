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
                     ("auc_rebalanced_own" in files)

Also reported: chroma, the mean of hypot(a, b) over all pixels; colorfulness (Hasler and Süsstrunk 2003) and the PSNR of
RGB values, both averaged over images (the PSNR without exact copies, for which it is infinite).

Images are paired by their path without its suffix. Results with the original's size are compared with the whole
original; square crops, as `test.py --load_size 224 --crop_size 224` writes, with the same crop of the original.

Prints these values for the results and for gray, and writes auc.json, auc.csv (per image), auc.npz (per-image sums for
resources/ablation.py), auc.txt (the counts behind the curve) and auc.png (the curve) to --save_path. With --gray and
--random the names begin with gray_ and random_.
"""

import csv
import math
import os
import sys
import warnings
from functools import partial
from pathlib import Path

from support import cli
from support.cpu import available_cores, keep_freed_memory, use_all_cores
from support.files import atomic_path, atomic_text, make_folder, provenance, read_json, sha256, write_json
from support.folders import pair_images, relative_path
from support.images import InvalidImageError, crop_resized, image_size, open_rgb
from support.workers import parallel_map

import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from skimage.color import lab2rgb, rgb2xyz, xyz2lab
from skimage.metrics import peak_signal_noise_ratio

from dataset import COLORING, RECORDS, list_images, read_rgb
from utils import MAX_THRESHOLD, RESOURCES, auc, first_threshold, load_ab_bins, load_prior, rebalancing_weights

KINDS = {"raw": "raw", "rebalanced": "rebalanced", "rebalanced_own": "macro"}  # in keys: as printed
VERSIONS = ("colored", "gray", "true")  # of each image
GRAY = "gray (ab = 0)"
BASELINES = {None: ("colored", "auc"), "gray": (GRAY, "gray_auc"), "random": ("random ab", "random_auc")}  # title, file
ERRORS = MAX_THRESHOLD + 2  # classes of an error: first within 0 … 150, and beyond
AREAS = auc(np.eye(ERRORS))  # contribution of one pixel to the AuC, by its error: [152]

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
    colored = read_rgb(colored_path) if colored_path else None
    if crop_size is None and (colored is None or colored.shape[1::-1] == image_size(true_path)):
        return read_rgb(true_path), colored
    height, width = (crop_size, crop_size) if colored is None else colored.shape[:2]
    load_size = load_size or width
    if height != width or width > load_size or crop_size not in (None, width):
        wanted = f"--crop_size {crop_size}" if crop_size else "the original's {}x{}".format(*image_size(true_path))
        raise InvalidImageError(colored_path, f"{width}x{height} does not match {wanted}")
    return crop_resized(open_rgb(true_path, least_side=load_size), load_size, width), colored


def compare(paths, grid, load_size=None, crop_size=None, random=False):
    """Compare an original with its result: count its pixels by bin and error, and sum up the other measures.

    Args:
        paths (tuple): Paths of the original and of the result. Without the latter, gray takes its place.
        grid (ndarray): Result of `bins_on_grid`.
        load_size (int): Size of the original's shorter side before the crop.
        crop_size (int): Side of the compared square crops.
        random (bool): The second path is another original, whose ab is to be taken.

    Returns:
        tuple[ndarray, dict]: Number of pixels by bin and error, uint32 [2, 313, 152], for the result and for gray, and
        sums by VERSIONS. Or an InvalidImageError, returned instead of raised so that the other pairs are compared.
    """
    try:
        true, colored = read_pair(paths[0], None if random else paths[1], load_size, crop_size)
        if random:
            colored = np.asarray(open_rgb(paths[1]).resize(true.shape[1::-1], Image.Resampling.BILINEAR))
    except InvalidImageError as error:
        return error
    true_lab = to_lab(true)
    true_ab = true_lab[..., 1:]
    gray = np.broadcast_to(GRAY_LEVELS[np.rint(100 * true_lab[..., :1]).astype(int)], true.shape)
    colored_ab = np.zeros_like(true_ab) if colored is None else to_lab(colored)[..., 1:]
    if colored is None:
        colored = gray
    elif random:
        colored = with_ab(true_lab, colored_ab)
    a, b = np.rint(true_ab / 10).astype(int).reshape(-1, 2).T + 11
    chroma = length(true_ab)  # gray's error
    size = ERRORS * (grid.max() + 1)
    cells = [grid[a, b] * ERRORS + first_threshold(x).ravel() for x in (length(true_ab - colored_ab), chroma)]
    counts = np.stack([np.bincount(x, minlength=size).reshape(-1, ERRORS) for x in cells])
    with np.errstate(divide="ignore"):  # an exact copy has an infinite PSNR
        noise = np.array([*(peak_signal_noise_ratio(true, rgb, data_range=255) for rgb in (colored, gray)), np.inf])
    return counts.astype(np.uint32), {
        "images": 1,
        "pixels": len(a),
        "areas": np.float32([*(counts @ AREAS), counts[0].sum(axis=1)]),  #                         [3, 313]
        "chroma": (length(colored_ab).sum(), 0, chroma.sum()),
        "colorfulness": (colorfulness(colored), 0, colorfulness(true)),
        "psnr": np.where(np.isinf(noise), 0, noise),
        "copies": np.isinf(noise),
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


def pool(images, times):
    """Sum over images, the i-th of which counts times[b, i] times: {name: [N, ...]}, [B, N] -> {name: [B, ...]}."""
    return {name: np.tensordot(times, values, axes=1) for name, values in images.items() if name != "names"}


def measures(sums, bin_weights):
    """Compute all measures from sums over pooled images: {name: [B, ...]}, [313] -> {version: {measure: [B]}}."""
    areas, counts = np.moveaxis(sums["areas"], 1, 0), sums["areas"][:, 2]
    with np.errstate(invalid="ignore"):  # the PSNR is NaN if all are exact copies
        found = {
            "auc_raw": areas.sum(axis=2) / counts.sum(axis=1),
            "auc_rebalanced": areas @ bin_weights / (counts @ bin_weights),
            "auc_rebalanced_own": (areas / counts.clip(min=1)).sum(axis=2) / (counts > 0).sum(axis=1),
            "chroma": sums["chroma"].T / sums["pixels"],
            "colorfulness": sums["colorfulness"].T / sums["images"],
            "psnr": sums["psnr"].T / (sums["images"] - sums["copies"].T),
        }
    return {version: {x: values[i] for x, values in found.items()} for i, version in enumerate(VERSIONS)}


def curves(counts, bin_weights):
    """Compute the share of pixels within t, by KINDS, from counts by bin and error: [313, 152] -> [3, 151]."""
    own = 1 / counts.sum(axis=1).clip(min=1)
    histograms = np.stack([np.ones_like(own), bin_weights, own]) @ counts  #                     [3, 152]
    return histograms.cumsum(axis=1)[:, :-1] / histograms.sum(axis=1, keepdims=True)


# -------------------------------------------------------------------------------------------------
# Output files


def write_csv(images, bin_weights, path):
    columns = "auc_raw auc_rebalanced psnr gray_auc_raw gray_auc_rebalanced gray_psnr chroma colorfulness true_chroma"
    columns = f"{columns} true_colorfulness".split()
    found = {}
    for version, values in measures(images, bin_weights).items():
        found.update({f"{version}_{x}".replace("colored_", ""): v for x, v in values.items()})
    with atomic_text(path) as file:
        writer = csv.writer(file)
        writer.writerow(("image", "pixels", *columns))
        for name, pixels, *values in zip(images["names"], images["pixels"], *(found[x] for x in columns)):
            writer.writerow((name, pixels, *(f"{value:.6f}" for value in values)))


def write_counts(counts, colored, gray, path):
    """Write the 151 counts and the total of [313, 152], and the curves [3, 151] of the results and of gray."""
    with atomic_text(path) as file:
        kinds = ", ".join(KINDS.values())
        file.write(f"# t, pixels with an ab error of at most t, share: {kinds}; the same for gray\n")
        for t, (count, shares) in enumerate(zip(counts.sum(axis=0).cumsum(), np.concatenate([colored, gray]).T)):
            file.write(f"{t:3d} {count:14d} " + " ".join(f"{share:.8f}" for share in shares) + "\n")
        file.write(f"total {counts.sum():12d}\n")


def read_curves(folders):
    """Read auc.txt of {name: folder}: curves [3, 151] by name, and those of gray."""
    both = {name: np.genfromtxt(Path(folder, "auc.txt"), skip_footer=1)[:, 2:].T for name, folder in folders.items()}
    *_, last = both.values()
    return {**{name: six[:3] for name, six in both.items()}, GRAY: last[3:]}


def plot(results, path):
    """Plot the curves of {name: [3, 151]}, one panel for each of KINDS; gray is dashed."""
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    for axes, kind, *shares in zip(figure.subplots(1, 3, sharey=True), KINDS.values(), *results.values()):
        for name, curve in zip(results, shares):
            style = {"linestyle": "--", "color": "0.5"} if name == GRAY else {}
            axes.plot(100 * curve, label=f"{name}: {auc(np.diff(curve, prepend=0, append=1)):.2%}", **style)
        axes.set(xlim=(0, MAX_THRESHOLD), ylim=(0, 100), xlabel="ab error t", title=kind)
        axes.grid(alpha=0.3)
        axes.legend(title="AuC", loc="lower right")
    figure.axes[0].set_ylabel("share of (weighted) pixels within t (%)")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)


# -------------------------------------------------------------------------------------------------
# Command line


def parse_args(argv=None):
    parser = cli.Parser(description="Compute the area under the curve of ab errors of colorized images.")
    group = parser.add_argument_group("images")
    add = group.add_argument
    add("--image_dir", "--imgs_dir", required=True, help="folder of the originals, nested or flat")
    add("--result_path", "--results_dir", default="./result", help="folder of the results (test.py), laid out the same")
    add("--crop_size", type=cli.SIDE, help="compare center crops of this side (default: the results', if square)")
    add("--load_size", type=cli.SIDE, help="shorter side before the crop, as given to test.py (default: the crop's)")
    add = group.add_mutually_exclusive_group().add_argument
    baseline = {"dest": "baseline", "action": "store_const"}
    add("--gray", const="gray", **baseline, help="evaluate gray (ab = 0) instead of results")
    add("--random", const="random", **baseline, help="evaluate the ab of a random other original instead of results")

    add = parser.add_argument_group("metric").add_argument
    add("--prior", help="file of 313 probabilities of the ab bins (default: the bundled prior)")
    add("--seed", type=cli.SEED, default=0, help="seed of --random")

    add = parser.add_argument_group("machine and output").add_argument
    add("--num_workers", type=cli.WORKERS, default=available_cores(), help="worker processes; 0: compare in this one")
    add("--save_path", default="./metrics", help="folder for auc.json, .csv, .npz, .txt and .png")
    return parser.parse_args(argv)


def find_pairs(args):
    """Return a list of (name, path of the original, path of the result or None), and the left out as `pair_images`."""
    if not args.baseline:
        return pair_images(args.image_dir, args.result_path, COLORING, RECORDS)
    originals = list_images(args.image_dir)
    others = [None] * len(originals)
    if args.baseline == "random":
        if len(originals) == 1:
            raise cli.UserError(f"{args.image_dir}: --random needs at least two images")
        order = np.random.default_rng(args.seed).permutation(len(originals))
        for i, following in zip(order, np.roll(order, -1)):  # one cycle
            others[i] = originals[following]
    return [(relative_path(path, args.image_dir), path, other) for path, other in zip(originals, others)], {}


def main(args):
    cli.check_crop(args)
    if args.baseline and args.load_size and not args.crop_size:
        raise cli.UserError(f"--load_size has no effect on --{args.baseline} without --crop_size")
    coloring = None if args.baseline else read_json(Path(args.result_path) / COLORING)
    if coloring and coloring.get("crop_size") and not (args.load_size or args.crop_size):
        args.load_size, args.crop_size = coloring["load_size"], coloring["crop_size"]
    use_all_cores()
    prior_path = args.prior or RESOURCES / "prior_probs.npy"
    bin_weights = rebalancing_weights(load_prior(prior_path), lam=0).numpy().astype(np.float64)
    pairs, left_out = find_pairs(args)
    make_folder(args.save_path)

    # Compare, pair by pair
    keep_freed_memory()
    grid = bins_on_grid(load_ab_bins().numpy())
    sizes = {"load_size": args.load_size, "crop_size": args.crop_size}
    job = partial(compare, grid=grid, random=args.baseline == "random", **sizes)
    records, totals = [], 0  # counts of the results and of gray
    results = parallel_map(job, [paths for _, *paths in pairs], args.num_workers, "comparing")
    for (name, *_), result in zip(pairs, results):
        if isinstance(result, InvalidImageError):
            cli.note(f"skipped {result}")
            left_out.setdefault("unreadable, or of another size", []).append(name)
            continue
        totals = totals + result[0].astype(np.int64)
        records.append({"names": name, **result[1]})
    if not records:
        raise cli.UserError(f"{args.image_dir}: none of its {len(pairs)} images could be compared")
    images = {key: np.array([record[key] for record in records]) for key in records[0]}
    pooled = measures(pool(images, np.ones((1, len(records)))), bin_weights).values()
    colored, gray, true = ({x: None if np.isnan(v) else float(v) for x, (v,) in found.items()} for found in pooled)
    shares = [curves(counts, bin_weights) for counts in totals]

    # Write and print
    title, name = BASELINES[args.baseline]
    base = os.path.join(args.save_path, name)
    summary = {
        **colored,
        "colorfulness_difference": colored["colorfulness"] - true["colorfulness"],
        "gray": gray,
        "true": {x: true[x] for x in ("chroma", "colorfulness")},
        "images": len(records),
        "pixels": int(totals[0].sum()),
        "true_images": cli.printable(os.path.abspath(args.image_dir)),
        "colored_images": title if args.baseline else cli.printable(os.path.abspath(args.result_path)),
        "coloring": coloring,
        **sizes,
        "seed": args.seed if args.baseline == "random" else None,
        "prior": {"file": cli.printable(prior_path), "sha256": sha256(prior_path)},
        "left_out": {problem: [cli.printable(name) for name in names] for problem, names in left_out.items()},
        **provenance(),
    }
    write_json(summary, base + ".json")
    with atomic_path(base + ".npz") as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, **images)
    write_csv(images, bin_weights, base + ".csv")
    write_counts(totals[0], *shares, base + ".txt")
    plot({title: shares[0], GRAY: shares[1]}, base + ".png")
    for name, found in {title: colored, GRAY: gray}.items():
        areas = "  ".join(f"{printed} {found[f'auc_{kind}']:.2%}" for kind, printed in KINDS.items())
        print(f"{name:13s}  AuC {areas}")
    values = "  ".join(f"{x} {colored[x]:.2f} (true {true[x]:.2f})" for x in ("chroma", "colorfulness"))
    ratio, gray_ratio = (found["psnr"] or math.inf for found in (colored, gray))
    print(f"{values}  PSNR {ratio:.2f} dB (gray {gray_ratio:.2f})")
    number = cli.counted(len(records), "image")
    print(f"{number}, {summary['pixels']} pixels; rebalanced by {cli.printable(prior_path)}")
    print(f"written: {cli.printable(base)}.json, .csv, .npz, .txt, .png")
    return cli.EXIT_SKIPPED if left_out else 0


if __name__ == "__main__":
    sys.exit(cli.run_script(main, parse_args, cli.AT_THE_END))
