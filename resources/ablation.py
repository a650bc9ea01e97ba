"""The paper's ablation, or any other comparison: a table of folders of colored images, with intervals.

    for variant in non_rebalance full rebalance; do    trained with --rebalance False, --gamma 0.5 and --gamma 0
        python test.py --image_dir val --model_path runs/$variant --load_model latest --result_path results/$variant
    done
    python resources/ablation.py --val_dir val --results results/* --runs runs                accuracy by VGG-16
    python resources/ablation.py --val_dir val --results results/* --arch mobilenet_v2 --weights FILE

A row for each folder, under its name, beside gray and the true images: say, one checkpoint at several sizes or
temperatures, by test.py's flags. metrics_auc.py and metrics_acc.py measure, this reads what they wrote of each image.
Intervals (95%) are from a bootstrap over the images, with the same resamples for all rows, so that differences have
theirs as well: for rows named as the three variants above, of the pattern that the paper tells of. With --runs, where
the trainings' logs are, by the rows' names, also the KL of the last validation, and the curves of KL in training.

    ablation: ablation.json, .md, _auc.png, _sheet.jpg, _curves.png; 3 rows, 780 images
"""

import csv
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from support.cli import EXIT_SKIPPED, SEED, WORKERS, Parser, UserError, printable, run_script, whole
from support.files import atomic_path, atomic_text, make_folder, provenance, read_json, write_json
from support.images import COLORING, named_images, open_rgb
from support.logs import read_log
from support.sheets import contact_sheet
from support.workers import default_workers

import numpy as np
from matplotlib.figure import Figure
from PIL import ImageOps

import metrics_acc
import metrics_auc
from utils import load_prior, rebalancing_weights

GRAY, TRUE = "gray", "true"
ROWS = {  # what a row is called; others go by their folder's name
    "non_rebalance": "Non-rebalance",
    "full": "Full",
    "rebalance": "Rebalance (λ = 0)",
    GRAY: metrics_auc.GRAY,
    TRUE: "true images",
}
QUANTITIES = {  # what is measured: its heading, and the factor to the unit in which it is shown
    "auc_raw": ("AuC raw", 100),
    "auc_rebalanced_own": ("AuC rebalanced, own", 100),
    "auc_rebalanced": ("AuC rebalanced", 100),
    "top1": ("top-1", 100),
    "top5": ("top-5", 100),
    "chroma": ("chroma", 1),
    "colorfulness": ("colorfulness", 1),
    "psnr": ("PSNR", 1),
    "kl": ("KL", 1),
}
RAREST_FIRST = ("rebalance", "full", "non_rebalance")
PATTERN = {  # what the paper tells of: of this quantity, each row has more than the next
    "auc_raw": RAREST_FIRST[::-1],
    "auc_rebalanced_own": RAREST_FIRST,  # without a prior's tail, which in a small set hangs on a few pixels
    "auc_rebalanced": RAREST_FIRST,
    "chroma": RAREST_FIRST,
    "top1": ("full", GRAY),
}
THUMBNAIL = (160, 120)  # of the sheet, in pixels

# -------------------------------------------------------------------------------------------------
# What is measured, by the metrics' own scripts


def measure(folder, output, args):
    """What metrics_auc.py finds in a folder of colored images, by image: what auc.npz holds."""
    flags = ["--prior", args.prior] if args.prior else []
    made_with = read_json(folder / COLORING) or {}
    if made_with.get("crop_size"):  # squares, to compare with the same squares of the true images
        flags += [f"--{size}={made_with[size]}" for size in ("load_size", "crop_size")]
    where = ["--imgs_dir", args.val_dir, "--results_dir", str(folder), "--save_path", str(output)]
    metrics_auc.main(metrics_auc.parse_args([*where, *flags, "--num_workers", str(args.num_workers)]))
    with np.load(output / "auc.npz") as file:
        return dict(file)


