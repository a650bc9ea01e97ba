"""What two scripts share: the ab bins, the prior and its weights, loss and annealed mean, the AuC,
checkpoints, and small helpers for the command line.

The mathematics is pure functions on Paddle tensors (the AuC: on NumPy arrays).
"""

import argparse
import ctypes
import hashlib
import json
import math
import os
import pickle
import pickletools
import platform
import re
import shlex
import signal
import sys
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from functools import partial
from pathlib import Path

import numpy as np
import paddle
import PIL
from tqdm import tqdm

from model import CIC, EXTRA_RELU

RESOURCES = Path(__file__).resolve().parent / "resources"

EXIT_SKIPPED = 3  # the work was done, but for files that had to be left out


class UserError(SystemExit):
    """Something that the user can mend. Uncaught, it prints its one line and ends with exit code 1."""


def printable(path):
    """A file's name for a message: bytes that are no UTF-8 and line breaks are escaped."""
    return one_line(os.fsencode(path).decode("utf-8", "backslashreplace"))


def one_line(text):
    """Text from a file for a message: what would not print, or break the line, is escaped."""
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
    (weights sum to 1, the indices of a position differ) -> float32 [N, h, w], nats per position.
    Gradients reach the logits only.
    """
    return _SoftCrossEntropy.apply(logits, indices, weights)


class _SoftCrossEntropy(paddle.autograd.PyLayer):
    """-sum_k w_k log p_k = log(sum_q exp x_q) - sum_k w_k x_k, whose gradient is softmax minus target.

    By hand, because nothing of the logits' size is then kept but the logits; and Paddle's own log_softmax along
    axis 1 is some thirty times slower on the CPU, its cross_entropy cut off at 64 nats there.
    """

    @staticmethod
    def forward(ctx, logits, indices, weights):
        peak = logits.max(axis=1, keepdim=True)
        log_sum = (logits - peak).exp_().sum(axis=1, keepdim=True).log() + peak  #          [N, 1, h, w]
        ctx.save_for_backward(logits, indices, weights, log_sum)
        chosen = paddle.take_along_axis(logits, indices, axis=1)  #                         [N, K, h, w]
        return log_sum.squeeze(1) - (weights * chosen).sum(axis=1)

    @staticmethod
    def backward(ctx, gradient):
        logits, indices, weights, log_sum = ctx.saved_tensor()
        result = (logits - log_sum).exp_()  #                                               [N, Q, h, w]
        result = paddle.put_along_axis(result, indices, -weights, axis=1, reduce="add")
        return result.multiply_(gradient.unsqueeze(1))


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
    # A softmax along axis 1 is slow on the CPU; the division by the sum can follow the expectation.
    ab = paddle.matmul(ab_bins, likelihood, transpose_x=True) / likelihood.sum(axis=1, keepdim=True)  # [N, 2, hw]
    return ab.reshape([logits.shape[0], 2, *logits.shape[2:]])


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
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # see `remove_temporaries`
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
        with suppress(OSError):
            temporary.unlink()


def remove_temporaries(folder):
    """Removes what processes that were killed while they wrote left in `folder`."""
    for path in Path(folder).glob(".*.tmp"):
        if (match := re.fullmatch(r"\..+\.(\d+)\.tmp", path.name)) and not _runs(int(match[1])):
            with suppress(OSError):
                path.unlink()


def _runs(process):
    try:
        os.kill(process, 0)  # sends nothing
    except PermissionError:
        return True
    except (ProcessLookupError, OverflowError):
        return False
    return True


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


def load_checkpoint(path):
    """The dict that `save_checkpoint` or `paddle.save` (2.0 to 3.x) wrote, or a safetensors file.

    NumPy arrays take the place of the tensors. Nothing in the file is executed: `paddle.load` would unpickle it,
    and a pickle can run code. Raises UserError, naming the file, when it is missing, damaged or holds anything
    but arrays, numbers, strings and containers of them.
    """
    try:
        with open(path, "rb") as file:
            state = _read_safetensors(path) if is_safetensors(file) else _read_pickle(file)
    except FileNotFoundError:
        raise UserError(f"{printable(path)}: no such checkpoint") from None
    except OSError as error:
        raise UserError(f"{printable(path)}: cannot be read: {(error.strerror or str(error)).lower()}") from error
    except Exception as error:  # bad bytes make the readers raise whatever they like: KeyError, struct.error, …
        reason = one_line(str(error) or type(error).__name__)
        raise UserError(f"{printable(path)}: not a readable checkpoint: {reason}") from error
    if not isinstance(state, dict):
        raise UserError(f"{printable(path)}: holds a {type(state).__name__}, not the state of a network")
    state.pop("StructuredToParameterName@@", None)  # Paddle's own note of parameter names
    return state


def check_names(state, expected, path):
    """Raises UserError, naming them, when the state lacks names that are expected or has others."""
    if missing := [name for name in expected if name not in state]:
        raise UserError(f"{printable(path)}: another network's checkpoint, it lacks {_some(missing)}")
    if unexpected := [str(name) for name in state if name not in expected]:
        raise UserError(f"{printable(path)}: another network's checkpoint, it also has {_some(unexpected)}")


def _some(names):
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return one_line(", ".join(names[:3])) + more


def load_network(path):
    """The network that the weights at `path` are for (the paper's, or the earlier port's variant), with them in it."""
    state = load_checkpoint(path)
    network = CIC(extra_relu=EXTRA_RELU in state)
    set_weights(network, state, path)
    return network


def load_weights(network, path):
    """Reads the weights at `path` into the network; they must fit it wholly and be finite."""
    set_weights(network, load_checkpoint(path), path)


def set_weights(network, state, path):
    """Puts a state dict of arrays, read from `path`, into the network. Raises UserError if it does not fit wholly."""
    expected = network.state_dict()
    if (EXTRA_RELU in state) != (EXTRA_RELU in expected):
        theirs, ours = ("with", "without") if EXTRA_RELU in state else ("without", "with")
        raise UserError(
            f"{printable(path)}: weights for the network {theirs} the earlier port's extra ReLU ({EXTRA_RELU}); "
            f"in this one, {ours} it, they would give other colors"
        )
    check_names(state, expected, path)
    found = {name: list(getattr(state[name], "shape", [type(state[name]).__name__])) for name in expected}
    if misshapen := [
        f"{name} {found[name]} instead of {list(tensor.shape)}"
        for name, tensor in expected.items()
        if found[name] != list(tensor.shape)
    ]:
        raise UserError(f"{printable(path)}: another network's checkpoint: {_some(misshapen)}")
    if broken := [name for name in expected if not np.isfinite(state[name]).all()]:
        raise UserError(f"{printable(path)}: not finite (NaN or infinity): {_some(broken)}")
    network.set_state_dict({name: x.astype(np.float32) if x.dtype.kind == "f" else x for name, x in state.items()})


# -------------------------------------------------------------------------------------------------
# Pickles and safetensors, read as data
#
# A pickle is a program that names functions and calls them with arguments of its own. The few that `paddle.save`
# writes are replaced by the stand-ins below, which check their arguments: NumPy's own would take any size and, by
# way of a forged dtype, numbers for pointers.


def _read_pickle(file):
    _check_memo(file)
    # Python 2 wrote the bytes of an array as a string, to be read as latin1.
    state = _to_plain(_ArrayUnpickler(file, encoding="latin1").load(), {})
    if isinstance(state, dict) and (parts := state.pop("UnpackBigParamInfor@@", None)):
        for name, part in parts.items():  # below protocol 4, Paddle splits arrays of over 1 GB
            joined = np.concatenate([state.pop(key) for key in part["slices"]])
            state[name] = joined.reshape(part["OriginShape"])
    return state


def _check_memo(file):
    """Refuses a pickle that asks for memory: the memo's indices count up, but a single one may claim gigabytes."""
    for count, (opcode, argument, _) in enumerate(pickletools.genops(file)):
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and argument > count:
            raise pickle.UnpicklingError("its memo has gaps")
    file.seek(0)


