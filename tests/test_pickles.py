"""Pickles are read as data: the values that Paddle and PyTorch write are returned, and no code in them is run."""

import os
import pickle
import time

from support.checkpoints import load_checkpoint

import numpy as np
import paddle
import pytest
from conftest import same_values
from paddle import nn
from weights import Call, peak_memory, refusal


@pytest.fixture
def path(tmp_path):
    return tmp_path / "epoch_0_model.pdparams"


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_state_that_paddle_saves_is_loaded(path, protocol):
    """Protocol 2 was Paddle 2.0's default, 4 is today's. Tensors are written as pairs of a name and an array."""
    state = {
        "network": nn.Sequential(nn.Conv2D(2, 3, 3), nn.BatchNorm2D(3)).state_dict(),
        "progress": {"epoch": 3, "best": np.float64(1.5), "count": np.int64(7), "done": False, "rest": None},
        "list": [paddle.arange(3), ("a", 1.5), "text"],
        "scalar": paddle.to_tensor(2.5),
        "bfloat16": paddle.to_tensor([1.5, -2.0]).astype("bfloat16"),
    }
    paddle.save(state, str(path), protocol=protocol)
    state["bfloat16"] = state["bfloat16"].astype("float32")
    assert same_values(load_checkpoint(path), state)


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_arrays_of_every_type_and_layout_are_loaded(path, protocol):
    kinds = ("bool", "int8", "uint8", "int16", "int32", "int64", "float16", "float32", "float64")
    state = {kind: np.arange(6).reshape(2, 3).astype(kind) for kind in kinds}
    state |= {"again": state["int8"], "empty": np.zeros((0, 3)), "number": np.array(2.0)}
    state["columns"] = np.asfortranarray(np.eye(2, 3))
    path.write_bytes(pickle.dumps(state, protocol))
    loaded = load_checkpoint(path)
    assert same_values(loaded, state)
    assert all(loaded[kind].dtype == kind for kind in kinds)
    assert "big-endian" in refusal(path, pickle.dumps({"a": np.ones(3, ">f4")}, protocol))


# Files that would run code


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_malicious_pickle_is_refused_and_does_not_run(path, tmp_path, protocol):
    """The opcodes are REDUCE, GLOBAL and, since protocol 4, STACK_GLOBAL."""
    call = Call(os.mkdir, str(tmp_path / "it-ran"))
    for content in (call, {"conv1.0.weight": np.ones(3), "conv1.0.bias": call}):
        assert "which no checkpoint needs" in refusal(path, pickle.dumps(content, protocol))
    assert os.listdir(tmp_path) == [path.name]


CALLS = {  # other ways in which a pickle calls a function with the argument %s, or changes an object
    "INST": b"(%sios\nmkdir\n.",
    "OBJ": b"(cnumpy\ndtype\n%so.",
    "NEWOBJ": b"cnumpy\ndtype\n%s\x85\x81.",
    "BUILD of a function": b"c_codecs\nencode\n}%s%ssb.",
    "BUILD of a text": b"%s}b.",
}


@pytest.mark.parametrize("kind", CALLS)
def test_opcodes_that_call_or_change_objects_reach_only_the_stand_ins(path, tmp_path, kind):
    argument = str(tmp_path / "it-ran").encode()
    text = b"X" + len(argument).to_bytes(4, "little") + argument
    assert refusal(path, b"\x80\x02" + CALLS[kind].replace(b"%s", text))
    assert os.listdir(tmp_path) == [path.name]


def test_message_names_the_content_that_was_refused(path):
    assert "time.sleep" in refusal(path, pickle.dumps({"a": time.sleep}))
    assert "opcode b'd', which" in refusal(path, pickle.dumps({}, 0))
    assert "holds a list, not the state" in refusal(path, pickle.dumps([1]))


# Arrays that contradict themselves

RECONSTRUCT, SCALAR = np.ones(1).__reduce__()[0], np.float64(1).__reduce__()[0]


def forged_array(shape, code, data):
    """Return what pickles as an array whose type and content may contradict its shape. No two share a tuple."""
    dtype = Call(np.dtype, code, False, True, state=(3, "<", *[None] * 3, -1, -1, 0))
    return Call(RECONSTRUCT, np.ndarray, (), b"b", state=(1, (*shape,), dtype, False, data))


def test_forged_arrays_are_refused(path):
    path.write_bytes(pickle.dumps({"a": forged_array((2,), "f4", b"\0" * 8)}))
    assert load_checkpoint(path)["a"].shape == (2,)  # the forgery works, if it is honest
    for shape, code, data, message in (
        ((1,), "O8", b"\x41" * 8, "array of 'O8'"),  # numbers that would be taken for pointers
        ((2**32, 2**32), "f4", b"", "cannot reshape"),  # its size overflows to 0 in 64 bits
        ((10**600,) * 1000, "f4", b"", "not a readable checkpoint"),  # its size takes minutes to compute
        ((-2, -1), "f4", b"\0" * 8, "one unknown dimension"),
    ):
        assert message in refusal(path, pickle.dumps({"a": forged_array(shape, code, data)}, 2))


def test_allowed_functions_are_not_called_with_the_arguments_in_the_file(path):
    """NumPy's own would take these for gigabytes, and for objects."""
    path.write_bytes(pickle.dumps({"a": Call(RECONSTRUCT, np.ndarray, (2**40,), b"d")}))
    assert peak_memory(lambda: load_checkpoint(path)) < 1e6
    assert "array of 'O'" in refusal(path, pickle.dumps({"a": Call(SCALAR, Call(np.dtype, "O"), [1])}))
    assert "not a readable checkpoint" in refusal(path, pickle.dumps({"a": Call(np.ndarray, (2**40,))}))


# Small files that would take much memory or time


def test_declared_sizes_take_no_memory(path):
    """A bytearray, bytes and a text declare their size; the last file declares the length of the memo."""
    declared = [opcode + (3_500_000_000).to_bytes(8, "little") for opcode in (b"\x96", b"\x8e", b"\x8d")]
    for content in (*(b"\x80\x04" + opcode + b"}." for opcode in declared), b"\x80\x02}r\xff\xff\xff\x0f"):
        assert peak_memory(lambda content=content: refusal(path, content)) < 1e6


def test_millions_of_opcodes_are_refused_in_bounded_memory(path):
    path.write_bytes(b"\x80\x04}" + b"}" * 3_000_000)
    assert peak_memory(lambda: refusal(path)) < 150e6


@pytest.mark.parametrize("container", [list, tuple])
def test_containers_that_repeat_each_other_are_refused_quickly(path, container):
    bomb = container()
    for _ in range(60):
        bomb = container((bomb, bomb))  # 2^60 containers, if each is copied, printed or hashed
    for state in ({"a": bomb}, {"a": Call(np.ndarray, bomb)}, {"a": [1], "b": bomb}):
        assert "same list, tuple, dict or long text twice" in refusal(path, pickle.dumps(state))


def test_arrays_that_share_their_bytes_are_refused(path):
    """A megabyte of bfloat16 could become a thousand arrays of float32."""
    data = bytes(2**20)
    attack = {str(i): forged_array((2**19,), "u2", data) for i in range(1000)}
    assert "long text twice" in refusal(path, pickle.dumps(attack, 4))
    assert peak_memory(lambda: refusal(path)) < 10 * 2**20
