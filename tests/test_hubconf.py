"""`hubconf.py`, used through paddle.hub."""

import subprocess
import sys
import textwrap

import numpy as np
import paddle
import pytest
from conftest import ROOT
from PIL import Image

import colorizer

HERE = {"repo_dir": str(ROOT), "source": "local"}


def test_entry_points_are_listed_and_documented():
    assert paddle.hub.list(**HERE) == ["colorizer", "network"]
    for name in paddle.hub.list(**HERE):
        assert "weights" in paddle.hub.help(model=name, **HERE)


@pytest.mark.slow
def test_hub_gives_the_same_pixels_next_to_modules_of_the_same_names(cic_checkpoint, image_folder, tmp_path):
    (tmp_path / "utils.py").write_text("theirs = True")
    (tmp_path / "model.py").write_text("theirs = True")
    (tmp_path / "notebook.py").write_text("""if True:
        import sys
        import utils
        import zlib  # before Paddle: see support/__init__.py
        import paddle

        where = {"repo_dir": sys.argv[1], "source": "local", "weights": sys.argv[2]}
        for _ in range(2):
            colorize = paddle.hub.load(model="colorizer", **where)
        colorize(sys.argv[3]).save("colored.png")
        assert paddle.hub.load(model="network", **where)(paddle.zeros([1, 1, 16, 24])).shape == [1, 313, 4, 6]
        import model
        assert utils.theirs and model.theirs
    """)
    coffee = image_folder / "coffee.png"
    subprocess.run([sys.executable, "notebook.py", ROOT, cic_checkpoint, coffee], cwd=tmp_path, check=True)
    assert np.array_equal(Image.open(tmp_path / "colored.png"), colorizer.Colorizer(cic_checkpoint)(coffee))


STATE = """
import logging, os, pickle, signal, sys, threading, warnings
import zlib  # before Paddle: see support/__init__.py
import numpy
import paddle
from paddle.base import initializer
from PIL import Image, ImageFile, PngImagePlugin

DIR, WEIGHTS, PHOTO = sys.argv[1:]
OURS = {"colorizer", "dataset", "model", "pretrained", "support", "utils"}

class Mine(paddle.nn.initializer.Constant):
    pass

paddle.nn.initializer.set_global_initializer(Mine(2.0), Mine(3.0))
logging.getLogger().setLevel(logging.ERROR)
paddle.vision.models  # imported lazily by some versions

def state():
    loggers = [logging.getLogger(), *map(logging.getLogger, ("PIL", "paddle"))]
    return {
        "Pillow": (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, ImageFile.MAXBLOCK, "HEIF" in Image.OPEN),
        "text in PNG": (PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY),
        "warnings": list(warnings.filters),
        "loggers": [(x.level, list(x.filters), list(x.handlers), x.disabled) for x in loggers],
        "environment": dict(os.environ),
        "path": list(sys.path),
        "modules": {name for name in sys.modules if name.split(".")[0] in OURS},
        "signals": {number: signal.getsignal(number) for number in signal.valid_signals()},
        "threads": threading.active_count(),
        "hooks": (sys.excepthook, threading.excepthook, sys.stdout, sys.stderr),
        "numpy": (numpy.geterr(), numpy.random.get_state()[1].tolist()),
        "initializers": [type(initializer._global_weight_initializer()), type(initializer._global_bias_initializer())],
        "Paddle": (paddle.get_default_dtype(), paddle.in_dynamic_mode(), paddle.is_grad_enabled(), paddle.get_device()),
        "random": [x.current_seed() for x in paddle.get_rng_state()],
        "current folder": os.getcwd(),
    }
"""


def execute(code, *arguments):
    subprocess.run([sys.executable, "-c", code, ROOT, *arguments], check=True)


def test_loading_and_colorizing_leave_the_state_of_the_program_as_it_was(cic_checkpoint, image_folder):
    run = """
    before = state()
    paddle.hub.load(DIR, "network", source="local", weights=WEIGHTS)(paddle.zeros([1, 1, 16, 16]))
    paddle.hub.load(DIR, "colorizer", source="local", weights=WEIGHTS)(PHOTO)
    after = state()
    assert before == after, [(key, before[key], after[key]) for key in before if before[key] != after[key]]
    assert paddle.nn.Linear(1, 1).weight.item() == 2
    """
    execute(STATE + textwrap.dedent(run), cic_checkpoint, image_folder / "coffee.png")


def test_classes_of_the_hub_can_be_pickled_and_errors_return_from_processes(cic_checkpoint, image_folder):
    run = """
    import multiprocessing

    network = paddle.hub.load(DIR, "network", source="local", weights=WEIGHTS)
    colorize = paddle.hub.load(DIR, "colorizer", source="local", weights=WEIGHTS)
    again = paddle.hub.load(DIR, "network", source="local", weights=WEIGHTS)
    assert type(again) is type(network) is pickle.loads(pickle.dumps(type(network)))

    def job(path):
        return colorize(path).size

    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map_async(job, [PHOTO, PHOTO]).get(60) == [colorize(PHOTO).size] * 2
        for path, name in (("missing.png", "InvalidImageError"), (b"bytes", "ValueError")):
            try:
                pool.apply_async(job, [path]).get(60)
            except Exception as error:
                assert type(error).__name__ == name, repr(error)
            else:
                raise AssertionError(path)
        pool.close()
        pool.join()
    """
    execute(STATE + textwrap.dedent(run), cic_checkpoint, image_folder / "coffee.png")
