"""get_invalid_images.py: the listed images, and the script that removes files of any name."""

import csv
import os
import subprocess
import sys
from pathlib import Path

from support.cli import EXIT_SKIPPED

import numpy as np
import pytest
from conftest import png_bomb, save_image
from PIL import Image
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
    arguments = ["--image_dir", str(image_dir), "--output", str(output), "--num_workers", "0", *flags]
    code = get_invalid_images.main(get_invalid_images.parse_args(arguments))
    with open(output / "invalid_images.csv", newline="", encoding="utf-8", errors="surrogateescape") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["path", "reason"]
    return code, dict(rows[1:])


def run_script(output, **options):
    return subprocess.run(["bash", str(output / "remove_invalid.sh")], capture_output=True, **options)


def noisy_gray(levels):
    noise = np.random.default_rng(0).integers(-levels, levels + 1, COLOR.shape)
    return (GRAY[..., None] + noise).clip(0, 255).astype(np.uint8)


def test_images_are_listed_with_the_right_reason(tmp_path, capsys):
    images = tmp_path / "images"
    gray_rgb = np.repeat(GRAY[..., None], 3, axis=2)
    one_red_corner = gray_rgb.copy()
    one_red_corner[:4, :4] = (200, 30, 30)
    save_image(images / "ok" / "color.png", COLOR)
    save_image(images / "ok" / "color.jpg", COLOR)
    save_image(images / "ok" / "corner.png", one_red_corner)
    Image.fromarray(COLOR).quantize(64).save(images / "ok" / "palette.png")
    Image.fromarray(COLOR).convert("CMYK").save(images / "ok" / "cmyk.jpg")
    single = images / "single"
    save_image(single / "l.jpg", GRAY)
    save_image(single / "i16.png", GRAY.astype(np.uint16) * 257)
    Image.fromarray(GRAY).convert("LA").save(single / "la.png")
    Image.fromarray(GRAY).convert("1").save(single / "one_bit.png")
    gray = images / "gray"
    save_image(gray / "rgb.png", gray_rgb)
    save_image(gray / "rgb.jpg", gray_rgb)
    save_image(gray / "noisy.jpg", noisy_gray(2), quality=95)
    Image.fromarray(GRAY).convert("P").save(gray / "palette.png")
    damaged = images / "damaged"
    whole = save_image(damaged / "truncated.jpg", COLOR).read_bytes()
    (damaged / "truncated.jpg").write_bytes(whole[: len(whole) * 2 // 3])
    whole = save_image(damaged / "truncated.png", COLOR).read_bytes()
    (damaged / "truncated.png").write_bytes(whole[: len(whole) // 2])
    (damaged / "text.jpg").write_text("not an image")
    (damaged / "empty.jpg").touch()
    before = sorted(images.rglob("*"))

    code, listed = run(images, tmp_path)

    categories = {os.path.relpath(path, images): reason.split(":")[0] for path, reason in listed.items()}
    by_folder = {"single": "single channel", "gray": "gray in color", "damaged": "unreadable"}
    expected = [path.relative_to(images) for path in before if path.is_file() and path.parent.name != "ok"]
    assert categories == {str(path): by_folder[path.parts[0]] for path in expected}
    assert listed[str(damaged / "empty.jpg")] == "unreadable: empty file"
    assert "truncated" in listed[str(damaged / "truncated.jpg")]
    assert code == 0
    printed = [line.split(None, 1) for line in capsys.readouterr().out.splitlines()]
    assert printed[:4] == [
        ["12", "of 17 images are unsuitable"],
        ["4", "single channel"],
        ["4", "gray in color"],
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


@pytest.mark.parametrize("move", [False, True])
@pytest.mark.parametrize("remove", [False, True])
def test_listed_files_of_any_name_are_deleted_or_moved_by_script_and_flag(tmp_path, capsys, move, remove):
    images, target, elsewhere = tmp_path / "$(touch pwned) 'images'", tmp_path / "-moved $ones", tmp_path / "elsewhere"
    for name in NASTY_NAMES:
        content = save_image(images / FOLDER / name, GRAY).read_bytes()
        save_image(images / "color" / name, COLOR)
    code, listed = run(images, tmp_path, *["--move_to", str(target)] * move, *["--remove"] * remove)
    assert code == 0 and sorted(listed) == sorted(str(images / FOLDER / name) for name in NASTY_NAMES)
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.endswith(f"{'moved' if move else 'deleted'} by this run: {len(listed)}") == remove
    elsewhere.mkdir()
    for _ in range(0 if remove else 2):  # running the script again does nothing
        done = run_script(tmp_path, cwd=elsewhere)
        assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert list((images / FOLDER).iterdir()) == list(elsewhere.iterdir()) == []
    assert sorted(path.name for path in (images / "color").iterdir()) == sorted(NASTY_NAMES)
    moved = {path.name: path.read_bytes() for path in (target / FOLDER).glob("*")}
    assert moved == (dict.fromkeys(NASTY_NAMES, content) if move else {})


def test_script_on_windows_has_forward_slashes(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sep", "\\")
    get_invalid_images.write_script({"C:\\in\\a.png": "C:\\moved/a.png"}, tmp_path / "script")
    assert "move 'C:/in/a.png' 'C:/moved/a.png'\n" in (tmp_path / "script").read_text()


@pytest.mark.parametrize("remove", [False, True])
def test_existing_file_is_not_replaced_by_a_moved_one(tmp_path, capsys, remove):
    images, target = tmp_path / "images", tmp_path / "moved"
    for name in ("a.png", "b.png"):
        save_image(images / name, GRAY)
    before = save_image(target / "a.png", COLOR).read_bytes()
    code, _ = run(images, tmp_path, "--move_to", str(target), *(["--remove"] if remove else []))
    if remove:
        assert code == EXIT_SKIPPED and "a.png: not removed: there is already" in capsys.readouterr().err
    else:
        done = run_script(tmp_path)
        assert done.returncode == 1 and b"a.png: not moved" in done.stderr
    assert (target / "a.png").read_bytes() == before and (images / "a.png").exists()
    assert (target / "b.png").exists() and not (images / "b.png").exists()


def test_image_dir_that_is_a_single_file_is_moved(tmp_path):
    path = save_image(tmp_path / "images" / "gray.png", GRAY)
    run(path, tmp_path, "--move_to", str(tmp_path / "moved"))
    assert run_script(tmp_path).returncode == 0
    assert (tmp_path / "moved" / "gray.png").exists() and not path.exists()


def test_missing_file_is_not_listed(tmp_path, capsys):
    save_image(tmp_path / "images" / "color.png", COLOR)
    (tmp_path / "images" / "link.png").symlink_to(tmp_path / "not there.png")
    code, listed = run(tmp_path / "images", tmp_path)
    assert (code, listed) == (EXIT_SKIPPED, {})
    assert "link.png: not checked: no such file" in capsys.readouterr().err
    assert "link" not in (tmp_path / "remove_invalid.sh").read_text()


def test_image_that_cannot_be_read_but_may_be_intact_is_not_listed(tmp_path, capsys):
    images = tmp_path / "images"
    save_image(images / "float.tif", np.linspace(-1, 300, 12, dtype=np.float32).reshape(3, 4))
    for name, content in {
        "large.png": png_bomb(),
        "postscript.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n",
        "kind.tif": b"II*\0\x08\0\0\0" + bytes(100),
        "cut_in_the_header.jpg": b"\xff\xd8\xff\xe0\0\x10JFIF\0",
    }.items():
        (images / name).write_bytes(content)
    unsupported = sorted(images.iterdir())
    damaged = save_image(images / "damaged.png", COLOR)
    damaged.write_bytes(damaged.read_bytes()[:3000])
    for flags in ((), ("--remove",)):
        code, listed = run(images, tmp_path, *flags)
        assert code == EXIT_SKIPPED and list(listed) == [str(damaged)]
        lines = capsys.readouterr().err.splitlines()
        assert [line.split(": not checked")[0] for line in lines] == [*map(str, unsupported)]
    assert sorted(images.iterdir()) == unsupported


def test_script_without_invalid_images_does_nothing(tmp_path):
    save_image(tmp_path / "images" / "color.png", COLOR)
    assert run(tmp_path / "images", tmp_path) == (0, {})
    assert run_script(tmp_path).returncode == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--image_dir", "missing"), "missing: no such file or folder"),
        (("--image_dir", "empty"), "empty: no images here"),
        (("--image_dir", "images", "--move_to", "images/bad"), "--move_to images/bad: is inside --image_dir"),
        (("--image_dir", "images", "--output", "images/a.png"), "images/a.png: cannot be written to: file exists"),
    ],
)
def test_usage_error_prints_one_line(tmp_path, monkeypatch, error_message, flags, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    save_image(tmp_path / "images" / "a.png", COLOR)
    assert message in error_message(get_invalid_images.main, get_invalid_images.parse_args(list(flags)))


@pytest.mark.slow
def test_command_of_the_readme_removes_images_and_stops_on_errors(tmp_path):
    """The README's line; a wrong path ends it before the script of an earlier run is executed."""
    save_image(tmp_path / "images" / "gray.png", GRAY)
    command = f"'{sys.executable}' '{ROOT / 'get_invalid_images.py'}' --image_dir images && bash remove_invalid.sh"
    done = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and not (tmp_path / "images" / "gray.png").exists()
    last = "listed in ./invalid_images.csv; deleted by bash ./remove_invalid.sh, or by the same command with --remove"
    assert done.stdout.splitlines()[-1] == last
    done = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("images: no images here")
