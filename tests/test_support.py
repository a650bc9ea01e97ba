"""Importing Paddle: the terminal shows only the scripts' own lines, none of Paddle's or of other libraries'."""

import os
import shutil
import subprocess
import sys

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

    def run(*command, code=0, home=tmp_path):
        bare = {"HOME": str(home), "PATH": str(tools), "PYTHONPATH": str(ROOT)}
        bare["MPLBACKEND"] = "TkAgg"  # fails without a display if a script uses it
        bare["LD_LIBRARY_PATH"] = os.environ.get("LD_LIBRARY_PATH", "")
        done = subprocess.run([sys.executable, *map(str, command)], cwd=tmp_path, env=bare, capture_output=True)
        lines = done.stderr.decode().splitlines()
        assert done.returncode == code, lines
        return lines

    return run


@pytest.mark.slow
@pytest.mark.parametrize("home", [".", "/proc/nowhere"])
def test_training_prints_no_messages_of_libraries_even_without_a_home_directory(
    stderr, square_crops, image_folder, tmp_path, home
):
    sizes = ["--load_size", "32", "--crop_size", "32", "--batch_size", "2", "--num_workers", "1", "--max_steps", 1]
    flags = ["--image_dir", square_crops, "--val_dir", image_folder, *sizes]
    assert stderr(ROOT / "train.py", *flags, home=tmp_path / home) == []


@pytest.mark.slow
def test_colorizing_prints_no_messages_of_libraries(stderr, square_crops, cic_checkpoint, tmp_path):
    checkpoint = tmp_path / "network.pdparams"
    checkpoint.symlink_to(cic_checkpoint)
    assert stderr(ROOT / "test.py", square_crops, "--load_model", checkpoint, "--load_size", 32) == []


@pytest.mark.slow
@pytest.mark.parametrize("script", ["metrics_auc.py", "get_invalid_images.py", "resources/estimate_prior.py"])
def test_scripts_that_read_images_print_no_messages_of_libraries(stderr, square_crops, script):
    flags = ["--imgs_dir", square_crops, "--gray"] if script == "metrics_auc.py" else ["--image_dir", square_crops]
    assert stderr(ROOT / script, *flags, "--num_workers", 1) == []


@pytest.mark.slow
def test_classifying_prints_no_messages_of_libraries(stderr, square_crops, tmp_path):
    paddle.save(paddle.vision.models.squeezenet1_1().state_dict(), str(tmp_path / "classifier.pdparams"))
    (tmp_path / "labels").write_text("".join(f"{path.name} 5\n" for path in square_crops.iterdir()))
    flags = ["--results_dir", square_crops, "--arch", "squeezenet1_1", "--weights", tmp_path / "classifier.pdparams"]
    assert stderr(ROOT / "metrics_acc.py", *flags, "--labels", tmp_path / "labels", "--num_workers", 1) == []


@pytest.mark.slow
def test_usage_error_prints_one_line(stderr, tmp_path):
    (line,) = stderr(ROOT / "metrics_acc.py", "--results_dir", tmp_path / "nowhere", code=1)
    assert "nowhere" in line


@pytest.mark.slow
def test_importing_the_drivers_in_resources_prints_nothing(stderr):
    names = ", ".join(f"resources.{path.stem}" for path in sorted((ROOT / "resources").glob("*.py")))
    assert stderr("-c", f"import {names}") == []


@pytest.mark.slow
def test_warnings_after_the_import_are_shown(stderr):
    lines = stderr("-c", "import support, warnings; warnings.warn('mine'); warnings.warn('too', DeprecationWarning)")
    assert any("mine" in line for line in lines) and any("too" in line for line in lines)


@pytest.mark.slow
def test_script_ended_by_sigterm_prints_one_line_and_no_stack_dump(stderr):
    main = "lambda _: (paddle.ones([2]).sum(), os.kill(os.getpid(), 15))"
    code = f"import os, sys; from support.cli import run_script; import paddle; sys.exit(run_script({main}, lambda: 0))"
    assert stderr("-c", code, code=143) == ["stopped by SIGTERM"]


@pytest.mark.slow
def test_importing_support_keeps_signal_handlers_and_the_home_directory(stderr):
    state = "signal.getsignal(2), signal.getsignal(15), signal.pthread_sigmask(0, []), os.environ['HOME']"
    code = f"import os, signal; before = {state}; import support; assert before == ({state}), before"
    assert stderr("-c", code, home="/proc/nowhere") == []


@pytest.mark.slow
def test_omp_num_threads_is_what_the_user_set(stderr):
    """Paddle sets the variable to 1, also for the processes that its launcher starts."""
    code = "import os, support; print(support.OMP_NUM_THREADS, os.environ.get('OMP_NUM_THREADS'))"
    for set_before, expected in (
        ({}, "None None"),
        ({"OMP_NUM_THREADS": "1"}, "1 1"),
        ({"OMP_NUM_THREADS": "2"}, "2 2"),
    ):
        environment = {"PYTHONPATH": str(ROOT), **set_before}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == expected and not done.stderr
    environment.update(OMP_NUM_THREADS="1", PADDLE_TRAINER_ID="0")
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "None 1"


def test_errors_of_paddle_are_shown(stderr):
    lines = stderr("-c", "import support, paddle; paddle.ones([2]).reshape([3])", code=1)
    assert any("ValueError" in line or "InvalidArgument" in line for line in lines)


@pytest.mark.parametrize(
    ("problem", "line"),
    [
        ("libgomp.so.1: cannot open shared object file", "on Debian and Ubuntu: apt-get install libgomp1"),
        ("No module named 'paddle'", "activate the environment, or install it: pip install -r requirements.txt"),
    ],
)
def test_missing_paddle_or_library_is_reported_on_one_line(tmp_path, problem, line):
    (tmp_path / "paddle.py").write_text(f"raise ImportError({problem!r})")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (tmp_path, ROOT)))}
    done = subprocess.run([sys.executable, "-c", "import support"], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, f"Paddle cannot be imported: {problem}; {line}\n")
