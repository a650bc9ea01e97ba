"""A page that colors photographs: drop one, drag the line between gray and colored, move the temperature.

    pip install -r requirements-app.txt
    python app.py                               for this machine alone, at http://127.0.0.1:7860
    python app.py --host 0.0.0.0 --port 8000    for the network that it is in

It works without a network: fonts and scripts come with Gradio, and nothing is reported to anyone. Of a photograph
nothing stays: what the page needs of it is in memory until its visitor has been away for a quarter of an hour.
"""

import html
import io
import logging
import os
import sys
import tempfile
import threading
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

from support.cli import Parser, UserError, run_script, whole
from support.cpu import return_freed_memory, use_all_cores
from support.images import InvalidImageError, image_size, open_rgb

import numpy as np
import paddle
import skimage
from PIL import Image

from colorizer import Colorizer, join, save
from pretrained import checkpoint_names, default_name
from utils import TEMPERATURE, annealed_mean, load_ab_bins

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when Gradio is imported
try:
    import gradio as gr
except ImportError:
    gr = None

PREVIEW = 1200  # long side in pixels of what the page shows; the download has the photograph's own size
MAX_MEGABYTES, MAX_MEGAPIXELS = 40, 50  # of a photograph
MAX_VISITORS = 32  # with a photograph in memory, some 10 MB each; the one longest away is forgotten first
MAX_WAITING = 64  # requests; who comes then is told so
FORGET = 15 * 60  # seconds after a visitor's last request
LOADED = 2  # networks in memory
FORGOTTEN = "There is no photograph here; after a quarter of an hour it is forgotten. Please drop it again."
EXAMPLES = ("astronaut.png", "coffee.png", "chelsea.png", "rocket.jpg")  # of scikit-image


@dataclass
class Visit:
    """What is kept of a visitor from one request to the next."""

    name: str  # of the photograph's file
    data: bytes  # … what is in it
    shown: np.ndarray  # uint8 [H, W, 3], the photograph as large as the page shows it
    gray: bytes  # a JPEG of its lightness
    weights: str = None  # the name of those that gave the logits
    logits: paddle.Tensor = None  # [1, 313, h/4, w/4]

    @contextmanager
    def file(self):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / self.name
            path.write_bytes(self.data)
            yield path


# -------------------------------------------------------------------------------------------------
# What the page does


def take(path):
    """A photograph that has come, shown in gray until it is its turn; the third output empties the field again."""
    try:
        width, height = image_size(path)
        if width * height > MAX_MEGAPIXELS * 1e6:
            raise InvalidImageError(path, f"{width}x{height} pixels; here {MAX_MEGAPIXELS} megapixels are the most")
        image = open_rgb(path)
    except InvalidImageError as error:
        gr.Warning(html.escape(f"{Path(path).name} cannot be read as a photograph: {error.reason}."))
        return gr.skip(), gr.skip(), None
    image.thumbnail((PREVIEW, PREVIEW))
    shown = np.asarray(image)
    visit = Visit(Path(path).name, Path(path).read_bytes(), shown, jpeg(join(shown, paddle.zeros([2, 1, 1]))))
    gray = file_of(visit.gray)
    return visit, (gray, gray), None


def example(name):
    return os.path.join(os.path.dirname(skimage.__file__), "data", name)


def color(colorizer, visit, weights, temperature):
    """Lets the network see the photograph, unless it has."""
    if visit is None or visit.weights == weights:
        return gr.skip(), gr.skip()
    with visit.file() as path:
        visit = replace(visit, weights=weights, logits=colorizer(weights).logits(path))
    return visit, gray_and_colored(visit, temperature)


def recolor(visit, temperature):
    """Another temperature: from the logits that are kept."""
    if visit is None:
        gr.Info(FORGOTTEN)
    if visit is None or visit.weights is None:
        return gr.skip(), gr.skip()
    return visit, gray_and_colored(visit, temperature)


def told(handler):
    """What would end a script is here a sentence for the visitor."""

    def handle(*inputs):
        try:
            return handler(*inputs)
        except UserError as error:
            raise gr.Error(html.escape(str(error)), print_exception=False) from error

    return handle


