"""A layer as an exported program, run by Paddle's inference engine: on CPUs several times faster than eager mode."""

import atexit
import shutil
import tempfile
from pathlib import Path

from support.cpu import available_cores
from support.files import remove_temporaries

import numpy as np
import paddle
from paddle import nn


def exported(make_layer, inputs, folder, stamp):
    """The folder of the exported program of `make_layer()`; made anew when the stamp in it is another one.

    inputs: a list of `paddle.static.InputSpec`. Where the folder cannot be written it is a temporary one.
    """
    if (folder / "stamp").is_file() and (folder / "stamp").read_text() == stamp:
        return folder
    layer = make_layer()
    layer.eval()
    fold_batch_norm(layer)
    program = paddle.jit.to_static(layer, input_spec=inputs, full_graph=True)
    remove_temporaries(folder.parent)
    try:
        _save(program, stamp, folder)
    except OSError:  # a folder that is only to be read, or full
        elsewhere = tempfile.mkdtemp()
        atexit.register(shutil.rmtree, elsewhere, ignore_errors=True)
        folder = Path(elsewhere) / folder.name
        _save(program, stamp, folder)
    return folder


def _save(program, stamp, folder):
    folder.mkdir(exist_ok=True)
    paddle.jit.save(program, str(folder / "program"))
    (folder / "stamp").write_text(stamp)


class Affine(nn.Layer):
    """What batch norm is once its statistics stand still: x [N, C, H, W] * scale + offset."""

    def __init__(self, norm):
        super().__init__()
        scale = norm.weight / (norm._variance + norm._epsilon).sqrt()
        self.register_buffer("scale", scale.reshape([1, -1, 1, 1]))
        self.register_buffer("offset", (norm.bias - norm._mean * scale).reshape([1, -1, 1, 1]))

    def forward(self, x):
        return x * self.scale + self.offset


@paddle.no_grad()
def fold_batch_norm(layer):
    """Puts a product and a sum in the place of each batch norm, in place.

    oneDNN's batch norm exists in float32 alone: in bf16 every one of them, and a transposed convolution after it,
    would be computed in float32, with a change of format before and behind.
    """
    for parent in layer.sublayers(include_self=True):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.BatchNorm2D):
                setattr(parent, name, Affine(child))


def engine(folder, precision="float32"):
    """The function that runs an exported program on the CPU: float32 arrays, one for each input -> one of its outputs.

    Arrays may have another shape in each call. `precision` "bf16" computes in bfloat16 where the processor and Paddle
    (3.x) have it. Raises whatever the engine lacks on this platform, or in this version of Paddle.
    """
    from paddle import inference

    program = next(path for path in folder.iterdir() if path.suffix in (".json", ".pdmodel"))  # Paddle 3, Paddle 2
    config = inference.Config(str(program), str(program.with_suffix(".pdiparams")))
    config.disable_gpu()
    config.disable_glog_info()
    config.set_cpu_math_library_num_threads(available_cores())
    config.enable_mkldnn()
    config.set_mkldnn_cache_capacity(1)  # else each new size keeps some 120 MB
    if precision == "bf16":
        config.enable_mkldnn_bfloat16()
    predictor = inference.create_predictor(config)
    handles = [predictor.get_input_handle(name) for name in predictor.get_input_names()]

    def run(*arrays, output=0):
        for handle, array in zip(handles, arrays):
            handle.reshape(array.shape)
            handle.copy_from_cpu(np.ascontiguousarray(array, np.float32))
        predictor.run()
        return predictor.get_output_handle(predictor.get_output_names()[output]).copy_to_cpu()

    return run
