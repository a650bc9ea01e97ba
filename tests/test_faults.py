"""Unreadable files, full disks, lost worker processes, steps that wait, memory that grows."""

import os
import resource
import shutil
import subprocess
from contextlib import nullcontext
from pathlib import Path

from support.checkpoints import load_checkpoint
from support.cli import UserError
from support.gpu import HALF, autocast, check_gpu, mixed_precision, to_device
from support.processes import check_synchronized
from support.workers import from_workers

import numpy as np
import paddle
import pytest
from conftest import png_bomb
from processes import LIMIT, has_ended, run_training_to_end, start_training, steps_done, wait_for
from small_network import SmallNetwork

import train
from dataset import ColorizationDataset


@pytest.fixture(autouse=True)
def _small(small_network):
    pass


@pytest.fixture
def damaged(tmp_path, square_crops):
    """Write twelve readable images and five unreadable ones. Return their folder."""
    folder = tmp_path / "damaged"
    folder.mkdir()
    whole = {path.stem: path.read_bytes() for path in square_crops.iterdir()}
    for name, content in whole.items():
        for i in range(3):
            (folder / f"{name}{i}.png").write_bytes(content)
    (folder / "truncated.png").write_bytes(whole["coffee"][:3000])
    (folder / "text.jpg").write_text("not an image")
    (folder / "zero.png").touch()
    (folder / "bomb.png").write_bytes(png_bomb())
    (folder / "vanished.png").symlink_to("nowhere")
    return folder


# Files


def test_unreadable_images_are_skipped_replaced_and_counted(run_training, damaged, capfd):
    flags = ["--batch_size", 17, "--num_epochs", 1, "--max_broken", 0.9, "--num_workers", 2]
    assert len(run_training(*flags, image_dir=damaged)) == 1
    err = capfd.readouterr().err
    reasons = ("truncated.png: ", "text.jpg: not an image", "zero.png: empty file", "bomb.png: 50000x50000 is over")
    assert all(reason in err for reason in (*reasons, "vanished.png: no such file"))
    skipped = err.count("skipped ")
    assert f"epoch 0: {skipped} of {17 + skipped} images could not be read" in err
    assert "Traceback" not in err


def test_too_many_unreadable_images_stop_the_run(run_training, error_message, damaged):
    message = error_message(run_training, "--batch_size", 17, image_dir=damaged)
    assert "cannot be read: more than --max_broken 0.1" in message


@pytest.mark.slow
def test_run_stops_when_all_images_vanish(tmp_path, square_crops):
    images = shutil.copytree(square_crops, tmp_path / "images")
    with start_training(tmp_path, images, "--num_workers", 1) as process:
        wait_for(lambda: steps_done(tmp_path) > 2, process)
        shutil.rmtree(images)
        assert process.wait(LIMIT) == 1
    assert "cannot be read: more than --max_broken" in (tmp_path / "err").read_text().splitlines()[-1]


def test_validation_skips_unreadable_images(run_training, damaged, square_crops):
    whole = run_training("--val_dir", square_crops, folder="a")
    part = run_training("--val_dir", damaged, folder="b")  # the same four images, three times
    names = ("val_kl", "val_auc")
    assert [whole[-1][x] for x in names] == pytest.approx([part[-1][x] for x in names], rel=1e-5)


def test_dataset_keeps_paths_of_any_bytes(tmp_path):
    paths = [str(tmp_path / "é\udcff\n.png"), "b.png", ""]
    dataset = ColorizationDataset(paths, 40, 32)
    assert [dataset.path(i) for i in range(len(dataset))] == paths


# Disks


