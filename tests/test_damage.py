"""Damage that a file itself proves."""

import os
import struct
from pathlib import Path

from support.damage import find_damage

import pytest
from conftest import save_image
from damaged import make
from PIL import Image
from skimage import data

COFFEE = data.coffee()[::8, ::8]


@pytest.fixture(params=["png", "jpg", "progressive.jpg"])
def whole(request, tmp_path):
    options = {"progressive.jpg": {"progressive": True}}.get(request.param, {})
    return save_image(tmp_path / f"a.{request.param}", COFFEE, **options)


def test_truncated_file_is_damaged_and_the_whole_one_is_not(whole):
    content = whole.read_bytes()
    assert find_damage(whole) == ""
    for length in [*range(20, len(content), 50), *range(len(content) - 15, len(content))]:
        whole.write_bytes(content[:length])
        assert find_damage(whole).startswith("truncated")


def test_thumbnail_does_not_count_as_the_end_of_a_jpeg(tmp_path):
    path = save_image(tmp_path / "a.jpg", COFFEE)
    thumbnail, content = path.read_bytes(), path.read_bytes()
    content = content[:2] + b"\xff\xe1" + struct.pack(">H", len(thumbnail) + 2) + thumbnail + content[2:]
    path.write_bytes(content)
    assert find_damage(path) == "" and Image.open(path).size == (75, 50)
    path.write_bytes(content[:-500])
    assert find_damage(path) == "truncated JPEG: no end marker"


def test_bytes_after_the_end_are_allowed(whole):
    whole.write_bytes(whole.read_bytes() + b"more")
    assert find_damage(whole) == ""


def test_wrong_checksum_proves_damage(tmp_path):
    path = save_image(tmp_path / "a.png", COFFEE)
    content = bytearray(path.read_bytes())
    content[content.index(b"IDAT") + 100] ^= 1
    path.write_bytes(content)
    assert find_damage(path) == "damaged PNG: wrong checksum"


@pytest.mark.parametrize(
    ("content", "damage"),
    [
        (b"", "empty file"),
        (b"\n<!DOCTYPE HTML PUBLIC>", "an HTML page"),
        (b"<html><body>Not found", "an HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", ""),
        (b"text", ""),
        (b"II*\0\x08\0\0\0", ""),
    ],
)
def test_only_what_can_be_no_image_proves_damage_in_other_files(tmp_path, content, damage):
    (tmp_path / "a.jpg").write_bytes(content)
    assert find_damage(tmp_path / "a.jpg") == damage


def test_file_that_is_missing_or_cannot_be_read_proves_nothing(tmp_path, monkeypatch):
    def refuse(_):
        raise PermissionError(13, "Permission denied")

    os.mkfifo(tmp_path / "pipe.jpg")
    assert find_damage(tmp_path / "missing.jpg") == find_damage(tmp_path / "pipe.jpg") == ""
    path = save_image(tmp_path / "a.png", COFFEE)
    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert find_damage(path) == ""


def test_intact_files_of_all_formats_are_not_damaged(tmp_path):
    make(tmp_path / "in")
    unharmed = [path for path in (tmp_path / "in").iterdir() if "unharmed" in path.name]
    assert len(unharmed) > 10 and not any(map(find_damage, unharmed))
