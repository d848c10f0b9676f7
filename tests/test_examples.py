"""The examples, and the tables of the experiments: what they show is right.

That lift_grpo.py learns is in test_learning.py."""

import json
import math
import os
import subprocess
import sys

import pytest
from conftest import ROOT

sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "experiments")]
import one_group
import tables

from support.custom import find_rewards

# --------------------------------------------------------------------------------------------------
# examples/one_group.py


@pytest.fixture(scope="module")
def shown():
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "one_group.py")],
        capture_output=True,
        text=True,
        encoding="utf-8",
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def numbers(shown):
    """Title of a table -> its four rows of five numbers."""
    found = {}
    for block in shown.split("\n\n")[1:]:
        title, *lines = block.splitlines()
        rows = [[float(x) for x in line.split()[1:]] for line in lines[:4]]
        found[title[4:50].strip()] = [row[:5] for row in rows]
        found[title[50:].strip()] = [row[5:] for row in rows]
    return found


def test_the_readme_shows_what_the_script_prints(shown):
    block = "".join(f"    {line}".rstrip() + "\n" for line in shown.splitlines())
    assert block in (ROOT / "README.md").read_text(encoding="utf-8")


def test_it_is_short_and_fits_a_page(shown):
    source = (ROOT / "examples" / "one_group.py").read_text(encoding="utf-8")
    assert len(source.splitlines()) < 100
    assert max(map(len, shown.splitlines())) <= 96


# By hand: rewards 2, 1, 0, 0 have the mean 0.75 and the unbiased std sqrt(2.75 / 3).
STD = math.sqrt(2.75 / 3) + 1e-4
ADVANTAGES = [1.25 / STD, 0.25 / STD, -0.75 / STD, -0.75 / STD]
LENGTHS = [5, 5, 2, 5]  # tokens that count


def test_rewards_and_advantages(shown):
    rows = [line.split()[-3:] for line in shown.splitlines()[1:5]]
    rewards = [(1, 1), (0, 1), (0, 0), (0, 0)]
    wanted = []
    for (accuracy, form), advantage in zip(rewards, ADVANTAGES):
        wanted.append([str(accuracy), str(form), f"{advantage:+.2f}"])
    assert rows == wanted


def test_the_first_step(shown, numbers):
    """Gradient of -(A ratio - beta k3), ratio 1, averaged over tokens and then completions."""
    policy, reference = numbers["log π, policy"], numbers["log π, reference"]
    gradients, loss = numbers["first step, ratio 1: d loss / d log π"], 0.0
    for g in range(4):
        for t in range(5):
            d = reference[g][t] - policy[g][t]
            kl = math.exp(d) - d - 1
            assert numbers["KL"][g][t] == pytest.approx(kl, abs=6e-4)
            counts, weight = t < LENGTHS[g], 1 / (4 * LENGTHS[g])
            gradient = -weight * (ADVANTAGES[g] - 0.04 * (1 - math.exp(d))) if counts else 0
            assert gradients[g][t] == pytest.approx(gradient, abs=6e-4)
            loss += counts * weight * 0.04 * kl
    assert f"loss {loss:.5f} = -mean advantage 0 + 0.04" in shown


def test_the_second_step_is_clipped(shown, numbers):
    """o1 is above 1.2 with A > 0, o3 below 0.8 with A < 0: there only the KL has a gradient."""
    ratios, gradients = (
        numbers["second step: ratio π / π_old"],
        numbers["second step: d loss / d log π"],
    )
    for g in range(4):
        for t in range(LENGTHS[g]):
            ratio = ratios[g][t]
            stopped = ratio > 1.2 and ADVANTAGES[g] > 0 or ratio < 0.8 and ADVANTAGES[g] < 0
            assert stopped == (g in (0, 2))
            pull = 0 if stopped else -ADVANTAGES[g] * ratio / (4 * LENGTHS[g])
            assert gradients[g][t] == pytest.approx(pull, abs=6e-3)
    assert "clip_share 0.50" in shown


def test_rows_are_filled_up_behind_the_first_eos():
    for row, length in zip(one_group.IDS[0].tolist(), LENGTHS):
        assert all(token == one_group.EOS for token in row[length:])
        assert row[: length - 1].count(one_group.EOS) == 0


# --------------------------------------------------------------------------------------------------
# experiments/tables.py


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")


def result(war, **more):
    return {"war": war, "uar": war / 2, "format": 1.0, **more}


STATED = {"face_true": 0.7, "voice_true": 0.8, "eea": 0.6, "epc": 0.9, "fcr": 0.5}


