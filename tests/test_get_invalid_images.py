"""get_invalid_images.py: the listed images, and removing files of any name, by the list and by the script."""

import csv
import errno
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

from support.cli import EXIT_SKIPPED

import numpy as np
import pytest
from conftest import png_bomb, save_image, save_images
from PIL import Image, JpegImagePlugin
from skimage import data

import get_invalid_images

ROOT = Path(get_invalid_images.__file__).parent
COLOR = data.coffee()[100:196, 200:328]
GRAY = np.asarray(Image.fromarray(COLOR).convert("L"))
NASTY_NAMES = (
    *("two words.png", "it's.png", 'double"quote.png', "$HOME.png", "`ls`.png", "$(touch pwned).png"),
    *("line\nbreak.png", "ends in newline\n.png", "-rf.png", "*.png", "semi;colon.png", "back\\slash.png"),
    *("ümlaut.png", "tab\t.png", "return\r.png", "!bang.png", "~.png", "#.png", os.fsdecode(b"latin-\xe9.png")),
)
FOLDER = "-gray $x\n"  # `$(dirname …)` would lose the line break


def run(image_dir, output, *flags):
    """Return the exit code of `main` and the listed {path: reason}."""
    arguments = [f"--image_dir={image_dir}", f"--output={output}", "--num_workers=0", *flags]
    code = get_invalid_images.main(get_invalid_images.parse_args(arguments))
    with open(output / "invalid_images.csv", newline="", encoding="utf-8", errors="surrogateescape") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["path", "reason"]
    return code, dict(filter(None, rows[1:]))


def remove(image_dir, output, *flags):
    """List images and remove those that are listed. Return the exit code."""
    run(image_dir, output, *flags)
    return run(image_dir, output, *flags, f"--remove_listed={output / 'invalid_images.csv'}")[0]


def run_script(output, **options):
    return subprocess.run(["bash", str(output / "remove_invalid.sh")], capture_output=True, text=True, **options)


def noisy_gray(levels):
    noise = np.random.default_rng(0).integers(-levels, levels + 1, COLOR.shape)
    return (GRAY[..., None] + noise).clip(0, 255).astype(np.uint8)


