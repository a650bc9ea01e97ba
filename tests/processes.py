"""`train.py` in processes of their own: to be killed, sent signals, and counted."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

TESTS = Path(__file__).resolve().parent
SMALL = TESTS / "train_small.py"
LIMIT = 120  # seconds for what takes a few on an idle machine


def flags(folder, images, *more, size=32):
    """Of a run that never ends by itself, on crops of 32 pixels; `more` overrides."""
    where = ["--image_dir", images, "--model_path", folder / "model", "--log_path", folder / "log"]
    sizes = ["--load_size", size + 8, "--crop_size", size, "--batch_size", 4, "--num_workers", 0, "--loss_step", 1]
    return [str(x) for x in [*where, *sizes, "--num_epochs", 10**6, "--save_freq", 10**6, *more]]


def launched(count, folder):
    """What comes ahead of the script's name to run it in `count` processes."""
    return ["-m", "paddle.distributed.launch", "--nproc_per_node", str(count), "--backend", "gloo"] + [
        *("--log_dir", str(folder / "launch"))
    ]


@contextlib.contextmanager
def started(folder, *arguments, script=SMALL, launcher=()):
    """A running process; its output is in `folder`. Whatever is left of it and its children is killed afterwards."""
    folder.mkdir(exist_ok=True)
    environment = {**os.environ, "PYTHONPATH": str(TESTS.parent), "OMP_NUM_THREADS": "1"}
    with open(folder / "out", "wb") as out, open(folder / "err", "wb") as err:
        process = subprocess.Popen(
            [sys.executable, *launcher, str(script), *arguments],
            stdout=out,
            stderr=err,
            env=environment,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
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


def run(folder, *arguments, **settings):
    """Runs to the end. Returns the exit code and what was written to standard error."""
    with started(folder, *arguments, **settings) as process:
        return process.wait(LIMIT), (folder / "err").read_text()


def descendants(pid):
    children = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    parents = {int(line.split()[0]): int(line.split()[1]) for line in children.splitlines()}
    found = {pid}
    while new := {child for child, parent in parents.items() if parent in found} - found:
        found |= new
    return found - {pid}


def wait_for(condition, process=None):
    """Waits until the condition holds; fails when it never does or the process ends before."""
    end = time.monotonic() + LIMIT
    while not (result := condition()):
        assert time.monotonic() < end, "waited in vain"
        assert process is None or process.poll() is None or condition(), f"ended with {process.returncode}"
        time.sleep(0.05)
    return result


def log(folder):
    """The lines of train.jsonl that are whole."""
    path = folder / "log" / "train.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def steps_done(folder):
    return max((line["step"] for line in log(folder)), default=0)


def gone(pid):
    """Whether a process has ended (or waits, ended, for its parent to take notice)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def stopped_at_random(folder, images, signals, seed=0):
    """Stops runs of very short epochs at any moment from their first step on; each goes on where the last one stopped.

    The signal goes to the whole group of processes, as a terminal sends it. Yields the exit code, the one that it
    should be, and what the run said.
    """
    moment = random.Random(seed)
    resume = []
    for _ in range(signals):
        number = moment.choice((signal.SIGINT, signal.SIGTERM))
        before = steps_done(folder)
        more = ["--batch_size", 1, "--num_workers", 2, "--num_epochs", 10**6, *resume]
        with started(folder, *flags(folder, images, *more)) as process:
            wait_for(lambda before=before: steps_done(folder) > before, process)
            time.sleep(moment.random())
            os.killpg(process.pid, number)
            yield process.wait(LIMIT), 128 + number, (folder / "err").read_text()
        resume = ["--continue_train"]
