"""Fixtures shared by all tests: images that scikit-image bundles, a small network, the scripts' main functions."""

import json
import os
import signal
import struct
import zlib
from pathlib import Path

from support.checkpoints import save_checkpoint
from support.cli import SIGNALS, UserError
from support.cpu import use_all_cores

import numpy as np
import paddle
import pytest
from PIL import ExifTags, Image, ImageOps
from scipy.ndimage import map_coordinates
from skimage import data
from small_network import SmallNetwork

import pretrained
import test
import train

ROOT = Path(__file__).resolve().parent.parent
BUNDLED_IMAGES = ("astronaut", "chelsea", "coffee", "rocket")

os.environ.setdefault("GLOG_minloglevel", "2")
use_all_cores()


@pytest.fixture
def small_network(monkeypatch):
    """Let `train.py` and `test.py` use the small network. Return its class."""
    monkeypatch.setattr(train, "CIC", SmallNetwork)
    monkeypatch.setattr(pretrained, "CIC", SmallNetwork)
    return SmallNetwork


def change_loss(patch, function):
    """Let `train.py` compute the classification loss by another function."""
    patch.setitem(train.OBJECTIVES, "classification", train.OBJECTIVES["classification"]._replace(compute=function))


def bundled_image(name):
    """Return one of scikit-image's images as a Pillow image."""
    return Image.fromarray(getattr(data, name)())


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
    """Write four images of different shapes, with a shorter side of 96 pixels. Return their folder."""
    folder = tmp_path_factory.mktemp("images")
    for name in BUNDLED_IMAGES:
        image = bundled_image(name)
        scale = 96 / min(image.size)
        image.resize([round(side * scale) for side in image.size]).save(folder / f"{name}.png")
    return folder


@pytest.fixture(scope="session")
def square_crops(tmp_path_factory):
    """Write 64x64 center crops of the same four images. Return their folder."""
    folder = tmp_path_factory.mktemp("square_crops")
    for name in BUNDLED_IMAGES:
        ImageOps.fit(bundled_image(name), (64, 64)).save(folder / f"{name}.png")
    return folder


@pytest.fixture(scope="session")
def cic_checkpoint(tmp_path_factory):
    """Write the bundled weights as training would, without the size of the network's input."""
    path = tmp_path_factory.mktemp("model") / "epoch_0_model.pdparams"
    save_checkpoint(pretrained.load_network(pretrained.SMALL).state_dict(), path)
    return path


@pytest.fixture
def small_checkpoint(small_network, tmp_path):
    """Write a checkpoint of the small network, the default one of its folder, for inputs of 64 pixels."""
    return _write_small(tmp_path / "model" / "epoch_19_model.pdparams", "conv8_313")


@pytest.fixture
def ab_checkpoint(small_network, tmp_path):
    """Write a checkpoint of the small network with the head that predicts ab itself."""
    return _write_small(tmp_path / "model" / "epoch_ab_model.pdparams", "conv8_ab")


def _write_small(path, head):
    paddle.seed(0)
    save_checkpoint({**SmallNetwork(head).state_dict(), "load_size": np.array(64)}, path)
    return path


@pytest.fixture
def colorize_files(small_checkpoint, tmp_path, monkeypatch):
    """Run `test.py` in tmp_path with the small network. Return its exit code and the folder of results."""
    monkeypatch.chdir(tmp_path)

    def colorize(images, *flags, result="result"):
        images = images if isinstance(images, tuple) else (images,)
        where = ["--model_path", small_checkpoint.parent, "--result_path", os.path.join(tmp_path, result)]
        flags = [*images, *where, "--precision", "float32", *flags]
        return test.main(test.parse_args([*map(str, flags)])), tmp_path / result

    return colorize


@pytest.fixture
def run_training(tmp_path, square_crops):
    """Run `train.py` for two steps of four 32-pixel crops; flags override. Return the lines of its log."""

    def run(*flags, folder="run", image_dir=square_crops, overwrite=True):
        short = "--load_size 40 --crop_size 32 --batch_size 4 --max_steps 2 --loss_step 1 --num_workers 0"
        where = ["--model_path", str(tmp_path / folder / "model"), "--log_path", str(tmp_path / folder / "log")]
        start = ["--overwrite"] if overwrite and "--continue_train" not in flags else []
        flags = [*where, *short.split(), *start, *map(str, flags)]
        code = train.main(train.parse_args(["--image_dir", str(image_dir), *flags]))
        assert code == 0
        return [json.loads(line) for line in (tmp_path / folder / "log" / "train.jsonl").read_text().splitlines()]

    return run


