"""Weights by their name: this project's, the authors' PyTorch and Caffe releases, the earlier Paddle port's."""

import hashlib
import math
import os
import re
import urllib.request
from pathlib import Path

from support.checkpoints import (
    check_names,
    is_safetensors,
    load_checkpoint,
    read_metadata,
    save_checkpoint,
    set_weights,
)
from support.cli import UserError, note, one_line, printable
from support.files import sha256

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import nn

from model import CIC
from utils import RESOURCES, TEMPERATURE, load_ab_bins

SMALL = RESOURCES / "epoch_small_model.safetensors"  # the weights that come with the project
SMALL_SHA256 = "e2794b3f366c50cc9742bc5251abd3cfadcd15faa936024897667f124f92e9a5"

OFFICIAL_URL = "https://colorizers.s3.us-east-2.amazonaws.com/colorization_release_v2-9b330a0b.pth"
NOREBAL_URL = (
    "http://eecs.berkeley.edu/~rich.zhang/projects/2016_colorization/files/demo_v2/"
    "colorization_release_v2_norebal.caffemodel"
)
TIMEOUT = 10  # seconds until an address counts as out of reach

# What the releases compute otherwise than this project, whose input is L - 50 and whose output is ab.
L_SCALE = 100  # the PyTorch network reads (L - 50) / 100
AB_SCALE = 110  # … and gives ab / 110
# … by a softmax without a temperature, so that its head's weights presumably carry 1 / 0.38.

PYTORCH, CAFFE = "the authors' PyTorch release", "the authors' Caffe release"
PORT, OURS = "the earlier Paddle port", "this project"

SUFFIXES = (".pdparams", ".safetensors")
DEFAULT_NAME = "19"  # as in the earlier port
LOAD_SIZE = 256  # short side in pixels as a network sees a photograph, unless its checkpoint says otherwise
CHECKPOINT_NAME = r"epoch_(.+)_model\.(?:pdparams|safetensors)"

# -------------------------------------------------------------------------------------------------
# Finding a checkpoint by its name


def find_weights(model_path, name=None):
    """The file that `--load_model NAME` means: epoch_{NAME}_model.pdparams or .safetensors in `model_path`, or a path.

    "small" comes with the project; "official" is downloaded and converted on first use. Raises UserError when there is
    no such file.
    """
    name = name or default_name(Path(model_path))
    folder = Path(model_path)
    for path in (Path(name), folder / name):
        if path.is_file():
            return path
    for suffix in SUFFIXES:
        if (path := folder / f"epoch_{name}_model{suffix}").exists():
            return path
    if name == "small":
        return check_small()
    if name == "official":
        return fetch_official(folder)
    if name == "norebal":
        raise UserError(
            f"norebal: the authors released it for Caffe alone: download {NOREBAL_URL}, then "
            f"python resources/convert_weights.py {NOREBAL_URL.split('/')[-1]} {folder}"
        )
    if os.sep in name or Path(name).suffix in SUFFIXES:
        raise UserError(f"{name}: no such checkpoint")
    names = checkpoint_names(folder)
    none = "there is none in that folder (train.py makes them; small comes with the project, official are the authors')"
    there = f"there are: --load_model {one_line(', '.join(names))}" if names else none
    raise UserError(f"{folder / f'epoch_{name}_model.pdparams'}: no such checkpoint; {there}")


def checkpoint_names(folder):
    return sorted({m[1] for p in folder.glob("epoch_*_model.*") if (m := re.fullmatch(CHECKPOINT_NAME, p.name))})


def default_name(folder):
    """What is meant without --load_model: 19, the last of 20 epochs; else the latest; else the only one; else small."""
    names = checkpoint_names(folder)
    if not names:
        check_small()  # else a line would promise what the next one takes back
        note(
            f"{folder} holds no checkpoint: taking small, which comes with the project and was trained for "
            "100 minutes; the authors' network, trained on all of ImageNet: --load_model official"
        )
        return "small"
    numbers = sorted((name for name in names if name.isdecimal()), key=int)
    preferred = [name for name in (DEFAULT_NAME, "latest", *numbers[-1:]) if name in names]
    name = preferred[0] if preferred else names[0] if len(names) == 1 else DEFAULT_NAME
    if name != DEFAULT_NAME:
        note(f"no --load_model: taking {name}, as {folder} has no {DEFAULT_NAME}")
    return name


def check_small():
    """The path of the weights that come with the project. Raises UserError unless they are as they came."""
    if not SMALL.exists() or sha256(SMALL) != SMALL_SHA256:
        state = "damaged or changed" if SMALL.exists() else "not there"
        git = f"git -C {printable(SMALL.parent)} checkout -- {SMALL.name}"
        raise UserError(f"{SMALL}: {state}; to have it as it came: {git}")
    return SMALL


