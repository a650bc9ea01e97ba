"""Checkpoints: files that cannot be read, and weights that do not fit, are refused in one line."""

import hashlib

from support.checkpoints import load_checkpoint, read_checkpoint, save_checkpoint, set_weights
from support.cli import UserError

import numpy as np
import paddle
import pytest
from conftest import same_values
from paddle import nn
from weights import refusal


def make_network():
    return nn.Sequential(nn.Conv2D(2, 3, 3), nn.BatchNorm2D(3))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "epoch_0_model.pdparams"


def test_saved_weights_are_read_with_their_checksum_and_truncated_ones_refused(path):
    network, state = make_network(), make_network().state_dict()
    save_checkpoint({**state, "entry": "text"}, path)
    loaded, sha256 = read_checkpoint(path)
    whole = path.read_bytes()
    assert sha256 == hashlib.sha256(whole).hexdigest()
    set_weights(network, loaded, path)
    assert same_values(network.state_dict(), state)
    for length in (0, 1, 2, 9, 40, len(whole) // 3, len(whole) // 2, len(whole) - 1):
        assert "not a readable checkpoint" in refusal(path, whole[:length])


UNFITTING = {  # changes to a state, and the message
    "many missing": (lambda s: s.clear(), r"missing or unknown: 0.bias, 0.weight, 1._mean, …$"),
    "unexpected": (lambda s: s.update(extra=paddle.ones([1])), r"checkpoint: missing or unknown: extra$"),
    "shape": (lambda s: s.update({"0.bias": paddle.ones([4])}), r"0.bias is float32 \[4\] instead of float \[3\]"),
    "NaN": (lambda s: s.update({"0.bias": np.float32([1, np.nan, 1])}), r"not finite .*: 0.bias$"),
    "no array": (lambda s: s.update({"0.bias": [1.0, 2.0, 3.0]}), r"missing or unknown: 0.bias$"),
    "integers": (lambda s: s.update({"0.bias": np.ones(3, int)}), r"0.bias is int64 \[3\] instead of float \[3\]"),
    "overflow": (lambda s: s.update({"0.bias": np.array([1e300, 1, 1])}), r"not finite .*: 0.bias$"),
    "negative variance": (lambda s: s.update({"1._variance": -paddle.ones([3])}), r"a negative variance: 1._variance$"),
}


@pytest.mark.parametrize("kind", UNFITTING)
def test_weights_that_do_not_fit_are_named_and_change_nothing(path, kind):
    (change, message), network = UNFITTING[kind], make_network()
    before = {name: tensor.numpy().copy() for name, tensor in network.state_dict().items()}
    state = dict(network.state_dict())
    change(state)
    save_checkpoint(state, path)
    with pytest.raises(UserError, match=message):
        set_weights(network, load_checkpoint(path), path)
    assert same_values(before, network.state_dict())


def test_missing_file_and_folder_are_refused_in_one_line(tmp_path):
    assert "cannot be read: no such file" in refusal(tmp_path / "nothing.pdparams")
    assert "cannot be read: is a directory" in refusal(tmp_path)