def recognize(where, output, args):
    """What metrics_acc.py finds there, by image: {name: its line of accuracy_images.csv}."""
    flags = ["--arch", args.arch, "--num_workers", str(args.num_workers), "--save_path", str(output)]
    for name in ("weights", "labels"):
        flags += [f"--{name}", getattr(args, name)] if getattr(args, name) else []
    metrics_acc.main(metrics_acc.parse_args([*where, *flags]))
    with open(output / "accuracy_images.csv", newline="", encoding="utf-8", errors="surrogateescape") as file:
        return {line["image"]: line for line in csv.DictReader(file)}


def align(measured, recognized):
    """The names of the images that all rows have, and what was measured of these, in this order; all by row."""
    places = {row: {name: i for i, name in enumerate(images["names"].tolist())} for row, images in measured.items()}
    first = next(iter(measured))
    names = [name for name in places[first] if all(name in x for x in (*places.values(), *recognized.values()))]
    if not names:
        raise UserError("the rows have no image in common that could be compared")
    aligned = {}
    for row, images in measured.items():
        aligned[row] = {key: values[[places[row][name] for name in names]] for key, values in images.items()}
        if not np.array_equal(aligned[row]["areas"][:, 2], aligned[first]["areas"][:, 2]):
            raise UserError(f"{row} and {first} are not of the same size or crop: each needs a table of its own")
    return names, aligned


# -------------------------------------------------------------------------------------------------
# Figures and their intervals


def resamples(images, number, seed):
    """How often each image is taken: float64 [1 + number, images]; each once, then as the bootstrap draws them."""
    random = np.random.default_rng(seed)
    times = np.ones((1 + number, images))
    for row in times[1:]:
        row[:] = np.bincount(random.integers(images, size=images), minlength=images)
    return times


def figures(names, measured, recognized, times, bin_weights):
    """Every quantity of the images pooled, for each resample: {row: {quantity: [1 + B]}}.

    measured, recognized: by row, as `align`, `recognize` return them; times [1 + B, N]; bin_weights [313].
    """
    found = {}
    for row, images in measured.items():
        found[row], *controls = metrics_auc.figures(metrics_auc.pool(images, times), bin_weights).values()
    found[GRAY], found[TRUE] = controls  # the same, whichever row they are from
    for row, lines in recognized.items():
        version = row if row in (GRAY, TRUE) else "colored"
        for top in ("top1", "top5"):
            found[row][top] = times @ [int(lines[name][f"{version}_{top}"]) for name in names] / len(names)
    return {row: {x: values for x, values in of.items() if np.isfinite(values).all()} for row, of in found.items()}


def estimate(values):
    """The value and its 95% percentile interval, of [1 + B].

    A resample misses some of the rarest colors: where few images have these, the rebalanced AuC's is lopsided.
    """
    low, high = np.percentile(values[1:], [2.5, 97.5])
    return {"value": float(values[0]), "low": float(low), "high": float(high)}


def differences(found):
    """What the paper's pattern is about, as far as its rows are there: each with its interval and whether it holds."""
    lines = []
    for quantity, rows in PATTERN.items():
        rows = [row for row in rows if quantity in found.get(row, ())]
        for more, less in zip(rows, rows[1:]):
            of = estimate(found[more][quantity] - found[less][quantity])
            verdict = "holds" if of["low"] > 0 else "does not" if of["high"] < 0 else "undecided"
            lines.append({"quantity": quantity, "of": more, "minus": less, **of, "verdict": verdict})
    return lines


# -------------------------------------------------------------------------------------------------
# What is written


