"""A web demo that colorizes photos: drop one, compare gray with colorized, correct colors, save.

    pip install -r requirements-app.txt
    python app.py                               only on this machine, at http://127.0.0.1:7860
    python app.py --host 0.0.0.0 --port 8000    on every network of this machine

The page works offline: fonts and scripts are part of Gradio, and nothing is reported to anyone. Photos are kept in
memory until an hour after the user closes the page.
"""

import html
import os
import shutil
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections import namedtuple
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from functools import lru_cache, partial, wraps
from io import BytesIO
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import urlsplit

from support.cli import Parser, UserError, report_os_errors, run_script, whole
from support.cpu import return_freed_memory, use_all_cores
from support.images import InvalidImageError, open_image, read_image, save, to_rgb

import numpy as np
import paddle
import skimage
from matplotlib.figure import Figure
from PIL import Image, ImageDraw

from colorizer import Colorizer, Correction, colored, network_input, to_ab
from dataset import lab_to_rgb, rgb_to_lightness, to_uint8
from pretrained import checkpoint_names, default_name
from utils import TEMPERATURE, load_ab_bins

try:
    import gradio as gr
    import uvicorn
    from fastapi import FastAPI
    from fastapi.responses import PlainTextResponse
except ImportError:
    gr = None

PREVIEW = 1200  # longer side in pixels of the pictures on the page; downloads have the photo's own size
MAX_MEGAPIXELS = 50  # per photo
MAX_MEGABYTES = 40  # per photo, unless the page is served to this machine only
LARGE = 13  # megapixels; photos with more are decoded one at a time
MAX_USERS = 32  # with a photo in memory, about 20 MB each; the least recently active one is dropped first
MAX_WAITING = 64  # requests; later ones are rejected
LOADED = 2  # networks in memory
MAX_CORRECTIONS = 20  # per photo; each takes 0.03 s whenever the photo is drawn
LIKELY = 3  # most likely colors, as buttons
DIFFERENT = 20  # ab units between them
NO_PHOTO = "The server no longer has your photo. Please choose it again."  # the controls are hidden without a photo
SUFFIXES = {"PNG": "png", "JPEG": "jpg"}  # of downloads
EXAMPLES = {"Astronaut": "astronaut.png", "Coffee": "coffee.png", "Cat": "chelsea.png", "Rocket": "rocket.jpg"}
EXAMPLE_FOLDER = Path(skimage.__file__).parent / "data"
Settings = namedtuple("Settings", "temperature saturation across down reach")  # the last three in percent


def clamp(values, controls):
    """Return entered numbers as Settings. Those out of the range of their slider or field are moved to its end."""
    limits = [(control.minimum, control.maximum) for control in controls]
    return Settings(*(min(most, max(least, float(value or 0))) for value, (least, most) in zip(values, limits)))


@dataclass
class Photo:
    """A user's photo, the network's output for it and the user's corrections, kept from one request to the next."""

    name: str
    data: bytes  # the uploaded file
    turn: object  # context manager to decode it in: the lock of large photos, or none
    preview: Image.Image  # in gray
    output: paddle.Tensor = None  # logits [1, 313, h/4, w/4], or ab [1, 2, h/4, w/4]
    corrections: list = field(default_factory=list)

    def decode(self):
        with self.turn:
            return read_image(Image.open(BytesIO(self.data)))

    def colorize(self, image, settings):
        """Colorize the photo, in any size."""
        (ab,) = to_ab(self.output, settings.temperature)
        return colored(image, ab, self.corrections, settings.saturation)


# -------------------------------------------------------------------------------------------------
# Event handlers


def guard(handler):
    """Turn whatever a handler raises into a message to its user.

    A SystemExit or KeyboardInterrupt would otherwise end Gradio's event loop, which serves all users.
    """

    @wraps(handler)
    def guarded(*arguments):
        try:
            if arguments and arguments[0] is None:
                raise UserError(NO_PHOTO)
            return handler(*arguments)
        except (UserError, InvalidImageError) as error:
            path, colon, problem = str(error).partition(": ")
            reason = Path(path).name + colon + problem  # without the folder, which is the server's
        except BaseException as error:
            traceback.print_exc()
            reason = f"The server cannot do this: {getattr(error, 'strerror', None) or type(error).__name__}"
        raise gr.Error(html.escape(reason), print_exception=False)

    return guarded


