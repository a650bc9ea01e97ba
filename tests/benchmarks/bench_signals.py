"""Stop short runs by SIGTERM and Ctrl-C at random moments; count correct exit codes and states that can be resumed.

    python tests/benchmarks/bench_signals.py [--signals 100] [--load 4]

--load is the number of processes that compute at the same time. Prints a line for each failure, and at the end

    100 signals: 100 ended with their exit code and a state that the next run resumed
"""

import argparse
import multiprocessing
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from support.checkpoints import load_checkpoint

from PIL import Image
from processes import steps_done, stopped_at_random
from skimage import data


def compute():
    while True:
        sum(range(10**6))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--signals", type=int, default=100)
    parser.add_argument("--load", type=int, default=4)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    for _ in range(args.load):
        multiprocessing.get_context("spawn").Process(target=compute, daemon=True).start()
    right = 0
    with tempfile.TemporaryDirectory() as folder:
        images = Path(folder) / "images"
        images.mkdir()
        for name in ("astronaut", "chelsea", "coffee", "rocket"):
            Image.fromarray(getattr(data, name)()).resize((64, 64)).save(images / f"{name}.png")
        run = Path(folder) / "run"
        for code, expected, said in stopped_at_random(run, images, args.signals, args.seed):
            step = load_checkpoint(run / "model" / "epoch_latest_state.pdopt")["progress"]["step"]
            if code == expected and step == steps_done(run) and "Traceback" not in said:
                right += 1
            else:
                print(f"code {code} instead of {expected}, saved at {step} of {steps_done(run)}: {said}", flush=True)
    print(f"{args.signals} signals: {right} ended with their exit code and a state that the next run resumed")


if __name__ == "__main__":
    main()
