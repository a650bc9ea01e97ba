"""What photographers expect: color profiles are read, metadata is kept, formats of cameras and telephones."""

import struct

from support.checkpoints import save_checkpoint
from support.cli import EXIT_SKIPPED
from support.images import SRGB_PROFILE, image_size, list_images, open_rgb, pair_images, read_rgb

import numpy as np
import paddle
import pytest
from PIL import ExifTags, Image, features
from skimage import color, data

import colorizer
import test

D50 = (0.9642, 1.0, 0.8249)
PRIMARIES = {  # x, y of red, green, blue; white is D65
    "sRGB": ((0.64, 0.33), (0.30, 0.60), (0.15, 0.06)),
    "P3": ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060)),
    "Adobe RGB": ((0.64, 0.33), (0.21, 0.71), (0.15, 0.06)),
}
ADOBE_GAMMA = 563 / 256
BRADFORD = np.array(((0.8951, 0.2664, -0.1614), (-0.7502, 1.7135, 0.0367), (0.0389, -0.0685, 1.0296)))


def to_xyz(space):
    """The matrix from linear RGB of a space to XYZ, white D65."""
    columns = np.array([(x / y, 1, (1 - x - y) / y) for x, y in PRIMARIES[space]]).T
    x, y = 0.3127, 0.3290
    return columns * np.linalg.solve(columns, (x / y, 1, (1 - x - y) / y))


def from_linear(linear, space):
    linear = np.clip(linear, 0, 1)
    if space == "Adobe RGB":
        return linear ** (1 / ADOBE_GAMMA)
    return np.where(linear > 0.0031308, 1.055 * linear ** (1 / 2.4) - 0.055, 12.92 * linear)


def icc_profile(space):
    """A minimal profile (ICC.1:2001): three colorants and a curve. For gray ("Gray"): a curve of gamma 1.8."""
    if space == "sRGB" or space == "P3":
        samples = np.linspace(0, 1, 1024)
        samples = np.where(samples > 0.04045, ((samples + 0.055) / 1.055) ** 2.4, samples / 12.92)
        curve = b"curv" + struct.pack(">4xI1024H", 1024, *np.round(samples * 65535).astype(int))
    else:
        curve = b"curv" + struct.pack(">4xIH", 1, round(256 * (1.8 if space == "Gray" else ADOBE_GAMMA)))

    def xyz(values):
        return b"XYZ " + struct.pack(">4x3i", *(round(float(v) * 65536) for v in values))

    text = b"desc" + struct.pack(">4xI", len(space) + 1) + space.encode() + bytes(1 + 4 + 4 + 2 + 1 + 67)
    tags = {b"desc": text, b"cprt": b"text" + bytes(4) + b"none\0", b"wtpt": xyz(D50)}
    if space == "Gray":
        tags[b"kTRC"] = curve
    else:
        matrix = to_xyz(space)
        to_cone = np.diag((BRADFORD @ D50) / (BRADFORD @ matrix.sum(axis=1)))
        adapted = np.linalg.inv(BRADFORD) @ to_cone @ BRADFORD @ matrix
        for name, column in zip((b"r", b"g", b"b"), adapted.T):
            tags[name + b"XYZ"], tags[name + b"TRC"] = xyz(column), curve
    table, body = struct.pack(">I", len(tags)), b""
    start = 128 + 4 + 12 * len(tags)
    for name, content in tags.items():
        table += struct.pack(">4sII", name, start + len(body), len(content))
        body += content + bytes(-len(content) % 4)
    kind = b"GRAY" if space == "Gray" else b"RGB "
    head = struct.pack(">I4sI4s4s4s", start + len(body), b"none", 0x02100000, b"mntr", kind, b"XYZ ")
    head += struct.pack(">6H4s", 2000, 1, 1, 0, 0, 0, b"acsp") + bytes(28) + xyz(D50)[8:]
    return head.ljust(128, b"\0") + table + body


