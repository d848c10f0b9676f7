"""On a GPU: the compiled, captured decode step, attention's kernels, bf16, a whole run.

    python -m pytest tests/test_cuda.py

Skipped without one; what can be said of this path without a GPU is in test_cuda_path.py.
"""

import pytest
import torch
from conftest import relative_error
from runs import GRPO, assert_same_run, read_metrics, stop_in_update, write_manifest

import train_grpo
from generate import Decoding, Sampler
from grpo import completion_logps
from model import attend
from support.compiling import Replay, compile_layers
from support.optimizer import set_trainable
from support.precision import autocast
from support.updates import TOLERANCE

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture
def prompts(prompts):
    return prompts.cuda()


@pytest.fixture
def model(prompts, model):  # in this order: prompts are embedded on the CPU
    return model.cuda()


def ragged(prompts):
    return [prompts[0], prompts[1][:50]]


def samplers(model, P, decoding):
    """Two: as a run has it on a GPU, and eager."""
    copy = model.frozen_copy(torch.float32)
    compile_layers(copy, dynamic=False)
    return (
        Sampler(model, 2, 8, P, decoding, copy=copy, replay=Replay()),
        Sampler(model, 2, 8, P, decoding),
    )


def test_compiled_and_captured_draws_the_tokens_of_eager(model, prompts):
    compiled, eager = samplers(model, prompts.shape[1], Decoding(40, temperature=0))
    for some in (ragged(prompts), [prompts[1][:9]], list(prompts)):
        ids, logps = compiled(some)
        expected_ids, expected_logps = eager(some)
        assert torch.equal(ids, expected_ids)
        assert torch.allclose(logps, expected_logps, atol=1e-4)


def test_captured_alone_is_eager_to_the_bit(model, prompts):
    """Without the compiler, samples too: a graph is the same kernels and the same numbers drawn."""
    decoding = Decoding(24, eos_token_id=7)
    captured, eager = (
        Sampler(model, 2, 8, prompts.shape[1], decoding, replay=replay)
        for replay in (Replay(), None)
    )
    for seed in range(4):
        for result, expected in zip(captured(ragged(prompts), seed), eager(ragged(prompts), seed)):
            assert torch.equal(result, expected)


def test_a_seed_repeats_through_replay(model, prompts):
    """The first call captures, the others replay."""
    sampler, _ = samplers(model, prompts.shape[1], Decoding(24))
    first, again, other = (sampler(list(prompts), seed)[0] for seed in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert len(set(map(tuple, first.flatten(0, 1).tolist()))) == 16


def test_compaction_through_replay_changes_no_row(model, prompts):
    sampler, eager = samplers(model, prompts.shape[1], Decoding(40, temperature=0, eos_token_id=7))
    ends = torch.tensor([[3, 3, 3, 3, 3, 3, 3, 38], [2, 5, 4, 3, 2, 9, 17, 30]]).flatten().cuda()
    rows = []

    def ended_by_hand(sampler):
        decode = sampler._decode

        def ending(R):
            rows.append(R)
            finished = sampler.step >= ends[sampler.row[:R]]
            sampler.logits[:R, 7] = torch.where(finished, torch.inf, -torch.inf)
            decode(R)

        sampler._decode = ending
        return sampler(list(prompts))[0]

    assert torch.equal(ended_by_hand(sampler), ended_by_hand(eager))
    assert set(rows) == {16, 8, 4}  # it is asked every 16 steps whether half the rows are done


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 2e-2), (torch.float32, 1e-4)])
def test_lower_right_causal_attention_has_the_gradients_of_a_mask(dtype, tolerance):
    """Rows that follow two prompts, through the kernel that the GPU chooses, against float64."""
    torch.manual_seed(0)
    shapes = [(6, 14, 33, 64), (6, 2, 33, 64), (6, 2, 33, 64), (2, 2, 70, 64), (2, 2, 70, 64)]
    ours = [torch.randn(s, device="cuda", dtype=dtype, requires_grad=True) for s in shapes]
    exact = [x.detach().double().cpu().requires_grad_() for x in ours]
    weight = torch.randn(shapes[0], dtype=torch.float64)
    results = []
    for q, k, v, old_k, old_v in (ours, exact):
        follows = torch.eye(2, device=q.device, dtype=q.dtype).repeat_interleave(3, 0)
        out = attend(q, k, v, past=(old_k, old_v), follows=follows)
        (out * weight.to(out)).sum().backward()
        results.append(out.detach().double().cpu())
    assert relative_error(*results) <= tolerance
    for x, reference in zip(ours, exact):
        assert relative_error(x.grad.double().cpu(), reference.grad) <= tolerance


def test_rollout_and_scoring_are_one_model_in_bf16(model, prompts):
    """The first update's check, on the golden model: a bf16 copy samples, float32 masters score."""
    model.compute_dtype = torch.bfloat16
    set_trainable(model)
    copy = model.frozen_copy(torch.bfloat16)
    compile_layers(copy, dynamic=False)
    compile_layers(model, dynamic=True)
    P = prompts.shape[1]
    sampler = Sampler(model, 2, 8, P, Decoding(24), copy=copy, replay=Replay())
    with autocast(model), torch.no_grad():
        ids, sampled = sampler(list(prompts), seed=0)
        scored = completion_logps(model, prompts, ids)
    assert sampled.dtype == scored.dtype == torch.float32
    assert (sampled - scored).abs().mean() < TOLERANCE[torch.bfloat16] / 4


def test_a_stopped_run_goes_on(tmp_path, monkeypatch):
    """Stopped in its fourth update and started again, a run ends as one that was left alone."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "more_rewards.py").write_text(
        "def variety(completion, label):\n    return len(set(completion)) / 10\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    manifest = write_manifest(tmp_path / "manifest.json")
    flags = [*GRPO, "--data", manifest, "--updates", "6", "--group", "3", "--lr", "1e-3"]
    flags += ["--save-every", "2", "--show-every", "0", "--save-dtype", "float32"]
    flags += ["--reward", "more_rewards:variety", "--max-new-tokens", "6"]
    train_grpo.main([*flags, "--out", "alone"])
    with monkeypatch.context() as patched:
        stop_in_update(patched, 4)
        with pytest.raises(KeyboardInterrupt):
            train_grpo.main([*flags, "--out", "stopped"])
    train_grpo.main([*flags, "--out", "stopped"])
    assert [line["update"] for line in read_metrics("stopped")[1]] == [1, 2, 3, 4, 5, 6]
    assert_same_run("stopped", "alone")
