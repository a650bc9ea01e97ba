"""The paper's figures: each is drawn."""

from support.checkpoints import save_checkpoint

import pytest
from PIL import Image, ImageChops
from skimage import data

from resources import figures


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


def test_all_figures_are_drawn(tmp_path, monkeypatch, small_network, tables):
    monkeypatch.chdir(tmp_path)
    save_checkpoint(small_network().state_dict(), tmp_path / "network.pdparams")
    Image.fromarray(data.coffee()).resize((96, 64)).save("coffee.png")
    flags = "--image_dir coffee.png --load_model network.pdparams --results . ."
    figures.main(figures.parse_args(flags.split()))
    drawn = {path.stem: path for path in (tmp_path / "figures").iterdir()}
    assert {*drawn} == {"prior", "weights", "annealed_mean", "soft_encoding", "accuracy_classes"}
    for name, path in drawn.items():
        assert ImageChops.invert(Image.open(path).convert("RGB")).getbbox(), f"{name} is blank"


def test_classes_and_pairs_are_drawn_by_their_rates(tables):
    classes, pairs = figures.plot_classes({"small": tables}).axes
    drawn = [axes.collections[0].get_offsets().tolist() for axes in (classes, pairs)]
    assert drawn == [[[0.2, 0.8], [0.6, 0.2]], [[0, 0.8], [0.2, 0.6], [0.2, 0]]]
