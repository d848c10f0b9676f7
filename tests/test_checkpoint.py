"""Nothing is lost: runs that are killed, stopped, out of disk or given nonsense, against the same run left alone."""

import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import GOLDEN, ROOT
from safetensors.torch import load_file

import checkpoint
import common
import model
import train_grpo
import train_sft
from data import QUESTION_REASONING, DataError
from model import CheckpointError, HumanOmni

CHECKPOINT = str(GOLDEN / "tiny" / "humanomni")


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with a manifest and a reward that tells random completions apart, so that weights move."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "more_rewards", raising=False)
    entries = [
        {
            "video": str(GOLDEN / "media" / f"clip{'16k' * (i % 2)}.mp4"),
            "conversations": [
                {"from": "human", "value": f"<video>\n<audio>\n{QUESTION_REASONING}"},
                {"from": "gpt", "value": ["happy", "sad", "angry"][i % 3]},
            ],
        }
        for i in range(6)
    ]
    Path("manifest.json").write_text(json.dumps(entries))
    Path("more_rewards.py").write_text(
        "def variety(completion, label):\n    return len(set(completion)) / 10\n"
    )
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield tmp_path
    for number, handler in handlers.items():
        signal.signal(number, handler)


GRPO = (
    train_grpo.main,
    [
        "--model",
        CHECKPOINT,
        "--data",
        "manifest.json",
        "--val",
        "manifest.json",
        "--updates",
        "6",
        "--prompts",
        "2",
        "--group",
        "3",
        "--max-new-tokens",
        "6",
        "--lr",
        "1e-3",
        "--val-every",
        "3",
        "--save-every",
        "2",
        "--show-every",
        "0",
        "--workers",
        "1",
        "--reward",
        "more_rewards:variety",
        "--save-dtype",
        "float32",
    ],
)
SFT = (
    train_sft.main,
    [
        "--model",
        CHECKPOINT,
        "--data",
        "manifest.json",
        "--steps",
        "8",
        "--batch-size",
        "2",
        "--lr",
        "1e-3",
        "--save-every",
        "2",
        "--workers",
        "1",
        "--save-dtype",
        "float32",
    ],
)


def child(script, out, *more, prepare=lambda: None):
    """A forked process that runs a script with its arguments; `prepare` first. (Forked: torch need not be imported again.)"""
    main, arguments = script

    def work():
        os.setpgrp()
        prepare()
        sys.stdout = sys.stderr = open(os.devnull, "w")
        main([*arguments, "--out", out, *more])

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    return process


def finish(script, out, *more):
    process = child(script, out, *more)
    process.join()
    assert process.exitcode == 0


def result(out):
    """All that a run leaves, times aside: metrics and weights."""
    header, *lines = map(json.loads, (Path(out) / "metrics.jsonl").read_text().splitlines())
    lines = [{key: value for key, value in line.items() if "second" not in key} for line in lines]
    weights = {
        file.relative_to(out): load_file(file) for file in Path(out).rglob("model.safetensors")
    }
    return lines, weights


def assert_same(a, b):
    (lines, weights), (expected_lines, expected_weights) = result(a), result(b)
    assert lines == expected_lines
    assert weights.keys() == expected_weights.keys() and weights
    for file, tensors in weights.items():
        assert tensors.keys() == expected_weights[file].keys()
        assert all(
            torch.equal(tensor, expected_weights[file][name]) for name, tensor in tensors.items()
        )


