"""A run that was stopped in any way goes on as if it had not been."""

import contextlib
import os
import random
import shutil
import signal
import time

from support.checkpoints import load_checkpoint, save_checkpoint
from support.processes import StopRequest

import numpy as np
import paddle
import pytest
from conftest import recorded
from processes import flags, gone, log, run, started, steps_done, stopped_at_random, wait_for

import train

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals")


@pytest.fixture(autouse=True)
def _small(small_network):
    pass


def state(folder, name="latest"):
    return load_checkpoint(folder / "model" / f"epoch_{name}_state.pdopt")


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return np.array_equal(a, b)


def figures(folder):
    """What the log says of each step, but for times; of a step that was done twice, both."""
    return [{k: v for k, v in line.items() if k not in ("images_per_second", "waiting")} for line in log(folder)]


# Killed


def killed_at_random(folder, images, steps, kills, *more):
    """Runs `steps` steps, killed by SIGKILL that often: at first once there is a save, then at any moment."""
    moment, saved = random.Random(0), folder / "model" / "epoch_latest_state.pdopt"
    for _ in range(kills):
        resume = ["--continue_train"] if saved.exists() else []
        goal = (state(folder)["progress"]["step"] if resume else 0) + 1 + moment.randrange(3)
        with started(folder, *flags(folder, images, "--max_steps", 10**6, *more, *resume)) as process:
            wait_for(lambda goal=goal: saved.exists() and steps_done(folder) >= goal, process)
            time.sleep(moment.random() * 0.1)
            process.kill()
            process.wait()
        assert steps_done(folder) < steps, "raise the number of steps"
    code, err = run(folder, *flags(folder, images, "--max_steps", steps, *more, "--continue_train"))
    assert code == 0, err


@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_as_one_that_was_not(tmp_path, squares):
    """It saves after every second step, so that most of its time goes into writing: some kills fall into that."""
    (whole := tmp_path / "whole").mkdir()
    more = ["--save_latest", 2, "--batch_size", 1, "--num_workers", 1, "--val_dir", squares, "--num_epochs", 500]
    killed_at_random(tmp_path / "parts", squares, 80, 3, *more)
    assert run(whole, *flags(whole, squares, "--max_steps", 80, *more))[0] == 0
    assert same(state(whole), state(tmp_path / "parts"))
    assert figures(whole) == figures(tmp_path / "parts")
    assert not list((tmp_path / "parts" / "model").glob(".*"))


@pytest.mark.slow
def test_killed_while_it_writes_each_part_of_a_checkpoint(run_training, tmp_path, monkeypatch, squares):
    """Stopped dead after each of the calls that write, as a kill would: what is there can be gone on from."""
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
            assert same(state(tmp_path / "whole"), state(tmp_path / folder))


@pytest.mark.slow
def test_the_real_network_killed_while_it_writes_goes_on(tmp_path, squares):
    more = ["--batch_size", 1, "--save_latest", 1]
    script = train.__file__
    with started(tmp_path, *flags(tmp_path, squares, *more), script=script) as process:
        wait_for((tmp_path / "model" / "epoch_latest_model.pdparams").exists, process)
        wait_for(lambda: list((tmp_path / "model").glob(".*.tmp")), process)
        process.kill()
        process.wait()
    assert list((tmp_path / "model").glob(".*.tmp"))
    done = state(tmp_path)["progress"]["step"]
    code, _ = run(
        tmp_path, *flags(tmp_path, squares, *more, "--max_steps", done + 1, "--continue_train"), script=script
    )
    assert code == 0 and state(tmp_path)["progress"]["step"] == done + 1
    assert not list((tmp_path / "model").glob(".*"))


@pytest.mark.slow
def test_workers_end_with_a_killed_run(tmp_path, squares):
    with started(tmp_path, *flags(tmp_path, squares, "--num_workers", 2, "--batch_size", 1)) as process:
        wait_for(lambda: steps_done(tmp_path) > 2 and len(process.family()) >= 3, process)
        process.send_signal(signal.SIGSTOP)  # no new workers meanwhile
        family = process.family()
        process.kill()
        wait_for(lambda: all(gone(pid) for pid in family))


