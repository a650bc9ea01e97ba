"""Checkpoints: states of networks and of whole runs, read as data, written whole."""

import math
import re
from pathlib import Path

from support.cli import UserError, note, one_line
from support.files import atomic_path, make_folder
from support.foreign import is_pytorch, is_safetensors, read_caffe, read_metadata, read_pytorch, read_safetensors
from support.pickles import read_pickle
from support.processes import all_reduce, is_first, share_statistics

import numpy as np
import paddle
import safetensors.numpy

# Entries that a training run adds to its network's weights: how large the network's inputs were, and how long it ran.
TRAINED = ("load_size", "epoch", "step")


def save_checkpoint(state, path):
    """Write a state dict (or nested dicts of tensors, numbers and strings) as `paddle.load` reads it."""
    with atomic_path(path) as temporary:
        paddle.save(state, str(temporary))


def save_safetensors(state, path, metadata=None):
    """Write a flat dict of NumPy arrays, and text entries that describe them."""
    arrays = {name: np.asarray(array, order="C") for name, array in state.items()}
    with atomic_path(path) as temporary:
        temporary.write_bytes(safetensors.numpy.save(arrays, {"format": "pd", **(metadata or {})}))


def load_checkpoint(path):
    """Return the dict that `save_checkpoint` or `paddle.save` (2.0 to 3.x) wrote, or the arrays of another format.

    The formats, recognized by their content, are safetensors and those of PyTorch and Caffe. NumPy arrays take the
    place of tensors. `paddle.load` would unpickle the file, and a pickle can run code; this function runs nothing.
    Raises UserError, naming the file, if it is missing, damaged or holds anything but arrays, numbers, strings and
    containers of these.
    """
    return read_checkpoint(path)[0]


def read_checkpoint(path):
    """Return what `load_checkpoint` does and, as a dict, what else the checkpoint contains: the entries in TRAINED."""
    return read_file(path, _read_state)


def read_info(path):
    """Return the second half of `read_checkpoint`; the arrays of a safetensors file are not read."""
    return read_file(path, lambda file: read_metadata(file) if is_safetensors(file) else _read_state(file)[1])


def _read_state(file):
    start = file.peek(256)[:256]
    if is_safetensors(file):
        return read_safetensors(file), read_metadata(file)
    if is_pytorch(file):
        state = read_pytorch(file)
    elif start.startswith(b"\x80"):
        state = read_pickle(file)
    elif start.isascii() and start.decode().replace("\n", "").replace("\r", "").isprintable():
        raise ValueError("text or empty: did its download go wrong?")
    else:
        state = read_caffe(file)
    if not isinstance(state, dict):
        raise ValueError(f"it holds a {type(state).__name__}, not the state of a network")
    state.pop("StructuredToParameterName@@", None)  # Paddle's own note of parameter names
    return state, {name: state.pop(name) for name in TRAINED if name in state}


def read_file(path, function):
    """Return `function(file)` of the opened file; any problem becomes a UserError that names the file."""
    try:
        with open(path, "rb") as file:
            return function(file)
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {(error.strerror or str(error)).lower()}") from error
    except Exception as error:  # damaged files make the readers raise anything: KeyError, struct.error, …
        reason = one_line(str(error) or type(error).__name__)
        raise UserError(f"{path}: not a readable checkpoint: {reason}") from error


def check_names(state, expected, path):
    """Raise UserError, naming them, if the state lacks expected names or has others."""
    if missing := [name for name in expected if name not in state]:
        raise UserError(f"{path}: another network's checkpoint, it lacks {_some(missing)}")
    if unexpected := [str(name) for name in state if name not in expected]:
        raise UserError(f"{path}: another network's checkpoint, it also has {_some(unexpected)}")


def _some(names):
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return one_line(", ".join(names[:3])) + more


def load_weights(network, path):
    """Read the weights at `path` into the network; they must fit completely and be finite."""
    set_weights(network, load_checkpoint(path), path)


def set_weights(network, state, path):
    """Put a state dict of arrays, read from `path`, into the network. Raises UserError if it does not fit."""
    tensors = network.state_dict()
    expected = {name: f"float {list(tensor.shape)}" for name, tensor in tensors.items()}
    check_names(state, expected, path)
    found = {name: _describe(state[name]) for name in expected}
    if found != expected:
        wrong = [
            f"{name} {found[name]} instead of {expected[name]}" for name in expected if found[name] != expected[name]
        ]
        raise UserError(f"{path}: another network's checkpoint: {_some(wrong)}")
    with np.errstate(over="ignore"):
        state = {name: state[name].astype(np.float32, copy=False) for name in expected}
    if broken := [name for name, array in state.items() if not np.isfinite(array).all()]:
        raise UserError(f"{path}: not finite (NaN or infinity): {_some(broken)}")
    if negative := [name for name in state if name.endswith("_variance") and state[name].min() < 0]:
        raise UserError(f"{path}: negative variances: {_some(negative)}")
    for name, tensor in tensors.items():
        tensor.set_value(state[name])


def _describe(array):
    """Return the kind and shape of an array, e.g. "float [64, 1, 3, 3]", or the type of anything else."""
    if not isinstance(array, np.ndarray):
        return type(array).__name__
    return f"{array.dtype.name.rstrip('0123456789')} {list(array.shape)}"


