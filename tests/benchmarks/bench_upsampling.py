"""Measure the error of ground-truth ab after downsampling to every 4th pixel and upsampling, by two placements.

    python tests/benchmarks/bench_upsampling.py --image_dir DIR

Each image is resized to a shorter side of 256 pixels. Positions are placed at the centers of 4x4 blocks or at their
pixels. Prints the mean ab error and the share of pixels within 5 units:

    200 images   blocks 3.47  80.1% within 5   pixels 2.54  86.2% within 5
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import support  # noqa: F401  before Paddle
from support.images import open_rgb

import numpy as np
import paddle
import paddle.nn.functional as F
from PIL import Image

from colorizer import network_size
from dataset import list_images, rgb_to_lab, targets
from utils import upsample_ab


def errors(path):
    """Return mean error and share within 5, for blocks and pixels: [2, 2]."""
    image = open_rgb(path)
    small = image.resize(network_size(*image.size, 256), Image.Resampling.BILINEAR)
    rgb = paddle.to_tensor(np.asarray(small).transpose(2, 0, 1)[None])
    ab, size = targets(rgb)[1], rgb.shape[2:]
    found = []
    for restored in (F.interpolate(ab, size=size, mode="bilinear"), upsample_ab(ab, *size)):
        distance = np.hypot(*(restored - rgb_to_lab(rgb)[:, 1:])[0].numpy())
        found.append((distance.mean(), (distance <= 5).mean()))
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--image_dir", required=True)
    paths = list_images(parser.parse_args().image_dir)
    blocks, pixels = np.mean([errors(path) for path in paths], axis=0)
    results = {"blocks": blocks, "pixels": pixels}
    columns = [f"{name} {error:.2f}  {share:.1%} within 5" for name, (error, share) in results.items()]
    print("   ".join([f"{len(paths)} images", *columns]))


if __name__ == "__main__":
    main()
