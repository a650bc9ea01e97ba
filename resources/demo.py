"""A first look in a few minutes, on a CPU, without data: trains a moment on scikit-image's photographs and colors them.

    python resources/demo.py

A network that has seen five photographs cannot color others: this shows that everything works, and how the
scripts go together. Everything is written to one folder, ./demo by default; the last line names the picture.
"""

import argparse
import shutil
import sys
from pathlib import Path

from PIL import Image
from skimage import data

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from support.cli import HelpFormatter, check_flags, run_script
from support.files import atomic_path

import test
import train

PHOTOGRAPHS = ("astronaut", "coffee", "chelsea", "rocket")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=HelpFormatter)
    parser.add_argument("--output", default="demo", help="folder to write to")
    parser.add_argument("--steps", type=int, default=150, help="training steps")
    return parser.parse_args(argv)


def save_photographs(folder):
    """Writes the photographs into a folder, which is made, and returns it."""
    for name in PHOTOGRAPHS:
        with atomic_path(folder / f"{name}.png") as temporary:
            Image.fromarray(getattr(data, name)()).save(temporary, format="PNG")
    return folder


def main(args):
    check_flags(args, steps=(1, None))
    output = Path(args.output)
    photographs = save_photographs(output / "photographs")

    print(f"1. train: {args.steps} steps on {len(PHOTOGRAPHS)} photographs at 64x64")
    folders = ["--model_path", str(output / "model")]
    size = ["--load_size", "72", "--crop_size", "64", "--batch_size", str(len(PHOTOGRAPHS))]
    # A higher learning rate than the paper's and no validation: there are only minutes.
    speed = ["--lr", "3e-4", "--num_workers", "0", "--loss_step", "25", "--save_freq", "1000000"]
    length = ["--max_steps", str(args.steps), "--num_epochs", str(args.steps)]
    log = ["--log_path", str(output / "log"), "--overwrite"]
    train.main(train.parse_args(["--image_dir", str(photographs), *folders, *log, *size, *speed, *length]))

    print("2. test: color them again from their lightness alone")
    results = ["--load_model", "latest", "--load_size", "72", "--result_path", str(output / "result"), "--compare"]
    test.main(test.parse_args(["--image_dir", str(photographs), *folders, *results]))

    picture = shutil.copy(output / "result_compare" / "sheet_001.png", output / "compare.png")
    print(f"{picture}: gray, colored, original")
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main, parse_args))