def kill_at(name, call, owner=None):
    """-> prepare() for a child: the call-th call of owner.name is the process's last; save_file first writes half."""
    owner = owner or checkpoint

    def prepare():
        original, calls = getattr(owner, name), []

        def deadly(*arguments, **more):
            calls.append(1)
            if len(calls) < call:
                return original(*arguments, **more)
            if name == "save_file":
                original(*arguments, **more)
                os.truncate(arguments[1], os.path.getsize(arguments[1]) // 2)
            os.kill(os.getpid(), signal.SIGKILL)

        setattr(owner, name, deadly)

    return prepare


# Where a process dies: in which of its own calls. Each goes on where the one before it had saved. GRPO saves its state at the
# start, after the first evaluation, and after updates 2, 4 and 6; SFT at the start and after steps 2, 4, 6 and 8.
MOMENTS = {
    "grpo": [
        ("save_file", 1),
        ("save_file", 2),
        ("save_file", 3),
        ("sync", 1),
        ("sync", 2),
        ("save_file", 1),
        ("sync", 2),
    ],
    "sft": [
        ("save_file", 1),
        ("save_file", 2),
        ("sync", 3),
        ("sync", 2),
        ("save_file", 1),
        ("sync", 4),
    ],
}


@pytest.mark.parametrize("script", [GRPO, SFT], ids=["grpo", "sft"])
def test_killed_while_saving_and_resumed_is_the_same_run(workplace, script):
    """SIGKILL with the state half written, written but not renamed, renamed but not synced; at the start, between, at the end."""
    finish(script, "alone")
    for moment in MOMENTS["grpo" if script is GRPO else "sft"]:
        process = child(script, "killed", prepare=kill_at(*moment))
        process.join()
        assert process.exitcode == -signal.SIGKILL, moment
    finish(script, "killed")
    assert_same("killed", "alone")
    assert not list(workplace.glob("killed.*")) and not list(workplace.rglob("*.tmp"))


def test_moments_in_main_memory_change_nothing(workplace):
    finish(GRPO, "alone")
    finish(GRPO, "offloaded", "--offload-optimizer")
    assert_same("offloaded", "alone")
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(3))])
    optimizer.param_groups[0]["params"][0].grad = torch.ones(3)
    optimizer.step()
    train_sft.move_moments(optimizer, "meta")  # any device that is not the parameter's
    (state,) = optimizer.state.values()
    assert (
        state["exp_avg"].device.type == state["exp_avg_sq"].device.type == "meta"
        and state["step"].device.type == "cpu"
    )


def test_moments_go_to_main_memory_before_a_resumed_run_does_anything(workplace, monkeypatch):
    stopped_run()
    places, move = [], train_grpo.move_moments
    monkeypatch.setattr(
        train_grpo,
        "move_moments",
        lambda optimizer, device: (places.append(str(device)), move(optimizer, device)),
    )
    run_grpo("--offload-optimizer", "--updates", "6")
    assert places[0] == "cpu" and len(places) > 1


def test_sft_killed_after_its_checkpoint_is_placed_places_no_second_one(workplace):
    process = child(SFT, "run", prepare=kill_at("finish", 1, owner=checkpoint.Run))
    process.join()
    assert (
        process.exitcode == -signal.SIGKILL
        and Path("run/model.safetensors").exists()
        and Path("run.run").exists()
    )
    finish(SFT, "run")
    assert sorted(path.name for path in workplace.glob("run*")) == ["run"]
    finish(SFT, "run")  # another run of the same flags is another run
    assert Path("run.1").exists()


@pytest.mark.slow
@pytest.mark.parametrize("script", [GRPO, SFT], ids=["grpo", "sft"])
def test_killed_at_random_moments_and_resumed_is_the_same_run(workplace, script):
    start = time.perf_counter()
    finish(script, "alone")
    whole = time.perf_counter() - start
    moments, kills, runs = random.Random(0), 0, 0
    while kills < 20:
        runs += 1
        while True:
            process = child(script, f"killed_{runs}")
            process.join(moments.uniform(0, 1.2 * whole))
            if process.exitcode is not None:
                assert process.exitcode == 0
                break
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            kills += 1
        assert_same(f"killed_{runs}", "alone")
    print(f"{kills} kills in {runs} runs")


def test_a_signal_finishes_the_update_saves_and_says_how_to_go_on(workplace):
    script = (GRPO[0], [*GRPO[1], "--updates", "16", "--test", "manifest.json"])
    finish(script, "alone")
    command = [sys.executable, str(ROOT / "train_grpo.py"), *script[1], "--out", "stopped"]
    metrics = Path("stopped/metrics.jsonl")
    for number, lines in (
        (signal.SIGTERM, 1),
        (signal.SIGINT, 3),
        (signal.SIGTERM, 8),
    ):  # in the first evaluation; in an update
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # as here: with others, last bits differ
        while not metrics.exists() or len(metrics.read_text().splitlines()) < lines:
            time.sleep(0.005)
            assert process.poll() is None, process.communicate()
        time.sleep(0.1)
        os.killpg(process.pid, number)  # as a terminal does: the workers get it too
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        assert "to go on, run the same command again" in out and "Traceback" not in err
        assert ("finishing this step" in err) == (lines > 1)
    finish(script, "stopped")
    assert_same("stopped", "alone")


