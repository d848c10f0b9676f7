"""RLVR: train an omni model with GRPO on labelled clips, as R1-Omni was trained (paper, sections 2 and 3.2).

    python train_grpo.py                                                                the toy, on a laptop
    python train_grpo.py --model DIR --data manifest.json --out runs/r1 --preset paper  any checkpoint, any manifest

Labels are all the supervision there is: the model samples G completions per clip, two rules score them (right emotion?
right format?), and what did better than its group becomes more likely. One update, numbered as in the README:

    1. sample G completions for each of B prompts     4. log-probabilities under policy and reference
    2. reward them                                    5. per-token KL
    3. advantages within each group                   6. loss, backward, optimizer step

Without --preset, the flags' defaults are the toy's. Without --model, what the toy needs is made first and kept for the
next run: clips and the cold start, under runs/toy.

Writes to --out: last/ and best/ (checkpoints in the published layout; best by --val), metrics.jsonl, curves.png,
results.json. Every metric is explained in the README.
"""

import gc
import json
import math
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import matplotlib
import torch
from tqdm import tqdm

import toy
from data import DataError, batches
from evaluate import (Common, clips_of, compute, compute_dtype, decode, encode_clips, evaluate, flag, load, make_room, parse_flags,
                      prompts_of, read_examples, run, score)
from generate import Sampler
from grpo import completion_logps, completion_mask, group_advantages, grpo_loss
from rewards import accuracy_reward, extract_answer, format_reward
from train_sft import data_order, set_trainable

matplotlib.use("Agg")  # draws to files; no display needed
import matplotlib.pyplot as plt  # noqa: E402

# The total reward is the sum of these (paper, eq. 5). A new one: a function (completion, label) -> float, and a line here.
REWARDS = {"accuracy": accuracy_reward, "format": lambda completion, label: format_reward(completion)}

# How far two passes over the same tokens may differ in log-probability, mean over the tokens of the first update,
# before they count as two different models.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}

TOY_UPDATES = 100
PRESETS = {"paper": dict(updates=0, epochs=2.0, prompts=16, group=8, max_new_tokens=512, lr=1e-6, beta=0.04,
                         updates_per_rollout=1, clip_norm=1.0)}


@dataclass
class Config(Common):
    val: tuple = flag((), "labelled manifests to evaluate on during training")
    test: tuple = flag((), "labelled manifests to evaluate on before and after")
    out: str = flag("runs/grpo", "where checkpoints, metrics and curves are written")
    preset: str = flag("none", "paper: the published run's epochs, batch, lengths and learning rate", choices=("none", "paper"))
    # one update = 16 prompts x 8 completions = 128 rows, sampled together
    updates: int = flag(0, f"rollouts, each followed by --updates-per-rollout optimizer steps; 0: by --epochs, or else {TOY_UPDATES}")
    epochs: float = flag(0.0, "passes over the data, instead of --updates")
    prompts: int = flag(16, "B, prompts per update", least=1)
    group: int = flag(8, "G, completions per prompt: an advantage compares a completion with its group", least=2)
    max_new_tokens: int = flag(64, "longest completion", least=1)
    # the optimizer
    lr: float = flag(2.5e-4, "learning rate at the start; falls linearly to 0")
    beta: float = flag(0.04, "weight of the KL to the frozen starting point; 0: no reference is kept")
    clip_eps: float = flag(0.2, "PPO clip of the probability ratio, felt from the second step per rollout on")
    updates_per_rollout: int = flag(1, "optimizer steps per rollout", least=1)
    clip_norm: float = flag(1.0, "largest gradient norm")
    compile: bool = flag(True, "on a GPU: compile the sampling step (needs a C compiler) and replay it as a CUDA graph")
    gradient_checkpointing: bool = flag(False, "keep less for the backward pass and compute it again: slower, smaller")
    cache_features: str = flag("", "folder that keeps the towers' output per clip (5 MB at full size), so that later epochs "
                                   "skip decoding and towers")
    # what is shown and kept
    val_every: int = flag(20, "updates between evaluations on --val", least=1)
    show_every: int = flag(10, "updates between printed samples; 0: none")
    save_dtype: str = flag("bfloat16", "of the saved weights; on a GPU what is frozen is bfloat16 already",
                           choices=("bfloat16", "float16", "float32"))


