"""Images in files: found in folders, and read as what their photographer saw (upright, sRGB, alpha over white)."""

import os
import warnings
from collections import Counter
from contextlib import contextmanager, suppress
from functools import lru_cache
from io import BytesIO

from support.cli import UserError, note, note_some, one_line

import numpy as np
from PIL import ExifTags, Image, ImageCms, UnidentifiedImageError

with suppress(ImportError):  # HEIC, as telephones write it, where that package is installed
    import pillow_heif

    pillow_heif.register_heif_opener()

# -------------------------------------------------------------------------------------------------
# Found

IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif"),
    *(".pgm", ".ppm", ".pbm", ".pnm", ".avif", ".heic", ".heif"),
    *(".jp2", ".j2k", ".jpf", ".jpx"),
)
READ_BY = {".avif": "Pillow 11.3 or newer", ".heic": "pillow-heif", ".heif": "pillow-heif"}  # which may not be there
# Larger images are taken for decompression bombs. A 200-megapixel one needs 0.6 GB decoded.
MAX_PIXELS = 200_000_000
Image.MAX_IMAGE_PIXELS = None  # `open_rgb` checks, with an error instead of a warning
warnings.filterwarnings("ignore", module=r"PIL\.")  # about damage that does not hinder reading


class InvalidImageError(ValueError):
    """A file that cannot serve as an image. The message names the file and the reason."""

    def __init__(self, path, reason):
        super().__init__(f"{path}: {reason}")
        self.path, self.reason = path, reason

    def __reduce__(self):  # so that it survives the way back from a worker process
        return InvalidImageError, (self.path, self.reason)


def list_images(root):
    """Sorted paths of the images below `root`: nested folders, a flat folder, or one file.

    Images are known by their suffix. Hidden files and folders are passed over in silence; with a line each what else
    is left out: folders that cannot be read or hold test.py's results, links to a folder that is visited anyway, and
    all other files together. Raises UserError when `root` does not exist or holds no image.
    """
    root = os.fspath(root)
    if os.path.isfile(root):
        return [root]
    if not os.path.isdir(root):
        raise UserError(f"{root}: {'no file and no folder' if os.path.exists(root) else NOTHING_THERE}")
    paths, left_out, others = [], {}, Counter()
    folders, links, visited = [root], [], set()
    while folders or links:
        # Links last, so that what a folder is called does not depend on the links to it.
        folder = folders.pop() if folders else links.pop(0)
        try:
            status = os.stat(folder)
            with os.scandir(folder) as entries:
                found = list(entries)
        except OSError as error:
            if folder == root:
                raise UserError(f"{root}: cannot be read: {error.strerror.lower()}") from error
            left_out.setdefault(f"left out, {error.strerror.lower()}", []).append(folder)
            continue
        if (status.st_dev, status.st_ino) in visited:
            left_out.setdefault("passed over, a link to a folder that is visited anyway", []).append(folder)
            continue
        visited.add((status.st_dev, status.st_ino))
        if folder != root and any(entry.name == COLORING for entry in found):
            left_out.setdefault(f"passed over, results of test.py ({COLORING})", []).append(folder)
            continue
        for entry in found:
            if entry.name.startswith("."):
                continue
            kind = _kind(entry)
            if kind == FOLDER:
                (links if entry.is_symlink() else folders).append(entry.path)
            elif kind == FILE and entry.name.lower().endswith(IMAGE_SUFFIXES):
                paths.append(entry.path)
            elif entry.name != COLORING:
                others[kind or os.path.splitext(entry.name)[1].lower() or "without suffix"] += 1
        links.sort()
    for problem, names in left_out.items():
        note_some(problem, sorted(names))
    if others:
        kinds = ", ".join(f"{count} {one_line(kind)}" for kind, count in others.most_common(5))
        more = ", …" if len(others) > 5 else ""
        note(f"{root}: other files passed over: {kinds}{more}")
    if not paths:
        raise UserError(f"{root}: no images here ({' '.join(IMAGE_SUFFIXES)})")
    return sorted(paths)


FOLDER, FILE, SPECIAL = "folder", "", "pipe, socket or device"
NOTHING_THERE = "no such file or folder"


