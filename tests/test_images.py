"""Reading image files of cameras, scanners and phones, their orientation and colors, and writing results."""

import os
import pickle
import struct
import sys
import warnings
import zlib
from contextlib import suppress

from support.cli import run_script
from support.images import InvalidImageError, crop_resized, open_rgb, read_image, read_rgb, save, srgb_profile

import numpy as np
import pytest
import tifffile
from conftest import exif, png_bomb, save_image
from PIL import ExifTags, Image, PngImagePlugin, features
from skimage import data

COFFEE = data.coffee()[::8, ::8]  # uint8 [50, 75, 3]

# Samples


@pytest.mark.parametrize("suffix", ["png", "tiff", "pgm"])
def test_16_bit_gray_keeps_its_range(tmp_path, suffix):
    levels = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257
    rgb = read_rgb(save_image(tmp_path / f"a.{suffix}", levels))
    assert np.array_equal(rgb, np.stack([np.arange(256).reshape(16, 16)] * 3, axis=2))


def test_alpha_is_blended_over_white(tmp_path):
    rgba = np.dstack([COFFEE, np.full(COFFEE.shape[:2], 255, np.uint8)])
    rgba[:20, :, 3], rgba[20:30, :, 3] = 0, 51
    rgb = read_rgb(save_image(tmp_path / "a.png", rgba))
    assert (rgb[:20] == 255).all() and np.array_equal(rgb[30:], COFFEE[30:])
    assert np.abs(rgb[20:30].astype(float) - (0.2 * COFFEE[20:30] + 0.8 * 255)).max() <= 1


def test_image_whose_alpha_is_0_everywhere_is_opaque(tmp_path):
    rgba = np.dstack([COFFEE, np.zeros(COFFEE.shape[:2], np.uint8)])
    assert np.array_equal(read_rgb(save_image(tmp_path / "a.png", rgba)), COFFEE)


TIFFS = {  # samples and options of tifffile
    "min-is-white 16": (np.uint16(65535 - 257 * np.uint16(COFFEE[..., 1])), {"photometric": "miniswhite"}),
    "float": (np.float32(COFFEE[..., 1] / 255), {"photometric": "minisblack"}),
    "rgb 16": (np.uint16(COFFEE) * 257, {"photometric": "rgb"}),
    "planes 16": (np.uint16(COFFEE.transpose(2, 0, 1)) * 257, {
        "photometric": "rgb", "planarconfig": "separate", "compression": "zlib"}),
    "cmyk 8": (np.dstack((255 - COFFEE, 0 * COFFEE[..., 0])), {"photometric": "separated"}),
}  # fmt: skip


REFUSED_TIFFS = {
    "raw planes": (np.uint16(COFFEE.transpose(2, 0, 1)) * 257, {"photometric": "rgb", "planarconfig": "separate"}),
    "int16": (np.int16(COFFEE[..., 1]) * 128, {}),
    "uint32": (np.uint32(COFFEE[..., 1]), {}),
    "float min-is-white": (np.float32(COFFEE[..., 1] / 255), {"photometric": "miniswhite"}),
    "float to 255": (np.float32(COFFEE[..., 1]), {}),
    "thumbnail": (COFFEE, {"subfiletype": 1}),
    "uncompressed ycbcr": (COFFEE, {"photometric": "ycbcr"}),
}


@pytest.mark.parametrize("kind", TIFFS)
def test_supported_tiff_is_read(tmp_path, kind):
    samples, options = TIFFS[kind]
    tifffile.imwrite(tmp_path / "a.tif", samples, **options)
    expected = COFFEE if len(samples.shape) == 3 else np.repeat(COFFEE[..., 1:2], 3, axis=2)
    assert np.abs(read_rgb(tmp_path / "a.tif").astype(int) - expected).max() <= 1


@pytest.mark.parametrize("kind", REFUSED_TIFFS)
def test_tiff_that_would_be_misread_is_refused_by_its_format(tmp_path, kind):
    samples, options = REFUSED_TIFFS[kind]
    tifffile.imwrite(tmp_path / "a.tif", samples, **options)
    with pytest.raises(InvalidImageError, match="unsupported TIFF|thumbnail|outside"):
        read_rgb(tmp_path / "a.tif")