def test_a_second_signal_stops_at_once(workplace, monkeypatch):
    config = train_sft.Config(out="x", model=CHECKPOINT, data=("manifest.json",))
    run = checkpoint.Run("x", config, {})
    with pytest.raises(KeyboardInterrupt):
        for _ in run.steps(5):
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
            pytest.fail("still running")


def stopped_run(out="run", steps=3):
    """A GRPO run that was killed after its state of update 2 was saved."""
    process = child(GRPO, out, prepare=kill_at("save_file", 4))
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert sorted(file.name for file in Path(out, "state").glob("*.safetensors")) == [
        "000000.safetensors",
        "000002.safetensors",
    ]


def run_grpo(*more, out="run"):
    GRPO[0]([*GRPO[1], "--out", out, *more])


def test_other_flags_and_other_files_are_refused_by_name_or_overridden(workplace, capsys):
    stopped_run()
    with pytest.raises(DataError, match=r"(?s)after step 2.*--lr was 0.001, is 0.01.*--override"):
        run_grpo("--lr", "0.01")
    entries = json.loads(Path("manifest.json").read_text())
    Path("manifest.json").write_text(json.dumps(entries[::-1]))
    with pytest.raises(DataError, match="manifest.json is not what it was"):
        run_grpo()
    run_grpo("--override", "--lr", "0.01", "--keep", "1")
    headers = [
        line
        for line in map(json.loads, Path("run/metrics.jsonl").read_text().splitlines())
        if "config" in line
    ]
    assert [header["config"]["lr"] for header in headers] == [0.001, 0.01] and headers[1][
        "after_step"
    ] == 2
    assert "going on after step 2" in capsys.readouterr().out


def test_no_resume_keeps_the_unfinished_run(workplace):
    stopped_run()
    run_grpo("--no-resume", "--updates", "1")
    assert Path("run.1/state/000002.safetensors").exists() and Path("run/results.json").exists()
    run_grpo("--updates", "1")  # finished: nothing to go on with, so it is a new run
    assert Path("run.2/results.json").exists() and not Path("run/state").exists()


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: file.write_bytes(file.read_bytes()[:-100]),
        lambda file: file.write_bytes(b""),
        lambda file: file.write_bytes(
            b"\x80\x04\x95cposix\nsystem\n(S'touch owned'\ntR."
        ),  # a pickle that would run a command
        lambda file: shutil.copy(GOLDEN / "tiny" / "humanomni" / "model.safetensors", file),
    ],
    ids=["cut off", "empty", "pickle", "something else"],
)
def test_a_damaged_state_is_named_and_the_one_before_it_serves(workplace, damage):
    finish(GRPO, "alone")
    stopped_run()
    newest = Path("run/state/000002.safetensors")
    damage(newest)
    with pytest.raises(CheckpointError, match="000002.safetensors: not a whole state.*delete it"):
        run_grpo()
    assert not Path("owned").exists()
    newest.unlink()
    run_grpo()
    assert_same("run", "alone")


def test_a_state_of_another_model_is_refused(workplace):
    parameters = {"w": torch.nn.Parameter(torch.zeros(2))}
    optimizer = torch.optim.AdamW(parameters.values())
    run = checkpoint.Run("x", train_sft.Config(out="x", save_every=1), {})
    run.track(parameters, optimizer)
    for _ in run.steps(1):
        pass
    run.lock.close()
    for other in (
        {"v": torch.nn.Parameter(torch.zeros(2))},
        {"w": torch.nn.Parameter(torch.zeros(3))},
        {},
    ):
        with pytest.raises(CheckpointError, match="not a whole state of this run"):
            checkpoint.Run("x", train_sft.Config(out="x", save_every=1), {}).track(other, optimizer)


def test_two_processes_do_not_share_a_run(workplace):
    process = child(GRPO, "run")
    while not Path("run/metrics.jsonl").exists():
        time.sleep(0.005)
    with pytest.raises(DataError, match="another process is at work"):
        run_grpo()
    process.join()
    assert process.exitcode == 0


def test_the_newest_states_are_kept(workplace):
    for keep in (1, 3):
        run = checkpoint.Run(f"keep_{keep}", train_sft.Config(keep=keep, save_every=2), {})
        kept = [
            sorted(int(file.stem) for file in run.states.glob("*.safetensors"))
            for _ in run.steps(9)
        ][-1]
        assert kept == [4, 6, 8][-keep:]  # on the way into the ninth step


