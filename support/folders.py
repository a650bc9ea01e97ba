"""Folders of images: list their images, pair originals with results, and keep records of where results came from."""

import json
import os
import unicodedata
import zlib
from contextlib import suppress
from pathlib import Path

from support.cli import UserError, counted, note, note_some
from support.files import read_json

import numpy as np

IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".pgm", ".ppm", ".pbm", ".pnm",
    ".avif", ".heic", ".heif", ".jp2", ".j2k", ".jpf", ".jpx",
)  # fmt: skip
# Names of folders with thumbnails, trash, snapshots and metadata, on a NAS, Windows and macOS
OF_THE_SYSTEM = ("@eadir", "#recycle", "#snapshot", "@recycle", "@recently-snapshot", "$recycle.bin", "__macosx")

# -------------------------------------------------------------------------------------------------
# Lists of images


def list_images(root, results_file):
    """List the images in a folder and its subfolders. They are recognized by their suffix.

    Hidden files and folders are skipped silently. Folders that cannot be read, folders of results, further links to the
    same folder, and the number of other files are reported.

    Args:
        root (str | Path): The folder, or a single file.
        results_file (str): Name of a file that marks a subfolder of results; files whose names begin with it are
            skipped silently.

    Returns:
        list[str]: Sorted paths; [root] if it is a file.

    Raises:
        UserError: If `root` does not exist or contains no images.
    """
    root = os.fspath(root)
    if os.path.isfile(root):
        return [root]
    if not os.path.isdir(root):
        raise UserError(f"{root}: no such file or folder")
    paths, visited = [], set()
    for folder, folders, files in os.walk(root, onerror=_note_unreadable, followlinks=True):
        real = os.path.realpath(folder)
        if real in visited:
            note(f"{folder}: skipped: a link to a folder that is visited anyway")
            folders.clear()
        elif results_file in files and folder != root:
            note(f"{folder}: skipped: contains results ({results_file})")
            folders.clear()
        else:
            visited.add(real)
            folders[:] = sorted(name for name in folders if not (name[0] == "." or name.lower() in OF_THE_SYSTEM))
            paths += [os.path.join(folder, name) for name in files if not name.startswith((".", results_file))]
    images = sorted(path for path in paths if path.lower().endswith(IMAGE_SUFFIXES))
    if others := len(paths) - len(images):
        suffixes = sorted({os.path.splitext(path)[1].lower() for path in paths} - {*IMAGE_SUFFIXES})
        note(f"{root}: {counted(others, 'other file')} skipped ({' '.join(suffixes).strip()})")
    if not images:
        raise UserError(f"{root}: no images here ({' '.join(IMAGE_SUFFIXES)})")
    return images


def _note_unreadable(error):
    note(f"{error.filename}: skipped: {error.strerror.lower()}")


def relative_path(path, root):
    """Return an image's path relative to `root`, with forward slashes; its name if `root` is the file itself."""
    return os.path.relpath(path, root if os.path.isdir(root) else os.path.dirname(root)).replace(os.sep, "/")


def named_images(roots, results_file):
    """Return the images in folders and files as {name: path}, sorted by name (arguments as for `list_images`).

    A name is the path without its suffix, relative to the folder that contains all of `roots`. Where two images differ
    in their suffix only, the second keeps it (photo, photo.tif).
    """
    try:
        top = os.path.commonpath(list(map(os.path.abspath, roots)))
    except ValueError as error:
        raise UserError(f"{' '.join(roots)}: on different drives; process one drive at a time") from error
    paths = {os.path.abspath(path): path for root in roots for path in list_images(root, results_file)}
    images = {}
    for name, path in sorted((relative_path(path, top), path) for path in paths.values()):
        for choice in (one_form(os.path.splitext(name)[0]), one_form(name), name):
            if choice not in images:
                images[choice] = path
                break
    return images


def one_form(name):
    """Return a name with composed characters (NFC): a file system or an archive may have taken "é" apart."""
    return unicodedata.normalize("NFC", name)


# -------------------------------------------------------------------------------------------------
# Records of results: one JSON object per line in a file in their folder


def make_record(source, settings, name, result):
    """Describe a result by the fingerprints of the file `source`, from which it was made, and of the file `result`.

    `name` is the result's path in the folder of the records; `result` may still be a temporary file.
    """
    return {
        "source": {"path": os.path.abspath(source), **fingerprint(source)},
        "settings": settings,
        "result": {"path": name, **fingerprint(result)},
    }


def fingerprint(path):
    """Return a file's size in bytes, time in nanoseconds and CRC-32; {} if it has been moved since it was processed."""
    with suppress(OSError), open(path, "rb") as file:
        status = os.fstat(file.fileno())
        return {"size": status.st_size, "mtime_ns": status.st_mtime_ns, "crc32": zlib.crc32(file.read())}
    return {}


def same_file(recorded, path):
    """Return whether a file has the recorded size and time or, if only the time differs, the recorded checksum."""
    with suppress(OSError):
        status = os.stat(path)
        if status.st_size == recorded.get("size"):
            return status.st_mtime_ns == recorded["mtime_ns"] or fingerprint(path).get("crc32") == recorded["crc32"]
    return False


def same_source(record, path):
    """Return whether a recorded result is that of the file `path`, or of a file with the same content."""
    return record["source"]["path"] == os.path.abspath(path) or same_file(record["source"], path)


