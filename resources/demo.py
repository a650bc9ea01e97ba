"""A first look, without data, a graphics card or a training: colors photographs, then shows how training goes.

    python resources/demo.py

The photographs are those that scikit-image and matplotlib bring along, and scikit-learn where it is installed; the
weights, which come with the project, have seen none of them. Then these weights are fine-tuned on the photographs for
a moment: the loss falls. Everything is written to one folder, ./demo by default; the last line names the picture.
"""

import importlib.util
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from support.cli import Parser, run_script, whole
from support.files import atomic_path

import test
import train

PHOTOGRAPHS = {  # by the package that brings them along
    "skimage": ("data/astronaut.png", "data/chelsea.png", "data/coffee.png", "data/rocket.jpg"),
    "matplotlib": ("mpl-data/sample_data/grace_hopper.jpg",),
    "sklearn": ("datasets/images/china.jpg", "datasets/images/flower.jpg"),
}


def parse_args(argv=None):
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", default="demo", help="folder to write to")
    parser.add_argument("--steps", type=whole(0), default=40, help="training steps; 0: only color")
    return parser.parse_args(argv)


def copy_photographs(folder):
    """Copies the photographs that are there into a folder, which is made; returns their number."""
    packages = {name: spec for name in PHOTOGRAPHS if (spec := importlib.util.find_spec(name))}
    paths = [Path(spec.origin).parent / path for name, spec in packages.items() for path in PHOTOGRAPHS[name]]
    paths = [path for path in paths if path.exists()]
    for path in paths:
        with atomic_path(folder / path.name) as temporary:
            shutil.copyfile(path, temporary)
    return len(paths)


def main(args):
    output = Path(args.output)
    number = copy_photographs(output / "photographs")
    images = ["--image_dir", str(output / "photographs")]

    print(f"1. test: {number} photographs, colored from their lightness alone")
    results = ["--load_model", "small", "--result_path", str(output / "result"), "--compare"]
    test.main(test.parse_args([*images, *results]))
    picture = shutil.copy(output / "result_compare" / "sheet_001.png", output / "compare.png")

    if args.steps:
        print(f"2. train: {args.steps} steps from the same weights, to learn these photographs by heart")
        folders = ["--model_path", str(output / "model"), "--log_path", str(output / "log"), "--overwrite"]
        size = ["--load_size", "72", "--crop_size", "64", "--batch_size", str(number)]
        length = ["--max_steps", str(args.steps), "--num_epochs", str(args.steps), "--save_freq", "1000000"]
        look = ["--lr", "1e-4", "--num_workers", "0", "--loss_step", "5"]
        train.main(train.parse_args([*images, "--init_from", "small", *folders, *size, *length, *look]))

    print(f"{picture}: gray, colored, original")
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main, parse_args))
