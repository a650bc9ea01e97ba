"""Pickles read as data.

A pickle is a program that names functions and calls them with arguments of its own. The few that `paddle.save`
writes are replaced by the stand-ins below, which check their arguments: NumPy's own would take any size and, by
way of a forged dtype, numbers for pointers.
"""

import math
import pickle
import pickletools
import re

import numpy as np


def read_pickle(file):
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
        return widen_bfloat16(value.array)
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


def widen_bfloat16(array):
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
