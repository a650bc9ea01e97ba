"""`hubconf.py`, used through paddle.hub."""

import subprocess
import sys

import numpy as np
import paddle
from conftest import ROOT
from PIL import Image

import colorizer

HERE = {"repo_dir": str(ROOT), "source": "local"}


def test_entry_points_are_listed_and_documented():
    assert paddle.hub.list(**HERE) == ["colorizer", "network"]
    for name in paddle.hub.list(**HERE):
        assert "weights" in paddle.hub.help(model=name, **HERE)


PROGRAM = """
import logging, multiprocessing, os, pickle, signal, sys, threading, warnings
import zlib  # before Paddle: see support/__init__.py
import numpy
import paddle
import utils
from paddle.base import initializer
from PIL import Image, ImageFile, PngImagePlugin

DIR, WEIGHTS, PHOTO = sys.argv[1:]

class Mine(paddle.nn.initializer.Constant):
    pass

paddle.nn.initializer.set_global_initializer(Mine(2.0), Mine(3.0))
logging.getLogger().setLevel(logging.ERROR)
paddle.vision.models  # imported lazily by some versions

def state():
    return {
        "Pillow": (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, ImageFile.MAXBLOCK, "HEIF" in Image.OPEN),
        "text in PNG": (PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY),
        "warnings": list(warnings.filters),
        "loggers": [(x.level, list(x.filters), list(x.handlers)) for x in map(logging.getLogger, ("", "paddle"))],
        "environment": dict(os.environ),
        "path": list(sys.path),
        "modules": {name for name in sys.modules if name.split(".")[0] in ("colorizer", "model", "support", "utils")},
        "signals": {number: signal.getsignal(number) for number in signal.valid_signals()},
        "threads": threading.active_count(),
        "hooks": (sys.excepthook, threading.excepthook, sys.stdout, sys.stderr),
        "numpy": (numpy.geterr(), numpy.random.get_state()[1].tolist()),
        "initializers": [type(initializer._global_weight_initializer()), type(initializer._global_bias_initializer())],
        "Paddle": (paddle.get_default_dtype(), paddle.in_dynamic_mode(), paddle.is_grad_enabled(), paddle.get_device()),
        "random": [x.current_seed() for x in paddle.get_rng_state()],
        "current folder": os.getcwd(),
    }

def load(name):
    return paddle.hub.load(DIR, name, source="local", weights=WEIGHTS)

def size(image):
    return colorize(image).size

before = state()
network = load("network")
assert network(paddle.zeros([1, 1, 16, 24])).shape == [1, 313, 4, 6]
colorize = load("colorizer")
colorize(PHOTO).save("colored.png")
after = state()
assert before == after, [(key, before[key], after[key]) for key in before if before[key] != after[key]]
assert paddle.nn.Linear(1, 1).weight.item() == 2

import model  # ours has another name
assert utils.theirs and model.theirs

assert type(load("network")) is type(network) is pickle.loads(pickle.dumps(type(network)))
with multiprocessing.get_context("fork").Pool(2) as pool:
    assert pool.map_async(size, [PHOTO, PHOTO]).get(60) == [size(PHOTO)] * 2
    for image, name in (("missing.png", "InvalidImageError"), (b"bytes", "ValueError")):
        try:
            pool.apply_async(size, [image]).get(60)
        except Exception as error:
            assert type(error).__name__ == name, repr(error)
        else:
            raise AssertionError(image)
"""


def test_hub_colorizes_in_a_program_and_its_processes_and_leaves_its_state_alone(
    cic_checkpoint, image_folder, tmp_path
):
    """The program has modules of the same names. Classes can be pickled, and errors return from processes."""
    for name in ("utils.py", "model.py"):
        (tmp_path / name).write_text("theirs = True")
    (tmp_path / "program.py").write_text(PROGRAM)
    coffee = image_folder / "coffee.png"
    subprocess.run([sys.executable, "program.py", ROOT, cic_checkpoint, coffee], cwd=tmp_path, check=True)
    assert np.array_equal(Image.open(tmp_path / "colored.png"), colorizer.Colorizer(cic_checkpoint)(coffee))
