"""Checkpoints: save and load the weights of networks and the states of training runs.

They are read as data, without running any code in them, and a file with the final name is always complete.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from support.cli import UserError, report_os_errors
from support.files import atomic_path
from support.weights_files import read_weights

import numpy as np
import paddle
import safetensors.numpy


def save_checkpoint(state, path):
    """Write a state dict (or nested dicts of tensors, numbers and strings) as `paddle.load` reads it."""
    with atomic_path(path) as temporary:
        paddle.save(state, str(temporary))


def save_safetensors(state, path, metadata=None):
    """Write a flat dict of tensors or arrays, and text entries that describe them, as a safetensors file."""
    arrays = {name: np.asarray(array, order="C") for name, array in state.items()}
    with atomic_path(path) as temporary:
        temporary.write_bytes(safetensors.numpy.save(arrays, {"format": "pd", **(metadata or {})}))


@dataclass
class Checkpoint:
    """The content of a weight file."""

    state: dict  # arrays by name; or nested containers of arrays, numbers and strings
    metadata: dict  # text entries that describe them; only safetensors has any
    sha256: str  # of the file, hexadecimal


def read_checkpoint(path):
    """Read a file of `paddle.save` (2.0 to 3.x), safetensors, PyTorch or Caffe as a `Checkpoint`.

    The format is recognized by the file's content. NumPy arrays take the place of tensors. `paddle.load` would unpickle
    the file, and a pickle can run code; this function runs nothing. Raises UserError, naming the file, if it is
    missing or damaged, or needs anything but arrays, numbers, strings and containers of these.
    """
    if not Path(path).exists():
        raise UserError(f"{path}: no such checkpoint")
    with report_os_errors(f"{path}: cannot be read"):
        content = Path(path).read_bytes()
    try:
        state, metadata = read_weights(content)
    except Exception as error:  # damaged files make the readers raise anything: KeyError, struct.error, …
        raise UserError(f"{path}: not a readable checkpoint: {str(error) or type(error).__name__}") from error
    return Checkpoint(state, metadata, hashlib.sha256(content).hexdigest())


def load_checkpoint(path):
    """Return the dict in a file that `read_checkpoint` reads."""
    return read_checkpoint(path).state


def set_weights(network, state, path):
    """Put a state dict of arrays, read from `path`, into a network.

    Raises UserError if they do not fit completely or are not finite.
    """
    tensors, arrays = network.state_dict(), {}
    if different := sorted(tensors.keys() ^ set(map(str, state))):
        names = ", ".join(different[:3]) + ", …" * (len(different) > 3)
        raise UserError(f"{path}: another network's checkpoint: missing or unknown: {names}")
    for name, tensor in tensors.items():
        found, expected = _describe(state[name]), f"float {list(tensor.shape)}"
        if found != expected:
            raise UserError(f"{path}: another network's checkpoint: {name} is {found} instead of {expected}")
        with np.errstate(over="ignore"):
            array = arrays[name] = state[name].astype(np.float32, copy=False)
        if not np.isfinite(array).all() or (name.endswith("_variance") and array.min() < 0):
            raise UserError(f"{path}: not finite (NaN or infinity), or a negative variance: {name}")
    for name, tensor in tensors.items():  # only now, so that the network never gets some of the weights
        tensor.set_value(arrays[name])


def _describe(array):
    """Return the kind and shape of an array, e.g. "float [64, 1, 3, 3]", or the type of anything else."""
    if not isinstance(array, np.ndarray):
        return type(array).__name__
    return f"{array.dtype.name.rstrip('0123456789')} {list(array.shape)}"
