"""The log of a run: lines, VisualDL, and the values that they show."""

import io
import math
import os
import shutil
import time
from types import SimpleNamespace

from support import logs

import numpy as np
import paddle
import pytest
from conftest import change_loss, visualdl_reader
from PIL import Image
from processes import steps

import train

pytestmark = pytest.mark.usefixtures("small_network")


def test_visualdl_shows_all_logged_values_and_a_picture(run_training, square_crops, tmp_path):
    lines = run_training("--val_dir", square_crops, "--load_size", 64)
    board = visualdl_reader(tmp_path / "run" / "log")
    names = {name for line in lines for name in line} - {"run", "step", "epoch"}
    tags = {f"validation/{name[4:]}" if name.startswith("val_") else f"training/{name}": name for name in names}
    assert {*board.get_tags()["scalar"]} == {*tags} and len(tags) == 9
    for tag, name in tags.items():
        logged = {line["step"]: line[name] for line in lines if name in line}
        assert {x.id: x.value for x in board.get_data("scalar", tag)} == pytest.approx(logged)
    pictures = board.get_data("image", train.PICTURE)
    picture = np.asarray(Image.open(io.BytesIO(pictures[-1].image.encoded_image_string)))
    assert picture.shape == (3 * 64, 3 * 64, 3)
    originals = [np.asarray(Image.open(path)) for path in sorted(square_crops.iterdir())[:3]]
    assert np.array_equal(picture[:, 2 * 64 :], np.concatenate(originals))


def test_lines_of_the_log_average_over_loss_step_steps(run_training):
    flags = ["--max_steps", 4, "--batch_size", 1, "--lr", 1e-3, "--lr_steps", 1, 3]
    each, pairs = (steps(run_training(*flags, "--loss_step", n, folder=str(n))) for n in (1, 2))
    assert [line["step"] for line in pairs] == [1, 2, 4]  # the first, too
    mean = (each[2]["cross_entropy"] + each[3]["cross_entropy"]) / 2
    assert pairs[2]["cross_entropy"] == pytest.approx(mean, rel=1e-5)
    rates = [1e-3 / math.sqrt(10), 1e-3 / math.sqrt(10), 1e-4, 1e-4]  # of the step after each line
    assert [line["lr"] for line in each] == pytest.approx(rates)
    values = {"loss", "cross_entropy", "kl", "images_per_second", "waiting", "lr"}
    assert pairs[0].keys() == {"run", "epoch", "step", *values}


def test_first_and_last_step_of_each_start_are_logged(run_training):
    flags = ["--batch_size", 1, "--num_epochs", 9, "--loss_step", 50]
    assert [line["step"] for line in steps(run_training("--max_steps", 3, *flags))] == [1, 3]
    assert [line["step"] for line in steps(run_training("--max_steps", 7, *flags, "--continue_train"))] == [1, 3, 4, 7]


def test_logged_speed_excludes_the_time_of_validation(run_training, square_crops, monkeypatch):
    """The clock advances by 1 s in a training step and by 100 s in a validation step."""
    clock, objective = [0], train.classification

    def timed(*x):
        clock[0] += 1 if paddle.is_grad_enabled() else 100
        return objective(*x)

    monkeypatch.setattr(logs, "time", SimpleNamespace(perf_counter=lambda: clock[0], time_ns=time.time_ns))
    change_loss(monkeypatch, timed)
    flags = ["--batch_size", 2, "--max_steps", 4, "--num_epochs", 2, "--loss_step", 4, "--val_dir", square_crops]
    assert [line["images_per_second"] for line in steps(run_training(*flags))] == [2, 2]


def test_damaged_lines_of_the_log_are_removed_on_resuming(run_training, tmp_path):
    run = run_training("--batch_size", 1, "--max_steps", 2)[0]["run"]
    with open(tmp_path / "run" / "log" / "train.jsonl", "a") as file:
        file.write(f'\0\0\n{{"run": "{run}", "step": 3, "loss": 1}}\n{{"step": 4, "lo')
    lines = run_training("--batch_size", 1, "--max_steps", 3, "--continue_train")
    assert [line["step"] for line in lines] == [1, 2, 3] and "cross_entropy" in lines[2]


def test_visualdl_shows_one_curve_for_a_stopped_or_killed_run(run_training, tmp_path, square_crops):
    """It shows only the file whose name sorts last."""
    model, kept = tmp_path / "run" / "model", tmp_path / "kept"

    def steps_shown(to, *more):
        run_training("--batch_size", 2, "--val_dir", square_crops, "--num_epochs", 9, "--max_steps", to, *more)
        board = visualdl_reader(tmp_path / "run" / "log")
        return [[x.id for x in board.get_data("scalar", tag)] for tag in ("training/loss", "validation/kl")]

    assert steps_shown(2) == [[1, 2], [2]]
    shutil.copytree(model, kept)
    assert steps_shown(4, "--continue_train") == [[1, 2, 3, 4], [2, 4]]
    shutil.rmtree(model)  # as if killed after step 4, of which 2 were saved
    shutil.copytree(kept, model)
    assert steps_shown(3, "--continue_train") == [[1, 2, 3], [2, 3]]
    assert steps_shown(2) == [[1, 2], [2]]  # a new run


# Unreadable files


def test_too_many_unreadable_images_stop_the_run(error_message):
    """Two are tolerated in very small sets."""
    meter = logs.Meter({"loss": float}, 4, max_broken=0.1)
    for broken in (2, 1):
        meter.check()
        meter.add(paddle.ones([4, 1]), paddle.to_tensor([broken, 0, 0, 0]))
    assert error_message(meter.check) == "3 of 11 images cannot be read: more than --max_broken 0.1"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs the device of a full disk")
def test_full_disk_of_the_log_is_reported_on_one_line(tmp_path, error_message):
    log = logs.Log(tmp_path, train.FORMATS)
    log.open("run", {"step": 0, "validated": 0})
    with open("/dev/full", "w", buffering=1) as log.file:
        assert error_message(log.write, {"step": 1}).endswith("the log cannot be written: no space left on device")
        log.close()
