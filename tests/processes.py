"""Run `train.py` in processes that tests kill, stop by signals, and count."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from support import logs
from support.checkpoints import load_checkpoint

TESTS = Path(__file__).resolve().parent
SMALL = TESTS / "train_small.py"
LIMIT = 600  # seconds; an idle machine needs a few


def train_flags(folder, images, *more, size=32):
    """Return flags of a run that does not end by itself, on crops of 32 pixels; `more` overrides them."""
    where = ["--image_dir", images, "--model_path", folder / "model", "--log_path", folder / "log"]
    sizes = ["--load_size", size + 8, "--crop_size", size, "--batch_size", 4, "--num_workers", 0, "--loss_step", 1]
    return [str(x) for x in [*where, *sizes, "--num_epochs", 10**6, "--save_freq", 10**6, *more]]


def launcher_flags(count, folder):
    """Return the arguments in front of the script's name that run it in `count` processes."""
    flags = ["--nproc_per_node", str(count), "--backend", "gloo", "--log_dir", str(folder / "launch")]
    return ["-m", "paddle.distributed.launch", *flags]


@contextlib.contextmanager
def started(folder, *arguments, script=SMALL, launcher=()):
    """Start a process whose output goes to `folder`; at the end, kill it and its children if they still run."""
    folder.mkdir(exist_ok=True)
    environment = {**os.environ, "PYTHONPATH": str(TESTS.parent), "OMP_NUM_THREADS": "1"}
    with open(folder / "out", "wb") as out, open(folder / "err", "wb") as err:
        process = subprocess.Popen(
            [sys.executable, *launcher, str(script), *arguments],
            stdout=out,
            stderr=err,
            env=environment,
            start_new_session=True,
            preexec_fn=reset_signals,
        )
    family = {process.pid}
    process.family = lambda: family.update(descendants(process.pid)) or family
    try:
        yield process
    finally:
        for pid in process.family():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()


def reset_signals():
    """Handle Ctrl-C and a closed terminal as usual; a shell's background jobs and `nohup` ignore them."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def start_training(folder, images, *more, size=32, **settings):
    return started(folder, *train_flags(folder, images, *more, size=size), **settings)


def run_training_to_end(folder, images, *more, **settings):
    """Train until the run ends by itself. Return the exit code and the standard error."""
    with start_training(folder, images, *more, **settings) as process:
        return process.wait(LIMIT), (folder / "err").read_text()


def descendants(pid):
    children = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    parents = {int(line.split()[0]): int(line.split()[1]) for line in children.splitlines()}
    found = {pid}
    while new := {child for child, parent in parents.items() if parent in found} - found:
        found |= new
    return found - {pid}


def wait_for(condition, process=None):
    """Wait until the condition holds. Fail after LIMIT seconds, or if the process ends first."""
    end = time.monotonic() + LIMIT
    while not (result := condition()):
        assert time.monotonic() < end, "timed out"
        assert process is None or process.poll() is None or condition(), f"ended with {process.returncode}"
        time.sleep(0.05)
    return result


def read_log(folder):
    """Return the complete lines of train.jsonl."""
    return logs.read_log(folder / "log" / "train.jsonl")


def values(folder):
    """Return the log without its times and the run's identifier; a step that was repeated appears twice."""
    varying = {"run", "images_per_second", "waiting"}
    return [{k: v for k, v in line.items() if k not in varying} for line in read_log(folder)]


def steps(lines):
    """Return the lines of the log that are not of a validation."""
    return [line for line in lines if "loss" in line]


def weights(folder, name="latest"):
    return load_checkpoint(folder / "model" / f"epoch_{name}_model.pdparams")


def state(folder, name="latest"):
    """Return a training state without the run's identifier, so that those of two runs can be equal."""
    content = load_checkpoint(folder / "model" / f"epoch_{name}_state.pdopt")
    del content["run"]
    return content


def saved_names(folder):
    return {path.name.split("_")[1] for path in (folder / "model").glob("*.pdparams")}


def steps_done(folder):
    return max((line["step"] for line in read_log(folder)), default=0)


def has_ended(pid):
    """Return whether a process has ended (or is a zombie)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True
