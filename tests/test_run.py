"""Nothing is lost: runs that are killed, stopped, out of disk or given nonsense, against the same
run left alone; and folders of others are left alone."""

import errno
import fcntl
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import children
import pytest
import torch
from children import code_of, finish, kill_at, limit_file_size, limit_file_size_at, note_end
from conftest import GOLDEN, ROOT
from runs import (
    CHECKPOINT,
    EVALUATE,
    PAPER,
    SFT,
    assert_same_run,
    entry,
    read_metrics,
    result_of,
    write_manifest,
)

import evaluate
import train_grpo
import train_sft
from checkpoint import CheckpointError
from model import HumanOmni
from support import sampler as support_sampler
from support.custom import find_rewards
from support.errors import DataError, TrainingError
from support.flags import run_script
from support.optimizer import Optimizer
from support.run import Run, make_room

GRPO_FLAGS = (
    f"--model {CHECKPOINT} --data manifest.json --val manifest.json --updates 6 --prompts 2 "
    "--group 3 --max-new-tokens 6 --lr 1e-3 --val-every 3 --save-every 2 --show-every 0 "
    "--workers 1 --reward more_rewards:variety --save-dtype float32"
).split() + PAPER
SFT_FLAGS = (
    f"--model {CHECKPOINT} --data manifest.json --steps 8 --batch-size 2 --lr 1e-3 --save-every 2 "
    "--workers 1 --save-dtype float32"
).split()
FLAGS = {"train_grpo": GRPO_FLAGS, "train_sft": SFT_FLAGS}
SCRIPTS = {"train_grpo": train_grpo, "train_sft": train_sft}
each_script = pytest.mark.parametrize("script", FLAGS)


def furnish(folder):
    """A manifest, and a reward that tells random completions apart, so that weights move."""
    write_manifest(folder / "manifest.json")
    reward = "def variety(completion, label):\n    return len(set(completion)) / 10\n"
    (folder / "more_rewards.py").write_text(reward)


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "more_rewards", raising=False)
    furnish(tmp_path)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield tmp_path
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Folders of the two scripts' runs, which nothing has disturbed."""
    folder, here = tmp_path_factory.mktemp("alone"), os.getcwd()
    furnish(folder)
    os.chdir(folder)
    for script, flags in FLAGS.items():
        finish(children.run_script, script, [*flags, "--out", script])
    os.chdir(here)
    return {script: folder / script for script in FLAGS}


def start(script, out, *prepare):
    return children.start(children.run_script, script, [*FLAGS[script], "--out", out], *prepare)


def finish_run(script, out, *more):
    finish(children.run_script, script, [*FLAGS[script], "--out", out, *more])


def run_grpo(*more, out="run"):
    train_grpo.main([*GRPO_FLAGS, "--out", out, *more])


def stopped_run(out="run"):
    """A GRPO run that was killed after its state of update 2 was saved."""
    process = start("train_grpo", out, kill_at, "support.run", "save_tensors", 4)
    assert code_of(process) == -signal.SIGKILL
    states = sorted(file.name for file in Path(out, "state").glob("*.safetensors"))
    assert states == ["000000.safetensors", "000002.safetensors"]


