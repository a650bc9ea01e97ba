"""Draw the paper's figures: bins, prior, rebalancing weights, annealed mean, soft-encoding, and accuracy by class.

    python resources/figures.py --image_dir val
    python resources/figures.py --image_dir val --results metrics_a metrics_b

`--results` names folders that metrics_acc.py wrote (its --save_path). docs/method.md shows the figures.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from support.cli import Parser, printable, run_script
from support.files import atomic_path
from support.images import open_rgb

import numpy as np
import paddle
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from PIL import ImageOps

from colorizer import Colorizer, network_input
from dataset import lab_to_rgb, list_images, rgb_to_lab, soft_encode
from utils import annealed_mean, load_ab_bins, load_prior, rebalancing_weights

TEMPERATURES = (1, 0.77, 0.58, 0.38, 0.29, 0.14, 0.1)
IMAGE_SIZE = (400, 400)  # in pixels; larger images are resized to fit


def new_figure(width, height, columns=1):
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, columns)


def draw_plane(axes, bins, values, norm, title):
    """Draw one value per ab bin [313] on the ab plane."""
    drawn = axes.scatter(bins[:, 0], bins[:, 1], c=values, marker="s", s=40, norm=norm, linewidths=0)
    axes.set(title=title, xlabel="a", ylabel="b", aspect="equal", xlim=(-115, 115), ylim=(-120, 115))
    return drawn


def plot_prior(bins, prior):
    figure, (colors, plane) = new_figure(9, 4, 2)
    lab = np.column_stack([np.full(len(bins), 60), bins]).astype(np.float32)
    rgb = lab_to_rgb(paddle.to_tensor(lab.reshape(-1, 3, 1, 1))).numpy().reshape(-1, 3)
    draw_plane(colors, bins, rgb, None, f"{len(bins)} ab bins, shown at L = 60")
    figure.colorbar(draw_plane(plane, bins, prior, LogNorm(), "prior (log scale)"), ax=plane)
    return figure


def plot_weights(bins, prior):
    figure, panels = new_figure(12, 3.8, 3)
    weights = {lam: rebalancing_weights(prior, lam).numpy() for lam in (0, 0.5, 1)}
    norm = LogNorm(min(w.min() for w in weights.values()), max(w.max() for w in weights.values()))
    for axes, (lam, w) in zip(panels, weights.items()):
        drawn = draw_plane(axes, bins, w, norm, f"λ = {lam}: {w.min():.3g} to {w.max():.3g}")
    figure.colorbar(drawn, ax=panels, label="weight in the loss (log scale)")
    return figure


def plot_annealed_mean(colorize, image, ab_bins):
    """Plot the image colorized at several temperatures, and mean chroma against the temperature."""
    figure = Figure(figsize=(2 * len(TEMPERATURES), 4.5), layout="constrained")
    top, bottom = figure.subfigures(2, 1)
    for axes, temperature in zip(top.subplots(1, len(TEMPERATURES)), TEMPERATURES):
        axes.imshow(colorize(image, temperature=temperature))
        axes.set_title(f"T = {temperature}")
        axes.axis("off")
    axes, temperatures = bottom.subplots(), np.geomspace(1, 0.1, 25)
    logits = colorize.predict(network_input(image, colorize.load_size)[None])
    chroma = [float(annealed_mean(logits, ab_bins, t).square().sum(1).sqrt().mean()) for t in temperatures]
    axes.plot(temperatures, chroma, "o-", markersize=3)
    axes.set(xlabel="temperature T", ylabel="mean chroma", xscale="log", xlim=(1.05, 0.095), ylim=(0, None))
    axes.set_xticks(TEMPERATURES, TEMPERATURES, minor=False)
    axes.grid(alpha=0.3)
    return figure


def plot_soft_encoding(image, ab_bins):
    """Plot the five bins that encode the image's most saturated color, with their probabilities."""
    lab = rgb_to_lab(paddle.to_tensor(np.asarray(image)).transpose([2, 0, 1]).unsqueeze(0)).numpy().reshape(3, -1)
    color = lab[:, np.hypot(*lab[1:]).argmax()].reshape(1, 3, 1, 1)
    indices, weights = (x.numpy().ravel() for x in soft_encode(paddle.to_tensor(color[:, 1:]), ab_bins))
    figure, axes = new_figure(5, 4.5)
    (a, b), bins = color.ravel()[1:], ab_bins.numpy()
    axes.scatter(*bins.T, color="0.85", s=60)
    axes.scatter(*bins[indices].T, s=1500 * weights, label="bins, by probability")
    for index, weight in zip(indices, weights):
        axes.annotate(f"{weight:.2f}", bins[index], xytext=(0, 14), textcoords="offset points", ha="center")
    rgb = lab_to_rgb(paddle.to_tensor(color)).numpy().ravel()
    axes.scatter(a, b, color=[rgb], marker="*", s=200, edgecolors="black", label=f"ab = ({a:.1f}, {b:.1f})")
    axes.set(xlim=(a - 25, a + 25), ylim=(b - 25, b + 25), xlabel="a", ylabel="b", aspect="equal")
    axes.legend(loc="lower left")
    return figure


