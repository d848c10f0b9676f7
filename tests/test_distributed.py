"""Several processes (gloo, on a CPU) do what one does: the same gradients, the same table; and none is waited for in vain."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import GOLDEN, ROOT
from safetensors.torch import load_file

import common
import data
from support import ranks as distributed
from data import QUESTION_REASONING
from support.errors import DataError

CHECKPOINT = str(GOLDEN / "tiny" / "humanomni")
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "tests")}


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    answers = [
        "happy",
        "a much longer answer than the others are",
        "sad",
        "angry, or so it seems to me",
    ]
    entries = [
        {
            "video": str(GOLDEN / "media" / f"clip{'16k' * (i % 2)}.mp4"),
            "conversations": [
                {"from": "human", "value": f"<video>\n<audio>\n{QUESTION_REASONING}"},
                {"from": "gpt", "value": answers[i % 4]},
            ],
        }
        for i in range(6)
    ]
    Path("manifest.json").write_text(json.dumps(entries))


def start(ranks, script, *arguments):
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        if ranks > 1
        else []
    )
    return subprocess.Popen(
        [sys.executable, *launcher, str(script), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
        start_new_session=True,
    )


def finish(ranks, script, *arguments):
    process = start(ranks, script, *arguments)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out


SCRIPTS = {
    "grpo": [
        "--data",
        "manifest.json",
        "--prompts",
        "4",
        "--group",
        "2",
        "--updates",
        "1",
        "--reward",
        "ranks:variety",
    ],
    "sft": ["--data", "manifest.json", "--batch-size", "4", "--steps", "1"],
}


@pytest.mark.parametrize(
    "script, more", [("grpo", []), ("grpo", ["--token-mean", "--micro-batch", "1"]), ("sft", [])]
)
def test_two_ranks_have_the_gradients_of_one(script, more):
    for ranks in (1, 2):
        finish(
            ranks,
            ROOT / "tests" / "ranks.py",
            f"{ranks}.safetensors",
            script,
            "--model",
            CHECKPOINT,
            *SCRIPTS[script],
            *more,
            "--seed",
            "3",
            "--clip-norm",
            "1e9",
            "--workers",
            "0",
            "--out",
            f"run_{ranks}",
        )
    one, two = load_file("1.safetensors"), load_file("2.safetensors")
    assert one.keys() == two.keys() and len(one) > 100
    norm = torch.stack([gradient.norm() for gradient in one.values()]).norm()
    assert norm > 1e-3
    for (
        name,
        gradient,
    ) in one.items():  # relative to the tensor, or, of one that is nearly 0, to all of them
        assert (two[name] - gradient).abs().max() <= 1e-5 * max(
            gradient.abs().max(), 1e-3 * norm
        ), name
    metrics = [
        json.loads((Path(f"run_{ranks}") / "metrics.jsonl").read_text().splitlines()[1])
        for ranks in (1, 2)
    ]
    counted = [
        name for name in metrics[0] if "second" not in name and name not in ("lr", "update", "step")
    ]
    for name in counted:
        assert metrics[1][name] == pytest.approx(metrics[0][name], rel=1e-4, abs=1e-6), name


def test_without_any_gradient_no_rank_takes_a_step():
    """Equal rewards and no KL: every backward pass is left out. Zeros in place of no gradients would let the momentum move on."""
    for ranks in (1, 2):
        finish(
            ranks,
            ROOT / "tests" / "ranks.py",
            f"{ranks}.safetensors",
            "grpo",
            "--model",
            CHECKPOINT,
            "--data",
            "manifest.json",
            "--prompts",
            "4",
            "--group",
            "2",
            "--updates",
            "1",
            "--beta",
            "0",
            "--workers",
            "0",
            "--out",
            f"run_{ranks}",
        )
    assert load_file("1.safetensors") == load_file("2.safetensors") == {}


def test_two_ranks_evaluate_to_the_table_of_one():
    outs = [
        finish(
            ranks,
            ROOT / "evaluate.py",
            "--model",
            CHECKPOINT,
            "--data",
            "manifest.json",
            "--max-new-tokens",
            "6",
            "--batch-size",
            "2",
            "--workers",
            "0",
            "--out",
            f"run_{ranks}",
        )
        for ranks in (1, 2)
    ]
    results = [json.loads(Path(f"run_{ranks}/manifest.json").read_text()) for ranks in (1, 2)]
    assert (
        results[0]["metrics"] == results[1]["metrics"]
        and results[0]["completions"] == results[1]["completions"]
    )
    assert outs[0].replace("run_1", "") == outs[1].replace(
        "run_2", ""
    )  # rank 0 alone prints, and the same
    assert sorted(file.name for file in Path("run_2").iterdir()) == sorted(
        file.name for file in Path("run_1").iterdir()
    )


SFT = [
    "--model",
    CHECKPOINT,
    "--data",
    "manifest.json",
    "--batch-size",
    "2",
    "--steps",
    "60",
    "--lr",
    "1e-3",
    "--save-every",
    "5",
    "--workers",
    "0",
    "--save-dtype",
    "float32",
]


def rank_processes(launcher):
    """Process ids of the launcher's ranks, in order."""
    ids = [int(i) for i in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()]
    ranks = {
        dict(
            part.split("=", 1)
            for part in Path(f"/proc/{i}/environ").read_text().split("\0")
            if "=" in part
        ).get("RANK"): i
        for i in ids
    }
    return [ranks[rank] for rank in sorted(filter(None, ranks))]


