"""Compute an ImageNet classifier's accuracy on colorized images (Section 3.1, "semantic interpretability").

    python metrics_acc.py --image_dir DIR                                     VGG-16 on ./result, with both controls
    python metrics_acc.py --image_dir DIR --arch mobilenet_v2 --weights FILE  a different classifier, no download
    python metrics_acc.py --labels val.txt                                    a flat folder, as ImageNet's own
    python metrics_acc.py --image_dir DIR --random                            random baseline: the ab of another image

Plausible colors help a classifier that was trained on color images. The originals and their gray versions (ab = 0) are
classified as controls, on the images that have a result. Results can score lower than gray.

An image's class is a WordNet id such as n01440764: its folder's name, or the end of its own name (as in
ILSVRC2012_val_00000293_n01440764.JPEG). For other flat folders, each line of --labels contains an image's name and its
class (a WordNet id, or a number, from 0, in the sorted list of ids, resources/imagenet_synsets.txt). Kaggle's
LOC_val_solution.csv can be passed as it is.

With --random, the names of the files begin with random_.

Prints a table of top-1 and top-5 accuracy and writes accuracy.json, accuracy_images.csv (which images were recognized)
and accuracy_per_class.csv to --save_path. With originals and results, as in the paper's analysis per class, also prints
the classes whose top-5 accuracy colorization raises and lowers most compared with gray (the file is sorted by it), and
the confusions that it adds; all are in accuracy_confusions.csv:

    raised most (top-5 minus gray's): n02979186 +13.3, ...
    lowered most (top-5 minus gray's): n03888257 -10.0, ...
    added most (top-5 confusions minus the originals'): n03417042 as n03930630 +16.7, ...
"""

import os
import re
import sys
from collections import defaultdict
from functools import partial
from itertools import islice

from support import cli
from support.checkpoints import load_checkpoint, set_weights
from support.cpu import use_all_cores
from support.files import full_path, prepare_results, provenance, sha256, write_csv, write_json
from support.folders import IMAGE_SUFFIXES, one_form, pair_at_random, pair_images
from support.images import crop_resized, open_rgb
from support.workers import default_workers, parallel_map

import numpy as np
import paddle
from paddle.vision import models

from dataset import COLORING, RECORDS, lab_to_rgb, rgb_to_lab, rgb_to_lightness
from utils import RESOURCES

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as in the training of Paddle's classifiers
TOP = {"top1": 1, "top5": 5}  # an image counts as recognized if its class is among that many
SHOWN = 10  # classes and confusions that are printed
LABEL = r"(.+?)[\s,]+(n[0-9]{8}\b|[0-9]+$)"  # a line of labels begins so; in Kaggle's file, boxes follow

# -------------------------------------------------------------------------------------------------
# Classes


def load_synsets():
    """Return the sorted WordNet ids of the 1000 classes of ILSVRC 2012: the order of every classifier's outputs."""
    return (RESOURCES / "imagenet_synsets.txt").read_text().split()


def find_labels(names, root, path=None):
    """Return the classes of named images below `root`, {name: number}.

    They are listed in the file `path`, by paths or bare names, or are WordNet ids: the ends of the images' names or
    else the names of their folders. Raises UserError if one is unknown.
    """
    numbers = {synset: i for i, synset in enumerate(load_synsets())}
    known = read_labels(path, numbers) if path else numbers
    labels = {}
    for name in names:
        stem = without_suffix(name)
        folder, base = os.path.split(stem)
        keys = (stem, base) if path else (base.split("_")[-1], os.path.basename(folder or os.path.abspath(root)))
        labels[name] = next((known[key] for key in keys if key in known), None)
        if labels[name] is None:
            unnamed = "neither its folder nor its name's end is an ImageNet class (n01440764); pass --labels FILE"
            raise cli.UserError(f"{name}: not listed in {path}" if path else f"{name}: {unnamed}")
    return labels