# Signals


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_ends_with_its_own_code(tmp_path, squares, number, code):
    """Sent to the whole group of processes, workers too, as a terminal or a launcher does."""
    more = ["--batch_size", 1, "--num_workers", 2]
    with started(tmp_path, *flags(tmp_path, squares, *more)) as process:
        wait_for(lambda: steps_done(tmp_path) > 5, process)
        os.killpg(process.pid, number)
        assert process.wait(60) == code
    message = (tmp_path / "err").read_text()
    assert "Traceback" not in message and "--continue_train" in message
    done = steps_done(tmp_path)
    assert state(tmp_path)["progress"]["step"] == done
    whole = tmp_path / "whole"
    code, _ = run(tmp_path, *flags(tmp_path, squares, *more, "--continue_train", "--max_steps", done + 3))
    assert code == 0 and run(whole, *flags(whole, squares, *more, "--max_steps", done + 3))[0] == 0
    assert same(state(tmp_path), state(whole)) and figures(tmp_path) == figures(whole)


@pytest.mark.slow
def test_nothing_is_lost_at_a_signal_at_whatever_moment(tmp_path, squares):
    """The workers of the next epoch may just be starting."""
    for code, right, said in stopped_at_random(tmp_path, squares, signals=12):
        assert code == right, said
        assert "Traceback" not in said and "to go on" in said
        assert state(tmp_path)["progress"]["step"] == steps_done(tmp_path)


@pytest.mark.slow
def test_a_worker_that_dies_of_the_same_signal_does_not_keep_the_run_from_saving(tmp_path, squares):
    with started(tmp_path, *flags(tmp_path, squares, "--num_workers", 2, "--batch_size", 1)) as process:
        wait_for(lambda: steps_done(tmp_path) > 2 and len(process.family()) >= 3, process)
        process.send_signal(signal.SIGSTOP)  # no new workers meanwhile
        for pid in process.family() - {process.pid}:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGCONT)
        assert process.wait(60) == 143
    assert state(tmp_path)["progress"]["step"] == steps_done(tmp_path)


def test_a_second_ctrl_c_leaves_at_once_but_not_a_second_sigterm(squares):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    stop = StopRequest()
    for _ in range(3):
        os.kill(os.getpid(), signal.SIGTERM)
    assert stop.after_step() == signal.SIGTERM
    assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL
    stop.restore()
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_signal_amid_validation_does_not_wait_for_its_end(run_training, squares, tmp_path, monkeypatch):
    """And what goes on validates then."""
    original = train.soft_encode

    def signalled(*x):
        if not paddle.is_grad_enabled() and x[0].shape[-1] == 10:  # a quarter of --load_size 40
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*x)

    flags_ = ["--val_dir", squares, "--num_epochs", 1, "--max_steps", 5]
    with monkeypatch.context() as patch:
        patch.setattr(train, "soft_encode", signalled)
        with pytest.raises(AssertionError):  # the fixture's, of the exit code
            run_training(*flags_)
    assert not any("val_kl" in line for line in log(tmp_path / "run"))
    lines = run_training(*flags_, "--continue_train")
    assert [line["step"] for line in lines if "val_kl" in line] == [1]
    assert (tmp_path / "run" / "model" / "epoch_0_model.pdparams").exists()


# Other flags, other files


def test_other_settings_than_the_checkpoints(run_training, stopped, tmp_path, capsys, squares):
    run_training("--batch_size", 1, "--max_steps", 2)

    def message(*flags):
        return stopped(lambda _: run_training("--batch_size", 1, "--max_steps", 3, "--continue_train", *flags), None)

    assert "--rebalance True is now False" in message("--no-rebalance")
    assert "--gamma 0.5 is now 0" in message("--gamma", 0)
    assert "--NN 5 is now 3" in message("--NN", 3)
    np.save(tmp_path / "prior.npy", np.arange(313.0))
    assert "--prior is another one" in message("--prior", tmp_path / "prior.npy")
    assert "exclude" in message("--init_from", "x")
    capsys.readouterr()
    run_training("--batch_size", 1, "--max_steps", 3, "--continue_train", "--lr", 1e-3, "--crop_size", 24, "--seed", 5)
    notes = capsys.readouterr().err
    assert "--lr 3.16e-05 is now 0.001" in notes and "--crop_size 32 is now 24" in notes
    assert "--seed 0 is now 5" in notes and "beginning epoch 0 again" in notes
    assert state(tmp_path / "run")["progress"]["batch"] == 1


