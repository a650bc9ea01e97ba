"""From files to targets: finding and reading images, Lab conversion, soft-encoding of ab, datasets.

The functions on colors take and return Paddle tensors, a batch at a time, on whatever device they
are. The datasets run in the worker processes of a `DataLoader`: they only decode, resize and crop
(Pillow, NumPy) and hand on uint8.
"""

import os
import sys
import warnings
from collections import Counter
from contextlib import contextmanager, suppress
from functools import cache, lru_cache
from io import BytesIO

from support.cli import UserError, note, note_some, one_line, printable

import numpy as np
import paddle
from paddle.io import DistributedBatchSampler
from PIL import ExifTags, Image, ImageCms, UnidentifiedImageError

with suppress(ImportError):  # HEIC, as telephones write it, where that package is installed
    import pillow_heif

    pillow_heif.register_heif_opener()

# -------------------------------------------------------------------------------------------------
# Files

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
        super().__init__(f"{printable(path)}: {reason}")
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
        raise UserError(f"{printable(root)}: {'no file and no folder' if os.path.exists(root) else NOTHING_THERE}")
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
                raise UserError(f"{printable(root)}: cannot be read: {error.strerror.lower()}") from error
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
        note(f"{printable(root)}: other files passed over: {kinds}{more}")
    if not paths:
        raise UserError(f"{printable(root)}: no images here ({' '.join(IMAGE_SUFFIXES)})")
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
        raise UserError(
            f"{printable(true_dir)} and {printable(colored_dir)} have no image in common (same path but for the suffix)"
        )
    return pairs, {problem: names for problem, names in left_out.items() if names}


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
        note(f"{printable(name)}: its color profile cannot be used, taken for sRGB ({one_line(str(error))})")
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


# -------------------------------------------------------------------------------------------------
# Color: sRGB (IEC 61966-2-1) and CIE Lab, D65 white, 2 degree observer

RGB_TO_XYZ = ((0.412453, 0.357580, 0.180423), (0.212671, 0.715160, 0.072169), (0.019334, 0.119193, 0.950227))
XYZ_TO_RGB = tuple(map(tuple, np.linalg.inv(RGB_TO_XYZ).tolist()))
WHITE = (0.95047, 1.0, 1.08883)
DELTA = 6 / 29  # where the cube root of CIE Lab turns linear


def rgb_to_lab(rgb):
    """[N, 3, H, W], uint8 or float in [0, 1] -> float32 [N, 3, H, W]: L in [0, 100], a and b within [-110, 110]."""
    xyz = _mix(RGB_TO_XYZ, _linear(rgb))
    fx, fy, fz = (_lab_curve(channel / white) for channel, white in zip(xyz, WHITE))
    return paddle.stack([116 * fy - 16, 500 * (fx - fy), 200 * (fy - fz)], axis=1)


def rgb_to_lightness(rgb):
    """The L of `rgb_to_lab` alone, at a third of the cost: [N, 3, H, W] -> float32 [N, 1, H, W]."""
    (y,) = _mix(RGB_TO_XYZ[1:2], _linear(rgb))
    return (116 * _lab_curve(y) - 16).unsqueeze(1)


def lab_to_rgb(lab):
    """float32 [N, 3, H, W] Lab -> float32 [N, 3, H, W] sRGB in [0, 1]; out-of-gamut values are clipped."""
    return _transfer(_lab_to_linear(lab))


def to_uint8(rgb):
    """float in [0, 1] -> uint8, rounded."""
    return (rgb * 255 + 0.5).astype("uint8")


def photograph_lightness(rgb):
    """`rgb_to_lightness` of one photograph: uint8 array [H, W, 3] -> float32 tensor [1, 1, H, W].

    NumPy looks tables up in a tenth of the time that Paddle takes on the CPU.
    """
    table = _linear_table().numpy()
    y = sum(np.float32(share) * table.take(rgb[..., channel]) for channel, share in enumerate(RGB_TO_XYZ[1]))
    return (116 * _lab_curve(paddle.to_tensor(y)) - 16).unsqueeze([0, 1])


def lab_to_photograph(lab):
    """`to_uint8(lab_to_rgb(lab))` of one photograph, likewise: [1, 3, H, W] -> uint8 array [H, W, 3].

    The table has so many steps that one sample in a hundred comes out one higher or lower.
    """
    steps = (_lab_to_linear(lab) * (2**16 - 1) + 0.5).astype("int32")
    return _srgb_table().take(steps[0].transpose([1, 2, 0]).numpy())


def _lab_to_linear(lab):
    """Lab -> linear RGB [N, 3, H, W], clipped to [0, 1]."""
    lightness, a, b = lab.unbind(axis=1)
    fy = (lightness + 16) / 116
    f = (fy + a / 500, fy, fy - b / 200)
    xyz = [white * _inverse_lab_curve(channel) for channel, white in zip(f, WHITE)]
    return paddle.stack(_mix(XYZ_TO_RGB, xyz), axis=1).clip(0, 1)


