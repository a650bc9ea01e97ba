"""A training run that was stopped in any way continues as if it had not been stopped."""

import json
import os
import pathlib
import random
import resource
import shutil
import time

from support import runs
from support.checkpoints import load_checkpoint

import numpy as np
import paddle
import pytest
from conftest import same_values
from PIL import Image
from processes import (
    read_log,
    run_training_to_end,
    saved_names,
    start_training,
    state,
    steps,
    steps_done,
    values,
    wait_for,
    weights,
)
from small_network import SmallNetwork

import train

pytestmark = [pytest.mark.usefixtures("small_network"), pytest.mark.skipif(os.name == "nt", reason="signals")]


def test_checkpoints_are_written_every_save_freq_epochs_and_at_the_end_and_the_newest_are_kept(
    run_training, tmp_path, square_crops
):
    run_training("--num_epochs", 7, "--save_freq", 2, "--keep", 3, "--max_steps", 100, "--val_dir", square_crops)
    assert saved_names(tmp_path / "run") == {"3", "5", "6", "latest", "best"}


def test_latest_is_saved_after_the_second_step_every_save_latest_steps_and_before_validation(
    run_training, square_crops, monkeypatch
):
    saved, original = [], runs.Run.save
    monkeypatch.setattr(runs.Run, "save", lambda run, *x: saved.append((*x, run.progress["step"])) or original(run, *x))
    flags = ["--batch_size", 1, "--max_steps", 5, "--num_epochs", 2, "--save_latest", 3, "--save_freq", 9]
    run_training(*flags)
    assert saved == [("latest", step) for step in (2, 3, 5)]  # an epoch has 4 steps
    saved.clear()
    run_training(*flags, "--val_dir", square_crops)
    assert saved == [("latest", step) for step in (2, 3, 4, 5, 5)]


def test_checkpoint_is_a_state_dict_with_load_size_epoch_and_step(run_training, tmp_path):
    run_training("--num_epochs", 2, "--max_steps", 9)
    for name, epoch, step in (("0", 1, 1), ("latest", 2, 2)):
        state = paddle.load(str(tmp_path / "run" / "model" / f"epoch_{name}_model.pdparams"))
        assert state.keys() == {*SmallNetwork().state_dict(), *train.ENTRIES}
        assert [int(state[entry]) for entry in train.ENTRIES] == [40, epoch, step]
        assert all(state[entry].dtype == np.int64 for entry in train.ENTRIES)


def test_resumed_run_equals_one_that_was_not_stopped(run_training, tmp_path, square_crops):
    flags = ["--batch_size", 1, "--val_dir", square_crops, "--num_epochs", 3]
    run_training(*flags, "--max_steps", 11, folder="whole")
    run_training(*flags, "--max_steps", 6, folder="parts")
    run_training(*flags, "--max_steps", 11, "--continue_train", folder="parts")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert same_values(state(whole), state(parts)) and steps(values(whole)) == steps(values(parts))


def test_state_that_was_saved_before_its_epoch_was_counted_is_resumed(run_training, tmp_path):
    """Earlier versions could write one."""
    flags = ["--batch_size", 1, "--num_epochs", 1, "--max_steps", 9]
    run_training(*flags)
    path = tmp_path / "run" / "model" / "epoch_latest_state.pdopt"
    whole = load_checkpoint(path)
    progress = {**whole["progress"], "epoch": 0, "batch": 4}
    checksum = runs._checksum(
        {**{part: whole[part] for part in whole.keys() - {"run", "checksum"}}, "progress": progress}
    )
    paddle.save({**whole, "progress": progress, "checksum": checksum}, str(path))
    run_training(*flags, "--continue_train")
    assert same_values(load_checkpoint(path), whole)


def test_run_resumes_from_a_numbered_epoch(run_training, tmp_path):
    """Later checkpoints stay, as pruning counts those of earlier epochs only."""
    run_training("--num_epochs", 4, "--max_steps", 100)
    before = weights(tmp_path / "run", "2")
    more = ["--num_epochs", 3, "--max_steps", 100, "--keep", 1]
    run_training(*more, "--continue_train", "True", "--which_epoch", 1)
    assert same_values(weights(tmp_path / "run", "2"), before)
    assert saved_names(tmp_path / "run") == {"2", "3", "latest"}


