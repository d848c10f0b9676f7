"""The shipped base model can be made again: a short retraining from the same seed goes the way its record says."""

import json

import pytest
from conftest import ROOT

import checkpoint
import toy
import train_sft
from common import load, parse_flags, read_examples
from evaluate import evaluate, score


def recorded(name):
    config, *lines = [json.loads(line) for line in (ROOT / "toy" / name).read_text().splitlines()]
    return config["config"], [line["loss"] for line in lines]


@pytest.mark.slow
def test_a_short_retraining_goes_the_same_way(tmp_path, monkeypatch):
    clips = toy.make_clips(tmp_path, ("text",))
    toy.new_model(tmp_path / "new")
    config, losses = recorded("text_metrics.jsonl")
    assert (config["steps"], config["lr"], config["batch_size"], config["seed"]) == (400, 3e-3, 32, 0)
    again = []

    def log(run, line):
        again.append(line["loss"])
        if len(again) == 40:
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.Run, "log", log)
    with pytest.raises(KeyboardInterrupt):
        train_sft.main(["--model", str(tmp_path / "new"), "--data", str(clips["text"]), "--out", str(tmp_path / "text"),
                        "--steps", "400", "--lr", "3e-3", "--batch-size", "32"])
    assert again[0] == pytest.approx(losses[0], rel=1e-3)  # the same weights, the same first batch
    assert sum(again[30:]) / 10 == pytest.approx(sum(losses[30:40]) / 10, rel=0.05)
    assert again[-1] < 0.5 * again[0]


@pytest.mark.slow
def test_the_shipped_base_perceives_unseen_clips_and_names_no_emotion(tmp_path):
    """The base model's own question on 210 clips it was not trained on."""
    clips = toy.make_clips(tmp_path, ("test",))
    config = parse_flags(train_sft.Config, "", ["--model", str(ROOT / "toy"), "--question", toy.CAPTION_QUESTION])
    rows = evaluate(*load(config), read_examples([clips["test"]], config), max_new_tokens=64)
    metrics = score(rows)
    assert metrics["face_true"] >= 0.95 and metrics["voice_true"] >= 0.95
    assert not any(word in row["completion"] for row in rows for word in toy.ALL_WORDS)
