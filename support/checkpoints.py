"""Checkpoints: save and load the weights of networks and the states of training runs.

They are read as data, without running any code in them, and a file with the final name is always complete.
"""

from support.cli import UserError
from support.files import atomic_path
from support.weights_files import is_safetensors, read_metadata, read_weights

import numpy as np
import paddle
import safetensors.numpy

# Entries (int64) that a training run adds to the weights: the size of the network's input and the run's length
TRAINED = ("load_size", "epoch", "step")
ENTRIES = (*TRAINED, "temperature")


def save_checkpoint(state, path):
    """Write a state dict (or nested dicts of tensors, numbers and strings) as `paddle.load` reads it."""
    with atomic_path(path) as temporary:
        paddle.save(state, str(temporary))


def save_safetensors(state, path, metadata=None):
    """Write a flat dict of NumPy arrays, and text entries that describe them, as a safetensors file."""
    arrays = {name: np.asarray(array, order="C") for name, array in state.items()}
    with atomic_path(path) as temporary:
        temporary.write_bytes(safetensors.numpy.save(arrays, {"format": "pd", **(metadata or {})}))


def load_checkpoint(path):
    """Return the dict in a file of `paddle.save` (2.0 to 3.x), safetensors, PyTorch or Caffe, without the ENTRIES.

    The format is recognized by the file's content. NumPy arrays take the place of tensors. `paddle.load` would unpickle
    the file, and a pickle can run code; this function runs nothing. Raises UserError, naming the file, if it is
    missing, damaged or holds anything but arrays, numbers, strings and containers of these.
    """
    return read_file(path, _read_state)[0]


def read_info(path):
    """Return what a checkpoint contains besides its weights, a dict: its ENTRIES, or the metadata of safetensors."""
    return read_file(path, lambda file: read_metadata(file) if is_safetensors(file) else _read_state(file)[1])


def _read_state(file):
    """Return the weights in an open file, and its entries ENTRIES."""
    state = read_weights(file)
    if not isinstance(state, dict):
        raise ValueError(f"it holds a {type(state).__name__}, not the state of a network")
    state.pop("StructuredToParameterName@@", None)  # Paddle's own note of parameter names
    return state, {name: state.pop(name) for name in ENTRIES if name in state}


def read_file(path, function):
    """Return `function(file)` of the opened file; any problem becomes a UserError that names the file."""
    try:
        with open(path, "rb") as file:
            return function(file)
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {(error.strerror or str(error)).lower()}") from error
    except Exception as error:  # damaged files make the readers raise anything: KeyError, struct.error, …
        raise UserError(f"{path}: not a readable checkpoint: {str(error) or type(error).__name__}") from error


def check_names(state, expected, path):
    """Raise UserError, naming them, if the state lacks expected names or has others."""
    if different := sorted(set(expected) ^ set(map(str, state))):
        names = ", ".join(different[:3]) + ", …" * (len(different) > 3)
        raise UserError(f"{path}: another network's checkpoint: missing or unknown: {names}")


def load_weights(network, path):
    """Read the weights at `path` into the network; they must fit completely and be finite."""
    set_weights(network, load_checkpoint(path), path)


def set_weights(network, state, path):
    """Put a state dict of arrays, read from `path`, into the network. Raises UserError if it does not fit."""
    tensors, arrays = network.state_dict(), {}
    check_names(state, tensors, path)
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