# Killed runs


class Killed(BaseException):
    """Ends a run at once, as a kill would, if nothing catches it."""


@pytest.mark.slow
def test_run_killed_at_random_moments_equals_one_that_was_not(tmp_path, square_crops):
    """It saves after every second step, so most of its time is spent writing, and some kills happen during that."""
    whole, parts, moment = tmp_path / "whole", tmp_path / "parts", random.Random(0)
    more = ["--save_latest", 2, "--batch_size", 1, "--num_workers", 1, "--val_dir", square_crops]
    for start in ([], ["--continue_train"], ["--continue_train"]):
        goal = (state(parts)["progress"]["step"] if start else 1) + 1 + moment.randrange(3)
        with start_training(parts, square_crops, *more, *start) as process:
            wait_for(lambda goal=goal: steps_done(parts) > goal, process)
            time.sleep(moment.random() * 0.1)
            process.kill()
            process.wait()
        assert steps_done(parts) < 80, "raise the number of steps"
    for folder, start in ((parts, ["--continue_train"]), (whole, [])):
        assert run_training_to_end(folder, square_crops, *more, "--max_steps", 80, *start)[0] == 0
    assert same_values(state(whole), state(parts)) and values(whole) == values(parts)
    assert not list((parts / "model").glob(".*.tmp"))


@pytest.mark.slow
def test_run_killed_after_any_write_of_a_checkpoint_can_be_resumed(run_training, tmp_path, monkeypatch, square_crops):
    """An exception that nothing catches ends it after each call that writes, as a kill would."""
    args = ["--batch_size", 1, "--save_latest", 1, "--loss_step", 1]
    run_training(*args, "--max_steps", 4, folder="whole")

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


# Earlier runs


def test_overwrite_removes_all_files_of_the_earlier_run(run_training, tmp_path, square_crops):
    run_training("--num_epochs", 3, "--max_steps", 9, "--val_dir", square_crops)
    for other in ("notes.txt", "epoch_mine_model.pdparams"):
        (tmp_path / "run" / "model" / other).touch()
    run_training("--num_epochs", 1)
    names = {path.name for path in (tmp_path / "run" / "model").iterdir()}
    written = {f"epoch_{name}_{file}" for name in ("0", "latest") for file in ("model.pdparams", "state.pdopt")}
    assert names == {*written, ".lock", "notes.txt", "epoch_mine_model.pdparams"}  # others are kept
    assert [line["step"] for line in read_log(tmp_path / "run")] == [1]
    assert len(list((tmp_path / "run" / "log").glob("vdlrecords*"))) == 1


# An identity that model folder, log and state share


def test_earlier_run_is_replaced_only_with_overwrite(run_training, error_message, tmp_path):
    """Also if its checkpoints or its log are elsewhere."""
    lines = run_training("--max_steps", 1, overwrite=False)
    for flags in ((), ("--model_path", tmp_path / "other"), ("--log_path", tmp_path / "other")):
        message = error_message(run_training, *flags, overwrite=False)
        assert "belongs to an earlier run; resume it with --continue_train, replace it with --overwrite" in message
    message = error_message(run_training, "--model_path", tmp_path / "other", "--continue_train")
    assert "train.jsonl: belongs to an earlier run" in message
    assert read_log(tmp_path / "run") == lines


def test_log_of_another_run_is_refused_when_resuming(run_training, error_message, tmp_path):
    flags = ["--batch_size", 1, "--num_epochs", 9, "--save_freq", 9]
    run_training(*flags, "--max_steps", 3, folder="a")
    lines = run_training(*flags, "--max_steps", 9, folder="b")
    resume = [*flags, "--max_steps", 6, "--continue_train", "--log_path"]
    message = error_message(run_training, *resume, tmp_path / "b" / "log", folder="a")
    assert "the log of another run" in message and "choose another --log_path" in message
    assert read_log(tmp_path / "b") == lines
    run_training(*resume, tmp_path / "c" / "log", folder="a")  # an empty folder is not refused
    assert [line["step"] for line in read_log(tmp_path / "c")] == [4, 5, 6]


