"""Images in files: list them, read their size, and decode them upright, in sRGB, with transparency over white."""

import os
import re
import struct
import warnings
from contextlib import contextmanager, suppress
from functools import lru_cache
from io import BytesIO
from itertools import product

from support.cli import UserError, counted, note, note_some
from support.records import absolute, read_records

import numpy as np
from PIL import ExifTags, Image, ImageCms, PngImagePlugin, UnidentifiedImageError

Image.init()  # registers all formats of Pillow; the others follow, where their packages are installed
with suppress(ImportError):
    __import__("pillow_heif").register_heif_opener()
with suppress(ImportError):
    __import__("pillow_jxl")

IMAGE_SUFFIXES = ".jpg .jpeg .jpe .jfif .png .bmp .tif .tiff .webp .gif .pgm .ppm .pbm .pnm .avif .heic .heif"
IMAGE_SUFFIXES = tuple(f"{IMAGE_SUFFIXES} .jp2 .j2k .jpf .jpx".split())
COLORING = "coloring.json"  # marks a folder of test.py's results
HIDDEN = (".", "@eaDir", "#recycle", COLORING)  # beginnings of skipped names; two are thumbnails and trash on a NAS

# Pillow's other formats stay closed: EPS would start Ghostscript, and ICO and ICNS decode before their size is known.
FORMATS = {"JPEG", "PNG", "TIFF", "WEBP", "GIF", "BMP", "PPM", "JPEG2000", "AVIF", "HEIF", "JXL"}
PACKAGES = {  # that Pillow needs for some formats, by the first bytes of a file
    b"....ftyp(avif|avis)": "AVIF, which needs Pillow 11.3 or newer",
    b"....ftyp(hei.|hev.|mif1|msf1)": "HEIC, which needs the package pillow-heif",
    b"\xff\x0a|....JXL ": "JPEG XL, which needs the package pillow-jxl-plugin",
}
MAX_PIXELS = 200_000_000  # per image: 0.6 GB when decoded; larger ones are treated as decompression bombs
Image.MAX_IMAGE_PIXELS = None  # `open_image` checks, and raises an error instead of a warning
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 64 * 2**20  # bytes of a text or a color profile
warnings.filterwarnings("ignore", module=r"PIL\.")  # about harmless damage


class InvalidImageError(ValueError):
    """A file that cannot be read as an image. The message contains the path and the reason.

    `damaged` is True if the file is known to be damaged or not an image; otherwise another installation may read it.
    """

    def __init__(self, path, reason, damaged=False):
        super().__init__(f"{path}: {reason}")
        self.path, self.reason, self.damaged = path, reason, damaged

    def __reduce__(self):  # to be sent from a worker process
        return InvalidImageError, (self.path, self.reason, self.damaged)


# -------------------------------------------------------------------------------------------------
# Lists of images


def list_images(root):
    """Return the sorted paths of the images in the folder `root` and its subfolders; [root] if it is a file.

    Images are recognized by their suffix. Hidden files and folders are skipped silently. Folders that cannot be read,
    folders of results, further links to the same folder, and the number of other files are reported. Raises UserError
    when `root` does not exist or contains no images.
    """
    root = os.fspath(root)
    if os.path.isfile(root):
        return [root]
    if not os.path.isdir(root):
        raise UserError(f"{root}: no such file or folder")
    paths, visited, tops = [], set(), [root]
    for top in tops:  # the loop appends links to folders, so a folder's own path comes before links to it
        for folder, folders, files in os.walk(top, onerror=_note_unreadable):
            real, within = os.path.realpath(folder), os.path.join(folder, "")
            linked, results = real in visited, COLORING in files and folder != root
            if linked or results:
                reason = "a link to a folder that is visited anyway" if linked else f"results of test.py ({COLORING})"
                note(f"{folder}: skipped: {reason}")
                folders.clear()
                continue
            visited.add(real)
            folders[:] = sorted(filter(_is_visible, folders))
            tops += filter(os.path.islink, map(within.__add__, folders))
            paths += map(within.__add__, filter(_is_visible, files))
    images = sorted(path for path in paths if path.lower().endswith(IMAGE_SUFFIXES))
    if others := len(paths) - len(images):
        suffixes = sorted({os.path.splitext(path)[1].lower() for path in paths} - {*IMAGE_SUFFIXES})
        note(f"{root}: {counted(others, 'other file')} skipped ({' '.join(suffixes).strip()})")
    if not images:
        raise UserError(f"{root}: no images here ({' '.join(IMAGE_SUFFIXES)})")
    return images


def _note_unreadable(error):
    note(f"{error.filename}: skipped: {error.strerror.lower()}")


def _is_visible(name):
    return not name.startswith(HIDDEN)


def relative_path(path, root):
    """Return an image's path relative to `root`, with forward slashes; its name if `root` is the file itself."""
    return os.path.relpath(path, root if os.path.isdir(root) else os.path.dirname(root)).replace(os.sep, "/")


