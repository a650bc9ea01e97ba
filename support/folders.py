"""Folders of images: list their images, pair originals with results, and keep records of where results came from."""

import json
import os
import unicodedata
import zlib
from contextlib import suppress
from pathlib import PurePath

from support.cli import UserError, counted, note, note_some
from support.files import atomic_text, open_text, read_json

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


def make_record(source, settings, folder, name, written=True):
    """Describe the result `name` in `folder`, made from the file `source`, with the fingerprints of both files.

    A record that is not `written` announces a result, so that it can be told from other files after a kill.
    """
    record = {"source": {"path": os.path.abspath(source)}, "settings": settings, "result": {"path": name}}
    if written:
        record["source"].update(fingerprint(source))
        record["result"].update(fingerprint(os.path.join(folder, name)))
    return record


def fingerprint(path):
    """Return a file's size in bytes, time in nanoseconds and CRC-32; {} if it has been moved since it was processed."""
    with suppress(OSError), open(path, "rb") as file:
        status = os.fstat(file.fileno())
        return {"size": status.st_size, "mtime_ns": status.st_mtime_ns, "crc32": zlib.crc32(file.read())}
    return {}


def same_file(recorded, path):
    """Return whether a file has the recorded size and time or, if only the time differs, the recorded checksum."""
    if not os.path.exists(path):
        return False
    status = os.stat(path)
    if status.st_size != recorded.get("size"):
        return False
    return status.st_mtime_ns == recorded["mtime_ns"] or fingerprint(path).get("crc32") == recorded.get("crc32")


def source_name(record, path):
    """Return a source's path below the folder that was processed: as deep as that of the record's result."""
    depth = record["result"]["path"].count("/") + 1
    return one_form("/".join(PurePath(path).parts[-depth:]))


def same_source(record, path):
    """Return whether the source of a record is the file `path`, whose folder may have been moved or copied."""
    before, now = record["source"]["path"], os.path.abspath(path)
    return before == now or (
        source_name(record, before) == source_name(record, now) and same_file(record["source"], now)
    )


def what_changed(record, source, settings, folder):
    """Return in a few words why a recorded result is out of date; "" if it is not.

    Args:
        record (dict): Its record.
        source (str): The image from which it would be made now.
        settings (dict): The settings with which it would be made now.
        folder (str): The folder of the results.
    """
    recorded, result = record["settings"], os.path.join(folder, record["result"]["path"])
    if changed := [key for key in sorted({*recorded, *settings}) if recorded.get(key) != settings.get(key)]:
        return f"other settings ({', '.join(changed)})"
    if "size" not in record["result"]:
        return "the result was not completed"
    if not same_file(record["source"], source):
        return "the original has changed"
    if not os.path.exists(result):
        return "the result is missing"
    return "" if same_file(record["result"], result) else "the result has changed"


def append_record(record, path):
    """Append a record to a file of records."""
    line = f"\n{json.dumps(record)}"  # the line break first: an earlier line may have been cut short
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(line)
    except OSError:  # some network file systems write whole files only
        with open_text(path) as file:
            before = file.read()
        with atomic_text(path) as file:
            file.write(before + line)


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


def pair_originals(true_dir, results_file, seed=None):
    """Pair originals with nothing or, given a seed, with a random other one each, so that all are taken: one cycle.

    Returns (name, path, path of the other or None) of each, sorted by name. Raises UserError if there is only one.
    """
    names, paths = zip(*named_images([true_dir], results_file).items())
    others = [None] * len(paths)
    if seed is not None:
        if len(paths) == 1:
            raise UserError(f"{paths[0]}: is the only image; a random other one needs at least two")
        order = np.random.default_rng(seed).permutation(len(paths))
        for i, following in zip(order, np.roll(order, -1)):
            others[i] = paths[following]
    return list(zip(names, paths, others))


def pair_images(true_dir, colored_dir, results_file, records_file):
    """Pair results with their originals.

    Where results have records, these decide: both files must be as recorded, and results must have the settings of the
    newest one. Without any record, as for results of other programs, images are paired by name.

    Args:
        true_dir (str): Folder of the originals; None to find the results alone.
        colored_dir (str): Folder of the results.
        results_file (str): See `list_images`.
        records_file (str): Name of the file of records in `colored_dir` or in the nearest folder above that has it.

    Returns:
        tuple[list, dict, dict]: (name, path of the original or None, path of the result) of each pair, sorted by name;
        what is left out, {problem: names}, which is reported; and how the results were made, the content of their
        `results_file` or, if it describes others, their settings from the records (None if nothing is known).

    Raises:
        UserError: If there are no pairs.
    """
    colored = named_images([colored_dir], results_file)
    true = named_images([true_dir], results_file) if true_dir else colored
    folder = _nearest(colored_dir, records_file)
    places = {one_form(relative_path(path, folder)): name for name, path in colored.items()}
    records = read_records(os.path.join(folder, records_file))
    records = {places[place]: record for place, record in records.items() if place in places}
    if records:
        result_of, problems, settings = _pair_by_records(true, true_dir, colored, records)
    else:
        result_of, settings = {name: name for name in colored if name in true}, {}
        problems = {name: "no original" for name in colored if name not in true}
        if result_of and true_dir:
            note(f"{colored_dir}: {counted(len(result_of), 'image')} paired by name, without a record of the original")
    problems.update({name: "no result" for name in true if name not in result_of and name not in problems})
    left_out = {}
    for problem, name in sorted((problem, name) for name, problem in problems.items()):
        left_out.setdefault(problem, []).append(name)
    if not result_of and not records:
        raise UserError(f"{true_dir} and {colored_dir} have no image in common (same path, any suffix)")
    for problem, names in left_out.items():
        note_some(problem, names)
    if not result_of:
        raise UserError(
            f"{colored_dir}: no result is as recorded; to pair by name, delete {os.path.join(folder, records_file)}"
        )
    pairs = [(x, true[x] if true_dir else None, colored[result_of[x]]) for x in sorted(result_of)]
    return pairs, left_out, _how_made(os.path.join(folder, results_file), settings)


def _nearest(folder, name):
    """Return `folder` or the nearest folder above that contains a file of this name; `folder` if none does."""
    folder = os.path.abspath(folder)
    folders = (folder, *map(str, PurePath(folder).parents))
    return next((x for x in folders if os.path.exists(os.path.join(x, name))), folder)


def _how_made(path, settings):
    description = read_json(path) or settings
    agrees = all(description.get(x, y) == y for x, y in settings.items())
    return (description if agrees else settings) or None


def _pair_by_records(true, true_dir, colored, records):
    """Return the result of each original, {name: name}, the problems of other results, and the settings."""
    places, below = {}, {}  # names of the originals
    for name, path in true.items() if true_dir else ():
        places[os.path.abspath(path)] = below[one_form(relative_path(path, true_dir))] = name
    result_of, settings = {}, {}
    problems = {name: "not recorded, unlike other results" for name in colored if name not in records}
    for name, record in reversed(records.items()):  # the newest first
        path = record["source"]["path"]
        source = places.get(path, below.get(source_name(record, path))) if true_dir else name
        if not same_file(record["result"], colored[name]):
            problems[name] = "changed since it was recorded"
        elif settings not in ({}, record["settings"]):
            problems[name] = "made with other settings than the newest result"
        elif source is None:
            problems[name] = "no original"
        elif true_dir and not same_file(record["source"], true[source]):
            problems[name] = "original changed since it was recorded"
        elif source in result_of:
            problems[name] = "older than another result of the same image"
        else:
            result_of[source], settings = name, record["settings"]
    return result_of, problems, settings
