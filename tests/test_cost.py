"""What an update costs, counted and not timed: the same on every machine."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from grpo import completion_logps, token_logps
from support.optimizer import set_trainable


def flops_of(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def test_a_shared_prompt_saves_two_thirds_of_the_arithmetic(model):
    """Scoring with backward, P 240, C 48, G 8.

    The original repeats the prompt for every completion and has logits at every position."""
    set_trainable(model)
    P, C, G = 240, 48, 8
    prompt, ids = torch.randn(P, 48), torch.randint(0, 320, (G, C))

    def repeated():
        embeds = torch.cat([prompt.expand(G, -1, -1), model.embed_tokens(ids)], dim=1)
        logits = model.logits(model(embeds))[:, P - 1 : -1]
        token_logps(logits, ids).sum().backward()

    def shared():
        completion_logps(model, prompt, ids).sum().backward()

    ratio = flops_of(repeated) / flops_of(shared)
    assert ratio >= 3.0, ratio


class LargestTensor(TorchDispatchMode):
    """Number of elements of the largest tensor that any operation makes."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor):
                self.largest = max(self.largest, x.numel())
        return result


def test_logits_live_in_chunks_only(model):
    """Nothing in scoring, forward or backward, is larger than one chunk of logits.

    All logits would be three times that here."""
    set_trainable(model)
    chunk, V, G, C = 64, 320, 8, 24
    prompt, ids = torch.randn(16, 48), torch.randint(0, V, (G, C))
    with LargestTensor() as counter:
        completion_logps(model, prompt, ids, chunk=chunk).sum().backward()
    assert counter.largest == chunk * V < G * C * V


def test_gradient_checkpointing_changes_no_gradient(model):
    set_trainable(model)
    prompt, ids = torch.randn(16, 48), torch.randint(0, 320, (3, 9))
    gradients = []
    for model.gradient_checkpointing in (False, True):
        model.zero_grad()
        completion_logps(model, prompt, ids).sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 20
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(*gradients))
