"""`app.py`: the page in a real browser, several users simultaneously, and the distribution at one place."""

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
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import paddle
import pytest
from conftest import ROOT
from page_client import PageClient
from PIL import ExifTags, Image

import app
from colorizer import Colorizer
from dataset import lab_to_rgb
from utils import load_ab_bins

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# Reports every host that the server connects to or looks up.
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
def page(cic_checkpoint, tmp_path_factory):
    """Serve the page and return its address."""
    if app.gr is None:
        pytest.skip("Gradio is not installed: requirements-app.txt")
    folder = tmp_path_factory.mktemp("page")
    (folder / "tmp").mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", WATCHED, "app.py", "--port", port, "--load_model", cic_checkpoint]
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
    assert set(re.findall("^calls (.*)", (folder / "log").read_text(), re.M)) == {
        "127.0.0.1"
    }  # Gradio requests its own page
    assert not [path for path in (folder / "tmp").rglob("*") if path.is_file()]


def until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.slow
def test_page_works_in_a_browser(page, cic_checkpoint, image_folder, tmp_path):
    if importlib.util.find_spec("playwright") is None or BROWSER is None:
        pytest.skip("no browser here: pip install playwright, and Debian's package chromium")
    from playwright.sync_api import sync_playwright

    flags = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=flags.split())
        tab = browser.new_page(viewport={"width": 390, "height": 844})
        tab.set_default_timeout(60_000)
        requested = []
        tab.on("request", lambda request: requested.append(request.url))
        tab.goto(page)
        field = tab.locator("#photo input[type=file]")

        def pictures():
            """Return the pictures on both sides of the divider, gray and colorized."""
            addresses = tab.eval_on_selector_all("#picture img", "all => all.map(image => image.src)")
            return {urllib.request.urlopen(address).read() for address in addresses}

        def style(selector, pseudo, name):
            return tab.locator(selector).first.evaluate(f"e => getComputedStyle(e, '{pseudo}').{name}")

        def inspected(text):
            return text in tab.locator("#distribution").inner_text()

        # A photo is uploaded: it shows in gray, then in color
        field.set_input_files(image_folder / "coffee.png")
        until(lambda: len(pictures()) == 2)
        assert style("#picture [data-testid=status-tracker]", "", "backgroundColor") == "rgba(0, 0, 0, 0)"
        until(lambda: style("#picture .content", "::after", "content") == '"Colorized"')
        assert style("#picture .content", "::before", "content") == '"Gray"'
        for name in ("Save as PNG", "Save as JPEG"):  # on the first screen of a phone
            box = tab.get_by_role("button", name=name).bounding_box()
            assert box["y"] + box["height"] <= 844
        assert tab.evaluate("document.documentElement.scrollWidth") <= 390

        # Another temperature gives other colors, in the downloads, too
        before = pictures()
        tab.get_by_role("slider", name="Temperature").fill("0.1")
        until(lambda: len(pictures() - before) == 1)
        colorized = np.int16(Colorizer(cic_checkpoint)(image_folder / "coffee.png", temperature=0.1))
        for name, suffix, tolerance in (("Save as PNG", "png", 1), ("Save as JPEG", "jpg", 60)):
            with tab.expect_download() as download:
                tab.get_by_role("button", name=name).click()
            assert download.value.suggested_filename == f"coffee_colorized.{suffix}"
            assert np.abs(colorized - Image.open(download.value.path())).max() <= tolerance

        # A place is clicked, then entered
        until(lambda: inspected("At 50% from the left and 50% from the top"))
        size = tab.locator("#place img").bounding_box()
        tab.locator("#place img").click(position={"x": size["width"] / 4, "y": size["height"] / 10})
        until(lambda: tab.get_by_label("From the top (%)").input_value()[:2] in ("9", "10", "9.", "10."))
        until(lambda: inspected(f"At {tab.get_by_label('From the left (%)').input_value()}% from the left"))
        tab.get_by_label("From the left (%)").fill("80")
        until(lambda: inspected("At 80% from the left"))

        # The divider follows its slider
        tab.get_by_role("slider", name="Share in gray").fill("100")
        until(lambda: "100%" in tab.locator("#picture img").last.get_attribute("style"))

        # A text file gives a message, and the photo stays
        (tmp_path / "text.jpg").write_text("not a photo")
        before = pictures()
        field.set_input_files(tmp_path / "text.jpg")
        tab.get_by_text("text.jpg cannot be read as a photo: not an image").wait_for()
        assert pictures() == before

        # One of the examples
        tab.get_by_role("button", name="Rocket").click()
        until(lambda: len(pictures() - before) == 2)
        browser.close()
    assert requested and all(url.startswith((page, "blob:", "data:")) for url in requested)


