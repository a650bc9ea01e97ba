"""`train.py`: the effect of each flag, the files that it writes, and the errors that stop it."""

import io
import math
import time
from types import SimpleNamespace

from support import checkpoints, logs
from support.checkpoints import load_checkpoint
from support.sheets import tile

import numpy as np
import paddle
import pytest
from conftest import SmallNetwork, same_values, upsample_by_scipy, visualdl_reader
from PIL import Image
from processes import read_log, run_training_to_end

import train
from utils import annealed_mean, auc, error_histogram, load_ab_bins, load_prior

POSITIONS = 8 * 8  # of a 32-pixel crop


@pytest.fixture(autouse=True)
def _small(small_network):
    pass


def steps(lines):
    return [line for line in lines if "loss" in line]


def weights(tmp_path, name="latest", folder="run"):
    return load_checkpoint(tmp_path / folder / "model" / f"epoch_{name}_model.pdparams")


def saved_names(tmp_path):
    return {path.name.split("_")[1] for path in (tmp_path / "run" / "model").glob("*.pdparams")}


def with_gray(folder, square_crops, colored):
    """Write the images to a folder, the first `colored` of them in color, the others in gray. Return the folder."""
    folder.mkdir()
    for i, path in enumerate(sorted(square_crops.iterdir())):
        image = Image.open(path)
        (image if i < colored else image.convert("L")).save(folder / path.name)
    return folder


# Method


