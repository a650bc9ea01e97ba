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
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import groupby, islice
from pathlib import Path

from support import cli, images
from support.cli import UserError, counted, note, printable, run_script
from support.cpu import available_cores, lower_priority, use_all_cores
from support.files import lock_folder, make_folder, provenance, remove_temporaries, write_json
from support.folders import append_record, make_record, read_records, same_source, what_changed
from support.gpu import check_gpu
from support.sheets import CELL, fit, write_sheets

import numpy as np
from PIL import Image

from colorizer import Colorizer, colored, network_input
from dataset import COLORING, RECORDS, named_images
from pretrained import LOAD_SIZE
from utils import TEMPERATURE

PIXELS_AHEAD = 32_000_000  # decoded before the network needs them, and again waiting to be written
IMAGES_AHEAD = 64  # at most, as each may be an open file
NEARLY_BLACK = 17  # of 255: above the maximum of 12 bits stored in 16 without scaling
METHOD = ("temperature", "saturation", "load_size", "crop_size")  # flags that change the colors, recorded with results
COLUMNS = ("gray", "colorized", "original")  # of a contact sheet

# -------------------------------------------------------------------------------------------------
# Plan


def result_names(named, args):
    """Return the name of each image's result, {path: name}."""
    if not args.output:
        return {path: f"{Path(name).as_posix()}.{args.format}" for name, path in named.items()}
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

    Returns:
        (dict, set): The name of the result of each image to colorize, {path: name}, and the paths of skipped images.
        The results of all others are up to date.
    """
    todo, skipped, again = {}, set(), Counter()
    records = read_records(args.folder / RECORDS)
    for path, name in results.items():
        record = records.get(name)
        if problem := obstacle(args.folder / name, record, path, args):
            note(f"skipped {path}: {args.folder / name} {problem}")
            skipped.add(path)
        elif not (args.skip_existing and record):
            todo[path] = name
        elif changed := what_changed(record, path, settings, args.folder):
            todo[path] = name
            again[changed] += 1
    for reason, count in again.items():
        note(f"{counted(count, 'image')} to colorize again: {reason.replace('sha256', 'checkpoint')}")
    return todo, skipped


def obstacle(target, record, path, args):
    """Return why the result of the image `path` must not replace the file `target`, if that has this record or None.

    Only files with a record are replaced, as others were not written by this script.
    """
    if args.output or not os.path.lexists(target):
        return ""
    if not record:
        return f"was not written by test.py (no record in {RECORDS}); move it, or choose another --result_path"
    if not same_source(record, path):
        return f"is the result of {record['source']['path']}; choose another --result_path"
    return ""


# -------------------------------------------------------------------------------------------------
# Read (threads), colorize (the device), write (threads)


@dataclass(eq=False)
class Item:
    """An image on its way through the steps below. Each of them adds what it computes, or the error."""

    path: str
    name: str  # of the result, relative to the folder of results
    image: Image.Image = None  # the image, or its crop, in RGB
    inputs: np.ndarray = None  # of the network, uint8 [h, w, 3]
    result: Image.Image = None
    record: dict = None  # how the result was made
    error: images.InvalidImageError = None

    @property
    def pixels(self):
        return self.image.width * self.image.height if self.image else 0


def open_images(todo, args):
    """Open one image after another. Yield its number of pixels and the function that loads it."""
    for path, name in todo.items():
        file = ExitStack()
        try:
            opened = file.enter_context(images.open_image(path, args.load_size if args.crop_size else None))
        except images.InvalidImageError as error:
            yield 0, partial(Item, path, name, error=error)
        else:
            yield opened.width * opened.height, partial(load, Item(path, name), opened, file, args)


def load(item, opened, file, args):
    """Decode an opened image, and make the network's input from it."""
    try:
        with file:
            if getattr(opened, "is_animated", False) and opened.format != "MPO":  # phones add depth or brightness to it
                note(f"{item.path}: only the first of its frames or pages is colorized")
            item.image = images.to_rgb(opened, item.path)
    except images.InvalidImageError as error:
        item.error = error
        return item
    if args.crop_size:
        info = item.image.info
        item.image = Image.fromarray(images.crop_resized(item.image, args.load_size, args.crop_size))
        item.image.info = info
    if not images.fits(item.image, args.format):
        item.error = images.InvalidImageError(item.path, f"too large for {args.format}; choose --format png")
        return item
    item.inputs = network_input(item.image, args.crop_size or args.load_size)
    if item.inputs.max() < NEARLY_BLACK:
        note(f"{item.path}: nearly black; possibly 8- or 12-bit samples stored in 16 bits without scaling")
    return item


