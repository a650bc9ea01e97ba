"""Compare folders of colorized images in one table with bootstrap intervals, such as the rebalancing variants.

    for variant in non_rebalance full rebalance; do    trained with --rebalance False, --gamma 0.5 and --gamma 0
        python test.py --image_dir val --model_path runs/$variant --load_model latest --result_path results/$variant
    done
    python resources/ablation.py --val_dir val --results results/* --runs runs                accuracy by VGG-16
    python resources/ablation.py --val_dir val --results results/* --arch mobilenet_v2 --weights FILE

The table has one row per folder, under the folder's name, and rows for gray and the originals. Rows may differ in
anything, for example one checkpoint at several sizes or temperatures. The script runs metrics_auc.py and metrics_acc.py
and reads their values for each image. The 95% intervals come from a bootstrap over the images, with the same resamples
for all rows, so differences have intervals too. Rows named like the three variants are tested for the expected order:
none (non_rebalance), λ = 0.5 (full), λ = 0 (rebalance). The paper has the first two; λ = 0 is a variant of the earlier
Paddle port. With --runs, a folder of log folders with the rows' names, the table also contains the KL of the last
validation, and the training curves of the KL are plotted.

    ablation: ablation.json, .md, _auc.png, _sheet.jpg, _curves.png; 3 rows, 780 images
"""

import csv
import os
import sys
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from support.cli import EXIT_SKIPPED, SEED, WORKERS, Parser, UserError, printable, run_script, whole
from support.files import atomic_path, atomic_text, make_folder, provenance, read_json, write_json
from support.images import open_rgb
from support.logs import read_log
from support.sheets import contact_sheet
from support.workers import default_workers

import numpy as np
from matplotlib.figure import Figure
from PIL import ImageOps

import metrics_acc
import metrics_auc
from dataset import COLORING, named_images
from utils import load_prior, rebalancing_weights

GRAY, TRUE = "gray", "true"
ROWS = {  # headings of rows; others have their folder's name
    "non_rebalance": "no rebalancing",
    "full": "λ = 0.5 (full)",
    "rebalance": "λ = 0",
    GRAY: metrics_auc.GRAY,
    TRUE: "ground truth",
}
QUANTITIES = {  # heading, and factor to the unit of the table
    "auc_raw": ("raw AuC", 100),
    "auc_rebalanced_own": ("macro AuC", 100),
    "auc_rebalanced": ("rebalanced AuC", 100),
    "top1": ("top-1", 100),
    "top5": ("top-5", 100),
    "chroma": ("chroma", 1),
    "colorfulness": ("colorfulness", 1),
    "psnr": ("PSNR", 1),
    "kl": ("KL", 1),
}
RAREST_FIRST = ("rebalance", "full", "non_rebalance")
PATTERN = {  # the expected order: each row has a higher value than the next
    "auc_raw": RAREST_FIRST[::-1],
    "auc_rebalanced_own": RAREST_FIRST,  # independent of the prior, whose rarest bins depend on a few pixels
    "auc_rebalanced": RAREST_FIRST,
    "chroma": RAREST_FIRST,
    "top1": ("full", GRAY),
}
THUMBNAIL = (160, 120)  # pixels


def heading(row):
    return ROWS.get(row, row)


# -------------------------------------------------------------------------------------------------
# Measuring, by the metrics' own scripts


def flags(**values):
    return [f"--{name}={value}" for name, value in values.items() if value is not None]


def measure(folder, output, args):
    """Run metrics_auc.py on a folder of results and return the per-image sums of its auc.npz."""
    where = {"image_dir": args.val_dir, "result_path": folder, "save_path": output}
    metrics_auc.main(metrics_auc.parse_args(flags(**where, prior=args.prior, num_workers=args.num_workers)))
    with np.load(output / "auc.npz") as file:
        return dict(file)


