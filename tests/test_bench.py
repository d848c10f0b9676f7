"""bench/ at small sizes: what it prints, what it does when a measure fails, lengths it forces."""

import importlib.util
import json

import torch

from bench import __main__ as bench
from bench import memory
from bench.arms import forced_lengths
from bench.memory import update_bytes

SIZES = "--prompt-tokens 200 --new-tokens 4 --completion 8 --repeats 1 --chunk 32".split()


def printed(capsys, *arguments):
    """Exit code, and the JSON line."""
    code = bench.main([*SIZES, *arguments])
    return code, json.loads(capsys.readouterr().out.splitlines()[-1])


def test_measures_that_need_no_other_package_run_on_a_cpu(capsys):
    names = "G7 G10 G9 C2 O3 O6 O10".split()
    code, result = printed(capsys, "--only", *names)
    assert code == 0
    assert result["preset"] == "small"
    assert result["sizes"]["prompt_tokens"] == 200
    assert result["device"]
    measures = result["measures"]
    assert set(measures) == set(names)
    assert measures["G7"]["ratio"] > 1
    assert "equal" in measures["G7"]["note"]
    assert measures["G7"]["met"] == "-"  # no GPU, no verdict
    assert measures["C2"]["ours"] == 1
    assert measures["C2"]["met"] == "yes"
    assert "lengths 4 on average, longest 8" in measures["G10"]["note"]
    assert measures["G9"]["status"] == "needs a GPU"
    assert "equal" in measures["O10"]["note"]


def test_a_measure_that_fails_or_whose_arms_disagree_is_said_and_the_others_go_on(
    capsys, monkeypatch
):
    def disagrees(b):
        raise bench.Unequal("mean difference 1")

    measures = [
        bench.Measure("X1", "breaks", lambda b: 1 / 0),
        bench.Measure("X2", "disagrees", disagrees),
        *(measure for measure in bench.MEASURES if measure.name == "C2"),
    ]
    monkeypatch.setattr(bench, "MEASURES", measures)
    code, result = printed(capsys)
    assert code == 1
    assert "ZeroDivisionError" in result["measures"]["X1"]["status"]
    assert "NOT EQUAL" in result["measures"]["X2"]["status"]
    assert "ratio" not in result["measures"]["X2"]
    assert result["measures"]["C2"]["status"] == "ok"


def test_padding_is_counted_and_only_live_tokens_reach_the_head(capsys):
    """K2, at the full size's lengths: 16 groups of 8, evenly from 1 to 512."""
    code, result = printed(capsys, "--only", "K2")
    assert code == 0
    measure = result["measures"]["K2"]
    assert measure["met"] == "yes"
    assert measure["ours"] <= 10  # percent
    assert 40 < measure["other"] < 50  # each group padded to its longest completion
    assert "rows of the head = live tokens" in measure["note"]


def test_without_trl_its_measure_says_how_to_get_it(capsys, monkeypatch):
    find_spec = importlib.util.find_spec

    def without_trl(name, package=None):
        return None if name == "trl" else find_spec(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", without_trl)
    code, result = printed(capsys, "--only", "T3")
    assert code == 0
    assert set(result["measures"]) == {"T3/toy", "T3/256"}
    for measure in result["measures"].values():
        assert measure["status"].startswith("needs trl: pip install trl==")


def test_forced_lengths_are_the_same_list_with_the_mean_in_the_middle():
    lengths = forced_lengths(128, 512)
    assert torch.equal(lengths, forced_lengths(128, 512))
    assert lengths.max() == 512
    assert lengths.min() == 1
    assert abs(lengths.float().mean() - 256) < 1


def test_what_fits_is_counted():
    assert 10 * 2**30 < sum(update_bytes(memory.Update(1, 2, 16)).values()) < 20 * 2**30


def test_more_completions_need_more_memory_and_checkpointing_less(monkeypatch):
    """Counted for a language model of four layers, which is quicker."""
    llm = memory.FULL_SIZE["llm"] | {"num_hidden_layers": 4}
    monkeypatch.setattr(memory, "FULL_SIZE", memory.FULL_SIZE | {"llm": llm})
    forget_counts()
    plain = sum(update_bytes(memory.Update(1, 2, 16)).values())
    again = sum(update_bytes(memory.Update(1, 2, 16, checkpointing=True)).values())
    wide = sum(update_bytes(memory.Update(1, 4, 16)).values())
    forget_counts()
    assert again < plain < wide


def forget_counts():
    memory.fake_models.cache_clear()
    memory.weight_bytes.cache_clear()
    memory.encode_bytes.cache_clear()
    memory.rollout_bytes.cache_clear()
    memory.scoring_bytes.cache_clear()
