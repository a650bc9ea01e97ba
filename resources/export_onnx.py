"""Writes a network with its annealed mean as one ONNX file, to color where there is no Paddle.

    pip install paddle2onnx                                  once; it needs Paddle 3
    python resources/export_onnx.py --load_model small       writes small.onnx

Inputs are `lightness`, float32 [N, 1, H, W] of L - 50, H and W multiples of 8, and `temperature`, float32 [1]; the
output is `ab`, float32 [N, 2, H/4, W/4]. docs/coloring.md shows how to color a photograph with it. The last line says
what was written, and at which short side the network is at its best:

    small.onnx: 129 MB, for photographs with a short side of 96 pixels
"""

import os
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from support import inference
from support.cli import Parser, UserError, printable, run_script
from support.files import atomic_path

import paddle

from colorizer import NetworkToAb
from pretrained import best_load_size, find_weights, load_network

OPSET = 13  # of 2021: whatever runs ONNX today knows it
SIDES = {"lightness": ("N", 1, "H", "W"), "ab": ("N", 2, "H/4", "W/4")}  # what a viewer shows


def parse_args(argv=None):
    parser = Parser(description="Writes a network with its annealed mean as one ONNX file.")
    parser.add_argument("--model_path", default="./model", help="folder of the checkpoints")
    parser.add_argument("--load_model", metavar="NAME", help="the one to write, as in test.py")
    parser.add_argument("--output", metavar="FILE", help="file to write (default: NAME.onnx)")
    return parser.parse_args(argv)


@contextmanager
def printed_to(path):
    """Sends to a file what is printed, also by native code."""
    kept = [os.dup(1), os.dup(2)]
    sys.stdout.flush()
    with open(path, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        sys.stdout.flush()
        for number, file in zip((1, 2), kept):
            os.dup2(file, number)
            os.close(file)


def convert(checkpoint):
    """The ONNX model of a checkpoint's network. Raises UserError when paddle2onnx cannot make it."""
    try:
        import onnx
        import paddle2onnx
    except ImportError:
        raise UserError("this needs Paddle 3 and paddle2onnx: pip install paddle2onnx") from None
    inputs = [
        paddle.static.InputSpec([None, 1, None, None], name="lightness"),
        paddle.static.InputSpec([1], name="temperature"),
    ]
    with tempfile.TemporaryDirectory() as folder:
        network = load_network(checkpoint)
        program = inference.exported(lambda: NetworkToAb(network), inputs, Path(folder) / "exported", stamp="")
        files = [str(program / f"program.{suffix}") for suffix in ("json", "pdiparams")]
        try:
            with printed_to(log := Path(folder) / "log"):
                # Its optimizer would install packages, from an index of its own.
                converted = paddle2onnx.export(*files, opset_version=OPSET, optimize_tool=None)
        except Exception as error:  # its own errors it only prints, and goes on to one that says nothing
            said = log.read_text(errors="replace").strip().splitlines() or [str(error)]
            raise UserError(f"paddle2onnx cannot convert this: {said[-1]}") from error
    return tidied(onnx.load_from_string(converted))


def tidied(model):
    """The model with ab as its one output, sides that have names, and no constants that nothing reads."""
    graph = model.graph
    ab = graph.output[0].name
    for node in graph.node:
        node.output[:] = ["ab" if name == ab else name for name in node.output]
    graph.output[0].name = "ab"
    del graph.output[1:]  # the logits
    for value in (graph.input[0], graph.output[0]):
        for dimension, side in zip(value.type.tensor_type.shape.dim, SIDES[value.name]):
            setattr(dimension, "dim_value" if isinstance(side, int) else "dim_param", side)
    return model


def main(args):
    checkpoint = find_weights(args.model_path, args.load_model)
    output = Path(args.output or f"{args.load_model or checkpoint.stem}.onnx")
    model = convert(checkpoint)
    with atomic_path(output) as temporary:
        temporary.write_bytes(model.SerializeToString())
    size = f"{output.stat().st_size / 1e6:.0f} MB"
    print(f"{printable(output)}: {size}, for photographs with a short side of {best_load_size(checkpoint)} pixels")
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main, parse_args))
