"""A photograph in, the colored photograph out: the network, the annealed mean, and the way back to full resolution.

    from colorizer import Colorizer

    colorize = Colorizer("model/epoch_latest_model.pdparams")
    colorize("photo.jpg").save("colored.png")

Whatever colors photographs (test.py, hubconf.py, the page) comes through here.
"""

from support import inference
from support.cli import note
from support.cpu import computes_bf16
from support.files import sha256

import numpy as np
import paddle
from PIL import Image

import model
from dataset import lab_to_rgb, open_rgb, rgb_to_lightness, to_uint8
from pretrained import best_load_size, find_weights, load_network
from utils import TEMPERATURE, annealed_mean, load_ab_bins, upsample_ab

MAX_ASPECT = 8  # a longer photograph is squeezed for the network: its input, and so the memory, stays bounded
STRIP_PIXELS = 1_000_000  # converted at a time, so that a large photograph needs little more than itself


class Colorizer:
    """Colors photographs with a checkpoint.

    weights: a checkpoint's path, or its name in the folder `model_path` as test.py's --load_model takes it; None for
    the one that a user would expect there. precision: "float32"; "bf16", which is faster and changes colors slightly;
    "auto", bf16 on a CPU that has it in hardware. Raises UserError when there are no such weights or they are damaged.
    """

    def __init__(self, weights=None, model_path="./model", precision="auto"):
        self.checkpoint = find_weights(model_path, weights)
        self.load_size = best_load_size(self.checkpoint)
        self.predict, self.precision = make_predictor(self.checkpoint, precision)

    def __call__(self, photograph, temperature=TEMPERATURE, load_size=None):
        """The colored photograph, a Pillow image of the same size.

        photograph: a path, a Pillow image or uint8 [H, W, 3]; temperature > 0, of the annealed mean; load_size: its
        short side in pixels as the network sees it, None for the checkpoint's own. Raises InvalidImageError for a file
        that cannot be read.
        """
        image = opened(photograph)
        (ab,) = self.predict_ab(as_seen(image, load_size or self.load_size)[None], temperature)
        return Image.fromarray(join(np.asarray(image), ab))

    def logits(self, photograph, load_size=None):
        """What the network says of the photograph, [1, 313, h/4, w/4]: `annealed_mean` of it is ab, at any temperature.

        For who moves the temperature: the network need not run again. Arguments and errors are those of a call.
        """
        return self.predict_ab(as_seen(opened(photograph), load_size or self.load_size)[None], None)

    @paddle.no_grad()
    def predict_ab(self, rgb, temperature=TEMPERATURE):
        """uint8 [N, h, w, 3], h and w multiples of 8 -> ab [N, 2, h/4, w/4]; without a temperature the logits."""
        return self.predict(rgb_to_lightness(paddle.to_tensor(rgb).transpose([0, 3, 1, 2])) - 50, temperature)


def opened(photograph):
    """A path, a Pillow image or uint8 [H, W, 3] -> a Pillow image in RGB."""
    if isinstance(photograph, np.ndarray):
        photograph = Image.fromarray(photograph)
    return photograph.convert("RGB") if isinstance(photograph, Image.Image) else open_rgb(photograph)


def as_seen(image, load_size):
    """What the network sees of a photograph: uint8 [h, w, 3]."""
    return np.asarray(image.resize(network_size(*image.size, load_size), Image.Resampling.BILINEAR))


def network_size(width, height, short_side):
    """The photograph's size with that short side, in multiples of 8; the aspect is kept up to MAX_ASPECT."""
    scale = short_side / min(width, height)
    return tuple(max(8, round(min(side * scale, MAX_ASPECT * short_side) / 8) * 8) for side in (width, height))


# -------------------------------------------------------------------------------------------------
# The network, made fast
#
# On a CPU Paddle's inference engine runs it with oneDNN, several times faster than eager mode. It needs the network
# as an exported program, which is kept beside the checkpoint. Photographs of any size and number go through it.


def make_predictor(checkpoint, precision="auto"):
    """The function that colors with a checkpoint: lightness - 50 [N, 1, h, w], temperature -> ab [N, 2, h/4, w/4].

    With None as the temperature it returns the logits [N, 313, h/4, w/4]. Also returned: its precision, "float32" or
    "bf16"; asked for "auto" it is bf16 where a CPU computes that (on GPUs nobody has measured it).
    """
    on_cpu = paddle.get_device().startswith("cpu")
    if precision == "auto":
        precision = "bf16" if on_cpu and computes_bf16() else "float32"
    if not on_cpu:
        return eager_predictor(load_network(checkpoint), precision), precision
    if precision == "bf16" and not computes_bf16():
        note("bf16: this processor, or this version of Paddle, does not compute it: coloring in float32")
        precision = "float32"
    for choice in dict.fromkeys((precision, "float32")):
        try:
            return engine_predictor(checkpoint, choice), choice
        except Exception as error:  # whatever the engine lacks on this platform or in this version
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            note(f"Paddle's inference engine cannot be used in {choice} here ({reason}): coloring in a slower way")
    return eager_predictor(load_network(checkpoint), "float32"), "float32"


def eager_predictor(network, precision):
    network.eval()
    ab_bins = load_ab_bins()

    def predict(lightness, temperature):
        with paddle.amp.auto_cast(enable=precision == "bf16", dtype="bfloat16"):
            logits = network(lightness)
        return logits if temperature is None else annealed_mean(logits, ab_bins, temperature)

    return predict


def engine_predictor(checkpoint, precision):
    inputs = [paddle.static.InputSpec([None, 1, None, None]), paddle.static.InputSpec([1])]
    stamp = " ".join([paddle.__version__, *map(sha256, (checkpoint, model.__file__, __file__))])
    folder = inference.exported(
        lambda: NetworkToAb(load_network(checkpoint)), inputs, checkpoint.with_suffix(".exported"), stamp
    )
    run = inference.engine(folder, precision)

    def predict(lightness, temperature):
        output = 1 if temperature is None else 0
        return paddle.to_tensor(run(lightness.numpy(), np.array([temperature or TEMPERATURE]), output=output))

    predict(paddle.zeros([1, 1, 64, 64]), TEMPERATURE)  # what does not work fails here
    return predict


class NetworkToAb(paddle.nn.Layer):
    """The network with the annealed mean, as one program that gives ab and logits."""

    def __init__(self, network):
        super().__init__()
        self.network = network
        self.register_buffer("ab_bins", load_ab_bins())

    def forward(self, lightness, temperature):
        logits = self.network(lightness)
        return annealed_mean(logits, self.ab_bins, temperature), logits


# -------------------------------------------------------------------------------------------------
# Back to full resolution


def join(rgb, ab):
    """The photograph's own lightness with the ab [2, h, w] brought to its size: uint8 [H, W, 3] -> the same."""
    height, width = rgb.shape[:2]
    colored = np.empty_like(rgb)
    for top in range(0, height, rows := max(1, STRIP_PIXELS // width)):
        strip = paddle.to_tensor(rgb[top : top + rows]).transpose([2, 0, 1]).unsqueeze(0)
        strip_ab = upsample_ab(ab, height, width, top, rows).unsqueeze(0)
        lab = paddle.concat([rgb_to_lightness(strip), strip_ab], axis=1)
        colored[top : top + rows] = to_uint8(lab_to_rgb(lab))[0].transpose([1, 2, 0]).numpy()
    return colored
