"""Measure metrics_auc.py, compared with reading the two images alone and with a loop over pixels.

    python tests/benchmarks/bench_auc.py --image_dir DIR

Writes the images with red and blue swapped as PNG into a temporary folder and measures alternately, in one process:
reading each pair; reading and comparing it; comparing one small pair pixel by pixel in Python, as earlier ports did.
Prints medians of several rounds in ms per megapixel, and their ratios. Then the whole script's peak memory for a set of
images and for the same set several times over.
"""

import argparse
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
from support.cpu import keep_freed_memory, use_all_cores  # noqa: E402
from support.folders import relative_path  # noqa: E402
from support.images import read_rgb  # noqa: E402

import metrics_auc  # noqa: E402
from dataset import list_images  # noqa: E402
from utils import load_ab_bins  # noqa: E402

REPEATS = 4
LOOP_SIDE = 64  # pixels; the loop is too slow for whole images


def make_pairs(image_dir, count, folder):
    pairs = []
    for path in list_images(image_dir)[:count]:
        colored = (folder / relative_path(path, image_dir)).with_suffix(".png")
        colored.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(read_rgb(path)[..., ::-1]).save(colored, compress_level=3)
        pairs.append((path, str(colored)))
    return pairs


def small_ab(path):
    return metrics_auc.to_lab(read_rgb(path)[:LOOP_SIDE, :LOOP_SIDE])[..., 1:].reshape(-1, 2)


def loop_over_pixels(true_ab, predicted_ab, bins, weights):
    """Count the pixels within each threshold by definition: [M, 2] twice."""
    within, weight_within = [0] * 151, [0.0] * 151
    for (a, b), (predicted_a, predicted_b) in zip(true_ab, predicted_ab):
        distance = math.sqrt((predicted_a - a) ** 2 + (predicted_b - b) ** 2)
        weight = weights[np.argmin((bins[:, 0] - a) ** 2 + (bins[:, 1] - b) ** 2)]
        for t in range(151):
            if distance <= t:
                within[t] += 1
                weight_within[t] += weight
    return within, weight_within


def seconds(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def peak_megabytes(pairs, times_over, folder):
    """Measure the script's peak memory without workers, on the pairs repeated `times_over` times."""
    folders = [folder / f"{kind}_{times_over}" for kind in ("true", "colored")]
    for i in range(times_over):
        for j, pair in enumerate(pairs):
            for target, path in zip(folders, pair):
                target.mkdir(exist_ok=True)
                (target / f"{i}_{j}{Path(path).suffix}").symlink_to(Path(path).resolve())
    script = [ROOT / "metrics_auc.py", "--image_dir", folders[0], "--result_path", folders[1], "--num_workers", "0"]
    code = (
        "import resource, subprocess, sys; subprocess.run(sys.argv[1:], capture_output=True, check=True); "
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    command = [sys.executable, "-c", code, sys.executable, *map(str, script), "--save_path", str(folder)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout) / 1024


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--image_dir", "--imgs_dir", required=True, help="folder of images")
    parser.add_argument("--count", type=int, default=200, help="number of images (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="number of rounds (default: %(default)s)")
    return parser.parse_args(argv)


def main(args):
    use_all_cores()
    keep_freed_memory()  # as the script does
    bins, weights = load_ab_bins().numpy(), np.ones(313)
    grid = metrics_auc.bins_on_grid(bins)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        pairs = make_pairs(args.image_dir, args.count, folder)
        megapixels = sum(read_rgb(true).size / 3e6 for true, _ in pairs)
        small = [small_ab(path) for path in pairs[0]]
        jobs = {
            "reading the two": (megapixels, lambda: [(read_rgb(true), read_rgb(colored)) for true, colored in pairs]),
            "reading and comparing": (megapixels, lambda: [metrics_auc.compare((None, *pair), grid) for pair in pairs]),
            "loop over pixels": (len(small[0]) / 1e6, lambda: loop_over_pixels(*small, bins, weights)),
        }
        times = {name: [] for name in jobs}
        for _ in range(args.rounds):  # alternately, so that the machine's load affects all alike
            for name, (size, job) in jobs.items():
                times[name].append(1000 * seconds(job) / size)
        for name, values in times.items():
            print(f"{name:22s} {np.median(values):10.1f} ms per megapixel ({min(values):.1f} to {max(values):.1f})")
        reading, both, loop = (np.array(values) for values in times.values())
        print(f"reading and comparing / reading: {np.median(both / reading):.2f}")
        print(f"loop / comparing alone:          {np.median(loop / (both - reading)):.0f}")
        for times_over in (1, REPEATS):
            print(
                f"peak memory: {peak_megabytes(pairs, times_over, folder):.0f} MB for {len(pairs)} pairs x {times_over}"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main(parse_args()))
