"""Convert the authors' or the earlier port's weights for `test.py`, or this project's for publication.

    python resources/convert_weights.py colorization_release_v2-9b330a0b.pth          the authors' PyTorch release
    python resources/convert_weights.py colorization_release_v2.caffemodel            the authors' Caffe release
    python resources/convert_weights.py ../port/epoch_19_model.pdparams               the earlier Paddle port
    python resources/convert_weights.py model/epoch_19_model.pdparams                 this project's, to safetensors

The format is recognized by the file's content. The second argument, ./model by default, is a model folder or the
.pdparams or .safetensors file to write. The last lines report the result and the command that uses it:

    model/epoch_official_model.pdparams: 32,240,377 values of the authors' PyTorch release
    python test.py --load_model model/epoch_official_model.pdparams --image_dir DIR
"""

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from support.checkpoints import save_checkpoint, save_safetensors
from support.cli import Parser, UserError, number, printable, run_script

import numpy as np

import pretrained


def parse_args(argv=None):
    parser = Parser(description="Convert weights of other projects for this one, or this project's to safetensors.")
    add = parser.add_argument_group("files").add_argument
    add("source", help="weights in the format of PyTorch (.pth), Caffe, Paddle (.pdparams) or safetensors")
    add("destination", nargs="?", default="./model", help="model folder, or .pdparams or .safetensors file")
    add = parser.add_argument_group("network").add_argument
    divided = "temperature by which the source's last layer is already divided, so that its own softmax has none"
    default = "1: not divided (default: 0.38 for the authors' PyTorch release, 1 for the others)"
    add("--head_temperature", type=number(1e-3, 1e3), metavar="T", help=f"{divided}; {default}")
    return parser.parse_args(argv)


def destination_path(source, destination, kind):
    """Return the file to write for a source of that kind. In a folder, its name differs from those of training runs."""
    destination = Path(destination)
    if destination.suffix in pretrained.SUFFIXES:
        return destination
    source = Path(source)
    name = match[1] if (match := re.fullmatch(pretrained.CHECKPOINT_NAME, source.name)) else source.stem
    if kind == pretrained.PORT:
        name = f"port_{name}"
    elif kind == pretrained.PYTORCH:
        name = "official"
    elif kind == pretrained.CAFFE:
        name = "norebal" if "norebal" in name else "caffe"
    to_publish = kind == pretrained.OURS and source.suffix != ".safetensors"
    return destination / f"epoch_{name}_model{'.safetensors' if to_publish else '.pdparams'}"


def main(args):
    # Read the source
    network, kind = pretrained.read_network(args.source, args.head_temperature)
    info = pretrained.checkpoint_info(args.source)

    # Write the destination
    path = destination_path(args.source, args.destination, kind)
    if path.exists() and path.samefile(args.source):
        raise UserError(f"{path}: this is the source; choose another destination")
    state = {name: tensor.numpy() for name, tensor in network.state_dict().items()}
    if path.suffix == ".safetensors":
        save_safetensors(state, path, {name: str(value) for name, value in info.items()})
    else:
        save_checkpoint({**state, **{name: np.array(value) for name, value in info.items()}}, path)

    # Report it and the command that uses it
    print(f"{printable(path)}: {sum(p.size for p in network.parameters()):,} values of {kind}")
    print(f"python test.py --load_model {printable(path)} --image_dir DIR")


if __name__ == "__main__":
    sys.exit(run_script(main, parse_args))
