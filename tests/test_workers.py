"""Processes and threads that read images."""

import multiprocessing
import os
import shutil
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

from support.images import InvalidImageError
from support.workers import default_workers, from_workers, parallel_map, submit

import numpy as np
import paddle
import pytest
from processes import LIMIT, has_ended, start_training, steps_done, wait_for

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals")


@pytest.mark.slow
def test_workers_end_with_a_killed_run(tmp_path, square_crops):
    with start_training(tmp_path, square_crops, "--num_workers", 2, "--batch_size", 1) as process:
        wait_for(lambda: steps_done(tmp_path) > 2 and len(process.family()) >= 3, process)
        process.send_signal(signal.SIGSTOP)  # so that it starts no new workers
        family = process.family()
        process.kill()
        wait_for(lambda: all(has_ended(pid) for pid in family))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGBUS])
def test_killed_worker_stops_the_run_with_advice(tmp_path, square_crops, number):
    """The kernel kills one with SIGKILL when memory runs out, with SIGBUS when /dev/shm is full.

    This happens before the last batches of an epoch. Later a lost worker does no harm, as the next epoch has new ones.
    """
    for i in range(500):  # an epoch of half a minute
        shutil.copytree(square_crops, tmp_path / "images" / str(i))
    with start_training(tmp_path, tmp_path / "images", "--batch_size", 1, "--num_workers", 2) as process:
        wait_for(lambda: steps_done(tmp_path) > 2, process)
        for pid in process.family() - {process.pid}:
            os.kill(pid, number)
        assert process.wait(LIMIT) == 1
    message = (tmp_path / "err").read_text()
    advice = "try fewer --num_workers; --continue_train resumes from the last save\n"
    assert "images was killed or failed" in message and message.endswith(advice)
    assert "Traceback (most recent" not in message


class FailingDataset(paddle.io.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        return np.full(2, 12 // (4 - index), np.uint8), np.int64(index)


def test_batches_without_workers_are_read_one_by_one_and_errors_are_raised():
    """Paddle's loader would wait forever after an error."""
    batches = from_workers(paddle.io.DataLoader(FailingDataset(), batch_size=2, num_workers=0))
    assert [[x.tolist() for x in next(batches)] for _ in range(2)] == [
        [[[3, 3], [4, 4]], [0, 1]],
        [[[6, 6], [12, 12]], [2, 3]],
    ]
    with pytest.raises(ZeroDivisionError):
        next(batches)


def thread_and_process(_):
    return threading.current_thread().name, os.getpid(), os.getpgrp()


def test_parallel_map_uses_threads_where_processes_do_not_fork(monkeypatch):
    monkeypatch.setattr(multiprocessing, "get_start_method", lambda: "spawn")
    results = list(parallel_map(thread_and_process, [1, 2, 3], 2, None))
    assert [i for i, _ in results] == [0, 1, 2]
    assert all("Thread" in name and pid == os.getpid() for _, (name, pid, _) in results)
    assert default_workers() == 0


def test_parallel_map_uses_processes_where_they_fork():
    """They have left the group of this one, so that Ctrl-C does not reach them."""
    results = [result for _, result in parallel_map(thread_and_process, [1, 2, 3], 2, None)]
    assert all(pid != os.getpid() and group == pid for _, pid, group in results)


def read_even(number):
    if number % 2:
        raise InvalidImageError(f"{number}.png", "odd")
    return number // 2


@pytest.mark.parametrize("num_workers", [0, 2])
def test_parallel_map_reports_unreadable_images_and_leaves_them_out(capsys, num_workers):
    assert list(parallel_map(read_even, [0, 1, 2, 3, 4], num_workers, None)) == [(0, 0), (2, 1), (4, 2)]
    assert capsys.readouterr().err.splitlines() == ["skipped 1.png: odd", "skipped 3.png: odd"]


@pytest.mark.parametrize(("share", "most"), [(0, 8), (0.25, 4), (3, 1)])
def test_limited_number_and_share_of_results_wait_to_be_used(share, most):
    """The results of all images might not fit into memory."""
    drawn = []

    def items():
        for i in range(20):
            drawn.append(i)
            yield i

    with ThreadPoolExecutor(1) as pool:
        for i, future in enumerate(submit(pool, int, items(), ahead=8, share=lambda _: share)):
            assert future.result() == i and len(drawn) - i <= most + 1
