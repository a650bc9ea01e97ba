"""Files of safetensors, PyTorch and Caffe are read without the latter frameworks; damaged ones are refused."""

import json
import os
import zipfile

from support.checkpoints import load_checkpoint

import numpy as np
import pytest
from caffe_files import field, varint
from conftest import same_values
from safetensors.numpy import save_file
from weights import Call, peak_memory, refusal


@pytest.fixture
def path(tmp_path):
    return tmp_path / "weights"


# Safetensors


def test_safetensors_are_read_as_by_their_own_package(path):
    kinds = ("float16", "float32", "float64", "int8", "int32", "int64", "uint8")
    arrays = {kind: np.arange(6).reshape(2, 3).astype(kind) for kind in kinds}
    arrays |= {"number": np.array(7), "empty": np.zeros((0, 3), np.float32)}
    save_file(arrays, path, {"load_size": "96"})
    loaded = load_checkpoint(path)
    assert loaded.pop("load_size") == "96"
    assert same_values(loaded, arrays) and all(loaded[kind].dtype == kind for kind in kinds)


def safetensors_file(header, data):
    header = json.dumps(header).encode()
    return len(header).to_bytes(8, "little") + header + data


def test_bfloat16_in_safetensors_is_loaded_as_float32(path):
    data = np.array([1.5, -2], np.float32).view(np.uint16)[1::2].tobytes()  # the upper halves
    path.write_bytes(safetensors_file({"x": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]}}, data))
    assert same_values(load_checkpoint(path), {"x": np.array([1.5, -2])})


def test_int8_weights_with_per_channel_scales_are_multiplied(path):
    numbers = np.array([[[1, -127]], [[64, 0]]], np.int8)
    save_file({"x": numbers, "x.scale": np.array([[[0.5]], [[0.25]]], np.float32), "alone": numbers}, path)
    loaded = load_checkpoint(path)
    assert loaded["x"].dtype == np.float32 and loaded["x"].tolist() == [[[0.5, -63.5]], [[16, 0]]]
    assert same_values(loaded["alone"], numbers)
    # 100 kB that would be 10 GB, if they were multiplied
    save_file({"x": np.ones((50000, 1), np.int8), "x.scale": np.ones((1, 50000), np.int8)}, path)
    assert "non-broadcastable" in refusal(path)


def test_header_of_millions_of_bytes_takes_no_memory(path):
    """Each entry of the header would take 30 times its size."""
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    content = safetensors_file(dict.fromkeys(map(str, range(10**5)), entry), b"")
    assert len(content) > 5e6 and peak_memory(lambda: refusal(path, content)) < len(content) + 1e6


# PyTorch

both_layouts = pytest.mark.parametrize("zipped", [True, False], ids=["since 1.6", "before 1.6"])


@both_layouts
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
        **{name: (10 * base).to(getattr(torch, name)) for name in ("float16", "float64", "int8", "int64")},
        **{name: base.abs().to(getattr(torch, name)) for name in ("uint8", "int16", "int32", "bool")},
    )
    if zipped:  # PyTorch before 1.6 hardly wrote it
        state["bfloat16"] = base.to(torch.bfloat16)
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    loaded = load_checkpoint(path)
    assert list(loaded) == list(state)
    for name, tensor in state.items():
        expected = (tensor.float() if name == "bfloat16" else tensor).detach().numpy()
        assert loaded[name].dtype == expected.dtype, name
        np.testing.assert_array_equal(loaded[name], expected, name)


@both_layouts
def test_hostile_or_truncated_pytorch_files_are_refused(path, tmp_path, zipped):
    torch = pytest.importorskip("torch")

    def save(value):
        torch.save({"a": value}, path, _use_new_zipfile_serialization=zipped)
        return path.read_bytes()

    assert "posix.mkdir" in refusal(path, save(Call(os.mkdir, str(tmp_path / "it-ran"))))
    assert not (tmp_path / "it-ran").exists()
    assert "larger than its storage" in refusal(path, save(torch.ones(1, 1).expand(2**20, 2**20)))
    whole = save(torch.ones(100))
    for length in (20, len(whole) // 2, len(whole) - 1):
        assert "not a readable checkpoint" in refusal(path, whole[:length])
    longer = whole.replace(b"Kd", b"J\xff\xff\xff\x7f")  # 2^31 - 1 instead of 100
    assert zipped or "not within its storage" in refusal(path, longer)
    for offset, shape, strides in (
        (1, [4], [1]),
        (-1, [1], [1]),
        (0, [2], [-1]),
        (0, [5], [2**60]),  # its last byte is at 2^64, which is 0 in 64 bits
    ):
        tensor = torch._utils._rebuild_tensor_v2, torch.ones(4).storage(), offset, shape, strides
        assert "not within its storage" in refusal(path, save(Call(*tensor, False, {})))


def test_compressed_zip_archives_are_refused(path):
    """PyTorch stores tensors uncompressed; a compressed megabyte could be a gigabyte of zeros."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10**6))
    assert "parts are larger than the file" in refusal(path)


# Caffe


def test_damaged_caffe_files_and_other_formats_are_refused(path):
    def blob(shape, data):
        sizes = field(7, field(1, b"".join(map(varint, shape))))
        return field(100, field(1, b"conv1_2") + field(7, sizes + field(5, data)))

    path.write_bytes(blob([2], bytes(8)))
    assert same_values(load_checkpoint(path), {"conv1_2.0": np.zeros(2, np.float32)})
    for content in (
        b"<!DOCTYPE html><html><body>Not found",
        b'name: "net"\nlayer {\n  name: "conv1"\n}',
        blob([2], bytes(8))[:-2],
        blob([2], bytes(7)),
        blob([2**40, 2**40], b""),
        blob([2**64 - 2, 2**64 - 1], bytes(8)),  # -2 and -1
        b"PK\x03\x04 cut short",
    ):
        assert refusal(path, content).startswith("not a readable checkpoint: ")
