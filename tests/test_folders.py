"""Folders of images: listing them and pairing originals with results."""

import json
import ntpath
import os
import pathlib
import unicodedata
from types import SimpleNamespace

from support.folders import (
    append_record,
    list_images,
    make_record,
    named_images,
    pair_at_random,
    pair_images,
    read_records,
    relative_path,
    same_source,
    what_changed,
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
    """Thumbnails, trash and snapshots of network drives, Windows and macOS count as hidden."""
    hidden = [".hidden.jpg", "._2.JPEG", ".cache/x.jpg", "@eaDir/a.png/SYNOPHOTO_THUMB_M.png", "#recycle/b.png"]
    hidden += [f"{name}/a.jpg" for name in ("@Recycle", "b/$RECYCLE.BIN", "__MACOSX", "#snapshot/b", "$Recycle.Bin")]
    touch("b/2.JPEG", "b/1.png", "a/c/3.tif", "0.jpg", "notes.txt", *hidden)
    assert listed(tmp_path) == ["0.jpg", "a/c/3.tif", "b/1.png", "b/2.JPEG"]


def test_other_files_are_counted_in_one_line(tmp_path, touch, capsys):
    touch("a.png", "b.JP2", "b.avif", "b.heic", "b.md", "c.md", "none", ".hidden", RESULTS)
    assert listed(tmp_path) == ["a.png", "b.JP2", "b.avif", "b.heic"]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(": 3 other files skipped (.md)")


def test_linked_folder_is_visited_once(tmp_path, touch, capsys):
    touch("z/a.png")
    for name in ("up", "up2"):
        (tmp_path / "z" / name).symlink_to("..")  # with two of them there are endless paths
    (tmp_path / "a").symlink_to("z")
    assert listed(tmp_path) == ["a/a.png"]
    assert capsys.readouterr().err.count("a link to a folder that is visited anyway") == 3


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

    def add(original, name, **settings):
        touch(f"out/{name}")
        append_record(make_record(original, settings, name, f"out/{name}"), f"out/{RECORDS}")

    monkeypatch.chdir(tmp_path)
    return add


def pair(true="in"):
    return pair_images(true, "out", RESULTS, RECORDS)


def test_records_pair_results_with_their_images(touch, add_result, capsys):
    touch("in/p.bmp", "in/p.jpg", "in/q.jpg")
    add_result("in/p.jpg", "p.png")  # before p.bmp was there, which now takes the name p
    pairs, left_out, _ = pair()
    assert pairs == [("p.jpg", "in/p.jpg", "out/p.png")] and left_out == {"no result": ["p", "q"]}
    assert capsys.readouterr().err == "p: no result\nq: no result\n"
    add_result("in/p.bmp", "p.png")
    add_result("in/p.jpg", "p.jpg.png")
    pairs, _, _ = pair()
    assert pairs == [("p", "in/p.bmp", "out/p.png"), ("p.jpg", "in/p.jpg", "out/p.jpg.png")]


def test_originals_alone_are_paired_with_others_at_random(tmp_path, touch, error_message):
    touch(*(f"{i}.jpg" for i in range(9)))
    originals, left_out, made_by = pair_images(tmp_path, None, RESULTS, RECORDS)
    paths = [str(tmp_path / f"{i}.jpg") for i in range(9)]
    assert originals == [(f"{i}", path, None) for i, path in enumerate(paths)] and not left_out and made_by is None
    first, second = (pair_at_random(originals, seed) for seed in (0, 1))
    for pairs in (first, second):
        assert [pair[:2] for pair in pairs] == [pair[:2] for pair in originals]
        assert sorted(other for _, _, other in pairs) == paths and all(path != other for _, path, other in pairs)
    assert first != second and first == pair_at_random(originals, 0)
    assert "0.jpg: is the only image" in error_message(pair_at_random, originals[:1], 0)


def test_results_without_records_are_paired_by_name_with_a_note(tmp_path, touch, monkeypatch, capsys, error_message):
    monkeypatch.chdir(tmp_path)
    touch("in/x/a.jpg", "in/b.tif", "out/x/a.png", "out/b.webp", "out/stray.png")
    pairs, left_out, made_by = pair()
    assert pairs == [("b", "in/b.tif", "out/b.webp"), ("x/a", "in/x/a.jpg", "out/x/a.png")]
    assert left_out == {"no original": ["stray"]} and made_by is None
    assert "out: 2 images paired by name, without a record of the original\n" in capsys.readouterr().err
    capsys.readouterr()
    assert pair(None)[0] == [("b", None, "out/b.webp"), ("stray", None, "out/stray.png"), ("x/a", None, "out/x/a.png")]
    assert not capsys.readouterr().err
    touch("other/c.png")
    assert error_message(pair, "other") == "out: no image could be paired, for the reasons above"


def write_text(path, text):
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_moved_and_copied_files_are_recognized_by_their_checksums(add_result, capsys):
    """The folder was renamed, and tar rounded the times to whole seconds."""
    for name in ("x/a", "b"):
        write_text(f"in/{name}.jpg", f"original {name}")
        write_text(f"out/{name}.png", f"result {name}")
        add_result(f"in/{name}.jpg", f"{name}.png")
    os.rename("in", "moved")
    for path in (*pathlib.Path("moved").rglob("*.jpg"), *pathlib.Path("out").rglob("*.png")):
        os.utime(path, (path.stat().st_mtime_ns // 10**9,) * 2)
    pairs, left_out, _ = pair("moved")
    assert pairs == [("b", "moved/b.jpg", "out/b.png"), ("x/a", "moved/x/a.jpg", "out/x/a.png")]
    assert not left_out and capsys.readouterr().err == ""
    write_text("moved/b.jpg", "original c")  # of the same size
    os.utime("moved/b.jpg", (2, 2))
    pairs, left_out, _ = pair("moved")
    assert [name for name, _, _ in pairs] == ["x/a"] and left_out == {"original changed since it was recorded": ["b"]}


def test_results_of_mixed_settings_are_not_used_together(touch, add_result, capsys):
    """An interrupted run replaced two of four results, and wrote one in another format."""
    touch(*(f"in/{name}.jpg" for name in "abcd"))
    for name in "abcd":
        add_result(f"in/{name}.jpg", f"{name}.png", sha256="old")
    add_result("in/a.jpg", "a.png", sha256="new")
    add_result("in/b.jpg", "b.webp", sha256="new")
    with open(f"out/{RESULTS}", "w") as file:
        json.dump({"checkpoint": "new.pdparams", "sha256": "new"}, file)
    pairs, left_out, made_by = pair()
    assert pairs == [("a", "in/a.jpg", "out/a.png"), ("b", "in/b.jpg", "out/b.webp")]
    assert left_out == {"made with other settings than the newest result": ["b", "c", "d"]}
    assert "c: made with other settings than the newest result\n" in capsys.readouterr().err
    assert made_by == {"checkpoint": "new.pdparams", "sha256": "new"}
    results_alone, left_out_alone, _ = pair(None)
    assert [name for name, _, _ in results_alone] == ["a", "b.webp"] and left_out_alone == left_out


@pytest.mark.parametrize("text", ['{"checkpoint": "new.pdparams", "sha256": "new", "crop_size": 224}', "{"])
def test_description_of_another_run_or_damaged_one_is_not_that_of_the_results(touch, add_result, text):
    """The next run described itself, and was stopped before its first result."""
    touch("in/a.jpg")
    add_result("in/a.jpg", "a.png", sha256="old", crop_size=None)
    write_text(f"out/{RESULTS}", text)
    assert pair()[2] == {"sha256": "old", "crop_size": None}


def test_files_that_are_not_as_recorded_are_not_paired(touch, add_result):
    touch(*(f"in/{name}.jpg" for name in "abcd"))
    for name in "abce":
        touch(f"in/{name}.jpg")
        add_result(f"in/{name}.jpg", f"{name}.png")
    os.remove("in/e.jpg")
    pathlib.Path("out/a.png").write_text("edited")
    pathlib.Path("in/b.jpg").write_text("exchanged")
    touch("out/d.png")
    pairs, left_out, _ = pair()
    assert pairs == [("c", "in/c.jpg", "out/c.png")]
    assert left_out == {
        "changed since it was recorded": ["a"],
        "no original": ["e"],
        "original changed since it was recorded": ["b"],
        "not recorded, unlike other results": ["d"],
    }


def test_part_of_the_results_has_the_records_of_the_whole(touch, add_result):
    touch("in/x/a.jpg", "in/x/b.jpg")
    for settings in ({"sha256": "old"}, {"sha256": "new"}):
        add_result("in/x/a.jpg", "x/a.png", **settings)
        add_result("in/x/b.jpg", "x/b.png", sha256="old")
    add_result("in/x/a.jpg", "x/a.png", sha256="new")
    for folder in ("out/x", "out/x/a.png"):
        pairs, _, made_by = pair_images("in/x", folder, RESULTS, RECORDS)
        assert pairs == [("a", "in/x/a.jpg", "out/x/a.png")] and made_by == {"sha256": "new"}


def test_newest_of_two_results_of_one_image_is_used(touch, add_result):
    touch("in/p.jpg")
    add_result("in/p.jpg", "p.png")
    add_result("in/p.jpg", "p.jpg.png")
    pairs, left_out, _ = pair()
    assert pairs == [("p", "in/p.jpg", "out/p.jpg.png")]
    assert left_out == {"older than another result of the same image": ["p"]}


def test_names_agree_whether_accents_are_composed_or_not(tmp_path, touch, monkeypatch):
    monkeypatch.chdir(tmp_path)
    composed, apart = (unicodedata.normalize(form, "café/ñ") for form in ("NFC", "NFD"))
    touch(f"in/{apart}.jpg", f"out/{composed}.png")
    assert pair()[0] == [(composed, f"in/{apart}.jpg", f"out/{composed}.png")]
    append_record(make_record(f"in/{apart}.jpg", {}, f"{composed}.png", f"out/{composed}.png"), f"out/{RECORDS}")
    os.renames(f"out/{composed}.png", f"out/{apart}.png")
    assert pair()[0] == [(composed, f"in/{apart}.jpg", f"out/{apart}.png")]
    touch(f"in/{composed}.jpg")
    assert sorted(named_images(["in"], RESULTS).values()) == sorted([f"in/{apart}.jpg", f"in/{composed}.jpg"])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda: None, ""),
        (lambda: os.utime("a.jpg", (1, 1)), ""),
        (lambda: write_text("a.jpg", "more"), "the original has changed"),
        (lambda: write_text("out/a.png", "more"), "the result is missing or has changed"),
        (lambda: os.remove("out/a.png"), "the result is missing or has changed"),
    ],
)
def test_result_is_up_to_date_or_the_reason_is_named(touch, add_result, change, reason):
    touch("a.jpg")
    add_result("a.jpg", "a.png", temperature=1)
    (record,) = read_records(f"out/{RECORDS}").values()
    change()
    assert what_changed(record, "a.jpg", {"temperature": 1}, "out/a.png") == reason
    changed = what_changed(record, "a.jpg", {"temperature": 2, "size": 3}, "out/a.png")
    assert changed == "other settings (size, temperature)"


def test_source_is_the_same_path_or_the_same_content(add_result, touch):
    write_text("a.jpg", "a")
    write_text("b.jpg", "b")
    record = make_record("a.jpg", {}, "a.png", "missing")
    assert same_source(record, "a.jpg") and not same_source(record, "b.jpg")
    os.rename("a.jpg", "moved.jpg")
    write_text("a.jpg", "edited")
    assert same_source(record, "moved.jpg") and same_source(record, "a.jpg")


def test_records_of_files_that_are_gone_are_written_and_those_cut_short_by_a_kill_ignored(tmp_path):
    path = tmp_path / RECORDS
    for name in ("a", "b"):
        append_record(make_record("no such file", {}, name, tmp_path / name), path)
    path.write_text(path.read_text()[:-9])
    append_record(make_record("no such file", {}, "c", tmp_path / "c"), path)
    assert list(read_records(path)) == ["a", "c"]
