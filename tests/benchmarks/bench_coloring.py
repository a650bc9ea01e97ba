"""`test.py` end to end: what share of the time is the network's, and how fast beside a plain loop; peak memory.

    python tests/benchmarks/bench_coloring.py --image_dir DIR [--max_samples 50] [--precision bf16]
    python tests/benchmarks/bench_coloring.py --megapixels 50

On one core (`taskset -c 0`) it is the processor's time that counts, which hardly depends on what else the machine does.

A random network serves: its time does not depend on the weights.
"""

import argparse
import resource
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
from support.checkpoints import save_checkpoint
from support.cpu import available_cores, use_all_cores
from support.images import list_images, read_rgb

import numpy as np
import paddle
from PIL import Image

import colorizer
import test
from dataset import rgb_to_lightness
from model import CIC
from tests.small_network import standardize

clock = time.process_time if available_cores() == 1 else time.perf_counter


def timed(predict, seconds):
    def run(*arguments):
        start = clock()
        ab = predict(*arguments)
        seconds.append(clock() - start)
        return ab

    return run


def plain_loop(paths, predict, folder):
    """The same steps, one after the other."""
    for i, path in enumerate(paths):
        rgb = read_rgb(path)
        size = colorizer.network_size(rgb.shape[1], rgb.shape[0], 256)
        small = np.asarray(Image.fromarray(rgb).resize(size, Image.Resampling.BILINEAR))
        ab = predict(rgb_to_lightness(paddle.to_tensor(small.transpose(2, 0, 1)[None])) - 50, 0.38)[0]
        Image.fromarray(colorizer.join(rgb, ab)).save(folder / f"{i}.png", **colorizer.FORMATS["png"])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--image_dir")
    parser.add_argument("--max_samples", type=int)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--megapixels", type=int, help="color one photograph of this size and report memory")
    args = parser.parse_args()
    use_all_cores()
    folder = Path(tempfile.mkdtemp())
    network = CIC()
    standardize(network, 50 + 20 * paddle.randn([2, 1, 64, 64]))
    save_checkpoint(network.state_dict(), folder / "epoch_19_model.pdparams")
    del network
    if args.megapixels:
        side = int((args.megapixels * 1e6 / 1.5) ** 0.5)
        noise = np.random.default_rng(0).integers(0, 256, (side // 16, side * 3 // 32, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((side * 3 // 2, side)).save(folder / "large.jpg")
        args.image_dir = str(folder / "large.jpg")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    flags = ["--image_dir", args.image_dir, "--model_path", str(folder), "--result_path", str(folder / "result")]
    flags += ["--precision", args.precision] + (["--max_samples", str(args.max_samples)] if args.max_samples else [])
    make, seconds, alone = colorizer.make_predictor, [], []
    predict, precision = make(folder / "epoch_19_model.pdparams", args.precision)
    colorizer.make_predictor = lambda *_: (timed(predict, seconds), precision)
    paths = list_images(args.image_dir)[: args.max_samples]
    for _ in range(args.rounds if not args.megapixels else 1):
        seconds.clear()
        alone.clear()
        start = clock()
        test.main(test.parse_args(flags))
        wall = clock() - start
        start = clock()
        if not args.megapixels:
            plain_loop(paths, timed(predict, alone), folder)
        loop = clock() - start
        share, speeds = sum(seconds) / wall, (len(paths) / wall, len(paths) / max(loop, 1e-9))
        print(f"{len(paths)} photographs, {precision}: network {share:.0%} of the time; ", end="")
        print(f"{speeds[0]:.2f} a second, plain loop {speeds[1]:.2f}; ", end="")
        own = max(sum(alone), 1e-9)  # one photograph at a time, and nothing beside it
        print(f"{wall / own:.2f} and {loop / own:.2f} of the network's own time", flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"resident memory: {before:.0f} MB before coloring, {peak:.0f} MB at the peak")


if __name__ == "__main__":
    main()
