"""One GRPO update as a whole, by this code and in the usual way with `transformers`.

Ours are train_grpo.py's own functions. The other update samples with eager `generate` from
repeated prompts and scores with the prompt before every completion and logits at every position;
the towers are this code's in both arms, run as often as each arm does.

Shapes: B prompts · G completions per prompt · R = B*G rows · P prompt length · C completion length.
"""

import tempfile
from pathlib import Path

import torch

import data
from generate import Decoding, Sampler
from grpo import group_advantages, grpo_loss
from support.clock import lap, timed
from support.optimizer import Optimizer, set_trainable
from support.updates import evidence
from train_grpo import (
    Config,
    add_gradients,
    advantages_of,
    logps_without_gradient,
    sample_groups,
)

EOS = 2  # ends completions of forced lengths


class ForcedLengths(Sampler):
    """Ends each row at a length given beforehand, EOS included, whatever the model says.

    lengths: (R,)"""

    def __init__(self, *args, lengths, **options):
        self.ends = None
        super().__init__(*args, **options)
        # At a fixed address, as all that a CUDA graph reads.
        self.ends = lengths.to(self.device) - 1

    def _decode(self, R):
        ended = self.step >= self.ends[self.row[:R], None]  # (R, 1)
        self.logits[:R, self.eos] = ended * 2e9 - 1e9
        super()._decode(R)


def forced_lengths(R, longest):
    """R lengths spread evenly over 1..longest, mean longest / 2, always in the same order: (R,)."""
    lengths = torch.linspace(1, longest, R).long()
    return lengths[torch.randperm(R, generator=torch.Generator().manual_seed(0))]


def random_rewards(B, G, device):
    return torch.rand(B, G, generator=torch.Generator().manual_seed(0)).to(device)


class Numbers:
    """In place of a tokenizer: the text of a completion is its ids."""

    def __init__(self, *eos_token_ids):
        self.eos_token_ids = eos_token_ids

    def decode(self, ids):
        return " ".join(map(str, ids))


class Update:
    """Our arm: an update of B clips, from pixels and log-mel to the optimizer's step.

    lengths (B*G,): of the completions, or None: all of C tokens. Rewards are random. `seconds`: of
    the last update's phases. The learning rate is 0, so that all measures see the same weights; the
    work is the same."""

    def __init__(self, bench, B, lengths=None):
        flags, G = bench.flags, bench.flags.group
        self.bench, self.clips = bench, bench.clips(B)
        self.rewards = random_rewards(B, G, bench.device)
        self.config = Config(prompts=B, group=G, micro_batch=flags.micro_batch)
        folder = Path(tempfile.gettempdir())  # where a NaN would be reported
        self.optimizer = Optimizer(set_trainable(bench.model), self.config, folder)
        if lengths is None:
            self.sampler = bench.sampler(B, G, Decoding(flags.completion))
            self.omni = data.Omni(bench.model, Numbers(bench.vocab), None)  # never drawn
        else:
            decoding = Decoding(flags.completion, eos_token_id=EOS)
            self.sampler = bench.sampler(B, G, decoding, ForcedLengths, lengths=lengths)
            self.sampler.warm_up()  # rows will be compacted
            self.omni = data.Omni(bench.model, Numbers(EOS), None)

    def __call__(self):
        lap()
        with timed("encode"):
            batch = self.bench.encode(self.clips)
        rollout = sample_groups(self.sampler, self.omni, batch, seed=0)
        rollout.rewards = {"random": self.rewards}
        rollout.ref_logps = logps_without_gradient(self.bench.reference, rollout, self.config)
        rollout.advantages = advantages_of(rollout, self.config)
        metrics, _ = add_gradients(self.bench.model, rollout, self.config)
        self.optimizer.step(0.0, evidence(0, rollout, metrics["loss"]))
        self.seconds = lap()


class OtherUpdate:
    """The other arm: `generate` over repeated prompts, scoring with the prompt repeated.

    encode_again: as in the original, each completion's clip goes through both towers again, for the
    policy and for the reference."""

    def __init__(self, bench, B, encode_again):
        self.bench, self.clips, self.encode_again = bench, bench.clips(B), encode_again
        self.advantages = group_advantages(random_rewards(B, bench.flags.group, bench.device))
        self.parameters = bench.other.policy.parameters()
        self.optimizer = torch.optim.AdamW(self.parameters, lr=0.0, weight_decay=0.0, fused=True)

    def score(self, arm, b, ids):
        """ids (G, C) of prompt b -> (G, C) float32."""
        G = len(ids)
        batch = data.take(self.batch, [b])
        if self.encode_again:
            batch = self.bench.encode([clip[b].expand(G, *clip[b].shape) for clip in self.clips])
        prompts = torch.stack(data.embed(arm.parts, batch))
        return arm.logps(prompts.expand(G, -1, -1), ids).float()

    def __call__(self):
        bench, G = self.bench, self.bench.flags.group
        policy, reference = bench.other.policy, bench.other.reference
        with torch.no_grad():
            self.batch = bench.encode(self.clips)
            prompts = data.embed(policy.parts, self.batch)
            repeated = [prompt for prompt in prompts for _ in range(G)]
            ids = policy.generate(repeated, bench.flags.completion).unflatten(0, (-1, G))
            ref_logps = [self.score(reference, b, group) for b, group in enumerate(ids)]
        for b, group in enumerate(ids):
            logps, mask = self.score(policy, b, group), torch.ones_like(group)
            advantages, total = self.advantages[b], ids.shape[0] * G
            loss, _ = grpo_loss(logps, None, ref_logps[b], advantages, mask, total=total)
            loss.backward()
            loss.item()  # for the log
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0).item()
        self.optimizer.step()
        self.optimizer.zero_grad()
