"""A run that was stopped in any way continues as if it had not been stopped."""

import contextlib
import fcntl
import math
import os
import pty
import random
import shutil
import signal
import subprocess
import sys
import termios
import threading
import time

from support.checkpoints import load_checkpoint, save_checkpoint
from support.processes import StopRequest

import numpy as np
import paddle
import pytest
from conftest import same_values, visualdl_reader
from processes import (
    LIMIT,
    SMALL,
    has_ended,
    read_log,
    run_training_to_end,
    start_training,
    steps_done,
    stopped_at_random,
    train_flags,
    wait_for,
)

import train

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals")


@pytest.fixture(autouse=True)
def _small(small_network):
    pass


def state(folder):
    return load_checkpoint(folder / "model" / "epoch_latest_state.pdopt")


@pytest.fixture
def change_progress(tmp_path):
    """Change entries of the progress in the training state of tmp_path / "run"."""

    def change(**entries):
        saved = state(tmp_path / "run")
        saved["progress"].update(entries)
        save_checkpoint(saved, tmp_path / "run" / "model" / "epoch_latest_state.pdopt")

    return change


def saved_names(tmp_path):
    return {path.name.split("_")[1] for path in (tmp_path / "run" / "model").glob("*.pdparams")}


def values(folder):
    """Return the log without its times; a step that was repeated appears twice."""
    return [{k: v for k, v in line.items() if k not in ("images_per_second", "waiting")} for line in read_log(folder)]


# Killed


def killed_at_random(folder, images, steps, kills, *more):
    """Run `steps` steps, killed `kills` times by SIGKILL: first after a save, later at any moment."""
    moment, saved = random.Random(0), folder / "model" / "epoch_latest_state.pdopt"
    for _ in range(kills):
        resume = ["--continue_train"] if saved.exists() else []
        goal = (state(folder)["progress"]["step"] if resume else 0) + 1 + moment.randrange(3)
        with start_training(folder, images, "--max_steps", 10**6, *more, *resume) as process:
            wait_for(lambda goal=goal: saved.exists() and steps_done(folder) >= goal, process)
            time.sleep(moment.random() * 0.1)
            process.kill()
            process.wait()
        assert steps_done(folder) < steps, "raise the number of steps"
        for path in (folder / "model").glob(".*.tmp"):
            os.utime(path, (0, 0))  # old enough to be removed by the next run
    code, err = run_training_to_end(folder, images, "--max_steps", steps, *more, "--continue_train")
    assert code == 0, err


@pytest.mark.slow
def test_run_killed_at_random_moments_equals_one_that_was_not(tmp_path, square_crops):
    """It saves after every second step, so most of its time is spent writing, and some kills happen during that."""
    (whole := tmp_path / "whole").mkdir()
    more = ["--save_latest", 2, "--batch_size", 1, "--num_workers", 1, "--val_dir", square_crops, "--num_epochs", 500]
    killed_at_random(tmp_path / "parts", square_crops, 80, 3, *more)
    assert run_training_to_end(whole, square_crops, "--max_steps", 80, *more)[0] == 0
    assert same_values(state(whole), state(tmp_path / "parts"))
    assert values(whole) == values(tmp_path / "parts")
    assert not list((tmp_path / "parts" / "model").glob(".*.tmp"))


@pytest.mark.slow
def test_run_killed_after_any_write_of_a_checkpoint_can_be_resumed(run_training, tmp_path, monkeypatch, square_crops):
    """An exception that nothing catches ends it after each call that writes, as a kill would."""
    args = ["--batch_size", 1, "--save_latest", 1, "--loss_step", 1]
    run_training(*args, "--max_steps", 4, folder="whole")

    class Killed(BaseException):
        pass

    for module, name in ((paddle, "save"), (os, "fsync"), (os, "replace")):
        for nth in (3, 4, 5, 6):  # state and weights of the second step, then of the third
            folder, calls, original = f"{name}{nth}", [], getattr(module, name)

            def write(*x, nth=nth, calls=calls, original=original):
                calls.append(str(x[-1]))
                if "log" not in calls[-1] and sum("model" in y or y.isdigit() for y in calls) == nth:
                    raise Killed
                return original(*x)

            with monkeypatch.context() as patch:
                patch.setattr(module, name, write)
                with pytest.raises(Killed):
                    run_training(*args, "--max_steps", 4, folder=folder)
            run_training(*args, "--max_steps", 4, "--continue_train", folder=folder)
            assert same_values(state(tmp_path / "whole"), state(tmp_path / folder))


