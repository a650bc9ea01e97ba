"""Worker processes that read images."""

import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from support.cli import SIGNALS, UserError, note, progress
from support.cpu import available_cores
from support.images import InvalidImageError

import numpy as np
import paddle
import paddle.distributed as dist
from paddle.io import DataLoader

LOST = "a process that reads images was killed or failed (memory or /dev/shm full?); try fewer --num_workers"


def forks():
    """Return whether new processes are copies of this one (Linux); elsewhere each would import Paddle, 300 MB."""
    return multiprocessing.get_start_method() == "fork"


def default_workers():
    """Return the default --num_workers of Paddle's loaders: a worker per core, 0 where Paddle has no workers."""
    return available_cores() if forks() else 0


def begin_worker(_=None):
    """Prepare a worker process so that it ends when its parent ends, and not before.

    Ctrl-C and a launcher's SIGTERM reach a whole group of processes, so a worker leaves the group. Paddle's own watch
    over the parent first waits for work, and `concurrent.futures` has none, so a worker would outlive a killed parent.
    """
    os.setpgrp()
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # drops a signal that came before; see `from_workers`
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    threading.Thread(target=_exit_with, args=(os.getppid(),), daemon=True).start()


def _exit_with(parent):
    """Wait until the parent process has ended, then end this one."""
    while os.getppid() == parent:
        time.sleep(2)
    os._exit(1)


def from_workers(loader, stop=None):
    """Yield a loader's batches. Without workers, this process reads each batch when it is asked for.

    Raises UserError when a worker is lost. With `stop`, a StopRequest, the batches end instead if it has noticed a
    signal, as that signal may have ended the worker, too: the caller has something to save.
    """
    if not loader.num_workers:
        # Paddle's loader would read in a thread, which ends silently at an error, and then wait for it forever.
        for indices in loader.batch_sampler:
            columns = zip(*(loader.dataset[index] for index in indices))
            yield [paddle.to_tensor(np.stack(column), place=paddle.CPUPlace()) for column in columns]
        return
    # A signal would end a worker that has not left the group yet, so it is held back until then.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        iterator = iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        # Paddle's handler would raise an error anywhere in this process, even during a save, once for each worker that
        # ends. Without it, the loader notices within seconds.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield from iterator
    except SystemError as error:
        for worker in multiprocessing.active_children():  # one may wait for a lock that the lost one held
            worker.kill()
        if stop and stop.noticed and dist.get_world_size() == 1:  # several have to take the same steps
            return
        raise UserError(LOST) from error
    finally:
        iterator._try_shutdown_all()  # Paddle's own shutdown of a partly read loader may block at exit


def make_loader(dataset, batches, num_workers):
    """Return a loader, whose workers end with this process; `batches` yields the indices of each batch."""
    return DataLoader(dataset, batch_sampler=batches, num_workers=num_workers, worker_init_fn=begin_worker)


def parallel_map(function, items, num_workers, title):
    """Yield (i, function(items[i])) in order, behind a progress bar.

    Items for which the function raises InvalidImageError are left out and reported on stderr. The work is done by
    `num_workers` processes, or by threads where processes do not fork; 0 takes one thread.
    """
    num_workers = min(num_workers, len(items))
    if num_workers and forks():
        # multiprocessing.Pool would wait forever for a worker that was killed.
        pool = ProcessPoolExecutor(num_workers, initializer=begin_worker)
    else:
        pool = ThreadPoolExecutor(max(1, num_workers))
    tasks = submit(pool, function, items, ahead=8 * max(1, num_workers))
    try:
        for i, task in enumerate(progress(tasks, len(items), title)):
            try:
                result = task.result()
            except InvalidImageError as error:
                note(f"skipped {error}")
            else:
                yield i, result
    except BrokenProcessPool as error:
        raise UserError(LOST) from error
    finally:
        pool.shutdown(cancel_futures=True)


def submit(pool, function, items, ahead, share=lambda item: 0):
    """Yield the future of the function of each item, in order, which may not be done yet.

    Results take memory, so at most `ahead` of them are computed or wait to be used. Of large ones, these are fewer:
    the sum of `share(item)` is at most 1, unless there is only one.
    """
    waiting = deque()
    for item in items:
        part = share(item)
        while waiting and (len(waiting) == ahead or part + sum(other for other, _ in waiting) > 1):
            yield waiting.popleft()[1]
        waiting.append((part, pool.submit(function, item)))
    for _, future in waiting:
        yield future
