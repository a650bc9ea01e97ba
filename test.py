"""Colorize images with a checkpoint: files and folders, nested or flat.

    python test.py photo.jpg                                                writes result/photo.png
    python test.py photo.jpg --output colored.png                           writes colored.png
    python test.py a.jpg b.jpg holiday                                      writes result/a.png, …, result/holiday/…
    python test.py --image_dir DIR --load_model 7                           writes result/<same path>.png
    python test.py --image_dir DIR --load_size 224 --crop_size 224          writes square crops, as papers evaluate

Results have the full resolution of their images: the network reads an image resized to a shorter side of 256 pixels,
or to the size stored in the checkpoint. The ab that it predicts is upsampled and joined with the image's own lightness.
Without a checkpoint, the bundled `small` weights are used. The last line names the results and the weights:

    ./result: 200 images colorized with model/epoch_7_model.pdparams (epoch 8, 3000 steps) in bf16
"""

import glob
import os
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from functools import partial
from itertools import groupby, islice
from pathlib import Path
from threading import Lock
from typing import NamedTuple

from support import cli, images
from support.cli import UserError, counted, note, printable, run_script
from support.cpu import available_cores, lower_priority, use_all_cores
from support.files import atomic_path, lock_folder, make_folder, provenance, write_json
from support.folders import append_record, make_record, read_records, same_source, what_changed
from support.gpu import check_gpu
from support.images import InvalidImageError
from support.sheets import CELL, fit, write_sheets
from support.workers import submit

import numpy as np
from PIL import Image

from colorizer import Colorizer, colored, network_input
from dataset import COLORING, RECORDS, named_images
from pretrained import LOAD_SIZE
from utils import TEMPERATURE

PIXELS_AHEAD = 32_000_000  # decoded before the network needs them, and again waiting to be written
IMAGES_AHEAD = 64
NEARLY_BLACK = 17  # of 255: above the maximum of 12 bits stored in 16 without scaling
RECORDED = ("temperature", "saturation", "load_size", "crop_size", "format")  # flags that change a result
COLUMNS = ("gray", "colorized", "original")  # of a contact sheet

# -------------------------------------------------------------------------------------------------
# Plan


def result_names(named, args):
    """Return the name of each image's result, {path: name}."""
    if not args.output:
        return {path: f"{name}.{args.format}" for name, path in named.items()}
    if len(named) > 1:
        raise UserError(f"--output names one file, but there are {len(named)} images: use --result_path FOLDER")
    return {path: Path(args.output).name for path in named.values()}


def check_apart(results, args):
    """Raise UserError if results would overwrite images or lie among them, where the next run would colorize them."""
    for parent in {os.path.realpath(os.path.dirname(path)) for path in results}:
        if not args.output and Path(parent).is_relative_to(os.path.realpath(args.folder)):
            raise UserError(
                f"{args.folder}: contains input images, so results would mix with them; "
                "choose another --result_path, or pass --output FILE for a single image"
            )
    for path, name in results.items():
        target = args.folder / name
        if os.path.exists(target) and os.path.samefile(target, path):
            raise UserError(f"{path}: the result would overwrite it; choose another name")
    sheets = args.compare_folder
    if args.compare and sheets.is_dir() and os.listdir(sheets) and not (sheets / COLORING).exists():
        raise UserError(f"{sheets}: contains other files; move them, or choose another --result_path")


def plan(results, settings, args):
    """Compare the results with what the folder of results contains, and report images that are skipped.

    Only files that the records name as results of the same images are replaced.

    Returns:
        (dict, set): The name of the result of each image to colorize, {path: name}, and the paths of skipped images.
        The results of all others are up to date.
    """
    todo, skipped, again = {}, set(), Counter()
    records = read_records(args.folder / RECORDS)
    for path, name in results.items():
        target, record = args.folder / name, records.get(name)
        if os.path.lexists(target) and not args.output and not (record and same_source(record, path)):
            reason = f"{target} is not its result, according to {RECORDS}"
            note(f"skipped {path}: {reason}; move that file, or choose another --result_path")
            skipped.add(path)
        elif not (args.skip_existing and record):
            todo[path] = name
        elif changed := what_changed(record, path, settings, target):
            todo[path] = name
            again[changed] += 1
    for reason, count in again.items():
        note(f"{counted(count, 'image')} to colorize again: {reason.replace('sha256', 'checkpoint')}")
    return todo, skipped


# -------------------------------------------------------------------------------------------------
# Read (threads), colorize (the device), write (threads)


class Item(NamedTuple):
    """A loaded image, or its result."""

    path: str
    name: str  # of the result, relative to the folder of results
    image: Image.Image  # in RGB: the image or its crop; after `colorize`, the result
    inputs: np.ndarray  # of the network, uint8 [h, w, 3]


