"""Files: written whole or not at all, with their permissions, and names of any length."""

import errno
import os
import time
from pathlib import Path

from support.files import atomic_path, lock_folder, make_folder

import pytest


def test_interrupted_write_keeps_the_old_file(tmp_path):
    (tmp_path / "a").write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_path(tmp_path / "a") as temporary:
        temporary.write_text("new")
        raise KeyboardInterrupt
    assert (tmp_path / "a").read_text() == "old" and os.listdir(tmp_path) == ["a"]


def test_replaced_file_keeps_its_permissions_and_links_to_it(tmp_path):
    (tmp_path / "folder").mkdir()
    (file := tmp_path / "folder" / "a").write_text("old")
    file.chmod(0o640)
    (link := tmp_path / "link").symlink_to("folder/a")
    with atomic_path(link) as temporary:
        temporary.write_text("new")
    assert link.is_symlink() and file.read_text() == "new" and file.stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("refused", ["chmod", "fsync", "access"])
def test_file_systems_that_refuse_courtesies_hold_results(tmp_path, monkeypatch, refused):
    """Fail as network file systems do. `shutil.copymode` calls `chmod`."""

    def refuse(*_, **__):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, refused, refuse)
    make_folder(tmp_path)
    for text in ("old", "new"):
        with atomic_path(tmp_path / "a") as temporary:
            temporary.write_text(text)
    assert (tmp_path / "a").read_text() == "new" and os.listdir(tmp_path) == ["a"]


def test_sync_that_reports_a_full_disk_keeps_the_old_file(tmp_path, monkeypatch, error_message):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "a").write_text("old")
    monkeypatch.setattr(os, "fsync", full)

    def write():
        with atomic_path(tmp_path / "a") as temporary:
            temporary.write_text("new")

    assert error_message(write) == f"{tmp_path / 'a'}: cannot be written: no space left on device"
    assert (tmp_path / "a").read_text() == "old" and os.listdir(tmp_path) == ["a"]


def test_folder_in_which_nothing_can_be_written_is_refused(tmp_path, monkeypatch, error_message):
    """Even if its permission bits allow it."""

    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "touch", refuse)
    assert error_message(make_folder, tmp_path) == f"{tmp_path}: cannot be written to: permission denied"


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


def test_folder_on_a_file_system_without_locks_stays_unlocked(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("support.files.fcntl.lockf", refuse)
    for folder in (tmp_path, tmp_path / "missing"):  # in the second, the file of the lock cannot be opened, either
        lock_folder(folder).close()