@pytest.mark.slow
def test_workers_end_with_a_killed_run(tmp_path, square_crops):
    with start_training(tmp_path, square_crops, "--num_workers", 2, "--batch_size", 1) as process:
        wait_for(lambda: steps_done(tmp_path) > 2 and len(process.family()) >= 3, process)
        process.send_signal(signal.SIGSTOP)  # so that it starts no new workers
        family = process.family()
        process.kill()
        wait_for(lambda: all(has_ended(pid) for pid in family))


# Signals


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_signal_saves_and_sets_the_exit_code(tmp_path, square_crops, number, code):
    """A terminal or a launcher sends it to the whole group of processes, workers included."""
    more = ["--batch_size", 1, "--num_workers", 2]
    with start_training(tmp_path, square_crops, *more) as process:
        wait_for(lambda: steps_done(tmp_path) > 5, process)
        os.killpg(process.pid, number)
        assert process.wait(LIMIT) == code
    message = (tmp_path / "err").read_text()
    assert "Traceback" not in message and "--continue_train" in message
    done = steps_done(tmp_path)
    assert state(tmp_path)["progress"]["step"] == done
    whole = tmp_path / "whole"
    code, _ = run_training_to_end(tmp_path, square_crops, *more, "--continue_train", "--max_steps", done + 3)
    assert code == 0 and run_training_to_end(whole, square_crops, *more, "--max_steps", done + 3)[0] == 0
    assert same_values(state(tmp_path), state(whole)) and values(tmp_path) == values(whole)


@pytest.mark.slow
def test_signal_at_any_moment_loses_no_step(tmp_path, square_crops):
    """The workers of the next epoch may just be starting."""
    for code, expected, printed in stopped_at_random(tmp_path, square_crops, signals=12):
        assert code == expected, printed
        assert "Traceback" not in printed and "resume with" in printed
        assert state(tmp_path)["progress"]["step"] == steps_done(tmp_path)


@pytest.mark.slow
def test_closed_terminal_loses_no_step(tmp_path, square_crops):
    """The other end of the run's own terminal is closed: the kernel sends SIGHUP, and writing fails from then on."""
    ours, theirs = pty.openpty()

    def take_terminal():
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        for number in (signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)

    command = [
        sys.executable,
        str(SMALL),
        *train_flags(tmp_path, square_crops, "--batch_size", 1, "--save_latest", 10**6),
    ]
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, preexec_fn=take_terminal)
    os.close(theirs)
    reader = threading.Thread(target=lambda: read_all(ours), daemon=True)
    reader.start()
    try:
        wait_for(lambda: steps_done(tmp_path) > 5, process)
        os.close(ours)
        assert process.wait(LIMIT) == 129
    finally:
        process.kill()
        process.wait()
    assert state(tmp_path)["progress"]["step"] == steps_done(tmp_path)


def read_all(descriptor):
    with contextlib.suppress(OSError):
        while os.read(descriptor, 1000):
            pass


@pytest.mark.slow
def test_nohup_keeps_a_run_alive_after_sighup(tmp_path, square_crops):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # the run inherits it
    try:
        with start_training(tmp_path, square_crops, "--batch_size", 1) as process:
            wait_for(lambda: steps_done(tmp_path) > 2, process)
            process.send_signal(signal.SIGHUP)
            before = steps_done(tmp_path)
            wait_for(lambda: steps_done(tmp_path) > before + 3, process)
    finally:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


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


def test_second_ctrl_c_ends_the_process_but_second_sigterm_does_not():
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with StopRequest() as stop:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop.after_step() == signal.SIGTERM
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_signal_during_validation_ends_it_and_the_resumed_run_validates(
    run_training, square_crops, tmp_path, monkeypatch
):
    original = train.objective

    def signalled(*x):
        if not paddle.is_grad_enabled():
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*x)

    flags = ["--val_dir", square_crops, "--num_epochs", 1, "--max_steps", 5]
    with monkeypatch.context() as patch:
        patch.setattr(train, "objective", signalled)
        with pytest.raises(AssertionError):  # the fixture checks the exit code
            run_training(*flags)
    assert state(tmp_path / "run")["progress"]["batch"] == 1  # of 1: the epoch has not ended
    assert not any("val_kl" in line for line in read_log(tmp_path / "run"))
    lines = run_training(*flags, "--continue_train")
    assert [line["step"] for line in lines if "val_kl" in line] == [1]
    assert (tmp_path / "run" / "model" / "epoch_0_model.pdparams").exists()


