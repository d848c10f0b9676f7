"""bench.py at small sizes: what it prints, what it does when a measure fails, and the lengths it forces."""

import json

import bench
import torch
from arms import forced_lengths

SIZES = [
    "--prompt-tokens",
    "200",
    "--new-tokens",
    "4",
    "--completion",
    "8",
    "--repeats",
    "1",
    "--chunk",
    "32",
]


def printed(capsys, *arguments):
    code = bench.main([*SIZES, *arguments])
    return code, json.loads(capsys.readouterr().out.splitlines()[-1])


def test_measures_that_need_no_other_package_run_on_a_cpu(capsys):
    code, result = printed(capsys, "--only", "G7", "G10", "G9", "C2", "O3", "O6")
    assert (
        code == 0
        and result["preset"] == "small"
        and result["sizes"]["prompt_tokens"] == 200
        and result["device"]
    )
    measures = result["measures"]
    assert set(measures) == {"G7", "G10", "G9", "C2", "O3", "O6"}
    assert (
        measures["G7"]["ratio"] > 1
        and "equal" in measures["G7"]["note"]
        and measures["G7"]["met"] == "-"
    )  # no GPU, no verdict
    assert measures["C2"]["ours"] == 1 and measures["C2"]["met"] == "yes"
    assert "lengths 4 on average, longest 8" in measures["G10"]["note"]
    assert measures["G9"]["status"] == "needs a GPU"


def test_a_measure_that_fails_or_whose_arms_disagree_is_said_and_the_others_go_on(
    capsys, monkeypatch
):
    def disagrees(b):
        raise bench.Unequal("mean difference 1")

    monkeypatch.setattr(
        bench,
        "MEASURES",
        [
            bench.Measure("X1", "breaks", lambda b: 1 / 0),
            bench.Measure("X2", "disagrees", disagrees),
            *(m for m in bench.MEASURES if m.name == "C2"),
        ],
    )
    code, result = printed(capsys)
    assert code == 1
    assert (
        "ZeroDivisionError" in result["measures"]["X1"]["status"]
        and "NOT EQUAL" in result["measures"]["X2"]["status"]
    )
    assert "ratio" not in result["measures"]["X2"] and result["measures"]["C2"]["status"] == "ok"


def test_forced_lengths_are_the_same_list_with_the_mean_in_the_middle():
    lengths = forced_lengths(128, 512)
    assert (
        torch.equal(lengths, forced_lengths(128, 512))
        and lengths.max() == 512
        and lengths.min() == 1
    )
    assert abs(lengths.float().mean() - 256) < 1


def test_what_fits_is_counted(capsys):
    """One configuration, counted twice: more completions need more memory, checkpointing less."""
    import fit
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        plain, again, wide = (
            sum(fit.update_bytes(1, G, 16, checkpointing=c).values())
            for G, c in ((2, False), (2, True), (4, False))
        )
    assert again < plain < wide
    assert 10 * 2**30 < plain < 20 * 2**30
