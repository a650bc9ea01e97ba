"""Find the images of a folder that are unsuitable as test images, and remove them or write a script that does.

    python get_invalid_images.py --image_dir DIR && bash remove_invalid.sh
    python get_invalid_images.py --image_dir DIR --remove
    python get_invalid_images.py --image_dir DIR --move_to OTHER_DIR --remove

Gray images have no colors to compare with. There are three reasons to list an image:

    single channel   the file is stored without color
    gray in color    stored in color, but all pixels are gray
    unreadable       damaged, as the file itself proves: empty, an HTML page, a JPEG or PNG that ends too early

Prints the number of images for each reason, and writes `invalid_images.csv` (path, reason) and `remove_invalid.sh`. The
script deletes the listed files, or with --move_to moves them to another folder and keeps their subfolders; it calls
this one with --remove_listed. It can be run twice, replaces no file, and continues after an error. No image is touched
before, except with --remove, which does at once what the script would do.

A file that cannot be read for another reason (a format whose package is missing, an unsupported kind of TIFF, too many
pixels, too little memory) is skipped and reported on stderr; the exit code is then 3. Not all damage is found: a JPEG
that is damaged in the middle may decode to a wrong picture.
"""

import csv
import os
import shlex
import shutil
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path

from support import cli
from support.cli import EXIT_SKIPPED, UserError, explain, note, printable, run_script
from support.cpu import available_cores
from support.files import atomic_path, atomic_text, make_folder, open_text, write_csv
from support.folders import relative_path
from support.images import EMPTY, HTML, InvalidImageError, open_image, to_rgb
from support.workers import parallel_map

import numpy as np
from PIL import Image

from dataset import list_images

SINGLE_CHANNEL, GRAY, UNREADABLE = REASONS = ("single channel", "gray in color", "unreadable")
CUT_SHORT = "Truncated File Read"  # Pillow's words for a file that ends in the description of the image


def why_invalid(path, tolerance):
    """Return why an image is unsuitable, "" if it is suitable. Raises InvalidImageError if that is not known."""
    format = None
    try:
        with open_image(path) as image:
            format = image.format
            single_channel = Image.getmodebase(image.mode) == "L"
            rgb = np.asarray(to_rgb(image, path))
    except InvalidImageError as error:
        # Of Pillow's errors only these prove damage; of others, the cause may be too little memory.
        ends_too_early = error.reason == CUT_SHORT or (format in ("JPEG", "PNG") and "truncated" in error.reason)
        if ends_too_early or error.reason in (EMPTY, HTML):
            return f"{UNREADABLE}: {error.reason}"
        raise
    if single_channel:
        return SINGLE_CHANNEL
    spread = (rgb.max(axis=2) - rgb.min(axis=2)).max()  # the largest difference between two channels of a pixel
    return GRAY if spread <= tolerance else ""


def read_list(path):
    """Return the paths in a list that this script wrote. Raises OSError, and UserError if it is another file."""
    with open_text(path) as file:
        if not file.readline().startswith("path,reason"):
            raise UserError(f"{path}: not a list of this script, which begins with path,reason")
        return [row[0] for row in csv.reader(file) if row]  # an editor may have added an empty line


def write_script(args, list_path, path):
    """Write a script that removes the listed images, from any working directory."""
    command = [sys.executable, os.path.abspath(__file__), f"--image_dir={args.image_dir}"]
    command += [f"--move_to={args.move_to}"] if args.move_to else []
    command += [f"--remove_listed={list_path}"]
    with atomic_text(path) as file:
        file.write("#!/usr/bin/env bash\n# Written by get_invalid_images.py; the list gives each file's reason.\n")
        file.write(f"cd -- {quoted(os.getcwd())} && exec {' '.join(map(quoted, command))}\n")


def quoted(text):
    """Quote a path or flag for bash, which on Windows expects forward slashes."""
    return shlex.quote(text.replace(os.sep, "/"))


