"""Colorize images with a checkpoint: files and folders, nested or flat.

    python test.py photo.jpg                                                writes result/photo.png
    python test.py photo.jpg --output colored.png                           writes colored.png
    python test.py a.jpg b.jpg holiday                                      writes result/a.png, …, result/holiday/…
    python test.py --image_dir DIR --load_model 7                           writes result/<same path>.png
    python test.py --image_dir DIR --load_size 256 --crop_size 224          writes square crops, as papers evaluate

Results have the full resolution of their images: the network reads an image resized to a shorter side of 256 pixels,
or to the size stored in the checkpoint. The ab that it predicts is upsampled and joined with the image's own lightness.
Without a checkpoint, the bundled `small` weights are used. The last line names the results and the weights:

    result: 200 images colorized with model/epoch_7_model.pdparams in bf16
"""

import glob
import math
import os
import sys
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path

from support import cli
from support.cli import UserError, counted, note, printable, run_script
from support.cpu import available_cores, lower_priority, use_all_cores
from support.files import make_folder, provenance, remove_temporaries, sha256, write_json
from support.gpu import check_gpu
from support.images import (
    COLORING,
    InvalidImageError,
    crop_resized,
    has_more_frames,
    image_size,
    named_images,
    open_image,
)
from support.records import absolute, append_record, make_record, read_records
from support.sheets import Sheets, fit

import numpy as np
from PIL import Image

from colorizer import FORMATS, LARGEST_SIDE, Colorizer, colored, decode, network_input, save
from pretrained import LOAD_SIZE, checkpoint_info, find_weights
from utils import TEMPERATURE

PIXELS_AHEAD = 32_000_000  # decoded before the network needs them, and again waiting to be written
LEAST_PIXELS = 500_000  # that an image counts as, because its network input needs memory, too
NEARLY_BLACK = 17  # of 255: above the maximum of 12 bits stored in 16 without scaling
COLUMNS = ("gray", "colored", "original")  # of a contact sheet

# -------------------------------------------------------------------------------------------------
# Plan


def plan(args, settings):
    """Return the images to colorize, {path: name of the result}, and why others are skipped, one line for each."""
    named = named_images(*args.images)
    if args.output and len(named) > 1:
        raise UserError(f"--output names one file, but there are {len(named)} images: use --result_path FOLDER")
    folder, output = result_folder(args), args.output and Path(args.output).name
    results = {path: output or f"{Path(name).as_posix()}.{args.format}" for name, path in named.items()}
    check_apart(results, args)
    records = {} if args.output else read_records(folder)
    todo, skipped = {}, []
    for path, name in islice(results.items(), args.max_samples):
        record = records.get(name)
        if os.path.isdir(folder / name):
            skipped.append(f"{path}: {folder / name} is a folder")
        elif not args.skip_existing and record and record["source"]["path"] != absolute(path):
            problem = f"is the result of {record['source']['path']}; choose another --result_path"
            skipped.append(f"{path}: {folder / name} {problem}")
        elif not args.skip_existing or record != make_record(path, settings, folder, name):
            todo[path] = name
    return todo, skipped


def result_folder(args):
    return Path(args.output).parent if args.output else Path(args.result_path)


def check_apart(results, args):
    """Raise UserError if results would overwrite images or lie among them, where the next run would colorize them."""
    folder = result_folder(args)
    for parent in {os.path.realpath(os.path.dirname(path)) for path in results}:
        if not args.output and Path(os.path.realpath(folder)) in (Path(parent), *Path(parent).parents):
            raise UserError(
                f"{folder}: contains input images, so results would mix with them; "
                "choose another --result_path, or pass --output FILE for a single image"
            )
    for path, name in results.items():
        if os.path.exists(folder / name) and os.path.exists(path) and os.path.samefile(folder / name, path):
            raise UserError(f"{path}: the result would overwrite it; choose another name")


# -------------------------------------------------------------------------------------------------
# Read (threads), colorize (the device), write (threads)


def read_ahead(pool, paths, args):
    """Read images in a pool's threads, at most PIXELS_AHEAD at a time. Yield their futures, in order."""
    pending, waiting = deque(), 0
    for path in paths:
        pixels = max(pixel_count(path), LEAST_PIXELS)
        while pending and waiting + pixels > PIXELS_AHEAD:
            waiting -= pending[0][0]
            yield pending.popleft()[1]
        pending.append((pixels, pool.submit(load, path, args)))
        waiting += pixels
    while pending:
        yield pending.popleft()[1]


