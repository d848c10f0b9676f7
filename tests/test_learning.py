"""Does it learn? A small policy must go from bad to good by rewards alone."""

import runpy

import torch
from conftest import ROOT, small_llm_config

from generate import Decoding, sample
from grpo import completion_logps, completion_mask, group_advantages, grpo_loss
from model import HumanOmni
from rewards import accuracy_reward

WORDS = ["happy", "sad", "angry", "calm", "um", "<eos>"]
EOS = 5


def text_of(ids):
    """The words before EOS; a completion that does not end says nothing."""
    return " ".join(WORDS[i] for i in ids[: ids.index(EOS)]) if EOS in ids else ""


def test_grpo_learns_which_word_to_say_and_to_stop():
    """Four prompts, each with a word of its own to be said, once, and then EOS. Chance: 1 in 36."""
    torch.manual_seed(0)
    model = HumanOmni(small_llm_config(vocab_size=len(WORDS)))
    torch.nn.init.normal_(model.embed_tokens.weight, std=0.02)
    prompts = torch.randn(4, 3, 16)  # (B, P, D)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    decoding = Decoding(max_new_tokens=4, eos_token_id=EOS)
    history = []
    for update in range(120):
        ids, _ = sample(model, prompts, 16, decoding, seed=update)  # (B, G, C)
        texts = [[text_of(row) for row in group] for group in ids.tolist()]
        rewards = [[accuracy_reward(text, label) for text in g] for g, label in zip(texts, WORDS)]
        rewards = torch.tensor(rewards)
        history.append(rewards.mean().item())
        mask = completion_mask(ids, EOS)
        logps = completion_logps(model, prompts, ids, mask)
        advantages = group_advantages(rewards)
        loss, _ = grpo_loss(logps, None, None, advantages, mask, beta=0.0)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert sum(history[:5]) / 5 < 0.4, history[:5]
    assert sum(history[-5:]) / 5 > 0.8, history[-5:]


def test_the_example_learns_and_is_short():
    """grpo.py and rewards.py lifted into another project, with another kind of model."""
    path = ROOT / "examples" / "lift_grpo.py"
    history = runpy.run_path(str(path))["main"]()
    # Of 2; the format alone is 1. The mean of three cues' groups, three updates long.
    assert sum(history[:3]) / 3 < 1.5
    assert sum(history[-3:]) / 3 > 1.8
    assert len(path.read_text().splitlines()) <= 90
