"""Supervised fine-tuning: learn to write a manifest's answers. The paper's cold start (section 3.1), its label-only
rival MAFW-DFEW-SFT, and the toy's base model are all this script with other data.

    python train_sft.py --model DIR --data emer.json --out runs/cold_start --preset paper
    python train_sft.py --model DIR --data dfew.json mafw.json --out runs/labels --preset paper --question label --epochs 1 --batch-size 128

Each answer's tokens, and the end-of-turn behind them, are predicted from the clip and the question; the loss is their
mean negative log-likelihood. What trains: language model, projectors and gate; with --train-towers the SigLIP and
Whisper towers too (only a model made from nothing needs that). BERT never trains.

Writes to --out: the checkpoint in the published layout, and metrics.jsonl. Until it is finished a run lives beside that,
in OUT.run; stopped by whatever, the same command goes on with it.
"""

import math
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from checkpoint import Run, TrainingFlags, all_finite, input_files, make_room
from common import clips_of, compute, compute_dtype, encode_clips, flag, load, parse_flags, question_inputs, read_examples, run
from data import batches
from distributed import RANK, add, add_gradients, first, own, share
from errors import DataError
from grpo import chunked_logps

PRESETS = {"paper": dict(save_every=50, epochs=5.0, steps=0, batch_size=16, lr=2e-5, clip_norm=1.0)}


@dataclass
class Config(TrainingFlags):
    question: str = flag("manifest", "manifest (each entry's own), reasoning, label, or the text of a question")
    out: str = flag("runs/sft", "where the checkpoint and metrics.jsonl are written")
    preset: str = flag("none", "paper: the published cold start's epochs, batch size and learning rate", choices=("none", "paper"))
    epochs: float = flag(5.0, "passes over the data")
    steps: int = flag(0, "optimizer steps, instead of --epochs", least=0)
    batch_size: int = flag(16, "examples per optimizer step", least=1)
    micro_batch: int = flag(0, "examples per forward pass, to save memory; 0: the whole batch", least=0)
    lr: float = flag(2e-5, "peak learning rate: 3 % linear warm-up, then cosine to 0")
    clip_norm: float = flag(1.0, "largest gradient norm")
    train_towers: bool = flag(False, "train the vision and audio towers too")


def set_trainable(model, towers=False):
    """Freeze BERT, and the towers unless they are to train; returns name -> parameter of what trains."""
    frozen = [model.bert_model] if towers else [model.bert_model, model.vision_tower, model.audio_tower]
    model.requires_grad_(True)
    for encoder in frozen:
        encoder.requires_grad_(False)
        encoder.to(compute_dtype(model.device))  # float32 is for what takes small steps
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def move_moments(optimizer, device):
    """AdamW's moments to a device: to the GPU for a step, and away where another phase needs the room more."""
    for state in optimizer.state.values():
        state.update({name: tensor.to(device) for name, tensor in state.items() if tensor.dim()})


def data_order(n, epochs, seed):
    """Indices of `epochs` (whole or not) passes over n examples, each pass in an order of its own."""
    order = []
    for epoch in range(math.ceil(epochs)):
        order += torch.randperm(n, generator=torch.Generator().manual_seed(1000 * seed + epoch)).tolist()
    return order[:round(epochs * n)]


def sft_loss(model, rows, answer_ids, num_tokens):
    """Sum of -log p over the answers' tokens, divided by num_tokens (those of the whole batch, over all its parts).

    rows: list of (L_i, D), prompt and answer embedded; answer_ids: list of (C_i,), the ids at the end of each row."""
    hidden = model(pad_sequence(rows, batch_first=True))  # padding stands on the right, where causal attention does not look
    # The state before a token predicts it: for C answer tokens at the end, states L-C-1 .. L-2.
    states = [h[len(row) - len(ids) - 1:len(row) - 1] for h, row, ids in zip(hidden, rows, answer_ids)]
    return -chunked_logps(model, torch.cat(states), torch.cat(answer_ids)).sum() / num_tokens


