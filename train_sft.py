"""Supervised fine-tuning: learn to write a manifest's answers. The cold start (paper, section 3.1),
its label-only rival MAFW-DFEW-SFT, and the toy's base model are all this script with other data.

    python train_sft.py --model DIR --data emer.json --out runs/cold_start --preset paper
    python train_sft.py --model DIR --data dfew.json mafw.json --out runs/labels --preset paper \
                        --question label --epochs 1 --batch-size 128

Each answer's tokens, and the end-of-turn behind them, are predicted from the clip and the question;
the loss is their mean negative log-likelihood. What trains: language model, projectors and gate;
with --train-towers the SigLIP and Whisper towers too (only a model made from nothing needs that).
BERT never trains.

Writes to --out: the checkpoint in the published layout, and metrics.jsonl. Until it is finished a
run lives beside that, in OUT.run; stopped by whatever, the same command goes on with it.
"""

import math
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence

import data
from grpo import chunked_logps
from support.clock import lap, timed
from support.errors import DataError
from support.flags import flag, load, parse_flags, read_examples, run_script
from support.optimizer import Evidence, Optimizer, set_trainable
from support.precision import autocast
from support.ranks import on_first_rank, share_of_rank, sum_over_ranks
from support.run import Run, TrainingFlags, check_room, input_files, input_paths, make_room

PAPER = {"epochs": 5.0, "batch_size": 16, "lr": 2e-5, "clip_norm": 1.0, "save_every": 50}


@dataclass
class Config(TrainingFlags):
    question: str = flag("manifest", "manifest (each entry's own), reasoning, label, or a text")
    out: str = flag("runs/sft", "where the checkpoint and metrics.jsonl are written")
    preset: str = flag("none", "paper: the published cold start's", choices=("none", "paper"))
    epochs: float = flag(5.0, "passes over the data", least=0)
    steps: int = flag(0, "optimizer steps, instead of --epochs", least=0)
    batch_size: int = flag(16, "examples per optimizer step", least=1)
    micro_batch: int = flag(0, "examples per forward pass; 0: the whole batch", least=0)
    lr: float = flag(2e-5, "peak learning rate: 3 % linear warm-up, then cosine to 0", above=0)
    clip_norm: float = flag(1.0, "largest gradient norm", above=0)
    train_towers: bool = flag(False, "train the vision and audio towers too")


def sft_loss(model, rows, answer_ids, num_tokens):
    """Sum of -log p over the answers' tokens, divided by num_tokens: those of the whole batch, over
    all its parts.

    rows: list of (L_i, D), prompt and answer embedded; answer_ids: list of (C_i,), the ids at the
    end of each row."""
    # Padding stands on the right, where causal attention does not look.
    hidden = model(pad_sequence(rows, batch_first=True))
    states = []
    for h, row, ids in zip(hidden, rows, answer_ids):
        # The state before a token predicts it: for C answer tokens at the end, L-C-1 .. L-2.
        states.append(h[len(row) - len(ids) - 1 : len(row) - 1])
    return -chunked_logps(model, torch.cat(states), torch.cat(answer_ids)).sum() / num_tokens


@timed("backward")
def add_gradients(omni, clips, items, config, backward):
    """Loss and gradient, a few examples at a time -> metrics of the whole batch, on all ranks."""
    examples = [clips.examples[item["index"]] for item in items]
    targets = [omni.tokenizer.sft_ids(e.question, e.answer, e.modality) for e in examples]
    prompt_ids = [ids for ids, _ in targets]
    answers = [torch.tensor([x for x in labels if x >= 0]) for _, labels in targets]
    answers = [answer.to(omni.model.device) for answer in answers]
    # One count for all parts and ranks: their losses and gradients then add up.
    num_tokens = sum_over_ranks({"tokens": sum(map(len, answers))})["tokens"]
    size = config.micro_batch or config.batch_size
    loss = 0.0
    for start in range(0, len(items), size):
        part = slice(start, start + size)
        with autocast(omni.model, config.train_towers):
            batch = data.encode(omni, clips, items[part], prompt_ids[part])
        with autocast(omni.model):
            rows = data.embed(omni.model, batch)
            part_loss = sft_loss(omni.model, rows, answers[part], num_tokens)
        backward(part_loss)
        loss += part_loss.item()
    return sum_over_ranks({"loss": loss})


def cosine(step, steps, warmup=0.03):
    """Learning rate at `step` (from 0) of `steps`, as a share of its peak."""
    warm = max(1, round(warmup * steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def main(argv=None):
    config = parse_flags(Config, __doc__, argv, {"paper": PAPER})
    if not config.model or not config.data:
        raise DataError("needs --model DIR and --data MANIFEST")
    on_first_rank(lambda: check_room(config.out, input_paths(config), replaced=True))
    omni = load(config)
    examples = read_examples(config.data, config)
    wanted = config.steps * config.batch_size or round(config.epochs * len(examples))
    steps = math.ceil(wanted / config.batch_size)
    if not steps:
        raise DataError("nothing to train: --epochs is too small, and no --steps are given")
    order = data.data_order(len(examples), wanted, config.seed)
    order, own_size = share_of_rank(order, config.batch_size, "--batch-size")
    run = Run(f"{Path(config.out)}.run", config, input_files(config))
    parameters = set_trainable(omni.model, config.train_towers)
    arithmetic = omni.model.compute_dtype
    optimizer = Optimizer(parameters, config, run.folder, arithmetic, run.facts)
    run.track(optimizer.parameters, optimizer.adamw)
    optimizer.park_moments()
    clips = data.clips_of(omni.model, examples, config.fit, keep=not config.train_towers)
    skip_log = run.skip_log("skipped.txt")
    batches = data.batches(clips, order, own_size, config.workers, skip_log, start=run.step)
    nothing_left = run.step == steps

    for step, items in run.steps(batches, steps, f"sft {Path(config.out).name}"):
        metrics = add_gradients(omni, clips, items, config, optimizer.backward)
        lr = config.lr * cosine(step - 1, steps)
        examples_now = [clips.examples[item["index"]] for item in items]
        story = {"step": step, "examples": examples_now}
        metrics |= optimizer.step(lr, Evidence(step, dict(metrics), story))
        run.log({"step": step, **metrics, **lap()}, ["loss"])

    on_first_rank(lambda: place_checkpoint(config, run.folder, omni.model, nothing_left))
    run.finish()
    on_first_rank(lambda: shutil.rmtree(run.folder))
    losses = [line["loss"] for line in run.metrics if line["loss"] is not None]
    fell = f"loss {losses[0]:.3f} -> {losses[-1]:.3f}; " if losses else ""
    print(f"{fell}checkpoint in {config.out}")


def place_checkpoint(config, folder, model, nothing_left):
    """Make the checkpoint ready in the run's folder, and move it to its place whole; unless an
    earlier process, which was killed right after, has done so."""
    placed, metrics = Path(config.out) / "metrics.jsonl", folder / "metrics.jsonl"
    if nothing_left and placed.exists() and placed.read_bytes() == metrics.read_bytes():
        return
    checkpoint = folder / "checkpoint"
    model.save_pretrained(checkpoint, getattr(torch, config.save_dtype))
    for file in (metrics, *folder.glob("*.txt"), *folder.glob("nonfinite_*.json")):
        shutil.copy(file, checkpoint)
    checkpoint.rename(make_room(config.out, input_paths(config)))


if __name__ == "__main__":
    run_script(main, "a smaller --micro-batch")