def read_labels(path, numbers):
    """Read lines "name label", separated by space, comma or tab, as {name without suffix: number of the class}.

    A label is a WordNet id or a number; numbers: {WordNet id: number}. The first line may be a heading.
    """
    classes, labels = {**numbers, **{str(number): number for number in numbers.values()}}, {}
    reading = cli.report_os_errors(f"{path}: cannot be read")
    with reading, open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
        lines = file.read().splitlines()
    for i, line in enumerate(lines, 1):
        match = re.match(LABEL, line.strip())
        number = classes.get(match[2]) if match else None
        if number is None and (i == 1 or not line.strip()):
            continue
        if number is None or labels.setdefault(without_suffix(one_form(match[1])), number) != number:
            problem = "not a name and a class, or not the class of an earlier line"
            raise cli.UserError(f"{path}, line {i}: {problem}: {line[:200]}")
    return labels


def without_suffix(name):
    stem, suffix = os.path.splitext(name)
    return stem if suffix.lower() in IMAGE_SUFFIXES else name


# -------------------------------------------------------------------------------------------------
# Classifier


def load_classifier(arch, weights=None):
    """Create a classifier of `paddle.vision.models` with its published weights or those of a file."""
    known = sorted(name for name in models.__all__ if name.islower())
    if arch not in known:
        raise cli.UserError(f"--arch {arch}: not one of {', '.join(known)}")
    create = getattr(models, arch)
    if weights:
        network = create()
        set_weights(network, load_checkpoint(weights), weights)
    else:
        try:
            network = create(pretrained=True)  # Paddle downloads its weights once
        except (AssertionError, RuntimeError, OSError) as error:
            advice = "pass --weights FILE, downloaded on a machine with internet access"
            raise cli.UserError(f"--arch {arch}: no published weights: {error}; {advice}") from error
    network.eval()
    return network


def describe(args):
    """Describe the classifier of --arch and --weights, for the provenance of the results."""
    weights = full_path(args.weights) or "published with Paddle"
    return {"arch": args.arch, "weights": weights, "sha256": sha256(args.weights) if args.weights else None}


def top_classes(network, rgb):
    """Return the classes with the largest logits, best first: [N, 3, H, W] in [0, 1] -> int64 [N, 5]."""
    mean, std = (paddle.to_tensor(values).reshape([1, 3, 1, 1]) for values in (MEAN, STD))
    logits = network((rgb - mean) / std)
    if isinstance(logits, (tuple, list)):  # GoogLeNet also returns those of its auxiliary classifiers
        logits = logits[0]
    return paddle.topk(logits, max(TOP.values()), axis=1)[1]


def with_ab(rgb, ab):
    """Replace images' ab: uint8 [N, 3, H, W], float32 [N, 2, H, W] -> float32 [N, 3, H, W] in [0, 1]."""
    return lab_to_rgb(paddle.concat([rgb_to_lightness(rgb), ab], axis=1))


def read_squares(pair, load_size, crop_size):
    """Read the center crops of an original, if it has a path, and its result: uint8 [crop_size, crop_size, 3]."""
    _, *paths = pair
    return [path and crop_resized(open_rgb(path, least_side=load_size), load_size, crop_size) for path in paths]


def to_versions(pairs, random=False):
    """Return what is classified of a list of `read_squares`: {version: float32 [N, 3, H, W] in [0, 1]}."""
    true, colored = (
        None if squares[0] is None else paddle.to_tensor(np.stack(squares).transpose(0, 3, 1, 2))
        for squares in zip(*pairs)
    )
    if random:
        versions = {"random": with_ab(true, rgb_to_lab(colored)[:, 1:])}
    else:
        versions = {"colored": colored.astype("float32") / 255}
    if true is not None:
        versions["true"] = true.astype("float32") / 255
        versions["gray"] = with_ab(true, paddle.zeros_like(true[:, :2], dtype="float32"))
    return versions


@paddle.no_grad()
def measure(network, pairs, random=False, load_size=256, crop_size=224, batch_size=32, num_workers=0):
    """Classify results, originals and their gray versions.

    Args:
        network (Layer): The classifier.
        pairs (list): Name, path of the original and path of the result of each image. All may lack the original (None).
        random (bool): The second path is another original, whose ab is to be taken: version "random".
        load_size (int): The shorter side is resized to this many pixels.
        crop_size (int): Side of the center crop that is classified.
        batch_size (int): Images per batch.
        num_workers (int): Number of worker processes.

    Returns:
        tuple[list, dict]: The names of the N images that can be read, and by version ("colored", "true", "gray") their
        five most likely classes, int64 [N, 5], best first. Other images are reported on stderr.

    Raises:
        UserError: If no image can be read.
    """
    names, classes = [], defaultdict(list)
    read = partial(read_squares, load_size=load_size, crop_size=crop_size)
    squares = parallel_map(read, pairs, num_workers, "classifying")
    while batch := list(islice(squares, batch_size)):
        names += [pairs[i][0] for i, _ in batch]
        for version, rgb in to_versions([images for _, images in batch], random).items():
            classes[version].append(top_classes(network, rgb).numpy())
    if not names:
        raise cli.UserError(f"none of the {len(pairs)} images can be read")
    return names, {version: np.concatenate(parts) for version, parts in classes.items()}