def reward_completions(texts, labels):
    """texts: B lists of G completions; labels: B -> {name: (B, G) float32}, one entry per reward function."""
    return {name: torch.tensor([[function(text, label) for text in group] for group, label in zip(texts, labels)])
            for name, function in REWARDS.items()}


def assert_same_model(a, b, mask, dtype, what):
    """At the first update the policy has not moved: rollout, scoring and reference must agree on every token."""
    gap = ((a - b).abs() * mask).sum() / mask.sum()
    if not gap <= TOLERANCE[dtype]:
        raise RuntimeError(f"the first update's log-probabilities of {what} differ by {gap:.2e} per token on average "
                           f"(tolerance for {dtype}: {TOLERANCE[dtype]}): they are not the same model")


class Phases:
    """Seconds that an update spends in each of its parts."""

    def __init__(self, device):
        self.device, self.seconds, self.start = device, {}, time.perf_counter()

    def end(self, phase):
        """What happened since the last call was `phase`; a phase that returns adds up."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()  # six times an update; otherwise the time would show up in a later phase
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self.start
        self.start = now


def show(example, texts, rewards, advantages, update):
    """One prompt's best and worst completion, as text for the terminal."""
    order = advantages.argsort()
    lines = [f"\nupdate {update} · {example.video} · label: {extract_answer(example.answer)}"]
    for i in dict.fromkeys((int(order[-1]), int(order[0]))):
        parts = "  ".join(f"{name} {value[i]:.0f}" for name, value in rewards.items())
        lines.append(f"  [{parts}  advantage {advantages[i]:+.2f}]  " + texts[i].replace("\n", "\n    "))
    return "\n".join(lines)


