"""Export a network with its annealed mean as one ONNX file, to colorize images without Paddle.

    pip install paddle2onnx                                  once; it needs Paddle 3
    python resources/export_onnx.py --load_model small       writes small.onnx

Inputs are `lightness`, float32 [N, 1, H, W] of L - 50, H and W multiples of 8, and, except for a network that predicts
ab itself, `temperature`, float32 [1]. The output is `ab`, float32 [N, 2, H/4, W/4]. resources/README.md shows how
to colorize an image with it. The last line names the file and the shorter side that the network's input should have:

    small.onnx: 129 MB, for images with a shorter side of 112 pixels
"""

import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from support import inference
from support.cli import Parser, UserError, printable, run_script
from support.files import atomic_path

import paddle

from pretrained import find_weights, read_weights
from utils import annealed_mean, load_ab_bins

OPSET = 13  # of 2021, which all current ONNX runtimes support


class NetworkToAb(paddle.nn.Layer):
    """The network with the annealed mean: lightness [N, 1, H, W], temperature [1] -> ab [N, 2, H/4, W/4]."""

    def __init__(self, network):
        super().__init__()
        self.network = network
        self.register_buffer("ab_bins", load_ab_bins())

    def forward(self, lightness, temperature):
        return annealed_mean(self.network(lightness), self.ab_bins, temperature)


def parse_args(argv=None):
    parser = Parser(description="Export a network with its annealed mean as one ONNX file.")
    parser.add_argument("--model_path", default="./model", help="folder of the checkpoints")
    parser.add_argument("--load_model", metavar="NAME", help="checkpoint to export, as in test.py")
    parser.add_argument("--output", metavar="FILE", help="file to write (default: NAME.onnx)")
    return parser.parse_args(argv)


def convert(network):
    """Return the ONNX model of a network. Raises UserError if paddle2onnx is not installed."""
    try:
        import onnx
        import paddle2onnx
    except ImportError:
        raise UserError("Paddle 3 and paddle2onnx are needed: pip install paddle2onnx") from None
    layer, shapes = network, {"lightness": [None, 1, None, None]}
    if network.head == "conv8_313":
        layer, shapes = NetworkToAb(network), {**shapes, "temperature": [1]}
    inputs = [paddle.static.InputSpec(shape, name=name) for name, shape in shapes.items()]
    with tempfile.TemporaryDirectory() as folder:
        inference.export(layer, inputs, folder)
        files = [os.path.join(folder, f"program.{suffix}") for suffix in ("json", "pdiparams")]
        # without the optimizer, which would install packages
        model = onnx.load_from_string(paddle2onnx.export(*files, opset_version=OPSET, optimize_tool=None))
    model.graph.node[-1].output[0] = model.graph.output[0].name = "ab"
    return model


def main(args):
    weights = read_weights(find_weights(args.model_path, args.load_model))
    output = Path(args.output or f"{args.load_model or weights.path.stem}.onnx")
    model = convert(weights.network())
    with atomic_path(output) as temporary:
        temporary.write_bytes(model.SerializeToString())
    megabytes = output.stat().st_size / 1e6
    print(f"{printable(output)}: {megabytes:.0f} MB, for images with a shorter side of {weights.load_size} pixels")
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main, parse_args))
