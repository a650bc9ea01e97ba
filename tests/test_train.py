"""`train.py`: the effect of each flag, the files that it writes, and the errors that stop it."""

import json
import math
import os
import shutil

from support.checkpoints import load_checkpoint
from support.gpu import autocast

import numpy as np
import paddle
import pytest
from conftest import SmallNetwork, same_values, upsample_by_scipy
from PIL import Image
from processes import read_log, run_training_to_end, saved_names, state, steps, weights
from scipy import special
from skimage import color

import train
from utils import annealed_mean, auc, error_histogram, load_ab_bins, load_prior

pytestmark = pytest.mark.usefixtures("small_network")


POSITIONS = 8 * 8  # of a 32-pixel crop


def with_gray(folder, square_crops, colored):
    """Write the images to a folder, the first `colored` of them in color, the others in gray. Return the folder."""
    folder.mkdir()
    for i, path in enumerate(sorted(square_crops.iterdir())):
        image = Image.open(path)
        (image if i < colored else image.convert("L")).save(folder / path.name)
    return folder


# Method


def test_gamma_1_or_a_uniform_prior_equals_no_rebalancing(run_training, tmp_path):
    np.save(tmp_path / "prior.npy", np.ones(313) / 313)
    variants = (["--no-rebalance"], ["--gamma", 1], ["--prior", tmp_path / "prior.npy"], [], ["--gamma", 0])
    plain, *equal, half, inverse = (steps(run_training("--max_steps", 1, *flags))[0]["loss"] for flags in variants)
    assert equal == [pytest.approx(plain, rel=1e-5)] * 2
    assert len({round(loss, 3) for loss in (plain, half, inverse)}) == 3


def test_classification_loss_equals_a_computation_in_float64(square_crops):
    """Each position has the weight of its nearest bin. The network's output is float16, but the loss is float32."""
    images = np.stack([np.asarray(Image.open(path)) for path in sorted(square_crops.iterdir())])
    constants = train.make_constants(train.parse_args(["--image_dir", "x"]), autocast("off"))
    network = SmallNetwork()
    rgb = paddle.to_tensor(images.transpose(0, 3, 1, 2))
    output, ab = train.forward(lambda lightness: network(lightness).astype("float16"), rgb, constants)
    values = train.classification(output, ab, constants)
    colors, logits = (x.numpy().transpose(0, 2, 3, 1).reshape(-1, x.shape[1]).astype(np.float64) for x in (ab, output))
    squared = ((colors[:, None] - load_ab_bins().numpy()) ** 2).sum(axis=2)
    nearest = squared.argsort(axis=1)[:, :5]
    soft = special.softmax(-np.take_along_axis(squared, nearest, axis=1) / 50, axis=1)
    prior = load_prior().numpy().astype(np.float64)
    importance = 1 / (0.5 * prior + 0.5 / 313)
    importance /= (prior * importance).sum()
    log_p = special.log_softmax(logits, axis=1)
    cross_entropy = -(soft * np.take_along_axis(log_p, nearest, axis=1)).sum(axis=1)
    assert values.dtype == paddle.float32
    loss = (importance[nearest[:, 0]] * cross_entropy).sum() / len(images)
    assert values.mean(axis=0).tolist()[:2] == pytest.approx([loss, cross_entropy.mean()], rel=1e-4)


def test_neighbors_and_sigma_change_the_targets(run_training):
    default, one, narrow = (
        steps(run_training("--max_steps", 1, *flags))[0] for flags in ([], ["--NN", 1], ["--sigma", 1])
    )
    assert one["kl"] == pytest.approx(one["cross_entropy"])  # one neighbor has no entropy
    assert default["kl"] < default["cross_entropy"] - 1
    assert narrow["cross_entropy"] != pytest.approx(default["cross_entropy"])


def test_gray_images_add_no_loss_but_count_in_the_average_and_do_not_stop_the_run(run_training, tmp_path, square_crops):
    mixed = with_gray(tmp_path / "mixed", square_crops, colored=1)
    line = steps(run_training("--batch_size", 4, "--no-rebalance", image_dir=mixed))[0]
    assert 0 < line["loss"] < line["cross_entropy"] * POSITIONS * 0.4
    lines = run_training("--batch_size", 1, "--max_steps", 8, "--num_epochs", 2, image_dir=mixed)
    assert sum(line["loss"] == 0 for line in lines) == 6