# -------------------------------------------------------------------------------------------------
# A run, saved and resumed


def claim(model_path, log_path, replace):
    """Makes the folders that a run will write to. Raises UserError where they cannot be, or hold an earlier run.

    `replace`: that may be there.
    """
    if not is_first():
        return
    for folder in (model_path, log_path):
        make_folder(folder)
    theirs = [path for path in Path(model_path).iterdir() if re.fullmatch(WRITTEN, path.name)]
    log = Path(log_path) / "train.jsonl"
    if not replace and (theirs or (log.exists() and log.stat().st_size)):
        raise UserError(
            f"{model_path if theirs else log}: an earlier run's; go on with it by --continue_train, "
            "replace it by --overwrite, or choose another --model_path and --log_path"
        )


WRITTEN = r"epoch_(latest|best|\d+)_(model\.pdparams|state\.pdopt)"


class Run:
    """Network, optimizer, scaler and how far they are: what a checkpoint holds.

    `epoch` and `batch` are what comes next, `step` counts the steps done. Of random state there is only the
    seed: which image comes when, and its crop, follow from seed, epoch and index.

    `flags`, numbers, strings and arrays, say how it is trained; `keep` is how many numbered checkpoints stay (0: all).
    """

    def __init__(self, folder, network, optimizer, scaler, flags, keep=0):
        self.folder, self.network, self.optimizer, self.scaler = Path(folder), network, optimizer, scaler
        self.flags, self.keep = flags, keep
        self.epoch = self.batch = self.step = 0
        self.best_kl = math.inf

    def save(self, *names):
        """Writes `epoch_{name}_model.pdparams`, and beside it all that is needed to go on.

        The training state holds the weights as well, so that it is whole by itself: a stop between the two
        files leaves no weights beside another step's moments.
        """
        share_statistics(self.network)
        if is_first():
            self._write(names)
        all_reduce(np.zeros(1))  # wait: a launcher that sees the others end gives the first process 3 seconds

    def _write(self, names):
        weights = self.network.state_dict()
        if not all(bool(paddle.isfinite(tensor).all()) for tensor in weights.values()):
            raise UserError("the weights are not finite, so they are not saved: try a lower --lr, or --continue_train")
        state = {
            "network": weights,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "progress": {k: getattr(self, k) for k in ("epoch", "batch", "step", "best_kl")},
            "flags": self.flags,
        }
        for name in names:
            save_checkpoint(state, self.folder / f"epoch_{name}_state.pdopt")
            self.save_weights(name)
        self._prune()

    def save_weights(self, name):
        if is_first():
            save_checkpoint(self.network.state_dict(), self.folder / f"epoch_{name}_model.pdparams")

    def _prune(self):
        """Removes numbered checkpoints beyond the newest to keep; never `latest` nor `best`."""
        matches = [re.fullmatch(r"epoch_(\d+)_model\.pdparams", path.name) for path in self.folder.glob("epoch_*")]
        # Later ones than this run's are another's, and not newer.
        epochs = sorted(int(match[1]) for match in matches if match and int(match[1]) < self.epoch)
        for epoch in epochs[: -self.keep] if self.keep else []:
            for name in ("model.pdparams", "state.pdopt"):
                (self.folder / f"epoch_{epoch}_{name}").unlink(missing_ok=True)

    def resume(self, name, objective, order):
        """Restores all that `save` wrote.

        Flags may have changed but for those of the `objective`, which raise UserError: the run would be neither the
        one nor the other. With others of the `order` a place within an epoch means nothing, so the epoch begins again.
        """
        path = self.folder / f"epoch_{name}_state.pdopt"
        if not path.exists() and path.with_name(f"epoch_{name}_model.pdparams").exists():
            raise UserError(f"{path}: not there; weights alone can start a training: --init_from FILE")
        state = load_checkpoint(path)
        if missing := {"network", "optimizer", "scaler", "progress", "flags"} - state.keys():
            raise UserError(f"{path}: not a training state of train.py, it lacks {', '.join(sorted(missing))}")
        changed = {name: text for name in self.flags if (text := self._change(name, state["flags"].get(name)))}
        if other := [text for name, text in changed.items() if name in objective]:
            raise UserError(f"{path}: trained otherwise: {'; '.join(other)} (to start anew from it: --init_from)")
        for text in changed.values():
            note(f"continuing with a changed setting: {text}")
        set_weights(self.network, state["network"], path)
        self.optimizer.set_state_dict(to_tensors(state["optimizer"]))
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        for key, value in state["progress"].items():
            setattr(self, key, value)
        if self.batch and changed.keys() & set(order):
            note(f"beginning epoch {self.epoch} again: its order of images is another one now")
            self.batch = 0

    def _change(self, name, before):
        """How a flag differs from what it was, in words; None if it does not."""
        now = self.flags[name]
        if isinstance(now, np.ndarray):
            same = before is not None and np.shape(before) == now.shape and np.allclose(before, now)
            return None if same else f"--{name} is another one now"
        label = "number of images" if name == "images" else f"--{name}"
        return None if before == now else f"{label} {before} is now {now}"


def to_tensors(state):
    """NumPy arrays in nested dicts -> tensors."""
    if isinstance(state, dict):
        return {key: to_tensors(value) for key, value in state.items()}
    return paddle.to_tensor(state) if isinstance(state, np.ndarray) else state