def content_of(folder):
    """All that is in a folder: path -> bytes, target of a link, or None for a folder."""
    found = {}
    for path in sorted(Path(folder).rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = os.readlink(path)
        else:
            found[name] = path.read_bytes() if path.is_file() else None
    return found


# --------------------------------------------------------------------------------------------------
# Killed, stopped, resumed

# Where a process dies: in which call of which function. Each goes on where the one before it had
# saved. GRPO saves its state at the start, after the first evaluation, and after updates 2, 4, 6;
# SFT at the start and after steps 2, 4, 6 and 8.
MOMENTS = {
    "train_grpo": [
        ("save_tensors", 1),
        ("save_tensors", 2),
        ("save_tensors", 3),
        ("sync", 1),
        ("sync", 2),
        ("save_tensors", 1),
        ("sync", 2),
    ],
    "train_sft": [
        ("save_tensors", 1),
        ("save_tensors", 2),
        ("sync", 3),
        ("sync", 2),
        ("save_tensors", 1),
        ("sync", 4),
    ],
}


@each_script
def test_killed_while_saving_and_resumed_is_the_same_run(workplace, alone, script):
    """SIGKILL with the state half written, written but not renamed, renamed but not synced; at the
    start, between, at the end."""
    for moment in MOMENTS[script]:
        process = start(script, "killed", kill_at, "support.run", *moment)
        assert code_of(process) == -signal.SIGKILL, moment
    finish_run(script, "killed")
    assert_same_run("killed", alone[script])
    assert not list(workplace.glob("killed.*")) and not list(workplace.rglob("*.tmp"))


def test_moments_in_main_memory_change_nothing(workplace, alone):
    finish_run("train_grpo", "offloaded", "--offload-optimizer")
    assert_same_run("offloaded", alone["train_grpo"])
    parameter = torch.nn.Parameter(torch.ones(3))
    config = train_sft.Config(offload_optimizer=True)
    optimizer = Optimizer({"p": parameter}, config, Path())
    parameter.grad = torch.ones(3)
    optimizer.adamw.step()
    (state,) = optimizer.adamw.state.values()
    before = {name: state[name].clone() for name in ("exp_avg", "exp_avg_sq")}
    for _ in range(2):  # the places stay
        optimizer.park_moments()
        for name, moment in before.items():
            assert state[name] is optimizer.parked[parameter, name]
            assert state[name].equal(moment) and moment.any()
        optimizer.fetch_moments()
    assert len(optimizer.parked) == 2  # not of the number of steps


def test_moments_go_to_main_memory_before_a_resumed_run_does_anything(workplace, monkeypatch):
    stopped_run()
    parked, park = [], Optimizer.park_moments

    def noted(optimizer):
        park(optimizer)
        parked.append((optimizer.parked.keys(), len(optimizer.adamw.state)))

    monkeypatch.setattr(Optimizer, "park_moments", noted)
    run_grpo("--offload-optimizer", "--updates", "6")
    places, states = parked[0]
    assert states > 100 and len(places) == 2 * states and len(parked) > 1


def test_the_reference_of_a_resumed_run_is_the_checkpoint_it_started_from(workplace, monkeypatch):
    stopped_run()
    models, load, score = [], train_grpo.load_policy, train_grpo.logps_without_gradient
    weights = []

    def loaded(config):
        omni, reference = load(config)
        models.extend([omni.model, reference])
        return omni, reference

    def scored(model, rollout, config):
        if not weights:
            assert model is models[1]
            weights.extend([{k: v.clone() for k, v in m.state_dict().items()} for m in models])
        return score(model, rollout, config)

    monkeypatch.setattr(train_grpo, "load_policy", loaded)
    monkeypatch.setattr(train_grpo, "logps_without_gradient", scored)
    run_grpo()
    policy, reference = weights
    start = HumanOmni.from_pretrained(CHECKPOINT).state_dict()
    assert reference.keys() == start.keys()
    assert all(torch.equal(reference[name], start[name]) for name in start)
    moved = {name for name in start if not torch.equal(policy[name], start[name])}
    assert len(moved) > 100  # two updates: it goes on from there, and was not the reference
    assert read_metrics("run")[1][2]["kl"] > 0


def test_sft_killed_after_its_checkpoint_is_placed_places_no_second_one(workplace):
    process = start("train_sft", "run", kill_at, "support.run:Run", "finish", 1)
    assert code_of(process) == -signal.SIGKILL
    assert Path("run/model.safetensors").exists() and Path("run.run").exists()
    finish_run("train_sft", "run")
    assert sorted(path.name for path in workplace.glob("run*")) == ["run"]
    finish_run("train_sft", "run")  # another run of the same flags is another run
    assert Path("run.1").exists()


def command(script, out, *more):
    return [sys.executable, str(ROOT / f"{script}.py"), *FLAGS[script], "--out", out, *more]


@pytest.fixture
def one_thread(monkeypatch):
    """Of processes that are started by their command: with others, last bits differ."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.mark.slow
@each_script
def test_killed_at_random_moments_and_resumed_is_the_same_run(workplace, alone, script):
    begin = time.perf_counter()
    finish(children.run_and_draw, script, [*FLAGS[script], "--out", "timed"])
    whole = time.perf_counter() - begin
    assert_same_run("timed", alone[script])
    moments, kills, runs = random.Random(0), 0, 0
    while kills < 20:
        runs += 1
        while True:
            arguments = [*FLAGS[script], "--out", f"killed_{runs}"]
            process = children.start(children.run_and_draw, script, arguments)
            process.join(moments.uniform(0, 1.2 * whole))
            if process.exitcode is not None:
                assert process.exitcode == 0
                break
            process.kill()
            process.join()
            kills += 1
        assert_same_run(f"killed_{runs}", alone[script])
    print(f"{kills} kills in {runs} runs")


def test_a_signal_finishes_the_update_saves_and_says_how_to_go_on(workplace, one_thread):
    more = ["--updates", "16", "--val-every", "8", "--test", "manifest.json"]
    finish_run("train_grpo", "alone", *more)
    metrics = Path("stopped/metrics.jsonl")
    # In the first evaluation; in an update.
    for number, lines in ((signal.SIGTERM, 1), (signal.SIGINT, 3), (signal.SIGTERM, 8)):
        process = subprocess.Popen(
            command("train_grpo", "stopped", *more),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        while not metrics.exists() or len(metrics.read_text().splitlines()) < lines:
            time.sleep(0.005)
            assert process.poll() is None, process.communicate()
        time.sleep(0.1)
        os.killpg(process.pid, number)  # as a terminal does: the workers get it too
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        assert "to go on, run the same command again" in out and "Traceback" not in err
        assert ("finishing this step" in err) == (lines > 1)
    finish_run("train_grpo", "stopped", *more)
    assert_same_run("stopped", "alone")


def new_run(out="x", **flags):
    return Run(out, train_sft.Config(out=out, **flags), {})


def steps_of(run, total):
    return run.steps(itertools.repeat(["a clip"]), total)


def test_a_second_signal_stops_at_once(workplace):
    run = new_run(model=CHECKPOINT, data=("manifest.json",))
    with pytest.raises(KeyboardInterrupt):
        for _ in steps_of(run, 5):
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
            pytest.fail("still running")


def test_other_flags_and_other_files_are_refused_by_name_or_overridden(workplace, capsys):
    stopped_run()
    with pytest.raises(DataError, match=r"(?s)after step 2.*--lr was 0.001, is 0.01.*--override"):
        run_grpo("--lr", "0.01")
    entries = json.loads(Path("manifest.json").read_text())
    write_manifest("manifest.json", entries[::-1])
    with pytest.raises(DataError, match="manifest.json is not what it was"):
        run_grpo()
    run_grpo("--override", "--lr", "0.01", "--keep", "1")
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    headers = [line for line in lines if "config" in line]
    assert [header["config"]["lr"] for header in headers] == [0.001, 0.01]
    assert headers[1]["after_step"] == 2
    assert "going on after step 2" in capsys.readouterr().out


def test_no_resume_keeps_the_unfinished_run(workplace):
    stopped_run()
    run_grpo("--no-resume", "--updates", "1")
    assert Path("run.1/state/000002.safetensors").exists() and Path("run/results.json").exists()
    run_grpo("--updates", "1")  # finished: nothing to go on with, so it is a new run
    assert Path("run.2/results.json").exists() and not Path("run/state").exists()


# A pickle that would run a command.
PICKLE = b"\x80\x04\x95cposix\nsystem\n(S'touch owned'\ntR."


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: file.write_bytes(file.read_bytes()[:-100]),
        lambda file: file.write_bytes(b""),
        lambda file: file.write_bytes(PICKLE),
        lambda file: shutil.copy(GOLDEN / "tiny" / "humanomni" / "model.safetensors", file),
    ],
    ids=["cut off", "empty", "pickle", "something else"],
)
def test_a_damaged_state_is_named_and_the_one_before_it_serves(workplace, alone, damage):
    stopped_run()
    newest = Path("run/state/000002.safetensors")
    damage(newest)
    with pytest.raises(CheckpointError, match="000002.safetensors: not a whole state.*delete it"):
        run_grpo()
    assert not Path("owned").exists()
    newest.unlink()
    run_grpo()
    assert_same_run("run", alone["train_grpo"])


def test_a_state_of_another_model_is_refused(workplace):
    parameters = {"w": torch.nn.Parameter(torch.zeros(2))}
    optimizer = torch.optim.AdamW(parameters.values())
    run = new_run(save_every=1)
    run.track(parameters, optimizer)
    for _ in steps_of(run, 1):
        pass
    run.lock.close()
    for other in (
        {"v": torch.nn.Parameter(torch.zeros(2))},
        {"w": torch.nn.Parameter(torch.zeros(3))},
        {},
    ):
        with pytest.raises(CheckpointError, match="not a whole state of this run"):
            new_run(save_every=1).track(other, optimizer)


def test_the_newest_states_are_kept(workplace):
    for keep in (1, 3):
        run = new_run(f"keep_{keep}", keep=keep, save_every=2)
        for _ in steps_of(run, 9):
            kept = sorted(int(file.stem) for file in run.states.glob("*.safetensors"))
        assert kept == [4, 6, 8][-keep:]  # on the way into the ninth step


# --------------------------------------------------------------------------------------------------
# Locks


def test_two_processes_do_not_share_a_run(workplace):
    process = start("train_grpo", "run")
    while not Path("run/metrics.jsonl").exists():
        time.sleep(0.005)
    with pytest.raises(DataError, match="another process is at work"):
        run_grpo()
    assert code_of(process) == 0


@pytest.mark.parametrize("number", ["ENOLCK", "ENOSYS", "EOPNOTSUPP", "EINVAL"])
def test_a_file_system_without_locks_is_warned_of(workplace, monkeypatch, capsys, number):
    """NFS with nolock, Lustre without flock, some FUSE mounts."""

    def lockf(*_):
        raise OSError(getattr(errno, number), "No locks available")

    monkeypatch.setattr(fcntl, "lockf", lockf)
    run = new_run()
    assert [step for step, _ in steps_of(run, 2)] == [1, 2]
    run.finish()
    (warning,) = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert "warning: x is on a file system without locks (No locks available)" in warning
    assert "second process" in warning


@pytest.mark.parametrize("number", ["EACCES", "EAGAIN"])
def test_a_lock_that_another_process_holds_is_no_missing_one(workplace, monkeypatch, number):
    def lockf(*_):
        raise OSError(getattr(errno, number), "Resource temporarily unavailable")

    monkeypatch.setattr(fcntl, "lockf", lockf)
    with pytest.raises(DataError, match="x: another process is at work on this run"):
        new_run()


# --------------------------------------------------------------------------------------------------
# Folders of others


def test_an_earlier_run_is_kept(tmp_path, capsys):
    out = tmp_path / "run"
    contents = [json.dumps({"config": {}, "number": number}) + "\n" for number in range(3)]
    for content in contents:
        make_room(out).mkdir()
        (out / "metrics.jsonl").write_text(content)
    kept = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("run.1", "run.2", "run")]
    assert kept == contents
    assert "is kept as" in capsys.readouterr().out


def earlier_run(folder):
    folder = Path(folder)
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text('{"config": {}}\n{"update": 1}\n')
    (folder / "results.json").write_text("{}")
    return folder


def thesis(folder):
    """A folder of the user's, with the clips and the manifest that are trained on."""
    (folder / "clips").mkdir(parents=True)
    (folder / "thesis.txt").write_text("mine")
    clip = shutil.copy(GOLDEN / "media" / "clip.mp4", folder / "clips")
    write_manifest(folder / "manifest.json", [entry(0, clip=clip)] * 4)


def other_metrics(folder):
    folder.mkdir()
    (folder / "metrics.jsonl").write_text('{"loss": 1}\n')


def no_object(folder):
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("5\n")


def run_with_notes(folder):
    (earlier_run(folder) / "notes.md").write_text("mine")


def states_of_others(folder):
    (folder / "state").mkdir(parents=True)
    (folder / "state" / "a.tmp").write_text("mine")
    (folder / "state" / "terraform.safetensors").write_text("mine")


def link_to_a_run(folder):
    folder.symlink_to(earlier_run(folder.parent / "elsewhere"))


def link_to_a_thesis(folder):
    thesis(folder.parent / "elsewhere")
    folder.symlink_to(folder.parent / "elsewhere")


FOREIGN = [
    thesis,
    other_metrics,
    no_object,
    run_with_notes,
    states_of_others,
    link_to_a_run,
    link_to_a_thesis,
]


def assert_left_alone(script, out, message, data="manifest.json"):
    """The script refuses to write there, and touches nothing."""
    flags = [*FLAGS[script], "--workers", "0", "--data", str(data), "--out", str(out)]
    if script == "train_grpo":
        flags += ["--val", str(data)]
    before = content_of(".")
    with pytest.raises(DataError, match=message):
        SCRIPTS[script].main(flags)
    assert content_of(".") == before


@each_script
@pytest.mark.parametrize("make", FOREIGN)
def test_a_folder_that_is_no_run_of_ours_is_left_alone(workplace, script, make):
    make(workplace / "out")
    assert_left_alone(script, "out", "^out.*choose another --out$")
    if make is thesis:  # trained on what lies in it
        assert_left_alone(script, "out", "^out: .*left as it is", "out/manifest.json")


@each_script
@pytest.mark.parametrize("out", [".", "..", "../inside", "below/.."])
def test_the_working_directory_is_left_alone(workplace, monkeypatch, script, out):
    (workplace / "inside" / "below").mkdir(parents=True)
    monkeypatch.chdir(workplace / "inside")
    furnish(workplace / "inside")
    assert_left_alone(script, out, "choose another --out")
    shutil.rmtree(workplace / "elsewhere", ignore_errors=True)
    monkeypatch.chdir(earlier_run(workplace / "elsewhere"))
    data = workplace / "manifest.json"
    assert_left_alone(script, ".", "is a link, a mount or where you are", data)


@each_script
def test_a_mount_is_not_renamed(workplace, monkeypatch, script):
    out, is_mount = earlier_run("out"), Path.is_mount
    monkeypatch.setattr(Path, "is_mount", lambda path: path == out or is_mount(path))
    assert_left_alone(script, "out", "out: is a link, a mount or where you are")


@each_script
def test_an_earlier_run_that_is_read_is_not_renamed(workplace, script):
    finish_run("train_sft", "out", "--steps", "1")
    before = content_of("out")
    flags = [*FLAGS[script], "--model", "out", "--workers", "0", "--out", "out"]
    with pytest.raises(DataError, match="out: holds an earlier run with out, which this reads"):
        SCRIPTS[script].main(flags)
    assert content_of("out") == before


def test_sft_says_at_once_what_its_checkpoint_cannot_replace(workplace, monkeypatch):
    """Empty places that GRPO may write into: a checkpoint is moved there whole, at the end."""
    (workplace / "empty").mkdir()
    Path("link").symlink_to("empty")
    is_mount = Path.is_mount
    monkeypatch.setattr(Path, "is_mount", lambda p: p.name == "empty" or is_mount(p))
    for out in ("empty", "link"):
        assert_left_alone("train_sft", out, "can be neither renamed nor replaced")
    run_grpo("--updates", "1", "--workers", "0", out="link")
    assert Path("link").is_symlink() and Path("empty/results.json").exists()
    data = workplace / "manifest.json"
    (workplace / "here").mkdir()
    monkeypatch.chdir(workplace / "here")
    assert_left_alone("train_sft", ".", "can be neither renamed nor replaced", data)


def test_names_of_folders_may_end_with_a_slash(workplace):
    train_sft.main([*SFT, "--data", "manifest.json", "--out", "new/sft/"])
    train_sft.main([*SFT, "--data", "manifest.json", "--out", "new/sft/"])
    HumanOmni.from_pretrained("new/sft")
    assert sorted(path.name for path in Path("new").iterdir()) == ["sft", "sft.1"]
    (workplace / "there").mkdir()
    train_sft.main([*SFT, "--data", "manifest.json", "--out", "there/"])
    HumanOmni.from_pretrained("there")


def test_every_file_of_a_checkpoint_is_ours(workplace):
    """A checkpoint may come with further files, which are saved with it: still an earlier run."""
    shutil.copytree(CHECKPOINT, "base")
    for name in ("processor_config.json", "chat_template.json"):
        Path("base", name).write_text("{}")
    flags = [*SFT, "--model", "base", "--data", "manifest.json", "--out", "out"]
    train_sft.main(flags)
    assert Path("out/processor_config.json").exists()
    Path("out/curves.png.partial").write_text("")  # of a process that was killed
    Path("out/.best.saving").mkdir()
    train_sft.main(flags)
    assert Path("out.1/processor_config.json").exists() and Path("out/model.safetensors").exists()


def test_results_of_an_evaluation_go_beside_what_is_there(workplace):
    thesis(workplace / "out")
    before = content_of("out")
    evaluate.main([*EVALUATE, "--data", "out/manifest.json", "--limit", "2", "--out", "out/new"])
    write_manifest("test.json")
    evaluate.main([*EVALUATE, "--data", "test.json", "--limit", "2", "--out", "out"])
    after = content_of("out")
    assert {name: after[name] for name in before} == before
    assert {"test.json", "test_confusion.png"} <= after.keys() - before.keys()


def test_a_folder_that_cannot_be_written_is_an_error_before_training(workplace):
    Path("file").write_text("not a folder")
    done = subprocess.run(
        command("train_grpo", "file/run"), capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "file/run" in done.stderr and "Traceback" not in done.stderr
    for script in FLAGS:
        assert_left_alone(script, "file", "^file.*choose another --out")


# --------------------------------------------------------------------------------------------------
# Full disks


def test_a_full_disk_stops_the_run_and_the_last_state_serves(workplace, alone):
    stopped_run()
    good = Path("run/state/000002.safetensors").read_bytes()
    flags = [*GRPO_FLAGS, "--out", "run"]
    full = (limit_file_size_at, "support.run", "save_tensors", 1, 3_000)
    finish(note_end, children.run_script, "train_grpo", flags, *full)
    message = Path("message").read_text()
    assert "000004.safetensors: cannot be written" in message
    assert "go on from the last one" in message and "exit code 2" in message
    assert Path("run/state/000002.safetensors").read_bytes() == good
    assert not list(Path("run").rglob("*.tmp"))
    finish_run("train_grpo", "run")
    assert_same_run("run", alone["train_grpo"])


def test_a_full_disk_names_the_file_of_metrics(workplace):
    flags = [*GRPO_FLAGS, "--out", "run"]
    full = (limit_file_size_at, "support.run:Run", "_write_line", 2, 100)
    finish(note_end, children.run_script, "train_grpo", flags, *full)
    message = Path("message").read_text()
    assert "error: run/metrics.jsonl: File too large\n" in message and "exit code 2" in message


def test_a_full_disk_names_the_file_of_an_evaluation(workplace):
    """The log's header, its rows, the result, the picture: whatever comes to the end first."""
    flags = [*EVALUATE, "--data", "manifest.json", "--batch-size", "2"]
    evaluate.main([*flags, "--out", "whole"])
    result = json.loads(Path("whole/manifest.json").read_text())
    header = len(json.dumps(result["settings"]))
    rows = sum(len(json.dumps(row, ensure_ascii=False)) + 2 for row in result["completions"])
    for size, name in (
        (header // 2, "manifest.partial.new"),
        (header + rows // 2, "manifest.partial.jsonl"),
        (header + rows + 50, "manifest.json"),
    ):
        out = f"full_{size}"
        arguments = [*flags, "--out", out]
        finish(note_end, children.run_script, "evaluate", arguments, limit_file_size, size)
        message = Path("message").read_text()
        assert f"error: {out}/{name}: File too large\n" in message, message
        assert "exit code 2" in message
    evaluate.main([*flags, "--out", out])  # goes on from the rows, which were all there
    again = json.loads(Path(out, "manifest.json").read_text())
    assert again["completions"] == result["completions"]


def test_a_full_disk_names_the_list_of_bad_clips(workplace, monkeypatch):
    entries = [entry(i) for i in range(20)]
    Path("broken.mp4").write_text("no clip")
    entries[0]["video"] = "broken.mp4"
    write_manifest("manifest.json", entries)

    def full(path, *_, write=Path.write_text, **more):
        if path.name == "manifest.skipped.txt":
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, *_, **more)

    monkeypatch.setattr(Path, "write_text", full)
    flags = [*EVALUATE, "--data", "manifest.json", "--out", "out", "--on-bad-clip", "skip"]
    with pytest.raises(OSError, match="No space left") as caught:
        evaluate.main(flags)
    assert caught.value.filename == "out/manifest.skipped.txt"


@pytest.mark.parametrize("moment", [("sync", 1), ("sync", 5), ("save_file", 1)])
def test_a_checkpoint_that_is_being_replaced_survives_a_kill(workplace, moment):
    """Killed while the new one is written: the old one is there, whole; written again, the new one
    is."""
    old = HumanOmni.from_pretrained(CHECKPOINT)
    old.save_pretrained("saved")
    work = (children.save_changed, CHECKPOINT, "saved")
    process = children.start(*work, kill_at, "checkpoint", *moment)
    assert code_of(process) == -signal.SIGKILL
    found = HumanOmni.from_pretrained("saved").embed_tokens.weight
    assert torch.equal(found, old.embed_tokens.weight)
    finish(*work)
    found = HumanOmni.from_pretrained("saved").embed_tokens.weight
    assert torch.equal(found, old.embed_tokens.weight + 1)
    assert [file.name for file in workplace.glob("saved*")] == ["saved"]


def test_a_checkpoint_that_does_not_fit_on_the_disk_leaves_the_old_one(workplace):
    HumanOmni.from_pretrained(CHECKPOINT).save_pretrained("saved")
    before = Path("saved/model.safetensors").read_bytes()
    finish(note_end, children.save_changed, CHECKPOINT, "saved", limit_file_size, 3_000)
    message = Path("message").read_text()
    assert "saved: cannot be written" in message and "unharmed" in message
    assert Path("saved/model.safetensors").read_bytes() == before
    assert [file.name for file in workplace.glob("saved*")] == ["saved"]


# --------------------------------------------------------------------------------------------------
# Bad numbers, bad rewards, not enough memory


@each_script
@pytest.mark.parametrize("where", ["logits", "gradient"])
def test_a_nan_stops_the_run_with_what_led_to_it_or_is_passed_over(
    workplace, monkeypatch, script, where
):
    """A NaN in the third step, in the forward or only in the backward pass."""
    done = {"step": 0}
    log, logits = Run.log, HumanOmni.logits

    def noted(run, line, *shown):
        log(run, line, *shown)
        done["step"] = run.step + 1

    def poisoned(self, hidden):
        out = logits(self, hidden)
        if done["step"] == 2 and torch.is_grad_enabled():
            if where == "logits":
                return out * torch.nan
            out.register_hook(lambda gradient: gradient * torch.nan)
        return out

    monkeypatch.setattr(Run, "log", noted)
    monkeypatch.setattr(HumanOmni, "logits", poisoned)
    main, flags = SCRIPTS[script].main, [*FLAGS[script], "--workers", "0", "--out", "run"]
    message = r"gradient norm not finite.*nonfinite_000003.json.*--skip-nonfinite"
    with pytest.raises(TrainingError, match=message):
        main(flags)
    folder = Path("run" if script == "train_grpo" else "run.run")
    story = json.loads((folder / "nonfinite_000003.json").read_text())
    if script == "train_grpo":
        assert len(story["completions"]) == 2 and len(story["completions"][0]) == 3
        assert set(story["rewards"]) == {"accuracy", "format", "variety"}
    assert ("loss" in story["not_finite"]) == (where == "logits")
    main([*flags, "--skip-nonfinite"])
    lines, weights = result_of("run")
    assert len(lines) == (6 if script == "train_grpo" else 8)
    assert [line["steps_left_out"] for line in lines[:4]] == [0, 0, 1, 0]
    saved = [tensor for tensors in weights.values() for tensor in tensors.values()]
    assert all(tensor.isfinite().all() for tensor in saved)


@pytest.mark.parametrize("steps", [1, 2])
def test_a_fine_tuning_whose_last_losses_are_none_ends_well(workplace, monkeypatch, capsys, steps):
    """All that it did is left out, or the last step."""
    logits, calls = HumanOmni.logits, []

    def poisoned(self, hidden):
        calls.append(1)
        return logits(self, hidden) * (torch.nan if len(calls) == steps else 1)

    monkeypatch.setattr(HumanOmni, "logits", poisoned)
    flags = [*SFT, "--data", "manifest.json", "--steps", str(steps), "--skip-nonfinite"]
    train_sft.main([*flags, "--out", "run"])
    assert [line["steps_left_out"] for line in read_metrics("run")[1]] == [0] * (steps - 1) + [1]
    out = capsys.readouterr().out
    assert out.count("loss 5.") == steps - 1 and out.endswith("checkpoint in run\n")


def test_a_sudden_gradient_is_said(workplace, capsys):
    run = new_run()
    for norm in [1.0, 2.0, 1.5] * 5 + [14.0, 16.0]:
        run.log({"grad_norm": norm})
    out = capsys.readouterr().out
    assert out.count("gradient norm") == 1
    assert "gradient norm 16: the median of the last 16 steps is 1.5" in out


def rewards_of(functions, completions, label):
    """Rewards of one prompt's completions: name -> (1, G)."""
    example = train_grpo.data.Example(None, "?", label, "text")
    batch = train_grpo.data.Batch([example], *[None] * 5)
    rollout = train_grpo.Rollout(batch, torch.zeros(1), None, None, [completions], None)
    return train_grpo.reward_groups(functions, rollout)


@pytest.mark.parametrize(
    "body, problem",
    [
        (
            "return 1 / 0",
            r"failed with ZeroDivisionError: division by zero \(broken_rewards.py, line 2\)",
        ),
        ("return float('nan')", "returned nan"),
        ("return float('-inf')", "returned -inf"),
        ("return 1e39", r"returned 1e\+39"),
        ("return -1e39", r"returned -1e\+39"),
        ("return 1e25", r"returned 1e\+25"),
        ("return 10 ** 400", "failed with OverflowError"),
        ("return [1.0, 2.0]", "failed with TypeError"),
        ("return None", "failed with TypeError"),
        ("return 'much'", "failed with ValueError"),
    ],
)
def test_a_bad_reward_is_named_with_the_completion(workplace, monkeypatch, body, problem):
    (workplace / "broken_rewards.py").write_text(f"def bad(completion, label):\n    {body}\n")
    monkeypatch.delitem(sys.modules, "broken_rewards", raising=False)
    functions = find_rewards(train_grpo.REWARDS, ["broken_rewards:bad"])
    message = f"reward bad {problem}.*\n<answer>sad</answer>$"
    with pytest.raises(TrainingError, match=message):
        rewards_of(functions, ["<answer>sad</answer>"], "happy")


def test_the_largest_rewards_have_finite_advantages(workplace, monkeypatch):
    body = "return 1e18 if completion == 'sad' else -1e18"
    (workplace / "broken_rewards.py").write_text(f"def large(completion, label):\n    {body}\n")
    monkeypatch.delitem(sys.modules, "broken_rewards", raising=False)
    functions = find_rewards({}, ["broken_rewards:large"])
    rewards = rewards_of(functions, ["sad"] + ["happy"] * 7, "sad")
    advantages = train_grpo.group_advantages(rewards["large"])
    expected = [1.75 / 0.5**0.5] + [-0.25 / 0.5**0.5] * 7  # the variance is 0.5, times 1e36
    assert advantages[0].tolist() == pytest.approx(expected, rel=1e-5)


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
        find_rewards(train_grpo.REWARDS, [name])


def test_a_reward_of_ones_own_counts(workplace):
    functions = find_rewards(train_grpo.REWARDS, ["more_rewards:variety"])
    rewards = rewards_of(functions, ["aab", "<answer>sad</answer>"], "sad")
    assert list(rewards) == ["accuracy", "format", "variety"]
    assert rewards["variety"].tolist() == [pytest.approx([0.2, 1.0])]
    assert rewards["accuracy"].tolist() == [[0, 1]]


def test_out_of_memory_says_what_to_change(capsys):
    def main():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    with pytest.raises(SystemExit) as stopped:
        run_script(main, "--gradient-checkpointing")
    err = capsys.readouterr().err
    assert stopped.value.code == 1
    assert "out of GPU memory" in err and "2.00 GiB" in err and "--gradient-checkpointing" in err


def test_the_samplers_buffers_come_before_anything_long(workplace, monkeypatch):
    """If they do not fit, it is known before the first evaluation and rollout."""

    def full(*arguments, **more):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(support_sampler, "Sampler", full)
    monkeypatch.setattr(evaluate, "evaluate", lambda *a, **b: pytest.fail("evaluated first"))
    with pytest.raises(torch.OutOfMemoryError):
        run_grpo("--test", "manifest.json")


def test_nothing_reads_or_writes_pickles():
    files = [*ROOT.glob("*.py")]
    for room in ("support", "toy", "bench", "experiments", "examples"):
        files += (ROOT / room).rglob("*.py")
    assert len(files) > 30
    words = ("torch.load", "torch.save", "import pickle", "allow_pickle", "shelve", "marshal")
    for file in files:
        text = file.read_text(encoding="utf-8")
        for word in (*words, "joblib"):
            assert word not in text, (file, word)
