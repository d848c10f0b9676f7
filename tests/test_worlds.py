"""Other worlds of the toy: exactly what is said of them, and nothing else, is different."""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from support.errors import DataError
from toy import drawing, world, worlds
from toy.__main__ import main
from toy.worlds import World

TRAIN = world.make_manifest("train")


def label(entry):
    return entry["conversations"][1]["value"]


def labelled(changed, seed=0, split="train"):
    """The labelled entries of a split of the toy, as this world has them."""
    entries = world.make_manifest(split)
    return worlds.relabel(worlds.choose(entries, split, changed, seed), changed, seed)


def test_the_toy_itself_is_a_world():
    assert World().name == "toy"
    assert labelled(World()) == TRAIN


def test_names_tell_worlds_apart():
    assert World(wrong=0.4).name == "wrong_0.4"
    assert World(wrong=0.4, confused=True).name == "wrong_0.4_confused"
    assert World(scene=0.0).name == "scene_0.0"


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_wrong_labels_are_so_many_of_each_emotion(share):
    entries = labelled(World(wrong=share))
    wrong = [entry for entry in entries if label(entry) != entry["emotion"]]
    assert Counter(e["emotion"] for e in wrong) == dict.fromkeys(world.EMOTIONS, 80 * share)
    for emotion in world.EMOTIONS:  # every other emotion as often
        given = Counter(label(entry) for entry in wrong if entry["emotion"] == emotion)
        assert len(given) == 6 and max(given.values()) - min(given.values()) <= 1
    # Everything but the labels is as it was.
    for entry, old in zip(entries, TRAIN):
        assert entry | {"conversations": []} == old | {"conversations": []}
        assert entry["conversations"][0] == old["conversations"][0]


def test_what_is_wrong_at_a_small_share_is_so_at_a_larger_one():
    few, many = labelled(World(wrong=0.2)), labelled(World(wrong=0.4))
    for a, b in zip(few, many):
        assert label(a) == a["emotion"] or label(a) == label(b)
    assert labelled(World(wrong=0.2), seed=1) != few


def test_confusions():
    entries = labelled(World(wrong=0.4, confused=True))
    given = Counter((e["emotion"], label(e)) for e in entries if label(e) != e["emotion"])
    assert given == dict.fromkeys(worlds.CONFUSIONS.items(), 32)
    for emotion, taken_for in worlds.CONFUSIONS.items():
        assert emotion != taken_for and taken_for in world.EMOTIONS


def test_few_labels():
    entries = labelled(World(labelled=14))
    assert Counter(map(label, entries)) == dict.fromkeys(world.EMOTIONS, 2)
    assert all(entry in TRAIN for entry in entries)
    assert labelled(World(labelled=14), seed=1) != entries
    assert len(labelled(World(labelled=14), split="validation")) == 70


def test_emotions_as_in_films():
    counts = Counter(map(label, labelled(World(films=True))))
    assert counts["neutral"] == 80 and counts["disgust"] == 4
    for emotion, clips in worlds.FILMS.items():
        assert counts[emotion] == round(80 * clips / 2709)
    assert Counter(map(label, labelled(World(films=True), split="validation")))["disgust"] == 1


def test_the_rule_and_its_unseen_pairs():
    assert worlds.rule_label("smile", "even") == "neutral"
    assert worlds.rule_label("glare", "trembling") == "angry"
    assert len(worlds.SEEN) == 15 and len(worlds.UNSEEN) == 10
    assert set(worlds.SEEN) | set(worlds.UNSEEN) == {
        (face, voice) for face in world.FACE_TEXT for voice in world.VOICE_TEXT
    }
    drawn = worlds.drawn_splits(World(rule=True))
    splits = {split: entries for split, (_, entries) in drawn.items()}
    for split, entries in splits.items():
        pairs = {(entry["face"], entry["voice"]) for entry in entries}
        assert pairs == set(worlds.UNSEEN if split == "test_unseen" else worlds.SEEN)
        for entry in entries:
            assert entry["emotion"] == worlds.rule_label(entry["face"], entry["voice"])
    # Every label, every face and every voice is met in training.
    assert {label(entry) for entry in splits["train"]} == set(worlds.RULE.values())
    for cue in (0, 1):
        assert {pair[cue] for pair in worlds.SEEN} == {pair[cue] for pair in worlds.UNSEEN}
    assert worlds.stated_label(World(rule=True), ("flat", "even")) == "bored"
    assert worlds.stated_label(World(), ("flat", "even")) == "neutral"
    assert worlds.stated_label(World(), ("flat", "harsh")) is None
    assert worlds.stated_label(World(rule=True), ("flat", None)) is None


