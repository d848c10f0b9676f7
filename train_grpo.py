"""RLVR: train an omni model with GRPO on labelled clips, as R1-Omni was (paper, sections 2, 3.2).

    python train_grpo.py                                   the toy, on a laptop
    python train_grpo.py --model DIR --data manifest.json --out runs/r1 --preset paper

Labels are all the supervision there is: the model samples G completions per clip, two rules reward
them (right emotion? right format?), and what did better than its group becomes more likely. The
loop at the end of this file is one update, numbered as in the README:

    1. sample G completions of each of B prompts
    2. reward them
    3. score them under the reference               log pi_ref stays fixed
    4. advantages within each group
    5. score them under the policy, with gradient   the KL compares it with the reference
    6. loss, backward, optimizer step

For GRPO alone, without clips, checkpoints and flags, read examples/lift_grpo.py first.

Without --preset, the flags' defaults are the toy's. Without --model, what the toy needs is made
first and kept for the next run: clips and the cold start, under runs/toy.

Writes to --out: last/ and best/ (checkpoints in the published layout; best by --val),
metrics.jsonl, curves.png, results.json, completions.jsonl (`python show.py run` makes a page of
them); and state/ until the run is finished: stopped by whatever, the same command goes on with it.
docs/metrics.md explains every metric.
"""

import math
from dataclasses import dataclass

import torch

import data
from grpo import completion_logps, completion_mask, group_advantages, grpo_loss, kl_in_reward
from rewards import accuracy_reward, extract_answer, format_reward
from support.clock import timed
from support.compiling import compile_layers, compiler_works
from support.custom import find_function, find_rewards
from support.errors import DataError
from support.flags import flag, load, parse_flags, read_examples, run_script
from support.optimizer import Optimizer, set_trainable
from support.precision import autocast
from support.ranks import RANK, share_of_rank, sum_over_ranks
from support.run import Run, TrainingFlags, input_files
from support.run_evaluation import RunEvaluation
from support.sampler import make_sampler
from support.updates import (
    SHOWN,
    CompletionLog,
    check_first_update,
    evidence,
    log_line,
    show_group,
)

# The total reward is the sum of these (paper, eq. 5), and of those that --reward adds.
REWARDS = {"accuracy": accuracy_reward, "format": lambda text, label: format_reward(text)}

TOY_UPDATES = 75
# Where the paper differs from the toy. Its 16 prompts x 8 completions, clip_eps and clip_norm are
# the defaults.
PAPER = {"epochs": 2.0, "max_new_tokens": 512, "lr": 1e-6, "beta": 0.04, "updates_per_rollout": 1}
PAPER |= {"micro_batch": 1, "save_every": 100}


