"""Pretrained weights by name: this project's, the authors' PyTorch and Caffe releases, the earlier Paddle port's."""

import os
import re
import urllib.request
from argparse import ArgumentTypeError
from pathlib import Path

from support.checkpoints import check_names, load_checkpoint, read_info, save_checkpoint, set_weights
from support.cli import SIDE, UserError, note, number, whole
from support.files import sha256

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import nn

from model import CIC
from utils import RESOURCES, TEMPERATURE, load_ab_bins

SMALL = RESOURCES / "epoch_small_model.safetensors"  # the bundled weights

OFFICIAL_URL = "https://colorizers.s3.us-east-2.amazonaws.com/colorization_release_v2-9b330a0b.pth"
TIMEOUT = 10  # seconds until an address counts as out of reach

# The authors' PyTorch network differs from this project's, whose input is L - 50 and whose output is ab:
L_SCALE = 100  # it takes (L - 50) / 100
AB_SCALE = 110  # and returns ab / 110, from a softmax without a temperature: its head presumably includes 1 / 0.38

PYTORCH, CAFFE = "the authors' PyTorch release", "the authors' Caffe release"
PORT, OURS = "the earlier Paddle port", "this project"

SUFFIXES = (".pdparams", ".safetensors")
DEFAULT_FOLDER = Path("model")
DEFAULT_NAME = "19"  # as in the earlier port
LOAD_SIZE = 256  # shorter side of the network's input in pixels, unless the checkpoint specifies another
CHECKPOINT_NAME = r"epoch_(.+)_model\.(?:pdparams|safetensors)"

# Optional entries of a checkpoint and their ranges. Training stores the size it used and how far it came; the metadata
# of a safetensors file may also contain the temperature of the annealed mean that suits the weights.
INFO = {"load_size": SIDE, "temperature": number(1e-3, 1e6), "epoch": whole(0), "step": whole(0)}

# -------------------------------------------------------------------------------------------------
# Finding a checkpoint by its name


def find_weights(model_path, name=None):
    """Return the path of the checkpoint that `--load_model NAME` means.

    It is epoch_{NAME}_model.pdparams or .safetensors in `model_path`, or NAME itself is a path. "small" is bundled;
    "official" is downloaded and converted on first use. Raises UserError if it is missing.
    """
    folder = Path(model_path)
    name = name or default_name(folder)
    candidates = (Path(name), folder / name, *(folder / f"epoch_{name}_model{suffix}" for suffix in SUFFIXES))
    if found := [path for path in candidates if path.is_file()]:
        return found[0]
    if name == "small":
        return SMALL
    if name == "official":
        return fetch_official(folder)
    if os.sep in name or Path(name).suffix in SUFFIXES:
        raise UserError(f"{name}: no such checkpoint")
    names = ", ".join(checkpoint_names(folder))
    none = "none (train.py writes them; small is bundled, official are the authors' weights)"
    available = f"--load_model {names}" if names else none
    raise UserError(f"{folder / f'epoch_{name}_model.pdparams'}: no such checkpoint; available: {available}")


def checkpoint_names(folder):
    return sorted({m[1] for p in folder.glob("epoch_*_model.*") if (m := re.fullmatch(CHECKPOINT_NAME, p.name))})


def default_name(folder):
    """Return the name used without --load_model: 19, else latest, else the highest number, else the only one or small.

    With several checkpoints of other names it is 19, too, which `find_weights` then reports as missing. Raises
    UserError if the folder does not exist, unless it is the default one.
    """
    names = checkpoint_names(folder)
    if not names:
        if not folder.is_dir() and folder != DEFAULT_FOLDER:
            raise UserError(f"{folder}: no such folder")
        note(
            f"{folder} contains no checkpoint: using the bundled weights, small; "
            "for the authors' weights, trained on all of ImageNet: --load_model official"
        )
        return "small"
    numbers = sorted((name for name in names if name.isdecimal()), key=int)
    preferred = [name for name in (DEFAULT_NAME, "latest", *numbers[-1:]) if name in names]
    name = preferred[0] if preferred else names[0] if len(names) == 1 else DEFAULT_NAME
    if name != DEFAULT_NAME:
        note(f"no --load_model: using {name}, as {folder} contains no {DEFAULT_NAME}")
    return name