def _to_plain(value, done):
    """The unpickled value with NumPy arrays for their stand-ins; `done`: containers met before, by identity."""
    if isinstance(value, _PickledArray):
        return _widen(value.array)
    if value is None or isinstance(value, (bool, int, float, str, np.generic)):
        return value
    if id(value) not in done:
        if isinstance(value, dict):
            plain = {_to_plain(key, done): _to_plain(item, done) for key, item in value.items()}
        elif isinstance(value, (list, tuple)):
            plain = type(value)(_to_plain(item, done) for item in value)
        else:
            raise pickle.UnpicklingError(f"it holds a {type(value).__name__}, which no checkpoint needs")
        done[id(value)] = plain
    return done[id(value)]


def _widen(array):
    """bfloat16, which NumPy lacks and Paddle hands on as uint16, as float32; other arrays as they are."""
    return (array.astype(np.uint32) << 16).view(np.float32) if array.dtype == np.uint16 else array


class _ArrayUnpickler(pickle.Unpickler):
    """Opens what `paddle.save` writes and nothing that could run code."""

    def find_class(self, module, name):
        module = module.replace("__builtin__", "builtins").replace("numpy._core", "numpy.core")
        if (module, name) not in STAND_INS:
            raise pickle.UnpicklingError(f"it holds {module}.{name}, which no checkpoint needs")
        stand_in = STAND_INS[module, name]
        return lambda *arguments: stand_in(*arguments)  # a fresh one, as a pickle may also set attributes