@dataclass
class Config(TrainingFlags):  # which adds model, data, seed, workers, saving, ...
    val: tuple = flag((), "labelled manifests to evaluate on during training")
    test: tuple = flag((), "labelled manifests to evaluate on before and after")
    check: str = flag("", "module:function that says more about completions (see evaluate.py)")
    out: str = flag("runs/grpo", "where checkpoints, metrics and curves are written")
    preset: str = flag("none", "paper: the published run's settings", choices=("none", "paper"))
    think: bool = flag(True, "--no-think: ask for the label alone, and reward accuracy alone")
    # one update = 16 prompts x 8 completions = 128 rows, sampled together
    updates: int = flag(0, f"rollouts; 0: by --epochs, or else {TOY_UPDATES}", least=0)
    epochs: float = flag(0.0, "passes over the data, instead of --updates", least=0)
    prompts: int = flag(16, "B, prompts per update", least=1)
    group: int = flag(8, "G, completions per prompt, compared with each other", least=2)
    max_new_tokens: int = flag(64, "longest completion", least=1)
    reward: tuple = flag((), "further rewards, module:function(completion, label) -> float each")
    updates_per_rollout: int = flag(2, "optimizer steps per rollout", least=1)
    lr: float = flag(2e-4, "learning rate at the start; falls linearly towards 0", above=0)
    beta: float = flag(0.2, "weight of the KL to the frozen starting point; 0: none", least=0)
    clip_eps: float = flag(0.2, "PPO clip of the ratio, felt from a rollout's second step", least=0)
    clip_norm: float = flag(1.0, "largest gradient norm", above=0)
    # variants
    kl: str = flag("loss", "where the KL counts; k3 or k1", choices=("loss", "reward"))
    std: bool = flag(True, "divide advantages by the group's std; --no-std is Dr. GRPO's")
    gdpo: bool = flag(False, "normalise each reward within its group before the sum (GDPO)")
    token_mean: bool = flag(False, "average the loss over all tokens, not completions (DAPO)")
    clip_high: float = flag(0.0, "the clip above 1, if not --clip-eps (DAPO: 0.28)", least=0)
    mask_truncated: bool = flag(False, "completions that are cut off get no gradient (DAPO)")
    # memory and time
    micro_batch: int = flag(4, "prompts scored at a time, G completions each; 0: all", least=0)
    gradient_checkpointing: bool = flag(False, "keep less for the backward pass: slower, smaller")
    cache_features: str = flag("", "folder to keep the towers' output per clip in")
    compile: bool = flag(True, "on a GPU: compile the layers, replay sampling as a CUDA graph")
    # what is shown and kept
    val_every: int = flag(20, "updates between evaluations on --val, and drawn curves", least=1)
    show_every: int = flag(10, "updates between printed samples; 0: none", least=0)
    log_completions: bool = flag(
        False, "keep every group in completions.jsonl, not only those of show.py's page"
    )


@dataclass
class Rollout:
    """What the policy said to B prompts, and what stays fixed about it while the policy moves.

    Log-probabilities and the batch's features lie on the model's device; all else lies in main
    memory, where it is looked at without waiting for a GPU."""

    batch: data.Batch  # the B prompts
    ids: torch.Tensor  # (B, G, C) int64, padded with EOS
    mask: torch.Tensor  # (B, G, C) bool: tokens up to and including the first EOS
    sampled_logps: torch.Tensor  # (B, G, C) float32, of the policy as it drew them
    texts: list  # B lists of G completions, without special tokens
    ended: torch.Tensor  # (B, G) bool: by EOS, not cut off
    rewards: dict | None = None  # name -> (B, G) float32; step 2
    ref_logps: torch.Tensor | None = None  # (B, G, C) float32, under the reference; step 3
    advantages: torch.Tensor | None = None  # (B, G) float32; step 4
    # (B, G, C) float32, under the policy before it moves, the ratio's denominator; step 5 (or 3)
    old_logps: torch.Tensor | None = None


@timed("rollout")
@torch.no_grad()
def sample_groups(sampler, omni, batch, seed):
    """1. G completions of each prompt, at temperature 1 from the whole vocabulary -> Rollout."""
    sampler.refresh()  # where a bf16 copy is sampled from: the policy's weights of now
    with autocast(omni.model):
        ids, logps = sampler(data.embed(omni.model, batch), seed)  # (B, G, C) both
    ids = ids.cpu()
    decoded = [[data.completion_text(omni.tokenizer, row) for row in group] for group in ids]
    return Rollout(
        batch=batch,
        ids=ids,
        mask=completion_mask(ids, omni.tokenizer.eos_token_ids),
        sampled_logps=logps,
        texts=[[text for text, _ in group] for group in decoded],
        ended=torch.tensor([[ended for _, ended in group] for group in decoded]),
    )


def reward_groups(functions, rollout):
    """2. {name: function(completion, label)} -> {name: (B, G) float32}."""
    labels = [extract_answer(example.answer) for example in rollout.batch.examples]
    rewards = {}
    for name, reward in functions.items():
        values = [[reward(text, label) for text in g] for g, label in zip(rollout.texts, labels)]
        rewards[name] = torch.tensor(values, dtype=torch.float32)
    return rewards


def logps_of(model, rollout):
    """log pi of every sampled token -> (B, G, C) float32, 0 where masked.

    All prompts must have one length (data.parts_of sees to it). They are embedded anew each time:
    projectors that train make their video and audio tokens."""
    with autocast(model):
        prompts = torch.stack(data.embed(model, rollout.batch))  # (B, P, D)
        return completion_logps(model, prompts, rollout.ids, rollout.mask)


