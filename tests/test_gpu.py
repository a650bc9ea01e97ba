"""GPU settings, checked on a CPU that pretends to be a GPU."""

from support.gpu import HALF, check_gpu, mixed_precision, to_device

import numpy as np
import paddle
import pytest


@pytest.mark.parametrize(
    ("choice", "capability", "expected"),
    [
        ("auto", (8, 0), (True, "bfloat16", False)),
        ("auto", (7, 5), (True, "float16", True)),
        ("auto", (6, 1), (False, "float16", False)),
        ("off", (8, 9), (False, "float16", False)),
    ],
)
def test_mixed_precision_follows_the_gpus_capability(monkeypatch, pretend_device, choice, capability, expected):
    scalers = []
    pretend_device("gpu:0", *capability)
    monkeypatch.setattr(paddle.amp, "GradScaler", lambda **settings: scalers.append(settings))
    autocast, _ = mixed_precision(choice)
    assert (autocast["enable"], autocast["dtype"], scalers[0]["enable"]) == expected
    assert scalers[0]["init_loss_scaling"] * 3535 < np.finfo(np.float16).max  # the largest gradient from `small`


def test_unsupported_mixed_precision_is_refused(pretend_device, error_message):
    pretend_device("gpu:0", 7, 0)
    assert error_message(mixed_precision, "bf16") == "--amp bf16: not supported by Paddle on this device, gpu:0"


def test_autocast_list_does_not_contradict_those_of_paddle():
    """Operators in neither list would be computed in float32."""
    from paddle.amp.amp_lists import black_list, white_list

    for dtype in ("float16", "bfloat16"):
        assert not HALF & black_list()[dtype]["O1"] and "conv2d" in white_list()[dtype]["O1"]


def test_unused_gpu_prints_one_line(monkeypatch, tmp_path, capsys):
    (tmp_path / "nvidia-smi").touch(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(paddle, "is_compiled_with_cuda", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    check_gpu()
    assert "is built for CPUs; see requirements-gpu.txt" in capsys.readouterr().err
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    check_gpu()
    assert capsys.readouterr().err == ""


def test_copy_to_the_gpu_does_not_wait(pretend_device):
    class Pinned:
        def cuda(self, blocking=True):
            return "there", blocking

    pretend_device("gpu:0", 8, 0)
    assert to_device(Pinned()) == ("there", False)