def best_load_size(path):
    """The short side in pixels at which a checkpoint's network is at its best: what the file says, or 256."""
    size = read_metadata(path).get("load_size", str(LOAD_SIZE))
    if not re.fullmatch("[1-9][0-9]{0,4}", size):
        raise UserError(f"{path}: says that it is at its best at a load_size of {size}")
    return int(size)


def fetch_official(folder):
    """Downloads the authors' PyTorch release, converts it and keeps it in the folder; returns its path."""
    _import_torch(OFFICIAL_URL)  # before a download in vain
    network, _ = read_network(download(OFFICIAL_URL, folder))
    path = folder / "epoch_official_model.pdparams"
    save_checkpoint(network.state_dict(), path)
    return path


def download(url, folder):
    """The file behind `url`, by way of Paddle's cache, its SHA-256 checked against the digits at the name's end."""
    from paddle.utils import download as paddle_download

    cache, name = Path(paddle_download.WEIGHTS_HOME), url.split("/")[-1]
    offline = f"python resources/convert_weights.py {name} {printable(folder)}"
    try:
        if not (cache / name).exists():  # Paddle's own attempts take long to fail, and know no timeout
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=TIMEOUT).close()
        # PyTorch's files are zip archives, which Paddle would unpack.
        path = Path(paddle_download.get_path_from_url(url, str(cache), decompress=False))
    except (OSError, RuntimeError) as error:
        reason = one_line(str(getattr(error, "reason", error)))
        raise UserError(f"{url}: cannot be downloaded ({reason}); fetch it elsewhere, then: {offline}") from error
    digits, digest = name.split(".")[0].split("-")[-1], hashlib.sha256(path.read_bytes()).hexdigest()
    if not digest.startswith(digits):
        path.unlink()  # else the next attempt would find it in the cache
        raise UserError(
            f"{url}: the file that came has the SHA-256 {digest[:8]}…, not {digits}…: damaged or another one; "
            f"it was removed, try again or fetch it elsewhere, then: {offline}"
        )
    return path


# -------------------------------------------------------------------------------------------------
# From a checkpoint to its network

EXTRA_RELU = "extra_relu_ahead_of_conv6"  # the entry that marks a state dict of the earlier port's network


class PortCIC(CIC):
    """The network of an earlier Paddle port, for weights that were trained there: one more ReLU, ahead of conv6.

    The parameters are the same, so its state dict has an entry more that tells it apart.
    """

    def __init__(self):
        super().__init__()
        self.register_buffer(EXTRA_RELU, paddle.ones([1]))
        self.conv6 = _AfterReLU(*self.conv6.children())


class _AfterReLU(nn.Sequential):
    def forward(self, x):
        return super().forward(F.relu(x))


def load_network(path):
    """The network that the checkpoint at `path` is for, with its weights. Raises UserError when it cannot be read."""
    return make_network(load_checkpoint(path), path)


def make_network(state, path):
    # Drawing 32 million random weights, which the checkpoint's would replace, takes longer than reading those.
    # (Paddle cannot tell what was set before: a global initializer of a caller's own is gone afterwards.)
    zeros = nn.initializer.Constant(0.0)
    nn.initializer.set_global_initializer(zeros, zeros)
    try:
        network = PortCIC() if EXTRA_RELU in state else CIC()
    finally:
        nn.initializer.set_global_initializer(None)
    set_weights(network, state, path)
    return network


# -------------------------------------------------------------------------------------------------
# From a file in any format to a network


def read_network(path, temperature=None):
    """The network at `path`, and whose it is: PYTORCH, CAFFE, PORT or OURS.

    `temperature`: the one that the source's head carries in its weights; None stands for 0.38 in the authors'
    PyTorch release and 1, none, in the others. Raises UserError when the weights are damaged or another network's.
    """
    state, is_caffe = _read_state(path)
    state = {re.sub(r"^_layers\.", "", str(key)): value for key, value in state.items()}
    kind, convert, scale = _recognize(state, is_caffe, path)
    state = convert(state, path)
    for name in ("conv8_313.weight", "conv8_313.bias"):
        state[name] = state[name] * np.float32(scale if temperature is None else temperature)
    return make_network(state, path), kind


def _recognize(state, is_caffe, path):
    """The layout of a state dict, by its names: whose it is, the function that converts it, its head's temperature."""
    if is_caffe:
        return CAFFE, _from_caffe, 1
    if any(name.startswith("model1.") for name in state):
        return PYTORCH, _from_pytorch, TEMPERATURE
    if any(name.startswith("features.") for name in state):
        return PORT, _from_port, 1
    if any(name.startswith("conv1.") for name in state):
        return OURS, _from_ourselves, 1
    names = one_line(", ".join(list(state)[:3])) or "nothing"
    raise UserError(f"{path}: no network that is known here; it holds {names}, …")


