"""RLVR: train an omni model with GRPO on labelled clips, as R1-Omni was trained (paper, sections 2 and 3.2).

    python train_grpo.py                                                                the toy, on a laptop
    python train_grpo.py --model DIR --data manifest.json --out runs/r1 --preset paper  any checkpoint, any manifest

Labels are all the supervision there is: the model samples G completions per clip, two rules score them (right emotion?
right format?), and what did better than its group becomes more likely. One update, numbered as in the README:

    1. sample G completions for each of B prompts     4. advantages within each group
    2. reward them                                    5. per-token KL
    3. log-probabilities under policy and reference   6. loss, backward, optimizer step

Without --preset, the flags' defaults are the toy's. Without --model, what the toy needs is made first and kept for the
next run: clips and the cold start, under runs/toy.

Writes to --out: last/ and best/ (checkpoints in the published layout; best by --val), metrics.jsonl, curves.png,
results.json; and state/ until the run is finished: stopped by whatever, the same command goes on with it. Every metric is
explained in the README.
"""

import importlib
import math
import os
import sys
import textwrap
import time
import traceback
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import matplotlib
import torch
from tqdm import tqdm

import toy
from checkpoint import Run, TrainingFlags, all_finite, input_files
from common import clips_of, compute, compute_dtype, decode, encode_clips, flag, load, parse_flags, prompts_of, read_examples, run
from data import batches
from distributed import RANK, add, add_gradients, first, mean, own, share
from errors import DataError, TrainingError
from evaluate import evaluate, score
from generate import Sampler
from grpo import completion_logps, completion_mask, group_advantages, grpo_loss, kl_in_reward
from rewards import accuracy_reward, extract_answer, format_reward
from train_sft import data_order, move_moments, set_trainable

matplotlib.use("Agg")  # draws to files; no display needed
import matplotlib.pyplot as plt  # noqa: E402

# The total reward is the sum of these (paper, eq. 5), and of those that --reward adds.
REWARDS = {"accuracy": accuracy_reward, "format": lambda completion, label: format_reward(completion)}

# How far two passes over the same tokens may differ in log-probability, mean over the tokens of the first update,
# before they count as two different models.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}

TOY_UPDATES = 100
PRESETS = {"paper": dict(save_every=100, updates=0, epochs=2.0, prompts=16, group=8, max_new_tokens=512, lr=1e-6, beta=0.04,
                         updates_per_rollout=1, clip_norm=1.0)}


@dataclass
class Config(TrainingFlags):
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
    reward: tuple = flag((), "further rewards, module:function each, with function(completion, label) -> float; the total is the sum")
    # the optimizer
    lr: float = flag(2.5e-4, "learning rate at the start; falls linearly to 0")
    beta: float = flag(0.04, "weight of the KL to the frozen starting point; 0: no reference is kept", least=0)
    clip_eps: float = flag(0.2, "PPO clip of the probability ratio, felt from the second step per rollout on")
    # variants; the defaults are the paper's
    kl: str = flag("loss", "where the KL counts: per token in the loss (k3), or summed up in the reward (k1); off: --beta 0",
                   choices=("loss", "reward"))
    std: bool = flag(True, "divide advantages by the group's standard deviation; --no-std is Dr. GRPO's")
    token_mean: bool = flag(False, "average the loss over all tokens, not over completions (DAPO)")
    clip_high: float = flag(0.0, "the clip above 1, if not --clip-eps (DAPO: 0.28)", least=0)
    mask_truncated: bool = flag(False, "completions that are cut off get no gradient (DAPO)")
    updates_per_rollout: int = flag(1, "optimizer steps per rollout", least=1)
    clip_norm: float = flag(1.0, "largest gradient norm")
    compile: bool = flag(True, "on a GPU: compile the sampling step (needs a C compiler) and replay it as a CUDA graph")
    micro_batch: int = flag(0, "completions scored at a time, to save memory; 0: the G of a prompt together", least=0)
    gradient_checkpointing: bool = flag(False, "keep less for the backward pass and compute it again: slower, smaller")
    cache_features: str = flag("", "folder that keeps the towers' output per clip (5 MB at full size), so that later epochs "
                                   "skip decoding and towers")
    # what is shown and kept
    val_every: int = flag(20, "updates between evaluations on --val, and between drawings of curves.png", least=1)
    show_every: int = flag(10, "updates between printed samples; 0: none")