def recognize(where, output, args):
    """Run metrics_acc.py and return the lines of its accuracy_images.csv by image name."""
    settings = {name: getattr(args, name) for name in ("arch", "weights", "labels", "num_workers")}
    metrics_acc.main(metrics_acc.parse_args([*where, *flags(**settings, save_path=output)]))
    with open(output / "accuracy_images.csv", newline="", encoding="utf-8", errors="surrogateescape") as file:
        return {line["image"]: line for line in csv.DictReader(file)}


def align(measured, recognized):
    """Return the names of the images that all rows have, and each row's sums for these, in this order."""
    places = {row: {name: i for i, name in enumerate(images["names"].tolist())} for row, images in measured.items()}
    first = next(iter(measured))
    names = [name for name in places[first] if all(name in x for x in (*places.values(), *recognized.values()))]
    if not names:
        raise UserError("the rows have no image in common that could be compared")
    aligned = {}
    for row, images in measured.items():
        chosen = [places[row][name] for name in names]
        aligned[row] = {key: values[chosen] for key, values in images.items()}
        if not np.array_equal(aligned[row]["areas"][:, 2], aligned[first]["areas"][:, 2]):
            raise UserError(f"{row} and {first} differ in size or crop: compare them in separate tables")
    return names, aligned


# -------------------------------------------------------------------------------------------------
# Values and their intervals


def resamples(images, number, seed):
    """Return how often each image counts, float64 [1 + number, images]: once in the first row, then bootstrap draws."""
    random = np.random.default_rng(seed)
    times = np.ones((1 + number, images))
    for row in times[1:]:
        row[:] = np.bincount(random.integers(images, size=images), minlength=images)
    return times


def measures(names, measured, recognized, times, bin_weights):
    """Compute every quantity for each resample of the pooled images: {row: {quantity: [1 + B]}}.

    Args:
        names (list[str]): The N images.
        measured (dict): Sums by row, from `align`.
        recognized (dict): Lines by row, from `recognize`.
        times (ndarray): [1 + B, N], from `resamples`.
        bin_weights (ndarray): [313].
    """
    found = {}
    for row, images in measured.items():
        found[row], *controls = metrics_auc.measures(metrics_auc.pool(images, times), bin_weights).values()
    found[GRAY], found[TRUE] = controls  # the same for all rows
    for (row, lines), top in product(recognized.items(), ("top1", "top5")):
        column = f"{row if row in (GRAY, TRUE) else 'colored'}_{top}"
        found[row][top] = times @ [int(lines[name][column]) for name in names] / len(names)
    return {row: {x: v for x, v in values.items() if np.isfinite(v).all()} for row, values in found.items()}


def estimate(values):
    """Return the value and its 95% percentile interval from [1 + B].

    Resamples miss some of the rarest colors, so the interval of a rebalanced AuC may be asymmetric.
    """
    low, high = np.percentile(values[1:], [2.5, 97.5])
    return {"value": float(values[0]), "low": float(low), "high": float(high)}


def differences(found):
    """Return the differences that PATTERN expects to be positive, with intervals and verdicts, for existing rows."""
    lines = []
    for quantity, rows in PATTERN.items():
        rows = [row for row in rows if quantity in found.get(row, ())]
        for more, less in zip(rows, rows[1:]):
            change = estimate(found[more][quantity] - found[less][quantity])
            verdict = "holds" if change["low"] > 0 else "does not" if change["high"] < 0 else "undecided"
            lines.append({"quantity": quantity, "of": more, "minus": less, **change, "verdict": verdict})
    return lines


# -------------------------------------------------------------------------------------------------
# Output files


