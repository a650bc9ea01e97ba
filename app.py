"""A web demo that colorizes photos: drop one, compare gray with colorized, change the temperature.

    pip install -r requirements-app.txt
    python app.py                               only on this machine, at http://127.0.0.1:7860
    python app.py --host 0.0.0.0 --port 8000    on every network of this machine

The page works offline: fonts and scripts are part of Gradio, and nothing is reported to anyone. Photos are kept in
memory for 15 minutes after the user's last action, or for an hour if the user closes the page.
"""

import html
import logging
import os
import shutil
import socket
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from io import BytesIO
from pathlib import Path

from support.cli import Parser, UserError, run_script, whole
from support.cpu import return_freed_memory, use_all_cores
from support.images import InvalidImageError, image_size, open_rgb, read_image, save

import numpy as np
import paddle
import skimage
from matplotlib.figure import Figure
from PIL import Image, ImageDraw

from colorizer import Colorizer, colored
from dataset import lab_to_rgb, rgb_to_lab
from pretrained import checkpoint_names, default_name
from utils import TEMPERATURE, annealed_mean, load_ab_bins

try:
    import gradio as gr
except ImportError:
    gr = None

PREVIEW = 1200  # longer side in pixels of the pictures on the page; downloads have the photo's own size
MAX_MEGABYTES, MAX_MEGAPIXELS = 40, 50  # per photo
MAX_USERS = 32  # with a photo in memory, about 10 MB each; the least recently active one is dropped first
MAX_WAITING = 64  # requests; later ones are rejected
KEEP = 15 * 60  # seconds after a user's last action; Gradio makes it an hour if the page is closed
LOADED = 2  # networks in memory
NO_PHOTO = "There is no photo to work on. Please choose one; it is deleted after 15 minutes without any action."
SUFFIXES = {"PNG": "png", "JPEG": "jpg"}  # of downloads
EXAMPLES = {"Astronaut": "astronaut.png", "Coffee": "coffee.png", "Cat": "chelsea.png", "Rocket": "rocket.jpg"}
EXAMPLE_FOLDER = Path(skimage.__file__).parent / "data"


@dataclass
class Photo:
    """A user's photo and the network's output for it, kept from one request to the next."""

    name: str
    data: bytes  # the uploaded file
    preview: Image.Image
    weights: str = None  # name of the weights that computed the logits
    logits: paddle.Tensor = None  # [1, 313, h/4, w/4]

    def image(self):
        return Image.open(BytesIO(self.data))

    def gray(self):
        return store(colored(self.preview, paddle.zeros([2, 1, 1])))

    def ab(self, temperature):
        return annealed_mean(self.logits, load_ab_bins(), temperature)[0]  # [2, h/4, w/4]


# -------------------------------------------------------------------------------------------------
# Event handlers


def open_photo(path):
    """Read a photo and show it in gray. The third output empties the upload field."""
    try:
        width, height = image_size(path)
        if width * height > MAX_MEGAPIXELS * 1e6:
            raise InvalidImageError(path, f"{width}x{height} pixels are more than {MAX_MEGAPIXELS} megapixels")
        image = open_rgb(path, least_side=PREVIEW)
    except InvalidImageError as error:
        gr.Warning(html.escape(f"{Path(path).name} cannot be read as a photo: {error.reason}."))
        return gr.skip(), gr.skip(), None
    image.thumbnail((PREVIEW, PREVIEW))
    photo = Photo(Path(path).name, Path(path).read_bytes(), image)
    return photo, (photo.gray(), photo.gray()), None


def compute(colorizer, photo, weights):
    """Run the network, unless its output for these weights is kept."""
    if photo and photo.weights != weights:
        try:
            photo.logits, photo.weights = colorizer(weights).logits(photo.image()), weights
        except UserError as error:  # unusable weights
            raise gr.Error(html.escape(str(error)), print_exception=False) from error


def draw(photo, temperature, across, down):
    """Draw everything that depends on the temperature or the place, from the kept logits."""
    if photo is None:
        gr.Info(NO_PHOTO)
    if photo is None or photo.logits is None:
        return [gr.skip()] * 4
    colorized = colored(photo.preview, photo.ab(temperature))
    pictures = photo.gray(), store(colorized)
    chart, text = distribution(photo, colorized, temperature, across or 0, down or 0)
    return pictures, store(colorized), chart, text