def open_photo(large, path):
    """Read a photo and show it in gray. `large` is the lock of large photos."""
    with open_image(path) as image:
        width, height = image.size
    if width * height > MAX_MEGAPIXELS * 1e6:
        raise InvalidImageError(path, f"{width}x{height} pixels are more than {MAX_MEGAPIXELS} megapixels")
    turn = large if width * height > LARGE * 1e6 else nullcontext()
    data = Path(path).read_bytes()  # uploads are deleted after a minute, which may pass before the photo's turn
    with open_image(path, least_side=PREVIEW) as opened, turn:
        image = to_rgb(opened, path)
    image.thumbnail((PREVIEW, PREVIEW))
    preview = colored(image, paddle.zeros([2, 1, 1]))
    picture = store(preview)
    return Photo(Path(path).name, data, turn, preview), (picture, picture), picture, None, ""


def compute(colorizer, network, photo, weights):
    """Run the network with the weights of this name. `network` is the lock to load and run networks."""
    image = photo.decode()
    with network:
        colorize = colorizer(weights)
        photo.output = colorize.predict(network_input(image, colorize.load_size)[None])


# Functions of the photo, its Settings and the event, whose `index` is the clicked pixel


def draw(photo, settings, event):
    """Draw everything that depends on the settings."""
    colorized = photo.colorize(photo.preview, settings)
    pictures = store(photo.preview), store(colorized)
    return pictures, store(mark(colorized, photo, settings)), *distribution(photo, settings)


def choose_place(photo, settings, event):
    """Return the clicked place in percent of the width and the height, and the new drawings."""
    across, down = (round(100 * (pixel + 0.5) / side, 1) for pixel, side in zip(event.index, photo.preview.size))
    return across, down, *draw(photo, settings._replace(across=across, down=down), event)


def correct(choose, photo, settings, event):
    """Let the place and its surroundings have another color: `choose` returns its ab."""
    place = settings.across / 100, settings.down / 100
    others = [correction for correction in photo.corrections if correction[:2] != place]
    if len(others) >= MAX_CORRECTIONS:
        raise UserError(f"There are {MAX_CORRECTIONS} corrections already.")
    color = choose(photo, settings, event)
    photo.corrections = [*others, Correction(*place, color, settings.reach / 100)]
    return draw(photo, settings, event)


def change_reach(photo, settings, event):
    """Change how far the last correction extends."""
    last = [correction._replace(reach=settings.reach / 100) for correction in photo.corrections[-1:]]
    photo.corrections = photo.corrections[:-1] + last
    return draw(photo, settings, event)


def remove(first, photo, settings, event):
    """Remove corrections, from the first one given on. Also return the reach of the last one left, for its slider."""
    photo.corrections = photo.corrections[:first]
    reach = round(100 * photo.corrections[-1].reach) if photo.corrections else settings.reach
    return *draw(photo, settings, event), reach


def full_size(suffix, photo, settings, event):
    """Write the file to download: the photo in its own size, colorized from the kept output."""
    target = temporary_path(f"{Path(photo.name).stem}_colorized.{suffix}")
    save(photo.colorize(photo.decode(), settings), target)
    return str(target)


# -------------------------------------------------------------------------------------------------
# Files for the browser


def store(image):
    """Write a picture where Gradio finds it, and return its path."""
    path = temporary_path("picture.jpg")
    image.save(path, quality=90, subsampling=0)
    return str(path)


def temporary_path(name):
    return Path(tempfile.mkdtemp(dir=os.environ["GRADIO_TEMP_DIR"])) / name


def delete_old_files(folder):
    """Delete uploads, also interrupted ones, and pictures after a minute.

    Gradio's own deletion (delete_cache) ends for good if a file is made while it runs.
    """
    for path in Path(folder).iterdir():
        with suppress(OSError):  # the end of an upload moves it, and Windows keeps files that are open
            if time.time() - path.stat().st_mtime > 60:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


