"""bfloat16 arithmetic over float32 weights, where the hardware has it."""

from contextlib import nullcontext

import torch


def compute_dtype(device):
    """bfloat16 where the device has it in hardware, else float32; weights that train are
    float32."""
    fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if fast else torch.float32


def autocast(model):
    """Context for all that runs the model: arithmetic in compute_dtype over the weights as held."""
    if compute_dtype(model.device) == torch.bfloat16:
        return torch.autocast("cuda", torch.bfloat16)
    return nullcontext()
