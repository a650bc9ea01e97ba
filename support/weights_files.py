"""Readers of weights in any format: Paddle's, safetensors, PyTorch's and Caffe's, without the latter frameworks.

They take an open file. Its format is recognized by its first bytes.
"""

import os
import zipfile

from support.pickles import DataUnpickler, read_pickle, widen_bfloat16

import numpy as np
from safetensors import deserialize, safe_open

LEGACY_PYTORCH = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # before PyTorch 1.6: the pickle of a magic number
PYTORCH = (b"PK", LEGACY_PYTORCH)
CAFFE = (b"\n", b"\x1a", b"\xa2\x06")  # a network's name, inputs or layers


def read_weights(file):
    """Return the content of a file in any format, with NumPy arrays in place of tensors. Errors are of many types."""
    if is_safetensors(file):
        return read_safetensors(file)
    if file.peek(16).startswith(PYTORCH):
        return read_pytorch(file)
    return read_caffe(file) if file.peek(2).startswith(CAFFE) else read_pickle(file)


# -------------------------------------------------------------------------------------------------
# Safetensors

DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "I8": "|i1", "U8": "|u1"}


def is_safetensors(file):
    """Return whether a file begins with eight bytes for the length of a JSON header, and this header."""
    start = file.peek(9)[:9]
    return start[8:] == b"{" and int.from_bytes(start[:8], "little") < 100_000_000


def read_metadata(file):
    """Return the text entries of a safetensors file, a dict."""
    with safe_open(file.name, "np") as opened:
        return opened.metadata() or {}


def read_safetensors(file):
    """Return the arrays: bfloat16 as float32, and an int8 array `X` with a float array `X.scale` as their product."""
    arrays = {}
    for name, entry in deserialize(file.read()):
        arrays[name] = np.frombuffer(entry["data"], DTYPES[entry["dtype"]]).reshape(entry["shape"])
        arrays[name] = widen_bfloat16(arrays[name])
    for name in [name for name in arrays if f"{name}.scale" in arrays]:
        product = arrays[name].astype(np.float32)
        product *= arrays.pop(f"{name}.scale")  # in place: raises ValueError if the scale has a larger shape
        arrays[name] = product
    return arrays


# -------------------------------------------------------------------------------------------------
# PyTorch


def read_pytorch(file):
    """Return the content of a file of `torch.save`, in either of its layouts."""
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
    """Read the layout since PyTorch 1.6: an uncompressed archive of a pickle and a file for each storage."""
    if sum(file.file_size for file in archive.infolist()) > size:
        raise ValueError("its parts are larger than the file")
    folder = archive.namelist()[0].split("/")[0]
    reader = DataUnpickler(archive.open(f"{folder}/data.pkl"), size)
    state = reader.load()
    for key, storage in reader.storages.items():
        storage.data = archive.read(f"{folder}/data/{key}")
    return reader.to_plain(state)


# -------------------------------------------------------------------------------------------------
# Caffe

# The fields of Caffe's caffe.proto that hold weights, as protobuf's own FileDescriptorProto; others are skipped. `data`
# is packed floats, which have the same encoding as bytes. As bytes, NumPy can take them as a whole.
CAFFE_PROTO = """
name: "caffe_weights.proto"
message_type { name: "BlobShape" field { name: "dim" number: 1 label: LABEL_REPEATED type: TYPE_INT64 } }
message_type {
  name: "BlobProto"
  field { name: "data" number: 5 label: LABEL_OPTIONAL type: TYPE_BYTES }
  field { name: "shape" number: 7 label: LABEL_OPTIONAL type: TYPE_MESSAGE type_name: ".BlobShape" }
}
message_type {
  name: "LayerParameter"
  field { name: "name" number: 1 label: LABEL_OPTIONAL type: TYPE_STRING }
  field { name: "blobs" number: 7 label: LABEL_REPEATED type: TYPE_MESSAGE type_name: ".BlobProto" }
}
message_type {
  name: "NetParameter"
  field { name: "layer" number: 100 label: LABEL_REPEATED type: TYPE_MESSAGE type_name: ".LayerParameter" }
}
"""


def read_caffe(file):
    """Return {"conv1_2.0": weight, "conv1_2.1": bias, …}: the arrays by the layer's name and their position in it."""
    from google.protobuf import descriptor_pb2, message_factory, text_format

    proto = text_format.Parse(CAFFE_PROTO, descriptor_pb2.FileDescriptorProto())
    net = message_factory.GetMessages([proto])["NetParameter"]()
    net.ParseFromString(file.read())
    return {
        f"{layer.name}.{i}": np.frombuffer(blob.data, "<f4").reshape(blob.shape.dim)
        for layer in net.layer
        for i, blob in enumerate(layer.blobs)
    }
