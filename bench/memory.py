"""What fits on a card: peak memory of one GRPO update at the published 0.5B shape, counted.

    python -m bench --fit        one table: configurations by peak memory, and cards that hold them

How the numbers are obtained, without a GPU: the code itself runs with weights that are fake
tensors, which have shapes and types but no content, in bf16 autocast as on a GPU, while every byte
of every storage that lives is counted. So these are not measurements: what a card needs besides
(its context, kernels' workspaces, fragmentation) is allowed for with RESERVE. Persistent are
weights, AdamW's moments, the sampler's buffers and one decode step's intermediates, which its CUDA
graph keeps; on top comes the largest of the phases encode, rollout, reference, backward and
optimizer, of which the last two hold gradients. Prompts are scored one at a time (--micro-batch 1,
as --preset paper has it), with completions that are all of the longest length.

Shapes: B prompts · G completions per prompt · P prompt length · C completion length · T frames.
"""

import functools
import weakref
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.sizes import FULL_SIZE
from generate import Decoding, Sampler
from grpo import completion_logps
from model import HumanOmni

TEXT = 60  # tokens of the prompt that are neither video nor audio: P = 392 + 500 + 60 = 952
CARDS = (8, 12, 16, 24, 48, 80)  # GiB
RESERVE = 1.0  # GiB of a card that the update does not get: CUDA context, workspaces, fragmentation

# Inside of this mode every tensor is fake. Outside, tensors made from fake ones are fake and others
# are real: the ids and masks of scoring, which completion_logps looks into.
FAKE = FakeTensorMode(allow_non_fake_inputs=True)


class PeakBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operations make while they live: now, and at most.

    Storages that were there before count nothing. `largest`: elements of the largest tensor."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = self.largest = 0
        self.known = weakref.WeakSet()

    def freed(self, size):
        self.live -= size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        for x in tree_leaves((args, kwargs)):
            if isinstance(x, torch.Tensor):
                self.known.add(x.untyped_storage())
        result = function(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and x.untyped_storage() not in self.known:
                storage = x.untyped_storage()
                self.known.add(storage)
                self.live += storage.nbytes()
                self.largest = max(self.largest, x.numel())
                weakref.finalize(storage, self.freed, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return result


class OneStep(Sampler):
    """A sampler whose first decode step stands for all: each has the same intermediates."""

    step_bytes = None

    def _run(self, R):
        if self.step_bytes is None:
            self.generator = None  # fake tensors take no generator
            self.step_bytes, _ = counted(lambda: self._decode(R))


@functools.cache
def fake_models():
    """The policy as it trains, and a bf16 copy: the reference, or what sampling reads.

    The policy is float32, its frozen encoders bf16."""

    def build(dtype):
        torch.set_default_dtype(dtype)
        try:
            with FAKE:
                return HumanOmni(FULL_SIZE)
        finally:
            torch.set_default_dtype(torch.float32)

    policy, copy = build(torch.float32), build(torch.bfloat16).requires_grad_(False)
    for encoder in ("vision_tower", "audio_tower", "bert_model"):
        setattr(policy, encoder, getattr(copy, encoder))

    def logits(hidden):
        shape = (*hidden.shape[:-1], copy.embed_tokens.num_embeddings)
        return hidden.new_empty(shape, dtype=torch.float32)

    # A CPU, as which the fake device counts, would make a float32 copy of a bf16 head; a GPU does
    # not (model.logits).
    copy.logits = logits
    return policy, copy


def fake_prompts(model, B):
    """B embedded prompts (B, P, D) from tower features, with gradient as in training."""
    video = torch.zeros(B, 8, 196, 768, dtype=torch.bfloat16)
    audio = torch.zeros(B, 500, 1280, dtype=torch.bfloat16)
    ids = torch.zeros(B, 50, dtype=torch.long)
    video = model.video_tokens(video, model.branch_weights(ids, torch.ones_like(ids)))
    text = model.embed_tokens(torch.zeros(B, TEXT, dtype=torch.long))
    parts = [tokens.to(text.dtype) for tokens in (video, model.audio_projector(audio), text)]
    return torch.cat(parts, dim=1)


def counted(function):
    """Peak bytes that function() makes besides what was there, and what it returns."""
    counter = PeakBytes()
    with counter:
        result = function()
    return counter.peak, result


@functools.cache
def weight_bytes():
    """-> bytes of: the policy with its encoders, its parameters that train, a bf16 copy of them."""
    policy, _ = fake_models()
    trainable = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    return sum(p.nbytes for p in policy.parameters()), 4 * trainable, 2 * trainable


@functools.cache
def encode_bytes(B):
    _, copy = fake_models()
    with FAKE, torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        frames, mel = torch.zeros(B, 8, 3, 224, 224), torch.zeros(B, 128, 3000)
        return counted(lambda: copy.encode(frames, mel))[0]


@functools.cache
def rollout_bytes(B, G, C):
    """-> bytes of the sampler's buffers, CUDA graph included, and of the prefill on top."""
    _, copy = fake_models()
    with FAKE, torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        _, prompts = counted(lambda: fake_prompts(copy, B))
        counter = PeakBytes()
        with counter:
            sampler = OneStep(copy, B, G, prompts.shape[1], Decoding(C))
            buffers, counter.peak = counter.live, counter.live
            sampler(prompts, seed=0)
    return buffers + sampler.step_bytes, counter.peak - buffers


@functools.cache
def scoring_bytes(G, C, trains, checkpointing=False):
    """Scoring one group: without gradient under the copy, or under the policy with backward.

    The gradients themselves exist before and are not counted."""
    policy, copy = fake_models()
    model = policy if trains else copy
    model.gradient_checkpointing = checkpointing
    ids = torch.zeros(1, G, C, dtype=torch.long)

    def score():
        with torch.autocast("cpu", torch.bfloat16):
            logps = completion_logps(model, fake_prompts(model, 1), ids)
        if trains:
            logps.sum().backward()

    for parameter in policy.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.empty_like(parameter)
    with torch.set_grad_enabled(trains):
        return counted(score)[0]


@dataclass(frozen=True)
class Update:
    """One update of train_grpo.py, by the flags that its memory depends on."""

    B: int  # --prompts
    G: int  # --group
    C: int  # --max-new-tokens
    checkpointing: bool = False  # --gradient-checkpointing
    beta: bool = True  # False: --beta 0, no reference
    cached: bool = False  # --cache-features: encoded already; the towers are loaded all the same
    offload: bool = False  # --offload-optimizer: AdamW's moments are there for its step only


def update_bytes(update):
    """-> {part: bytes} of one update."""
    B, G, C = update.B, update.G, update.C
    policy, gradients, copy = weight_bytes()
    buffers, prefill = rollout_bytes(B, G, C)
    moments = 2 * gradients
    phases = {
        "encode": 0 if update.cached else encode_bytes(B),
        "rollout": prefill,
        "reference": scoring_bytes(G, C, trains=False) if update.beta else 0,
        "backward": gradients + scoring_bytes(G, C, True, update.checkpointing),
        "optimizer": gradients + (moments if update.offload else 0),
    }
    largest = max(phases, key=phases.get)
    return {
        "policy and towers": policy,
        "AdamW": 0 if update.offload else moments,
        "working copy": copy,
        "reference": copy if update.beta else 0,
        "sampler": buffers,
        f"largest phase ({largest})": phases[largest],
    }


UPDATES = [
    Update(16, 8, 512),
    Update(16, 8, 512, cached=True),
    Update(16, 8, 512, beta=False),
    Update(16, 8, 512, checkpointing=True),
    Update(16, 8, 512, checkpointing=True, beta=False),
    Update(16, 8, 256),
    Update(16, 8, 256, checkpointing=True),
    Update(16, 4, 512),
    Update(16, 16, 512, checkpointing=True),
    Update(4, 8, 512, checkpointing=True),
    Update(4, 4, 256, checkpointing=True),
    Update(1, 2, 256, checkpointing=True, beta=False),
    Update(16, 8, 512, checkpointing=True, offload=True),
    Update(16, 8, 512, checkpointing=True, beta=False, offload=True),
    Update(8, 8, 256, checkpointing=True, beta=False, offload=True),
]


def table_line(update, peak):
    cards = ", ".join(str(card) for card in CARDS if peak + RESERVE <= card)
    return (
        f"{update.B:3} {update.G:3} {update.C:4}  "
        f"{'yes' if update.checkpointing else 'no':14}"
        f"{'0.04' if update.beta else '0':6}"
        f"{'cached' if update.cached else 'towers':10}"
        f"{'offloaded' if update.offload else 'on the GPU':11}"
        f"{peak:6.1f}  {cards or 'none of these'}"
    )


def main():
    print("Peak memory of one update, GiB, counted on fake tensors (not measured). P = 952.\n")
    print(
        f"{'B':>3} {'G':>3} {'C':>4}  {'checkpointing':14}{'beta':6}{'features':10}{'AdamW':11}"
        f"{'peak':>6}  fits on a card of ... GiB"
    )
    for update in UPDATES:
        print(table_line(update, sum(update_bytes(update).values()) / 2**30))
    parts = update_bytes(UPDATES[0]).items()
    first = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in parts)
    print(f"\nThe first line in parts: {first} GiB.")
    print(f"A card counts as holding a configuration if {RESERVE:.0f} GiB of it stays free.")
