"""What fits on a card: peak memory of one GRPO update at the published 0.5B shape, counted without a GPU.

    python bench.py --fit        one table: configurations by peak memory, and the cards that hold them

How the numbers are obtained: the code itself runs on fake tensors, which have shapes and types but no content, in bf16
autocast as on a GPU, while every byte of every storage that lives is counted. So these are not measurements: what a card
needs besides (its context, kernels' workspaces, fragmentation) is allowed for with RESERVE. Persistent are weights, AdamW's
moments, the sampler's buffers and one decode step's intermediates, which its CUDA graph keeps; on top comes the largest of
the phases encode, rollout, reference, backward and optimizer, of which the last two hold gradients.

Shapes: B prompts · G completions per prompt · P prompt length · C completion length · T video frames.
"""

import functools
import weakref

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from generate import Sampler
from grpo import completion_logps
from model import HumanOmni

FULL_SIZE = {  # HumanOmni-0.5B
    "llm": dict(hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2,
                rms_norm_eps=1e-6, rope_theta=1e6, vocab_size=151936, tie_word_embeddings=True, num_frames=8,
                model_type="HumanOmni_qwen2", architectures=["HumanOmniQwen2ForCausalLM"], mm_projector_type="all_in_one_small",
                mm_audio_projector_type="mlp2x_gelu", mm_vision_select_layer=-2, mm_hidden_size=768, audio_hidden_size=1280),
    "siglip": dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072, image_size=224,
                   patch_size=16, layer_norm_eps=1e-6),
    "whisper": dict(d_model=1280, encoder_layers=32, encoder_attention_heads=20, encoder_ffn_dim=5120, num_mel_bins=128,
                    max_source_positions=1500),
    "bert": dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072, vocab_size=30522,
                 max_position_embeddings=512, type_vocab_size=2, layer_norm_eps=1e-12),
}
TEXT = 60  # tokens of the prompt that are neither video nor audio: P = 392 + 500 + 60 = 952
CARDS = (8, 12, 16, 24, 48, 80)  # GiB
RESERVE = 1.0  # GiB of a card that the update does not get: CUDA context, workspaces, fragmentation
UPDATES = 15_306 * 2 // 16 + 1  # the paper's RLVR stage: clips x epochs, 16 prompts per update


class PeakBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operations make, while they live: `live` now, `peak` so far.

    Storages that were there before count nothing. `largest`: elements of the largest tensor made."""

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
    """The policy as it trains (float32, frozen encoders in bf16) and a bf16 copy: reference, or what sampling reads."""
    def build(dtype):
        torch.set_default_dtype(dtype)
        try:
            return HumanOmni(FULL_SIZE)
        finally:
            torch.set_default_dtype(torch.float32)

    policy, copy = build(torch.float32), build(torch.bfloat16).requires_grad_(False)
    policy.vision_tower, policy.audio_tower, policy.bert_model = copy.vision_tower, copy.audio_tower, copy.bert_model
    # A CPU, as which the fake device counts, would make a float32 copy of a bf16 head; a GPU does not (model.logits).
    copy.logits = lambda hidden: hidden.new_empty(*hidden.shape[:-1], copy.embed_tokens.num_embeddings, dtype=torch.float32)
    return policy, copy


def fake_prompts(model, B):
    """B embedded prompts (B, P, D) from tower features, with gradient as in training."""
    video, audio = torch.zeros(B, 8, 196, 768, dtype=torch.bfloat16), torch.zeros(B, 500, 1280, dtype=torch.bfloat16)
    ids = torch.zeros(B, 50, dtype=torch.long)
    video = model.video_tokens(video, model.branch_weights(ids, torch.ones_like(ids)))
    text = model.embed_tokens(torch.zeros(B, TEXT, dtype=torch.long))
    return torch.cat([tokens.to(text.dtype) for tokens in (video, model.audio_projector(audio), text)], dim=1)


def counted(function):
    """Peak bytes that function() makes besides what was there, and what it returns."""
    counter = PeakBytes()
    with counter:
        result = function()
    return counter.peak, result


@functools.cache
def weight_bytes():
    """-> bytes of: the policy with its encoders, of its parameters that train, of a bf16 copy of those."""
    policy, copy = fake_models()
    trainable = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    return sum(p.nbytes for p in policy.parameters()), 4 * trainable, 2 * trainable


@functools.cache
def encode_bytes(B):
    _, copy = fake_models()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        return counted(lambda: copy.encode(torch.zeros(B, 8, 3, 224, 224), torch.zeros(B, 128, 3000)))[0]


@functools.cache
def rollout_bytes(B, G, C):
    """-> bytes of the sampler's buffers with what its CUDA graph keeps, and of the prefill on top."""
    _, copy = fake_models()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        _, prompts = counted(lambda: fake_prompts(copy, B))
        counter = PeakBytes()
        with counter:
            sampler = OneStep(copy, B, G, prompts.shape[1], C)
            buffers, counter.peak = counter.live, counter.live
            sampler(prompts, seed=0)
    return buffers + sampler.step_bytes, counter.peak - buffers


