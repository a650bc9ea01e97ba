"""The paper's figures: each is drawn, and shows the values that the project computes."""

import csv
import shutil

from support.checkpoints import save_checkpoint

import numpy as np
import pytest
from PIL import Image, ImageChops
from skimage import data

import metrics_auc
from resources import figures
from utils import load_ab_bins, load_prior, rebalancing_weights


@pytest.fixture
def draw(tmp_path, monkeypatch, small_network):
    """Draw figures into ./figures with a small network."""
    monkeypatch.chdir(tmp_path)
    save_checkpoint(small_network().state_dict(), tmp_path / "network.pdparams")
    Image.fromarray(data.coffee()).resize((96, 64)).save("coffee.png")

    def run(*flags):
        figures.main(figures.parse_args(["--image_dir", "coffee.png", "--load_model", "network.pdparams", *flags]))
        return {path.name for path in (tmp_path / "figures").iterdir()}

    return run


def write_accuracy(folder, gains):
    """Write an accuracy_per_class.csv in which colorizing gains this many of 100 images per class."""
    with open(folder / "accuracy_per_class.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("class", "images", "colored_top1", "colored_top5", "gray_top1", "gray_top5"))
        writer.writerows((name, 100, 0.5 + gain / 100, 1, 0.5, 1) for name, gain in gains.items())
    (folder / "accuracy_confusions.csv").write_text("class,taken_for,colored,true\nn01440764,n01443537,0.5,0.1\n")


def test_figures_of_one_image_are_drawn(draw):
    names = draw()
    assert names == {"prior.png", "weights.png", "annealed_mean.png", "soft_encoding.png"}
    for name in names:
        image = Image.open(f"figures/{name}").convert("RGB")
        assert ImageChops.invert(image).getbbox(), f"{name} is blank"


def test_figures_of_results_are_drawn_from_the_files_of_the_metrics(draw, tmp_path):
    flags = ["--imgs_dir", "coffee.png", "--gray", "--save_path", "first", "--num_workers", "0"]
    metrics_auc.main(metrics_auc.parse_args(flags))
    (tmp_path / "first" / "gray_auc.txt").rename("first/auc.txt")
    write_accuracy(tmp_path / "first", {"n01440764": 1, "n02102040": -2})
    shutil.copytree("first", "second")
    assert {"auc.png", "accuracy_gains.png", "accuracy_classes.png"} <= draw("--results", "first", "second")
    curves = figures.read_curves({name: tmp_path / name for name in ("first", "second")})
    assert list(curves) == ["first", "second", metrics_auc.GRAY]
    for curve in curves.values():
        assert curve.shape == (3, 151) and np.all(np.diff(curve) >= 0) and curve[0, -1] == 1


def test_accuracy_gains_are_sorted_and_limited_to_both_ends(tmp_path):
    gains = {f"n{i:08d}": (7 * i) % 101 - 50 for i in range(101)}
    write_accuracy(tmp_path, gains)
    (axes,) = figures.plot_gains({"small": tmp_path}).axes
    drawn = axes.lines[0].get_ydata()
    assert np.allclose(drawn, [*range(-50, -30), *range(31, 51)])
    labels = [label.get_text() for label in axes.get_xticklabels()]
    assert np.allclose(drawn, [gains[label] for label in labels])


def test_accuracy_without_gray_is_rejected(tmp_path, error_message):
    (tmp_path / "accuracy_per_class.csv").write_text("class,images,colored_top1,colored_top5\nn01440764,1,0.5,1\n")
    assert "--image_dir" in error_message(figures.plot_gains, {"small": tmp_path})


def test_first_and_last_classes_and_pairs_are_highlighted(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "HIGHLIGHTED_CLASSES", 1)
    monkeypatch.setattr(figures, "HIGHLIGHTED_PAIRS", 2)
    (tmp_path / "accuracy_per_class.csv").write_text(
        "class,images,colored_top5,gray_top5\nn1,5,0.8,0.2\nn2,5,0.6,0.4\nn3,5,0.6,0.6\nn4,5,0.2,0.6\n"
    )
    (tmp_path / "accuracy_confusions.csv").write_text(
        "class,taken_for,colored,true\nn1,n2,0.8,0.0\nn1,n3,0.6,0.2\nn2,n1,0.4,0.2\nn3,n4,0.2,0.2\nn4,n1,0.0,0.2\n"
    )
    classes, pairs = figures.plot_classes({"small": tmp_path}).axes
    drawn = [[points.get_offsets().tolist() for points in axes.collections] for axes in (classes, pairs)]
    assert drawn[0] == [[[0.2, 0.8], [0.4, 0.6], [0.6, 0.6], [0.6, 0.2]], [[0.2, 0.8]], [[0.6, 0.2]]]
    assert len(drawn[1][0]) == 5 and drawn[1][1:] == [[[0, 0.8], [0.2, 0.6]], [[0.2, 0]]]


def test_missing_table_is_reported(tmp_path, error_message):
    assert "accuracy_per_class.csv: cannot be read" in error_message(figures.plot_classes, {"small": tmp_path})


def test_weights_figure_has_one_panel_per_lambda():
    prior = load_prior()
    panels = figures.plot_weights(load_ab_bins().numpy(), prior).axes[:3]
    for axes, lam in zip(panels, (0, 0.5, 1)):
        assert np.allclose(axes.collections[0].get_array(), rebalancing_weights(prior, lam).numpy())


def test_soft_encoding_figure_shows_the_most_saturated_color():
    image = Image.new("RGB", (8, 8), (120, 125, 120))
    image.putpixel((3, 4), (255, 0, 0))  # ab = (80.1, 67.2)
    (axes,) = figures.plot_soft_encoding(image, load_ab_bins()).axes
    _, nearest, star = axes.collections
    assert np.allclose(star.get_offsets(), [[80.1, 67.2]], atol=0.1)
    assert nearest.get_offsets().tolist()[0] == [80, 70] and len(nearest.get_offsets()) == 5
    assert np.isclose(sum(float(text.get_text()) for text in axes.texts), 1, atol=0.03)
