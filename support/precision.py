"""The type that arithmetic is done in, over weights that train in float32."""

from contextlib import nullcontext

import torch

from support.errors import DataError

DTYPES = ("auto", "bfloat16", "float16", "float32")


def prepare_gpu():
    """Settings of the whole process."""
    # TF32: exact for products of bf16 numbers, such as the float32 head's.
    torch.set_float32_matmul_precision("high")
    # cuDNN's attention makes a plan for every new length, flash has one kernel for all.
    torch.backends.cuda.enable_cudnn_sdp(False)


def compute_dtype(device, name="auto"):
    """--dtype -> the type of arithmetic; auto: bfloat16 where a GPU has it in hardware, float16 on
    older ones, float32 on a CPU."""
    on_gpu = torch.device(device).type == "cuda"
    has_bf16 = not on_gpu or torch.cuda.is_bf16_supported(including_emulation=False)
    if name == "auto":
        name = ("bfloat16" if has_bf16 else "float16") if on_gpu else "float32"
    if name == "bfloat16" and not has_bf16:
        raise DataError(f"--dtype bfloat16: {torch.cuda.get_device_name()} lacks it; try float16")
    return getattr(torch, name)


def autocast(model, wanted=True):
    """Context for the language model and what trains: arithmetic in model.compute_dtype.

    Also over copies that are held in that type, so that theirs is the policy's arithmetic. Not for
    frozen encoders, which are held in it too and would only have their layer norms widened."""
    if wanted and model.compute_dtype != torch.float32:
        return torch.autocast(model.device.type, model.compute_dtype)
    return nullcontext()
