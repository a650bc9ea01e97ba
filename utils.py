"""What two scripts share: the ab bins, the prior and its weights, loss and annealed mean, the AuC,
checkpoints, and small helpers for the command line.

The mathematics is pure functions on Paddle tensors (the AuC: on NumPy arrays).
"""

import hashlib
import json
import os
import pickle
import platform
import shlex
import signal
import sys
from collections import OrderedDict
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from datetime import datetime, timezone
from functools import partial
from pathlib import Path

import numpy as np
import paddle
import paddle.nn.functional as F
import PIL
from tqdm import tqdm

RESOURCES = Path(__file__).resolve().parent / "resources"

EXIT_SKIPPED = 3  # the work was done, but for files that had to be left out


class UserError(SystemExit):
    """Something that the user can mend. Uncaught, it prints its one line and ends with exit code 1."""


def printable(path):
    """A file's name for a message: bytes that are no UTF-8 and line breaks are escaped."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


# -------------------------------------------------------------------------------------------------
# Bins, prior, weights (Section 2.2 of the paper)


def load_ab_bins():
    """The centers of the 313 ab bins, in the published order: float32 [313, 2]."""
    return paddle.to_tensor(np.load(RESOURCES / "pts_in_hull.npy").astype(np.float32))


def load_prior(path=None):
    """The distribution of colors over the bins, float32 [313], sums to 1; by default the shipped one.

    Raises UserError when the file is no array of 313 finite, non-negative numbers with a positive sum.
    """
    path = path or RESOURCES / "prior_probs.npy"
    try:
        prior = np.load(path, allow_pickle=False).astype(np.float64)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{printable(path)}: cannot be read as a prior ({error})") from error
    if prior.shape != (313,):
        raise UserError(f"{printable(path)}: a prior has the shape (313,), this has {prior.shape}")
    if not (np.isfinite(prior).all() and (prior >= 0).all() and prior.sum() > 0):
        raise UserError(f"{printable(path)}: a prior's numbers are finite, non-negative and not all zero")
    return paddle.to_tensor((prior / prior.sum()).astype(np.float32))


def rebalancing_weights(prior, lam=0.5):
    """The weight of each bin in the loss (Eq. 4): w = 1 / ((1 - lam) prior + lam / Q), scaled to sum(prior * w) = 1.

    prior float32 [Q] -> float32 [Q]. `lam` in [0, 1]: 1 weights all bins alike, 0 fully by rarity.
    A bin that never occurs is given the weight of the rarest one that does.
    """
    if not 0 <= lam <= 1:
        raise UserError(f"lambda (--gamma) lies in [0, 1], not at {lam}")
    p = prior.numpy().astype(np.float64)
    mixed = (1 - lam) * p + lam / len(p)
    weights = 1 / np.maximum(mixed, mixed[mixed > 0].min())
    return paddle.to_tensor((weights / (p * weights).sum()).astype(np.float32))


GRAY_AB = 5  # an image whose ab all stay within this teaches no color


def is_gray(ab):
    """Which images have no ab over 5 in absolute value: [N, 2, h, w] -> bool [N]."""
    return ab.abs().max(axis=[1, 2, 3]) <= GRAY_AB


# -------------------------------------------------------------------------------------------------
# Loss and point estimate


def soft_cross_entropy(logits, indices, weights):
    """Cross-entropy with a soft target that is given by its few non-zero entries (Eq. 2, without v).

    logits [N, Q, h, w]; indices int64 and weights float32 [N, K, h, w] as `soft_encode` returns them
    (weights sum to 1) -> float32 [N, h, w], nats per position.

    A dense target is never built. As the weights sum to 1, -sum_k w_k log p_k is the cross-entropy
    of the first neighbor alone, for which Paddle has a fast, stable kernel, corrected by a
    difference of logits.
    """
    first = F.cross_entropy(logits, indices[:, :1], axis=1, reduction="none").squeeze(1)
    chosen = paddle.take_along_axis(logits, indices, axis=1)  #                        [N, K, h, w]
    return first + chosen[:, 0] - (weights * chosen).sum(axis=1)


def entropy(weights):
    """Of soft targets [N, K, h, w] -> [N, h, w], in nats: what the cross-entropy cannot fall below."""
    return -(weights * paddle.log(weights.clip(min=1e-30))).sum(axis=1)


def annealed_mean(logits, ab_bins, temperature=0.38):
    """The expected ab under softmax(logits / temperature) (Eq. 5).

    logits [N, Q, h, w], ab_bins [Q, 2] -> ab [N, 2, h, w]. The temperature is > 0: 1 is the mean
    (dull), toward 0 the mode (vivid, but patchy).
    """
    scaled = (logits.astype("float32") / temperature).flatten(2)  #                      [N, Q, hw]
    likelihood = paddle.exp(scaled - scaled.max(axis=1, keepdim=True))
    # One product gives sum(p a), sum(p b) and sum(p); a softmax along axis 1 is slow on the CPU.
    columns = paddle.concat([ab_bins, paddle.ones_like(ab_bins[:, :1])], axis=1)  #          [Q, 3]
    sums = paddle.matmul(columns, likelihood, transpose_x=True)  #                       [N, 3, hw]
    return (sums[:, :2] / sums[:, 2:]).reshape([logits.shape[0], 2, *logits.shape[2:]])


# -------------------------------------------------------------------------------------------------
# Area under the curve of color errors (Section 3.1)

MAX_THRESHOLD = 150


def first_threshold(distance):
    """The smallest whole t that each distance (NumPy, any shape) lies within, int64; 151 beyond 150."""
    return np.ceil(distance).clip(max=MAX_THRESHOLD + 1).astype(np.int64)


def error_histogram(predicted_ab, true_ab, weights=None):
    """How many pixels (or how much weight) first lie within the threshold t, for t = 0 … 150.

    predicted_ab, true_ab [2, …] NumPy arrays, weights [...] or None -> float64 [152]; the last entry
    is what lies farther off than 150. Histograms of several images add up.
    """
    distance = np.hypot(*(np.asarray(predicted_ab) - np.asarray(true_ab)).reshape(2, -1))
    weights = None if weights is None else np.asarray(weights).ravel()
    return np.bincount(first_threshold(distance), weights, MAX_THRESHOLD + 2).astype(np.float64)


def auc(histogram):
    """Area under "share of pixels within t" over t = 0 … 150, by trapezoids, divided by 150: in [0, 1]."""
    shares = np.cumsum(histogram)[: MAX_THRESHOLD + 1] / np.sum(histogram)
    return float((shares[:-1] + shares[1:]).mean() / 2)


# -------------------------------------------------------------------------------------------------
# Files that appear whole or not at all; checkpoints


@contextmanager
def atomic_path(path):
    """A temporary path beside `path`; what was written there takes its place when the block ends without an error.

    Raises UserError when the folder cannot be written to or the disk is full.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())  # else a power cut could leave the new name with nothing behind it
        os.replace(temporary, path)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise UserError(f"{printable(path)}: cannot be written: {reason}") from error
    finally:
        if temporary.exists():
            temporary.unlink()


