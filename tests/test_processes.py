"""Several processes (`paddle.distributed.launch` with gloo on the CPU) train as one does, and signals stop a run."""

import contextlib
import os
import pty
import random
import shutil
import signal
import sys
import time
from pathlib import Path

from support.processes import StopRequest

import numpy as np
import paddle
import pytest
from conftest import change_loss
from processes import (
    LIMIT,
    SMALL,
    has_ended,
    launcher_flags,
    reset_signals,
    run_training_to_end,
    start_training,
    state,
    steps_done,
    train_flags,
    values,
    wait_for,
    weights,
)

import train

pytestmark = [pytest.mark.usefixtures("small_network"), pytest.mark.skipif(os.name == "nt", reason="gloo")]


def compare(one, two):
    """Compare the logs and weights of two runs."""
    lines = [values(folder) for folder in (one, two)]
    assert [line["step"] for line in lines[0]] == [line["step"] for line in lines[1]]
    for a, b in zip(*lines):
        assert a == pytest.approx(b, rel=1e-4)
    for name, value in weights(one).items():
        np.testing.assert_allclose(weights(two)[name], value, rtol=1e-3, atol=1e-5, err_msg=name)


@pytest.mark.slow
def test_two_processes_equal_one_with_the_same_batch(tmp_path, image_folder, square_crops):
    """Losses, weights, and a validation of three images, then of one. Batch norm's statistics are per process."""
    for name, count in (("three", 3), ("single", 1)):
        (tmp_path / name).mkdir()
        for path in sorted(image_folder.iterdir())[:count]:
            shutil.copy(path, tmp_path / name)
    more = ["--freeze_bn", "--lr", 1e-3, "--save_freq", 2]
    one, two = tmp_path / "one", tmp_path / "two"
    for folder, launcher in ((one, ()), (two, launcher_flags(2, two))):
        flags = [*more, "--val_dir", tmp_path / "three", "--num_epochs", 5]
        assert run_training_to_end(folder, square_crops, *flags, launcher=launcher)[0] == 0
    compare(one, two)
    names = [sorted(path.name for path in (folder / "model").iterdir()) for folder in (one, two)]
    assert names[0] == names[1]
    assert len(list((two / "log").glob("vdlrecords*"))) == 1  # only rank 0 writes
    assert (two / "out").read_text().count("val_kl") == 5
    # A run can be resumed with another number of processes, and the images stay the same.
    for folder, launcher in ((one, launcher_flags(2, one)), (two, ())):
        flags = [*more, "--val_dir", tmp_path / "single", "--num_epochs", 7, "--continue_train"]
        assert run_training_to_end(folder, square_crops, *flags, launcher=launcher)[0] == 0
    compare(one, two)


