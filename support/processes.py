"""Several processes: those that train together, those that read images, and signals to them."""

import logging
import multiprocessing
import os
import signal
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial

from support.cli import UserError, progress

import numpy as np
import paddle
import paddle.distributed as dist

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
ASK_SECONDS = 1  # between two questions among the processes whether to stop: after Ctrl-C a launcher may give them 4
# Of workers that are gone `from_workers` tells, in one line; Paddle's loader warns of them as well, by the root logger.
logging.getLogger().addFilter(lambda record: record.module != "dataloader_iter" or record.levelno > logging.WARNING)


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


def begin_worker(_):
    """In a process that reads images: it ends when its parent does, whatever ends that, and not before.

    Ctrl-C and a launcher's SIGTERM reach a whole group of processes, which a worker therefore leaves. Paddle's own
    watch over the parent waits for work first, so that a worker would outlive a parent that was killed.
    """
    os.setpgrp()
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # forgets one that came before it left; see `from_workers`
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    threading.Thread(target=leave_with, args=(os.getppid(),), daemon=True).start()


def leave_with(parent):
    while os.getppid() == parent:
        time.sleep(2)
    os._exit(1)


def from_workers(loader, stop=None):
    """What the loader yields. Raises UserError when a process that reads images is gone.

    Not when `stop`, a training's StopRequest, has heard of a signal: that may be what ended it, and there is something
    to save.
    """
    # A worker that has not left the group yet would die of a signal: until then it has none.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        iterator = iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    # Paddle would raise an error wherever this process is, once for each worker that ends, also amid a save. Without
    # that it notices in some seconds, here.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield from iterator
    except SystemError as error:
        for worker in multiprocessing.active_children():  # one may wait for a lock that the dead one held
            worker.kill()
        if stop and stop.noticed and dist.get_world_size() == 1:  # several have to take the same steps
            return
        advice = "go on with --continue_train, perhaps with fewer --num_workers" if stop else "try fewer --num_workers"
        raise UserError(
            "a process that reads images was killed or failed "
            f"(too little memory, or too little in /dev/shm?); {advice}"
        ) from error
    finally:
        iterator._try_shutdown_all()  # left to Paddle, one that was not read to its end could hang at the exit


def parallel_map(function, items, num_workers, title, setup=None):
    """Yields function(item) of each item, in order, from worker processes (0: from this one), behind a progress bar.

    `setup`: a function and its arguments, called once in each process. The place for what is too large to be sent
    with every item; where processes are forked (Linux) it is not even copied.
    """
    bar = partial(progress, total=len(items), title=title)
    num_workers = min(num_workers, len(items))
    if num_workers == 0:
        if setup:
            setup[0](*setup[1:])
        yield from bar(map(function, items))
        return
    # Not multiprocessing.Pool: that one waits forever for a worker that was killed.
    pool = ProcessPoolExecutor(num_workers, initializer=_start_worker, initargs=(setup,))
    try:
        yield from bar(pool.map(function, items, chunksize=8))
    except BrokenProcessPool as error:
        time.sleep(0.5)  # a signal that was sent to all of the processes reaches this one, too, and says more
        raise UserError("a worker process was killed, perhaps for lack of memory: try fewer --num_workers") from error
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker(setup):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # which may end this one so, without its parent's words
    if setup:
        setup[0](*setup[1:])