def cosine(step, steps, warmup=0.03):
    """Learning rate at `step` of `steps`, as a share of its peak."""
    warm = max(1, round(warmup * steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def main(argv=None):
    config = parse_flags(Config, __doc__, argv, PRESETS)
    if not config.model or not config.data:
        raise DataError("needs --model DIR and --data MANIFEST")
    model, tokenizer, bert = load(config)
    examples = read_examples(config.data, config)
    epochs = config.epochs if not config.steps else config.steps * config.batch_size / len(examples)
    order = data_order(len(examples), epochs, config.seed)
    steps = math.ceil(len(order) / config.batch_size)
    if not order:
        raise DataError("nothing to train: --epochs is too small, and no --steps are given")
    order, own_size = share(order, config.batch_size, "--batch-size")
    parameters = set_trainable(model, config.train_towers)
    optimizer = torch.optim.AdamW(parameters.values(), lr=config.lr, weight_decay=0.0, fused=True)
    run = Run(f"{config.out}.run", config, input_files(config))
    run.track(parameters, optimizer)
    resting = "cpu" if config.offload_optimizer else model.device  # where AdamW's moments are between steps
    move_moments(optimizer, resting)
    decoded = batches(clips_of(model, examples, config.fit), order, own_size, config.workers, start=run.step,
                      skip_log=own(run.folder / "skipped.txt") if config.on_bad_clip == "skip" else None)
    nothing_left = run.step == steps
    with tqdm(total=steps, initial=run.step, desc=f"sft {Path(config.out).name}", unit="step", disable=RANK > 0) as progress:
        for step in run.steps(steps):
            clips = next(decoded, [])
            batch = [examples[clip["index"]] for clip in clips]
            targets = [tokenizer.sft_ids(e.question, e.answer, e.modality) for e in batch]  # (ids, labels) each
            answers = [torch.tensor([label for label in labels if label >= 0], device=model.device) for _, labels in targets]
            num_tokens = add({"tokens": sum(map(len, answers))})["tokens"]  # of all ranks: the parts' losses then add up
            if not num_tokens:  # all of the batch's clips are bad
                continue
            loss = 0.0
            size = config.micro_batch or config.batch_size
            for start in range(0, len(batch), size):
                part = slice(start, start + size)
                with compute(model):
                    features = encode_clips(model, clips[part])
                    rows = model.embed_prompts([ids for ids, _ in targets[part]], *features, *question_inputs(model, bert, batch[part]))
                    part_loss = sft_loss(model, rows, answers[part], num_tokens)
                part_loss.backward()
                loss += part_loss.item()
            add_gradients(parameters.values())
            loss = add({"loss": loss})["loss"]
            norm = torch.nn.utils.clip_grad_norm_(parameters.values(), config.clip_norm).item()
            lr = config.lr * cosine(step - 1, steps)
            for group in optimizer.param_groups:
                group["lr"] = lr
            good = all_finite({"loss": loss, "gradient norm": norm}, own(run.folder / f"nonfinite_{step:06}.json"),
                              {"step": step, "examples": batch}, config.skip_nonfinite)
            if good:
                move_moments(optimizer, model.device)
                optimizer.step()
            optimizer.zero_grad()
            move_moments(optimizer, resting)
            run.log({"step": step, "loss": loss, "grad_norm": norm, "lr": lr, "steps_left_out": int(not good)})
            progress.update()

    first(lambda: place_checkpoint(config, run.folder, model, nothing_left))
    run.finish()
    first(lambda: shutil.rmtree(run.folder))
    print(f"loss {run.metrics[0]['loss']:.3f} -> {run.metrics[-1]['loss']:.3f}; checkpoint in {config.out}")


def place_checkpoint(config, folder, model, nothing_left):
    """Make the checkpoint ready in the run's folder, and move it to its place whole; unless an earlier process, which was killed
    right after, has done so."""
    placed = Path(config.out) / "metrics.jsonl"
    if nothing_left and placed.exists() and placed.read_bytes() == (folder / "metrics.jsonl").read_bytes():
        return
    model.save_pretrained(folder / "checkpoint", getattr(torch, config.save_dtype))
    for file in (folder / "metrics.jsonl", *folder.glob("*.txt"), *folder.glob("nonfinite_*.json")):
        shutil.copy(file, folder / "checkpoint")
    out = make_room(config.out)
    (folder / "checkpoint").rename(out)


if __name__ == "__main__":
    run(main, ("a smaller --micro-batch",))
