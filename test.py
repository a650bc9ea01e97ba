"""Colors photographs with a checkpoint: a folder, nested or flat, or one file.

    python test.py photo.jpg                                                writes result/photo.png
    python test.py --image_dir DIR --load_model 7                           writes result/<same path>.png
    python test.py --image_dir DIR --load_size 256 --crop_size 224          squares, as papers evaluate

Each photograph comes out at its own, full resolution: the network sees it with a short side of 256 pixels, and
the ab that it predicts goes back up and joins the photograph's own lightness. Ends with what was written:

    result: 200 images colored with model/epoch_7_model.pdparams
"""

import argparse
import atexit
import os
import shutil
import sys
import tempfile
import zlib  # noqa: F401  ahead of Paddle, whose 2.x GPU builds carry a zlib with which Pillow reads no PNG
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path

import numpy as np
import paddle
import paddle.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from tqdm import tqdm

import model
from dataset import (
    InvalidImageError,
    crop_resized,
    image_size,
    lab_to_rgb,
    named_images,
    open_rgb,
    rgb_to_lightness,
    to_uint8,
)
from utils import (
    EXIT_SKIPPED,
    HelpFormatter,
    UserError,
    add_bool_flag,
    annealed_mean,
    atomic_path,
    available_cores,
    check_at_least,
    check_crop,
    load_ab_bins,
    load_network,
    note,
    printable,
    provenance,
    sha256,
    use_all_cores,
    write_json,
)
from weights import find_weights

MAX_ASPECT = 8  # a longer photograph is squeezed for the network: its input, and so the memory, stays bounded
PIXELS_AHEAD = 32_000_000  # decoded ahead of the network, and again waiting to be written
STRIP_PIXELS = 1_000_000  # converted at a time, so that a large photograph needs little more than itself
PNG_COMPRESSION = 3  # of 0 to 9; the files are some 5% larger than with 6 and written twice as fast


@dataclass
class Photograph:
    """One photograph on its way from file to file."""

    path: str
    target: Path
    size: tuple  # of the result: width, height
    network_size: tuple  # of what the network sees
    rgb: np.ndarray = None  # uint8 [H, W, 3] of the photograph, then of the result
    small: np.ndarray = None  # uint8 [h, w, 3], what the network sees
    colored: np.ndarray = None  # uint8 [H, W, 3]
    failure: str = None  # why there is no result

    @property
    def pixels(self):
        return self.size[0] * self.size[1]


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
        help="epoch_{NAME}_model.pdparams there; official: the authors' weights; or a path "
        "(default: 19; where that is not there, latest, then the highest number)",
    )
    add("--temperature", type=float, default=0.38, help="of the annealed mean: 1 is dull, toward 0 vivid but patchy")
    add("--precision", choices=("float32", "bf16"), default="float32", help="bf16: faster, colors differ slightly")
    add("--load_size", type=int, default=256, help="short side in pixels as the network sees it")
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


# -------------------------------------------------------------------------------------------------
# What is to be done


def plan(args):
    """The photographs to color, those that the network sees at one size together."""
    targets = {path: Path(args.result_path) / f"{name}.png" for name, path in named_images(args.image_dir).items()}
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
    if args.crop_size:
        square = (args.crop_size, args.crop_size)
        return Photograph(path, targets[path], square, square)
    return Photograph(path, targets[path], (width, height), network_size(width, height, args.load_size))


def network_size(width, height, short_side):
    """The photograph's size with that short side, in multiples of 8; the aspect is kept up to MAX_ASPECT."""
    scale = short_side / min(width, height)
    return tuple(max(8, round(min(side * scale, MAX_ASPECT * short_side) / 8) * 8) for side in (width, height))


# -------------------------------------------------------------------------------------------------
# The network, made fast
#
# On a CPU Paddle's inference engine runs it with oneDNN, several times faster than eager mode. It needs the network
# as an exported program, which is kept beside the checkpoint. Photographs of any size and number go through it.


def make_predictor(checkpoint, temperature=0.38, precision="float32"):
    """The function that colors with a checkpoint: lightness - 50 [N, 1, h, w] -> ab [N, 2, h/4, w/4].

    `precision` "bf16" computes the network in bfloat16 where the processor and Paddle (3.x) have it.
    """
    if not paddle.get_device().startswith("cpu"):
        return plain_predictor(load_network(checkpoint), temperature, precision)
    for choice in dict.fromkeys((precision, "float32")):
        try:
            return exported_predictor(exported(checkpoint), temperature, choice)
        except Exception as error:  # whatever the engine lacks on this platform or in this version
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            note(f"Paddle's inference engine cannot be used in {choice} here ({reason}): coloring in a slower way")
    return plain_predictor(load_network(checkpoint), temperature, "float32")


def plain_predictor(network, temperature, precision):
    network.eval()
    ab_bins = load_ab_bins()

    @paddle.no_grad()
    def predict(lightness):
        with paddle.amp.auto_cast(enable=precision == "bf16", dtype="bfloat16"):
            logits = network(lightness)
        return annealed_mean(logits, ab_bins, temperature)

    return predict


