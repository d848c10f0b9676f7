"""GRPO in another project: a tiny language model learns which emotion each of three words means.

    python examples/lift_grpo.py        a few seconds

Rewards are all it gets. grpo.py and rewards.py are all it needs: copy these two files to yours.
completion_logps asks little of a model, as this GRU shows: "keys and values of the prompt" may be
its state after the prompt. B prompts · G completions each · P, C their lengths · D width
"""

import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))  # not needed beside the two files
from grpo import completion_logps, completion_mask, group_advantages, grpo_loss
from rewards import accuracy_reward, format_reward

CUES, LABELS = ["smile", "frown", "glare"], ["happy", "sad", "angry"]
WORDS = [*CUES, *LABELS, "<think>", "</think>", "<answer>", "</answer>", "<eos>"]
FORM = "<think> {} </think> <answer> {} </answer> <eos>"


class TinyLM(nn.Module):
    def __init__(self, D=48):
        super().__init__()
        self.embed_tokens = nn.Embedding(len(WORDS), D)
        self.gru = nn.GRU(D, D, batch_first=True)
        self.logits = nn.Linear(D, len(WORDS))

    def forward(self, embeds, past=None, prompt_of=None, return_kv=False):
        """(R, L, D) -> (R, L, D). past (1, B, D): of B prompts; row i follows prompt_of[i]."""
        hidden, state = self.gru(embeds, past if prompt_of is None else past[:, prompt_of])
        return (hidden, state) if return_kv else hidden

    @torch.no_grad()
    def sample(self, prompts, G, C):
        """(B, P, D) -> ids (B, G, C)."""
        hidden, state = self(prompts.repeat_interleave(G, dim=0), return_kv=True)
        ids = []
        for _ in range(C):
            ids.append(self.logits(hidden[:, -1]).softmax(-1).multinomial(1))  # (B*G, 1)
            hidden, state = self(self.embed_tokens(ids[-1]), past=state, return_kv=True)
        return torch.cat(ids, dim=1).view(-1, G, C)


def reward(ids, label):
    """1 for the format, 1 for the emotion; a completion that does not end gets neither."""
    words = [WORDS[i] for i in ids]
    text = " ".join(words[: words.index("<eos>")]) if "<eos>" in words else ""
    return format_reward(text) + accuracy_reward(text, label)


def main(updates=80, G=16, C=8, seed=0):
    torch.manual_seed(seed)
    model = TinyLM()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    cues = torch.tensor([[WORDS.index(cue)] for cue in CUES])  # (B, P): prompts of one word

    for _ in range(60):  # the cold start: it imitates the format, with any emotion as the answer
        guesses = [LABELS[i] for i in torch.randint(3, (3,))]
        words = [FORM.format(*pair).split() for pair in zip(CUES, guesses)]
        ids = torch.tensor([[[WORDS.index(word) for word in row]] for row in words])  # (B, 1, C)
        (-completion_logps(model, model.embed_tokens(cues), ids).mean()).backward()
        optimizer.step()
        optimizer.zero_grad()

    history = []
    for update in range(1, updates + 1):  # GRPO, numbered as in grpo.py; no reference (3), so no KL
        prompts = model.embed_tokens(cues)  # (B, P, D)
        ids = model.sample(prompts, G, C)  # 1. (B, G, C)
        mask = completion_mask(ids, WORDS.index("<eos>"))
        rewards = [[reward(row, label) for row in g] for g, label in zip(ids.tolist(), LABELS)]
        rewards = torch.tensor(rewards)  # 2. (B, G)
        advantages = group_advantages(rewards)  # 4. (B, G)
        logps = completion_logps(model, prompts, ids, mask)  # 5. (B, G, C)
        loss, _ = grpo_loss(logps, None, None, advantages, mask, beta=0.0)  # 6.
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append(rewards.mean().item())
        if update % 20 == 0 or update == 1:
            said = " ".join(WORDS[i] for i in ids[0, 0])
            print(f"update {update:3}  mean reward {history[-1]:.2f} of 2   smile -> {said}")
    return history


if __name__ == "__main__":
    main()
