"""Pickles read as data.

A pickle is a program that names functions and calls them with arguments of its choice. Here it may only use the opcodes
that `paddle.save` and `torch.save` write, and the few functions that they need are replaced by the stand-ins below,
which only note what they are given. Arrays are views of the bytes in the file, so they take no memory of their own.
"""

import pickle
from functools import cached_property
from io import BytesIO

import numpy as np

# The opcodes that are written with protocols 2 to 4
OPCODES = """PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT
    SHORT_BINBYTES BINBYTES BINBYTES8 SHORT_BINSTRING BINSTRING SHORT_BINUNICODE BINUNICODE BINUNICODE8
    EMPTY_DICT SETITEM SETITEMS EMPTY_LIST APPEND APPENDS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3
    BINPUT LONG_BINPUT MEMOIZE BINGET LONG_BINGET GLOBAL STACK_GLOBAL REDUCE BUILD BINPERSID"""
MOST_OPCODES = 1_000_000  # each may make a container of about 70 bytes; a checkpoint has about 30 per array
LONGEST_REPEATED = 1000  # bytes of a text that a pickle may repeat; names are shorter


def read_pickle(content):
    """Return what the bytes of a file of `paddle.save` hold: containers of numbers, strings and NumPy arrays."""
    return to_plain(DataUnpickler(BytesIO(content)).load())


class DataUnpickler(pickle._Unpickler):
    """An unpickler that calls only the stand-ins.

    Its base is the version written in Python: there, opcodes and the memo can be replaced. (The memo of the version in
    C is an array as long as the largest index in the file.)

    Attributes:
        storages: PyTorch's storages by key, whose `data` must be set between `load` and `to_plain`.
    """

    def __init__(self, file):
        super().__init__(file, encoding="latin1")  # Python 2 wrote the bytes of an array as a string
        codes = [getattr(pickle, name)[0] for name in OPCODES.split()]
        self.dispatch = _Opcodes({code: pickle._Unpickler.dispatch[code] for code in codes})
        self.dispatch[pickle.BUILD[0]] = DataUnpickler.load_build
        self.memo = _Memo()
        self.storages = {}

    def find_class(self, module, name):
        name = f"{module}.{name}".replace("__builtin__", "builtins").replace("numpy._core", "numpy.core")
        if name not in STAND_INS:
            raise pickle.UnpicklingError(f"it holds {name}, which no checkpoint needs")
        return STAND_INS[name]

    def persistent_load(self, reference):
        _, code, key, _, count = reference[:5]
        return self.storages.setdefault(key, _Storage(code, count))

    def load_build(self):
        state = self.stack.pop()
        if not isinstance(self.stack[-1], dict):  # PyTorch adds the versions of its layers to a dict
            self.stack[-1].__setstate__(state)


class _Opcodes(dict):
    """The functions that run the opcodes, for a limited number of them."""

    left = MOST_OPCODES

    def __getitem__(self, code):
        self.left -= 1
        if self.left < 0:
            raise pickle.UnpicklingError(f"it has more than {MOST_OPCODES:,} opcodes")
        return super().__getitem__(code)

    def __missing__(self, code):
        raise pickle.UnpicklingError(f"it has the opcode {bytes([code])}, which no checkpoint needs")


class _Memo(dict):
    """A memo that repeats no container and no array's bytes: a few kilobytes could stand for any amount of them."""

    def __getitem__(self, index):
        value = super().__getitem__(index)
        long_text = isinstance(value, (str, bytes)) and len(value) > LONGEST_REPEATED
        if long_text or isinstance(value, (dict, list, tuple)):
            raise pickle.UnpicklingError("it holds the same list, tuple, dict or long text twice")
        return value


def to_plain(value):
    """Return an unpickled value with NumPy arrays in place of the stand-ins."""
    if isinstance(value, (_NumpyArray, _TorchTensor)):
        return value.array
    if isinstance(value, dict):
        return {key: to_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(to_plain, value))
    return value  # a number or text; or, in no checkpoint, a stand-in


def to_numbers(data, dtype):
    """Return bytes, or text that holds them, as a flat array in native byte order, bfloat16 as float32."""
    data = data.encode("latin1") if isinstance(data, str) else data
    return widen_bfloat16(np.frombuffer(data, dtype).astype(dtype.newbyteorder("="), copy=False))


def widen_bfloat16(array):
    """Return bfloat16, which NumPy lacks and others hand over as uint16, as float32; other arrays unchanged."""
    return (array.astype(np.uint32) << 16).view(np.float32) if array.dtype == np.uint16 else array


# -------------------------------------------------------------------------------------------------
# Stand-ins

# The types of PyTorch's storages, and all types of numbers that are read
STORAGES = {"Float": "f4", "Double": "f8", "Half": "f2", "BFloat16": "u2", "Long": "i8", "Int": "i4", "Short": "i2"}
STORAGES |= {"Char": "i1", "Byte": "u1", "Bool": "b1"}


class _Dtype:
    """The type of an array's numbers, e.g. f4 or i8. Raises UnpicklingError for other types."""

    def __init__(self, code, *_):
        if code not in STORAGES.values():
            raise pickle.UnpicklingError(f"it holds an array of {code!r}, not of numbers")
        self.dtype = np.dtype(code)

    def __setstate__(self, state):
        self.dtype = self.dtype.newbyteorder(state[1])


class _NumpyArray:
    """NumPy's array, which a pickle creates empty and sets afterwards."""

    state = 1, (0,), _Dtype("f4"), False, b""

    def __init__(self, *_):
        pass

    def __setstate__(self, state):
        self.state = state

    @cached_property
    def array(self):
        _, shape, stand_in, in_fortran_order, data = self.state
        return to_numbers(data, stand_in.dtype).reshape(shape, order="F" if in_fortran_order else "C")


class _Storage:
    """PyTorch's storage, of which tensors are views: `count` numbers of one type."""

    def __init__(self, code, count):
        self.dtype, self.count, self.data = _Dtype(code).dtype, count, None

    @cached_property
    def numbers(self):
        return to_numbers(self.data, self.dtype)


class _TorchTensor:
    """PyTorch's tensor."""

    def __init__(self, storage, offset, shape, strides, *_):
        self.storage, self.offset, self.shape, self.strides = storage, offset, shape, strides

    @property
    def array(self):
        numbers = self.storage.numbers
        end = self.offset + 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.strides))
        if min((self.offset, *self.shape, *self.strides)) < 0 or end > len(numbers):
            raise pickle.UnpicklingError("it holds a tensor that is not within its storage")
        size = numbers.itemsize
        view = np.ndarray(self.shape, numbers.dtype, numbers, self.offset * size, [size * x for x in self.strides])
        if view.size > numbers.size:
            raise pickle.UnpicklingError("it holds a tensor that is larger than its storage")
        return view


STAND_INS = {
    "collections.OrderedDict": dict,
    "builtins.tuple": lambda pair: pair[1],  # Paddle 2.1 and later may write a tensor as tuple((name, array))
    "builtins.bytes": lambda: b"",  # protocol 2 has no bytes: it writes none as this call, others as encoded text
    "_codecs.encode": lambda text, _: text,
    "numpy.ndarray": None,  # only named, as the kind of array that _reconstruct makes
    "numpy.dtype": _Dtype,
    "numpy.core.multiarray._reconstruct": _NumpyArray,
    "numpy.core.multiarray.scalar": lambda stand_in, data: to_numbers(data, stand_in.dtype).reshape(())[()],
    "torch._utils._rebuild_tensor_v2": _TorchTensor,
    **{f"torch.{name}Storage": code for name, code in STORAGES.items()},
}