def find_rewards(names):
    """REWARDS, and module:function of --reward; modules are looked for in the working directory first."""
    rewards = dict(REWARDS)
    for name in names:
        module, _, function = name.partition(":")
        sys.path.insert(0, "")
        try:
            rewards[function] = getattr(importlib.import_module(module), function)
        except (ImportError, AttributeError, ValueError) as error:
            raise DataError(f"--reward {name}: cannot be found ({error}); give module:function, with module.py in this folder") from None
        finally:
            sys.path.pop(0)
        if function in REWARDS or not callable(rewards[function]):
            raise DataError(f"--reward {name}: must be a function (completion, label) -> float with a name of its own")
    return rewards


def reward_completions(functions, texts, labels):
    """texts: B lists of G completions; labels: B -> {name: (B, G) float32}, one entry per reward function.

    A function that raises, or returns anything but one finite number, is a TrainingError that quotes the completion."""
    def reward(name, text, label):
        try:
            value = float(functions[name](text, label))
            if math.isfinite(value):
                return value
            problem = f"returned {value}"
        except Exception as error:  # whatever a foreign function may raise
            where = traceback.extract_tb(error.__traceback__)[-1]
            problem = f"failed with {type(error).__name__}: {error} ({Path(where.filename).name}, line {where.lineno})"
        raise TrainingError(f"reward {name} {problem}, where one finite number was expected, for the label {label!r} and the completion\n{text}")

    return {name: torch.tensor([[reward(name, text, label) for text in group] for group, label in zip(texts, labels)])
            for name in functions}


def assert_same_model(a, b, mask, dtype, what):
    """At the first update the policy has not moved: rollout, scoring and reference must agree on every token."""
    gap = (a - b)[mask].abs().mean()
    if gap > TOLERANCE[dtype]:  # a NaN is found later, with what led to it
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
    """One prompt, and its group's best and worst completion, as text for the terminal.

    texts: the G completions; rewards: {name: (G,)}; advantages (G,)."""
    lines = [f"\n── update {update} · {example.video} · label: {extract_answer(example.answer)}",
             *textwrap.wrap(example.question, 110, initial_indent="   asked   ", subsequent_indent="           ")]
    order = advantages.argsort(descending=True)
    for i in dict.fromkeys((int(order[0]), int(order[-1]))):
        parts = "  ".join(f"{name} {value[i].item():.3g}" for name, value in rewards.items())
        lines.append(f"   {parts}  advantage {advantages[i]:+.2f}")
        lines.append(textwrap.indent(texts[i], "           "))
    return "\n".join(lines)


def draw_curves(metrics, path):
    """The run so far as one picture, written whole: a viewer never finds half of it."""
    figure, axes = plt.subplots(2, 3, figsize=(13, 6.5))
    panels = [("reward by component", [name for name in metrics[0] if name.startswith("reward_")]), ("KL to the reference (nats per token)", ["kl"]),
              ("completion length (tokens)", ["completion_length"]), ("groups with equal rewards (share)", ["zero_spread"]),
              ("entropy (nats per token)", ["entropy"]), ("validation", ["val_war", "val_format"])]
    for axis, (title, names) in zip(axes.flat, panels):
        for name in names:
            points = [(line["update"], line[name]) for line in metrics if line.get(name) is not None]
            axis.plot(*zip(*points) if points else ([], []), marker="o" if title == "validation" else None, label=name)
        axis.set(title=title, xlabel="update")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(partial := path.with_name("partial_" + path.name), dpi=110)
    os.replace(partial, path)
    plt.close(figure)


