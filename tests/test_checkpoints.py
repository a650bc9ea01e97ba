"""Checkpoints are read as data: files of Paddle, PyTorch and safetensors are returned, and no code in them is run."""

import codecs
import json
import os
import pickle
import time
import tracemalloc
import zipfile

from support.checkpoints import TRAINED, load_checkpoint, load_weights, read_info, save_checkpoint, save_safetensors
from support.cli import UserError

import numpy as np
import paddle
import pytest
import safetensors.numpy
from paddle import nn


def make_network():
    return nn.Sequential(nn.Conv2D(2, 3, 3), nn.BatchNorm2D(3))


@pytest.fixture
def network():
    return make_network()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "epoch_0_model.pdparams"


def refusal(path, content=None):
    """Return the message with which a file is refused, one line, without the file's name at its beginning."""
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as error:
        load_checkpoint(path)
    message = str(error.value)
    assert message.startswith(f"{path}: ") and message.isprintable()
    return message[len(str(path)) + 2 :]


def assert_same(loaded, saved):
    if isinstance(saved, dict):
        assert list(loaded) == list(saved)
        for name in saved:
            assert_same(loaded[name], saved[name])
    elif isinstance(saved, (list, tuple)):
        assert len(loaded) == len(saved) and type(loaded) is type(saved)
        for one, other in zip(loaded, saved):
            assert_same(one, other)
    elif isinstance(saved, paddle.Tensor):
        assert type(loaded) is np.ndarray
        np.testing.assert_array_equal(loaded, saved.numpy())
    else:
        np.testing.assert_array_equal(loaded, saved)


# -------------------------------------------------------------------------------------------------
# Paddle's files


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_weights_of_any_pickle_protocol_are_loaded(network, path, protocol):
    """2 was Paddle 2.0's default, 4 is today's."""
    other = make_network()
    paddle.save(other.state_dict(), str(path), protocol=protocol)
    assert_same(load_checkpoint(path), other.state_dict())
    load_weights(network, path)
    assert_same(load_checkpoint(path), network.state_dict())


def test_nested_state_is_loaded(network, path):
    """Paddle writes its tensors as pairs of a name and an array."""
    state = {
        "network": network.state_dict(),
        "progress": {"epoch": 3, "best": np.float64(1.5), "count": np.int64(7), "done": False, "rest": None},
        "list": [paddle.arange(3), ("a", 1.5), "text"],
        "scalar": paddle.to_tensor(2.5),
    }
    save_checkpoint(state, path)
    assert_same(load_checkpoint(path), state)


def test_arrays_of_every_type_and_layout_are_loaded(path):
    for protocol in (2, 3, 4):
        kinds = ("bool", "int8", "uint8", "int16", "int32", "int64", "float16", "float32", "float64", ">f4", ">i8")
        state = {kind: np.arange(6).reshape(2, 3).astype(kind) for kind in kinds}
        state |= {"empty": np.zeros((0, 3)), "number": np.array(2.0), "columns": np.asfortranarray(np.eye(2, 3))}
        with open(path, "wb") as file:
            pickle.dump(state, file, protocol)
        loaded = load_checkpoint(path)
        assert_same(loaded, state)
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
    assert_same(load_checkpoint(path), {"w": np.array([1, -1], np.float32)})


ARRAYS = {
    "float": np.linspace(-1, 1, 6, dtype=np.float32).reshape(2, 3),
    "half": np.linspace(-1, 1, 3, dtype=np.float16),
    "double": np.array([np.pi]),
    "count": np.array(7),
    "bytes": np.arange(-128, 127, dtype=np.int8),
    "empty": np.zeros((0, 3), np.float32),
}


def test_safetensors_are_written_as_their_own_package_reads_them(path):
    save_safetensors(ARRAYS, path, {"load_size": "96"})
    with safetensors.safe_open(path, "np") as file:
        assert len(file.keys()) == len(ARRAYS)
        assert_same({name: file.get_tensor(name) for name in ARRAYS}, ARRAYS)
        assert file.metadata() == {"format": "pd", "load_size": "96"} == read_info(path)


def test_safetensors_of_their_own_package_are_read_whatever_the_suffix(path):
    safetensors.numpy.save_file(ARRAYS, path, {"made": "elsewhere"})
    loaded = load_checkpoint(path)
    assert len(loaded) == len(ARRAYS)
    assert_same({name: loaded[name] for name in ARRAYS}, ARRAYS)
    assert read_info(path) == {"made": "elsewhere"}


def test_bfloat16_in_safetensors_is_loaded_as_float32(path):
    torch = pytest.importorskip("torch")
    save_file = pytest.importorskip("safetensors.torch").save_file
    tensor = torch.randn(5, 7, generator=torch.manual_seed(0)).to(torch.bfloat16)
    save_file({"x": tensor}, path)
    assert_same(load_checkpoint(path), {"x": tensor.float().numpy()})


