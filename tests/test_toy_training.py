"""The shipped base model can be made again: a short retraining from the same seed goes the way its record says."""

import json
from itertools import islice

import pytest
from conftest import ROOT

import toy
import train_sft
from evaluate import evaluate, load, parse_flags, read_examples, score


def recorded(name):
    config, *lines = [json.loads(line) for line in (ROOT / "toy" / name).read_text().splitlines()]
    return config["config"], [line["loss"] for line in lines]


def flags_of(config, **changes):
    """The recorded configuration, as the script would parse it, with some values changed."""
    return train_sft.Config(**{**config, **{key: value for key, value in changes.items()}})


@pytest.mark.slow
def test_a_short_retraining_goes_the_same_way(tmp_path):
    clips = toy.make_clips(tmp_path, ("text",))
    toy.new_model(tmp_path / "new")
    config, losses = recorded("text_metrics.jsonl")
    config = flags_of(config, model=tmp_path / "new", data=(clips["text"],), out=str(tmp_path / "text"))
    model, tokenizer, bert = load(config)
    examples = read_examples(config.data, config)
    again = [line["loss"] for line in islice(train_sft.train(config, model, tokenizer, bert, examples), 40)]
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
