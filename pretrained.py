"""From a name or a file to a network: this project's weights, the authors' (PyTorch, Caffe), the earlier port's."""

import hashlib
import re
import urllib.request
from argparse import ArgumentTypeError
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

from support.checkpoints import read_checkpoint, set_weights
from support.cli import SIDE, UserError, note, number, whole
from support.files import atomic_path

import numpy as np
import paddle
from paddle import nn

from model import CIC
from utils import RESOURCES, TEMPERATURE, load_ab_bins

SMALL = RESOURCES / "epoch_small_model.safetensors"  # the bundled weights

OFFICIAL_URL = "https://colorizers.s3.us-east-2.amazonaws.com/colorization_release_v2-9b330a0b.pth"
TIMEOUT = 10  # seconds until an address counts as out of reach

# The authors' PyTorch network differs from this project's, whose input is L - 50 and whose output is ab:
L_SCALE = 100  # it takes (L - 50) / 100
AB_SCALE = 110  # and returns ab / 110, from a softmax without a temperature: its head presumably includes 1 / 0.38

DEFAULT_FOLDER = Path("model")
DEFAULT_NAME = "19"  # as in the earlier port
LOAD_SIZE = 256  # shorter side of the network's input in pixels, unless the weights specify another

# Entries of a file besides its weights, and their ranges. Training stores the size it used and how far it came; the
# metadata of a safetensors file may also contain the temperature of the annealed mean that suits the weights.
ENTRIES = {"load_size": SIDE, "temperature": number(1e-3, 1e6), "epoch": whole(0), "step": whole(0)}


def check_entry(name, value):
    """Return the number that is the value of an entry. Raises ValueError if it is none or out of range."""
    try:
        return ENTRIES[name](str(value))
    except (ArgumentTypeError, ValueError) as error:
        raise ValueError(f"{name}: {error}") from None


# -------------------------------------------------------------------------------------------------
# From a name to a file


def find_weights(model_path, name=None):
    """Return the path of the weights that `--load_model NAME` means.

    NAME is a path, or epoch_{NAME}_model.pdparams or .safetensors in `model_path`. "small" is bundled; "official" is
    downloaded to Paddle's cache on first use. Raises UserError if there are no such weights.
    """
    folder = Path(model_path)
    name = default_name(folder) if name is None else str(name)
    for path in (Path(name), folder / f"epoch_{name}_model.pdparams", folder / f"epoch_{name}_model.safetensors"):
        if path.is_file():
            return path
    if name == "small":
        return SMALL
    if name == "official":
        return download(OFFICIAL_URL)
    available = ", ".join([*checkpoint_names(folder), "small", "official"])
    raise UserError(f"{name}: no such checkpoint in {folder}; available: {available}")


def checkpoint_names(folder):
    pattern = r"epoch_(.+)_model\.(?:pdparams|safetensors)"
    return sorted({m[1] for p in folder.glob("epoch_*_model.*") if (m := re.fullmatch(pattern, p.name))})


def default_name(folder):
    """Return the name used without --load_model: 19, latest, the highest number, any other name, or small.

    Raises UserError if the folder does not exist, unless it is the default one.
    """
    if not folder.is_dir():
        if folder != DEFAULT_FOLDER:
            raise UserError(f"{folder}: no such folder")
        return "small"
    names = checkpoint_names(folder)
    numbers = sorted((name for name in names if name.isdecimal()), key=int)
    preferred = (DEFAULT_NAME, "latest", *numbers[-1:], *names)
    name = next((name for name in preferred if name in names), "small")
    if name != DEFAULT_NAME:
        note(f"no --load_model: using {name}, as {folder} contains no {DEFAULT_NAME}")
    return name


def download(url):
    """Return the file behind `url`, which is downloaded to Paddle's cache once.

    Raises UserError if its SHA-256 does not begin with the digits at the end of its name.
    """
    path = Path(paddle.utils.download.WEIGHTS_HOME, url.split("/")[-1])
    if path.exists():
        return path
    note(f"downloading {url} to {path}")
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as response:
            content = response.read()
    except (OSError, HTTPException) as error:
        advice = f"download it on another machine and pass its path: --load_model {path.name}"
        raise UserError(f"{url}: download failed ({getattr(error, 'reason', error)}); {advice}") from error
    digits, digest = path.stem.split("-")[-1], hashlib.sha256(content).hexdigest()
    if not digest.startswith(digits):
        raise UserError(f"{url}: download failed: its SHA-256 is {digest[:8]}…, not {digits}…; try again")
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)
    return path


# -------------------------------------------------------------------------------------------------
# From a file to a network


@dataclass
class Weights:
    """The content of a weight file, read once. `network` makes the network."""

    path: Path
    sha256: str  # of the file
    state: dict  # arrays, under this project's names
    head: str  # of the network: conv8_313 or conv8_ab
    extra_relu: bool  # whether the network has the earlier port's additional ReLU before conv6
    temperature: float  # of the annealed mean; None if the network predicts ab itself
    load_size: int = LOAD_SIZE  # shorter side of the network's input in pixels
    epoch: int = None  # how long the weights were trained, if known
    step: int = None

    def network(self):
        """Return a network with these weights. Raises UserError if they are damaged or another network's."""
        with paddle.LazyGuard():  # without initial weights: to draw them takes longer than to read the file
            network = CIC(self.head)
        if self.extra_relu:
            network.conv5.add_sublayer("extra_relu", nn.ReLU())
        set_weights(network, self.state, self.path)
        return network


