"""Damage that a file itself proves. The error of a decoder is no proof: it may lack memory, for example."""

import os
import re
import struct
import zlib
from pathlib import Path

MARKER = re.compile(rb"\xff([\xc0-\xcf\xd8-\xfe])")  # of a JPEG, without a restart of the decoder and stuffed bytes
END_OF_IMAGE = b"\xd9"


def find_damage(path):
    """Return how an image file is damaged; "" if it may be intact."""
    if not os.path.isfile(path):  # a pipe would wait for its other end
        return ""
    try:
        content = Path(path).read_bytes()
    except OSError:
        return ""
    if not content:
        return "empty file"
    if re.match(rb"\s*<(!doctype html|html)", content, re.IGNORECASE):  # as servers send instead of an image
        return "an HTML page"
    if content.startswith(b"\xff\xd8\xff"):
        return _jpeg_damage(content)
    if content.startswith(b"\x89PNG\r\n\x1a\n"):
        return _png_damage(content)
    return ""


def _jpeg_damage(content):
    position = 2
    while marker := MARKER.search(content, position):
        if marker[1] == END_OF_IMAGE:
            return ""
        position = marker.end() + int.from_bytes(content[marker.end() : marker.end() + 2], "big")
    return "truncated JPEG: no end marker"


def _png_damage(content):
    position = 8
    while position + 12 <= len(content):
        length, kind = struct.unpack_from(">I4s", content, position)
        end = position + 8 + length
        if end + 4 > len(content):
            break
        (checksum,) = struct.unpack_from(">I", content, end)
        if checksum != zlib.crc32(content[position + 4 : end]):
            return "damaged PNG: wrong checksum"
        if kind == b"IEND":
            return ""
        position = end + 4
    return "truncated PNG: no IEND chunk"
