"""Weights in the formats of others, read without the frameworks that write them: safetensors, PyTorch, Caffe."""

import math
import os
import zipfile

from support.pickles import DataUnpickler, widen_bfloat16

import numpy as np
from safetensors import deserialize, safe_open

# -------------------------------------------------------------------------------------------------
# Safetensors

DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "I8": "|i1", "U8": "|u1"}


def is_safetensors(file):
    """Return whether an open file begins with eight bytes for the length of a JSON header, and this header."""
    start = file.peek(9)[:9]
    return start[8:] == b"{" and int.from_bytes(start[:8], "little") < 100_000_000


def read_metadata(file):
    """Return the text entries of an open file, a dict."""
    with safe_open(file.name, "np") as opened:
        return opened.metadata() or {}


def read_safetensors(file):
    """Return the arrays: bfloat16 as float32, and an int8 array `X` with a float array `X.scale` as their product."""
    arrays = {}
    for name, entry in deserialize(file.read()):
        array = np.frombuffer(entry["data"], DTYPES[entry["dtype"]]).reshape(entry["shape"])
        arrays[name] = widen_bfloat16(array) if entry["dtype"] == "BF16" else array
    for name in [name for name, array in arrays.items() if array.dtype == np.int8 and f"{name}.scale" in arrays]:
        product = arrays[name].astype(np.float32)
        product *= arrays.pop(f"{name}.scale")  # in place: raises ValueError if the scale has a larger shape
        arrays[name] = product
    return arrays


# -------------------------------------------------------------------------------------------------
# PyTorch

# Before PyTorch 1.6, a file began with the pickle of a magic number.
LEGACY_PYTORCH = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."


def is_pytorch(file):
    """Return whether an open file was written by `torch.save`."""
    return file.peek(16).startswith((b"PK", LEGACY_PYTORCH))


def read_pytorch(file):
    """Return the content of an open file of `torch.save`, in either of its layouts, with arrays in place of tensors."""
    size = os.fstat(file.fileno()).st_size
    if file.peek(2).startswith(b"PK"):
        return _read_zip(zipfile.ZipFile(file), size)
    for _ in ("magic number", "version", "system"):
        DataUnpickler(file, size).load()
    reader = DataUnpickler(file, size)
    state = reader.load()
    for key in DataUnpickler(file, size).load():
        storage = reader.storages[key]
        file.seek(8, os.SEEK_CUR)  # the number of elements, which the storage has, too
        storage.data = file.read(storage.count * storage.dtype.itemsize)
    return reader.to_plain(state)


def _read_zip(archive, size):
    """Read the layout since 1.6: a pickle and each storage as a file of its own, uncompressed."""
    files = archive.infolist()
    pickled = next((file.filename for file in files if file.filename.endswith("/data.pkl")), None)
    if not pickled:
        raise ValueError("a zip archive that PyTorch did not write")
    if any(file.compress_type for file in files) or sum(file.file_size for file in files) > size:
        raise ValueError("its parts are larger than the file")
    reader = DataUnpickler(archive.open(pickled), size)
    state = reader.load()
    for key, storage in reader.storages.items():
        storage.data = archive.read(pickled.replace("data.pkl", f"data/{key}"))
    return reader.to_plain(state)


# -------------------------------------------------------------------------------------------------
# Caffe

# The fields of Caffe's caffe.proto that hold weights; the others are skipped. `data` and `double_data` are packed
# floats and doubles, which have the same encoding as bytes. As bytes, NumPy can take them as a whole.
CAFFE_PROTO = {
    "BlobShape": ["repeated int64 dim = 1"],
    "BlobProto": [
        *("optional int64 num = 1", "optional int64 channels = 2", "optional int64 height = 3"),
        *("optional int64 width = 4", "optional bytes data = 5", "optional BlobShape shape = 7"),
        "optional bytes double_data = 8",
    ],
    "LayerParameter": ["optional string name = 1", "repeated BlobProto blobs = 7"],
    "V1LayerParameter": ["optional string name = 4", "repeated BlobProto blobs = 6"],
    "NetParameter": ["repeated V1LayerParameter layers = 2", "repeated LayerParameter layer = 100"],
}


def _caffe_net():
    """Return an empty NetParameter, the message that a .caffemodel is, without a compiled caffe.proto."""
    from google.protobuf import descriptor_pb2, message_factory

    constants = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="caffe_weights.proto", package="caffe", syntax="proto2")
    for message, fields in CAFFE_PROTO.items():
        declared = file.message_type.add(name=message)
        for field in fields:
            label, kind, name, _, number = field.split()
            field = declared.field.add(name=name, number=int(number))
            field.label = getattr(constants, f"LABEL_{label.upper()}")
            if kind in CAFFE_PROTO:
                field.type, field.type_name = constants.TYPE_MESSAGE, f".caffe.{kind}"
            else:
                field.type = getattr(constants, f"TYPE_{kind.upper()}")
    return message_factory.GetMessages([file])["caffe.NetParameter"]()


def read_caffe(file):
    """Return {"conv1_2.0": weight, "conv1_2.1": bias, …}: the arrays by the layer's name and their position in it."""
    from google.protobuf.message import DecodeError

    net = _caffe_net()
    try:
        net.ParseFromString(file.read())
    except DecodeError:
        raise ValueError("damaged, or in an unknown format") from None
    layers = [*net.layer, *net.layers]
    return {f"{layer.name}.{i}": _blob_array(blob) for layer in layers for i, blob in enumerate(layer.blobs)}


def _blob_array(blob):
    shape = list(blob.shape.dim) or [blob.num, blob.channels, blob.height, blob.width]  # formerly always four
    data, dtype = (blob.data, "<f4") if blob.data else (blob.double_data, "<f8")
    count = math.prod(shape)
    if count * np.dtype(dtype).itemsize != len(data):
        raise ValueError(f"it holds {len(data)} bytes for a blob of {count} numbers")
    return np.ndarray(shape, dtype, data)  # raises ValueError if sizes are negative
