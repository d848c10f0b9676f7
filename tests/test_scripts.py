"""Every script, end to end for a few steps, on the small golden checkpoint and real mp4 files; and
what they refuse."""

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from runs import (
    CHECKPOINT,
    CLIPS,
    EVALUATE,
    GRPO,
    LABELS,
    SFT,
    entry,
    read_metrics,
    stop_in_update,
    without_times,
    write_manifest,
)
from safetensors.torch import load_file

import data
import evaluate
import train_grpo
import train_sft
from model import AudioTower, HumanOmni, VisionTower
from support import flags, run_evaluation, updates
from support import results as run_results
from support.custom import find_function
from support.errors import DataError


@pytest.fixture
def manifest(tmp_path):
    """Six labelled entries over the two golden clips."""
    return write_manifest(tmp_path / "manifest.json")


def grpo(manifest, out, more=""):
    """A GRPO run -> its lines of metrics.jsonl."""
    train_grpo.main([*GRPO, "--data", manifest, "--out", str(out), *more.split()])
    return read_metrics(out)[1]


def sft(manifest, out, more=""):
    """A fine-tuning -> its lines of metrics.jsonl."""
    train_sft.main([*SFT, "--data", manifest, "--out", str(out), *more.split()])
    return read_metrics(out)[1]


def evaluation(manifest, out, more=""):
    """An evaluation -> what it wrote about the manifest."""
    evaluate.main([*EVALUATE, "--data", manifest, "--out", str(out), *more.split()])
    return json.loads((Path(out) / f"{Path(manifest).stem}.json").read_text())


def variety(completion, label):
    """A reward that tells random completions apart."""
    return len(set(completion)) / 10


def moved(out):
    """Names of the saved tensors that are not those of the checkpoint that training began with."""
    before, after = load_file(f"{CHECKPOINT}/model.safetensors"), load_file(out)
    return {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}


# --------------------------------------------------------------------------------------------------
# Supervised fine-tuning


def test_sft_trains_what_it_should_and_nothing_else(manifest, tmp_path):
    more = "--steps 12 --batch-size 3 --micro-batch 2 --lr 3e-3 --save-dtype float32"
    lines = sft(manifest, tmp_path / "sft", more)
    assert len(lines) == 12 and lines[-1]["loss"] < 0.7 * lines[0]["loss"]
    weights = tmp_path / "sft" / "model.safetensors"
    frozen = ("model.vision_tower", "model.audio_tower", "model.bert_model")
    # All that trains has moved.
    assert moved(weights) == {name for name in load_file(weights) if not name.startswith(frozen)}
    HumanOmni.from_pretrained(tmp_path / "sft")


