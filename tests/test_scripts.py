"""Every script, end to end for a few steps, on the small golden checkpoint and real mp4 files; and what they refuse."""

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import GOLDEN, ROOT
from safetensors.torch import load_file

import checkpoint
import common
import evaluate
import train_grpo
import train_sft
from data import QUESTION_REASONING, DataError, Example
from model import HumanOmni

CHECKPOINT = str(GOLDEN / "tiny" / "humanomni")
LABELS = ["happy", "sad", "angry"]


@pytest.fixture
def manifest(tmp_path):
    """Six labelled entries over the two golden clips."""
    entries = [
        {
            "video": str(GOLDEN / "media" / f"clip{'16k' * (i % 2)}.mp4"),
            "conversations": [
                {"from": "human", "value": f"<video>\n<audio>\n{QUESTION_REASONING}"},
                {"from": "gpt", "value": LABELS[i % 3]},
            ],
        }
        for i in range(6)
    ]
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(entries))
    return str(path)


def read_metrics(folder):
    config, *lines = [
        json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]
    return config, lines


def test_sft_trains_what_it_should_and_nothing_else(manifest, tmp_path):
    train_sft.main(
        [
            "--model",
            CHECKPOINT,
            "--data",
            manifest,
            "--out",
            str(tmp_path / "sft"),
            "--steps",
            "12",
            "--batch-size",
            "3",
            "--micro-batch",
            "2",
            "--lr",
            "3e-3",
            "--save-dtype",
            "float32",
            "--workers",
            "0",
        ]
    )
    _, lines = read_metrics(tmp_path / "sft")
    assert len(lines) == 12 and lines[-1]["loss"] < 0.7 * lines[0]["loss"]
    before, after = (
        load_file(f"{folder}/model.safetensors") for folder in (CHECKPOINT, tmp_path / "sft")
    )
    moved = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    frozen = ("model.vision_tower", "model.audio_tower", "model.bert_model")
    # All that trains has moved, but for the word pieces: those that never occurred keep their embeddings' rows.
    assert moved == {name for name in after if not name.startswith(frozen)}
    HumanOmni.from_pretrained(tmp_path / "sft")


def test_micro_batches_change_nothing(manifest, tmp_path):
    losses = []
    for size in ("0", "1", "4"):
        train_sft.main(
            [
                "--model",
                CHECKPOINT,
                "--data",
                manifest,
                "--out",
                str(tmp_path / size),
                "--steps",
                "3",
                "--batch-size",
                "6",
                "--micro-batch",
                size,
                "--lr",
                "1e-3",
                "--workers",
                "0",
            ]
        )
        losses.append([line["loss"] for line in read_metrics(tmp_path / size)[1]])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4) and losses[2] == pytest.approx(
        losses[0], rel=1e-4
    )


def test_sft_of_nothing_is_refused(manifest, tmp_path):
    with pytest.raises(DataError, match="nothing to train"):
        train_sft.main(
            [
                "--model",
                CHECKPOINT,
                "--data",
                manifest,
                "--out",
                str(tmp_path / "sft"),
                "--epochs",
                "0",
                "--workers",
                "0",
            ]
        )
    assert not (tmp_path / "sft").exists()


def test_towers_train_on_request(manifest, tmp_path):
    train_sft.main(
        [
            "--model",
            CHECKPOINT,
            "--data",
            manifest,
            "--out",
            str(tmp_path / "sft"),
            "--steps",
            "1",
            "--batch-size",
            "2",
            "--lr",
            "1e-3",
            "--train-towers",
            "--save-dtype",
            "float32",
            "--workers",
            "0",
        ]
    )
    before, after = (
        load_file(f"{folder}/model.safetensors") for folder in (CHECKPOINT, tmp_path / "sft")
    )
    moved = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert any("vision_tower" in name for name in moved) and any(
        "audio_tower" in name for name in moved
    )
    assert not any("bert_model" in name for name in moved)


