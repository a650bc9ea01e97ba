"""Checkpoints: states of networks and of whole runs, read as data, written whole."""

import json
import math
import re
from pathlib import Path

from support.cli import UserError, note, one_line
from support.files import atomic_path, make_folder
from support.pickles import read_pickle, widen_bfloat16
from support.processes import all_reduce, is_first, share_statistics

import numpy as np
import paddle


def save_checkpoint(state, path):
    """Writes a state dict (or nested dicts of tensors, numbers and strings) as `paddle.load` reads it."""
    with atomic_path(path) as temporary:
        paddle.save(state, str(temporary))


def load_checkpoint(path):
    """The dict that `save_checkpoint` or `paddle.save` (2.0 to 3.x) wrote, or a safetensors file.

    NumPy arrays take the place of the tensors. Nothing in the file is executed: `paddle.load` would unpickle it,
    and a pickle can run code. Raises UserError, naming the file, when it is missing, damaged or holds anything
    but arrays, numbers, strings and containers of them.
    """
    state = _read(path, lambda file: _read_safetensors(file) if is_safetensors(file) else read_pickle(file))
    if not isinstance(state, dict):
        raise UserError(f"{path}: holds a {type(state).__name__}, not the state of a network")
    state.pop("StructuredToParameterName@@", None)  # Paddle's own note of parameter names
    return state


def _read(path, function):
    """`function` of the opened file; whatever goes wrong becomes a UserError that names the file."""
    try:
        with open(path, "rb") as file:
            return function(file)
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {(error.strerror or str(error)).lower()}") from error
    except Exception as error:  # bad bytes make the readers raise whatever they like: KeyError, struct.error, …
        reason = one_line(str(error) or type(error).__name__)
        raise UserError(f"{path}: not a readable checkpoint: {reason}") from error


def check_names(state, expected, path):
    """Raises UserError, naming them, when the state lacks names that are expected or has others."""
    if missing := [name for name in expected if name not in state]:
        raise UserError(f"{path}: another network's checkpoint, it lacks {_some(missing)}")
    if unexpected := [str(name) for name in state if name not in expected]:
        raise UserError(f"{path}: another network's checkpoint, it also has {_some(unexpected)}")


def _some(names):
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return one_line(", ".join(names[:3])) + more


def load_weights(network, path):
    """Reads the weights at `path` into the network; they must fit it wholly and be finite."""
    set_weights(network, load_checkpoint(path), path)


def set_weights(network, state, path):
    """Puts a state dict of arrays, read from `path`, into the network. Raises UserError if it does not fit wholly."""
    expected = network.state_dict()
    check_names(state, expected, path)
    found = {name: list(getattr(state[name], "shape", [type(state[name]).__name__])) for name in expected}
    if misshapen := [
        f"{name} {found[name]} instead of {list(tensor.shape)}"
        for name, tensor in expected.items()
        if found[name] != list(tensor.shape)
    ]:
        raise UserError(f"{path}: another network's checkpoint: {_some(misshapen)}")
    if broken := [name for name in expected if not np.isfinite(state[name]).all()]:
        raise UserError(f"{path}: not finite (NaN or infinity): {_some(broken)}")
    network.set_state_dict({name: x.astype(np.float32) if x.dtype.kind == "f" else x for name, x in state.items()})


# -------------------------------------------------------------------------------------------------
# Safetensors: numbers and nothing else, the format to publish weights in
#
# Eight bytes with the length of a header, the header (JSON: type, shape and place of each array, and a few strings),
# the arrays. Read here, as the package of that name gives NumPy no bfloat16, and Paddle 2.6 does not bring it along.

DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "I8": "|i1", "U8": "|u1"}


def is_safetensors(file):
    """Whether an open file begins as that format does."""
    start = file.read(9)
    file.seek(0)
    return start[8:] == b"{" and int.from_bytes(start[:8], "little") < 100_000_000


def _read_header(file):
    """Of an open file: {name: what the array is}, and its strings; the file stands at the first array then."""
    header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return header, header.pop("__metadata__", {})


def read_metadata(path):
    """The strings that a safetensors file holds beside its arrays, a dict; of other files {}."""
    return _read(path, lambda file: _read_header(file)[1] if is_safetensors(file) else {})


def _read_safetensors(file):
    """Its arrays: bfloat16 as float32, and for an 8-bit `X` that has an `X.scale` their product."""
    (header, _), data = _read_header(file), file.read()
    if len(data) != max((entry["data_offsets"][1] for entry in header.values()), default=0):
        raise ValueError("cut short, or longer than it says")
    arrays = {}
    for name, entry in header.items():
        array = np.frombuffer(data[slice(*entry["data_offsets"])], DTYPES[entry["dtype"]]).reshape(entry["shape"])
        arrays[name] = widen_bfloat16(array) if entry["dtype"] == "BF16" else array
    for name in [name for name, array in arrays.items() if array.dtype == np.int8 and f"{name}.scale" in arrays]:
        arrays[name] = arrays[name] * arrays.pop(f"{name}.scale")
    return arrays


def save_safetensors(state, path, metadata=None):
    """Writes a flat dict of NumPy arrays, and strings that say something about them."""
    names = {np.dtype(code): name for name, code in DTYPES.items()}
    arrays = dict(sorted(state.items(), key=lambda item: -item[1].itemsize))  # each at a multiple of its numbers' size
    header, end = {"__metadata__": {"format": "pd", **(metadata or {})}}, 0
    for name, array in arrays.items():
        begin, end = end, end + array.nbytes
        header[name] = {"dtype": names[array.dtype], "shape": list(array.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        file.writelines([len(text).to_bytes(8, "little"), text, *(array.tobytes() for array in arrays.values())])


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