def colorize(items, colorizer, args):
    """Yield the items with their results, in order."""
    for batch in batches(items, args.batch_size):
        if batch[0].error:
            yield from batch
            continue
        predicted = colorizer.predict_ab(np.stack([item.inputs for item in batch]), args.temperature)
        for item, ab in zip(batch, predicted):
            item.result = colored(item.image, ab, saturation=args.saturation)
            yield item


def batches(items, batch_size):
    """Yield lists of consecutive items whose network inputs have one shape, at most `batch_size` long."""
    for _, group in groupby(items, key=lambda item: np.shape(item.inputs)):
        batch, pixels = [], 0
        for item in group:
            batch.append(item)
            pixels += item.pixels
            if len(batch) == batch_size or pixels > PIXELS_AHEAD:
                yield batch
                batch, pixels = [], 0
        if batch:
            yield batch


def write_results(items, settings, args):
    """Announce one result after another in the records. Yield its number of pixels and the function that writes it."""
    for item in items:
        if not (item.error or args.output):
            announced = make_record(item.path, settings, args.folder, item.name, written=False)
            append_record(announced, args.folder / RECORDS)
        yield item.pixels, partial(write, item, settings, args)


def write(item, settings, args):
    """Write a result, and compute its record, which reads both files."""
    if not item.error:
        images.save(item.result, args.folder / item.name, args.format)
        item.record = make_record(item.path, settings, args.folder, item.name)
    return item


def in_threads(pool, jobs, at_once=False):
    """Call functions in a pool's threads and yield what they return, in order.

    Args:
        pool (ThreadPoolExecutor): The threads.
        jobs (Iterable): Pairs of a number of pixels and a function. Jobs are started while all that are not yielded
            yet have at most PIXELS_AHEAD pixels.
        at_once (bool): Yield what is done whenever a job is started, so that it counts and is released.
    """
    pending, waiting = deque(), 0
    for pixels, function in jobs:
        pixels = max(pixels, PIXELS_AHEAD // IMAGES_AHEAD)
        while pending and (waiting + pixels > PIXELS_AHEAD or (at_once and pending[0][1].done())):
            waiting -= pending[0][0]
            yield pending.popleft()[1].result()
        pending.append((pixels, pool.submit(function)))
        waiting += pixels
    while pending:
        yield pending.popleft()[1].result()


def thumbnails(path, name, args):
    """Return an image's row of a contact sheet, its name and thumbnails."""
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
    add("--num_workers", type=cli.whole(1, 1024), default=available_cores(), help="threads that read, and that write")

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
    method = {name: getattr(args, name) for name in METHOD}
    settings = {"sha256": colorizer.sha256, **method, "format": args.format}
    made_by = {"checkpoint": printable(colorizer.path), "sha256": colorizer.sha256, "precision": colorizer.precision}
    made_by.update(method, **provenance())

    make_folder(args.folder)
    with ExitStack() as stack:
        if not args.output:
            stack.enter_context(lock_folder(args.folder))
        todo, skipped = plan(results, settings, args)
        for folder in {(args.folder / name).parent for name in todo.values()}:
            remove_temporaries(folder)
        if todo and not args.output:
            write_json(made_by, args.folder / COLORING)

        # Read, colorize and write simultaneously. The threads leave the cores to the network: one delayed compute
        # thread would delay all.
        readers = stack.enter_context(ThreadPoolExecutor(args.num_workers, initializer=lower_priority))
        writers = stack.enter_context(ThreadPoolExecutor(args.num_workers, initializer=lower_priority))
        loaded = in_threads(readers, open_images(todo, args))
        writing = write_results(colorize(loaded, colorizer, args), settings, args)
        for item in cli.progress(in_threads(writers, writing, at_once=True), len(todo)):
            if item.error:
                note(f"skipped {item.error}")
                skipped.add(item.path)
            elif not args.output:
                append_record(item.record, args.folder / RECORDS)

        # Draw contact sheets of all images, whenever they were colorized
        if args.compare:
            drawn = {path: name for path, name in results.items() if path not in skipped}
            jobs = ((0, partial(thumbnails, path, name, args)) for path, name in drawn.items())
            rows = cli.progress(in_threads(readers, jobs), len(drawn), "contact sheets")
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