# -------------------------------------------------------------------------------------------------
# The distribution at one place


def pixel(width, height, settings):
    """Return the row and the column of the place in an image or in the network's output."""
    return min(int(settings.down / 100 * height), height - 1), min(int(settings.across / 100 * width), width - 1)


def output_at(photo, settings):
    """Return the network's output at the place: logits [1, 313, 1, 1], or ab [1, 2, 1, 1]."""
    height, width = photo.output.shape[2:]
    row, column = pixel(width, height, settings)
    return photo.output[:, :, row : row + 1, column : column + 1]


def likely_bins(output):
    """Return the indices of the most likely ab bins, except for those near a more likely one. None for ab."""
    bins, chosen = load_ab_bins().numpy(), []
    for index in [] if output.shape[1] == 2 else np.argsort(-output.numpy().ravel(), kind="stable"):
        if all(np.hypot(*(bins[index] - bins[other])) >= DIFFERENT for other in chosen):
            chosen.append(index)
    return chosen[:LIKELY]


def likely_color(rank, photo, settings, event):
    return load_ab_bins().numpy()[likely_bins(output_at(photo, settings))[rank]]


def clicked_color(photo, settings, event):
    """Return the ab bin that is nearest to the clicked pixel of the chart."""
    x, y = event.index
    ab = chart_axes().transData.inverted().transform((x, CHART - y))
    bins = load_ab_bins().numpy()
    return bins[np.hypot(*(bins - ab).T).argmin()]


def distribution(photo, settings):
    """Show the predicted probabilities of the 313 colors at the place.

    Args:
        photo (Photo): The network's output is needed.
        settings (Settings): Place, and temperature of the softmax and of the annealed mean.

    Returns:
        tuple: Path of the chart, a sentence with the predicted color, and a button for each of the likely colors.
    """
    output, bins = output_at(photo, settings), load_ab_bins().numpy()
    mean = to_ab(output, settings.temperature).flatten().tolist()
    place = f"At {settings.across:g}% from the left and {settings.down:g}% from the top"
    text = f"{place}, the predicted color is a = {round(mean[0])}, b = {round(mean[1])}."
    if output.shape[1] == 2:
        probability = np.zeros(len(bins))
        text += " This network predicts one color instead of a distribution."
    else:
        probability = paddle.nn.functional.softmax(output.flatten() / settings.temperature, axis=0).numpy()
    colors = colors_like(np.asarray(photo.preview)[pixel(*photo.preview.size, settings)], bins)
    buttons = [gr.Button(visible=False)] * LIKELY
    for rank, index in enumerate(likely_bins(output)):
        swatch = store(Image.new("RGB", (32, 32), tuple(colors[index].tolist())))
        a, b = bins[index]
        buttons[rank] = gr.Button(f"a {a:.0f}, b {b:.0f} ({probability[index]:.0%})", icon=swatch, visible=True)
    return draw_chart(probability, colors, mean), text, *buttons


def colors_like(rgb, ab):
    """Return the colors of ab values at the lightness of a color: uint8 [3], float32 [N, 2] -> uint8 [N, 3]."""
    lightness = rgb_to_lightness(paddle.to_tensor(rgb.reshape([1, 3, 1, 1]))).item()
    lab = np.insert(ab, 0, lightness, axis=1)[:, :, None, None]  # [N, 3, 1, 1]
    return to_uint8(lab_to_rgb(paddle.to_tensor(lab), keep_lightness=True))[:, :, 0, 0].numpy()


CHART = 600  # pixels per side


def chart_axes():
    """Return the axes of the ab plane in a new figure, always at the same place."""
    plane = {"xlim": (-115, 115), "ylim": (-120, 110), "xlabel": "a (green to red)", "ylabel": "b (blue to yellow)"}
    return Figure(figsize=(CHART / 100, CHART / 100), dpi=100).add_axes((0.12, 0.1, 0.87, 0.88), **plane)