def _layers():
    """The layers with weights, by their names here, in the authors' PyTorch and Caffe releases, and in the port."""
    index = 0  # of the port's one flat Sequential
    for stage, convs in enumerate((2, 2, 3, 3, 3, 3, 3, 3), start=1):
        index += stage == 6  # the extra ReLU
        for i in range(convs):
            caffe = f"conv{stage}_{i + 1}" if (stage, i) != (1, 0) else "bw_conv1_1"
            yield f"conv{stage}.{2 * i}", f"model{stage}.{2 * i}", caffe, f"features.{index}"
            index += 2
        if stage < 8:
            norm = 2 * convs
            yield f"conv{stage}.{norm}", f"model{stage}.{norm}", f"conv{stage}_{convs}norm", f"features.{index}"
            index += 1
    yield "conv8_313", "model8.6", "conv8_313", f"features.{index}"


def _is_norm(caffe):
    return caffe.endswith("norm")


def _rename(state, names, path):
    """The state under this project's names; `names`: theirs to ours."""
    check_names(state, names, path)
    if odd := [name for name in names if not isinstance(state[name], np.ndarray)]:
        raise UserError(f"{path}: holds a {type(state[odd[0]]).__name__} as {odd[0]}, not an array")
    return {ours: state[theirs].astype(np.float32) for theirs, ours in names.items()}


def _from_ourselves(state, path):
    names = {name: name for name in (PortCIC if EXTRA_RELU in state else CIC)().state_dict()}
    return _rename(state, names, path)


def _from_port(state, path):
    """The port has one more ReLU ahead of conv6, which the converted state says by an entry of its own."""
    names = {}
    for ours, _, caffe, port in _layers():
        for part in ("weight", "bias", "_mean", "_variance") if _is_norm(caffe) else ("weight", "bias"):
            names[f"{port}.{part}"] = f"{ours}.{part}"
    return {**_rename(state, names, path), EXTRA_RELU: np.ones(1, np.float32)}


def _from_pytorch(state, path):
    parts = {"weight": "weight", "bias": "bias", "running_mean": "_mean", "running_var": "_variance"}
    names = {"model_out.weight": "model_out"}
    for ours, theirs, caffe, _ in _layers():
        for part in parts if _is_norm(caffe) else ("weight", "bias"):
            names[f"{theirs}.{part}"] = f"{ours}.{parts[part]}"
    state = {name: array for name, array in state.items() if not name.endswith(".num_batches_tracked")}
    state = _rename(state, names, path)
    _check_bins(state.pop("model_out") * AB_SCALE, path)
    state["conv1.0.weight"] = state["conv1.0.weight"] / np.float32(L_SCALE)
    return state


def _check_bins(expectation, path):
    """Raises UserError unless the last layer, [2, 313, 1, 1], is the expectation over the bins in this order."""
    bins = load_ab_bins().numpy()
    if expectation.shape != (2, len(bins), 1, 1):
        raise UserError(f"{path}: model_out is {list(expectation.shape)}, not [2, {len(bins)}, 1, 1]")
    theirs = expectation.reshape(2, -1).T
    if (wrong := np.abs(theirs - bins).max(axis=1) > 0.5).any():  # of the grid's 10: covers rounding to 16 bits
        i = int(wrong.argmax())
        raise UserError(
            f"{path}: its bins are not pts_in_hull.npy's in the same order: number {i} is "
            f"({theirs[i][0]:.4g}, {theirs[i][1]:.4g}) instead of ({bins[i][0]:.0f}, {bins[i][1]:.0f})"
        )


# -------------------------------------------------------------------------------------------------
# The formats


def _read_state(path):
    """Flat dict of arrays, and whether they are a Caffe file's: {"conv1_2.0": …}."""
    try:
        with open(path, "rb") as file:
            start = file.read(512)
            file.seek(0)
            if is_safetensors(file) or (start[:1] == b"\x80" and not start.startswith(LEGACY_PYTORCH)):
                return load_checkpoint(path), False
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {(error.strerror or str(error)).lower()}") from error
    if start.startswith((b"PK", LEGACY_PYTORCH)):
        return _read_pytorch(path), False
    if start.isascii() and re.sub(rb"\s", b" ", start).decode().isprintable():
        raise UserError(f"{path}: text or empty, not weights: did its download go wrong?")
    return _read_caffe(path), True


LEGACY_PYTORCH = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # before 1.6: the pickle of a magic number


