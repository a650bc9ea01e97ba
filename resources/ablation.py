"""The paper's ablation: three trained variants compared, from their checkpoints to the README's tables and pictures.

    python train.py … --model_path runs/non_rebalance --log_path runs/non_rebalance --rebalance False
    python train.py … --model_path runs/full --log_path runs/full --gamma 0.5
    python train.py … --model_path runs/rebalance --log_path runs/rebalance --gamma 0
    python resources/ablation.py --val_dir val                                                accuracy by VGG-16
    python resources/ablation.py --val_dir val --load_size 80 --arch mobilenet_v2 --weights FILE

Colors the photographs of --val_dir with each variant and measures, image by image: the errors in ab (AuC), how well a
classifier recognizes the result, its chroma (mean of hypot(a, b) over the pixels), and the KL of train.py's validation.
To compare with: gray, the true images, and the KL of predicting the prior everywhere. Intervals (95%) are from a
bootstrap over images, with the same resamples for all rows, so that the differences have theirs as well.

Photographs that are colored already are not colored again while checkpoint, size and folder stay the same. Prints the
tables, which end with the pattern that the paper tells of and whether it holds, and

    ablation: ablation.json, .md, _curves.png, _auc.png, _held_out.jpg, _bundled.jpg; 3 of 3 variants, 780 images
"""

import argparse
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import paddle
from matplotlib.figure import Figure
from PIL import ImageOps
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from support.checkpoints import load_checkpoint
from support.cli import EXIT_SKIPPED, HelpFormatter, UserError, check_at_least, note, printable
from support.cpu import available_cores, use_all_cores
from support.files import atomic_path, atomic_text, make_folder, provenance, sha256, write_json
from support.logs import read_log
from support.processes import parallel_map
from support.sheets import contact_sheet

import metrics_acc
import metrics_auc
import test
from dataset import ColorizationDataset, InvalidImageError, named_images, open_rgb, read_rgb, soft_encode, targets
from pretrained import find_weights, load_network
from resources.demo import PHOTOGRAPHS, save_photographs
from utils import (
    MAX_THRESHOLD,
    RESOURCES,
    auc,
    entropy,
    load_ab_bins,
    load_prior,
    rebalancing_weights,
    soft_cross_entropy,
)

# Of each variant, by its folder: lambda, the share of the uniform in the prior (train.py --gamma; 1: no rebalancing).
VARIANTS = {"non_rebalance": 1, "full": 0.5, "rebalance": 0}
GRAY, PRIOR, TRUE = "gray", "prior", "true"
ROWS = {  # of the table
    "non_rebalance": "Non-rebalance",
    "full": "Full",
    "rebalance": "Rebalance (λ = 0)",
    GRAY: "gray (ab = 0)",
    PRIOR: "prior alone",
    TRUE: "true images",
}
QUANTITIES = {  # what is measured: its heading, and the factor to the unit in which it is shown
    "auc_raw": ("AuC raw", 100),
    "auc_rebalanced": ("AuC rebalanced", 100),
    "auc_rebalanced_own": ("AuC rebalanced, own", 100),
    "top1": ("top-1", 100),
    "top5": ("top-5", 100),
    "chroma": ("chroma", 1),
    "kl": ("KL", 1),
}
PATTERN = (  # what the paper tells of: of this quantity, the first row has more than the second
    ("auc_raw", "non_rebalance", "full"),
    ("auc_raw", "full", "rebalance"),
    ("auc_rebalanced", "full", "non_rebalance"),
    ("auc_rebalanced", "rebalance", "full"),
    # The same without a prior's tail, which in a small set hangs on a few pixels.
    ("auc_rebalanced_own", "full", "non_rebalance"),
    ("auc_rebalanced_own", "rebalance", "full"),
    ("chroma", "full", "non_rebalance"),
    ("chroma", "rebalance", "full"),
    ("top1", "full", GRAY),
)
AREAS = np.array([auc(one) for one in np.eye(metrics_auc.ERRORS)])  # what a pixel adds to the AuC, by its error: [152]
KL_BATCH = 16
COLORS = dict(zip(ROWS, ("C0", "C1", "C2", "0.5")))  # of the curves
THUMBNAIL = (160, 120)  # of the sheets, in pixels
NOT_TRAINED = "*not trained yet*"

