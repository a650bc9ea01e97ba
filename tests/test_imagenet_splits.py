"""resources/imagenet_splits.py: the paper's images, as links to those of ImageNet's validation set."""

import os
import shutil

from support.cli import EXIT_SKIPPED

import numpy as np
import pytest
from conftest import ROOT

from resources import imagenet_splits

SYNSETS = (ROOT / "resources" / "imagenet_synsets.txt").read_text().split()


def run(image_dir, output):
    return imagenet_splits.main(imagenet_splits.parse_args(["--image_dir", str(image_dir), "--output", str(output)]))


@pytest.fixture
def small_sets(monkeypatch):
    """Let the test set be two images of two classes, and the validation set three images."""
    test_set = {"ILSVRC2012_val_00030001": SYNSETS[5], "ILSVRC2012_val_00040002": SYNSETS[9]}
    monkeypatch.setattr(imagenet_splits, "load_ctest10k", lambda: test_set)
    monkeypatch.setattr(imagenet_splits, "VALIDATION_IMAGES", 3)


@pytest.fixture
def image_dir(tmp_path, square_crops):
    """Write six validation images into one folder, as they are unpacked."""
    folder = tmp_path / "ILSVRC2012_img_val"
    folder.mkdir()
    for i, number in enumerate((1, 2, 3, 4, 30001, 40002)):
        source = sorted(square_crops.iterdir())[i % 4]
        shutil.copy(source, folder / f"ILSVRC2012_val_{number:08d}.JPEG")
    return folder


def found(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.JPEG")}


def test_list_of_test_images_is_that_of_larsson():
    names = imagenet_splits.load_ctest10k()
    numbers = np.array([int(name.removeprefix("ILSVRC2012_val_")) for name in names])
    assert len(names) == 10_000 and len(set(numbers)) == 10_000 and numbers.min() == 25_275 and numbers.max() == 50_000
    assert sorted({*names.values()}) == SYNSETS
    assert names["ILSVRC2012_val_00025275"] == "n03595614" and names["ILSVRC2012_val_00050000"] == "n02437616"


@pytest.mark.parametrize("layout", ["{1}/{0}", "{0}_{1}"], ids=["class folders", "Hugging Face"])
def test_sets_contain_the_images_in_the_layout_that_the_programs_need(tmp_path, small_sets, image_dir, layout):
    before = {path.stem: path.read_bytes() for path in image_dir.iterdir()}
    for i, name in enumerate(before):
        os.renames(image_dir / f"{name}.JPEG", image_dir / f"{layout.format(name, SYNSETS[i])}.JPEG")
    assert run(image_dir, tmp_path) == 0
    test_set, validation_set = (found(tmp_path / name) for name in imagenet_splits.SETS)
    expected = [f"{SYNSETS[5]}/ILSVRC2012_val_00030001", f"{SYNSETS[9]}/ILSVRC2012_val_00040002"]
    assert [name[:33] for name in sorted(test_set)] == expected
    assert test_set[min(test_set)] == before["ILSVRC2012_val_00030001"]
    assert [name[:23] for name in sorted(validation_set)] == [f"ILSVRC2012_val_0000000{i}" for i in (1, 2, 3)]
    assert len([*image_dir.rglob("*.JPEG")]) == 6  # nothing is moved


@pytest.mark.parametrize("way", ["links", "copies"])
def test_running_again_changes_nothing_however_files_are_placed(
    tmp_path, small_sets, image_dir, monkeypatch, capsys, way
):
    def refuse(*_):
        raise OSError("not on this file system")

    if way == "copies":
        monkeypatch.setattr(os, "symlink", refuse)
    before = None
    for _ in range(2):
        assert run(tmp_path, tmp_path) == 0  # links in folders below --image_dir are not images of the set
        states = [(path, path.lstat().st_ino, path.lstat().st_mtime_ns) for path in sorted(tmp_path.rglob("*.JPEG"))]
        assert f"3 of 3 images ({way})" in capsys.readouterr().out
        assert before in (None, states)
        before = states


def test_missing_images_are_reported_and_links_follow_moved_images(tmp_path, small_sets, image_dir, capsys):
    (image_dir / "ILSVRC2012_val_00000002.JPEG").unlink()
    assert run(image_dir, tmp_path) == EXIT_SKIPPED
    captured = capsys.readouterr()
    assert "val10k: 2 of 3 images (links)" in captured.out
    assert captured.err == f"ILSVRC2012_val_00000002: missing, not in {tmp_path / 'val10k'}\n"
    image_dir.rename(tmp_path / "moved")
    run(tmp_path / "moved", tmp_path)
    assert len(found(tmp_path / "val10k")) == 2 and len(found(tmp_path / "ctest10k")) == 2


def test_other_files_are_neither_taken_nor_replaced(tmp_path, small_sets, image_dir, square_crops, error_message):
    assert "contains no image of ImageNet's validation set" in error_message(run, square_crops, tmp_path)
    (tmp_path / "val10k").mkdir()
    mine = tmp_path / "val10k" / "ILSVRC2012_val_00000001.JPEG"
    mine.write_text("mine")
    assert "00000001.JPEG: is a different file" in error_message(run, image_dir, tmp_path)
    assert mine.read_text() == "mine"
