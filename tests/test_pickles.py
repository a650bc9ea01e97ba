"""Pickles are read as data: the values that Paddle and PyTorch write are returned, and no code in them is run."""

import os
import pickle
import time

from support.checkpoints import load_checkpoint, save_checkpoint

import numpy as np
import paddle
import pytest
from paddle import nn
from weights import Call, assert_same_state, peak_memory, refusal


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
    }
    paddle.save(state, str(path), protocol=protocol)
    assert_same_state(load_checkpoint(path), state)


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_arrays_of_every_type_and_layout_are_loaded(path, protocol):
    kinds = ("bool", "int8", "uint8", "int16", "int32", "int64", "float16", "float32", "float64", ">f4", ">i8")
    state = {kind: np.arange(6).reshape(2, 3).astype(kind) for kind in kinds}
    state |= {"again": state["int8"], "empty": np.zeros((0, 3)), "number": np.array(2.0)}
    state["columns"] = np.asfortranarray(np.eye(2, 3))
    path.write_bytes(pickle.dumps(state, protocol))
    loaded = load_checkpoint(path)
    assert_same_state(loaded, state)
    assert all(array.dtype.isnative for array in loaded.values())


def test_bfloat16_is_loaded_as_float32(path):
    save_checkpoint({"nested": [paddle.to_tensor([1.5, -2.0, 3e38]).astype("bfloat16")]}, path)
    (array,) = load_checkpoint(path)["nested"]
    np.testing.assert_allclose(array, [1.5, -2.0, 3e38], rtol=1 / 128)


