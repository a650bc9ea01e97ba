"""get_invalid_images.py: the listed images, and the script that removes files of any name."""

import csv
import os
import shutil
import subprocess
import sys
from pathlib import Path

from support.cli import EXIT_SKIPPED

import numpy as np
import pytest
from PIL import Image
from skimage import data

import get_invalid_images

ROOT = Path(get_invalid_images.__file__).parent
COLOR = data.coffee()[100:196, 200:328]
GRAY = np.asarray(Image.fromarray(COLOR).convert("L"))
NASTY_NAMES = (
    *("two words.png", "it's.png", 'double"quote.png', "$HOME.png", "`ls`.png", "$(touch pwned).png"),
    *(
        "line\nbreak.png",
        "ends in newline\n.png",
        "-rf.png",
        "*.png",
        "semi;colon.png",
        "back\\slash.png",
        "ümlaut.png",
    ),
    *("tab\t.png", "return\r.png", "!bang.png", "~.png", "#.png", os.fsdecode(b"latin-\xe9.png")),
)
FOLDER = "-gray $x\n"  # as nasty: `$(dirname …)` would lose the line break


def save(path, image, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        Image.fromarray(image).save(file, options.pop("format", "PNG"), **options)
    return path


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
    save(images / "ok" / "color.png", COLOR)
    save(images / "ok" / "color.jpg", COLOR, format="JPEG")
    save(images / "ok" / "corner.png", one_red_corner)
    Image.fromarray(COLOR).quantize(64).save(images / "ok" / "palette.png")
    Image.fromarray(COLOR).convert("CMYK").save(images / "ok" / "cmyk.jpg")
    single = images / "single"
    save(single / "l.jpg", GRAY, format="JPEG")
    save(single / "i16.png", GRAY.astype(np.uint16) * 257)
    Image.fromarray(GRAY).convert("LA").save(single / "la.png")
    Image.fromarray(GRAY).convert("1").save(single / "one_bit.png")
    gray = images / "gray"
    save(gray / "rgb.png", gray_rgb)
    save(gray / "rgb.jpg", gray_rgb, format="JPEG")
    save(gray / "noisy.jpg", noisy_gray(2), format="JPEG", quality=95)
    Image.fromarray(GRAY).convert("P").save(gray / "palette.png")
    broken = images / "broken"
    whole = save(broken / "truncated.jpg", COLOR, format="JPEG").read_bytes()
    (broken / "truncated.jpg").write_bytes(whole[: len(whole) * 2 // 3])
    whole = save(broken / "truncated.png", COLOR).read_bytes()
    (broken / "truncated.png").write_bytes(whole[: len(whole) // 2])
    (broken / "text.jpg").write_text("not an image")
    (broken / "empty.jpg").touch()
    before = sorted(images.rglob("*"))

    code, listed = run(images, tmp_path)

    categories = {os.path.relpath(path, images): reason.split(":")[0] for path, reason in listed.items()}
    by_folder = {"single": "single channel", "gray": "gray in color", "broken": "unreadable"}
    expected = [path.relative_to(images) for path in before if path.is_file() and path.parent.name != "ok"]
    assert categories == {str(path): by_folder[path.parts[0]] for path in expected}
    assert listed[str(broken / "empty.jpg")] == "unreadable: empty file"
    assert "truncated" in listed[str(broken / "truncated.jpg")]
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
    save(tmp_path / "images" / "a.png", image)
    assert bool(run(tmp_path / "images", tmp_path, *flags)[1]) == invalid


def test_script_removes_the_listed_files_of_any_name(tmp_path):
    images = tmp_path / "$(touch pwned) 'images'"
    for name in NASTY_NAMES:
        save(images / FOLDER / name, GRAY)
        save(images / "color" / name, COLOR)
    _, listed = run(images, tmp_path)
    assert sorted(listed) == sorted(str(images / FOLDER / name) for name in NASTY_NAMES)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for _ in range(2):  # harmless when run again
        done = run_script(tmp_path, cwd=elsewhere)
        assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
        assert list((images / FOLDER).iterdir()) == []
        assert sorted(path.name for path in (images / "color").iterdir()) == sorted(NASTY_NAMES)
    assert list(elsewhere.iterdir()) == []


def test_script_with_move_to_keeps_the_folders(tmp_path):
    images, target = tmp_path / "images", tmp_path / "-moved $ones"
    for name in NASTY_NAMES:
        save(images / FOLDER / name, GRAY)
    content = (images / FOLDER / NASTY_NAMES[0]).read_bytes()
    save(images / "color.png", COLOR)
    run(images, tmp_path, "--move_to", str(target))
    for _ in range(2):
        done = run_script(tmp_path)
        assert (done.returncode, done.stderr) == (0, b"")
        assert sorted(path.name for path in (target / FOLDER).iterdir()) == sorted(NASTY_NAMES)
        assert [path.name for path in images.rglob("*.png")] == ["color.png"]
    assert (target / FOLDER / NASTY_NAMES[0]).read_bytes() == content


def test_script_on_windows_has_forward_slashes(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sep", "\\")
    get_invalid_images.write_script({"C:\\in\\a.png": "C:\\moved/a.png"}, tmp_path / "script")
    assert "move 'C:/in/a.png' 'C:/moved/a.png'\n" in (tmp_path / "script").read_text()


def test_script_replaces_no_file_and_continues(tmp_path):
    images, target = tmp_path / "images", tmp_path / "moved"
    for name in ("a.png", "b.png"):
        save(images / name, GRAY)
    save(target / "a.png", COLOR)
    there = (target / "a.png").read_bytes()
    run(images, tmp_path, "--move_to", str(target))
    done = run_script(tmp_path)
    assert done.returncode == 1 and b"a.png: not moved" in done.stderr
    assert (target / "a.png").read_bytes() == there and (images / "a.png").exists()
    assert (target / "b.png").exists() and not (images / "b.png").exists()


def test_image_dir_that_is_one_file_is_moved(tmp_path):
    path = save(tmp_path / "images" / "gray.png", GRAY)
    run(path, tmp_path, "--move_to", str(tmp_path / "moved"))
    assert run_script(tmp_path).returncode == 0
    assert (tmp_path / "moved" / "gray.png").exists() and not path.exists()


def test_missing_file_is_not_listed(tmp_path, capsys):
    save(tmp_path / "images" / "color.png", COLOR)
    (tmp_path / "images" / "link.png").symlink_to(tmp_path / "not there.png")
    code, listed = run(tmp_path / "images", tmp_path)
    assert (code, listed) == (EXIT_SKIPPED, {})
    assert "link.png: not checked: no such file" in capsys.readouterr().err
    assert "link" not in (tmp_path / "remove_invalid.sh").read_text()


def test_only_gray_and_damaged_images_are_listed(tmp_path, capsys, monkeypatch):
    """An intact image that this installation cannot read is never removed."""
    images = tmp_path / "images"
    monkeypatch.setattr("support.images.MAX_PIXELS", COLOR.size)
    save(images / "large.png", np.zeros((200, 200, 3), np.uint8))
    unsupported = {
        "heic.jpg": b"\0\0\0\x18ftypheic" + bytes(100),
        "avif.png": b"\0\0\0\x18ftypavif" + bytes(100),
        "jpeg_xl.jpg": b"\xff\x0a" + bytes(100),
        "postscript.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n",
        "kind.tif": b"II*\0\x08\0\0\0" + bytes(100),
        "cut_in_the_header.jpg": b"\xff\xd8\xff\xe0\0\x10JFIF\0",
    }
    monkeypatch.setattr("support.images.FORMATS", {"JPEG", "PNG", "TIFF"})
    for name, content in unsupported.items():
        (images / name).write_bytes(content)
    Image.fromarray(np.linspace(-1, 300, 12, dtype=np.float32).reshape(3, 4)).save(images / "float.tif")
    damaged = save(images / "damaged.png", COLOR)
    damaged.write_bytes(damaged.read_bytes()[:3000])
    for flags in ((), ("--remove",)):
        code, listed = run(images, tmp_path, *flags)
        assert code == EXIT_SKIPPED and list(listed) == [str(damaged)]
        lines = capsys.readouterr().err.splitlines()
        assert [line.split(": not checked")[0] for line in lines] == sorted(
            str(images / name) for name in (*unsupported, "large.png", "float.tif")
        )
    assert {path.name for path in images.iterdir()} == {*unsupported, "large.png", "float.tif"}


@pytest.mark.parametrize("move", [False, True])
def test_remove_flag_does_the_same_as_the_script(tmp_path, capsys, move):
    flags = ["--move_to", str(tmp_path / "moved")] if move else []
    trees = []
    for folder, more in (("script", ()), ("flag", ("--remove",))):
        images = tmp_path / folder
        for name in NASTY_NAMES:
            save(images / FOLDER / name, GRAY)
        save(images / "color.png", COLOR)
        code, listed = run(images, tmp_path, *flags, *more)
        assert code == 0 and len(listed) == len(NASTY_NAMES)
        last = capsys.readouterr().out.splitlines()[-1]
        assert last.endswith(f"{'moved' if move else 'deleted'} by this run: {len(listed)}") == bool(more)
        assert more or run_script(tmp_path).returncode == 0
        trees.append({str(path.relative_to(images)) for path in images.rglob("*")})
        if move:
            trees[-1] |= {str(path.relative_to(tmp_path)) for path in (tmp_path / "moved").rglob("*.png")}
            shutil.rmtree(tmp_path / "moved")
    assert trees[0] == trees[1] and (len(trees[0]) > len(NASTY_NAMES)) == move


def test_remove_flag_replaces_no_file_and_continues(tmp_path, capsys):
    images, target = tmp_path / "images", tmp_path / "moved"
    for name in ("a.png", "b.png"):
        save(images / name, GRAY)
    there = save(target / "a.png", COLOR).read_bytes()
    code, _ = run(images, tmp_path, "--move_to", str(target), "--remove")
    assert code == EXIT_SKIPPED and "a.png: not removed: there is already" in capsys.readouterr().err
    assert (target / "a.png").read_bytes() == there and (images / "a.png").exists()
    assert (target / "b.png").exists() and not (images / "b.png").exists()


def test_script_without_invalid_images_does_nothing(tmp_path):
    save(tmp_path / "images" / "color.png", COLOR)
    assert run(tmp_path / "images", tmp_path) == (0, {})
    assert run_script(tmp_path).returncode == 0


def test_worker_processes_give_the_same_list(tmp_path):
    for i in range(20):
        save(tmp_path / "images" / f"{i}.png", GRAY if i % 3 else COLOR)
    _, alone = run(tmp_path / "images", tmp_path)
    _, shared = run(tmp_path / "images", tmp_path, "--num_workers", "2")
    assert list(alone.items()) == list(shared.items()) and len(alone) == 13


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--image_dir", "missing"), "missing: no such file or folder"),
        (("--image_dir", "empty"), "empty: no images here"),
        (("--image_dir", "images", "--move_to", "images/bad"), "--move_to images/bad: is inside --image_dir"),
        (("--image_dir", "images", "--output", "images/a.png"), "images/a.png: cannot be written to: file exists"),
    ],
)
def test_invalid_input_is_reported_in_one_line(tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    save(tmp_path / "images" / "a.png", COLOR)
    with pytest.raises(SystemExit) as stop:
        get_invalid_images.main(get_invalid_images.parse_args(list(flags)))
    assert message in str(stop.value) and "\n" not in str(stop.value)


@pytest.mark.slow
def test_command_of_the_readme_removes_images_and_stops_on_errors(tmp_path):
    """The README's line; a wrong path ends it before the script of an earlier run is executed."""
    save(tmp_path / "images" / "gray.png", GRAY)
    command = f"'{sys.executable}' '{ROOT / 'get_invalid_images.py'}' --image_dir images && bash remove_invalid.sh"
    done = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and not (tmp_path / "images" / "gray.png").exists()
    last = "listed in ./invalid_images.csv; deleted by bash ./remove_invalid.sh, or by the same command with --remove"
    assert done.stdout.splitlines()[-1] == last
    done = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("images: no images here")