@pytest.mark.parametrize("suffix", ["jpg", "tif"])
def test_image_of_any_orientation_is_read_upright(tmp_path, suffix):
    """Recent versions of Pillow turn TIFFs themselves."""
    stored = data.coffee()[:64:2, ::8]  # 75 x 32
    upright = [stored, stored[:, ::-1], stored[::-1, ::-1], stored[::-1], stored.transpose(1, 0, 2)]
    upright += [np.rot90(stored, -1), upright[4][::-1, ::-1], np.rot90(stored)]
    for orientation, expected in enumerate(upright, 1):
        metadata = Image.Exif()
        metadata[ExifTags.Base.Orientation] = orientation
        path = save_image(tmp_path / f"a.{suffix}", stored, exif=metadata, quality=98)
        assert np.abs(read_rgb(path) - expected.astype(float)).mean() < 5


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


@pytest.mark.parametrize(("transfer", "hdr"), [(13, False), (16, True), (18, True)])
@pytest.mark.parametrize("suffix", ["png", "avif", "heic"])
def test_hdr_image_is_refused(tmp_path, suffix, transfer, hdr):
    """Transfer functions of ITU-T H.273: 13 is sRGB, 16 PQ and 18 HLG."""
    if suffix == "heic":
        pytest.importorskip("pillow_heif").register_heif_opener()
    elif suffix == "avif" and not features.check("avif"):
        pytest.skip("Pillow reads AVIF from 11.3 on")
    path = save_image(tmp_path / f"a.{suffix}", COFFEE)
    content = path.read_bytes()
    if suffix == "png":
        content = content[:33] + chunk(b"cICP", bytes([9, transfer, 0, 1])) + content[33:]
    else:
        at = content.index(b"colrnclx") + 10
        content = content[:at] + struct.pack(">H", transfer) + content[at + 2 :]
    path.write_bytes(content)
    if hdr:
        with pytest.raises(InvalidImageError, match=r"HDR \(PQ or HLG\)"):
            read_rgb(path)
    else:
        assert read_rgb(path).shape == COFFEE.shape


# Unreadable files


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty file"),
        (b"hello", "not an image in a readable format"),
        (b"\x89PNG\r\n", "not an image in a readable format"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer instead of the image"),
        (b"\n<!DOCTYPE HTML PUBLIC>", "HTML page instead of the image"),
        (b"\0\0\0\x18ftypheic" + bytes(12), "HEIC, which needs the package pillow-heif"),
        (b"\0\0\0\x1cftypavif" + bytes(12), "AVIF, which needs Pillow 11.3"),
        (b"\xff\x0a\xfa\x1f" + bytes(12), "JPEG XL, which needs the package pillow-jxl-plugin"),
        (png_bomb(), r"Image size \(2500000000 pixels\) exceeds limit of 178956970 pixels"),
        (None, "no such file"),
    ],
)
def test_error_of_an_unreadable_file_has_its_path_and_the_reason(tmp_path, monkeypatch, content, reason):
    monkeypatch.setattr("support.images.READ_FORMATS", {"JPEG", "PNG"})  # as without the optional packages
    path = tmp_path / "a.jpg"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InvalidImageError, match=reason) as error:
        read_rgb(path)
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)
    assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value)


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp", "gif", "bmp", "ppm", "jp2", "avif"])
def test_intact_image_of_any_mode_is_read_and_a_damaged_one_read_or_refused(tmp_path, suffix):
    path, random = tmp_path / f"a.{suffix}", np.random.default_rng(0)
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"):
        try:
            Image.fromarray(COFFEE).convert(mode).save(path)
        except (OSError, ValueError, KeyError):
            continue  # the format does not have the mode
        assert read_rgb(path).shape == COFFEE.shape
        whole = path.read_bytes()
        for count in range(8):
            content = bytearray(whole)
            for at in random.integers(len(whole), size=count):
                content[at] = random.integers(256)
            path.write_bytes(content[: random.integers(len(whole))])
            with suppress(InvalidImageError):
                read_rgb(path)


def test_lack_of_memory_is_named(tmp_path, monkeypatch):
    def load(image):
        raise MemoryError

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", load)
    with pytest.raises(InvalidImageError, match="a.png: not enough memory"):
        read_rgb(save_image(tmp_path / "a.png", COFFEE))


