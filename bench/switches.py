"""O: what each optimisation brings, our own code with it and without.

Shapes: B prompts · G completions per prompt · R = B*G rows · P prompt length · C completion length.
"""

import torch

from bench.arms import EOS, ForcedLengths, forced_lengths
from bench.measures import logps_operation
from bench.rows import Unequal, row
from generate import Decoding
from grpo import chunked_logps, completion_logps
from support.precision import autocast


def shared_prefill(bench):
    """One new token: the prompts read once, against read once per completion."""
    B, G, prompts = bench.flags.prompts, bench.flags.group, bench.prompts(bench.flags.prompts)
    once, again = bench.sampler(B, G, Decoding(1)), bench.sampler(B * G, 1, Decoding(1))
    repeated = [prompt for prompt in prompts for _ in range(G)]
    times = bench.medians(lambda: once(prompts, seed=0), lambda: again(repeated, seed=0))
    return row(*times, "s", f"{B} prompts x {G}")


def one_rollout(bench):
    """All prompts of an update sampled together, against prompt by prompt."""
    B, G, decoding = bench.flags.prompts, bench.flags.group, Decoding(bench.flags.completion)
    together, alone = bench.sampler(B, G, decoding), bench.sampler(1, G, decoding)
    prompts = bench.prompts(B)
    times = bench.medians(
        lambda: together(prompts, seed=0),
        lambda: [alone([prompt], seed=0) for prompt in prompts],
    )
    return row(*times, "s", f"{B} prompts x {G}")


class Uncompacted(ForcedLengths):
    def _compact(self, G):
        return G


def compaction(bench):
    """Finished rows left out as soon as half of the places are enough, against all to the end."""
    B, G, C = bench.flags.prompts, bench.flags.group, bench.flags.completion
    lengths, prompts = forced_lengths(B * G, C), bench.prompts(B)
    decoding = Decoding(C, eos_token_id=EOS)
    compacted = bench.sampler(B, G, decoding, ForcedLengths, lengths=lengths)
    uncompacted = bench.sampler(B, G, decoding, Uncompacted, lengths=lengths)
    for sampler in (compacted, uncompacted):
        ids, _ = sampler(prompts, seed=0)
        if not torch.equal((ids != EOS).sum(-1).flatten() + 1, lengths.to(ids.device)):
            raise Unequal("the rows do not have the lengths that were asked for")
    times = bench.medians(lambda: compacted(prompts, seed=0), lambda: uncompacted(prompts, seed=0))
    return row(*times, "s", "lengths as asked for")


def compiled_step(bench):
    """The decode step compiled and replayed as a CUDA graph, against eager."""
    bench.needs_gpu()
    B, G, decoding = bench.flags.prompts, bench.flags.group, Decoding(bench.flags.new_tokens)
    prompts = bench.prompts(B)
    compiled, eager = bench.sampler(B, G, decoding), bench.eager_sampler(B, G, decoding)
    times = bench.medians(lambda: compiled(prompts, seed=0), lambda: eager(prompts, seed=0))
    return row(*times, "s", f"{B * G} rows")


@torch.no_grad()
def head_type(bench):
    """Logits of all rows: bf16 products summed in float32, against a float32 copy of the head."""
    bench.needs_gpu()
    head = bench.working.embed_tokens.weight
    hidden = torch.randn(bench.flags.rows, head.shape[1], device=bench.device, dtype=head.dtype)

    def ours():
        return bench.working.logits(hidden)

    def other():
        return hidden.float() @ head.float().T

    outcome = bench.close(ours(), other())
    return row(*bench.medians(ours, other), "s", outcome)


def repeated_chunked(model, prompt, ids):
    """The prompt before every completion, but logits where they are needed and in chunks."""
    embeds = torch.cat([prompt.expand(len(ids), -1, -1), model.embed_tokens(ids)], dim=1)
    hidden = model(embeds)[:, len(prompt) - 1 : -1]
    return chunked_logps(model, hidden.flatten(0, 1), ids.flatten()).view(ids.shape)


def chunked_seconds(bench):
    """Log-probabilities with backward: logits in four chunks, against all at once."""
    n = 4 * bench.flags.chunk
    chunked, full = logps_operation(bench.model, n, bench.flags.chunk, bench.device, bench.dtype)
    outcome = bench.close(chunked(), full())
    peaks = [bench.peak_bytes(arm) / 2**20 for arm in (chunked, full)]
    note = f"{outcome}; {peaks[0]:.0f} against {peaks[1]:.0f} MiB, both of {n} positions"
    return row(*bench.medians(chunked, full), "s", note)


def checkpointing(bench):
    """Scoring with backward, layers computed again in backward, against kept."""
    model, (prompt,) = bench.model, bench.prompts(1)
    ids = bench.random_ids(bench.flags.group, bench.flags.new_tokens)

    def run(again):
        model.gradient_checkpointing = again
        with autocast(model):
            logps = completion_logps(model, prompt, ids)
        logps.sum().backward()
        model.zero_grad()
        model.gradient_checkpointing = False

    arms = [lambda: run(True), lambda: run(False)]
    peaks = [bench.peak_bytes(arm) / 2**20 for arm in arms]
    return row(*bench.medians(*arms), "s", f"{peaks[0]:.0f} against {peaks[1]:.0f} MiB")


def fused_adamw(bench):
    def optimizer(fused):
        trainable = [p for p in bench.model.parameters() if p.requires_grad]
        parameters = [p.detach().clone().requires_grad_() for p in trainable]
        for p in parameters:
            p.grad = torch.ones_like(p)
        adamw = torch.optim.AdamW(parameters, lr=1e-6, weight_decay=0.0, fused=fused)
        return adamw.step, parameters

    (fused, ours), (plain, theirs) = optimizer(True), optimizer(False)
    times = bench.medians(fused, plain)
    means = [torch.stack([p.detach().mean() for p in arm]) for arm in (ours, theirs)]
    return row(*times, "s", bench.close(*means))


def prompts_together(bench):
    """Several prompts scored in one pass, with backward, against one by one."""
    B, G, C = bench.flags.prompts, bench.flags.group, bench.flags.new_tokens
    model, prompts, ids = bench.model, torch.stack(bench.prompts(B)), bench.random_ids(B, G, C)

    def logps(size):
        with autocast(model):
            parts = zip(prompts.split(size), ids.split(size))
            return [completion_logps(model, *part) for part in parts]

    def run(size):
        for part in logps(size):
            part.sum().backward()
        model.zero_grad()

    with torch.no_grad():
        outcome = bench.close(torch.cat(logps(B)), torch.cat(logps(1)))
    return row(*bench.medians(lambda: run(B), lambda: run(1)), "s", f"{B} x {G}; {outcome}")
