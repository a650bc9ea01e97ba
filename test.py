"""Colors photographs with a checkpoint: a folder, nested or flat, or one file.

    python test.py photo.jpg                                                writes result/photo.png
    python test.py --image_dir DIR --load_model 7                           writes result/<same path>.png
    python test.py --image_dir DIR --load_size 256 --crop_size 224          squares, as papers evaluate

Each photograph comes out at its own, full resolution: the network sees it smaller, with a short side of 256 pixels or
what its checkpoint says, and the ab that it predicts goes back up and joins the photograph's own lightness. Without a
checkpoint of one's own it is colored with the small one that comes with the project. Ends with what was written:

    result: 200 images colored with model/epoch_7_model.pdparams in bf16
"""

import argparse
import math
import os
import sys
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path

from support.cli import (
    EXIT_SKIPPED,
    HelpFormatter,
    UserError,
    add_bool_flag,
    check_at_least,
    check_crop,
    note,
    printable,
)
from support.cpu import available_cores, use_all_cores
from support.files import provenance, sha256, write_json
from support.gpu import check_gpu
from support.sheets import Sheets, fit

import numpy as np
from PIL import Image
from tqdm import tqdm

from colorizer import FORMATS, LARGEST_SIDE, Colorizer, join, network_size, read_photograph, save
from dataset import COLORING, InvalidImageError, crop_resized, image_size, named_images
from pretrained import best_load_size, find_weights
from utils import TEMPERATURE

PIXELS_AHEAD = 32_000_000  # decoded ahead of the network, and again waiting to be written
COLUMNS = ("gray", "colored", "original")  # of a contact sheet


@dataclass
class Photograph:
    """One photograph on its way from file to file."""

    path: str
    target: Path
    size: tuple  # of the result: width, height
    network_size: tuple  # of what the network sees
    rgb: np.ndarray = None  # uint8 [H, W, 3] of the photograph
    small: np.ndarray = None  # uint8 [h, w, 3], what the network sees
    colored: np.ndarray = None  # uint8 [H, W, 3]
    info: dict = None  # metadata that the result keeps
    failure: str = None  # why there is no result

    @property
    def pixels(self):
        return self.size[0] * self.size[1]


# -------------------------------------------------------------------------------------------------
# What is to be done


def plan(args):
    """The photographs to color, those that the network sees at one size together."""
    names = named_images(args.image_dir)
    targets = {path: Path(args.result_path) / f"{name}.{args.format}" for name, path in names.items()}
    paths = without_results(sorted(targets), args)[: args.max_samples]
    for path in paths:
        if os.path.realpath(targets[path]) == os.path.realpath(path):
            raise UserError(f"{printable(path)}: the result would overwrite it; choose another --result_path")
    if args.skip_existing:
        paths = [path for path in paths if not targets[path].exists()]
    with ThreadPoolExecutor(args.num_workers) as pool:
        photographs = list(pool.map(partial(prepare, args=args, targets=targets), paths))
    return sorted(photographs, key=lambda x: x.network_size)


def without_results(paths, args):
    """Leaves out what lies in the result folder, should that be inside the folder of photographs."""
    result = os.path.join(os.path.realpath(args.result_path), "")
    sheets = result.rstrip(os.sep) + "_compare" + os.sep
    root = os.path.join(os.path.realpath(args.image_dir), "")
    if not (result.startswith(root) and result != root):
        return paths
    return [path for path in paths if not os.path.realpath(path).startswith((result, sheets))]


def prepare(path, args, targets):
    """Reads a photograph's size and from it says what the network will see."""
    try:
        width, height = image_size(path)
    except InvalidImageError as error:
        return Photograph(path, targets[path], (0, 0), (0, 0), failure=str(error))
    if not args.crop_size and max(width, height) > LARGEST_SIDE.get(args.format, math.inf):
        failure = f"{printable(path)}: {width}x{height} is too large for {args.format}"
        return Photograph(path, targets[path], (0, 0), (0, 0), failure=failure)
    if args.crop_size:
        square = (args.crop_size, args.crop_size)
        return Photograph(path, targets[path], square, square)
    return Photograph(path, targets[path], (width, height), network_size(width, height, args.load_size))


# -------------------------------------------------------------------------------------------------
# The way of a photograph: load (threads), color (the device), write (threads)


def load(photograph, args):
    if photograph.failure:
        return photograph
    try:
        image = read_photograph(photograph.path, args.load_size if args.crop_size else None)
        photograph.info = image.info
        if args.crop_size:
            photograph.rgb = photograph.small = crop_resized(image, args.load_size, args.crop_size)
        else:
            photograph.small = np.asarray(image.resize(photograph.network_size, Image.Resampling.BILINEAR))
            photograph.rgb = np.asarray(image)
    except InvalidImageError as error:
        photograph.failure = str(error)
    return photograph


def background_threads(count):
    """Threads that leave the cores to the network's: one of these that has to wait makes all of them wait."""
    polite = partial(os.nice, 10) if sys.platform == "linux" else None  # of a single thread, on Linux alone
    return ThreadPoolExecutor(count, initializer=polite)


def ahead(pool, function, photographs, pixels=PIXELS_AHEAD):
    """`function` of each photograph, in order, done by the pool's threads so many pixels ahead of the reader."""
    pending, waiting = deque(), 0
    for photograph in photographs:
        while pending and waiting + photograph.pixels > pixels:
            done = pending.popleft().result()
            waiting -= done.pixels
            yield done
        pending.append(pool.submit(function, photograph))
        waiting += photograph.pixels
    while pending:
        yield pending.popleft().result()


