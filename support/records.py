"""Records of where results came from: one JSON object per line in a file next to them."""

import json
import os
from contextlib import suppress

RECORDS = "coloring.jsonl"


def absolute(path):
    """Return an absolute path without links among its folders. A file that is itself a link keeps its name."""
    folder, name = os.path.split(path)
    return os.path.join(os.path.realpath(folder), name)


def make_record(source, settings, folder, name):
    """Describe the result `name` in `folder`, made from the file `source`, with both files' sizes and times."""
    result = {"path": name, **_size_and_time(os.path.join(folder, name))}
    return {"source": {"path": absolute(source), **_size_and_time(source)}, "settings": settings, "result": result}


def _size_and_time(path):
    status = os.stat(path) if os.path.exists(path) else None
    return {"size": status.st_size, "mtime_ns": status.st_mtime_ns} if status else {}


def append_record(record, folder):
    """Append a record to the file of records in a folder."""
    with open(os.path.join(folder, RECORDS), "a", encoding="utf-8") as file:
        file.write(f"\n{json.dumps(record)}")  # the line break first: an earlier line may have been cut short


def read_records(folder):
    """Return each result's last record, {path below the folder: record}."""
    records = {}
    with suppress(OSError), open(os.path.join(folder, RECORDS), encoding="utf-8", errors="replace") as file:
        for line in file:
            with suppress(ValueError, KeyError, TypeError):  # cut short by a kill
                record = json.loads(line)
                name, _ = record["result"]["path"], record["source"]["path"]
                records[name] = record
    return records