def test_failed_save_keeps_the_last_checkpoint(run_training, error_message, tmp_path):
    run_training("--batch_size", 1, "--max_steps", 2)
    path = tmp_path / "run" / "model" / "epoch_latest_state.pdopt"
    before = path.read_bytes()
    original, limit = resource.getrlimit(resource.RLIMIT_FSIZE), path.stat().st_size // 2
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, original[1]))  # Python ignores SIGXFSZ: writing fails
    try:
        message = error_message(run_training, "--batch_size", 1, "--max_steps", 3, "--continue_train")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, original)
    assert "epoch_latest_state.pdopt: cannot be written: file too large" in message
    assert path.read_bytes() == before and len(list(path.parent.iterdir())) == 3  # with the lock
    run_training("--batch_size", 1, "--max_steps", 3, "--continue_train")


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt" or os.geteuid() != 0, reason="mounts a file system")
@pytest.mark.parametrize("full", ["model", "log"])
def test_full_disk_stops_the_run_with_one_line(tmp_path, square_crops, full):
    (disk := tmp_path / full).mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "none", disk], capture_output=True).returncode:
        pytest.skip("cannot mount a file system here")
    try:
        more = ["--batch_size", 1, "--save_latest", 5]
        with start_training(tmp_path, square_crops, *more) as process:
            wait_for(lambda: (tmp_path / "model" / "epoch_latest_model.pdparams").exists(), process)
            with pytest.raises(OSError), open(disk / "filler", "wb", buffering=0) as file:
                while True:
                    file.write(bytes(10_000))
            assert process.wait(LIMIT) == 1
        lines = (tmp_path / "err").read_text().splitlines()
        assert "cannot be written: no space left on device" in lines[-1] and "Traceback" not in "".join(lines)
        (disk / "filler").unlink()
        step = load_checkpoint(tmp_path / "model" / "epoch_latest_state.pdopt")["progress"]["step"]
        assert step % 5 == 0
        code, _ = run_training_to_end(tmp_path, square_crops, *more, "--continue_train", "--max_steps", step + 5)
        assert code == 0
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def test_weights_that_are_not_finite_are_not_saved(run_training, error_message, tmp_path):
    """The first step at a very high learning rate has a finite loss, but leaves weights that overflow."""
    run_training("--batch_size", 1, "--max_steps", 2)
    path = tmp_path / "run" / "model" / "epoch_latest_state.pdopt"
    before = path.read_bytes()
    overflow = ["--max_steps", 3, "--lr", 1e38, "--beta2", 0]
    assert "the weights are not finite" in error_message(run_training, "--batch_size", 1, "--continue_train", *overflow)
    assert path.read_bytes() == before


# Processes


