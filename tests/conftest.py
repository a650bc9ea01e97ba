"""Fixtures shared by all tests: images that scikit-image bundles, a small network, the scripts' main functions."""

import json
import os
from pathlib import Path

from support.checkpoints import save_checkpoint
from support.cpu import use_all_cores

import numpy as np
import paddle
import pytest
from PIL import Image, ImageOps
from scipy.ndimage import map_coordinates
from skimage import data
from small_network import SmallNetwork, standardize

import pretrained
import train
from dataset import rgb_to_lightness
from model import CIC

ROOT = Path(__file__).resolve().parent.parent
PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket")

os.environ.setdefault("GLOG_minloglevel", "2")
use_all_cores()


@pytest.fixture
def small_network(monkeypatch):
    """`train.py` and `test.py` use the small network."""
    monkeypatch.setattr(train, "CIC", SmallNetwork)
    monkeypatch.setattr(pretrained, "CIC", SmallNetwork)
    return SmallNetwork


@pytest.fixture(scope="session")
def photographs(tmp_path_factory):
    """A folder of four photographs, 96 pixels wide or high at the short side, of different shapes."""
    folder = tmp_path_factory.mktemp("photographs")
    for name in PHOTOGRAPHS:
        image = Image.fromarray(getattr(data, name)())
        scale = 96 / min(image.size)
        image.resize([round(side * scale) for side in image.size]).save(folder / f"{name}.png")
    return folder


@pytest.fixture(scope="session")
def squares(tmp_path_factory):
    """A folder of the same four as squares of 64 pixels."""
    folder = tmp_path_factory.mktemp("squares")
    for name in PHOTOGRAPHS:
        ImageOps.fit(Image.fromarray(getattr(data, name)()), (64, 64)).save(folder / f"{name}.png")
    return folder


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A checkpoint of the real network with outputs of a usual size: its layers scaled on a photograph."""
    paddle.seed(1)
    network = CIC()
    rgb = paddle.to_tensor(np.asarray(Image.fromarray(data.coffee()).resize((96, 96))))
    standardize(network, rgb_to_lightness(rgb.transpose([2, 0, 1]).unsqueeze(0)))
    path = tmp_path_factory.mktemp("model") / "epoch_0_model.pdparams"
    save_checkpoint(network.state_dict(), path)
    return path


@pytest.fixture
def run_training(tmp_path, squares):
    """Runs `train.py` for two steps of four 32-pixel crops; flags override. Returns the lines of its log."""

    def run(*flags, folder="run", image_dir=squares):
        short = "--load_size 40 --crop_size 32 --batch_size 4 --max_steps 2 --loss_step 1 --num_workers 0"
        where = ["--model_path", str(tmp_path / folder / "model"), "--log_path", str(tmp_path / folder / "log")]
        start = [] if "--continue_train" in flags else ["--overwrite"]
        flags = [*where, *short.split(), *start, *map(str, flags)]
        code = train.main(train.parse_args(["--image_dir", str(image_dir), *flags]))
        assert code == 0
        return [json.loads(line) for line in (tmp_path / folder / "log" / "train.jsonl").read_text().splitlines()]

    return run


@pytest.fixture
def stopped():
    """Runs a main function that must stop with one clear line, and returns the line."""

    def stopped(main, args):
        with pytest.raises(SystemExit) as stop:
            main(args)
        message = str(stop.value.code)
        assert message and "\n" not in message
        return message

    return stopped


def recorded(folder):
    """Return VisualDL's reader of a folder, which shows only the latest of its files."""
    from visualdl import LogReader

    return LogReader(file_path=str(max(folder.glob("*vdlrecords*"))))


def random_rgb(count, seed=0):
    """uint8 [count, 3, 1, 1] random colors."""
    return np.random.default_rng(seed).integers(0, 256, (count, 3, 1, 1), dtype=np.uint8)


def upsampled(ab, height, width):
    """By SciPy: ab [2, h, w], where (i, j) is the color of pixel (4i, 4j) of 4h x 4w, at each pixel of height x width.

    The two images have the same edges, so their pixels' middles lie at the same shares of the sides.
    """
    at = [(np.arange(n) + 0.5) / n * 4 * cells - 0.5 for n, cells in zip((height, width), ab.shape[1:])]
    grid = np.stack(np.meshgrid(*at, indexing="ij")) / 4
    return np.stack([map_coordinates(np.asarray(channel), grid, order=1, mode="nearest") for channel in ab])
