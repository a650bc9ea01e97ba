"""Training runs: claim their folders, save and resume their state.

A run has a random identifier, which its training states and each line of its log contain. A run's first save replaces
the run that was in its folders before; until then, that one stays as it was.
"""

import re
import secrets
import zlib
from contextlib import suppress
from pathlib import Path

from support.checkpoints import load_checkpoint, save_checkpoint, set_weights
from support.cli import UserError
from support.files import lock_folder, make_folder, read_json, write_json
from support.logs import LOG_FILES
from support.processes import all_reduce, is_first, share_statistics

import numpy as np
import paddle

STATES = r"epoch_(latest|\d+)_state\.pdopt"
CHECKPOINTS = rf"{STATES}|epoch_(latest|best|\d+)_model\.pdparams|epoch_best\.json"

# -------------------------------------------------------------------------------------------------
# Folders of a run


def lock_folders(model_path, log_path):
    """Make the folders that a run writes to, and lock them until the returned files are closed or the process ends.

    Raises UserError if they cannot be written to or another process holds them.
    """
    if not is_first():
        return []
    for folder in (model_path, log_path):
        make_folder(folder)
    return [lock_folder(folder) for folder in {Path(model_path), Path(log_path)}]


def _matching(folder, names):
    """Return the files in a folder whose names match a regular expression."""
    return sorted(path for path in Path(folder).iterdir() if re.fullmatch(names, path.name))


def has_state(model_path):
    """Return whether a folder contains a training state to resume."""
    return bool(_matching(model_path, STATES))


def earlier_files(model_path, log_path):
    """Return the files of an earlier run in the folders of checkpoints and logs."""
    return _matching(model_path, CHECKPOINTS) + _matching(log_path, LOG_FILES)


# -------------------------------------------------------------------------------------------------
# State of a run