# L2, the paper's baseline


def test_l2_loss_and_its_gradient_equal_those_in_numpy():
    """The gradient of 1/2 |Y - Y^|^2 is Y^ - Y."""
    predicted, ab = paddle.randn([3, 2, 4, 5]), paddle.randn([3, 2, 4, 5])
    predicted.stop_gradient = False
    values = train.l2(predicted, ab, None)
    difference = predicted.numpy() - ab.numpy()
    squared = (difference**2).sum(axis=1)
    expected = np.stack([squared.sum(axis=(1, 2)) / 2, squared.mean(axis=(1, 2))], axis=1)
    np.testing.assert_allclose(values.numpy(), expected, rtol=1e-5)
    values[:, 0].sum().backward()
    np.testing.assert_allclose(predicted.grad.numpy(), difference, rtol=1e-5)


def test_l2_run_logs_loss_and_rmse_and_selects_best_by_rmse(run_training, square_crops, tmp_path):
    flags = ["--loss", "l2", "--val_dir", square_crops, "--num_epochs", 3, "--max_steps", 9, "--lr", 1e-3]
    lines = run_training(*flags)
    for line in steps(lines):
        assert line["loss"] == pytest.approx(POSITIONS / 2 * line["rmse"] ** 2, rel=1e-5)
    best = json.loads((tmp_path / "run" / "model" / "epoch_best.json").read_text())
    assert best["rmse"] == min(line["val_rmse"] for line in lines if "val_rmse" in line)


def test_l2_run_starts_from_all_layers_of_a_classification_network_but_the_head(run_training, tmp_path, capsys):
    run_training(folder="a")
    path = tmp_path / "a" / "model" / "epoch_latest_model.pdparams"
    run_training(
        "--loss", "l2", "--init_from", path, "--max_steps", 1, "--lr", 1e-30, "--weight_decay", 0, "--freeze_bn"
    )
    assert f"{path}: from a network with another last layer; conv8_ab starts at random" in capsys.readouterr().err
    before, after = load_checkpoint(path), weights(tmp_path / "run")
    assert after["conv8_ab.weight"].shape == (2, 32, 1, 1) and after["conv8_ab.weight"].std() > 0.01
    shared = {*before} - {"conv8_313.weight", "conv8_313.bias", *train.ENTRIES}
    assert {*after} - {"conv8_ab.weight", "conv8_ab.bias", *train.ENTRIES} == shared
    assert all(np.array_equal(before[name], after[name]) for name in shared)


# Data and optimization


