"""The maths by hand, the numbers of the original, and the shared prompt against the repeated
one."""

import math
from types import SimpleNamespace

import pytest
import torch
from conftest import relative_error

import train_grpo
from grpo import (
    completion_logps,
    completion_mask,
    group_advantages,
    grpo_loss,
    kl_in_reward,
    length_buckets,
    per_token_kl,
    token_logps,
)
from support.errors import DataError
from train_grpo import advantages_of
from train_sft import set_trainable

LOG2 = math.log(2)


# --- by hand


def test_advantages_by_hand():
    # mean 1, deviations -1 0 1 0, unbiased variance 2/3
    advantages = group_advantages(torch.tensor([[0.0, 1.0, 2.0, 1.0], [1.0, 1.0, 1.0, 1.0]]))
    std = math.sqrt(2 / 3) + 1e-4
    assert torch.allclose(advantages, torch.tensor([[-1 / std, 0, 1 / std, 0], [0, 0, 0, 0]]))
    assert (advantages[1] == 0).all()  # equal rewards teach nothing, exactly


def test_each_reward_in_its_own_standard_deviations_by_hand():
    """GDPO tells apart what a sum does not: right without the format, and the format without being
    right."""
    accuracy = torch.tensor([[1.0, 0.0, 0.0, 0.0]])  # mean 1/4, unbiased variance 1/4
    form = torch.tensor([[0.0, 1.0, 1.0, 0.0]])  # mean 1/2, unbiased variance 1/3
    rollout = SimpleNamespace(rewards={"accuracy": accuracy, "format": form})
    a, f = 1 / (0.5 + 1e-4), 1 / (math.sqrt(1 / 3) + 1e-4)
    expected = [0.75 * a - 0.5 * f, -0.25 * a + 0.5 * f, -0.25 * a + 0.5 * f, -0.25 * a - 0.5 * f]
    advantages = advantages_of(rollout, train_grpo.Config(gdpo=True))
    assert torch.allclose(advantages, torch.tensor([expected]))
    together = advantages_of(rollout, train_grpo.Config())
    assert together[0, 0] == together[0, 1] and advantages[0, 0] > advantages[0, 1] + 0.25
    plain = advantages_of(rollout, train_grpo.Config(gdpo=True, std=False))
    assert torch.allclose(plain, torch.tensor([[0.25, 0.25, 0.25, -0.75]]))


def test_gdpo_and_a_kl_in_the_reward_are_not_for_each_other():
    with pytest.raises(DataError, match="--gdpo"):
        train_grpo.read_config(["--gdpo", "--kl", "reward"])


@pytest.mark.parametrize("rewards", [torch.ones(3, 1), torch.ones(3), torch.ones(2, 0)])
def test_advantages_need_a_group(rewards):
    with pytest.raises(ValueError, match="G >= 2"):
        group_advantages(rewards)


@pytest.mark.parametrize("reward", [1.0, 1.1, 2.1, 0.3])
@pytest.mark.parametrize("G", [3, 8, 12])
def test_equal_rewards_have_exactly_no_advantage(reward, G):
    """Also where their mean rounds to another number: such a group must not pull, and its backward
    pass is left out."""
    assert (
        not group_advantages(torch.full((2, G), reward)).any()
        and not group_advantages(torch.full((2, G), reward), scale=False).any()
    )


def test_kl_by_hand():
    logps, ref = torch.tensor([[0.0, -LOG2, -LOG2]]), torch.tensor([[0.0, 0.0, -2 * LOG2]])
    # d = 0, log 2, -log 2: exp(d) - d - 1
    assert torch.allclose(per_token_kl(logps, ref), torch.tensor([[0.0, 1 - LOG2, LOG2 - 0.5]]))


def test_kl_is_never_negative_in_float32():
    """exp(d) - d - 1 would be, for up to a sixth of small d."""
    d = torch.logspace(-5, 0, 200_000)
    for sign in (1, -1):
        kl = per_token_kl(torch.zeros_like(d), sign * d)
        assert (kl >= 0).all()
        exact = torch.expm1(sign * d.double()) - sign * d.double()
        assert torch.allclose(kl.double(), exact, rtol=1e-2, atol=1e-12)


