"""The sampler of a training run."""

import torch

from data import longest_prompt
from generate import Decoding, Sampler
from support.compiling import Replay, compile_layers, compiler_works
from support.precision import autocast, compute_dtype
from support.ranks import WORLD


def make_sampler(omni, examples, config):
    """A sampler for this rank's prompts of an update, with its buffers, compiled on a GPU."""
    dtype = compute_dtype(omni.model.device)
    # In float32 the policy itself is sampled from.
    copy = None if dtype == torch.float32 else omni.model.frozen_copy(dtype)
    compiled = config.compile and compiler_works(omni.model.device)
    if compiled and copy is not None:
        compile_layers(copy, dynamic=False)
    sampler = Sampler(
        omni.model,
        config.prompts // WORLD,
        config.group,
        longest_prompt(omni, examples),
        Decoding(config.max_new_tokens, eos_token_id=omni.tokenizer.eos_token_ids),
        copy=copy,
        replay=Replay() if compiled else None,
    )
    if compiled:
        print("compiling: a minute or two, once per run")
    with autocast(omni.model):
        sampler.warm_up()
    return sampler