def find_hits(classes, labels):
    """Return whether each image's class is among the first 1 and 5: int64 [N, 5], [N] -> {"top1": bool [N], …}."""
    right = classes == labels[:, None]
    return {name: right[:, :count].any(axis=1) for name, count in TOP.items()}


# -------------------------------------------------------------------------------------------------
# Analysis per class (the paper's appendix)


def rank_classes(hits, labels):
    """Return the classes and their top-5 accuracy on results minus that on gray images, in descending order of it."""
    change = hits["colored_top5"].astype(int) - hits["gray_top5"]
    classes = np.unique(labels)
    gains = np.array([change[labels == c].mean() for c in classes])
    order = np.argsort(-gains, kind="stable")
    return classes[order], gains[order]


def confusion_rates(classes, labels):
    """Return at [c, d] the share of images of class c for which d is among the five most likely classes."""
    counts = np.zeros([len(load_synsets())] * 2)
    np.add.at(counts, (labels[:, None], classes), 1)
    return counts / np.bincount(labels, minlength=len(counts)).clip(min=1)[:, None]


def rank_confusions(classes, labels):
    """Sort the confusions of two classes by how much colorization adds to those of the originals.

    Args:
        classes (dict): Result of `measure`.
        labels (ndarray): int64 [N]. The classes of the images.

    Returns:
        tuple[ndarray, ndarray]: Pairs (c, d) of different classes, int64 [M, 2], and their rates in results and in
        originals, float64 [M, 2], in descending order of the difference.
    """
    rates = np.stack([confusion_rates(classes[version], labels) for version in ("colored", "true")], axis=2)
    rates[np.diag_indices(len(rates))] = 0
    pairs = np.argwhere(rates.any(axis=2))
    rates = rates[tuple(pairs.T)]
    order = np.argsort(rates[:, 1] - rates[:, 0], kind="stable")
    return pairs[order], rates[order]


# -------------------------------------------------------------------------------------------------
# Output files


def write_per_class(hits, labels, classes, synsets, path):
    columns = {"class": synsets[classes], "images": [np.sum(labels == c) for c in classes]}
    for heading, right in hits.items():
        columns[heading] = [f"{right[labels == c].mean():.4f}" for c in classes]
    write_csv(columns, path)


def write_confusions(confusions, rates, path):
    colored, true = ([f"{rate:.4f}" for rate in column] for column in rates.T)
    names, others = confusions.T
    write_csv({"class": names, "taken_for": others, "colored": colored, "true": true}, path)


def write_images(names, hits, labels, synsets, path):
    """Write for each image and version whether its class is among the first 1 and 5, as 1 and 0."""
    recognized = {heading: right.astype(int) for heading, right in hits.items()}
    write_csv({"image": names, "class": synsets[labels], **recognized}, path)


def print_table(accuracy):
    print(f"{'':8s}   top-1   top-5")
    for version, shares in accuracy.items():
        print(f"{version:8s}" + "".join(f"{share:8.2%}" for share in shares.values()))


def print_first(title, names, changes, sign=1):
    """Print the first changes, in percentage points, that have this sign."""
    first = [f"{name} {100 * x:+.1f}" for name, x in zip(names[:SHOWN], changes[:SHOWN]) if sign * x > 0]
    print(f"{title}: {', '.join(first) or 'none'}")


# -------------------------------------------------------------------------------------------------
# Command line