def test_script_reads_large_color_profiles_and_prints_no_warnings(tmp_path, monkeypatch, handlers):
    """Unlike the library, which leaves Pillow's settings as they are."""
    for name, value in {"MAX_TEXT_CHUNK": 2**20, "MAX_TEXT_MEMORY": 2**26}.items():
        monkeypatch.setattr(PngImagePlugin, name, value)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", COFFEE[..., 0].size - 1)  # it warns up to twice as many
    profile = struct.pack(">I", 2_000_000) + P3[4:].ljust(1_999_996, b"\0")
    path = save_image(tmp_path / "a.png", COFFEE, icc_profile=profile)
    with pytest.raises(InvalidImageError, match="MAX_TEXT_CHUNK"):
        read_rgb(path)
    with pytest.warns(Image.DecompressionBombWarning):
        read_rgb(save_image(tmp_path / "b.png", COFFEE))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert run_script(lambda _: read_rgb(path).shape, lambda: None) == COFFEE.shape
    assert not caught


def test_heic_is_read_where_its_package_is_installed(tmp_path, monkeypatch):
    heif = pytest.importorskip("pillow_heif")
    heif.from_pillow(Image.fromarray(COFFEE)).save(tmp_path / "a.jpg")
    monkeypatch.delitem(Image.OPEN, "HEIF", raising=False)
    monkeypatch.delitem(sys.modules, "pillow_heif.HeifImagePlugin", raising=False)
    assert read_rgb(tmp_path / "a.jpg").shape == COFFEE.shape


def test_pipe_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "a.jpg")
    with pytest.raises(InvalidImageError, match="not a regular"):
        read_rgb(tmp_path / "a.jpg")


@pytest.mark.parametrize("format", ["EPS", "ICO"])
def test_other_formats_of_pillow_are_not_opened(tmp_path, format):
    Image.fromarray(COFFEE).save(tmp_path / "a.jpg", format)
    with pytest.raises(InvalidImageError, match="not an image in a readable format"):
        read_rgb(tmp_path / "a.jpg")


# Color profiles


def with_colorants(red, green, blue):
    """Return the profile of a space with sRGB's curve and other primaries: their XYZ, relative to D50."""
    profile = bytearray(srgb_profile())
    for tag, xyz in ((b"rXYZ", red), (b"gXYZ", green), (b"bXYZ", blue)):
        (offset,) = struct.unpack_from(">I", profile, profile.index(tag) + 4)
        struct.pack_into(">3i", profile, offset + 8, *(round(65536 * value) for value in xyz))
    return bytes(profile)


def gray_profile(gamma=1.8):
    """Return a minimal profile of gray images (ICC.1:2001)."""
    curve = b"curv" + struct.pack(">4xIH2x", 1, round(256 * gamma))
    header = struct.pack(">I4sI4s4s4s12x4s", 144 + len(curve), b"none", 0x02100000, b"mntr", b"GRAY", b"XYZ ", b"acsp")
    return header.ljust(128, b"\0") + struct.pack(">I4s2I", 1, b"kTRC", 144, 14) + curve


P3 = with_colorants((0.51512, 0.24120, -0.00105), (0.29198, 0.69225, 0.04189), (0.15710, 0.06657, 0.78407))
P3_TO_SRGB = ((1.2249, -0.2247, 0), (-0.0420, 1.0419, 0), (-0.0197, -0.0786, 1.0979))  # linear, white D65
ADOBE_RGB_TO_SRGB = ((1.3984, -0.3984, 0), (0, 1, 0), (0, -0.0429, 1.0429))
STORED = np.random.default_rng(0).integers(50, 256, (40, 40, 3)).astype(np.uint8)  # near 0, 8 bits are coarse


def from_linear(linear):
    """Convert linear RGB to sRGB: [...] -> [...], from 0 to 255."""
    linear = np.clip(linear, 0, 1)
    return 255 * np.where(linear > 0.0031308, 1.055 * linear ** (1 / 2.4) - 0.055, 12.92 * linear)