def named_images(*roots):
    """Return the images in `roots` as {name: path}, sorted by name. A name is the relative path without its suffix.

    With several folders and files, paths are relative to the folder that contains all of them. Where two images differ
    in their suffix only, the second keeps it (photo.png, photo.tif.png), as do the results of test.py.
    """
    try:
        top = os.path.commonpath(list(map(os.path.abspath, roots)))
    except ValueError as error:
        raise UserError(f"{' '.join(roots)}: on different drives; process one drive at a time") from error
    paths = {os.path.abspath(path): path for root in roots for path in list_images(root)}
    images = {}
    for name, path in sorted((relative_path(path, top), path) for path in paths.values()):
        stem = os.path.splitext(name)[0]
        images[name if stem in images else stem] = path
    return images


def pair_images(true_dir, colored_dir):
    """Pair the images of a folder with their results: by the results' records, by name where these do not help.

    Returns a list of (name, path of the original, path of the result), and what is left out and reported, {problem:
    names}. Raises UserError if there are no pairs.
    """
    true, colored = named_images(true_dir), named_images(colored_dir)
    originals = dict(zip(map(absolute, true.values()), true))
    sources = {result: record["source"]["path"] for result, record in read_records(colored_dir).items()}
    top = absolute(os.path.join(true_dir, ""))
    by_record, by_name = {}, {}  # the result of each original
    for name, path in colored.items():
        source = sources.get(relative_path(path, colored_dir), "")
        if source in originals:
            by_record[originals[source]] = name
        elif name in true and not source.startswith(top):  # another program's result, or the images were moved
            by_name[name] = name
    if by_name:
        note(f"{colored_dir}: {counted(len(by_name), 'image')} paired by name, without a record of the original")
    result_of = {**by_name, **by_record}
    pairs = [(name, true[name], colored[result]) for name, result in sorted(result_of.items())]
    if not pairs:
        raise UserError(f"{true_dir} and {colored_dir} have no image in common (same path, any suffix)")
    left_out = {"no colored image": {*true} - {*result_of}, "no true image": {*colored} - {*result_of.values()}}
    left_out = {problem: sorted(names) for problem, names in left_out.items() if names}
    for problem, names in left_out.items():
        note_some(problem, names)
    return pairs, left_out


# -------------------------------------------------------------------------------------------------
# Reading


def read_rgb(path):
    """Read an image as uint8 [H, W, 3]: upright (EXIF), in sRGB (ICC profile), with transparency over white.

    Raises InvalidImageError.
    """
    return np.asarray(open_rgb(path))


def open_rgb(path, least_side=None):
    """Read an image like `read_rgb`, as a Pillow image.

    With `least_side`, the JPEG decoder may shrink the image by 2, 4 or 8 as long as both sides keep at least that many
    pixels, which is faster than decoding all of them.
    """
    with open_image(path, least_side) as image:
        return to_rgb(image, path)


def image_size(path):
    """Return the (width, height) that `read_rgb` gives, from the file's header. Raises InvalidImageError."""
    with open_image(path) as image:
        return upright_size(image)


def has_more_frames(image):
    """Return whether an opened image has frames or pages after the first."""
    # MPO, as phones write it, has depth or brightness after the image.
    return getattr(image, "is_animated", False) and image.format != "MPO"


@contextmanager
def open_image(path, least_side=None):
    """Open an image without decoding it. Any error in the block is raised as an InvalidImageError."""
    if not os.path.isfile(path):
        raise InvalidImageError(path, "no such file, or not a regular one")
    image = None
    try:
        with Image.open(path, formats=sorted(FORMATS & Image.OPEN.keys())) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width}x{image.height} is over {MAX_PIXELS / 1e6:.0f} megapixels")
            if least_side:
                image.draft(None, (least_side, least_side))
            yield image
    except UnidentifiedImageError as error:
        raise InvalidImageError(path, *_why_unidentified(path)) from error
    except Exception as error:  # plugins raise OSError, ValueError, KeyError and others
        # Decoders report damage by an OSError without a number or by a SyntaxError; `to_rgb` raises ValueError.
        strerror = getattr(error, "strerror", None)
        damaged = image is not None and isinstance(error, (OSError, SyntaxError)) and not strerror
        reason = strerror.lower() if strerror else str(error) or type(error).__name__
        raise InvalidImageError(path, reason, damaged) from error


def _why_unidentified(path):
    """Return why Pillow does not open a file, and whether the file is known to be damaged."""
    with open(path, "rb") as file:
        head = file.read(32)
    for pattern, format in PACKAGES.items():
        if re.match(pattern, head, re.DOTALL):
            return format, False
    for format, (_, accept) in Image.OPEN.items():
        if accept and accept(head.ljust(32, b"\0")):  # the header may be damaged, or of a kind newer than Pillow
            return f"{format} of a kind that cannot be read, or damaged", False
    return "not an image" if head else "empty file", True


