"""Area under the curve of color errors (AuC) of colored images, raw and rebalanced (Section 3.1 of the paper).

    python metrics_auc.py --imgs_dir DIR                       the images in ./result against the true ones in DIR
    python metrics_auc.py --imgs_dir DIR --gray                the gray baseline (ab = 0), which needs no results

For each pixel the distance of the predicted from the true color in the ab plane; the share of pixels within t, for
t = 0 … 150; the area under that curve, divided by 150. All pixels of all images are pooled, in three ways:

    raw              every pixel counts the same; gray alone scores 89.1% on ImageNet
    rebalanced       a pixel counts by the rarity of its true color in the prior (lambda = 0); gray scores 58.0%
    rebalanced_own   the same, rarity being that among the true images themselves: the mean over the bins that occur.
                     A prior from other images can give a few bins that it has hardly seen most of the weight.

Beside them chroma, the mean of hypot(a, b) over all pixels; colorfulness (Hasler and Süsstrunk 2003) and PSNR of the
RGB values, the means over the images (an exact copy, whose PSNR is infinite, left out of the latter).

Images are paired by their path without its suffix. Colored images of the true one's size are compared as they are;
squares, as `test.py --load_size 224 --crop_size 224` makes them, with the same square of the true image.

Prints these for the colored images and for gray, and writes auc.json, auc.csv (each image), auc.npz (each image's sums,
for resources/ablation.py), auc.txt (the counts behind the curve) and auc.png (the curve) into --save_path; with --gray
the names begin with gray_.
"""

import csv
import math
import os
import sys
from functools import cache, partial
from pathlib import Path

from support.cli import (
    AT_THE_END,
    EXIT_SKIPPED,
    SIDE,
    WORKERS,
    Parser,
    UserError,
    check_crop,
    counted,
    note,
    note_some,
    printable,
    run_script,
)
from support.cpu import available_cores, keep_freed_memory, use_all_cores
from support.files import atomic_path, atomic_text, make_folder, provenance, read_json, sha256, write_json
from support.images import (
    COLORING,
    InvalidImageError,
    crop_resized,
    image_size,
    list_images,
    open_rgb,
    pair_images,
    read_rgb,
    relative_path,
)
from support.workers import parallel_map

import numpy as np
import paddle
from matplotlib.figure import Figure

from dataset import rgb_to_lab, rgb_to_lightness
from model import NUM_BINS
from utils import MAX_THRESHOLD, RESOURCES, auc, first_threshold, load_ab_bins, load_prior, rebalancing_weights

KINDS = ("raw", "rebalanced", "rebalanced_own")
VERSIONS = ("colored", "gray", "true")  # of each image
GRAY = "gray (ab = 0)"
ERRORS = MAX_THRESHOLD + 2  # classes of an error: within 0 … 150, and beyond
AREAS = np.array([auc(one) for one in np.eye(ERRORS)])  # what a pixel adds to the AuC, by its error: [152]

# -------------------------------------------------------------------------------------------------
# What is known of every color, prepared once


@cache
def tables():
    """Of all 256^3 colors, by the color as a number 0xRRGGBB: ab, and what else is asked of a true color.

    ab is a + ib, complex64 [2^24]: a distance is one fast `np.abs`, and a look-up fetches both a and b. The other,
    int32 [2^24], is the number of the nearest bin * 256 + the level of the gray (ab = 0) that is as light. 192 MB, made
    in 2 seconds; worker processes that are forked afterwards share them.
    """
    points, ab_bins = np.arange(-110, 111, 10), load_ab_bins().numpy()  # the bins lie on this grid
    grid = np.stack(np.meshgrid(points, points, indexing="ij"), axis=-1)[:, :, None]  #     [23, 23, 1, 2]
    nearest = ((grid - ab_bins) ** 2).sum(axis=3).argmin(axis=2).astype(np.int32)  #        [23, 23]
    between_grays = rgb_to_lightness(paddle.arange(0.5, 255).expand([1, 3, 1, 255]) / 255).numpy().ravel()
    levels = np.arange(256, dtype=np.uint8)
    ab, bins_and_grays = (np.empty((256, 256, 256), dtype) for dtype in (np.complex64, np.int32))
    for reds in np.split(levels, 16):
        rgb = np.stack(np.meshgrid(reds, levels, levels, indexing="ij"), axis=1)  #         [16, 3, 256, 256]
        lightness, *a_and_b = rgb_to_lab(paddle.to_tensor(rgb)).numpy().swapaxes(0, 1)
        ab.real[reds], ab.imag[reds] = a_and_b
        # For an sRGB color the nearest point of the grid is a bin, and so the nearest bin: rounding finds it.
        bins = nearest[tuple(np.rint(x / 10).astype(np.intp) + 11 for x in a_and_b)]
        bins_and_grays[reds] = bins * 256 + np.searchsorted(between_grays, lightness)
    return ab.ravel(), bins_and_grays.ravel()