# -------------------------------------------------------------------------------------------------
# The runs, and the photographs colored with them


def find_runs(args):
    """The checkpoints of the variants that are there, {variant: path}; a line for each that is not."""
    runs = {}
    for variant in VARIANTS:
        try:
            runs[variant] = find_weights(Path(args.runs) / variant, args.load_model)
        except UserError as error:
            note(f"{ROWS[variant]} is left out: {error}")
    if not runs:
        raise UserError(f"{printable(args.runs)}: no trained variant in its folders {', '.join(VARIANTS)}")
    return runs


def describe_run(variant, checkpoint, args):
    """What a checkpoint is, for ablation.json. Raises UserError if it was trained as another variant."""
    path = Path(args.runs) / variant / f"epoch_{args.load_model}_state.pdopt"
    state = load_checkpoint(path) if path.exists() else {"progress": {}, "flags": {}}
    flags = {name: value for name, value in state["flags"].items() if name != "prior"}
    if flags and (flags["gamma"] if flags["rebalance"] else 1) != VARIANTS[variant]:
        trained = f"--rebalance {flags['rebalance']} --gamma {flags['gamma']}"
        raise UserError(f"{printable(path)}: trained with {trained}, which is not {ROWS[variant]}")
    steps = state["progress"].get("step")
    return {"checkpoint": printable(checkpoint), "sha256": sha256(checkpoint), "steps": steps, "flags": flags}


def color(checkpoint, image_dir, folder, args):
    """Colors a folder of photographs into `folder`: all anew, or what is missing if it was made from the same."""
    source = printable(os.path.abspath(image_dir))
    made_from = {"checkpoint": sha256(checkpoint), "images": source, "load_size": args.load_size}
    stamp = folder.with_suffix(".json")
    if not stamp.exists() or json.loads(stamp.read_text()) != made_from:
        if folder.exists() and not stamp.exists():
            raise UserError(f"{printable(folder)}: not written by this script; choose another --save_path")
        if folder.exists():
            shutil.rmtree(folder)
        write_json(made_from, stamp)
    where = ["--image_dir", str(image_dir), "--load_model", str(checkpoint), "--result_path", str(folder)]
    how = ["--load_size", str(args.load_size), "--num_workers", str(max(1, args.num_workers)), "--skip_existing"]
    test.main(test.parse_args([*where, *how]))


# -------------------------------------------------------------------------------------------------
# What is measured of each image


def measure(paths):
    """Of an image and its colored versions (a worker's job): errors of gray and of each version, and sums of chroma.

    Errors are pairs as `metrics_auc.count_errors` returns them; chroma is of the true image, then of each version.
    Returns an InvalidImageError instead of raising it.
    """
    try:
        images = [read_rgb(path) for path in paths]
        for path, image in zip(paths, images):
            if image.shape != images[0].shape:
                raise InvalidImageError(path, "not of the true image's size")
    except InvalidImageError as error:
        return error
    true_ab, *colored_ab = [metrics_auc.look_up_ab(image) for image in images]
    errors = metrics_auc.tally(true_ab, 0, *colored_ab)
    return errors, [np.abs(ab).sum(dtype=np.float64) for ab in (true_ab, *colored_ab)]


