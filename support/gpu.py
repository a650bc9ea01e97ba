"""GPU settings, and a message about a GPU that is not used."""

import os
import shutil

from support.cli import UserError, note

import paddle

# In Paddle's O1 lists, the inputs decide the type of these operators. Float32 parameters would turn all that follows
# into float32: a convolution's bias, the transposed convolution and, in 2.6, batch norm in bf16 (its statistics stay
# float32).
HALF = {"conv2d_transpose", "elementwise_add", "batch_norm"}


def on_gpu():
    """Return whether Paddle computes on a GPU."""
    return paddle.get_device().startswith("gpu")


def check_gpu():
    """Print a note about an unused GPU."""
    if not on_gpu() and shutil.which("nvidia-smi") and os.environ.get("CUDA_VISIBLE_DEVICES") != "":
        reason = "finds no GPU" if paddle.is_compiled_with_cuda() else "is built for CPUs"
        note(f"GPU not used: Paddle {paddle.__version__} {reason}; see requirements-gpu.txt")


def to_device(tensor):
    """Copy a batch of a DataLoader to the GPU, if there is one, without waiting for the copy.

    On a GPU, the batch is in pinned memory. An operator would copy it, too, but would first wait for all work that the
    GPU still has to do.
    """
    return tensor.cuda(blocking=False) if on_gpu() else tensor


def search_kernels():
    """Let cuDNN time its algorithms for each convolution, which pays off as shapes never change.

    It is an error together with FLAGS_cudnn_deterministic.
    """
    if not paddle.get_flags("FLAGS_cudnn_deterministic")["FLAGS_cudnn_deterministic"]:
        paddle.set_flags({"FLAGS_cudnn_exhaustive_search": True})


def half_types():
    """Return the 16-bit types that the GPU multiplies in hardware, the better one first; none on other devices."""
    generation = paddle.device.cuda.get_device_capability()[0] if on_gpu() else 0
    return [name for name, since in (("bf16", 8), ("fp16", 7)) if generation >= since]


def mixed_precision(choice):
    """Return the autocast arguments and the loss scaler for --amp. Without mixed precision, neither has an effect.

    Raises UserError if the device does not support the choice.
    """
    available = [*half_types(), "off"]
    if choice == "auto":
        choice = available[0]
    if choice not in available:
        raise UserError(f"--amp {choice}: not supported by Paddle on this device, {paddle.get_device()}")
    # The loss is a sum over positions: at a larger scale, its gradients overflow in fp16 from the first step.
    return autocast(choice), paddle.amp.GradScaler(enable=choice == "fp16", init_loss_scaling=16.0)


def autocast(choice):
    """Return the arguments of `paddle.amp.auto_cast` for "bf16" or "fp16"; for any other choice, they disable it."""
    dtype = "bfloat16" if choice == "bf16" else "float16"
    return {"enable": choice in ("bf16", "fp16"), "dtype": dtype, "custom_white_list": HALF}
