"""Folders of images: list their images, pair originals with results, and keep records of where results came from."""

import json
import os
from contextlib import suppress

from support.cli import UserError, counted, note, note_some

IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".pgm", ".ppm", ".pbm", ".pnm",
    ".avif", ".heic", ".heif", ".jp2", ".j2k", ".jpf", ".jpx",
)  # fmt: skip
HIDDEN = (".", "@eaDir", "#recycle")  # beginnings of skipped names; two are thumbnails and trash on a NAS

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
    root, hidden = os.fspath(root), (*HIDDEN, results_file)
    if os.path.isfile(root):
        return [root]
    if not os.path.isdir(root):
        raise UserError(f"{root}: no such file or folder")
    paths, visited, tops = [], set(), [root]
    for top in tops:  # the loop appends links to folders, so a folder's own path comes before links to it
        for folder, folders, files in os.walk(top, onerror=_note_unreadable):
            real, within = os.path.realpath(folder), os.path.join(folder, "")
            linked, results = real in visited, results_file in files and folder != root
            if linked or results:
                reason = "a link to a folder that is visited anyway" if linked else f"contains results ({results_file})"
                note(f"{folder}: skipped: {reason}")
                folders.clear()
                continue
            visited.add(real)
            folders[:] = sorted(name for name in folders if not name.startswith(hidden))
            tops += [within + name for name in folders if os.path.islink(within + name)]
            paths += [within + name for name in files if not name.startswith(hidden)]
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
        stem = os.path.splitext(name)[0]
        images[name if stem in images else stem] = path
    return images


# -------------------------------------------------------------------------------------------------
# Records of results: one JSON object per line in a file in their folder


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


def append_record(record, path):
    """Append a record to a file of records."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(f"\n{json.dumps(record)}")  # the line break first: an earlier line may have been cut short


def read_records(path):
    """Return each result's last record in a file of records, {path below the folder: record}; {} without a file."""
    records = {}
    with suppress(OSError), open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            with suppress(ValueError, KeyError, TypeError):  # cut short by a kill
                record = json.loads(line)
                name, _ = record["result"]["path"], record["source"]["path"]
                records[name] = record
    return records


# -------------------------------------------------------------------------------------------------
# Pairs of originals and results


def pair_images(true_dir, colored_dir, results_file, records_file):
    """Pair the images of a folder with their results: by the results' records, by name where these do not help.

    `results_file` is that of `list_images`, `records_file` the name of the file of records in `colored_dir`. Returns a
    list of (name, path of the original, path of the result), and what is left out and reported, {problem: names}.
    Raises UserError if there are no pairs.
    """
    true, colored = named_images([true_dir], results_file), named_images([colored_dir], results_file)
    records = read_records(os.path.join(colored_dir, records_file))
    originals = dict(zip(map(absolute, true.values()), true))
    sources = {result: record["source"]["path"] for result, record in records.items()}
    top = absolute(os.path.join(true_dir, ""))
    by_record, by_name = {}, {}  # the result of each original
    for name, path in colored.items():
        source = sources.get(relative_path(path, colored_dir), "")
        if source in originals:
            by_record[originals[source]] = name
        elif name in true and not source.startswith(top):  # another program's result, or the images were moved
            by_name[name] = name
    if by_name:
        note(f"{colored_dir}: {counted(len(by_name), 'image')} paired by name, without a record of the original")
    result_of = {**by_name, **by_record}
    pairs = [(name, true[name], colored[result]) for name, result in sorted(result_of.items())]
    if not pairs:
        raise UserError(f"{true_dir} and {colored_dir} have no image in common (same path, any suffix)")
    left_out = {"no result": {*true} - {*result_of}, "no original": {*colored} - {*result_of.values()}}
    left_out = {problem: sorted(names) for problem, names in left_out.items() if names}
    for problem, names in left_out.items():
        note_some(problem, names)
    return pairs, left_out