@pytest.fixture
def in_space(tmp_path):
    """Writes linear sRGB colors [H, W, 3] as an 8-bit file of another space, with its profile."""

    def write(linear, space, name="{}.png", **options):
        own = linear @ (np.linalg.inv(to_xyz(space)) @ to_xyz("sRGB")).T
        path = tmp_path / name.format(space)
        rgb = np.round(255 * from_linear(own, space)).astype(np.uint8)
        Image.fromarray(rgb).save(path, icc_profile=icc_profile(space), **options)
        return path

    return write


@pytest.fixture
def colors():
    """Linear sRGB colors, whose channels are not near 0, where 8 bits are coarse: [40, 40, 3]."""
    return np.random.default_rng(0).uniform(0.03, 1, (40, 40, 3))


@pytest.mark.parametrize("space", ["P3", "Adobe RGB"])
def test_a_color_profile_is_converted_to_srgb(in_space, colors, space):
    true = 255 * from_linear(colors, "sRGB")
    found = read_rgb(in_space(colors, space)).astype(float)
    assert np.abs(found - true).max() < 3  # two roundings to 8 bits, one of them in coarser steps
    assert np.abs(found - true).mean() < 0.6
    naive = np.asarray(Image.open(in_space(colors, space))).astype(float)
    assert np.abs(naive - true).mean() > 5


def test_the_same_colors_in_p3_adobe_rgb_and_srgb_give_the_same_lab(in_space, colors):
    labs = [color.rgb2lab(read_rgb(in_space(colors, space))) for space in PRIMARIES]
    for lab in labs[1:]:
        assert np.linalg.norm(lab - labs[0], axis=-1).mean() < 0.7


def test_colors_out_of_srgb_are_clipped_to_it(in_space):
    pure_green = np.linalg.inv(to_xyz("sRGB")) @ to_xyz("P3") @ (0, 1, 0)
    assert (np.abs(read_rgb(in_space(np.tile(pure_green, (4, 4, 1)), "P3")).astype(int) - (0, 255, 0)) <= 1).all()


def test_profiles_that_are_srgb_change_no_pixel_and_cost_nothing(in_space, colors, monkeypatch):
    path = in_space(colors, "sRGB")
    Image.open(path).save(own := path.with_name("own.png"), icc_profile=SRGB_PROFILE)
    for file in (path, own):
        assert np.array_equal(read_rgb(file), np.asarray(Image.open(file)))
    monkeypatch.setattr("support.images.ImageCms.buildTransform", None)
    monkeypatch.setattr("support.images.ImageCms.applyTransform", None)
    for file in (path, own):  # whose profiles are known by now
        read_rgb(file)


def test_profiles_of_gray_and_cmyk_images(tmp_path):
    ramp = np.tile(np.arange(256, dtype=np.uint8), (4, 1))
    Image.fromarray(ramp).save(tmp_path / "gray.png", icc_profile=icc_profile("Gray"))
    Image.fromarray(ramp.astype(np.uint16) * 257).save(tmp_path / "gray16.tif", icc_profile=icc_profile("Gray"))
    true = np.round(255 * from_linear((ramp / 255) ** 1.8, "sRGB"))
    for name in ("gray.png", "gray16.tif"):
        found = read_rgb(tmp_path / name)
        assert np.ptp(found, axis=2).max() == 0
        assert np.abs(found[..., 0] - true)[:, 16:].max() <= 1


@pytest.mark.parametrize("profile", [b"x", bytes(500), icc_profile("P3")[:300], icc_profile("Gray")])
def test_a_profile_that_cannot_be_used_costs_a_line_not_the_image(tmp_path, photographs, capsys, profile):
    path = tmp_path / "photo.png"
    coffee = Image.open(photographs / "coffee.png")
    coffee.save(path, icc_profile=profile)
    assert np.array_equal(read_rgb(path), np.asarray(coffee))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{path}: its color profile cannot be used")