# -------------------------------------------------------------------------------------------------
# Orientation and samples

TURNS = ("FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_270", "TRANSVERSE", "ROTATE_90")
TURNS = dict(enumerate(map(Image.Transpose.__getitem__, TURNS), 2))  # by EXIF orientation, 2 to 8
TIFF_SAMPLES = {  # types that Pillow decodes correctly, by photometric interpretation
    0: {"uint1", "uint2", "uint4", "uint8", "uint16"},  # gray, 0 is white
    1: {"uint1", "uint2", "uint4", "uint8", "uint16", "float32"},  # gray, 0 is black
    2: {"uint8", "uint16"},  # RGB
    3: {"uint1", "uint2", "uint4", "uint8"},  # palette
    5: {"uint8", "uint16"},  # CMYK
    6: {"uint8"},  # YCbCr
    8: {"uint8"},  # Lab
}
SAMPLE_FORMATS = {1: "uint", 2: "int", 3: "float"}


def upright_size(image):
    """Return the (width, height) of an opened image after `to_rgb`."""
    # Recent versions of Pillow turn TIFFs, and swap their size when they are opened.
    swapped = image.format == "TIFF" and image.size != (image.tag_v2[256], image.tag_v2[257])
    turned = _from_exif(image, ExifTags.Base.Orientation) in (5, 6, 7, 8)
    return image.size[::-1] if turned and not swapped else image.size


def _from_exif(image, tag, ifd=None):
    """Return a value from EXIF; None if there is none or EXIF is damaged, because the image may be intact."""
    try:
        exif = image.getexif()
        return (exif.get_ifd(ifd) if ifd else exif).get(tag)
    except Exception:
        return None


def to_rgb(image, name="image"):
    """Convert an opened Pillow image to sRGB, upright, with transparency over white.

    An unusable color profile is reported with `name`; the image is then taken for sRGB.
    """
    if image.format == "TIFF":
        _check_tiff(image.tag_v2)
    image.load()
    rgb = _convert_colors(image, _convert_samples(image), name)
    turn = TURNS.get(_from_exif(image, ExifTags.Base.Orientation))
    return rgb if turn is None else rgb.transpose(turn)


def _check_tiff(tags):
    """Raise ValueError unless Pillow decodes a TIFF with these tags correctly, and to its full size."""
    if tags.get(254, 0) & 1:  # NewSubfileType: reduced
        raise ValueError("TIFF that begins with a thumbnail, like camera raw files: convert it to another format first")
    photometric, planar, compression = tags.get(262, 0), tags.get(284, 1), tags.get(259, 1)
    samples = product(tags.get(339, (1,)), tags.get(258, (1,)))
    kinds = {f"{SAMPLE_FORMATS.get(format, 'other')}{bits}" for format, bits in samples}
    stripes = (kinds, planar, compression) == ({"uint16"}, 2, 1)  # of which Pillow would make one picture
    if stripes or not kinds <= TIFF_SAMPLES.get(photometric, set()):
        kinds = f"{' '.join(sorted(kinds))} samples, photometric interpretation {photometric}"
        raise ValueError(f"TIFF with {kinds} and planar configuration {planar} is not supported")


def _convert_samples(image):
    """Convert a loaded image to RGB of 8 bits per sample, with transparency over white."""
    if image.mode[0] in "IF":  # 16 bits per sample, which Pillow widens to "I" for some formats, or floating point
        samples, most = np.asarray(image), 1 if image.mode == "F" else 65535
        if not ((samples >= 0) & (samples <= most)).all():  # NaN fails, too
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


SRGB_PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
# With a fixed date (bytes 24 to 35), so that equal images give equal files
SRGB_PROFILE = SRGB_PROFILE[:24] + struct.pack(">6H", 2000, 1, 1, 0, 0, 0) + SRGB_PROFILE[36:]


def _adobe_rgb_profile():
    """Return sRGB's profile with the primaries and the exponent of Adobe RGB (1998)."""
    profile = bytearray(SRGB_PROFILE)
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
    color_space = _from_exif(image, ExifTags.Base.ColorSpace, ExifTags.IFD.Exif)
    index = _from_exif(image, ExifTags.Interop.InteropIndex, ExifTags.IFD.Interop)
    adobe_rgb = (color_space, index) == (65535, "R03")
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
        note(f"{name}: unusable color profile, taken for sRGB ({error})")
        return rgb


@lru_cache(maxsize=16)
def _srgb_transform(profile, mode):
    """Return the transform from an ICC profile to sRGB; None if that changes no channel by more than 2 levels."""
    settings = (mode, "RGB", ImageCms.Intent.RELATIVE_COLORIMETRIC, 0x2000)  # black-point compensation
    transform = ImageCms.buildTransform(BytesIO(profile), BytesIO(SRGB_PROFILE), *settings)
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