@timed("score")
@torch.no_grad()
def logps_without_gradient(model, rollout, config):
    """3. As logps_of, a few prompts at a time -> (B, G, C) float32."""
    logps = torch.zeros_like(rollout.sampled_logps)
    for part in data.parts_of(rollout.batch, config.micro_batch):
        logps[data.indices(part, logps.device)] = logps_of(model, data.take(rollout, part))
    return logps


def advantages_of(rollout, config):
    """4. How much better than its group is each completion? (eq. 4) -> (B, G) float32."""
    rewards = rollout.rewards.values()
    if config.gdpo:  # each in its own standard deviations
        return sum(group_advantages(values, scale=config.std) for values in rewards)
    reward = sum(rewards)  # eq. 5
    if config.kl == "reward":
        logps = (rollout.old_logps.cpu(), rollout.ref_logps.cpu())
        reward = kl_in_reward(reward, *logps, rollout.mask, config.beta)
    return group_advantages(reward, scale=config.std)


@timed("backward")
def add_gradients(policy, rollout, config, backward=torch.Tensor.backward):
    """5., 6. Score under the policy, KL, loss and its gradient, a few prompts at a time.

    One normaliser, of the whole update on all ranks, divides every part: losses, metrics and
    gradients of the parts add up to those of the update.

    -> metrics, and the policy's log-probabilities (B, G, C), NaN for parts that were not scored:
    they have nothing to teach, in this step and in the rollout's later ones."""
    beta = config.beta if config.kl == "loss" else 0.0
    mask = rollout.mask
    if config.mask_truncated:
        mask = mask & rollout.ended[..., None]
    here = int(mask.sum()) if config.token_mean else rollout.ended.numel()
    normaliser = max(1, sum_over_ranks({"here": here})["here"])
    sums = {"loss": 0.0, "kl": 0.0, "clip_share": 0.0}
    all_logps = torch.full_like(rollout.sampled_logps, torch.nan)
    for part in data.parts_of(rollout.batch, config.micro_batch):
        piece = data.take(rollout, part)
        has_signal = beta or piece.advantages.any()
        if not (has_signal and mask[part].any()):
            continue  # no KL and equal rewards, or nothing counts: the gradient is exactly 0
        logps = logps_of(policy, piece)
        loss, metrics = grpo_loss(
            logps,
            piece.old_logps,
            piece.ref_logps,
            piece.advantages,
            mask[part],
            beta,
            config.clip_eps,
            clip_high=config.clip_high or None,
            token_mean=config.token_mean,
            total=normaliser,
        )
        backward(loss)
        all_logps[data.indices(part, logps.device)] = logps.detach()
        sums["loss"] += loss.detach()
        sums["kl"] += metrics["kl"]
        sums["clip_share"] += metrics["clip_share"]
    return sum_over_ranks({name: float(value) for name, value in sums.items()}), all_logps


def load_policy(config):
    """-> the policy with its tokenizers, and the reference: a frozen copy of it as in its files.

    A resume overwrites the policy afterwards (Run.track), and never the reference."""
    omni = load(config)
    reference = omni.model.frozen_copy(omni.model.compute_dtype) if config.beta else None
    omni.model.gradient_checkpointing = config.gradient_checkpointing
    if config.compile and compiler_works(omni.model.device):
        compile_layers(omni.model, dynamic=True)
        if reference is not None:
            compile_layers(reference, dynamic=True)
    return omni, reference


def training_batches(policy, examples, run):
    """-> the clips, and batches of them from the run's next update on, in the order of its seed."""
    config = run.config
    order = data.data_order(len(examples), config.updates * config.prompts, config.seed)
    order, prompts_here = share_of_rank(order, config.prompts, "--prompts")
    clips = data.clips_of(policy, examples, config.fit, config.cache_features, keep=True)
    skip_log = run.skip_log("skipped.txt")
    return clips, data.batches(clips, order, prompts_here, config.workers, skip_log, run.step)