def main(argv=None):
    config = parse_flags(Config, __doc__, argv, PRESETS)
    if not config.model:
        config.model, clips = toy.prepare(config.seed)
        config.data, config.val = config.data or (clips["train"],), config.val or (clips["validation"],)
        config.test = config.test or (clips["test"], clips["test_ood"], clips["swapped"])
    if not config.data:
        raise DataError("needs --data MANIFEST with --model")
    if config.kl == "reward" and not config.beta:
        raise DataError("--kl reward needs a --beta above 0")

    # Set-up: the policy holds float32 master weights; the reference shares the frozen towers and BERT with it.
    rewards_of = find_rewards(config.reward)
    model, tokenizer, bert = load(config)
    device, on_gpu, dtype = model.device, model.device.type == "cuda", compute_dtype(model.device)
    examples = read_examples(config.data, config)
    val = read_examples(config.val, config) if config.val else []
    tests = {Path(path).stem: read_examples([path], config) for path in config.test}
    config.updates = config.updates or math.ceil(config.epochs * len(examples) / config.prompts) or TOY_UPDATES
    run = Run(config.out, config, input_files(config))  # refuses a folder where another run is unfinished
    out = run.folder
    parameters = set_trainable(model)
    model.gradient_checkpointing = config.gradient_checkpointing
    reference = model.trainable_copy(dtype) if config.beta else None
    working_copy = model.trainable_copy(dtype) if dtype != torch.float32 else None  # sampled from; in float32 the policy itself is
    optimizer = torch.optim.AdamW(parameters.values(), lr=config.lr, weight_decay=0.0, fused=True)
    # The sampler's buffers are the largest thing of all: if they do not fit, let it be now.
    asked = {(e.question, e.modality): e for e in examples}.values()
    longest = max(model.prompt_length(tokenizer.prompt_ids(e.question, e.modality)) for e in asked)
    order = data_order(len(examples), config.updates * config.prompts / len(examples), config.seed)
    order, own_prompts = share(order, config.prompts, "--prompts")
    sampler = Sampler(model, own_prompts, config.group, longest, config.max_new_tokens, eos_token_id=tokenizer.eos_token_id,
                      copy=working_copy, compiled=on_gpu and config.compile)
    if sampler.compiled:
        print("compiling the sampling step: minutes, once per run")
    with compute(model):
        sampler.warm_up()
    run.track(parameters, optimizer)
    resting = "cpu" if config.offload_optimizer else device  # where AdamW's moments are between steps
    move_moments(optimizer, resting)
    skip_log = own(out / "skipped.txt") if config.on_bad_clip == "skip" else None

    def evaluate_on(name, examples, title):
        rows = evaluate(model, tokenizer, bert, examples, fit=config.fit, max_new_tokens=config.max_new_tokens, workers=config.workers,
                        title=title, skip_log=skip_log and own(out / f"skipped_{name}.txt"))
        return score(rows)

    def test_all(when):
        return {name: evaluate_on(name, test, f"{name}, {when}") for name, test in tests.items()}

    if "before" not in run.facts:
        run.facts |= {"before": test_all("before"), "best_war": -1.0}
        run.save()
    clips_ahead = batches(clips_of(model, examples, config.fit, config.cache_features), order, own_prompts, config.workers,
                          skip_log=skip_log, start=run.step)
    start, done_before = time.perf_counter(), len(run.metrics)
    with tqdm(total=config.updates, initial=run.step, desc="grpo", unit="update", disable=RANK > 0) as progress:
        for update in run.steps(config.updates):
            phases = Phases(device)
            clips = next(clips_ahead)
            if add({"empty": not clips})["empty"]:  # a rank's clips are all bad: all ranks leave the update out
                continue
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
                sampler.refresh()
                ids, sampled_logps = sampler(prompts, seed=config.seed * 1_000_003 + update + 1_000_000_007 * RANK)  # each rank, update and run draws its own
            C = ids.shape[-1]
            mask = completion_mask(ids.flatten(0, 1), tokenizer.eos_token_id).view(B, G, C)
            phases.end("rollout")

            # 2. Reward.
            decoded = [[decode(tokenizer, row) for row in group] for group in ids.cpu()]
            texts = [[text for text, _ in group] for group in decoded]
            rewards = reward_completions(rewards_of, texts, [extract_answer(example.answer) for example in batch])
            total = sum(rewards.values())  # (B, G), eq. 5

            # 3. Log-probabilities that stay fixed while the policy moves: of the reference, and, if the rollout serves
            #    several steps, of the policy that sampled. Prompt by prompt, G completions against one prompt (or fewer,
            #    with --micro-batch), and not beyond the longest of them.
            lengths, size = mask.sum(-1).cpu(), config.micro_batch or G
            pieces = [(b, slice(g, g + size), int(lengths[b, g:g + size].max())) for b in range(B) for g in range(0, G, size)]

            def score_piece(scored, b, rows, C):
                # The prompt is embedded anew each time: its video and audio tokens come from projectors that train.
                prompt, = prompts_of(scored, tokenizer, bert, [batch[b]], features[b])
                return completion_logps(scored, prompt, ids[b, rows, :C])  # (rows, C)

            def score_all(scored):
                logps = torch.zeros_like(sampled_logps)  # (B, G, C); 0 behind the end
                for b, rows, C in pieces:
                    logps[b, rows, :C] = score_piece(scored, b, rows, C)
                return logps

            with torch.no_grad(), compute(model):
                ref_logps = score_all(reference) if reference else None
                old_logps = score_all(model) if config.updates_per_rollout > 1 or update == 1 else None
            phases.end("score")
            if update == 1:
                assert_same_model(old_logps, sampled_logps, mask, dtype, "rollout and scoring")
                if reference:
                    assert_same_model(old_logps, ref_logps, mask, dtype, "policy and reference")
            if config.updates_per_rollout == 1:
                old_logps = None  # one step per rollout: the policy that sampled is the policy that is scored

            # 4. Advantages within each group.
            shaped = total if config.kl == "loss" else kl_in_reward(total, *(x.cpu() for x in (sampled_logps, ref_logps, mask)), config.beta)
            advantages = group_advantages(shaped, scale=config.std).to(device)  # (B, G), eq. 4

            # 5., 6. KL and loss. Gradients add up prompt by prompt; the number of completions of the whole update
            #        normalises each part, so that the sum is the update's mean.
            counted = mask
            if config.mask_truncated:
                counted = mask & torch.tensor([[ended for _, ended in group] for group in decoded], device=device)[..., None]
            total_count = max(1, add({"count": int(counted.sum()) if config.token_mean else B * G})["count"])
            beta = config.beta if config.kl == "loss" else 0.0
            lr = config.lr * (1 - (update - 1) / config.updates)
            for group in optimizer.param_groups:
                group["lr"] = lr
            line, grad_norm = dict.fromkeys(("loss", "kl", "clip_share"), 0.0), 0.0  # averages over the rollout's steps
            for _ in range(config.updates_per_rollout):
                for b, rows, C in pieces:
                    if not beta and not advantages[b, rows].any():
                        continue  # equal rewards and no KL: the gradient is exactly 0
                    with compute(model):
                        logps = score_piece(model, b, rows, C)
                    old, ref = (None if fixed is None else fixed[b, rows, :C] for fixed in (old_logps, ref_logps))
                    loss, parts = grpo_loss(logps, old, ref, advantages[b, rows], counted[b, rows, :C], beta, config.clip_eps,
                                            clip_high=config.clip_high or None, token_mean=config.token_mean, total=total_count)
                    loss.backward()
                    for name, value in {"loss": loss.detach(), "kl": parts["kl"], "clip_share": parts["clip_share"]}.items():
                        line[name] += value.item() / config.updates_per_rollout
                add_gradients(parameters.values())
                phases.end("backward")
                norm = torch.nn.utils.clip_grad_norm_(parameters.values(), config.clip_norm)
                grad_norm += norm.item() / config.updates_per_rollout
                good = all_finite({"sampled log-probabilities": sampled_logps[mask], "loss": line["loss"], "gradient norm": norm},
                                  own(out / f"nonfinite_{update:06}.json"),
                                  {"update": update, "prompts": batch, "completions": texts, "rewards": rewards}, config.skip_nonfinite)
                if good:
                    move_moments(optimizer, device)
                    optimizer.step()
                optimizer.zero_grad()
                move_moments(optimizer, resting)
                phases.end("optimizer")
                if not good:
                    break

            # Log the whole update.
            means = {"reward": total.mean().item(), **{f"reward_{name}": value.mean().item() for name, value in rewards.items()},
                     "entropy": (-(sampled_logps * mask).sum(-1) / mask.sum(-1)).mean().item(),
                     "completion_length": int(mask.sum()) / (B * G),
                     "truncated": sum(not ended for group in decoded for _, ended in group) / (B * G),
                     "zero_spread": (total == total[:, :1]).all(dim=1).float().mean().item()}
            seconds, tokens = sum(phases.seconds.values()), add({"tokens": int(mask.sum())})["tokens"]
            line = add(line) | ({} if reference else {"kl": None})  # without a reference not 0 but unknown
            line = {"update": update, **mean(means, B), **line, "grad_norm": grad_norm, "lr": lr, "steps_left_out": int(not good),
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
                if result["war"] >= run.facts["best_war"]:  # of equals the later: it has seen more
                    run.facts["best_war"] = result["war"]
                    first(lambda: model.save_pretrained(out / "best", getattr(torch, config.save_dtype)))
            run.log(line)
            if update % config.val_every == 0:
                first(lambda: draw_curves(run.metrics, out / "curves.png"))
            progress.update()
            progress.set_postfix({name: f"{value.mean():.2f}" for name, value in rewards.items()}, kl=f"{line['kl'] or 0:.3f}",
                                 len=f"{line['completion_length']:.0f}", tok_s=f"{line['tokens_per_second']:.0f}")

    first(lambda: model.save_pretrained(out / "last", getattr(torch, config.save_dtype)))
    first(lambda: draw_curves(run.metrics, out / "curves.png"))
    if (out / "best").exists():  # report the checkpoint that validation chose
        # Make room for it: no name may hold the parameters any more.
        model = reference = working_copy = sampler = optimizer = parameters = group = loss = logps = run.parameters = run.optimizer = None
        model, tokenizer, bert = load(replace(config, model=out / "best", siglip="", whisper="", bert=""))
    before, after = run.facts["before"], test_all("after")
    first(lambda: toy.write_json(out / "results.json", {"config": asdict(config), "before": before, "after": after}))
    run.finish()
    if tests:
        print(f"\n{'':10}{'':8}{'WAR':>8}{'UAR':>8}{'format':>8}{'length':>8}")
    for name in tests:
        for when, results in (("before", before), ("after", after)):
            r = results[name]
            print(f"{name:10}{when:8}{100 * r['war']:8.2f}{100 * r['uar']:8.2f}{100 * r['format']:8.1f}{r['mean_length']:8.1f}")
    print(f"\n{len(run.metrics)} updates, the last {len(run.metrics) - done_before} in {time.perf_counter() - start:.0f} s; checkpoints, "
          f"metrics.jsonl, curves.png, results.json in {out}")


if __name__ == "__main__":
    run(main, ("--gradient-checkpointing", "--micro-batch", "a smaller --max-new-tokens", "a smaller --group", "fewer --prompts", "--beta 0",
               "--offload-optimizer"))