def markdown(summary):
    """Return the results and the differences as two Markdown tables with a caption."""
    results, prior, classifier = summary["results"], summary["prior"], summary["classifier"]
    measured = [x for x in QUANTITIES if any(x in values for values in results.values())]
    rows = [["", *(QUANTITIES[x][0] for x in measured)]]
    rows += [[heading(row), *(cell(x, values.get(x)) for x in measured)] for row, values in results.items()]
    caption = (
        f"*{summary['images']} images. AuC and accuracy in percent, chroma in ab units, PSNR in dB"
        f"{'; KL of the last validation in nats per position, lower is better' * ('kl' in measured)}. In parentheses "
        f"the 95% interval of {summary['bootstrap']} bootstrap resamples. Rebalanced by "
        f"{os.path.basename(prior['file'])} (sha256 {prior['sha256'][:8]}…)"
        + (f"; accuracy by {classifier['arch']}.*" if classifier else ".*")
    )
    pattern = [["", "difference", "95% interval", ""]]
    for line in summary["differences"]:
        name, factor = QUANTITIES[line["quantity"]]
        value, low, high = (f"{factor * line[x]:+.2f}" for x in ("value", "low", "high"))
        expected = f"{name}: {ROWS[line['of']]} − {ROWS[line['minus']]} > 0"
        pattern.append([expected, value, f"{low} … {high}", line["verdict"]])
    return "\n".join([table(rows), caption, *(["", table(pattern)] if summary["differences"] else [])])


def table(rows):
    """Return rows of cells, the first one being the header, as a Markdown table."""
    lines = ["| " + " | ".join(cells) + " |\n" for cells in rows]
    return "".join([lines[0], "|---" * len(rows[0]) + "|\n", *lines[1:]])


def cell(quantity, estimated):
    """Return a cell: the value and its interval, if it has one."""
    if estimated is None:
        return "–"
    factor = QUANTITIES[quantity][1]
    value, low, high = (f"{factor * estimated.get(x, estimated['value']):.2f}" for x in ("value", "low", "high"))
    return f"{value} ({low} – {high})" if low != high else value


def plot_curves(logs, path):
    """Plot KL by step from {row: lines of train.jsonl}: running means in training, points in validation."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for i, (row, lines) in enumerate(logs.items()):
        for key, style, suffix in (("kl", "-", ""), ("val_kl", "o--", ", validation")):
            points = np.array([(line["step"], line[key]) for line in lines if key in line])
            width = max(1, len(points) // 20) if key == "kl" else 1
            means = [np.convolve(values, np.full(width, 1 / width), "valid") for values in points.T]
            if len(points):
                axes.plot(*means, style, color=f"C{i}", markersize=4, linewidth=1, label=heading(row) + suffix)
    axes.set(xlabel="step", ylabel="KL, nats per position, not re-weighted")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=max(1, len(logs)))
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def save_sheet(names, true_dir, results, path):
    """Write a contact sheet of the named images: gray | each row's result | true; results: {row: folder}."""
    true, colored, rows = named_images(true_dir), [named_images(folder) for folder in results.values()], []
    for name in names:
        original, *versions = (ImageOps.contain(open_rgb(images[name]), THUMBNAIL) for images in (true, *colored))
        rows.append((printable(os.path.basename(name)), (original.convert("L").convert("RGB"), *versions, original)))
    headings = ("gray", *(heading(row).split(" (")[0] for row in results), "ground truth")
    with atomic_path(path) as temporary:
        contact_sheet(rows, headings, THUMBNAIL[0]).save(temporary, format="JPEG", quality=85)


# -------------------------------------------------------------------------------------------------
# Command line


def parse_args(argv=None):
    parser = Parser(description="Compare folders of colorized images in one table with bootstrap intervals.")
    add = parser.add_argument_group("images").add_argument
    add("--val_dir", required=True, help="folder of the originals")
    add("--results", required=True, nargs="+", metavar="DIR", help="folders of results (test.py)")
    add("--runs", help="folder of training log folders with the rows' names")

    add = parser.add_argument_group("metrics").add_argument
    add("--prior", help="file of 313 probabilities of the ab bins, instead of the bundled prior")
    add("--arch", default="vgg16", help="an ImageNet classifier of paddle.vision.models; none: no accuracy")
    add("--weights", metavar="FILE", help="weights of the classifier (.pdparams), instead of a download")
    add("--labels", metavar="FILE", help="lines of an image's name and its class, instead of class folders")
    add("--bootstrap", type=whole(), default=1000, help="bootstrap resamples of the images")

    add = parser.add_argument_group("machine and output").add_argument
    add("--seed", type=SEED, default=0, help="seed of the resamples and of the images to show")
    add("--panel", type=whole(), default=6, help="number of images to show")
    add("--num_workers", type=WORKERS, default=min(8, default_workers()), help="worker processes; 0: this one only")
    add("--save_path", default="./ablation", help="folder for the tables and the metrics' results")
    return parser.parse_args(argv)


