"""Several processes (gloo, on a CPU) do what one does: the same gradients, the same table; and none
is waited for in vain."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import children
import pytest
import torch
from conftest import ROOT
from runs import CHECKPOINT, EVALUATE, PAPER, entry, read_metrics, write_manifest
from safetensors.torch import load_file

import data
from support import flags, ranks
from support.errors import DataError

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "tests")}
ANSWERS = [
    "happy",
    "a much longer answer than the others are",
    "sad",
    "angry, or so it seems to me",
]


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_manifest("manifest.json", [entry(i, ANSWERS[i % 4]) for i in range(6)])


def start(processes, script, *arguments):
    """The script under torchrun, as users start it."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return subprocess.Popen(
        [sys.executable, *launcher, str(ROOT / script), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
        start_new_session=True,
    )


def finish(processes, script, *arguments):
    """The script in processes that need not start torch -> what it prints."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [
        children.start(children.run_rank, rank, processes, port, f"{rank}.out", script, arguments)
        for rank in range(processes)
    ]
    codes = [children.code_of(rank) for rank in ranks]
    assert codes == [0] * processes, Path(children.LOG).read_text()[-3000:]
    return Path("0.out").read_text()


def one_step(processes, script, *more):
    """One step of a script on given completions -> the gradients, the line of metrics."""
    given = f"--model {CHECKPOINT} --data manifest.json --workers 0".split()
    given += ["--out", f"run_{processes}"]
    file = f"{processes}.safetensors"
    finish(processes, "tests/ranks.py", file, script, *given, *more)
    return load_file(file), read_metrics(f"run_{processes}")[1][0]


GRPO_STEP = [*PAPER, *"--prompts 4 --group 2 --updates 1 --reward ranks:variety".split()]
SFT_STEP = "--batch-size 4 --steps 1".split()


@pytest.mark.parametrize(
    "script, more",
    [
        ("train_grpo", GRPO_STEP),
        ("train_grpo", [*GRPO_STEP, "--token-mean", "--micro-batch", "1"]),
        ("train_grpo", [*GRPO_STEP, "--mask-truncated"]),
        ("train_sft", SFT_STEP),
    ],
)
def test_two_ranks_have_the_gradients_of_one(script, more):
    more = [*more, "--seed", "3", "--clip-norm", "1e9"]
    (one, line), (two, other_line) = (one_step(processes, script, *more) for processes in (1, 2))
    assert one.keys() == two.keys() and len(one) > 100
    norm = torch.stack([gradient.norm() for gradient in one.values()]).norm()
    assert norm > 1e-3
    for name, gradient in one.items():
        # Relative to the tensor, or, of one that is nearly 0, to all of them.
        largest = max(gradient.abs().max(), 1e-3 * norm)
        assert (two[name] - gradient).abs().max() <= 1e-5 * largest, name
    counted = [name for name in line if "second" not in name]
    for name in set(counted) - {"lr", "update", "step"}:
        assert other_line[name] == pytest.approx(line[name], rel=1e-4, abs=1e-6), name


def test_without_any_gradient_no_rank_takes_a_step():
    """Equal rewards and no KL: every backward pass is left out. Zeros in place of no gradients
    would let the momentum move on."""
    more = [*PAPER, *"--prompts 4 --group 2 --updates 1 --beta 0".split()]
    for processes in (1, 2):
        with pytest.raises(FileNotFoundError, match=f"{processes}.safetensors"):
            one_step(processes, "train_grpo", *more)
        (line,) = read_metrics(f"run_{processes}")[1]
        assert line["steps_left_out"] == 1 and line["grad_norm"] == 0


def test_two_ranks_evaluate_to_the_table_of_one():
    outs, results, files = [], [], []
    for processes in (1, 2):
        out = Path(f"run_{processes}")
        more = ["--data", "manifest.json", *"--max-new-tokens 6 --batch-size 2 --out".split()]
        outs.append(finish(processes, "evaluate.py", *EVALUATE, *more, str(out)))
        results.append(json.loads((out / "manifest.json").read_text()))
        files.append(sorted(file.name for file in out.iterdir()))
    assert results[0]["metrics"] == results[1]["metrics"]
    assert results[0]["completions"] == results[1]["completions"]
    # Rank 0 alone prints, and the same.
    assert outs[0].replace("run_1", "") == outs[1].replace("run_2", "")
    assert files[0] == files[1]


SFT = (
    f"--model {CHECKPOINT} --data manifest.json --batch-size 2 --steps 60 --lr 1e-3 "
    "--save-every 5 --workers 0 --save-dtype float32"
).split()


def rank_processes(launcher):
    """Process ids of the launcher's ranks, in order."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    found = {}
    for process in map(int, children):
        environment = Path(f"/proc/{process}/environ").read_text().split("\0")
        for variable in environment:
            if variable.startswith("RANK="):
                found[variable] = process
    return [found[rank] for rank in sorted(found)]


