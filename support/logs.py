"""A run's log: lines on the terminal, JSON lines, and VisualDL."""

import json
import math
import os
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
    """Lines on the terminal, JSON lines and VisualDL; of the first process, silent in the others.

    `tags`: what VisualDL calls the figures, {name: tag}. Of an earlier run in the folder the lines up to the place
    `last` stay, (steps done, whether validated since); those beyond it are there when that run was killed. VisualDL
    shows only the latest file of a folder, so a new one begins with what the kept lines hold (but pictures).
    """

    def __init__(self, folder, tags, last=(0, False)):
        self.folder, self.tags, self.file = folder, tags, None
        if not is_first():
            return
        LogWriter = _import_visualdl()  # noqa: N806
        path = Path(folder) / "train.jsonl"
        with self._one_line():
            before = [figures for figures in read_log(path) if _place(figures) <= last] if last[0] else []
            with atomic_path(path) as temporary:
                temporary.write_text("".join(json.dumps(figures) + "\n" for figures in before))
            self.file = open(path, "a")  # noqa: SIM115
            with redirect_stdout(None):
                self.board = LogWriter(logdir=str(folder), file_name=f"vdlrecords.{time.time_ns()}.log")
            for figures in before:
                self._show(figures)

    @contextmanager
    def _one_line(self):
        """A full disk or a folder that is not writable: what went wrong in one line."""
        try:
            yield
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise UserError(f"{self.folder}: the log cannot be written: {reason}") from error

    def write(self, line, figures):
        """The line on the terminal, the figures (a dict with "step") in train.jsonl and on the board."""
        if self.file is None:
            return
        tqdm.write(line)
        with self._one_line():
            self.file.write(json.dumps(figures) + "\n")
            self.file.flush()
            self._show(figures)

    def _show(self, figures):
        for name, tag in self.tags.items():
            if name in figures:
                self.board.add_scalar(tag, figures[name], figures["step"])

    def picture(self, tag, image, step):
        if self.file is not None and image is not None:
            self.board.add_image(tag, image, step)

    def close(self):
        if self.file is not None:
            with suppress(OSError):  # told already, when it was written
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
    """The figures of each line of a train.jsonl; none if it is not there. What a kill cut off ends them."""
    lines = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines


def _place(figures):
    """Of a line: its step, and whether it comes after that step, from a validation."""
    return figures["step"], any(name.startswith("val_") for name in figures)


class Meter:
    """Sums of the steps' figures, kept on the device: reading them there would make it wait in every step.

    `names`: of the figures, the first is the loss.
    """

    def __init__(self, *names):
        self.names = names
        self.begin_epoch()
        self.begin_interval()

    def begin_epoch(self):
        self.broken, self.seen = 0, 0

    def begin_interval(self):
        self.sums, self.steps, self.images, self.waited, self.began = 0, 0, 0, 0.0, time.perf_counter()

    def add(self, figures, broken):
        """`figures`: of a step, a tensor [len(names)]; `broken`: int64 [N], files that failed, for each image."""
        self.sums = self.sums + figures
        self.broken += int(broken.numpy().sum())  # in the host's memory, also on a GPU: pinned
        self.steps += 1
        self.images += len(broken)
        self.seen += len(broken)

    def timed(self, batches):
        """The batches, with the time spent waiting for them added up."""
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            self.waited += time.perf_counter() - start
            if batch is None:
                return
            yield batch

    def check(self, max_broken):
        """Raises UserError for a loss that is not finite and for too many broken images, over all processes."""
        local = [*np.asarray(self.sums + paddle.zeros([len(self.names)])), self.broken, self.seen]
        *sums, broken, seen = all_reduce(np.array(local, np.float64)).tolist()
        tried = seen + broken  # a broken image is replaced by another one
        if not math.isfinite(sums[0]):
            raise UserError(
                f"the loss is not finite ({sums[0]}, over the last {self.steps} steps): try a lower --lr, "
                "or go on from the last checkpoint with --continue_train"
            )
        if broken > max_broken * max(tried, 20):  # a few are let pass in the smallest sets
            raise UserError(f"{broken:.0f} of {tried:.0f} images cannot be read: more than --max_broken {max_broken:g}")
        return sums, int(broken), int(tried)

    def end_epoch(self, epoch, max_broken):
        _, broken, tried = self.check(max_broken)
        if broken and is_first():
            note(f"epoch {epoch}: {broken} of {tried} images could not be read; others took their place")

    def read(self, max_broken):
        """The means of the interval that ends here, over all processes."""
        sums, _, _ = self.check(max_broken)
        world, seconds = dist.get_world_size(), time.perf_counter() - self.began
        figures = {name: x / (self.steps * world) for name, x in zip(self.names, sums)}
        figures.update(images_per_second=self.images * world / seconds, waiting=self.waited / seconds)
        self.begin_interval()
        return figures
