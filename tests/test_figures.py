"""The paper's figures: each is drawn, and shows the values that the project computes."""

from support.checkpoints import save_checkpoint

import numpy as np
import pytest
from PIL import Image, ImageChops
from skimage import data

from resources import figures
from utils import load_ab_bins


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


@pytest.fixture
def tables(tmp_path):
    """Write the tables of metrics_acc.py. Return their folder."""
    (tmp_path / "accuracy_per_class.csv").write_text(
        "class,images,colored_top5,gray_top5\nn1,5,0.8,0.2\nn2,5,0.2,0.6\n"
    )
    (tmp_path / "accuracy_confusions.csv").write_text(
        "class,taken_for,colored,true\nn1,n2,0.8,0.0\nn1,n3,0.6,0.2\nn2,n1,0.0,0.2\n"
    )
    return tmp_path


def test_all_figures_are_drawn(draw, tables):
    names = draw("--results", str(tables), str(tables))
    assert names == {f"{x}.png" for x in ("prior", "weights", "annealed_mean", "soft_encoding", "accuracy_classes")}
    for name in names:
        image = Image.open(f"figures/{name}").convert("RGB")
        assert ImageChops.invert(image).getbbox(), f"{name} is blank"


def test_classes_and_pairs_are_drawn_by_their_rates(tables):
    classes, pairs = figures.plot_classes({"small": tables}).axes
    drawn = [axes.collections[0].get_offsets().tolist() for axes in (classes, pairs)]
    assert drawn == [[[0.2, 0.8], [0.6, 0.2]], [[0, 0.8], [0.2, 0.6], [0.2, 0]]]


def test_soft_encoding_figure_shows_the_most_saturated_color():
    image = Image.new("RGB", (8, 8), (120, 125, 120))
    image.putpixel((3, 4), (255, 0, 0))  # ab = (80.1, 67.2)
    (axes,) = figures.plot_soft_encoding(image, load_ab_bins()).axes
    _, nearest, star = axes.collections
    assert np.allclose(star.get_offsets(), [[80.1, 67.2]], atol=0.1)
    assert nearest.get_offsets().tolist()[0] == [80, 70] and len(nearest.get_offsets()) == 5
    assert np.isclose(sum(float(text.get_text()) for text in axes.texts), 1, atol=0.03)