def test_a_profile_is_used_whatever_else_is_done_to_the_image(in_space, colors):
    large = colors.repeat(16, axis=0).repeat(16, axis=1)
    path = in_space(large, "P3", "{}.jpg", quality=98, subsampling=0, exif=exif(6))
    true = np.rot90(255 * from_linear(colors, "sRGB"), -1)
    found = np.asarray(open_rgb(path, least_side=80).resize((40, 40), Image.Resampling.BOX)).astype(float)
    assert np.abs(found - true).mean() < 3


# Metadata


def exif(orientation=6):
    """As a camera writes it."""
    data = Image.Exif()
    data[ExifTags.Base.Orientation] = orientation
    data[ExifTags.Base.Model] = "Camera"
    data[ExifTags.Base.Copyright] = "somebody"
    data[ExifTags.IFD.Exif] = {
        ExifTags.Base.DateTimeOriginal: "2001:02:03 04:05:06",
        ExifTags.Base.ColorSpace: 65535,
        ExifTags.Base.ExifImageWidth: 75,
    }
    data[ExifTags.IFD.GPSInfo] = {ExifTags.GPS.GPSLatitudeRef: "N", ExifTags.GPS.GPSLatitude: (48.0, 8.0, 6.5)}
    return data


@pytest.fixture
def photograph(tmp_path):
    """75 x 50 pixels, lying on its side, with 300 dots per inch."""
    folder = tmp_path / "in"
    folder.mkdir()
    Image.fromarray(data.coffee()[::8, ::8]).save(folder / "photo.jpg", exif=exif(), dpi=(300, 300), quality=95)
    return folder / "photo.jpg"


@pytest.fixture
def checkpoint(small_network, tmp_path):
    paddle.seed(0)
    save_checkpoint(small_network().state_dict(), tmp_path / "model" / "epoch_0_model.pdparams")
    return tmp_path / "model" / "epoch_0_model.pdparams"


@pytest.fixture
def color_files(checkpoint, tmp_path):
    """Runs `test.py`. Returns its exit code and the folder of results."""

    def run(images, *flags, result="result"):
        flags = ["--load_model", checkpoint, "--result_path", tmp_path / result, "--load_size", 64, *flags]
        return test.main(test.parse_args([str(images), *map(str, flags)])), tmp_path / result

    return run


@pytest.mark.parametrize("format", ["png", "jpg", "webp"])
def test_a_result_keeps_the_metadata_that_still_holds(color_files, photograph, format):
    code, result = color_files(photograph, "--format", format)
    assert code == 0
    image = Image.open(result / f"photo.{format}")
    assert image.size == (50, 75)
    assert image.info["icc_profile"] == SRGB_PROFILE
    found = image.getexif()
    assert ExifTags.Base.Orientation not in found
    assert found[ExifTags.Base.Model] == "Camera" and found[ExifTags.Base.Copyright] == "somebody"
    assert found[ExifTags.Base.XResolution] == found[ExifTags.Base.YResolution] == 300
    assert format == "webp" or np.allclose(image.info["dpi"], 300, atol=0.01)
    camera = found.get_ifd(ExifTags.IFD.Exif)
    assert camera[ExifTags.Base.DateTimeOriginal] == "2001:02:03 04:05:06"
    assert camera[ExifTags.Base.ColorSpace] == 1 and ExifTags.Base.ExifImageWidth not in camera
    assert found.get_ifd(ExifTags.IFD.GPSInfo)[ExifTags.GPS.GPSLatitude] == (48.0, 8.0, 6.5)


def test_of_a_scan_the_caption_is_kept_not_how_its_file_was_laid_out(color_files, tmp_path):
    scan = Image.fromarray(data.coffee()[::8, ::8])
    scan.save(tmp_path / "scan.tif", description="a caption", dpi=(600, 600))
    _, result = color_files(tmp_path / "scan.tif")
    found = Image.open(result / "scan.png").getexif()
    kept = {ExifTags.TAGS[tag] for tag in found}
    assert kept == {"ImageDescription", "XResolution", "YResolution", "ResolutionUnit"}
    assert found[ExifTags.Base.XResolution] == 600


