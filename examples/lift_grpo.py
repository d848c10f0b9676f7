"""grpo.py and rewards.py in another project: a language model of one GRU layer learns which emotion a cue stands for.

    python examples/lift_grpo.py

Only those two files are needed; copy them. What completion_logps asks of a model fits anything causal: here "the keys
and values of the prompt" are the GRU's state after the prompt, which the G completions then share.
"""

import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))  # not needed once the two files lie beside this one
from grpo import completion_logps, completion_mask, group_advantages, grpo_loss  # noqa: E402
from rewards import accuracy_reward, format_reward  # noqa: E402

WORDS = ["smile", "frown", "glare", "happy", "sad", "angry", "<think>", "</think>", "<answer>", "</answer>", "<eos>"]
LABELS = {"smile": "happy", "frown": "sad", "glare": "angry"}


class TinyLM(nn.Module):
    def __init__(self, width=48):
        super().__init__()
        self.embed_tokens = nn.Embedding(len(WORDS), width)
        self.gru = nn.GRU(width, width, batch_first=True)
        self.logits = nn.Linear(width, len(WORDS))

    def forward(self, embeds, past=None, return_kv=False):
        """(R, L, D) -> (R, L, D); past: the state after one prompt, shared by the R rows."""
        hidden, state = self.gru(embeds, None if past is None else past.expand(-1, len(embeds), -1).contiguous())
        return (hidden, state) if return_kv else hidden

    @torch.no_grad()
    def sample(self, prompt, G, steps):
        """(1, P, D) -> ids (G, steps)."""
        hidden, state = self(prompt, return_kv=True)
        hidden, ids = hidden[:, -1:].expand(G, -1, -1), []
        for _ in range(steps):
            ids.append(torch.multinomial(self.logits(hidden[:, -1]).softmax(-1), 1))
            hidden, state = self(self.embed_tokens(ids[-1]), state, return_kv=True)
        return torch.cat(ids, dim=1)


def text_of(ids):
    words = [WORDS[i] for i in ids.tolist()]
    return " ".join(words[:words.index("<eos>")]) if "<eos>" in words else ""


def main(updates=80, G=16, steps=8, seed=0):
    torch.manual_seed(seed)
    model = TinyLM()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    embed = lambda word: model.embed_tokens(torch.tensor([[WORDS.index(word)]]))  # noqa: E731
    for _ in range(60):  # the cold start: the format, with any word as the answer
        for cue in LABELS:
            word = WORDS[3 + int(torch.randint(3, ()))]
            target = torch.tensor([[WORDS.index(w) for w in f"<think> {cue} </think> <answer> {word} </answer> <eos>".split()]])
            (-completion_logps(model, embed(cue), target).mean() / len(LABELS)).backward()
        optimizer.step()
        optimizer.zero_grad()
    history = []
    for update in range(1, updates + 1):  # GRPO, numbered as in grpo.py; no reference, so no KL
        for cue, label in LABELS.items():
            ids = model.sample(embed(cue), G, steps)  # 1
            rewards = torch.tensor([[accuracy_reward(text_of(row), label) + format_reward(text_of(row)) for row in ids]])  # 2
            logps = completion_logps(model, embed(cue), ids)  # 3
            loss, _ = grpo_loss(logps, None, None, group_advantages(rewards), completion_mask(ids, WORDS.index("<eos>")), beta=0.0)  # 4, 6
            (loss / len(LABELS)).backward()
            history.append(rewards.mean().item())
        optimizer.step()
        optimizer.zero_grad()
        if update % 20 == 0 or update == 1:
            print(f"update {update:3}  mean reward {sum(history[-3:]) / 3:.2f} of 2   {cue} -> {text_of(ids[0])}")
    return history


if __name__ == "__main__":
    main()