def share(image):
    """Return which part of PIXELS_AHEAD an image has, opened or decoded."""
    return image.width * image.height / PIXELS_AHEAD


def share_of_file(path):
    """Return the share of an image from its header; 0 if it cannot be read."""
    with suppress(InvalidImageError), images.open_image(path) as opened:
        return share(opened)
    return 0


def load(path, name_of, args):
    """Decode an image, and make the network's input from it. Return an Item. Raises InvalidImageError."""
    with images.open_image(path, args.load_size if args.crop_size else None) as opened:
        if getattr(opened, "is_animated", False) and opened.format != "MPO":  # phones add depth or brightness to it
            note(f"{path}: only the first of its frames or pages is colorized")
        image = images.to_rgb(opened, path)
    if args.crop_size:
        info = image.info
        image = Image.fromarray(images.crop_resized(image, args.load_size, args.crop_size))
        image.info = info
    if not images.fits(image, args.format):
        raise InvalidImageError(path, f"too large for {args.format}; choose --format png")
    inputs = network_input(image, args.crop_size or args.load_size)
    if inputs.max() < NEARLY_BLACK:
        note(f"{path}: nearly black; possibly 8- or 12-bit samples stored in 16 bits without scaling")
    return Item(path, name_of[path], image, inputs)


def load_all(pool, todo, skipped, args):
    """Yield the images as items. Report those that cannot be read, and add them to `skipped`."""
    for future in submit(pool, partial(load, name_of=todo, args=args), todo, IMAGES_AHEAD, share_of_file):
        try:
            yield future.result()
        except InvalidImageError as error:
            note(f"skipped {error}")
            skipped.add(error.path)


def batches(items, batch_size):
    """Yield lists of consecutive items whose network inputs have one shape, at most `batch_size` long.

    They are shorter if the images are large. It is assumed that all are as large as the first one.
    """
    for _, group in groupby(items, key=lambda item: item.inputs.shape):
        for first in group:
            others = min(batch_size - 1, int(1 / share(first.image)))
            yield [first, *islice(group, others)]  # noqa: B031  advances the loop, too


def colorize(items, colorizer, args):
    """Yield the items with their results instead of their images."""
    for batch in batches(items, args.batch_size):
        predicted = colorizer.predict_ab(np.stack([item.inputs for item in batch]), args.temperature)
        for item, ab in zip(batch, predicted):
            yield item._replace(image=colored(item.image, ab, saturation=args.saturation))


def write(item, settings, lock, args):
    """Write a result. It is recorded before it gets its name, so there is no result without a record after a kill."""
    with atomic_path(args.folder / item.name) as temporary:
        images.encode(item.image, temporary, args.format)
        if not args.output:
            record = make_record(item.path, settings, item.name, temporary)
            with lock:
                append_record(record, args.folder / RECORDS)


def thumbnails(path, name_of, args):
    """Return an image's row of a contact sheet, its name and thumbnails."""
    name = name_of[path]
    original = images.open_rgb(path, args.load_size if args.crop_size else max(CELL))
    result = images.open_rgb(args.folder / name)
    if args.crop_size:
        original = Image.fromarray(images.crop_resized(original, args.load_size, args.crop_size))
    original = fit(original)
    return printable(os.path.splitext(name)[0]), (original.convert("L").convert("RGB"), fit(result), original)


# -------------------------------------------------------------------------------------------------
# Command line


def parse_args(argv=None):
    parser = cli.Parser(description="Colorize images with a checkpoint.")
    add = parser.add_argument_group("input").add_argument
    add("images", nargs="*", metavar="IMAGE", help="images and folders, nested or flat")
    add("--image_dir", help="a folder of images, or one file; the same as without --image_dir")
    add("--max_samples", type=cli.whole(), help="number of images to colorize, the first by name (default: all)")

    add = parser.add_argument_group("method").add_argument
    add("--model_path", default="./model", help="folder of the checkpoints")
    weights = "epoch_NAME_model.pdparams in --model_path; small: the bundled weights; official: the authors'; or a path"
    add("--load_model", metavar="NAME", help=f"{weights} (default: 19, latest, the highest number, or small)")
    stored = "(default: the checkpoint's own, otherwise {})"
    annealing = f"1: mean over all colors, toward 0: the most likely color {stored.format(TEMPERATURE)}"
    add("--temperature", type=cli.number(1e-3, 1e6), help=annealing)
    add("--saturation", type=cli.number(0, 10), default=1.0, help="factor of the predicted ab; not part of the paper")
    bf16 = "bf16: half the time, ab differs by 0.056 on average; auto: bf16 where the CPU has it in hardware"
    add("--precision", choices=("auto", "float32", "bf16"), default="auto", help=bf16)
    shorter = f"shorter side of the network's input in pixels {stored.format(LOAD_SIZE)}"
    add("--load_size", type=cli.SIDE, help=shorter)
    add("--crop_size", type=cli.SIDE, help="colorize only a center crop with this side in pixels (default: all)")
    add("--batch_size", type=cli.whole(), default=8, help="number of consecutive images of equal size per batch")
    add("--num_workers", type=cli.whole(1, 1024), default=available_cores(), help="threads that read and write images")

    group = parser.add_argument_group("output")
    add, add_bool = group.add_argument, partial(cli.add_bool_flag, group)
    add("--result_path", default="./result", help="folder of the results, with the same subfolders as the images")
    add("--output", metavar="FILE", help="the result of a single image, instead of --result_path")
    add("--format", choices=images.WRITE_FORMATS, help="format of the results (default: as --output, or png)")
    add_bool("--compare", False, "also write contact sheets (gray, colorized, original) to <result_path>_compare")
    add_bool("--skip_existing", False, "skip images whose result in --result_path is up to date, to resume a run")
    args = parser.parse_args(argv)
    if args.image_dir is not None:
        args.images.append(args.image_dir)
    # On Windows the shell leaves patterns as they are.
    found = [[path] if os.path.exists(path) else sorted(glob.glob(path)) or [path] for path in args.images]
    args.images = sum(found, [])
    if not args.images:
        parser.error("no image or folder given")
    return args