def test_run_killed_while_it_replaces_an_earlier_one_can_be_resumed(run_training, tmp_path, square_crops, monkeypatch):
    """It removes the files of the log first, so the log that it resumes is never that of the earlier run."""
    flags = ["--batch_size", 1, "--num_epochs", 2, "--seed", 1, "--max_steps", 5]
    run_training("--num_epochs", 3, "--max_steps", 9, "--val_dir", square_crops)
    removed, unlink = [], pathlib.Path.unlink

    def killed(path, **settings):
        if path.parent.name in ("model", "log") and not path.name.startswith("."):
            removed.append(path.parent.name)
            if removed == ["log", "log", "model"]:
                raise Killed
        unlink(path, **settings)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(pathlib.Path, "unlink", killed)
        run_training(*flags)
    run_training(*flags, "--continue_train")
    run_training(*flags, folder="whole")
    assert same_values(weights(tmp_path / "run"), weights(tmp_path / "whole"))


@pytest.mark.parametrize("name", ["text.jpg", "gray.png"])
def test_overwrite_keeps_the_earlier_run_if_the_new_one_cannot_train(run_training, error_message, tmp_path, name):
    """Its images are unreadable or gray."""
    run_training()
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    (images := tmp_path / "images").mkdir()
    for i in range(30):
        path = images / f"{i}{name}"
        path.write_text("not an image") if name == "text.jpg" else Image.new("L", (64, 64), 99).save(path)
    assert error_message(run_training, "--num_epochs", 3, image_dir=images).endswith("nothing was saved")
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_continue_train_without_a_run_starts_a_new_one(run_training, error_message, capsys):
    lines = run_training("--batch_size", 1, "--max_steps", 2, "--continue_train")
    assert [line["step"] for line in lines] == [1, 2]
    assert "model: nothing to resume yet; starting a new run" in capsys.readouterr().err
    assert "no such file" in error_message(run_training, "--continue_train", "--which_epoch", 7)


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


# Changed flags and files


def test_changed_objective_is_refused_when_resuming(run_training, error_message, tmp_path):
    run_training("--max_steps", 1)
    np.save(tmp_path / "prior.npy", np.arange(313.0))
    message = error_message(run_training, "--continue_train", "--gamma", 0, "--prior", tmp_path / "prior.npy")
    assert "gamma 0.5 is now 0.0, prior has changed" in message


def test_resumed_run_reports_changed_flags_and_trains_the_epochs_left(run_training, tmp_path, square_crops, capsys):
    """Stopped in the middle of the third epoch of five, which begins again because of the batch size."""
    run_training("--batch_size", 1, "--num_epochs", 5, "--max_steps", 10)
    more = ["--batch_size", 2, "--lr", 1e-3, "--num_epochs", 5, "--max_steps", 999, "--val_dir", square_crops]
    lines = run_training(*more, "--continue_train")[10:]
    message = capsys.readouterr().err
    assert "lr 3.16e-05 is now 0.001" in message and "starting epoch 2 again" in message
    assert [(line["epoch"], "val_kl" in line) for line in lines] == [(n, x) for n in (2, 3, 4) for x in (0, 0, 1)]
    progress = state(tmp_path / "run")["progress"]
    assert (progress["epoch"], progress["batch"], progress["step"]) == (5, 0, 16)


def test_flags_of_an_older_version_may_be_fewer():
    assert runs.Run(".", None, None, None, None, {"new": 1}, {}, (), 0)._changes({}) == {}