class Run:
    """The network, optimizer and loss scaler of a training run, and its progress: everything that a checkpoint holds.

    Args:
        model_path (str): Folder of the checkpoints.
        log (Log): Its log, which is written from the first save on.
        network (Layer): The network.
        optimizer (Optimizer): Its optimizer.
        scaler (GradScaler): The loss scaler.
        flags (dict): Numbers, strings and arrays that must be, or usually are, the same when the run is resumed.
        progress (dict): Non-negative numbers, updated by the caller: the number of completed epochs, of steps, and of
            steps until the last validation ("epoch", "step", "validated"), and others.
        entries (tuple[str]): Names of those flags and numbers that are stored with the weights, too, as int64.
        keep (int): Number of numbered checkpoints to keep; 0 keeps all.
    """

    def __init__(self, model_path, log, network, optimizer, scaler, flags, progress, entries, keep):
        self.folder, self.log = Path(model_path), log
        self.network, self.optimizer, self.scaler = network, optimizer, scaler
        self.flags, self.progress, self.entries, self.keep = flags, progress, entries, keep
        self.moments = {}  # of a resumed run, which the optimizer of Paddle 2.6 returns only after its first step
        self.id = secrets.token_hex(8)
        self.saved = False  # whether the folders contain this run

    def save(self, *names):
        """Write `epoch_{name}_model.pdparams` for each name, and next to it the state that is needed to resume.

        The state also contains the weights: if the process is killed between the two files, weights and Adam's
        moments of different steps are never combined. The first save removes an earlier run. Raises UserError if the
        weights are not finite.
        """
        share_statistics(self.network)
        if is_first():
            state = self._state()
            for name in names:
                save_checkpoint(state, self.folder / f"epoch_{name}_state.pdopt")
                self._write_weights(name)
            if not self.saved:
                self._remove_earlier_run(written={*map(str, names)})
            self._prune()
        self.saved = True
        self.log.open(self.id, self.progress)
        all_reduce(np.zeros(1))  # wait: when other processes end, a launcher gives rank 0 only 3 seconds

    def _state(self):
        """Return everything that is needed to resume, with a checksum. Raises UserError if weights are not finite."""
        weights = self.network.state_dict()
        if not all(paddle.isfinite(tensor).all() for tensor in weights.values()):
            raise UserError("the weights are not finite and were not saved: try a lower --lr")
        state = {
            "network": weights,
            "optimizer": {**self.moments, **self.optimizer.state_dict()},
            "scaler": self.scaler.state_dict(),
            "progress": self.progress,
            "flags": self.flags,
        }
        return {**state, "run": self.id, "checksum": _checksum(state)}

    def _write_weights(self, name):
        """Write `epoch_{name}_model.pdparams`: the weights and the entries."""
        known = {**self.flags, **self.progress}
        entries = {entry: np.array(known[entry], np.int64) for entry in self.entries}
        save_checkpoint({**self.network.state_dict(), **entries}, self.folder / f"epoch_{name}_model.pdparams")

    def _remove_earlier_run(self, written):
        """Remove the log of an earlier run and its checkpoints, except for those that have been replaced."""
        earlier = _matching(self.log.folder, LOG_FILES)  # first, because `resume` refuses another run's log
        earlier += [path for path in _matching(self.folder, CHECKPOINTS) if path.name.split("_")[1] not in written]
        for path in earlier:
            path.unlink()

    def save_best(self, name, value, measured_on):
        """Save the weights as `best` if no other weights of this run have a lower value.

        `epoch_best.json` describes them. `measured_on` identifies the data that the value was measured on: values
        of other data do not count.
        """
        if not is_first():
            return
        path = self.folder / "epoch_best.json"
        best = read_json(path) or {}
        comparable = (best.get("run"), best.get("measured_on")) == (self.id, measured_on)
        if comparable and best[name] <= value:
            return
        self._write_weights("best")
        where = {"epoch": self.progress["epoch"], "step": self.progress["step"]}
        write_json({"run": self.id, **where, name: value, "measured_on": measured_on}, path)

    def _prune(self):
        """Remove numbered checkpoints, except for the last ones to keep; never `latest` or `best`."""
        epochs = [int(path.name.split("_")[1]) for path in _matching(self.folder, r"epoch_\d+_model\.pdparams")]
        # Later epochs remain from before a run was resumed at an earlier one.
        done = sorted(epoch for epoch in epochs if epoch < self.progress["epoch"])
        for epoch in done[: -self.keep]:  # none if it is 0
            (self.folder / f"epoch_{epoch}_model.pdparams").unlink(missing_ok=True)
            (self.folder / f"epoch_{epoch}_state.pdopt").unlink(missing_ok=True)

    def resume(self, name, fixed):
        """Restore the state that `save` wrote. Return the flags that have changed since, as {name: message}.

        Raises UserError if the file cannot be read or is not a training state, if the log is another run's, or if one
        of the flags `fixed` has changed.
        """
        path = self.folder / f"epoch_{name}_state.pdopt"
        try:
            state = _read_state(path)
        except UserError as error:
            raise UserError(f"{error}; {self._other_state(path)}") from error
        changes = self._changes(state["flags"])
        if refused := ", ".join(changes[flag] for flag in fixed if flag in changes):
            raise UserError(f"{path}: the objective differs: {refused}; --init_from FILE starts a new run from weights")
        self.progress.update(state["progress"])
        set_weights(self.network, state["network"], path)
        self.optimizer.set_state_dict(state["optimizer"])
        missing = state["optimizer"].keys() - self.optimizer.state_dict().keys()
        self.moments = {name: state["optimizer"][name] for name in missing}
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.id, self.saved = state["run"], True
        self.log.open(self.id, self.progress)
        return changes

    def _changes(self, earlier_flags):
        changes = {}
        for name, now in self.flags.items():
            before = earlier_flags.get(name, now)  # an older version has fewer flags
            if not np.array_equal(before, now):
                changes[name] = f"{name} has changed" if np.ndim(now) else f"{name} {before} is now {now}"
        return changes

    def _other_state(self, damaged):
        """Return advice that names the newest state that can be read, in place of a damaged one."""
        others = [path for path in _matching(self.folder, STATES) if path != damaged]
        for path in sorted(others, key=lambda path: path.stat().st_mtime, reverse=True):
            with suppress(UserError):
                _read_state(path)
                return f"the newest state that can be read: --which_epoch {path.name.split('_')[1]}"
        return "no other state can be read"


def _read_state(path):
    """Return the content of a training state. Raises UserError if it is damaged or the file is something else."""
    state = load_checkpoint(path)
    if "checksum" not in state:
        raise UserError(f"{path}: not a training state")
    if _checksum({name: part for name, part in state.items() if name not in ("run", "checksum")}) != state["checksum"]:
        raise UserError(f"{path}: damaged: its checksum does not match")
    return state


def _checksum(value, start=0):
    """Return the CRC-32 of a nested dict of arrays or tensors, numbers and strings, in 0.3 s per gigabyte."""
    if isinstance(value, dict):
        for key in sorted(value):
            start = _checksum(value[key], zlib.crc32(key.encode(), start))
        return start
    array = np.asarray(value)
    return zlib.crc32(array.tobytes() if array.dtype.kind in "biuf" else repr(value).encode(), start)