@pytest.mark.parametrize("crop_size", [32, 24])
def test_loss_without_rebalancing_is_the_sum_over_positions(run_training, crop_size):
    for line in steps(run_training("--rebalance", False, "--crop_size", crop_size)):
        assert line["loss"] == pytest.approx(line["cross_entropy"] * (crop_size // 4) ** 2, rel=1e-5)


def test_gamma_1_or_a_uniform_prior_equals_no_rebalancing(run_training, tmp_path):
    np.save(tmp_path / "prior.npy", np.ones(313) / 313)
    plain, *equal = (
        [line["loss"] for line in steps(run_training(*flags, folder=f"run{i}"))]
        for i, flags in enumerate((["--no-rebalance"], ["--gamma", 1], ["--prior", tmp_path / "prior.npy"]))
    )
    assert equal == [pytest.approx(plain, rel=1e-5)] * 2
    others = {round(steps(run_training("--gamma", gamma, folder=f"gamma{gamma}"))[0]["loss"], 3) for gamma in (0.5, 0)}
    assert len({round(plain[0], 3), *others}) == 3


def test_first_loss_equals_a_computation_in_float64(run_training, square_crops, tmp_path):
    """The computation uses the network before the step; each position has the weight of its nearest bin."""
    line = steps(run_training("--lr", 1e-12, "--max_steps", 1, "--weight_decay", 0))[0]
    sizes = ["--load_size", "40", "--crop_size", "32", "--batch_size", "4", "--num_workers", "0"]
    args = train.parse_args(["--image_dir", str(square_crops), *sizes])
    loader, sampler = train.training_data(args)
    sampler.begin(0, 0, 0)
    rgb, _ = next(iter(loader))
    lightness, ab = train.targets(rgb)
    network = SmallNetwork()
    network.set_state_dict(weights(tmp_path))
    logits = network(lightness - 50).numpy().astype(np.float64)
    colors = ab.numpy().transpose(0, 2, 3, 1).reshape(-1, 2)
    squared = ((colors[:, None] - load_ab_bins().numpy()) ** 2).sum(axis=2)
    nearest = squared.argsort(axis=1)[:, :5]
    soft = np.exp(-np.take_along_axis(squared, nearest, axis=1) / 50)
    soft /= soft.sum(axis=1, keepdims=True)
    prior = load_prior().numpy().astype(np.float64)
    importance = 1 / (0.5 * prior + 0.5 / 313)
    importance /= (prior * importance).sum()
    flat = logits.transpose(0, 2, 3, 1).reshape(-1, 313)
    log_p = flat - np.log(np.exp(flat - flat.max(1, keepdims=True)).sum(1, keepdims=True)) - flat.max(1, keepdims=True)
    nats = -(soft * np.take_along_axis(log_p, nearest, axis=1)).sum(axis=1)
    assert line["cross_entropy"] == pytest.approx(nats.mean(), rel=1e-4)
    assert line["loss"] == pytest.approx((importance[nearest[:, 0]] * nats).sum() / 4, rel=1e-4)


def test_neighbors_and_sigma_change_the_targets(run_training):
    first = {
        name: steps(run_training("--max_steps", 1, *flags, folder=name))[0]
        for name, flags in {"default": [], "NN": ["--NN", 1], "sigma": ["--sigma", 1]}.items()
    }
    assert first["NN"]["kl"] == pytest.approx(first["NN"]["cross_entropy"])  # one neighbor has no entropy
    assert first["default"]["kl"] < first["default"]["cross_entropy"] - 1
    assert first["sigma"]["cross_entropy"] != pytest.approx(first["default"]["cross_entropy"])


def test_gray_images_add_no_loss_but_count_in_the_average(run_training, tmp_path, square_crops):
    mixed = with_gray(tmp_path / "mixed", square_crops, colored=2)
    line = steps(run_training("--batch_size", 4, "--no-rebalance", image_dir=mixed))[0]
    assert 0 < line["loss"] < line["cross_entropy"] * POSITIONS * 0.75


def test_training_set_of_gray_images_stops_the_run(run_training, error_message, tmp_path, square_crops):
    gray = with_gray(tmp_path / "gray", square_crops, colored=0)
    message = error_message(run_training, "--batch_size", 2, "--num_epochs", 2, image_dir=gray)
    assert "all images of the epoch are gray" in message and "nothing was saved" in message


def test_one_gray_step_does_not_stop_the_run(run_training, tmp_path, square_crops):
    mixed = with_gray(tmp_path / "mixed", square_crops, colored=1)
    lines = run_training("--batch_size", 1, "--max_steps", 8, "--num_epochs", 2, image_dir=mixed)
    assert sum(line["loss"] == 0 for line in lines) == 6
    run_training("--batch_size", 1, "--max_steps", 1, image_dir=tmp_path / "mixed", folder="b")


def test_validation_set_of_gray_images_prints_a_warning(run_training, tmp_path, square_crops, capsys):
    run_training("--val_dir", with_gray(tmp_path / "gray", square_crops, colored=0))
    assert "gray: all 4 images are gray: this does not measure color" in capsys.readouterr().err
    run_training("--val_dir", with_gray(tmp_path / "mixed", square_crops, colored=1), folder="b")
    assert "gray" not in capsys.readouterr().err


# Data and optimization


def test_runs_are_equal_only_with_equal_seeds_whatever_the_number_of_workers(run_training, tmp_path):
    for folder, seed, workers in (("a", 3, 0), ("b", 3, 2), ("c", 4, 0)):
        run_training("--seed", seed, "--num_workers", workers, folder=folder)
    assert same_values(weights(tmp_path, folder="a"), weights(tmp_path, folder="b"))
    assert not same_values(weights(tmp_path, folder="a"), weights(tmp_path, folder="c"))


def test_adam_steps_equal_those_in_numpy():
    """Weight decay is an L2 penalty, which is part of the gradient, and the learning rate follows the schedule."""
    lr, beta1, beta2, decay = 0.01, 0.8, 0.9, 0.5
    adam = f"--lr {lr} --beta1 {beta1} --beta2 {beta2} --weight_decay {decay} --lr_steps 1"
    random = np.random.default_rng(0)
    x, x2 = random.normal(size=(2, 3, 4)).astype(np.float32)
    layer = paddle.nn.Linear(4, 2)
    optimizer, schedule = train.make_optimizer(layer, train.parse_args(["--image_dir", "x", *adam.split()]))
    expected = layer.weight.numpy().astype(np.float64)
    mean, variance = np.zeros_like(expected), np.zeros_like(expected)
    for step, inputs in enumerate((x, x2), 1):
        (layer(paddle.to_tensor(inputs)) ** 2).sum().backward()
        gradient = layer.weight.grad.numpy() + decay * expected
        mean = beta1 * mean + (1 - beta1) * gradient
        variance = beta2 * variance + (1 - beta2) * gradient**2
        rate = lr / math.sqrt(10) ** (step - 1)
        corrected = mean / (1 - beta1**step), variance / (1 - beta2**step)
        expected = expected - rate * corrected[0] / (np.sqrt(corrected[1]) + 1e-8)
        optimizer.step()
        schedule.step()
        optimizer.clear_grad()
        np.testing.assert_allclose(layer.weight.numpy(), expected, rtol=1e-5)


def test_run_ends_after_its_epochs_or_steps_and_is_not_repeated(run_training):
    for flags, count in ((["--num_epochs", 3, "--max_steps", 100], 3), (["--batch_size", 1, "--max_steps", 5], 5)):
        assert len(steps(run_training(*flags))) == count  # 4 images, batches of 4 by default
        assert len(steps(run_training(*flags, "--continue_train"))) == count


def test_freeze_bn_flag_keeps_stored_statistics(run_training, tmp_path, capsys):
    run_training("--max_steps", 1, folder="start")
    assert "model.pdparams: 1 step; log in" in capsys.readouterr().out
    start = tmp_path / "start" / "model" / "epoch_latest_model.pdparams"
    run_training("--init_from", start, "--freeze_bn", folder="frozen")
    run_training("--init_from", start, folder="free")
    before, frozen, free = load_checkpoint(start), weights(tmp_path, folder="frozen"), weights(tmp_path, folder="free")
    statistics = [name for name in before if name.endswith(("_mean", "_variance"))]
    assert statistics and all(np.array_equal(before[x], frozen[x]) for x in statistics)
    assert not any(np.array_equal(before[x], free[x]) for x in statistics)
    assert not np.array_equal(before["head.weight"], frozen["head.weight"])


# Validation and logs


def test_validation_runs_after_each_epoch(run_training, square_crops, tmp_path):
    lines = run_training("--val_dir", square_crops, "--num_epochs", 2, "--max_steps", 9)
    validations = [line for line in lines if "val_kl" in line]
    assert [line["step"] for line in validations] == [1, 2]
    assert all(line["val_kl"] < line["val_cross_entropy"] and 0 < line["val_auc"] < 1 for line in validations)
    assert (tmp_path / "run" / "model" / "epoch_best_model.pdparams").exists()


def test_visualdl_shows_all_logged_values_and_a_picture(run_training, square_crops, tmp_path):
    lines = run_training("--val_dir", square_crops, "--load_size", 64)
    board = visualdl_reader(tmp_path / "run" / "log")
    names = {name for line in lines for name in line} - {"step", "epoch"}
    tags = {f"validation/{name[4:]}" if name.startswith("val_") else f"training/{name}": name for name in names}
    assert {*board.get_tags()["scalar"]} == {*tags} and len(tags) == 9
    for tag, name in tags.items():
        logged = {line["step"]: line[name] for line in lines if name in line}
        assert {x.id: x.value for x in board.get_data("scalar", tag)} == pytest.approx(logged)
    pictures = board.get_data("image", train.PICTURE)
    picture = np.asarray(Image.open(io.BytesIO(pictures[-1].image.encoded_image_string)))
    assert picture.shape == (2 * 68, 2 * (3 * 64 + 4), 3)
    for i, path in enumerate(sorted(square_crops.iterdir())):  # the ground truth, two images per row
        top, left = i // 2 * 68, i % 2 * (3 * 64 + 4) + 2 * 64
        assert np.array_equal(picture[top : top + 64, left : left + 64], np.asarray(Image.open(path)))


def test_picture_of_one_or_three_validation_images_is_filled_up():
    square = np.zeros((32, 96, 3), np.uint8)
    assert tile([square]).shape == (34, 98, 3)
    three = tile([square] * 3)
    assert three.shape == (68, 196, 3) and (three[34:, 98:] == 255).all()


def test_validation_auc_equals_that_of_the_checkpoint(run_training, square_crops, tmp_path):
    (line,) = (x for x in run_training("--val_dir", square_crops, "--max_steps", 1, "--load_size", 64) if "val_kl" in x)
    network = SmallNetwork()
    network.set_state_dict(weights(tmp_path))
    network.eval()
    images = [train.ColorizationDataset([str(p)], 64, 64)[0][0] for p in sorted(square_crops.iterdir())]
    rgb = paddle.to_tensor(np.stack(images))
    lab = train.rgb_to_lab(rgb)
    with paddle.no_grad():
        colored = annealed_mean(network(lab[:, :1] - 50), load_ab_bins())
    colored = np.stack([upsample_by_scipy(ab, 64, 64) for ab in colored.numpy()], axis=1)
    assert line["val_auc"] == pytest.approx(auc(error_histogram(colored, lab[:, 1:].numpy().swapaxes(0, 1))), abs=1e-4)


def test_lines_of_the_log_average_over_loss_step_steps(run_training):
    each = steps(run_training("--max_steps", 4, "--batch_size", 1, "--lr", 1e-3, "--lr_steps", 1, 3, folder="a"))
    pairs = steps(run_training("--max_steps", 4, "--batch_size", 1, "--loss_step", 2, "--lr", 1e-3, "--lr_steps", 1, 3))
    assert [x["step"] for x in pairs] == [1, 2, 4]  # the first, too
    assert pairs[2]["cross_entropy"] == pytest.approx(
        (each[2]["cross_entropy"] + each[3]["cross_entropy"]) / 2, rel=1e-5
    )
    rates = [1e-3 / math.sqrt(10), 1e-3 / math.sqrt(10), 1e-4, 1e-4]  # of the step after each line
    assert [line["lr"] for line in each] == pytest.approx(rates)
    assert pairs[0].keys() == {"step", "epoch", "loss", "cross_entropy", "kl", "images_per_second", "waiting", "lr"}
    assert 0 <= pairs[0]["waiting"] <= 1 and pairs[0]["images_per_second"] > 0


def test_first_and_last_step_of_each_start_are_logged(run_training):
    flags = ["--batch_size", 1, "--num_epochs", 9, "--loss_step", 50]
    assert [line["step"] for line in steps(run_training("--max_steps", 3, *flags))] == [1, 3]
    assert [line["step"] for line in steps(run_training("--max_steps", 7, *flags, "--continue_train"))] == [1, 3, 4, 7]


def test_start_prints_data_device_disk_use_and_columns(run_training, square_crops, tmp_path, capsys):
    run_training("--val_dir", square_crops, "--batch_size", 2)
    out = capsys.readouterr().out
    assert "data: 4 images, 4 for validation; 2 steps per epoch\ndevice: cpu, float32\n" in out
    names = ("epoch_0_model.pdparams", "epoch_0_state.pdopt")
    size = sum((tmp_path / "run" / "model" / name).stat().st_size for name in names) / 1e6
    assert f"model ({size:.0f} MB per saved epoch)" in out and str(tmp_path / "run" / "log") in out
    explained = out[out.index("columns:") : out.index("epoch ")]
    assert all(name in explained for name in ("loss", "cross_entropy", "kl", "lr", "waiting"))


def test_logged_speed_excludes_the_time_of_validation(run_training, square_crops, monkeypatch):
    """The clock advances by 1 s in a training step and by 100 s in a validation step."""
    clock, objective = [0], train.objective

    def timed(*x):
        clock[0] += 1 if paddle.is_grad_enabled() else 100
        return objective(*x)

    monkeypatch.setattr(logs, "time", SimpleNamespace(perf_counter=lambda: clock[0], time_ns=time.time_ns))
    monkeypatch.setattr(train, "objective", timed)
    flags = ["--batch_size", 2, "--max_steps", 4, "--num_epochs", 2, "--loss_step", 4, "--val_dir", square_crops]
    assert [line["images_per_second"] for line in steps(run_training(*flags))] == [2, 2]


# Checkpoints


def test_checkpoints_are_written_every_save_freq_epochs_and_at_the_end(run_training, tmp_path):
    run_training("--num_epochs", 5, "--save_freq", 2, "--max_steps", 100)
    assert saved_names(tmp_path) == {"1", "3", "4", "latest"}


def test_keep_flag_removes_the_oldest_checkpoints(run_training, tmp_path, square_crops):
    run_training("--num_epochs", 5, "--keep", 2, "--max_steps", 100, "--val_dir", square_crops)
    assert saved_names(tmp_path) == {"3", "4", "latest", "best"}


def test_save_latest_flag_saves_during_the_epoch(run_training, tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(checkpoints.Run, "save", lambda run, *names: saved.append((*names, run.progress["step"])))
    run_training("--batch_size", 1, "--max_steps", 3, "--save_latest", 2)
    assert saved == [("latest", 2), ("latest", 3)]


def test_checkpoint_is_a_state_dict_with_load_size_epoch_and_step(run_training, tmp_path, square_crops):
    run_training("--num_epochs", 2, "--max_steps", 9, "--val_dir", square_crops)
    for name, epoch, step in (("0", 1, 1), ("1", 2, 2), ("latest", 2, 2)):
        path = tmp_path / "run" / "model" / f"epoch_{name}_model.pdparams"
        state = paddle.load(str(path))
        assert state.keys() == {*SmallNetwork().state_dict(), *train.ENTRIES}
        assert [int(state[entry]) for entry in train.ENTRIES] == [40, epoch, step]
        assert all(state[entry].dtype == np.int64 for entry in train.ENTRIES)
        checkpoints.load_weights(SmallNetwork(), path)
    assert {*train.ENTRIES} < paddle.load(str(path.with_name("epoch_best_model.pdparams"))).keys()


def test_resumed_run_equals_one_that_was_not_stopped(run_training, tmp_path, square_crops):
    flags = ["--batch_size", 1, "--val_dir", square_crops, "--num_epochs", 3]
    whole = run_training(*flags, "--max_steps", 11, folder="whole")
    run_training(*flags, "--max_steps", 6, folder="parts")
    parts = run_training(*flags, "--max_steps", 11, "--continue_train", folder="parts")
    assert same_values(weights(tmp_path, folder="whole"), weights(tmp_path, folder="parts"))
    timeless = [
        {k: v for k, v in line.items() if k in ("step", "cross_entropy", "kl", "val_kl", "lr")} for line in steps(whole)
    ]
    assert timeless == [{k: line[k] for k in timeless[0]} for line in steps(parts)]


def test_run_resumes_from_a_numbered_epoch(run_training, tmp_path):
    run_training("--num_epochs", 3, "--max_steps", 100, folder="a")
    run_training("--num_epochs", 2, "--max_steps", 100, folder="b")
    run_training("--num_epochs", 3, "--max_steps", 100, "--continue_train", "True", "--which_epoch", 1, folder="b")
    assert same_values(weights(tmp_path, "2", folder="a"), weights(tmp_path, "2", folder="b"))


# Errors


def test_usage_errors_print_one_line(run_training, error_message, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()

    def check(line, *flags, **settings):
        assert line in error_message(run_training, *flags, **settings)

    check("missing: no such", image_dir=tmp_path / "missing")
    check("empty: no images", image_dir=tmp_path / "empty")
    check("larger than --load_size", "--crop_size", 48)
    check("multiple of 8", "--crop_size", 30)
    check("do not fill", "--batch_size", 5)
    check("as a prior: no such file", "--prior", tmp_path / "none.npy")
    check("no such checkpoint", "--continue_train")
    check("no such checkpoint", "--init_from", tmp_path / "none")
    check("GPUs only", "--sync_bn")
    check("exclude each other", "--freeze_bn", "--sync_bn")
    check("exclude each other", "--continue_train", "--overwrite")
    check("only valid with --continue_train", "--which_epoch", 0)
    for flag in ("--model_path", "--log_path"):  # reported before images are listed
        check("cannot be written", flag, tmp_path / "file" / "x", image_dir=tmp_path / "missing")
    args = train.parse_args(["--image_dir", "x"])
    assert "not a multiple of the number of processes, 3" in error_message(train.check_args, args, 3)


def test_loss_that_is_not_finite_stops_the_run_and_saves_nothing(run_training, error_message, tmp_path):
    flags = ["--lr", 1e38, "--max_steps", 9, "--num_epochs", 9, "--loss_step", 50, "--save_latest", 3]
    flags += ["--save_freq", 99]
    message = error_message(run_training, *flags)
    assert "the loss is not finite" in message and message.endswith("; nothing was saved")
    assert not list((tmp_path / "run" / "model").glob("*.pd*"))


# Training as a whole


@pytest.mark.slow
def test_network_overfits_four_images(square_crops, tmp_path):
    """The real network, trained from scratch at 64x64, gets within 0.1 nats per position of the lower bound.

    Without rebalancing, as that value is not re-weighted: with rebalancing, it falls more slowly.
    """
    length = ["--load_size", 64, "--max_steps", 110, "--loss_step", 10, "--lr", 3e-4, "--lr_steps", 80]
    more = [*length, "--weight_decay", 0, "--no-rebalance"]
    code, _ = run_training_to_end(tmp_path, square_crops, *more, size=64, script=train.__file__)
    assert code == 0 and read_log(tmp_path)[-1]["kl"] < 0.1
