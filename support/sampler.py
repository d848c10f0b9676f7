"""Samplers as scripts use them: in the compute type, on a GPU compiled and replayed."""

from data import longest_prompt
from generate import Decoding, Sampler
from support.compiling import Replay, compile_layers, compiler_works
from support.precision import autocast
from support.ranks import WORLD


def sampler_of(omni, examples, B, G, decoding, compiled):
    """A sampler for B of the examples' prompts x G, its buffers made, on a GPU compiled."""
    model, dtype = omni.model, omni.model.compute_dtype
    compiled = compiled and compiler_works(model.device)
    # Weights that train are float32: where arithmetic is not, a copy is sampled from. And what is
    # compiled to decode is not what is compiled to score.
    same_type = model.embed_tokens.weight.dtype == dtype
    copy = None if same_type and not compiled else model.frozen_copy(dtype)
    if compiled:
        compile_layers(copy, dynamic=False)
    replay = Replay() if compiled else None
    P = longest_prompt(omni, examples)
    sampler = Sampler(model, B, G, P, decoding, copy=copy, replay=replay)
    with autocast(model):
        sampler.warm_up()
    return sampler


def make_sampler(omni, examples, config):
    """The sampler of a training run, for this rank's prompts of an update."""
    if config.compile and compiler_works(omni.model.device):
        print("compiling: a minute or two, once per run")
    decoding = Decoding(config.max_new_tokens, eos_token_id=omni.tokenizer.eos_token_ids)
    prompts = config.prompts // WORLD
    return sampler_of(omni, examples, prompts, config.group, decoding, config.compile)