# Training states


def test_validation_that_a_kill_prevented_is_done_when_resumed(run_training, change_progress, square_crops):
    """The run saved at the last step of an epoch and was killed during the validation."""
    flags = ["--batch_size", 1, "--num_epochs", 1]
    run_training(*flags, "--max_steps", 4)
    change_progress(epoch=0, batch=4)
    lines = run_training(*flags, "--max_steps", 9, "--val_dir", square_crops, "--continue_train")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 4] and "val_kl" in lines[-1]


def test_progress_of_a_wrong_type_prints_one_line(run_training, change_progress, error_message):
    run_training()
    for key, value in (("step", "7"), ("step", -1), ("batch", 0.5), ("epoch", None), ("best_kl", math.nan)):
        before = {"step": 2, "batch": 0, "epoch": 2, "best_kl": math.inf}
        change_progress(**{**before, key: value})
        message = error_message(run_training, "--continue_train")
        assert f"epoch_latest_state.pdopt: not a training state: its {key} is " in message


def test_unknown_progress_is_ignored(run_training, change_progress, tmp_path):
    """It once set any attribute of the run: `keep` deleted checkpoints."""
    run_training("--num_epochs", 2, "--max_steps", 9)
    change_progress(keep=1, folder="/nowhere", save=None)
    run_training("--num_epochs", 3, "--max_steps", 9, "--continue_train")
    assert saved_names(tmp_path) == {"0", "1", "2", "latest"}


# Folders


def test_earlier_run_is_replaced_only_with_overwrite(run_training, error_message, tmp_path):
    lines = run_training("--max_steps", 1, "--loss_step", 50, overwrite=False)
    assert [line["step"] for line in lines] == [1]  # though the run is shorter than --loss_step
    for flags in ((), ("--model_path", tmp_path / "other"), ("--log_path", tmp_path / "other")):
        message = error_message(run_training, *flags, overwrite=False)
        assert "--continue_train" in message and "--overwrite" in message
    assert read_log(tmp_path / "run") == lines
    assert len(run_training("--max_steps", 2)) == 2


def test_overwrite_removes_all_files_of_the_earlier_run(run_training, tmp_path, square_crops):
    run_training("--num_epochs", 3, "--max_steps", 9, "--val_dir", square_crops)
    for other in ("notes.txt", "epoch_mine_model.pdparams"):
        (tmp_path / "run" / "model" / other).touch()
    run_training("--num_epochs", 1)
    names = {path.name for path in (tmp_path / "run" / "model").iterdir()}
    written = {f"epoch_{name}_{file}" for name in ("0", "latest") for file in ("model.pdparams", "state.pdopt")}
    assert names == {*written, ".lock", "notes.txt", "epoch_mine_model.pdparams"}  # others are kept
    assert {line["step"] for line in read_log(tmp_path / "run")} == {1}
    assert len(list((tmp_path / "run" / "log").glob("vdlrecords*"))) == 1


def test_overwrite_with_a_wrong_flag_removes_nothing(run_training, error_message, tmp_path, square_crops):
    run_training("--num_epochs", 3, "--max_steps", 9)
    before = sorted(tmp_path.rglob("*"))
    (tmp_path / "empty").mkdir()
    for wrong in (["--init_from", tmp_path / "none"], ["--prior", "none"], ["--val_dir", tmp_path / "empty"]):
        error_message(run_training, *wrong)
    assert sorted(tmp_path.rglob("*")) == sorted([*before, tmp_path / "empty"])


@pytest.mark.slow
def test_replaced_run_cannot_be_resumed_after_a_kill(run_training, tmp_path, square_crops):
    """--overwrite is killed before its first save."""
    folder = tmp_path / "run"
    run_training("--num_epochs", 2, "--max_steps", 9)
    with start_training(folder, square_crops, "--overwrite") as process:
        wait_for(lambda: read_log(folder) and "Traceback" not in (folder / "out").read_text(), process)
        wait_for(lambda: "columns:" in (folder / "out").read_text(), process)
        process.kill()
        process.wait()
    code, err = run_training_to_end(folder, square_crops, "--continue_train", "--max_steps", 9)
    assert code == 1 and "no such checkpoint" in err
    assert run_training_to_end(folder, square_crops, "--max_steps", 2)[0] == 0  # the original command is not refused
    assert [line["step"] for line in read_log(folder)] == [1, 2]


