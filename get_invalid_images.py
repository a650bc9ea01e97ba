"""Find the images of a folder that are unsuitable as test images, and remove them or write a script that does.

    python get_invalid_images.py --image_dir DIR && bash remove_invalid.sh
    python get_invalid_images.py --image_dir DIR --remove
    python get_invalid_images.py --image_dir DIR --move_to OTHER_DIR --remove

Gray images have no colors to compare with. There are three reasons to list an image:

    single channel   the file is stored without color
    gray in color    stored in color, but all pixels are gray
    unreadable       truncated, empty or not an image

Prints the number of images for each reason, and writes `invalid_images.csv` (path, reason) and `remove_invalid.sh`. The
script deletes the listed files, or with --move_to moves them to another folder and keeps their subfolders. Without
--remove, no image is touched before you run the script.

Only gray and damaged images are listed. A file that cannot be read for another reason (a format whose package is
missing, an unsupported kind of TIFF, too many pixels) is reported as not checked, and the exit code is 3. Decoders do
not notice all damage: a JPEG that is damaged in the middle may decode to a wrong picture, and is not found.
"""

import csv
import os
import shlex
import shutil
import sys
from collections import Counter
from functools import partial
from pathlib import Path

from support.cli import AT_THE_END, EXIT_SKIPPED, WORKERS, Parser, UserError, note, printable, run_script, whole
from support.cpu import available_cores
from support.files import atomic_text, make_folder
from support.folders import absolute, relative_path
from support.images import InvalidImageError, open_image, to_rgb
from support.workers import parallel_map

import numpy as np
from PIL import Image

from dataset import list_images

SINGLE_CHANNEL, GRAY, UNREADABLE = REASONS = ("single channel", "gray in color", "unreadable")
NOT_CHECKED = "not checked"

SCRIPT_HEAD = """\
#!/usr/bin/env bash
# Written by get_invalid_images.py; invalid_images.csv gives the reason for each file.
# It can be run twice, replaces no file, and continues after an error.
failed=0
remove() { # FILE
    rm -f -- "$1" || failed=1
}
move() { # FILE TARGET
    if [ ! -e "$1" ] && [ ! -L "$1" ]; then return; fi # moved before
    if [ -e "$2" ] || [ -L "$2" ]; then
        printf '%s: not moved, there is already %s\\n' "$1" "$2" >&2
        failed=1
        return
    fi
    mkdir -p -- "${2%/*}" && mv -- "$1" "$2" || failed=1
}
"""


def why_invalid(path, tolerance):
    """Return the reason why an image is unsuitable, None if it is suitable, and for an unreadable one a detail."""
    try:
        with open_image(path) as image:
            mode = image.mode
            rgb = np.asarray(to_rgb(image, path))
    except InvalidImageError as error:
        return UNREADABLE if error.damaged else NOT_CHECKED, error.reason
    if Image.getmodebase(mode) == "L":
        return SINGLE_CHANNEL, ""
    spread = (rgb.max(axis=2) - rgb.min(axis=2)).max()  # the largest difference between two channels of a pixel
    return GRAY if spread <= tolerance else None, ""


def write_csv(invalid, path):
    with atomic_text(path) as file:
        writer = csv.writer(file)
        writer.writerow(("path", "reason"))
        for name, (reason, detail) in invalid.items():
            writer.writerow((name.replace(os.sep, "/"), f"{reason}: {detail}" if detail else reason))


def write_script(targets, path):
    """Write a script that does the same as `remove`, from any working directory, because its paths are absolute."""
    with atomic_text(path) as file:
        file.write(SCRIPT_HEAD)
        for source, target in targets.items():
            command = shlex.join(["move", source, target] if target else ["remove", source])
            file.write(command.replace(os.sep, "/") + "\n")
        file.write('exit "$failed"\n')


def remove(targets):
    """Do what the script would do. Return the number of files that could not be removed."""
    failed = 0
    for source, target in targets.items():
        try:
            if not target:
                os.remove(source)
            elif os.path.lexists(target):
                raise FileExistsError(None, f"there is already {target}")
            else:
                os.makedirs(os.path.dirname(target), exist_ok=True)
                shutil.move(source, target)
        except OSError as error:
            note(f"{source}: not removed: {error.strerror}")
            failed += 1
    return failed


def parse_args(argv=None):
    parser = Parser(description="Find gray and unreadable images; remove them or write a script that does.")
    add = parser.add_argument_group("data").add_argument
    add("--image_dir", required=True, help="folder of test images, nested or flat")
    # A gray image with noise of +-2 levels has differences of up to 5 after a JPEG of quality 95.
    difference = "largest difference between the channels of a pixel, of 255 levels, for an image to count as gray"
    add("--tolerance", type=whole(0, 255), default=5, help=difference)
    add("--num_workers", type=WORKERS, default=available_cores(), help="decoding processes; 0: the main process only")

    add = parser.add_argument_group("output").add_argument
    add("--output", default=".", help="folder for invalid_images.csv and remove_invalid.sh")
    add("--move_to", metavar="DIR", help="folder to move the images to (default: delete them)")
    add("--remove", action="store_true", help="delete or move the images now, without the script and without asking")
    return parser.parse_args(argv)


def main(args):
    if args.move_to and Path(os.path.realpath(args.move_to)).is_relative_to(os.path.realpath(args.image_dir)):
        raise UserError(f"--move_to {args.move_to}: is inside --image_dir, so the images would be found again")
    paths = list_images(args.image_dir)
    make_folder(args.output)

    # Decode all of every image, because a truncated file shows only at its end.
    invalid, counts = {}, Counter()
    judge = partial(why_invalid, tolerance=args.tolerance)
    for path, (reason, detail) in zip(paths, parallel_map(judge, paths, args.num_workers, "reading")):
        counts[reason] += 1
        if reason == NOT_CHECKED:
            note(f"{path}: not checked: {detail}")
        elif reason:
            invalid[path] = (reason, detail)

    # Write the list and the script, and remove the images if asked to.
    csv_path, script_path = (os.path.join(args.output, name) for name in ("invalid_images.csv", "remove_invalid.sh"))
    write_csv(invalid, csv_path)
    folder = args.move_to and os.path.realpath(args.move_to)
    targets = {absolute(path): folder and os.path.join(folder, relative_path(path, args.image_dir)) for path in invalid}
    write_script(targets, script_path)
    not_removed = remove(targets) if args.remove else 0

    # Print the counts.
    print(f"{len(invalid)} of {len(paths)} images are unsuitable")
    for reason in (*REASONS, NOT_CHECKED):
        print(f"{counts[reason]:8d}  {reason}")
    by = f"bash {shlex.quote(printable(script_path))}, or by the same command with --remove"
    by = f"this run: {len(invalid) - not_removed}" if args.remove else by
    print(f"listed in {printable(csv_path)}; {'moved' if args.move_to else 'deleted'} by {by}")
    return EXIT_SKIPPED if counts[NOT_CHECKED] or not_removed else 0


if __name__ == "__main__":
    sys.exit(run_script(main, parse_args, AT_THE_END))
