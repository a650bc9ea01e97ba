"""Pickles read as data.

A pickle is a program that names functions and calls them with arguments of its choice. The few functions that
`paddle.save` and `torch.save` need are replaced by the stand-ins below, which only note what they are given. Arrays
are made at the end, by which time it is known that together they are not much larger than the file.
"""

import math
import os
import pickle
from types import SimpleNamespace

import numpy as np


def read_pickle(file):
    """Return the content of an open file of `paddle.save`: containers of numbers, strings and NumPy arrays."""
    reader = DataUnpickler(file, os.fstat(file.fileno()).st_size)
    return reader.to_plain(reader.load())


def widen_bfloat16(array):
    """Return bfloat16, which NumPy lacks and others hand over as uint16, as float32; other arrays unchanged."""
    return (array.astype(np.uint32) << 16).view(np.float32) if array.dtype == np.uint16 else array


PLAIN = (type(None), bool, int, float, str, np.generic)  # types that `to_plain` returns unchanged


class DataUnpickler(pickle._Unpickler):
    """An unpickler that calls only the stand-ins.

    Its base is the version written in Python: there, opcodes and the memo can be replaced. (The memo of the version in
    C is an array as long as the largest index in the file.)

    Attributes:
        storages: PyTorch's storages by key, whose `data` must be set between `load` and `to_plain`.
    """

    dispatch = dict(pickle._Unpickler.dispatch)
    del dispatch[pickle.DUP[0]]  # never written; repeats a container, as the memo could

    def __init__(self, file, size):
        super().__init__(file, encoding="latin1")  # Python 2 wrote the bytes of an array as a string
        self.memo = _Memo()
        self.bytes_left = 4 * size  # for all arrays: a few may share their numbers, a thousand are an attack
        self.storages = {}

    def find_class(self, module, name):
        name = f"{module}.{name}".replace("__builtin__", "builtins").replace("numpy._core", "numpy.core")
        if name not in STAND_INS:
            raise pickle.UnpicklingError(f"it holds {name}, which no checkpoint needs")
        return STAND_INS[name]

    def persistent_load(self, reference):
        _, code, key, _, count = reference[:5]
        return self.storages.setdefault(key, _storage(_Dtype(code), count))

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
        if not isinstance(value, PLAIN):
            raise pickle.UnpicklingError(f"it holds a {type(value).__name__}, which no checkpoint needs")
        return value


class _Memo(dict):
    """A memo that repeats no containers: 60 lists, each of which holds the next one twice, would stand for 2^60."""

    def __getitem__(self, index):
        if isinstance(value := super().__getitem__(index), (dict, list, tuple)):
            raise pickle.UnpicklingError("it holds the same list, tuple or dict twice")
        return value


# -------------------------------------------------------------------------------------------------
# Stand-ins


class _Dtype:
    """The type of an array's numbers, e.g. f4 or i8. Raises UnpicklingError for other types."""

    def __init__(self, code, *_):
        if code not in STORAGES.values():
            raise pickle.UnpicklingError(f"it holds an array of {code!r}, not of numbers")
        self.dtype = np.dtype(code)

    def __setstate__(self, state):
        self.dtype = self.dtype.newbyteorder(state[1])


def _storage(stand_in, count, data=None):
    """Return a storage, of which PyTorch's tensors, and here all arrays, are views: `count` numbers of one type."""
    return SimpleNamespace(dtype=stand_in.dtype, count=count, data=data)


class _Array:
    """An array that is not made yet: PyTorch's, or NumPy's, which is created empty and set afterwards."""

    def __init__(self, storage, offset, shape, strides, *_):
        end = offset + 1 + sum((size - 1) * stride for size, stride in zip(shape, strides))
        if min((offset, *shape, *strides)) < 0 or end > storage.count:
            raise pickle.UnpicklingError("it holds a tensor that is not within its storage")
        size = storage.dtype.itemsize
        self.storage, self.shape = storage, shape
        self.layout = {"offset": offset * size, "strides": [stride * size for stride in strides]}

    def __setstate__(self, state):
        _, self.shape, dtype, in_fortran_order, data = state
        self.storage = _storage(dtype, math.prod(self.shape), data)
        self.layout = {"order": "F" if in_fortran_order else "C"}

    def to_numpy(self):
        """Return the array in native byte order. Raises UnpicklingError if the file has too few bytes for it."""
        dtype, count, data = self.storage.dtype, self.storage.count, self.storage.data
        data = data.encode("latin1") if isinstance(data, str) else data
        if len(data) != count * dtype.itemsize:
            raise pickle.UnpicklingError(f"it holds {len(data)} bytes for an array of {count} numbers")
        return np.ndarray(self.shape, dtype, data, **self.layout).astype(dtype.newbyteorder("="), copy=False)


# The types of PyTorch's storages, and all types of numbers that are read
STORAGES = {"Float": "f4", "Double": "f8", "Half": "f2", "BFloat16": "u2", "Long": "i8", "Int": "i4", "Short": "i2"}
STORAGES |= {"Char": "i1", "Byte": "u1", "Bool": "b1"}

STAND_INS = {
    "collections.OrderedDict": dict,
    "builtins.tuple": lambda pair: pair[1],  # Paddle 2.1 and later may write a tensor as tuple((name, array))
    "builtins.bytes": lambda: b"",  # protocol 2 has no bytes: it writes none as this call, others as encoded text
    "_codecs.encode": lambda text, _: text,
    "numpy.ndarray": None,  # only named, as the kind of array that _reconstruct makes
    "numpy.dtype": _Dtype,
    "numpy.core.multiarray._reconstruct": lambda *_: _Array(_storage(_Dtype("f4"), 0, b""), 0, (0,), (1,)),
    "numpy.core.multiarray.scalar": lambda dtype, data: _Array(_storage(dtype, 1, data), 0, (), ()).to_numpy()[()],
    "torch._utils._rebuild_tensor_v2": _Array,
    **{f"torch.{name}Storage": code for name, code in STORAGES.items()},
}