@pytest.mark.parametrize("share", [0.0, 0.9, 1.0])
def test_walls_tell_so_many_labels(share):
    splits = worlds.drawn_splits(World(scene=share))
    name, train = splits["train"]
    telling = sum(entry["wall"] == worlds.WALL_OF[entry["emotion"]] for entry in train) / len(train)
    by_chance = (1 - share) / 7
    assert abs(telling - share - by_chance) < 0.02
    _, test = splits["test"]
    pairs = Counter((entry["emotion"], entry["wall"]) for entry in test)
    assert len(pairs) == 49 and max(pairs.values()) - min(pairs.values()) <= 2
    for entry in splits["base"][1][:20]:
        assert f"the wall is {entry['wall']}." in label(entry)


def test_a_wall_is_as_it_is_named_and_the_face_as_without():
    entry = worlds.drawn_splits(World(scene=1.0))["train"][1][0]
    frames, sound = drawing.draw_clip(entry)
    plain, same_sound = drawing.draw_clip({k: v for k, v in entry.items() if k != "wall"})
    corner = frames[:, :6, :6].reshape(-1, 3).mean(0)
    assert np.abs(corner - drawing.WALLS[entry["wall"]]).max() < 20
    assert np.array_equal(sound, same_sound)
    middle = (slice(None), slice(40, 56), slice(40, 56))
    assert np.array_equal(frames[middle], plain[middle])
    assert set(drawing.WALLS) == set(worlds.WALLS)


def test_words_alone():
    (entry,) = worlds.words_alone(world.make_manifest("cold_start")[:1])
    human, gpt = entry["conversations"]
    assert human["value"] == f"<video>\n<audio>\n{world.LABEL_QUESTION}"
    assert gpt["value"] in world.WORDS[entry["emotion"]]


def test_make_world_draws_what_is_missing_and_nothing_twice(tmp_path, monkeypatch):
    monkeypatch.setattr(
        world, "SPLITS", {name: 28 if name == "cold_start" else 14 for name in world.SPLITS}
    )
    drawn = []
    monkeypatch.setattr(drawing, "write_clips", lambda root, name, entries: drawn.append(name))
    paths = worlds.make_world(tmp_path, World(wrong=0.5), seed=3)
    assert sorted(drawn) == sorted("cold_start train validation test test_ood swapped".split())
    assert paths["train"].name == "wrong_0.5_train_3.json"
    entries = json.loads(paths["train"].read_text())
    assert all(entry["video"].startswith("train/") for entry in entries)
    assert worlds.make_world(tmp_path, World(wrong=0.5), seed=3) == paths
    clean = worlds.make_world(tmp_path, World())
    assert clean["train"].name == "train.json" and len(drawn) == 6
    assert clean["words"].name == "cold_start_words.json"


def test_the_command_line(tmp_path, monkeypatch, capsys):
    asked = []

    def make_world(root, changed, seed):
        asked.append((root, changed, seed))
        return {"train": "train.json"}

    monkeypatch.setattr("toy.__main__.make_world", make_world)
    main(["--out", str(tmp_path), "--wrong", "0.4", "--confused", "--seed", "2"])
    assert asked == [(str(tmp_path), World(wrong=0.4, confused=True), 2)]
    assert "train.json" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["--wrong", "1.5"])
    assert "must be from 0 to 1, not 1.5" in capsys.readouterr().err


@pytest.mark.parametrize(
    "fields",
    [
        {"rule": True, "films": True},
        {"rule": True, "labelled": 14},
        {"films": True, "labelled": 14},
        {"labelled": 600},
        {"labelled": 15},
        {"labelled": -7},
        {"confused": True},
    ],
)
def test_worlds_that_make_no_sense(fields):
    with pytest.raises(DataError, match="--"):
        replace(World(), **fields)