@pytest.mark.parametrize("beta, steps_per_rollout", [("0.04", "1"), ("0.04", "2"), ("0", "1")])
def test_grpo_runs_end_to_end(manifest, tmp_path, beta, steps_per_rollout, capsys):
    out = tmp_path / "grpo"
    train_grpo.main(
        [
            "--model",
            CHECKPOINT,
            "--data",
            manifest,
            "--val",
            manifest,
            "--test",
            manifest,
            "--out",
            str(out),
            "--updates",
            "3",
            "--prompts",
            "2",
            "--group",
            "3",
            "--max-new-tokens",
            "6",
            "--lr",
            "1e-3",
            "--beta",
            beta,
            "--updates-per-rollout",
            steps_per_rollout,
            "--val-every",
            "2",
            "--show-every",
            "1",
            "--workers",
            "1",
        ]
    )
    _, lines = read_metrics(out)
    assert [line["update"] for line in lines] == [1, 2, 3] and lines[0]["lr"] == 1e-3 > lines[2][
        "lr"
    ]
    assert all(0 <= line["reward_format"] <= 1 and line["completion_length"] <= 6 for line in lines)
    assert ["val_war" in line for line in lines] == [
        False,
        True,
        True,
    ]  # every second update, and the last
    assert all((line["kl"] is None) == (beta == "0") for line in lines)
    if beta != "0" and steps_per_rollout == "1":
        assert (
            lines[0]["kl"] < 1e-6 and abs(lines[0]["loss"]) < 1e-5
        )  # the policy is the reference; the ratio is 1
    for folder in ("last", "best"):
        HumanOmni.from_pretrained(out / folder)
    assert (out / "curves.png").stat().st_size > 10_000
    results = json.loads((out / "results.json").read_text())
    assert results["before"]["manifest"]["n"] == results["after"]["manifest"]["n"] == 6
    printed = capsys.readouterr().out
    assert "advantage" in printed and "WAR" in printed and "label: " in printed


def test_a_sample_is_shown_with_its_parts():
    example = Example(Path("a/b.mp4"), QUESTION_REASONING, "sad", "video_audio")
    texts = ["<think>x</think>\n<answer>sad</answer>", "", "<answer>happy</answer>"]
    rewards = {"accuracy": torch.tensor([1.0, 0.0, 0.0]), "format": torch.tensor([1.0, 0.0, 0.0])}
    shown = train_grpo.show(
        example, texts, rewards, torch.tensor([1.15, -0.58, -0.57]), 7
    ).splitlines()
    assert shown[1] == "── update 7 · a/b.mp4 · label: sad"
    assert (
        shown[2].startswith("   asked   As an emotional")
        and sum("asked" in line for line in shown) == 1
    )  # the prompt once
    best, worst = (
        i for i, line in enumerate(shown) if "advantage" in line
    )  # the second is the worst, not the third
    assert shown[best : best + 3] == [
        "   accuracy 1  format 1  advantage +1.15",
        "           <think>x</think>",
        "           <answer>sad</answer>",
    ]
    assert shown[worst] == "   accuracy 0  format 0  advantage -0.58"


def test_kl_in_the_reward_does_not_blur_what_is_logged(manifest, tmp_path):
    train_grpo.main(
        [
            "--model",
            CHECKPOINT,
            "--data",
            manifest,
            "--out",
            str(tmp_path / "grpo"),
            "--updates",
            "3",
            "--prompts",
            "2",
            "--group",
            "3",
            "--max-new-tokens",
            "6",
            "--lr",
            "1e-2",
            "--kl",
            "reward",
            "--beta",
            "1",
            "--workers",
            "0",
        ]
    )
    _, lines = read_metrics(tmp_path / "grpo")
    assert lines[-1]["kl"] > 0 and all(
        line["reward"] == line["reward_accuracy"] + line["reward_format"] for line in lines
    )
    assert lines[-1]["grad_norm"] > 0  # all rewards are 0; the KL in them pulls


