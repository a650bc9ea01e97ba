"""Importing Paddle: the terminal shows only the scripts' own lines, none of Paddle's or of other libraries'."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import paddle
import pytest
from conftest import ROOT


@pytest.fixture
def stderr(tmp_path):
    """Run Python as on a new machine without ccache and display. Return the lines of standard error."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("cat", "grep", "sh", "uname", "which"):
        (tools / tool).symlink_to(shutil.which(tool))

    def run(*command, home=tmp_path):
        bare = {"HOME": str(home), "PATH": str(tools), "PYTHONPATH": str(ROOT)}
        bare["MPLBACKEND"] = "TkAgg"  # fails without a display if a script uses it
        bare["LD_LIBRARY_PATH"] = os.environ.get("LD_LIBRARY_PATH", "")
        done = subprocess.run([sys.executable, *map(str, command)], cwd=tmp_path, env=bare, capture_output=True)
        lines = done.stderr.decode().splitlines()
        assert done.returncode == 0, lines
        return lines

    return run


@pytest.mark.slow
def test_scripts_print_no_messages_of_libraries(stderr, square_crops, image_folder, cic_checkpoint, tmp_path):
    """Training prints none even without a home directory."""
    sizes = ["--load_size", "32", "--crop_size", "32", "--batch_size", "2", "--num_workers", "1", "--max_steps", 1]
    flags = ["--image_dir", square_crops, "--val_dir", image_folder, *sizes]
    assert stderr(ROOT / "train.py", *flags, home="/proc/nowhere") == []
    (tmp_path / "network.pdparams").symlink_to(cic_checkpoint)
    paddle.save(paddle.vision.models.squeezenet1_1().state_dict(), str(tmp_path / "classifier.pdparams"))
    (tmp_path / "labels").write_text("".join(f"{path.name} 5\n" for path in square_crops.iterdir()))
    classifier = ["--arch", "squeezenet1_1", "--weights", tmp_path / "classifier.pdparams"]
    for command in (
        ["test.py", square_crops, "--load_model", tmp_path / "network.pdparams", "--load_size", 32],
        ["metrics_auc.py", "--imgs_dir", square_crops, "--gray", "--num_workers", 1],
        ["metrics_acc.py", "--results_dir", square_crops, *classifier, "--labels", tmp_path / "labels"],
        ["get_invalid_images.py", "--image_dir", square_crops, "--num_workers", 1],
        ["resources/estimate_prior.py", "--image_dir", square_crops, "--num_workers", 1],
    ):
        assert stderr(ROOT / command[0], *command[1:]) == [], command


@pytest.mark.slow
def test_importing_the_drivers_in_resources_prints_nothing(stderr):
    names = ", ".join(f"resources.{path.stem}" for path in sorted((ROOT / "resources").glob("*.py")))
    assert stderr("-c", f"import {names}") == []


def test_importing_support_keeps_signal_handlers_the_home_directory_and_warnings(stderr):
    state = "signal.getsignal(2), signal.getsignal(15), signal.pthread_sigmask(0, []), os.environ['HOME']"
    code = f"import os, signal, warnings; os.chdir({str(ROOT / 'docs')!r})\n"
    code += "signal.signal(2, signal.default_int_handler)\n"  # ignored in a shell's background jobs
    code += f"before = {state}; import support; assert before == ({state}), before\n"
    lines = stderr("-c", code + "warnings.warn('mine', DeprecationWarning)", home="/proc/nowhere")
    assert lines and all("mine" in line for line in lines)  # Python 3.13 shows the statement as well


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, "None None"),
        ({"OMP_NUM_THREADS": "1"}, "1 1"),
        ({"OMP_NUM_THREADS": "1", "PADDLE_TRAINER_ID": "0"}, "None 1"),
    ],
)
def test_omp_num_threads_is_what_the_user_set(variables, expected):
    """Paddle sets the variable to 1, also for the processes that its launcher starts."""
    code = "import os, support; print(support.OMP_NUM_THREADS, os.environ.get('OMP_NUM_THREADS'))"
    environment = {"PYTHONPATH": str(ROOT), **variables}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == expected and not done.stderr


def test_matrix_products_of_numpy_use_as_many_threads_as_without_this_package():
    library = next(Path(np.__file__).parents[1].glob("numpy.libs/*scipy_openblas64*"), None)
    if library is None:
        pytest.skip("NumPy has another BLAS")
    code = f"import ctypes; print(ctypes.CDLL({str(library)!r}).scipy_openblas_get_num_threads64_())"
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}

    def threads(first):
        command = [sys.executable, "-c", f"import {first}, numpy; {code}"]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout

    assert threads("support") == threads("sys")


def test_missing_paddle_is_reported_on_one_line_by_scripts_and_as_an_import_error_by_the_package(tmp_path):
    (tmp_path / "paddle.py").write_text("raise ImportError('libgomp.so.1: cannot open shared object file')")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (tmp_path, ROOT)))}

    def stderr(*command):
        done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)
        assert done.returncode == 1
        return done.stderr.splitlines()

    problem = "libgomp.so.1: cannot open shared object file"
    remedy = "activate the environment in which it is installed (README.md); Debian and Ubuntu need libgomp1, too"
    line = f"Paddle cannot be imported: {problem}; {remedy}"
    assert stderr(ROOT / "train.py") == [line]
    assert stderr("-c", "import support")[-1] == f"ImportError: {problem}"