def wait_for_lines(process, metrics, lines):
    while not metrics.exists() or len(metrics.read_text().splitlines()) < lines:
        time.sleep(0.02)
        assert process.poll() is None, process.communicate()[1]


needs_proc = pytest.mark.skipif(
    not Path("/proc/self/environ").exists(), reason="needs /proc to find the ranks"
)


@needs_proc
@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_dies_ends_all_and_fewer_ranks_go_on(victim):
    finish(1, "train_sft.py", *SFT, "--out", "alone")
    process = start(2, "train_sft.py", *SFT, "--out", "killed")
    wait_for_lines(process, Path("killed.run/metrics.jsonl"), 12)
    os.kill(rank_processes(process.pid)[victim], signal.SIGKILL)
    begin = time.time()
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0 and time.time() - begin < 60
    message = (
        "another process of this run has ended, or cannot be reached; the same command goes on "
        "from what was saved"
    )
    assert err.count(message) == 1
    assert not Path("killed").exists()
    out = finish(1, "train_sft.py", *SFT, "--out", "killed")
    assert "going on after step" in out
    alone, killed = (read_metrics(folder)[1] for folder in ("alone", "killed"))
    assert [line["step"] for line in killed] == list(range(1, 61))
    losses = [line["loss"] for line in alone]
    assert [line["loss"] for line in killed] == pytest.approx(losses, rel=1e-2)


@needs_proc
def test_a_signal_stops_all_ranks_after_the_same_step():
    process = start(2, "train_sft.py", *SFT, "--out", "stopped")
    wait_for_lines(process, Path("stopped.run/metrics.jsonl"), 8)
    os.kill(rank_processes(process.pid)[1], signal.SIGTERM)  # to one of them only
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and "Traceback" not in err, err
    assert "to go on, run the same command again" in out
    finish(2, "train_sft.py", *SFT, "--out", "stopped")
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
    process = start(2, script, *arguments)
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0
    assert err.count(message) == 1 and err.count("error: ") == 1, err


def test_the_limit_of_bad_clips_counts_for_each_ranks_share(monkeypatch, tmp_path):
    monkeypatch.setattr(data, "WORLD", 4)
    (tmp_path / "bad.mp4").write_text("no clip")
    names = ["bad" if i % 5 == 0 else "no" for i in range(40)]
    examples = [data.Example(tmp_path / f"{name}.mp4", "", "", "audio") for name in names]
    clips = data.Clips(examples, 4, 32, 80, 32000)
    # The first bad clip of a rank that has 10 of the 40.
    with pytest.raises(DataError, match="more than 5 %"):
        list(data.batches(clips, list(range(0, 40, 4)), 2, skip_log=tmp_path / "skipped.txt"))


def test_shares_are_parts_of_every_batch(monkeypatch):
    assert ranks.share_of_rank([4, 3, 2, 1, 0], 2, "--prompts") == ([4, 3, 2, 1, 0], 2)
    monkeypatch.setattr(ranks, "WORLD", 2)
    monkeypatch.setattr(ranks, "RANK", 1)
    # Of 9 8 7 6, then of 5 4 3.
    assert ranks.share_of_rank([9, 8, 7, 6, 5, 4, 3], 4, "--prompts") == ([8, 6, 4], 2)
    with pytest.raises(DataError, match="--prompts 3 cannot be shared out equally among 2"):
        ranks.share_of_rank([1, 2, 3], 3, "--prompts")


def test_every_process_has_a_gpu_of_its_own(monkeypatch):
    def choose(name):
        try:
            return flags.choose_device(name)
        except DataError as error:  # as on a machine without one
            return str(error)

    # Always with its number: set_device wants one.
    assert "cuda:0" in choose("cuda") and choose("cpu") == "cpu"
    monkeypatch.setattr(ranks, "WORLD", 2)
    monkeypatch.setattr(ranks, "LOCAL_RANK", 1)
    assert "cuda:1" in choose("cuda") and "leave --device out" in choose("cuda:0")