@pytest.mark.slow
def test_folder_of_a_running_training_is_refused_until_it_ends(tmp_path, square_crops):
    first, second = tmp_path / "first", tmp_path / "second"
    with start_training(first, square_crops, "--num_workers", 1, "--save_latest", 1) as process:
        wait_for(lambda: steps_done(first) > 2, process)
        for shared in (["--model_path", first / "model"], ["--log_path", first / "log"]):
            code, err = run_training_to_end(second, square_crops, *shared, "--overwrite")
            assert code == 1 and "another run is writing to this folder" in err
        before = state(first)["progress"]["step"]
        process.kill()
        process.wait()  # its worker may live a little longer
        more = ["--max_steps", before + 9, "--continue_train"]
        code, err = run_training_to_end(first, square_crops, *more)
        assert code == 0, err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "workers", "save_latest", "advice"),
    [
        (signal.SIGKILL, 2, 10**6, "nothing was saved"),
        (signal.SIGBUS, 1, 1, "--continue_train resumes from the last save"),
    ],
)
def test_killed_worker_stops_the_run_with_advice(tmp_path, square_crops, number, workers, save_latest, advice):
    """The kernel kills one with SIGKILL when memory runs out, with SIGBUS when /dev/shm is full.

    This happens before the last batches of an epoch. Later a lost worker does no harm, as the next epoch has new ones.
    """
    for i in range(500):  # an epoch of half a minute
        shutil.copytree(square_crops, tmp_path / "images" / str(i))
    run = [tmp_path, tmp_path / "images", "--batch_size", 1, "--num_workers", workers, "--save_latest", save_latest]
    with start_training(*run) as process:
        wait_for(lambda: steps_done(tmp_path) > 2, process)
        for pid in process.family() - {process.pid}:
            os.kill(pid, number)
        assert process.wait(LIMIT) == 1
    message = (tmp_path / "err").read_text()
    assert "images was killed or failed" in message and message.rstrip().endswith(f"try fewer --num_workers; {advice}")
    assert "Traceback (most recent" not in message and "exit unexpectedly" not in message  # Paddle's own message
    resume = ["--continue_train"] if save_latest == 1 else []  # the original command is not refused
    code, err = run_training_to_end(*run, *resume, "--max_steps", steps_done(tmp_path) + 5)
    assert code == 0, err


# Other flags and files


def test_changed_objective_is_refused_when_resuming(run_training, error_message, tmp_path):
    run_training("--max_steps", 1)
    np.save(tmp_path / "prior.npy", np.arange(313.0))
    for flags, message in (
        (["--no-rebalance"], "rebalance True is now False"),
        (["--gamma", 0], "gamma 0.5 is now 0"),
        (["--NN", 3], "NN 5 is now 3"),
        (["--prior", tmp_path / "prior.npy"], "prior has changed"),
        (["--init_from", "x"], "exclude"),
    ):
        assert message in error_message(run_training, "--continue_train", *flags)


def test_other_changed_flags_are_reported_when_resuming(run_training, tmp_path, capsys):
    run_training("--batch_size", 1, "--max_steps", 2)
    capsys.readouterr()
    run_training("--batch_size", 1, "--max_steps", 3, "--continue_train", "--lr", 1e-3, "--crop_size", 24, "--seed", 5)
    notes = capsys.readouterr().err
    changes = ("lr 3.16e-05 is now 0.001", "crop_size 32 is now 24", "seed 0 is now 5", "starting epoch 0 again")
    assert all(change in notes for change in changes)
    assert state(tmp_path / "run")["progress"]["batch"] == 1