def main(args):
    # Setup; report wrong flags before the work
    output, true = Path(args.save_path), named_images(args.val_dir)
    results = {printable(os.path.basename(os.path.abspath(folder))): Path(folder) for folder in args.results}
    if len({*results, GRAY, TRUE}) < len(args.results) + 2:
        raise UserError(f"--results: rows have the folders' names, which must differ and be neither {GRAY} nor {TRUE}")
    results = {row: results[row] for row in sorted(results, key=[*ROWS, *results].index)}
    bin_weights = rebalancing_weights(load_prior(args.prior), lam=0).numpy().astype(np.float64)
    if args.arch != "none":
        metrics_acc.load_classifier(args.arch, args.weights)
    make_folder(output)

    # Measure each folder; the controls once
    measured = {row: measure(folder, output / row, args) for row, folder in results.items()}
    recognized, classifier = {}, None
    if args.arch != "none":
        controls = recognize(["--controls_only", "--image_dir", args.val_dir], output, args)
        recognized = {row: recognize(["--result_path", str(x)], output / row, args) for row, x in results.items()}
        recognized.update({GRAY: controls, TRUE: controls})
        classifier = read_json(output / "accuracy.json")["classifier"]

    # Pool and resample
    names, measured = align(measured, recognized)
    found = measures(names, measured, recognized, resamples(len(names), args.bootstrap, args.seed), bin_weights)
    estimates = {row: {x: estimate(v) for x, v in values.items()} for row, values in found.items()}
    logs = {row: read_log(Path(args.runs) / row / "train.jsonl") for row in results} if args.runs else {}
    for row, lines in logs.items():
        estimates[row].update([("kl", {"value": line["val_kl"]}) for line in lines if "val_kl" in line])  # the last one

    # Write and print
    first = next(iter(results))
    first_summary = read_json(output / first / "auc.json")
    left_out = [printable(name) for name in true if name not in set(names)]
    summary = {
        "results": estimates,
        "differences": differences(found),
        "images": len(names),
        "true_images": first_summary["true_images"],
        "coloring": {row: read_json(folder / COLORING) for row, folder in results.items()},
        "bootstrap": args.bootstrap,
        "seed": args.seed,
        "prior": first_summary["prior"],
        "classifier": classifier,
        "left_out": left_out,
        **provenance(),
    }
    write_json(summary, output / "ablation.json")
    with atomic_text(output / "ablation.md") as file:
        file.write(markdown(summary))
    curves = metrics_auc.read_curves({heading(row): output / row for row in results})
    metrics_auc.plot(curves, output / "ablation_auc.png")
    shown = np.random.default_rng(args.seed).permutation(len(names))[: args.panel]
    save_sheet([names[i] for i in shown], args.val_dir, results, output / "ablation_sheet.jpg")
    if logs:
        plot_curves(logs, output / "ablation_curves.png")
    print(markdown(summary))
    files = "ablation.json, .md, _auc.png, _sheet.jpg" + ", _curves.png" * bool(logs)
    skipped = f", {len(left_out)} skipped" * bool(left_out)
    print(f"{printable(output)}: {files}; {len(results)} rows, {len(names)} images{skipped}")
    return EXIT_SKIPPED if left_out else 0


if __name__ == "__main__":
    sys.exit(run_script(main, parse_args))
