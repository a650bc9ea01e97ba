"""Image files: read them upright, in sRGB, with transparency over white, and write them with their metadata."""

import math
import os
import re
import struct
from contextlib import contextmanager, suppress
from functools import lru_cache
from importlib import import_module
from io import BytesIO
from pathlib import Path

from support.cli import UserError, explain, note
from support.files import atomic_path

import numpy as np
from PIL import ExifTags, Image, ImageCms, UnidentifiedImageError

# Pillow's other formats stay closed: EPS would start Ghostscript, and ICO and ICNS decode before their size is known.
READ_FORMATS = {"JPEG", "PNG", "TIFF", "WEBP", "GIF", "BMP", "PPM", "JPEG2000", "AVIF", "HEIF", "JXL"}
EMPTY, HTML = "empty file", "HTML page instead of the image"
# Files that Pillow may not open: their first bytes, a module that adds their format, and the reason for the user
SPECIAL_FILES = (
    (rb"....ftyp(hei.|hev.|mif1|msf1)", "pillow_heif.HeifImagePlugin", "HEIC, which needs the package pillow-heif"),
    (rb"\xff\x0a|....JXL ", "pillow_jxl", "JPEG XL, which needs the package pillow-jxl-plugin"),
    (rb"....ftyp(avif|avis)", None, "AVIF, which needs Pillow 11.3 or newer"),
    (rb"version https://git-lfs", None, "Git LFS pointer instead of the image, which `git lfs pull` fetches"),
    (rb"\s*<(?i:!doctype html|html)", None, HTML),
    (rb"\Z", None, EMPTY),
)
HEAD = 2**16  # bytes of a file in which these and the kind of color are found
# Transfer functions (ITU-T H.273) in a PNG's cICP chunk or an AVIF's or HEIC's first colr box; 16 is PQ, 18 HLG
TRANSFER = re.compile(rb"(?:\x00\x00\x00\x04cICP.|colrnclx..\x00)(.)", re.DOTALL)
HDR = (b"\x10", b"\x12")


class InvalidImageError(ValueError):
    """A file that cannot be read as an image. The message contains the path and the reason."""

    def __init__(self, path, reason):
        super().__init__(path, reason)
        self.path, self.reason = path, reason

    def __str__(self):
        return f"{self.path}: {self.reason}"


# -------------------------------------------------------------------------------------------------
# Reading


def read_rgb(path):
    """Read an image as uint8 [H, W, 3]: upright (EXIF), in sRGB (ICC profile), with transparency over white.

    Raises InvalidImageError.
    """
    return np.asarray(open_rgb(path))


def open_rgb(path, least_side=None):
    """Read an image like `read_rgb`, as a Pillow image; its `info` holds the metadata that a result keeps.

    With `least_side`, the JPEG decoder may shrink the image by 2, 4 or 8 as long as both sides keep at least that many
    pixels, which is faster than decoding all of them.
    """
    with open_image(path, least_side) as image:
        return to_rgb(image, path)


def read_image(image):
    """Read an image from any source, as `open_rgb` does.

    Args:
        image (str | Path | Image | ndarray): A file, a Pillow image, or uint8 [H, W, 3].

    Returns:
        Image: An RGB image.

    Raises:
        InvalidImageError: If the file cannot be read.
        ValueError: If it is something else, or an array of another shape or type.
    """
    if isinstance(image, (str, os.PathLike)):
        return open_rgb(image)
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.shape[2:] == (3,) and image.size:
        image = Image.fromarray(image)
    if not isinstance(image, Image.Image) or 0 in image.size:
        kind = type(image).__name__
        raise ValueError(f"an image must be a path, a Pillow image or uint8 [H, W, 3], and not empty; this is {kind}")
    return to_rgb(image)


