"""bfloat16 arithmetic over float32 weights, where the hardware has it."""

from contextlib import nullcontext

import torch


def prepare_gpu():
    """Settings of the whole process."""
    # TF32: exact for products of bf16 numbers, such as the float32 head's.
    torch.set_float32_matmul_precision("high")
    # cuDNN's attention makes a plan for every new length, flash has one kernel for all.
    torch.backends.cuda.enable_cudnn_sdp(False)


def compute_dtype(device):
    """bfloat16 where the device has it in hardware, else float32; weights that train are
    float32."""
    fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if fast else torch.float32


def autocast(model, wanted=True):
    """Context for what runs float32 weights: arithmetic in compute_dtype.

    Not for frozen encoders, which are held in compute_dtype themselves and would only have their
    layer norms widened."""
    if wanted and compute_dtype(model.device) == torch.bfloat16:
        return torch.autocast("cuda", torch.bfloat16)
    return nullcontext()
