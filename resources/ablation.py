"""Compare folders of colorized images in one table with bootstrap intervals, such as the rebalancing variants.

    for variant in non_rebalance full rebalance l2_ft; do    the commands of docs/ablation.md train them
        python test.py --image_dir val --model_path runs/$variant --load_model latest --result_path results/$variant
    done
    python resources/ablation.py --val_dir val --results results/*                            accuracy by VGG-16
    python resources/ablation.py --val_dir val --results results/* --arch mobilenet_v2 --weights FILE

The table has one row per folder, under the folder's name, and rows for gray and the originals. Rows may differ in
anything, for example one checkpoint at several sizes or temperatures. The values are those of metrics_auc.py and
metrics_acc.py, for the images that all rows have. The 95% intervals come from a bootstrap over the images, with the
same resamples for all rows, so differences have intervals too. Rows named like the variants are tested for the expected
order: none (non_rebalance), λ = 0.5 (full), λ = 0 (rebalance), and for the L2 loss (l2_ft) having the lowest chroma.
λ = 0 is a variant of the earlier Paddle port, the others are the paper's.

    ablation: ablation.json, .md, _auc.png, _sheet.jpg; 3 rows, 780 images, 0 skipped
"""

import os
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from support.cli import EXIT_SKIPPED, SEED, WORKERS, Parser, UserError, printable, run_script, whole
from support.files import atomic_path, atomic_text, full_path, prepare_results, provenance, write_json
from support.folders import pair_images
from support.images import open_rgb
from support.sheets import contact_sheet, fit
from support.workers import default_workers

import numpy as np

import metrics_acc
import metrics_auc
from dataset import COLORING, RECORDS, named_images
from utils import PRIOR

GRAY, TRUE = "gray", "true"
ROWS = {  # headings of rows; others have their folder's name
    "non_rebalance": "no rebalancing",
    "full": "λ = 0.5 (full)",
    "rebalance": "λ = 0",
    "l2": "L2",
    "l2_ft": "L2, ft",
    GRAY: metrics_auc.GRAY,
    TRUE: "ground truth",
}
QUANTITIES = {  # heading, and factor to the unit of the table
    "auc_raw": ("raw AuC", 100),
    "auc_macro": ("macro AuC", 100),
    "auc_rebalanced": ("rebalanced AuC", 100),
    "top1": ("top-1", 100),
    "top5": ("top-5", 100),
    "chroma": ("chroma", 1),
    "colorfulness": ("colorfulness", 1),
    "psnr": ("PSNR", 1),
}
RAREST_FIRST = ("rebalance", "full", "non_rebalance")
PATTERN = {  # the expected order: each row has a higher value than the next
    "auc_raw": RAREST_FIRST[::-1],
    "auc_macro": RAREST_FIRST,  # independent of the prior, whose rarest bins depend on a few pixels
    "auc_rebalanced": RAREST_FIRST,
    "chroma": (*RAREST_FIRST, "l2_ft"),  # the L2 loss averages colors, so its results are grayish
    "top1": ("full", GRAY),
}
THUMBNAIL = (160, 120)  # pixels


def heading(row):
    return ROWS.get(row, row)


# -------------------------------------------------------------------------------------------------
# Measuring


class Row(NamedTuple):
    """The results of one folder: what `pair_images` returns of them, and then what `metrics_auc.measure` returns."""

    pairs: list
    left_out: dict
    coloring: dict
    images: dict
    counts: np.ndarray


def measure(folder, args):
    pairs, left_out, coloring = pair_images(args.val_dir, folder, COLORING, RECORDS)
    errors = metrics_auc.measure(pairs, args.num_workers, **metrics_auc.square_size(coloring))
    return Row(pairs, left_out, coloring, *errors)


def recognize(classifier, rows, num_workers):
    """Classify each row's results and, with the first row's, the originals and their gray versions.

    Returns {row: {name: the five most likely classes}}.
    """
    found = {}
    for title, row in rows.items():
        pairs = [(name, None, result) for name, _, result in row.pairs] if found else row.pairs
        names, versions = metrics_acc.measure(classifier, pairs, num_workers=num_workers)
        for version, classes in versions.items():
            found[title if version == "colored" else version] = dict(zip(names, classes))
    return found