def _transfer(rgb):
    root = paddle.exp(paddle.log(rgb.clip(min=0.0031308)) / 2.4)
    return paddle.where(rgb > 0.0031308, 1.055 * root - 0.055, 12.92 * rgb)


@cache
def _srgb_table():
    """Linear light in 2^16 steps -> sRGB, uint8."""
    return to_uint8(_transfer(paddle.arange(2**16, dtype="float32") / (2**16 - 1))).numpy()


def _linear(rgb):
    """The three channels [N, H, W] with the sRGB transfer curve undone."""
    if rgb.dtype == paddle.uint8:
        linear = paddle.gather(_linear_table(), rgb.flatten().astype("int32")).reshape(rgb.shape)
    else:
        linear = _undo_transfer(rgb.astype("float32"))
    return linear.unbind(axis=1)


def _undo_transfer(rgb):
    return paddle.where(rgb > 0.04045, ((rgb + 0.055) / 1.055) ** 2.4, rgb / 12.92)


@cache
def _linear_table():
    return _undo_transfer(paddle.arange(256, dtype="float32") / 255)


def _mix(matrix, channels):
    # Written out, because a matrix product may run in TF32 on a GPU: three digits are not enough here.
    return [m0 * channels[0] + m1 * channels[1] + m2 * channels[2] for m0, m1, m2 in matrix]


def _lab_curve(t):
    # The cube root, and below DELTA^3 its tangent there: the sum of both, each clipped to where it holds, because
    # `where` takes longer. exp(log(t) / 3), because Paddle's `pow` takes four times as long on the CPU.
    root = paddle.exp(paddle.log(t.clip(min=DELTA**3)) / 3)
    return root + (t.clip(max=DELTA**3) - DELTA**3) / (3 * DELTA**2)


def _inverse_lab_curve(f):
    above = f.clip(min=DELTA)
    return (above * above * above + (3 * DELTA**2) * (f.clip(max=DELTA) - DELTA)).clip(min=0)


def targets(rgb):
    """uint8 [N, 3, H, W] -> lightness [N, 1, H, W] and the ab to predict [N, 2, H/4, W/4].

    ab at a quarter of the resolution is every 4th pixel, as in the authors' graph.
    """
    return rgb_to_lightness(rgb), rgb_to_lab(rgb[:, :, ::4, ::4])[:, 1:]


# -------------------------------------------------------------------------------------------------
# Soft-encoding of ab (Section 2.2 of the paper)

AB_LIMIT = 128  # `soft_encode` is exact for |a|, |b| up to here; sRGB stays within 110
CELL_SIDE = 2  # of the cells of the look-up grid, in ab units


def soft_encode(ab, ab_bins, neighbors=5, sigma=5.0):
    """Each color as a distribution over its nearest bins, weighted by a Gaussian of the distance.

    ab [N, 2, h, w], ab_bins [Q, 2] -> indices int64 [N, neighbors, h, w] of bins, nearest first, and
    weights float32 [N, neighbors, h, w], proportional to exp(-d^2 / 2 sigma^2), which sum to 1.

    The neighbors are exact. A color looks up the few bins that can be among the nearest of its cell
    of the ab plane, and only those are compared.
    """
    bin_table, a_table, b_table = _candidate_tables(ab_bins, neighbors)
    a, b = (x.reshape([-1, 1]) for x in ab.unbind(axis=1))  #                                [M, 1]
    row, column = (((x + AB_LIMIT) / CELL_SIDE).floor().clip(0, _cells() - 1).astype("int32") for x in (a, b))
    cell = (row * _cells() + column).flatten()  #                                               [M]
    offset_a, offset_b = paddle.gather(a_table, cell) - a, paddle.gather(b_table, cell) - b
    squared = offset_a * offset_a + offset_b * offset_b  #                                   [M, K]
    squared, order = paddle.topk(squared, neighbors, axis=1, largest=False)
    indices = paddle.take_along_axis(paddle.gather(bin_table, cell), order, axis=1)
    # Relative to the nearest: far from every bin all exponentials would underflow to 0 / 0.
    weights = paddle.exp((squared[:, :1] - squared) / (2 * sigma**2))
    weights = weights / weights.sum(axis=1, keepdim=True)

    def to_map(x):
        return x.reshape([ab.shape[0], *ab.shape[2:], neighbors]).transpose([0, 3, 1, 2])

    return to_map(indices), to_map(weights)


def _cells():
    return 2 * AB_LIMIT // CELL_SIDE