def test_images_are_listed_with_the_right_reason(tmp_path, capsys):
    images = tmp_path / "images"
    gray_rgb = np.repeat(GRAY[..., None], 3, axis=2)
    one_red_corner = gray_rgb.copy()
    one_red_corner[:4, :4] = (200, 30, 30)
    save_images(images / "ok", {"color": COLOR, "corner": one_red_corner})
    Image.fromarray(COLOR).quantize(64).save(images / "ok" / "palette.png")
    save_images(images / "single", {"l": GRAY, "i16": GRAY.astype(np.uint16) * 257})
    Image.fromarray(GRAY).convert("1").save(images / "single" / "one_bit.png")
    save_image(images / "gray" / "rgb.png", gray_rgb)
    save_image(images / "gray" / "noisy.jpg", noisy_gray(2), quality=95)
    Image.fromarray(GRAY).convert("P").save(images / "gray" / "palette.png")
    damaged = images / "damaged"
    whole = save_image(damaged / "truncated.jpg", COLOR).read_bytes()
    (damaged / "truncated.jpg").write_bytes(whole[: len(whole) * 2 // 3])
    whole = save_image(damaged / "cut_short.png", COLOR).read_bytes()
    (damaged / "cut_short.png").write_bytes(whole[:60])
    (damaged / "page.jpg").write_text("<html><body>Not found</body></html>")
    (damaged / "empty.jpg").touch()
    before = sorted(images.rglob("*"))

    code, listed = run(images, tmp_path)

    categories = {os.path.relpath(path, images): reason.split(":")[0] for path, reason in listed.items()}
    by_folder = {"single": "single channel", "gray": "gray in color", "damaged": "unreadable"}
    expected = [path.relative_to(images) for path in before if path.is_file() and path.parent.name != "ok"]
    assert categories == {str(path): by_folder[path.parts[0]] for path in expected}
    assert listed[str(damaged / "empty.jpg")] == "unreadable: empty file"
    assert code == 0
    printed = [line.split(None, 1) for line in capsys.readouterr().out.splitlines()]
    assert printed[:4] == [
        ["10", "of 13 images are unsuitable, 0 skipped"],
        ["3", "single channel"],
        ["3", "gray in color"],
        ["4", "unreadable"],
    ]
    assert sorted(images.rglob("*")) == before  # nothing was touched


@pytest.mark.parametrize(
    ("spread", "flags", "invalid"), [(5, (), True), (6, (), False), (6, ("--tolerance", "6"), True)]
)
def test_tolerance_limits_the_spread_of_each_pixels_channels(tmp_path, spread, flags, invalid):
    image = np.repeat(GRAY[..., None] // 2, 3, axis=2)
    image[50, 60, 1] += spread  # in one pixel only
    save_image(tmp_path / "images" / "a.png", image)
    assert bool(run(tmp_path / "images", tmp_path, *flags)[1]) == invalid


@pytest.mark.parametrize(("way", "move"), [("--remove", True), ("--remove_listed", False), ("remove_invalid.sh", True)])
def test_listed_files_of_any_name_are_deleted_or_moved(tmp_path, monkeypatch, capsys, move, way):
    """The script works from any folder, although --image_dir was a relative path."""
    images, target = Path("-$(touch pwned) 'images'"), tmp_path / "-moved $ones"
    monkeypatch.chdir(tmp_path)
    for name in NASTY_NAMES:
        content = save_image(images / FOLDER / name, GRAY).read_bytes()
        save_image(images / "color" / name, COLOR)
    flags = [f"--move_to={target}"] if move else []
    code, listed = run(images, tmp_path, *flags, *(["--remove"] if way == "--remove" else []))
    assert code == 0 and sorted(listed) == sorted(str(images / FOLDER / name) for name in NASTY_NAMES)
    if way == "--remove_listed":
        with open("invalid_images.csv", "a") as file:
            file.write("\n")  # as an editor may add
        for count in (len(listed), 0):  # the second time, all are missing
            assert run(images, tmp_path, *flags, "--remove_listed=invalid_images.csv")[0] == 0
            assert capsys.readouterr().out.endswith(f"invalid_images.csv: {count} of {len(listed)} images deleted\n")
    elif way == "remove_invalid.sh":
        (tmp_path / "elsewhere").mkdir()
        script = run_script(tmp_path, cwd="elsewhere")
        assert (script.returncode, script.stderr) == (0, "") and not os.listdir("elsewhere")
        assert script.stdout == f"{tmp_path}/invalid_images.csv: {len(listed)} of {len(listed)} images moved\n"
    assert not os.listdir(images / FOLDER) and sorted(os.listdir(images / "color")) == sorted(NASTY_NAMES)
    moved = {path.name: path.read_bytes() for path in (target / FOLDER).glob("*")}
    assert moved == (dict.fromkeys(NASTY_NAMES, content) if move else {})


def test_script_on_windows_has_forward_slashes(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sep", "\\")
    args = SimpleNamespace(image_dir="C:\\in", move_to="D:\\moved")
    get_invalid_images.write_script(args, "list.csv", tmp_path / "script")
    assert " --image_dir=C:/in --move_to=D:/moved " in (tmp_path / "script").read_text()


def test_existing_file_is_not_replaced_by_a_moved_one(tmp_path, capsys):
    images, target = tmp_path / "images", tmp_path / "moved"
    for name in ("a.png", "new.png"):
        save_image(images / name, GRAY)
    before = save_image(target / "a.png", COLOR).read_bytes()
    assert remove(images, tmp_path, f"--move_to={target}") == EXIT_SKIPPED
    assert capsys.readouterr().err == f"{images}/a.png: not removed: there is already {target}/a.png\n"
    assert (target / "a.png").read_bytes() == before and os.listdir(images) == ["a.png"]


def test_failed_move_leaves_the_image_and_no_part_of_it(tmp_path, monkeypatch, capsys):
    path = save_image(tmp_path / "images" / "gray.png", GRAY)
    content = path.read_bytes()

    def fail(source, target):
        Path(target).write_bytes(b"part")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("shutil.copyfile", fail)
    assert remove(path.parent, tmp_path, f"--move_to={tmp_path / 'moved'}") == EXIT_SKIPPED
    assert "gray.png: cannot be written: no space left on device" in capsys.readouterr().err
    assert path.read_bytes() == content and not os.listdir(tmp_path / "moved")


@pytest.mark.parametrize("refused", [False, True])
def test_moved_image_keeps_its_time_unless_the_disk_refuses(tmp_path, monkeypatch, refused):
    path, moved = save_image(tmp_path / "images" / "gray.png", GRAY), tmp_path / "moved" / "gray.png"
    os.utime(path, (1_000_000_000,) * 2)

    def refuse(*_):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    if refused:
        monkeypatch.setattr("shutil.copystat", refuse)
    assert remove(path.parent, tmp_path, f"--move_to={moved.parent}") == 0 and not path.exists()
    assert (moved.stat().st_mtime == 1_000_000_000) != refused


def test_moved_links_are_images_even_if_their_targets_are_moved_too(tmp_path):
    images, moved = tmp_path / "images", tmp_path / "else" / "where"
    outside, inside = save_image(tmp_path / "pool" / "1.png", GRAY), save_image(images / "a" / "1.png", GRAY)
    (images / "b").mkdir()
    (images / "b" / "outside.png").symlink_to("../../pool/1.png")
    (images / "b" / "inside.png").symlink_to("../a/1.png")
    content = inside.read_bytes()
    assert remove(images, tmp_path, f"--move_to={moved}") == 0
    for name in ("a/1.png", "b/outside.png", "b/inside.png"):
        assert (moved / name).read_bytes() == content and not os.path.lexists(images / name)
    assert outside.exists()


def test_image_that_cannot_be_read_but_may_be_intact_is_not_listed(tmp_path, monkeypatch, capsys):
    """A decoder that lacks memory calls an intact JPEG broken."""

    def broken(_):
        raise OSError("broken data stream when reading image file")

    images = tmp_path / "images"
    save_image(images / "too_large_for_the_memory.jpg", COLOR, progressive=True)
    monkeypatch.setattr(JpegImagePlugin.JpegImageFile, "load", broken)
    (images / "large.png").write_bytes(png_bomb())
    (images / "text.jpg").write_bytes(b"not an image")
    (images / "link.png").symlink_to("not there.png")
    tiff = save_image(images / "ends_too_early.tif", COLOR)  # which Pillow also reports for some intact ones
    tiff.write_bytes(tiff.read_bytes()[:-3000])
    skipped = sorted(images.iterdir())
    damaged = save_image(images / "damaged.png", COLOR)
    damaged.write_bytes(damaged.read_bytes()[:3000])
    code, listed = run(images, tmp_path)
    assert code == EXIT_SKIPPED and list(listed) == [str(damaged)]
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[0] for line in lines] == [f"skipped {path}" for path in skipped]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("images", "--move_to", "images/bad"), "--move_to images/bad: is inside --image_dir"),
        (("images", "--output", "images/a.png"), "images/a.png: cannot be written to: file exists"),
        (("images", "--remove_listed", "images/a.png"), "images/a.png: not a list of this script"),
        (("other", "--remove_listed", "invalid_images.csv"), "lists images/a.png, which is not in --image_dir other"),
    ],
)
def test_usage_error_prints_one_line_and_removes_nothing(tmp_path, monkeypatch, error_message, flags, message):
    monkeypatch.chdir(tmp_path)
    save_image(tmp_path / "images" / "a.png", GRAY)
    run("images", tmp_path)
    arguments = get_invalid_images.parse_args(["--image_dir", *flags])
    assert message in error_message(get_invalid_images.main, arguments)
    assert (tmp_path / "images" / "a.png").exists()


@pytest.mark.slow
def test_command_of_the_readme_removes_images_and_stops_on_errors(tmp_path):
    """The README's line; a wrong path ends it before the script of an earlier run is executed."""
    save_image(tmp_path / "images" / "gray.png", GRAY)
    command = f"'{sys.executable}' '{ROOT / 'get_invalid_images.py'}' --image_dir images && bash remove_invalid.sh"
    done = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and not (tmp_path / "images" / "gray.png").exists()
    by = "bash ./remove_invalid.sh, or by the same command with --remove_listed ./invalid_images.csv"
    assert f"listed in ./invalid_images.csv; deleted by {by}\n" in done.stdout
    assert done.stdout.endswith("invalid_images.csv: 1 of 1 images deleted\n")
    done = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("images: no images here")