def write_table1(folder, methods, seeds):
    """Results as map.sh leaves them."""
    for method in methods:
        world, arm = tables.IN_THE_MAP[method]
        for seed in seeds:
            stated = {} if arm == "label_only" else STATED
            split = {**result(0.5 + seed / 10), **stated, "video_alone": 0.2, "audio_alone": 0.3}
            figures = {**dict.fromkeys(tables.SPLITS, split), "seconds": 60}
            write(folder / world / f"{arm}_{seed}.json", json.dumps(figures))


def test_table1_is_read_from_the_map(tmp_path):
    write_table1(tmp_path, ["base"], [0])
    others = [method for method in tables.METHODS if method != "base"]
    write_table1(tmp_path, others, [0, 1])
    results = tables.table1(tmp_path)
    tables.check_complete("table1", results, tmp_path)
    row = results["rlvr"]["1"]
    assert row["test WAR"] == 0.6 and row["test UAR"] == 0.3
    assert row["test_ood WAR, video alone"] == 0.2 and row["test WAR, audio alone"] == 0.3
    assert row["test EPC"] == 0.9 and row["test_ood face true"] == 0.7
    assert not any("true" in figure for figure in results["label_only"]["0"])
    shown = tables.markdown_table(results, ["test WAR", "test face true"])
    assert "| RLVR (GRPO) | 55.0 ± 7.1 | 70.0 ± 0.0 |" in shown
    assert "| RLVR (GRPO), half wrong | 55.0 ± 7.1 | 70.0 ± 0.0 |" in shown
    assert "| base | 50.0 | 70.0 |" in shown
    assert "| label-only SFT | 55.0 ± 7.1 | – |" in shown
    assert "label-only" not in tables.markdown_table(results, ["test face true"])
    assert tables.map_seconds(tmp_path) == 11 * 60 / 2  # two jobs at a time


def test_a_missing_seed_is_an_error(tmp_path):
    others = [method for method in tables.METHODS if method not in ("base", "rlvr")]
    write_table1(tmp_path, ["base", *others], [0, 1])
    write_table1(tmp_path, ["rlvr"], [0])
    with pytest.raises(SystemExit, match="something is missing"):
        tables.check_complete("table1", tables.table1(tmp_path), tmp_path)


def test_ablations_are_read_from_their_folder(tmp_path):
    for arm in tables.ARMS:
        for seed in (0, 1):
            place = tmp_path / f"{arm}_{seed}"
            after = {"test": result(1.0, **STATED), "test_ood": result(0.9)}
            write(place / "results.json", json.dumps({"after": after}))
            lines = [{"config": {"beta": 0.0 if arm == "no_kl" else 0.04}}]
            for update in range(12):  # the first two do not count
                line = {"reward_accuracy": float(update >= 2), "reward_format": 0.5}
                kl = None if arm == "no_kl" else 0.02
                lines.append({**line, "kl": kl, "completion_length": 31})
            write(place / "metrics.jsonl", "\n".join(map(json.dumps, lines)))
    results = tables.ablations(tmp_path)
    tables.check_complete("ablations", results, tmp_path)
    assert list(results) == list(tables.ARMS)
    row = results["paper"]["0"]
    assert row["sampled accuracy"] == 1 and row["sampled format"] == 0.5
    assert row["face true"] == 0.7 and row["KL"] == pytest.approx(0.02)
    assert "| no_kl | – | 31.0 ± 0.0 |" in tables.markdown_table(results, ["KL", "length"])


# --------------------------------------------------------------------------------------------------
# examples/consistent.py


@pytest.mark.parametrize(
    "think, answer, reward",
    [
        ("She is delighted.", "happy", 1.0),
        ("She is delighted.", "joyful", 1.0),  # another word for what <think> names
        ("She is delighted.", "sad", 0.0),
        ("The mouth smiles.", "happy", 0.0),  # names no emotion
        ("She is delighted.", "", 0.0),
    ],
)
def test_a_reward_for_an_answer_that_the_thinking_names(think, answer, reward):
    """Whatever the label is: right answers are accuracy's part."""
    function = find_rewards({}, ["examples.consistent:consistent"])["consistent"]
    completion = f"<think>{think}</think><answer>{answer}</answer>"
    assert function(completion, "happy") == function(completion, "angry") == reward


@pytest.mark.parametrize("answer", ["sadness", "sad", "sorrow"])
@pytest.mark.parametrize("label", ["sadness", "sad", "anger"])
def test_that_reward_takes_any_word_for_the_emotion(label, answer):
    """Also where the labels are other words than the lexicon's."""
    function = find_rewards({}, ["examples.consistent:consistent"])["consistent"]
    assert function(f"<think>She looks sad.</think><answer>{answer}</answer>", label) == 1
    assert function(f"<think>She looks glad.</think><answer>{answer}</answer>", label) == 0


def test_that_reward_is_short():
    source = (ROOT / "examples" / "consistent.py").read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 20
