"""`app.py`: the page in a browser, several users simultaneously, corrections, the distribution at one place."""

import base64
import errno
import io
import itertools
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path

from support.cli import UserError
from support.images import InvalidImageError

import numpy as np
import paddle
import pytest
from conftest import ROOT
from page_client import PageClient
from PIL import ExifTags, Image

import app
from colorizer import Colorizer, Correction, colored
from dataset import lab_to_rgb
from utils import annealed_mean, load_ab_bins

needs_gradio = pytest.mark.skipif(app.gr is None, reason="Gradio is not installed: requirements-app.txt")
SETTINGS = (0.38, 1, 50, 50, 20)
BINS = load_ab_bins().numpy()


# -------------------------------------------------------------------------------------------------
# Errors, limits and addresses


@needs_gradio
@pytest.mark.parametrize(
    ("error", "message"),
    [
        (UserError("/tmp/abc/x.jpg: cannot be written: 1/2"), "^'x.jpg: cannot be written: 1/2'$"),
        (InvalidImageError("/tmp/abc/<b>.jpg", "not an image"), "^'&lt;b&gt;.jpg: not an image'$"),
        (MemoryError(), "MemoryError"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (ValueError("secret"), "ValueError"),
        (SystemExit(1), "SystemExit"),
        (KeyboardInterrupt(), "KeyboardInterrupt"),
        (GeneratorExit(), "GeneratorExit"),
    ],
)
def test_whatever_a_handler_raises_becomes_a_message_to_its_user(error, message):
    def handler():
        raise error

    with pytest.raises(app.gr.Error, match=message) as raised:
        app.guard(handler)()
    assert "secret" not in str(raised.value) and "/tmp" not in str(raised.value)


def test_numbers_are_moved_into_their_ranges():
    assert app.clamp([0, 7, -3, 250, None]) == (0.02, 2, 0, 100, 1)
    assert app.clamp(["0.5", 1, float("inf"), float("-inf"), float("nan")]) == (0.5, 1, 100, 0, 1)
    assert app.clamp(SETTINGS) == SETTINGS


@needs_gradio
def test_photos_of_too_many_pixels_are_refused_before_they_are_decoded(tmp_path):
    Image.new("1", (10_000, 5_001)).save(tmp_path / "large.png")
    with pytest.raises(InvalidImageError, match="10000x5001 pixels are more than 50 megapixels"):
        app.open_photo(threading.Lock(), tmp_path / "large.png")


@needs_gradio
@pytest.mark.parametrize(("size", "waits"), [((5_000, 3_000), True), ((100, 100), False)])
def test_large_photos_are_decoded_one_at_a_time_and_small_ones_do_not_wait(tmp_path, monkeypatch, size, waits):
    Image.new("1", size).save(tmp_path / "photo.png")
    large, locked = threading.Lock(), []

    def decode(image, name=None):
        locked.append(large.locked())
        return Image.new("RGB", (40, 40))

    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    monkeypatch.setattr(app, "to_rgb", decode)
    monkeypatch.setattr(app, "read_image", decode)
    photo, *_ = app.open_photo(large, tmp_path / "photo.png")
    photo.decode()
    assert locked == [waits, waits]


@needs_gradio
def test_upload_that_is_deleted_while_it_waits_for_its_turn_is_read(tmp_path, monkeypatch):
    Image.new("1", (5_000, 3_000)).save(tmp_path / "photo.png")

    @contextmanager
    def turn():
        (tmp_path / "photo.png").unlink()
        yield

    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    photo, *_ = app.open_photo(turn(), tmp_path / "photo.png")
    assert photo.preview.size == (1200, 720) and photo.corrections == []


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_addresses_of_this_machine_can_be_served(host):
    if ":" in host and not socket.has_ipv6:
        pytest.skip("no IPv6 here")
    with app.listen(host, 0) as listener:
        assert app.ip_address(listener.getsockname()[0]).is_loopback
        port = listener.getsockname()[1]
        with pytest.raises(UserError, match=f"--host {host} --port {port}: cannot be used: address already in use"):
            app.listen(host, port)


def test_unknown_host_is_reported(error_message):
    assert "--host 192.0.2.1 --port 7799: cannot be used" in error_message(app.listen, "192.0.2.1", 7799)


@needs_gradio
def test_taken_port_is_reported_before_weights_are_loaded(error_message):
    with app.listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        assert "in use" in error_message(app.main, app.parse_args(["--port", str(port), "--load_model", "missing"]))


@needs_gradio
def test_server_that_ends_by_itself_ends_the_program(monkeypatch, error_message):
    class Model:
        temperature = 0.38

    monkeypatch.setattr(app.uvicorn.Server, "run", lambda self, sockets: None)
    monkeypatch.setattr(app, "Colorizer", lambda name, model_path: Model())
    monkeypatch.setattr(app, "return_freed_memory", lambda: None)
    monkeypatch.setenv("GRADIO_TEMP_DIR", "restored afterwards")
    arguments = app.parse_args(["--load_model", "any", "--port", "7798"])
    assert error_message(app.main, arguments) == "the server has stopped unexpectedly"


def test_missing_gradio_is_reported():
    without = "import runpy, sys; sys.modules['gradio'] = None; runpy.run_path('app.py', run_name='__main__')"
    ended = subprocess.run([sys.executable, "-c", without], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 1 and ended.stderr.count("\n") == 1 and "requirements-app.txt" in ended.stderr


def test_old_uploads_and_pictures_are_deleted_except_for_the_icons(tmp_path):
    for name, age in (("interrupted", 61), ("growing", 1), ("picture/a.jpg", 61), ("new/a.jpg", 1), ("icon/a.jpg", 61)):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x")
        for changed in {path, tmp_path / name.split("/")[0]}:
            os.utime(changed, (time.time() - age,) * 2)
    app.delete_old_files(tmp_path, kept={tmp_path / "icon"})
    assert {path.name for path in tmp_path.iterdir()} == {"growing", "new", "icon"}


# -------------------------------------------------------------------------------------------------
# Corrections and the distribution at one place


@pytest.fixture
def photo(tmp_path, monkeypatch):
    """Return a photo of 120x80 pixels whose logits are 50 for one color at one place and equal everywhere else."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    logits = np.zeros((1, 313, 8, 12), np.float32)
    logits[0, np.all(BINS == (60, 40), axis=1), 2, 9] = 50
    gray = Image.new("RGB", (120, 80), "gray")
    return app.Photo("photo.png", b"", nullcontext(), gray, paddle.to_tensor(logits))


def color(ab):
    return lambda photo, settings: ab


@needs_gradio
def test_corrections_are_added_changed_and_removed(photo):
    first, second = Correction(0.5, 0.5, (60, 40), 0.2), Correction(0.1, 0.9, (0, 0), 0.3)
    app.correct(color((60, 40)), photo, *SETTINGS)
    app.correct(color((0, 0)), photo, 0.38, 1, 10, 90, 30)
    assert photo.corrections == [first, second]
    app.change_reach(photo, 0.38, 1, 50, 50, 70)  # of the last one, wherever the place is now
    assert photo.corrections == [first, second._replace(reach=0.7)]
    *_, reach = app.undo(photo, *SETTINGS)
    assert photo.corrections == [first] and reach == 20
    app.reset(photo, *SETTINGS)
    assert photo.corrections == []
    app.undo(photo, *SETTINGS)
    app.change_reach(photo, *SETTINGS)
    assert photo.corrections == []


@needs_gradio
def test_another_color_for_the_same_place_replaces_the_first(photo):
    for ab in ((60, 40), (0, 0), (-20, 30)):
        app.correct(color(ab), photo, *SETTINGS)
    assert photo.corrections == [Correction(0.5, 0.5, (-20, 30), 0.2)]


@needs_gradio
def test_number_of_corrections_is_limited(photo):
    photo.corrections = [Correction(i / 100, 0.5, (60, 40), 0.2) for i in range(app.MAX_CORRECTIONS)]
    with pytest.raises(UserError, match="20 corrections already"):
        app.correct(color((60, 40)), photo, 0.38, 1, 99, 50, 20)
    app.correct(color((0, 0)), photo, 0.38, 1, 3, 50, 20)  # another color for one of the places
    assert len(photo.corrections) == app.MAX_CORRECTIONS


@needs_gradio
def test_pictures_have_the_corrections_and_the_strength(photo):
    app.correct(color((60, 40)), photo, 0.38, 1, 20, 30, 10)
    pictures, *_ = app.draw(photo, 1, 0.5, 80, 80, 10)
    ab = annealed_mean(photo.output, load_ab_bins(), 1)[0]
    expected = colored(photo.preview, ab, [Correction(0.2, 0.3, (60, 40), 0.1)], 0.5)
    assert np.abs(np.int16(Image.open(pictures[1])) - expected).mean() < 2
    assert np.ptp(np.asarray(Image.open(pictures[0])).reshape(-1, 3), axis=0).max() <= 2  # gray


def test_likely_colors_differ_and_begin_with_the_most_likely():
    logits = -np.hypot(*(BINS - (20, 30)).T)
    chosen = BINS[app.likely_bins(paddle.to_tensor(logits.reshape([1, 313, 1, 1])))]
    assert tuple(chosen[0]) == (20, 30) and len(chosen) == 3
    assert all(np.hypot(*(a - b)) >= 20 for a, b in itertools.combinations(chosen, 2))


def test_click_on_a_square_of_the_chart_chooses_its_color(photo, tmp_path):
    """The squares are found in the picture by their colors, not computed."""
    colors = np.stack([np.arange(313) % 200, np.arange(313) // 200 * 100, np.full(313, 250)], axis=1).astype(np.uint8)
    chart = np.asarray(Image.open(app.draw_chart(np.ones(313), colors, (0, 0))).convert("RGB"))
    assert chart.shape == (app.CHART, app.CHART, 3)
    for index in (0, 57, 150, 290, 312):
        rows, columns = np.nonzero((chart == colors[index]).all(axis=-1))
        assert len(rows) > 50
        for row, column in ((rows.min(), columns.min()), (rows.max(), columns.max())):
            assert tuple(app.color_in_chart(column, row)) == tuple(BINS[index])


@needs_gradio
def test_distribution_is_that_of_the_chosen_place(photo):
    def look(across, down):
        chart, text, *buttons = app.distribution(photo, app.clamp((1, 1, across, down, 20)))
        return np.int16(Image.open(chart).convert("RGB")), text, buttons

    chart, text, buttons = look(100 * 9.5 / 12, 100 * 2.5 / 8)
    assert "the predicted color is a = 60, b = 40." in text
    red = 255 * lab_to_rgb(paddle.to_tensor([53.6, 60, 40]).reshape([1, 3, 1, 1])).flatten().numpy()
    assert (np.abs(chart - red).max(axis=-1) < 4).sum() > 50  # pixels of the square
    assert buttons[0].value == "a 60, b 40 (100%)" and len(buttons) == 3
    for place in ((100 * 8.5 / 12, 100 * 2.5 / 8), (100, 100), (0, 0)):
        _, text, _ = look(*place)
        mean = BINS.mean(axis=0)
        assert f"the predicted color is a = {round(mean[0])}, b = {round(mean[1])}." in text


@needs_gradio
def test_network_that_predicts_ab_shows_one_color_and_can_be_corrected(photo):
    photo.output = paddle.full([1, 2, 8, 12], 12.4)
    pictures, _, chart, text, *buttons = app.draw(photo, *SETTINGS)
    assert "the predicted color is a = 12, b = 12. This network predicts one color instead of a distribution." in text
    assert Path(chart).is_file() and [button.visible for button in buttons] == [False] * 3
    expected = colored(photo.preview, photo.output[0])
    assert np.abs(np.int16(Image.open(pictures[1])) - expected).mean() < 2
    pictures = app.correct(color((0, 0)), photo, 0.38, 1, 50, 50, 100)[1]
    assert np.abs(np.int16(Image.open(pictures[1])) - photo.preview).mean() < 2


# -------------------------------------------------------------------------------------------------
# The page, served by a process of its own

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# Reports every host that the server connects to or looks up; the model named exit ends the program.
SERVER = """if True:
    import sys
    def watch(event, arguments):
        if event in ("socket.connect", "socket.getaddrinfo"):
            host = arguments[event == "socket.connect"]
            print("calls", host[0] if isinstance(host, tuple) else host, file=sys.stderr, flush=True)
    sys.addaudithook(watch)
    import app
    def colorizer(name, model_path, original=app.Colorizer):
        return sys.exit() if name == "exit" else original(name, model_path=model_path)
    app.Colorizer = colorizer
    sys.exit(app.run_script(app.main, app.parse_args))
"""


@contextmanager
def served(folder, checkpoint, *flags):
    """Serve the page in a process of its own and yield its address. The log and temporary files lie in `folder`."""
    (folder / "tmp").mkdir()
    with app.listen("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-c", SERVER, "--port", port, "--load_model", checkpoint, "--model_path", folder, *flags]
    with open(folder / "log", "w") as log:
        settings = {"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": log, "text": True}
        environment = {**os.environ, "TMPDIR": str(folder / "tmp")}
        server = subprocess.Popen([*map(str, command)], env=environment, **settings)
    try:
        address = server.stdout.readline().split(": ")[0]
        assert address.endswith(f":{port}"), (folder / "log").read_text()
        yield address
    finally:
        server.terminate()
        assert server.wait(timeout=30) == 128 + signal.SIGTERM
        assert not [path for path in (folder / "tmp").rglob("*") if path.is_file()]


@pytest.fixture(scope="module")
def page(cic_checkpoint, tmp_path_factory):
    """Serve the page with a model that ends the program, and return its address."""
    if app.gr is None:
        pytest.skip("Gradio is not installed: requirements-app.txt")
    folder = tmp_path_factory.mktemp("page")
    (folder / "epoch_exit_model.pdparams").touch()
    with served(folder, cic_checkpoint) as address:
        yield address
    assert set(re.findall("^calls (.*)", (folder / "log").read_text(), re.M)) <= {"127.0.0.1"}


def until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def png(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@pytest.mark.slow
def test_errors_reach_only_their_user(page):
    client, other = PageClient(page), PageClient(page)
    client.take("photo.png", png(Image.new("RGB", (64, 64))))
    client.weights, fine = "exit", client.weights
    with pytest.raises(RuntimeError, match="SystemExit"):
        client.color()
    other.take("photo.png", png(Image.new("RGB", (64, 64))))
    assert len(set(other.color())) == 2
    client.weights = fine
    assert len(set(client.color())) == 2


@pytest.mark.slow
def test_photos_that_cannot_be_read_or_written_give_their_users_a_message(page):
    client = PageClient(page)
    with pytest.raises(RuntimeError, match="^text.jpg: not an image"):
        client.take("text.jpg", b"not a photo")
    with pytest.raises(RuntimeError, match="no photo to work on"):
        client.download()
    client.take("wide.png", png(Image.new("L", (70_000, 40))))
    client.color()
    with pytest.raises(RuntimeError, match="^wide_colorized.jpg: "):
        client.download("JPEG")
    assert Image.open(io.BytesIO(client.download("PNG"))).size == (70_000, 40)


@needs_gradio
@pytest.mark.slow
@pytest.mark.parametrize(("host", "address", "limited"), [("::1", r"\[::1\]", False), ("::", "localhost", True)])
def test_other_addresses_are_served_and_uploads_are_limited_unless_only_this_machine_can_send_them(
    cic_checkpoint, tmp_path, host, address, limited
):
    if not socket.has_ipv6:
        pytest.skip("no IPv6 here")
    with served(tmp_path, cic_checkpoint, "--host", host) as served_at:
        assert re.fullmatch(rf"http://{address}:\d+", served_at)
        error, message = (OSError, "413") if limited else (RuntimeError, "large.jpg: not an image")
        with pytest.raises(error, match=message):
            PageClient(served_at).take("large.jpg", bytes(app.MAX_MEGABYTES * 2**20 + 1))


@pytest.mark.slow
def test_uploads_from_pages_of_other_sites_are_refused(page):
    photo = png(Image.new("RGB", (64, 64)))
    assert PageClient(page).take("photo.png", photo, Origin=page)
    for origin in ("http://other.example", "null", page.replace("http:", "http://127.0.0.1.other.example")):
        with pytest.raises(OSError, match="403"):
            PageClient(page).take("photo.png", photo, Origin=origin)


@pytest.mark.slow
def test_simultaneous_users_get_their_own_photos_corrections_and_metadata(page, cic_checkpoint, image_folder, tmp_path):
    paths = [tmp_path / f"{path.stem}.jpg" for path in sorted(image_folder.iterdir())]
    for path in paths:
        exif = Image.Exif()
        exif[ExifTags.Base.Artist] = path.stem
        Image.open(image_folder / f"{path.stem}.png").save(path, exif=exif)
    colorize = Colorizer(cic_checkpoint)

    def visit(path):
        across = 10 + 20 * paths.index(path)
        client = PageClient(page)
        assert len(set(client.take(path.name, path.read_bytes()))) == 1  # all gray, before the network runs
        assert len(set(client.color())) == 2
        client.change("Gray", "click", across=across, reach=15)
        return client.download(temperature=0.2, saturation=1.2), [(across / 100, 0.5, (0, 0), 0.15)]

    with ThreadPoolExecutor(len(paths)) as pool:
        for path, (data, corrections) in zip(paths, pool.map(visit, paths)):
            downloaded = Image.open(io.BytesIO(data))
            expected = colorize(path, temperature=0.2, corrections=corrections, saturation=1.2)
            assert downloaded.getexif()[ExifTags.Base.Artist] == path.stem
            assert np.abs(np.int16(downloaded) - expected).max() <= 1


# Returns whether the page handles the event; otherwise, the browser would leave the page and open the photo.
DROP = """async ([target, kind, names]) => {
    const data = new DataTransfer();
    if (!names.length) data.items.add(new File([], "none"));
    for (const [name, url] of names) data.items.add(new File([await (await fetch(url)).blob()], name));
    const event = new DragEvent(kind, { dataTransfer: data, bubbles: true, cancelable: true });
    document.querySelector(target).dispatchEvent(event);
    return event.defaultPrevented;
}"""


@pytest.fixture
def browser():
    """Return a function that opens a page in a browser."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="no browser here: pip install playwright")
    if BROWSER is None:
        pytest.skip("no browser here: Debian's package is chromium")
    flags = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=BROWSER, args=flags.split())

        def visit(address, width, height):
            tab = chromium.new_page(viewport={"width": width, "height": height})
            tab.set_default_timeout(60_000)
            tab.requested = []
            tab.on("request", lambda request: tab.requested.append(request.url))
            tab.goto(address)
            tab.locator("#photo input[type=file]").wait_for(state="attached")
            until(lambda: tab.evaluate(DROP, ["h1", "dragover", []]))  # the page's script has run
            return tab

        yield visit
        chromium.close()


def pictures(tab):
    """Return the files on both sides of the divider, gray and colorized; one if they are equal."""
    addresses = tab.eval_on_selector_all("#picture img", "all => all.map(image => image.src)")
    return {urllib.request.urlopen(address).read() for address in addresses}


def colorized(tab):
    address = tab.locator("#picture img").last.get_attribute("src")
    return np.int16(Image.open(io.BytesIO(urllib.request.urlopen(address).read())))


def difference(tab, image, where=...):
    """Return the mean difference between the colorized picture and an image of its size, in levels."""
    return np.abs(colorized(tab) - image)[where].mean()


def changes(tab, action, least=0):
    """Wait until an action has changed the pixels of the colorized picture; its file may change for other reasons."""
    before = colorized(tab)
    action()
    until(lambda: difference(tab, before) > least)


def save(tab, name):
    with tab.expect_download() as download:
        tab.get_by_role("button", name=f"Save as {name}").click()
    return download.value


def click(tab, picture, across, down):
    """Click a place of a picture, in shares of its sides."""
    tab.locator(f"{picture} img").scroll_into_view_if_needed()
    box = tab.locator(f"{picture} img").bounding_box()
    tab.locator(f"{picture} img").click(position={"x": box["width"] * across, "y": box["height"] * down})


def inspected(tab, text):
    return text in tab.locator("#distribution").inner_text()


@pytest.mark.slow
def test_page_works_in_a_browser(page, browser, cic_checkpoint, image_folder, tmp_path):
    tab = browser(page, 390, 844)
    field = tab.locator("#photo input[type=file]")

    def style(selector, pseudo, name):
        return tab.locator(selector).first.evaluate(f"e => getComputedStyle(e, '{pseudo}').{name}")

    # A photo is uploaded: it shows in gray, then in color
    field.set_input_files(image_folder / "coffee.png")
    until(lambda: len(pictures(tab)) == 2)
    assert style("#picture [data-testid=status-tracker]", "", "backgroundColor") == "rgba(0, 0, 0, 0)"
    until(lambda: style("#picture .content", "::after", "content") == '"Colorized"')
    assert style("#picture .content", "::before", "content") == '"Gray"'
    for name in ("Save as PNG", "Save as JPEG"):  # on the first screen of a phone
        until(lambda: tab.get_by_role("button", name=name).evaluate("e => e.getBoundingClientRect().bottom") <= 844)  # noqa: B023
    until(lambda: tab.evaluate("document.documentElement.scrollWidth") <= 390)

    # Another temperature gives other colors, in the downloads, too
    changes(tab, lambda: tab.get_by_role("slider", name="Variety of colors").fill("0.1"))
    expected = np.int16(Colorizer(cic_checkpoint)(image_folder / "coffee.png", temperature=0.1))
    for name, suffix, tolerance in (("PNG", "png", 1), ("JPEG", "jpg", 60)):
        download = save(tab, name)
        assert download.suggested_filename == f"coffee_colorized.{suffix}"
        assert np.abs(expected - Image.open(download.path())).max() <= tolerance

    # A place is clicked, then entered
    until(lambda: inspected(tab, "At 50% from the left and 50% from the top"))
    click(tab, "#place", 0.25, 0.1)
    until(lambda: tab.get_by_label("From top (%)").input_value()[:2] in ("9", "10", "9.", "10."))
    until(lambda: inspected(tab, f"At {tab.get_by_label('From left (%)').input_value()}% from the left"))
    tab.get_by_label("From left (%)").fill("80")
    until(lambda: inspected(tab, "At 80% from the left"))

    # The divider follows its slider
    tab.get_by_role("slider", name="Share in gray").fill("100")
    until(lambda: "100%" in tab.locator("#picture img").last.get_attribute("style"))

    # A text file gives one message; the photo stays, and the field is empty again
    (tmp_path / "text.jpg").write_text("not a photo")
    before = pictures(tab)
    field.set_input_files(tmp_path / "text.jpg")
    tab.get_by_text("text.jpg: not an image").wait_for()
    assert pictures(tab) == before
    field.wait_for(state="attached")

    # One of the examples
    tab.get_by_role("button", name="Rocket").click()
    until(lambda: len(pictures(tab) - before) == 2)
    assert tab.requested and all(url.startswith((page, "blob:", "data:")) for url in tab.requested)


@pytest.mark.slow
@pytest.mark.parametrize(("width", "height"), [(1366, 768), (390, 844)])
def test_colors_are_corrected_in_a_browser(page, browser, width, height):
    tab = browser(page, width, height)
    tab.get_by_role("button", name="Astronaut").click()
    until(lambda: len(pictures(tab)) == 2)
    before = colorized(tab)

    click(tab, "#place", 0.26, 0.8)
    until(lambda: inspected(tab, "and 80% from the top") or inspected(tab, "and 79.9% from the top"))
    changes(tab, lambda: click(tab, "#chart", 0.75, 0.25))  # an orange
    changes(tab, lambda: tab.get_by_role("slider", name="Reach").fill("60"))
    until(lambda: difference(tab, before, np.s_[400:420, 100:150]) > 30)  # the suit
    assert difference(tab, before, np.s_[:50]) < 3  # the background

    changes(tab, lambda: tab.get_by_role("slider", name="Variety of colors").fill("0.7"))
    saved = np.int16(Image.open(save(tab, "PNG").path()))
    until(lambda: difference(tab, saved) < 2)

    changes(tab, lambda: tab.get_by_role("slider", name="Strength").fill("0"))
    until(lambda: np.ptp(colorized(tab), axis=-1).mean() < 2)
    changes(tab, lambda: tab.get_by_role("slider", name="Strength").fill("1"))
    changes(tab, lambda: tab.get_by_role("slider", name="Variety of colors").fill("0.38"))
    changes(tab, lambda: tab.get_by_role("button", name="Undo").click())
    until(lambda: difference(tab, before) < 0.1)


def focused(tab):
    return tab.evaluate("(e => e.ariaLabel || e.innerText || e.type || e.tagName)(document.activeElement)")


def tab_to(tab, name):
    """Press the tab key until a control has the focus. Return the names of all controls on the way."""
    names = []
    while not names or name not in names[-1]:
        tab.keyboard.press("Tab")
        names.append(focused(tab))
        outline = tab.evaluate("(e => getComputedStyle(e).outlineWidth)(document.activeElement)")
        assert outline == "3px" or names[-1] == "BODY", names
        assert len(names) < 40, names
    return names


@pytest.mark.slow
@pytest.mark.parametrize(("width", "height"), [(1366, 768), (390, 844)])
def test_page_can_be_used_by_keyboard_alone(page, browser, width, height):
    tab = browser(page, width, height)
    tab.on("filechooser", lambda chooser: chooser.set_files(app.EXAMPLE_FOLDER / "coffee.png"))
    tab_to(tab, "Click to upload")
    tab.keyboard.press("Enter")
    until(lambda: len(pictures(tab)) == 2)
    until(lambda: "Click to upload" in focused(tab))  # the focus is kept
    until(lambda: inspected(tab, "At 50%"))

    def press(key, least=0):
        changes(tab, lambda: tab.keyboard.press(key), least)

    tab_to(tab, "range slider for Variety of colors")
    press("ArrowRight")
    tab_to(tab, "range slider for Strength")
    press("ArrowRight")
    tab_to(tab, "Save as PNG")
    with tab.expect_download() as download:
        tab.keyboard.press("Enter")
    saved = np.int16(Image.open(download.value.path()))
    until(lambda: difference(tab, saved) < 3)  # the picture's JPEG makes 2
    tab_to(tab, "From left")
    tab.keyboard.type("30")
    until(lambda: inspected(tab, "At 30%"))
    tab_to(tab, "a ")  # the most likely colors
    press("Enter")
    tab_to(tab, "Gray")
    press("Enter")
    tab_to(tab, "range slider for Reach")
    press("ArrowRight")
    tab_to(tab, "Undo")
    press("Enter", least=0.1)
    tab_to(tab, "Reset")


@pytest.mark.slow
def test_nothing_is_said_while_there_is_no_photo(page, browser):
    tab = browser(page, 1366, 768)
    for _ in range(20):
        tab.keyboard.press("Tab")
    time.sleep(1)
    assert tab.locator(".toast-body").count() == 0


@pytest.mark.slow
def test_typed_numbers_are_moved_into_their_ranges(page, browser):
    tab = browser(page, 1366, 768)
    tab.get_by_role("button", name="Coffee").click()
    until(lambda: inspected(tab, "At 50%"))
    for name, typed, valid in (("Variety of colors", "0", "0.02"), ("Strength", "7", "2"), ("Reach", "-3", "1")):
        field = tab.locator(f"input[type=number][aria-label*='{name}']")
        field.fill(typed)
        field.press("Tab")
        until(lambda: field.input_value() == valid)  # noqa: B023
    tab.get_by_label("From left (%)").fill("250")
    tab.get_by_label("From left (%)").press("Tab")
    until(lambda: tab.get_by_label("From left (%)").input_value() == "100")
    until(lambda: inspected(tab, "At 100% from the left"))
    assert tab.locator(".toast-body").count() == 0


@pytest.mark.slow
def test_photos_are_dropped_anywhere_and_of_two_the_first_is_taken(page, browser):
    tab = browser(page, 1366, 768)
    address = "data:image/png;base64,"
    red, blue = (address + base64.b64encode(png(Image.new("RGB", (64, 64), name))).decode() for name in ("red", "blue"))

    def drop(target, *photos):
        """Return the message about them. The page ignores drops while it uploads a photo."""
        assert tab.evaluate(DROP, [target, "drop", photos])
        return tab.locator("#message p").inner_text()

    assert drop("h1", ["red.png", red]) == ""
    until(lambda: tab.locator("#place img").count() == 1)
    until(lambda: "One photo is taken: blue.png" in drop("#place", ["blue.png", blue], ["red.png", red]))
    until(lambda: drop("#photo", ["red.png", red]) == "")


CONTRAST = """() => {
    const numbers = (color) => [...color.match(/[\\d.]+/g).map(Number), 1].slice(0, 4);
    const over = (top, under) => under.map((value, i) => top[i] * top[3] + value * (1 - top[3]));
    const linear = (c) => (c / 255 <= 0.04045 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4);
    const luminance = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
    const color = (e, name) => numbers(getComputedStyle(e)[name]);
    const behind = (e) => (e ? over(color(e, "backgroundColor"), behind(e.parentElement)) : [255, 255, 255]);
    const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), result = [];
    while (texts.nextNode()) {
        const e = texts.currentNode.parentElement, text = texts.currentNode.textContent.trim();
        if (!/\\w/.test(text) || !e.checkVisibility({ opacityProperty: true, visibilityProperty: true })) continue;
        const [one, two] = [over(color(e, "color"), behind(e)), behind(e)].map(luminance);
        result.push([(Math.max(one, two) + 0.05) / (Math.min(one, two) + 0.05), text]);
    }
    return result;
}"""


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_have_a_contrast_of_at_least_4_5(page, browser, scheme):
    tab = browser(page, 1366, 768)
    tab.emulate_media(color_scheme=scheme)
    tab.reload()
    tab.get_by_role("button", name="Coffee").click()
    until(lambda: inspected(tab, "At 50%"))
    until(lambda: all(ratio >= 4.5 for ratio, _ in tab.evaluate(CONTRAST)))  # the buttons fade
    assert len(tab.evaluate(CONTRAST)) > 40
