"""The log of a training run, on the terminal, in JSON lines and in VisualDL, and the values that it shows."""

import json
import os
import sys
import tempfile
import time
from contextlib import redirect_stdout, suppress
from pathlib import Path

from support.cli import UserError, counted, note, report_os_errors
from support.files import atomic_text
from support.processes import all_reduce, is_first

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
    """

    def __init__(self, folder, formats):
        self.folder, self.formats = Path(folder), formats
        self.problem = f"{folder}: the log cannot be written"
        self.run, self.waiting, self.file, self.board = None, [], None, None

    def open(self, run, progress):
        """Begin to write the lines of a run, if that has not happened yet.

        Earlier lines of the same run stay up to the step of its progress, and those of validations up to the step that
        was validated last. Later ones, which exist if the run was killed after its last save or resumes at an earlier
        epoch, are moved to another file. VisualDL shows only the file of a folder whose name sorts last, so a new file
        begins with the values (not the images) of the lines that stay. Raises UserError if the log is another run's.
        """
        if self.file or not is_first():
            return
        path, stay, later = self.folder / LINES, [], []
        for values in read_log(path):
            if values.get("run") != run:
                raise UserError(f"{self.folder}: the log of another run; choose another --log_path")
            last = "validated" if any(name.startswith(VAL) for name in values) else "step"
            part = stay if values["step"] <= progress[last] else later
            part.append(values)
        lines = stay + [{"run": run, **values} for values in self.waiting]
        with report_os_errors(self.problem):
            if later:
                with open(self.folder / REPLACED, "a") as file:
                    file.writelines(map(_json_line, later))
                note(f"{path}: {counted(len(later), 'line')} after step {progress['step']} moved to {REPLACED}")
            with atomic_text(path) as file:
                file.writelines(map(_json_line, lines))
            self.run, self.file = run, open(path, "a", buffering=1)  # noqa: SIM115  by lines
            numbers = [int(path.name.split(".")[1]) for path in self.folder.glob("vdlrecords.[0-9]*.log")]
            name = f"vdlrecords.{max(numbers, default=10**9) + 1}.log"
            with redirect_stdout(None):
                LogWriter = _import_visualdl()  # noqa: N806
                self.board = LogWriter(logdir=str(self.folder), file_name=name)
            for values in lines:
                self._show(values)

    def write(self, values):
        """Print a dict of values, which includes "step", and write it to train.jsonl and VisualDL."""
        if not is_first():
            return
        formatted = (f"{name} {value:{self.formats[name.removeprefix(VAL)]}}" for name, value in values.items())
        tqdm.write("  ".join(formatted))
        sys.stdout.flush()  # for a user who follows a file
        if not self.file:
            self.waiting.append(values)
            return
        with report_os_errors(self.problem):
            self.file.write(_json_line({"run": self.run, **values}))
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


def _json_line(values):
    return json.dumps(values, allow_nan=False) + "\n"


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


class Meter:
    """Sums of each step's values, on the device, because reading them in every step would wait for it.

    An interval ends at a line of the log. The time between two epochs, in which the network is validated and saved,
    does not count.

    Args:
        columns (dict): Names of the values, and a function of the mean of each over the images. The first is the loss.
        batch_size (int): Images per step, over all processes.
        max_broken (float): Largest share of the files read so far that may be unreadable.
    """

    def __init__(self, columns, batch_size, max_broken):
        self.columns, self.batch_size, self.max_broken = columns, batch_size, max_broken
        self.images = self.broken = 0  # so far
        self.learned = False  # whether the loss of any image was not 0, until the last `check`
        self.last = time.perf_counter()
        self._begin_interval()

    def _begin_interval(self):
        self.sums = paddle.zeros([len(self.columns)])
        self.steps = self.waited = self.worked = 0

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
        self.sums = self.sums + values.mean(axis=0)
        self.broken += int(broken.numpy().sum())  # in the host's memory (pinned), also with a GPU
        self.images += self.batch_size
        self.steps += 1

    def check(self):
        """Return the sums over this interval and all processes, float64 [len(columns)].

        Raises UserError if the loss is not finite or too many files are unreadable.
        """
        totals = all_reduce(np.array([*self.sums.tolist(), self.broken], np.float64))
        sums, broken = totals[:-1], int(totals[-1])
        if not np.isfinite(sums).all():
            raise UserError(f"the loss is not finite ({sums[0]}, over the last {self.steps} steps): try a lower --lr")
        tried = self.images + broken  # a different image replaces each unreadable one
        if broken > self.max_broken * max(tried, 20):  # tolerates a few in very small sets
            problem = f"{broken} of {tried} images cannot be read"
            raise UserError(f"{problem}: more than --max_broken {self.max_broken:g}")
        self.learned = self.learned or sums[0] > 0
        return sums

    def read(self):
        """Return the means over the interval that ends here, over all processes, and begin the next interval."""
        self.worked += self._lap()
        seconds = self.worked + self.waited
        values = finish(self.columns, self.check() / (self.steps * dist.get_world_size()))
        speed = {"images_per_second": self.steps * self.batch_size / seconds, "waiting": self.waited / seconds}
        self._begin_interval()
        return {**values, **speed}


def finish(columns, means):
    """Return the values that are logged, by name, from the means over the images."""
    return {name: function(mean) for (name, function), mean in zip(columns.items(), means.tolist())}