needs_proc = pytest.mark.skipif(
    not Path("/proc/self/environ").exists(), reason="needs /proc to find the ranks"
)


@needs_proc
@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_dies_ends_all_and_fewer_ranks_go_on(victim):
    finish(1, ROOT / "train_sft.py", *SFT, "--out", "alone")
    process = start(2, ROOT / "train_sft.py", *SFT, "--out", "killed")
    metrics = Path("killed.run/metrics.jsonl")
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 12:
        time.sleep(0.02)
        assert process.poll() is None, process.communicate()[1]
    os.kill(rank_processes(process.pid)[victim], signal.SIGKILL)
    begin = time.time()
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0 and time.time() - begin < 60
    assert (
        err.count(
            "another process of this run has ended, or cannot be reached; the same command goes on from what was saved"
        )
        == 1
    )
    assert not Path("killed").exists()
    out = finish(1, ROOT / "train_sft.py", *SFT, "--out", "killed")
    assert "going on after step" in out
    lines = [
        [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()[1:]]
        for folder in ("alone", "killed")
    ]
    assert [line["step"] for line in lines[1]] == list(range(1, 61))
    assert [line["loss"] for line in lines[1]] == pytest.approx(
        [line["loss"] for line in lines[0]], rel=1e-2
    )


@needs_proc
def test_a_signal_stops_all_ranks_after_the_same_step():
    process = start(2, ROOT / "train_sft.py", *SFT, "--out", "stopped")
    metrics = Path("stopped.run/metrics.jsonl")
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 8:
        time.sleep(0.02)
        assert process.poll() is None, process.communicate()[1]
    ranks = rank_processes(process.pid)
    os.kill(ranks[1], signal.SIGTERM)  # to one of them only
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and "Traceback" not in err, err
    assert "to go on, run the same command again" in out
    finish(2, ROOT / "train_sft.py", *SFT, "--out", "stopped")
    assert Path("stopped/model.safetensors").exists()


@pytest.mark.parametrize(
    "script, arguments, message",
    [
        (
            "train_sft.py",
            [*SFT, "--batch-size", "3", "--out", "x"],
            "--batch-size 3 cannot be shared out equally among 2 processes",
        ),
        (
            "evaluate.py",
            ["--model", "nowhere", "--data", "manifest.json"],
            "nowhere/config.json: not found",
        ),
    ],
)
def test_an_error_of_all_is_said_once(script, arguments, message):
    process = start(2, ROOT / script, *arguments)
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0
    assert err.count(message) == 1 and err.count("error: ") == 1, err


def test_the_limit_of_bad_clips_counts_for_each_ranks_share(monkeypatch, tmp_path):
    monkeypatch.setattr(data, "WORLD", 4)
    (tmp_path / "bad.mp4").write_text("no clip")
    examples = [
        data.Example(tmp_path / f"{'bad' if i % 5 == 0 else 'no'}.mp4", "", "", "audio")
        for i in range(40)
    ]
    clips = data.Clips(examples, 4, 32, 80, 32000)
    with pytest.raises(
        DataError, match="more than 5 %"
    ):  # the first bad clip of a rank that has 10 of the 40
        list(data.batches(clips, list(range(0, 40, 4)), 2, skip_log=tmp_path / "skipped.txt"))


def test_shares_are_parts_of_every_batch(monkeypatch):
    assert distributed.share([4, 3, 2, 1, 0], 2, "--prompts") == ([4, 3, 2, 1, 0], 2)
    monkeypatch.setattr(distributed, "WORLD", 2)
    monkeypatch.setattr(distributed, "RANK", 1)
    assert distributed.share([9, 8, 7, 6, 5, 4, 3], 4, "--prompts") == (
        [8, 6, 4],
        2,
    )  # of 9 8 7 6, then of 5 4 3
    with pytest.raises(DataError, match="--prompts 3 cannot be shared out equally among 2"):
        distributed.share([1, 2, 3], 3, "--prompts")


def test_every_process_has_a_gpu_of_its_own(monkeypatch):
    def choose(name):
        try:
            return common.choose_device(name)
        except DataError as error:  # as on a machine without one
            return str(error)

    assert (
        "cuda:0" in choose("cuda") and choose("cpu") == "cpu"
    )  # always with its number: set_device wants one
    monkeypatch.setattr(distributed, "WORLD", 2)
    monkeypatch.setattr(distributed, "LOCAL_RANK", 1)
    assert "cuda:1" in choose("cuda") and "leave --device out" in choose("cuda:0")
