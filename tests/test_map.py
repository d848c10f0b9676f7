"""The map of worlds and arms: what is counted, by hand, and the page that is made of it."""

import json
import random
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from runs import CHECKPOINT, write_manifest

from experiments import map as experiment
from experiments import map_page, map_results
from experiments.predicted import LATER, Figures, predicted
from toy.world import EMOTIONS, make_manifest, reasoned


def test_every_job_is_one_of_a_world_and_once_there():
    jobs = experiment.jobs(more=True)
    assert len(set(jobs)) == len(jobs) and set(experiment.jobs()) < set(jobs)
    starts = {"base", "cold_start", "words", "probe"}
    for _, world, arm, seed in jobs:
        assert world in experiment.WORLDS and arm in {*experiment.STARTS_FROM, *starts}
        assert 0 <= seed < 5
    # The chosen learning rates were tried, with seeds that are used for nothing else.
    for arm, rates in experiment.SFT_LR.items():
        assert set(rates) <= set(experiment.LR_TRIED[arm])
    assert experiment.GRPO_LR["grpo_answer"] in experiment.LR_TRIED["grpo_answer"]
    assert experiment.GRPO_LR["grpo_think"] == experiment.train_grpo.Config().lr
    assert all(seed >= 10 for *_, seed in experiment.jobs(choose=True))
    assert {job[1] for job in experiment.jobs(quick=True)} <= set(experiment.WORLDS)


def test_all_arms_visit_as_many_clips():
    config = experiment.train_grpo.Config()
    visits = experiment.ROLLOUTS * experiment.BATCH * config.updates_per_rollout
    assert visits == experiment.STEPS * experiment.BATCH == 2400


def example(face, voice, **more):
    return SimpleNamespace(extra={"face": face, "voice": voice, **more})


def row(index, label, completion):
    return {"index": index, "label": label, "completion": completion}


def test_what_the_thinking_is_worth_by_hand():
    examples = [example("wide", "trembling")] * 4
    rows = [
        row(0, "fear", reasoned("wide", "trembling", "fear")),
        row(1, "fear", reasoned("wide", "trembling", "scared")),  # consistent, not the label
        row(2, "fear", reasoned("wide", "high_fast", "surprise")),  # false, and consistent
        row(3, "fear", reasoned("flat", "trembling", "fear")),  # nothing follows from that
    ]
    assert experiment.reasoning("wrong_0.0", rows, examples) == {
        "face_true": 3 / 4,
        "voice_true": 3 / 4,
        "eea": 2 / 4,
        "epc": 3 / 4,
        "fcr": 1 / 4,
    }
    assert experiment.reasoning("wrong_0.0", [row(0, "fear", "fear")], examples) == {}
    by_rule = [row(0, "surprise", reasoned("flat", "trembling", "amazed"))]
    counts = experiment.reasoning("rule", by_rule, [example("flat", "trembling")])
    assert counts == {"face_true": 1, "voice_true": 1, "eea": 1, "epc": 1, "fcr": 0}


def test_whose_emotion_a_swapped_clip_gets():
    clip = {entry["emotion"]: entry["video"] for entry in make_manifest("test")}
    swapped = example("glare", "low_slow", face_from=clip["angry"], voice_from=clip["sad"])
    rows = [row(i, "disgust", word) for i, word in enumerate(("disgust", "angry", "sad", "sad"))]
    counts = experiment.by_medium(rows, 4 * [swapped])
    assert counts == {"as_the_face": 1 / 4, "as_the_voice": 2 / 4}


def test_wrong_labels_in_groups_by_hand(tmp_path):
    entries = [{"video": f"train/{i}.mp4", "emotion": "happy"} for i in range(3)]
    (tmp_path / "train.json").write_text(json.dumps(entries))

    def group(clip, label, accuracy, advantages):
        accuracy += [0.0] * (experiment.SAMPLES - len(accuracy))
        rewards = {"accuracy": accuracy}
        return dict(video=f"x/{clip}.mp4", label=label, rewards=rewards, advantages=advantages)

    groups = [
        group(0, "happy", [1.0, 1.0], [1.0, 1.0, -1.0]),
        group(1, "sad", [1.0], [2.0, -1.0]),
        group(2, "sad", [], [0.0]),
        group(2, "angry", [], [0.0]),
    ]
    (tmp_path / "completions.jsonl").write_text("".join(json.dumps(g) + "\n" for g in groups))
    assert experiment.wrong_labels(tmp_path, tmp_path / "train.json") == {
        "wrong_groups": 3 / 4,
        "said_in": 1 / 3,
        "said": 1 / 24,
        "right_said": 2 / 8,
        "weight": 3 / 6,
    }


def test_a_model_has_no_kl_to_itself_and_some_to_another(tmp_path, monkeypatch):
    monkeypatch.setattr(experiment, "OUT", tmp_path)
    manifest = write_manifest(tmp_path / "test.json")
    omni, clips = experiment.opened(CHECKPOINT, manifest, "label")
    begun, _ = experiment.opened(CHECKPOINT, manifest, "label")
    assert experiment.kl_between(omni, begun, clips) == pytest.approx(0, abs=1e-4)
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in omni.model.layers.parameters():
            weight += 0.05 * torch.randn_like(weight)
    assert experiment.kl_between(omni, begun, clips) > 0.01