def draw_seed(config, update):
    """Every seed, update and rank draws its own completions, and the same ones after a resume."""
    return config.seed * 1_000_003 + update + 1_000_000_007 * RANK


def read_config(argv):
    config = parse_flags(Config, __doc__, argv, {"paper": PAPER})
    if config.kl == "reward" and not config.beta:
        raise DataError("--kl reward needs a --beta above 0")
    if config.gdpo and config.kl == "reward":
        raise DataError(
            "--gdpo normalises each reward by itself; a KL in the reward is none of them"
        )
    if not config.think and config.question == "reasoning":
        config.question = "label"
    if config.model and not config.data:
        raise DataError("needs --data MANIFEST with --model")
    return config


def main(argv=None):
    config = read_config(argv)
    rules = REWARDS if config.think else {"accuracy": accuracy_reward}
    reward_functions = find_rewards(rules, config.reward)
    if config.check:
        find_function("--check", config.check)  # a wrong name, before anything long
    if not config.model:
        from toy.stages import fill_in  # here, as the toy is made with these scripts

        fill_in(config)
    omni, reference = load_policy(config)
    policy = omni.model
    examples = read_examples(config.data, config)
    evaluation = RunEvaluation(omni, config)
    by_epochs = math.ceil(config.epochs * len(examples) / config.prompts)
    config.updates = config.updates or by_epochs or TOY_UPDATES

    # The folder refuses another run's flags; the sampler's buffers are most of the memory. Both may
    # fail: let it be before anything long.
    run = Run(config.out, config, input_files(config))
    parameters = set_trainable(policy)
    optimizer = Optimizer(parameters, config, run.folder, policy.compute_dtype, run.facts)
    clips, batches = training_batches(policy, examples, run)
    sampler = make_sampler(omni, examples, config)
    run.track(parameters, optimizer.adamw)  # a resumed run's weights and moments come back
    optimizer.park_moments()
    evaluation.before(run)
    completions = CompletionLog(run, omni.tokenizer)

    for update, items in run.steps(batches, config.updates, "grpo"):
        # The frozen towers, once per clip: policy and reference share what comes out.
        batch = data.encode(omni, clips, items)

        # 1. Sample G completions of each of B prompts from the policy.
        rollout = sample_groups(sampler, omni, batch, draw_seed(config, update))

        # 2. Reward them by rule (eq. 1, 5, 6).
        rollout.rewards = reward_groups(reward_functions, rollout)  # {name: (B, G)}

        # 3. Score them under the reference (for a KL in the reward under the policy, too).
        if reference is not None:
            rollout.ref_logps = logps_without_gradient(reference, rollout, config)  # (B, G, C)
        if config.kl == "reward":
            rollout.old_logps = logps_without_gradient(policy, rollout, config)  # (B, G, C)

        # 4. Advantages within each group (eq. 4).
        rollout.advantages = advantages_of(rollout, config)  # (B, G)

        # 5., 6. Score under the policy, KL to the reference, loss, optimizer step (eq. 2, 3).
        step_metrics = []
        for _ in range(config.updates_per_rollout):
            metrics, logps = add_gradients(policy, rollout, config, optimizer.backward)
            if rollout.old_logps is None:
                rollout.old_logps = logps  # later steps of this rollout compare with its first
            if not optimizer.adamw.state:  # the policy has not moved yet
                check_first_update(rollout, policy.compute_dtype)
            lr = config.lr * (1 - (update - 1) / config.updates)
            metrics |= optimizer.step(lr, evidence(update, rollout, metrics["loss"]))
            step_metrics.append(metrics)

        line = log_line(update, rollout, step_metrics)
        if evaluation.due(update):
            evaluation.validate(line, run)
        if config.show_every and (update % config.show_every == 0 or update == 1):
            show_group(update, rollout)
        completions.add(update, rollout)
        run.log(line, SHOWN)

    evaluation.after(run)


if __name__ == "__main__":
    run_script(
        main,
        "--gradient-checkpointing, a smaller --micro-batch, --max-new-tokens or --group, "
        "fewer --prompts, --beta 0, --offload-optimizer",
    )
