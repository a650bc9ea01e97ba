"""Finding and reading images of every kind, and the squares that training sees."""

import os

from support import images
from support.cli import UserError
from support.images import InvalidImageError, crop_resized, image_size, list_images, open_rgb, read_rgb

import numpy as np
import pytest
from PIL import Image
from skimage import data

from dataset import ColorizationDataset

COFFEE = data.coffee()[::4, ::4]  # uint8 [100, 150, 3]


def saved(path, image, **settings):
    image.save(path, **settings)
    return path


# Finding


def test_images_are_found_in_nested_folders_sorted(tmp_path):
    for name in ("b/2.JPEG", "b/1.png", "a/c/3.tif", "0.jpg", "notes.txt", ".hidden.jpg", ".cache/x.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = [os.path.relpath(path, tmp_path) for path in list_images(tmp_path)]
    assert found == ["0.jpg", "a/c/3.tif", "b/1.png", "b/2.JPEG"]


def test_one_file_is_a_list_of_one(tmp_path):
    path = saved(tmp_path / "a.png", Image.fromarray(COFFEE))
    assert list_images(path) == [str(path)]


@pytest.mark.parametrize(("folder", "message"), [("missing", "no such"), (".", "no images")])
def test_a_folder_without_images_is_an_error(tmp_path, folder, message):
    with pytest.raises(UserError, match=message):
        list_images(tmp_path / folder)


# Reading


@pytest.mark.parametrize("suffix", ["png", "bmp", "tiff", "ppm", "webp"])
def test_formats_without_loss(tmp_path, suffix):
    path = saved(tmp_path / f"a.{suffix}", Image.fromarray(COFFEE), **({"lossless": True} if suffix == "webp" else {}))
    assert np.array_equal(read_rgb(path), COFFEE)


def test_jpeg(tmp_path):
    path = saved(tmp_path / "a.jpg", Image.fromarray(COFFEE), quality=95)
    assert np.abs(read_rgb(path).astype(int) - COFFEE).mean() < 5


def test_cmyk(tmp_path):
    path = saved(tmp_path / "a.tif", Image.fromarray(COFFEE).convert("CMYK"))
    assert np.abs(read_rgb(path).astype(int) - COFFEE).mean() < 3


@pytest.mark.parametrize("suffix", ["png", "jpg", "pgm"])
def test_gray_becomes_three_equal_channels(tmp_path, suffix):
    rgb = read_rgb(saved(tmp_path / f"a.{suffix}", Image.fromarray(COFFEE).convert("L")))
    assert rgb.shape == COFFEE.shape and (rgb[..., 0] == rgb[..., 1]).all() and (rgb[..., 1] == rgb[..., 2]).all()


@pytest.mark.parametrize("suffix", ["png", "tiff", "pgm"])
def test_16_bit_gray_keeps_its_range(tmp_path, suffix):
    levels = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257
    rgb = read_rgb(saved(tmp_path / f"a.{suffix}", Image.fromarray(levels)))
    assert np.array_equal(rgb[..., 0], np.arange(256).reshape(16, 16))


def test_palette(tmp_path):
    image = Image.fromarray(COFFEE).quantize(64)
    assert np.array_equal(read_rgb(saved(tmp_path / "a.png", image)), np.asarray(image.convert("RGB")))


def test_alpha_is_blended_over_white(tmp_path):
    rgba = np.dstack([COFFEE, np.full(COFFEE.shape[:2], 255, np.uint8)])
    rgba[:50, :, 3], rgba[50:60, :, 3] = 0, 51
    rgb = read_rgb(saved(tmp_path / "a.png", Image.fromarray(rgba)))
    assert (rgb[:50] == 255).all() and np.array_equal(rgb[60:], COFFEE[60:])
    assert np.abs(rgb[50:60].astype(float) - (0.2 * COFFEE[50:60] + 0.8 * 255)).max() <= 1


def test_exif_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    path = saved(tmp_path / "a.png", Image.fromarray(COFFEE), exif=exif)
    assert np.array_equal(read_rgb(path), np.rot90(COFFEE, -1))
    assert image_size(path) == (100, 150)


def broken_files(folder):
    whole = saved(folder / "whole.jpg", Image.fromarray(COFFEE)).read_bytes()
    contents = {
        "empty.jpg": b"",
        "truncated.jpg": whole[: len(whole) // 2],
        "text.jpg": b"hello",
        "start.png": b"\x89PNG\r\n",
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return [folder / name for name in contents] + [folder / "vanished.jpg"]


def test_what_cannot_be_read_is_named_with_the_reason(tmp_path):
    reasons = ["empty file", "truncated", "not an image", "not an image", "no such file"]
    for path, reason in zip(broken_files(tmp_path), reasons):
        with pytest.raises(InvalidImageError) as error:
            read_rgb(path)
        assert str(path) in str(error.value) and reason in str(error.value) and "\n" not in str(error.value)


def test_a_decompression_bomb_is_refused_unread(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 10_000)
    with pytest.raises(InvalidImageError, match="150x100 is over"):
        read_rgb(saved(tmp_path / "a.png", Image.fromarray(COFFEE)))


# Squares


def test_crop_resized_is_resizing_the_short_side_and_cropping():
    image = Image.fromarray(data.coffee())  # 600 x 400
    whole = np.asarray(image.resize((96, 64), Image.Resampling.BILINEAR)).astype(int)
    for across, left in ((0, 0), (0.5, 24), (1, 48)):
        square = crop_resized(image, 64, 48, across=across, down=0.5).astype(int)
        assert square.shape == (48, 48, 3)
        # One step or two differ by rounding, and at the border, where the filter sees no neighbors.
        assert np.abs(square - whole[8:56, left : left + 48])[1:-1, 1:-1].max() <= 1


def test_the_decoders_own_downscaling_changes_little(tmp_path):
    path = saved(tmp_path / "a.jpg", Image.fromarray(data.astronaut()), quality=95)  # 512 x 512
    shrunk = open_rgb(path, least_side=200)
    assert shrunk.size == (256, 256)
    difference = crop_resized(shrunk, 200, 176).astype(int) - crop_resized(open_rgb(path), 200, 176)
    assert np.abs(difference).mean() < 2


def test_random_squares_follow_from_seed_epoch_and_index_alone(photographs):
    def square(index=0, epoch=0, seed=0):
        squares = ColorizationDataset(list_images(photographs), 64, 48, augment=True, seed=seed)
        squares.epoch = epoch
        return squares[index][0]

    assert square().shape == (3, 48, 48) and square().dtype == np.uint8
    assert np.array_equal(square(), square())
    assert not np.array_equal(square(), square(epoch=1)) and not np.array_equal(square(), square(seed=1))


def test_half_of_the_squares_are_mirrored(photographs):
    squares = ColorizationDataset([list_images(photographs)[0]], 64, 64, augment=True)  # a square photograph: one crop
    plain = ColorizationDataset([squares.path(i) for i in range(len(squares))], 64, 64)[0][0]
    kinds = []
    for squares.epoch in range(40):
        square = squares[0][0]
        assert np.array_equal(square, plain) or np.array_equal(square, plain[:, :, ::-1])
        kinds.append(np.array_equal(square, plain))
    assert 10 < sum(kinds) < 30


def test_a_broken_file_is_replaced_counted_and_named(tmp_path, capsys):
    paths = [str(path) for path in broken_files(tmp_path)[:1]] + [str(tmp_path / "whole.jpg")] * 3
    square, broken = ColorizationDataset(paths, 64, 48, augment=True)[0]
    assert broken >= 1 and square.std() > 10
    assert "skipped" in (message := capsys.readouterr().err) and "empty.jpg: empty file" in message


def test_when_nothing_can_be_read_the_square_is_gray(tmp_path, capsys):
    square, broken = ColorizationDataset([str(tmp_path / "missing.jpg")], 64, 48)[0]
    assert broken > 1 and (square == square[0, 0, 0]).all()
