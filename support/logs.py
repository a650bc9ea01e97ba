"""The log of a training run, on the terminal, in JSON lines and in VisualDL, and the values that it shows."""

import json
import os
import sys
import tempfile
import time
from contextlib import redirect_stdout, suppress
from pathlib import Path

from support.cli import UserError, note, report_os_errors
from support.files import atomic_text
from support.processes import all_reduce, is_first, on_first
from support.sheets import tile

import numpy as np
import paddle
import paddle.distributed as dist
from tqdm import tqdm


class Log:
    """Lines on the terminal, JSON lines and VisualDL, all written by rank 0.

    `tags` are VisualDL's names of the values, {name: tag}. When a run is resumed, lines of the log up to `last` (step,
    whether its validation is done) stay. Later lines exist if the run was killed after its last save. VisualDL shows
    only the latest file of a folder, so a new file begins with the values (not the images) of the lines that stay.
    """

    def __init__(self, folder, tags, last):
        self.tags, self.problem = tags, f"{folder}: the log cannot be written"
        if not is_first():
            self.write = self.pictures = self.close = lambda *_: None
            return
        LogWriter = _import_visualdl()  # noqa: N806
        path = Path(folder) / "train.jsonl"
        with report_os_errors(self.problem):
            before = [values for values in read_log(path) if _step_and_stage(values) <= last]
            with atomic_text(path) as file:
                file.writelines(json.dumps(values) + "\n" for values in before)
            self.file = open(path, "a", buffering=1)  # noqa: SIM115  by lines
            with redirect_stdout(None):
                self.board = LogWriter(logdir=str(folder), file_name=f"vdlrecords.{time.time_ns()}.log")
            for values in before:
                self._show(values)

    def write(self, line, values):
        """Print a line, and write its values (a dict with "step") to train.jsonl and VisualDL."""
        tqdm.write(line)
        sys.stdout.flush()  # for a user who follows a file
        with report_os_errors(self.problem):
            self.file.write(json.dumps(values) + "\n")
            self._show(values)

    def _show(self, values):
        for name, tag in self.tags.items():
            if name in values:
                self.board.add_scalar(tag, values[name], values["step"])

    def pictures(self, tag, panel, step):
        """Show images of one size, uint8 [H, W, 3], as one picture in VisualDL."""
        if len(panel):
            self.board.add_image(tag, tile(panel), step)

    def close(self):
        with suppress(OSError):  # `write` has reported it
            self.file.close()
            self.board.close()


def _import_visualdl():
    """Import VisualDL with a temporary home directory, to which it writes; the real one may be read-only."""
    home = os.path.expanduser("~")
    with tempfile.TemporaryDirectory() as os.environ["HOME"]:
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


def _step_and_stage(values):
    """Return the step of a line, and whether the line is from the validation after that step."""
    return values["step"], any(name.startswith("val_") for name in values)


class Meter:
    """Sums of each step's values, on the device, because reading them in every step would wait for it.

    `names` are the names of the values; the first is the loss. An interval ends at a line of the log. The time between
    two epochs, in which the network is validated and saved, does not count.
    """

    def __init__(self, *names):
        self.names, self.last = names, time.perf_counter()
        self.begin_interval()
        self.begin_epoch()

    def begin_epoch(self):
        self.broken = self.seen = 0
        self.loss = paddle.zeros([1])

    def begin_interval(self):
        self.sums = paddle.zeros([len(self.names)])
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
        """Add a step: `values`, a tensor [len(names)], and `broken`, int64 [N], the unreadable files per image."""
        self.sums = self.sums + values
        self.loss = self.loss + values[:1]
        self.broken += int(broken.numpy().sum())  # in the host's memory (pinned), also with a GPU
        self.steps += 1
        self.images += len(broken)
        self.seen += len(broken)

    def check(self, max_broken):
        """Return sums over all processes: the interval's values, and the epoch's loss, unreadable files and images.

        Raises UserError if the loss is not finite or the share of unreadable files exceeds `max_broken`.
        """
        local = [*self.sums.tolist(), *self.loss.tolist(), self.broken, self.seen]
        loss, *_, broken, seen = sums = all_reduce(np.array(local, np.float64)).tolist()
        tried = seen + broken  # a different image replaces each unreadable one
        if not np.isfinite(loss):
            raise UserError(f"the loss is not finite ({loss}, over the last {self.steps} steps): try a lower --lr")
        if broken > max_broken * max(tried, 20):  # tolerates a few in very small sets
            raise UserError(f"{broken:.0f} of {tried:.0f} images cannot be read: more than --max_broken {max_broken:g}")
        return sums

    def end_epoch(self, epoch, max_broken):
        """Return the sum of the losses since `begin_epoch`, and the number of images, over all processes."""
        *_, loss, broken, seen = self.check(max_broken)
        if broken:
            text = f"{broken:.0f} of {seen + broken:.0f} images could not be read; others took their place"
            on_first(note, f"epoch {epoch}: {text}")
        return loss, seen

    def read(self, max_broken):
        """Return the means over the interval that ends here, over all processes, and begin the next interval."""
        self.worked += self._lap()
        world, seconds = dist.get_world_size(), self.worked + self.waited
        means = {name: x / (self.steps * world) for name, x in zip(self.names, self.check(max_broken))}
        means.update(images_per_second=self.images * world / seconds, waiting=self.waited / seconds)
        self.begin_interval()
        return means