@pytest.mark.slow
def test_statistics_of_batch_norm_are_averaged_over_the_processes(tmp_path, square_crops):
    """Each process has half of the images; the learning rate is almost 0."""
    more = ["--max_steps", 1, "--lr", 1e-30, "--weight_decay", 0]
    one, two = tmp_path / "one", tmp_path / "two"
    assert run_training_to_end(one, square_crops, *more)[0] == 0
    assert run_training_to_end(two, square_crops, *more, launcher=launcher_flags(2, two))[0] == 0
    # The first batch norm's mean is linear in the images.
    np.testing.assert_allclose(weights(one)["down.0.2._mean"], weights(two)["down.0.2._mean"], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_to_the_launcher_saves_the_run(tmp_path, square_crops, number):
    with start_training(tmp_path, square_crops, "--num_workers", 1, launcher=launcher_flags(2, tmp_path)) as process:
        wait_for(lambda: steps_done(tmp_path) > 5, process)
        family = process.family()
        process.send_signal(number)
        process.wait(LIMIT)
        wait_for(lambda: all(has_ended(pid) for pid in family))
    assert state(tmp_path)["progress"]["step"] == steps_done(tmp_path)


@pytest.mark.slow
def test_lost_process_ends_the_others(tmp_path, square_crops):
    with start_training(tmp_path, square_crops, launcher=launcher_flags(2, tmp_path)) as process:
        wait_for(lambda: steps_done(tmp_path) > 2, process)
        family = process.family()
        (lost,) = (pid for pid in family if b"PADDLE_TRAINER_ID=1" in Path(f"/proc/{pid}/environ").read_bytes())
        os.kill(lost, signal.SIGKILL)
        assert process.wait(LIMIT) != 0
        wait_for(lambda: all(has_ended(pid) for pid in family))


def test_processes_agree_after_the_same_steps(monkeypatch, pretend_device):
    """Which ones follows from the step's number alone. On a GPU, agreeing waits for the device."""
    asked = []
    monkeypatch.setattr(StopRequest, "agreed", lambda _: asked.append(1) or 0)
    with StopRequest() as stop:
        for device, count in (("cpu", 40), ("gpu:0", 4)):
            pretend_device(device, 8, 0)
            asked.clear()
            assert not any(stop.after_step(step) for step in range(1, 41)) and len(asked) == count


# Signals


@pytest.mark.slow
def test_signal_at_any_moment_loses_no_step(tmp_path, square_crops):
    """A terminal or a launcher sends it to the whole group of processes; workers may just be starting."""
    moment, resume = random.Random(0), []
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2) * 3:
        before = steps_done(tmp_path)
        with start_training(tmp_path, square_crops, "--batch_size", 1, "--num_workers", 2, *resume) as process:
            wait_for(lambda before=before: steps_done(tmp_path) > before, process)
            time.sleep(moment.random())
            os.killpg(process.pid, number)
            assert process.wait(LIMIT) == 128 + number
        message = (tmp_path / "err").read_text()
        assert "Traceback" not in message and "resume with --continue_train" in message
        assert state(tmp_path)["progress"]["step"] == steps_done(tmp_path)
        resume = ["--continue_train"]


@pytest.mark.slow
def test_closed_terminal_loses_no_step(tmp_path, square_crops):
    """The kernel sends SIGHUP, and writing to the terminal fails from then on."""
    flags = train_flags(tmp_path, square_crops, "--batch_size", 1, "--save_latest", 10**6)
    pid, terminal = pty.fork()
    if not pid:
        reset_signals()
        os.execv(sys.executable, [sys.executable, str(SMALL), *flags])
    while steps_done(tmp_path) <= 5:
        os.read(terminal, 10_000)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 128 + signal.SIGHUP
    assert state(tmp_path)["progress"]["step"] == steps_done(tmp_path)


@pytest.mark.slow
def test_worker_killed_by_the_same_signal_does_not_prevent_a_save(tmp_path, square_crops):
    with start_training(tmp_path, square_crops, "--num_workers", 2, "--batch_size", 1) as process:
        wait_for(lambda: steps_done(tmp_path) > 2 and len(process.family()) >= 3, process)
        process.send_signal(signal.SIGSTOP)  # so that it starts no new workers
        for pid in process.family() - {process.pid}:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGCONT)
        assert process.wait(LIMIT) == 143
    assert state(tmp_path)["progress"]["step"] == steps_done(tmp_path)


def test_second_ctrl_c_ends_the_process_but_second_sigterm_does_not(handlers):
    with StopRequest() as stop:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop.after_step(1) == signal.SIGTERM
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # as before


def test_signal_during_validation_ends_it_and_the_resumed_run_validates(run_training, square_crops, monkeypatch):
    original, batches = train.classification, []

    def signalled(*x):
        if not paddle.is_grad_enabled():
            batches.append(x)
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*x)

    flags = ["--val_dir", square_crops, "--num_epochs", 1]
    with monkeypatch.context() as patch, pytest.raises(AssertionError, match="143"):  # the exit code
        change_loss(patch, signalled)
        run_training(*flags)
    assert len(batches) == 1  # of two
    lines = run_training(*flags, "--continue_train")
    assert ["val_kl" in line for line in lines] == [False, True]
