"""A photograph in, the colored photograph out: the network, the annealed mean, and the way back to full resolution.

    from colorizer import Colorizer, save

    colorize = Colorizer("model/epoch_latest_model.pdparams")
    save(colorize("photo.jpg"), "colored.png")

Whatever colors photographs (test.py, hubconf.py, the page) comes through here.
"""

from pathlib import Path

from support import inference
from support.cli import note
from support.cpu import computes_bf16
from support.files import atomic_path, sha256
from support.gpu import autocast
from support.images import SRGB_PROFILE, open_image, to_rgb

import numpy as np
import paddle
from PIL import ExifTags, Image

import model
from dataset import lab_to_photograph, photograph_lightness, rgb_to_lightness
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
        """The colored photograph, a Pillow image of the same size, with the metadata that `save` writes.

        photograph: a path, a Pillow image or uint8 [H, W, 3]; temperature > 0, of the annealed mean; load_size: its
        short side in pixels as the network sees it, None for the checkpoint's own. Raises InvalidImageError for a file
        that cannot be read.
        """
        image = read_photograph(photograph)
        (ab,) = self.predict_ab(as_seen(image, load_size or self.load_size)[None], temperature)
        colored = Image.fromarray(join(np.asarray(image), ab))
        colored.info = image.info
        return colored

    def logits(self, photograph, load_size=None):
        """What the network says of the photograph, [1, 313, h/4, w/4]: `annealed_mean` of it is ab, at any temperature.

        For who moves the temperature: the network need not run again. Arguments and errors are those of a call.
        """
        return self.predict_ab(as_seen(read_photograph(photograph), load_size or self.load_size)[None], None)

    @paddle.no_grad()
    def predict_ab(self, rgb, temperature=TEMPERATURE):
        """uint8 [N, h, w, 3], h and w multiples of 8 -> ab [N, 2, h/4, w/4]; without a temperature the logits."""
        return self.predict(rgb_to_lightness(paddle.to_tensor(rgb).transpose([0, 3, 1, 2])) - 50, temperature)


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
        with paddle.amp.auto_cast(**autocast(precision)):
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
        strip = rgb[top : top + rows]
        strip_ab = upsample_ab(ab, height, width, top, rows).unsqueeze(0)
        colored[top : top + rows] = lab_to_photograph(paddle.concat([photograph_lightness(strip), strip_ab], axis=1))
    return colored


# -------------------------------------------------------------------------------------------------
# From files and back: what a photographer expects a result to keep

FORMATS = {  # by suffix: Pillow's settings
    "png": {"format": "PNG", "compress_level": 3},  # of 0 to 9: files 5% larger than with 6, written twice as fast
    "jpg": {"format": "JPEG", "quality": 95, "subsampling": "4:4:4"},
    "webp": {"format": "WEBP", "quality": 95},
}
LARGEST_SIDE = {"jpg": 65_500, "webp": 16_383}  # in pixels, of those that have a limit
MAX_EXIF = 65_000  # bytes; a JPEG has no place for more
KEPT_EXIF = {  # of the whole picture; others tell how the file was laid out, or what its thumbnail shows
    *("ImageDescription", "Make", "Model", "Software", "DateTime", "Artist", "HostComputer", "Copyright", "Rating"),
    *("XPTitle", "XPComment", "XPAuthor", "XPKeywords", "XPSubject"),
}


def read_photograph(photograph, least_side=None):
    """A path, a Pillow image or uint8 [H, W, 3] -> a Pillow image in sRGB, upright, its `info` what a result keeps.

    `least_side` as in `open_rgb`. Raises InvalidImageError for a file that cannot be read.
    """
    if isinstance(photograph, np.ndarray):
        photograph = Image.fromarray(photograph)
    if isinstance(photograph, Image.Image):
        image, kept = to_rgb(photograph), metadata(photograph)
    else:
        with open_image(photograph, least_side) as opened:
            image, kept = to_rgb(opened, photograph), metadata(opened)
    image = image.copy() if image is photograph else image
    image.info = kept
    return image


def metadata(image):
    """Of an image that Pillow opened: EXIF and resolution, for an upright picture in sRGB; as keywords of `save`."""
    kept = {"icc_profile": SRGB_PROFILE}
    dpi = image.info.get("dpi")
    try:
        if dpi and all(1 <= x <= 65_535 for x in dpi):
            kept["dpi"] = tuple(map(float, dpi))
        if exif := kept_exif(image.getexif(), kept.get("dpi")):
            kept["exif"] = exif
    except Exception:  # whatever damaged EXIF leads to: the image itself is whole
        pass
    return kept


def kept_exif(exif, dpi):
    """Pillow's EXIF as bytes, without what no longer holds; `dpi` (or None) besides, as WebP has no other place."""
    kept = Image.Exif()
    if dpi:
        kept[ExifTags.Base.XResolution], kept[ExifTags.Base.YResolution] = dpi
        kept[ExifTags.Base.ResolutionUnit] = 2  # inches
    for tag, value in exif.items():
        if ExifTags.TAGS.get(tag) in KEPT_EXIF:
            kept[tag] = value
    for ifd in (ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo):
        if values := dict(exif.get_ifd(ifd)):
            kept[ifd] = values
    if camera := kept.get(ExifTags.IFD.Exif):
        camera[ExifTags.Base.ColorSpace] = 1  # sRGB
        for tag in (ExifTags.Base.ExifImageWidth, ExifTags.Base.ExifImageHeight, ExifTags.IFD.Interop):
            camera.pop(tag, None)  # they may tell of another size and of Adobe RGB
    data = kept.tobytes() if kept else b""
    return data if len(data) <= MAX_EXIF else b""


def save(image, path, format=None):
    """Writes a colored photograph with what its `info` says was kept; format "png", "jpg" or "webp", else by suffix.

    Raises UserError when the file cannot be written.
    """
    kept = {key: image.info[key] for key in ("icc_profile", "dpi", "exif") if key in image.info}
    with atomic_path(path) as temporary:
        image.save(temporary, **FORMATS[format or Path(path).suffix.lower().lstrip(".")], **kept)
