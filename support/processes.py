"""Processes that train together, and the signals that stop them."""

import os
import signal
import time
from contextlib import suppress

from support.cli import UserError, handle_signals

import numpy as np
import paddle
import paddle.distributed as dist

AGREE_SECONDS = 1  # between two agreements on whether to stop: after Ctrl-C, a launcher may wait for only 4


def is_first():
    """Return whether this process has rank 0."""
    return dist.get_rank() == 0


def on_first(function, *arguments):
    """Call the function on rank 0 only, and return its result there."""
    return function(*arguments) if is_first() else None


def first_decides(function, *arguments):
    """Call the function on rank 0 only, and return its result on all ranks."""
    result = [on_first(function, *arguments)]
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(result, src=0)
    return result[0]


def all_reduce(values, operation=dist.ReduceOp.SUM):
    """Return the sum (or maximum) of a float64 array over all processes."""
    if dist.get_world_size() == 1:
        return values
    total = paddle.to_tensor(values)
    dist.all_reduce(total, operation)
    return total.numpy()


def _statistics(network):
    """Return batch norm's running means and variances, the tensors of a state dict that are not trained."""
    return [tensor for tensor in network.state_dict().values() if tensor.stop_gradient]


def share_statistics(network):
    """Set the batch norm statistics of all processes to their mean; each process gathers them from its own images."""
    for tensor in _statistics(network):
        mean = all_reduce(tensor.numpy().astype("float64")) / dist.get_world_size()
        tensor.set_value(mean.astype("float32"))


def check_synchronized(network):
    """Raise UserError unless all processes hold the same batch norm statistics, as they should with `SyncBatchNorm`.

    Where Paddle finds no communicator for it, it silently normalizes the images of each process on their own.
    """
    mine = np.concatenate([tensor.numpy() for tensor in _statistics(network)]).astype("float64")
    most = all_reduce(mine, dist.ReduceOp.MAX)
    least = -all_reduce(-mine, dist.ReduceOp.MAX)
    if not np.allclose(most, least, rtol=1e-3, atol=1e-4 * np.abs(most).max()):
        raise UserError("batch norm is not synchronized: its statistics differ between the processes after a step")


class StopRequest:
    """A stop signal, remembered until the end of a step. A second Ctrl-C ends the process immediately.

    The end of the launcher, the parent of several processes, counts as SIGTERM: gloo's launcher dies of that signal
    without passing it on.
    """

    def __init__(self):
        self.launcher = os.getppid() if dist.get_world_size() > 1 else None
        self.noticed = 0  # the signal that this process received
        self.signal = 0  # the signal that all processes agreed to obey
        self.steps, self.pause, self.asked = 0, 1, time.perf_counter()
        self.terminals = [stream for stream in (1, 2) if os.isatty(stream)]
        self.before = handle_signals(self.notice)

    def notice(self, number, _):
        """Remember a signal (the handler of all stop signals)."""
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # but not SIGTERM, which a launcher sends several times
        if number == getattr(signal, "SIGHUP", None):  # writing to the closed terminal would fail
            for stream in self.terminals:
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        if not self.noticed and is_first():
            # Not print, which this signal may have interrupted
            with suppress(OSError):
                os.write(2, b"\nstopping after this step; press Ctrl-C again to stop immediately\n")
        self.noticed = self.noticed or number

    def agreed(self):
        """Return the signal that any process received, or 0; all processes must call this at the same place."""
        if self.launcher and os.getppid() != self.launcher:
            self.noticed = self.noticed or signal.SIGTERM
        self.signal = int(all_reduce(np.array([self.noticed], np.float64), dist.ReduceOp.MAX)[0])
        return self.signal

    def after_step(self):
        """Call `agreed`; with several processes, only about once per second, and return 0 otherwise."""
        if dist.get_world_size() == 1:
            return self.agreed()
        self.steps += 1
        if self.steps < self.pause:
            return 0
        seconds = all_reduce(np.array([time.perf_counter() - self.asked]), dist.ReduceOp.MAX)[0]
        self.pause = max(1, int(AGREE_SECONDS * self.steps / seconds))  # equal in all processes
        self.steps, self.asked = 0, time.perf_counter()
        return self.agreed()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        """Restore the previous signal handlers."""
        for number, handler in self.before.items():
            signal.signal(number, handler)