@pytest.mark.parametrize(("batch_size", "images"), [(2, 4), (1, 3), (1, 6)])
def test_resumed_run_trains_the_epochs_left_with_a_changed_batch_or_folder(
    run_training, tmp_path, square_crops, capsys, batch_size, images
):
    """Stopped in the middle of the third epoch of five, which begins again."""
    run_training("--batch_size", 1, "--num_epochs", 5, "--max_steps", 10)
    (folder := tmp_path / "images").mkdir()
    for i in range(images):
        shutil.copy(sorted(square_crops.iterdir())[i % 4], folder / f"{i}.png")
    capsys.readouterr()
    more = ["--batch_size", batch_size, "--num_epochs", 5, "--max_steps", 999, "--continue_train"]
    lines = run_training(*more, image_dir=folder)
    assert images == 4 or f"images 4 is now {images}" in capsys.readouterr().err
    steps_per_epoch = images // batch_size
    assert [line["epoch"] for line in lines[10:]] == [2] * steps_per_epoch + [3] * steps_per_epoch + [
        4
    ] * steps_per_epoch
    progress = state(tmp_path / "run")["progress"]
    assert (progress["epoch"], progress["batch"], progress["step"]) == (5, 0, 10 + 3 * steps_per_epoch)


def test_unusable_training_states_print_one_line(run_training, error_message, tmp_path):
    run_training()
    path = tmp_path / "run" / "model" / "epoch_latest_state.pdopt"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert "epoch_latest_state.pdopt: not a readable checkpoint" in error_message(run_training, "--continue_train")
    path.write_bytes((path.parent / "epoch_latest_model.pdparams").read_bytes())
    assert "not a training state" in error_message(run_training, "--continue_train")
    path.unlink()
    for flags in ((), ("--which_epoch", 7)):
        assert "no such checkpoint" in error_message(run_training, "--continue_train", *flags)


def test_damaged_lines_of_the_log_are_removed_on_resuming(run_training, tmp_path):
    run_training("--batch_size", 1, "--max_steps", 2)
    with open(tmp_path / "run" / "log" / "train.jsonl", "a") as file:
        file.write('\0\0\n{"step": 3, "loss": 1}\n{"step": 4, "lo')
    lines = run_training("--batch_size", 1, "--max_steps", 3, "--continue_train")
    assert [line["step"] for line in lines] == [1, 2, 3] and "cross_entropy" in lines[2]


def test_visualdl_shows_one_curve_for_a_stopped_or_killed_run(run_training, tmp_path, square_crops, capsys):
    """Pictures are shown since the last start only."""
    shown = (("scalar", "training/loss"), ("scalar", "validation/kl"), ("image", train.PICTURE))
    model, logs = tmp_path / "run" / "model", tmp_path / "run" / "log"

    def steps_shown(to, *more):
        run_training("--batch_size", 2, "--val_dir", square_crops, "--num_epochs", 9, "--max_steps", to, *more)
        board = visualdl_reader(logs)
        return [[x.id for x in board.get_data(*kind)] if kind[1] in board.get_tags()[kind[0]] else [] for kind in shown]

    assert steps_shown(2) == [[1, 2], [2], [2]]
    shutil.copytree(model, tmp_path / "saved")
    assert steps_shown(4, "--continue_train") == [[1, 2, 3, 4], [2, 4], [4]]
    shutil.rmtree(model)  # as if killed after step 4, of which 2 were saved
    shutil.copytree(tmp_path / "saved", model)
    assert steps_shown(3, "--continue_train")[:2] == [[1, 2, 3], [2, 3]]
    assert steps_shown(2) == [[1, 2], [2], [2]]  # a new run
    assert "exists" not in capsys.readouterr().out


def test_keep_flag_leaves_later_checkpoints_when_an_earlier_epoch_is_resumed(run_training, tmp_path):
    run_training("--num_epochs", 4, "--max_steps", 100)
    more = ["--num_epochs", 3, "--max_steps", 100, "--continue_train", "--which_epoch", 1]
    run_training(*more, "--keep", 1)
    assert saved_names(tmp_path) == {"2", "3", "latest"}


@pytest.mark.parametrize("folder", ["run", "other"])
def test_fine_tuning_starts_from_weights_alone(run_training, tmp_path, folder):
    """Weights of the run that --overwrite removes can be used, too."""
    run_training()
    path = tmp_path / "run" / "model" / "epoch_latest_model.pdparams"
    before = load_checkpoint(path)
    run_training("--init_from", path, "--lr", 1e-30, "--weight_decay", 0, "--max_steps", 1, folder=folder)
    after = state(tmp_path / folder)
    assert after["progress"]["step"] == 1
    assert np.array_equal(after["network"]["head.weight"], before["head.weight"])