def test_kl_is_the_kl_on_average():
    """Over the policy's own samples k3 averages to KL(policy || reference): this fixes sign and
    direction."""
    policy, ref = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.3, 0.3, 0.4])
    exact = (policy * (policy / ref).log()).sum()
    assert torch.isclose((policy * per_token_kl(policy.log(), ref.log())).sum(), exact)
    other_way = (ref * (ref / policy).log()).sum()
    assert not torch.isclose(exact, other_way)


@pytest.mark.parametrize(
    "advantage, ratio, value, has_gradient",
    [
        (+1.0, 1.5, 1.2, False),  # good, already pushed up beyond the clip: stop
        (+1.0, 0.5, 0.5, True),  # good, but became less likely: pull back
        (-1.0, 0.5, -0.8, False),  # bad, already pushed down beyond the clip: stop
        (-1.0, 1.5, -1.5, True),  # bad, but became more likely: push down
    ],
)
def test_clipped_loss_on_all_sides(advantage, ratio, value, has_gradient):
    logps = torch.full((1, 1), math.log(ratio), requires_grad=True)
    loss, metrics = grpo_loss(
        logps, torch.zeros(1, 1), None, torch.tensor([advantage]), torch.ones(1, 1), beta=0.0
    )
    loss.backward()
    assert torch.isclose(-loss, torch.tensor(value))
    assert logps.grad.item() == pytest.approx(-ratio * advantage if has_gradient else 0.0)
    assert metrics["clip_share"].item() == (0.0 if has_gradient else 1.0)


def test_loss_averages_tokens_then_completions():
    logps = torch.zeros(2, 3, requires_grad=True)
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    loss, metrics = grpo_loss(logps, None, None, torch.tensor([[3.0, -3.0]]), mask, beta=0.0)
    loss.backward()
    assert loss.item() == 0.0  # ratio 1: -(3 - 3) / 2
    # Each completion weighs 1/2, each of its tokens 1/length of that.
    assert torch.allclose(logps.grad, torch.tensor([[-0.5, -0.5, -0.5], [1.5, 0, 0]]))
    assert metrics["completion_length"].item() == 2.0


def test_without_a_reference_there_is_no_kl():
    logps, advantages, mask = torch.randn(2, 3) - 2, torch.tensor([1.0, -1.0]), torch.ones(2, 3)
    with_beta, metrics = grpo_loss(logps, None, None, advantages, mask, beta=0.04)
    assert (
        with_beta == grpo_loss(logps, None, None, advantages, mask, beta=0.0)[0]
        and metrics["kl"] == 0
    )


def test_the_first_loss_is_zero_but_its_gradient_is_not():
    logps = torch.randn(4, 5).log_softmax(-1).requires_grad_()
    advantages = group_advantages(torch.tensor([[0.0, 1.0, 2.0, 0.0]]))
    loss, metrics = grpo_loss(logps, None, logps.detach(), advantages, torch.ones(4, 5))
    loss.backward()
    assert abs(loss.item()) < 1e-6 and metrics["kl"].item() == 0.0
    assert logps.grad.abs().max() > 0.01


def test_what_is_masked_never_reaches_the_loss():
    logps = torch.tensor([[-1.0, -torch.inf], [-1.0, -1.0]], requires_grad=True)
    mask = torch.tensor([[1, 0], [1, 1]])
    loss, _ = grpo_loss(
        logps,
        None,
        torch.tensor([[-1.0, torch.inf], [-1.0, -1.0]]),
        torch.tensor([1.0, -1.0]),
        mask,
    )
    loss.backward()
    assert loss.isfinite() and logps.grad[1].isfinite().all() and logps.grad[0, 0].isfinite()


