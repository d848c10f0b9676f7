"""Does it learn? A small policy must go from bad to good by rewards alone."""

import runpy

import torch
from conftest import ROOT, small_llm_config

from generate import sample
from grpo import completion_logps, completion_mask, group_advantages, grpo_loss
from model import HumanOmni
from rewards import accuracy_reward

WORDS = ["happy", "sad", "angry", "calm", "um", "<eos>"]
EOS = 5


def text_of(ids):
    """The words before EOS; a completion that does not end says nothing."""
    return " ".join(WORDS[i] for i in ids[: ids.index(EOS)]) if EOS in ids else ""


def test_grpo_learns_which_word_to_say_and_to_stop():
    """Four prompts, each with a word of its own that must be said, once, and then EOS. Chance is 1 in 36."""
    torch.manual_seed(0)
    model = HumanOmni(small_llm_config(vocab_size=len(WORDS)))
    torch.nn.init.normal_(model.embed_tokens.weight, std=0.02)
    prompts = torch.randn(4, 3, 16)  # (B, P, D)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    history = []
    for update in range(120):
        ids, _ = sample(
            model, prompts, num_samples=16, max_new_tokens=4, eos_token_id=EOS, seed=update
        )
        rewards = torch.tensor(
            [
                [accuracy_reward(text_of(row), label) for row in group]
                for group, label in zip(ids.tolist(), WORDS)
            ]
        )
        history.append(rewards.mean().item())
        advantages = group_advantages(rewards)
        for prompt, group, advantage in zip(prompts, ids, advantages):
            logps = completion_logps(model, prompt, group)
            loss, _ = grpo_loss(
                logps, None, None, advantage, completion_mask(group, EOS), beta=0.0, total=64
            )
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert sum(history[:5]) / 5 < 0.4, history[:5]
    assert sum(history[-5:]) / 5 > 0.8, history[-5:]


def test_the_example_learns_and_is_short():
    """grpo.py and rewards.py lifted into another project, with another kind of model."""
    path = ROOT / "examples" / "lift_grpo.py"
    history = runpy.run_path(str(path))["main"]()
    assert sum(history[:9]) / 9 < 1.5 and sum(history[-9:]) / 9 > 1.8  # of 2; the format alone is 1
    assert len(path.read_text().splitlines()) <= 80