class _PickledDtype:
    """The type of an array's numbers: f4, i8, …"""

    __slots__ = ("dtype",)

    def __init__(self, code, *_):
        if not re.fullmatch("b1|[iu][1248]|f[248]", code):
            raise pickle.UnpicklingError(f"it holds an array of {code!r}, not of numbers")
        self.dtype = np.dtype(code)

    def __setstate__(self, state):
        if state[1] == ">":
            self.dtype = self.dtype.newbyteorder(">")

    def array(self, shape, data, order="C"):
        data = data.encode("latin1") if isinstance(data, str) else data
        if math.prod(shape) * self.dtype.itemsize != len(data) or min(shape, default=0) < 0:
            raise pickle.UnpicklingError(f"it holds {len(data)} bytes for an array of shape {shape}")
        return np.ndarray(shape, self.dtype, data, order=order).astype(self.dtype.newbyteorder("="))


class _PickledArray:
    """An array that is on its way: first made empty, then given shape, type and bytes."""

    __slots__ = ("array",)

    def __init__(self, *_):
        self.array = np.empty(0, np.float32)

    def __setstate__(self, state):
        _, shape, dtype, in_fortran_order, data = state
        self.array = dtype.array(shape, data, "F" if in_fortran_order else "C")


def _named_tensor(pair):
    """Paddle 2.1 and later write a tensor among other things as tuple((name, array))."""
    return pair[1] if len(pair) == 2 and isinstance(pair[1], _PickledArray) else tuple(pair)


def _lone_tensor(*arguments):
    """Paddle writes a DenseTensor as eval("data", {"data": array})."""
    if arguments[:1] != ("data",) or not isinstance(arguments[1]["data"], _PickledArray):
        raise pickle.UnpicklingError("it holds builtins.eval, which no checkpoint needs")
    return arguments[1]["data"]


def _encode(text, encoding):
    """Protocol 2 has no bytes and writes them as a string to be encoded."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it holds text in {encoding}")
    return text.encode("latin1")


STAND_INS = {
    ("collections", "OrderedDict"): dict,
    ("builtins", "tuple"): _named_tensor,
    ("builtins", "eval"): _lone_tensor,
    ("builtins", "bytes"): lambda: b"",
    ("_codecs", "encode"): _encode,
    ("numpy", "ndarray"): None,  # only ever named as the kind of array that _reconstruct shall make
    ("numpy", "dtype"): _PickledDtype,
    ("numpy.core.multiarray", "_reconstruct"): _PickledArray,
    ("numpy.core.multiarray", "scalar"): lambda dtype, data: dtype.array((), data)[()],
}


def is_safetensors(file):
    """Whether an open file begins as that format does: the header's length in 8 bytes, then JSON."""
    start = file.read(9)
    file.seek(0)
    return start[8:] == b"{" and int.from_bytes(start[:8], "little") < 100_000_000