def remove_listed(list_path, args):
    """Delete the images in a list, or move them to --move_to. Return the exit code.

    Missing files are ignored, so the same list can be used twice.
    """
    paths, folder = read_list(list_path), os.path.abspath(args.image_dir)
    for path in paths:
        if not Path(os.path.abspath(path)).is_relative_to(folder):
            raise UserError(f"{list_path}: lists {path}, which is not in --image_dir {args.image_dir}")
    present = list(filter(os.path.lexists, paths))
    removed = 0
    for path in sorted(present, key=os.path.islink, reverse=True):  # links first, while their images are there
        try:
            if args.move_to:
                move(path, os.path.join(args.move_to, relative_path(path, args.image_dir)))
            else:
                os.remove(path)
            removed += 1
        except (OSError, UserError) as error:
            note(f"{path}: not removed: {explain(error)}")
    print(f"{printable(list_path)}: {removed} of {len(paths)} images {'moved' if args.move_to else 'deleted'}")
    return EXIT_SKIPPED if removed < len(present) else 0


def move(source, target):
    """Copy an image to `target`, which may be on another disk, and delete it. Of a symbolic link, the image is copied.

    Raises OSError or UserError. No part of an image is then left at the target.
    """
    if os.path.lexists(target):
        raise UserError(f"there is already {target}")
    with atomic_path(target) as temporary:
        shutil.copyfile(source, temporary)
        with suppress(OSError):  # some file systems refuse times and permission bits
            shutil.copystat(source, temporary)
    os.remove(source)


def parse_args(argv=None):
    parser = cli.Parser(description="Find gray and unreadable images; remove them or write a script that does.")
    add = parser.add_argument_group("data").add_argument
    add("--image_dir", required=True, help="folder of test images, nested or flat")
    # A gray image with noise of +-2 levels has differences of up to 5 after a JPEG of quality 95.
    difference = "largest difference between the channels of a pixel, of 255 levels, for an image to count as gray"
    add("--tolerance", type=cli.whole(0, 255), default=5, help=difference)
    add("--num_workers", type=cli.WORKERS, default=available_cores(), help="worker processes; 0: decode in this one")

    add = parser.add_argument_group("output").add_argument
    add("--output", default=".", help="folder for invalid_images.csv and remove_invalid.sh")
    add("--move_to", metavar="DIR", help="folder to move the images to (default: delete them)")
    add("--remove", action="store_true", help="delete or move the images now, without the script and without asking")
    listed = "only delete or move the images in this list, which an earlier run wrote, as remove_invalid.sh does"
    add("--remove_listed", metavar="CSV", help=listed)
    return parser.parse_args(argv)


def main(args):
    if args.move_to and Path(os.path.realpath(args.move_to)).is_relative_to(os.path.realpath(args.image_dir)):
        raise UserError(f"--move_to {args.move_to}: is inside --image_dir, so the images would be found again")
    if args.remove_listed:
        return remove_listed(args.remove_listed, args)

    # Decode all of every image, because a truncated file shows only at its end
    paths = list_images(args.image_dir)
    make_folder(args.output)
    reasons = dict(parallel_map(partial(why_invalid, tolerance=args.tolerance), paths, args.num_workers, "reading"))
    skipped = len(paths) - len(reasons)
    invalid = {paths[i]: reason for i, reason in reasons.items() if reason}

    # Write the list and the script, and remove the images if asked to
    list_path, script_path = (os.path.join(args.output, name) for name in ("invalid_images.csv", "remove_invalid.sh"))
    write_csv({"path": [path.replace(os.sep, "/") for path in invalid], "reason": invalid.values()}, list_path)
    write_script(args, list_path, script_path)

    # Print the counts
    print(f"{len(invalid)} of {len(paths)} images are unsuitable, {skipped} skipped")
    for kind in REASONS:
        print(f"{sum(reason.startswith(kind) for reason in invalid.values()):8d}  {kind}")
    code = EXIT_SKIPPED if skipped else 0
    if args.remove:
        return max(code, remove_listed(list_path, args))
    by = f"bash {shlex.quote(script_path)}, or by the same command with --remove_listed {list_path}"
    print(printable(f"listed in {list_path}; {'moved' if args.move_to else 'deleted'} by {by}"))
    return code


if __name__ == "__main__":
    sys.exit(run_script(main, parse_args, after_stop="to continue: the same command again"))
