"""Folders of images: listing them and pairing originals with results."""

import json
import ntpath
import os
import unicodedata
from pathlib import Path
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


@pytest.fixture(autouse=True)
def _current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(*names, text=""):
    """Write a file at each of these paths, by default an empty one."""
    for path in map(Path, names):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def add_record(original, name, **settings):
    """Record that an image was made from an original: the file of this name in `out`."""
    append_record(make_record(original, settings, name, f"out/{name}"), f"out/{RECORDS}")


def add_result(original, name, **settings):
    """Write an empty file as the result of an original, and its record."""
    write(f"out/{name}")
    add_record(original, name, **settings)


def listed(folder):
    return [os.path.relpath(path, folder) for path in list_images(folder, RESULTS)]


def pair(true="in", colored="out"):
    return pair_images(true, colored, RESULTS, RECORDS)


def test_images_in_nested_folders_are_listed_sorted_without_hidden_ones():
    """Thumbnails, trash and snapshots of network drives, Windows and macOS count as hidden."""
    hidden = [".hidden.jpg", "._2.JPEG", ".cache/x.jpg", "@eaDir/a.png/SYNOPHOTO_THUMB_M.png", "#recycle/b.png"]
    hidden += [f"{name}/a.jpg" for name in ("@Recycle", "b/$RECYCLE.BIN", "__MACOSX", "#snapshot/b", "$Recycle.Bin")]
    write("b/2.JPEG", "b/1.png", "a/c/3.tif", "0.jpg", "notes.txt", *hidden)
    assert listed(".") == ["0.jpg", "a/c/3.tif", "b/1.png", "b/2.JPEG"]


def test_other_files_are_counted_in_one_line(capsys):
    write("a.png", "b.JP2", "b.avif", "b.heic", "b.md", "c.md", "none", ".hidden", RESULTS)
    assert listed(".") == ["a.png", "b.JP2", "b.avif", "b.heic"]
    assert capsys.readouterr().err == ".: 3 other files skipped (.md)\n"


def test_linked_folder_is_visited_once(capsys):
    write("z/a.png")
    for name in ("up", "up2"):
        Path("z", name).symlink_to("..")  # with two of them there are endless paths
    Path("a").symlink_to("z")
    assert listed(".") == ["a/a.png"]
    assert capsys.readouterr().err.count("a link to a folder that is visited anyway") == 3


def test_unreadable_folder_is_reported(monkeypatch, capsys):
    write("open/a.png", "closed/b.png")
    scandir = os.scandir

    def guarded(folder):
        if "closed" in str(folder):
            raise PermissionError(13, "Permission denied", folder)
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", guarded)  # root, which may run this test, may read any folder
    assert len(listed(".")) == 1
    assert "closed: skipped: permission denied" in capsys.readouterr().err


def test_paths_on_windows_become_names_with_forward_slashes_on_one_drive(monkeypatch, error_message):
    monkeypatch.setattr("support.folders.os", SimpleNamespace(path=ntpath, sep="\\"))
    assert relative_path("C:\\in\\class\\a.png", "C:\\in\\b.png") == "class/a.png"
    assert "different drives" in error_message(named_images, ["C:\\a", "D:\\b"], RESULTS)


def test_subfolders_of_results_are_skipped_unless_they_are_asked_for(capsys):
    write("in/a.png", "in/out/b.png", f"in/out/{RESULTS}")
    assert listed("in") == ["a.png"]
    assert capsys.readouterr().err == f"in/out: skipped: contains results ({RESULTS})\n"
    assert listed("in/out") == ["b.png"] and not capsys.readouterr().err


def test_missing_or_empty_folder_is_reported(error_message):
    assert error_message(list_images, "missing", RESULTS) == "missing: no such file or folder"
    assert ".: no images here (.jpg .jpeg" in error_message(list_images, ".", RESULTS)


# Pairs


