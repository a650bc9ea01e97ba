"""The log of a training run, on the terminal, in JSON lines and in VisualDL, and the values that it shows."""

import json
import os
import sys
import tempfile
import time
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import NamedTuple

from support.cli import UserError, counted, note, report_os_errors
from support.files import atomic_text
from support.processes import all_reduce, is_first, on_first

import numpy as np
import paddle
import paddle.distributed as dist
from tqdm import tqdm

VAL = "val_"  # begins the names of values of validation
LINES, REPLACED = "train.jsonl", "train_replaced.jsonl"
LOG_FILES = r"train(_replaced)?\.jsonl|vdlrecords\.\d+\.log"


class Log:
    """Lines on the terminal, JSON lines and VisualDL, all written by rank 0.

    Lines wait in memory until `open` is called, so that the log of an earlier run stays until this one works.

    Args:
        folder (str): Folder of the log.
        formats (dict): Formats of the values on the terminal, by their names; values of validation have the same names
            after "val_".
        run (str): Identifier of the run, which becomes part of each line of the file.
        last (tuple[int, bool]): Lines of the log stay up to this step, and to that of its validation if the second is
            true. Later lines, which exist if the run was killed after its last save or resumes at an earlier epoch, are
            moved to another file.
    """

    def __init__(self, folder, formats, run, last):
        self.folder, self.formats, self.run, self.last = Path(folder), formats, run, last
        self.problem = f"{folder}: the log cannot be written"
        self.waiting, self.file, self.board = [], None, None

    def open(self):
        """Begin to write, if that has not happened yet.

        VisualDL shows only the file of a folder whose number is the largest, so a new file begins with the values (not
        the images) of the lines that stay.
        """
        if self.file or not is_first():
            return
        with report_os_errors(self.problem):
            path = self.folder / LINES
            lines = read_log(path)
            before = [values for values in lines if _step_and_stage(values) <= self.last]
            later = [values for values in lines if _step_and_stage(values) > self.last]
            if later:
                with open(self.folder / REPLACED, "a") as file:
                    file.writelines(json.dumps(values) + "\n" for values in later)
                note(f"{path}: {counted(len(later), 'line')} after step {self.last[0]} moved to {REPLACED}")
            with atomic_text(path) as file:
                file.writelines(json.dumps(values) + "\n" for values in before)
            self.file = open(path, "a", buffering=1)  # noqa: SIM115  by lines
            with redirect_stdout(None):
                LogWriter = _import_visualdl()  # noqa: N806
                self.board = LogWriter(logdir=str(self.folder), file_name=f"vdlrecords.{self._number()}.log")
            for values in before:
                self._show(values)
        for values in self.waiting:
            self._record(values)

    def _number(self):
        """Return a number for VisualDL's new file, larger than those of earlier ones: a clock may run backwards."""
        numbers = (path.name.split(".")[1] for path in self.folder.glob("vdlrecords.*.log"))
        return max([time.time_ns(), *(int(number) + 1 for number in numbers if number.isdecimal())])

    def write(self, values):
        """Print a dict of values, which includes "step", and write it to train.jsonl and VisualDL."""
        if not is_first():
            return
        formatted = (f"{name} {value:{self.formats[name.removeprefix(VAL)]}}" for name, value in values.items())
        tqdm.write("  ".join(formatted))
        sys.stdout.flush()  # for a user who follows a file
        if self.file:
            self._record(values)
        else:
            self.waiting.append(values)

    def _record(self, values):
        with report_os_errors(self.problem):
            self.file.write(json.dumps({"run": self.run, **values}, allow_nan=False) + "\n")
            self._show(values)

    def _show(self, values):
        for name, value in values.items():
            if name not in ("run", "step", "epoch"):
                stage = "validation" if name.startswith(VAL) else "training"
                self.board.add_scalar(f"{stage}/{name.removeprefix(VAL)}", value, values["step"])

    def pictures(self, tag, panel, step):
        """Show images of one size, uint8 [H, W, 3], as one picture in VisualDL."""
        if self.board and len(panel):
            self.board.add_image(tag, np.concatenate(panel), step)

    def close(self):
        if self.file:
            with suppress(OSError):  # `write` has reported it
                self.file.close()
                self.board.close()