class FailingDataset(paddle.io.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        if index == 4:
            raise ZeroDivisionError
        return np.full(2, index, np.uint8), np.int64(index)


def test_error_in_a_dataset_without_workers_is_raised():
    """Paddle's loader would wait forever."""
    batches = from_workers(paddle.io.DataLoader(FailingDataset(), batch_size=2, num_workers=0))
    read = [[x.tolist() for x in next(batches)] for _ in range(2)]
    assert read == [[[[0, 0], [1, 1]], [0, 1]], [[[2, 2], [3, 3]], [2, 3]]]
    with pytest.raises(ZeroDivisionError):
        next(batches)


# Steps without waiting


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

    def objective(model, rgb, *more, original=train.objective):
        assert rgb is copies[-1]
        counts.append(len(reads))  # before each step
        return original(model, rgb, *more)

    monkeypatch.setattr(train, "objective", objective)
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
    # An epoch has 4 steps, and the first step is logged.
    within = [b - a for i, (a, b) in enumerate(zip(counts, counts[1:]), 1) if i % 4 and i > 1]
    assert len(within) == 17 and set(within) == {0}
    assert counts[-1] > counts[0]  # the count works: values are read at the end of each epoch


# Mixed precision


@pytest.mark.parametrize(
    ("choice", "capability", "expected"),
    [
        ("auto", (8, 0), (True, "bfloat16", False)),
        ("auto", (7, 5), (True, "float16", True)),
        ("auto", (6, 1), (False, "float16", False)),
        ("fp16", (9, 0), (True, "float16", True)),
        ("bf16", (7, 0), (False, "float16", False)),
        ("off", (8, 9), (False, "float16", False)),
    ],
)
def test_mixed_precision_follows_the_gpus_capability(monkeypatch, pretend_device, capsys, choice, capability, expected):
    scalers = []
    pretend_device("gpu:0", *capability)
    monkeypatch.setattr(paddle.amp, "GradScaler", lambda **settings: scalers.append(settings))
    autocast, _ = mixed_precision(choice)
    assert (autocast["enable"], autocast["dtype"], scalers[0]["enable"]) == expected
    assert scalers[0]["init_loss_scaling"] * 3535 < np.finfo(np.float16).max  # the largest gradient from `small`
    note = f"--amp {choice}: not supported by this GPU; training in float32\n"
    assert capsys.readouterr().err == (note if choice == "bf16" else "")


def test_autocast_list_does_not_contradict_those_of_paddle():
    """Operators in neither list would be computed in float32."""
    from paddle.amp.amp_lists import black_list, white_list

    for dtype in ("float16", "bfloat16"):
        assert not HALF & black_list()[dtype]["O1"] and "conv2d" in white_list()[dtype]["O1"]
    with paddle.amp.auto_cast(**autocast("float32")):
        assert paddle.matmul(paddle.ones([2, 2]), paddle.ones([2, 2])).dtype == paddle.float32


def test_unused_gpu_or_untested_device_prints_one_line(monkeypatch, pretend_device, tmp_path, capsys):
    (tmp_path / "nvidia-smi").touch(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(paddle, "is_compiled_with_cuda", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    check_gpu()
    assert "is built for CPUs; see requirements-gpu.txt" in capsys.readouterr().err
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    check_gpu()
    assert capsys.readouterr().err == ""
    pretend_device("xpu:0")
    check_gpu()
    assert capsys.readouterr().err.startswith("xpu:0: this kind of device is untested")


def test_copy_to_the_gpu_does_not_wait(pretend_device):
    class Pinned:
        def cuda(self, blocking=True):
            return "there", blocking

    pretend_device("gpu:0", 8, 0)
    assert to_device(Pinned()) == ("there", False)


@pytest.mark.parametrize("other", [1.0, 1.2])
def test_unsynchronized_batch_norm_stops_the_run(monkeypatch, other):
    """`other` is the ratio of the statistics of a second process to this one's."""

    def maximum(values, _):
        return np.maximum(values, values * other)

    monkeypatch.setattr("support.processes.all_reduce", maximum)
    network = SmallNetwork()
    network(25 * paddle.randn([2, 1, 32, 32]))
    with nullcontext() if other == 1 else pytest.raises(UserError, match="not synchronized"):
        check_synchronized(network)


def test_loss_of_a_float16_output_is_computed_in_float32():
    rgb = paddle.randint(0, 256, [2, 3, 32, 32]).astype("uint8")
    logits = paddle.randn([2, 313, 8, 8]).astype("float16")
    args = train.parse_args(["--image_dir", "x"])
    settings = train.make_constants(args), args, autocast("off")
    half, single = (train.objective(lambda _, x=x: x, rgb, *settings)[0] for x in (logits, logits.astype("float32")))
    assert half.dtype == paddle.float32 and half.tolist() == single.tolist()


# A long run


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_memory_is_steady_over_a_thousand_steps(tmp_path, square_crops):
    """Compare resident memory, the worker's too, and open files after 200 steps and after 1,200.

    Within one long epoch, because Paddle ends a loader's thread and closes its pipes seconds after an epoch.
    """

    def usage(process):
        pids = [process.pid, *(pid for pid in process.family() - {process.pid} if not has_ended(pid))]
        pages = [int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids]
        return [*(n * resource.getpagesize() / 2**20 for n in pages), len(os.listdir(f"/proc/{process.pid}/fd"))]

    (tmp_path / "images").mkdir()
    for i in range(1500):
        (tmp_path / "images" / f"{i}.png").symlink_to(square_crops / "coffee.png")
    more = ["--num_workers", 1, "--batch_size", 1, "--loss_step", 20, "--save_latest", 50]
    with start_training(tmp_path, tmp_path / "images", *more, size=16) as process:
        samples = []
        for step in (200, 1200):
            wait_for(lambda step=step: steps_done(tmp_path) >= step, process)
            # The lowest of ten samples: a save opens a file.
            samples.append(np.min([usage(process) for _ in range(10)], axis=0))
    before, after = samples
    assert len(before) == 3 and (after[:2] < before[:2] + 20).all() and after[2] <= before[2], samples