@lru_cache(maxsize=8)  # by the identity of the tensor `ab_bins`: load it once
def _candidate_tables(ab_bins, neighbors):
    """For every cell the bins that are among the nearest of some color in it.

    Their numbers, int64 [cells, K], and their coordinates a and b, float32 [cells, K].

    A bin is one if its distance from the cell's nearest point is at most the `neighbors`-th smallest of the bins'
    distances from the cell's farthest points. Rows are filled up with bins at infinity.
    """
    bins = ab_bins.numpy().astype(np.float64)
    if not 1 <= neighbors <= len(bins):
        raise UserError(f"the number of neighbors must be from 1 to {len(bins)}, not {neighbors}")
    centers = np.arange(_cells()) * CELL_SIDE + CELL_SIDE / 2 - AB_LIMIT
    a_offset = np.abs(centers[:, None] - bins[:, 0])[:, None, :]  #                  [cells, 1, Q]
    b_offset = np.abs(centers[:, None] - bins[:, 1])[None, :, :]  #                  [1, cells, Q]
    half = CELL_SIDE / 2
    nearest = np.hypot((a_offset - half).clip(0), (b_offset - half).clip(0)).reshape(-1, len(bins))
    farthest = np.hypot(a_offset + half, b_offset + half).reshape(-1, len(bins))
    bound = np.partition(farthest, neighbors - 1, axis=1)[:, neighbors - 1 : neighbors]
    possible = nearest <= bound + 1e-3  # the margin covers float32's rounding of the distances
    width = possible.sum(axis=1).max()
    indices = np.argsort(~possible, axis=1, kind="stable")[:, :width]  # the possible ones first
    coordinates = bins[indices].astype(np.float32)
    coordinates[~np.take_along_axis(possible, indices, axis=1)] = 1e9
    return tuple(map(paddle.to_tensor, (indices, coordinates[..., 0], coordinates[..., 1])))


# -------------------------------------------------------------------------------------------------
# Datasets

MAX_REPLACEMENTS = 8


class ColorizationDataset(paddle.io.Dataset):
    """Squares of photographs for the network to color.

    In training (`augment`) the square is a random one, mirrored half of the time; otherwise the
    center. What is drawn depends on `seed`, `epoch` and the index alone, not on the worker, the process or
    what came before, so that a resumed run, or one spread over more processes, sees the same.

    An item is (uint8 [3, crop_size, crop_size], int64 broken). A file that cannot be read costs a line on
    standard error and another image takes its place; `broken` counts the files that failed.
    """

    def __init__(self, paths, load_size, crop_size, augment=False, seed=0):
        super().__init__()
        # One string of bytes: a worker process that touches a list of a million strings copies it all.
        encoded = [os.fsencode(path) for path in paths]
        self.paths, self.ends = b"".join(encoded), np.cumsum([len(path) for path in encoded])
        self.load_size, self.crop_size = load_size, crop_size
        self.augment, self.seed, self.epoch = augment, seed, 0

    def __len__(self):
        return len(self.ends)

    def path(self, index):
        return os.fsdecode(self.paths[self.ends[index - 1] if index else 0 : self.ends[index]])

    def __getitem__(self, index):
        random = np.random.default_rng((self.seed, self.epoch, index))
        broken = 0
        while True:
            try:
                return self._square(self.path(index), random), np.int64(broken)
            except InvalidImageError as error:
                print(f"skipped {error}", file=sys.stderr, flush=True)
            broken += 1
            if broken > MAX_REPLACEMENTS:  # a gray image: it teaches nothing (its weight is 0)
                return np.full((3, self.crop_size, self.crop_size), 128, np.uint8), np.int64(broken)
            index = int(random.integers(len(self)))

    def _square(self, path, random):
        image = open_rgb(path, least_side=self.load_size)
        if not self.augment:
            return crop_resized(image, self.load_size, self.crop_size).transpose(2, 0, 1)
        across, down, mirror = random.random(3)
        square = crop_resized(image, self.load_size, self.crop_size, across, down)
        return (square[:, ::-1] if mirror < 0.5 else square).transpose(2, 0, 1)


class ClassificationDataset(paddle.io.Dataset):
    """Center squares of images for a classifier.

    An item is (uint8 [3, crop_size, crop_size], whether the file could be read).
    """

    def __init__(self, paths, load_size, crop_size):
        super().__init__()
        self.paths, self.load_size, self.crop_size = paths, load_size, crop_size

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        try:
            image = open_rgb(self.paths[index], least_side=self.load_size)
        except InvalidImageError as error:
            note(f"skipped {error}")
            return np.zeros((3, self.crop_size, self.crop_size), np.uint8), False
        return crop_resized(image, self.load_size, self.crop_size).transpose(2, 0, 1), True


class EpochSampler(DistributedBatchSampler):
    """Random batches of the whole set, shared out among the processes, from anywhere in any epoch.

    The order follows from seed and epoch alone, whatever the number of processes: each takes its part of every
    batch. (Paddle's own order depends on their number, as it fills the set up to a multiple of it beforehand.)
    """

    def begin(self, seed, epoch, skip):
        self.seed, self.epoch, self.skip = seed, epoch, skip

    def __iter__(self):
        order = np.random.default_rng((self.seed, self.epoch)).permutation(len(self.dataset))
        for batch in range(self.skip, len(self)):
            start = (batch * self.nranks + self.local_rank) * self.batch_size
            yield order[start : start + self.batch_size].tolist()

    def __len__(self):
        """Batches in an epoch; the few images that do not fill one wait for the next epoch."""
        return len(self.dataset) // (self.batch_size * self.nranks)