def fetch_official(folder):
    """Download the authors' PyTorch release, convert it and store it in the folder; return its path."""
    network, _ = read_network(download(OFFICIAL_URL, folder))
    path = folder / "epoch_official_model.pdparams"
    save_checkpoint(network.state_dict(), path)
    return path


def download(url, folder):
    """Return the file behind `url`, downloaded to Paddle's cache.

    Raises UserError if its SHA-256 does not begin with the digits at the end of its name.
    """
    from paddle.utils import download as paddle_download

    cache, name = Path(paddle_download.WEIGHTS_HOME), url.split("/")[-1]
    offline = f"download it on another machine, then: python resources/convert_weights.py {name} {folder}"
    try:
        if not (cache / name).exists():  # Paddle's own attempts have no timeout and take long to fail
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=TIMEOUT).close()
        # PyTorch's files are zip archives, which Paddle would unpack.
        path = Path(paddle_download.get_path_from_url(url, str(cache), decompress=False))
    except (OSError, RuntimeError) as error:
        raise UserError(f"{url}: download failed ({getattr(error, 'reason', error)}); {offline}") from error
    digits, digest = name.split(".")[0].split("-")[-1], sha256(path)
    if not digest.startswith(digits):
        path.unlink()  # else the next attempt would find it in the cache
        raise UserError(f"{url}: removed, as its SHA-256 is {digest[:8]}…, not {digits}…; try again, or {offline}")
    return path


# -------------------------------------------------------------------------------------------------
# From a checkpoint to its network

EXTRA_RELU = "extra_relu_ahead_of_conv6"  # the entry that marks a state dict of the earlier port's network


class PortCIC(CIC):
    """The network of an earlier Paddle port, with another ReLU before conv6, for weights trained there.

    The parameters are the same, so an additional entry in its state dict distinguishes it.
    """

    def __init__(self):
        super().__init__()
        self.register_buffer(EXTRA_RELU, paddle.ones([1]))
        self.conv6 = _AfterReLU(*self.conv6.children())


class _AfterReLU(nn.Sequential):
    def forward(self, x):
        return super().forward(F.relu(x))


def load_network(path):
    """Return the network for the checkpoint at `path`, with its weights. Raises UserError if it cannot be read."""
    return make_network(load_checkpoint(path), path)


def checkpoint_info(path):
    """Return what a checkpoint specifies besides its weights: a dict with some of the keys in INFO.

    Raises UserError if it cannot be read or an entry is out of range.
    """
    info = read_info(path)
    for name in INFO.keys() & info.keys():
        try:
            info[name] = INFO[name](str(np.asarray(info[name]).item()))
        except (ArgumentTypeError, ValueError) as error:
            raise UserError(f"{path}: {name} {error}") from None
    return {name: info[name] for name in INFO if name in info}


class _Unset(nn.initializer.Initializer):
    """Leave parameters as they are: drawing 32 million random weights takes longer than reading the checkpoint's."""

    def forward(self, tensor, block=None):
        return tensor


def make_network(state, path):
    """Return the network for a state dict that was read from `path`. Raises UserError if there is none."""
    # Paddle does not return the current global initializer: a caller's own is lost.
    nn.initializer.set_global_initializer(_Unset(), _Unset())
    try:
        network = PortCIC() if EXTRA_RELU in state else CIC()
    finally:
        nn.initializer.set_global_initializer(None)
    set_weights(network, state, path)
    return network


# -------------------------------------------------------------------------------------------------
# From a file in any format to a network


def read_network(path, temperature=None):
    """Return the network in a file of any format, and whose it is: PYTORCH, CAFFE, PORT or OURS.

    Args:
        path: The file.
        temperature: What the logits are multiplied by. None means 0.38 for the authors' PyTorch release, whose head
            presumably includes 1 / 0.38, and 1 for the others.

    Raises:
        UserError: If the weights are damaged or another network's.
    """
    state = load_checkpoint(path)
    state = {re.sub(r"^_layers\.", "", str(key)): value for key, value in state.items()}
    kinds = [kind for prefix, kind in KINDS.items() if any(name.startswith(prefix) for name in state)]
    if not kinds:
        raise UserError(f"{path}: not a known network; it contains {', '.join(list(state)[:3]) or 'nothing'}, …")
    convert = {PYTORCH: _from_pytorch, CAFFE: _from_caffe, PORT: _from_port, OURS: lambda state, path: state}[kinds[0]]
    network = make_network(convert(state, path), path)
    for tensor in network.conv8_313.parameters():
        tensor.set_value(tensor * (temperature or (TEMPERATURE if kinds[0] == PYTORCH else 1)))
    return network, kinds[0]