def test_image_with_a_color_profile_is_converted_to_srgb(tmp_path):
    x = STORED / 255
    true = from_linear(np.where(x > 0.04045, ((x + 0.055) / 1.055) ** 2.4, x / 12.92) @ np.transpose(P3_TO_SRGB))
    found = read_rgb(save_image(tmp_path / "a.png", STORED, icc_profile=P3))
    assert np.abs(found - true).max() < 2 and np.abs(STORED - true).mean() > 5


def test_srgb_profiles_change_no_pixel(tmp_path):
    """Those of other programs have slightly different numbers."""
    rounded = with_colorants((0.4363, 0.2225, 0.0139), (0.3849, 0.7169, 0.0971), (0.1431, 0.0606, 0.7141))
    colors = np.indices((18, 18, 18), np.uint8).reshape(3, -1, 18).transpose(1, 2, 0) * 15
    for profile in (srgb_profile(), rounded):
        assert np.array_equal(read_rgb(save_image(tmp_path / "a.png", colors, icc_profile=profile)), colors)


def test_gray_image_with_a_gray_profile_is_converted(tmp_path):
    ramp = np.tile(np.arange(256, dtype=np.uint8), (4, 1))
    true = from_linear((ramp / 255) ** 1.8)
    for name, levels in (("gray.png", ramp), ("gray16.tif", ramp.astype(np.uint16) * 257)):
        found = read_rgb(save_image(tmp_path / name, levels, icc_profile=gray_profile()))
        assert np.ptp(found, axis=2).max() == 0
        assert np.abs(found[..., 0] - true)[:, 16:].max() < 1.5


@pytest.mark.parametrize(("mode", "profile"), [("RGB", b"x"), ("RGB", gray_profile()), ("CMYK", P3)])
def test_unusable_color_profile_warns_and_keeps_image(tmp_path, capsys, mode, profile):
    path = tmp_path / "photo.tif"
    Image.fromarray(COFFEE).convert(mode).save(path, icc_profile=profile)
    assert np.array_equal(read_rgb(path), COFFEE)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{path}: unusable color profile")


@pytest.mark.parametrize(("index", "adobe"), [("R03", True), ("R98", False)])
def test_adobe_rgb_that_only_exif_declares_is_converted(tmp_path, index, adobe):
    metadata = Image.Exif()
    metadata[ExifTags.IFD.Exif] = {ExifTags.Base.ColorSpace: 65535, ExifTags.IFD.Interop: {1: index}}
    true = from_linear((STORED / 255) ** (563 / 256) @ np.transpose(ADOBE_RGB_TO_SRGB)) if adobe else STORED
    assert np.abs(read_rgb(save_image(tmp_path / "a.png", STORED, exif=metadata)) - true).max() < 2


# Square crops


def test_crop_resized_equals_resizing_the_shorter_side_and_cropping():
    image = Image.fromarray(data.coffee())  # 600 x 400
    whole = np.asarray(image.resize((96, 64), Image.Resampling.BILINEAR)).astype(int)
    for across, left in ((0, 0), (0.5, 24), (1, 48)):
        crop = crop_resized(image, 64, 48, across=across, down=0.5).astype(int)
        assert crop.shape == (48, 48, 3)
        # One step differs from two by rounding, and at the border, where the filter has no neighbors.
        assert np.abs(crop - whole[8:56, left : left + 48])[1:-1, 1:-1].max() <= 1


def test_downscaling_by_the_jpeg_decoder_changes_little(tmp_path):
    path = save_image(tmp_path / "a.jpg", data.astronaut(), quality=95)  # 512 x 512
    shrunk = open_rgb(path, least_side=200)
    assert shrunk.size == (256, 256)
    difference = crop_resized(shrunk, 200, 176).astype(int) - crop_resized(open_rgb(path), 200, 176)
    assert np.abs(difference).mean() < 2


# Writing