def pixel_count(path):
    try:
        return math.prod(image_size(path))
    except InvalidImageError:  # which `load` raises as well
        return 0


def readable(futures):
    """Yield what was read; report and skip the images that cannot be."""
    for future in futures:
        try:
            yield future.result()
        except InvalidImageError as error:
            note(f"skipped {error}")


def load(path, args):
    """Return the path, its image and the network's input. Raises InvalidImageError."""
    with open_image(path, args.load_size if args.crop_size else None) as opened:
        if not args.crop_size and max(opened.size) > LARGEST_SIDE.get(args.format, math.inf):
            raise ValueError(f"{opened.width}x{opened.height} is too large for {args.format}")
        if has_more_frames(opened):
            note(f"{path}: only the first of its frames or pages is colorized")
        image = decode(opened)
    if args.crop_size:
        crop = Image.fromarray(crop_resized(image, args.load_size, args.crop_size))
        crop.info, image = image.info, crop
    inputs = network_input(image, args.crop_size or args.load_size)
    if inputs.max() < NEARLY_BLACK:
        note(f"{path}: nearly black; were 8 or 12 bits stored in more, without scaling?")
    return path, image, inputs


def batches(loaded, batch_size):
    """Yield lists of consecutive images whose network inputs have one shape, at most `batch_size` long."""
    batch, pixels = [], 0
    for path, image, inputs in loaded:
        pixels += image.width * image.height
        if batch and (len(batch) == batch_size or pixels > PIXELS_AHEAD or inputs.shape != batch[0][2].shape):
            yield batch
            batch, pixels = [], image.width * image.height
        batch.append((path, image, inputs))
    if batch:
        yield batch


def colorize(batch, colorizer, temperature):
    """Return (path, image, result) of each image in a batch."""
    paths, images, inputs = zip(*batch)
    predicted = colorizer.predict_ab(np.stack(inputs), temperature)
    return list(zip(paths, images, map(colored, images, predicted)))


def write(path, image, result, target, args):
    """Write a result. Return the path and, for the contact sheet, thumbnails: gray, colored, original."""
    save(result, target, args.format)
    if not args.compare:
        return path, None
    original = fit(image)
    return path, (original.convert("L").convert("RGB"), fit(result), original)


@contextmanager
def background_threads(count):
    """Yield a pool of threads that leave the cores to the network: one delayed compute thread would delay all."""
    pool = ThreadPoolExecutor(count, initializer=lower_priority)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)  # pending jobs are left if the run is stopped


def run(todo, colorizer, args):
    """Read, colorize and write simultaneously. Yield (path, thumbnails) of each result, in order."""
    folder, writing = result_folder(args), []
    with background_threads(args.num_workers) as readers, background_threads(args.num_workers) as writers:
        for batch in batches(readable(read_ahead(readers, todo, args)), args.batch_size):
            colorized = colorize(batch, colorizer, args.temperature)
            yield from (future.result() for future in writing)  # of the batch before
            writing = [writers.submit(write, *each, folder / todo[each[0]], args) for each in colorized]
        yield from (future.result() for future in writing)


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
    name = "epoch_{NAME}_model.pdparams in --model_path; small: the bundled weights; official: the authors'; or a path"
    default = "(default: 19; if missing, latest, then the highest number, then small)"
    add("--load_model", metavar="NAME", help=f"{name} {default}")
    annealing = "temperature of the annealed mean; 1: mean over all colors, toward 0: the most likely color"
    suits = f"(default: the checkpoint's own, otherwise {TEMPERATURE})"
    add("--temperature", type=cli.number(1e-3, 1e6), help=f"{annealing} {suits}")
    bf16 = "bf16: half the time, ab differs by 0.05 on average; auto: bf16 where the CPU has it in hardware"
    add("--precision", choices=("auto", "float32", "bf16"), default="auto", help=bf16)
    shorter = f"shorter side of the network's input in pixels (default: the checkpoint's own, otherwise {LOAD_SIZE})"
    add("--load_size", type=cli.SIDE, help=shorter)
    add("--crop_size", type=cli.SIDE, help="colorize only a center crop with this side in pixels (default: all)")
    add("--batch_size", type=cli.whole(), default=8, help="number of consecutive images of equal size per batch")
    workers = "number of threads that read, and of those that write"
    add("--num_workers", type=cli.whole(1, 1024), default=available_cores(), help=workers)

    group = parser.add_argument_group("output")
    add, add_bool = group.add_argument, partial(cli.add_bool_flag, group)
    add("--result_path", default="./result", help="folder of the results, with the same subfolders as the images")
    add("--output", metavar="FILE", help="the result of a single image, instead of --result_path")
    add("--format", choices=FORMATS, help="format of the results (default: that of --output, otherwise png)")
    add_bool("--compare", False, "also write contact sheets (gray, colored, original) to <result_path>_compare")
    add_bool("--skip_existing", False, "skip images whose result in --result_path is up to date, to resume a run")
    args = parser.parse_args(argv)
    if args.image_dir is not None:
        args.images.append(args.image_dir)
    # On Windows the shell leaves patterns as they are.
    found = [[path] if os.path.exists(path) else sorted(glob.glob(path)) or [path] for path in args.images]
    args.images = list(dict.fromkeys(sum(found, [])))
    if not args.images:
        parser.error("no image or folder given")
    return args