@pytest.mark.slow
def test_simultaneous_users_get_their_own_photos_and_metadata(page, cic_checkpoint, image_folder, tmp_path):
    paths = [tmp_path / f"{path.stem}.jpg" for path in sorted(image_folder.iterdir())]
    for path in paths:
        exif = Image.Exif()
        exif[ExifTags.Base.Artist] = path.stem
        Image.open(image_folder / f"{path.stem}.png").save(path, exif=exif)
    colorize = Colorizer(cic_checkpoint)

    def visit(path):
        client = PageClient(page)
        assert len(set(client.take(path.name, path.read_bytes()))) == 2  # both gray, before the network runs
        assert len(set(client.color())) == 2
        return client.download(0.2)

    with ThreadPoolExecutor(len(paths)) as pool:
        for path, data in zip(paths, pool.map(visit, paths)):
            downloaded = Image.open(io.BytesIO(data))
            assert downloaded.getexif()[ExifTags.Base.Artist] == path.stem
            assert np.abs(np.int16(downloaded) - colorize(path, temperature=0.2)).max() <= 1


@pytest.mark.slow
def test_invalid_large_and_missing_photos_are_rejected(page):
    client = PageClient(page)
    assert client.take("text.jpg", b"not a photo") is None
    with pytest.raises(OSError, match="413"):
        client.take("large.jpg", bytes(app.MAX_MEGABYTES * 2**20 + 1))
    file = io.BytesIO()
    Image.new("L", (10_000, 5_001)).save(file, "PNG")
    assert client.take("large.png", file.getvalue()) is None
    with pytest.raises(RuntimeError, match="no photo to work on"):
        client.download()


def test_distribution_is_that_of_the_chosen_place(tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    logits = np.zeros((1, 313, 8, 12), np.float32)
    bins = load_ab_bins().numpy()
    logits[0, np.all(bins == (60, 40), axis=1), 2, 9] = 50
    gray = Image.new("RGB", (120, 80), "gray")
    photo = app.Photo("photo.png", b"", gray, "small", paddle.to_tensor(logits))

    def look(across, down):
        place = gray.copy()
        chart, text = app.distribution(photo, place, 1, across, down)
        assert place != gray  # marked
        return np.int16(Image.open(chart).convert("RGB")), text

    chart, text = look(100 * 9.5 / 12, 100 * 2.5 / 8)
    assert "most likely color is a = 60, b = 40 (probability 100%). The annealed mean is a = 60, b = 40" in text
    red = 255 * lab_to_rgb(paddle.to_tensor([54.0, 60, 40]).reshape([1, 3, 1, 1])).flatten().numpy()
    assert (np.abs(chart - red).max(axis=-1) < 4).sum() > 50  # pixels of the square
    for place in ((100 * 8.5 / 12, 100 * 2.5 / 8), (100, 100), (0, 0)):
        chart, text = look(*place)
        mean = bins.mean(axis=0)
        assert f"The annealed mean is a = {round(mean[0])}, b = {round(mean[1])}" in text


def test_old_uploads_and_pictures_are_deleted_except_for_the_icons(tmp_path):
    for name, age in (("interrupted", 61), ("growing", 1), ("picture/a.jpg", 61), ("new/a.jpg", 1), ("icon/a.jpg", 61)):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x")
        for changed in {path, tmp_path / name.split("/")[0]}:
            os.utime(changed, (time.time() - age,) * 2)
    app.delete_old_files(tmp_path, kept={tmp_path / "icon"})
    assert {path.name for path in tmp_path.iterdir()} == {"growing", "new", "icon"}


@needs_gradio
def test_missing_checkpoint_is_reported(tmp_path, error_message):
    assert "no such checkpoint" in error_message(
        app.main, app.parse_args(["--model_path", str(tmp_path), "--load_model", "7", "--port", "7799"])
    )


@needs_gradio
def test_taken_port_is_reported_before_weights_are_loaded():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(OSError, match="in use"):  # which `run_script` prints on one line
            app.main(app.parse_args(["--port", str(taken.getsockname()[1]), "--load_model", "missing"]))


def test_importing_the_page_changes_no_settings_of_the_process():
    state = "dict(os.environ), logging.getLogger('httpx').level, signal.getsignal(2), threading.active_count()"
    code = "import logging, os, signal, threading, support.images, colorizer, matplotlib.figure\n"
    code += f"try: import gradio\nexcept ImportError: pass\nbefore = {state}; import app; assert before == ({state})"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GRADIO")}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True)


def test_missing_gradio_is_reported():
    without = "import runpy, sys; sys.modules['gradio'] = None; runpy.run_path('app.py', run_name='__main__')"
    ended = subprocess.run([sys.executable, "-c", without], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 1 and ended.stderr.count("\n") == 1 and "requirements-app.txt" in ended.stderr