@pytest.mark.parametrize(("format", "opened"), [("png", False), ("jpg", True), ("webp", False)])
def test_written_image_keeps_the_metadata_that_still_applies(tmp_path, format, opened):
    sideways = save_image(tmp_path / "sideways.jpg", COFFEE, exif=exif(), dpi=(300, 300), quality=95)
    save(read_image(Image.open(sideways) if opened else sideways), tmp_path / f"a.{format}")
    image = Image.open(tmp_path / f"a.{format}")
    assert image.size == (50, 75)
    assert image.info["icc_profile"] == srgb_profile()
    found = image.getexif()
    assert ExifTags.Base.Orientation not in found
    assert found[ExifTags.Base.Model] == "Camera" and found[ExifTags.Base.Copyright] == "somebody"
    assert found[ExifTags.Base.XResolution] == found[ExifTags.Base.YResolution] == 300
    assert format == "webp" or np.allclose(image.info["dpi"], 300, atol=0.01)
    camera = found.get_ifd(ExifTags.IFD.Exif)
    assert camera[ExifTags.Base.DateTimeOriginal] == "2001:02:03 04:05:06"
    assert camera[ExifTags.Base.ColorSpace] == 1
    assert not {ExifTags.Base.ExifImageWidth, ExifTags.IFD.Interop} & camera.keys()
    assert found.get_ifd(ExifTags.IFD.GPSInfo)[ExifTags.GPS.GPSLatitude] == (48.0, 8.0, 6.5)


def test_written_image_of_a_scan_keeps_the_caption_without_the_file_layout(tmp_path):
    scan = save_image(tmp_path / "scan.tif", COFFEE, description="a caption", dpi=(600, 600))
    save(read_image(scan), tmp_path / "a.png")
    found = Image.open(tmp_path / "a.png").getexif()
    kept = {ExifTags.TAGS[tag] for tag in found}
    assert kept == {"ImageDescription", "XResolution", "YResolution", "ResolutionUnit"}
    assert found[ExifTags.Base.XResolution] == 600


def test_images_with_damaged_metadata_are_read_and_written(tmp_path):
    whole = exif().tobytes()
    random = np.random.default_rng(0)
    for _ in range(20):
        damaged = bytearray(whole)
        for at in random.integers(6, len(whole), 8):
            damaged[at] = random.integers(256)
        save(read_image(save_image(tmp_path / "a.jpg", COFFEE, exif=bytes(damaged))), tmp_path / "b.jpg")
    too_long = Image.Exif()
    too_long[ExifTags.Base.ImageDescription] = "x" * 70_000  # bytes; a JPEG has no room for more than 65,533
    save(read_image(save_image(tmp_path / "a.png", COFFEE, exif=too_long)), tmp_path / "b.jpg")
    image = Image.fromarray(COFFEE)
    image.info["dpi"] = (float("nan"),) * 2
    save(read_image(image), tmp_path / "b.jpg")


@pytest.mark.parametrize("suffix", ["jpg", "jpeg"])
def test_written_jpeg_has_full_color_resolution_and_quality_95(tmp_path, suffix):
    save(Image.fromarray(COFFEE), tmp_path / f"a.{suffix}")
    image = Image.open(tmp_path / f"a.{suffix}")
    assert image.format == "JPEG" and {layer[1:3] for layer in image.layer} == {(1, 1)}  # 4:4:4
    assert image.quantization[0][0] <= 2  # quality 95


def test_unknown_suffix_is_refused(tmp_path, error_message):
    message = error_message(save, Image.new("RGB", (8, 8)), tmp_path / "a.xyz")
    assert message == f"{tmp_path / 'a.xyz'}: its suffix must be one of png, jpg, jpeg, webp"


@pytest.mark.parametrize(("side", "suffix"), [(65_501, "jpg"), (16_384, "webp")])
def test_image_too_large_for_its_format_is_refused(tmp_path, error_message, side, suffix):
    message = error_message(save, Image.new("RGB", (side, 2)), tmp_path / f"a.{suffix}")
    assert message == f"{tmp_path / 'a'}.{suffix}: {side}x2 pixels are too large for {suffix}; choose png"
    assert not list(tmp_path.iterdir())


ARRAYS = [np.zeros((8, 8), np.uint8), np.zeros((8, 0, 3), np.uint8), np.zeros((8, 8, 3))]


@pytest.mark.parametrize("source", [*ARRAYS, Image.new("RGB", (0, 5)), b"\xff\xd8", None])
def test_other_types_and_empty_images_are_refused(source):
    with pytest.raises(ValueError, match=f"and not empty; this is {type(source).__name__}"):
        read_image(source)