# -------------------------------------------------------------------------------------------------
# One pair of images (in a worker process: NumPy and Pillow alone)


def color_numbers(rgb):
    """uint8 [3, M] -> 0xRRGGBB, [M]."""
    red, green, blue = rgb
    return ((red.astype(np.int32) << 8 | green) << 8 | blue).astype(np.intp)


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


def compare(paths, load_size=None, crop_size=None):
    """What a pair adds to the results: how many pixels of which true color have which error, and a dict of sums.

    The former is uint32 [2, 313, 152], of the colored image and of gray, which also stands in for a colored image of
    no path. The sums are by VERSIONS. Returns an InvalidImageError instead of raising it, so that the others go on.
    """
    try:
        true, colored = map(flat, read_pair(*paths, load_size, crop_size))
    except InvalidImageError as error:
        return error
    take = partial(np.take, mode="clip")  # no number is out of range: the fastest way
    ab, bins_and_grays = tables()
    numbers = color_numbers(true)
    true_ab, of_true = take(ab, numbers), take(bins_and_grays, numbers)
    gray = np.broadcast_to((of_true & 255).astype(np.uint8), true.shape)
    colored_ab = np.zeros_like(true_ab) if colored is None else take(ab, color_numbers(colored))
    colored = gray if colored is None else colored
    start, true_chroma = (of_true >> 8) * np.int64(ERRORS), np.abs(true_ab)
    errors = [first_threshold(distance) for distance in (np.abs(true_ab - colored_ab), true_chroma)]
    counts = [np.bincount(start + error, minlength=NUM_BINS * ERRORS).reshape(-1, ERRORS) for error in errors]
    noise = (psnr(colored, true), psnr(gray, true), None)
    return np.stack(counts).astype(np.uint32), {
        "images": 1,
        "pixels": len(true_ab),
        "areas": np.float32([*(x @ AREAS for x in counts), counts[0].sum(axis=1)]),  #             [3, 313]
        "chroma": (np.abs(colored_ab).sum(), 0, true_chroma.sum()),
        "colorfulness": (colorfulness(colored), 0, colorfulness(true)),
        "psnr": [x or 0 for x in noise],
        "copies": [x is None for x in noise],
    }


def flat(image):
    """uint8 [H, W, 3] -> [3, H * W]; None stays None."""
    return None if image is None else np.ascontiguousarray(image.reshape(-1, 3).T)


def colorfulness(rgb):
    """Hasler and Süsstrunk (2003), M3, of uint8 [3, M]: 0 for gray, 33 "moderately", 109 "extremely colorful".

    The spread and, at 0.3, the mean of the opponent colors red - green and (red + green) / 2 - blue.
    """
    red, green, blue = rgb.astype(np.int16)
    opponents = np.float32(red - green), np.float32(red + green - 2 * blue) / 2
    means = [x.mean() for x in opponents]
    spreads = [math.sqrt(np.square(x - mean).mean()) for x, mean in zip(opponents, means)]
    return math.hypot(*spreads) + 0.3 * math.hypot(*means)


def psnr(rgb, true):
    """Peak signal-to-noise ratio of the RGB values, uint8 [3, M] twice, in dB; None for an exact copy (infinite)."""
    error = np.square(np.subtract(rgb, true, dtype=np.int16).astype(np.float32)).mean()
    return 10 * math.log10(255**2 / error) if error else None


# -------------------------------------------------------------------------------------------------
# All images


