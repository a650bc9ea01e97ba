"""Measure time and memory of listing as many files as ImageNet's training set has: empty ones, in 1,000 folders.

    python tests/benchmarks/bench_listing.py [--folder DIR]      creates the files in a temporary folder in DIR first

On a virtual machine with 2 cores and a local disk, busy with other work (listing took 1.7 s when idle):

    made 1280000 files in 40.8 s
    listed 1280000 files in 4.0 s; resident memory grew by 134 MB, at most by 144 MB
    in the dataset: 59 MB
"""

import argparse
import resource
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


from dataset import ColorizationDataset, list_images


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def main(args):
    with tempfile.TemporaryDirectory(dir=args.folder) as root:
        began = time.perf_counter()
        for i in range(1000):
            folder = Path(root) / f"n{i:08d}"
            folder.mkdir()
            for j in range(args.files // 1000):
                (folder / f"{folder.name}_{j}.JPEG").touch()
        print(f"made {args.files} files in {time.perf_counter() - began:.1f} s", flush=True)

        before, began = resident(), time.perf_counter()
        paths = list_images(root)
        seconds = time.perf_counter() - began
        memory = f"resident memory grew by {resident() - before:.0f} MB, at most by {peak() - before:.0f} MB"
        print(f"listed {len(paths)} files in {seconds:.1f} s; {memory}")

        dataset = ColorizationDataset(paths, 256, 176)
        print(f"in the dataset: {dataset.paths.nbytes / 1e6:.0f} MB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", help="folder for the files (default: the system's temporary folder)")
    parser.add_argument("--files", type=int, default=1_280_000)
    main(parser.parse_args())
