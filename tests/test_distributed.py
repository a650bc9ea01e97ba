"""Several processes (`paddle.distributed.launch` with gloo on the CPU) train as one process does."""

import os
import re
import signal

from support import processes
from support.checkpoints import load_checkpoint

import numpy as np
import pytest
from processes import (
    LIMIT,
    has_ended,
    launcher_flags,
    read_log,
    run_training_to_end,
    start_training,
    steps_done,
    wait_for,
)

from dataset import EpochSampler

pytestmark = pytest.mark.skipif(os.name == "nt", reason="gloo")


def ranks(process):
    """Return the ids of the processes that train, by rank."""
    found = {}
    for pid in process.family() - {process.pid}:
        try:
            with open(f"/proc/{pid}/environ", "rb") as environ, open(f"/proc/{pid}/stat") as stat:
                rank = re.search(rb"PADDLE_TRAINER_ID=(\d+)", environ.read())
                parent = int(stat.read().rsplit(")", 1)[1].split()[1])
        except OSError:
            continue
        if rank and parent == process.pid:
            found[int(rank[1])] = pid
    return found


def weights(folder, name="latest"):
    return load_checkpoint(folder / "model" / f"epoch_{name}_model.pdparams")


def compare(one, two, rtol=1e-4):
    """Compare the logs and weights of two runs."""
    lines = [read_log(folder) for folder in (one, two)]
    assert [line["step"] for line in lines[0]] == [line["step"] for line in lines[1]]
    for a, b in zip(*lines):
        for name in a.keys() - {"images_per_second", "waiting"}:
            assert a[name] == pytest.approx(b[name], rel=rtol), name
    for name, value in weights(one).items():
        np.testing.assert_allclose(weights(two)[name], value, rtol=1e-3, atol=1e-5, err_msg=name)


@pytest.mark.slow
def test_two_processes_equal_one_with_the_same_batch(tmp_path, image_folder, square_crops):
    """Losses, weights, and a validation of three images. Batch norm is frozen: its statistics are per process."""
    for i, path in enumerate(sorted(image_folder.iterdir())[:3]):
        (tmp_path / "three").mkdir(exist_ok=True)
        (tmp_path / "three" / f"{i}.png").write_bytes(path.read_bytes())
    (tmp_path / "five").mkdir()
    for path in [*sorted(square_crops.iterdir()), tmp_path / "three" / "0.png"]:
        (tmp_path / "five" / path.name).write_bytes(path.read_bytes())
    more = ["--val_dir", tmp_path / "three", "--freeze_bn", "--lr", 1e-3, "--num_epochs", 5, "--save_freq", 2]
    one, two = tmp_path / "one", tmp_path / "two"
    assert run_training_to_end(one, tmp_path / "five", *more)[0] == 0
    code, _ = run_training_to_end(two, tmp_path / "five", *more, launcher=launcher_flags(2, two))
    assert code == 0
    compare(one, two)
    assert sum("val_kl" in line for line in read_log(two)) == 5
    names = [sorted(path.name for path in (folder / "model").iterdir()) for folder in (one, two)]
    assert names[0] == names[1]
    assert len(list((two / "log").glob("vdlrecords*"))) == 1  # only rank 0 writes
    assert (two / "out").read_text().count("val_kl") == 5
    # A run can be resumed with another number of processes, and the images stay the same.
    for folder, launcher in ((one, launcher_flags(2, one)), (two, ())):
        more[more.index("--num_epochs") + 1] = 7
        assert run_training_to_end(folder, tmp_path / "five", *more, "--continue_train", launcher=launcher)[0] == 0
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
        trainers = ranks(process)
        assert len(trainers) == 2
        process.send_signal(number)
        process.wait(LIMIT)
        wait_for(lambda: all(has_ended(pid) for pid in trainers.values()))
    state = load_checkpoint(tmp_path / "model" / "epoch_latest_state.pdopt")
    assert state["progress"]["step"] == steps_done(tmp_path)


@pytest.mark.slow
def test_lost_process_ends_the_others(tmp_path, square_crops):
    with start_training(tmp_path, square_crops, "--num_workers", 1, launcher=launcher_flags(2, tmp_path)) as process:
        wait_for(lambda: steps_done(tmp_path) > 2, process)
        trainers = ranks(process)
        family = process.family()
        os.kill(trainers[1], signal.SIGKILL)
        assert process.wait(LIMIT) != 0
        wait_for(lambda: all(has_ended(pid) for pid in family))
    # Rank 0 may be named as well, if it ended before the launcher looked.
    message = (tmp_path / "out").read_text() + (tmp_path / "err").read_text()
    assert re.search(r"rank=\[(0, )?1\] was aborted", message)


def test_processes_agree_about_once_per_second(monkeypatch):
    """Steps may take any time."""
    clock, questions = [0.0], []
    monkeypatch.setattr(processes.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(processes.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(processes, "all_reduce", lambda values, _: questions.append(clock[0]) or values)
    with processes.StopRequest() as stop:
        for _ in range(2000):
            clock[0] += 0.01 if clock[0] < 10 else 3
            assert stop.after_step() == 0
    early = sorted({x for x in questions if x < 10})
    assert 9 <= len(early) <= 12
    late = sorted({x for x in questions if x > 500})
    assert np.diff(late).max() == 3  # after each step


def test_image_order_does_not_depend_on_the_number_of_processes():
    """Each image appears once per epoch, except for those that do not fill a batch."""

    def batches(rank, count, skip=0, epoch=0):
        sampler = EpochSampler(range(37), 12 // count, num_replicas=count, rank=rank)
        sampler.begin(1, epoch, skip)
        assert len(sampler) == 3
        return list(sampler)

    whole = batches(0, 1)
    assert len({i for batch in whole for i in batch}) == 36
    for count in (2, 3, 4):
        shares = [batches(rank, count) for rank in range(count)]
        assert [sum((share[i] for share in shares), []) for i in range(3)] == whole
    assert batches(0, 1, skip=2) == whole[2:] and batches(0, 1, skip=3) == []
    assert batches(0, 1, epoch=1) != whole