def test_a_folder_of_another_size(run_training, tmp_path, capsys, squares):
    run_training("--batch_size", 1, "--max_steps", 2)
    os.link(squares / "coffee.png", squares / "more.png")
    try:
        run_training("--batch_size", 1, "--max_steps", 3, "--continue_train")
    finally:
        (squares / "more.png").unlink()
    assert "number of images 4 is now 5" in capsys.readouterr().err


def test_files_that_cannot_be_gone_on_from(run_training, stopped, tmp_path):
    run_training()
    path = tmp_path / "run" / "model" / "epoch_latest_state.pdopt"

    def message(*flags):
        return stopped(lambda _: run_training("--continue_train", *flags), None)

    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert "epoch_latest_state.pdopt: not a readable checkpoint" in message()
    path.write_bytes((path.parent / "epoch_latest_model.pdparams").read_bytes())
    assert "not a training state" in message()
    path.unlink()
    assert "--init_from" in message()
    assert "no such checkpoint" in message("--which_epoch", 7)


def test_a_log_that_was_cut_off_is_mended(run_training, tmp_path):
    run_training("--batch_size", 1, "--max_steps", 2)
    with open(tmp_path / "run" / "log" / "train.jsonl", "a") as file:
        file.write('{"step": 3, "loss": 1}\n{"step": 4, "lo')
    lines = run_training("--batch_size", 1, "--max_steps", 3, "--continue_train")
    assert [line["step"] for line in lines] == [1, 2, 3] and "nats" in lines[2]


def test_visualdl_shows_a_run_that_was_stopped_or_killed_as_one(run_training, tmp_path, squares, capsys):
    """Its curves, that is: of pictures those since the last start."""
    shown = (("scalar", train.TAGS["loss"]), ("scalar", train.TAGS["val_kl"]), ("image", train.PICTURE))
    model, logs = tmp_path / "run" / "model", tmp_path / "run" / "log"

    def steps_shown(to, *more):
        run_training("--batch_size", 2, "--val_dir", squares, "--num_epochs", 9, "--max_steps", to, *more)
        board = recorded(logs)
        return [[x.id for x in board.get_data(*kind)] if kind[1] in board.get_tags()[kind[0]] else [] for kind in shown]

    assert steps_shown(2) == [[1, 2], [2], [2]]
    shutil.copytree(model, tmp_path / "saved")
    assert steps_shown(4, "--continue_train") == [[1, 2, 3, 4], [2, 4], [4]]
    shutil.rmtree(model)  # as if killed after step 4, of which 2 were saved
    shutil.copytree(tmp_path / "saved", model)
    assert steps_shown(3, "--continue_train")[:2] == [[1, 2, 3], [2, 3]]
    assert steps_shown(2) == [[1, 2], [2], [2]]  # a new run
    assert "exists" not in capsys.readouterr().out


def test_keep_leaves_later_checkpoints_of_another_run(run_training, tmp_path):
    save_checkpoint({"x": paddle.ones([1])}, tmp_path / "run" / "model" / "epoch_19_model.pdparams")
    run_training("--num_epochs", 3, "--keep", 1, "--max_steps", 100)
    names = {path.name for path in (tmp_path / "run" / "model").glob("*.pdparams")}
    assert names == {f"epoch_{x}_model.pdparams" for x in ("2", "19", "latest")}


def test_fine_tuning_starts_from_weights_alone(run_training, tmp_path):
    run_training(folder="a")
    path = tmp_path / "a" / "model" / "epoch_latest_model.pdparams"
    run_training("--init_from", path, "--max_steps", 1, "--lr", 1e-30, "--weight_decay", 0, folder="b")
    assert state(tmp_path / "b")["progress"]["step"] == 1
    a, b = (load_checkpoint(tmp_path / x / "model" / "epoch_latest_model.pdparams") for x in "ab")
    assert np.array_equal(a["head.weight"], b["head.weight"])