def read_table(path):
    """Read a CSV file that metrics_acc.py writes; it writes accuracy_confusions.csv if it has the originals."""
    with open(path, encoding="utf-8") as file:
        return np.atleast_1d(np.genfromtxt(file, delimiter=",", names=True, dtype=None, encoding="utf-8"))


def plot_classes(folders):
    """Plot, as the paper's analysis per class, the effect of colorization on classes and on pairs of classes.

    On the left, each class's top-5 accuracy on colorized images against that on gray images; on the right, the top-5
    confusions of each pair of classes on colorized images against those on the originals.
    """
    figure = Figure(figsize=(9, 4.5 * len(folders)), layout="constrained")
    panels = figure.subplots(len(folders), 2, squeeze=False)
    for (left, right), (name, folder) in zip(panels, folders.items()):
        classes, pairs = (read_table(folder / f"accuracy_{x}.csv") for x in ("per_class", "confusions"))
        scatter(left, classes["gray_top5"], classes["colored_top5"])
        left.set(title=f"{name}: classes", xlabel="top-5 accuracy on gray images")
        scatter(right, pairs["true"], pairs["colored"])
        right.set(title=f"{name}: pairs of classes", xlabel="top-5 confusion on originals")
    return figure


def scatter(axes, before, after):
    """Draw points above and below the diagonal."""
    axes.scatter(before, after, s=12, alpha=0.5)
    axes.axline((0, 0), slope=1, color="0.5", linewidth=1)
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal", ylabel="on colorized images")


def parse_args(argv=None):
    parser = Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--image_dir", required=True, help="folder whose first image is drawn, or one file")
    add("--results", nargs="+", default=[], metavar="DIR", help="folders with the output of metrics_acc.py")
    add("--load_model", metavar="NAME", default="small", help="small, official or a checkpoint's path")
    add("--prior", help="file with 313 probabilities (default: the bundled prior)")
    add("--save_path", default="./figures", help="folder for the figures")
    return parser.parse_args(argv)


def main(args):
    ab_bins, prior = load_ab_bins(), load_prior(args.prior)
    image = ImageOps.contain(open_rgb(list_images(args.image_dir)[0]), IMAGE_SIZE)
    colorize = Colorizer(args.load_model)
    figures = {
        "prior": plot_prior(ab_bins.numpy(), prior.numpy()),
        "weights": plot_weights(ab_bins.numpy(), prior),
        "soft_encoding": plot_soft_encoding(image, ab_bins),
    }
    if colorize.temperature is not None:  # the network predicts a distribution
        figures["annealed_mean"] = plot_annealed_mean(colorize, image, ab_bins)
    if args.results:
        figures["accuracy_classes"] = plot_classes({printable(x): Path(x) for x in args.results})
    for name, figure in figures.items():
        with atomic_path(Path(args.save_path, f"{name}.png")) as temporary:
            figure.savefig(temporary, format="png", dpi=80)
    print(f"{printable(args.save_path)}: {', '.join(figures)} (.png)")


if __name__ == "__main__":
    sys.exit(run_script(main, parse_args))
