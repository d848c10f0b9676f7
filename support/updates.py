"""What is said about a GRPO update: the check of the first, a line of metrics, groups as text."""

import json
import os

import torch
from tqdm import tqdm

from rewards import extract_answer
from show import group_text
from support.clock import lap
from support.errors import DataError, naming
from support.optimizer import Evidence
from support.ranks import RANK, mean_over_ranks, rank_file, sum_over_ranks

# How far two passes over the same tokens may differ in log-probability, mean over the tokens of the
# first update, before they count as two different models. By rounding alone bf16 differs by 0.013
# (published shape, random weights, H200) to 0.025; another model differs by 1 and more.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 0.05, torch.bfloat16: 0.2}
# Metrics on the progress bar.
SHOWN = ("reward_accuracy", "reward_format", "kl", "completion_length", "tokens_per_second")


def mean_gap(a, b, mask):
    """Mean |a - b| over the mask's tokens on all ranks; those that are NaN on one side are left
    out.

    NaN if none is left."""
    gaps = (a - b).cpu()[mask].abs()
    known = ~gaps.isnan()
    sums = {"gap": gaps[known].sum().item(), "tokens": int(known.sum())}
    sums = sum_over_ranks(sums)
    return sums["gap"] / sums["tokens"] if sums["tokens"] else float("nan")


def check_first_update(rollout, dtype):
    """Before the policy has moved, rollout, scoring and reference must agree, on average over the
    tokens.

    NaNs are not looked at: the optimizer's step finds them, and tells what led to them."""
    gaps = {"scoring": rollout.old_logps, "reference": rollout.ref_logps}
    for name, logps in gaps.items():
        if logps is None:
            continue
        gap = mean_gap(logps, rollout.sampled_logps, rollout.mask)
        if gap > TOLERANCE[dtype]:
            raise RuntimeError(
                f"the first update's log-probabilities of rollout and {name} differ by {gap:.2e} "
                f"per token on average (tolerance for {dtype}: {TOLERANCE[dtype]}): they are not "
                "the same model"
            )


def evidence(update, rollout, loss):
    """What an optimizer step of this rollout rests on."""
    logps = rollout.sampled_logps.cpu()[rollout.mask]
    return Evidence(
        number=update,
        must_be_finite={"sampled log-probabilities": logps, "loss": loss},
        story={
            "update": update,
            "prompts": rollout.batch.examples,
            "completions": rollout.texts,
            "rewards": {name: values.tolist() for name, values in rollout.rewards.items()},
        },
    )


