"""Files: atomic writing, JSON, checksums, and the provenance of results."""

import csv
import errno
import hashlib
import json
import os
import platform
import shlex
import shutil
import sys
import time
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path

from support.cli import UserError, note, printable, report_os_errors

import numpy as np
import paddle
import PIL

try:
    import fcntl
except ImportError:  # Windows
    import msvcrt

    fcntl = None

LOCK = ".lock"  # name of the file by which a folder is locked


@contextmanager
def atomic_path(path):
    """Yield a temporary path next to `path`. The file written there replaces `path` if the block ends without an error.

    An existing file keeps its permission bits, and a symbolic link remains one: the file that it leads to is replaced.
    A killed process leaves the temporary file, which the next attempt to write `path` replaces. Raises UserError when
    the file cannot be written or the disk is full.
    """
    target = Path(os.path.realpath(path))
    digits = hashlib.sha256(os.fsencode(target.name)).hexdigest()[:16]  # because long names are shortened
    temporary = target.with_name(f".{target.name[:40]}.{digits}.tmp")
    try:
        with report_os_errors(f"{path}: cannot be written"):
            target.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            _sync(temporary)
            with suppress(OSError):  # no such file, or file systems without permission bits
                shutil.copymode(target, temporary)
            _replace(temporary, target)
    finally:
        with suppress(OSError):
            temporary.unlink()


def _sync(path):
    """Have a file written to the disk; otherwise a power cut could leave an empty one with the new name.

    Raises OSError only if data are lost: some network file systems refuse this, or to open a file again.
    """
    try:
        with open(path, "r+b") as file:  # Windows syncs only files that are open for writing
            os.fsync(file.fileno())
    except OSError as error:
        if error.errno in (errno.EIO, errno.ENOSPC, errno.EDQUOT):
            raise


def _replace(source, target):
    """Rename a file. Retry for a second, because on Windows a virus scanner may hold either of the two."""
    for _ in range(10):
        with suppress(PermissionError):
            return os.replace(source, target)
        time.sleep(0.1)
    os.replace(source, target)


def make_folder(path):
    """Make a folder for results, before the work starts. Raises UserError when it cannot be made or written to."""
    with report_os_errors(f"{path}: cannot be written to"):
        Path(path).mkdir(parents=True, exist_ok=True)
        probe = Path(path, ".probe.tmp")  # on network file systems, permission bits do not tell
        probe.touch()
        probe.unlink(missing_ok=True)  # another process may have removed it


def lock_folder(folder):
    """Lock a folder until the returned file is closed or the process ends. Raises UserError if it is locked already.

    A folder on a file system without locks stays unlocked.
    """
    file = open(Path(folder, LOCK), "a")  # noqa: SIM115
    try:
        if fcntl:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock, worker processes do not inherit it
        else:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):  # others: the file system has no locks
            raise UserError(f"{folder}: another run is writing to this folder") from error
    return file


@contextmanager
def atomic_text(path):
    """Open a text file for writing through `atomic_path`."""
    with atomic_path(path) as temporary, open_text(temporary, "w") as file:
        yield file


def open_text(path, mode="r"):
    """Open a text file. File names in it that are not UTF-8 keep their bytes, and line breaks are not translated."""
    return open(path, mode, encoding="utf-8", errors="surrogateescape", newline="")


def write_csv(columns, path):
    """Write a table, {heading: values}, through `atomic_text`."""
    with atomic_text(path) as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values()))


def write_json(data, path):
    """Write data as indented JSON through `atomic_path`."""
    with atomic_text(path) as file:
        json.dump(data, file, indent=2)
        file.write("\n")


def read_json(path):
    """Return the content of a JSON file; None if the file does not exist or cannot be read."""
    with suppress(OSError, ValueError):
        return json.loads(Path(path).read_text(encoding="utf-8"))


def prepare_results(path, subject):
    """Make the folder of a JSON file. Report that a file about a different subject, {key: value}, will be replaced."""
    make_folder(os.path.dirname(path))
    earlier = read_json(path) or {}
    others = [str(earlier[key]) for key, value in subject.items() if earlier.get(key, value) != value]
    if others:
        note(f"{path}: is about {', '.join(others)} and will be replaced; to keep it, choose another --save_path")


def sha256(path):
    """Return a file's SHA-256 as hexadecimal digits."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def full_path(path):
    """Return a path for a JSON file: absolute and printable. Without a path, return None."""
    return printable(os.path.abspath(path)) if path else None


def provenance():
    """Return the command, date and versions that produced a result."""
    packages = {"paddle": paddle.__version__, "numpy": np.__version__, "pillow": PIL.__version__}
    return {
        "command": printable(shlex.join(sys.argv)),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), **packages},
    }