def exported_predictor(folder, temperature, precision):
    from paddle import inference

    program = next(path for path in folder.iterdir() if path.suffix in (".json", ".pdmodel"))  # Paddle 3, Paddle 2
    config = inference.Config(str(program), str(folder / "network.pdiparams"))
    config.disable_gpu()
    config.disable_glog_info()
    config.set_cpu_math_library_num_threads(available_cores())
    config.enable_mkldnn()
    config.set_mkldnn_cache_capacity(1)  # else each new size keeps some 120 MB
    if precision == "bf16":
        config.enable_mkldnn_bfloat16()
    engine = inference.create_predictor(config)
    lightness_input, temperature_input = map(engine.get_input_handle, engine.get_input_names())

    def predict(lightness):
        lightness_input.reshape(lightness.shape)
        lightness_input.copy_from_cpu(lightness.numpy())
        temperature_input.reshape([1])
        temperature_input.copy_from_cpu(np.array([temperature], np.float32))
        engine.run()
        return paddle.to_tensor(engine.get_output_handle(engine.get_output_names()[0]).copy_to_cpu())

    predict(paddle.zeros([1, 1, 64, 64]))  # what does not work fails here
    return predict


class Colorizer(paddle.nn.Layer):
    """The network with the annealed mean, as one program."""

    def __init__(self, network):
        super().__init__()
        self.network = network
        self.register_buffer("ab_bins", load_ab_bins())

    def forward(self, lightness, temperature):
        return annealed_mean(self.network(lightness), self.ab_bins, temperature)


def exported(checkpoint):
    """The folder of the exported network, beside its checkpoint; made anew when that, Paddle or model.py changed."""
    stamp = f"{sha256(checkpoint)} {paddle.__version__} {sha256(model.__file__)}"
    folder = checkpoint.with_suffix(".exported")
    if (folder / "stamp").is_file() and (folder / "stamp").read_text() == stamp:
        return folder
    colorizer = Colorizer(load_network(checkpoint))
    colorizer.eval()
    inputs = [paddle.static.InputSpec([None, 1, None, None]), paddle.static.InputSpec([1])]
    try:
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    except OSError:  # a folder that is only to be read
        folder = temporary = Path(tempfile.mkdtemp())
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    program = paddle.jit.to_static(colorizer, input_spec=inputs, full_graph=True)
    paddle.jit.save(program, str(temporary / "network"))
    (temporary / "stamp").write_text(stamp)
    if temporary != folder:
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
    return folder


# -------------------------------------------------------------------------------------------------
# The way of a photograph: load (threads), color (the device), write (threads)


def load(photograph, args):
    if photograph.failure:
        return photograph
    try:
        if args.crop_size:
            image = open_rgb(photograph.path, least_side=args.load_size)
            photograph.rgb = photograph.small = crop_resized(image, args.load_size, args.crop_size)
        else:
            image = open_rgb(photograph.path)
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
    pending, load = deque(), 0
    for photograph in photographs:
        while pending and load + photograph.pixels > pixels:
            done = pending.popleft().result()
            load -= done.pixels
            yield done
        pending.append(pool.submit(function, photograph))
        load += photograph.pixels
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


@paddle.no_grad()
def color(photographs, predict, batch_size):
    """Gives each photograph its colors. `predict`: lightness - 50 [N, 1, h, w] -> ab [N, 2, h/4, w/4]."""
    for batch in batches(photographs, batch_size):
        if not batch[0].failure:
            small = paddle.to_tensor(np.stack([x.small for x in batch])).transpose([0, 3, 1, 2])
            for photograph, ab in zip(batch, predict(rgb_to_lightness(small) - 50)):
                photograph.colored = join(photograph.rgb, ab)
        yield from batch