def test_newest_records_pair_results_with_their_images(capsys):
    write("in/p.bmp", "in/p.jpg", "in/q.jpg")
    add_result("in/p.jpg", "p.png")  # before p.bmp was there, which now takes the name p
    pairs, left_out, _ = pair()
    assert pairs == [("p.jpg", "in/p.jpg", "out/p.png")] and left_out == {"no result": ["p", "q"]}
    assert capsys.readouterr().err == "p: no result\nq: no result\n"
    add_result("in/p.jpg", "p.jpg.png")
    pairs, left_out, _ = pair()
    assert pairs == [("p.jpg", "in/p.jpg", "out/p.jpg.png")]
    assert left_out["older than another result of the same image"] == ["p"]
    add_result("in/p.bmp", "p.png")
    pairs, _, _ = pair()
    assert pairs == [("p", "in/p.bmp", "out/p.png"), ("p.jpg", "in/p.jpg", "out/p.jpg.png")]


def test_originals_alone_are_paired_with_others_at_random(error_message):
    paths = [f"in/{i}.jpg" for i in range(9)]
    write(*paths)
    originals, left_out, made_by = pair(colored=None)
    assert originals == [(f"{i}", path, None) for i, path in enumerate(paths)] and not left_out and made_by is None
    first, second = (pair_at_random(originals, seed) for seed in (0, 1))
    for pairs in (first, second):
        assert [pair[:2] for pair in pairs] == [pair[:2] for pair in originals]
        assert sorted(other for _, _, other in pairs) == paths and all(path != other for _, path, other in pairs)
    assert first != second and first == pair_at_random(originals, 0)
    assert "in/0.jpg: is the only image" in error_message(pair_at_random, originals[:1], 0)


def test_results_without_records_are_paired_by_name_with_a_note(capsys, error_message):
    write("in/x/a.jpg", "in/b.tif", "out/x/a.png", "out/b.webp", "out/stray.png")
    pairs, left_out, made_by = pair()
    assert pairs == [("b", "in/b.tif", "out/b.webp"), ("x/a", "in/x/a.jpg", "out/x/a.png")]
    assert left_out == {"no original": ["stray"]} and made_by is None
    assert "out: 2 images paired by name, without a record of the original\n" in capsys.readouterr().err
    assert pair(None)[0] == [("b", None, "out/b.webp"), ("stray", None, "out/stray.png"), ("x/a", None, "out/x/a.png")]
    assert not capsys.readouterr().err
    write("other/c.png")
    assert error_message(pair, "other") == "out: no image could be paired, for the reasons above"