def align(rows, classes, labels):
    """Select the images that all rows have.

    Args:
        rows (dict): Row by title.
        classes (dict): Result of `recognize`; {} without a classifier.
        labels (dict): Numbers of the classes by the images' names.

    Returns:
        tuple[list, dict, dict]: The names of the N images, their sums ([N, ...] by name) by row, and whether they are
        recognized (result of `metrics_acc.find_hits`) by row.
    """
    measured = [*(row.images for row in rows.values()), *classes.values()]
    chosen = sorted(set.intersection(*map(set, measured)))
    if not chosen:
        raise UserError("the rows have no image in common that could be compared")
    sums = {title: metrics_auc.stack([row.images[name] for name in chosen]) for title, row in rows.items()}
    first = next(iter(sums))
    for title, images in sums.items():
        if not np.array_equal(images["pixels"], sums[first]["pixels"]):
            raise UserError(f"{title} and {first} differ in size or crop: compare them in separate tables")
    wanted = np.array([labels.get(name) for name in chosen])
    hits = {
        title: metrics_acc.find_hits(np.array([found[name] for name in chosen]), wanted)
        for title, found in classes.items()
    }
    return chosen, sums, hits


# -------------------------------------------------------------------------------------------------
# Values and their intervals


def resamples(images, number, seed):
    """Return how often each image counts, float64 [1 + number, images]: once in the first row, then bootstrap draws."""
    random = np.random.default_rng(seed)
    times = np.ones((1 + number, images))
    for row in times[1:]:
        row[:] = np.bincount(random.integers(images, size=images), minlength=images)
    return times


def evaluate(sums, hits, times, bin_weights):
    """Compute every quantity for each resample of the pooled images: {row: {quantity: [1 + B]}}.

    Args:
        sums (dict): Sums of the N images by row.
        hits (dict): Whether they are recognized by row; {} without a classifier.
        times (ndarray): [1 + B, N], from `resamples`.
        bin_weights (ndarray): [313].
    """
    found = {}
    for row, images in sums.items():
        values = metrics_auc.evaluate(metrics_auc.pool(images, times), bin_weights)
        found[row] = values["colored"]
    found[GRAY], found[TRUE] = values["gray"], values["true"]  # the same for all rows
    for row, recognized in hits.items():
        found[row].update({top: times @ right / len(right) for top, right in recognized.items()})
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
    results, classifier = summary["results"], summary["classifier"]
    measured = [x for x in QUANTITIES if any(x in values for values in results.values())]
    rows = [["", *(QUANTITIES[x][0] for x in measured)]]
    rows += [[heading(row), *(cell(x, values.get(x)) for x in measured)] for row, values in results.items()]
    prior = f"{os.path.basename(summary['prior']['file'])} (sha256 {summary['prior']['sha256'][:8]}…)"
    caption = f"*{summary['images']} images; 95% intervals of {summary['bootstrap']} resamples; rebalanced by {prior}"
    caption += f"; accuracy by {classifier['arch']}.*\n" if classifier else ".*\n"
    tables = [table(rows), caption]
    if summary["differences"]:
        tables.append(table(difference_rows(summary["differences"])))
    return "\n".join(tables)


def difference_rows(lines):
    """Return the result of `differences` as rows of a table."""
    rows = [["", "difference", "95% interval", ""]]
    for line in lines:
        name, factor = QUANTITIES[line["quantity"]]
        value, low, high = (f"{factor * line[x]:+.2f}" for x in ("value", "low", "high"))
        expected = f"{name}: {ROWS[line['of']]} − {ROWS[line['minus']]} > 0"
        rows.append([expected, value, f"{low} … {high}", line["verdict"]])
    return rows


def table(rows):
    """Return rows of cells, the first one being the header, as a Markdown table."""
    lines = ["| " + " | ".join(cells) + " |\n" for cells in rows]
    return "".join([lines[0], "|---" * len(rows[0]) + "|\n", *lines[1:]])