# --------------------------------------------------------------------------------------------------
# The page


@pytest.fixture
def facts():
    """Results of all jobs, made up."""
    rng = random.Random(0)
    split = {"war": 0.5, "uar": 0.5, "recall": dict.fromkeys(EMOTIONS, 0.5), "as_the_face": 0.1}
    split |= {"as_the_voice": 0.1}
    stated = dict.fromkeys(("face_true", "voice_true", "eea", "epc", "fcr"), 0.9)
    wrong = dict.fromkeys(("wrong_groups", "said_in", "said", "right_said", "weight"), 0.2)
    results = {}
    for world in experiment.WORLDS:
        for _, name, arm, seed in experiment.jobs(more=True):
            if name != world:
                continue
            figures = {"kl": rng.random(), "seconds": 60}
            splits = ("test", "test_unseen") if world == "rule" else ("test", "test_ood", "swapped")
            for test in splits:
                figures[test] = split | {"war": rng.random()}
                if arm in ("cold_start", "own_correct", "grpo_think"):
                    figures[test] |= stated
            if arm in experiment.GRPO_LR:
                figures["wrong"] = wrong
            if arm == "probe":
                figures = {"toy": 0.3, "scene": 0.95, "seconds": 60}
            results.setdefault(world, {}).setdefault(arm, {})[str(seed)] = figures
    rates = {
        arm: {str(lr): [0.5, 0.4] for lr in tried} for arm, tried in experiment.LR_TRIED.items()
    }
    facts = {"command": "experiments/map.sh", "date": "today", "machine": "a machine"}
    return facts | {"torch": "2", "minutes": 1, "results": results, "rates": rates}


def test_the_page_holds_every_world_and_every_prediction(facts, tmp_path):
    page = map_page.page(facts)
    for world in facts["results"]:
        assert map_results.world_name(world) in page
    said = (ROOT / "experiments" / "predictions.md").read_text(encoding="utf-8")
    numbers = {line.split(".")[0] for line in said.splitlines() if line[:1].isdigit()}
    claims = predicted(facts["results"])
    assert {number for number, *_ in claims} == numbers == {str(n) for n in range(1, 18)}
    assert "nan" not in page
    map_page.draw(facts["results"], tmp_path / "map.png")
    assert (tmp_path / "map.png").stat().st_size > 10_000


def test_the_pages_are_those_of_the_results():
    """map.md whole, and the tables that when_rlvr_wins.md quotes."""
    folder = ROOT / "experiments"
    facts = json.loads((folder / "map.json").read_text(encoding="utf-8"))
    assert (folder / "map.md").read_text(encoding="utf-8") == map_page.page(facts)
    text = (folder / "when_rlvr_wins.md").read_text(encoding="utf-8")
    assert map_page.summary_table(facts["results"]) in text
    assert map_page.arms_table(facts["results"]) in text
    claims = predicted(facts["results"])
    failed = sum(held == "**no**" for *_, held in claims)
    assert f"Of {len(claims)} claims {failed} failed" in text


def test_what_the_readme_says_of_rlvr_stands_in_the_map():
    facts = json.loads((ROOT / "experiments" / "map.json").read_text(encoding="utf-8"))
    figures, readme = Figures(facts["results"]), (ROOT / "README.md").read_text(encoding="utf-8")
    text = " ".join(readme.split("## Results")[1].split())
    for world, arms in {
        "wrong_0.5": ("grpo_think", "label_only", "label_kept"),
        "early_0.0": ("grpo_think", "label_only", "label_cold"),
        "early_0.5": ("grpo_think",),
    }.items():
        for arm in arms:
            assert f"{figures.home(world, arm):.1f} / {figures.away(world, arm):.1f}" in text
    rlvr, labels = (figures.away("rule", arm) for arm in ("grpo_think", "label_only"))
    assert f"{rlvr:.1f} against {labels:.1f}" in text
    said = figures.of("wrong_0.5", "grpo_think", "wrong.said_in")
    assert f"in {said:.0f} % of such groups" in text


def test_what_is_paired_is_paired_by_seed():
    def runs(*wars):
        return {str(seed): {"test": {"war": war}} for seed, war in enumerate(wars)}

    results = {"wrong_0.0": {"grpo_think": runs(0.9, 0.5, 0.7), "label_only": runs(0.8, 0.6, 0.7)}}
    line = map_page.paired_table(results).splitlines()[2]
    assert "| 0.0 ± 10.0 | 1 / 1 |" in line


def test_a_prediction_that_failed_is_said_to_have(facts):
    for arms in facts["results"].values():
        for run in arms["grpo_think"].values():
            run["test"]["face_true"] = 0.5
    for world in ("early_0.0", "early_0.5"):
        del facts["results"][world]
    *_, last = predicted(facts["results"])
    assert int(last[0]) == min(LATER) - 1  # what --all alone runs is not said to have failed
    assert last[0] == "13" and last[2] == "50.0" and last[3] == "**no**"
