"""When does RLVR beat fine-tuning on the labels? Five ways of training, in many worlds of the toy.

    experiments/map.sh                                 all of it, and the page
    python experiments/map.py jobs [--quick]           what there is to do, a line each
    python experiments/map.py run WORLD ARM SEED       one of them, unless its result is there
    python experiments/map.py page                     map.md, map.json and map.png of the results

Every arm gets the same clips with the same labels, and as many visits: 150 optimizer steps of 16
clips (GRPO: 75 rollouts of 16 prompts, two steps each). All start from one base model; only GRPO
and its like get a cold start before. The last checkpoint is evaluated: none is selected.

    label_only       SFT on the labels from the base: the paper's rival
    label_cold       SFT on the labels from the cold start
    own_correct      SFT on the cold start's own completions, those that are right by the label
                     (rejection sampling), with their <think>
    grpo_answer      GRPO without <think>, accuracy alone, from a cold start of words
    grpo_think       GRPO with <think>: R1-Omni

A result is runs/map/WORLD/ARM_SEED.json.
"""

import argparse
import json
import os
import shutil
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import torch

import data
import train_grpo
import train_sft
from evaluate import Settings, evaluate, score
from generate import generate
from grpo import completion_logps, completion_mask
from rewards import accuracy_reward, extract_answer, format_reward
from support.flags import read_examples
from support.flags import load as load_model
from toy import stages
from toy.world import read_statements
from toy.worlds import World, make_world, stated_label

CLIPS, OUT = ROOT / "runs" / "toy", ROOT / "runs" / "map"

WORLDS = {
    **{f"wrong_{share}": World(wrong=share) for share in (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6)},
    **{f"confused_{share}": World(wrong=share, confused=True) for share in (0.2, 0.3, 0.4)},
    **{f"labelled_{n}": World(labelled=n) for n in (14, 42, 140)},
    "films": World(films=True),
    "films_wrong_0.4": World(films=True, wrong=0.4),
    "rule": World(rule=True),
    **{f"scene_{share}": World(scene=share) for share in (0.0, 0.9, 1.0)},
}
STEPS, ROLLOUTS, BATCH = 150, 75, 16
SFT_LR = {"label_only": 1e-3, "label_cold": 1e-3, "own_correct": 1e-3}
GRPO_LR = {"grpo_answer": 2e-4, "grpo_think": 2e-4}
ARMS = (*SFT_LR, *GRPO_LR)
SAMPLES = 8  # completions per clip for own_correct, as many as GRPO's group has


# --------------------------------------------------------------------------------------------------
# Training


def starts(world, seed, paths):
    """-> {name: folder} of the models that training starts from: base, cold start, and words (the
    cold start without <think>)."""
    kind = "rule_" if world.rule else "scene_" if world.scene >= 0 else ""
    base = stages.BASE
    if world.scene >= 0:
        base = CLIPS / "scene_base_model"
        if not (base / "model.safetensors").exists():
            flags = "--steps 300 --lr 1e-3 --batch-size 32 --train-towers"
            stages.fine_tune(stages.BASE, paths["base"], base, flags, 0)
    made = {"base": base}
    for split in ("cold_start", "words"):
        out = CLIPS / f"{kind}{split}_{seed}"
        made[split] = stages.cold_start(base, paths[split], out, seed)
    return made


def train(arm, world, seed, paths, models, out, lr=None):
    """-> folder of the trained model, and of the one that it started from."""
    if arm in GRPO_LR:
        start = models["cold_start" if arm == "grpo_think" else "words"]
        flags = ["--model", str(start), "--data", str(paths["train"]), "--out", str(out)]
        flags += ["--updates", str(ROLLOUTS), "--prompts", str(BATCH), "--seed", str(seed)]
        flags += ["--lr", str(lr or GRPO_LR[arm]), "--show-every", "0", "--val-every", "1000"]
        flags += ["--workers", "0", "--log-completions"]
        if arm == "grpo_answer":
            flags.append("--no-think")
        if not (out / "last" / "model.safetensors").exists():
            train_grpo.main(flags)
        return out / "last", start
    start = models["base" if arm == "label_only" else "cold_start"]
    manifest, question = paths["train"], "label"
    if arm == "own_correct":
        manifest, question = own_correct(start, paths["train"], out, seed), "reasoning"
    flags = ["--model", str(start), "--data", str(manifest), "--out", str(out)]
    flags += ["--question", question, "--steps", str(STEPS), "--batch-size", str(BATCH)]
    flags += ["--lr", str(lr or SFT_LR[arm]), "--seed", str(seed), "--workers", "0"]
    if not (out / "model.safetensors").exists():
        train_sft.main(flags)
    return out, start


def own_correct(start, manifest, out, seed):
    """Writes a manifest of the start's own completions that earn both rewards -> its path."""
    omni, clips = opened(start, manifest, "reasoning")
    settings = Settings(64, temperature=1.0, samples=SAMPLES, seed=seed, batch_size=32)
    entries = json.loads(Path(manifest).read_text(encoding="utf-8"))
    kept = []
    for row in evaluate(omni, clips, settings, "own completions"):
        entry, text = entries[row["index"]], row["completion"]
        if not row["truncated"] and accuracy_reward(text, row["label"]) and format_reward(text):
            answer = {"from": "gpt", "value": text}
            kept.append(entry | {"conversations": [entry["conversations"][0], answer]})
    path = out.with_suffix(".manifest.json")
    for entry in kept:
        entry["video"] = os.path.relpath(CLIPS / entry["video"], path.parent)
    path.write_text(json.dumps(kept), encoding="utf-8")
    return path