def markdown(summary):
    """The results and the pattern as two Markdown tables, and between them what they were measured on."""
    results, prior, classifier = summary["results"], summary["prior"], summary["classifier"]
    measured = {x: how for x, how in QUANTITIES.items() if any(x in row for row in results.values())}
    rows = [["", *(heading for heading, _ in measured.values())]]
    for row, of in results.items():
        rows.append([ROWS.get(row, row), *(show(of.get(x), factor) for x, (_, factor) in measured.items())])
    caption = (
        f"*{summary['images']} images. AuC and accuracy in percent, chroma in ab units, PSNR in dB"
        + ("; KL of the last validation in nats per position, less is better" if "kl" in measured else "")
        + f". In parentheses the 95% interval of {summary['bootstrap']} bootstrap resamples. Rebalanced by "
        + f"{os.path.basename(prior['file'])} (sha256 {prior['sha256'][:8]}…)"
        + (f"; accuracy by {classifier['arch']}.*" if classifier else ".*")
    )
    pattern = [["", "difference", "95% interval", ""]]
    for line in summary["differences"]:
        heading, factor = QUANTITIES[line["quantity"]]
        value, low, high = (f"{factor * line[x]:+.2f}" for x in ("value", "low", "high"))
        name = f"{heading}: {ROWS[line['of']]} − {ROWS[line['minus']]} > 0"
        pattern.append([name, value, f"{low} … {high}", line["verdict"]])
    return "\n".join([table(rows), caption, *(["", table(pattern)] if len(pattern) > 1 else [])])


def table(rows):
    """Lists of cells as a Markdown table, the first one its head."""
    lines = ["| " + " | ".join(cells) + " |\n" for cells in rows]
    return "".join([lines[0], "|---" * len(rows[0]) + "|\n", *lines[1:]])


def show(figure, factor):
    """A cell: the value and its interval, if it has one, which need not be centered on it."""
    if figure is None:
        return "–"
    value, low, high = (f"{factor * figure.get(x, figure['value']):.2f}" for x in ("value", "low", "high"))
    return f"{value} ({low} – {high})" if low != high else value


def plot_curves(logs, path):
    """KL against the step, of {row: lines of train.jsonl}: running means in training, and validation as points."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for i, (row, lines) in enumerate(logs.items()):
        for key, style, suffix in (("kl", "-", ""), ("val_kl", "o--", ", validation")):
            points = np.array([(line["step"], line[key]) for line in lines if key in line])
            width = max(1, len(points) // 20) if key == "kl" else 1
            means = [np.convolve(values, np.full(width, 1 / width), "valid") for values in points.T]
            label = f"{ROWS.get(row, row)}{suffix}"
            if len(points):
                axes.plot(*means, style, color=f"C{i}", markersize=4, linewidth=1, label=label)
    axes.set(xlabel="step", ylabel="KL, nats per position, not re-weighted")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=max(1, len(logs)))
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def save_sheet(names, true_dir, results, path):
    """gray | each row's | true, for each photograph of these names; results: {row: folder}."""
    true, colored, rows = named_images(true_dir), [named_images(folder) for folder in results.values()], []
    for name in names:
        original, *versions = (ImageOps.contain(open_rgb(images[name]), THUMBNAIL) for images in (true, *colored))
        rows.append((printable(os.path.basename(name)), (original.convert("L").convert("RGB"), *versions, original)))
    headings = ("gray", *(ROWS.get(row, row).split(" (")[0] for row in results), "true")
    with atomic_path(path) as temporary:
        contact_sheet(rows, headings, THUMBNAIL[0]).save(temporary, format="JPEG", quality=85)


# -------------------------------------------------------------------------------------------------
# Command line


def parse_args(argv=None):
    parser = Parser(description="A table of folders of colored images, with intervals.")
    add = parser.add_argument_group("what to compare").add_argument
    add("--val_dir", required=True, help="folder of the true photographs")
    add("--results", required=True, nargs="+", metavar="DIR", help="folders that test.py colored them into")
    add("--runs", help="folder of the trainings' log folders, with the rows' names")

    add = parser.add_argument_group("metrics").add_argument
    add("--prior", help="file of 313 probabilities that tells how rare a color is, instead of the shipped prior")
    add("--arch", default="vgg16", help="an ImageNet classifier of paddle.vision.models; none: no accuracy")
    add("--weights", metavar="FILE", help="its weights (.pdparams), instead of a download")
    add("--labels", metavar="FILE", help="lines of an image's name and its class, instead of class folders")
    add("--bootstrap", type=whole(), default=1000, help="resamples of the images behind the intervals")

    add = parser.add_argument_group("machine and output").add_argument
    add("--seed", type=SEED, default=0, help="of the resamples and of the choice of photographs to show")
    add("--panel", type=whole(), default=6, help="photographs to show")
    add(
        "--num_workers",
        type=WORKERS,
        default=min(8, default_workers()),
        help="processes that read; 0: none but this one",
    )
    add("--save_path", default="./ablation", help="folder for what is written, the metrics' results included")
    return parser.parse_args(argv)