@contextmanager
def open_image(path, least_side=None):
    """Open an image without decoding it. Any error in the block is raised as an InvalidImageError.

    Pillow's limit of the number of pixels (`PIL.Image.MAX_IMAGE_PIXELS`) holds.
    """
    if not os.path.isfile(path):
        raise InvalidImageError(path, "no such file, or not a regular one")
    unidentified = ""
    try:
        with open(path, "rb") as file:
            head = file.read(HEAD)
            file.seek(0)
            plugin, unidentified = _recognize(head)
            with Image.open(file, formats=_formats(plugin)) as image:
                transfer = TRANSFER.search(head)
                if transfer and transfer[1] in HDR:
                    raise ValueError("HDR (PQ or HLG): convert it to sRGB first")
                if least_side:
                    image.draft(None, (least_side, least_side))
                yield image
    except UnidentifiedImageError as error:
        raise InvalidImageError(path, unidentified) from error
    except Exception as error:  # plugins raise OSError, ValueError, KeyError and others
        raise InvalidImageError(path, explain(error)) from error


def _recognize(head):
    """Return the plugin that a file with these first bytes needs, and the reason if it cannot be opened."""
    for start, plugin, reason in SPECIAL_FILES:
        if re.match(start, head, re.DOTALL):
            return plugin, reason
    return None, "not an image in a readable format, or damaged"


def _formats(plugin):
    """Return the names of the formats to open, after a plugin was imported that adds one to Pillow's own."""
    Image.init()
    if plugin:
        with suppress(ImportError):
            import_module(plugin)
    return sorted(READ_FORMATS & Image.OPEN.keys())


# -------------------------------------------------------------------------------------------------
# Orientation and samples