def cell(quantity, estimated):
    """Return a cell: the value and its interval, unless this is a point."""
    if estimated is None:
        return "–"
    value, low, high = (f"{QUANTITIES[quantity][1] * estimated[x]:.2f}" for x in ("value", "low", "high"))
    return f"{value} ({low} – {high})" if low != high else value


def save_sheet(names, originals, results, path):
    """Write a contact sheet of the named images, gray | results | ground truth, from paths by name (results by row)."""
    rows = []
    for name in names:
        paths = [originals[name], *(images[name] for images in results.values())]
        original, *versions = (fit(open_rgb(path), THUMBNAIL) for path in paths)
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

    add = parser.add_argument_group("metrics").add_argument
    add("--prior", default=PRIOR, help="file of 313 probabilities of the ab bins")
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


def find_rows(folders):
    """Return {row: folder}, named like the folders and in the order of ROWS."""
    results = {printable(os.path.basename(os.path.abspath(folder))): Path(folder) for folder in folders}
    if len({*results, GRAY, TRUE}) < len(folders) + 2:
        raise UserError(f"--results: rows have the folders' names, which must differ and be neither {GRAY} nor {TRUE}")
    return {row: results[row] for row in sorted(results, key=[*ROWS, *results].index)}


def main(args):
    # Setup; report wrong flags before the work
    output, folders, originals = Path(args.save_path), find_rows(args.results), named_images(args.val_dir)
    bin_weights = metrics_auc.inverse_prior(args.prior)
    classifier, labels = None, {}
    if args.arch != "none":
        classifier = metrics_acc.load_classifier(args.arch, args.weights)
        labels = metrics_acc.find_labels(originals, args.val_dir, args.labels)
    subject = {"true_images": full_path(args.val_dir), "colored_images": ", ".join(map(full_path, folders.values()))}
    prepare_results(output / "ablation.json", subject)

    # Measure
    rows = {title: measure(folder, args) for title, folder in folders.items()}
    classes = recognize(classifier, rows, args.num_workers) if classifier else {}
    names, sums, hits = align(rows, classes, labels)

    # Pool and resample
    found = evaluate(sums, hits, resamples(len(names), args.bootstrap, args.seed), bin_weights)
    estimates = {row: {x: estimate(v) for x, v in values.items()} for row, values in found.items()}

    # Write and print
    left_out = sorted({*originals} - {*names})
    summary = {
        "results": estimates,
        "differences": differences(found),
        "images": len(names),
        **subject,
        "coloring": {title: row.coloring for title, row in rows.items()},
        "bootstrap": args.bootstrap,
        "seed": args.seed,
        "prior": metrics_auc.describe_prior(args.prior),
        "classifier": metrics_acc.describe(args) if classifier else None,
        "left_out": [printable(name) for name in left_out],
        "unpaired": {title: row.left_out for title, row in rows.items()},
        **provenance(),
    }
    write_json(summary, output / "ablation.json")
    tables = markdown(summary)
    with atomic_text(output / "ablation.md") as file:
        file.write(tables)
    curves = {heading(title): metrics_auc.curves(row.counts[0], bin_weights) for title, row in rows.items()}
    curves[metrics_auc.GRAY] = metrics_auc.curves(next(iter(rows.values())).counts[1], bin_weights)
    metrics_auc.plot(curves, output / "ablation_auc.png")
    shown = np.random.default_rng(args.seed).permutation(names)[: args.panel]
    results = {title: {name: result for name, _, result in row.pairs} for title, row in rows.items()}
    save_sheet(shown, originals, results, output / "ablation_sheet.jpg")
    print(tables)
    files = "ablation.json, .md, _auc.png, _sheet.jpg"
    print(f"{printable(output)}: {files}; {len(rows)} rows, {len(names)} images, {len(left_out)} skipped")
    return EXIT_SKIPPED if left_out or any(row.left_out for row in rows.values()) else 0


if __name__ == "__main__":
    sys.exit(run_script(main, parse_args))
