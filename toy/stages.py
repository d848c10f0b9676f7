"""The paper's stages in miniature: a base model, its cold start, and what reinforcement learning
starts from. All training is train_sft.py's."""

import shutil
import zlib
from pathlib import Path

import torch

import train_sft
from checkpoint import read_companions, read_config
from model import HumanOmni
from support.errors import read_json, write_json
from support.ranks import on_first_rank
from toy.drawing import make_clips
from toy.files import make_checkpoint_files
from toy.world import WORLD
from toy.worlds import World, make_world

BASE = Path(__file__).parent / "base"  # the base model as shipped
ROOT = Path("runs/toy")


def new_model(root, seed=0):
    """Writes a checkpoint with random weights and the toy's sizes, tokenizer and vocabulary to the
    folder root."""
    root = Path(root)
    make_checkpoint_files(root)
    folders = {name: root / name for name in ("siglip", "whisper", "bert")}
    configs = {name: read_config(folder / "config.json") for name, folder in folders.items()}
    torch.manual_seed(seed)
    model = HumanOmni({"llm": read_config(root / "config.json"), **configs})
    for embedding in (
        model.embed_tokens,
        model.vision_tower.embeddings.position_embedding,
        model.audio_tower.embed_positions,
    ):
        # torch's own std of 1 would drown what they are added to
        torch.nn.init.normal_(embedding.weight, std=0.02)
    model.files = read_companions(root, folders)
    model.save_pretrained(root)


def fine_tune(model, data, out, flags, seed):
    """`python train_sft.py` with these paths, further flags and seed."""
    paths = ["--model", str(model), "--data", str(data), "--out", str(out)]
    train_sft.main([*paths, *flags.split(), "--seed", str(seed)])


def train_base(out, seed=0, root=ROOT, steps=900):
    """The base model, from nothing: first the language model on text alone, so that it can speak
    before it sees, then everything but BERT on what face and voice do. Plays the part of
    HumanOmni-0.5B, which was pretrained elsewhere.

    steps: of the second part. After few it sees and hears badly."""
    clips = on_first_rank(lambda: make_clips(root, ("text", "base")))
    work = Path(root) / f"base_{seed}"
    new, speaking = work / "new", work / "text"
    if not (speaking / "model.safetensors").exists():
        on_first_rank(lambda: new_model(new, seed))
        flags = "--steps 400 --lr 3e-3 --batch-size 32 --save-dtype float32"
        fine_tune(new, clips["text"], speaking, flags, seed)
    flags = f"--steps {steps} --lr 1e-3 --batch-size 32 --train-towers"
    fine_tune(speaking, clips["base"], out, flags, seed)
    record = Path(out) / "text_metrics.jsonl"
    on_first_rank(lambda: shutil.copyfile(speaking / "metrics.jsonl", record))


def cold_start(base, data, out, seed=0):
    """The cold start: a few hundred clips with reasoning, towers frozen from here on (paper,
    section 3.1). One that is there is used as it is, unless it came from another base or world."""
    weights = zlib.crc32((Path(base) / "model.safetensors").read_bytes())
    made_from = {"base": weights, "world": WORLD, "seed": seed}
    stamp = Path(out) / "made_from.json"
    if read_json(stamp, {}) != made_from:
        fine_tune(base, data, out, "--steps 240 --lr 1e-3", seed)
        on_first_rank(lambda: write_json(stamp, made_from))
    return Path(out)


def prepare(seed=0, root=ROOT, think=True):
    """What `python train_grpo.py` needs and nobody gave: the folder of a cold-started model, and
    {split: manifest} of training, validation, and test clips. Whatever exists is used.

    think: does the cold start answer with <think>, or with the word alone?
    """
    clips = on_first_rank(lambda: make_world(root, World()))
    base = BASE
    if not (base / "model.safetensors").exists():
        base = Path(root) / f"base_{seed}" / "trained"
        if not (base / "model.safetensors").exists():
            train_base(base, seed, root)
    split = "cold_start" if think else "words"
    return cold_start(base, clips[split], Path(root) / f"{split}_{seed}", seed), clips


def fill_in(config):
    """Give a `train_grpo.Config` without --model the toy's: model, manifests, check."""
    model, clips = prepare(config.seed, think=config.think)
    config.model = str(model)
    config.data = config.data or (str(clips["train"]),)
    config.val = config.val or (str(clips["validation"]),)
    tests = ("test", "test_ood", "swapped")
    config.test = config.test or tuple(str(clips[split]) for split in tests)
    if config.think:
        config.check = config.check or "toy.world:check_statements"