def draw_again(photo, temperature, across, down):
    """Draw, and keep the photo for another 15 minutes."""
    return photo or gr.skip(), *draw(photo, temperature, across, down)


def full_size(suffix, photo, temperature):
    """Write the file to download: the photo in its own size, colorized from the kept logits."""
    if photo is None or photo.logits is None:
        raise gr.Error(NO_PHOTO, print_exception=False)
    target = temporary_path(f"{Path(photo.name).stem}_colorized.{suffix}")
    save(colored(read_image(photo.image()), photo.ab(temperature)), target)
    return str(target)


def position(photo, event: "gr.SelectData"):
    """Return the clicked place in percent of the width and the height."""
    if photo is None:
        return gr.skip(), gr.skip()
    return [round(100 * (pixel + 0.5) / side, 1) for pixel, side in zip(event.index, photo.preview.size)]


def store(image):
    """Write a picture where Gradio finds it, and return its path."""
    path = temporary_path("picture.jpg")
    image.save(path, quality=90, subsampling=0)
    return str(path)


def temporary_path(name):
    return Path(tempfile.mkdtemp(dir=os.environ["GRADIO_TEMP_DIR"])) / name


def delete_old_files(folder, kept):
    """Delete uploads, also interrupted ones, and pictures after a minute; `kept` is a set of paths that stay.

    Gradio's own deletion (delete_cache) ends for good if a file is made while it runs.
    """
    for path in set(Path(folder).iterdir()) - kept:
        with suppress(OSError):  # the end of an upload moves it, and Windows keeps files that are open
            if time.time() - path.stat().st_mtime > 60:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


# -------------------------------------------------------------------------------------------------
# The distribution at one place


def distribution(photo, place, temperature, across, down):
    """Draw the predicted probabilities of the 313 colors at one place.

    Args:
        photo (Photo): Its logits are needed.
        place (Image): The colorized preview, in which the place is marked.
        temperature (float): Temperature of the softmax and of the annealed mean.
        across (float): Distance from the left edge in percent of the width.
        down (float): Distance from the top edge in percent of the height.

    Returns:
        tuple: Path of the chart, and a sentence with its main numbers.
    """
    x, y = min(across / 100, 0.999), min(down / 100, 0.999)
    row, column = (int(share * side) for share, side in zip((y, x), photo.logits.shape[2:]))
    logits = photo.logits[:, :, row : row + 1, column : column + 1]  # [1, 313, 1, 1]
    mean = annealed_mean(logits, load_ab_bins(), temperature).flatten().tolist()
    probability = paddle.nn.functional.softmax(logits.flatten() / temperature, axis=0).numpy()

    center = x * place.width, y * place.height
    pixel = np.asarray(place)[int(center[1]), int(center[0])]
    lightness = rgb_to_lab(paddle.to_tensor(pixel.reshape([1, 3, 1, 1])))[0, 0].item()
    dot = [*(c - 7 for c in center), *(c + 7 for c in center)]
    ImageDraw.Draw(place).ellipse(dot, fill="white", outline="black", width=3)
    a, b = load_ab_bins().numpy()[probability.argmax()]
    text = (
        f"At {across:g}% from the left and {down:g}% from the top, the most likely color is a = {a:.0f}, b = {b:.0f} "
        f"(probability {probability.max():.0%}). The annealed mean is a = {round(mean[0])}, b = {round(mean[1])}."
    )
    return draw_chart(probability, lightness, mean), text


def draw_chart(probability, lightness, mean):
    """Draw the ab plane with a square for each bin, its area proportional to the probability, and mark the mean."""
    ab = load_ab_bins()
    lab = paddle.concat([paddle.full([len(ab), 1], lightness), ab], axis=1)  # [313, 3]
    colors = lab_to_rgb(lab.unsqueeze([2, 3])).squeeze([2, 3]).numpy()
    figure = Figure(figsize=(6, 6), layout="constrained")
    axes = figure.subplots()
    axes.scatter(*ab.numpy().T, s=2, c="lightgray")
    axes.scatter(*ab.numpy().T, s=180 * probability / probability.max(), c=colors, marker="s")
    axes.plot(*mean, "o", ms=10, mfc="white", mec="black", mew=3, label="annealed mean")
    axes.set(xlabel="a (green to red)", ylabel="b (blue to yellow)", aspect="equal")
    axes.legend()
    path = temporary_path("chart.png")
    figure.savefig(path)
    return str(path)


# -------------------------------------------------------------------------------------------------
# Layout

