"""Readers of weights in any format: Paddle's, safetensors, PyTorch's and Caffe's, without the latter frameworks.

They take a file's bytes. The format is recognized by the first of them.
"""

import json
import os
import zipfile
from io import BytesIO

from support.pickles import DataUnpickler, widen_bfloat16

import numpy as np
from safetensors import deserialize

ZIP = b"PK"  # PyTorch since 1.6
LEGACY_PYTORCH = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # before: the pickle of a magic number
LONGEST_HEADER = 1_000_000  # bytes of a safetensors file's description of its arrays, about 80 for each
CAFFE = (b"\n", b"\x1a", b"\xa2\x06")  # a network's name, inputs or layers


def read_weights(content):
    """Return the content of a file in any format as a dict, with NumPy arrays in place of tensors.

    The text entries of a safetensors file are strings in it. Errors are of many types.
    """
    if content[8:9] == b"{" and int.from_bytes(content[:8], "little") < LONGEST_HEADER:
        return read_safetensors(content)
    if content.startswith(ZIP):
        state = read_zip(content)
    elif content.startswith(LEGACY_PYTORCH):
        state = read_legacy_pytorch(content)
    elif content.startswith(CAFFE):
        state = read_caffe(content)
    else:
        state = DataUnpickler(BytesIO(content)).load()
    if not isinstance(state, dict):
        raise ValueError(f"it holds a {type(state).__name__}, not the state of a network")
    return state


# -------------------------------------------------------------------------------------------------
# Safetensors

DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "I8": "|i1", "U8": "|u1"}


def read_safetensors(content):
    """Return the arrays, bfloat16 as float32, and the text entries.

    An int8 array `X` with a float array `X.scale` is returned as their product `X`.
    """
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])  # after eight bytes for its length
    arrays = {}
    for name, entry in deserialize(content):
        numbers = np.frombuffer(entry["data"], DTYPES[entry["dtype"]])
        arrays[name] = widen_bfloat16(numbers.reshape(entry["shape"]))
    for name in [name for name in arrays if f"{name}.scale" in arrays]:
        product = np.empty(arrays[name].shape, np.float32)  # raises ValueError if the scale has a larger shape
        arrays[name] = np.multiply(arrays[name], arrays.pop(f"{name}.scale"), out=product)
    return {**header.get("__metadata__", {}), **arrays}


# -------------------------------------------------------------------------------------------------
# PyTorch


def read_zip(content):
    """Read the layout since PyTorch 1.6: an uncompressed archive of a pickle and a file for each storage."""
    archive = zipfile.ZipFile(BytesIO(content))
    if sum(file.file_size for file in archive.infolist()) > len(content):
        raise ValueError("its parts are larger than the file")
    folder = archive.namelist()[0].split("/")[0]

    def read_storage(key, dtype, _):
        return widen_bfloat16(np.frombuffer(archive.read(f"{folder}/data/{key}"), dtype))

    return DataUnpickler(archive.open(f"{folder}/data.pkl"), read_storage).load()


def read_legacy_pytorch(content):
    """Read the layout before PyTorch 1.6: pickles, and the bytes of each storage."""
    file = BytesIO(content)
    for _ in ("magic number", "version", "system"):
        DataUnpickler(file).load()
    # Storages are filled after the tensors, their views, have been made. None is longer than the file.
    reader = DataUnpickler(file, lambda _, dtype, count: np.zeros(min(count, len(content)), dtype))
    state = reader.load()
    for key in DataUnpickler(file).load():
        file.seek(8, os.SEEK_CUR)  # the number of elements, which the storage has, too
        if file.readinto(reader.storages[key]) < reader.storages[key].nbytes:
            raise ValueError("it is cut short")
    return state


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


def read_caffe(content):
    """Return {"conv1_2.0": weight, "conv1_2.1": bias, …}: the arrays by the layer's name and their position in it."""
    from google.protobuf import descriptor_pb2, message_factory, text_format

    proto = text_format.Parse(CAFFE_PROTO, descriptor_pb2.FileDescriptorProto())
    net = message_factory.GetMessages([proto])["NetParameter"]()
    net.ParseFromString(content)
    return {
        f"{layer.name}.{i}": np.frombuffer(blob.data, "<f4").reshape(blob.shape.dim)
        for layer in net.layer
        for i, blob in enumerate(layer.blobs)
    }
