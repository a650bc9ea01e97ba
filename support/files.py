"""Files that appear whole or not at all; JSON; how a result came about."""

import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import sys
import zlib
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path

from support.cli import UserError, printable

import numpy as np
import paddle
import PIL


@contextmanager
def atomic_path(path):
    """A temporary path beside `path`; what was written there takes its place when the block ends without an error.

    A file, or a folder that the block makes. Raises UserError when it cannot be written or the disk is full.
    """
    path = Path(path)
    # See `remove_temporaries`. The checksum stands for the part of a long name that would be too long with more to it.
    checksum = zlib.crc32(os.fsencode(path.name))
    temporary = path.with_name(f".{path.name[:40]}.{checksum:08x}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        for file in temporary.iterdir() if temporary.is_dir() else [temporary]:
            with open(file, "r+b") as opened:  # Windows syncs only files that are open for writing
                os.fsync(opened.fileno())  # else a power cut could leave the new name with nothing behind it
        if temporary.is_dir():
            _remove(path)  # a folder replaces no other that holds something
        os.replace(temporary, path)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise UserError(f"{path}: cannot be written: {reason}") from error
    finally:
        _remove(temporary)


def _remove(path):
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    with suppress(OSError):
        path.unlink()


def remove_temporaries(folder):
    """Removes what processes that were killed while they wrote left in `folder`."""
    for path in Path(folder).glob(".*.tmp"):
        if (match := re.fullmatch(r"\..+\.(\d+)\.tmp", path.name)) and not _runs(int(match[1])):
            _remove(path)


def _runs(process):
    try:
        os.kill(process, 0)  # sends nothing
    except PermissionError:
        return True
    except (ProcessLookupError, OverflowError):
        return False
    return True


def make_folder(path):
    """Makes the folder that results go to, before the work for them is done, and removes what a kill left there.

    Raises UserError when it cannot be made or written to.
    """
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        writable = os.access(path, os.W_OK)
        reason = "permission denied"
    except OSError as error:
        writable, reason = False, error.strerror.lower()
    if not writable:
        raise UserError(f"{path}: cannot be written to: {reason}")
    remove_temporaries(path)


@contextmanager
def atomic_text(path):
    """A text file to write, by way of `atomic_path`. A name in it that is no UTF-8 comes out byte for byte."""
    encoding = {"encoding": "utf-8", "errors": "surrogateescape", "newline": ""}
    with atomic_path(path) as temporary, open(temporary, "w", **encoding) as file:
        yield file


def write_json(data, path):
    with atomic_text(path) as file:
        json.dump(data, file, indent=2)
        file.write("\n")


def read_json(path):
    """What the file holds; None where there is none, or none that can be read."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def sha256(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def provenance():
    """How a result came about: the command, when, and the versions behind it."""
    return {
        "command": printable(shlex.join(sys.argv)),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {
            "python": platform.python_version(),
            "paddle": paddle.__version__,
            "numpy": np.__version__,
            "pillow": PIL.__version__,
        },
    }
