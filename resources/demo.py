"""Demonstrate the project without data, a GPU or training: colorize images, then overfit them for a few steps.

    python resources/demo.py

The images are those bundled with scikit-image, matplotlib and, if installed, scikit-learn. The bundled weights were
not trained on them. `camera` was taken in gray, so it has no original. Then the weights are fine-tuned on the images
for a moment: the loss falls. Results, the picture and the training's log stay in one folder, ./demo by default; the
checkpoints are deleted. The last line names the picture:

    demo/compare.png: 8 images colorized (gray, colored, original)
"""

import importlib.util
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from support.cli import Parser, counted, printable, run_script, whole
from support.files import atomic_path
from support.images import list_images, open_rgb
from support.sheets import contact_sheet, fit

from PIL import Image

import test
import train

IMAGES = {  # by the package that bundles them
    "skimage": ("astronaut.png", "camera.png", "chelsea.png", "coffee.png", "rocket.jpg"),
    "matplotlib": ("sample_data/grace_hopper.jpg",),
    "sklearn": ("images/china.jpg", "images/flower.jpg"),
}
FOLDERS = {"skimage": "data", "matplotlib": "mpl-data", "sklearn": "datasets"}
TAKEN_IN_GRAY = "camera"
CELL = (200, 140)  # pixels of an image in the picture, which fits on one screen
ACROSS = 2  # images next to each other, each gray, colored and original


def parse_args(argv=None):
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", default="demo", help="folder to write to")
    parser.add_argument("--steps", type=whole(0), default=40, help="number of training steps; 0: only colorize")
    return parser.parse_args(argv)


def copy_images(folder):
    """Copy the images that are installed to a folder, which is made if necessary. Return their number."""
    number = 0
    for package, names in IMAGES.items():
        if spec := importlib.util.find_spec(package):
            for path in (Path(spec.origin).parent / FOLDERS[package] / name for name in names):
                if path.exists():
                    with atomic_path(folder / path.name) as temporary:
                        shutil.copyfile(path, temporary)
                    number += 1
    return number


def compare(images, result):
    """Return a picture of the images in gray, their results and the originals, and the number of images."""
    rows = []
    for path in map(Path, list_images(images)):
        original, colored = (fit(open_rgb(x), CELL) for x in (path, result / f"{path.stem}.png"))
        row = (original.convert("L").convert("RGB"), colored, original)
        rows.append((path.stem, row[:2] if path.stem == TAKEN_IN_GRAY else row))
    sheets = [contact_sheet(rows[i::ACROSS], test.COLUMNS, CELL[0]) for i in range(ACROSS)]
    picture = Image.new("RGB", (sum(sheet.width for sheet in sheets), sheets[0].height), "white")
    for i, sheet in enumerate(sheets):
        picture.paste(sheet, (i * sheet.width, 0))
    return picture, len(rows)


def main(args):
    output = Path(args.output)
    images, result = output / "photographs", output / "result"
    copy_images(images)

    print("1. test: colorize images from their lightness alone")
    test.main(test.parse_args([str(images), "--load_model", "small", "--result_path", str(result)]))
    picture, number = compare(images, result)
    with atomic_path(output / "compare.png") as temporary:
        picture.save(temporary, format="PNG")

    if args.steps:
        print(f"2. train: {args.steps} steps from the same weights, to overfit these images")
        with tempfile.TemporaryDirectory() as checkpoints:
            folders = ["--model_path", checkpoints, "--log_path", str(output / "log"), "--overwrite"]
            size = ["--load_size", "72", "--crop_size", "64", "--batch_size", str(number)]
            length = ["--max_steps", str(args.steps), "--num_epochs", str(args.steps), "--save_freq", "1000000"]
            look = ["--lr", "1e-4", "--num_workers", "0", "--loss_step", "5"]
            data = ["--image_dir", str(images), "--init_from", "small"]
            train.main(train.parse_args([*data, *folders, *size, *length, *look]))

    print(f"{printable(output / 'compare.png')}: {counted(number, 'image')} colorized ({', '.join(test.COLUMNS)})")
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main, parse_args))
