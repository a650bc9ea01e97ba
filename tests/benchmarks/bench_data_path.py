"""Measure preprocessing per training image on one thread, compared with decoding and resizing alone (the floor).

    python tests/benchmarks/bench_data_path.py --image_dir DIR [--images 200]

Then measure images per second with worker processes, as `train.py` uses them.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
from support.cpu import keep_freed_memory, use_all_cores
from support.neighbors import Lookup

import numpy as np
import paddle
from PIL import Image

from dataset import ColorizationDataset, list_images, rgb_to_lab, rgb_to_lightness, soft_encode, targets
from utils import load_ab_bins, load_prior, position_weight, rebalancing_weights

LOAD, CROP, BATCH = 256, 176, 40


def floor(paths):
    """Decode and resize the shorter side to 256, as any loader would do."""
    for path in paths:
        image = Image.open(path).convert("RGB")
        scale = LOAD / min(image.size)
        np.asarray(image.resize([round(side * scale) for side in image.size], Image.Resampling.BILINEAR))


def squares(dataset, indices):
    return [dataset[i][0] for i in indices]


def to_targets(batch, ab_bins, bin_weights, lookup):
    """Prepare a batch as a training step does before the network runs."""
    rgb = paddle.to_tensor(np.stack(batch))
    lightness, ab = targets(rgb)
    indices, weights = soft_encode(ab, ab_bins, lookup=lookup)
    return lightness - 50, weights, position_weight(indices, ab, bin_weights)


def parts(rgb, ab_bins, lookup):
    """Measure the seconds of the batch-wise parts."""
    ab = rgb_to_lab(rgb[:, :, ::4, ::4])[:, 1:]
    return {
        "lightness": seconds(lambda: rgb_to_lightness(rgb)),
        "ab at a quarter": seconds(lambda: rgb_to_lab(rgb[:, :, ::4, ::4])),
        "soft-encoding": seconds(lambda: soft_encode(ab, ab_bins, lookup=lookup)),
    }


def seconds(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def workers(paths, count):
    """Measure the images per second of a DataLoader."""
    dataset = ColorizationDataset(paths, LOAD, CROP, augment=True)
    loader = paddle.io.DataLoader(dataset, batch_size=BATCH, num_workers=count)
    return len(paths) / seconds(lambda: [None for _ in loader])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--image_dir", required=True)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    use_all_cores(1)
    keep_freed_memory()  # as train.py does
    paths = list_images(args.image_dir)[: args.images]
    dataset = ColorizationDataset(paths, LOAD, CROP, augment=True)
    ab_bins, bin_weights, size = load_ab_bins(), rebalancing_weights(load_prior()), min(BATCH, len(paths))
    lookup = Lookup(ab_bins, 5)
    to_targets(squares(dataset, range(size)), ab_bins, bin_weights, lookup)

    def full():
        for start in range(0, len(paths), BATCH):
            batch = squares(dataset, range(start, min(start + BATCH, len(paths))))
            to_targets(batch, ab_bins, bin_weights, lookup)

    rounds = [(seconds(lambda: floor(paths)), seconds(full)) for _ in range(args.rounds)]
    rgb = paddle.to_tensor(np.stack(squares(dataset, range(size))))
    for name in (measured := [parts(rgb, ab_bins, lookup) for _ in range(args.rounds)])[0]:
        print(f"{name}: {1000 * statistics.median(x[name] for x in measured) / size:.2f} ms per image")
    for name, times in zip(("floor: decode and resize", "all preprocessing"), zip(*rounds)):
        print(f"{name}: {1000 * statistics.median(times) / len(paths):.2f} ms per image")
    print(f"ratio: {statistics.median(b / a for a, b in rounds):.2f}")
    for count in (1, 2):
        print(f"{count} worker(s): {statistics.median(workers(paths, count) for _ in range(3)):.0f} images per second")


if __name__ == "__main__":
    main()