def _import_torch(path):
    try:
        import torch
    except ImportError:
        raise UserError(f"{path}: PyTorch's format needs PyTorch once, to convert it: pip install torch") from None
    return torch


def _read_pytorch(path):
    torch = _import_torch(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        return {name: tensor.float().numpy() for name, tensor in state.items()}
    except Exception as error:  # whatever bad bytes, or another kind of content, make it raise
        reason = one_line((str(error) or type(error).__name__).splitlines()[0])
        raise UserError(f"{path}: not a readable state dict of PyTorch: {reason}") from error


# Those fields of Caffe's caffe.proto that hold weights; in reading, fields that are not declared are skipped.
# `data` and `double_data` are packed floats and doubles. Bytes are the same on the wire, and NumPy takes them whole.
CAFFE_PROTO = {
    "BlobShape": ["repeated int64 dim = 1"],
    "BlobProto": [
        *("optional int64 num = 1", "optional int64 channels = 2", "optional int64 height = 3"),
        *("optional int64 width = 4", "optional bytes data = 5", "optional BlobShape shape = 7"),
        "optional bytes double_data = 8",
    ],
    "LayerParameter": ["optional string name = 1", "repeated BlobProto blobs = 7"],
    "V1LayerParameter": ["optional string name = 4", "repeated BlobProto blobs = 6"],
    "NetParameter": ["repeated V1LayerParameter layers = 2", "repeated LayerParameter layer = 100"],
}


def _caffe_net():
    """An empty NetParameter, the message that a .caffemodel is, made without a compiled caffe.proto."""
    from google.protobuf import descriptor_pb2, message_factory

    constants = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="caffe_weights.proto", package="caffe", syntax="proto2")
    for message, fields in CAFFE_PROTO.items():
        declared = file.message_type.add(name=message)
        for field in fields:
            label, kind, name, _, number = field.split()
            field = declared.field.add(name=name, number=int(number))
            field.label = getattr(constants, f"LABEL_{label.upper()}")
            if kind in CAFFE_PROTO:
                field.type, field.type_name = constants.TYPE_MESSAGE, f".caffe.{kind}"
            else:
                field.type = getattr(constants, f"TYPE_{kind.upper()}")
    return message_factory.GetMessages([file])["caffe.NetParameter"]()


def _read_caffe(path):
    """{"conv1_2.0": weight, "conv1_2.1": bias, …}: the arrays of each layer, by its name and their position."""
    from google.protobuf.message import DecodeError

    net = _caffe_net()
    try:
        net.ParseFromString(Path(path).read_bytes())
    except DecodeError:
        raise UserError(f"{path}: damaged, or of no format that is known here") from None
    layers = [*net.layer, *net.layers]
    return {f"{layer.name}.{i}": _blob_array(blob, path) for layer in layers for i, blob in enumerate(layer.blobs)}


def _blob_array(blob, path):
    array = np.frombuffer(blob.data, "<f4") if blob.data else np.frombuffer(blob.double_data, "<f8")
    shape = list(blob.shape.dim) or [blob.num, blob.channels, blob.height, blob.width]  # the older way: always four
    if math.prod(shape) != array.size:
        raise UserError(f"{path}: damaged: {array.size} numbers for a blob of shape {shape}")
    return array.astype(np.float32).reshape(shape)


def _from_caffe(state, path):
    """Batch norm holds sums there, mean and variance times a third number, and has neither weight nor bias.

    Of the other layers some hold numbers too, but none that count: every program that uses the file fills in the
    last one, class8_ab, from pts_in_hull.npy, and training has layers of its own.
    """
    wanted = {}
    for ours, _, caffe, _ in _layers():
        for i, part in enumerate(("_mean", "_variance", "factor") if _is_norm(caffe) else ("weight", "bias")):
            wanted[f"{caffe}.{i}"] = f"{ours}.{part}"
    state = _rename({name: array for name, array in state.items() if name in wanted}, wanted, path)
    for ours, _, caffe, _ in _layers():
        if _is_norm(caffe):
            factor = state.pop(f"{ours}.factor")
            if factor.size != 1 or not factor > 0:
                raise UserError(f"{path}: {caffe} was never trained: its scale factor is {factor.ravel()}")
            for part in ("_mean", "_variance"):
                state[f"{ours}.{part}"] = state[f"{ours}.{part}"].ravel() / factor.ravel()
            state[f"{ours}.weight"] = np.ones_like(state[f"{ours}._mean"])
            state[f"{ours}.bias"] = np.zeros_like(state[f"{ours}._mean"])
        else:
            state[f"{ours}.bias"] = state[f"{ours}.bias"].ravel()
    return state
