"""Pickles read as data.

A pickle is a program that names functions and calls them with arguments of its choice. Here it may only use the opcodes
that `paddle.save` and `torch.save` write, and the few functions that they need are replaced by the stand-ins below.
Arrays are views of the bytes in the file, so they take no memory of their own.
"""

import pickle

import numpy as np

# The opcodes that are written with protocols 2 to 4
OPCODES = """PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT
    SHORT_BINBYTES BINBYTES BINBYTES8 SHORT_BINUNICODE BINUNICODE BINUNICODE8
    EMPTY_DICT SETITEM SETITEMS EMPTY_LIST APPEND APPENDS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3
    BINPUT LONG_BINPUT MEMOIZE BINGET LONG_BINGET GLOBAL STACK_GLOBAL REDUCE BUILD BINPERSID"""
MOST_OPCODES = 1_000_000  # each may make a container of about 70 bytes; a checkpoint has about 30 per array
LONGEST_REPEATED = 1000  # bytes of a text that a pickle may repeat; names are shorter


class DataUnpickler(pickle._Unpickler):
    """An unpickler that calls only the stand-ins. It returns containers of numbers, strings and NumPy arrays.

    Its base is the version written in Python: there, opcodes and the memo can be replaced. (The memo of the version in
    C is an array as long as the largest index in the file.)

    Args:
        file (BinaryIO): The pickle.
        read_storage (Callable, optional): Returns one of PyTorch's storages, of which tensors are views, as a flat
            array, given its key in the file, NumPy's type of its numbers, and their count.
    """

    def __init__(self, file, read_storage=None):
        super().__init__(file)
        codes = [getattr(pickle, name)[0] for name in OPCODES.split()]
        self.dispatch = _Opcodes({code: pickle._Unpickler.dispatch[code] for code in codes})
        self.dispatch[pickle.BUILD[0]] = DataUnpickler.load_build
        self.memo = _Memo()
        self.read_storage, self.storages = read_storage, {}

    def find_class(self, module, name):
        name = f"{module}.{name}".replace("__builtin__", "builtins").replace("numpy._core", "numpy.core")
        if name not in STAND_INS:
            raise pickle.UnpicklingError(f"it holds {name}, which no checkpoint needs")
        return STAND_INS[name]

    def persistent_load(self, reference):
        _, code, key, _, count = reference[:5]
        if key not in self.storages:
            self.storages[key] = self.read_storage(key, number_type(code), count)
        return self.storages[key]

    def load_build(self):
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, _EmptyArray):
            self.stack[-1] = target.filled = numpy_array(*state)
        elif isinstance(target, str) and state[1] == ">":  # the code of a type
            raise pickle.UnpicklingError("it holds an array in big-endian byte order")
        # PyTorch also adds the versions of its layers to a dict.


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
        return value.filled if isinstance(value, _EmptyArray) else value


# -------------------------------------------------------------------------------------------------
# Arrays

# The types of PyTorch's storages, and all types of numbers that are read
STORAGES = {"Float": "f4", "Double": "f8", "Half": "f2", "BFloat16": "u2", "Long": "i8", "Int": "i4", "Short": "i2"}
STORAGES |= {"Char": "i1", "Byte": "u1", "Bool": "b1"}


def number_type(code):
    """Return NumPy's type for a code such as f4 or i8. Raises UnpicklingError if it is not one of numbers."""
    if code not in STORAGES.values():
        raise pickle.UnpicklingError(f"it holds an array of {code!r}, not of numbers")
    return np.dtype(code)


def widen_bfloat16(array):
    """Return bfloat16, which NumPy lacks and others hand over as uint16, as float32; other arrays unchanged."""
    return (array.astype(np.uint32) << 16).view(np.float32) if array.dtype == np.uint16 else array


def numpy_array(_, shape, code, in_fortran_order, data):
    """Return the array of a NumPy array's state in a pickle."""
    numbers = widen_bfloat16(np.frombuffer(data, number_type(code)))
    return numbers.reshape(shape, order="F" if in_fortran_order else "C")


def torch_tensor(storage, offset, shape, strides, *_):
    """Return a view of a storage, which is a flat array. Offset and strides are in numbers, not bytes."""
    end = offset + 1 + sum((size - 1) * stride for size, stride in zip(shape, strides))
    if min((offset, *shape, *strides)) < 0 or end > len(storage):  # NumPy's own check overflows
        raise pickle.UnpicklingError("it holds a tensor that is not within its storage")
    size = storage.itemsize
    view = np.ndarray(shape, storage.dtype, storage, offset * size, [size * stride for stride in strides])
    if view.size > storage.size:
        raise pickle.UnpicklingError("it holds a tensor that is larger than its storage")
    return view


class _EmptyArray:
    """NumPy's array when a pickle creates it. It is filled afterwards."""

    filled = None


STAND_INS = {
    "collections.OrderedDict": dict,
    "builtins.tuple": lambda pair: pair[1],  # Paddle 2.1 and later may write a tensor as tuple((name, array))
    "builtins.bytes": lambda: b"",  # protocol 2 has no bytes: it writes none as this call, others as encoded text
    "_codecs.encode": lambda text, _: text.encode("latin1"),
    "numpy.ndarray": None,  # only named, as the kind of array that _reconstruct makes
    "numpy.dtype": lambda code, *_: code,
    "numpy.core.multiarray._reconstruct": lambda *_: _EmptyArray(),
    "numpy.core.multiarray.scalar": lambda code, data: np.frombuffer(data, number_type(code))[0],
    "torch._utils._rebuild_tensor_v2": torch_tensor,
    **{f"torch.{name}Storage": code for name, code in STORAGES.items()},
}