def _kind(entry):
    """What a directory's entry is, without looking at the file where the directory knows."""
    try:
        if entry.is_file():
            return FILE
        if entry.is_dir():
            return FOLDER
        return SPECIAL if os.path.exists(entry.path) else FILE
    except OSError:  # a link to itself, or into a folder that is closed
        return FILE  # so that reading it says what is wrong


def relative_path(path, root):
    """Of an image that `list_images(root)` found: its path below `root`, or its name if `root` is the file itself."""
    return os.path.relpath(path, root if os.path.isdir(root) else os.path.dirname(root))


def named_images(*roots):
    """The images below `roots` by their relative path without suffix, {name: path}, sorted.

    Of several folders and files the path is that from the folder which holds all of them. Where two differ in the
    suffix alone, the later one keeps it, as in test.py's results (photo.png, photo.tif.png).
    """
    top = roots[0]
    if len(roots) > 1:
        top = os.path.commonpath([os.path.dirname(os.path.abspath(root)) for root in roots])
    paths = {os.path.abspath(path): path for root in roots for path in list_images(root)}
    images = {}
    for path in sorted(paths.values()):
        name = relative_path(path, top)
        stem = os.path.splitext(name)[0]
        images[name if stem in images else stem] = path
    return images


COLORING = "coloring.json"  # beside colored images: what test.py made them with


def pair_images(true_dir, colored_dir):
    """Images of two folders that belong together, by the names of `named_images`.

    Returns a list of (name, path of the true image, path of the colored one) and what is left out, a dict from the
    problem to the names. Raises UserError when not one pair is left.
    """
    true, colored = named_images(true_dir), named_images(colored_dir)
    left_out = {
        "no colored image": [name for name in true if name not in colored],
        "no true image": [name for name in colored if name not in true],
    }
    pairs = [(name, true[name], colored[name]) for name in true if name in colored]
    if not pairs:
        raise UserError(f"{true_dir} and {colored_dir} have no image in common (same path but for the suffix)")
    return pairs, {problem: names for problem, names in left_out.items() if names}


# -------------------------------------------------------------------------------------------------
# Read


def read_rgb(path):
    """The image at `path` as uint8 [H, W, 3]: sRGB (ICC profile), upright (EXIF), alpha blended over white.

    Raises InvalidImageError, which names the file and the reason.
    """
    return np.asarray(open_rgb(path))


def image_size(path):
    """Width and height of the image at `path`, upright, from its header alone. Raises InvalidImageError."""
    with open_image(path) as image:
        return image.size[::-1] if _orientation(image) >= 5 else image.size


def has_more_frames(path):
    """Whether further frames or pages follow the one that is read. Raises InvalidImageError."""
    with open_image(path) as image:
        # What phones keep behind a photograph (MPO), a map of depth or brightness, is no other picture.
        return getattr(image, "is_animated", False) and image.format != "MPO"


def open_rgb(path, least_side=None):
    """Like `read_rgb`, as a Pillow image.

    `least_side`: the JPEG decoder may shrink the image by 2, 4 or 8 while both sides stay at least
    that long, which is faster than decoding all and resizing afterwards.
    """
    with open_image(path, least_side) as image:
        return to_rgb(image, path)


def _orientation(image):
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # whatever damaged EXIF leads to: the image itself may be whole
        return 1
    return orientation if orientation in TURNS else 1


@contextmanager
def open_image(path, least_side=None):
    """As a Pillow image whose samples are not read yet; whatever goes wrong in the block is an InvalidImageError."""
    try:
        with Image.open(path) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width}x{image.height} is over {MAX_PIXELS / 1e6:.0f} megapixels")
            if least_side:
                image.draft(None, (least_side, least_side))
            yield image
    except Exception as error:  # decoders meet bad bytes with whatever they like: OSError, IndexError, struct.error, …
        raise InvalidImageError(path, _reason(path, error)) from error


def _reason(path, error):
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    if isinstance(error, UnidentifiedImageError):
        suffix = os.path.splitext(path)[1].lower()
        if suffix in READ_BY and suffix not in Image.registered_extensions():
            return f"reading {suffix} needs {READ_BY[suffix]}"
        if os.path.getsize(path) == 0:
            return "empty file"
        with open(path, "rb") as file:
            tiff = file.read(4) in (b"II*\0", b"MM\0*")
        return "a TIFF of a kind that cannot be read" if tiff else "not an image, or damaged at its beginning"
    return (str(error).splitlines() or [type(error).__name__])[0]


