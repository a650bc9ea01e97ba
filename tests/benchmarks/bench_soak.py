"""Sample resident memory (training process and workers) and open files during a long run of `train.py`.

    python tests/benchmarks/bench_soak.py --image_dir DIR [--steps 1200] [flags of train.py]

Prints a line every 100 steps. With --crop_size 32 --load_size 40 --batch_size 1 --num_workers 2 on 800 images (some
of the lines; a checkpoint is written every 500 steps; workers are forked again for each epoch, so in the second epoch
they share the memory of weights and Adam's moments with the training process):

    step   100  935 MB  workers 311 311 MB  14 open files
    step   400  955 MB  workers 311 311 MB  14 open files
    step   800  947 MB  workers 773 773 MB  20 open files
    step  1000  1182 MB  workers 773 773 MB  15 open files
    step  1200  948 MB  workers 773 773 MB  14 open files
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def resident(pid):
    """Return megabytes; 0 if the process has ended."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize() / 1e6
    except FileNotFoundError:
        return 0


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def steps_done(log):
    lines = log.read_text().split("\n")[:-1] if log.exists() else []
    return max((json.loads(line)["step"] for line in lines), default=0)


def main(args, others):
    with tempfile.TemporaryDirectory() as folder:
        where = ["--image_dir", args.image_dir, "--model_path", f"{folder}/model", "--log_path", f"{folder}/log"]
        length = ["--num_epochs", "1000000", "--save_freq", "1000000", "--max_steps", str(args.steps + 50)]
        command = [sys.executable, ROOT / "train.py", *where, *length, "--loss_step", "10", "--save_latest", "500"]
        process = subprocess.Popen([*command, *others], stdout=subprocess.DEVNULL)
        for step in range(100, args.steps + 1, 100):
            while steps_done(Path(folder, "log", "train.jsonl")) < step:
                if process.poll() is not None:
                    sys.exit(f"train.py ended with {process.returncode}")
                time.sleep(0.2)
            workers = " ".join(f"{resident(pid):.0f}" for pid in children(process.pid))
            files = len(os.listdir(f"/proc/{process.pid}/fd"))
            print(
                f"step {step:5d}  {resident(process.pid):.0f} MB  workers {workers} MB  {files} open files", flush=True
            )
        process.wait()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--image_dir", required=True)
    parser.add_argument("--steps", type=int, default=1200)
    main(*parser.parse_known_args())
