"""What GPUs need to be fast: mixed precision."""

from support.cli import note

import paddle


def on_gpu():
    return paddle.get_device().startswith("gpu")


def mixed_precision(choice):
    """The autocast arguments and the loss scaler for --amp. Without mixed precision both do nothing."""
    if choice == "auto":
        choice = "off" if not on_gpu() else "bf16" if paddle.amp.is_bfloat16_supported() else "fp16"
    if choice != "off" and not on_gpu():
        note(f"--amp {choice}: Paddle has mixed precision on GPUs only, so this run is in float32")
        choice = "off"
    dtype = "bfloat16" if choice == "bf16" else "float16"
    scaler = paddle.amp.GradScaler(enable=choice == "fp16", init_loss_scaling=1024.0)
    return {"enable": choice != "off", "dtype": dtype}, scaler