def compare(true, colored, num_workers):
    """Errors and chroma of the images that can be read. true: list of paths; colored: {variant: list of paths}.

    Returns the M readable images' indices; what adds up over images, a dict: "counts" [M, 313], pixels by the bin of
    their true color, "areas" {row: [M, 313]}, what these add to the AuC, "chroma" {row: [M]}, its sum over the pixels;
    and the pooled counts {row: int64 [23 * 23 * 152]} that metrics_auc.py has.
    """
    bins = load_ab_bins().numpy()
    bin_of_cell = metrics_auc.weight_of_every_cell(bins, np.arange(len(bins))).astype(np.int64)
    readable, counts, rows = [], [], (GRAY, *colored)
    areas, chroma = {row: [] for row in rows}, {row: [] for row in (TRUE, *colored)}
    pooled = {row: np.zeros(bin_of_cell.size * metrics_auc.ERRORS, np.int64) for row in rows}
    setup = (metrics_auc.share, metrics_auc.ab_of_every_color())
    results = parallel_map(measure, list(zip(true, *colored.values())), num_workers, "comparing", setup)
    for i, result in enumerate(results):
        if isinstance(result, InvalidImageError):
            note(f"skipped {result}")
            continue
        for row, (classes, number) in zip(rows, result[0]):
            pooled[row][classes] += number
            cells, error = np.divmod(classes, metrics_auc.ERRORS)
            areas[row].append(np.bincount(bin_of_cell[cells], number * AREAS[error], len(bins)))
        counts.append(np.bincount(bin_of_cell[cells], number, len(bins)))
        for row, chroma_sum in zip(chroma, result[1]):
            chroma[row].append(chroma_sum)
        readable.append(i)
    if not readable:
        raise UserError(f"none of the {len(true)} images could be compared")
    counts, areas = np.stack(counts), {row: np.stack(values) for row, values in areas.items()}
    chroma = {GRAY: np.zeros(len(counts)), **{row: np.array(values) for row, values in chroma.items()}}
    return readable, {"counts": counts, "areas": {**areas, TRUE: counts}, "chroma": chroma}, pooled


def recognize(network, labels, true, colored, num_workers):
    """Whether each image's class is among a classifier's first 1 and 5, {row: bool [N, 2]}; as metrics_acc.py does."""
    settings = metrics_acc.parse_args(["--num_workers", str(num_workers)])
    controls = {TRUE: metrics_acc.as_float, GRAY: metrics_acc.as_gray}
    hits, _ = metrics_acc.classify(network, true, labels, controls, settings)
    for variant, paths in colored.items():
        hits.update(metrics_acc.classify(network, paths, labels, {variant: metrics_acc.as_float}, settings)[0])
    return hits