def batches(photographs, batch_size):
    """Runs of photographs that the network sees at one size, at most `batch_size` long."""
    for _, group in groupby(photographs, key=lambda x: (x.network_size, x.failure)):
        batch = []
        for photograph in group:
            batch.append(photograph)
            if len(batch) == batch_size or sum(x.pixels for x in batch) > PIXELS_AHEAD:
                yield batch
                batch = []
        if batch:
            yield batch


def color(photographs, colorizer, temperature, batch_size):
    """Gives each photograph its colors, a batch at a time."""
    for batch in batches(photographs, batch_size):
        if not batch[0].failure:
            predicted = colorizer.predict_ab(np.stack([x.small for x in batch]), temperature)
            for photograph, ab in zip(batch, predicted):
                photograph.colored = join(photograph.rgb, ab)
        yield from batch


def write(photograph, format):
    if not photograph.failure:
        image = Image.fromarray(photograph.colored)
        image.info = photograph.info
        save(image, photograph.target, format)
    return photograph


def thumbnails(photograph):
    """gray, colored, original, for a contact sheet."""
    original, colored = (fit(Image.fromarray(rgb)) for rgb in (photograph.rgb, photograph.colored))
    return original.convert("L").convert("RGB"), colored, original


# -------------------------------------------------------------------------------------------------
# Command line


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Colors photographs with a checkpoint.", formatter_class=HelpFormatter)
    group = parser.add_argument_group("what to color")
    add = group.add_argument
    add("image", nargs="?", help="a photograph or a folder; short for --image_dir")
    add("--image_dir", help="folder of photographs, nested or flat, or one file")
    add("--max_samples", type=int, help="color only so many, the first by name (default: all)")

    group = parser.add_argument_group("how")
    add = group.add_argument
    add("--model_path", default="./model", help="folder of the checkpoints")
    add(
        "--load_model",
        metavar="NAME",
        help="epoch_{NAME}_model.pdparams there; small: what comes with the project; official: the authors'; or a path "
        "(default: 19; where that is not there, latest, then the highest number, then small)",
    )
    add(
        "--temperature",
        type=float,
        default=TEMPERATURE,
        help="of the annealed mean: 1 is dull, 0 vivid but patchy",
    )
    add(
        "--precision",
        choices=("auto", "float32", "bf16"),
        default="auto",
        help="bf16: half the time, ab differs by 0.05 on average; auto: bf16 where the CPU has it in hardware",
    )
    add(
        "--load_size",
        type=int,
        help="short side in pixels as the network sees it (default: what the checkpoint says, 96 for small; else 256)",
    )
    add(
        "--crop_size",
        type=int,
        help="color only the center square of so many pixels, as papers do (default: all)",
    )
    add("--batch_size", type=int, default=8, help="photographs of equal size that the network colors at a time")
    add("--num_workers", type=int, default=available_cores(), help="threads that decode, and as many that write")

    group = parser.add_argument_group("what to write")
    add = group.add_argument
    add("--result_path", default="./result", help="folder of the results, laid out as the photographs are")
    add("--format", choices=FORMATS, default="png", help="of the results")
    add_bool_flag(
        group, "--compare", False, "also write contact sheets (gray, colored, original) to <result_path>_compare"
    )
    add_bool_flag(group, "--skip_existing", False, "leave out what already has a result, to go on after a stop")
    args = parser.parse_args(argv)
    args.image_dir = args.image_dir or args.image
    if not args.image_dir:
        parser.error("name a photograph or a folder")
    return args


def check_args(args):
    check_at_least(args, load_size=1, crop_size=1, batch_size=1, num_workers=1, max_samples=1)
    if not args.temperature > 0:
        raise UserError(f"--temperature {args.temperature}: must be above 0")
    check_crop(args, multiple=8)


def main(args):
    # Setup
    check_gpu()
    check_args(args)
    use_all_cores()

    # What is to be colored, and with what: mistakes show before the network is made
    checkpoint = find_weights(args.model_path, args.load_model)
    args.load_size = args.load_size or best_load_size(checkpoint)
    check_crop(args)
    photographs = plan(args)
    colorizer = Colorizer(checkpoint, precision=args.precision)
    sheets = Sheets(f"{args.result_path.rstrip(os.sep)}_compare", COLUMNS) if args.compare else None

    # Load, color and write, each while the others work
    done = skipped = 0
    with background_threads(args.num_workers) as readers, background_threads(args.num_workers) as writers:
        loaded = ahead(readers, partial(load, args=args), photographs)
        colored = color(loaded, colorizer, args.temperature, args.batch_size)
        written = ahead(writers, partial(write, format=args.format), colored)
        for photograph in tqdm(written, total=len(photographs), unit="image", disable=None):
            if photograph.failure:
                note(f"skipped {photograph.failure}")
                skipped += 1
                continue
            if sheets:
                name = photograph.target.relative_to(args.result_path).with_suffix("")
                sheets.add(printable(name), thumbnails(photograph))
            photograph.rgb = photograph.small = photograph.colored = None
            done += 1
    settings = {name: getattr(args, name) for name in ("temperature", "load_size", "crop_size")}
    made_by = {
        "checkpoint": printable(colorizer.checkpoint),
        "sha256": sha256(colorizer.checkpoint),
        "precision": colorizer.precision,
        **settings,
        **provenance(),
    }
    write_json(made_by, Path(args.result_path) / COLORING)  # which the metrics put into their results
    if sheets:
        sheets.flush()
        print(f"{printable(sheets.folder)}: {sheets.written} contact sheets (gray, colored, original)")
    left_out = f", {skipped} skipped" if skipped else ""
    made_with = f"with {printable(colorizer.checkpoint)} in {colorizer.precision}"
    print(f"{printable(args.result_path)}: {done} images colored {made_with}{left_out}")
    return EXIT_SKIPPED if skipped else 0


if __name__ == "__main__":
    sys.exit(main(parse_args()))
