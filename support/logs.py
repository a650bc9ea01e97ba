"""The log of a training run: lines on the terminal, JSON lines, and VisualDL."""

import json
import os
import sys
import tempfile
import time
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path

from support.cli import UserError, note
from support.files import atomic_path
from support.processes import all_reduce, is_first

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

    def __init__(self, folder, tags, last=(0, False)):
        self.folder, self.tags, self.file = folder, tags, None
        if not is_first():
            return
        LogWriter = _import_visualdl()  # noqa: N806
        path = Path(folder) / "train.jsonl"
        with self._one_line():
            before = [values for values in read_log(path) if _place(values) <= last]
            with atomic_path(path) as temporary:
                temporary.write_text("".join(json.dumps(values) + "\n" for values in before))
            self.file = open(path, "a")  # noqa: SIM115
            with redirect_stdout(None):
                self.board = LogWriter(logdir=str(folder), file_name=f"vdlrecords.{time.time_ns()}.log")
            for values in before:
                self._show(values)

    @contextmanager
    def _one_line(self):
        """Report a full disk or a folder that is not writable on one line."""
        try:
            yield
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise UserError(f"{self.folder}: the log cannot be written: {reason}") from error

    def write(self, line, values):
        """Print a line, and write its values (a dict with "step") to train.jsonl and VisualDL."""
        if self.file is None:
            return
        tqdm.write(line)
        sys.stdout.flush()  # for a user who follows a file
        with self._one_line():
            self.file.write(json.dumps(values) + "\n")
            self.file.flush()
            self._show(values)

    def _show(self, values):
        for name, tag in self.tags.items():
            if name in values:
                self.board.add_scalar(tag, values[name], values["step"])

    def picture(self, tag, image, step):
        if self.file is not None and image is not None:
            self.board.add_image(tag, image, step)

    def close(self):
        if self.file is not None:
            with suppress(OSError):  # `write` has reported it
                self.file.close()
                self.board.close()


def _import_visualdl():
    """Import VisualDL, which fails without a writable home directory (as in a container run for another user)."""
    home = os.path.expanduser("~")
    with tempfile.TemporaryDirectory() as temporary:
        os.environ["HOME"] = home if os.access(home, os.W_OK) else temporary
        from visualdl import LogWriter
    os.environ["HOME"] = home
    return LogWriter


def read_log(path):
    """Return the values of each line of a train.jsonl, up to a line that a kill cut off; [] without a file."""
    lines = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines


def _place(values):
    """Return the step of a line, and whether the line is from the validation after that step."""
    return values["step"], any(name.startswith("val_") for name in values)


class Meter:
    """Sums of each step's values, kept on the device, because reading them would wait for it in every step.

    `names` are those of the values; the first is the loss. Time between epochs does not count.
    """

    def __init__(self, *names):
        self.names = names
        self.begin_interval()
        self.begin_epoch()

    def begin_epoch(self):
        self.broken = self.seen = self.epoch_loss = 0
        self.began = time.perf_counter() - self.elapsed

    def begin_interval(self):
        self.sums = self.steps = self.images = self.waited = self.elapsed = 0
        self.began = time.perf_counter()

    def add(self, values, broken):
        """Add a step: `values`, a tensor [len(names)], and `broken`, int64 [N], the unreadable files per image."""
        self.sums = self.sums + values
        self.epoch_loss = self.epoch_loss + values[0]
        self.broken += int(broken.numpy().sum())  # in the host's memory (pinned), also with a GPU
        self.steps += 1
        self.images += len(broken)
        self.seen += len(broken)

    def timed(self, batches):
        """Yield the batches and add up the time spent waiting for them."""
        start = time.perf_counter()
        for batch in batches:
            self.waited += time.perf_counter() - start
            yield batch
            start = time.perf_counter()

    def check(self, max_broken):
        """Return sums over all processes. Raise UserError for a loss that is not finite or too many broken images."""
        sums = self.sums + paddle.zeros([len(self.names)])  # also before the first step
        local = [*sums.tolist(), float(self.epoch_loss), self.broken, self.seen]
        *sums, epoch_loss, broken, seen = all_reduce(np.array(local, np.float64)).tolist()
        tried = seen + broken  # a different image replaces each unreadable one
        if not np.isfinite(sums[0]):
            raise UserError(f"the loss is not finite ({sums[0]}, over the last {self.steps} steps): try a lower --lr")
        if broken > max_broken * max(tried, 20):  # tolerates a few in very small sets
            raise UserError(f"{broken:.0f} of {tried:.0f} images cannot be read: more than --max_broken {max_broken:g}")
        return sums, epoch_loss, int(broken), int(seen)

    def end_epoch(self, epoch, max_broken):
        """Return the sum of the losses since `begin_epoch`, and the number of images, over all processes."""
        _, loss, broken, seen = self.check(max_broken)
        if broken and is_first():
            note(f"epoch {epoch}: {broken} of {seen + broken} images could not be read; others took their place")
        self.elapsed = time.perf_counter() - self.began
        return loss, seen

    def read(self, max_broken):
        """Return the means over the interval that ends here, over all processes, and begin the next interval."""
        sums, *_ = self.check(max_broken)
        world, seconds = dist.get_world_size(), time.perf_counter() - self.began
        means = {name: x / (self.steps * world) for name, x in zip(self.names, sums)}
        means.update(images_per_second=self.images * world / seconds, waiting=self.waited / seconds)
        self.begin_interval()
        return means