def pool(images, times):
    """The sums over images, of which the i-th is taken times[b, i] times: {name: [N, …]}, [B, N] -> {name: [B, …]}."""
    return {name: np.tensordot(times, values, axes=1) for name, values in images.items() if name != "names"}


def figures(sums, bin_weights):
    """What is reported, of each image or of pooled ones: {name: [B, …]}, [313] -> {version: {figure: [B]}}."""
    counts, found = sums["areas"][:, 2], {}
    for i, version in enumerate(VERSIONS):
        areas = sums["areas"][:, i]
        with np.errstate(invalid="ignore"):  # NaN: the PSNR where all are exact copies
            found[version] = {
                "auc_raw": areas.sum(axis=1) / counts.sum(axis=1),
                "auc_rebalanced": areas @ bin_weights / (counts @ bin_weights),
                "auc_rebalanced_own": (areas / counts.clip(min=1)).sum(axis=1) / (counts > 0).sum(axis=1),
                "chroma": sums["chroma"][:, i] / sums["pixels"],
                "colorfulness": sums["colorfulness"][:, i] / sums["images"],
                "psnr": sums["psnr"][:, i] / (sums["images"] - sums["copies"][:, i]),
            }
    return found


def curves(counts, bin_weights):
    """Pixels by the bin of their true color and their error, [313, 152] -> their share within t, by KINDS: [3, 151]."""
    own = 1 / counts.sum(axis=1).clip(min=1)
    histograms = np.stack([np.ones(NUM_BINS), bin_weights, own]) @ counts  #                     [3, 152]
    return histograms.cumsum(axis=1)[:, :-1] / histograms.sum(axis=1, keepdims=True)


# -------------------------------------------------------------------------------------------------
# What is written


def write_csv(images, bin_weights, path):
    found = figures(images, bin_weights)
    columns = [(version, x) for version in VERSIONS[:2] for x in ("auc_raw", "auc_rebalanced", "psnr")]
    columns += [(version, x) for version in ("colored", "true") for x in ("chroma", "colorfulness")]
    with atomic_text(path) as file:
        writer = csv.writer(file)
        writer.writerow(("image", "pixels", *(f"{version}_{x}".replace("colored_", "") for version, x in columns)))
        rows = zip(images["names"], images["pixels"], *(found[version][x] for version, x in columns))
        writer.writerows((name, pixels, *(f"{value:.6f}" for value in values)) for name, pixels, *values in rows)


def write_counts(counts, colored, gray, path):
    """The 151 counts and the total, of [313, 152], beside the curves [3, 151] of the colored images and of gray."""
    with atomic_text(path) as file:
        file.write(f"# t, pixels whose ab is within t of the true one, share: {', '.join(KINDS)}; gray's: the same\n")
        for t, (count, shares) in enumerate(zip(counts.sum(axis=0).cumsum(), np.concatenate([colored, gray]).T)):
            file.write(f"{t:3d} {count:14d} " + " ".join(f"{share:.8f}" for share in shares) + "\n")
        file.write(f"total {counts.sum():12d}\n")


def plot(results, path):
    """The curves of {name: [3, 151]}, a panel for each of KINDS; gray dashed."""
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    for axes, kind, *of_kind in zip(figure.subplots(1, 3, sharey=True), KINDS, *results.values()):
        for name, curve in zip(results, of_kind):
            style = {"linestyle": "--", "color": "0.5"} if name == GRAY else {}
            axes.plot(100 * curve, label=f"{name}: {(curve[:-1] + curve[1:]).mean() / 2:.2%}", **style)
        axes.set(xlim=(0, MAX_THRESHOLD), ylim=(0, 100), xlabel="distance in ab", title=kind.replace("_", ", "))
        axes.grid(alpha=0.3)
        axes.legend(title="AuC", loc="lower right")
    figure.axes[0].set_ylabel("pixels, or their weight, within it (%)")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)


# -------------------------------------------------------------------------------------------------
# Command line