def test_int8_weights_with_per_channel_scales_are_multiplied(path):
    numbers = np.array([[[1, -127]], [[64, 0]]], np.int8)
    scale = np.array([[[0.5]], [[0.25]]], np.float32)
    save_safetensors({"x": numbers, "x.scale": scale, "alone": numbers}, path)
    product = np.array([[[0.5, -63.5]], [[16, 0]]], np.float32)
    assert_same(dict(sorted(load_checkpoint(path).items())), {"alone": numbers, "x": product})


def test_entries_of_a_training_run_are_separated_from_its_weights(network, path):
    entries = dict(zip(TRAINED, (np.array(96), np.array(3), np.array(1200))))
    save_checkpoint({**network.state_dict(), **entries}, path)
    load_weights(network, path)
    assert_same(load_checkpoint(path), network.state_dict())
    assert_same(read_info(path), entries)
    save_checkpoint(network.state_dict(), path)
    assert read_info(path) == {}


# -------------------------------------------------------------------------------------------------
# PyTorch's files


@pytest.mark.parametrize("zipped", [True, False], ids=["since 1.6", "before 1.6"])
def test_pytorch_state_equals_what_torch_load_returns(path, zipped):
    """Views, shared storages, every type of numbers."""
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    base = torch.randn(4, 6)
    layers = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3), torch.nn.BatchNorm2d(3))
    state = layers.state_dict()  # an OrderedDict with an attribute of its own, the versions of the layers
    state.update(
        {"base": base, "transposed": base.t(), "part": base[1:3, ::2], "tied": base, "expanded": base[:1].expand(3, 6)},
        channels_last=torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        number=torch.tensor(2.5),
        empty=torch.zeros(0, 3),
        **{name: (10 * base).to(getattr(torch, name)) for name in ("float16", "bfloat16", "float64", "int8", "int64")},
        **{name: base.abs().to(getattr(torch, name)) for name in ("uint8", "int16", "int32", "bool")},
    )
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    expected = torch.load(path, weights_only=True)
    loaded = load_checkpoint(path)
    assert list(loaded) == list(expected)
    for name, tensor in expected.items():
        tensor = tensor.detach()
        tensor = tensor.float() if tensor.dtype == torch.bfloat16 else tensor
        assert loaded[name].dtype == tensor.numpy().dtype, name
        np.testing.assert_array_equal(loaded[name], tensor.numpy(), name)


