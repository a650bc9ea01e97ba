"""Demonstrate the project without data, a GPU or training: colorize images, then overfit them for a few steps.

    python resources/demo.py

The images are those bundled with scikit-image, matplotlib and, if installed, scikit-learn. The bundled weights were
not trained on them. Then the weights are fine-tuned on the images for a moment: the loss falls. Results, contact sheets
(result_compare), the README's picture and the training's log stay in one folder, ./demo by default; the checkpoints are
deleted. The last line names the picture:

    demo/pairs.png: 8 images colorized
"""

import importlib.util
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from support.cli import Parser, counted, printable, run_script, whole
from support.images import open_rgb
from support.sheets import contact_sheet

from PIL import ImageOps

import test
import train
from dataset import list_images

IMAGES = {  # by the package that bundles them
    "skimage": "data/astronaut.png data/camera.png data/chelsea.png data/coffee.png data/rocket.jpg",
    "matplotlib": "mpl-data/sample_data/grace_hopper.jpg",
    "sklearn": "datasets/images/china.jpg datasets/images/flower.jpg",
}
PAIRS = {  # the README's picture, with what is wrong
    "rocket": "rocket",
    "astronaut": "astronaut",
    "camera": "camera (taken in gray)",
    "coffee": "coffee (a failure: a green cloud on the table)",
}
SIZE = (400, 267)  # pixels of an image in this picture
TRAINING = "--init_from small --load_size 72 --crop_size 64 --lr 1e-4 --loss_step 5 --num_workers 0 --overwrite"


def parse_args(argv=None):
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", default="demo", help="folder to write to")
    parser.add_argument("--steps", type=whole(0), default=20, help="number of training steps; 0: only colorize")
    return parser.parse_args(argv)


def copy_images(folder):
    """Copy the images of installed packages to a folder, which is made if necessary. Return their number."""
    folder.mkdir(parents=True, exist_ok=True)
    for package, names in IMAGES.items():
        if spec := importlib.util.find_spec(package):
            for name in names.split():
                shutil.copy(Path(spec.origin).parent / name, folder)
    return len(list_images(folder))


def pairs(images, result):
    """Return a picture of the images in PAIRS, in gray and colorized."""
    rows = []
    for name, caption in PAIRS.items():
        colorized = ImageOps.fit(open_rgb(result / f"{name}.png"), SIZE, centering=(0.5, 0))
        (path,) = images.glob(f"{name}.*")
        gray = ImageOps.fit(open_rgb(path), SIZE, centering=(0.5, 0)).convert("L").convert("RGB")
        rows.append((caption, (gray, colorized)))
    return contact_sheet(rows, test.COLUMNS[:2], SIZE[0])


def main(args):
    output = Path(args.output)
    images, result = output / "images", output / "result"
    number = copy_images(images)

    print("1. test: colorize images from their lightness alone")
    test.main(test.parse_args([str(images), "--load_model", "small", "--result_path", str(result), "--compare"]))
    pairs(images, result).save(output / "pairs.png")

    code = 0
    if args.steps:
        print(f"2. train: {args.steps} steps from the same weights, to overfit these images (checkpoints are not kept)")
        length = f"--batch_size {number} --max_steps {args.steps} --num_epochs {args.steps} --save_freq 1000000"
        with tempfile.TemporaryDirectory(prefix="deleted_after_the_demo_") as checkpoints:
            folders = ["--image_dir", str(images), "--model_path", checkpoints, "--log_path", str(output / "log")]
            code = train.main(train.parse_args([*folders, *TRAINING.split(), *length.split()]))

    print(f"{printable(output / 'pairs.png')}: {counted(number, 'image')} colorized")
    return code


if __name__ == "__main__":
    sys.exit(run_script(main, parse_args))
