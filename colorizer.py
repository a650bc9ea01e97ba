"""Colorize an image: the network, the annealed mean, and the way back to full resolution.

    from colorizer import Colorizer
    from support.images import save

    colorize = Colorizer("model/epoch_latest_model.pdparams")
    save(colorize("photo.jpg"), "colored.png")

test.py, hubconf.py and the web demo all colorize images with this module.
"""

from concurrent.futures import ThreadPoolExecutor
from numbers import Real
from typing import NamedTuple

from support.cpu import available_cores
from support.gpu import on_gpu
from support.images import read_image
from support.inference import make_predictor
from support.regions import geodesic_distance, region_weights

import numpy as np
import paddle
from PIL import Image

from dataset import lab_to_rgb, rgb_to_lightness, to_uint8
from pretrained import check_entry, find_weights, read_weights
from utils import STRIDE, annealed_mean, load_ab_bins, upsample_ab

INPUT_SHAPE = [None, 1, None, None]  # of the network
MAX_ASPECT = 8  # longer images are squeezed for the network, so that its memory stays bounded
REGION_SIDE = 320  # longer side in pixels of the image in which the regions of corrections are computed
STRIP_PIXELS = 2**17  # converted at a time by each core, so that a large image needs little more memory than itself


class Colorizer:
    """Colorize images with a checkpoint.

    Args:
        weights (str | Path, optional): Path of a checkpoint, or its name in `model_path` as for --load_model of
            test.py. By default the one that test.py would use.
        model_path (str | Path): Folder of the checkpoints.
        precision (str): "float32"; "bf16", which is faster and changes colors slightly; or "auto", which is bf16 on
            CPUs that compute it in hardware.

    Raises:
        UserError: If there are no such weights, or they are damaged.
    """

    def __init__(self, weights=None, model_path="./model", precision="auto"):
        read = read_weights(find_weights(model_path, weights))
        self.path, self.sha256, self.epoch, self.step = read.path, read.sha256, read.epoch, read.step
        self.load_size, self.temperature = read.load_size, read.temperature
        self.network, self.precision = make_predictor(read.network, INPUT_SHAPE, precision)

    def __call__(self, image, temperature=None, load_size=None, corrections=(), saturation=1):
        """Colorize one image.

        Args:
            image (str | Path | Image | ndarray): A file, a Pillow image, or uint8 [H, W, 3].
            temperature (float, optional): Temperature of the annealed mean, 0.001 to 1,000,000; by default the
                checkpoint's own, otherwise 0.38. It does not apply to a network that predicts ab itself.
            load_size (int, optional): Shorter side of the network's input in pixels, 1 to 4096; by default the
                checkpoint's own, otherwise 256.
            corrections (list[Correction]): Colors to use instead of the predicted ones.
            saturation (float): Factor of ab, corrected or not: 0 is gray, 1 leaves the colors as they are.

        Returns:
            Image: An RGB image of the same size. Its `info` holds the metadata that `save` writes.

        Raises:
            InvalidImageError: If the file cannot be read.
            ValueError: If an argument is out of range or has a wrong type or shape.
        """
        image = read_image(image)
        load_size = self.load_size if load_size is None else check_entry("load_size", load_size)
        (ab,) = self.predict_ab(network_input(image, load_size)[None], temperature)
        return colored(image, ab, corrections, saturation)

    def predict_ab(self, inputs, temperature=None):
        """Predict ab.

        Args:
            inputs (ndarray): uint8 [N, h, w, 3], of which only the lightness is used; h and w are multiples of 8.
            temperature (float, optional): As for a call.

        Returns:
            Tensor: float32 [N, 2, h/4, w/4].
        """
        if temperature is not None and self.temperature is None:
            raise ValueError(f"temperature: does not apply to {self.path}, whose network predicts ab itself")
        temperature = self.temperature if temperature is None else check_entry("temperature", temperature)
        return to_ab(self.predict(inputs), temperature)

    @paddle.no_grad()
    def predict(self, inputs):
        """Run the network: uint8 [N, h, w, 3] -> float32 [N, 313 or 2, h/4, w/4], logits or ab."""
        return self.network(rgb_to_lightness(paddle.to_tensor(inputs).transpose([0, 3, 1, 2])) - 50)


def to_ab(output, temperature):
    """Return the predicted ab [N, 2, h, w] for logits [N, 313, h, w], or for ab, which it is already."""
    return output if output.shape[1] == 2 else annealed_mean(output, load_ab_bins(), temperature)