def test_moved_and_copied_files_are_recognized_by_their_checksums(capsys):
    """The folder was renamed, and tar rounded the times to whole seconds."""
    for name in ("x/a", "b"):
        write(f"in/{name}.jpg", f"out/{name}.png", text=name)
        add_record(f"in/{name}.jpg", f"{name}.png")
    os.rename("in", "moved")
    for path in (*Path("moved").rglob("*.jpg"), *Path("out").rglob("*.png")):
        os.utime(path, (path.stat().st_mtime_ns // 10**9,) * 2)
    pairs, left_out, _ = pair("moved")
    assert pairs == [("b", "moved/b.jpg", "out/b.png"), ("x/a", "moved/x/a.jpg", "out/x/a.png")]
    assert not left_out and capsys.readouterr().err == ""
    write("moved/b.jpg", text="c")  # of the same size
    os.utime("moved/b.jpg", (2, 2))
    assert pair("moved")[1] == {"original changed since it was recorded": ["b"]}


def test_results_of_mixed_settings_are_not_used_together(capsys):
    """An interrupted run replaced two of four results, and wrote one in another format."""
    write(*(f"in/{name}.jpg" for name in "abcd"))
    for name in "abcd":
        add_result(f"in/{name}.jpg", f"{name}.png", sha256="old")
    add_result("in/a.jpg", "a.png", sha256="new")
    add_result("in/b.jpg", "b.webp", sha256="new")
    made_by = {"checkpoint": "new.pdparams", "sha256": "new"}
    write(f"out/{RESULTS}", text=json.dumps(made_by))
    left_out = {"made with other settings than the newest result": ["b", "c", "d"]}
    assert pair() == ([("a", "in/a.jpg", "out/a.png"), ("b", "in/b.jpg", "out/b.webp")], left_out, made_by)
    assert "c: made with other settings than the newest result\n" in capsys.readouterr().err
    assert pair(None) == ([("a", None, "out/a.png"), ("b.webp", None, "out/b.webp")], left_out, made_by)


@pytest.mark.parametrize("text", ['{"checkpoint": "new.pdparams", "sha256": "new", "crop_size": 224}', "{"])
def test_description_of_another_run_or_damaged_one_is_not_that_of_the_results(text):
    """The next run described itself, and was stopped before its first result."""
    write("in/a.jpg", f"out/{RESULTS}", text=text)
    add_result("in/a.jpg", "a.png", sha256="old", crop_size=None)
    assert pair()[2] == {"sha256": "old", "crop_size": None}


def test_files_that_are_not_as_recorded_are_not_paired():
    for name in "abce":
        write(f"in/{name}.jpg")
        add_result(f"in/{name}.jpg", f"{name}.png")
    os.remove("in/e.jpg")
    write("out/a.png", "in/b.jpg", text="exchanged")
    write("in/d.jpg", "out/d.png")
    pairs, left_out, _ = pair()
    assert pairs == [("c", "in/c.jpg", "out/c.png")]
    assert left_out == {
        "changed since it was recorded": ["a"],
        "no original": ["e"],
        "original changed since it was recorded": ["b"],
        "not recorded, unlike other results": ["d"],
    }


@pytest.mark.parametrize("part", ["out/x", "out/x/a.png"])
def test_part_of_the_results_has_the_records_of_the_whole(part):
    write("in/x/a.jpg")
    add_result("in/x/a.jpg", "x/a.png", sha256="new")
    assert pair("in/x", part) == ([("a", "in/x/a.jpg", "out/x/a.png")], {}, {"sha256": "new"})


def test_names_agree_whether_accents_are_composed_or_not():
    composed, apart = (unicodedata.normalize(form, "café/ñ") for form in ("NFC", "NFD"))
    write(f"in/{apart}.jpg", f"out/{composed}.png")
    assert pair()[0] == [(composed, f"in/{apart}.jpg", f"out/{composed}.png")]
    add_record(f"in/{apart}.jpg", f"{composed}.png")
    os.renames(f"out/{composed}.png", f"out/{apart}.png")
    assert pair()[0] == [(composed, f"in/{apart}.jpg", f"out/{apart}.png")]
    write(f"in/{composed}.jpg")
    assert {*named_images(["in"], RESULTS).values()} == {f"in/{apart}.jpg", f"in/{composed}.jpg"}


# Records


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda: os.utime("a.jpg", (1, 1)), ""),
        (lambda: write("a.jpg", text="more"), "the original has changed"),
        (lambda: write("out/a.png", text="more"), "the result is missing or has changed"),
        (lambda: os.remove("out/a.png"), "the result is missing or has changed"),
    ],
)
def test_result_is_up_to_date_or_the_reason_is_named(change, reason):
    write("a.jpg")
    add_result("a.jpg", "a.png", temperature=1)
    (record,) = read_records(f"out/{RECORDS}").values()
    change()
    assert what_changed(record, "a.jpg", {"temperature": 1}, "out/a.png") == reason
    changed = what_changed(record, "a.jpg", {"temperature": 2, "size": 3}, "out/a.png")
    assert changed == "other settings (size, temperature)"


def test_source_is_the_same_path_or_the_same_content():
    write("a.jpg", text="a")
    write("b.jpg", text="b")
    record = make_record("a.jpg", {}, "a.png", "missing")
    assert same_source(record, "a.jpg") and not same_source(record, "b.jpg")
    os.rename("a.jpg", "moved.jpg")
    write("a.jpg", text="edited")
    assert same_source(record, "moved.jpg") and same_source(record, "a.jpg")


def test_records_of_files_that_are_gone_are_written_and_those_cut_short_by_a_kill_ignored():
    for name in ("a", "b"):
        append_record(make_record("missing", {}, name, "missing"), RECORDS)
    write(RECORDS, text=Path(RECORDS).read_text()[:-9])
    append_record(make_record("missing", {}, "c", "missing"), RECORDS)
    assert list(read_records(RECORDS)) == ["a", "c"]