TURNS = {  # by EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def to_rgb(image, name="image"):
    """Return a new image: an opened Pillow image in sRGB, upright, with transparency over white (see `open_rgb`).

    An unusable color profile is reported with `name`; the image is then read as sRGB.
    """
    if image.format == "TIFF":
        _check_tiff(image.tag_v2)
    image.load()
    rgb = _convert_colors(image, _convert_samples(image), name)
    orientation = _from_exif(image, ExifTags.Base.Orientation)
    if orientation in TURNS:
        rgb = rgb.transpose(TURNS[orientation])
    rgb.info = metadata(image)
    return rgb


def _from_exif(image, tag, ifd=None):
    """Return a value from EXIF; None if there is none or EXIF is damaged, because the image may be intact."""
    with suppress(Exception):
        exif = image.getexif()
        return (exif.get_ifd(ifd) if ifd else exif).get(tag)


def _check_tiff(tags):
    """Raise ValueError unless Pillow decodes a TIFF with these tags correctly, and to its full size."""
    if tags.get(254, 0) & 1:  # NewSubfileType: reduced
        raise ValueError("TIFF that begins with a thumbnail, like camera raw files: convert it to another format first")
    photometric, planar, compression = tags.get(262, 0), tags.get(284, 1), tags.get(259, 1)
    bits, formats = tags.get(258, (1,)), tags.get(339, (1,))  # formats: 1 unsigned, 2 signed, 3 floating point
    unsigned = set(formats) == {1} and set(bits) <= {1, 2, 4, 8, 16}
    floating_point = (photometric, *formats, *bits) == (1, 3, 32)  # gray, 0 is black
    stripes = compression == 1 and planar == 2 and 16 in bits  # of which Pillow would make one picture
    ycbcr = compression == 1 and photometric == 6  # which Pillow leaves to libtiff, and that decompresses only
    if stripes or ycbcr or not (unsigned or floating_point):
        samples = f"bits per sample {bits}, sample format {formats}, photometric interpretation {photometric}"
        raise ValueError(f"unsupported TIFF: {samples}, compression {compression}, planar configuration {planar}")


def _convert_samples(image):
    """Convert a loaded image to RGB of 8 bits per sample, with transparency over white."""
    if image.mode[0] in "IF":  # 16 bits per sample, which Pillow widens to "I" for some formats, or floating point
        samples, most = np.float32(image), 1 if image.mode == "F" else 65535
        if not (samples.min() >= 0 and samples.max() <= most):  # NaN fails, too
            raise ValueError(f"gray samples outside [0, {most}]")
        gray = (samples * (255 / most)).round().astype(np.uint8)
        if image.format == "TIFF" and image.tag_v2.get(262, 0) == 0:  # 0 is white
            gray = 255 - gray
        return Image.fromarray(gray).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if image.getchannel("A").getbbox():  # alpha that is 0 everywhere is unused, as in many BMPs
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


# -------------------------------------------------------------------------------------------------
# Color spaces


@lru_cache(maxsize=1)
def srgb_profile():
    """Return the ICC profile of sRGB, with a fixed date, so that equal images give equal files."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return profile[:24] + struct.pack(">6H", 2000, 1, 1, 0, 0, 0) + profile[36:]


def _adobe_rgb_profile():
    """Return sRGB's profile with the primaries and the exponent of Adobe RGB (1998)."""
    profile = bytearray(srgb_profile())
    for tag, values in {
        b"rXYZ": (0.60974, 0.31111, 0.01947),
        b"gXYZ": (0.20528, 0.62567, 0.06087),
        b"bXYZ": (0.14919, 0.06322, 0.74457),
        b"rTRC": (563 / 256, 1, 0, 0, 0),  # y = x^g; lcms shares one curve between the channels
    }.items():
        offset, size = struct.unpack_from(">2I", profile, profile.index(tag) + 4)
        data = struct.pack(f">{len(values)}i", *(round(65536 * value) for value in values))
        profile[offset + size - len(data) : offset + size] = data
    return bytes(profile)


def _convert_colors(image, rgb, name):
    """Convert `rgb`, the samples of `image`, to sRGB from the color space that the image declares."""
    adobe_rgb = _from_exif(image, ExifTags.Interop.InteropIndex, ExifTags.IFD.Interop) == "R03"
    profile = image.info.get("icc_profile") or (_adobe_rgb_profile() if adobe_rgb else None)
    if not profile:
        return rgb
    samples = image if image.mode == "CMYK" else rgb
    if profile[16:20] == b"GRAY" and Image.getmodebase(image.mode) == "L":
        samples = rgb.getchannel(0)
    try:
        transform = _srgb_transform(profile, samples.mode)
        return ImageCms.applyTransform(samples, transform) if transform else rgb
    except ImageCms.PyCMSError as error:
        note(f"{name}: unusable color profile, read as sRGB ({error})")
        return rgb


@lru_cache(maxsize=16)  # building one takes longer than decoding a small image
def _srgb_transform(profile, mode):
    """Return the transform from an ICC profile to sRGB; None if that changes no channel by more than 2 levels."""
    settings = (mode, "RGB", ImageCms.Intent.RELATIVE_COLORIMETRIC, 0x2000)  # black-point compensation
    transform = ImageCms.buildTransform(BytesIO(profile), BytesIO(srgb_profile()), *settings)
    levels = np.arange(0, 256, 15, dtype=np.uint8)
    swatches = Image.fromarray(np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(1, -1, 3)).convert(mode)
    change = np.int16(ImageCms.applyTransform(swatches, transform)) - np.int16(swatches.convert("RGB"))
    return transform if np.abs(change).max() > 2 else None


def crop_resized(image, load_size, crop_size, across=0.5, down=0.5):
    """Resize an image so that its shorter side has `load_size` pixels, and return a square of it.

    `across` and `down`, in [0, 1], place the square; 0.5 is the center. Only the square is computed. Pillow image ->
    uint8 [crop_size, crop_size, 3].
    """
    side = crop_size * min(image.size) / load_size  # of the square, in pixels of the image
    left, top = across * (image.width - side), down * (image.height - side)
    box = (left, top, left + side, top + side)
    return np.asarray(image.resize((crop_size, crop_size), Image.Resampling.BILINEAR, box=box))


# -------------------------------------------------------------------------------------------------
# Writing

JPEG = {"format": "JPEG", "quality": 95, "subsampling": "4:4:4"}
WRITE_FORMATS = {  # by suffix: Pillow's settings
    "png": {"format": "PNG", "compress_level": 3},  # of 0 to 9: files 5% larger than with 6, written twice as fast
    "jpg": JPEG,
    "jpeg": JPEG,
    "webp": {"format": "WEBP", "quality": 95},
}
LARGEST_SIDE = {"jpg": 65_500, "jpeg": 65_500, "webp": 16_383}  # in pixels, of the formats that have a limit
MAX_EXIF = 65_000  # bytes; a JPEG has no room for more
# Other entries describe how the file was laid out, or its thumbnail.
KEPT_EXIF = {ExifTags.Base[name] for name in (
    "ImageDescription", "Make", "Model", "Software", "DateTime", "Artist", "HostComputer", "Copyright", "Rating",
    "XPTitle", "XPComment", "XPAuthor", "XPKeywords", "XPSubject",
)}  # fmt: skip
# Entries of the camera that may be about another size or color space
DROPPED_EXIF = {ExifTags.Base.ExifImageWidth, ExifTags.Base.ExifImageHeight, ExifTags.IFD.Interop}


def metadata(image):
    """Return the EXIF, resolution and profile of an upright result in sRGB, as keywords of Pillow's `save`."""
    kept = {"icc_profile": srgb_profile()}
    with suppress(Exception):  # damaged EXIF raises many kinds; the image itself is intact
        dpi = image.info.get("dpi")
        if dpi and all(1 <= x <= 65_535 for x in dpi):
            kept["dpi"] = tuple(map(float, dpi))
        exif = _kept_exif(image.getexif(), kept.get("dpi"))
        if exif and len(exif.tobytes()) <= MAX_EXIF:
            kept["exif"] = exif.tobytes()
    return kept


def _kept_exif(exif, dpi):
    """Return the part of an image's EXIF that holds for the result, with its resolution, which WebP needs."""
    kept = Image.Exif()
    if dpi:
        kept[ExifTags.Base.XResolution], kept[ExifTags.Base.YResolution] = dpi
        kept[ExifTags.Base.ResolutionUnit] = 2  # inches
    kept.update({tag: exif[tag] for tag in KEPT_EXIF & exif.keys()})
    camera, place = exif.get_ifd(ExifTags.IFD.Exif), exif.get_ifd(ExifTags.IFD.GPSInfo)
    if camera:
        kept[ExifTags.IFD.Exif] = {tag: camera[tag] for tag in camera.keys() - DROPPED_EXIF}
        kept[ExifTags.IFD.Exif][ExifTags.Base.ColorSpace] = 1  # sRGB
    if place:
        kept[ExifTags.IFD.GPSInfo] = place
    return kept


def fits(image, format):
    """Return whether an image is small enough for a format, a key of WRITE_FORMATS."""
    return max(image.size) <= LARGEST_SIDE.get(format, math.inf)


def save(image, path):
    """Write an image with the metadata in its `info`.

    Args:
        image (Image): The image.
        path (str | Path): The file to write: .png, .jpg, .jpeg or .webp.

    Raises:
        UserError: If the suffix is a different one, the image too large for it, or the file cannot be written.
    """
    format = Path(path).suffix.lower().lstrip(".")
    if format not in WRITE_FORMATS:
        raise UserError(f"{path}: its suffix must be one of {', '.join(WRITE_FORMATS)}")
    if not fits(image, format):
        raise UserError(f"{path}: {image.width}x{image.height} pixels are too large for {format}; choose png")
    with atomic_path(path) as temporary:
        encode(image, temporary, format)


def encode(image, path, format):
    """Write an image that `fits`, like `save`, but directly to `path`: for the block of an `atomic_path`."""
    kept = {key: image.info[key] for key in ("icc_profile", "dpi", "exif") if key in image.info}
    image.save(path, **WRITE_FORMATS[format], **kept)