def test_runs_are_equal_only_with_equal_seeds_whatever_the_number_of_workers(run_training, tmp_path):
    for folder, seed, workers in (("a", 3, 0), ("b", 3, 2), ("c", 4, 0)):
        run_training("--seed", seed, "--num_workers", workers, folder=folder)
    assert same_values(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert not same_values(weights(tmp_path / "a"), weights(tmp_path / "c"))


def test_adam_steps_equal_those_in_numpy():
    """Weight decay is an L2 penalty, which is part of the gradient, and the learning rate follows the schedule."""
    args = "--image_dir x --lr 0.01 --beta1 0.8 --beta2 0.9 --weight_decay 0.5 --lr_steps 1"
    layer = paddle.nn.Linear(4, 2)
    optimizer, schedule = train.make_optimizer(layer, train.parse_args(args.split()))
    expected, mean, variance = layer.weight.numpy().astype(np.float64), 0, 0
    for step, rate in ((1, 0.01), (2, 0.01 / math.sqrt(10))):
        (layer(paddle.randn([3, 4])) ** 2).sum().backward()
        gradient = layer.weight.grad.numpy() + 0.5 * expected
        mean = 0.8 * mean + 0.2 * gradient
        variance = 0.9 * variance + 0.1 * gradient**2
        expected = expected - rate * mean / (1 - 0.8**step) / (np.sqrt(variance / (1 - 0.9**step)) + 1e-8)
        optimizer.step()
        schedule.step()
        optimizer.clear_grad()
        np.testing.assert_allclose(layer.weight.numpy(), expected, rtol=1e-5)


def test_run_ends_after_its_epochs_or_steps_and_is_not_repeated(run_training):
    for flags, count in ((["--num_epochs", 3, "--max_steps", 100], 3), (["--batch_size", 1, "--max_steps", 5], 5)):
        assert len(steps(run_training(*flags))) == count  # 4 images, batches of 4 by default
        assert len(steps(run_training(*flags, "--continue_train"))) == count


def test_freeze_bn_flag_keeps_stored_statistics(run_training, tmp_path):
    run_training(folder="start")
    start = tmp_path / "start" / "model" / "epoch_latest_model.pdparams"
    run_training("--init_from", start, "--freeze_bn")
    before, after = load_checkpoint(start), weights(tmp_path / "run")
    statistics = {name for name in before if name.endswith(("_mean", "_variance"))}
    same = {name for name in before if np.array_equal(before[name], after[name])} - {*train.ENTRIES}
    assert statistics and same == statistics


# Validation and logs


@pytest.mark.parametrize("loss", ["classification", "l2"])
def test_validation_equals_that_of_the_checkpoint(run_training, square_crops, tmp_path, loss):
    flags = ["--loss", loss, "--val_dir", square_crops, "--max_steps", 1, "--load_size", 64]
    line = run_training(*flags)[-1]
    network = SmallNetwork(train.OBJECTIVES[loss].head)
    network.set_state_dict(weights(tmp_path / "run"))
    network.eval()
    images = [np.asarray(Image.open(path)) for path in sorted(square_crops.iterdir())]
    lab = color.rgb2lab(np.stack(images)).transpose(0, 3, 1, 2)
    with paddle.no_grad():
        output = network(paddle.to_tensor(lab[:, :1].astype(np.float32)) - 50)
    ab = (output if loss == "l2" else annealed_mean(output, load_ab_bins())).numpy()
    distance = np.hypot(*(np.stack([upsample_by_scipy(x, 64, 64) for x in ab]) - lab[:, 1:]).swapaxes(0, 1))
    assert line["val_auc"] == pytest.approx(auc(error_histogram(distance)[0]), abs=1e-4)
    if loss == "l2":
        rmse = np.sqrt(((ab - lab[:, 1:, ::4, ::4]) ** 2).sum(axis=1).mean())
        assert line["val_rmse"] == pytest.approx(rmse, rel=1e-3)


def test_start_prints_data_device_folders_and_columns(run_training, square_crops, tmp_path, capsys):
    run_training("--val_dir", square_crops, "--batch_size", 2)
    out, folder = capsys.readouterr().out, tmp_path / "run"
    lines = ["data: 4 images, 4 for validation; 2 steps per epoch", "device: cpu, float32"]
    assert out.startswith("\n".join([*lines, f"output: {folder / 'model'}, {folder / 'log'}", "columns: loss, "]))
    assert out.splitlines()[-1].startswith(f"{folder / 'model' / 'epoch_latest_model.pdparams'}: 2 steps; log in")


# Checkpoints


def test_nan_in_validation_ends_the_run_after_a_save(run_training, error_message, tmp_path, square_crops, monkeypatch):
    """No NaN reaches train.jsonl, as that would not be JSON."""
    original = train.forward

    def diverged(network, *x):
        logits, ab = original(network, *x)
        return (logits if network.training else logits * math.nan), ab

    monkeypatch.setattr(train, "forward", diverged)
    message = error_message(run_training, "--val_dir", square_crops, "--num_epochs", 3, "--max_steps", 9)
    assert "the network's output for the validation images is not finite" in message
    assert message.endswith("--continue_train resumes from the last save")
    assert [line["step"] for line in read_log(tmp_path / "run")] == [1]
    assert state(tmp_path / "run")["progress"]["step"] == 1 and "best" not in saved_names(tmp_path / "run")


def test_unreadable_validation_images_do_not_discard_the_epoch(run_training, error_message, tmp_path):
    (tmp_path / "text.png").write_text("not an image")
    message = error_message(run_training, "--val_dir", tmp_path / "text.png")
    assert "none of the images can be read; --continue_train resumes from the last save" in message
    assert saved_names(tmp_path / "run") == {"0", "latest"}


def test_validation_images_among_the_training_images_print_a_warning(run_training, tmp_path, square_crops, capsys):
    """Whatever the spelling of the path, and through links."""
    (val := tmp_path / "val").mkdir()
    (val / "other.png").symlink_to(square_crops / "coffee.png")
    shutil.copy(square_crops / "rocket.png", val / "copy.png")
    run_training("--val_dir", val, image_dir=f"{os.path.relpath(square_crops)}{os.sep}")
    assert "1 of 2 images for validation are also used for training" in capsys.readouterr().err
    (val / "other.png").unlink()
    run_training("--val_dir", val)
    assert "also used" not in capsys.readouterr().err


def test_gray_images_stop_a_run_that_is_shorter_than_an_epoch(run_training, error_message, tmp_path, square_crops):
    gray = with_gray(tmp_path / "gray", square_crops, colored=0)
    message = error_message(run_training, "--batch_size", 1, "--max_steps", 2, image_dir=gray)
    assert "all 2 images so far are gray" in message and "nothing was saved" in message
    assert steps(run_training("--loss", "l2", image_dir=gray))[0]["loss"] > 0  # Eq. 1 has no weights


# Errors


def test_usage_errors_print_one_line(run_training, error_message, tmp_path):
    (tmp_path / "file").touch()

    def check(line, *flags, **settings):
        assert line in error_message(run_training, *flags, **settings)

    check("multiple of 8", "--crop_size", 30)
    check("do not fill", "--batch_size", 5)
    check("cannot be combined", "--continue_train", "--overwrite")
    check("only valid with --continue_train", "--which_epoch", 0)
    check("--gamma: does not apply to --loss l2", "--loss", "l2", "--gamma", 0)
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


def test_validation_skips_unreadable_images(run_training, damaged, square_crops):
    """The readable ones are the same four images, three times."""
    whole, part = (run_training("--val_dir", folder)[-1] for folder in (square_crops, damaged))
    for name in ("val_kl", "val_auc"):
        assert whole[name] == pytest.approx(part[name], rel=1e-5)


READERS = ("numpy", "item", "tolist", "__float__", "__int__", "__bool__", "__index__", "__array__", "cpu")


def test_float32_step_reads_no_value_from_the_device(run_training, monkeypatch):
    """Reading a value waits until the device has finished all its work, so it happens only for lines of the log.

    A loader's batches are in pinned host memory, also with a GPU. They may be read, but an operator would copy them and
    wait, so they must pass through `to_device`. In fp16, Paddle's loss scaling reads values in every step.
    """
    reads, batches, copies, counts = [], [], [], []
    read_batches = train.from_workers
    monkeypatch.setattr(train, "from_workers", lambda *x: (batches.append(y) or y for y in read_batches(*x)))
    monkeypatch.setattr(train.gpu, "to_device", lambda x: copies.append(x.clone()) or copies[-1])

    def forward(model, rgb, constants, original=train.forward):
        assert rgb is copies[-1]
        counts.append(len(reads))  # before each step
        return original(model, rgb, constants)

    monkeypatch.setattr(train, "forward", forward)
    for name in READERS:
        original = getattr(paddle.Tensor, name, None)
        if original is None:
            continue

        def read(self, *x, original=original, name=name, **y):
            if not any(self is x for batch in batches for x in batch):
                reads.append(name)
            return original(self, *x, **y)

        monkeypatch.setattr(paddle.Tensor, name, read)
    run_training("--batch_size", 1, "--max_steps", 24, "--loss_step", 12, "--num_epochs", 6, "--save_latest", 100)
    assert len(counts) == 24
    # An epoch has 4 steps, the first step is logged, and the weights are saved after the second.
    within = [b - a for i, (a, b) in enumerate(zip(counts, counts[1:]), 1) if i % 4 and i > 2]
    assert len(within) == 16 and set(within) == {0}
    assert counts[-1] > counts[0]  # the count works: values are read at the end of each epoch
