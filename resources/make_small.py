"""Writes `epoch_small_model.safetensors`, the weights that come with the project, from those that were trained.

    python resources/make_small.py cic_small.safetensors

Three things happen to them. The logits of each bin are lowered by CALM times the log of its rebalancing weight (in
the last layer's bias): a network trained with the weights w then predicts as though w^(1 - CALM) had been its own,
which leaves fewer patches of rare colors on plain surfaces. Each output channel of a convolution is rounded to 8 bits
with a scale of its own. And the file says at which short side of a photograph the network is at its best.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from support.checkpoints import load_checkpoint, save_safetensors
from support.cli import Parser, run_script
from support.files import sha256

import numpy as np

from pretrained import SMALL
from utils import load_prior, rebalancing_weights

CALM, LOAD_SIZE = 0.2, 96  # docs/weights.md tells how they were found
TRANSPOSED = "conv8.0.weight"  # has its output channels second: [512, 256, 4, 4]


def round_to_8_bits(weight, channels):
    """A weight with its output channels along the axis `channels`: int8, and the float32 scale of each channel."""
    others = tuple(axis for axis in range(weight.ndim) if axis != channels)
    scale = np.abs(weight).max(axis=others, keepdims=True) / np.float32(127)
    return np.rint(weight / scale).astype(np.int8), scale


def parse_args(argv=None):
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("source", help="the trained weights")
    return parser.parse_args(argv)


def main(args):
    state = load_checkpoint(args.source)
    state["conv8_313.bias"] = state["conv8_313.bias"] - CALM * np.log(rebalancing_weights(load_prior()).numpy())
    rounded = {}
    for name, array in state.items():
        rounded[name] = array.astype(np.float32)
        if array.ndim == 4:
            rounded[name], rounded[f"{name}.scale"] = round_to_8_bits(rounded[name], int(name == TRANSPOSED))
    save_safetensors(rounded, SMALL, {"load_size": str(LOAD_SIZE)})
    print(f"{SMALL}: {SMALL.stat().st_size:,} bytes, SHA-256 {sha256(SMALL)}")


if __name__ == "__main__":
    sys.exit(run_script(main, parse_args))
