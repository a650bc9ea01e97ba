"""Predictors: the engine, eager mode and bf16 agree; what a platform lacks is reported in one line."""

import faulthandler
import os
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial

from support.cli import Stopped, run_script
from support.inference import eager_predictor, fold_batch_norm, make_predictor, temporary_folder

import numpy as np
import paddle
import pytest
from small_network import SmallNetwork

from colorizer import INPUT_SHAPE
from pretrained import load_network


@pytest.fixture(scope="module")
def engine(cic_checkpoint):
    return make_predictor(partial(load_network, cic_checkpoint), INPUT_SHAPE, "float32")[0]


def test_engine_equals_eager_mode_at_any_size_and_bf16_nearly_does(cic_checkpoint, engine):
    eager = eager_predictor(load_network(cic_checkpoint), "float32")
    bf16, _ = make_predictor(partial(load_network, cic_checkpoint), INPUT_SHAPE, "bf16")
    for size in ((1, 64, 64), (3, 72, 120), (1, 8, 8), (1, 64, 64)):
        x = 25 * paddle.randn([size[0], 1, *size[1:]])
        expected = eager(x)
        assert (engine(x) - expected).abs().max() < 1e-4 * expected.abs().max()
        assert (bf16(x) - expected).abs().mean() < 0.1 * expected.std()


@pytest.mark.parametrize(
    ("supported", "paddles", "precision"),
    [(True, "3.0.0", "bf16"), (True, "2.6.2", "float32"), (False, "3.3.1", "float32")],
)
def test_auto_precision_is_bf16_where_the_cpu_supports_it(supported, paddles, precision, monkeypatch):
    monkeypatch.setattr(paddle.base.core, "supports_bfloat16_fast_performance", lambda: supported)
    monkeypatch.setattr(paddle, "__version__", paddles)
    monkeypatch.setattr("support.inference.engine_predictor", lambda layer, shape, precision: precision)
    assert make_predictor(SmallNetwork, INPUT_SHAPE, "auto") == (precision, precision)


@pytest.mark.parametrize(("generation", "precision"), [(7, "float32"), (8, "bf16")])
def test_bf16_on_a_gpu_without_it_prints_one_line_and_computes_in_float32(
    generation, precision, pretend_device, capsys
):
    pretend_device("gpu:0", generation, 0)
    assert make_predictor(SmallNetwork, INPUT_SHAPE, "bf16")[1] == precision
    assert capsys.readouterr().err.count("bf16: not supported") == (precision == "float32")


@pytest.mark.parametrize("has_engine", [True, False])
def test_predictions_are_the_same_without_the_engine(small_network, small_checkpoint, monkeypatch, capsys, has_engine):
    """The engine fails, after it changed the layer, or Paddle was built without oneDNN."""
    load, x = partial(load_network, small_checkpoint), 25 * paddle.randn([1, 1, 24, 40])
    expected = make_predictor(load, INPUT_SHAPE, "float32")[0](x)
    monkeypatch.setattr("paddle.inference.create_predictor", lambda _: 1 / 0)
    monkeypatch.setattr(paddle.base.core, "is_compiled_with_mkldnn", lambda: has_engine)
    predict, precision = make_predictor(load, INPUT_SHAPE, "bf16")
    assert precision == "float32" and float((predict(x) - expected).abs().max()) < 1e-4
    assert capsys.readouterr().err.count("computing in a slower way, in float32") == has_engine


def test_folded_batch_norm_does_not_change_the_output():
    network, x = SmallNetwork(), 25 * paddle.randn([2, 1, 32, 32])
    network(x)  # statistics other than 0 and 1
    network.down[0][2].weight.set_value(paddle.rand([16]) + 0.5)
    network.eval()
    before = network(x)
    fold_batch_norm(network)
    assert not any(isinstance(layer, paddle.nn.BatchNorm2D) for layer in network.sublayers())
    np.testing.assert_allclose(network(x), before, rtol=1e-4, atol=1e-4)


def test_temporary_folder_has_an_ascii_name_on_windows(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "猫"))
    monkeypatch.setenv("PUBLIC", str(tmp_path))
    with temporary_folder() as folder:
        assert os.path.dirname(folder) == str(tmp_path)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are not forked")
def test_process_forked_amid_a_run_of_another_thread_can_run_the_engine(engine):
    x = paddle.ones([1, 1, 64, 64])
    expected = engine(x).numpy()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(lambda: [engine(x) for _ in range(50)])
        for _ in range(3):
            if (child := os.fork()) == 0:
                faulthandler.dump_traceback_later(30, exit=True)  # if it hangs
                os._exit(not np.array_equal(engine(x).numpy(), expected))
            assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("error", [RuntimeError, None], ids=["another exception", "no exception"])
def test_stop_that_is_lost_while_the_engine_is_built_stops_the_script(handlers, monkeypatch, capsys, error):
    def build(*_):
        with suppress(Stopped):
            os.kill(os.getpid(), signal.SIGTERM)
        if error:
            raise error("In transformed code:")

    monkeypatch.setattr("support.inference.engine_predictor", build)
    assert run_script(lambda _: make_predictor(SmallNetwork, INPUT_SHAPE), lambda: None) == 143
    assert capsys.readouterr().err == "stopped by SIGTERM\n"


def test_full_disk_is_the_reason_that_is_printed(monkeypatch, capsys):
    save = paddle.jit.save

    def save_half(layer, path):
        save(layer, path)
        os.truncate(f"{path}.pdiparams", os.path.getsize(f"{path}.pdiparams") // 2)

    monkeypatch.setattr(paddle.jit, "save", save_half)
    assert make_predictor(SmallNetwork, INPUT_SHAPE, "float32")[1] == "float32"
    (line,) = capsys.readouterr().err.splitlines()
    assert "cannot be used in float32 (the disk of " in line and "is full); computing in a slower way" in line


def test_thread_that_first_uses_paddle_during_an_export_is_in_dynamic_mode():
    """Paddle would put it into static mode for good."""
    results = []

    class Watched(SmallNetwork):
        def forward(self, x):  # called in static mode
            thread = threading.Thread(target=lambda: results.append(paddle.to_tensor(np.uint8([7])).numpy()))
            thread.start()
            thread.join()
            return super().forward(x)

    assert make_predictor(Watched, INPUT_SHAPE, "float32")[1] == "float32"
    assert results == [7] and paddle.in_dynamic_mode()


def test_threads_make_and_run_predictors_without_mixing_up_images(capsys):
    interval = sys.getswitchinterval()
    with ThreadPoolExecutor(4) as pool:
        predict, _ = [*pool.map(lambda _: make_predictor(SmallNetwork, INPUT_SHAPE, "float32"), range(8))][0]
        assert not capsys.readouterr().err
        inputs = [25 * paddle.randn([1, 1, 8 * (i % 3 + 1), 8]) for i in range(64)]
        expected = [predict(x).numpy() for x in inputs]
        sys.setswitchinterval(1e-6)  # seconds
        try:
            results = [x.numpy() for x in pool.map(predict, inputs)]
        finally:
            sys.setswitchinterval(interval)
    assert all(map(np.array_equal, results, expected))