def check_args(args):
    suffix = Path(args.output).suffix.lower().lstrip(".") if args.output else None
    args.format = args.format or suffix or "png"
    if args.output and (suffix not in FORMATS or FORMATS[suffix] != FORMATS.get(args.format)):
        raise UserError(f"--output {args.output}: must end in its format's name: {', '.join(FORMATS)}")


def main(args):
    # Setup
    check_gpu()
    check_args(args)
    use_all_cores()

    # Plan: usage errors appear before the network is loaded
    checkpoint = find_weights(args.model_path, args.load_model)
    info = checkpoint_info(checkpoint)
    args.load_size = args.load_size or info.get("load_size", LOAD_SIZE)
    args.temperature = args.temperature or info.get("temperature", TEMPERATURE)
    cli.check_crop(args, multiple=8)
    method = {name: getattr(args, name) for name in ("temperature", "load_size", "crop_size")}
    settings = {"sha256": sha256(checkpoint), **method, "format": args.format}
    todo, skipped = plan(args, settings)
    result = result_folder(args)
    for folder in {(result / name).parent for name in todo.values()}:
        remove_temporaries(folder)
    make_folder(result)
    for line in skipped:
        note(f"skipped {line}")
    where = printable(args.output or args.result_path)
    if not todo:
        print(f"{where}: 0 images colorized, {len(skipped) or 'all'} {'skipped' if skipped else 'are up to date'}")
        return cli.EXIT_SKIPPED if skipped else 0
    colorizer = Colorizer(checkpoint, precision=args.precision)
    compare = Path(f"{os.path.splitext(args.output)[0] if args.output else result}_compare")
    made_by = {"checkpoint": printable(checkpoint), "sha256": settings["sha256"], "precision": colorizer.precision}
    made_by.update(method, **provenance())

    # Read, colorize and write; coloring.json precedes the first result
    described = [*([] if args.output else [result]), *([compare] if args.compare else [])]
    for folder in described:
        write_json(made_by, folder / COLORING)
    done, sheets = 0, {}
    for path, thumbnails in cli.progress(run(todo, colorizer, args), len(todo)):
        done += 1
        if not args.output:
            append_record(make_record(path, settings, result, todo[path]), result)
        if args.compare:
            stem = Path(todo[path]).with_suffix("")
            folder = compare / stem.parts[0] if len(args.images) > 1 and len(stem.parts) > 1 else compare
            sheets.setdefault(folder, Sheets(folder, COLUMNS)).add(printable(stem), thumbnails)
    for folder, of_folder in sheets.items():
        of_folder.flush()
        print(f"{printable(folder)}: {counted(of_folder.written, 'contact sheet')} (gray, colored, original)")
    number_skipped = len(skipped) + len(todo) - done
    trained = f" (epoch {info['epoch']}, {counted(info['step'], 'step')})" if "step" in info else ""
    made_with = f"with {printable(checkpoint)}{trained} in {colorizer.precision}"
    print(
        f"{where}: {counted(done, 'image')} colorized {made_with}"
        + (f", {number_skipped} skipped" if number_skipped else "")
    )
    return cli.EXIT_SKIPPED if number_skipped else 0


if __name__ == "__main__":
    sys.exit(run_script(main, parse_args, after_stop="to resume: the same command with --skip_existing"))