def test_damaged_metadata_does_not_cost_the_image(color_files, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    whole = exif().tobytes()
    random = np.random.default_rng(0)
    for i in range(20):
        damaged = bytearray(whole)
        for at in random.integers(6, len(whole), 8):
            damaged[at] = random.integers(256)
        Image.fromarray(data.coffee()[::8, ::8]).save(folder / f"{i}.jpg", exif=bytes(damaged), dpi=(i, i))
    Image.fromarray(data.coffee()[::8, ::8]).save(folder / "long.png", exif=b"Exif\0\0" + bytes(100_000))
    code, result = color_files(folder, "--format", "jpg")
    assert code == 0 and len(list(result.glob("*.jpg"))) == 21


def test_the_same_photograph_gives_the_same_file(color_files, photograph):
    files = [color_files(photograph, result=name)[1] / "photo.png" for name in "ab"]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_call_on_a_path_or_an_image_gives_the_pixels_and_the_metadata_of_test_py(
    color_files, photograph, checkpoint, tmp_path
):
    _, result = color_files(photograph)
    colorize = colorizer.Colorizer(checkpoint)
    for colored in (colorize(photograph, load_size=64), colorize(Image.open(photograph), load_size=64)):
        colorizer.save(colored, tmp_path / "saved.png")
        assert (tmp_path / "saved.png").read_bytes() == (result / "photo.png").read_bytes()


# Formats


def test_a_jpeg_result_keeps_all_of_its_colors(color_files, photograph):
    _, result = color_files(photograph, "--format", "jpg")
    image = Image.open(result / "photo.jpg")
    assert {layer[1:3] for layer in image.layer} == {(1, 1)}  # 4:4:4
    assert image.quantization[0][0] <= 2  # quality 95


def test_a_photograph_too_large_for_the_format_is_left_out(color_files, tmp_path, capsys):
    Image.new("L", (17_000, 8)).save(tmp_path / "wide.png")
    code, _ = color_files(tmp_path / "wide.png", "--format", "webp", "--load_size", 8)
    assert code == EXIT_SKIPPED and "17000x8 is too large for webp" in capsys.readouterr().err


@pytest.mark.skipif(not features.check("avif"), reason="Pillow reads AVIF from 11.3 on")
def test_avif_is_read(tmp_path):
    check_reading(tmp_path / "photo.avif", turned=True)


def test_heic_is_read(tmp_path):
    pytest.importorskip("pillow_heif")
    check_reading(tmp_path / "photo.heic", turned=False)  # pillow_heif itself turns what a telephone wrote turned


def check_reading(path, turned):
    coffee = Image.fromarray(data.coffee()[::4, ::4])
    coffee.save(path, quality=95, exif=exif(6 if turned else 1))
    upright = np.rot90(coffee, -1) if turned else np.asarray(coffee)
    assert list_images(path.parent) == [str(path)]
    assert image_size(path) == upright.shape[1::-1]
    assert np.abs(read_rgb(path) - upright.astype(int)).mean() < 4


def test_a_format_that_nothing_here_reads_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("support.images.Image.registered_extensions", lambda: {".jpg": "JPEG"})
    (tmp_path / "photo.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(12))
    with pytest.raises(ValueError, match="reading .heic needs pillow-heif"):
        read_rgb(tmp_path / "photo.heic")


def test_metrics_pair_results_of_any_format(color_files, photograph):
    for format in colorizer.FORMATS:
        _, result = color_files(photograph, "--format", format, result=format)
        pairs, left_out = pair_images(photograph.parent, result)
        assert [name for name, *_ in pairs] == ["photo"] and not left_out
