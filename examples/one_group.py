"""One group, number by number: what GRPO makes of four completions of one prompt.

    python examples/one_group.py

Completions and log-probabilities are written by hand; grpo.py and rewards.py compute the rest, in
the order of the README's six steps. A token here is a longer piece of text than a real tokenizer's.

Shapes: B = 1 prompt · G = 4 completions · C = 5 tokens
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from grpo import completion_mask, group_advantages, grpo_loss, per_token_kl
from rewards import accuracy_reward, format_reward

LABEL = "surprise"
TOKENS = ["<think>wide eyes</think>", "<answer>", "surprise", "fear", "</answer>", "<eos>"]
EOS = TOKENS.index("<eos>")

# Sampled ids (B, G, C); behind the first EOS a row is filled up with EOS. The last one is cut off.
IDS = torch.tensor([[[0, 1, 2, 4, 5], [0, 1, 3, 4, 5], [3, 5, 5, 5, 5], [0, 1, 3, 3, 3]]])
# log pi of each token (B, G, C), under the policy that sampled it and under the reference.
LOGPS = torch.tensor(
    [
        [-0.25, -0.02, -1.20, -0.01, -0.05],
        [-0.25, -0.02, -0.70, -0.01, -0.06],
        [-3.00, -0.40, 0.0, 0.0, 0.0],
        [-0.25, -0.02, -0.70, -4.00, -2.50],
    ]
)[None]
REF_LOGPS = torch.tensor(
    [
        [-0.20, -0.02, -1.50, -0.01, -0.04],
        [-0.20, -0.02, -0.60, -0.01, -0.05],
        [-3.20, -0.30, 0.0, 0.0, 0.0],
        [-0.20, -0.02, -0.60, -4.30, -2.40],
    ]
)[None]
BETA, CLIP, STEP = 0.04, 0.2, 5.0  # STEP stands for the optimizer's


def show(left, left_values, right, right_values):
    """Two tables (B, G, C) side by side, a completion a line."""
    print(f"\n    {left:<46}{right}")
    for g in range(IDS.shape[1]):
        cells = []
        for values in (left_values, right_values):
            rounded = values[0, g].round(decimals=3) + 0.0  # + 0.0: no "-0.000"
            cells.append("".join(f"{number:8.3f}" for number in rounded))
        print(f"o{g + 1}{cells[0]}      {cells[1]}")


def main():
    print(f"label: {LABEL:<51}accuracy  format  advantage")
    mask = completion_mask(IDS, EOS)  # (B, G, C): up to and including the first EOS
    sampled = [[TOKENS[i] for i in ids[counts]] for ids, counts in zip(IDS[0], mask[0])]
    texts = ["".join(word for word in words if word != "<eos>") for words in sampled]
    accuracy = torch.tensor([[accuracy_reward(text, LABEL) for text in texts]])  # (B, G)
    form = torch.tensor([[format_reward(text) for text in texts]])
    advantages = group_advantages(accuracy + form)  # (B, G)
    for g, words in enumerate(sampled):
        numbers = f"{accuracy[0, g]:8.0f}{form[0, g]:8.0f}{advantages[0, g]:+11.2f}"
        print(f"o{g + 1}  {''.join(words):<54}{numbers}")

    show("log π, policy", LOGPS, "log π, reference", REF_LOGPS)

    # The first step after the sampling: no old_logps, so the ratio is 1.
    logps = LOGPS.clone().requires_grad_()
    loss, metrics = grpo_loss(logps, None, REF_LOGPS, advantages, mask, BETA, CLIP)
    loss.backward()
    kl = per_token_kl(LOGPS, REF_LOGPS)
    show("KL", kl, "first step, ratio 1: d loss / d log π", logps.grad)
    mean = f"{advantages.mean().abs():.0f}"
    print(f"loss {loss:.5f} = -mean advantage {mean} + {BETA} · mean KL {metrics['kl']:.5f}")

    # A second step with the same completions: now the ratio is felt, and clipped.
    later = (LOGPS - STEP * logps.grad).requires_grad_()
    loss, metrics = grpo_loss(later, LOGPS, REF_LOGPS, advantages, mask, BETA, CLIP)
    loss.backward()
    ratio = torch.exp(later.detach() - LOGPS)
    show("second step: ratio π / π_old", ratio, "second step: d loss / d log π", later.grad)
    print(f"loss {loss:.5f}, clip_share {metrics['clip_share']:.2f}")


if __name__ == "__main__":
    main()
