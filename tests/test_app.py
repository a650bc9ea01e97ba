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
from functools import partial
from types import SimpleNamespace
from unittest.mock import Mock

from support.cli import UserError
from support.images import InvalidImageError

import numpy as np
import paddle
import pytest
from conftest import ROOT, exif
from page_client import PageClient
from PIL import ExifTags, Image

import app
from colorizer import Colorizer, Correction, colored
from dataset import lab_to_rgb
from utils import annealed_mean, load_ab_bins

needs_gradio = pytest.mark.skipif(app.gr is None, reason="Gradio is not installed: requirements-app.txt")
SETTINGS = app.Settings(temperature=0.38, saturation=1, across=50, down=50, reach=20)
BINS = load_ab_bins().numpy()


# -------------------------------------------------------------------------------------------------
# Errors, limits and addresses


@needs_gradio
@pytest.mark.parametrize(
    ("error", "message"),
    [
        (UserError("/tmp/abc/x.jpg: cannot be written: 1/2"), "^'x.jpg: cannot be written: 1/2'$"),
        (InvalidImageError("/tmp/abc/<b>.jpg", "not an image"), "^'&lt;b&gt;.jpg: not an image'$"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (SystemExit("secret"), "SystemExit"),
    ],
)
def test_whatever_a_handler_raises_becomes_a_message_to_its_user(error, message):
    with pytest.raises(app.gr.Error, match=message) as raised:
        app.guard(Mock(side_effect=error))()
    assert "secret" not in str(raised.value) and "/tmp" not in str(raised.value)


def test_numbers_are_moved_into_their_ranges():
    controls = [SimpleNamespace(minimum=1, maximum=100)] * 5
    assert app.clamp([0, 700, None, "0.5", 1.5], controls) == (1, 100, 1, 1, 1.5)
    assert app.clamp([float("inf"), float("-inf"), float("nan"), 1, 100], controls) == (100, 1, 1, 1, 100)


def test_photos_of_too_many_pixels_are_refused_before_they_are_decoded(tmp_path):
    Image.new("1", (10_000, 5_001)).save(tmp_path / "large.png")
    with pytest.raises(InvalidImageError, match="10000x5001 pixels are more than 50 megapixels"):
        app.open_photo(threading.Lock(), tmp_path / "large.png")


def test_only_large_photos_wait_for_their_turn_in_which_their_upload_may_be_deleted(tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    monkeypatch.setattr(app, "LARGE", 0.01)
    path = tmp_path / "photo.png"

    class Turn:
        number = 0

        def __enter__(self):
            self.number += 1
            path.unlink(missing_ok=True)

        def __exit__(self, *error):
            pass

    for size, turns in (((120, 90), 2), ((90, 90), 0)):
        Image.new("L", size).save(path)
        photo, *_ = app.open_photo(turn := Turn(), path)
        assert photo.decode().size == photo.preview.size == size and turn.number == turns


def test_addresses_of_this_machine_can_be_served_unless_they_are_taken(error_message):
    for host in ("127.0.0.1", "localhost", "::1")[: 2 + socket.has_ipv6]:
        with app.listen(host, 0) as listener:
            address, port, *_ = listener.getsockname()
            assert app.ip_address(address).is_loopback
            taken = f"--host {host} --port {port}: cannot be used: address already in use"
            assert error_message(app.listen, host, port).startswith(taken)


@needs_gradio
def test_unusable_address_is_reported_before_weights_are_loaded(error_message):
    arguments = app.parse_args(["--host", "192.0.2.1", "--load_model", "missing"])
    assert "--host 192.0.2.1 --port 7860: cannot be used" in error_message(app.main, arguments)


@needs_gradio
def test_server_that_ends_by_itself_ends_the_program(monkeypatch, error_message):
    model = SimpleNamespace(temperature=0.38)
    monkeypatch.setattr(app.uvicorn.Server, "run", lambda self, sockets: None)
    monkeypatch.setattr(app, "Colorizer", lambda name, model_path: model)
    monkeypatch.setattr(app, "return_freed_memory", lambda: None)
    monkeypatch.setenv("GRADIO_TEMP_DIR", "restored afterwards")
    arguments = app.parse_args(["--load_model", "any", "--port", "7798"])
    assert error_message(app.main, arguments) == "the server has stopped unexpectedly"


def test_missing_gradio_is_reported(monkeypatch, error_message):
    monkeypatch.setattr(app, "gr", None)
    assert "requirements-app.txt" in error_message(app.main, app.parse_args([]))


def test_old_uploads_and_pictures_are_deleted(tmp_path):
    for name, age in (("interrupted", 61), ("growing", 1), ("picture/a.jpg", 61), ("new/a.jpg", 1)):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x")
        for changed in {path, tmp_path / name.split("/")[0]}:
            os.utime(changed, (time.time() - age,) * 2)
    app.delete_old_files(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"growing", "new"}


# -------------------------------------------------------------------------------------------------
# Corrections and the distribution at one place


@pytest.fixture
def photo(tmp_path, monkeypatch):
    """Return a photo of 120x80 pixels whose logits are 50 for one color at one place and equal everywhere else."""
    pytest.importorskip("gradio", reason="Gradio is not installed: requirements-app.txt")
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    logits = np.zeros((1, 313, 8, 12), np.float32)
    logits[0, np.all(BINS == (60, 40), axis=1), 2, 9] = 50
    gray = Image.new("RGB", (120, 80), "gray")
    return app.Photo("photo.png", b"", nullcontext(), gray, paddle.to_tensor(logits))


def correct(photo, ab, **settings):
    """Correct a color. Return the new drawings."""
    return app.correct(lambda *_: ab, photo, SETTINGS._replace(**settings), None)


def test_corrections_are_added_changed_and_removed(photo, monkeypatch):
    monkeypatch.setattr(app, "draw", lambda *_: ())
    first, second = Correction(0.5, 0.5, (60, 40), 0.2), Correction(0.1, 0.9, (0, 0), 0.3)
    correct(photo, (-20, 30), reach=10)
    correct(photo, (60, 40))  # replaces the color of the same place
    correct(photo, (0, 0), across=10, down=90, reach=30)
    assert photo.corrections == [first, second]
    app.change_reach(photo, SETTINGS._replace(reach=70), None)  # of the last one, wherever the place is now
    assert photo.corrections == [first, second._replace(reach=0.7)]
    *_, reach = app.remove(-1, photo, SETTINGS._replace(reach=70), None)
    assert photo.corrections == [first] and reach == 20
    correct(photo, (0, 0), across=10)
    for change in (partial(app.remove, 0), partial(app.remove, -1), app.change_reach):
        change(photo, SETTINGS, None)
        assert photo.corrections == []
    for across in range(app.MAX_CORRECTIONS):
        correct(photo, (0, 0), across=across)
    with pytest.raises(UserError, match="20 corrections already"):
        correct(photo, (60, 40), across=99)
    correct(photo, (60, 40), across=3)  # one of these places
    assert len(photo.corrections) == app.MAX_CORRECTIONS


def test_pictures_have_the_corrections_and_the_strength(photo):
    correct(photo, (60, 40), across=20, down=30, reach=10)
    pictures, *_ = app.draw(photo, app.Settings(1, 0.5, 80, 80, 10), None)
    ab = annealed_mean(photo.output, load_ab_bins(), 1)[0]
    expected = colored(photo.preview, ab, [Correction(0.2, 0.3, (60, 40), 0.1)], 0.5)
    assert np.abs(np.int16(Image.open(pictures[1])) - expected).mean() < 2
    assert np.ptp(np.asarray(Image.open(pictures[0])).reshape(-1, 3), axis=0).max() <= 2  # gray


def test_likely_colors_differ_and_begin_with_the_most_likely():
    logits = -np.hypot(*(BINS - (20, 30)).T)
    chosen = BINS[app.likely_bins(paddle.to_tensor(logits.reshape([1, 313, 1, 1])))]
    assert tuple(chosen[0]) == (20, 30) and len(chosen) == 3
    assert all(np.hypot(*(a - b)) >= 20 for a, b in itertools.combinations(chosen, 2))


def test_click_on_a_square_of_the_chart_chooses_its_color(photo):
    """The squares are found in the picture by their colors, not computed."""
    colors = np.stack([np.arange(313) % 200, np.arange(313) // 200 * 100, np.full(313, 250)], axis=1).astype(np.uint8)
    chart = np.asarray(Image.open(app.draw_chart(np.ones(313), colors, (0, 0))).convert("RGB"))
    for index in (0, 57, 150, 290, 312):
        rows, columns = np.nonzero((chart == colors[index]).all(axis=-1))
        assert len(rows) > 50
        for place in ((columns.min(), rows.min()), (columns.max(), rows.max())):
            color = app.clicked_color(photo, SETTINGS, SimpleNamespace(index=place))
            assert tuple(color) == tuple(BINS[index])


def test_distribution_is_that_of_the_chosen_place(photo):
    def look(across, down):
        return app.distribution(photo, SETTINGS._replace(temperature=1, across=across, down=down))

    chart, text, *buttons = look(100 * 9.5 / 12, 100 * 2.5 / 8)
    assert "the predicted color is a = 60, b = 40." in text
    red = 255 * lab_to_rgb(paddle.to_tensor([53.6, 60, 40]).reshape([1, 3, 1, 1])).flatten().numpy()
    differences = np.abs(np.int16(Image.open(chart).convert("RGB")) - red).max(axis=-1)
    assert (differences < 4).sum() > 50  # pixels of the square
    assert buttons[0].value == "a 60, b 40 (100%)" and len(buttons) == 3
    a, b = map(round, BINS.mean(axis=0).tolist())
    for place in ((100 * 8.5 / 12, 100 * 2.5 / 8), (100, 100), (0, 0)):
        assert f"the predicted color is a = {a}, b = {b}." in look(*place)[1]


def test_network_that_predicts_ab_shows_one_color(photo):
    photo.output = paddle.full([1, 2, 8, 12], 12.4)
    pictures, _, _, text, *buttons = app.draw(photo, SETTINGS, None)
    assert "the predicted color is a = 12, b = 12. This network predicts one color instead of a distribution." in text
    assert [button.visible for button in buttons] == [False] * 3
    assert np.abs(np.int16(Image.open(pictures[1])) - colored(photo.preview, photo.output[0])).mean() < 2


# -------------------------------------------------------------------------------------------------
# The page, served by a process of its own

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# Reports every host that the server connects to or looks up
SERVER = """if True:
    import sys
    def watch(event, arguments):
        if event in ("socket.connect", "socket.getaddrinfo"):
            host = arguments[event == "socket.connect"]
            print("calls", host[0] if isinstance(host, tuple) else host, file=sys.stderr, flush=True)
    sys.addaudithook(watch)
    import app
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
    """Serve the page and return its address. It may connect to this machine only."""
    if app.gr is None:
        pytest.skip("Gradio is not installed: requirements-app.txt")
    folder = tmp_path_factory.mktemp("page")
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
def test_photos_that_cannot_be_read_or_written_give_only_their_users_a_message(page):
    client, other = PageClient(page), PageClient(page)
    with pytest.raises(RuntimeError, match="no longer has your photo"):
        client.download()
    with pytest.raises(RuntimeError, match="^text.jpg: not an image"):
        client.take("text.jpg", b"not a photo")
    client.take("wide.png", png(Image.new("L", (70_000, 40))))
    with pytest.raises(KeyError):
        client.download()  # nothing happens until the network has run
    client.color()
    with pytest.raises(RuntimeError, match="^wide_colorized.jpg: "):
        client.download("JPEG")
    assert Image.open(io.BytesIO(client.download("PNG"))).size == (70_000, 40)
    other.take("photo.png", png(Image.new("RGB", (64, 64))))
    assert len(set(other.color())) == 2


@pytest.mark.slow
def test_uploads_of_other_sites_are_refused_and_large_ones_unless_only_this_machine_can_send_them(
    page, cic_checkpoint, tmp_path
):
    client, large = PageClient(page), bytes(app.MAX_MEGABYTES * 2**20 + 1)
    origins = (page, "null", page.replace("127.0.0.1", "127.0.0.1.other.example"))
    assert [client.upload("photo.png", large, Origin=origin).status_code for origin in origins] == [200, 403, 403]
    with served(tmp_path, cic_checkpoint, "--host", "::" if socket.has_ipv6 else "0.0.0.0") as everywhere:
        assert everywhere.startswith("http://localhost:")
        assert PageClient(everywhere).upload("photo.png", large).status_code == 413


@pytest.mark.slow
def test_simultaneous_users_get_their_own_photos_corrections_and_metadata(page, cic_checkpoint, image_folder, tmp_path):
    paths = [tmp_path / f"{path.stem}.jpg" for path in sorted(image_folder.iterdir())]
    for path in paths:
        Image.open(image_folder / f"{path.stem}.png").save(path, exif=exif())
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
            assert downloaded.getexif()[ExifTags.Base.Model] == "Camera"
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


def move(tab, slider, value):
    changes(tab, lambda: tab.get_by_role("slider", name=slider).fill(value))


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


def drop(tab, target, *photos):
    """Drop photos on an element of the page. Return the page's message about them."""
    files = [(path.name, "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()) for path in photos]
    assert tab.evaluate(DROP, [target, "drop", files])
    return tab.locator("#message p").inner_text()


@pytest.mark.slow
def test_photo_is_dropped_colorized_and_saved_on_a_phone(page, browser, image_folder, tmp_path):
    tab = browser(page, 390, 844)
    coffee, rocket = image_folder / "coffee.png", image_folder / "rocket.png"

    def style(selector, pseudo, name):
        return tab.locator(selector).first.evaluate(f"e => getComputedStyle(e, '{pseudo}').{name}")

    # It shows in gray, then in color, with the buttons on the first screen
    assert drop(tab, "h1", coffee) == ""
    until(lambda: len(pictures(tab)) == 2)
    assert style("#picture [data-testid=status-tracker]", "", "backgroundColor") == "rgba(0, 0, 0, 0)"
    until(lambda: style("#picture .content", "::after", "content") == '"Colorized"')
    assert style("#picture .content", "::before", "content") == '"Gray"'
    until(lambda: tab.get_by_role("button", name="JPEG").evaluate("e => e.getBoundingClientRect().bottom") <= 844)
    until(lambda: tab.evaluate("document.documentElement.scrollWidth") <= 390)

    for name, suffix in (("PNG", "png"), ("JPEG", "jpg")):
        download = save(tab, name)
        assert download.suggested_filename == f"coffee_colorized.{suffix}"
        assert Image.open(download.path()).format == name

    # A text file gives a message; the photo stays, and the field is empty again
    (tmp_path / "text.jpg").write_text("not a photo")
    before = pictures(tab)
    field = tab.locator("#photo input[type=file]")
    field.set_input_files(tmp_path / "text.jpg")
    tab.get_by_text("text.jpg: not an image").wait_for()
    assert pictures(tab) == before
    field.wait_for(state="attached")

    # Of two dropped photos, the first is taken
    assert "One photo is taken: rocket.png" in drop(tab, "#place", rocket, coffee)
    until(lambda: len(pictures(tab) - before) == 2)
    assert tab.requested and all(url.startswith((page, "blob:", "data:")) for url in tab.requested)


@pytest.mark.slow
def test_colors_are_corrected_in_a_browser(page, browser):
    tab = browser(page, 1366, 768)
    tab.get_by_role("button", name="Astronaut").click()
    until(lambda: len(pictures(tab)) == 2)
    before = colorized(tab)

    # The suit becomes orange, the background stays
    click(tab, "#place", 0.26, 0.8)
    until(lambda: float(tab.get_by_label("From top").input_value()) == pytest.approx(80, abs=0.5))
    changes(tab, lambda: click(tab, "#chart", 0.75, 0.25))
    move(tab, "Reach", "60")
    until(lambda: difference(tab, before, np.s_[400:420, 100:150]) > 30)
    assert difference(tab, before, np.s_[:50]) < 3

    # The corrections stay at another temperature, and are in the file
    move(tab, "Variety of colors", "0.7")
    saved = np.int16(Image.open(save(tab, "PNG").path()))
    until(lambda: difference(tab, saved) < 2)

    # Without them, all is as before
    move(tab, "Variety of colors", "0.38")
    changes(tab, lambda: tab.get_by_role("button", name="Undo").click())
    until(lambda: difference(tab, before) < 0.1)

    # Numbers out of range are replaced in their fields, without a message
    for name, typed, valid in (("Variety of colors", "0", "0.02"), ("Reach", "700", "100"), ("From left", "-1", "0")):
        field = tab.locator("input[type=number]").and_(tab.get_by_label(name))
        field.fill(typed)
        field.press("Tab")
        until(lambda: field.input_value() == valid)  # noqa: B023
    until(lambda: inspected(tab, "At 0% from the left"))
    assert tab.locator(".toast-body").count() == 0


def focused(tab):
    return tab.evaluate("(e => e.ariaLabel || e.innerText || e.type || e.tagName)(document.activeElement)")


def tab_to(tab, name):
    """Press the tab key until a control has the focus. The focus is visible on the way."""
    names = []
    while not names or name not in names[-1]:
        tab.keyboard.press("Tab")
        names.append(focused(tab))
        outline = tab.evaluate("(e => getComputedStyle(e).outlineWidth)(document.activeElement)")
        assert outline == "3px" or names[-1] == "BODY", names
        assert len(names) < 40, names


@pytest.mark.slow
def test_page_can_be_used_by_keyboard_alone(page, browser):
    tab = browser(page, 1366, 768)
    tab.on("filechooser", lambda chooser: chooser.set_files(app.EXAMPLE_FOLDER / "coffee.png"))
    for name in ("Click to upload", "Rocket", "Click to upload"):  # around the page, which says nothing yet
        tab_to(tab, name)
    assert tab.locator(".toast-body").count() == 0
    tab.keyboard.press("Enter")
    until(lambda: len(pictures(tab)) == 2)
    until(lambda: "Click to upload" in focused(tab))  # the focus is kept
    until(lambda: inspected(tab, "At 50%"))

    def press(key, control, least=0):
        tab_to(tab, control)
        changes(tab, lambda: tab.keyboard.press(key), least)

    press("ArrowRight", "range slider for Variety of colors")
    press("ArrowRight", "range slider for Strength")
    tab_to(tab, "Save as PNG")
    with tab.expect_download():
        tab.keyboard.press("Enter")
    tab_to(tab, "range slider for Share in gray")
    tab.keyboard.press("End")
    until(lambda: "100%" in tab.locator("#picture img").last.get_attribute("style"))
    tab_to(tab, "From left")
    tab.keyboard.type("30")
    until(lambda: inspected(tab, "At 30%"))
    press("Enter", "a ")  # the most likely colors
    press("Enter", "Gray")
    press("ArrowRight", "range slider for Reach")
    press("Enter", "Undo", least=0.1)
    tab_to(tab, "Reset")


# Returns the color of each visible text and the one behind it.
COLORS = """() => {
    const behind = (e) => {
        const color = getComputedStyle(e).backgroundColor;
        return color === "rgba(0, 0, 0, 0)" && e.parentElement ? behind(e.parentElement) : color;
    };
    const hasText = (e) => [...e.childNodes].some((node) => node.nodeType === Node.TEXT_NODE && /\\w/.test(node.data));
    const isVisible = (e) => e.checkVisibility({ opacityProperty: true, visibilityProperty: true });
    const texts = [...document.body.querySelectorAll("*")].filter((e) => hasText(e) && isVisible(e));
    return texts.map((e) => [getComputedStyle(e).color, behind(e)]);
}"""


def luminance(color):
    """Return the relative luminance of a color like "rgb(255, 0, 0)", as the WCAG define it."""
    channels = np.array(re.findall(r"[\d.]+", color)[:3], float) / 255
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return linear @ (0.2126, 0.7152, 0.0722)


@pytest.mark.slow
def test_texts_have_a_contrast_of_at_least_4_5(page, browser):
    tab = browser(page, 1366, 768)

    def contrasts():
        pairs = [sorted(map(luminance, colors)) for colors in tab.evaluate(COLORS)]
        return [(lighter + 0.05) / (darker + 0.05) for darker, lighter in pairs]

    for scheme in ("light", "dark"):
        tab.emulate_media(color_scheme=scheme)
        tab.reload()
        tab.get_by_role("button", name="Coffee").click()
        until(lambda: inspected(tab, "At 50%"))
        until(lambda: min(contrasts()) >= 4.5)  # the buttons fade
        assert len(contrasts()) > 40
