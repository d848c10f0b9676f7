"""Arithmetic in bfloat16 and float16 over float32 weights, on a CPU as far as it goes."""

from pathlib import Path

import pytest
import torch
from runs import GRPO, assert_same_run, read_metrics, stop_in_update, write_manifest

import train_grpo
from support.errors import DataError, TrainingError
from support.optimizer import FIRST_SCALE, STEPS_AT_SCALE, Evidence, Optimizer
from support.precision import compute_dtype

HALF = ["float16", "bfloat16"]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """run(out, *flags): four updates of the golden model, with a reward that tells completions
    apart -> lines of metrics."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("more_rewards.py").write_text(
        "def variety(completion, label):\n    return len(set(completion)) / 10\n"
    )
    manifest = write_manifest(tmp_path / "manifest.json")
    flags = [*GRPO, "--data", manifest, "--updates", "4", "--save-every", "2", "--show-every", "0"]
    flags += ["--reward", "more_rewards:variety", "--save-dtype", "float32", "--lr", "1e-4"]

    def run(out, *more):
        train_grpo.main([*flags, "--out", out, *more])
        return read_metrics(out)[1]

    return run


@pytest.mark.parametrize("dtype", HALF)
def test_a_run_in_half_precision_is_near_one_in_float32(run, dtype):
    """The same prompts; what is sampled may differ, so what the first step measures is compared."""
    exact, half = run("exact")[0], run("half", "--dtype", dtype)[0]
    assert 0 < half["mismatch"] < {"float16": 0.02, "bfloat16": 0.1}[dtype]
    assert half["grad_norm"] == pytest.approx(exact["grad_norm"], rel=0.5)
    assert half.get("loss_scale") == (FIRST_SCALE if dtype == "float16" else None)
    assert half["steps_left_out"] == exact["steps_left_out"] == 0


def optimizer_of(parameter, dtype=torch.float16, facts=None, **flags):
    config = train_grpo.Config(lr=0.1, clip_norm=1e9, **flags)
    return Optimizer({"p": parameter}, config, Path(), dtype, facts)


def step(optimizer, loss):
    optimizer.backward(loss)
    return optimizer.step(0.1, Evidence(1, {}, {}))


def test_small_gradients_survive_float16_by_the_scale():
    """1e-8 is below float16's smallest number, and 65536 times that is not."""
    for scaled in (True, False):
        parameter = torch.nn.Parameter(torch.ones(3))
        optimizer = optimizer_of(parameter, torch.float16 if scaled else torch.float32)
        metrics = step(optimizer, (parameter.half().float() * 1e-8).sum())
        assert metrics["grad_norm"] == pytest.approx(3**0.5 * 1e-8 if scaled else 0, rel=0.01)
        assert (metrics.get("loss_scale") == FIRST_SCALE) == scaled


def test_an_overflow_leaves_the_step_out_and_halves_the_scale():
    parameter, facts = torch.nn.Parameter(torch.ones(3)), {}
    optimizer = optimizer_of(parameter, facts=facts)
    metrics = step(optimizer, (parameter.half().float() * 100).sum())  # times 65536: inf
    assert metrics["steps_left_out"] == 1 and torch.equal(parameter, torch.ones(3))
    assert facts["loss_scale"] == FIRST_SCALE / 2 and parameter.grad is None
    for _ in range(7):
        metrics = step(optimizer, (parameter.half().float() * 100).sum())
    assert facts["loss_scale"] == 512 and metrics["steps_left_out"] == 0
    assert metrics["grad_norm"] == pytest.approx(3**0.5 * 100)
    facts["steps_at_scale"] = STEPS_AT_SCALE - 1
    step(optimizer, parameter.half().float().sum())
    assert facts == {"loss_scale": 1024, "steps_at_scale": 0}


def test_what_is_not_finite_without_a_scale_is_an_error(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    parameter, facts = torch.nn.Parameter(torch.ones(3)), {"loss_scale": 1.0}
    with pytest.raises(TrainingError, match="gradient norm not finite"):
        step(optimizer_of(parameter, facts=facts), (parameter * torch.inf).sum())


def test_a_loss_that_is_none_is_an_error_at_any_scale(tmp_path, monkeypatch):
    """No scale made it, and no lower one would mend it."""
    monkeypatch.chdir(tmp_path)
    parameter, facts = torch.nn.Parameter(torch.ones(3)), {}
    optimizer = optimizer_of(parameter, facts=facts)
    loss = (parameter * torch.nan).sum()
    optimizer.backward(loss)
    with pytest.raises(TrainingError, match="loss and gradient norm not finite"):
        optimizer.step(0.1, Evidence(1, {"loss": loss.item()}, {}))
    assert Path("nonfinite_000001.json").exists()


def test_the_scale_goes_on_with_a_resumed_run(run, monkeypatch):
    """Stopped after its state of update 2, whose scale was another than the first."""
    monkeypatch.setattr("support.optimizer.STEPS_AT_SCALE", 1)  # doubled at every step
    whole = run("whole", "--dtype", "float16")
    assert whole[1]["loss_scale"] == 2 * FIRST_SCALE
    with monkeypatch.context() as patched:
        stop_in_update(patched, 3)
        with pytest.raises(KeyboardInterrupt):
            run("stopped", "--dtype", "float16")
    run("stopped", "--dtype", "float16")
    assert_same_run("stopped", "whole")


def test_auto_takes_what_the_hardware_has(monkeypatch):
    assert compute_dtype("cpu") == torch.float32
    assert compute_dtype("cpu", "bfloat16") == torch.bfloat16
    for has_bf16, expected in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation, has=has_bf16: has
        )
        assert compute_dtype("cuda:0") == expected
        assert compute_dtype("cuda:0", "float32") == torch.float32
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    with pytest.raises(DataError, match="--dtype bfloat16: Tesla T4 lacks it; try float16"):
        compute_dtype("cuda:0", "bfloat16")