def gray_and_colored(visit, temperature):
    (ab,) = annealed_mean(visit.logits, load_ab_bins(), temperature)
    return file_of(visit.gray), file_of(jpeg(join(visit.shown, ab)))


def jpeg(rgb):
    with io.BytesIO() as file:
        Image.fromarray(rgb).save(file, "JPEG", quality=90, subsampling=0)
        return file.getvalue()


def file_of(data):
    """Where the page finds it, for a minute."""
    path = temporary_path("picture.jpg")
    path.write_bytes(data)
    return str(path)


def temporary_path(name):
    return Path(tempfile.mkdtemp(dir=os.environ["GRADIO_TEMP_DIR"])) / name


def full_size(colorizer, visit, weights, temperature):
    """The file to download: what test.py would write."""
    if visit is None:
        raise gr.Error(FORGOTTEN, print_exception=False)
    with visit.file() as path:
        colored = colorizer(weights)(path, temperature)
    target = temporary_path(f"{path.stem}_colored.png")
    save(colored, target)
    return str(target)


# -------------------------------------------------------------------------------------------------
# How it looks

INTRODUCTION = """
# Colorful Image Colorization
A network looks at the **lightness** of a photograph, gray or not, and guesses its **colors**.
"""
ABOUT = f"""
**Temperature.** For every place the network says how likely each of 313 colors is. Toward 0 the likeliest one is taken:
vivid, but patchy. At 1 it is the mean of all: calm, but dull. The paper takes {TEMPERATURE}.

**What to expect.** Colors are plausible at best, never a record of what was there: the network cannot know whether a
dress was red or blue. Do not take its results for evidence of anything.

**Weights.** WEIGHTS

**Your photograph** goes to the machine that serves this page and no further. A quarter of an hour after you last
touched it, it is forgotten; nothing of it is kept.
"""
KNOWN_WEIGHTS = {
    "small": "come with the project. They have seen a hundredth of what the paper's network saw: skin, skies, wood and "
    "stone mostly look right, other things by chance, and plain surfaces may get blotches.",
    "official": "are the authors', trained on the 1.3 million photographs of ImageNet.",
}
STYLE = """
footer { display: none !important }
#examples .grid-wrap { min-height: 0; padding-top: 2.2rem; overflow: hidden }
#examples .grid-container { grid-template-columns: repeat(4, 1fr) !important; grid-auto-rows: auto !important }
#examples .gallery-item { max-height: 6rem }
#weights input { text-overflow: ellipsis }
"""
PASTE = """() => document.addEventListener("paste", (event) => {
    const input = document.querySelector("#photograph input[type=file]");
    if (!input || !event.clipboardData.files.length) return;
    input.files = event.clipboardData.files;
    input.dispatchEvent(new Event("change", { bubbles: true }));
})"""
SAVE = """(file) => {
    if (file) Object.assign(document.createElement("a"), { href: file.url, download: file.orig_name }).click();
}"""


