"""Make the paper's two sets of images from ImageNet's validation set, as folders of links.

    python resources/imagenet_splits.py --image_dir ILSVRC2012_img_val

`ctest10k/<WordNet id>/` contains the paper's 10,000 test images, which are those of Larsson et al. (2016). `val10k/`
contains the first 10,000 images, which the paper uses for validation. ImageNet's set may be flat, as it is unpacked, or
sorted into folders. Nothing is moved, and running this again changes nothing. Missing images are reported.

    ctest10k: 10000 of 10000 images (links)
    val10k: 10000 of 10000 images (links)
"""

import filecmp
import os
import shutil
import sys
from collections import Counter
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from support.cli import EXIT_SKIPPED, Parser, UserError, note_some, printable, run_script
from support.files import atomic_path, make_folder

from dataset import list_images
from utils import RESOURCES

NAME = "ILSVRC2012_val_{:08d}"
SETS = ("ctest10k", "val10k")
VALIDATION_IMAGES = 10_000  # the first by number


def load_ctest10k():
    """Return the names of the test images, {name: WordNet id}."""
    lines = (RESOURCES / "ctest10k.txt").read_text().splitlines()
    classes = [line.split() for line in lines if not line.startswith("#")]
    return {NAME.format(int(number)): synset for synset, *numbers in classes for number in numbers}


def find_images(folder, output):
    """Return the images of the validation set in `folder`, {name: path}, except for links that this script made."""
    ours = tuple(os.path.join(os.path.abspath(output), name, "") for name in SETS)
    paths = [path for path in list_images(folder) if not os.path.abspath(path).startswith(ours)]
    names = [Path(path).stem[: len(NAME.format(0))] for path in paths]  # at Hugging Face, the class follows
    return {name: path for name, path in zip(names, paths) if name.startswith("ILSVRC2012_val_")}


def place(source, target):
    """Make `target` a link to `source` or, where links are impossible, a copy of it. Return which of the two it is.

    Raises UserError if there is another file.
    """
    if os.path.exists(target) and filecmp.cmp(source, target):
        return "links" if os.path.islink(target) else "copies"
    if os.path.islink(target):
        os.remove(target)  # the images were moved since it was made
    elif os.path.exists(target):
        raise UserError(f"{target}: is a different file; remove it or choose another --output")
    with suppress(OSError, ValueError):  # not on this file system, without administrator's rights, or to another drive
        # a relative link, so that both folders can be moved together
        os.symlink(os.path.relpath(source, os.path.realpath(os.path.dirname(target))), target)
        return "links"
    with atomic_path(target) as temporary:
        shutil.copy2(source, temporary)
    return "copies"


def make_set(folder, wanted, images):
    """Place the images that are wanted, {name: subfolder}, in a folder. Return the number of those that are missing."""
    ways, missing = Counter(), []
    for name, subfolder in wanted.items():
        if name not in images:
            missing.append(name)
            continue
        target = folder / subfolder / os.path.basename(images[name])
        target.parent.mkdir(parents=True, exist_ok=True)
        ways[place(images[name], target)] += 1
    note_some(f"missing, not in {folder}", missing)
    how = f" ({', '.join(sorted(ways))})" if ways else ""
    print(f"{printable(folder)}: {sum(ways.values())} of {len(wanted)} images{how}")
    return len(missing)


def parse_args(argv=None):
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--image_dir", required=True, help="ImageNet's validation set (ILSVRC 2012), flat or in folders"
    )
    parser.add_argument("--output", default=".", help=f"folder in which {' and '.join(SETS)} are made")
    return parser.parse_args(argv)


def main(args):
    images = find_images(args.image_dir, args.output)
    if not images:
        raise UserError(
            f"{args.image_dir}: contains no image of ImageNet's validation set, such as {NAME.format(1)}.JPEG"
        )
    make_folder(args.output)
    validation = {NAME.format(number): "" for number in range(1, VALIDATION_IMAGES + 1)}
    sets = {"ctest10k": load_ctest10k(), "val10k": validation}
    missing = sum(make_set(Path(args.output, name), wanted, images) for name, wanted in sets.items())
    return EXIT_SKIPPED if missing else 0


if __name__ == "__main__":
    sys.exit(run_script(main, parse_args))