def _read_safetensors(path):
    safetensors = import_safetensors(path)
    return {name: _widen(array) for name, array in safetensors.load_file(path).items()}


def save_safetensors(state, path):
    """Writes a flat dict of NumPy arrays in the format to publish weights in: it holds numbers and nothing else."""
    safetensors = import_safetensors(path)
    with atomic_path(path) as temporary:
        temporary.write_bytes(safetensors.save(state, metadata={"format": "pd"}))


def import_safetensors(path):
    try:
        import safetensors.numpy
    except ImportError:
        raise UserError(
            f"{printable(path)}: this format needs the package safetensors (pip install safetensors)"
        ) from None
    return safetensors.numpy


# -------------------------------------------------------------------------------------------------
# Command line and machine


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds to each flag's help its default, where there is one."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


def parse_bool(text):
    if text.lower() in ("true", "yes", "1"):
        return True
    if text.lower() in ("false", "no", "0"):
        return False
    raise ValueError(text)


def add_bool_flag(parser, name, default, help):
    """`--name`, `--name True`, `--name false` and `--no-name`, with or without capitals."""
    destination = name.lstrip("-")
    parser.add_argument(name, type=parse_bool, nargs="?", const=True, default=default, metavar="BOOL", help=help)
    negation = {"dest": destination, "action": "store_const", "const": False, "default": argparse.SUPPRESS}
    parser.add_argument(f"--no-{destination}", **negation, help=f"{name} False")


def check_at_least(args, **least):
    """Raises UserError for a flag that is given and smaller than it may be."""
    for name, value in least.items():
        if getattr(args, name) is not None and getattr(args, name) < value:
            raise UserError(f"--{name} {getattr(args, name)}: must be at least {value}")


def check_crop(args, multiple=1):
    """Raises UserError for a --crop_size, if given, that is no multiple of `multiple` or exceeds --load_size."""
    if args.crop_size and args.crop_size % multiple:
        raise UserError(f"--crop_size {args.crop_size}: must be a multiple of {multiple}")
    if args.crop_size and args.load_size and args.crop_size > args.load_size:
        raise UserError(f"--crop_size {args.crop_size}: larger than --load_size {args.load_size}")


def use_all_cores(threads=None):
    """Lets Paddle's CPU operators use the machine's cores; call it before the first operator. Returns their number.

    Paddle starts with one thread unless OMP_NUM_THREADS is set, and the MKL that it bundles takes its slow, generic
    path on AMD processors unless it is told what they can do. What the user has set is left alone.
    """
    if kind := _mkl_kind():
        os.environ.setdefault("MKL_DEBUG_CPU_TYPE", kind)
    threads = threads or available_cores()
    paddle.base.core.set_num_threads(threads)
    return threads


M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8  # of glibc's malloc.h


def keep_freed_memory():
    """Makes malloc keep what is freed, for a program that asks for the same tensors again and again; call it early.

    glibc would give every large block back and be given it anew, page by page: up to a third of a small training step.
    """
    if hasattr(libc := ctypes.CDLL(None), "mallopt"):
        for parameter, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1), (M_ARENA_MAX, 1)):
            libc.mallopt(parameter, value)


def available_cores():
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _mkl_kind():
    """What MKL calls the instructions of this AMD processor: "7" for AVX-512, "5" for AVX2; None elsewhere."""
    try:
        processor = Path("/proc/cpuinfo").read_text()
    except OSError:
        return None
    if "AuthenticAMD" not in processor:
        return None
    return "7" if " avx512f " in processor else "5" if " avx2 " in processor else None


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
