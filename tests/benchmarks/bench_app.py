"""Measure the page: times to the first result and to a changed one, memory over many uploads, simultaneous users.

    python tests/benchmarks/bench_app.py [--load_model NAME] [--uploads 200] [--users 20]

Photos are those of scikit-image, rotated, cropped and saved as JPEG of one megapixel, a different one per upload.
"""

import argparse
import io
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
from support.cpu import use_all_cores

import numpy as np
from PIL import Image
from skimage import data

from colorizer import Colorizer
from pretrained import default_name
from tests.page_client import PageClient

ROOT = Path(__file__).resolve().parent.parent.parent
PORT = 7899
ADDRESS = f"http://127.0.0.1:{PORT}"


def photograph(seed):
    random = np.random.default_rng(seed)
    image = Image.fromarray(getattr(data, random.choice(["astronaut", "coffee", "chelsea", "rocket"]))())
    image = image.rotate(random.uniform(-5, 5), Image.Resampling.BICUBIC)
    left, top, right, bottom = random.uniform((0.02, 0.02, 0.7, 0.7), (0.3, 0.3, 0.98, 0.98)) * (image.size * 2)
    image = image.crop([round(x) for x in (left, top, right, bottom)])
    scale = (1e6 / (image.width * image.height)) ** 0.5
    file = io.BytesIO()
    image.resize([round(side * scale) for side in image.size]).save(file, "JPEG", quality=90)
    return file.getvalue()


def resident(server):
    return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{server.pid}/status").read_text())[1]) / 1024


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model_path", default="./model")
    parser.add_argument("--load_model")
    parser.add_argument("--uploads", type=int, default=200)
    parser.add_argument("--users", type=int, default=20)
    args = parser.parse_args()
    use_all_cores()
    weights = args.load_model or default_name(Path(args.model_path))

    start = time.perf_counter()
    flags = ["--port", str(PORT), "--model_path", args.model_path, "--load_model", weights]
    server = subprocess.Popen([sys.executable, str(ROOT / "app.py"), *flags], stdout=subprocess.PIPE, text=True)
    try:
        server.stdout.readline()
        ready = time.perf_counter() - start
        client = PageClient(ADDRESS)
        client.take("first.jpg", photograph(0))
        client.color()
        print(f"start: page after {ready:.1f} s, first result after {time.perf_counter() - start:.1f} s")

        changes = {"temperature": ("Variety of colors", "input"), "correction": ("Gray", "click")}
        seconds = {name: [] for name in changes}
        for i in range(20):
            for name, event in changes.items():
                start = time.perf_counter()
                client.change(*event, temperature=0.2 + i / 50)  # at one place: there is one correction
                seconds[name].append(time.perf_counter() - start)
            client.change("Reset", "click")
        medians = {name: np.median(values) for name, values in seconds.items()}
        print(", ".join(f"{name} changed: {value:.2f} s" for name, value in medians.items()), flush=True)

        seconds = []
        for i in range(1, args.uploads + 1):
            mine = photograph(i)
            start = time.perf_counter()
            client = PageClient(ADDRESS)  # each user uploads one photo
            client.take(f"{i}.jpg", mine)
            client.color()
            seconds.append(time.perf_counter() - start)
            if i in (10, args.uploads) or i % 50 == 0:
                print(
                    f"{i} uploads: {resident(server):.0f} MB, median {np.median(seconds):.2f} s per upload", flush=True
                )

        colorize = Colorizer(weights, args.model_path)
        expected = [np.asarray(colorize(Image.open(io.BytesIO(photograph(i))))) for i in range(args.users)]

        photographs = [photograph(i) for i in range(args.users)]

        def visit(i):
            start, client = time.perf_counter(), PageClient(ADDRESS)
            client.take(f"{i}.jpg", photographs[i])
            gray = time.perf_counter() - start
            client.color()
            colored = time.perf_counter() - start
            client.change("Variety of colors", temperature=0.1)
            moved = time.perf_counter() - start - colored
            difference = np.int16(expected[i]) - Image.open(io.BytesIO(client.download()))
            mine = not difference.any()
            return gray, colored, moved, time.perf_counter() - start, mine

        with ThreadPoolExecutor(args.users) as pool:
            *times, mine = zip(*pool.map(visit, range(args.users)))
        for name, values in zip(("gray", "colorized", "temperature changed", "downloaded"), times):
            print(f"{args.users} simultaneous users, {name}: {min(values):.1f} to {max(values):.1f} s")
        print(f"{sum(mine)} of {args.users} got their own photo; {resident(server):.0f} MB")
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