INTRODUCTION = """
# Colorize a photo
A neural network predicts a photo's **colors** from its **lightness**. Colors already in the photo are ignored.
"""
PLACE = """
## The prediction at one place
At every place, the network predicts a probability for each of 313 colors. Click a place, or enter its position. The
chart shows the colors at the lightness of this place; the area of a square is the probability at this temperature.
"""
ABOUT = f"""
**Temperature.** At 1, the color of a place is the mean of all 313 colors, weighted by their probabilities. Lower
temperatures give the more likely colors more weight, and near 0 only the most likely one counts. The paper uses
{TEMPERATURE}.

**Limits.** The colors are plausible at best. The network cannot know whether a dress was red or blue, so do not use its
results as evidence of anything.

**Model.** *small* is bundled with the page. It turns skies blue and plants often green; clothes, flowers and furniture
mostly remain brown or gray. *official* is the model of the paper's authors, trained on the 1.3 million photos of
ImageNet. All other models are checkpoints from a folder of this server.

**Privacy.** Your photo is sent only to the server of this page. It is deleted 15 minutes after your last action, one
hour after it if you close the page, or earlier if many people use the page.
"""
PASTE = """() => document.addEventListener("paste", (event) => {
    const input = document.querySelector("#photo input[type=file]");
    if (!input || !event.clipboardData.files.length) return;
    input.files = event.clipboardData.files;
    input.dispatchEvent(new Event("change", { bubbles: true }));
})"""
DOWNLOAD = """(file) => {
    if (file) Object.assign(document.createElement("a"), { href: file.url, download: file.orig_name }).click();
}"""


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
        still = {"show_label": False, "interactive": False}
        photo = gr.State(time_to_live=KEEP)
        gr.Markdown(INTRODUCTION)
        with gr.Row(elem_id="main"):
            with gr.Column(elem_id="choose"):
                upload = gr.File(label="Drop, paste or choose a photo", elem_id="photo", height=64)
                with gr.Row(elem_id="examples"):
                    examples = [example_button(name, EXAMPLE_FOLDER / file) for name, file in EXAMPLES.items()]
            picture = gr.ImageSlider(
                label="Gray and colorized", max_height=520, buttons=["fullscreen"], **still, elem_id="picture"
            )
            with gr.Column(elem_id="adjust"):
                slider = {"label": "Temperature", "info": "0: likeliest color, 1: mean of all", "buttons": []}
                suits = colorizer(names[0]).temperature
                temperature = gr.Slider(0.02, 1, suits, step=0.02, elem_id="temperature", **slider)
                choices = [(Path(name).name, name) for name in names]
                weights = gr.Dropdown(choices, value=names[0], label="Model", elem_id="weights")
                with gr.Row():
                    saves = {name: gr.Button(f"Save as {name}", variant="primary", min_width=100) for name in SUFFIXES}
                divider = gr.Slider(0, 100, 50, label="Share in gray (%)", buttons=[], elem_id="divider")
        file = gr.DownloadButton(visible=False)
        gr.Markdown(PLACE)
        with gr.Row():
            marked = gr.Image(alt_text="The colorized photo, the place marked", buttons=[], elem_id="place", **still)
            with gr.Column():
                with gr.Row():
                    percent = {"value": 50, "minimum": 0, "maximum": 100, "min_width": 120}
                    across = gr.Number(label="From the left (%)", elem_id="across", **percent)
                    down = gr.Number(label="From the top (%)", elem_id="down", **percent)
                text = gr.Markdown(elem_id="distribution")
                chart = gr.Image(alt_text="Probabilities in the ab plane", buttons=[], elem_id="chart", **still)
        gr.Markdown(ABOUT)

        # Events: trigger, function, inputs, outputs. The network runs for one user at a time; the others need not wait.
        network = {"concurrency_id": "network", "concurrency_limit": 1, "show_progress_on": picture}
        quick = {"concurrency_limit": 4, "show_progress": "hidden"}
        opening = {"concurrency_limit": 4, "show_progress_on": picture}
        state = [photo, temperature, across, down]
        drawn = [picture, marked, chart, text]

        def on(trigger, function, inputs, outputs, **settings):
            return trigger(function, inputs, outputs, api_visibility="private", **settings)

        opened = [on(upload.upload, open_photo, upload, [photo, picture, upload], **opening)]
        for button, name in zip(examples, EXAMPLES.values()):
            example = partial(open_photo, EXAMPLE_FOLDER / name)
            opened += [on(button.click, example, None, [photo, picture, upload], **opening)]
        for event in opened:
            computed = on(event.then, partial(compute, colorizer), [photo, weights], None, **network)
            # Without the state: the user may have chosen another photo since the network started.
            on(computed.success, draw, state, drawn, **quick)
        computed = on(weights.input, partial(compute, colorizer), [photo, weights], None, **network)
        on(computed.success, draw_again, state, [photo, *drawn], **quick)
        adjusted = partial(gr.on, [temperature.input, across.input, down.input])
        on(adjusted, draw_again, state, [photo, *drawn], **quick, trigger_mode="always_last")
        clicked = on(marked.select, position, photo, [across, down], **quick)
        on(clicked.then, draw_again, state, [photo, *drawn], **quick)
        on(divider.input, lambda share: gr.ImageSlider(slider_position=share), divider, picture, **quick)
        for name, button in saves.items():
            made = on(button.click, partial(full_size, SUFFIXES[name]), [photo, temperature], file, **network)
            made.success(None, file, js=DOWNLOAD)
    return page