# Beginnings of parameter names that only one kind of network has
KINDS = {"bw_conv1_1.": CAFFE, "model1.": PYTORCH, "features.": PORT, "conv1.": OURS}

LAYER_PARTS = {"weight": "weight", "bias": "bias"}
NORM_PARTS = {**LAYER_PARTS, "_mean": "_mean", "_variance": "_variance"}


def _names(column, parts, norm_parts):
    """Map the names of one column of `_layers` to this project's."""
    return {
        f"{layer[column]}.{theirs}": f"{layer[0]}.{ours}"
        for layer in _layers()
        for theirs, ours in (norm_parts if _is_norm(layer) else parts).items()
    }


def _layers():
    """Yield the names of each layer with weights: here, in the authors' PyTorch and Caffe releases, in the port."""
    index = 0  # in the port's single Sequential
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


def _is_norm(layer):
    return layer[2].endswith("norm")


def _rename(state, names, path):
    """Return the state under this project's names; `names` maps those of the source to them."""
    check_names(state, names, path)
    if odd := [name for name in names if getattr(state[name], "dtype", np.dtype(int)).kind != "f"]:
        raise UserError(f"{path}: not an array of floats: {odd[0]}")
    return {ours: state[theirs].astype(np.float32) for theirs, ours in names.items()}


def _from_port(state, path):
    """Mark the converted state as one of the network with another ReLU before conv6."""
    return {**_rename(state, _names(3, LAYER_PARTS, NORM_PARTS), path), EXTRA_RELU: np.ones(1, np.float32)}


def _from_pytorch(state, path):
    norm_parts = {**LAYER_PARTS, "running_mean": "_mean", "running_var": "_variance"}
    names = {"model_out.weight": "model_out", **_names(1, LAYER_PARTS, norm_parts)}
    state = {name: array for name, array in state.items() if not name.endswith(".num_batches_tracked")}
    state = _rename(state, names, path)
    _check_bins(state.pop("model_out") * AB_SCALE, path)
    state["conv1.0.weight"] = state["conv1.0.weight"] / np.float32(L_SCALE)
    return state


def _check_bins(expectation, path):
    """Raise UserError unless the last layer, [2, 313, 1, 1], is the expectation over the bins in this order."""
    bins = load_ab_bins().numpy().T[:, :, None, None]
    # 0.5 of the grid's 10 covers rounding to 16 bits
    if expectation.shape != bins.shape or not np.abs(expectation - bins).max() < 0.5:
        raise UserError(f"{path}: its model_out does not contain pts_in_hull.npy's bins in the same order")


def _from_caffe(state, path):
    """Convert batch norm, which has sums there (mean and variance times a third number) but neither weight nor bias.

    Other layers are ignored: class8_ab, which every program that uses the file fills in from pts_in_hull.npy, and
    layers for training only.
    """
    names = _names(2, {"0": "weight", "1": "bias"}, {"0": "_mean", "1": "_variance", "2": "factor"})
    state = _rename({name: array for name, array in state.items() if name in names}, names, path)
    state = {name: array if name.endswith("weight") else array.ravel() for name, array in state.items()}
    for ours, *_ in filter(_is_norm, _layers()):
        factor = state.pop(f"{ours}.factor").sum()  # of one number
        with np.errstate(all="ignore"):  # 0 if never trained, which gives NaN
            state[f"{ours}._mean"] /= factor
            state[f"{ours}._variance"] /= factor
        state[f"{ours}.weight"] = np.ones_like(state[f"{ours}._mean"])
        state[f"{ours}.bias"] = np.zeros_like(state[f"{ours}._mean"])
    return state
