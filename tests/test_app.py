"""`app.py`: the page in a real browser, and what visitors at once are given."""

import importlib.util
import io
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image
from visitor import Visitor

import app
from colorizer import Colorizer

ROOT = Path(__file__).resolve().parent.parent
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# Reports every host that the page's process connects to, or asks the address of.
WATCHED = """if True:
    import runpy, sys
    def watch(event, arguments):
        if event in ("socket.connect", "socket.getaddrinfo"):
            host = arguments[event == "socket.connect"]
            print("calls", host[0] if isinstance(host, tuple) else host, file=sys.stderr, flush=True)
    sys.addaudithook(watch)
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
"""

needs_gradio = pytest.mark.skipif(app.gr is None, reason="Gradio is not installed: requirements-app.txt")


@pytest.fixture(scope="module")
def page(trained, tmp_path_factory):
    """The page's address, while it is served."""
    if app.gr is None:
        pytest.skip("Gradio is not installed: requirements-app.txt")
    folder = tmp_path_factory.mktemp("page")
    (folder / "tmp").mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", WATCHED, "app.py", "--port", port, "--load_model", trained]
    command += ["--model_path", folder]
    with open(folder / "log", "w") as log:
        environment = {**os.environ, "TMPDIR": str(folder / "tmp")}
        server = subprocess.Popen(
            map(str, command), cwd=ROOT, stdout=subprocess.PIPE, stderr=log, text=True, env=environment
        )
    address = server.stdout.readline().split(": ")[0]
    assert address == f"http://127.0.0.1:{port}", (folder / "log").read_text()
    yield address
    server.terminate()
    assert server.wait(timeout=30) == 128 + signal.SIGTERM
    assert set(re.findall("^calls (.*)", (folder / "log").read_text(), re.M)) == {"127.0.0.1"}  # to see that it is up
    assert not [path for path in (folder / "tmp").rglob("*") if path.is_file()]  # uploaded or shown


def until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.slow
def test_in_a_browser(page, trained, photographs, tmp_path):
    if importlib.util.find_spec("playwright") is None or BROWSER is None:
        pytest.skip("no browser here: pip install playwright, and Debian's package chromium")
    from playwright.sync_api import sync_playwright

    flags = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=flags.split())
        tab = browser.new_page()
        requested = []
        tab.on("request", lambda request: requested.append(request.url))
        tab.goto(page)
        field = tab.locator("#photograph input[type=file]")

        def pictures():
            """What lies at both sides of the line: gray and colored."""
            addresses = tab.eval_on_selector_all("#picture img", "all => all.map(image => image.src)")
            return {tab.request.get(address).body() for address in addresses}

        # A photograph is dropped: it shows in gray, then in color
        field.set_input_files(photographs / "coffee.png", timeout=60_000)
        until(lambda: len(pictures()) == 2)

        # The temperature is moved: other colors, and the download has them
        before = pictures()
        tab.locator("#temperature input[type=range]").fill("0.1")
        until(lambda: len(pictures() - before) == 1)
        with tab.expect_download() as download:
            tab.locator("#save").click()
        assert download.value.suggested_filename == "coffee_colored.png"
        colored = Colorizer(trained)(photographs / "coffee.png", temperature=0.1)
        assert np.array_equal(Image.open(download.value.path()), colored)

        # A text file gets a sentence, and the photograph stays
        (tmp_path / "text.jpg").write_text("no photograph")
        before = pictures()
        field.set_input_files(tmp_path / "text.jpg")
        tab.get_by_text("text.jpg cannot be read as a photograph: not an image").wait_for()
        assert pictures() == before

        # One of the examples
        tab.locator("#examples button").first.click()
        until(lambda: len(pictures() - before) == 2)
        browser.close()
    assert requested and all(url.startswith((page, "blob:", "data:")) for url in requested)


@pytest.mark.slow
def test_visitors_at_once_get_their_own_photographs(page, trained, photographs, tmp_path):
    """With what their camera wrote into them."""
    paths = [tmp_path / f"{path.stem}.jpg" for path in sorted(photographs.iterdir())]
    for path in paths:
        exif = Image.Exif()
        exif[ExifTags.Base.Artist] = path.stem
        Image.open(photographs / f"{path.stem}.png").save(path, exif=exif)
    colorize = Colorizer(trained)

    def visit(path):
        visitor = Visitor(page)
        assert len(set(visitor.take(path.name, path.read_bytes()))) == 1  # gray on both sides, at once
        assert len(set(visitor.color())) == 2
        return visitor.download(0.2)

    with ThreadPoolExecutor(len(paths)) as pool:
        for path, data in zip(paths, pool.map(visit, paths)):
            downloaded = Image.open(io.BytesIO(data))
            assert downloaded.getexif()[ExifTags.Base.Artist] == path.stem
            assert np.array_equal(downloaded, colorize(path, temperature=0.2))


@pytest.mark.slow
def test_what_is_no_photograph_too_large_or_forgotten(page):
    visitor = Visitor(page)
    assert visitor.take("text.jpg", b"no photograph") is None
    with pytest.raises(OSError, match="413"):
        visitor.take("large.jpg", bytes(app.MAX_MEGABYTES * 2**20 + 1))
    file = io.BytesIO()
    Image.new("L", (10_000, 5_001)).save(file, "PNG")
    assert visitor.take("large.png", file.getvalue()) is None
    with pytest.raises(RuntimeError, match="no photograph here"):
        visitor.download()


@needs_gradio
def test_mistakes_give_one_line(tmp_path, trained, stopped):
    def message(*flags):
        return stopped(app.main, app.parse_args(["--model_path", str(tmp_path), *map(str, flags)]))

    assert "no such checkpoint" in message("--load_model", "7")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert "cannot be served" in message("--load_model", trained, "--port", taken.getsockname()[1])


def test_without_gradio_a_line_says_how_to_get_it(stopped, monkeypatch):
    monkeypatch.setattr(app, "gr", None)
    assert "requirements-app.txt" in stopped(app.main, app.parse_args([]))
