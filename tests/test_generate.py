"""Sampling: with the cache and without, together and alone, and from the right distribution."""

import pytest
import torch

from generate import Decoding, Sampler, draw, generate, sample
from grpo import completion_logps, completion_mask
from support.compiling import compile_layers


@torch.no_grad()
def greedy_without_cache(model, prompt, steps):
    ids = []
    for _ in range(steps):
        ids.append(int(model.logits(model(prompt[None])[:, -1]).argmax()))
        prompt = torch.cat([prompt, model.embed_tokens(torch.tensor(ids[-1:]))])
    return ids


def test_greedy_equals_the_original(model, prompts, expected):
    assert torch.equal(
        generate(model, prompts, max_new_tokens=12, temperature=0)[:, 0], expected["greedy_ids"]
    )


def test_greedy_equals_decoding_without_a_cache_for_prompts_of_unequal_length(model, prompts):
    ragged = [prompts[0], prompts[1][:50], prompts[0][:7], prompts[1][:1]]
    together = generate(model, ragged, num_samples=2, max_new_tokens=10, temperature=0)
    assert together.shape == (4, 2, 10)
    for prompt, rows in zip(ragged, together):
        alone = generate(model, [prompt], max_new_tokens=10, temperature=0)[0, 0]
        assert (
            rows[0].tolist()
            == rows[1].tolist()
            == alone.tolist()
            == greedy_without_cache(model, prompt, 10)
        )


def test_sampled_logps_are_those_of_the_scoring_pass(model, prompts):
    ragged = [prompts[0], prompts[1][:33]]
    ids, logps = sample(model, ragged, 3, Decoding(max_new_tokens=9), seed=0)
    for prompt, rows, sampled in zip(ragged, ids, logps):
        assert torch.allclose(sampled, completion_logps(model, prompt, rows), atol=1e-4)


def test_a_seed_repeats_and_samples_differ(model, prompts):
    first, again, other = (generate(model, prompts, 4, 8, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)
    rows = first.flatten(0, 1).tolist()
    assert len({tuple(row) for row in rows}) == 8  # every row its own
    # The first token too: the G rows of a prompt draw from its one distribution, they do not copy
    # one draw.
    assert len({row[0] for row in generate(model, prompts[:1], 50, 1, seed=0)[0].tolist()}) > 10


def test_samples_of_one_prefill_follow_the_models_distribution(model, prompts):
    """Frequencies of 4000 first and second tokens against the probabilities the model gives
    them."""
    prompts = prompts * 0.5  # any input will do
    n = 4000
    ids = generate(model, prompts, n, 2, temperature=1.0, seed=0)
    probabilities = model.logits(model(prompts))[:, -1].softmax(-1)
    for b in range(2):
        counts = torch.bincount(ids[b, :, 0], minlength=320)
        expected = n * probabilities[b]
        chi2 = ((counts - expected) ** 2 / expected)[expected > 5].sum()
        bins = int((expected > 5).sum())
        assert (
            bins > 20 and chi2 < bins + 5 * (2 * bins) ** 0.5
        )  # mean of chi2 is about bins, its std sqrt(2 bins)
        # second tokens, given the most frequent first one
        first = int(counts.argmax())
        rows = ids[b][ids[b, :, 0] == first, 1]
        x = torch.cat([prompts[b], model.embed_tokens(torch.tensor([first]))])[None]
        likely = model.logits(model(x))[0, -1].softmax(-1)
        top = likely.argmax()
        share, p = (rows == top).float().mean(), likely[top]
        assert abs(share - p) < 5 * (p * (1 - p) / len(rows)) ** 0.5


def test_temperature_and_top_p_by_hand():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(20_000, 4)
    generator = torch.Generator().manual_seed(0)
    for temperature, top_p, expected in [
        (1.0, 1.0, [0.5, 0.3, 0.15, 0.05]),
        (0.5, 1.0, [0.25, 0.09, 0.0225, 0.0025]),  # squared
        (1.0, 0.75, [0.5, 0.3, 0, 0]),  # 0.5 does not reach 0.75, 0.8 does
        (1.0, 0.5, [1, 0, 0, 0]),
        (0, 1.0, [1, 0, 0, 0]),
    ]:
        expected = torch.tensor(expected) / sum(expected)
        ids, logps = draw(logits, temperature, top_p, generator)
        assert torch.allclose(torch.bincount(ids, minlength=4) / len(ids), expected, atol=0.02)
        if temperature:
            assert torch.allclose(logps.exp(), expected[ids], atol=1e-5)


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.7, 0.9), (0, 1.0)])
def test_logits_that_are_not_numbers_draw_a_word_and_say_so(temperature, top_p):
    """The optimizer's step finds them, and tells what led to them: sampling must not end before."""
    logits = torch.randn(3, 700)
    logits[1] = torch.nan
    ids, logps = draw(logits, temperature, top_p, torch.Generator().manual_seed(0))
    assert ((ids >= 0) & (ids < 700)).all()
    assert logps.isnan().tolist() == [False, True, False]