def join(rgb, ab):
    """The photograph's own lightness with the ab [2, h, w] brought to its size: uint8 [H, W, 3] -> the same."""
    height, width = rgb.shape[:2]
    colored = np.empty_like(rgb)
    for top in range(0, height, rows := max(1, STRIP_PIXELS // width)):
        strip = paddle.to_tensor(rgb[top : top + rows]).transpose([2, 0, 1]).unsqueeze(0)
        strip_ab = F.interpolate(
            resample_rows(ab, height, top, strip.shape[2]).unsqueeze(0), size=strip.shape[2:], mode="bilinear"
        )
        lab = paddle.concat([rgb_to_lightness(strip), strip_ab], axis=1)
        colored[top : top + rows] = to_uint8(lab_to_rgb(lab))[0].transpose([1, 2, 0]).numpy()
    return colored


def resample_rows(ab, height, top, rows):
    """`rows` rows, from `top` on, of ab [2, h, w] brought to that height bilinearly: [2, rows, w]."""
    y = ((np.arange(top, top + rows) + 0.5) * ab.shape[1] / height - 0.5).clip(0, ab.shape[1] - 1)
    above = np.floor(y).astype(np.int64)
    below = np.minimum(above + 1, ab.shape[1] - 1)
    share = paddle.to_tensor((y - above).astype(np.float32)).reshape([1, -1, 1])
    above, below = (paddle.gather(ab, paddle.to_tensor(i), axis=1) for i in (above, below))
    return above + share * (below - above)


def write(photograph):
    if not photograph.failure:
        with atomic_path(photograph.target) as temporary:
            Image.fromarray(photograph.colored).save(temporary, format="PNG", compress_level=PNG_COMPRESSION)
    return photograph


# -------------------------------------------------------------------------------------------------
# Contact sheets

CELL = (320, 240)  # width and height in which each picture fits
ROWS = 12  # photographs on a sheet
COLUMNS = ("gray", "colored", "original")
MARGIN, HEAD, FOOT = 10, 44, 30  # pixels between pictures, for the headings, and for the name below a row


def thumbnails(photograph):
    """gray, colored, original, each to fill a cell in one direction."""
    original, colored = (fit(Image.fromarray(rgb)) for rgb in (photograph.rgb, photograph.colored))
    return original.convert("L").convert("RGB"), colored, original


def fit(image):
    image.thumbnail(CELL)  # faster than `contain` for a large one
    return ImageOps.contain(image, CELL)


def contact_sheet(rows, columns=COLUMNS, cell_width=CELL[0]):
    """Rows of (name, thumbnails) under the columns' headings, as one image."""
    width = len(columns) * (cell_width + MARGIN) + MARGIN
    heights = [max(image.height for image in images) + FOOT for _, images in rows]
    sheet = Image.new("RGB", (width, HEAD + sum(heights)), "white")
    draw = ImageDraw.Draw(sheet)
    heading, caption = font(20), font(14)
    centers = [MARGIN + column * (cell_width + MARGIN) + cell_width // 2 for column in range(len(columns))]
    for center, text in zip(centers, columns):
        draw.text((center, HEAD // 2), text, "black", heading, anchor="mm")
    top = HEAD
    for (name, images), height in zip(rows, heights):
        for center, image in zip(centers, images):
            sheet.paste(image, (center - image.width // 2, top))
        top += height
        text = shortened(name, draw, caption, width - 2 * MARGIN)
        draw.text((width // 2, top - FOOT * 2 // 3), text, "dimgray", caption, anchor="mm")
    return sheet


def font(size):
    """matplotlib's, which has accents, Greek and Cyrillic; Pillow's own has ASCII alone."""
    import matplotlib  # not with the others: only a sheet needs it

    return ImageFont.truetype(os.path.join(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), size)


def shortened(name, draw, font, width):
    """A name's end, as far as it fits into so many pixels."""
    if draw.textlength(name, font) <= width:
        return name
    while draw.textlength(f"…{name}", font) > width:
        name = name[1:]
    return f"…{name}"


class Sheets:
    """Collects thumbnails and writes a sheet whenever one is full."""

    def __init__(self, result_path):
        self.result_path = result_path
        self.folder = Path(f"{result_path.rstrip(os.sep)}_compare")
        self.rows, self.written = [], 0

    def add(self, photograph):
        name = printable(photograph.target.relative_to(self.result_path).with_suffix(""))
        self.rows.append((name, thumbnails(photograph)))
        if len(self.rows) == ROWS:
            self.flush()

    def flush(self):
        if self.rows:
            self.written += 1
            with atomic_path(self.folder / f"sheet_{self.written:03d}.png") as temporary:
                contact_sheet(self.rows).save(temporary, format="PNG")
            self.rows = []


# -------------------------------------------------------------------------------------------------


def main(args):
    # Setup
    check_args(args)
    use_all_cores()

    # What is to be colored, and with what: mistakes show before the network is made
    photographs = plan(args)
    checkpoint = find_weights(args.model_path, args.load_model)
    predict = make_predictor(checkpoint, args.temperature, args.precision)
    sheets = Sheets(args.result_path) if args.compare else None

    # Load, color and write, each while the others work
    done = skipped = 0
    with background_threads(args.num_workers) as readers, background_threads(args.num_workers) as writers:
        loaded = ahead(readers, partial(load, args=args), photographs)
        colored = color(loaded, predict, args.batch_size)
        for photograph in tqdm(ahead(writers, write, colored), total=len(photographs), unit="image", disable=None):
            if photograph.failure:
                note(f"skipped {photograph.failure}")
                skipped += 1
                continue
            if sheets:
                sheets.add(photograph)
            photograph.rgb = photograph.small = photograph.colored = None
            done += 1
    settings = {name: getattr(args, name) for name in ("temperature", "precision", "load_size", "crop_size")}
    made_by = {"checkpoint": printable(checkpoint), "sha256": sha256(checkpoint), **settings, **provenance()}
    write_json(made_by, Path(args.result_path) / "coloring.json")  # which the metrics put into their results
    if sheets:
        sheets.flush()
        print(f"{printable(sheets.folder)}: {sheets.written} contact sheets (gray, colored, original)")
    left_out = f", {skipped} skipped" if skipped else ""
    print(f"{printable(args.result_path)}: {done} images colored with {printable(checkpoint)}{left_out}")
    return EXIT_SKIPPED if skipped else 0


if __name__ == "__main__":
    sys.exit(main(parse_args()))
