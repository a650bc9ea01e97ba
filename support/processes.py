"""Processes that train together, and the signals that stop them."""

import os
import signal
from contextlib import suppress

from support.cli import handle_signals
from support.gpu import on_gpu

import numpy as np
import paddle
import paddle.distributed as dist

GPU_STEPS = 10  # between two agreements on whether to stop, which wait until the GPU has finished its work


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


def share_statistics(network):
    """Set the batch norm statistics of all processes to their mean; each process gathers them from its own images."""
    for tensor in network.state_dict().values():
        if tensor.stop_gradient:  # running means and variances, which are not trained
            mean = all_reduce(tensor.numpy().astype("float64")) / dist.get_world_size()
            tensor.set_value(mean.astype("float32"))


class StopRequest:
    """A stop signal, remembered until the end of a step. A second Ctrl-C ends the process immediately.

    The end of the launcher, the parent of several processes, counts as SIGTERM: gloo's launcher dies of that signal
    without passing it on.
    """

    def __init__(self):
        self.launcher = os.getppid() if dist.get_world_size() > 1 else None
        self.noticed = 0  # the signal that this process received
        self.signal = 0  # the signal that all processes agreed to obey
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
                os.write(2, b"\nstopping and saving; press Ctrl-C again to stop immediately\n")
        self.noticed = self.noticed or number

    def agreed(self):
        """Return the signal that any process received, or 0; all processes must call this at the same place."""
        if self.launcher and os.getppid() != self.launcher:
            self.noticed = self.noticed or signal.SIGTERM
        self.signal = int(all_reduce(np.array([self.noticed], np.float64), dist.ReduceOp.MAX)[0])
        return self.signal

    def after_step(self, step):
        """Call `agreed`, on GPUs only after some of the steps; return 0 after the others."""
        return 0 if on_gpu() and step % GPU_STEPS else self.agreed()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        """Restore the previous signal handlers."""
        for number, handler in self.before.items():
            signal.signal(number, handler)