def test_parts_of_an_update_add_up_to_the_update():
    torch.manual_seed(0)
    logps, old, ref = (torch.randn(6, 4) * 0.3 - 1 for _ in range(3))
    mask, advantages = torch.rand(6, 4) > 0.3, torch.randn(6)
    mask[:, 0] = True
    for variant, total in ({}, 6), ({"token_mean": True}, mask.sum()):
        whole, metrics = grpo_loss(logps, old, ref, advantages, mask, **variant)
        parts = [
            grpo_loss(logps[s], old[s], ref[s], advantages[s], mask[s], total=total, **variant)
            for s in (slice(0, 2), slice(2, 6))
        ]
        assert torch.isclose(sum(loss for loss, _ in parts), whole)
        for name in ("kl", "clip_share"):
            assert torch.isclose(sum(part[name] for _, part in parts), metrics[name]), name


def test_mask_counts_up_to_and_including_the_first_eos():
    ids = torch.tensor(
        [[5, 6, 9, 9], [9, 9, 9, 9], [5, 6, 7, 8], [9, 5, 9, 6]]
    )  # EOS 9, which is also the padding
    expected = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]]).bool()
    assert torch.equal(completion_mask(ids, 9), expected)
    assert completion_mask(ids, None).all()


# --- variants, by hand


def test_advantages_without_the_std():
    advantages = group_advantages(
        torch.tensor([[0.0, 1.0, 2.0, 1.0], [0.0, 0.0, 0.0, 1.0]]), scale=False
    )
    assert torch.equal(
        advantages, torch.tensor([[-1.0, 0.0, 1.0, 0.0], [-0.25, -0.25, -0.25, 0.75]])
    )


def test_token_mean_weighs_every_token_the_same():
    logps = torch.zeros(2, 3, requires_grad=True)
    loss, _ = grpo_loss(
        logps,
        None,
        None,
        torch.tensor([1.0, -1.0]),
        torch.tensor([[1, 1, 1], [1, 0, 0]]),
        beta=0.0,
        token_mean=True,
    )
    loss.backward()
    assert loss.item() == -0.5  # -(3 * 1 - 1) / 4 tokens
    assert torch.allclose(logps.grad, torch.tensor([[-0.25, -0.25, -0.25], [0.25, 0, 0]]))


@pytest.mark.parametrize(
    "ratio, value, has_gradient", [(1.25, 1.25, True), (1.5, 1.28, False), (0.5, 0.5, True)]
)
def test_a_higher_clip_lets_good_tokens_rise_further(ratio, value, has_gradient):
    logps = torch.full((1, 1), math.log(ratio), requires_grad=True)
    loss, _ = grpo_loss(
        logps, torch.zeros(1, 1), None, torch.ones(1), torch.ones(1, 1), beta=0.0, clip_high=0.28
    )
    loss.backward()
    assert torch.isclose(-loss, torch.tensor(value)) and bool(logps.grad) == has_gradient
    # The other side is clip_eps, as ever.
    loss, _ = grpo_loss(
        torch.full((1, 1), math.log(0.5)),
        torch.zeros(1, 1),
        None,
        -torch.ones(1),
        torch.ones(1, 1),
        beta=0.0,
        clip_high=0.28,
    )
    assert torch.isclose(loss, torch.tensor(0.8))


def test_completions_left_out_of_the_mask_have_no_gradient():
    logps = torch.zeros(2, 2, requires_grad=True)
    loss, metrics = grpo_loss(
        logps, None, None, torch.tensor([1.0, -1.0]), torch.tensor([[1, 1], [0, 0]]), beta=0.0
    )
    loss.backward()
    assert (
        torch.equal(logps.grad, torch.tensor([[-0.25, -0.25], [0.0, 0.0]])) and loss.item() == -0.5
    )


def test_kl_in_the_reward():
    rewards = torch.tensor([[1.0, 0.0]])
    logps, ref = (
        torch.tensor([[[-1.0, -2.0], [-1.0, -torch.inf]]]),
        torch.tensor([[[-2.0, -4.0], [-0.5, 0.0]]]),
    )
    mask = torch.tensor([[[True, True], [True, False]]])
    # log-ratios 1 + 2 and -0.5; what the mask leaves out does not count
    assert torch.allclose(
        kl_in_reward(rewards, logps, ref, mask, beta=0.1), torch.tensor([[0.7, 0.05]])
    )