def load_network(path):
    """Return the network in a weight file of any known format. Raises UserError if it cannot be read."""
    return read_weights(path).network()


def initialize(network, path):
    """Put the weights in a file of any known format into a network of this project, to train it further.

    Returns:
        str: The network's head, if it keeps its random weights because the file's network has a different one, or None.

    Raises:
        UserError: If the weights are damaged or another network's.
    """
    weights = read_weights(path)
    if weights.extra_relu:
        raise UserError(f"{path}: has the earlier port's additional ReLU before conv6 and can only colorize")
    if weights.head == network.head:
        set_weights(network, weights.state, path)
        return None
    kept = {name: array for name, array in weights.state.items() if not name.startswith(weights.head)}
    random = {name: tensor.numpy() for name, tensor in network.state_dict().items() if name.startswith(network.head)}
    set_weights(network, {**kept, **random}, path)
    return network.head


def read_weights(path):
    """Read a weight file: this project's, the authors' PyTorch or Caffe release, or the earlier port's.

    The parameter names show whose network it is. Raises UserError if the file cannot be read or is damaged.
    """
    content, sha256 = read_checkpoint(path)
    entries = {name: content.pop(name) for name in ENTRIES if name in content}
    try:
        entries = {name: check_entry(name, np.asarray(value).item()) for name, value in entries.items()}
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    arrays = {str(name): array for name, array in content.items() if isinstance(array, np.ndarray)}
    state = {name.removeprefix("_layers."): array for name, array in arrays.items()}
    extra_relu = "features.0.weight" in state
    if extra_relu:
        state = _from_port(state)
    elif "model1.0.weight" in state:
        state = _from_pytorch(state, path)
    elif "bw_conv1_1.0" in state:
        state = _from_caffe(state)
    head = "conv8_ab" if "conv8_ab.weight" in state else "conv8_313"
    temperature = entries.pop("temperature", TEMPERATURE) if head == "conv8_313" else None
    return Weights(Path(path), sha256, state, head, extra_relu, temperature, **entries)


# -------------------------------------------------------------------------------------------------
# Other projects' parameters under this project's names. Whatever does not fit keeps its name and is reported later.


def _from_port(state):
    """Convert the state of the port, which has all layers in one list, among them another ReLU after conv5."""
    counts = (5, 5, 7, 7, 8, 7, 7, 6)
    layers = [f"conv{stage}.{i}" for stage, count in enumerate(counts, start=1) for i in range(count)]
    names = {f"features.{i}": layer for i, layer in enumerate([*layers, "conv8_313"])}
    return {re.sub(r"^features\.\d+", lambda m: names.get(m[0], m[0]), name): array for name, array in state.items()}


def _from_pytorch(state, path):
    """Convert the state of the PyTorch release, its scales, and its softmax without a temperature."""
    expectation, bins = state.pop("model_out.weight", None), load_ab_bins().numpy().T[:, :, None, None]
    # 0.5 of the grid's 10 covers rounding to 16 bits
    if np.shape(expectation) != bins.shape or not np.abs(expectation * AB_SCALE - bins).max() < 0.5:
        raise UserError(f"{path}: its model_out does not contain pts_in_hull.npy's bins in the same order")
    state = {name: array for name, array in state.items() if not name.endswith(".num_batches_tracked")}
    names = {"model8.6": "conv8_313", "model": "conv", "running_mean": "_mean", "running_var": "_variance"}
    for theirs, ours in names.items():
        state = {name.replace(theirs, ours): array for name, array in state.items()}
    factors = {"conv1.0.weight": 1 / L_SCALE, "conv8_313.weight": TEMPERATURE, "conv8_313.bias": TEMPERATURE}
    for name, factor in factors.items():
        if name in state:
            state[name] = state[name] * factor
    return state


def _from_caffe(state):
    """Convert batch norm, which has sums there (mean and variance times a third number) but neither weight nor bias.

    Layers that are not in this network are left out: class8_ab, which every program that uses the file fills in from
    pts_in_hull.npy, and layers for training only.
    """
    converted = {}
    for name, array in state.items():
        if conv := re.fullmatch(r"(?:bw_)?conv(\d)_(\d+)\.([01])", name):
            layer = "conv8_313" if conv[2] == "313" else f"conv{conv[1]}.{2 * int(conv[2]) - 2}"
            converted[f"{layer}.{'weight' if conv[3] == '0' else 'bias'}"] = array
        elif norm := re.fullmatch(r"conv(\d)_(\d)norm\.2", name):
            mean, variance = (state.get(f"{name[:-1]}{i}", np.nan) for i in (0, 1))
            layer, factor = f"conv{norm[1]}.{2 * int(norm[2])}", array.sum() or np.nan  # one number, 0 if untrained
            converted[f"{layer}._mean"], converted[f"{layer}._variance"] = mean / factor, variance / factor
            converted[f"{layer}.weight"], converted[f"{layer}.bias"] = np.ones_like(mean), np.zeros_like(mean)
    return converted