def test_curves_are_drawn_during_the_run(manifest, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(train_grpo, "draw_curves", lambda metrics, path: drawn.append(len(metrics)))
    train_grpo.main(
        [
            "--model",
            CHECKPOINT,
            "--data",
            manifest,
            "--out",
            str(tmp_path / "grpo"),
            "--updates",
            "4",
            "--prompts",
            "2",
            "--group",
            "2",
            "--max-new-tokens",
            "2",
            "--val-every",
            "2",
            "--workers",
            "0",
            "--lr",
            "0",
        ]
    )
    assert drawn == [2, 4, 4]


def test_grpo_micro_batches_change_nothing(manifest, tmp_path, monkeypatch):
    """Completions scored two at a time, and G together: the same loss, KL and gradient norm."""
    monkeypatch.setitem(
        train_grpo.REWARDS, "variety", lambda completion, label: len(set(completion)) / 10
    )
    runs = []
    for size in ("0", "2", "1"):
        train_grpo.main(
            [
                "--model",
                CHECKPOINT,
                "--data",
                manifest,
                "--out",
                str(tmp_path / size),
                "--updates",
                "2",
                "--prompts",
                "2",
                "--group",
                "5",
                "--max-new-tokens",
                "6",
                "--lr",
                "1e-4",
                "--workers",
                "0",
                "--micro-batch",
                size,
            ]
        )
        runs.append(
            [
                [line[key] for key in ("loss", "kl", "grad_norm", "reward")]
                for line in read_metrics(tmp_path / size)[1]
            ]
        )
    assert runs[0][0][2] > 0.01  # there is something to learn from
    for run in runs[1:]:
        assert run[0] == pytest.approx(runs[0][0], rel=1e-3, abs=1e-6) and run[1] == pytest.approx(
            runs[0][1], rel=1e-2, abs=1e-5
        )


@pytest.mark.parametrize(
    "variant",
    [
        ["--kl", "reward"],
        ["--no-std"],
        ["--token-mean", "--clip-high", "0.28"],
        ["--mask-truncated"],
    ],
)
def test_variants_run(manifest, tmp_path, variant):
    train_grpo.main(
        [
            "--model",
            CHECKPOINT,
            "--data",
            manifest,
            "--out",
            str(tmp_path / "grpo"),
            "--updates",
            "2",
            "--prompts",
            "2",
            "--group",
            "3",
            "--max-new-tokens",
            "6",
            "--lr",
            "1e-3",
            "--workers",
            "0",
            *variant,
        ]
    )
    _, lines = read_metrics(tmp_path / "grpo")
    assert len(lines) == 2
    if variant == ["--mask-truncated"]:  # nothing of what this random model says ends by itself
        assert lines[0]["truncated"] == 1 and lines[0]["grad_norm"] == 0


def test_grpo_with_the_same_seed_is_the_same_run_with_and_without_a_feature_cache(
    manifest, tmp_path
):
    runs, cache = [], ["--cache-features", str(tmp_path / "cache")]
    for name, more in (("a", []), ("b", []), ("miss", cache), ("hit", cache)):
        train_grpo.main(
            [
                "--model",
                CHECKPOINT,
                "--data",
                manifest,
                "--out",
                str(tmp_path / name),
                "--updates",
                "2",
                "--prompts",
                "2",
                "--group",
                "2",
                "--max-new-tokens",
                "5",
                "--seed",
                "7",
                "--workers",
                "1",
                *more,
            ]
        )
        runs.append(
            [
                {k: v for k, v in line.items() if "second" not in k}
                for line in read_metrics(tmp_path / name)[1]
            ]
        )
    assert runs[0] == runs[1]
    # A cached clip may have been encoded in a batch of another size, which changes the last bits. The first update has
    # no reward to learn from here, so its gradient is only such bits: what comes after it cannot be compared.
    for run in runs[2:]:
        assert run[0] == pytest.approx(runs[0][0], rel=1e-4, abs=1e-5)


def test_an_earlier_run_is_kept(tmp_path, capsys):
    out = tmp_path / "run"
    for content in ("first", "second", "third"):
        checkpoint.make_room(out).mkdir()
        (out / "metrics.jsonl").write_text(content)
    assert [
        (tmp_path / name / "metrics.jsonl").read_text() for name in ("run.1", "run.2", "run")
    ] == ["first", "second", "third"]
    assert "is kept as" in capsys.readouterr().out


def test_a_model_that_differs_between_rollout_and_scoring_stops_the_run():
    logps, mask = torch.randn(2, 3, 4) - 3, torch.ones(2, 3, 4, dtype=torch.bool)
    train_grpo.assert_same_model(logps, logps + 1e-5, mask, torch.float32, "a and b")
    with pytest.raises(RuntimeError, match="a and b differ by 1.00e-02"):
        train_grpo.assert_same_model(logps, logps + 0.01, mask, torch.float32, "a and b")


def test_evaluate_a_manifest_and_a_clip(manifest, tmp_path, capsys):
    out = tmp_path / "results"
    evaluate.main(
        [
            "--model",
            CHECKPOINT,
            "--data",
            manifest,
            "--out",
            str(out),
            "--max-new-tokens",
            "5",
            "--batch-size",
            "4",
            "--workers",
            "0",
        ]
    )
    printed = capsys.readouterr().out
    for word in ("n 6", "WAR", "UAR", "recall", "unknown words", "unformatted", *LABELS):
        assert word in printed
    result = json.loads((out / "manifest.json").read_text())
    assert (
        len(result["completions"]) == 6
        and {"video", "label", "completion"} <= result["completions"][0].keys()
    )
    settings = result["settings"]
    assert (
        settings["max_new_tokens"] == 5
        and settings["fit"] == "pad"
        and settings["question"] == "reasoning"
    )
    assert sorted(file.name for file in out.iterdir()) == [
        "manifest.json",
        "manifest_confusion.png",
    ]
    evaluate.main(
        [
            "--model",
            CHECKPOINT,
            "--clip",
            str(GOLDEN / "media" / "clip.mp4"),
            "--max-new-tokens",
            "5",
        ]
    )
    assert (
        capsys.readouterr().out.strip() == result["completions"][0]["completion"].strip()
    )  # the same, alone


def test_an_interrupted_evaluation_goes_on(manifest, tmp_path, monkeypatch):
    """Stopped after the first batch, then started again: the same results, and no completion made twice."""
    command = [
        "--model",
        CHECKPOINT,
        "--data",
        manifest,
        "--max-new-tokens",
        "5",
        "--batch-size",
        "2",
        "--workers",
        "0",
        "--out",
    ]
    evaluate.main([*command, str(tmp_path / "whole")])
    calls, generate = [], evaluate.generate

    def stopping(model, prompts, *rest):
        calls.append(len(prompts))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return generate(model, prompts, *rest)

    monkeypatch.setattr(evaluate, "generate", stopping)
    with pytest.raises(KeyboardInterrupt):
        evaluate.main([*command, str(tmp_path / "stopped")])
    log = tmp_path / "stopped" / "manifest.partial.jsonl"
    log.write_text(log.read_text() + '{"index": 5, "vid')  # torn in the middle of a line, too
    with pytest.raises(DataError, match="other settings"):
        evaluate.main([*command, str(tmp_path / "stopped"), "--fit", "squash"])
    evaluate.main([*command, str(tmp_path / "stopped")])
    assert calls == [2, 2, 2, 2]  # done, interrupted, and the two that were left
    whole, stopped = (
        json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("whole", "stopped")
    )
    assert whole["completions"] == stopped["completions"] and whole["metrics"] == stopped["metrics"]
    assert not log.exists()


def test_several_manifests_each_medium_and_the_table(manifest, tmp_path, capsys):
    (tmp_path / "other").mkdir()
    copy = tmp_path / "other" / "manifest.json"
    copy.write_text((tmp_path / "manifest.json").read_text())
    out = tmp_path / "results"
    evaluate.main(
        [
            "--model",
            CHECKPOINT,
            "--data",
            manifest,
            str(copy),
            "--out",
            str(out),
            "--max-new-tokens",
            "4",
            "--modality-report",
            "--limit",
            "2",
            "--workers",
            "0",
        ]
    )
    files = sorted(out.glob("*.json"))
    assert len(files) == 6 and {"other_manifest.audio.json", "other_manifest.video.json"} <= {
        file.name for file in files
    }
    completions = {
        file.name: json.loads(file.read_text())["completions"][0]["completion"] for file in files
    }
    assert (
        len({completions[f"other_manifest.{m}.json"] for m in ("video_audio", "video", "audio")})
        == 3
    )  # what is given matters
    capsys.readouterr()
    evaluate.main(["--table", *map(str, files), "--published"])
    printed = capsys.readouterr().out
    assert (
        "| R1-Omni (published) |" in printed
        and "65.83 | 56.27" in printed
        and "other_manifest.audio WAR" in printed
    )
    result = json.loads(files[0].read_text())
    (tmp_path / "mine.json").write_text(json.dumps({**result, "name": "dfew_test"}))
    evaluate.main(["--table", str(tmp_path / "mine.json"), "--published"])
    assert (
        "DFEW WAR | DFEW UAR | MAFW WAR" in capsys.readouterr().out
    )  # in the column of the published numbers
    with pytest.raises(DataError, match="not a result"):
        evaluate.main(["--table", manifest])


def test_one_medium_leaves_the_other_tower_alone(manifest, tmp_path, monkeypatch):
    from model import AudioTower, VisionTower

    ran = []
    for tower in (AudioTower, VisionTower):
        monkeypatch.setattr(
            tower,
            "forward",
            lambda self, x, own=tower.forward: (ran.append(type(self).__name__), own(self, x))[1],
        )
    for modality, tower in (("video", "VisionTower"), ("audio", "AudioTower")):
        for script in (
            lambda out: train_grpo.main(
                [
                    "--model",
                    CHECKPOINT,
                    "--data",
                    manifest,
                    "--modality",
                    modality,
                    "--updates",
                    "1",
                    "--prompts",
                    "2",
                    "--group",
                    "2",
                    "--max-new-tokens",
                    "3",
                    "--workers",
                    "0",
                    "--out",
                    out,
                ]
            ),
            lambda out: train_sft.main(
                [
                    "--model",
                    CHECKPOINT,
                    "--data",
                    manifest,
                    "--modality",
                    modality,
                    "--steps",
                    "1",
                    "--batch-size",
                    "2",
                    "--workers",
                    "0",
                    "--out",
                    out,
                ]
            ),
        ):
            ran.clear()
            script(str(tmp_path / modality))
            assert set(ran) == {tower}
            assert len(ran) == 1  # and once per batch, policy and reference together


def test_cached_features_are_those_of_the_towers(manifest, tmp_path, model, monkeypatch):
    """A hit equals a miss, towers do not run again, and the key changes with file, frames, fit and towers."""
    from data import batches, read_manifest
    from model import VisionTower

    examples, cache = read_manifest(manifest)[:2], tmp_path / "cache"
    for example in examples:
        example.video = Path(shutil.copy(example.video, tmp_path))

    def encode(model, fit="pad"):
        with torch.no_grad():
            clips = next(batches(common.clips_of(model, examples, fit, cache), [0, 1], 2))
            return common.encode_clips(model, clips)

    plain = next(batches(common.clips_of(model, examples, "pad"), [0, 1], 2))
    with torch.no_grad():
        expected = common.encode_clips(model, plain)
    miss = encode(model)
    assert len(list(cache.iterdir())) == 2
    runs, forward = [], VisionTower.forward
    monkeypatch.setattr(
        VisionTower, "forward", lambda self, x: (runs.append(1), forward(self, x))[1]
    )
    hit = encode(model)
    assert not runs
    for a, b, c in zip(expected, miss, hit):
        assert torch.equal(a, b) and torch.equal(a, c)
    encode(model, "squash")
    assert len(runs) == 1 and len(list(cache.iterdir())) == 4
    with torch.no_grad():
        model.audio_tower.conv1.bias[0] += 1
    encode(model)
    assert len(runs) == 2 and len(list(cache.iterdir())) == 6
    model.configs["llm"]["num_frames"] = 2
    encode(model)
    assert len(runs) == 3 and len(list(cache.iterdir())) == 8
    os.utime(examples[0].video)
    encode(model)
    assert len(runs) == 4 and len(list(cache.iterdir())) == 9


def test_bad_clips_stop_the_run_or_are_left_out_and_listed(tmp_path):
    good = json.loads(
        json.dumps(
            [
                {
                    "video": str(GOLDEN / "media" / "clip16k.mp4"),
                    "conversations": [
                        {"from": "human", "value": "<video>\n<audio>\n?"},
                        {"from": "gpt", "value": "happy"},
                    ],
                }
            ]
        )
    )[0]
    (tmp_path / "broken.mp4").write_text("not a film")
    bad = {**good, "video": str(tmp_path / "broken.mp4")}
    path = tmp_path / "m.json"
    path.write_text(json.dumps([good] * 3 + [bad] + [good] * 16))
    command = [
        "--model",
        CHECKPOINT,
        "--data",
        str(path),
        "--max-new-tokens",
        "2",
        "--batch-size",
        "4",
        "--out",
        str(tmp_path / "out"),
    ]
    with pytest.raises(DataError, match="broken.mp4"):
        evaluate.main(command)
    evaluate.main(
        [*command, "--on-bad-clip", "skip"]
    )  # goes on from there; 1 of 20 is not more than 5 %
    result = json.loads((tmp_path / "out" / "m.json").read_text())
    assert result["metrics"]["n"] == 19 and 3 not in {row["index"] for row in result["completions"]}
    assert "broken.mp4" in (tmp_path / "out" / "m.skipped.txt").read_text()
    path.write_text(json.dumps([good] * 3 + [bad] + [good] * 10))
    with pytest.raises(DataError, match="1 of 14 clips cannot be used"):
        evaluate.main([*command, "--on-bad-clip", "skip"])


def test_presets_are_the_papers_and_flags_win():
    config = common.parse_flags(
        train_grpo.Config, "", ["--preset", "paper", "--group", "4"], train_grpo.PRESETS
    )
    assert config.updates == 0  # by epochs
    assert (
        config.lr,
        config.beta,
        config.epochs,
        config.prompts,
        config.group,
        config.max_new_tokens,
    ) == (1e-6, 0.04, 2, 16, 4, 512)
    config = common.parse_flags(
        train_sft.Config,
        "",
        ["--preset", "paper", "--epochs", "1", "--batch-size", "128"],
        train_sft.PRESETS,
    )
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
    assert (
        loose["war"] == 2 / 3
        and loose["unknown"] == 0
        and set(loose["recall"]) == {"angry", "happy", "sad"}
    )


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


def test_statements_are_checked_against_what_face_and_voice_did():
    rows = [
        {
            "label": "happy",
            "tokens": 1,
            "truncated": False,
            "face": "smile",
            "voice": "high_fast",
            "completion": f"<think>In the video, {face}. In the audio, {voice}.</think><answer>happy</answer>",
        }
        for face, voice in [
            ("the mouth smiles", "the voice is high and fast"),
            ("the mouth turns down", "the voice is high and fast"),
        ]
    ]
    result = evaluate.score([{**row, "index": 0} for row in rows])
    assert (result["n"], result["completions"]) == (1, 2)  # two samples of one clip
    assert result["face_true"] == 0.5 and result["voice_true"] == 1.0
    assert result["follows"] == 0.5  # a frown and a high, fast voice are no emotion's


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
    arguments = ["--model", str(tmp_path), "--data", "nowhere.json"]
    done = subprocess.run(
        [sys.executable, str(ROOT / script), *arguments],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert (
        done.returncode == 2
        and "config.json: not found" in done.stderr
        and "Traceback" not in done.stderr
    )
    shown = subprocess.run(
        [sys.executable, str(ROOT / script), "--help"], capture_output=True, text=True
    )
    assert shown.returncode == 0 and "--model" in shown.stdout and "default" in shown.stdout


def test_library_files_import_only_what_they_may():
    """Each of these can be copied into another project alone."""
    allowed = {"rewards.py": set(), "grpo.py": {"torch"}, "model.py": {"torch", "safetensors"}}
    for file, packages in allowed.items():
        imported = set()
        for node in ast.walk(ast.parse((ROOT / file).read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module.split(".")[0])
        assert imported <= packages | sys.stdlib_module_names, (file, imported)