def test_rows_end_with_eos(model, prompts):
    """EOS is made frequent; a row repeats it from its first one on, and C is the longest row."""
    eos = int(generate(model, prompts, temperature=0, max_new_tokens=1)[0, 0, 0])
    ids = generate(model, prompts * 0.3, 16, 40, eos_token_id=eos, seed=0, temperature=0.7)
    free = generate(model, prompts * 0.3, 16, 40, eos_token_id=None, seed=0, temperature=0.7)
    mask = completion_mask(ids.flatten(0, 1), eos)
    ids, free = ids.flatten(0, 1), free.flatten(0, 1)
    assert (ids[~mask] == eos).all()
    assert torch.equal(
        ids[mask], free[:, : ids.shape[1]][mask]
    )  # up to its end a row is what it would have been
    assert ids.shape[1] == int(mask.sum(1).max())
    assert free.shape[1] == 40


def test_one_new_token(model, prompts):
    assert generate(model, prompts, 3, 1).shape == (2, 3, 1)


@pytest.mark.parametrize(
    "wrong",
    [
        dict(num_samples=0),
        dict(max_new_tokens=0),
        dict(temperature=-1),
        dict(top_p=0.0),
        dict(top_p=1.5),
    ],
)
def test_wrong_arguments_are_named(model, prompts, wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        generate(model, prompts, **wrong)


@pytest.mark.parametrize("V", [5, 151_936])
def test_the_drawn_distribution_is_the_softmax(V):
    """Chi-squared over the likely words; words of probability 0 are never drawn, at any size."""
    torch.manual_seed(0)
    n, chosen = 20_000, torch.randperm(V)[:4]
    logits = torch.full((1, V), -torch.inf)
    logits[0, chosen] = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    ids, logps = draw(logits.expand(n if V < 10 else 2_000, V), 1.0, 1.0, torch.Generator())
    counts = torch.stack([(ids == word).sum() for word in chosen]).double()
    expected = torch.tensor([0.4, 0.3, 0.2, 0.1]).double() * len(ids)
    assert counts.sum() == len(ids)
    assert ((counts - expected) ** 2 / expected).sum() < 16.3  # 3 degrees of freedom, p = 0.001
    assert torch.allclose(logps.exp(), torch.softmax(logits[0], -1)[ids], atol=1e-5)


def test_a_flat_distribution_over_the_published_vocabulary_is_drawn_flat():
    """In float32 the running sum of 151 936 equal words would be uneven; its thirds must be
    equal."""
    V, n = 151_936, 3_000
    generator = torch.Generator().manual_seed(0)
    ids = torch.cat([draw(torch.zeros(500, V), 1.0, 1.0, generator)[0] for _ in range(n // 500)])
    thirds = torch.bincount(ids * 3 // V, minlength=3).double()
    assert ((thirds - n / 3) ** 2 / (n / 3)).sum() < 13.8  # 2 degrees of freedom, p = 0.001
    assert len(ids.unique()) > 0.97 * n


def test_any_of_several_eos_ids_ends_a_row(model, prompts):
    """Two frequent words both end rows: after either the first of them is repeated."""
    first, second = (int(i) for i in generate(model, prompts, 1, 1, temperature=0).flatten())
    if first == second:
        second = (first + 1) % 300
    # One row per prompt: no compaction, so every row keeps its random numbers.
    prompts = list(prompts * 0.3) * 16
    settings = {"max_new_tokens": 40, "seed": 0, "temperature": 0.7}
    ids = generate(model, prompts, eos_token_id=(first, second), **settings).flatten(0, 1)
    free = generate(model, prompts, **settings).flatten(0, 1)
    mask = completion_mask(ids, (first, second))
    assert (ids[~mask] == first).all()
    assert torch.equal(ids[mask], free[:, : ids.shape[1]][mask])
    ended = torch.isin(free, torch.tensor([first, second])).any(1)
    assert ended.any()
    assert torch.equal(mask.sum(1), completion_mask(free, (first, second)).sum(1))


# --- the sampler that a training run keeps


def test_compaction_changes_no_row(model, prompts):
    """Rows of one prompt end at different steps, most of them early: the batch halves, and halves
    again, on the way."""
    eos, P = 7, prompts.shape[1]
    torch.manual_seed(0)
    halvings = []

    class Counting(Sampler):
        def _compact(self, G):
            halved = super()._compact(G)
            halvings.append(halved)
            return halved

    counting = Counting(model, 2, 8, P, Decoding(40, temperature=0, eos_token_id=eos))
    # Greedy rows are all equal, so the rows are ended by hand: as if each had drawn EOS at a step
    # of its own.
    ends = torch.tensor([[3, 3, 3, 3, 3, 3, 3, 38], [2, 5, 4, 3, 2, 9, 17, 30]]).flatten()
    decode = counting._decode

    steps = []

    def ending(R):
        steps.append(R)
        finished = counting.step >= ends[counting.row[:R]]
        counting.logits[:R, eos] = torch.where(finished, torch.inf, -torch.inf)
        decode(R)

    counting._decode = ending
    ids, logps = counting(list(prompts))
    assert halvings == [4, 2, 1]
    assert (logps[~completion_mask(ids, eos)] == 0).all()
    reference = generate(model, prompts, max_new_tokens=40, temperature=0)[:, 0]  # without any end
    reference = reference.repeat_interleave(8, 0)
    for row, end, expected in zip(ids.flatten(0, 1), ends, reference):
        if eos not in expected[:end]:
            assert row[:end].tolist() == expected[:end].tolist()
        assert (row[end:] == eos).all()
    assert ids.shape[-1] == 39
    assert steps[0] == 16 and steps[-1] == 2
    ends -= 20  # the same, with all rows done by step 18: no step is made after the last row's end
    steps.clear()
    assert counting(list(prompts))[0].shape[-1] == 19 and len(steps) <= 20


def test_a_sampler_is_used_again_with_other_prompts_and_fewer(model, prompts):
    sampler = Sampler(model, 3, 2, prompts.shape[1] + 5, Decoding(9))
    for some in (
        [prompts[0], prompts[1][:50]],
        [prompts[1][:20]],
        [prompts[0][:7], prompts[1], prompts[0]],
    ):
        ids, logps = sampler(some, seed=5)
        assert ids.shape == (len(some), 2, 9)
        for prompt, rows, sampled in zip(
            some, ids, logps
        ):  # what an earlier call left in the buffers has no influence
            assert torch.allclose(sampled, completion_logps(model, prompt, rows), atol=1e-4)
    with pytest.raises(ValueError, match="made for 3"):
        sampler([prompts[0]] * 4)


def test_refresh_brings_new_weights_into_the_working_copy_in_place(model, prompts):
    working = model.frozen_copy(torch.float32)
    sampler = Sampler(model, 2, 1, prompts.shape[1], Decoding(8, temperature=0), copy=working)
    addresses = [p.data_ptr() for p in working.parameters()]
    old, _ = sampler(prompts)
    with torch.no_grad():
        for parameter in model.layers.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    assert torch.equal(sampler(prompts)[0], old)  # not yet
    sampler.refresh()
    new, _ = sampler(prompts)
    assert not torch.equal(new, old) and torch.equal(
        new, generate(model, prompts, max_new_tokens=8, temperature=0)
    )
    assert [p.data_ptr() for p in working.parameters()] == addresses


def test_a_bf16_copy_samples_almost_the_same_distribution(model, prompts):
    sampler = Sampler(
        model, 2, 4, prompts.shape[1], Decoding(8), copy=model.frozen_copy(torch.bfloat16)
    )
    assert sampler.dtype == torch.bfloat16 and sampler.logps.dtype == torch.float32
    ids, logps = sampler(prompts, seed=0)
    for prompt, rows, sampled in zip(prompts, ids, logps):
        assert (sampled - completion_logps(model, prompt, rows)).abs().mean() < 0.05


@pytest.mark.slow
def test_compiled_equals_eager_and_nothing_recompiles(model, prompts):
    """The layers compiled for each number of rows; then other lengths, prompts, seeds: all of
    it compiled already."""
    eos, P = 7, prompts.shape[1]
    decoding = Decoding(24, eos_token_id=eos)
    eager = Sampler(model, 2, 4, P, decoding)
    copy = model.frozen_copy(torch.float32)
    compile_layers(copy, dynamic=False)
    compiled = Sampler(model, 2, 4, P, decoding, copy=copy)
    compiled.warm_up()
    torch.compiler.set_stance("fail_on_recompile")
    try:
        for seed, some in enumerate(
            [list(prompts), [prompts[0][:9], prompts[1][:40]], [prompts[1]], list(prompts * 0.5)]
        ):
            ids, logps = compiled(some, seed=seed)
            again, expected = eager(some, seed=seed)
            assert torch.equal(ids, again) and torch.allclose(logps, expected, atol=1e-4)
    finally:
        torch.compiler.set_stance("default")