def draw_chart(probability, colors, mean):
    """Draw the ab plane with a square for each bin, larger for a higher probability, and mark the mean."""
    axes = chart_axes()
    area = 20 + 180 * probability / (probability.max() or 1)
    axes.scatter(*load_ab_bins().numpy().T, s=area, c=colors / 255, marker="s", ec="gray", lw=0.4)
    axes.plot(*mean, "o", ms=10, mfc="white", mec="black", mew=3, label="predicted")
    axes.legend()
    path = temporary_path("chart.png")
    axes.figure.savefig(path)
    return str(path)


def mark(image, photo, settings):
    """Mark the corrections in an image, and the place."""
    draw = ImageDraw.Draw(image)
    places = [(correction.across, correction.down, 4) for correction in photo.corrections]
    for across, down, radius in (*places, (settings.across / 100, settings.down / 100, 7)):
        x, y = across * image.width, down * image.height
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill="white", outline="black", width=3)
    return image


# -------------------------------------------------------------------------------------------------
# Layout

INTRODUCTION = """
# Colorize a photo
A neural network predicts a photo's **colors** from its **lightness**. Colors already in the photo are ignored.
"""
PLACE = f"""
## Correct a color
Click a place in the picture, or enter its position. The chart shows what the network predicts there: the area of a
square is the probability of its color. Click the color that the place should have, or press a
button. *Reach* then sets how far this correction extends. Up to {MAX_CORRECTIONS} places can be corrected.
"""
ABOUT = f"""
**Variety of colors.** At 1, the color of a place is the mean of all 313 colors, weighted by their probabilities. Lower
values give the more likely colors more weight, and near 0 only the most likely one counts. The paper calls it
temperature and uses {TEMPERATURE}.

**Limits.** The colors are plausible at best. The network cannot know whether a dress was red or blue, so do not use its
results as evidence of anything.

**Model.** *small* is bundled with the page. It turns skies blue and plants often green; clothes, flowers and furniture
mostly remain brown or gray. *official*, if it is in the list, is the model of the paper's authors, trained on the
1.3 million photos of ImageNet. All other models are checkpoints from a folder of this server.

**Privacy.** Your photo is sent only to the server of this page. It is deleted when you choose a different one, an hour
after you close the page, or earlier if many people use the page.
"""
HINT = "temperature; low: most likely color"