# --------------------------------------------------------------------------------------------------
# Measuring


def opened(model, manifest, question):
    """-> the model with its tokenizers, and the manifest's clips, asked this question."""
    config = train_sft.Config(model=str(model), question=question, device="cpu")
    omni = load_model(config)
    examples = read_examples([manifest], config)
    return omni, data.clips_of(omni.model, examples, cache=str(OUT / "features"))


def measure(model, start, world, paths, question):
    """-> {test: its figures}, and the KL from the start."""
    figures = {}
    for split in ("test", "test_ood", "swapped", "test_unseen"):
        if split not in paths:
            continue
        omni, clips = opened(model, paths[split], question)
        rows = evaluate(omni, clips, Settings(64, batch_size=35), split)
        scores = score(rows)
        figures[split] = {name: scores[name] for name in ("war", "uar", "recall", "format")}
        figures[split] |= reasoning(world, rows, clips.examples)
        if split == "swapped":
            figures[split] |= by_medium(rows, clips.examples, paths["test"])
    omni, clips = opened(model, paths["test"], question)
    begun, _ = opened(start, paths["test"], question)
    figures["kl"] = kl_between(omni, begun, clips)
    return figures


def reasoning(world, rows, examples):
    """What <think> says against the clip, the label and the answer (EEA, EPC, FCR: see
    docs/metrics.md); {} where nothing is stated."""
    counts = Counter()
    for row in rows:
        extra, answer = examples[row["index"]].extra, extract_answer(row["completion"])
        cues = read_statements(row["completion"])
        if "<think>" not in row["completion"]:
            continue
        stated = stated_label(world, cues)
        counts["face_true"] += cues[0] == extra["face"]
        counts["voice_true"] += cues[1] == extra["voice"]
        counts["eea"] += stated == row["label"]
        counts["epc"] += stated is not None and stated == answer
        counts["fcr"] += stated == row["label"] == answer
    return {name: count / len(rows) for name, count in counts.items()}


def by_medium(rows, examples, test_manifest):
    """Of the swapped clips: how often is the answer the emotion of the clip that the face is from,
    and of the one that the voice is from?"""
    entries = json.loads(Path(test_manifest).read_text(encoding="utf-8"))
    emotion = {entry["video"]: entry["emotion"] for entry in entries}
    counts = {"as_the_face": 0, "as_the_voice": 0}
    for row in rows:
        extra, answer = examples[row["index"]].extra, extract_answer(row["completion"])
        counts["as_the_face"] += answer == emotion.get(extra["face_from"])
        counts["as_the_voice"] += answer == emotion.get(extra["voice_from"])
    return {name: count / len(rows) for name, count in counts.items()}


@torch.no_grad()
def kl_between(omni, begun, clips):
    """KL(policy || start) in nats per completion, on one sample of the policy per clip of the test:
    the mean of the sum of log pi - log pi_start over its tokens."""
    total = 0.0
    eos = omni.tokenizer.eos_token_ids
    for items in data.batches(clips, range(len(clips)), 35):
        batch = data.encode(omni, clips, items)
        prompts = data.embed(omni.model, batch)
        ids = generate(omni.model, prompts, 1, 64, 1.0, 1.0, eos, seed=items[0]["index"])
        mask = completion_mask(ids, eos)
        policy = completion_logps(omni.model, torch.stack(prompts), ids, mask)
        prompts = torch.stack(data.embed(begun.model, batch))
        total += (policy - completion_logps(begun.model, prompts, ids, mask)).sum().item()
    return total / len(clips)


def wrong_labels(out, manifest):
    """Of a GRPO run's groups with a wrong label: in how many was that label ever said, how often,
    and how much of the gradient is theirs: the sum of |A| over their completions as a share of all.
    """
    entries = json.loads(Path(manifest).read_text(encoding="utf-8"))
    truth = {Path(entry["video"]).name: entry["emotion"] for entry in entries}
    lines = (out / "completions.jsonl").read_text(encoding="utf-8").splitlines()
    groups = [json.loads(line) for line in lines]
    wrong = [g for g in groups if g["label"] != truth[Path(g["video"]).name]]
    if not wrong:
        return {}

    def weight(some):
        return sum(abs(a) for group in some for a in group["advantages"])

    said = [sum(group["rewards"]["accuracy"]) for group in wrong]
    right = [sum(g["rewards"]["accuracy"]) for g in groups if g not in wrong]
    G = len(wrong[0]["completions"])
    return {
        "wrong_groups": len(wrong) / len(groups),
        "said_in": sum(count > 0 for count in said) / len(wrong),
        "said": sum(said) / (G * len(wrong)),
        "right_said": sum(right) / (G * max(1, len(right))),
        "weight": weight(wrong) / weight(groups),
    }


# --------------------------------------------------------------------------------------------------
# Jobs


def run(name, arm, seed):
    """One arm in one world, unless its result is there."""
    result = OUT / name / f"{arm}_{seed}.json"
    if result.exists():
        return
    result.parent.mkdir(parents=True, exist_ok=True)
    world = WORLDS[name]
    paths = make_world(CLIPS, world, seed)
    models = starts(world, seed, paths)
    if arm == "start":  # nothing but what comes before: clips and models
        return
    out = OUT / name / f"{arm}_{seed}"
    if arm in models:  # the starts themselves
        model = start = models[arm]
    else:
        model, start = train(arm, world, seed, paths, models, out)
    question = "reasoning" if arm in ("own_correct", "grpo_think", "cold_start", "base") else "label"
    figures = measure(model, start, world, paths, question)
    if arm in GRPO_LR:
        figures["wrong"] = wrong_labels(out, paths["train"])
    result.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