def _import_visualdl():
    """Import VisualDL with a temporary home directory, to which it writes; the real one may be read-only."""
    home = os.path.expanduser("~")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HOME"] = folder
        from visualdl import LogWriter
    os.environ["HOME"] = home
    return LogWriter


def read_log(path):
    """Return the values of each line of a train.jsonl; [] without a file."""
    values = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        with suppress(ValueError):  # a kill may cut a line off
            values.append(json.loads(line))
    return values


def log_runs(folder):
    """Return the identifiers of the runs whose lines are in a log."""
    return {values.get("run") for values in read_log(Path(folder, LINES))}


def _step_and_stage(values):
    """Return the step of a line, and whether the line is from the validation after that step."""
    return values["step"], any(name.startswith(VAL) for name in values)


class Totals(NamedTuple):
    """Sums over all processes."""

    interval: np.ndarray  # of the interval's values, float64 [len(columns)]
    loss: float  # of the epoch
    broken: int  # unreadable files in the epoch
    images: int  # images in the epoch


class Meter:
    """Sums of each step's values, on the device, because reading them in every step would wait for it.

    An interval ends at a line of the log. The time between two epochs, in which the network is validated and saved,
    does not count.

    Args:
        columns (dict): Names of the values, and a function of the mean of each over the images. The first is the loss.
        max_broken (float): Largest share of an epoch's files that may be unreadable.
    """

    def __init__(self, columns, max_broken):
        self.columns, self.max_broken, self.last = columns, max_broken, time.perf_counter()
        self.begin_interval()
        self.begin_epoch()

    def begin_epoch(self):
        self.loss = paddle.zeros([])
        self.epoch_broken = self.epoch_images = 0

    def begin_interval(self):
        self.sums = paddle.zeros([len(self.columns)])
        self.steps = self.images = self.waited = self.worked = 0

    def timed(self, batches):
        """Yield the batches of an epoch, and measure the time spent waiting for them and working on them."""
        self._lap()
        for batch in batches:
            self.waited += self._lap()
            yield batch
            self.worked += self._lap()

    def _lap(self):
        """Return the seconds since the last call."""
        before, self.last = self.last, time.perf_counter()
        return self.last - before

    def add(self, values, broken):
        """Add a step.

        Args:
            values (Tensor): float32 [N, len(columns)]. The values of each image.
            broken (Tensor): int64 [N]. The unreadable files that each image replaces.
        """
        mean = values.mean(axis=0)
        self.sums = self.sums + mean
        self.loss = self.loss + mean[0]
        self.epoch_broken += int(broken.numpy().sum())  # in the host's memory (pinned), also with a GPU
        self.steps += 1
        self.images += len(broken)
        self.epoch_images += len(broken)

    def check(self):
        """Return the Totals. Raise UserError if the loss is not finite or too many files are unreadable."""
        local = [*self.sums.tolist(), float(self.loss), self.epoch_broken, self.epoch_images]
        *interval, loss, broken, images = all_reduce(np.array(local, np.float64)).tolist()
        if not np.isfinite(interval).all():
            raise UserError(
                f"the loss is not finite ({interval[0]}, over the last {self.steps} steps): try a lower --lr"
            )
        tried = images + broken  # a different image replaces each unreadable one
        if broken > self.max_broken * max(tried, 20):  # tolerates a few in very small sets
            share = f"{broken:.0f} of {tried:.0f} images cannot be read"
            raise UserError(f"{share}: more than --max_broken {self.max_broken:g}")
        return Totals(np.array(interval), loss, int(broken), int(images))

    def end_epoch(self, epoch):
        """Return the Totals, and report unreadable files."""
        totals = self.check()
        if totals.broken:
            text = (
                f"{totals.broken} of {totals.images + totals.broken} images could not be read; others took their place"
            )
            on_first(note, f"epoch {epoch}: {text}")
        return totals

    def read(self):
        """Return the means over the interval that ends here, over all processes, and begin the next interval."""
        self.worked += self._lap()
        world, seconds = dist.get_world_size(), self.worked + self.waited
        values = finish(self.columns, self.check().interval / (self.steps * world))
        speed = {"images_per_second": self.images * world / seconds, "waiting": self.waited / seconds}
        self.begin_interval()
        return {**values, **speed}


def finish(columns, means):
    """Return the values that are logged, by name, from the means over the images."""
    return {name: function(mean) for (name, function), mean in zip(columns.items(), means.tolist())}