def parse_args(argv=None):
    parser = cli.Parser(description="Compute an ImageNet classifier's accuracy on colorized images.")
    add = parser.add_argument_group("images").add_argument
    originals = "folder of the originals, same layout; these and their gray versions are the controls"
    add("--image_dir", "--imgs_dir", help=originals)
    add("--result_path", "--results_dir", default="./result", help="folder of the results (test.py)")
    add("--random", action="store_true", help="evaluate the ab of a random other original instead of results")
    add("--seed", type=cli.SEED, default=0, help="seed of --random")
    add("--labels", metavar="FILE", help="lines of an image's name and its class (default: in folder or file names)")
    add("--load_size", type=cli.SIDE, default=256, help="the shorter side is resized to this many pixels")
    add("--crop_size", type=cli.SIDE, default=224, help="side of the center crop that is classified, in pixels")

    add = parser.add_argument_group("classifier").add_argument
    add("--arch", default="vgg16", help="an ImageNet classifier of paddle.vision.models")
    add("--weights", metavar="FILE", help="weights of the classifier, .pdparams (default: download Paddle's)")

    add = parser.add_argument_group("machine and output").add_argument
    add("--batch_size", type=cli.whole(), default=32, help="images per batch")
    workers = "worker processes; 0: decode in this one"
    add("--num_workers", type=cli.WORKERS, default=min(8, default_workers()), help=workers)
    add("--save_path", default="./metrics", help="folder for accuracy.json and two tables")
    return parser.parse_args(argv)


def main(args):
    cli.check_crop(args)
    if args.random and not args.image_dir:
        raise cli.UserError("--random needs --image_dir")
    use_all_cores()

    # Find images and classes before the classifier, so that a wrong folder is reported before a download
    colored_dir = None if args.random else args.result_path
    pairs, left_out, coloring = pair_images(args.image_dir, colored_dir, COLORING, RECORDS)
    if args.random:
        pairs = pair_at_random(pairs, args.seed)
    all_labels = find_labels([name for name, _, _ in pairs], args.image_dir or args.result_path, args.labels)
    subject = {"true_images": full_path(args.image_dir), "colored_images": full_path(colored_dir)}
    base = os.path.join(args.save_path, "random_accuracy" if args.random else "accuracy")
    prepare_results(f"{base}.json", subject)

    # Classify; an image that is unreadable in one version is left out of all
    network = load_classifier(args.arch, args.weights)
    settings = {x: getattr(args, x) for x in ("load_size", "crop_size", "batch_size", "num_workers")}
    names, classes = measure(network, pairs, args.random, **settings)
    if unreadable := sorted({*all_labels} - {*names}):
        left_out["unreadable"] = unreadable
    labels = np.array([all_labels[name] for name in names])
    hits = {f"{x}_{top}": right for x, found in classes.items() for top, right in find_hits(found, labels).items()}

    # Write and print
    synsets, ranked = np.array(load_synsets()), np.unique(labels)
    accuracy = {version: {top: float(hits[f"{version}_{top}"].mean()) for top in TOP} for version in classes}
    summary = {
        "accuracy": accuracy,
        "images": len(labels),
        "classes": len(ranked),
        **subject,
        "coloring": coloring,
        "load_size": args.load_size,
        "crop_size": args.crop_size,
        "classifier": describe(args),
        "labels": full_path(args.labels) or "class folders",
        "seed": args.seed if args.random else None,
        "left_out": left_out,
        **provenance(),
    }
    write_json(summary, f"{base}.json")
    write_images(names, hits, labels, synsets, f"{base}_images.csv")
    print_table(accuracy)
    if {"colored", "true"} <= classes.keys():
        (ranked, gains), (confusions, rates) = rank_classes(hits, labels), rank_confusions(classes, labels)
        write_confusions(synsets[confusions], rates, f"{base}_confusions.csv")
        print_first("raised most (top-5 minus gray's)", synsets[ranked], gains)
        print_first("lowered most (top-5 minus gray's)", synsets[ranked[::-1]], gains[::-1], sign=-1)
        names = [" as ".join(pair) for pair in synsets[confusions]]
        print_first("added most (top-5 confusions minus the originals')", names, rates[:, 0] - rates[:, 1])
    write_per_class(hits, labels, ranked, synsets, f"{base}_per_class.csv")
    print(f"{len(labels)} images of {summary['classes']} classes; {args.arch} at {args.crop_size} pixels")
    print(f"written: {cli.printable(base)}.json, _*.csv")
    return cli.EXIT_SKIPPED if left_out else 0


if __name__ == "__main__":
    sys.exit(cli.run_script(main, parse_args, cli.AT_THE_END))
