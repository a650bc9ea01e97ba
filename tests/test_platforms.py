"""The scripts on Linux, with everything removed that Python lacks on Windows or macOS."""

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

from support.cli import run_script
from support.cpu import use_all_cores
from support.workers import default_workers, parallel_map

import paddle
import pytest
from conftest import ROOT

PREAMBLE = """
import ctypes, fcntl, multiprocessing, os, pathlib, platform, runpy, signal, subprocess, sys, types

def refuse(*_, **__):
    raise TypeError("not on this system")

multiprocessing.set_start_method("spawn")
for name in ("fork", "killpg", "nice", "sched_getaffinity", "sched_setaffinity", "setpgrp"):
    delattr(os, name)
for name in ("SIGCHLD", "SIGHUP", "SIGPIPE", "pthread_sigmask"):
    delattr(signal, name)
load = ctypes.CDLL.__init__
ctypes.CDLL.__init__ = lambda self, name, *x, **y: refuse() if name is None else load(self, name, *x, **y)
platform.libc_ver = lambda *_: ("", "")
sync = os.fsync
os.fsync = lambda file: sync(file) if fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE else refuse()
os.kill = refuse  # on Windows, it sends Ctrl-C or ends the process
exists = pathlib.Path.exists
pathlib.Path.exists = lambda path: not str(path).startswith("/proc/") and exists(path)
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


CELL = """
import sys
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell.instance()
for cell in sys.argv[1:]:
    shell.run_cell(cell).raise_error()
"""


@pytest.mark.slow
def test_all_cells_of_the_notebook_page_run(tmp_path):
    """The cells that clone and install are skipped, and training takes fewer steps."""
    pytest.importorskip("IPython")
    for path in ROOT.iterdir():
        if path.suffix == ".py" or path.name in ("support", "resources"):
            (tmp_path / path.name).symlink_to(path)
    cells = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "notebook.md").read_text("utf-8"), re.DOTALL)
    cells = [cell.replace("demo.py", "demo.py --steps 5") for cell in cells if not re.match("!(git|pip)", cell)]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "IPYTHONDIR": str(tmp_path)}
    command = [sys.executable, "-c", CELL, *cells]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert len(cells) == 5 and done.returncode == 0, done.stdout + done.stderr
    assert len(list((tmp_path / "result").glob("*.png"))) >= 5 and '"step": 5' in done.stdout


def thread_and_process(_):
    return threading.current_thread().name, os.getpid()


def test_parallel_map_uses_threads_where_processes_do_not_fork(monkeypatch):
    monkeypatch.setattr(multiprocessing, "get_start_method", lambda: "spawn")
    results = list(parallel_map(thread_and_process, [1, 2, 3], 2, None))
    assert {pid for _, pid in results} == {os.getpid()} and all("Thread" in name for name, _ in results)
    assert default_workers() == 0


def test_parallel_map_uses_processes_where_they_fork():
    assert os.getpid() not in {pid for _, pid in parallel_map(thread_and_process, [1, 2, 3], 2, None)}


@pytest.mark.parametrize(
    ("processor", "avx2", "avx512", "kind"),
    [
        ("AMD64 Family 25 Model 97 Stepping 2, AuthenticAMD", True, True, "7"),
        ("AMD64 Family 23 Model 1 Stepping 2, AuthenticAMD", True, False, "5"),
        ("AMD64 Family 21 Model 1 Stepping 2, AuthenticAMD", False, False, None),
        ("Intel64 Family 6 Model 143 Stepping 8, GenuineIntel", True, True, None),
    ],
)
def test_mkl_gets_the_instructions_of_amd_processors_without_cpuinfo(monkeypatch, processor, avx2, avx512, kind):
    monkeypatch.setattr(Path, "exists", lambda _: False)
    monkeypatch.setenv("PROCESSOR_IDENTIFIER", processor)  # as on Windows
    monkeypatch.setattr(paddle.base.core, "supports_int8", lambda: avx2)
    monkeypatch.setattr(paddle.base.core, "supports_bfloat16", lambda: avx512)
    monkeypatch.setenv("MKL_DEBUG_CPU_TYPE", "")  # removed after the test
    monkeypatch.delenv("MKL_DEBUG_CPU_TYPE")
    use_all_cores()
    assert os.environ.get("MKL_DEBUG_CPU_TYPE") == kind


class NotebookStream:
    """Like a notebook's standard output, has neither `reconfigure` nor `fileno`."""

    write = flush = lambda self, *_: None


def test_script_runs_in_a_notebook_and_leaves_its_interrupts_alone(monkeypatch):
    monkeypatch.setattr(sys, "stdout", NotebookStream())
    before = signal.getsignal(signal.SIGINT)
    assert run_script(lambda _: 0, lambda: None) == 0
    assert signal.getsignal(signal.SIGINT) is before