def parse_args(argv=None):
    description = "Area under the curve of ab errors of colored images, raw and rebalanced."
    parser = Parser(description=description)
    add = parser.add_argument_group("images").add_argument
    add("--imgs_dir", required=True, help="folder of the true images, nested or flat")
    add("--results_dir", default="./result", help="folder of the colored images, laid out the same (test.py)")
    add("--gray", action="store_true", help="evaluate gray (ab = 0) instead of --results_dir")
    add("--crop_size", type=SIDE, help="compare center squares of so many pixels (default: the results', if squares)")
    add("--load_size", type=SIDE, help="short side before that crop, as given to test.py (default: the crop's)")

    add = parser.add_argument_group("metric").add_argument
    add("--prior", help="file of 313 probabilities that tells how rare a color is (default: the shipped prior)")

    add = parser.add_argument_group("machine and output").add_argument
    add("--num_workers", type=WORKERS, default=available_cores(), help="processes that compare; 0: none but this one")
    add("--save_path", default="./metrics", help="folder for auc.json, .csv, .npz, .txt and .png")
    return parser.parse_args(argv)


def main(args):
    check_crop(args)
    if args.gray and args.load_size and not args.crop_size:
        raise UserError("--load_size without --crop_size changes nothing for --gray")
    use_all_cores()
    prior_path = args.prior or RESOURCES / "prior_probs.npy"
    bin_weights = rebalancing_weights(load_prior(prior_path), lam=0).numpy().astype(np.float64)

    # Which images, and which are left out
    if args.gray:
        pairs, left_out = [(relative_path(path, args.imgs_dir), path, None) for path in list_images(args.imgs_dir)], {}
    else:
        pairs, left_out = pair_images(args.imgs_dir, args.results_dir)
    for problem, names in left_out.items():
        note_some(problem, names)
    make_folder(args.save_path)

    # Compare, pair by pair
    tables()  # before the workers, so that these share them
    keep_freed_memory()
    job = partial(compare, load_size=args.load_size, crop_size=args.crop_size)
    records, totals = [], np.zeros((2, NUM_BINS, ERRORS), np.int64)  # of the colored images and of gray
    results = parallel_map(job, [paths for _, *paths in pairs], args.num_workers, "comparing", (tables,))
    for (name, *_), result in zip(pairs, results):
        if isinstance(result, InvalidImageError):
            note(f"skipped {result}")
            left_out.setdefault("unreadable, or of another size", []).append(name)
            continue
        totals += result[0]
        records.append({"names": name, **result[1]})
    if not records:
        raise UserError(f"{args.imgs_dir}: none of its {len(pairs)} images could be compared")
    images = {key: np.array([record[key] for record in records]) for key in records[0]}
    pooled = figures(pool(images, np.ones((1, len(records)))), bin_weights).values()
    colored, gray, true = ({x: None if np.isnan(v) else float(v) for x, (v,) in of.items()} for of in pooled)
    shares = [curves(counts, bin_weights) for counts in totals]

    # Write and tell
    pixels = int(totals[0].sum())
    summary = {
        **colored,
        "colorfulness_difference": colored["colorfulness"] - true["colorfulness"],
        "gray": gray,
        "true": {x: true[x] for x in ("chroma", "colorfulness")},
        "images": len(records),
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
    with atomic_path(base + ".npz") as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, **images)
    write_csv(images, bin_weights, base + ".csv")
    write_counts(totals[0], *shares, base + ".txt")
    plot({"colored": shares[0], GRAY: shares[1]} if not args.gray else {GRAY: shares[1]}, base + ".png")
    for name, of in (("colored", colored), (GRAY, gray))[args.gray :]:
        print(f"{name:13s}  AuC " + "  ".join(f"{kind} {of[f'auc_{kind}']:.2%}" for kind in KINDS))
    quality = "  ".join(f"{x} {colored[x]:.2f} (true {true[x]:.2f})" for x in ("chroma", "colorfulness"))
    ratio, of_gray = (of["psnr"] or math.inf for of in (colored, gray))
    print(f"{quality}  PSNR {ratio:.2f} dB (gray {of_gray:.2f})")
    print(f"{counted(len(records), 'image')}, {pixels} pixels; rebalanced by {printable(prior_path)}")
    print(f"written: {printable(base)}.json, .csv, .npz, .txt, .png")
    return EXIT_SKIPPED if left_out else 0


if __name__ == "__main__":
    sys.exit(run_script(main, parse_args, AT_THE_END))