def example_button(name, path):
    image = open_rgb(path)
    image.thumbnail((160, 160))
    return gr.Button(name, icon=store(image), size="sm", min_width=60)


# -------------------------------------------------------------------------------------------------


def parse_args(argv=None):
    parser = Parser(description="Serve a web demo that colorizes photos.")
    add = parser.add_argument_group("address").add_argument
    add("--host", default="127.0.0.1", help="address to serve at; 0.0.0.0: all addresses of this machine")
    add("--port", type=whole(1, 65535), default=7860, help="port to serve at")
    add("--root_path", metavar="PATH", help="path at which a reverse proxy serves the page, such as /color")
    add = parser.add_argument_group("weights to choose from").add_argument
    add("--model_path", default="./model", help="folder of checkpoints")
    add("--load_model", metavar="NAME", help="weights selected at first, as in test.py")
    return parser.parse_args(argv)


def main(args):
    # Setup
    if gr is None:
        raise UserError("the web demo needs Gradio and Python 3.10: pip install -r requirements-app.txt")
    family = socket.getaddrinfo(args.host, args.port)[0][0]
    socket.create_server((args.host, args.port), family=family).close()  # raises if the port is taken
    use_all_cores()
    return_freed_memory()
    logging.getLogger("httpx").setLevel(logging.WARNING)  # Gradio requests its own page once

    # Weights, and the network of the first ones
    first = args.load_model or default_name(Path(args.model_path))
    names = list(dict.fromkeys([first, *checkpoint_names(Path(args.model_path)), "small"]))
    colorizer = lru_cache(LOADED)(partial(Colorizer, model_path=args.model_path))
    colorizer(first)

    # Serve until stopped
    with tempfile.TemporaryDirectory() as folder:  # for uploads and pictures, each for one to two minutes
        os.environ["GRADIO_TEMP_DIR"] = folder
        page = build(names, colorizer).queue(max_size=MAX_WAITING)
        serve(page, args.host, args.port, args.root_path)
        icons = set(Path(folder).iterdir())
        print(f"http://{args.host}:{args.port}: open it in a browser; Ctrl-C ends it", flush=True)
        try:
            while True:
                time.sleep(30)  # which Ctrl-C interrupts on Windows, too
                delete_old_files(folder, icons)
        finally:
            page.close(verbose=False)


def serve(page, host, port, root_path):
    font = [gr.themes.LocalFont("Source Sans Pro", weights=(400, 700)), "system-ui", "sans-serif"]
    css = Path(__file__).resolve().parent / "resources" / "app.css"
    appearance = {"theme": gr.themes.Default(primary_hue="blue", font=font), "css_paths": [css], "js": PASTE}
    limits = {"max_file_size": f"{MAX_MEGABYTES}mb", "state_session_capacity": MAX_USERS}
    without = {"share": False, "footer_links": [], "run_history": False, "enable_monitoring": False, "ssr_mode": False}
    address = {"server_name": host, "server_port": port, "root_path": root_path}
    try:
        page.launch(**address, prevent_thread_lock=True, quiet=True, **appearance, **limits, **without)
    except ValueError as error:  # Gradio does not reach its own page, for example through a proxy that http_proxy names
        raise UserError(f"http://{host}:{port}: cannot be served ({error})") from error


if __name__ == "__main__":
    sys.exit(run_script(main, parse_args))
