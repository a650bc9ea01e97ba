"""The structure of the project: imports run one way, and scripts run on other systems."""

import ast
import json
import subprocess
import sys

import pytest
from conftest import ROOT

METHOD = {"model", "dataset", "utils"}  # which do not know each other
SCRIPTS = {"train", "test", "metrics_auc", "metrics_acc", "get_invalid_images"}
MAY_IMPORT = {
    **dict.fromkeys(METHOD, {"support"}),
    "pretrained": {"support", "model", "utils"},
    "colorizer": {"support", *METHOD, "pretrained"},
    "hubconf": {"colorizer", "pretrained"},
    "app": {"support", "dataset", "utils", "pretrained", "colorizer"},
    **dict.fromkeys(SCRIPTS, {"support", *METHOD, "pretrained", "colorizer"}),
}


@pytest.mark.parametrize("path", [*ROOT.glob("*.py"), *ROOT.glob("support/*.py")], ids=lambda path: path.name)
def test_imports_run_one_way(path):
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    modules = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    modules += [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
    ours = {module.split(".")[0] for module in modules} & {"support", "resources", "tests", *MAY_IMPORT}
    assert ours <= ({"support"} if path.parent != ROOT else MAY_IMPORT[path.stem])


PREAMBLE = """
import ctypes, fcntl, multiprocessing, os, pathlib, runpy, signal, subprocess, sys, types

def refuse(*_, **__):
    raise TypeError("not on this system")

multiprocessing.set_start_method("spawn")
for name in ("fork", "killpg", "nice", "sched_getaffinity", "sched_setaffinity", "setpgrp"):
    delattr(os, name)
for name in ("SIGCHLD", "SIGHUP", "SIGPIPE", "SIGUSR1", "SIGUSR2", "pthread_sigmask"):
    delattr(signal, name)
load = ctypes.CDLL.__init__
ctypes.CDLL.__init__ = lambda self, name, *x, **y: refuse() if name is None else load(self, name, *x, **y)
sync = os.fsync
os.fsync = lambda file: sync(file) if fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE else refuse()
os.kill = refuse  # on Windows, it sends Ctrl-C or ends the process
read, nothing = pathlib.Path.read_text, pathlib.Path("/nowhere")
pathlib.Path.read_text = lambda x, **y: read(nothing if str(x).startswith(("/proc/", "/sys/")) else x, **y)
sys.modules["fcntl"] = sys.modules["resource"] = None
sys.modules["msvcrt"] = types.SimpleNamespace(LK_NBLCK=2, locking=lambda *_: None)  # Windows locks files by it
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture
def run(tmp_path):
    """Run a script of the project to its end. Return its standard output."""

    def run(script, *flags):
        command = [sys.executable, "-c", PREAMBLE, str(ROOT / script), *map(str, flags)]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0 and not done.stderr, done.stderr
        return done.stdout

    return run


def sizes(*more):
    return ["--load_size", 40, "--crop_size", 32, "--batch_size", 2, "--loss_step", 1, *more]


@pytest.mark.slow
def test_scripts_run_without_the_functions_that_windows_and_macos_lack(run, square_crops, tmp_path):
    image, weights = square_crops / "coffee.png", ["--load_model", "small", "--load_size", 64]
    assert "1 image " in run("test.py", image, *weights, "--output", tmp_path / "coffee.png")
    assert "4 images " in run("test.py", square_crops, *weights)
    assert "0 of 4 images" in run("get_invalid_images.py", "--image_dir", square_crops)
    run("metrics_auc.py", "--imgs_dir", square_crops, "--num_workers", 2)
    run("resources/estimate_prior.py", "--image_dir", square_crops, "--output", tmp_path / "prior.npy")
    run("train.py", "--image_dir", square_crops, *sizes("--max_steps", 2))
    run("train.py", "--image_dir", square_crops, *sizes("--max_steps", 3, "--continue_train"))
    lines = (tmp_path / "log" / "train.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]
