"""What is said about a GRPO update: the check of the first, a line of metrics, groups as text."""

import json

import torch
from tqdm import tqdm

from rewards import extract_answer
from show import group_text
from support.clock import lap
from support.errors import naming
from support.optimizer import Evidence
from support.ranks import mean_over_ranks, rank_file, sum_over_ranks

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


def show_group(update, rollout):
    """Print the group that teaches most: its best and its worst completion."""
    b = int(sum(rollout.rewards.values()).std(dim=1).argmax())
    rewards = {name: values[b] for name, values in rollout.rewards.items()}
    example, texts = rollout.batch.examples[b], rollout.texts[b]
    tqdm.write(group_text(update, example, texts, rewards, rollout.advantages[b]))


class CompletionLog:
    """completions.jsonl in a run's folder: a line per group of every update. Each rank has its
    own file."""

    def __init__(self, run):
        """What a resumed run will do again is cut off."""
        self.path = rank_file(run.folder / "completions.jsonl")
        with naming(self.path):
            self.path.touch()
            lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
            whole = [line for line in lines if line.endswith("\n")]
            kept = [line for line in whole if json.loads(line)["update"] <= run.step]
            self.path.write_text("".join(kept), encoding="utf-8")

    def add(self, update, rollout):
        lines = []
        for b, (example, texts) in enumerate(zip(rollout.batch.examples, rollout.texts)):
            group = {
                "update": update,
                "video": str(example.video),
                "label": extract_answer(example.answer),
                "completions": texts,
                "tokens": rollout.mask[b].sum(-1).tolist(),
                "rewards": {name: values[b].tolist() for name, values in rollout.rewards.items()},
                "advantages": rollout.advantages[b].tolist(),
            }
            lines.append(json.dumps(group, ensure_ascii=False) + "\n")
        with naming(self.path), open(self.path, "a", encoding="utf-8") as file:
            file.write("".join(lines))
