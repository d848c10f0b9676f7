"""What can be known of the CUDA path without a GPU: cuda_path.py makes torch imagine one.

Kernels per layer and decode step, waits for the device, GiB; each with its bound. Two defects are
put back, and found."""

import functools
import gc
import json
import subprocess
import sys
import weakref

import pytest
import torch
from conftest import ROOT, small_llm_config

from generate import Decoding, Sampler
from model import HumanOmni
from support.compiling import compiler_works

ROWS = ("128", "64", "32", "16")
pytestmark = pytest.mark.skipif(
    torch.version.cuda is None, reason="needs the CUDA build of torch, and no GPU"
)


@functools.cache
def imagined(*arguments):
    """What cuda_path.py prints."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "cuda_path.py"), *arguments],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_a_layers_decode_step_is_one_graph_of_few_kernels():
    counts = imagined("kernels")
    per_layer = {R: counts[R]["triton"] + counts[R]["library"] for R in ROWS}
    assert max(per_layer.values()) <= 21, per_layer
    assert per_layer["16"] <= per_layer["128"]  # they do not grow when rows are compacted


@pytest.mark.slow
def test_caches_are_written_in_place():
    assert {R: imagined("kernels")[R]["copies"] for R in ROWS} == dict.fromkeys(ROWS, 0)


@pytest.mark.slow
def test_a_cache_written_by_slices_would_be_found():
    """The compiler copies it, as soon as it is larger than what is written to."""
    counts = imagined("kernels", "slices")
    assert all(counts[R]["copies"] >= 2 for R in ROWS[1:])


@pytest.mark.slow
def test_decoding_never_waits_for_the_device_and_multiplies_in_bf16():
    waits = imagined("waits")
    for R in ROWS:
        step = waits[f"decode {R}"]
        assert step["waits"] == {}
        assert set(step) == {"kernels", "waits", "torch.bfloat16"}


@pytest.mark.slow
def test_an_update_waits_for_the_device_a_handful_of_times():
    """Encoding, scoring and the loss never; a rollout once in 16 steps, and for its lengths."""
    waits = imagined("waits")
    for phase in ("encode", "score", "loss"):
        assert waits[phase]["waits"] == {}, phase
    rollout = sum(waits["rollout of 64"]["waits"].values())
    assert rollout <= 64 // 16 + 4
    # At 512 tokens; then what is looked at of a rollout, of a step, and for the log.
    assert rollout + (512 - 64) // 16 + 16 <= 64


@pytest.mark.slow
def test_scoring_a_group_fits():
    sizes = imagined("sizes")
    assert sizes["kept"] <= 11.0 and sizes["again"] <= 3.0, sizes


def freed_when_dropped(model, change=None):
    """Is a sampler freed as soon as nobody holds it, without the garbage collector?"""
    sampler = Sampler(model, 1, 2, 8, Decoding(4))
    sampler([torch.zeros(8, 16)], seed=0)
    if change is not None:
        change(sampler)
    gc.collect()
    gc.disable()
    try:
        alive = weakref.ref(sampler)
        del sampler
        return alive() is None
    finally:
        gc.enable()


def test_a_dropped_sampler_is_freed_at_once():
    """Its buffers are the largest thing on a card."""
    assert freed_when_dropped(HumanOmni(small_llm_config()).eval())


def test_a_sampler_that_holds_itself_would_be_found():
    def hold_itself(sampler):
        sampler.forward = sampler._decode

    assert not freed_when_dropped(HumanOmni(small_llm_config()).eval(), hold_itself)


def test_without_a_compiler_there_is_one_warning_and_nothing_is_compiled(monkeypatch):
    def failing(function):
        def run(x):
            error = RuntimeError("Failed to find C compiler")
            raise torch._dynamo.exc.BackendCompilerFailed(function, error, None)

        return run

    gpu = torch.device("cuda")
    monkeypatch.setattr(torch, "compile", failing)
    monkeypatch.setattr(torch, "zeros", lambda size, device: None)
    compiler_works.cache_clear()
    with pytest.warns(UserWarning, match="Failed to find C compiler.*nothing is compiled") as told:
        assert not compiler_works(gpu) and not compiler_works(gpu)
    assert len(told) == 1
    compiler_works.cache_clear()
    assert not compiler_works(torch.device("cpu"))