def draw_curves(metrics, path):
    """The run as one picture."""
    figure, axes = plt.subplots(2, 3, figsize=(13, 6.5))
    panels = [("reward by component", [f"reward_{name}" for name in REWARDS]), ("KL to the reference (nats per token)", ["kl"]),
              ("completion length (tokens)", ["completion_length"]), ("groups with equal rewards (share)", ["zero_spread"]),
              ("entropy (nats per token)", ["entropy"]), ("validation", ["val_war", "val_format"])]
    for axis, (title, names) in zip(axes.flat, panels):
        for name in names:
            points = [(line["update"], line[name]) for line in metrics if name in line]
            axis.plot(*zip(*points) if points else ([], []), marker="o" if title == "validation" else None, label=name)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("update")
        axis.grid(alpha=0.3)
        if len(names) > 1:
            axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv=None):
    config = parse_flags(Config, __doc__, argv, PRESETS)
    if not config.model:
        config.model, clips = toy.prepare(config.seed)
        config.data, config.val = config.data or (clips["train"],), config.val or (clips["validation"],)
        config.test = config.test or (clips["test"], clips["test_ood"], clips["swapped"])
    if not config.data:
        raise DataError("needs --data MANIFEST with --model")

    # Set-up: the policy holds float32 master weights; the reference shares the frozen towers and BERT with it.
    model, tokenizer, bert = load(config)
    device = model.device
    parameters = set_trainable(model)
    model.gradient_checkpointing = config.gradient_checkpointing
    on_gpu, dtype = device.type == "cuda", compute_dtype(device)
    reference = model.trainable_copy(dtype) if config.beta else None
    working_copy = model.trainable_copy(dtype) if dtype != torch.float32 else None  # sampled from; in float32 the policy itself is
    sampler = None
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=0.0, fused=True)
    examples = read_examples(config.data, config)
    val = read_examples(config.val, config) if config.val else []
    tests = {Path(path).stem: read_examples([path], config) for path in config.test}
    out = make_room(config.out)
    out.mkdir(exist_ok=True)
    skip_log = out / "skipped.txt" if config.on_bad_clip == "skip" else None

    def evaluate_on(name, examples, title):
        rows = evaluate(model, tokenizer, bert, examples, fit=config.fit, max_new_tokens=config.max_new_tokens, workers=config.workers,
                        title=title, skip_log=skip_log and out / f"skipped_{name}.txt")
        return score(rows)

    def test_all(when):
        return {name: evaluate_on(name, test, f"{name}, {when}") for name, test in tests.items()}

    before = test_all("before")
    config.updates = config.updates or math.ceil(config.epochs * len(examples) / config.prompts) or TOY_UPDATES
    order = data_order(len(examples), config.updates * config.prompts / len(examples), config.seed)
    clips_ahead = batches(clips_of(model, examples, config.fit, config.cache_features), order, config.prompts, config.workers,
                          skip_log=skip_log)
    metrics, best_war, start = [], -1.0, time.perf_counter()
    with open(out / "metrics.jsonl", "w", encoding="utf-8") as metrics_file:
        metrics_file.write(json.dumps({"config": asdict(config)}, default=str) + "\n")
        progress = tqdm(total=config.updates, desc="grpo", unit="update")
        for update in range(1, config.updates + 1):
            phases = Phases(device)
            clips = next(clips_ahead, None)
            if clips is None:  # bad clips were left out at the very end
                break
            phases.end("data")
            batch = [examples[clip["index"]] for clip in clips]
            B, G = len(batch), config.group

            # Each clip goes through the frozen towers once; policy and reference share what comes out.
            with torch.no_grad(), compute(model):
                video, audio = encode_clips(model, clips)
            features = [[None if medium is None else medium[b:b + 1] for medium in (video, audio)] for b in range(B)]
            phases.end("encode")

            # 1. Sample: B x G completions in one go.
            with torch.no_grad(), compute(model):
                prompts = prompts_of(model, tokenizer, bert, batch, (video, audio))
                longest = max(map(len, prompts))
                if sampler is None or longest > sampler.P:  # its buffers are the largest thing: made first, and once
                    sampler = None  # the old ones go before the new ones come
                    gc.collect()
                    sampler = Sampler(model, config.prompts, G, 64 * math.ceil(longest / 64), config.max_new_tokens,
                                      eos_token_id=tokenizer.eos_token_id, copy=working_copy, compiled=on_gpu and config.compile)
                    if sampler.compiled:
                        tqdm.write("compiling the sampling step: minutes, once per run")
                    sampler.warm_up()
                sampler.refresh()
                ids, sampled_logps = sampler(prompts, seed=config.seed * 1_000_003 + update)
            C = ids.shape[-1]
            mask = completion_mask(ids.flatten(0, 1), tokenizer.eos_token_id).view(B, G, C)
            phases.end("rollout")

            # 2. Reward.
            decoded = [[decode(tokenizer, row) for row in group] for group in ids.cpu()]
            texts = [[text for text, _ in group] for group in decoded]
            rewards = reward_completions(texts, [extract_answer(example.answer) for example in batch])
            total = sum(rewards.values())  # (B, G), eq. 5

            # 3. Advantages within each group.
            advantages = group_advantages(total).to(device)  # (B, G), eq. 4

            # 4. Log-probabilities that stay fixed while the policy moves: of the reference, and, if the rollout serves
            #    several steps, of the policy that sampled. Prompt by prompt: G completions against one prompt.
            #    The prompt is embedded anew each time: its video and audio tokens come from projectors that train.
            def score_group(scored, b):
                prompt, = prompts_of(scored, tokenizer, bert, [batch[b]], features[b])
                return completion_logps(scored, prompt, ids[b])  # (G, C)

            with torch.no_grad(), compute(model):
                ref_logps = [score_group(reference, b) for b in range(B)] if reference else [None] * B
                old_logps = [score_group(model, b) for b in range(B)] if config.updates_per_rollout > 1 or update == 1 else [None] * B
            phases.end("score")
            if update == 1:
                assert_same_model(torch.stack(old_logps), sampled_logps, mask, dtype, "rollout and scoring")
                if reference:
                    assert_same_model(torch.stack(old_logps), torch.stack(ref_logps), mask, dtype, "policy and reference")
            if config.updates_per_rollout == 1:
                old_logps = [None] * B  # one step per rollout: the policy that sampled is the policy that is scored

            # 5., 6. KL and loss. Gradients add up prompt by prompt; B*G, the number of completions of the whole update,
            #        normalises each part, so that the sum is the update's mean.
            lr = config.lr * (1 - (update - 1) / config.updates)
            for group in optimizer.param_groups:
                group["lr"] = lr
            line = dict.fromkeys(("loss", "kl", "clip_share", "grad_norm"), 0.0)  # averages over the rollout's steps
            for _ in range(config.updates_per_rollout):
                for b in range(B):
                    if not config.beta and not advantages[b].any():
                        continue  # equal rewards and no KL: the gradient is exactly 0
                    with compute(model):
                        logps = score_group(model, b)
                    loss, parts = grpo_loss(logps, old_logps[b], ref_logps[b], advantages[b], mask[b], config.beta,
                                            config.clip_eps, num_completions=B * G)
                    loss.backward()
                    for name, value in {"loss": loss.detach(), "kl": parts["kl"], "clip_share": parts["clip_share"]}.items():
                        line[name] += value.item() / config.updates_per_rollout
                phases.end("backward")
                norm = torch.nn.utils.clip_grad_norm_(parameters, config.clip_norm)
                line["grad_norm"] += norm.item() / config.updates_per_rollout
                optimizer.step()
                optimizer.zero_grad()
                phases.end("optimizer")

            # Log the whole update.
            seconds, tokens = sum(phases.seconds.values()), int(mask.sum())
            line = {"update": update, "reward": total.mean().item(),
                    **{f"reward_{name}": value.mean().item() for name, value in rewards.items()},
                    **line, "entropy": (-(sampled_logps * mask).sum(-1) / mask.sum(-1)).mean().item(),
                    "completion_length": tokens / (B * G),
                    "truncated": sum(not ended for group in decoded for _, ended in group) / (B * G),
                    "zero_spread": (total.std(dim=1) == 0).float().mean().item(), "lr": lr,
                    "seconds": seconds, **{f"seconds_{phase}": value for phase, value in phases.seconds.items()},
                    "tokens_per_second": tokens / seconds}
            if on_gpu:
                line["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
            if config.show_every and (update % config.show_every == 0 or update == 1):
                b = int(total.std(dim=1).argmax())  # the group that teaches most
                tqdm.write(show(batch[b], texts[b], {n: r[b] for n, r in rewards.items()}, advantages[b], update))
            if val and (update % config.val_every == 0 or update == config.updates):
                result = evaluate_on("validation", val, "validation")
                line.update(val_war=result["war"], val_uar=result["uar"], val_format=result["format"])
                tqdm.write(f"\nupdate {update} · validation WAR {100 * result['war']:.1f}  format {100 * result['format']:.1f} %")
                if result["war"] >= best_war:  # of equals the later: it has seen more
                    best_war = result["war"]
                    model.save_pretrained(out / "best", getattr(torch, config.save_dtype))
            metrics.append(line)
            metrics_file.write(json.dumps(line) + "\n")
            metrics_file.flush()
            progress.update()
            progress.set_postfix({name: f"{value.mean():.2f}" for name, value in rewards.items()}, kl=f"{line['kl']:.3f}",
                                 len=f"{line['completion_length']:.0f}", tok_s=f"{line['tokens_per_second']:.0f}")
        progress.close()

    model.save_pretrained(out / "last", getattr(torch, config.save_dtype))
    draw_curves(metrics, out / "curves.png")
    if (out / "best").exists():  # report the checkpoint that validation chose
        model = reference = working_copy = sampler = optimizer = parameters = None  # make room for it
        model, tokenizer, bert = load(replace(config, model=out / "best", siglip="", whisper="", bert=""))
    after = test_all("after")
    results = {"config": asdict(config), "before": before, "after": after}
    (out / "results.json").write_text(json.dumps(results, indent=1, default=str) + "\n")
    if tests:
        print(f"\n{'':10}{'':8}{'WAR':>8}{'UAR':>8}{'format':>8}{'length':>8}")
    for name in tests:
        for when, results in (("before", before), ("after", after)):
            r = results[name]
            print(f"{name:10}{when:8}{100 * r['war']:8.2f}{100 * r['uar']:8.2f}{100 * r['format']:8.1f}{r['mean_length']:8.1f}")
    print(f"\n{len(metrics)} updates in {time.perf_counter() - start:.0f} s; checkpoints, metrics.jsonl, curves.png, results.json in {out}")


if __name__ == "__main__":
    run(main)
