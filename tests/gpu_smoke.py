"""Comparisons for gpu_smoke.sh: print the compared values, and exit with 1 if they differ too much."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from support.logs import read_log  # `support` before Paddle

import numpy as np
import paddle
import skimage.data
from PIL import Image


def report(text):
    print(f"   {text}", file=sys.stderr, flush=True)


def machine(work):
    """Write the images and print the number of GPUs."""
    for name in ("originals", "images"):
        (Path(work) / name).mkdir()
    for name in ("astronaut", "coffee", "chelsea", "rocket"):
        path = Path(work) / "originals" / f"{name}.png"
        Image.fromarray(getattr(skimage.data, name)()).save(path)
        for i in range(10):
            os.link(path, Path(work) / "images" / f"{name}{i}.png")
    gpus = paddle.device.cuda.device_count() if paddle.get_device().startswith("gpu") else 0
    kinds = [".".join(map(str, paddle.device.cuda.get_device_capability(i))) for i in range(gpus)]
    report(f"Paddle {paddle.__version__} on {paddle.get_device()}, CUDA {paddle.version.cuda()}; capabilities {kinds}")
    print(gpus)
    return True


def losses(run):
    return [line["loss"] for line in read_log(Path(run) / "train.jsonl")]


def falls(run):
    values = losses(run)
    report(f"loss {values[0]:.0f} in the first step, {np.mean(values[-4:]):.0f} over the last 4 of {len(values)}")
    return len(values) == 20 and np.mean(values[-4:]) < 0.9 * values[0]


def same(first, second, tolerance):
    pairs = list(zip(losses(first), losses(second)))[:4]
    worst = max(abs(a - b) / a for a, b in pairs)
    report(f"losses of {len(pairs)} steps differ by {worst:.2%} at most; {float(tolerance):.0%} would pass")
    return len(pairs) == 4 and worst < float(tolerance)


def pictures(first, second, tolerance):
    differences = [
        np.abs(np.asarray(Image.open(path)).astype(int) - np.asarray(Image.open(Path(second) / path.name))).mean()
        for path in Path(first).glob("*.png")
    ]
    report(f"{len(differences)} pictures differ by {max(differences):.3f} of 255 on average; {tolerance} would pass")
    return len(differences) == 4 and max(differences) < float(tolerance)


if __name__ == "__main__":
    check, *arguments = sys.argv[1:]
    if not {f.__name__: f for f in (machine, falls, same, pictures)}[check](*arguments):
        sys.exit(f"   FAILED: {check}")
