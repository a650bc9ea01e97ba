"""Measure test.py: the network's share of the time, the speed compared with a plain loop, and peak memory.

    python tests/benchmarks/bench_coloring.py --image_dir DIR [--max_samples 50] [--precision bf16]
    python tests/benchmarks/bench_coloring.py --megapixels 50

On one core (`taskset -c 0`) CPU time is measured, which hardly depends on the load of the machine. The network has
random weights, on which its time does not depend.
"""

import argparse
import resource
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
from support.checkpoints import save_checkpoint
from support.cli import counted
from support.cpu import available_cores, use_all_cores
from support.images import WRITE_FORMATS, read_rgb

import numpy as np
import paddle
from PIL import Image

import colorizer
import test
from dataset import list_images, rgb_to_lightness
from model import CIC
from utils import annealed_mean, load_ab_bins

clock = time.process_time if available_cores() == 1 else time.perf_counter


def timed(predict, seconds):
    def run(*arguments):
        start = clock()
        logits = predict(*arguments)
        seconds.append(clock() - start)
        return logits

    return run


def plain_loop(paths, predict, folder):
    """Take the same steps one after another."""
    ab_bins = load_ab_bins()
    for i, path in enumerate(paths):
        rgb = read_rgb(path)
        size = colorizer.network_size(rgb.shape[1], rgb.shape[0], 256)
        small = np.asarray(Image.fromarray(rgb).resize(size, Image.Resampling.BILINEAR))
        ab = annealed_mean(predict(rgb_to_lightness(paddle.to_tensor(small.transpose(2, 0, 1)[None])) - 50), ab_bins)[0]
        Image.fromarray(colorizer.join(rgb, ab)).save(folder / f"{i}.png", **WRITE_FORMATS["png"])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--image_dir")
    parser.add_argument("--max_samples", type=int)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--megapixels", type=int, help="colorize one image of this size and report memory")
    args = parser.parse_args()
    use_all_cores()
    folder = Path(tempfile.mkdtemp())
    save_checkpoint(CIC().state_dict(), folder / "epoch_19_model.pdparams")
    if args.megapixels:
        side = int((args.megapixels * 1e6 / 1.5) ** 0.5)
        noise = np.random.default_rng(0).integers(0, 256, (side // 16, side * 3 // 32, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((side * 3 // 2, side)).save(folder / "large.jpg")
        args.image_dir = str(folder / "large.jpg")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    flags = ["--image_dir", args.image_dir, "--model_path", str(folder), "--result_path", str(folder / "result")]
    flags += ["--precision", args.precision] + (["--max_samples", str(args.max_samples)] if args.max_samples else [])
    made, seconds, alone = colorizer.Colorizer(folder / "epoch_19_model.pdparams", precision=args.precision), [], []
    colorizer.make_predictor = lambda *_: (timed(made.network, seconds), made.precision)
    paths = list_images(args.image_dir)[: args.max_samples]
    for _ in range(args.rounds if not args.megapixels else 1):
        seconds.clear()
        alone.clear()
        start = clock()
        test.main(test.parse_args(flags))
        wall = clock() - start
        start = clock()
        if not args.megapixels:
            plain_loop(paths, timed(made.network, alone), folder)
        loop = clock() - start
        print(f"{counted(len(paths), 'image')}, {made.precision}: ", end="")
        print(f"network {sum(seconds) / wall:.0%} of the time; ", end="")
        print(f"{len(paths) / wall:.2f} images per second", end="\n" if args.megapixels else ", ", flush=True)
        if not args.megapixels:
            own = sum(alone)  # of the network, one image at a time and no other work
            print(f"plain loop {len(paths) / loop:.2f}; ", end="")
            print(f"{wall / own:.2f} and {loop / own:.2f} of the network's own time", flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"resident memory: {before:.0f} MB before colorizing, {peak:.0f} MB at the peak")


if __name__ == "__main__":
    main()
