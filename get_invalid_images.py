"""Finds the images of a folder that cannot serve as test images, and writes a script that removes them.

    python get_invalid_images.py --image_dir DIR && bash remove_invalid.sh
    python get_invalid_images.py --image_dir DIR --move_to OTHER_DIR && bash remove_invalid.sh

A gray photograph has no colors to compare with. Three reasons are told apart:

    single channel   the file itself is stored without color
    gray in color    stored in color, but all of its pixels are gray
    unreadable       truncated, damaged or no image at all

Prints how many images there are of each, and writes `invalid_images.csv` (path, reason) and
`remove_invalid.sh`, to be looked at first: nothing is touched before that script is run. It deletes the listed files
and no others, or, with --move_to, moves them to another folder, their subfolders kept.
"""

import csv
import os
import shlex
import sys
from collections import Counter
from functools import partial

from support.cli import AT_THE_END, EXIT_SKIPPED, WORKERS, Parser, UserError, note, printable, run_script, whole
from support.cpu import available_cores
from support.files import atomic_text, make_folder
from support.images import InvalidImageError, list_images, read_rgb, relative_path
from support.workers import parallel_map

from PIL import Image

SINGLE_CHANNEL, GRAY, UNREADABLE = REASONS = ("single channel", "gray in color", "unreadable")
SINGLE_CHANNEL_MODES = ("1", "L", "LA", "La", "I", "F")  # of Pillow; "I;16" and its kin besides

# The script is harmless when run twice, replaces nothing that is already there, and goes on when one file fails.
SCRIPT_HEAD = """\
#!/usr/bin/env bash
# Written by get_invalid_images.py; invalid_images.csv gives the reason for each file.
failed=0
"""
REMOVE_FUNCTION = """\
remove() { # FILE
    rm -f -- "$1" || failed=1
}
"""
MOVE_FUNCTION = """\
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
    """A (reason, detail) why the image cannot serve; None if it can.

    The reason is None where the file could not be opened or memory ran out: that says nothing about the image.
    """
    try:
        rgb = read_rgb(path)
    except InvalidImageError as error:
        cause = error.__cause__
        no_verdict = isinstance(cause, MemoryError) or (isinstance(cause, OSError) and cause.errno)
        return None if no_verdict else UNREADABLE, error.reason
    with Image.open(path) as image:
        mode = image.mode
    if mode in SINGLE_CHANNEL_MODES or mode.startswith("I;"):
        return SINGLE_CHANNEL, ""
    return (GRAY, "") if channel_spread(rgb) <= tolerance else None


def channel_spread(rgb):
    """The largest difference between two channels of one pixel, uint8 [H, W, 3] -> 0 (gray) … 255."""
    return int((rgb.max(axis=2) - rgb.min(axis=2)).max())


def write_csv(invalid, path):
    with atomic_text(path) as file:
        writer = csv.writer(file)
        writer.writerow(("path", "reason"))
        writer.writerows((name, f"{reason}: {detail}" if detail else reason) for name, reason, detail in invalid)


def write_script(invalid, path, image_dir, move_to):
    """The paths in it are absolute, so that it does the same wherever it is run from."""
    with atomic_text(path) as file:
        file.write(SCRIPT_HEAD + (MOVE_FUNCTION if move_to else REMOVE_FUNCTION))
        for name, _, _ in invalid:
            words = ["move" if move_to else "remove", system_path(name)]
            if move_to:
                words.append(os.path.join(os.path.realpath(move_to), relative_path(name, image_dir)))
            file.write(shlex.join(words) + "\n")
        file.write('exit "$failed"\n')


def system_path(path):
    """The absolute path of a file, its folder as the system resolves it (`link/..` too), itself perhaps a link."""
    folder, name = os.path.split(path)
    return os.path.join(os.path.realpath(folder), name)


def check_args(args):
    if args.move_to:
        inside, outside = os.path.realpath(args.move_to), os.path.realpath(args.image_dir)
        if os.path.commonpath([inside, outside]) == outside:
            raise UserError(f"--move_to {args.move_to}: lies within --image_dir, they would be found again")


def parse_args(argv=None):
    parser = Parser(description="Finds gray and unreadable images and writes a script that removes them.")
    add = parser.add_argument_group("data").add_argument
    add("--image_dir", required=True, help="folder of test photographs, nested or flat")
    add(
        "--tolerance",
        type=whole(0, 255),
        default=5,  # a gray image with noise of +-2 levels comes back from a JPEG of quality 95 with up to 5
        help="difference of a pixel's channels, in levels of 255, up to which it counts as gray",
    )
    add("--num_workers", type=WORKERS, default=available_cores(), help="processes that decode; 0: none but this one")

    add = parser.add_argument_group("what is written").add_argument
    add("--output", default=".", help="folder for invalid_images.csv and remove_invalid.sh")
    add("--move_to", metavar="DIR", help="let remove_invalid.sh move the images there (default: it deletes them)")
    return parser.parse_args(argv)


def main(args):
    check_args(args)
    paths = list_images(args.image_dir)
    make_folder(args.output)

    # Decode every image, wholly: a truncated file shows only at its end.
    judge = partial(why_invalid, tolerance=args.tolerance)
    invalid, not_opened = [], 0
    for path, verdict in zip(paths, parallel_map(judge, paths, args.num_workers, "reading")):
        if verdict is None:
            continue
        reason, detail = verdict
        if reason is None:
            not_opened += 1
            note(f"{path}: {detail}; not looked at, and not listed")
        else:
            invalid.append((path, reason, detail))

    # Write the list and the script, then say so.
    csv_path = os.path.join(args.output, "invalid_images.csv")
    script_path = os.path.join(args.output, "remove_invalid.sh")
    write_csv(invalid, csv_path)
    write_script(invalid, script_path, args.image_dir, args.move_to)
    counts = Counter(reason for _, reason, _ in invalid)
    print(f"{len(invalid)} of {len(paths)} images cannot serve")
    for reason in REASONS:
        print(f"{counts[reason]:8d}  {reason}")
    if not_opened:
        print(f"{not_opened:8d}  could not be opened, not listed")
    done = "moved" if args.move_to else "deleted"
    print(f"listed in {printable(csv_path)}; {done} by: bash {shlex.quote(printable(script_path))}")
    return EXIT_SKIPPED if not_opened else 0


if __name__ == "__main__":
    sys.exit(run_script(main, parse_args, AT_THE_END))
