"""Unusual use: flags out of range, stopped runs, folders with links and other files, existing results."""

import ntpath
import os
import re
import shutil
import signal
import socket
import time
from types import SimpleNamespace

from support.files import atomic_path, make_folder
from support.folders import relative_path
from support.images import InvalidImageError, read_rgb

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from processes import started, wait_for

from dataset import list_images, named_images


def found(folder, pattern="*.png"):
    """Return the sorted relative paths of a folder's files."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob(pattern))


# Ends of scripts


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_colorization_leaves_only_complete_results(tmp_path, image_folder, number, code):
    (tmp_path / "many").mkdir()
    for i in range(600):
        (tmp_path / "many" / f"{i}.png").symlink_to(image_folder / "coffee.png")
    result = tmp_path / "result"
    flags = [tmp_path / "many", "--load_model", "small", "--load_size", 32, "--result_path", result]
    with started(tmp_path / "run", *map(str, flags), script=ROOT / "test.py") as process:
        wait_for(lambda: len(list(result.glob("*.png"))) > 9, process)
        os.killpg(process.pid, number)
        assert process.wait(60) == code
    lines = (tmp_path / "run" / "err").read_text().strip().splitlines()
    assert re.fullmatch(r"stopped by .*; to resume: .* --skip_existing", lines[-1])
    assert 0 < len(list(result.glob("*.png"))) < 600
    assert "Traceback" not in "".join(lines) and (result / "coloring.json").exists()
    assert not list(result.glob(".*"))
    for path in result.glob("*.png"):
        Image.open(path).load()


def test_only_temporary_files_older_than_a_day_are_removed(tmp_path):
    with atomic_path(tmp_path / "a.png") as left:
        left.touch()
    (folder := tmp_path / f".folder.{'1' * 16}.tmp").mkdir()
    names = (".a.png.1.tmp", ".hidden", f"b.{'0' * 16}.tmp", ".c.tmp", ".d.12345678.9.tmp")
    others = [tmp_path / name for name in names]
    for path in (left, *others):
        path.touch()
    for path in (folder, *others):
        os.utime(path, (time.time() - 90_000,) * 2)
    make_folder(tmp_path)
    assert left.exists()
    os.utime(left, (time.time() - 90_000,) * 2)
    make_folder(tmp_path)
    assert {*tmp_path.iterdir()} == {tmp_path / "a.png", folder, *others}
    make_folder(tmp_path / "new")


def test_interrupted_write_keeps_the_old_file(tmp_path):
    (tmp_path / "a").write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_path(tmp_path / "a") as temporary:
        temporary.write_text("new")
        raise KeyboardInterrupt
    assert (tmp_path / "a").read_text() == "old" and found(tmp_path, "*") == ["a"]


def test_replaced_file_keeps_its_permissions_and_links_to_it(tmp_path):
    (tmp_path / "folder").mkdir()
    (file := tmp_path / "folder" / "a").write_text("old")
    file.chmod(0o640)
    (link := tmp_path / "link").symlink_to("folder/a")
    with atomic_path(link) as temporary:
        temporary.write_text("new")
    assert link.is_symlink() and file.read_text() == "new" and file.stat().st_mode & 0o777 == 0o640


def test_file_that_another_program_holds_briefly_is_replaced(tmp_path, monkeypatch):
    attempts, replace = [], os.replace

    def held(*paths):
        attempts.append(paths)
        if len(attempts) < 3:
            raise PermissionError(13, "Permission denied")
        replace(*paths)

    monkeypatch.setattr(os, "replace", held)
    with atomic_path(tmp_path / "a") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "a").read_text() == "new" and len(attempts) == 3


def test_files_with_the_longest_names_are_written(tmp_path):
    for path in (tmp_path / ("x" * 251 + ".png"), tmp_path / ("猫" * 83 + ".png")):
        with atomic_path(path) as temporary:
            temporary.write_text("")
        assert path.exists()


# Lists of images


@pytest.fixture
def make_images(tmp_path, image_folder):
    """Write an image at each of these paths below tmp_path."""

    def make(*names):
        for name in names:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(image_folder / "coffee.png", tmp_path / name)

    return make


def listed(folder):
    return [os.path.relpath(path, folder) for path in list_images(folder)]


def test_linked_folder_is_visited_once_under_its_own_name(tmp_path, make_images, capsys):
    make_images("z/a.png")
    for name in ("up", "up2"):
        (tmp_path / "z" / name).symlink_to("..")  # with two of them there are endless paths
    (tmp_path / "a").symlink_to("z")
    assert listed(tmp_path) == ["z/a.png"]
    assert capsys.readouterr().err.count("a link to a folder that is visited anyway") == 3


def test_links_to_other_folders_are_followed(tmp_path, make_images):
    make_images("elsewhere/a.png")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "link").symlink_to("../elsewhere")
    assert listed(tmp_path / "in") == ["link/a.png"]


def test_unreadable_folder_is_reported(tmp_path, make_images, monkeypatch, capsys, error_message):
    make_images("open/a.png", "closed/b.png")
    scandir = os.scandir

    def guarded(folder):
        if "closed" in str(folder):
            raise PermissionError(13, "Permission denied", folder)
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", guarded)  # root, which may run this test, may read any folder
    assert len(list_images(tmp_path)) == 1
    assert "closed: skipped: permission denied" in capsys.readouterr().err
    assert "no images here" in error_message(list_images, tmp_path / "closed")


def test_pipes_and_sockets_are_not_opened(tmp_path, make_images, error_message):
    make_images("a.png")
    os.mkfifo(tmp_path / "x.jpg")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(os.path.relpath(tmp_path / "y.jpg"))
        for path in list_images(tmp_path)[1:]:
            with pytest.raises(InvalidImageError, match="not a regular") as error:
                read_rgb(path)
            assert not error.value.damaged
    assert "no such file or folder" in error_message(list_images, tmp_path / "x.jpg")


def test_paths_on_windows_become_names_with_forward_slashes_on_one_drive(monkeypatch, error_message):
    monkeypatch.setattr("support.folders.os", SimpleNamespace(path=ntpath, sep="\\"))
    assert relative_path("C:\\in\\class\\a.png", "C:\\in\\b.png") == "class/a.png"
    assert "different drives" in error_message(named_images, "C:\\a", "D:\\b")


def test_other_files_are_counted_in_one_line(tmp_path, capsys):
    for name in ("a.png", "b.JP2", "b.avif", "b.heic", "b.md", "c.md", "none", ".hidden"):
        (tmp_path / name).touch()
    assert listed(tmp_path) == ["a.png", "b.JP2", "b.avif", "b.heic"]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(": 3 other files skipped (.md)")


def test_truncated_jpeg_counts_as_damaged(tmp_path, image_folder):
    Image.open(image_folder / "coffee.png").save(path := tmp_path / "a.jpg")
    content = path.read_bytes()
    for cut in (2, 3, 60, 1000):
        path.write_bytes(content[:-cut])
        with pytest.raises(InvalidImageError, match="truncated") as error:
            read_rgb(path)
        assert error.value.damaged


# Results and images


def test_results_of_several_files_and_folders_keep_their_names(tmp_path, colorize_files, make_images):
    make_images("one.png", "two.png", "beach/a.png", "hills/a.png")
    code, result = colorize_files(("one.png", "two.png", "one.png", "beach"), "--image_dir", "hills", "--compare")
    assert code == 0 and found(result) == ["beach/a.png", "hills/a.png", "one.png", "two.png"]
    assert found(tmp_path / "result_compare") == ["sheet_001.png"]


def test_output_flag_names_the_result_of_one_image(tmp_path, colorize_files, make_images, error_message):
    make_images("a.png", "c.png")
    assert colorize_files("a.png", "--output", "new/b.jpg")[0] == 0
    assert found(tmp_path / "new", "*") == ["b.jpg"] and Image.open(tmp_path / "new" / "b.jpg").format == "JPEG"
    assert "--output names one file" in error_message(colorize_files, ("a.png", "c.png"), "--output", "b.png")
    assert "would overwrite it" in error_message(colorize_files, "a.png", "--output", "a.png")
    for flags in (("b.xyz",), ("b.png", "--format", "jpg")):
        assert "must end in" in error_message(colorize_files, "a.png", "--output", *flags)


def test_result_path_that_contains_images_is_refused(tmp_path, colorize_files, make_images, error_message):
    """Otherwise a second run would colorize them again, as x.png.png."""
    make_images("same/x.png", "same/y/x.png")
    for images, result in (("same", "same"), ("same/y", "same"), ("same", "same/y"), ("same/x.png", "same")):
        assert "contains input images" in error_message(colorize_files, images, result=result)
    assert found(tmp_path / "same") == ["x.png", "y/x.png"]


def test_earlier_results_and_their_sheets_are_not_colorized(colorize_files, make_images, capsys):
    make_images("in/x.png")
    for name in ("out1", "out2"):
        code, result = colorize_files("in", "--compare", result=f"in/{name}")
        assert code == 0 and found(result) == ["x.png"]
    assert "out1: skipped: contains results (coloring.json)" in capsys.readouterr().err


def test_run_without_results_writes_nothing(tmp_path, colorize_files):
    (tmp_path / "a.png").write_bytes(b"x")
    code, result = colorize_files("a.png")
    assert code == 3 and not found(result, "*")


def test_name_too_long_for_a_result_is_reported(colorize_files, make_images, capsys):
    make_images("in/a.png", *(f"in/{'x' * 251}.{suffix}" for suffix in ("gif", "ppm")))  # and x….ppm.png is too long
    code, result = colorize_files("in")
    assert code == 3 and len(found(result)) == 2 and "file name too long" in capsys.readouterr().err


def test_nearly_black_images_and_further_frames_are_reported(tmp_path, colorize_files, image_folder, capsys):
    gray = Image.open(image_folder / "coffee.png").convert("L")
    (tmp_path / "in").mkdir()
    Image.fromarray(np.asarray(gray).astype(np.uint16) << 4).save(tmp_path / "in" / "twelve.tif")
    gray.save(tmp_path / "in" / "frames.gif", save_all=True, append_images=[gray.rotate(90), gray.rotate(180)])
    gray.save(tmp_path / "in" / "usual.png")
    assert colorize_files("in")[0] == 0
    lines = sorted(capsys.readouterr().err.splitlines())
    assert len(lines) == 2 and "frames.gif: only the first" in lines[0] and "twelve.tif: nearly black" in lines[1]
