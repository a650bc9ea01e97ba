"""Checkpoints: save and load the weights of networks and the states of training runs.

They are read as data, without running any code in them, and a file with the final name is always complete.
"""

import hashlib
from pathlib import Path

from support.cli import UserError, report_os_errors
from support.files import atomic_path
from support.weights_files import read_weights

import numpy as np
import paddle


def save_checkpoint(state, path):
    """Write a state dict (or nested dicts of tensors, numbers and strings) as `paddle.load` reads it."""
    with atomic_path(path) as temporary:
        paddle.save(state, str(temporary))


def read_checkpoint(path):
    """Read a file of `paddle.save` (2.0 to 3.x), safetensors, PyTorch or Caffe.

    The format is recognized by the file's content. `paddle.load` would unpickle the file, and a pickle can run code;
    this function runs nothing.

    Args:
        path (str | Path): The file.

    Returns:
        (dict, str): Arrays by name, also numbers, strings and containers of these (the text entries of a safetensors
        file are strings); and the file's SHA-256, hexadecimal.

    Raises:
        UserError: If the file is missing or damaged, or needs anything else.
    """
    with report_os_errors(f"{path}: cannot be read"):
        content = Path(path).read_bytes()
    try:
        state = read_weights(content)
    except Exception as error:  # damaged files make the readers raise anything: KeyError, struct.error, …
        raise UserError(f"{path}: not a readable checkpoint: {str(error) or type(error).__name__}") from error
    return state, hashlib.sha256(content).hexdigest()


def load_checkpoint(path):
    """Return the dict in a file that `read_checkpoint` reads."""
    return read_checkpoint(path)[0]


def set_weights(network, state, path):
    """Put the arrays in a state dict, which was read from `path`, into a network.

    Raises UserError if they do not fit completely or are not finite.
    """
    tensors = network.state_dict()
    arrays = {str(name): array for name, array in state.items() if isinstance(array, np.ndarray)}  # without texts
    if different := sorted(tensors.keys() ^ arrays.keys()):
        names = ", ".join(different[:3]) + ", …" * (len(different) > 3)
        raise UserError(f"{path}: another network's checkpoint: missing or unknown: {names}")
    for name, tensor in tensors.items():
        array = arrays[name]
        if array.dtype.kind != "f" or list(array.shape) != list(tensor.shape):
            found = f"{array.dtype.name} {list(array.shape)} instead of float {list(tensor.shape)}"
            raise UserError(f"{path}: another network's checkpoint: {name} is {found}")
        with np.errstate(over="ignore", invalid="ignore"):
            arrays[name] = array.astype(np.float32, copy=False)
            finite = np.isfinite(arrays[name].sum())
        if not finite or (name.endswith("_variance") and array.min() < 0):
            raise UserError(f"{path}: not finite (NaN or infinity), or a negative variance: {name}")
    for name, tensor in tensors.items():  # only now, so that the network never gets some of the weights
        tensor.set_value(arrays[name])
