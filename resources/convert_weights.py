"""Converts weights that others trained, so that `test.py` can use them.

    python resources/convert_weights.py colorization_release_v2-9b330a0b.pth          the authors' PyTorch release
    python resources/convert_weights.py colorization_release_v2.caffemodel            … their Caffe release
    python resources/convert_weights.py ../port/epoch_19_model.pdparams               the earlier Paddle port
    python resources/convert_weights.py model/epoch_19_model.pdparams                 this project's, as safetensors

What the file is shows in its content. The second argument, ./model by default, is a model folder or the file to
write, .pdparams or .safetensors. The last line says what was written and how to use it:

    model/epoch_official_model.pdparams: 32,240,377 numbers of the authors' PyTorch release
    python test.py --model_path model --load_model official --image_dir DIR
"""

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from support.checkpoints import save_checkpoint, save_safetensors
from support.cli import Parser, UserError, number, printable, run_script

import pretrained


def parse_args(argv=None):
    parser = Parser(description="Converts weights that others trained to this project's.")
    add = parser.add_argument_group("files").add_argument
    add(
        "source",
        help="the authors' .pth or .caffemodel, the earlier port's or this project's .pdparams, or .safetensors",
    )
    add("destination", nargs="?", default="./model", help="model folder, or .pdparams or .safetensors file")
    add = parser.add_argument_group("network").add_argument
    add(
        "--head_temperature",
        type=number(1e-3, 1e3),
        metavar="T",
        help="temperature that the source's head has taken into its weights, so that its own softmax has none; "
        "1: it has not (default: 0.38 for the authors' PyTorch release, 1 for the others)",
    )
    return parser.parse_args(argv)


def destination_path(source, destination, kind):
    """The file to write for a source of that kind; in a folder it is named so that nothing of one's own is lost."""
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

    # Read the source, whatever it is
    network, kind = pretrained.read_network(args.source, args.head_temperature)

    # Write it
    path = destination_path(args.source, args.destination, kind)
    if path.exists() and path.samefile(args.source):
        raise UserError(f"{path}: is the source itself; name another destination")
    state = network.state_dict()
    if path.suffix == ".safetensors":
        save_safetensors({name: tensor.numpy() for name, tensor in state.items()}, path)
    else:
        save_checkpoint(state, path)

    # Say what it is and how to use it
    print(f"{printable(path)}: {sum(p.size for p in network.parameters()):,} numbers of {kind}")
    if match := re.fullmatch(pretrained.CHECKPOINT_NAME, path.name):
        print(
            f"python test.py --model_path {printable(path.parent)} --load_model {printable(match[1])} --image_dir DIR"
        )
    else:
        print("to use it, put it into test.py's --model_path as epoch_{NAME}_model" + path.suffix)


if __name__ == "__main__":
    sys.exit(run_script(main, parse_args))
