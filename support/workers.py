"""Worker processes that read images."""

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
from support.processes import STOP_SIGNALS

import paddle.distributed as dist

# Of workers that are gone `from_workers` tells, in one line; Paddle's loader warns of them as well, by the root logger.
logging.getLogger().addFilter(lambda record: record.module != "dataloader_iter" or record.levelno > logging.WARNING)


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