def network_input(image, load_size):
    """Resize an image for the network.

    Args:
        image (Image): An RGB image.
        load_size (int): Shorter side of the result in pixels, before both sides are rounded to multiples of 8.

    Returns:
        ndarray: uint8 [h, w, 3].
    """
    return np.asarray(image.resize(network_size(*image.size, load_size), Image.Resampling.BILINEAR))


def network_size(width, height, shorter_side):
    """Return (width, height) of the network's input, multiples of 8, for an image and its shorter side there."""
    scale = shorter_side / min(width, height)
    return tuple(max(8, round(min(side * scale, MAX_ASPECT * shorter_side) / 8) * 8) for side in (width, height))


# -------------------------------------------------------------------------------------------------
# Back to full resolution


class Correction(NamedTuple):
    """A color that replaces the predicted one around a place, up to the edges there."""

    across: float  # the place, as a share of the width and of the height, in [0, 1]
    down: float
    ab: tuple  # a and b, in [-128, 128]
    reach: float  # how far the color extends, > 0: see `geodesic_distance`; without edges, 1 is the longer side


def colored(image, ab, corrections=(), saturation=1):
    """Colorize an image.

    Args:
        image (Image): An RGB image.
        ab (Tensor): Predicted ab, float32 [2, h, w].
        corrections (list[Correction]): Colors to use instead, later ones over earlier ones.
        saturation (float): Factor of ab, corrected or not: 0 is gray, 1 leaves the colors as they are.

    Returns:
        Image: An RGB image of the same size, with the same `info`.

    Raises:
        ValueError: If a correction or the saturation is out of range.
    """
    if not (isinstance(saturation, Real) and 0 <= saturation < np.inf):
        raise ValueError(f"saturation: must be finite and not negative, not {saturation!r:.40}")
    stride = STRIDE
    if corrections:
        ab, stride = correct(image, ab, corrections), 1
    result = Image.fromarray(join(np.asarray(image), saturation * ab, stride))
    result.info = image.info
    return result


def correct(image, ab, corrections):
    """Replace predicted colors.

    Args:
        image (Image): An RGB image.
        ab (Tensor): Predicted ab, float32 [2, h, w].
        corrections (list[Correction]): Colors to use instead, later ones over earlier ones.

    Returns:
        Tensor: ab at each pixel of the image reduced to a longer side of 320 pixels, float32 [2, H', W'].

    Raises:
        ValueError: If a correction is out of range.
    """
    scale = REGION_SIDE / max(image.size)
    small = image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.BILINEAR)
    gray = rgb_to_lightness(paddle.to_tensor(np.asarray(small)).transpose([2, 0, 1]).unsqueeze(0))[0, 0].numpy() / 100
    ab = upsample_ab(ab, *gray.shape).numpy()
    for across, down, color, reach in corrections:
        valid = 0 <= across <= 1 and 0 <= down <= 1 and np.abs(color).max() <= 128 and 0 < reach < np.inf
        if not valid:  # NaN is not valid, either
            raise ValueError(f"a correction is out of range: place {across}, {down}, ab {color}, reach {reach}")
        weights = region_weights(geodesic_distance(gray, across, down), reach)
        ab = ab + weights * (np.reshape(color, [2, 1, 1]) - ab)
    return paddle.to_tensor(ab.astype(np.float32))


def join(rgb, ab, stride=STRIDE):
    """Combine an image's lightness with ab, brought to its size.

    Args:
        rgb (ndarray): uint8 [H, W, 3].
        ab (Tensor): float32 [2, h, w].
        stride (int): As for `upsample_ab`.

    Returns:
        ndarray: uint8 [H, W, 3].
    """
    height, width = rgb.shape[:2]
    result, rows = np.empty_like(rgb), max(1, STRIP_PIXELS // width)

    def join_strip(top):
        strip = slice(top, top + rows)
        lightness = rgb_to_lightness(paddle.to_tensor(np.ascontiguousarray(rgb[strip].transpose(2, 0, 1)[None])))
        colors = upsample_ab(ab, height, width, top, rows, stride)
        lab = paddle.concat([lightness, colors.unsqueeze(0)], axis=1)
        result[strip] = to_uint8(lab_to_rgb(lab, keep_lightness=True))[0].transpose([1, 2, 0]).numpy()

    with ThreadPoolExecutor(1 if on_gpu() else available_cores()) as pool:
        list(pool.map(join_strip, range(0, height, rows)))
    return result
