"""Make images of many formats and modes from those that scikit-image bundles, and damage most of them."""

import io
import random
from contextlib import suppress

import numpy as np
import tifffile
from PIL import ExifTags, Image
from skimage import data

Image.init()
with suppress(ImportError):
    __import__("pillow_heif").register_heif_opener()

FORMATS = {"jpg": "JPEG", "png": "PNG", "tif": "TIFF", "webp": "WEBP", "gif": "GIF", "bmp": "BMP", "ppm": "PPM"}
FORMATS |= {suffix: format for suffix, format in (("jp2", "JPEG2000"), ("avif", "AVIF"), ("heic", "HEIF"))
            if format in Image.SAVE and format in Image.OPEN}  # fmt: skip
MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16")
TIFFS = {  # by tifffile: a function of the gray levels, and options
    "white16": (lambda gray: np.uint16(65535 - 257 * gray.astype(int)), {"photometric": "miniswhite"}),
    "float": (lambda gray: np.float32(gray / 255), {}),
    "int16": (lambda gray: np.int16(gray) * 128, {}),
    "uint32": (lambda gray: np.uint32(gray) << 24, {}),
    "thumbnail": (lambda gray: gray, {"subfiletype": 1}),
}
UNSUPPORTED = ("int16", "uint32", "thumbnail", "float")  # floats when damaged, because they leave [0, 1]


def make(folder, count, seed=0):
    """Write `count` images, whose names contain format, mode and damage."""
    choose = random.Random(seed)
    images = [Image.fromarray(x()[::6, ::6]) for x in (data.astronaut, data.chelsea, data.coffee, data.rocket)]
    folder.mkdir(parents=True)
    made = 0
    while made < count:
        suffix = choose.choice(sorted(FORMATS))
        mode = choose.choice((*MODES, *TIFFS) if suffix == "tif" else MODES)
        whole = encoded(choose.choice(images), suffix, mode, choose)
        if whole is None:
            continue  # the format does not have the mode
        damage = choose.choice(DAMAGES)
        name = f"{made:03d}_{suffix}_{mode.replace(';', '')}_{damage.__name__}.{suffix}"
        (folder / name).write_bytes(damage(whole, choose))
        made += 1


def encoded(original, suffix, mode, choose):
    """Return the bytes of an image; None if the format does not have the mode."""
    file = io.BytesIO()
    if mode in TIFFS:
        samples, options = TIFFS[mode]
        tifffile.imwrite(file, samples(np.asarray(original.convert("L"))), **options)
        return file.getvalue()
    image = original.convert("L" if mode == "I;16" else mode)
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image).astype(np.uint16) * 257)
    options = {
        "jpg": {"progressive": choose.random() < 0.5},
        "tif": {"compression": choose.choice(("raw", "tiff_lzw"))},
    }
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = choose.randint(1, 8)
    exif = {"exif": exif} if suffix in ("jpg", "png", "tif", "webp") else {}
    try:
        image.save(file, FORMATS[suffix], **options.get(suffix, {}), **exif)
    except (OSError, ValueError, KeyError):
        return None
    return file.getvalue()


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
        if any(f"_{kind}_" in path.name for kind in UNSUPPORTED):
            continue
        try:
            with Image.open(path) as image:
                image.load()
                image.convert("RGB")
        except Exception:  # decoders raise exceptions of all kinds
            continue
        names.add(path.name)
    return names
