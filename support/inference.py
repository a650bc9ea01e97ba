"""Predictors of any layer. On CPUs with oneDNN, Paddle Inference runs it several times faster than eager mode."""

import os
import tempfile
import threading
from contextlib import contextmanager

from support.cli import check_stop, note
from support.cpu import available_cores, computes_bf16
from support.gpu import autocast, half_types

import paddle
from paddle import inference, nn
from paddle.base import framework


def make_predictor(load_layer, shape, precision="auto"):
    """Return a function that runs a layer without gradients, and its precision.

    Args:
        load_layer (Callable): Returns the layer.
        shape (list[int]): Shape of its input, with None for sizes that vary.
        precision (str): "float32"; "bf16"; or "auto", which is bf16 on CPUs that compute it in hardware.

    Returns:
        (Callable, str): The layer as a function, which takes and returns a float32 tensor, and "float32" or "bf16".

    Raises:
        ValueError: If the precision is a different one.
    """
    if precision not in ("auto", "float32", "bf16"):
        raise ValueError(f"precision must be auto, float32 or bf16, not {precision!r:.80}")
    on_cpu = paddle.get_device() == "cpu"
    has_bf16 = computes_bf16() if on_cpu else "bf16" in half_types()
    if precision == "auto":
        precision = "bf16" if on_cpu and has_bf16 else "float32"
    if precision == "bf16" and not has_bf16:
        note("bf16: not supported by this processor, GPU or version of Paddle; computing in float32")
        precision = "float32"
    layer = load_layer()
    if not on_cpu:
        return eager_predictor(layer, precision), precision
    if paddle.base.core.is_compiled_with_mkldnn():  # otherwise the engine is no faster than eager mode
        try:
            predict = engine_predictor(layer, shape, precision)
            check_stop()
            return predict, precision
        except Exception as error:  # the engine raises many kinds
            check_stop()
            reason = str(error).strip().partition("\n")[0]
            note(f"Paddle Inference cannot be used in {precision} ({reason}); computing in a slower way, in float32")
            layer = load_layer()
    return eager_predictor(layer, "float32"), "float32"


def eager_predictor(layer, precision):
    """Return a layer as a function that runs it operator by operator, on any device."""
    layer.eval()

    @paddle.no_grad()
    def predict(x):
        with paddle.amp.auto_cast(**autocast(precision)):
            return layer(x).astype("float32")

    return predict


def engine_predictor(layer, shape, precision):
    """Return a layer as a function that runs it in Paddle Inference on the CPU. The layer must not be used afterwards.

    The function may be called from several threads. "bf16" computes in bfloat16 where the processor and Paddle (3.x)
    support it. Raises any error of the engine on this platform or in this version of Paddle. It is not run here, as
    a run prepares the engine for inputs of one size only.
    """
    with temporary_folder() as folder:
        export(layer, [paddle.static.InputSpec(shape)], folder)
        program = "json" if os.path.exists(os.path.join(folder, "program.json")) else "pdmodel"  # Paddle 3, Paddle 2
        config = inference.Config(*(os.path.join(folder, f"program.{suffix}") for suffix in (program, "pdiparams")))
        config.disable_glog_info()
        config.set_cpu_math_library_num_threads(available_cores())
        config.enable_mkldnn()
        config.set_mkldnn_cache_capacity(1)  # otherwise each new size keeps about 120 MB
        if precision == "bf16":
            config.enable_mkldnn_bfloat16()
        predictor = inference.create_predictor(config)
    source = predictor.get_input_handle(predictor.get_input_names()[0])
    result = predictor.get_output_handle(predictor.get_output_names()[0])

    def run(x):
        with LOCK:
            source.reshape(x.shape)
            source.copy_from_cpu(x.numpy())
            predictor.run()
            return paddle.to_tensor(result.copy_to_cpu())

    return run


def temporary_folder():
    """Return a temporary folder that Paddle can write to, as a context manager.

    On Windows Paddle writes only to paths that are ASCII. PUBLIC names such a folder; other systems do not set it.
    """
    return tempfile.TemporaryDirectory(dir=None if tempfile.gettempdir().isascii() else os.environ.get("PUBLIC"))


def export(layer, inputs, folder):
    """Export a layer, with its batch norm folded in place, as a program in a folder.

    Args:
        layer (Layer): The layer.
        inputs (list[InputSpec]): Shapes of its inputs.
        folder (str): An existing folder.

    Raises:
        OSError: If the disk is full.
    """
    layer.eval()
    fold_batch_norm(layer)
    paddle.jit.not_to_static(type(layer).forward)  # without control flow: its source need not be converted, 0.3 s
    layer = paddle.jit.to_static(layer, input_spec=inputs, full_graph=True)
    with static_mode_of_this_thread():
        paddle.jit.save(layer, os.path.join(folder, "program"))
    size = sum(tensor.size * tensor.element_size() for tensor in layer.state_dict().values())
    if os.path.getsize(os.path.join(folder, "program.pdiparams")) < size:  # Paddle does not notice it
        raise OSError(f"the disk of {folder} is full")


# Held while a layer is exported, as Paddle requires, and while an engine runs.
LOCK = threading.RLock()
if hasattr(os, "register_at_fork"):  # in a copy of the process, a thread that held it would not release it
    os.register_at_fork(before=LOCK.acquire, after_in_parent=LOCK.release, after_in_child=LOCK.release)


@contextmanager
def static_mode_of_this_thread():
    """Keep Paddle's static mode, in which `paddle.jit.save` works, from other threads.

    Each thread has its mode. But Paddle also sets the mode with which threads begin, so one that uses Paddle for the
    first time meanwhile would stay in static mode for good.
    """
    this_thread, modes = threading.get_ident(), framework.GlobalThreadLocal

    def set_mode(self, name, value):
        if name == "_dygraph_tracer_" and threading.get_ident() == this_thread:
            paddle.base.core._switch_tracer(value)
        self.__dict__[name] = value

    with LOCK:
        original, modes.__setattr__ = modes.__setattr__, set_mode
        try:
            yield
        finally:
            modes.__setattr__ = original


class Affine(nn.Layer):
    """Batch norm with fixed statistics: x [N, C, H, W] * scale + offset."""

    def __init__(self, norm):
        super().__init__()
        scale = norm.weight / (norm._variance + norm._epsilon).sqrt()
        self.register_buffer("scale", scale.reshape([1, -1, 1, 1]))
        self.register_buffer("offset", (norm.bias - norm._mean * scale).reshape([1, -1, 1, 1]))

    def forward(self, x):
        return x * self.scale + self.offset


@paddle.no_grad()
def fold_batch_norm(layer):
    """Replace each batch norm by a product and a sum, in place.

    oneDNN's batch norm exists in float32 only: in bf16, each of them, and a transposed convolution after it, would be
    computed in float32, with a conversion before and after.
    """
    for parent in layer.sublayers(include_self=True):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.BatchNorm2D):
                setattr(parent, name, Affine(child))
