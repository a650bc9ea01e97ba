"""Pickles read as data.

A pickle is a program that names functions and calls them with arguments of its choice. The few functions that
`paddle.save` and `torch.save` need are replaced by the stand-ins below, which only note what they are given. Arrays
are made at the end, by which time it is known that together they are not much larger than the file.
"""

import math
import os
import pickle
import re
from functools import partial
from types import SimpleNamespace

import numpy as np


def read_pickle(file):
    """Return the content of an open file of `paddle.save`: containers of numbers, strings and NumPy arrays."""
    reader = DataUnpickler(file, os.fstat(file.fileno()).st_size)
    state = reader.to_plain(reader.load())
    if isinstance(state, dict) and (parts := state.pop("UnpackBigParamInfor@@", None)):
        for name, part in parts.items():  # below protocol 4, Paddle splits arrays larger than 1 GB
            slices = [state.pop(f"{name}@@.{i}") for i in range(len(part["slices"]))]
            state[name] = np.concatenate(slices).reshape(part["OriginShape"])
    return state


def widen_bfloat16(array):
    """Return bfloat16, which NumPy lacks and others hand over as uint16, as float32; other arrays unchanged."""
    return (array.astype(np.uint32) << 16).view(np.float32) if array.dtype == np.uint16 else array


class DataUnpickler(pickle._Unpickler):
    """An unpickler that calls only the stand-ins.

    Its base is the version written in Python: there, opcodes can be replaced, and the memo is a dict. (The version in
    C allocates an array as long as the largest index in the file.)

    Attributes:
        storages: PyTorch's storages by key, whose `data` must be set between `load` and `to_plain`.
    """

    dispatch = dict(pickle._Unpickler.dispatch)

    def __init__(self, file, size):
        super().__init__(file, encoding="latin1")  # Python 2 wrote the bytes of an array as a string
        self.bytes_left = 4 * size  # for all arrays: a few may share their numbers, a thousand are an attack
        self.storages = {}

    def find_class(self, module, name):
        module = module.replace("__builtin__", "builtins").replace("numpy._core", "numpy.core")
        if (module, name) not in STAND_INS:
            raise pickle.UnpicklingError(f"it holds {module}.{name}, which no checkpoint needs")
        return STAND_INS[module, name]

    def persistent_load(self, reference):
        _, storage, key, _, count, *view = reference
        if any(view):
            raise pickle.UnpicklingError("it holds a view of a storage, which PyTorch no longer writes")
        return self.storages.setdefault(key, storage(count))

    def load_build(self):
        state = self.stack.pop()
        if not isinstance(self.stack[-1], dict):  # PyTorch adds the versions of its layers to a dict
            self.stack[-1].__setstate__(state)

    dispatch[pickle.BUILD[0]] = load_build

    def to_plain(self, value):
        """Return an unpickled value with NumPy arrays in place of the stand-ins."""
        if isinstance(value, _Array):
            self.bytes_left -= math.prod(value.shape) * value.storage.dtype.itemsize
            if self.bytes_left < 0:
                raise pickle.UnpicklingError("its arrays are many times as large as the file")
            return widen_bfloat16(value.to_numpy())
        if isinstance(value, dict):
            return {key: self.to_plain(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(map(self.to_plain, value))
        if value is None or isinstance(value, (bool, int, float, str, np.generic)):
            return value
        raise pickle.UnpicklingError(f"it holds a {type(value).__name__}, which no checkpoint needs")


def _unshared(load):
    """Make an opcode refuse to repeat a container: 60 lists that each hold the next one twice stand for 2^60."""

    def load_unshared(self):
        load(self)
        if isinstance(self.stack[-1], (dict, list, tuple)):
            raise pickle.UnpicklingError("it holds the same list, tuple or dict twice")

    return load_unshared


for _opcode in (pickle.GET, pickle.BINGET, pickle.LONG_BINGET, pickle.DUP):
    DataUnpickler.dispatch[_opcode[0]] = _unshared(DataUnpickler.dispatch[_opcode[0]])

# -------------------------------------------------------------------------------------------------
# Stand-ins


class _Dtype:
    """The type of an array's numbers: f4, i8, …"""

    def __init__(self, code, *_):
        if not re.fullmatch("b1|[iu][1248]|f[248]", code):
            raise pickle.UnpicklingError(f"it holds an array of {code!r}, not of numbers")
        self.dtype = np.dtype(code)

    def __setstate__(self, state):
        if state[1] == ">":
            self.dtype = self.dtype.newbyteorder(">")


def _storage(code, count, data=None):
    """Return what PyTorch's tensors, and here all arrays, are views of: `count` numbers."""
    return SimpleNamespace(dtype=np.dtype(code), count=count, data=data)


class _Array:
    """An array that is not made yet: PyTorch's, or NumPy's, which is created empty and set afterwards."""

    def __init__(self, storage, shape, **layout):
        self.storage, self.shape, self.layout = storage, shape, layout

    def __setstate__(self, state):
        _, self.shape, dtype, in_fortran_order, data = state
        self.storage = _storage(dtype.dtype, math.prod(self.shape), data)
        self.layout = {"order": "F" if in_fortran_order else "C"}

    def to_numpy(self):
        dtype, count, data = self.storage.dtype, self.storage.count, self.storage.data
        if len(data) != count * dtype.itemsize:
            raise pickle.UnpicklingError(f"it holds {len(data)} bytes for an array of {count} numbers")
        array = np.ndarray(self.shape, dtype, _to_bytes(data), **self.layout)
        return array.astype(dtype.newbyteorder("="), copy=False)


def _to_bytes(data):
    return data.encode("latin1") if isinstance(data, str) else data


def _tensor(storage, offset, shape, strides, *_):
    end = offset + 1 + sum((size - 1) * stride for size, stride in zip(shape, strides))
    if min((offset, *shape, *strides)) < 0 or (end > storage.count and math.prod(shape)):
        raise pickle.UnpicklingError("it holds a tensor that is not within its storage")
    size = storage.dtype.itemsize
    return _Array(storage, shape, offset=offset * size, strides=[stride * size for stride in strides])


def _lone_tensor(text, scope=None):
    """Return the array of a DenseTensor, which Paddle writes as eval("data", {"data": array})."""
    if text != "data":
        raise pickle.UnpicklingError("it holds builtins.eval, which no checkpoint needs")
    return scope["data"]


STORAGES = {"Float": "f4", "Double": "f8", "Half": "f2", "BFloat16": "u2", "Long": "i8", "Int": "i4", "Short": "i2"}
STORAGES |= {"Char": "i1", "Byte": "u1", "Bool": "b1"}

STAND_INS = {
    ("collections", "OrderedDict"): dict,
    ("builtins", "tuple"): lambda pair: pair[1],  # Paddle 2.1 and later may write a tensor as tuple((name, array))
    ("builtins", "eval"): _lone_tensor,
    ("builtins", "bytes"): lambda: b"",
    ("_codecs", "encode"): lambda text, _: text,  # protocol 2 has no bytes and writes them as text to be encoded
    ("numpy", "ndarray"): None,  # only named, as the kind of array that _reconstruct makes
    ("numpy", "dtype"): _Dtype,
    ("numpy.core.multiarray", "_reconstruct"): lambda *_: _Array(_storage("f4", 0, b""), (0,)),
    ("numpy.core.multiarray", "scalar"): lambda dtype, data: np.frombuffer(_to_bytes(data), dtype.dtype)[0],
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
    **{("torch", f"{name}Storage"): partial(_storage, code) for name, code in STORAGES.items()},
}