def test_micro_batches_change_nothing(manifest, tmp_path):
    losses = []
    for size in ("0", "1", "4"):
        more = f"--steps 3 --batch-size 6 --lr 1e-3 --micro-batch {size}"
        losses.append([line["loss"] for line in sft(manifest, tmp_path / size, more)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert losses[2] == pytest.approx(losses[0], rel=1e-4)


def test_sft_of_nothing_is_refused(manifest, tmp_path):
    with pytest.raises(DataError, match="nothing to train"):
        sft(manifest, tmp_path / "sft", "--steps 0 --epochs 0")
    assert not (tmp_path / "sft").exists()


def test_towers_train_on_request(manifest, tmp_path):
    sft(manifest, tmp_path / "sft", "--lr 1e-3 --train-towers --save-dtype float32")
    names = moved(tmp_path / "sft" / "model.safetensors")
    assert any("vision_tower" in name for name in names)
    assert any("audio_tower" in name for name in names)
    assert not any("bert_model" in name for name in names)


# --------------------------------------------------------------------------------------------------
# GRPO


@pytest.mark.curves
@pytest.mark.parametrize("beta, steps_per_rollout", [("0.04", "1"), ("0.04", "2"), ("0", "1")])
def test_grpo_runs_end_to_end(manifest, tmp_path, beta, steps_per_rollout, capsys):
    out = tmp_path / "grpo"
    more = "--updates 3 --group 3 --max-new-tokens 6 --lr 1e-3 --val-every 2 --show-every 1"
    more += f" --workers 1 --beta {beta} --updates-per-rollout {steps_per_rollout}"
    lines = grpo(manifest, out, f"{more} --val {manifest} --test {manifest}")
    assert [line["update"] for line in lines] == [1, 2, 3]
    assert lines[0]["lr"] == 1e-3 > lines[2]["lr"]
    assert all(0 <= line["reward_format"] <= 1 and line["completion_length"] <= 6 for line in lines)
    # Every second update, and the last.
    assert ["val_war" in line for line in lines] == [False, True, True]
    assert all((line["kl"] is None) == (beta == "0") for line in lines)
    if beta != "0" and steps_per_rollout == "1":
        # The policy is the reference; the ratio is 1.
        assert lines[0]["kl"] < 1e-6 and abs(lines[0]["loss"]) < 1e-5
    for folder in ("last", "best"):
        HumanOmni.from_pretrained(out / folder)
    assert (out / "curves.png").stat().st_size > 10_000
    results = json.loads((out / "results.json").read_text())
    assert results["before"]["manifest"]["n"] == results["after"]["manifest"]["n"] == 6
    printed = capsys.readouterr().out
    assert "advantage" in printed and "WAR" in printed and "label: " in printed


def test_without_thinking_the_label_is_asked_for_and_accuracy_is_the_reward(manifest, tmp_path):
    out = tmp_path / "grpo"
    lines = grpo(manifest, out, f"--updates 1 --no-think --val {manifest} --show-every 1")
    config, _ = read_metrics(out)
    assert config["config"]["question"] == "label"
    assert "reward_format" not in lines[0] and lines[0]["reward"] == lines[0]["reward_accuracy"]
    asked = train_grpo.read_config([*GRPO, "--data", manifest, "--no-think"])
    assert flags.read_examples([manifest], asked)[0].question == data.QUESTION_LABEL
    own = [*GRPO, "--data", manifest, "--no-think", "--question", "Which one?"]
    assert train_grpo.read_config(own).question == "Which one?"


def read_completions(out):
    return [json.loads(line) for line in (out / "completions.jsonl").read_text().splitlines()]


def test_completions_are_kept_on_request(manifest, tmp_path, monkeypatch):
    """A line per group, the same ones after a run that was interrupted."""
    monkeypatch.setitem(train_grpo.REWARDS, "variety", variety)
    more = "--updates 4 --group 3 --save-every 2 --log-completions"
    grpo(manifest, tmp_path / "whole", more)
    groups = read_completions(tmp_path / "whole")
    assert [group["update"] for group in groups] == [1, 1, 2, 2, 3, 3, 4, 4]
    for group in groups:
        assert group["label"] in LABELS and group["video"] in CLIPS
        assert set(group["rewards"]) == {"accuracy", "format", "variety"}
        for text, reward in zip(group["completions"], group["rewards"]["variety"]):
            assert reward == pytest.approx(variety(text, ""))
        assert len(group["completions"]) == len(group["advantages"]) == len(group["tokens"]) == 3
        assert sum(group["advantages"]) == pytest.approx(0, abs=1e-4)
    with monkeypatch.context() as patch:
        stop_in_update(patch, 4)  # its completions are written, its state is not
        with pytest.raises(KeyboardInterrupt):
            grpo(manifest, tmp_path / "stopped", more)
    assert len(read_completions(tmp_path / "stopped")) == 8
    grpo(manifest, tmp_path / "stopped", more)
    assert read_completions(tmp_path / "stopped") == groups


@pytest.mark.parametrize("more", ["", "--kl reward", "--updates-per-rollout 2", "--no-std"])
def test_sampling_and_scoring_are_compared_at_every_update(manifest, tmp_path, monkeypatch, more):
    monkeypatch.setitem(train_grpo.REWARDS, "variety", variety)
    lines = grpo(manifest, tmp_path / "grpo", f"--updates 3 --lr 1e-2 {more}")
    assert len(lines) == 3
    assert all(line["mismatch"] is not None and line["mismatch"] < 1e-5 for line in lines)
    assert lines[-1]["kl"] > 0  # the policy has moved, and still scores what it samples


def test_kl_in_the_reward_does_not_blur_what_is_logged(manifest, tmp_path, monkeypatch):
    monkeypatch.setitem(train_grpo.REWARDS, "variety", variety)  # of equal rewards nothing moves
    more = "--updates 3 --group 3 --max-new-tokens 6 --lr 1e-2 --kl reward --beta 1"
    lines = grpo(manifest, tmp_path / "grpo", more)
    assert lines[-1]["kl"] > 0
    for line in lines:
        parts = [line[f"reward_{name}"] for name in train_grpo.REWARDS]
        assert line["reward"] == pytest.approx(sum(parts), abs=1e-6)
    assert lines[-1]["grad_norm"] > 0


def test_curves_are_drawn_during_the_run(manifest, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        run_evaluation, "draw_curves", lambda metrics, path: drawn.append(len(metrics))
    )
    grpo(manifest, tmp_path / "grpo", "--updates 4 --max-new-tokens 2 --val-every 2")
    assert drawn == [2, 4]  # at each validation, the last update's too


def test_grpo_micro_batches_change_nothing(manifest, tmp_path, monkeypatch):
    """Prompts scored one at a time, in twos, or all together: the same loss, KL, gradient norm."""
    monkeypatch.setitem(train_grpo.REWARDS, "variety", variety)
    runs = []
    for size in ("0", "2", "1"):
        more = "--updates 2 --prompts 3 --group 5 --max-new-tokens 6 --lr 1e-4"
        lines = grpo(manifest, tmp_path / size, f"{more} --micro-batch {size}")
        runs.append([[line[k] for k in ("loss", "kl", "grad_norm", "reward")] for line in lines])
    assert runs[0][0][2] > 0.01  # there is something to learn from
    for other in runs[1:]:
        assert other[0] == pytest.approx(runs[0][0], rel=1e-3, abs=1e-6)
        assert other[1] == pytest.approx(runs[0][1], rel=1e-2, abs=1e-5)


VARIANTS = ["--kl reward", "--no-std", "--token-mean --clip-high 0.28", "--mask-truncated --seed 1"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_run(manifest, tmp_path, variant):
    more = f"--updates 2 --group 3 --max-new-tokens 6 --lr 1e-3 {variant}"
    lines = grpo(manifest, tmp_path / "grpo", more)
    assert len(lines) == 2
    if "--mask-truncated" in variant:  # with this seed, nothing ends by itself
        assert lines[0]["truncated"] == 1 and lines[0]["grad_norm"] == 0


@pytest.mark.parametrize(
    "variant",
    [
        "--beta 0",
        "--beta 0 --no-std",
        "--beta 0 --token-mean --micro-batch 1",
        "--beta 0 --updates-per-rollout 2",
        "--mask-truncated",
        "--mask-truncated --token-mean",
        "--mask-truncated --kl reward",
        "--mask-truncated --updates-per-rollout 2 --micro-batch 1",
        "--mask-truncated --beta 0",
    ],
)
def test_an_update_without_a_signal_takes_no_step(manifest, tmp_path, monkeypatch, variant):
    """All rewards are equal and there is no KL, or no completion counts: after an update that had
    something to teach, momentum alone would move the weights."""
    update, teaches = [0], "--mask-truncated" not in variant
    steps, step = [], torch.optim.AdamW.step
    sample, reward = train_grpo.sample_groups, train_grpo.reward_groups

    def sampled(*arguments):
        rollout = sample(*arguments)
        update[0] += 1
        rollout.ended[:] = update[0] == 1
        return rollout

    def rewarded(functions, rollout):
        rewards = reward(functions, rollout)
        if update[0] == 1 or not teaches:
            rewards["variety"] = torch.arange(4.0).view(2, 2) ** 2
        return rewards

    def counted(self, *arguments):
        steps.append(update[0])
        return step(self, *arguments)

    monkeypatch.setattr(train_grpo, "sample_groups", sampled)
    monkeypatch.setattr(train_grpo, "reward_groups", rewarded)
    monkeypatch.setattr(torch.optim.AdamW, "step", counted)
    more = "--updates 3 --lr 1e-2 --save-dtype float32 --keep 9 --save-every 1 --val-every 1"
    lines = grpo(manifest, tmp_path / "grpo", f"{more} {variant}")
    assert set(steps) == {1}
    assert [line["steps_left_out"] for line in lines] == [0, 1, 1]
    assert lines[0]["grad_norm"] > 0
    assert [line["grad_norm"] for line in lines[1:]] == [0, 0]


def test_the_first_updates_check_waits_for_an_update_that_is_done(tmp_path, monkeypatch):
    """The first update's only clip is bad, so it is left out: the check comes with the next."""
    first = data.data_order(20, 20, seed=0)[0]
    (tmp_path / "broken.mp4").write_text("not a film")
    entries = [entry(i) for i in range(20)]
    entries[first]["video"] = str(tmp_path / "broken.mp4")
    manifest = write_manifest(tmp_path / "manifest.json", entries)
    checked, check = [], train_grpo.check_first_update
    monkeypatch.setattr(
        train_grpo, "check_first_update", lambda *given: (checked.append(given), check(*given))
    )
    more = "--prompts 1 --updates 3 --on-bad-clip skip"
    lines = grpo(manifest, tmp_path / "grpo", more)
    assert [line["update"] for line in lines] == [2, 3]
    assert len(checked) == 1
    monkeypatch.setitem(updates.TOLERANCE, torch.float32, -1.0)  # nothing is as near as that
    with pytest.raises(RuntimeError, match="rollout and scoring differ by"):
        grpo(manifest, tmp_path / "other", more)


def test_the_first_updates_check_waits_for_something_to_score(manifest, tmp_path, monkeypatch):
    """Without KL and with equal rewards nothing is scored, and the policy stays what it was."""
    reward, done = train_grpo.reward_groups, []

    def rewarded(functions, rollout):
        done.append(1)
        rewards = reward(functions, rollout)
        return rewards | {"variety": torch.arange(4.0).view(2, 2) * (len(done) > 1)}

    monkeypatch.setattr(train_grpo, "reward_groups", rewarded)
    monkeypatch.setitem(updates.TOLERANCE, torch.float32, -1.0)
    with pytest.raises(RuntimeError, match="rollout and scoring differ by"):
        grpo(manifest, tmp_path / "grpo", "--updates 3 --beta 0")
    assert len(done) == 2


def rollout_of(sampled_logps, **more):
    mask = torch.ones_like(sampled_logps, dtype=torch.bool)
    return train_grpo.Rollout(None, None, mask, sampled_logps, [], None, **more)


def test_a_model_that_differs_between_rollout_and_scoring_stops_the_run():
    logps = torch.randn(2, 3, 4) - 3
    same = rollout_of(logps, old_logps=logps + 1e-5, ref_logps=logps - 1e-5)
    updates.check_first_update(same, torch.float32)
    for name, number in (("scoring", "old_logps"), ("reference", "ref_logps")):
        other = rollout_of(logps, **{number: logps + 0.01})
        with pytest.raises(RuntimeError, match=f"rollout and {name} differ by 1.00e-02"):
            updates.check_first_update(other, torch.float32)
    unknown = rollout_of(logps, old_logps=torch.full_like(logps, torch.nan))
    updates.check_first_update(unknown, torch.float32)


def test_kl_in_the_reward_compares_two_scoring_passes(manifest, tmp_path, monkeypatch):
    """What sampling rounds differently, as bf16 does, must not become an advantage: divided by the
    std of a group of equal rewards it would be one of 0.6 to 1."""
    make, seen = train_grpo.make_sampler, []

    def rounding(*arguments):
        sampler = make(*arguments)
        sampler.refresh = lambda: None

        def sample(prompts, seed):
            ids, logps = sampler(prompts, seed)
            return ids, logps + 0.01 * torch.randn(logps.shape)

        sample.refresh = sampler.refresh
        return sample

    def advantages(rollout, config, advantages_of=train_grpo.advantages_of):
        seen.append(advantages_of(rollout, config))
        return seen[-1]

    monkeypatch.setattr(train_grpo, "make_sampler", rounding)
    monkeypatch.setattr(train_grpo, "advantages_of", advantages)
    monkeypatch.setitem(updates.TOLERANCE, torch.float32, 1.0)
    lines = grpo(manifest, tmp_path / "grpo", "--updates 1 --kl reward")
    assert lines[0]["zero_spread"] == 1 and 0.001 < lines[0]["mismatch"] < 0.1
    assert not seen[0].any()


def test_grpo_with_the_same_seed_is_the_same_run_with_and_without_a_feature_cache(
    manifest, tmp_path
):
    runs, cache = [], f"--cache-features {tmp_path / 'cache'}"
    for name, more in (("a", ""), ("b", ""), ("miss", cache), ("hit", cache)):
        more = f"--updates 2 --max-new-tokens 5 --seed 7 --workers 1 {more}"
        runs.append(without_times(grpo(manifest, tmp_path / name, more)))
    assert runs[0] == runs[1] == runs[2] == runs[3]


def test_features_that_are_kept_are_those_that_are_computed(manifest, tmp_path, monkeypatch):
    """Six clips, twelve prompts: in the second pass no clip is decoded and no tower runs."""
    monkeypatch.setitem(train_grpo.REWARDS, "variety", variety)
    decoded, decode, runs = [], data.decode, {}
    monkeypatch.setattr(
        data, "decode", lambda *given: (decoded.append(given[0]), decode(*given))[1]
    )
    more = f"--updates 4 --prompts 3 --lr 1e-4 --val {manifest} --val-every 2"
    for name, size in (("kept", 2 << 30), ("one", None), ("computed", 0)):
        decoded.clear()
        if size is None:  # room for a single clip
            size = 4 * 16000
        monkeypatch.setattr(data, "KEEP_BYTES", size)
        runs[name] = without_times(grpo(manifest, tmp_path / name, more)), len(decoded)
    assert runs["kept"][1] == 12 and runs["computed"][1] == 24
    assert 12 <= runs["one"][1] <= 24
    for name in ("one", "computed"):
        for line, expected in zip(runs[name][0], runs["kept"][0]):
            assert line == pytest.approx(expected, rel=1e-6, abs=1e-6)


# --------------------------------------------------------------------------------------------------
# Prompts of any kind, several at a time

MEDIA = ["<video>\n<audio>\n", "<video>\n", "<audio>\n", "<video>\n<audio>\n", "<audio>\n"]


@pytest.fixture
def mixed(tmp_path):
    """A manifest whose entries ask for both media, or for one of them."""
    entries = [entry(i, media=media) for i, media in enumerate(MEDIA)]
    return write_manifest(tmp_path / "mixed.json", entries)


def gradients(omni, reference, rollout, config):
    policy = omni.model
    policy.zero_grad()
    rollout.ref_logps = train_grpo.logps_without_gradient(reference, rollout, config)
    metrics, logps = train_grpo.add_gradients(policy, rollout, config)
    found = {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}
    return {name: grad.clone() for name, grad in found.items()}, metrics, logps


@pytest.mark.parametrize("more", ["", "--token-mean", "--beta 0.5 --mask-truncated"])
def test_prompts_in_one_pass_have_the_gradients_of_one_by_one(mixed, more):
    argv = [*GRPO, *"--prompts 5 --group 3 --max-new-tokens 6".split(), *more.split()]
    configs = [
        train_grpo.read_config([*argv, "--data", mixed, "--micro-batch", size]) for size in "1024"
    ]
    omni, reference = train_grpo.load_policy(configs[0])
    trained = train_grpo.set_trainable(omni.model)
    with torch.no_grad():  # a policy that is not its reference, so that there is a KL
        generator = torch.Generator().manual_seed(0)
        for p in trained.values():
            p.add_(0.01 * p.std() * torch.randn(p.shape, generator=generator))
    examples = flags.read_examples([mixed], configs[0])
    clips = data.clips_of(omni.model, examples)
    (items,) = data.batches(clips, range(5), 5)
    batch = data.encode(omni, clips, items)
    assert len(set(batch.prompt_lengths)) == 3
    sampler = train_grpo.make_sampler(omni, examples, configs[0])
    rollout = train_grpo.sample_groups(sampler, omni, batch, seed=3)
    rollout.mask[0, 0, 3:] = False  # completions of unequal length
    rollout.ended[::2] = True
    rollout.advantages = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
    (expected, metrics, logps), *others = [
        gradients(omni, reference, rollout, config) for config in configs
    ]
    norm = torch.stack([grad.norm() for grad in expected.values()]).norm()
    assert norm > 1e-3 and metrics["kl"] > 1e-6 and len(expected) > 100
    for found, found_metrics, found_logps in others:
        assert found.keys() == expected.keys()
        for name, grad in expected.items():
            assert (found[name] - grad).abs().max() <= 1e-6 * max(1, norm), name
        assert found_metrics == pytest.approx(metrics, rel=1e-4, abs=1e-7)
        # A prompt of which no completion counts is scored in the company of others only.
        known = ~(found_logps.isnan() | logps.isnan())
        assert known.any()
        torch.testing.assert_close(found_logps[known], logps[known], rtol=1e-5, atol=1e-5)


def test_a_manifest_of_different_media_is_evaluated_as_one_by_one(mixed, tmp_path):
    results = [
        evaluation(mixed, tmp_path / size, f"--batch-size {size} --max-new-tokens 6")
        for size in ("1", "2", "5")
    ]
    alone = []
    for i, media in enumerate(MEDIA):
        path = write_manifest(tmp_path / f"alone_{i}.json", [entry(i, media=media)])
        (row,) = evaluation(path, tmp_path / "alone", "--max-new-tokens 6")["completions"]
        alone.append(row["completion"])
    assert len(set(alone)) > 2  # what is given matters
    for result in results:
        assert [row["completion"] for row in result["completions"]] == alone


def test_a_manifest_of_different_media_trains_as_one_by_one(mixed, tmp_path, monkeypatch):
    monkeypatch.setitem(train_grpo.REWARDS, "variety", variety)
    runs = []
    for size in ("0", "1"):
        more = f"--updates 2 --prompts 5 --max-new-tokens 6 --lr 1e-4 --micro-batch {size}"
        runs.append(without_times(grpo(mixed, tmp_path / f"grpo_{size}", more)))
    assert runs[0][0]["grad_norm"] > 0.01
    assert runs[1][0] == pytest.approx(runs[0][0], rel=1e-3, abs=1e-6)
    losses = []
    for size in ("0", "1"):
        more = f"--question manifest --steps 3 --batch-size 5 --lr 1e-3 --micro-batch {size}"
        losses.append([line["loss"] for line in sft(mixed, tmp_path / f"sft_{size}", more)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_special_tokens_inside_a_completion_are_trained_on_but_no_text(model):
    from text import Tokenizer

    tokenizer = Tokenizer(CHECKPOINT)
    end, start = tokenizer.eos_token_id, tokenizer.tokenizer.token_to_id("<|im_start|>")
    assert start not in tokenizer.eos_token_ids
    words = tokenizer.encode("<answer>sad</answer>")
    ids = torch.tensor([*words[:2], start, *words[2:], end, words[0], end])
    assert data.completion_text(tokenizer, ids) == ("<answer>sad</answer>", True)
    mask = train_grpo.completion_mask(ids, tokenizer.eos_token_ids)
    assert mask.tolist() == [True] * (len(words) + 2) + [False] * 2
    assert data.completion_text(tokenizer, ids[: len(words) + 1])[1] is False


def test_every_eos_that_the_checkpoint_names_ends_a_completion(tmp_path, monkeypatch):
    """generation_config.json names a second one: the token that this model says first."""
    ids, generate = [], evaluate.generate
    monkeypatch.setattr(evaluate, "generate", lambda *g: (ids.append(generate(*g)), ids[-1])[1])
    manifest = write_manifest(tmp_path / "m.json", [entry(0)])
    (row,) = evaluation(manifest, tmp_path / "one")["completions"]
    assert row["tokens"] == 4 and row["truncated"]
    model = Path(shutil.copytree(CHECKPOINT, tmp_path / "model"))
    file = model / "generation_config.json"
    config = json.loads(file.read_text())
    first = int(ids[0][0, 0, 0])
    assert config["eos_token_id"] != first
    file.write_text(json.dumps(config | {"eos_token_id": [first]}))
    (row,) = evaluation(manifest, tmp_path / "two", f"--model {model}")["completions"]
    assert ids[-1].shape == (1, 1, 1)
    assert row["tokens"] == 1 and not row["truncated"]
    lines = grpo(manifest, tmp_path / "grpo", f"--model {model} --updates 1 --prompts 1 --group 64")
    assert lines[0]["truncated"] < 1


def test_one_medium_leaves_the_other_tower_alone(manifest, tmp_path, monkeypatch):
    ran = []
    for tower in (AudioTower, VisionTower):
        monkeypatch.setattr(
            tower,
            "forward",
            lambda self, x, own=tower.forward: (ran.append(type(self).__name__), own(self, x))[1],
        )
    for modality, tower in (("video", "VisionTower"), ("audio", "AudioTower")):
        for script in (grpo, sft):
            for room, times in ((0, 1), (data.KEEP_BYTES, 2)):
                monkeypatch.setattr(data, "KEEP_BYTES", room)
                ran.clear()
                script(manifest, tmp_path / modality, f"--modality {modality}" + GIVEN[script])
                assert set(ran) == {tower}
                # And once per batch, policy and reference together; or, kept, once per clip.
                assert len(ran) == times


GIVEN = {grpo: " --updates 1", sft: " --steps 1"}


def test_cached_features_are_those_of_the_towers(manifest, tmp_path, model, monkeypatch):
    """A hit equals a miss, towers do not run again, and the key changes with file, frames, fit and
    towers."""
    examples, cache = data.read_manifest(manifest)[:2], tmp_path / "cache"
    for example in examples:
        example.video = Path(shutil.copy(example.video, tmp_path))

    def encoded(fit="pad", folder=cache):
        (items,) = data.batches(data.clips_of(model, examples, fit, folder), [0, 1], 2)
        data.run_towers(model, items)
        return [item[name] for item in items for name in ("video", "audio")]

    expected = encoded(folder=None)
    miss = encoded()
    assert len(list(cache.iterdir())) == 2
    runs, forward = [], VisionTower.forward
    monkeypatch.setattr(
        VisionTower, "forward", lambda self, x: (runs.append(1), forward(self, x))[1]
    )
    hit = encoded()
    assert not runs
    for a, b, c in zip(expected, miss, hit):
        assert torch.equal(a, b) and torch.equal(a, c)
    encoded("squash")
    assert len(runs) == 1 and len(list(cache.iterdir())) == 4
    with torch.no_grad():
        model.audio_tower.conv1.bias[0] += 1
    encoded()
    assert len(runs) == 2 and len(list(cache.iterdir())) == 6
    model.configs["llm"]["num_frames"] = 2
    encoded()
    assert len(runs) == 3 and len(list(cache.iterdir())) == 8
    os.utime(examples[0].video)
    encoded()
    assert len(runs) == 4 and len(list(cache.iterdir())) == 9


# --------------------------------------------------------------------------------------------------
# Evaluation


def test_evaluate_a_manifest_and_a_clip(manifest, tmp_path, capsys):
    out = tmp_path / "results"
    result = evaluation(manifest, out, "--max-new-tokens 5 --batch-size 4")
    printed = capsys.readouterr().out
    for word in ("n 6", "WAR", "UAR", "recall", "unknown words", "unformatted", *LABELS):
        assert word in printed
    assert len(result["completions"]) == 6
    assert {"video", "label", "completion"} <= result["completions"][0].keys()
    settings = result["settings"]
    assert settings["max_new_tokens"] == 5
    assert settings["fit"] == "pad"
    assert settings["question"] == "reasoning"
    assert sorted(file.name for file in out.iterdir()) == [
        "manifest.json",
        "manifest_confusion.png",
    ]
    evaluate.main([*EVALUATE, "--clip", CLIPS[0], "--max-new-tokens", "5"])
    # The same, alone.
    assert capsys.readouterr().out.strip() == result["completions"][0]["completion"].strip()


def test_clips_are_answered_in_python_and_from_the_command_line(tmp_path, capsys):
    """One clip, a list, a folder: the same answers, which JSON lines hold as well."""
    quick = {"max_new_tokens": 5, "workers": 0, "device": "cpu"}
    answer = evaluate.answerer(CHECKPOINT, **quick)
    think, word = answer(CLIPS[0])
    assert (think, word) == answer([Path(CLIPS[0])])[0]
    both = answer(CLIPS)
    assert both[0] == (think, word) and len(both) == 2
    assert evaluate.answerer(CHECKPOINT, question="label", **quick)(CLIPS[0]) != (think, word)
    with pytest.raises(DataError, match="nowhere.mp4"):
        answer("nowhere.mp4")
    with pytest.raises(DataError, match="a clip gets one answer here"):
        evaluate.answerer(CHECKPOINT, samples=2)

    folder, out = tmp_path / "folder", tmp_path / "out"
    folder.mkdir()
    for clip in CLIPS:
        shutil.copy(clip, folder)
    (folder / "notes.txt").write_text("no clip")
    evaluate.main([*EVALUATE, "--clip", str(folder), "--max-new-tokens", "5", "--out", str(out)])
    lines = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    assert [Path(line["clip"]).name for line in lines] == sorted(Path(c).name for c in CLIPS)
    assert [(line["think"], line["answer"]) for line in lines] == both
    printed = capsys.readouterr().out
    assert all(line["clip"] in printed and line["completion"] in printed for line in lines)
    assert [file.name for file in out.iterdir()] == ["answers.jsonl"]
    with pytest.raises(DataError, match="answers.jsonl: is there already; delete it or choose"):
        evaluate.main([*EVALUATE, "--clip", *CLIPS, "--out", str(out)])
    with pytest.raises(DataError, match="--aliases is for --data, not --clip"):
        evaluate.main([*EVALUATE, "--clip", CLIPS[0], "--aliases"])
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "._clip.mp4").write_text("as macOS leaves it")
    with pytest.raises(DataError, match="empty: holds no media file"):
        evaluate.main([*EVALUATE, "--clip", str(tmp_path / "empty")])


def test_the_readmes_five_lines_are_a_script(tmp_path):
    """Saved as they are: nothing reads the script again, as processes that decode would."""
    lines = ["from evaluate import answerer", f"answer = answerer({CHECKPOINT!r})"]
    lines += [f"think, word = answer({CLIPS[0]!r})", f"print(len(answer({CLIPS!r})), 'answers')"]
    (tmp_path / "mine.py").write_text("\n".join(lines))
    done = subprocess.run(
        [sys.executable, "mine.py"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "2 answers\n", done.stderr


@pytest.fixture
def stopped_evaluation(manifest, tmp_path, monkeypatch):
    """An evaluation that was interrupted in its second batch -> its flags, and the sizes of all
    batches from then on."""
    calls, generate = [], evaluate.generate

    def stopping(model, prompts, *rest):
        calls.append(len(prompts))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return generate(model, prompts, *rest)

    command = [*EVALUATE, "--data", manifest, *"--max-new-tokens 5 --batch-size 2".split()]
    command += ["--out", str(tmp_path / "stopped")]
    monkeypatch.setattr(evaluate, "generate", stopping)
    with pytest.raises(KeyboardInterrupt):
        evaluate.main(command)
    return command, calls


def test_an_interrupted_evaluation_goes_on(stopped_evaluation, manifest, tmp_path):
    """Stopped after the first batch, then started again: the same results, and no completion made
    twice."""
    command, calls = stopped_evaluation
    log = tmp_path / "stopped" / "manifest.partial.jsonl"
    log.write_text(log.read_text() + '{"index": 5, "vid')  # torn in the middle of a line, too
    with pytest.raises(DataError, match="other settings"):
        evaluate.main([*command, "--fit", "squash"])
    evaluate.main(command)
    assert calls == [2, 2, 2, 2]  # done, interrupted, and the two that were left
    whole = evaluation(manifest, tmp_path / "whole", "--max-new-tokens 5 --batch-size 2")
    stopped = json.loads((tmp_path / "stopped" / "manifest.json").read_text())
    assert whole["completions"] == stopped["completions"]
    assert whole["metrics"] == stopped["metrics"]
    assert not log.exists()


def test_completions_may_hold_what_other_alphabets_end_lines_with(tmp_path):
    log, row = tmp_path / "x.partial.jsonl", {"index": 0, "completion": "a\u2028b\x85c\x0bd\r\ne"}
    evaluate.start_log(log, {"settings": 1})
    evaluate.append_rows(log, [row])
    evaluate.start_log(log, {"settings": 1})  # an interrupted evaluation goes on
    assert evaluate.read_log(log, samples=1) == [row]
    torn = json.dumps({**row, "completion": "é"}, ensure_ascii=False).encode()
    log.write_bytes(log.read_bytes() + torn[: torn.index("é".encode()) + 1])  # within a letter
    evaluate.start_log(log, {"settings": 1})
    assert evaluate.read_log(log, samples=1) == [row]
    log.write_text(log.read_text() + "no JSON\n")
    with pytest.raises(DataError, match="x.partial.jsonl: cannot be read as JSON lines"):
        evaluate.start_log(log, {"settings": 1})


def test_an_interrupted_evaluation_does_not_go_on_with_another_manifest(
    stopped_evaluation, manifest, tmp_path
):
    """The same entries in another order: rows are known by their number, so some clips would count
    twice and others never."""
    command, calls = stopped_evaluation
    log = tmp_path / "stopped" / "manifest.partial.jsonl"
    before = log.read_bytes()
    entries = json.loads(Path(manifest).read_text())
    write_manifest(manifest, entries[::-1])
    with pytest.raises(DataError, match="manifest.partial.jsonl.*another manifest.*delete it"):
        evaluate.main(command)
    assert log.read_bytes() == before and not (tmp_path / "stopped" / "manifest.json").exists()
    write_manifest(manifest, entries)
    evaluate.main(command)
    result = json.loads((tmp_path / "stopped" / "manifest.json").read_text())
    assert [row["index"] for row in result["completions"]] == list(range(6))
    assert [row["video"] for row in result["completions"]] == CLIPS * 3


def test_several_manifests_each_medium_and_the_table(manifest, tmp_path, capsys):
    copy = write_manifest(tmp_path / "other" / "manifest.json")
    out = tmp_path / "results"
    more = [*"--modality-report --limit 2 --out".split(), str(out)]
    evaluate.main([*EVALUATE, "--data", manifest, copy, *more])
    files = sorted(out.glob("*.json"))
    assert len(files) == 6
    names = {file.name for file in files}
    assert {"other_manifest.audio.json", "other_manifest.video.json"} <= names
    results = {file.name: json.loads(file.read_text()) for file in files}
    said = [
        results[f"other_manifest.{medium}.json"]["completions"][0]["completion"]
        for medium in ("video_audio", "video", "audio")
    ]
    assert len(set(said)) == 3  # what is given matters
    capsys.readouterr()
    evaluate.main(["--table", *map(str, files), "--published"])
    printed = capsys.readouterr().out
    assert "| R1-Omni (published) |" in printed
    assert "65.83 | 56.27" in printed
    assert "other_manifest.audio WAR" in printed
    result = results[files[0].name]
    (tmp_path / "mine.json").write_text(json.dumps({**result, "name": "dfew_test"}))
    evaluate.main(["--table", str(tmp_path / "mine.json"), "--published"])
    # In the column of the published numbers.
    assert "DFEW WAR | DFEW UAR | MAFW WAR" in capsys.readouterr().out
    with pytest.raises(DataError, match="is no result"):
        evaluate.main(["--table", manifest])


def test_no_result_hides_another_in_a_table(tmp_path):
    def result(file, name, model="m"):
        metrics = dict.fromkeys(("war", "uar"), 0.5)
        metrics |= dict.fromkeys(("n", "unknown", "unformatted", "truncated"), 1)
        found = {"name": name, "settings": {"model": model}, "metrics": metrics}
        (tmp_path / file).write_text(json.dumps(found))
        return str(tmp_path / file)

    names = ["dfew_test", "dfew_test.audio", "dfew_train"]
    files = [result(f"{i}.json", name) for i, name in enumerate(names)]
    table = run_results.results_table(files)
    assert all(f"{name} WAR" in table for name in ("DFEW", "dfew_test.audio", "dfew_train"))
    again = result("again.json", "DFEW")
    with pytest.raises(DataError, match="again.json: a second result of m on DFEW"):
        run_results.results_table([*files, again])
    assert "| n |" in run_results.results_table([*files, result("other.json", "DFEW", "n")])
    none = tmp_path / "none.json"
    none.write_text(Path(again).read_text().replace('"war": 0.5', '"war": null'))
    with pytest.raises(DataError, match="none.json: its WAR and UAR are no numbers"):
        run_results.scores_of([none])


def test_a_check_may_not_take_a_metrics_name():
    row = {"index": 0, "label": "sad", "completion": "sad", "tokens": 1, "truncated": False}
    with pytest.raises(DataError, match="--check says war, a metric already; rename it"):
        evaluate.score([row | {"checks": {"war": True}}])


def test_text_alone_has_no_medium_to_ask_for():
    text = data.Example(None, "?", "sad", "text")
    clip = data.Example(Path("a.mp4"), "?", "sad", "video_audio")
    config = train_grpo.Config(modality="video")
    assert [flags.as_asked(e, config).modality for e in (text, clip)] == ["text", "video"]


def test_wrong_names_are_found_before_the_toy_is_made(monkeypatch):
    def never(config):
        raise AssertionError("the toy is made")

    monkeypatch.setattr("toy.stages.fill_in", never)
    for name in ("--reward", "--check"):
        with pytest.raises(DataError, match=f"{name} nothere:f: cannot be found"):
            train_grpo.main([name, "nothere:f"])


def test_a_folder_of_one_clip_and_clips_left_out_are_said(tmp_path, capsys):
    folder, out = tmp_path / "folder", tmp_path / "out"
    folder.mkdir()
    shutil.copy(CLIPS[0], folder / "0.mp4")
    evaluate.main([*EVALUATE, "--clip", str(folder), "--out", str(out)])
    assert len((out / "answers.jsonl").read_text().splitlines()) == 1
    for i in range(1, 20):
        (folder / f"{i}.mp4").symlink_to(CLIPS[0])
    (folder / "bad.mp4").write_text("no clip")
    more = ["--on-bad-clip", "skip", "--out", str(tmp_path / "other")]
    evaluate.main([*EVALUATE, "--clip", str(folder), *more])
    assert "clips left out are listed in" in capsys.readouterr().out


def test_several_samples_of_one_clip_are_printed(capsys):
    printed = []
    for samples in ("1", "3"):
        more = ["--temperature", "1", "--samples", samples]
        evaluate.main([*EVALUATE, "--clip", CLIPS[0], *more])
        printed.append(capsys.readouterr().out)
    assert len(printed[1]) > len(printed[0])


def test_a_users_module_may_put_folders_on_the_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    Path("mine_first.py").write_text("import sys\nsys.path.insert(0, 'own')\ndef f(): pass\n")
    find_function("--check", "mine_first:f")
    assert sys.path[0] == "own" and "" not in sys.path


def test_folds_of_one_name_leave_a_result_each(tmp_path):
    manifests = []
    for fold, count in (("f1", 1), ("f2", 2)):
        entries = [entry(i) for i in range(count)]
        manifests.append(write_manifest(tmp_path / fold / "dfew" / "test.json", entries))
    evaluate.main([*EVALUATE, "--data", *manifests, "--out", str(tmp_path / "out")])
    results = {}
    for file in (tmp_path / "out").glob("*.json"):
        results[file.name] = json.loads(file.read_text())["metrics"]["n"]
    assert results == {"f1_dfew_test.json": 1, "f2_dfew_test.json": 2}
    assert len(list((tmp_path / "out").glob("*_confusion.png"))) == 2


@pytest.mark.parametrize(
    "paths, names",
    [
        (["dfew/test.json"], ["test"]),
        (["dfew.json", "mafw.json"], ["dfew", "mafw"]),
        (["dfew/test.json", "mafw/test.json"], ["dfew_test", "mafw_test"]),
        (["a/x/t.json", "b/x/t.json", "b/y/t.json"], ["a_x_t", "b_x_t", "b_y_t"]),
        (["test.json", "test.jsonl"], None),
        (["a/b_c.json", "a_b/c.json", "x/c.json"], None),
        (["a_b/c.json", "a/b_c.json", "x/a_b/c.json", "x/a/b_c.json"], None),
    ],
)
def test_results_have_names_of_their_own(paths, names):
    found = evaluate.unique_names([f"/{path}" for path in paths])
    assert len(set(found)) == len(paths)
    assert found == (names or found)
    assert not any("/" in name for name in found)


def test_a_manifest_given_twice_is_refused(manifest, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for again in (manifest, "manifest.json", f"{tmp_path}/x/../manifest.json"):
        (tmp_path / "x").mkdir(exist_ok=True)
        with pytest.raises(DataError, match="a manifest is given twice"):
            evaluate.main([*EVALUATE, "--data", manifest, again, "--out", "out"])
        with pytest.raises(DataError, match="a manifest is given twice"):
            grpo(manifest, "out", f"--test {manifest} {again}")
    assert not Path("out").exists()


def test_what_is_no_result_of_this_manifest_is_not_replaced(tmp_path):
    """One evaluation after the other into one folder, of manifests of one name; and one into the
    folder of the manifest itself."""
    first = write_manifest(tmp_path / "dfew" / "test.json")
    second = write_manifest(tmp_path / "mafw" / "test.json", [entry(0)])
    evaluation(first, tmp_path / "out")
    before = (tmp_path / "out" / "test.json").read_bytes()
    for manifest, out in ((second, tmp_path / "out"), (first, tmp_path / "dfew")):
        content = (out / "test.json").read_bytes()
        with pytest.raises(DataError, match="test.json: is not a result of .*another --out"):
            evaluation(manifest, out)
        assert (out / "test.json").read_bytes() == content
    assert (tmp_path / "out" / "test.json").read_bytes() == before
    with pytest.raises(DataError, match="test.json: is not a result of .*another --out"):
        evaluate.main(
            [*EVALUATE, "--model", "another", "--data", first, "--out", f"{tmp_path}/out"]
        )
    # An earlier result of the same model and manifest gives way to a new one.
    assert len(evaluation(first, tmp_path / "out", "--limit 2")["completions"]) == 2


def test_test_sets_of_one_name_have_a_row_each(manifest, tmp_path, capsys):
    tests = []
    for name, count in (("dfew", 1), ("mafw", 2)):
        entries = [entry(i) for i in range(count)]
        tests.append(write_manifest(tmp_path / name / "test.json", entries))
    grpo(manifest, tmp_path / "grpo", f"--updates 1 --test {' '.join(tests)}")
    results = json.loads((tmp_path / "grpo" / "results.json").read_text())
    for when in ("before", "after"):
        counts = {name: result["n"] for name, result in results[when].items()}
        assert counts == {"dfew_test": 1, "mafw_test": 2}
    printed = capsys.readouterr().out
    assert printed.count("dfew_test ") == printed.count("mafw_test ") == 2


def test_bad_clips_stop_the_run_or_are_left_out_and_listed(tmp_path):
    good = entry(1)
    (tmp_path / "broken.mp4").write_text("not a film")
    bad = {**good, "video": str(tmp_path / "broken.mp4")}
    path = write_manifest(tmp_path / "m.json", [good] * 3 + [bad] + [good] * 16)
    more, out = "--max-new-tokens 2 --batch-size 4", tmp_path / "out"
    with pytest.raises(DataError, match="broken.mp4"):
        evaluation(path, out, more)
    # Goes on from there; 1 of 20 is not more than 5 %.
    result = evaluation(path, out, f"{more} --on-bad-clip skip")
    assert result["metrics"]["n"] == 19
    assert 3 not in {row["index"] for row in result["completions"]}
    assert "broken.mp4" in (out / "m.skipped.txt").read_text()
    write_manifest(path, [good] * 3 + [bad] + [good] * 10)
    with pytest.raises(DataError, match="1 of 14 clips cannot be used"):
        evaluation(path, out, f"{more} --on-bad-clip skip")


def test_presets_are_the_papers_and_flags_win():
    argv = ["--preset", "paper", "--group", "4"]
    config = flags.parse_flags(train_grpo.Config, "", argv, {"paper": train_grpo.PAPER})
    assert config.updates == 0  # by epochs
    assert (config.lr, config.beta, config.epochs) == (1e-6, 0.04, 2)
    assert (config.prompts, config.group, config.max_new_tokens) == (16, 4, 512)
    assert config.updates_per_rollout == 1 and (config.clip_eps, config.clip_high) == (0.2, 0)
    argv = "--preset paper --epochs 1 --batch-size 128".split()
    config = flags.parse_flags(train_sft.Config, "", argv, {"paper": train_sft.PAPER})
    assert (config.lr, config.epochs, config.batch_size) == (2e-5, 1, 128)


def test_aliases_count_only_on_request():
    rows = [
        {"label": "angry", "completion": "Anger.", "tokens": 1, "truncated": False},
        {"label": "happiness", "completion": "joyful", "tokens": 1, "truncated": False},
        {"label": "sad", "completion": "angry", "tokens": 1, "truncated": False},
    ]
    rows = [{**row, "index": i} for i, row in enumerate(rows)]
    exact, loose = evaluate.score(rows), evaluate.score(rows, aliases=True)
    assert exact["war"] == 0 and exact["unknown"] == 2
    assert loose["war"] == 2 / 3 and loose["unknown"] == 0
    assert set(loose["recall"]) == {"angry", "happy", "sad"}


def test_score_by_hand():
    def row(label, answer, formatted=True):
        completion = f"<think>x</think><answer>{answer}</answer>" if formatted else answer
        return {"label": label, "completion": completion, "tokens": 10, "truncated": False}

    rows = [
        row("happy", "happy"),
        row("happy", "Happy."),
        row("happy", "sad"),
        row("happy", "joyful"),
        row("sad", "sad"),
        row("angry", "sad", formatted=False),
    ]
    result = evaluate.score([{**row, "index": i} for i, row in enumerate(rows)])
    assert result["n"] == 6 and result["war"] == 3 / 6
    assert result["recall"] == {"angry": 0.0, "happy": 0.5, "sad": 1.0} and result["uar"] == 0.5
    assert result["unknown"] == 1 and result["unformatted"] == 1 and result["format"] == 5 / 6
    assert result["confusion"]["happy"] == {"happy": 2, "joyful": 1, "sad": 1}


SAID = [
    "<think>In the video, {}. In the audio, {}.</think><answer>happy</answer>".format(*cues)
    for cues in [
        ("the mouth smiles", "the voice is high and fast"),
        ("the mouth turns down", "the voice is high and fast"),
    ]
]


def test_statements_are_checked_against_what_face_and_voice_did(tmp_path, monkeypatch):
    """--check of the toy's own function, from the manifest's other keys to the result."""
    known = {**entry(0), "face": "smile", "voice": "high_fast"}
    manifest = write_manifest(tmp_path / "m.json", [known, entry(1)])
    said = iter([(SAID[0], True), (SAID[1], True), ("happy", True), ("happy", True)])
    monkeypatch.setattr(evaluate, "completion_text", lambda *_: next(said))
    more = "--check toy.world:check_statements --samples 2 --temperature 1"
    result = evaluation(manifest, tmp_path / "out", more)["metrics"]
    assert (result["n"], result["completions"]) == (2, 4)  # two samples of each clip
    # Of the second clip nothing is known.
    assert result["face_true"] == 0.5 and result["voice_true"] == 1.0
    # A frown and a high, fast voice are no emotion's.
    assert result["eea"] == result["epc"] == result["fcr"] == 0.5


# --------------------------------------------------------------------------------------------------
# What is refused, and how


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--group", "1"], "--group must be at least 2, not 1"),
        (["--max-new-tokens", "0"], "--max-new-tokens must be at least 1"),
        (["--prompts", "-3"], "--prompts must be at least 1"),
        (["--model", CHECKPOINT], "needs --data"),
        (["--model", CHECKPOINT, "--data", "nowhere.json"], "nowhere.json"),
        (
            ["--model", CHECKPOINT, "--data", "nowhere.json", "--kl", "reward", "--beta", "0"],
            "--kl reward needs a --beta above 0",
        ),
    ],
)
def test_grpo_refuses_what_it_cannot_do(arguments, message, tmp_path):
    with pytest.raises(DataError, match=message):
        train_grpo.main([*arguments, "--out", str(tmp_path / "x")])


@pytest.mark.parametrize("script", ["train_sft.py", "train_grpo.py", "evaluate.py"])
def test_a_users_error_is_one_line_and_exit_code_2(script, tmp_path):
    command = [
        sys.executable,
        str(ROOT / script),
        "--model",
        str(tmp_path),
        "--data",
        "nowhere.json",
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert "config.json: not found" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("module", [train_sft, train_grpo, evaluate])
def test_help_names_flags_and_defaults(module, capsys):
    with pytest.raises(SystemExit, match="^0$"):
        module.main(["--help"])
    shown = capsys.readouterr().out
    assert "--model" in shown and "default" in shown


def test_library_files_import_only_what_they_may():
    """Each of these can be copied into another project, alone or with the files named here."""
    allowed = {
        "rewards.py": set(),
        "grpo.py": {"torch"},
        "support/kv_cache.py": {"torch"},
        "generate.py": {"torch", "grpo", "support.kv_cache"},
        "checkpoint.py": {"torch", "safetensors"},
        "model.py": {"torch", "checkpoint"},
    }
    for file, packages in allowed.items():
        imported = set()
        for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                package = node.module.split(".")[0]
                imported.add(node.module if package == "support" else package)
        assert imported <= packages | sys.stdlib_module_names, (file, imported)