def limit_file_size():
    """As a full disk does, from here on writing more than 3 kB into a file fails."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3_000, resource.RLIM_INFINITY))


def test_a_full_disk_stops_the_run_and_the_last_state_serves(workplace):
    finish(GRPO, "alone")
    stopped_run()
    good = Path("run/state/000002.safetensors").read_bytes()
    message = Path("message")

    def prepare():
        save = checkpoint.save_file
        checkpoint.save_file = lambda *arguments, **more: (
            limit_file_size(),
            save(*arguments, **more),
        )

    process = child(
        (lambda arguments: expect(CheckpointError, message, arguments), GRPO[1]),
        "run",
        prepare=prepare,
    )
    process.join()
    assert process.exitcode == 0
    assert (
        "000004.safetensors: cannot be written" in message.read_text()
        and "go on from the last one" in message.read_text()
    )
    assert Path("run/state/000002.safetensors").read_bytes() == good and not list(
        Path("run").rglob("*.tmp")
    )
    finish(GRPO, "run")
    assert_same("run", "alone")


def expect(error, message, arguments):
    try:
        train_grpo.main(arguments)
    except error as raised:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        message.write_text(str(raised))
    else:
        sys.exit(1)


def test_a_folder_that_cannot_be_written_is_an_error_before_training(workplace):
    Path("file").write_text("not a folder")
    done = subprocess.run(
        [sys.executable, str(ROOT / "train_grpo.py"), *GRPO[1], "--out", "file/run"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "file/run" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("moment", [("sync", 1), ("sync", 5), ("save_file", 1)])
def test_a_checkpoint_that_is_being_replaced_survives_a_kill(workplace, moment):
    """Killed while the new one is written: the old one is there, whole; written again, the new one is."""
    new, old = HumanOmni.from_pretrained(CHECKPOINT), HumanOmni.from_pretrained(CHECKPOINT)
    old.save_pretrained("saved")
    with torch.no_grad():
        new.embed_tokens.weight.add_(1)
    process = child(
        (lambda arguments: new.save_pretrained("saved"), []),
        "",
        prepare=kill_at(*moment, owner=model),
    )
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert torch.equal(
        HumanOmni.from_pretrained("saved").embed_tokens.weight, old.embed_tokens.weight
    )
    new.save_pretrained("saved")
    assert torch.equal(
        HumanOmni.from_pretrained("saved").embed_tokens.weight, new.embed_tokens.weight
    )
    assert [file.name for file in workplace.glob("saved*")] == ["saved"]


def test_a_checkpoint_that_does_not_fit_on_the_disk_leaves_the_old_one(workplace):
    new = HumanOmni.from_pretrained(CHECKPOINT)
    new.save_pretrained("saved")
    message, before = Path("message"), Path("saved/model.safetensors").read_bytes()

    def work(arguments):
        limit_file_size()
        with pytest.raises(CheckpointError) as stopped:
            new.save_pretrained("saved")
        message.write_text(str(stopped.value))

    process = child((work, []), "")
    process.join()
    assert (
        process.exitcode == 0
        and "saved: cannot be written" in message.read_text()
        and "unharmed" in message.read_text()
    )
    assert Path("saved/model.safetensors").read_bytes() == before
    assert [file.name for file in workplace.glob("saved*")] == ["saved"]


# --- bad numbers, bad rewards, not enough memory


@pytest.mark.parametrize(
    "script, where", [(GRPO, "logits"), (GRPO, "gradient"), (SFT, "logits"), (SFT, "gradient")]
)
def test_a_nan_stops_the_run_with_what_led_to_it_or_is_passed_over(
    workplace, monkeypatch, script, where
):
    """A NaN in the third step, in the forward or only in the backward pass."""
    main, arguments = script
    state = {"step": 0}
    log = checkpoint.Run.log
    monkeypatch.setattr(
        checkpoint.Run,
        "log",
        lambda run, line: (log(run, line), state.update(step=run.step + 1))[0],
    )
    logits = HumanOmni.logits

    def poisoned(self, hidden):
        out = logits(self, hidden)
        if state["step"] == 2 and torch.is_grad_enabled():
            if where == "logits":
                return out * torch.nan
            out.register_hook(lambda gradient: gradient * torch.nan)
        return out

    monkeypatch.setattr(HumanOmni, "logits", poisoned)
    with pytest.raises(
        checkpoint.TrainingError,
        match=r"gradient norm not finite.*nonfinite_000003.json.*--skip-nonfinite",
    ):
        main([*arguments, "--out", "run"])
    folder = Path("run" if script is GRPO else "run.run")
    story = json.loads((folder / "nonfinite_000003.json").read_text())
    if script is GRPO:
        assert (
            len(story["completions"]) == 2
            and len(story["completions"][0]) == 3
            and set(story["rewards"]) == {"accuracy", "format", "variety"}
        )
    assert ("loss" in story["not_finite"]) == (where == "logits")
    main([*arguments, "--out", "run", "--skip-nonfinite"])
    lines, weights = result("run")
    assert len(lines) == (6 if script is GRPO else 8)
    assert [line["steps_left_out"] for line in lines[:4]] == [0, 0, 1, 0]
    assert all(
        tensor.isfinite().all() for tensors in weights.values() for tensor in tensors.values()
    )


def test_a_sudden_gradient_is_said(workplace, capsys):
    run = checkpoint.Run("x", train_sft.Config(), {})
    for norm in [1.0, 2.0, 1.5] * 5 + [14.0, 16.0]:
        run.log({"grad_norm": norm})
    err = capsys.readouterr().out
    assert (
        err.count("gradient norm") == 1
        and "gradient norm 16: the median of the last 16 steps is 1.5" in err
    )


@pytest.mark.parametrize(
    "body, problem",
    [
        (
            "return 1 / 0",
            r"reward bad failed with ZeroDivisionError: division by zero \(more_rewards.py, line 2\)",
        ),
        ("return float('nan')", "reward bad returned nan"),
        ("return [1.0, 2.0]", "reward bad failed with TypeError"),
        ("return None", "reward bad failed with TypeError"),
        ("return 'much'", "reward bad failed with ValueError"),
    ],
)
def test_a_bad_reward_is_named_with_the_completion(workplace, monkeypatch, body, problem):
    (workplace / "broken_rewards.py").write_text(f"def bad(completion, label):\n    {body}\n")
    monkeypatch.delitem(sys.modules, "broken_rewards", raising=False)
    functions = train_grpo.find_rewards(["broken_rewards:bad"])
    with pytest.raises(
        checkpoint.TrainingError,
        match=f"{problem.replace('more_rewards', 'broken_rewards')}.*\n<answer>sad</answer>$",
    ):
        train_grpo.reward_completions(functions, [["<answer>sad</answer>"]], ["happy"])


@pytest.mark.parametrize(
    "name",
    [
        "nowhere:variety",
        "more_rewards:nothing",
        "more_rewards",
        "",
        "train_grpo:REWARDS",
        "rewards:accuracy",
    ],
)
def test_a_reward_that_cannot_be_found_is_named(workplace, name):
    with pytest.raises(DataError, match="--reward"):
        train_grpo.find_rewards([name])


def test_a_reward_of_ones_own_counts(workplace):
    rewards = train_grpo.reward_completions(
        train_grpo.find_rewards(["more_rewards:variety"]),
        [["aab", "<answer>sad</answer>"]],
        ["sad"],
    )
    assert list(rewards) == ["accuracy", "format", "variety"]
    assert rewards["variety"].tolist() == [pytest.approx([0.2, 1.0])] and rewards[
        "accuracy"
    ].tolist() == [[0, 1]]


def test_out_of_memory_says_what_to_change(capsys):
    def main():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    with pytest.raises(SystemExit) as stopped:
        common.run(main, ("--gradient-checkpointing",))
    err = capsys.readouterr().err
    assert (
        stopped.value.code == 1
        and "out of GPU memory" in err
        and "--gradient-checkpointing" in err
        and "2.00 GiB" in err
    )


def test_the_samplers_buffers_come_before_anything_long(workplace, monkeypatch):
    """If they do not fit, it is known before the first evaluation and rollout."""

    def full(*arguments, **more):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(train_grpo, "Sampler", full)
    monkeypatch.setattr(train_grpo, "evaluate", lambda *a, **b: pytest.fail("evaluated first"))
    with pytest.raises(torch.OutOfMemoryError):
        run_grpo("--test", "manifest.json")


def test_nothing_reads_or_writes_pickles():
    for file in ROOT.glob("*.py"):
        text = file.read_text()
        for word in (
            "torch.load",
            "torch.save",
            "import pickle",
            "allow_pickle",
            "shelve",
            "marshal",
            "joblib",
        ):
            assert word not in text, (file, word)
