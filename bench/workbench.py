"""What the measures share: our model, its inputs with random content, and fair timing.

Shapes: B prompts · G completions per prompt · P prompt length · C completion length · T frames ·
D width · V vocabulary.
"""

import functools
import gc
import statistics
import time
from types import SimpleNamespace

import torch

import data
from bench.memory import PeakBytes
from bench.other import OtherModel
from bench.rows import NotHere, Unequal
from bench.sizes import SHAPES
from generate import Sampler
from model import AUDIO_TOKEN, VIDEO_TOKEN, HumanOmni
from support.compiling import Replay, compile_layers
from support.optimizer import set_trainable
from support.precision import autocast, compute_dtype, prepare_gpu

# Mean difference of log-probabilities up to which two arms are one model.
LOGP_GAP = {torch.float32: 1e-3, torch.bfloat16: 5e-2}


class Bench:
    """Models and inputs, each made when first asked for.

    flags: preset, device, repeats, and the sizes prompt_tokens, group, ... of the command line."""

    def __init__(self, flags):
        self.flags, self.device = flags, torch.device(flags.device)
        self.on_gpu = self.device.type == "cuda"
        self.dtype = compute_dtype(self.device)
        if self.on_gpu:
            prepare_gpu()

    def needs_gpu(self):
        if not self.on_gpu:
            raise NotHere("needs a GPU")

    @functools.cached_property
    def model(self):
        """The policy: float32 where it trains, the frozen encoders in the compute type."""
        torch.manual_seed(0)
        with self.device:
            model = HumanOmni(SHAPES[self.flags.preset])
        torch.nn.init.normal_(model.embed_tokens.weight, std=0.05)
        model.compute_dtype = self.dtype
        set_trainable(model)
        return self.compiled(model.eval(), dynamic=True)

    def compiled(self, model, dynamic):
        """The model with its layers compiled as train_grpo.py does it: on a GPU."""
        if self.on_gpu:
            compile_layers(model, dynamic)
        return model

    @property
    def vocab(self):
        return self.model.embed_tokens.num_embeddings

    @functools.cached_property
    def working(self):
        """What is sampled from: a bf16 copy on a GPU, in float32 the policy itself."""
        return self.compiled(self.frozen_copy(), dynamic=False) if self.on_gpu else None

    @functools.cached_property
    def reference(self):
        return self.compiled(self.frozen_copy(), dynamic=True)

    def frozen_copy(self):
        return self.model.frozen_copy(self.dtype)

    @functools.cached_property
    def other(self):
        """The other arm, with our weights: a policy, and a frozen copy of it.

        On a GPU all of it is bf16, gradients and AdamW's moments too: less work than the float32
        masters of our arm."""
        return SimpleNamespace(
            policy=OtherModel(self.model, self.dtype, trains=True),
            reference=OtherModel(self.model, self.dtype, trains=False),
        )

    def forget_other(self):
        """Free the other arm: what is measured next is our memory."""
        self.__dict__.pop("other", None)
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()

    # ---- inputs

    def clips(self, B):
        """Random frames (B, T, 3, S, S) and log-mel (B, mels, 2*A)."""
        c, random = self.model.configs, torch.Generator(self.device).manual_seed(1)
        size, T = c["siglip"]["image_size"], c["llm"]["num_frames"]
        mel = (B, c["whisper"]["num_mel_bins"], 2 * c["whisper"]["max_source_positions"])
        frames = torch.rand(B, T, 3, size, size, generator=random, device=self.device)
        return frames * 2 - 1, torch.rand(mel, generator=random, device=self.device)

    @functools.cached_property
    def prompt_ids(self):
        """Text around the two placeholders: P tokens in all once the media are in."""
        media = self.model.prompt_length([VIDEO_TOKEN, AUDIO_TOKEN])
        text = self.flags.prompt_tokens - media
        if text < 3:
            raise ValueError(f"--prompt-tokens must be at least {media + 3}: media take {media}")
        return [5, VIDEO_TOKEN, 6, AUDIO_TOKEN, *range(7, 5 + text)]

    @torch.no_grad()
    def encode(self, clips):
        """Clips through the towers -> data.Batch of their prompts."""
        video, audio = self.model.encode(*clips)
        return self.batch([self.prompt_ids] * len(video), list(video), list(audio))

    def batch(self, prompt_ids, video, audio):
        B = len(prompt_ids)
        question = torch.arange(20, device=self.device)[None]
        (reading,) = self.model.read_question(question, torch.ones_like(question))
        return data.Batch(
            examples=[data.Example(None, "", "", "video_audio")] * B,
            prompt_ids=prompt_ids,
            prompt_lengths=[self.flags.prompt_tokens] * B,
            question=[reading] * B,
            video=video,
            audio=audio,
        )

    @torch.no_grad()
    def prompts(self, B):
        """B embedded prompts (P, D) in the compute type."""
        with autocast(self.model):
            prompts = data.embed(self.model, self.encode(self.clips(B)))
        return [prompt.to(self.dtype) for prompt in prompts]

    def random_ids(self, *shape):
        return torch.randint(self.vocab, shape, device=self.device)

    def sampler(self, B, G, decoding, kind=Sampler, **options):
        """A sampler as train_grpo.py makes it: on a GPU compiled, replayed as a CUDA graph."""
        replay = Replay() if self.on_gpu else None
        options = {"copy": self.working, "replay": replay, **options}
        return kind(self.model, B, G, self.flags.prompt_tokens, decoding, **options)

    def eager_sampler(self, B, G, decoding):
        copy = self.frozen_copy() if self.on_gpu else None
        return self.sampler(B, G, decoding, copy=copy, replay=None)

    # ---- comparing and timing

    def close(self, ours, other):
        """Log-probabilities, or the like, of both arms -> how far they are apart, in words.

        Too far apart: Unequal."""
        gap = (ours.detach().float() - other.detach().float()).abs().mean().item()
        if not gap <= LOGP_GAP[self.dtype]:
            raise Unequal(f"mean difference {gap:.1e}")
        return f"equal: mean difference {gap:.0e}"

    def synchronize(self):
        if self.on_gpu:
            torch.cuda.synchronize()

    def seconds(self, function):
        self.synchronize()
        start = time.perf_counter()
        function()
        self.synchronize()
        return time.perf_counter() - start

    def medians(self, *arms):
        """Median seconds of each function, timed in turns after one call of each to warm up."""
        for arm in arms:
            arm()
        times = [[self.seconds(arm) for arm in arms] for _ in range(self.flags.repeats)]
        return [statistics.median(column) for column in zip(*times)]

    def peak_bytes(self, function):
        """Largest sum of bytes that function() has alive at once, besides what was there before."""
        if not self.on_gpu:
            with PeakBytes() as counter:
                function()
            return counter.peak
        gc.collect()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        self.synchronize()
        return torch.cuda.max_memory_allocated() - before