def check_args(args):
    formats, suffix = images.WRITE_FORMATS, Path(args.output or "").suffix.lower().lstrip(".")
    args.format = args.format or suffix or "png"
    if args.output and (suffix not in formats or formats[suffix] != formats[args.format]):
        raise UserError(f"--output {args.output}: must end in its format's name: {', '.join(formats)}")
    args.folder = Path(args.output).parent if args.output else Path(args.result_path)
    args.compare_folder = Path(f"{os.path.splitext(args.output)[0] if args.output else args.folder}_compare")


def main(args):
    # Setup: usage errors appear before the network is loaded
    check_gpu()
    check_args(args)
    use_all_cores()
    results = result_names(dict(islice(named_images(*args.images).items(), args.max_samples)), args)
    check_apart(results, args)
    colorizer = Colorizer(args.load_model, args.model_path, args.precision)
    args.load_size = args.load_size or colorizer.load_size
    if args.temperature and colorizer.temperature is None:
        raise UserError(f"--temperature: does not apply to {colorizer.path}, whose network predicts ab itself")
    args.temperature = args.temperature or colorizer.temperature
    cli.check_crop(args, multiple=8)
    settings = {"sha256": colorizer.sha256, **{name: getattr(args, name) for name in RECORDED}}
    made_by = {"checkpoint": printable(colorizer.path), "precision": colorizer.precision, **settings, **provenance()}

    make_folder(args.folder)
    with ExitStack() as stack:
        if not args.output:
            stack.enter_context(lock_folder(args.folder))
        todo, skipped = plan(results, settings, args)
        if todo and not args.output:
            write_json(made_by, args.folder / COLORING)

        # Read, colorize and write simultaneously. The threads leave the cores to the network: one delayed compute
        # thread would delay all.
        pool = stack.enter_context(ThreadPoolExecutor(args.num_workers, initializer=lower_priority))
        colorized = cli.progress(colorize(load_all(pool, todo, skipped, args), colorizer, args), len(todo))
        write_item = partial(write, settings=settings, lock=Lock(), args=args)
        for future in submit(pool, write_item, colorized, IMAGES_AHEAD, lambda item: share(item.image)):
            future.result()  # raises the error if writing failed

        # Draw contact sheets of all images, whenever they were colorized
        if args.compare:
            drawn = [path for path in results if path not in skipped]
            futures = submit(pool, partial(thumbnails, name_of=results, args=args), drawn, IMAGES_AHEAD)
            rows = cli.progress((future.result() for future in futures), len(drawn), "contact sheets")
            write_json(made_by, args.compare_folder / COLORING)
            count = write_sheets(rows, COLUMNS, args.compare_folder)
            print(f"{printable(args.compare_folder)}: {counted(count, 'contact sheet')} ({', '.join(COLUMNS)})")

    # Report
    trained = "" if colorizer.step is None else f" (epoch {colorizer.epoch}, {counted(colorizer.step, 'step')})"
    where, done = printable(args.output or args.result_path), len(todo.keys() - skipped)
    line = f"{where}: {counted(done, 'image')} colorized with {printable(colorizer.path)}{trained}"
    line += f" in {colorizer.precision}"
    for state, count in (("up to date", len(results) - done - len(skipped)), ("skipped", len(skipped))):
        line += f", {count} {state}" if count else ""
    print(line)
    return cli.EXIT_SKIPPED if skipped else 0


if __name__ == "__main__":
    sys.exit(run_script(main, parse_args, after_stop="to resume: the same command with --skip_existing"))
