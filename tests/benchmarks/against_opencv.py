"""Compare the time per image with OpenCV's DNN module, which can run the same weights; both run alternately.

    pip install "opencv-python-headless<5"                        (for this benchmark alone)
    python tests/benchmarks/against_opencv.py [float32] [bf16] [--rounds 7]

Random weights are written as a Caffe file, which both OpenCV and `pretrained.py` read.
"""

import argparse
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from support.cpu import available_cores, use_all_cores
from support.inference import make_predictor

import numpy as np
import paddle
import skimage.data
from caffe_files import caffe_layers, flat_network, run_by_opencv, write_caffe
from PIL import Image

from colorizer import INPUT_SHAPE
from dataset import rgb_to_lightness
from pretrained import load_network
from utils import annealed_mean, load_ab_bins


def photograph(side):
    rgb = np.asarray(Image.fromarray(skimage.data.coffee()).resize((side, side)))
    return rgb_to_lightness(paddle.to_tensor(rgb.transpose(2, 0, 1)[None])) - 50


def seconds(run):
    run()  # untimed, to warm up after the pause
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main():
    import cv2

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("precisions", nargs="*", default=["float32", "bf16"], help="float32, bf16")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    use_all_cores()
    threads = available_cores()
    cv2.setNumThreads(threads)
    folder = Path(tempfile.mkdtemp())
    x = photograph(224)
    network = flat_network(x + 50)
    caffemodel = write_caffe(folder / "network.caffemodel", caffe_layers(network))
    theirs = run_by_opencv(caffemodel, network, 224, 224)
    expected = theirs(x.numpy())
    for precision in args.precisions:
        predictor, _ = make_predictor(partial(load_network, caffemodel), INPUT_SHAPE, precision)
        ab_bins = load_ab_bins()

        def predict(lightness, predictor=predictor, ab_bins=ab_bins):
            return annealed_mean(predictor(lightness), ab_bins)

        difference = np.abs(predict(x).numpy() - expected)
        ours_and_theirs = (partial(predict, x), partial(theirs, x.numpy()))
        times = [tuple(map(seconds, ours_and_theirs)) for _ in range(args.rounds)]
        ratios = [a / b for a, b in times]
        ours, opencvs = (statistics.median(t) for t in zip(*times))
        print(f"{precision:8s} 224x224, {threads} threads: Paddle {ours:.3f} s, OpenCV {opencvs:.3f} s, ", end="")
        print(f"ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}); ", end="")
        print(f"ab differs by {difference.mean():.4f} on average, {difference.max():.4f} at most", flush=True)


if __name__ == "__main__":
    main()
