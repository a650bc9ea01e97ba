"""Colors photographs with a checkpoint: files and folders, nested or flat.

    python test.py photo.jpg                                                writes result/photo.png
    python test.py photo.jpg --output colored.png                           writes colored.png
    python test.py a.jpg b.jpg holiday                                      writes result/a.png, …, result/holiday/…
    python test.py --image_dir DIR --load_model 7                           writes result/<same path>.png
    python test.py --image_dir DIR --load_size 256 --crop_size 224          squares, as papers evaluate

Each photograph comes out at its own, full resolution: the network sees it smaller, with a short side of 256 pixels or
what its checkpoint says, and the ab that it predicts goes back up and joins the photograph's own lightness. Without a
checkpoint of one's own it is colored with the small one that comes with the project. Ends with what was written:

    result: 200 images colored with model/epoch_7_model.pdparams in bf16
"""

import errno
import math
import os
import sys
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path

from support.cli import (
    EXIT_SKIPPED,
    SIDE,
    Parser,
    UserError,
    add_bool_flag,
    check_crop,
    counted,
    note,
    number,
    printable,
    progress,
    run_script,
    whole,
)
from support.cpu import available_cores, lower_priority, use_all_cores
from support.files import make_folder, provenance, read_json, remove_temporaries, sha256, write_json
from support.gpu import check_gpu
from support.images import COLORING, InvalidImageError, crop_resized, has_more_frames, image_size, named_images
from support.sheets import Sheets, fit

import numpy as np
from PIL import Image

from colorizer import FORMATS, LARGEST_SIDE, Colorizer, join, network_size, read_photograph, save
from pretrained import best_load_size, find_weights
from utils import TEMPERATURE

PIXELS_AHEAD = 32_000_000  # decoded ahead of the network, and again waiting to be written
NEARLY_BLACK = 17  # of 255: 12 bits in 16 stay below, unless scaled
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
    named = named_images(*args.images)
    if args.output and len(named) > 1:
        raise UserError(f"--output names one file, but there are {len(named)} photographs: use --result_path FOLDER")
    folder = Path(args.result_path)
    targets = {path: Path(args.output or folder / f"{name}.{args.format}") for name, path in named.items()}
    check_apart(targets, args)
    paths = sorted(targets)[: args.max_samples]
    if args.skip_existing:
        paths = [path for path in paths if not targets[path].exists()]
    with background_threads(args.num_workers) as pool:
        photographs = list(pool.map(partial(prepare, args=args, targets=targets), paths))
    return sorted(photographs, key=lambda x: x.network_size)


def check_apart(targets, args):
    """Raises UserError where results would lie among photographs: the next run would take them for such."""
    result = os.path.realpath(args.result_path)
    if not args.output:
        for folder in {os.path.dirname(path) for path in targets}:
            if os.path.commonpath([os.path.realpath(folder), result]) == result:
                raise UserError(
                    f"{args.result_path}: results would lie among the photographs, or overwrite them; "
                    "choose another --result_path, or for one photograph --output FILE"
                )
    for path, target in targets.items():
        if os.path.realpath(target) == os.path.realpath(path):
            raise UserError(f"{path}: the result would overwrite it; choose another name")


def prepare(path, args, targets):
    """Reads a photograph's size and from it says what the network will see."""
    try:
        width, height = image_size(path)
        if has_more_frames(path):
            note(f"{path}: only the first of its frames or pages is colored")
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
        if photograph.small.max() < NEARLY_BLACK:
            note(f"{photograph.path}: nearly black; were 8 or 12 bits stored in more, without scaling?")
    except InvalidImageError as error:
        photograph.failure = str(error)
    return photograph


@contextmanager
def background_threads(count):
    """Threads that leave the cores to the network's: one of these that has to wait makes all of them wait."""
    pool = ThreadPoolExecutor(count, initializer=lower_priority)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)  # of a run that is stopped; else there are none


def ahead(pool, function, photographs, pixels=PIXELS_AHEAD, at_once=False):
    """`function` of each photograph, in order, done by the pool's threads so many pixels ahead of the reader.

    `at_once`: what is done is handed on, so that it counts, instead of waiting until as much is on its way.
    """
    pending, waiting = deque(), 0
    for photograph in photographs:
        while pending and (waiting + photograph.pixels > pixels or (at_once and pending[0].done())):
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
        try:
            save(image, photograph.target, format)
        except UserError as error:
            if error.__cause__.errno != errno.ENAMETOOLONG:  # the only one that is this photograph's own
                raise
            photograph.failure = str(error)
    return photograph


def thumbnails(photograph):
    """gray, colored, original, for a contact sheet."""
    original, colored = (fit(Image.fromarray(rgb)) for rgb in (photograph.rgb, photograph.colored))
    return original.convert("L").convert("RGB"), colored, original


# -------------------------------------------------------------------------------------------------
# What is said of the results


def describe(colorizer, args):
    """How the results come about, for the coloring.json beside them, which the metrics put into theirs."""
    return {
        "checkpoint": printable(colorizer.checkpoint),
        "sha256": sha256(colorizer.checkpoint),
        "precision": colorizer.precision,
        "temperature": args.temperature,
        "load_size": args.load_size,
        "crop_size": args.crop_size,
        **provenance(),
    }


