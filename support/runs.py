"""Training runs: claim their folders, save and resume their state."""

import re
from pathlib import Path

from support.checkpoints import load_checkpoint, save_checkpoint, set_weights
from support.cli import UserError
from support.files import LOCK, lock_folder, make_folder
from support.processes import all_reduce, is_first, share_statistics

import numpy as np
import paddle

WRITTEN = r"epoch_(latest|best|\d+)_(model\.pdparams|state\.pdopt)"  # names of a run's files in its model folder
LOGGED = r"train\.jsonl|vdlrecords\.\d+\.log"  # and in its log folder
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
    return [lock_folder(folder) for folder in {Path(model_path), Path(log_path)}]


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
