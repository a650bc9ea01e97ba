"""Checkpoints: save, load and resume states of networks and of training runs.

They are read as data, without running any code in them, and a file with the final name is always complete.
"""

import errno
import re
from pathlib import Path

from support.cli import UserError
from support.files import atomic_path, make_folder
from support.processes import all_reduce, is_first, share_statistics
from support.weights_files import is_safetensors, read_metadata, read_weights

import numpy as np
import paddle
import safetensors.numpy

try:
    import fcntl
except ImportError:  # Windows
    import msvcrt

    fcntl = None

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


# -------------------------------------------------------------------------------------------------
# Save and resume a training run

WRITTEN = r"epoch_(latest|best|\d+)_(model\.pdparams|state\.pdopt)"  # names of a run's files in its model folder
LOGGED = r"train\.jsonl|vdlrecords\.\d+\.log"  # and in its log folder
LOCK = ".lock"
PARTS = ("network", "optimizer", "scaler", "progress", "flags")  # keys of a training state


def claim(model_path, log_path, advice=None):
    """Make the folders that a run writes to, and lock them until the returned files are closed or the process ends.

    Raises UserError if they cannot be written to or another process holds them; with `advice`, which becomes part of
    the message, also if they contain an earlier run. A log whose run never saved a checkpoint does not count as one.
    """
    if not is_first():
        return []
    for folder in (model_path, log_path):
        make_folder(folder)
    earlier = _matching(model_path, WRITTEN)
    if not Path(model_path, LOCK).exists():
        earlier += _matching(log_path, LOGGED)
    if advice and earlier:
        raise UserError(f"{earlier[0]}: belongs to an earlier run; {advice}")
    return [_lock(folder) for folder in {Path(model_path), Path(log_path)}]


def _lock(folder):
    """Lock a folder until the returned file is closed or the process ends. Raises UserError if it is locked already."""
    file = open(Path(folder, LOCK), "a")  # noqa: SIM115
    try:
        if fcntl:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock, worker processes do not inherit it
        else:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):  # others: the file system has no locks
            raise UserError(f"{folder}: another run is writing to this folder") from error
    return file


def _matching(folder, names):
    """Return the files in a folder whose names match a regular expression."""
    return [path for path in Path(folder).iterdir() if re.fullmatch(names, path.name)]


def remove_run(model_path, log_path):
    """Remove the checkpoints, training states and logs of an earlier run."""
    if is_first():
        for path in _matching(model_path, WRITTEN) + _matching(log_path, LOGGED):
            path.unlink()


class Run:
    """The network, optimizer and loss scaler of a training run, and its progress: everything that a checkpoint holds.

    `flags` (numbers, strings and arrays) and `progress` (non-negative numbers, updated by the caller) are dicts.
    `entries` are the names of those that are also stored with the weights alone, as int64. `keep` is the number of
    numbered checkpoints to keep (0: all).
    """

    def __init__(self, folder, network, optimizer, scaler, flags, progress, entries=(), keep=0):
        self.folder, self.network, self.optimizer, self.scaler = Path(folder), network, optimizer, scaler
        self.flags, self.progress, self.entries, self.keep = flags, progress, entries, keep

    def save(self, *names):
        """Write `epoch_{name}_model.pdparams` for each name, and next to it the state that is needed to resume.

        The state also contains the weights: if the process is killed between the two files, weights and Adam's
        moments of different steps are never combined. Raises UserError if the weights are not finite.
        """
        share_statistics(self.network)
        if is_first():
            self._write(names)
            self._prune()
        all_reduce(np.zeros(1))  # wait: when other processes end, a launcher gives rank 0 only 3 seconds

    def _write(self, names):
        weights = self.network.state_dict()
        if not all(paddle.isfinite(tensor).all() for tensor in weights.values()):
            raise UserError("the weights are not finite and were not saved: try a lower --lr")
        state = {
            "network": weights,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "progress": self.progress,
            "flags": self.flags,
        }
        for name in names:
            save_checkpoint(state, self.folder / f"epoch_{name}_state.pdopt")
            self.save_weights(name)

    def save_weights(self, name):
        """Write `epoch_{name}_model.pdparams`: the weights and the entries."""
        if is_first():
            known = {**self.flags, **self.progress}
            entries = {entry: np.array(known[entry], np.int64) for entry in self.entries}
            save_checkpoint({**self.network.state_dict(), **entries}, self.folder / f"epoch_{name}_model.pdparams")

    def _prune(self):
        """Remove numbered checkpoints, except for the last ones to keep; never `latest` or `best`."""
        names = [path.name.split("_")[1] for path in self.folder.glob("epoch_*_model.pdparams")]
        # Later epochs remain from before a run was resumed at an earlier one.
        epochs = sorted(int(name) for name in names if name.isdecimal() and int(name) < self.progress["epoch"])
        for epoch in epochs[: -self.keep]:  # none if it is 0
            (self.folder / f"epoch_{epoch}_model.pdparams").unlink(missing_ok=True)
            (self.folder / f"epoch_{epoch}_state.pdopt").unlink(missing_ok=True)

    def resume(self, name):
        """Restore the state that `save` wrote. Return the flags that have changed since, as {name: message}.

        Raises UserError if the file cannot be read or is not a training state.
        """
        path = self.folder / f"epoch_{name}_state.pdopt"
        state = load_checkpoint(path)
        if not all(isinstance(state.get(part), dict) for part in PARTS):
            raise UserError(f"{path}: not a training state, which has {', '.join(PARTS)}")
        for key, before in self.progress.items():
            value = state["progress"].get(key, before)
            if not (isinstance(value, type(before)) and value >= 0):
                raise UserError(f"{path}: not a training state: its {key} is {value!r}")
            self.progress[key] = value
        set_weights(self.network, state["network"], path)
        self.optimizer.set_state_dict(state["optimizer"])
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        changes = {}
        for name, now in self.flags.items():
            before = state["flags"].get(name)
            if not np.array_equal(before, now):
                changes[name] = f"{name} has changed" if np.ndim(now) else f"{name} {before} is now {now}"
        return changes
