"""Lists of images, reading them, and the square crops for training."""

import os

from support.images import InvalidImageError, crop_resized, open_rgb, read_rgb

import numpy as np
import pytest
from conftest import png_bomb, save_image
from PIL import Image
from skimage import data

from dataset import ColorizationDataset, list_images

COFFEE = data.coffee()[::4, ::4]  # uint8 [100, 150, 3]


def test_images_in_nested_folders_are_listed_sorted_without_hidden_ones(tmp_path):
    """Thumbnails and trash of network drives count as hidden."""
    hidden = (".hidden.jpg", ".cache/x.jpg", "@eaDir/a.png/SYNOPHOTO_THUMB_M.png", "#recycle/b.png")
    for name in ("b/2.JPEG", "b/1.png", "a/c/3.tif", "0.jpg", "notes.txt", *hidden):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = [os.path.relpath(path, tmp_path) for path in list_images(tmp_path)]
    assert found == ["0.jpg", "a/c/3.tif", "b/1.png", "b/2.JPEG"]


# Reading


@pytest.mark.parametrize("suffix", ["png", "bmp", "tiff", "ppm", "webp", "jp2"])
def test_lossless_format_keeps_every_pixel(tmp_path, suffix):
    options = {"webp": {"lossless": True}, "jp2": {"irreversible": False}}.get(suffix, {})
    assert np.array_equal(read_rgb(save_image(tmp_path / f"a.{suffix}", COFFEE, **options)), COFFEE)


@pytest.mark.parametrize("suffix", ["png", "tiff", "pgm"])
def test_16_bit_gray_keeps_its_range(tmp_path, suffix):
    levels = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257
    rgb = read_rgb(save_image(tmp_path / f"a.{suffix}", levels))
    assert np.array_equal(rgb, np.stack([np.arange(256).reshape(16, 16)] * 3, axis=2))


def test_palette_becomes_its_colors(tmp_path):
    image = Image.fromarray(COFFEE).quantize(64)
    image.save(tmp_path / "a.png")
    assert np.array_equal(read_rgb(tmp_path / "a.png"), np.asarray(image.convert("RGB")))


def test_alpha_is_blended_over_white(tmp_path):
    rgba = np.dstack([COFFEE, np.full(COFFEE.shape[:2], 255, np.uint8)])
    rgba[:50, :, 3], rgba[50:60, :, 3] = 0, 51
    rgb = read_rgb(save_image(tmp_path / "a.png", rgba))
    assert (rgb[:50] == 255).all() and np.array_equal(rgb[60:], COFFEE[60:])
    assert np.abs(rgb[50:60].astype(float) - (0.2 * COFFEE[50:60] + 0.8 * 255)).max() <= 1


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("empty.jpg", b"", "empty file"),
        ("text.jpg", b"hello", "not an image"),
        ("start.png", b"\x89PNG\r\n", "not an image"),
        ("bomb.png", png_bomb(), "50000x50000 is over"),
        ("missing.jpg", None, "no such file"),
    ],
)
def test_unreadable_image_is_reported_with_the_reason_and_replaced(tmp_path, capsys, name, content, reason):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InvalidImageError, match=reason) as error:
        read_rgb(tmp_path / name)
    assert str(tmp_path / name) in str(error.value) and "\n" not in str(error.value)

    paths = [str(tmp_path / name), *[str(save_image(tmp_path / "intact.png", COFFEE))] * 3]
    crop, unreadable = ColorizationDataset(paths, 64, 48, augment=True)[0]
    assert unreadable >= 1 and crop.std() > 10
    line = capsys.readouterr().err.splitlines()[0]
    assert line.startswith(f"skipped {tmp_path / name}: ") and reason in line


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


def test_random_crops_depend_only_on_seed_epoch_and_index(image_folder):
    def crop(index=0, epoch=0, seed=0):
        dataset = ColorizationDataset(list_images(image_folder), 64, 48, augment=True, seed=seed)
        dataset.epoch = epoch
        return dataset[index][0]

    assert crop().shape == (3, 48, 48) and crop().dtype == np.uint8
    assert np.array_equal(crop(), crop())
    assert not np.array_equal(crop(), crop(epoch=1)) and not np.array_equal(crop(), crop(seed=1))


def test_random_crops_are_mirrored_half_of_the_time(image_folder):
    path = list_images(image_folder)[0]  # a square image, which has one crop
    dataset = ColorizationDataset([path], 64, 64, augment=True)
    plain = ColorizationDataset([path], 64, 64)[0][0]
    intact = []
    for dataset.epoch in range(40):
        crop = dataset[0][0]
        intact.append(np.array_equal(crop, plain))
        assert intact[-1] or np.array_equal(crop, plain[:, :, ::-1])
    assert 10 < sum(intact) < 30


def test_crop_is_gray_if_no_image_can_be_read(tmp_path):
    crop, unreadable = ColorizationDataset([str(tmp_path / "missing.jpg")], 64, 48)[0]
    assert unreadable > 1 and (crop == crop[0, 0, 0]).all()