# --- the original's numbers


def test_a_step_equals_the_originals(model, grpo_expected):
    e = grpo_expected
    set_trainable(model)
    video, audio = model.encode(e["pixel_values"], e["input_features"])
    question = model.read_question(e["bert_input_ids"], e["bert_attention_mask"])
    (prompt,) = model.embed_prompts(e["prompt_ids"].tolist(), video, audio, question)
    logps = completion_logps(model, prompt, e["completion_ids"])
    mask = completion_mask(e["completion_ids"], 317)
    assert mask.sum(1).tolist() == [12, 5, 8, 1]
    assert relative_error(logps[mask], e["logps"][mask]) <= 1e-5
    loss, metrics = grpo_loss(
        logps,
        None,
        e["ref_logps"],
        group_advantages(e["rewards"][None]),
        mask,
        beta=e["beta"].item(),
    )
    loss.backward()
    assert relative_error(loss[None], e["loss"]) <= 1e-4
    assert relative_error(metrics["kl"][None], e["kl"]) <= 1e-4
    assert torch.equal(metrics["completion_length"][None], e["completion_length"])
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    norm = torch.stack([g.norm() for g in gradients.values()]).norm()
    assert relative_error(norm[None], e["grad_norm"]) <= 1e-4
    recorded = [name for name in e if name.startswith("grad.")]
    assert len(recorded) == 10
    for name in recorded:
        assert relative_error(gradients[name.removeprefix("grad.model.")], e[name]) <= 1e-4, name


@torch.no_grad()
def test_completion_logps_equal_the_originals(model, prompts, expected):
    for prompt, ids, logps in zip(
        prompts, expected["completion_ids"], expected["completion_logps"]
    ):
        assert relative_error(completion_logps(model, prompt, ids[None]), logps[None]) <= 1e-5
    assert torch.isclose(
        -expected["completion_logps"].mean(), expected["sft_loss"][0], rtol=1e-5
    )  # one number, two ways


def test_sft_loss_equals_the_originals(model, prompts, expected):
    from train_sft import sft_loss

    ids = expected["completion_ids"]
    rows = [torch.cat([prompt, model.embed_tokens(row)]) for prompt, row in zip(prompts, ids)]
    whole = sft_loss(model, rows, list(ids), ids.numel())
    assert relative_error(whole[None], expected["sft_loss"]) <= 1e-4
    parts = [sft_loss(model, [row], [answer], ids.numel()) for row, answer in zip(rows, ids)]
    assert torch.isclose(sum(parts), whole)


# --- two routes to the same thing


def test_shared_prompt_equals_repeated_prompt_values_and_gradients(model, prompts):
    set_trainable(model)
    prompt = prompts[0].requires_grad_()
    ids = torch.randint(0, 300, (5, 11), generator=torch.Generator().manual_seed(1))
    weights = torch.randn(5, 11)

    def gradients(logps):
        model.zero_grad()
        prompt.grad = None
        (logps * weights).sum().backward()
        return {
            "prompt": prompt.grad.clone(),
            **{n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None},
        }

    repeated = torch.cat([prompt.expand(5, -1, -1), model.embed_tokens(ids)], dim=1)
    logits = model.logits(model(repeated))[:, len(prompt) - 1 : -1]
    slow = token_logps(logits, ids)
    slow_gradients = gradients(slow)
    fast = completion_logps(model, prompt, ids)
    assert relative_error(fast, slow) <= 1e-5
    fast_gradients = gradients(fast)
    assert fast_gradients.keys() == slow_gradients.keys() and len(fast_gradients) > 20
    for name, gradient in slow_gradients.items():
        assert relative_error(fast_gradients[name], gradient) <= 1e-4, name