def test_unusable_training_states_print_one_line(run_training, error_message, tmp_path):
    run_training("--num_epochs", 2)
    model = tmp_path / "run" / "model"
    path, last = model / "epoch_latest_state.pdopt", model / "epoch_1_state.pdopt"
    whole = path.read_bytes()
    start = whole.index(state(tmp_path / "run")["network"]["up.weight"].tobytes())
    for content, problem in (
        (whole[: len(whole) // 2], "epoch_latest_state.pdopt: not a readable checkpoint"),
        (whole[:start] + bytes(4096) + whole[start + 4096 :], "damaged: its checksum does not match"),  # never written
        ((model / "epoch_latest_model.pdparams").read_bytes(), "not a training state"),
    ):
        path.write_bytes(content)
        message = error_message(run_training, "--continue_train")
        assert problem in message and message.endswith("; the newest state that can be read: --which_epoch 1")
    last.write_bytes(b"")
    assert error_message(run_training, "--continue_train").endswith("--which_epoch 0")
    run_training("--continue_train", "--which_epoch", 0)


def test_resuming_an_earlier_epoch_keeps_later_lines_and_a_better_best(run_training, tmp_path, square_crops, capsys):
    flags = ["--batch_size", 1, "--val_dir", square_crops, "--max_steps", 99]
    lines = run_training(*flags, "--num_epochs", 4, "--lr", 1e-3)
    path, before = tmp_path / "run" / "model" / "epoch_best.json", weights(tmp_path / "run", "best")
    best = json.loads(path.read_text())
    assert best["kl"] == min(line["val_kl"] for line in lines if "val_kl" in line) and best["step"] > 4
    run_training(*flags, "--num_epochs", 2, "--lr", 1e-12, "--continue_train", "--which_epoch", 0)
    later = [line for line in lines if (line["step"], "val_kl" in line) > (4, False)]
    assert f"train.jsonl: {len(later)} lines after step 4 moved to train_replaced.jsonl" in capsys.readouterr().err
    kept = (tmp_path / "run" / "log" / "train_replaced.jsonl").read_text()
    assert [json.loads(line) for line in kept.splitlines()] == later
    assert json.loads(path.read_text()) == best and same_values(weights(tmp_path / "run", "best"), before)


def test_best_begins_again_on_other_validation_images_and_in_another_run(run_training, tmp_path, square_crops, capsys):
    """However low the value was before."""
    flags, path = ["--max_steps", 9, "--num_epochs"], tmp_path / "run" / "model" / "epoch_best.json"
    run_training(*flags, 1, "--val_dir", square_crops)
    changes = {"run": "another", "kl": 0}, {"kl": 0}
    for epochs, change, val_dir in zip((2, 3), changes, (square_crops, square_crops / "rocket.png")):
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
        run_training(*flags, epochs, "--val_dir", val_dir, "--continue_train")
        best = json.loads(path.read_text())
        assert best["step"] == best["epoch"] == int(weights(tmp_path / "run", "best")["epoch"]) == epochs
    assert "val_images 4 (names 715f338b) is now 1 (names " in capsys.readouterr().err


def test_renamed_training_image_restarts_the_epoch(run_training, tmp_path, square_crops, capsys):
    images = shutil.copytree(square_crops, tmp_path / "images")
    flags = ["--batch_size", 1, "--max_steps", 99, "--continue_train"]
    run_training("--batch_size", 1, "--max_steps", 2, "--num_epochs", 1, image_dir=images)
    (images / "rocket.png").rename(images / "a.png")
    assert len(run_training(*flags, "--num_epochs", 1, image_dir=f"{images}{os.sep}")) == 2 + 4
    assert "images 4 (names" in capsys.readouterr().err
    shutil.move(images, tmp_path / "moved")  # names are relative to the folder
    run_training(*flags, "--num_epochs", 2, image_dir=tmp_path / "moved")
    assert "changed" not in capsys.readouterr().err


# Failed saves


def test_failed_save_keeps_the_last_checkpoint(run_training, error_message, tmp_path):
    run_training("--batch_size", 1, "--max_steps", 2)
    path = tmp_path / "run" / "model" / "epoch_latest_state.pdopt"
    before = path.read_bytes()
    original = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, original[1]))  # Python ignores SIGXFSZ: writing fails
    try:
        message = error_message(run_training, "--batch_size", 1, "--max_steps", 3, "--continue_train")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, original)
    assert "epoch_latest_state.pdopt: cannot be written: file too large" in message
    assert path.read_bytes() == before and len(list(path.parent.iterdir())) == 3  # with the lock


def test_weights_that_are_not_finite_are_not_saved(run_training, error_message, tmp_path):
    """The first step at a very high learning rate has a finite loss, but leaves weights that overflow."""
    run_training("--batch_size", 1, "--max_steps", 2)
    before = state(tmp_path / "run")
    flags = ["--batch_size", 1, "--continue_train", "--max_steps", 3, "--lr", 1e38, "--beta2", 0]
    assert "the weights are not finite" in error_message(run_training, *flags)
    assert same_values(state(tmp_path / "run"), before)
