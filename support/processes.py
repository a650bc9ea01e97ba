"""Processes that train together, and the signals that stop them."""

import os
import signal
import time

from support.cli import UserError

import numpy as np
import paddle
import paddle.distributed as dist

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
ASK_SECONDS = 1  # between two questions among the processes whether to stop: after Ctrl-C a launcher may give them 4


def is_first():
    return dist.get_rank() == 0


def first_decides(function, *arguments):
    """What the function returns in the first process, for all of them: they need to agree, and one has the work."""
    result = [function(*arguments) if is_first() else None]
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(result, src=0)
    return result[0]


def all_reduce(values, operation=dist.ReduceOp.SUM):
    """The sum (or maximum) of a float64 array over the processes."""
    if dist.get_world_size() == 1:
        return values
    total = paddle.to_tensor(values)
    dist.all_reduce(total, operation)
    return total.numpy()


@paddle.no_grad()
def share_statistics(network):
    """Gives all processes the mean of their batch norm statistics, which each gathers from its own images."""
    if dist.get_world_size() > 1:
        for tensor in network.state_dict().values():
            if tensor.stop_gradient:  # a statistic, not a weight
                dist.all_reduce(tensor)
                tensor.set_value(tensor / dist.get_world_size())


def check_synchronized(network):
    """Raises UserError unless all processes hold the same batch norm statistics, as `SyncBatchNorm` must leave them.

    Where Paddle finds no communicator for it, it normalizes each process's images by themselves without a word.
    """
    mine = np.concatenate([x.numpy().ravel() for x in network.state_dict().values() if x.stop_gradient]).astype(
        "float64"
    )
    most, least = (sign * all_reduce(sign * mine, dist.ReduceOp.MAX) for sign in (1, -1))
    if not np.allclose(most, least, rtol=1e-3, atol=1e-4 * np.abs(most).max()):
        raise UserError("--sync_bn: the processes' statistics differ after a step: batch norm is not synchronized here")


class StopRequest:
    """SIGTERM or Ctrl-C: noted here, obeyed between two steps. A second Ctrl-C leaves at once.

    So is the end of the launcher, which of several processes is the parent: one kind of it (that of gloo) has no
    ear for SIGTERM and dies without a word to them.
    """

    def __init__(self):
        self.launcher = os.getppid() if dist.get_world_size() > 1 else None
        self.noticed = 0  # by this process
        self.signal = 0  # that all processes agreed to obey
        self.steps, self.pause, self.asked = 0, 1, time.perf_counter()
        self.before = {number: signal.signal(number, self.notice) for number in STOP_SIGNALS}

    def notice(self, number, _):
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # but not SIGTERM: a launcher sends it several times
        if not self.noticed and is_first():
            # Not by print: the signal may have come amid one.
            os.write(2, b"\nstopping after this step; Ctrl-C once more leaves at once\n")
        self.noticed = self.noticed or number

    def agreed(self):
        """The signal that any of the processes was sent, or 0; to be asked by all of them at the same place."""
        if self.launcher and os.getppid() != self.launcher:
            self.noticed = self.noticed or signal.SIGTERM
        self.signal = int(all_reduce(np.array([self.noticed], np.float64), dist.ReduceOp.MAX)[0])
        return self.signal

    def after_step(self):
        """`agreed`, but several processes in fact ask each other every second or so only."""
        if dist.get_world_size() == 1:
            return self.agreed()
        self.steps += 1
        if self.steps < self.pause:
            return 0
        now = time.perf_counter()
        seconds = all_reduce(np.array([now - self.asked]), dist.ReduceOp.MAX)[0]
        self.pause = max(1, int(ASK_SECONDS * self.steps / seconds))  # the same in all processes, as it must be
        self.steps, self.asked = 0, now
        return self.agreed()

    def restore(self):
        for number, handler in self.before.items():
            signal.signal(number, handler)