def test_chunks_change_nothing(model, prompts):
    set_trainable(model)
    ids = torch.randint(0, 300, (3, 7), generator=torch.Generator().manual_seed(2))
    results = []
    for chunk in (1000, 4):  # one piece; pieces that cut through rows
        model.zero_grad()
        logps = completion_logps(model, prompts[:1], ids, chunk=chunk)
        logps.sum().backward()
        results.append((logps.detach(), model.embed_tokens.weight.grad.clone()))
    assert torch.allclose(results[0][0], results[1][0], atol=1e-6)
    assert relative_error(results[1][1], results[0][1]) <= 1e-6


def test_a_completion_of_one_token(model, prompts):
    ids = torch.tensor([[3], [7]])
    logps = completion_logps(model, prompts[0], ids)
    assert torch.allclose(
        logps, model.logits(model(prompts[:1]))[0, -1].log_softmax(-1)[ids], atol=1e-5
    )


def test_eos_gets_a_gradient(model, prompts):
    """The token that ends a completion is learned like any other."""
    set_trainable(model)
    ids = torch.tensor([[5, 317, 317], [6, 8, 317]])
    mask = completion_mask(ids, 317)
    logps = completion_logps(model, prompts[0], ids)
    logps.retain_grad()
    grpo_loss(logps, None, None, torch.tensor([1.0, -1.0]), mask, beta=0.0)[0].backward()
    assert logps.grad[0].tolist() == pytest.approx([-0.25, -0.25, 0.0])
    assert logps.grad[1].tolist() == pytest.approx([1 / 6] * 3)


# --- several prompts, live tokens, length buckets


def ragged_completions(seed=0, B=3, G=4, C=30):
    """ids (B, G, C) and a mask whose rows have lengths from 1 to C."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 300, (B, G, C), generator=generator)
    lengths = torch.tensor([[1, 30, 12, 3], [30, 29, 5, 2], [7, 7, 30, 1]])
    return ids, torch.arange(C) < lengths[..., None]


def gradients_of(model, logps, mask):
    weights = torch.linspace(-1, 1, logps.numel()).view(logps.shape)
    model.zero_grad()
    (logps * weights * mask).sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_several_prompts_live_tokens_and_buckets_change_neither_values_nor_gradients(
    model, prompts
):
    set_trainable(model)
    prompts = torch.cat([prompts, prompts[:1] * 0.7])
    ids, mask = ragged_completions()
    together = completion_logps(model, prompts, ids, mask)
    gradients = gradients_of(model, together, mask)
    assert (together[~mask] == 0).all()
    alone = torch.stack([completion_logps(model, p, rows) for p, rows in zip(prompts, ids)])
    assert torch.allclose(together[mask], alone[mask], atol=1e-6, rtol=1e-6)
    expected = gradients_of(model, alone, mask)
    assert gradients.keys() == expected.keys()
    largest = max(g.abs().max() for g in expected.values())
    for name, gradient in expected.items():
        assert (gradients[name] - gradient).abs().max() <= 1e-6 * max(1.0, largest), name


def test_rows_without_a_token_that_counts_are_0_and_cost_nothing(model, prompts):
    ids, mask = ragged_completions(B=2)
    ids, mask = ids[:2], mask[:2].clone()
    mask[0, 1:] = False
    logps = completion_logps(model, prompts, ids, mask)
    assert (logps[0, 1:] == 0).all() and (logps[mask] < 0).all()
    assert (completion_logps(model, prompts, ids, torch.zeros_like(mask)) == 0).all()


def test_length_buckets_by_hand():
    assert length_buckets([31, 30, 29, 33]) == [[3, 0, 1, 2]]  # alike: together
    assert length_buckets([100, 10, 95, 60]) == [[0, 2], [3], [1]]
    assert length_buckets([10, 2, 9]) == [[0, 2, 1]]  # few tokens are not worth a pass


def test_only_live_tokens_reach_the_head(model, prompts, monkeypatch):
    ids, mask = ragged_completions(B=2)
    ids, mask = ids[:2], mask[:2]
    rows = []
    logits = model.logits
    monkeypatch.setattr(model, "logits", lambda h: (rows.append(len(h)), logits(h))[1])
    completion_logps(model, prompts, ids, mask)
    assert sum(rows) == mask.sum()
