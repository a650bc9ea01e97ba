"""Make images of many formats and modes, and damage most of them."""

import io
import random
from contextlib import suppress
from itertools import product

import numpy as np
from PIL import Image
from skimage import data

Image.init()
with suppress(ImportError):
    __import__("pillow_heif").register_heif_opener()

FORMATS = {"jpg": "JPEG", "png": "PNG", "tif": "TIFF", "webp": "WEBP", "gif": "GIF", "bmp": "BMP", "ppm": "PPM"}
FORMATS |= {suffix: format for suffix, format in (("jp2", "JPEG2000"), ("avif", "AVIF"), ("heic", "HEIF"))
            if format in Image.SAVE and format in Image.OPEN}  # fmt: skip
MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16")


def make(folder, seed=0):
    """Write an image of each format and mode with each kind of damage. Its name contains the mode and the damage."""
    choose = random.Random(seed)
    folder.mkdir(parents=True)
    image = Image.fromarray(data.coffee()[::8, ::8])
    wide = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    for suffix, mode in product(FORMATS, MODES):
        file = io.BytesIO()
        try:
            (wide if mode == "I;16" else image.convert(mode)).save(file, FORMATS[suffix])
        except (OSError, ValueError, KeyError):
            continue  # the format does not have the mode
        for damage in DAMAGES:
            name = f"{mode.replace(';', '')}_{damage.__name__}.{suffix}"
            (folder / name).write_bytes(damage(file.getvalue(), choose))


def unharmed(whole, _):
    return whole


def emptied(*_):
    return b""


def truncated(whole, choose):
    return whole[: choose.randrange(1, len(whole))]


def shortened(whole, choose):
    return whole[: -choose.randint(1, 20)]


def flipped(whole, choose):
    return changed(whole, choose, range(len(whole)), 10)


def flipped_at_the_beginning(whole, choose):
    return changed(whole, choose, range(2, min(64, len(whole))), 3)


def blanked(whole, choose):
    start = choose.randrange(len(whole))
    return whole[:start] + bytes(len(whole[start : start + 200])) + whole[start + 200 :]


def inserted(whole, choose):
    start = choose.randrange(len(whole))
    return whole[:start] + choose.randbytes(choose.randint(1, 50)) + whole[start:]


def changed(whole, choose, places, count):
    result = bytearray(whole)
    for _ in range(count):
        result[choose.choice(places)] = choose.randrange(256)
    return bytes(result)


DAMAGES = (unharmed, emptied, truncated, shortened, flipped, flipped_at_the_beginning, blanked, inserted)


def readable(folder):
    """Return the names of the files that Pillow decodes completely and correctly."""
    names = set()
    for path in sorted(folder.iterdir()):
        try:
            with Image.open(path) as image:
                image.load()
                image.convert("RGB")
        except Exception:  # decoders raise exceptions of all kinds
            continue
        names.add(path.name)
    return names