def build(names, colorizer):
    """Build the page.

    Args:
        names (list): Names of the weights to choose from.
        colorizer (callable): Returns the `Colorizer` of such a name.

    Returns:
        gr.Blocks: The page, not yet served.
    """
    with gr.Blocks(title="Colorful Image Colorization", analytics_enabled=False) as page:
        # Components
        photo = gr.State()
        slider = partial(gr.Slider, buttons=[])
        place = partial(gr.Number, 50, minimum=0, maximum=100, min_width=100)
        small = partial(gr.Button, size="sm", min_width=100)
        still = {"show_label": False, "interactive": False}
        gr.Markdown(INTRODUCTION)
        with gr.Row(elem_id="main"):
            with gr.Column(elem_id="choose"):
                upload = gr.File(label="Drop, paste or choose a photo", elem_id="photo", height=64)
                gr.HTML('<p role="status"></p>', elem_id="message")
                with gr.Row(elem_id="examples"):
                    gr.set_static_paths(EXAMPLE_FOLDER)
                    icons = {name: EXAMPLE_FOLDER / file for name, file in EXAMPLES.items()}
                    examples = [gr.Button(name, icon=icon, size="sm", min_width=60) for name, icon in icons.items()]
            picture = gr.ImageSlider(label="Gray and colorized", buttons=["fullscreen"], elem_id="picture", **still)
            with gr.Column(elem_id="adjust"):
                suits = colorizer(names[0]).temperature or TEMPERATURE  # it does not apply to networks that predict ab
                temperature = slider(0.02, 1, suits, step=0.02, label="Variety of colors", info=HINT)
                saturation = slider(0, 2, 1, step=0.05, label="Strength of all colors")
                choices = [(Path(name).name, name) for name in names]
                weights = gr.Dropdown(choices, value=names[0], label="Model")
                with gr.Row():
                    saves = {name: gr.Button(f"Save as {name}", variant="primary", min_width=100) for name in SUFFIXES}
                divider = slider(0, 100, 50, step=1, label="Share in gray (%)", elem_id="divider")
        file = gr.DownloadButton(visible=False)
        with gr.Column(elem_id="correct"):
            gr.Markdown(PLACE)
            with gr.Row(elem_classes="places"):
                marked = gr.Image(alt_text="The photo, the place marked", buttons=[], elem_id="place", **still)
                with gr.Column():
                    with gr.Row():
                        across, down = place(label="From left (%)"), place(label="From top (%)")
                    with gr.Row(elem_id="colors"):
                        likely = [small("") for _ in range(LIKELY)]
                        neutral = small("Gray")
                    reach = slider(1, 100, 20, step=1, label="Reach (%)", info="how far the last correction extends")
                    with gr.Row():
                        undone, restored = small("Undo"), small("Reset")
                    text = gr.Markdown(elem_id="distribution")
                chart = gr.Image(alt_text="Probabilities in the ab plane", buttons=[], elem_id="chart", **still)
        gr.Markdown(ABOUT)

        # Events: trigger, function, inputs, outputs
        large, network = threading.Lock(), threading.Lock()
        controls = [temperature, saturation, across, down, reach]
        opened = [photo, picture, marked, chart, text]
        drawn = [picture, marked, chart, text, *likely]

        def on(trigger, function, inputs, outputs, **how):
            return trigger(guard(function), inputs, outputs, api_visibility="private", **how)

        def slow(trigger, function, inputs, outputs):
            """Decode a photo, which may have to wait for others."""
            return on(trigger, function, inputs, outputs, concurrency_limit=8, show_progress_on=picture)

        def adjust(trigger, function, outputs, **how):
            """Call a function of the photo, the settings and the event; nothing happens until the network has run."""

            def handler(photo, event: gr.EventData, *values):
                return gr.skip() if photo.output is None else function(photo, clamp(values, controls), event)

            how = {"concurrency_limit": 4, "show_progress": "hidden", **how}
            # Without Gradio's preprocessing, which would reject numbers out of range
            return on(trigger, handler, [photo, *controls], outputs, preprocess=False, **how)

        chosen = [slow(upload.upload, partial(open_photo, large), upload, opened)]
        for ended in (chosen[0].success, chosen[0].failure):
            ended(None, None, upload, js="() => window.emptied()")
        for button, path in zip(examples, icons.values()):
            chosen.append(slow(button.click, partial(open_photo, large, path), None, opened))
        for trigger in (weights.input, *(event.success for event in chosen)):
            computed = slow(trigger, partial(compute, colorizer, network), [photo, weights], None)
            adjust(computed.success, draw, drawn)  # of another photo if the user has chosen one since
        for changed in (temperature, saturation, across, down):
            adjust(changed.input, draw, drawn, trigger_mode="always_last")
        adjust(marked.select, choose_place, [across, down, *drawn], trigger_mode="always_last")
        for rank, button in enumerate(likely):
            adjust(button.click, partial(correct, partial(likely_color, rank)), drawn)
        adjust(neutral.click, partial(correct, lambda *_: (0, 0)), drawn)
        adjust(chart.select, partial(correct, clicked_color), drawn)
        adjust(reach.input, change_reach, drawn, trigger_mode="always_last")
        adjust(undone.click, partial(remove, -1), [*drawn, reach])
        adjust(restored.click, partial(remove, 0), [*drawn, reach])
        on(divider.input, lambda share: gr.ImageSlider(slider_position=share), divider, picture, show_progress="hidden")
        for name, button in saves.items():
            how = {"concurrency_id": "files", "concurrency_limit": 2, "show_progress": "full"}
            made = adjust(button.click, partial(full_size, SUFFIXES[name]), file, show_progress_on=picture, **how)
            made.success(None, file, file, js="(file) => window.download(file)")
    return page


# -------------------------------------------------------------------------------------------------