def log_line(update, rollout, step_metrics):
    """One line of metrics.jsonl, about the whole update, on all ranks.

    step_metrics: of each of the rollout's optimizer steps; they are averaged."""
    rewards, lengths = rollout.rewards, rollout.mask.sum(-1)  # (B, G) each
    reward = sum(rewards.values())
    mean_logps = (rollout.sampled_logps.cpu() * rollout.mask).sum(-1) / lengths
    per_completion = {"reward": reward}
    per_completion |= {f"reward_{name}": values for name, values in rewards.items()}
    per_completion |= {
        "entropy": -mean_logps,  # an estimate, by the samples themselves
        "completion_length": lengths,
        "truncated": ~rollout.ended,
        "zero_spread": (reward == reward[:, :1]).all(dim=1),
    }
    means = {name: values.float().mean().item() for name, values in per_completion.items()}
    means = mean_over_ranks(means, len(rollout.batch))
    steps = len(step_metrics)
    averages = {name: sum(m[name] for m in step_metrics) / steps for name in step_metrics[0]}
    # Of the first step alone: later ones see completions that an earlier policy sampled, and there
    # the estimate is biased, by a single rare token as much as to 5 nats. None: not 0 but unknown.
    averages["kl"] = None if rollout.ref_logps is None else step_metrics[0]["kl"]
    mismatch = mean_gap(rollout.old_logps, rollout.sampled_logps, rollout.mask)
    line = {"update": update, **means, **averages, "mismatch": mismatch, **lap()}
    tokens = sum_over_ranks({"tokens": int(lengths.sum())})["tokens"]
    line["tokens_per_second"] = tokens / line["seconds"]
    if torch.cuda.is_initialized():
        line["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return line


def telling_group(rollout):
    """The number of the group that teaches most: the one whose rewards differ most."""
    return int(sum(rollout.rewards.values()).std(dim=1).argmax())


def show_group(update, rollout):
    """Print the telling group: its best and its worst completion."""
    b = telling_group(rollout)
    rewards = {name: values[b] for name, values in rollout.rewards.items()}
    example, texts = rollout.batch.examples[b], rollout.texts[b]
    tqdm.write(group_text(update, example, texts, rewards, rollout.advantages[b]))


def group_facts(update, rollout, b):
    """Group b of an update, JSON-able."""
    example = rollout.batch.examples[b]
    return {
        "update": update,
        "video": str(example.video),
        "label": extract_answer(example.answer),
        "completions": rollout.texts[b],
        "tokens": rollout.mask[b].sum(-1).tolist(),
        "rewards": {name: values[b].tolist() for name, values in rollout.rewards.items()},
        "advantages": rollout.advantages[b].tolist(),
    }


def token_facts(rollout, b, tokenizer):
    """Group b token by token: each one's text, and its log-probability under policy and reference
    (None without one)."""
    example, mask = rollout.batch.examples[b], rollout.mask[b]
    logps, sampled = rollout.old_logps[b].cpu(), rollout.sampled_logps[b].cpu()
    logps = torch.where(logps.isnan(), sampled, logps)  # what taught nothing was not scored

    def rows(values):  # (G, C) -> G lists, of the tokens that count
        return [row[counts].tolist() for row, counts in zip(values, mask)]

    def rounded(values):
        return [[round(number, 5) for number in row] for row in rows(values)]

    def text(token):
        return tokenizer.tokenizer.decode([token], skip_special_tokens=False)

    return {
        "question": example.question,
        "modality": example.modality,
        "ended": rollout.ended[b].tolist(),
        "pieces": [[text(token) for token in row] for row in rows(rollout.ids[b])],
        "logps": rounded(logps),
        "ref_logps": None if rollout.ref_logps is None else rounded(rollout.ref_logps[b].cpu()),
    }


class CompletionLog:
    """completions.jsonl in a run's folder: a line per group.

    Of the first, the middle and the last update the telling group, token by token, which show.py
    makes a page of. With --log-completions all groups of every update; then each rank has its own
    file, otherwise rank 0's groups are enough."""

    def __init__(self, run, tokenizer):
        """What a resumed run will do again is cut off."""
        self.config, self.tokenizer = run.config, tokenizer
        self.path = rank_file(run.folder / "completions.jsonl")
        if self.path.exists():
            with naming(self.path):
                self._cut_off_after(run.step)

    def _cut_off_after(self, update):
        kept = 0
        for line in self.path.read_bytes().splitlines(keepends=True):
            try:
                whole = line.endswith(b"\n") and json.loads(line)["update"] <= update
            except (ValueError, TypeError, KeyError) as error:
                raise DataError(
                    f"{self.path}: is not as this run wrote it ({error}); put it back, or delete it"
                ) from None
            if not whole:
                break
            kept += len(line)
        os.truncate(self.path, kept)

    def add(self, update, rollout):
        moments = (1, (self.config.updates + 1) // 2, self.config.updates)
        telling = telling_group(rollout) if RANK == 0 and update in moments else None
        lines = []
        for b in range(len(rollout.batch)):
            if b == telling or self.config.log_completions:
                group = group_facts(update, rollout, b)
                group |= token_facts(rollout, b, self.tokenizer) if b == telling else {}
                lines.append(json.dumps(group, ensure_ascii=False) + "\n")
        if lines:
            with naming(self.path), open(self.path, "a", encoding="utf-8") as file:
                file.write("".join(lines))
