"""What GPUs need to be fast, and what tells a user that theirs is not used."""

import os
import shutil

from support.cli import UserError, note

import paddle

WHEEL_2_6 = (61, 70, 75, 80, 86)  # what Paddle 2.6.2's wheel has code for, without PTX; 3.x says it itself
# Paddle's own lists of O1 leave these to their inputs, whose float32 parameters make float32 of all that follows:
# a convolution's bias, the transposed convolution and, in 2.6, batch norm in bf16 (its statistics stay float32).
HALF = {"conv2d_transpose", "elementwise_add", "batch_norm", "sync_batch_norm"}


def on_gpu():
    return paddle.get_device().startswith("gpu")


def check_gpu():
    """Says so when there is a GPU that this Paddle does not use. Raises UserError for one that it would fail on."""
    if on_gpu():
        major, minor = paddle.device.cuda.get_device_capability()
        built_for = getattr(paddle.version, "cuda_archs", lambda: WHEEL_2_6)()
        # Code for x.y runs on x.z from y on.
        if built_for and not any(int(x) // 10 == major and int(x) % 10 <= minor for x in built_for):
            name = paddle.device.cuda.get_device_name()
            raise UserError(
                f"{name} (compute capability {major}.{minor}): Paddle {paddle.__version__} has no code for it; "
                "see requirements-gpu.txt (or, for the CPU, put CUDA_VISIBLE_DEVICES= ahead of the command)"
            )
    elif shutil.which("nvidia-smi") and os.environ.get("CUDA_VISIBLE_DEVICES") != "":
        reason = "finds none" if paddle.is_compiled_with_cuda() else "is built for CPUs"
        note(f"a GPU is here, but Paddle {paddle.__version__} {reason}: on the CPU; for the GPU: requirements-gpu.txt")


def to_device(tensor):
    """A batch of a DataLoader where the work is done, without waiting for it.

    On a GPU it comes in pinned memory. An operator would copy it there too, but then wait for all that the GPU still
    has to do.
    """
    return tensor.cuda(blocking=False) if on_gpu() else tensor


def search_kernels():
    """Lets cuDNN time its ways of each convolution: worth it, as the shapes never change.

    Not beside FLAGS_cudnn_deterministic, with which it is an error.
    """
    if not paddle.get_flags("FLAGS_cudnn_deterministic")["FLAGS_cudnn_deterministic"]:
        paddle.set_flags({"FLAGS_cudnn_exhaustive_search": True})


def mixed_precision(choice):
    """The autocast arguments and the loss scaler for --amp. Without mixed precision both do nothing."""
    generation = paddle.device.cuda.get_device_capability()[0] if on_gpu() else 0
    has = {"bf16": generation >= 8, "fp16": generation >= 7}
    if choice == "auto":
        choice = next((kind for kind in has if has[kind]), "off")
    if choice != "off" and not has[choice]:
        where = "this GPU has it not" if on_gpu() else "Paddle has mixed precision on GPUs only"
        note(f"--amp {choice}: {where}, so this run is in float32")
        choice = "off"
    return autocast(choice), paddle.amp.GradScaler(enable=choice == "fp16", init_loss_scaling=1024.0)


def autocast(choice):
    """The arguments of `paddle.amp.auto_cast` for "bf16", "fp16" or anything else, which is none."""
    dtype = "bfloat16" if choice == "bf16" else "float16"
    return {"enable": choice in ("bf16", "fp16"), "dtype": dtype, "custom_white_list": HALF}
