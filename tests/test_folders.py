"""Folders of images: listing them and pairing originals with results."""

import ntpath
import os
from types import SimpleNamespace

from support.folders import (
    append_record,
    list_images,
    make_record,
    named_images,
    pair_images,
    read_records,
    relative_path,
)

import pytest

RESULTS, RECORDS = "results.json", "results.jsonl"  # files in a folder of results


@pytest.fixture
def touch(tmp_path):
    """Make an empty file at each of these paths below tmp_path."""

    def touch(*names):
        for name in names:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).touch()

    return touch


def listed(folder):
    return [os.path.relpath(path, folder) for path in list_images(folder, RESULTS)]


def test_images_in_nested_folders_are_listed_sorted_without_hidden_ones(tmp_path, touch):
    """Thumbnails and trash of network drives count as hidden."""
    hidden = (".hidden.jpg", ".cache/x.jpg", "@eaDir/a.png/SYNOPHOTO_THUMB_M.png", "#recycle/b.png")
    touch("b/2.JPEG", "b/1.png", "a/c/3.tif", "0.jpg", "notes.txt", *hidden)
    assert listed(tmp_path) == ["0.jpg", "a/c/3.tif", "b/1.png", "b/2.JPEG"]


def test_other_files_are_counted_in_one_line(tmp_path, touch, capsys):
    touch("a.png", "b.JP2", "b.avif", "b.heic", "b.md", "c.md", "none", ".hidden", RESULTS)
    assert listed(tmp_path) == ["a.png", "b.JP2", "b.avif", "b.heic"]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(": 3 other files skipped (.md)")


def test_linked_folder_is_visited_once_under_its_own_name(tmp_path, touch, capsys):
    touch("z/a.png")
    for name in ("up", "up2"):
        (tmp_path / "z" / name).symlink_to("..")  # with two of them there are endless paths
    (tmp_path / "a").symlink_to("z")
    assert listed(tmp_path) == ["z/a.png"]
    assert capsys.readouterr().err.count("a link to a folder that is visited anyway") == 3


def test_links_to_other_folders_are_followed(tmp_path, touch):
    touch("elsewhere/a.png")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "link").symlink_to("../elsewhere")
    assert listed(tmp_path / "in") == ["link/a.png"]


def test_unreadable_folder_is_reported(tmp_path, touch, monkeypatch, capsys, error_message):
    touch("open/a.png", "closed/b.png")
    scandir = os.scandir

    def guarded(folder):
        if "closed" in str(folder):
            raise PermissionError(13, "Permission denied", folder)
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", guarded)  # root, which may run this test, may read any folder
    assert len(listed(tmp_path)) == 1
    assert "closed: skipped: permission denied" in capsys.readouterr().err
    assert "no images here" in error_message(list_images, tmp_path / "closed", RESULTS)


def test_paths_on_windows_become_names_with_forward_slashes_on_one_drive(monkeypatch, error_message):
    monkeypatch.setattr("support.folders.os", SimpleNamespace(path=ntpath, sep="\\"))
    assert relative_path("C:\\in\\class\\a.png", "C:\\in\\b.png") == "class/a.png"
    assert "different drives" in error_message(named_images, ["C:\\a", "D:\\b"], RESULTS)


def test_subfolders_of_results_are_skipped_unless_they_are_asked_for(tmp_path, touch, capsys):
    touch("in/a.png", "in/out/b.png", f"in/out/{RESULTS}")
    assert listed(tmp_path / "in") == ["a.png"]
    assert capsys.readouterr().err == f"{tmp_path}/in/out: skipped: contains results ({RESULTS})\n"
    assert listed(tmp_path / "in" / "out") == ["b.png"] and not capsys.readouterr().err


def test_missing_or_empty_folder_is_reported(tmp_path, error_message):
    assert error_message(list_images, "missing", RESULTS) == "missing: no such file or folder"
    assert f"{tmp_path}: no images here (.jpg .jpeg" in error_message(list_images, tmp_path, RESULTS)


# Pairs


@pytest.fixture
def add_result(tmp_path, touch, monkeypatch):
    """Write a result of an image, and its record. The paths are below the current folder, tmp_path, and `out`."""

    def add(original, name):
        touch(f"out/{name}")
        append_record(make_record(original, {}, "out", name), f"out/{RECORDS}")

    monkeypatch.chdir(tmp_path)
    return add


def test_records_pair_results_with_their_images(touch, add_result, capsys):
    touch("in/p.bmp", "in/p.jpg", "in/q.jpg")
    add_result("in/p.jpg", "p.png")  # before p.bmp was there, which now takes the name p
    pairs, left_out = pair_images("in", "out", RESULTS, RECORDS)
    assert pairs == [("p.jpg", "in/p.jpg", "out/p.png")] and left_out == {"no result": ["p", "q"]}
    assert capsys.readouterr().err == "p: no result\nq: no result\n"
    add_result("in/p.bmp", "p.png")
    add_result("in/p.jpg", "p.jpg.png")
    pairs, _ = pair_images("in", "out", RESULTS, RECORDS)
    assert pairs == [("p", "in/p.bmp", "out/p.png"), ("p.jpg", "in/p.jpg", "out/p.jpg.png")]


def test_images_that_were_moved_are_paired_by_name_with_one_note(touch, add_result, capsys):
    for name in ("x/a", "b"):
        touch(f"in/{name}.jpg")
        add_result(f"in/{name}.jpg", f"{name}.png")
    os.rename("in", "moved")
    pairs, left_out = pair_images("moved", "out", RESULTS, RECORDS)
    assert pairs == [("b", "moved/b.jpg", "out/b.png"), ("x/a", "moved/x/a.jpg", "out/x/a.png")] and not left_out
    assert "out: 2 images paired by name, without a record of the original\n" in capsys.readouterr().err


def test_record_that_a_kill_cut_short_is_ignored(tmp_path):
    (tmp_path / "a.png").touch()
    for name in ("a", "b"):
        append_record(make_record(tmp_path / "a.png", {}, tmp_path, name), tmp_path / RECORDS)
    text = (tmp_path / RECORDS).read_text()
    (tmp_path / RECORDS).write_text(text[:-9])
    append_record(make_record(tmp_path / "a.png", {}, tmp_path, "c"), tmp_path / RECORDS)
    assert list(read_records(tmp_path / RECORDS)) == ["a", "c"]