def what_changed(record, source, settings, result):
    """Return in a few words why a result is out of date; "" if it is not.

    Args:
        record (dict): Its record.
        source (str): The image from which it would be made now.
        settings (dict): The settings with which it would be made now.
        result (str | Path): The file.
    """
    recorded = record["settings"]
    if changed := [key for key in sorted({*recorded, *settings}) if recorded.get(key) != settings.get(key)]:
        return f"other settings ({', '.join(changed)})"
    if not same_file(record["result"], result):  # a run that was killed may have recorded it, but not written it
        return "the result is missing or has changed"
    return "" if same_file(record["source"], source) else "the original has changed"


def append_record(record, path):
    """Append a record to a file of records. Not for several threads simultaneously."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(f"\n{json.dumps(record)}")  # the line break first: an earlier line may have been cut short


def read_records(path):
    """Return each result's last record, the newest last: {path below the folder: record}; {} without a file."""
    records = {}
    with suppress(OSError), open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            with suppress(ValueError, KeyError, TypeError):  # cut short by a kill
                record = json.loads(line)
                name, _, _ = record["result"]["path"], record["source"]["path"], record["settings"]
                records.pop(name, None)
                records[name] = record
    return records


# -------------------------------------------------------------------------------------------------
# Pairs of originals and results


def pair_images(true_dir, colored_dir, results_file, records_file):
    """Pair results with their originals, or list either of them alone.

    Where results have records, these decide: both files must be as recorded, and results must have the settings of the
    newest one. Without any record, as for results of other programs, images are paired by name.

    Args:
        true_dir (str): Folder of the originals; None to find the results alone.
        colored_dir (str): Folder of the results; None to find the originals alone.
        results_file (str): See `list_images`.
        records_file (str): Name of the file of records in `colored_dir` or in the nearest folder above that has it.

    Returns:
        tuple[list, dict, dict]: (name, path of the original or None, path of the result or None) of each pair, sorted
        by name; what is left out, {problem: names}, which is reported; and how the results were made, the content of
        their `results_file` or, if it describes others, their settings from the records (None if nothing is known).

    Raises:
        UserError: If there are no pairs.
    """
    if not colored_dir:
        return [(name, path, None) for name, path in named_images([true_dir], results_file).items()], {}, None
    colored = named_images([colored_dir], results_file)
    true = named_images([true_dir], results_file) if true_dir else colored
    here = Path(os.path.abspath(colored_dir))
    folder = next((x for x in (here, *here.parents) if (x / records_file).exists()), here)
    places = {one_form(relative_path(path, folder)): name for name, path in colored.items()}
    records = read_records(folder / records_file)
    records = {places[place]: record for place, record in records.items() if place in places}

    result_of, problems, settings = _match(true, true_dir, colored, records)
    if result_of and true_dir and not records:
        note(f"{colored_dir}: {counted(len(result_of), 'image')} paired by name, without a record of the original")
    problems.update({name: "no result" for name in true if name not in result_of and name not in problems})
    left_out = {}
    for problem, name in sorted((problem, name) for name, problem in problems.items()):
        left_out.setdefault(problem, []).append(name)
    for problem, names in left_out.items():
        note_some(problem, names)
    if not result_of:
        raise UserError(f"{colored_dir}: no image could be paired, for the reasons above")

    pairs = [(x, true[x] if true_dir else None, colored[result_of[x]]) for x in sorted(result_of)]
    description = read_json(folder / results_file) or settings
    agrees = all(description.get(x, y) == y for x, y in settings.items())
    return pairs, left_out, (description if agrees else settings) or None


def _match(true, true_dir, colored, records):
    """Return the result of each original, {name: name}, the problems of other results, and the recorded settings."""
    originals = {os.path.abspath(path): name for name, path in true.items()}
    result_of, problems, settings = {}, {}, {}
    for name, record in reversed(records.items()):  # the newest first
        same_name = name if name in true else os.path.splitext(name)[0]
        source = originals.get(record["source"]["path"], same_name)  # the folder may have been moved
        if not same_file(record["result"], colored[name]):
            problems[name] = "changed since it was recorded"
        elif settings not in ({}, record["settings"]):
            problems[name] = "made with other settings than the newest result"
        elif source not in true:
            problems[name] = "no original"
        elif true_dir and not same_file(record["source"], true[source]):
            problems[name] = "original changed since it was recorded"
        elif source in result_of:
            problems[name] = "older than another result of the same image"
        else:
            result_of[source], settings = name, record["settings"]
    for name in colored.keys() - records.keys():
        if records:
            problems[name] = "not recorded, unlike other results"
        elif name in true:
            result_of[name] = name
        else:
            problems[name] = "no original"
    return result_of, problems, settings


def pair_at_random(originals, seed):
    """Pair originals, (name, path, None), with a random other one each, so that all are taken: one cycle.

    Returns (name, path, path of the other) of each. Raises UserError if there is only one.
    """
    if len(originals) == 1:
        raise UserError(f"{originals[0][1]}: is the only image; a random other one needs at least two")
    order = np.random.default_rng(seed).permutation(len(originals))
    others = {i: originals[following][1] for i, following in zip(order, np.roll(order, -1))}
    return [(name, path, others[i]) for i, (name, path, _) in enumerate(originals)]