@pytest.mark.parametrize("zipped", [True, False], ids=["since 1.6", "before 1.6"])
def test_hostile_or_truncated_pytorch_files_are_refused(path, tmp_path, zipped):
    torch = pytest.importorskip("torch")

    def save(value):
        torch.save({"a": value}, path, _use_new_zipfile_serialization=zipped)
        return path.read_bytes()

    assert "posix.mkdir" in refusal(path, save(Call(os.mkdir, str(tmp_path / "it-ran"))))
    assert not (tmp_path / "it-ran").exists()
    assert "many times as large" in refusal(path, save(torch.ones(1, 1).expand(2**20, 2**20)))
    whole = save(torch.ones(100))
    for length in (20, len(whole) // 2, len(whole) - 1):
        assert "not a readable checkpoint" in refusal(path, whole[:length])
    rebuild, storage = torch._utils._rebuild_tensor_v2, torch.ones(4).storage()
    for offset, shape, strides in (
        (1, [4], [1]),
        (-1, [1], [1]),
        (0, [2], [-1]),
        (0, [5], [2**60]),  # its last byte is at 2^64, which is 0 in 64 bits
        (0, [3, 3], [2**59, -(2**59)]),
    ):
        forged = Call(rebuild, storage, offset, shape, strides, False, {})
        assert "not within its storage" in refusal(path, save(forged))


def test_compressed_zip_archives_are_refused(path):
    """PyTorch stores tensors uncompressed; a compressed megabyte could be a gigabyte of zeros."""
    torch = pytest.importorskip("torch")
    torch.save({"a": torch.zeros(1000)}, path)
    with zipfile.ZipFile(path) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in contents.items():
            archive.writestr(name, content)
    assert "parts are larger than the file" in refusal(path)


# -------------------------------------------------------------------------------------------------
# Files that would run code or take much memory


class Call:
    """Pickles as a call of the function: what an attacker puts into a file."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_malicious_pickle_is_refused_and_does_not_run(path, tmp_path, protocol):
    trace = tmp_path / "it-ran"
    for function, argument in (
        (os.system, f"touch {trace}"),
        (eval, f"open({str(trace)!r}, 'w')"),
        (exec, f"open({str(trace)!r}, 'w')"),
        (os.mkdir, str(trace)),
        (np.save, str(trace)),
    ):
        attack = {"conv1.0.weight": np.ones(3), "conv1.0.bias": Call(function, argument)}
        for content in (attack, Call(function, argument)):
            assert "which no checkpoint needs" in refusal(path, pickle.dumps(content, protocol))
    assert not list(tmp_path.glob("it-ran*"))


def test_message_names_the_content_that_was_refused(path):
    assert "posix.system" in refusal(path, pickle.dumps({"a": Call(os.system, "true")}))
    assert "time.sleep" in refusal(path, pickle.dumps({"a": time.sleep}))
    assert "it holds a set" in refusal(path, pickle.dumps({"a": {1, 2}}))
    assert "holds a list, not the state" in refusal(path, pickle.dumps([1]))
    assert "Linear" in refusal(path, pickle.dumps({"a": nn.Linear}))


def array_pickle(shape, code, data, flags=0):
    """Return the pickle of an array whose dtype and content may contradict its shape."""
    return pickle.dumps({"a": _Forged(shape, _ForgedDtype(code, flags), data)}, 2)


class _ForgedDtype:
    def __init__(self, code, flags):
        self.code, self.flags = code, flags

    def __reduce__(self):
        return np.dtype, (self.code, False, True), (3, "<", None, None, None, -1, -1, self.flags)


class _Forged:
    def __init__(self, *parts):
        self.parts = parts

    def __reduce__(self):
        shape, dtype, data = self.parts
        reconstruct = np.ones(1).__reduce__()[0]
        return reconstruct, (np.ndarray, (0,), b"b"), (1, shape, dtype, False, data)


def test_forged_arrays_are_refused(path):
    path.write_bytes(array_pickle((2,), "f4", b"\0" * 8))
    assert load_checkpoint(path)["a"].shape == (2,)  # the forgery works, if it is honest
    for shape, code, data, message in (
        ((1,), "O8", b"\x41" * 8, "array of 'O8'"),  # numbers that would be taken for pointers
        ((2**40,), "f4", b"\0" * 8, "many times as large as the file"),
        ((3,), "f4", b"\0" * 8, "8 bytes for an array of 3 numbers"),
        ((2**32, 2**32), "f4", b"", "many times as large as the file"),  # its size overflows to 0 in 64 bits
        ((1,), "u4", b"\0" * 4, "array of 'u4'"),  # numbers, but of a type that no framework writes
        ((-2, -1), "f4", b"\0" * 8, "negative dimensions"),
        ((1,), "V8", b"\0" * 8, "array of 'V8'"),
        ((1,), "S8", b"\0" * 8, "array of 'S8'"),
    ):
        assert message in refusal(path, array_pickle(shape, code, data))


def test_allowed_functions_are_not_called_with_the_arguments_in_the_file(path):
    """NumPy's own would take these for gigabytes, for the pickled function's attributes, for objects."""
    reconstruct, scalar = np.ones(1).__reduce__()[0], np.float64(1).__reduce__()[0]
    assert load_checkpoint_of(path, Call(reconstruct, np.ndarray, (2**40,), b"d")).size == 0
    assert "array of 'O'" in refusal(path, pickle.dumps({"a": Call(scalar, Call(np.dtype, "O"), [1])}))
    assert "not a readable checkpoint" in refusal(path, pickle.dumps({"a": Call(np.ndarray, (2**40,))}))


def load_checkpoint_of(path, value):
    path.write_bytes(pickle.dumps({"a": value}))
    return load_checkpoint(path)["a"]


def peak_memory(function):
    """Return the most bytes that Python and NumPy held while the function ran."""
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memo_index_of_a_gigabyte_takes_no_memory(path):
    content = b"\x80\x02}r\xff\xff\xff\x0f."  # Python's unpickler in C would allocate a list of that length
    path.write_bytes(content)
    assert peak_memory(lambda: load_checkpoint(path)) < 1e6
    assert "not a readable checkpoint" in refusal(path, b"\x80\x04}\x8e\xff\xff\xff\xff\xff\xff\xff\x0f.")


@pytest.mark.parametrize("container", [list, tuple])
def test_containers_that_repeat_each_other_are_refused_quickly(path, container):
    bomb = container()
    for _ in range(60):
        bomb = container((bomb, bomb))  # 2^60 containers, if each is copied, printed or hashed
    start = time.process_time()
    for state in ({"a": bomb}, {"a": Call(np.ndarray, bomb)}, {"a": [1], "b": bomb}):
        assert "same list, tuple or dict twice" in refusal(path, pickle.dumps(state))
    if container is tuple:
        # As a key: pickle.dumps would hash it, too, so the bytes are written out: } (nested tuples) 1 s .
        nested = b"\x80\x02})q\x00" + b"".join(b"h%c\x86q%c" % (2 * (i,) + (i + 1,))[1:] for i in range(60))
        assert "same list, tuple or dict twice" in refusal(path, nested + b"K\x01s.")
    endless = []
    endless.append(endless)
    assert "same list, tuple or dict twice" in refusal(path, pickle.dumps({"a": endless}))
    assert time.process_time() - start < 5


def test_arrays_that_share_their_numbers_are_refused(path):
    """A megabyte could become a thousand arrays."""
    data = bytes(2**20)
    attack = {str(i): _Forged((2**18,), _ForgedDtype("f4", 0), data) for i in range(1000)}
    content = pickle.dumps(attack, 4)
    assert len(content) < 2**21
    path.write_bytes(content)
    assert peak_memory(lambda: refusal(path)) < 20 * 2**20
    text = {str(i): Call(codecs.encode, "\0" * 2**20, "latin1") for i in range(3)}  # bytes, as protocol 2 has them
    assert "it holds" in refusal(path, pickle.dumps({"a": {1, 2}, **text}, 2))


def test_scale_that_is_larger_than_its_array_is_refused(path):
    """100 kB that would be 10 GB, if they were multiplied."""
    save_safetensors({"x": np.ones((50000, 1), np.int8), "x.scale": np.ones((1, 50000), np.int8)}, path)
    assert "non-broadcastable" in refusal(path)


def safetensors_file(header, data):
    header = json.dumps(header).encode()
    return len(header).to_bytes(8, "little") + header + data


def test_forged_safetensors_are_refused(path):
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    path.write_bytes(safetensors_file({"a": entry}, bytes(8)))
    assert load_checkpoint(path)["a"].shape == (2,)  # the honest file is read
    for header in (
        {"a": entry, "b": entry},  # the same bytes twice
        {"a": {**entry, "shape": [2**40]}},
        {"a": {**entry, "data_offsets": [0, 2**40]}},
        {"a": entry, "__metadata__": ["load_size", "96"]},
        {"a": entry, "__metadata__": {"load_size": 96}},
    ):
        assert "not a readable checkpoint" in refusal(path, safetensors_file(header, bytes(8)))
        with pytest.raises(UserError, match="not a readable checkpoint"):
            read_info(path)


# -------------------------------------------------------------------------------------------------
# Damaged files and other networks' files


@pytest.mark.parametrize(
    "save",
    [lambda state, path: paddle.save(state, str(path)), lambda state, path: save_safetensors({**state}, path)],
    ids=["Paddle", "safetensors"],
)
def test_truncated_file_is_refused_in_one_line(network, path, save):
    save(network.state_dict(), path)
    whole = path.read_bytes()
    for length in (0, 1, 2, 9, 40, len(whole) // 3, len(whole) // 2, len(whole) - 1):
        assert "not a readable checkpoint" in refusal(path, whole[:length])
        with pytest.raises(UserError, match="not a readable checkpoint"):
            read_info(path)


UNFITTING = {  # changes to a state, and the message
    "missing": (lambda s: s.pop("0.bias"), r"another network's checkpoint: missing or unknown: 0.bias$"),
    "many missing": (lambda s: s.clear(), r"missing or unknown: 0.bias, 0.weight, 1._mean, …$"),
    "unexpected": (lambda s: s.update(extra=paddle.ones([1])), r"checkpoint: missing or unknown: extra$"),
    "shape": (lambda s: s.update({"0.bias": paddle.ones([4])}), r"0.bias is float \[4\] instead of float \[3\]"),
    "NaN": (lambda s: s.update({"0.bias": np.float32([1, np.nan, 1])}), r"not finite .*: 0.bias$"),
    "no array": (lambda s: s.update({"0.bias": [1.0, 2.0, 3.0]}), r"0.bias is list instead of float \[3\]"),
    "integers": (lambda s: s.update({"0.bias": np.ones(3, int)}), r"0.bias is int \[3\] instead of float \[3\]"),
    "overflow": (lambda s: s.update({"0.bias": np.array([1e300, 1, 1])}), r"not finite .*: 0.bias$"),
    "negative variance": (lambda s: s.update({"1._variance": -paddle.ones([3])}), r"a negative variance: 1._variance$"),
}


@pytest.mark.parametrize("kind", UNFITTING)
def test_weights_that_do_not_fit_are_named_and_change_nothing(network, path, kind):
    change, message = UNFITTING[kind]
    before = {name: tensor.numpy().copy() for name, tensor in network.state_dict().items()}
    state = dict(network.state_dict())
    change(state)
    save_checkpoint(state, path)
    with pytest.raises(UserError, match=message):
        load_weights(network, path)
    assert_same(before, network.state_dict())


def test_missing_file_and_folder_are_refused_in_one_line(tmp_path):
    assert "no such checkpoint" in refusal(tmp_path / "nothing.pdparams")
    assert "is a directory" in refusal(tmp_path)