def main(args):
    # Setup; what can be wrong is found before the work
    output, true = Path(args.save_path), named_images(args.val_dir)
    results = {printable(os.path.basename(os.path.abspath(folder))): Path(folder) for folder in args.results}
    if len({*results, GRAY, TRUE}) < len(args.results) + 2:
        raise UserError(f"--results: the rows go by the folders' names: each its own, and neither {GRAY} nor {TRUE}")
    results = {row: results[row] for row in sorted(results, key=[*ROWS, *results].index)}
    bin_weights = rebalancing_weights(load_prior(args.prior), lam=0).numpy().astype(np.float64)
    make_folder(output)

    # Measure each folder; the controls once
    measured = {row: measure(folder, output / row, args) for row, folder in results.items()}
    recognized, classifier = {}, None
    if args.arch != "none":
        controls = recognize(["--controls_only", "--imgs_dir", args.val_dir], output, args)
        recognized = {row: recognize(["--results_dir", str(x)], output / row, args) for row, x in results.items()}
        recognized.update({GRAY: controls, TRUE: controls})
        classifier = read_json(output / "accuracy.json")["classifier"]

    # Pool and resample
    names, measured = align(measured, recognized)
    found = figures(names, measured, recognized, resamples(len(names), args.bootstrap, args.seed), bin_weights)
    estimates = {row: {x: estimate(values) for x, values in of.items()} for row, of in found.items()}
    logs = {row: read_log(Path(args.runs) / row / "train.jsonl") for row in results} if args.runs else {}
    for row, lines in logs.items():
        estimates[row].update([("kl", {"value": line["val_kl"]}) for line in lines if "val_kl" in line])  # the last one

    # Write and tell
    first = next(iter(results))
    of_first = read_json(output / first / "auc.json")
    left_out = [printable(name) for name in true if name not in set(names)]
    summary = {
        "results": estimates,
        "differences": differences(found),
        "images": len(names),
        "true_images": of_first["true_images"],
        "coloring": {row: read_json(folder / COLORING) for row, folder in results.items()},
        "bootstrap": args.bootstrap,
        "seed": args.seed,
        "prior": of_first["prior"],
        "classifier": classifier,
        "left_out": left_out,
        **provenance(),
    }
    write_json(summary, output / "ablation.json")
    with atomic_text(output / "ablation.md") as file:
        file.write(markdown(summary))
    curves = {row: np.genfromtxt(output / row / "auc.txt", skip_footer=1)[:, 2:].T for row in results}
    curves = {**{ROWS.get(row, row): six[:3] for row, six in curves.items()}, ROWS[GRAY]: curves[first][3:]}
    metrics_auc.plot(curves, output / "ablation_auc.png")
    shown = np.random.default_rng(args.seed).permutation(len(names))[: args.panel]
    save_sheet([names[i] for i in shown], args.val_dir, results, output / "ablation_sheet.jpg")
    if logs:
        plot_curves(logs, output / "ablation_curves.png")
    print(markdown(summary))
    files = "ablation.json, .md, _auc.png, _sheet.jpg" + (", _curves.png" if logs else "")
    skipped = f", {len(left_out)} skipped" if left_out else ""
    print(f"{printable(output)}: {files}; {len(results)} rows, {len(names)} images{skipped}")
    return EXIT_SKIPPED if left_out else 0


if __name__ == "__main__":
    sys.exit(run_script(main, parse_args))