def check_alike(made_by, folder):
    """Raises UserError where the folder's results were made otherwise: those that are added would be taken for such."""
    before = read_json(folder / COLORING) or {}
    for name in ("sha256", "temperature", "load_size", "crop_size"):
        if name in before and before[name] != made_by[name]:
            raise UserError(
                f"{folder / COLORING}: the results there have the {name} {before[name]}, not "
                f"{made_by[name]}: choose another --result_path, or leave --skip_existing out"
            )


def announced(photographs, made_by, folders):
    """The photographs; ahead of the first with a result the folders' coloring.json: it is there however this ends."""
    written = False
    for photograph in photographs:
        if not photograph.failure and not written:
            for folder in folders:
                write_json(made_by, folder / COLORING)
            written = True
        yield photograph


# -------------------------------------------------------------------------------------------------
# Command line


def parse_args(argv=None):
    parser = Parser(description="Colors photographs with a checkpoint.")
    group = parser.add_argument_group("what to color")
    add = group.add_argument
    add("images", nargs="*", metavar="IMAGE", help="photographs and folders, nested or flat")
    add("--image_dir", help="a folder of photographs, or one file; the same as without --image_dir")
    add("--max_samples", type=whole(), help="color only so many, the first by name (default: all)")

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
        type=number(1e-3, 1e6),
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
        type=SIDE,
        help="short side in pixels as the network sees it (default: what the checkpoint says, 96 for small; else 256)",
    )
    add(
        "--crop_size",
        type=SIDE,
        help="color only the center square of so many pixels, as papers do (default: all)",
    )
    add("--batch_size", type=whole(), default=8, help="photographs of equal size that the network colors at a time")
    add(
        "--num_workers",
        type=whole(1, 1024),
        default=available_cores(),
        help="threads that decode, and as many that write",
    )

    group = parser.add_argument_group("what to write")
    add = group.add_argument
    add("--result_path", default="./result", help="folder of the results, laid out as the photographs are")
    add("--output", metavar="FILE", help="the result of a single photograph, instead of --result_path")
    add("--format", choices=FORMATS, help="of the results (default: that of --output, else png)")
    add_bool_flag(
        group, "--compare", False, "also write contact sheets (gray, colored, original) to <result_path>_compare"
    )
    add_bool_flag(group, "--skip_existing", False, "leave out what already has a result, to go on after a stop")
    args = parser.parse_args(argv)
    if args.image_dir is not None:
        args.images.append(args.image_dir)
    args.images = list(dict.fromkeys(args.images))
    if not args.images:
        parser.error("name a photograph or a folder")
    return args


def check_args(args):
    suffix = Path(args.output).suffix.lower().lstrip(".") if args.output else None
    args.format = args.format or suffix or "png"
    if args.output and (suffix != args.format or suffix not in FORMATS):
        raise UserError(f"--output {args.output}: must end in its format's name: {', '.join(FORMATS)}")


def main(args):
    # Setup
    check_gpu()
    check_args(args)
    use_all_cores()

    # What is to be colored, and with what: mistakes show before the network is made
    checkpoint = find_weights(args.model_path, args.load_model)
    args.load_size = args.load_size or best_load_size(checkpoint)
    check_crop(args, multiple=8)
    photographs = plan(args)
    result = Path(args.output).parent if args.output else Path(args.result_path)
    for folder in {photograph.target.parent for photograph in photographs}:
        remove_temporaries(folder)
    make_folder(result)
    if not photographs:
        print(f"{printable(args.output or args.result_path)}: 0 images colored, all have a result")
        return 0
    colorizer = Colorizer(checkpoint, precision=args.precision)
    made_by = describe(colorizer, args)
    if args.skip_existing and not args.output:
        check_alike(made_by, result)
    compare = Path(f"{os.path.splitext(args.output)[0] if args.output else args.result_path.rstrip(os.sep)}_compare")
    sheets = {}
    folders = [folder for folder, given in ((result, not args.output), (compare, args.compare)) if given]

    # Load, color and write, each while the others work
    done = skipped = 0
    with background_threads(args.num_workers) as readers, background_threads(args.num_workers) as writers:
        loaded = ahead(readers, partial(load, args=args), photographs)
        colored = announced(color(loaded, colorizer, args.temperature, args.batch_size), made_by, folders)
        written = ahead(writers, partial(write, format=args.format), colored, at_once=True)
        for photograph in progress(written, len(photographs)):
            if photograph.failure:
                note(f"skipped {photograph.failure}")
                skipped += 1
                continue
            if args.compare:
                name = photograph.target.relative_to(result).with_suffix("")
                folder = compare / name.parts[0] if len(args.images) > 1 and len(name.parts) > 1 else compare
                sheets.setdefault(folder, Sheets(folder, COLUMNS)).add(printable(name), thumbnails(photograph))
            photograph.rgb = photograph.small = photograph.colored = None
            done += 1
    for folder, of_folder in sheets.items():
        of_folder.flush()
        print(f"{printable(folder)}: {counted(of_folder.written, 'contact sheet')} (gray, colored, original)")
    left_out = f", {skipped} skipped" if skipped else ""
    made_with = f"with {printable(colorizer.checkpoint)} in {colorizer.precision}"
    print(f"{printable(args.output or args.result_path)}: {counted(done, 'image')} colored {made_with}{left_out}")
    return EXIT_SKIPPED if skipped else 0


if __name__ == "__main__":
    sys.exit(run_script(main, parse_args, after_stop="to go on: the same command with --skip_existing"))