def parse_args(argv=None):
    parser = Parser(description="Serve a web demo that colorizes photos.")
    add = parser.add_argument_group("address").add_argument
    add("--host", default="127.0.0.1", help="address to serve at; 0.0.0.0 or :: serves at all of this machine")
    add("--port", type=whole(1, 65535), default=7860, help="port to serve at")
    add("--max_megabytes", type=whole(), help="largest upload; default: no limit on 127.0.0.1, otherwise 40")
    add("--root_path", metavar="PATH", help="path at which a reverse proxy serves the page, such as /color")
    add = parser.add_argument_group("weights to choose from").add_argument
    add("--model_path", default="./model", help="folder of checkpoints")
    add("--load_model", metavar="NAME", help="weights selected at first, as in test.py")
    return parser.parse_args(argv)


def main(args):
    # Setup
    if gr is None:
        raise UserError("the web demo needs Gradio and Python 3.10: pip install -r requirements-app.txt")
    listener = listen(args.host.strip("[]"), args.port)
    use_all_cores()
    return_freed_memory()

    # Weights, and the network of the first ones
    first = args.load_model or default_name(Path(args.model_path))
    names = list(dict.fromkeys([first, *checkpoint_names(Path(args.model_path)), "small"]))
    colorizer = lru_cache(LOADED)(partial(Colorizer, model_path=args.model_path))
    colorizer(first)

    # Serve until stopped
    with tempfile.TemporaryDirectory() as folder:  # for uploads and pictures, each for one to two minutes
        os.environ["GRADIO_TEMP_DIR"] = folder
        page = build(names, colorizer).queue(max_size=MAX_WAITING)
        page.state_session_capacity = MAX_USERS
        address = ip_address(listener.getsockname()[0])
        limit = args.max_megabytes or (None if address.is_loopback else MAX_MEGABYTES)
        app = web_app(page, args.root_path, limit)
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        thread = threading.Thread(target=server.run, args=[[listener]], daemon=True)
        thread.start()
        name = "localhost" if address.is_unspecified else f"[{address}]" if address.version == 6 else address
        print(f"http://{name}:{args.port}: open it in a browser; Ctrl-C ends it", flush=True)  # which may wait a moment
        try:
            while thread.is_alive():
                time.sleep(5)  # which Ctrl-C interrupts on Windows, too
                delete_old_files(folder)
        finally:  # otherwise a request that is being processed would print a traceback
            server.should_exit = True
            thread.join(5)
    raise UserError("the server has stopped unexpectedly")


def listen(host, port):
    """Return a socket at an address. Raises UserError if the port is taken or the address is not this machine's."""
    with report_os_errors(f"--host {host} --port {port}: cannot be used"):
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        both = family == socket.AF_INET6 and socket.has_dualstack_ipv6()  # `::` then serves IPv4, too
        return socket.create_server((host, port), family=family, dualstack_ipv6=both)


def web_app(page, root_path, max_megabytes):
    """Return the page as an ASGI application, which refuses requests that pages of other sites send."""
    font = gr.themes.LocalFont("Source Sans Pro", weights=(400, 700))  # Gradio has no file for its own choice of 600
    theme = gr.themes.Default(primary_hue="blue", font=[font, "system-ui", "sans-serif"])
    contrast = {"body_text_color_subdued": "*neutral_500", "button_primary_background_fill": "*primary_600"}
    resources = Path(__file__).resolve().parent / "resources"
    site = FastAPI(openapi_url=None)

    @site.middleware("http")
    async def refuse_other_sites(request, call_next):
        origin = request.headers.get("origin")
        if request.method == "POST" and origin and urlsplit(origin).netloc != request.headers.get("host"):
            return PlainTextResponse("This request comes from a page of another site.", 403)
        return await call_next(request)

    return gr.mount_gradio_app(
        site,
        page,
        path="/",
        root_path=root_path,
        max_file_size=max_megabytes and f"{max_megabytes}mb",
        theme=theme.set(**contrast),
        css_paths=[resources / "app.css"],
        js=(resources / "app.js").read_text(encoding="utf-8"),
        show_error=False,
        run_history=False,
        enable_monitoring=False,
    )


if __name__ == "__main__":
    sys.exit(run_script(main, parse_args))