@pytest.fixture
def damaged(tmp_path, square_crops):
    """Write twelve readable images and five unreadable ones. Return their folder."""
    folder = tmp_path / "damaged"
    folder.mkdir()
    whole = {path.stem: path.read_bytes() for path in square_crops.iterdir()}
    for name, content in whole.items():
        for i in range(3):
            (folder / f"{name}{i}.png").write_bytes(content)
    (folder / "truncated.png").write_bytes(whole["coffee"][:3000])
    (folder / "text.jpg").write_text("not an image")
    (folder / "zero.png").touch()
    (folder / "bomb.png").write_bytes(png_bomb())
    (folder / "vanished.png").symlink_to("nowhere")
    return folder


@pytest.fixture
def error_message():
    """Call a function that must stop with one clear line. Return the line."""

    def call(function, *arguments, **settings):
        with pytest.raises(UserError) as error:
            function(*arguments, **settings)
        message = str(error.value)
        assert message and "\n" not in message
        return message

    return call


@pytest.fixture
def handlers():
    """Restore the usual handlers, because Ctrl-C is ignored when a shell runs the tests in the background."""
    before = {x: signal.signal(x, signal.SIG_DFL) for x in SIGNALS}
    yield
    for signal_number, handler in before.items():
        signal.signal(signal_number, handler)


@pytest.fixture
def pretend_device(monkeypatch):
    """Let Paddle report another device: "gpu:0" of a compute capability, or an untested kind."""

    def pretend(device, *capability):
        monkeypatch.setattr(paddle, "get_device", lambda: device)
        monkeypatch.setattr(paddle.device.cuda, "get_device_capability", lambda: capability)
        monkeypatch.setattr(paddle.device.cuda, "get_device_name", lambda: "NVIDIA X")

    return pretend


def visualdl_reader(folder):
    """Return VisualDL's reader of a folder, which shows only the latest of its files."""
    from visualdl import LogReader

    return LogReader(file_path=str(max(folder.glob("*vdlrecords*"))))


def save_image(path, pixels, **options):
    """Write an array as an image, in a folder that may not exist yet. Return the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return path


def save_images(folder, images):
    """Write {name: array} as PNG files. Return the folder."""
    for name, pixels in images.items():
        save_image(folder / f"{name}.png", pixels)
    return folder


def exif(orientation=6):
    """Return metadata like those of a camera."""
    metadata = Image.Exif()
    metadata[ExifTags.Base.Orientation] = orientation
    metadata[ExifTags.Base.Model] = "Camera"
    metadata[ExifTags.Base.Copyright] = "somebody"
    metadata[ExifTags.IFD.Exif] = {
        ExifTags.Base.DateTimeOriginal: "2001:02:03 04:05:06",
        ExifTags.Base.ColorSpace: 65535,
        ExifTags.Base.ExifImageWidth: 75,
        ExifTags.IFD.Interop: {ExifTags.Interop.InteropIndex: "R98"},
    }
    metadata[ExifTags.IFD.GPSInfo] = {ExifTags.GPS.GPSLatitudeRef: "N", ExifTags.GPS.GPSLatitude: (48.0, 8.0, 6.5)}
    return metadata


def png_bomb():
    """Return a PNG of a few bytes whose header declares 50,000 by 50,000 pixels."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(9))) + chunk(b"IEND", b"")


def same_values(one, other):
    """Return whether two nested containers of tensors, arrays, numbers and texts are equal, types of numbers aside."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same_values(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return type(one) is type(other) and len(one) == len(other) and all(map(same_values, one, other))
    return np.array_equal(one, other)


def upsample_by_scipy(ab, height, width):
    """Upsample ab [2, h, w], where (i, j) is the color of pixel (4i, 4j) of 4h x 4w, to each pixel of height x width.

    The two images have the same edges, so the centers of their pixels lie at the same shares of the sides.
    """
    at = [(np.arange(n) + 0.5) / n * 4 * cells - 0.5 for n, cells in zip((height, width), ab.shape[1:])]
    grid = np.stack(np.meshgrid(*at, indexing="ij")) / 4
    return np.stack([map_coordinates(np.asarray(channel), grid, order=1, mode="nearest") for channel in ab])
