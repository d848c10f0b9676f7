"""The shipped base model can be made again: a short retraining from the same seed goes the way its
record says."""

import json
from pathlib import Path

import pytest
from conftest import ROOT

import train_grpo
import train_sft
from data import clips_of
from evaluate import Settings, evaluate, score
from support.custom import find_function
from support.flags import load, parse_flags, read_examples
from support.run import Run
from toy import drawing, stages, world

SPLITS = ("cold_start", "words", "train", "validation", "test", "test_ood", "swapped")


def recorded(name):
    lines = (ROOT / "toy" / "base" / name).read_text().splitlines()
    config, *lines = [json.loads(line) for line in lines]
    return config["config"], [line["loss"] for line in lines]


@pytest.mark.slow
def test_a_short_retraining_goes_the_same_way(tmp_path, monkeypatch):
    clips = drawing.make_clips(tmp_path, ("text",))
    stages.new_model(tmp_path / "new")
    config, losses = recorded("text_metrics.jsonl")
    settings = config["steps"], config["lr"], config["batch_size"], config["seed"]
    assert settings == (400, 3e-3, 32, 0)
    again = []

    def log(run, line, shown=None):
        again.append(line["loss"])
        if len(again) == 40:
            raise KeyboardInterrupt

    monkeypatch.setattr(Run, "log", log)
    flags = "--steps 400 --lr 3e-3 --batch-size 32"
    with pytest.raises(KeyboardInterrupt):
        stages.fine_tune(tmp_path / "new", clips["text"], tmp_path / "text", flags, seed=0)
    assert again[0] == pytest.approx(losses[0], rel=1e-3)  # the same weights, the same first batch
    assert sum(again[30:]) / 10 == pytest.approx(sum(losses[30:40]) / 10, rel=0.05)
    assert again[-1] < 0.5 * again[0]


@pytest.mark.slow
def test_the_shipped_base_perceives_unseen_clips_and_names_no_emotion(tmp_path):
    """The base model's own question on 210 clips it was not trained on."""
    manifest = drawing.make_clips(tmp_path, ("test",))["test"]
    flags = ["--model", str(stages.BASE), "--question", world.CAPTION_QUESTION]
    config = parse_flags(train_sft.Config, "", flags)
    omni = load(config)
    clips = clips_of(omni.model, read_examples([manifest], config), config.fit)
    settings = Settings(max_new_tokens=64, check=world.check_statements)
    rows = evaluate(omni, clips, settings)
    metrics = score(rows)
    assert metrics["face_true"] >= 0.95 and metrics["voice_true"] >= 0.95
    assert not any(word in row["completion"] for row in rows for word in world.ALL_WORDS)


@pytest.fixture
def trainings(tmp_path, monkeypatch):
    """The command lines of train_sft.py that are asked for; nothing is drawn or trained."""
    command_lines = []

    def main(arguments):
        command_lines.append(" ".join(arguments).replace(str(tmp_path), "ROOT"))
        out = Path(arguments[arguments.index("--out") + 1])
        out.mkdir(parents=True, exist_ok=True)
        (out / "metrics.jsonl").write_text(f"of {out.name}")

    def make_clips(root, splits):
        return {split: root / f"{split}.json" for split in splits}

    monkeypatch.setattr(train_sft, "main", main)

    def make_world(root, world):
        assert world == stages.World()  # the toy itself
        return {split: root / f"{split}.json" for split in SPLITS}

    monkeypatch.setattr(stages, "make_clips", make_clips)
    monkeypatch.setattr(stages, "make_world", make_world)
    monkeypatch.setattr(stages, "new_model", lambda root, seed: None)
    return command_lines


def test_the_base_model_is_trained_in_two_stages(tmp_path, trainings):
    stages.train_base(tmp_path / "out", seed=3, root=tmp_path)
    assert trainings == [
        "--model ROOT/base_3/new --data ROOT/text.json --out ROOT/base_3/text "
        "--steps 400 --lr 3e-3 --batch-size 32 --save-dtype float32 --seed 3",
        "--model ROOT/base_3/text --data ROOT/base.json --out ROOT/out "
        "--steps 900 --lr 1e-3 --batch-size 32 --train-towers --seed 3",
    ]
    assert (tmp_path / "out" / "text_metrics.jsonl").read_text() == "of text"


def test_a_cold_start_is_made_once_for_each_base(tmp_path, trainings, monkeypatch):
    base = tmp_path / "base"
    base.mkdir()
    (base / "model.safetensors").write_bytes(b"a base")
    monkeypatch.setattr(stages, "BASE", base)
    made = tmp_path / "cold_start_3", {name: tmp_path / f"{name}.json" for name in SPLITS}
    command_line = (
        "--model ROOT/base --data ROOT/cold_start.json --out ROOT/cold_start_3 "
        "--steps 240 --lr 1e-3 --seed 3"
    )
    assert stages.prepare(3, tmp_path) == made
    assert stages.prepare(3, tmp_path) == made  # as it is
    assert trainings == [command_line]
    (base / "model.safetensors").write_bytes(b"another base")
    assert stages.prepare(3, tmp_path) == made
    assert trainings == 2 * [command_line]


def test_the_cold_start_without_thinking(tmp_path, trainings):
    model, _ = stages.prepare(3, tmp_path, think=False)
    assert model == tmp_path / "words_3"
    (command_line,) = trainings
    assert "--data ROOT/words.json --out ROOT/words_3 --steps 240" in command_line


def test_a_grpo_run_gets_what_it_was_not_given(monkeypatch):
    made = Path("cold"), {name: Path(f"{name}.json") for name in world.CLIP_SPLITS}
    monkeypatch.setattr(stages, "prepare", lambda seed, think: made)
    config = parse_flags(train_grpo.Config, "", ["--val", "mine.json"])
    stages.fill_in(config)
    assert (config.model, config.data, config.val) == ("cold", ("train.json",), ["mine.json"])
    assert config.test == ("test.json", "test_ood.json", "swapped.json")
    assert find_function("--check", config.check) is world.check_statements