def test_checkpoint_of_paddle_2_0_under_python_2_is_loaded(path):
    """Text is bytes, an array's numbers are such text, and NumPy's module has its old name."""
    path.write_bytes(
        b"\x80\x02}U\x01wcnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        b"(K\x01K\x02\x85cnumpy\ndtype\nU\x02f4K\x00K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        b"\x89U\x08\x00\x00\x80\x3f\x00\x00\x80\xbftbs."
    )
    assert_same_state(load_checkpoint(path), {"w": np.array([1, -1], np.float32)})


# Files that would run code


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_malicious_pickle_is_refused_and_does_not_run(path, tmp_path, protocol):
    trace = str(tmp_path / "it-ran")
    for call in (Call(os.mkdir, trace), Call(eval, f"open({trace!r}, 'w')")):
        for content in (call, {"conv1.0.weight": np.ones(3), "conv1.0.bias": call}):
            assert "which no checkpoint needs" in refusal(path, pickle.dumps(content, protocol))
    assert not os.path.exists(trace)


FUNCTION, DTYPE = b"cos\nmkdir\n", b"cnumpy\ndtype\n"
CALLS = {  # ways in which a pickle calls a function with the argument %s, or changes an object
    "REDUCE": FUNCTION + b"(%st\x85R.",
    "STACK_GLOBAL": b"\x8c\x02os\x8c\x05mkdir\x93%s\x85R.",
    "INST": b"(%sios\nmkdir\n.",
    "OBJ": b"(" + FUNCTION + b"%so.",
    "OBJ of an allowed class": b"(" + DTYPE + b"%so.",
    "NEWOBJ": FUNCTION + b"%s\x85\x81.",
    "NEWOBJ of an allowed class": DTYPE + b"%s\x85\x81.",
    "BUILD of a class": DTYPE + b"}%s%ssb.",
    "BUILD of a function": b"c_codecs\nencode\n}%s%ssb.",
    "BUILD of a text": b"%s}b.",
    "REDUCE of a text": b"%s)R.",
    "PERSID": b"Pmkdir\n.",
    "EXT1": b"\x82\x01.",
}


@pytest.mark.parametrize("kind", CALLS)
def test_opcodes_that_call_or_change_objects_reach_only_the_stand_ins(path, tmp_path, kind):
    argument = str(tmp_path / "it-ran").encode()
    text = b"X" + len(argument).to_bytes(4, "little") + argument
    assert refusal(path, b"\x80\x02" + CALLS[kind].replace(b"%s", text))
    assert os.listdir(tmp_path) == [path.name]


def test_opcodes_that_are_never_written_are_refused(path):
    for value in ({"a": {1, 2}}, {"a": bytearray(3)}, {"a": 2**3000}, {"a": frozenset()}):
        assert "which no checkpoint needs" in refusal(path, pickle.dumps(value, 5))
    assert "opcode b'd', which" in refusal(path, pickle.dumps({}, 0))


def test_message_names_the_content_that_was_refused(path):
    assert "time.sleep" in refusal(path, pickle.dumps({"a": time.sleep}))
    assert "holds a list, not the state" in refusal(path, pickle.dumps([1]))


# Arrays that contradict themselves


class ForgedArray:
    """Pickles as an array whose type and content may contradict its shape."""

    def __init__(self, shape, code, data):
        self.shape, self.dtype, self.data = shape, ForgedDtype(code), data

    def __reduce__(self):
        reconstruct = np.ones(1).__reduce__()[0]
        return reconstruct, (np.ndarray, (0,), b"b"), (1, self.shape, self.dtype, False, self.data)


class ForgedDtype:
    def __init__(self, code):
        self.code = code

    def __reduce__(self):
        return np.dtype, (self.code, False, True), (3, "<", None, None, None, -1, -1, 0)


def test_forged_arrays_are_refused(path):
    path.write_bytes(pickle.dumps({"a": ForgedArray((2,), "f4", b"\0" * 8)}))
    assert load_checkpoint(path)["a"].shape == (2,)  # the forgery works, if it is honest
    for shape, code, data, message in (
        ((1,), "O8", b"\x41" * 8, "array of 'O8'"),  # numbers that would be taken for pointers
        ((2**40,), "f4", b"\0" * 8, "cannot reshape"),
        ((2**32, 2**32), "f4", b"", "cannot reshape"),  # its size overflows to 0 in 64 bits
        ((10**600,) * 1000, "f4", b"", "not a readable checkpoint"),  # its size takes minutes to compute
        ((1,), "u4", b"\0" * 4, "array of 'u4'"),  # numbers, but of a type that no framework writes
        ((-2, -1), "f4", b"\0" * 8, "one unknown dimension"),
        ((1,), "f4", b"\0" * 7, "multiple of element size"),
    ):
        assert message in refusal(path, pickle.dumps({"a": ForgedArray(shape, code, data)}, 2))


def test_allowed_functions_are_not_called_with_the_arguments_in_the_file(path):
    """NumPy's own would take these for gigabytes, for the pickled function's attributes, for objects."""
    reconstruct, scalar = np.ones(1).__reduce__()[0], np.float64(1).__reduce__()[0]
    path.write_bytes(pickle.dumps({"a": Call(reconstruct, np.ndarray, (2**40,), b"d")}))
    assert load_checkpoint(path)["a"].size == 0
    assert "array of 'O'" in refusal(path, pickle.dumps({"a": Call(scalar, Call(np.dtype, "O"), [1])}))
    assert "not a readable checkpoint" in refusal(path, pickle.dumps({"a": Call(np.ndarray, (2**40,))}))


# Small files that would take much memory or time


def test_declared_sizes_take_no_memory(path):
    """A bytearray, bytes and a text declare their size; the last file declares the length of the memo."""
    declared = [opcode + (3_500_000_000).to_bytes(8, "little") for opcode in (b"\x96", b"\x8e", b"\x8d")]
    for content in (*(b"\x80\x04" + opcode + b"}." for opcode in declared), b"\x80\x02}r\xff\xff\xff\x0f"):
        assert peak_memory(lambda content=content: refusal(path, content)) < 1e6


@pytest.mark.parametrize("opcode", [b"}", b"(", b"\x94"], ids=["dicts", "marks", "memo"])
def test_millions_of_opcodes_are_refused_in_bounded_memory(path, opcode):
    def check():
        assert "more than 1,000,000 opcodes" in refusal(path, b"\x80\x04}" + opcode * 3_000_000)

    assert peak_memory(check) < 150e6


@pytest.mark.parametrize("container", [list, tuple])
def test_containers_that_repeat_each_other_are_refused_quickly(path, container):
    bomb = container()
    for _ in range(60):
        bomb = container((bomb, bomb))  # 2^60 containers, if each is copied, printed or hashed
    start = time.process_time()
    for state in ({"a": bomb}, {"a": Call(np.ndarray, bomb)}, {"a": [1], "b": bomb}):
        assert "same list, tuple, dict or long text twice" in refusal(path, pickle.dumps(state))
    endless = []
    endless.append(endless)
    assert "same list, tuple, dict or long text twice" in refusal(path, pickle.dumps({"a": endless}))
    assert time.process_time() - start < 5


def test_arrays_that_share_their_bytes_are_refused(path):
    """A megabyte could become a thousand arrays."""
    data = bytes(2**20)
    for code in ("f4", "u2"):  # u2: bfloat16, which is copied to float32
        attack = {str(i): ForgedArray((len(data) // int(code[1]),), code, data) for i in range(1000)}
        content = pickle.dumps(attack, 4)
        assert len(content) < 2**21 and "long text twice" in refusal(path, content)
        assert peak_memory(lambda: refusal(path)) < 10 * 2**20


def test_array_that_occurs_a_thousand_times_is_converted_once(path):
    array = ForgedArray((2**19,), "u2", bytes(2**20))
    path.write_bytes(pickle.dumps({"a": [array] * 1000}, 4))
    assert peak_memory(lambda: load_checkpoint(path)) < 10 * 2**20


def test_deep_nesting_is_refused(path):
    assert "recursion" in refusal(path, b"\x80\x02}X\x01\x00\x00\x00a" + b"]" * 100_000 + b"a" * 99_999 + b"s.")