TURNS = {  # from EXIF's orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def to_rgb(image, name="image"):
    """What Pillow opened as a Pillow image in sRGB, upright, alpha blended over white.

    A color profile that cannot be used costs a line with the image's name; it is then taken for sRGB.
    """
    image = _loaded(image)
    if turn := TURNS.get(_orientation(image)):
        image = image.transpose(turn)
    rgb = _to_rgb(image)
    if not (profile := image.info.get("icc_profile")):
        return rgb
    samples = image if image.mode == "CMYK" else rgb
    if profile[16:20] == b"GRAY" and image.mode[0] in "1LIF":
        samples = rgb.getchannel(0)
    try:
        transform = _to_srgb(profile, samples.mode)
        return ImageCms.applyTransform(samples, transform) if transform else rgb
    except ImageCms.PyCMSError as error:
        note(f"{name}: its color profile cannot be used, taken for sRGB ({str(error)})")
        return rgb


def _loaded(image):
    """The image with its samples read; also a JPEG that lacks nothing but its end marker, two bytes."""
    try:
        image.load()
        return image
    except OSError:
        # A progressive one could as well lack whole scans, and be coarse.
        if image.format not in ("JPEG", "MPO") or "progressive" in image.info or not image.filename:
            raise
        # Bytes that follow the last sample are skipped; were samples missing, they would be taken for such.
        with open(image.filename, "rb") as file:
            there = file.read()
        restarts = b"".join(b"\xff%c\x55\x55\x55" % marker for marker in range(0xD0, 0xD8))
        fillings = (b"\0" * 64, b"\x55" * 64, b"\xaa" * 64, restarts)
        candidates = [Image.open(BytesIO(there + filling + b"\xff\xd9")) for filling in fillings]
        for candidate in candidates:
            candidate.draft(None, image.size)
        if there.endswith(b"\xff") or len({candidate.tobytes() for candidate in candidates}) > 1:
            raise
        return candidates[0]


def _to_rgb(image):
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):  # 16 bits a sample, which Pillow widens to "I" for some formats
        samples = np.asarray(image).astype(np.int64)
        return Image.fromarray(((samples.clip(0, 65535) + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        samples = np.asarray(image)
        if not (samples.min() >= 0 and samples.max() <= 1):  # also true of NaN
            raise ValueError("floating-point samples outside [0, 1]")
        return Image.fromarray((255 * samples).round().astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _srgb_profile():
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    profile[24:36] = b"\x07\xd0\0\1\0\1" + bytes(6)  # its date, else the current one: the same image, the same file
    return bytes(profile)


SRGB_PROFILE = _srgb_profile()


@lru_cache(maxsize=16)
def _to_srgb(profile, mode):
    """The transform of samples of that mode to sRGB from an ICC profile; None if that is sRGB itself, to 2 levels."""
    transform = ImageCms.buildTransform(
        *map(BytesIO, (profile, SRGB_PROFILE)),
        *(mode, "RGB"),
        ImageCms.Intent.RELATIVE_COLORIMETRIC,
        ImageCms.Flags.BLACKPOINTCOMPENSATION,
    )
    levels = np.arange(0, 256, 15, dtype=np.uint8)
    swatches = Image.fromarray(np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(1, -1, 3)).convert(mode)
    change = np.int16(ImageCms.applyTransform(swatches, transform)) - np.int16(swatches.convert("RGB"))
    return transform if np.abs(change).max() > 2 else None


def crop_resized(image, load_size, crop_size, across=0.5, down=0.5):
    """A `crop_size` square of the image after its short side was resized to `load_size` pixels.

    `across` and `down`, in [0, 1], place the square; 0.5 is the center. Resizing and cropping are
    one step, so that only the square is computed. Pillow image -> uint8 [crop_size, crop_size, 3].
    """
    side = crop_size * min(image.size) / load_size  # of the square, in the image's own pixels
    left, top = across * (image.width - side), down * (image.height - side)
    box = (left, top, left + side, top + side)
    return np.asarray(image.resize((crop_size, crop_size), Image.Resampling.BILINEAR, box=box))