@paddle.no_grad()
def divergences(runs, true, prior, args):
    """KL in nats per position, not re-weighted, of each image, {row: [N]}; on the squares of train.py's validation.

    Also that of predicting the prior at every position: Non-rebalance, which minimizes this KL, has to beat it; the
    others are trained to predict rare colors more often than they occur. Targets: 5 neighbors, sigma 5.
    """
    log_prior = prior.clip(min=1e-12).log().reshape([1, -1, 1, 1])
    predictors = {PRIOR: lambda x: log_prior.expand([x.shape[0], -1, x.shape[2] // 4, x.shape[3] // 4])}
    for variant, checkpoint in runs.items():
        predictors[variant] = load_network(checkpoint)
        predictors[variant].eval()
    dataset = ColorizationDataset(true, args.load_size, args.load_size // 8 * 8)
    loader = paddle.io.DataLoader(dataset, batch_size=KL_BATCH, num_workers=args.num_workers)
    ab_bins, found = load_ab_bins(), {row: [] for row in predictors}
    for rgb, _ in tqdm(loader, "KL", unit="batch", disable=None):
        lightness, ab = targets(rgb)
        indices, weights = soft_encode(ab, ab_bins)
        for row, predict in predictors.items():
            kl = soft_cross_entropy(predict(lightness - 50), indices, weights) - entropy(weights)  # [N, h, w]
            found[row] += kl.mean(axis=[1, 2]).tolist()
    return {row: np.array(values) for row, values in found.items()}


# -------------------------------------------------------------------------------------------------
# Figures and their intervals


def resamples(images, number, seed):
    """How often each image is taken: float64 [1 + number, images]; each once, then as the bootstrap draws them."""
    random = np.random.default_rng(seed)
    times = np.ones((1 + number, images))
    for row in times[1:]:
        row[:] = np.bincount(random.integers(images, size=images), minlength=images)
    return times


def figures(measured, times, bin_weights):
    """Every quantity of the images pooled, for each resample: {row: {quantity: [1 + B]}}.

    measured: what `compare` returns, with "hits" and "kl"; times [1 + B, N]; bin_weights [313], of the rebalanced AuC.
    """
    counts, found = times @ measured["counts"], {row: {} for row in ROWS}  #                     [1 + B, 313]
    for row, values in measured["areas"].items():
        areas = times @ values  #                                                                [1 + B, 313]
        found[row]["auc_raw"] = areas.sum(axis=1) / counts.sum(axis=1)
        found[row]["auc_rebalanced"] = areas @ bin_weights / (counts @ bin_weights)
        found[row]["auc_rebalanced_own"] = (areas / counts.clip(min=1)).sum(axis=1) / (counts > 0).sum(axis=1)
    for row, values in measured["chroma"].items():
        found[row]["chroma"] = times @ values / counts.sum(axis=1)
    for row, values in measured["hits"].items():
        found[row]["top1"], found[row]["top5"] = (times @ values).T / times.shape[1]
    for row, values in measured["kl"].items():
        found[row]["kl"] = times @ values / times.shape[1]
    return {row: quantities for row, quantities in found.items() if quantities}


def estimate(values):
    """The value and its 95% percentile interval, of [1 + B].

    A resample misses some of the rarest colors: where few images have these, the rebalanced AuC's is lopsided.
    """
    low, high = np.percentile(values[1:], [2.5, 97.5])
    return {"value": float(values[0]), "low": float(low), "high": float(high)}


def differences(found):
    """What the paper's pattern is about, each with its interval and whether it holds; None where a row is missing."""
    lines = []
    for quantity, more, less in PATTERN:
        if not any(quantity in row for row in found.values()):  # --arch none
            continue
        line = {"quantity": quantity, "of": more, "minus": less, "verdict": None}
        if more in found and less in found:
            line.update(estimate(found[more][quantity] - found[less][quantity]))
            line["verdict"] = "holds" if line["low"] > 0 else "does not" if line["high"] < 0 else "undecided"
        lines.append(line)
    return lines


# -------------------------------------------------------------------------------------------------
# What is written


def markdown(summary):
    """The results and the pattern as two Markdown tables, and between them what they were measured on."""
    results = summary["results"]
    measured = {x: how for x, how in QUANTITIES.items() if any(x in row for row in results.values())}
    rows = [["", *(heading for heading, _ in measured.values())]]
    for row, name in ROWS.items():
        cells = [show(results[row].get(x), factor) for x, (_, factor) in measured.items()] if row in results else None
        rows.append([name, *(cells or [NOT_TRAINED] + [""] * (len(measured) - 1))])
    pattern = [["", "difference", "95% interval", ""]]
    for line in summary["differences"]:
        heading, factor = QUANTITIES[line["quantity"]]
        cells = [NOT_TRAINED, "", ""]
        if line["verdict"]:
            value, low, high = (f"{factor * line[x]:+.2f}" for x in ("value", "low", "high"))
            cells = [value, f"{low} … {high}", line["verdict"]]
        pattern.append([f"{heading}: {ROWS[line['of']]} − {ROWS[line['minus']]} > 0", *cells])
    prior = summary["prior"]
    classifier = f"; accuracy by {summary['classifier']['arch']}" if summary["classifier"] else ""
    caption = (
        f"*{summary['images']} images; the network sees their short side with {summary['load_size']} pixels. AuC and "
        "accuracy in percent, chroma in ab units, KL in nats per position (less is better); in parentheses the 95% "
        f"interval of {summary['bootstrap']} bootstrap resamples. "
        f"Rebalanced by {os.path.basename(prior['file'])} (sha256 {prior['sha256'][:8]}…){classifier}.*"
    )
    return f"{table(rows)}\n{caption}\n\n{table(pattern)}"


def table(rows):
    """Lists of cells as a Markdown table, the first one its head."""
    lines = ["| " + " | ".join(cells) + " |\n" for cells in rows]
    return "".join([lines[0], "|---" * len(rows[0]) + "|\n", *lines[1:]])


def show(figure, factor):
    """A cell: the value and its interval, which need not be centered on it."""
    if figure is None:
        return "–"
    value, low, high = (f"{factor * figure[x]:.2f}" for x in ("value", "low", "high"))
    return f"{value} ({low} – {high})" if low != high else value


def plot_curves(logs, path):
    """KL against the step, of {variant: lines of train.jsonl}: running means in training, and validation as points."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for variant, lines in logs.items():
        for key, style, suffix in (("kl", "-", ""), ("val_kl", "o--", ", validation")):
            points = np.array([(line["step"], line[key]) for line in lines if key in line])
            width = max(1, len(points) // 20) if key == "kl" else 1
            means = [np.convolve(values, np.full(width, 1 / width), "valid") for values in points.T]
            label = f"{ROWS[variant]}{suffix}"
            if len(points):
                axes.plot(*means, style, color=COLORS[variant], markersize=4, linewidth=1, label=label)
    axes.set(xlabel="step", ylabel="KL, nats per position, not re-weighted")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=max(1, len(logs)))
    save_figure(figure, path)


def plot_auc(pooled, results, bin_weights, path):
    """The curves behind the AuC, raw and rebalanced; pooled: {row: int64 [23 * 23 * 152]}, bin_weights [313]."""
    cell_weights = metrics_auc.weight_of_every_cell(load_ab_bins().numpy(), bin_weights)
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for kind, weights, axes in zip(("auc_raw", "auc_rebalanced"), (np.ones_like(cell_weights), cell_weights), panels):
        for row in [row for row in ROWS if row in pooled]:
            (curve,) = metrics_auc.curves(metrics_auc.histograms(np.arange(pooled[row].size), pooled[row], [weights]))
            label = f"{ROWS[row]}: {results[row][kind]['value']:.2%}"
            axes.plot(100 * curve, "--" if row == GRAY else "-", color=COLORS[row], label=label)
        axes.set(xlim=(0, MAX_THRESHOLD), ylim=(0, 100), xlabel="distance in ab", title=QUANTITIES[kind][0])
        axes.grid(alpha=0.3)
        axes.legend()
    panels[0].set_ylabel("pixels, or their weight, within it (%)")
    save_figure(figure, path)


def save_figure(figure, path):
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def save_sheet(true, colored, path):
    """gray | each variant | true, a row for each photograph: true is a list of paths, colored {variant: list}."""
    rows = []
    for true_path, *colored_paths in zip(true, *colored.values()):
        original, *versions = (ImageOps.contain(open_rgb(x), THUMBNAIL) for x in (true_path, *colored_paths))
        rows.append((printable(Path(true_path).stem), (original.convert("L").convert("RGB"), *versions, original)))
    headings = ("gray", *(ROWS[variant].split(" (")[0] for variant in colored), "true")
    with atomic_path(path) as temporary:
        contact_sheet(rows, headings, THUMBNAIL[0]).save(temporary, format="JPEG", quality=85)


# -------------------------------------------------------------------------------------------------
# Command line


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description="Compares the three variants of the paper's ablation.",
        formatter_class=HelpFormatter,
    )
    add = parser.add_argument_group("what to compare").add_argument
    add("--runs", default="./runs", help=f"folder of the runs, each --model_path and --log_path: {', '.join(VARIANTS)}")
    add("--load_model", default="latest", metavar="NAME", help="epoch_{NAME}_model.pdparams of each")
    add("--val_dir", required=True, help="folder of photographs that no run has seen")
    add("--load_size", type=int, default=256, help="short side in pixels as the network sees it")

    add = parser.add_argument_group("metrics").add_argument
    add("--prior", help="file of 313 probabilities that tells how rare a color is, instead of the shipped prior")
    add("--arch", default="vgg16", help="an ImageNet classifier of paddle.vision.models; none: no accuracy")
    add("--weights", metavar="FILE", help="its weights (.pdparams), instead of a download")
    add("--labels", metavar="FILE", help="lines of an image's name and its class, instead of class folders")
    add("--bootstrap", type=int, default=1000, help="resamples of the images behind the intervals")

    add = parser.add_argument_group("machine and output").add_argument
    add("--seed", type=int, default=0, help="of the resamples and of the choice of photographs to show")
    add("--panel", type=int, default=6, help="photographs of --val_dir to show")
    add("--num_workers", type=int, default=min(8, available_cores()), help="processes that read; 0: none but this one")
    add("--save_path", default="./ablation", help="folder for what is written, the colored photographs included")
    return parser.parse_args(argv)


def main(args):
    # Setup; what can be wrong is found before the work
    check_at_least(args, load_size=8, bootstrap=1, panel=1, num_workers=0)
    use_all_cores()
    output, prior_path = Path(args.save_path), args.prior or RESOURCES / "prior_probs.npy"
    if Path(args.val_dir).resolve() in output.resolve().parents:
        raise UserError(f"{printable(output)}: lies in --val_dir; choose another --save_path")
    prior = load_prior(prior_path)
    bin_weights = rebalancing_weights(prior, lam=0).numpy().astype(np.float64)
    runs = find_runs(args)
    descriptions = {variant: describe_run(variant, checkpoint, args) for variant, checkpoint in runs.items()}
    images = named_images(args.val_dir)
    names, true = list(images), list(images.values())
    if args.arch != "none":
        labels = metrics_acc.find_labels(names, args.val_dir, args.labels)
        classifier = metrics_acc.load_classifier(args.arch, args.weights)
    make_folder(output)

    # Color
    bundled = save_photographs(output / "bundled")
    for variant, checkpoint in runs.items():
        color(checkpoint, args.val_dir, output / variant / "colored", args)
        color(checkpoint, bundled, output / variant / "bundled", args)
    colored = {variant: [str(output / variant / "colored" / f"{name}.png") for name in names] for variant in runs}

    # Measure
    readable, measured, pooled = compare(true, colored, args.num_workers)
    left_out = [printable(names[i]) for i in sorted(set(range(len(names))) - set(readable))]
    true = [true[i] for i in readable]
    colored = {variant: [paths[i] for i in readable] for variant, paths in colored.items()}
    measured["hits"] = {}
    if args.arch != "none":
        measured["hits"] = recognize(classifier, labels[readable], true, colored, args.num_workers)
    measured["kl"] = divergences(runs, true, prior, args)
    found = figures(measured, resamples(len(true), args.bootstrap, args.seed), bin_weights)

    # Write and tell
    summary = {
        "results": {row: {x: estimate(values) for x, values in of_row.items()} for row, of_row in found.items()},
        "differences": differences(found),
        "runs": {variant: descriptions.get(variant) for variant in VARIANTS},
        "images": len(true),
        "pixels": int(measured["counts"].sum()),
        "true_images": printable(os.path.abspath(args.val_dir)),
        "load_size": args.load_size,
        "bootstrap": args.bootstrap,
        "seed": args.seed,
        "prior": {"file": printable(prior_path), "sha256": sha256(prior_path)},
        "classifier": None if args.arch == "none" else metrics_acc.describe(args),
        "left_out": {"unreadable": left_out} if left_out else {},
        **provenance(),
    }
    write_json(summary, output / "ablation.json")
    with atomic_text(output / "ablation.md") as file:
        file.write(markdown(summary))
    plot_curves(
        {variant: read_log(Path(args.runs) / variant / "train.jsonl") for variant in runs},
        output / "ablation_curves.png",
    )
    plot_auc(pooled, summary["results"], bin_weights, output / "ablation_auc.png")
    shown = np.random.default_rng(args.seed).permutation(len(true))[: args.panel]
    held_out = {variant: [paths[i] for i in shown] for variant, paths in colored.items()}
    save_sheet([true[i] for i in shown], held_out, output / "ablation_held_out.jpg")
    versions = {variant: [output / variant / "bundled" / f"{name}.png" for name in PHOTOGRAPHS] for variant in runs}
    save_sheet([bundled / f"{name}.png" for name in PHOTOGRAPHS], versions, output / "ablation_bundled.jpg")
    print(markdown(summary))
    files = "ablation.json, .md, _curves.png, _auc.png, _held_out.jpg, _bundled.jpg"
    skipped = f", {len(left_out)} skipped" if left_out else ""
    print(f"{printable(output)}: {files}; {len(runs)} of {len(VARIANTS)} variants, {len(true)} images{skipped}")
    return EXIT_SKIPPED if left_out else 0


if __name__ == "__main__":
    sys.exit(main(parse_args()))
