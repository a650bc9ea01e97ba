"""Files: written whole or not at all, with their permissions, and names of any length."""

import errno
import os
from pathlib import Path

from support.files import atomic_path, lock_folder, make_folder

import pytest


def refuse(reason):
    """Return a function that fails with a number of `errno`."""

    def fail(*_, **__):
        raise OSError(reason, os.strerror(reason))

    return fail


def write(path, text):
    with atomic_path(path) as temporary:
        temporary.write_text(text)


def test_interrupted_write_keeps_the_old_file(tmp_path):
    write(tmp_path / "a", "old")
    with pytest.raises(KeyboardInterrupt), atomic_path(tmp_path / "a") as temporary:
        temporary.write_text("new")
        raise KeyboardInterrupt
    assert (tmp_path / "a").read_text() == "old" and os.listdir(tmp_path) == ["a"]


def test_replaced_file_keeps_its_permissions_and_links_to_it(tmp_path):
    write(file := tmp_path / "folder" / "a", "old")
    file.chmod(0o640)
    (link := tmp_path / "link").symlink_to("folder/a")
    write(link, "new")
    assert link.is_symlink() and file.read_text() == "new" and file.stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("refused", ["chmod", "fsync"])
def test_file_systems_that_refuse_courtesies_hold_results(tmp_path, monkeypatch, refused):
    """Fail as network file systems do. `shutil.copymode` calls `chmod`."""
    monkeypatch.setattr(os, refused, refuse(errno.EPERM))
    for text in ("old", "new"):
        write(tmp_path / "a", text)
    assert (tmp_path / "a").read_text() == "new" and os.listdir(tmp_path) == ["a"]


def test_sync_that_reports_a_full_disk_keeps_the_old_file(tmp_path, monkeypatch, error_message):
    write(tmp_path / "a", "old")
    monkeypatch.setattr(os, "fsync", refuse(errno.ENOSPC))
    message = error_message(write, tmp_path / "a", "new")
    assert message == f"{tmp_path / 'a'}: cannot be written: no space left on device"
    assert (tmp_path / "a").read_text() == "old" and os.listdir(tmp_path) == ["a"]


def test_folder_in_which_nothing_can_be_written_is_refused(tmp_path, monkeypatch, error_message):
    """Even if its permission bits allow it."""
    monkeypatch.setattr(Path, "touch", refuse(errno.EACCES))
    assert error_message(make_folder, tmp_path) == f"{tmp_path}: cannot be written to: permission denied"


def test_file_that_another_program_holds_briefly_is_replaced(tmp_path, monkeypatch):
    failures, replace = [PermissionError(errno.EACCES, "Permission denied")] * 2, os.replace

    def held(*paths):
        if failures:
            raise failures.pop()
        replace(*paths)

    monkeypatch.setattr(os, "replace", held)
    write(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "new" and not failures


def test_files_with_the_longest_names_have_temporary_files_of_their_own(tmp_path):
    one, other = tmp_path / ("x" * 251 + ".png"), tmp_path / ("x" * 251 + ".jpg")
    with atomic_path(one) as temporary, atomic_path(other) as second, atomic_path(tmp_path / ("猫" * 85)) as third:
        for path in (temporary, second, third):
            path.write_text(path.name)
    assert one.read_text() == temporary.name != other.read_text() == second.name


def test_temporary_file_that_a_kill_left_is_replaced(tmp_path):
    with atomic_path(tmp_path / "a") as left:
        left.touch()
    left.write_text("long ago")
    write(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "new" and os.listdir(tmp_path) == ["a"]


def test_folder_on_a_file_system_without_locks_stays_unlocked(tmp_path, monkeypatch):
    monkeypatch.setattr("support.files.fcntl.lockf", refuse(errno.ENOLCK))
    lock_folder(tmp_path).close()