def make_folder(path):
    """Makes the folder that results go to, before the work for them is done. Raises UserError when it cannot be."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        writable = os.access(path, os.W_OK)
        reason = "permission denied"
    except OSError as error:
        writable, reason = False, error.strerror.lower()
    if not writable:
        raise UserError(f"{printable(path)}: cannot be written to: {reason}")


@contextmanager
def atomic_text(path):
    """A text file to write, by way of `atomic_path`. A name in it that is no UTF-8 comes out byte for byte."""
    encoding = {"encoding": "utf-8", "errors": "surrogateescape", "newline": ""}
    with atomic_path(path) as temporary, open(temporary, "w", **encoding) as file:
        yield file


def write_json(data, path):
    with atomic_text(path) as file:
        json.dump(data, file, indent=2)
        file.write("\n")


COLORING = "coloring.json"  # beside colored images: what they were made with


def read_coloring(results_dir):
    """What a folder's colored images were made with, as its coloring.json tells; None where there is no such file."""
    try:
        return json.loads((Path(results_dir) / COLORING).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def sha256(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def provenance():
    """How a result came about: the command, when, and the versions behind it."""
    return {
        "command": printable(shlex.join(sys.argv)),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {
            "python": platform.python_version(),
            "paddle": paddle.__version__,
            "numpy": np.__version__,
            "pillow": PIL.__version__,
        },
    }


def save_checkpoint(state, path):
    """Writes a state dict (or nested dicts of tensors, numbers and strings) as `paddle.load` reads it."""
    with atomic_path(path) as temporary:
        paddle.save(state, str(temporary))


class _ArrayUnpickler(pickle.Unpickler):
    """Opens what `paddle.save` writes and nothing that could run code: arrays, numbers, strings, containers."""

    ALLOWED = {
        ("collections", "OrderedDict"): OrderedDict,
        ("builtins", "tuple"): tuple,
        ("__builtin__", "tuple"): tuple,
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
    }

    def find_class(self, module, name):
        if (module, name) in self.ALLOWED:
            return self.ALLOWED[module, name]
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name in ("_reconstruct", "scalar"):
            return super().find_class(module, name)
        if module in ("numpy.core.numeric", "numpy._core.numeric") and name == "_frombuffer":
            return super().find_class(module, name)
        if (module, name) == ("_codecs", "encode"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it holds {module}.{name}, which no checkpoint needs")


def load_checkpoint(path):
    """The dict that `save_checkpoint` or `paddle.save` wrote, with NumPy arrays for the tensors.

    Nothing in the file is executed. Raises UserError, naming the file, when it is missing, damaged
    or holds anything but arrays, numbers, strings and containers of them.
    """
    try:
        with open(path, "rb") as file:
            state = _ArrayUnpickler(file).load()
    except FileNotFoundError:
        raise UserError(f"{printable(path)}: no such checkpoint") from None
    except Exception as error:
        raise UserError(f"{printable(path)}: not a readable checkpoint: {error or type(error).__name__}") from error
    if not isinstance(state, dict):
        raise UserError(f"{printable(path)}: holds a {type(state).__name__}, not the state of a network")
    state.pop("StructuredToParameterName@@", None)  # Paddle's own note of parameter names
    return state


def load_weights(network, path):
    """Reads the weights at `path` into the network; they must fit it wholly and be finite."""
    set_weights(network, load_checkpoint(path), path)


def set_weights(network, state, path):
    """Puts a state dict of arrays, read from `path`, into the network. Raises UserError if it does not fit wholly."""
    expected = network.state_dict()

    def complain(what, names):
        raise UserError(
            f"{printable(path)}: {what}: {', '.join(names[:3])}"
            + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        )

    if missing := [name for name in expected if name not in state]:
        complain("another network's checkpoint, it lacks", missing)
    if unexpected := [str(name) for name in state if name not in expected]:
        complain("another network's checkpoint, it also has", unexpected)
    if misshapen := [
        f"{name} {list(np.shape(state[name]))} instead of {expected[name].shape}"
        for name in expected
        if list(np.shape(state[name])) != list(expected[name].shape)
    ]:
        complain("another network's checkpoint", misshapen)
    if broken := [name for name in expected if not np.isfinite(state[name]).all()]:
        complain("not finite (NaN or infinity)", broken)
    network.set_state_dict(state)


# -------------------------------------------------------------------------------------------------
# Command line and machine


def parse_bool(text):
    if text.lower() in ("true", "yes", "1"):
        return True
    if text.lower() in ("false", "no", "0"):
        return False
    raise ValueError(text)


def add_bool_flag(parser, name, default, help):
    """`--name`, `--name True`, `--name false` and `--no-name`, with or without capitals."""
    destination = name.lstrip("-")
    help = f"{help} (default: {default})"
    parser.add_argument(name, type=parse_bool, nargs="?", const=True, default=default, metavar="BOOL", help=help)
    parser.add_argument(
        f"--no-{destination}", dest=destination, action="store_const", const=False, help=f"{name} False"
    )


def check_at_least(args, **least):
    """Raises UserError for a flag that is given and smaller than it may be."""
    for name, value in least.items():
        if getattr(args, name) is not None and getattr(args, name) < value:
            raise UserError(f"--{name} {getattr(args, name)}: must be at least {value}")


def use_all_cores(threads=None):
    """Lets Paddle's CPU operators use the machine's cores; call it before the first operator.

    Paddle starts with one thread unless OMP_NUM_THREADS is set, and the MKL that it bundles takes its slow,
    generic path on AMD processors unless told that AVX2 is there. Both are left alone where the user set them.
    """
    if _has_avx2():
        os.environ.setdefault("MKL_DEBUG_CPU_TYPE", "5")
    threads = threads or available_cores()
    paddle.base.core.set_num_threads(threads)
    return threads


def available_cores():
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _has_avx2():
    try:
        return " avx2 " in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def parallel_map(function, items, num_workers, title, setup=None):
    """Yields function(item) of each item, in order, from worker processes (0: from this one), behind a progress bar.

    `setup`: a function and its arguments, called once in each process. The place for what is too large to be sent
    with every item; where processes are forked (Linux) it is not even copied.
    """
    bar = partial(tqdm, desc=title, total=len(items), unit="image", disable=None)
    num_workers = min(num_workers, len(items))
    if num_workers == 0:
        if setup:
            setup[0](*setup[1:])
        yield from bar(map(function, items))
        return
    # Not multiprocessing.Pool: that one waits forever for a worker that was killed.
    with ProcessPoolExecutor(num_workers, initializer=_start_worker, initargs=(setup,)) as pool:
        try:
            yield from bar(pool.map(function, items, chunksize=8))
        except BrokenProcessPool as error:
            raise UserError(
                "a worker process was killed, perhaps for lack of memory: try fewer --num_workers"
            ) from error


def _start_worker(setup):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process, one traceback is enough
    if setup:
        setup[0](*setup[1:])


def note_some(problem, names, limit=10):
    """A line for each of the first names, one for the others."""
    for name in names[:limit]:
        note(f"{printable(name)}: {problem}")
    if len(names) > limit:
        note(f"… and {len(names) - limit} more: {problem}")


def note(message):
    """One line for the user, on standard error, above any progress bar."""
    tqdm.write(message, file=sys.stderr)