@functools.cache
def scoring_bytes(G, C, trains, checkpointing=False):
    """Scoring one group: without gradient under the copy, or under the policy with backward onto gradients that exist."""
    policy, copy = fake_models()
    model = policy if trains else copy
    model.gradient_checkpointing = checkpointing
    ids = torch.zeros(G, C, dtype=torch.long)

    def score():
        with torch.autocast("cpu", torch.bfloat16):
            logps = completion_logps(model, fake_prompts(model, 1)[0], ids)
        if trains:
            logps.sum().backward()

    with torch.set_grad_enabled(trains):
        if trains and policy.norm.weight.grad is None:
            score()  # makes the gradients
        return counted(score)[0]


def update_bytes(B, G, C, checkpointing=False, beta=True, cached=False, offload=False):
    """-> {part: bytes} of one update; needs an active FakeTensorMode. cached: all features come from the feature cache;
    the towers are loaded all the same. offload: AdamW's moments are on the GPU only for its step."""
    policy, trainable, copy = weight_bytes()
    buffers, prefill = rollout_bytes(B, G, C)
    reference = scoring_bytes(G, C, trains=False) if beta else 0
    backward = trainable + scoring_bytes(G, C, True, checkpointing)  # gradients, and what their making needs
    phases = {"encode": 0 if cached else encode_bytes(B), "rollout": prefill, "reference": reference, "backward": backward,
              "optimizer": trainable + (2 * trainable if offload else 0)}
    parts = {"policy and towers": policy, "AdamW": 0 if offload else 2 * trainable, "working copy": copy, "reference": copy if beta else 0,
             "sampler": buffers, f"largest phase ({max(phases, key=phases.get)})": max(phases.values())}
    return parts


CONFIGURATIONS = [  # B, G, C, checkpointing, beta, cached, optimizer offloaded
    (16, 8, 512, False, True, False), (16, 8, 512, False, True, True), (16, 8, 512, False, False, False),
    (16, 8, 512, True, True, False), (16, 8, 512, True, False, False), (16, 8, 256, False, True, False),
    (16, 8, 256, True, True, False), (16, 4, 512, False, True, False), (16, 16, 512, True, True, False),
    (4, 8, 512, True, True, False), (4, 4, 256, True, True, False), (1, 2, 256, True, False, False),
    (16, 8, 512, True, True, False, True), (16, 8, 512, True, False, False, True), (8, 8, 256, True, False, False, True),
]


def main():
    print("Peak memory of one update, GiB, counted on fake tensors (not measured). P = 952.\n")
    print(f"{'B':>3} {'G':>3} {'C':>4}  {'checkpointing':14}{'beta':6}{'features':10}{'AdamW':11}{'peak':>6}  fits on a card of ... GiB")
    with FakeTensorMode():
        for B, G, C, checkpointing, beta, cached, *offload in CONFIGURATIONS:
            parts = update_bytes(B, G, C, checkpointing, beta, cached, *offload)
            peak = sum(parts.values()) / 2**30
            cards = ", ".join(str(card) for card in CARDS if peak + RESERVE <= card) or "none of these"
            print(f"{B:3} {G:3} {C:4}  {'yes' if checkpointing else 'no':14}{'0.04' if beta else '0':6}"
                  f"{'cached' if cached else 'towers':10}{'offloaded' if offload else 'on the GPU':11}{peak:6.1f}  {cards}")
        parts = update_bytes(*CONFIGURATIONS[0])
    print("\nThe first line in parts: " + ", ".join(f"{name} {size / 2**30:.2f}" for name, size in parts.items()) + " GiB.")
    print(f"A card counts as holding a configuration if {RESERVE:.0f} GiB of it stays free.")
