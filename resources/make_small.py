"""Convert trained weights to the bundled weights, `epoch_small_model.safetensors`.

    python resources/make_small.py cic_small.safetensors

Three changes are made. Logit adjustment: STRENGTH times the log of each bin's rebalancing weight w is subtracted from
the bias of the last layer, so that a network trained with w predicts as if trained with w^(1 - STRENGTH); this leaves
fewer patches of rare colors. The weights of convolutions are rounded to int8 with per-channel scales. The file's
metadata contains the shorter side at which the network works best.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from support.cli import Parser, run_script
from support.files import sha256

import numpy as np
from safetensors.numpy import save_file

from pretrained import SMALL, read_weights
from utils import load_prior, rebalancing_weights

STRENGTH, LOAD_SIZE = 0.4, 112  # README.md in this folder describes how they were chosen
TRANSPOSED = "conv8.0.weight"  # its output channels come second: [512, 256, 4, 4]


def round_to_8_bits(weight, channels):
    """Round a weight whose output channels lie along the axis `channels`; return int8 and float32 scales."""
    others = tuple(i for i in range(weight.ndim) if i != channels)
    scale = np.abs(weight).max(axis=others, keepdims=True) / np.float32(127)
    return np.rint(weight / scale).astype(np.int8), scale


def parse_args(argv=None):
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("source", help="the trained weights")
    return parser.parse_args(argv)


def main(args):
    state = read_weights(args.source).state
    state["conv8_313.bias"] = state["conv8_313.bias"] - STRENGTH * np.log(rebalancing_weights(load_prior()).numpy())
    rounded = {}
    for name, array in state.items():
        rounded[name] = array.astype(np.float32, order="C")
        if array.ndim == 4:
            rounded[name], rounded[f"{name}.scale"] = round_to_8_bits(rounded[name], int(name == TRANSPOSED))
    save_file(rounded, SMALL, {"load_size": str(LOAD_SIZE)})
    print(f"{SMALL}: {SMALL.stat().st_size:,} bytes, SHA-256 {sha256(SMALL)}")


if __name__ == "__main__":
    sys.exit(run_script(main, parse_args))