def build(names, colorizer):
    """The page. names: of weights to choose from; colorizer: the function that gives the `Colorizer` of such a name."""

    def take_example(event: gr.SelectData):
        return take(example(EXAMPLES[event.index]))

    with gr.Blocks(title="Colorful Image Colorization", analytics_enabled=False, delete_cache=(30, 60)) as page:
        # What is to be seen
        visit = gr.State(time_to_live=FORGET)
        gr.Markdown(INTRODUCTION)
        with gr.Row(equal_height=True):
            upload = gr.File(label="Drop, paste or choose a photograph", elem_id="photograph", height=140)
            thumbnails = [open_rgb(example(name)) for name in EXAMPLES]
            for image in thumbnails:
                image.thumbnail((400, 400))
            examples = gr.Gallery(
                thumbnails,
                label="or take one of these",
                columns=4,
                object_fit="cover",
                allow_preview=False,
                buttons=[],
                elem_id="examples",
            )
        picture = gr.ImageSlider(
            show_label=False, interactive=False, max_height=620, buttons=["fullscreen"], elem_id="picture"
        )
        with gr.Row():
            temperature = gr.Slider(
                *(0.02, 1, TEMPERATURE),
                step=0.02,
                label="Temperature",
                info="toward 0 vivid, at 1 calm",
                min_width=240,
                buttons=[],
                elem_id="temperature",
            )
            choices = [(Path(name).name, name) for name in names]
            weights = gr.Dropdown(
                choices, value=names[0], label="Weights", info="whose guess", min_width=240, elem_id="weights"
            )
            button = gr.Button("Download at full size", variant="primary", elem_id="save")
        file = gr.DownloadButton(visible=False)
        known = [f"*{Path(name).name}* {KNOWN_WEIGHTS.get(name, 'are a checkpoint of your own.')}" for name in names]
        gr.Markdown(ABOUT.replace("WEIGHTS", " ".join(map(html.escape, known))))

        # What happens. The network serves one visitor after another; what is quick need not wait for it.
        network = {"concurrency_id": "network", "concurrency_limit": 1, "api_visibility": "private"}
        quick = {"concurrency_limit": 4, "api_visibility": "private"}
        taken = [visit, picture, upload]
        colored = {"inputs": [visit, weights, temperature], "outputs": [visit, picture]}
        colors = told(partial(color, colorizer))
        upload.upload(take, upload, taken, show_progress_on=picture, **quick).then(colors, **colored, **network)
        examples.select(take_example, None, taken, show_progress_on=picture, **quick).then(colors, **colored, **network)
        weights.input(colors, **colored, **network)
        temperature.input(
            recolor, [visit, temperature], [visit, picture], trigger_mode="always_last", show_progress="hidden", **quick
        )
        whole = told(partial(full_size, colorizer))
        made = button.click(whole, colored["inputs"], file, show_progress_on=button, **network)
        made.success(None, file, js=SAVE)
    return page


# -------------------------------------------------------------------------------------------------


def parse_args(argv=None):
    parser = Parser(description="A page that colors photographs.")
    add = parser.add_argument_group("where").add_argument
    add("--host", default="127.0.0.1", help="address to serve at; 0.0.0.0: every one that this machine has")
    add("--port", type=whole(1, 65535), default=7860, help="port to serve at")
    add = parser.add_argument_group("weights to choose from").add_argument
    add("--model_path", default="./model", help="folder of the checkpoints")
    add("--load_model", metavar="NAME", help="the one to begin with, as in test.py")
    return parser.parse_args(argv)


def main(args):
    # Setup
    if gr is None:
        raise UserError("the page needs Gradio and Python 3.10: pip install -r requirements-app.txt")
    use_all_cores()
    return_freed_memory()
    logging.getLogger("httpx").setLevel(logging.WARNING)  # Gradio's look at its own page

    # The weights, and the network of the first
    first = args.load_model or default_name(Path(args.model_path))
    names = list(dict.fromkeys([first, *checkpoint_names(Path(args.model_path)), "small"]))
    colorizer = lru_cache(LOADED)(partial(Colorizer, model_path=args.model_path))
    colorizer(first)

    # Serve until told to stop
    with tempfile.TemporaryDirectory() as folder:  # of uploads and of what is shown; each file for a minute or two
        os.environ["GRADIO_TEMP_DIR"] = folder
        page = build(names, colorizer).queue(max_size=MAX_WAITING)
        serve(page, args.host, args.port)
        print(f"http://{args.host}:{args.port}: open it in a browser; Ctrl-C ends it", flush=True)
        try:
            threading.Event().wait()
        finally:
            page.close(verbose=False)


def serve(page, host, port):
    font = [gr.themes.LocalFont("Source Sans Pro", weights=(400, 700)), "system-ui", "sans-serif"]
    look = {"theme": gr.themes.Default(primary_hue="blue", font=font), "css": STYLE, "js": PASTE}
    limits = {"max_file_size": f"{MAX_MEGABYTES}mb", "state_session_capacity": MAX_VISITORS}
    without = {"share": False, "footer_links": [], "run_history": False, "enable_monitoring": False, "ssr_mode": False}
    try:
        page.launch(
            server_name=host, server_port=port, prevent_thread_lock=True, quiet=True, **look, **limits, **without
        )
    except (OSError, ValueError) as error:
        raise UserError(f"http://{host}:{port}: cannot be served ({str(error)})") from error


if __name__ == "__main__":
    sys.exit(run_script(main, parse_args))
