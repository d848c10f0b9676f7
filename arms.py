"""The two arms that bench.py compares: this code, and the usual way with `transformers`; models, inputs, updates.

Ours: the policy with float32 weights, a bf16 working copy to sample from, one prefill per prompt, a group scored against
one prompt. The other: transformers' Qwen2ForCausalLM with the same weights, eager `generate`, the prompt repeated for every
completion, logits at every position; towers and projectors are this code's in both arms, run as often as each arm does.

Shapes: B prompts · G completions per prompt · R = B*G rows · P prompt length · C completion length · T video frames ·
D width · V vocabulary.
"""

import functools
import gc
import importlib.util
import statistics
import time
from contextlib import nullcontext
from types import SimpleNamespace

import torch

from fit import FULL_SIZE, PeakBytes
from generate import Sampler
from grpo import completion_logps, completion_mask, group_advantages, grpo_loss
from model import AUDIO_TOKEN, VIDEO_TOKEN, HumanOmni

SMALL_SIZE = {  # the same architecture; towers, language model and head in about the published proportions
    "llm": {**FULL_SIZE["llm"], "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 8,
            "vocab_size": 8192, "mm_hidden_size": 128, "audio_hidden_size": 256},
    "siglip": {**FULL_SIZE["siglip"], "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 512,
               "image_size": 64, "patch_size": 8},
    "whisper": {**FULL_SIZE["whisper"], "d_model": 256, "encoder_layers": 4, "encoder_attention_heads": 4, "encoder_ffn_dim": 1024,
                "max_source_positions": 150},
    "bert": {**FULL_SIZE["bert"], "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128},
}
SHAPES = {"small": SMALL_SIZE, "full": FULL_SIZE}
LOGP_GAP = {torch.float32: 1e-3, torch.bfloat16: 5e-2}  # mean difference of log-probabilities up to which two arms are one model


class NotHere(Exception):
    """This measure cannot run on this machine; the message says what it needs."""


class Unequal(Exception):
    """The arms do not compute the same, so that a ratio would mean nothing."""


def need(package):
    if importlib.util.find_spec(package) is None:
        raise NotHere(f"needs {package}: pip install {package}")


class Bench:
    """Models and inputs that the measures share, each made when first asked for."""

    def __init__(self, flags):
        self.flags, self.device = flags, torch.device(flags.device)
        self.on_gpu = self.device.type == "cuda"
        self.dtype = torch.bfloat16 if self.on_gpu else torch.float32
        if self.on_gpu:
            torch.set_float32_matmul_precision("high")
            torch._dynamo.config.recompile_limit = 64  # several samplers, each compiled for several numbers of rows

    def compute(self):
        """As in training: bf16 arithmetic over float32 weights on a GPU."""
        return torch.autocast("cuda", torch.bfloat16) if self.on_gpu else nullcontext()

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
        for encoder in (model.vision_tower, model.audio_tower, model.bert_model):
            encoder.requires_grad_(False).to(self.dtype)
        return model.eval()

    @property
    def vocab(self):
        return self.model.embed_tokens.num_embeddings

    @functools.cached_property
    def working(self):
        """What is sampled from: a bf16 copy on a GPU, in float32 the policy itself."""
        return self.model.trainable_copy(self.dtype) if self.on_gpu else None

    @functools.cached_property
    def reference(self):
        return self.model.trainable_copy(self.dtype)

    @functools.cached_property
    def other(self):
        """The other arm: transformers' Qwen2 with our weights, under our projectors, and a frozen copy of both.

        On a GPU all of it is bf16, gradients and AdamW's moments too: less work than the float32 masters of our arm."""
        need("transformers")
        import transformers
        c = self.model.configs["llm"]
        names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "rms_norm_eps",
                 "vocab_size", "tie_word_embeddings")
        config = transformers.Qwen2Config(**{name: c[name] for name in names}, max_position_embeddings=32768, bos_token_id=None,
                                          eos_token_id=None, rope_parameters={"rope_type": "default", "rope_theta": c["rope_theta"]})

        def build(trains):
            parts = self.model.trainable_copy(self.dtype)  # for its projectors
            llm = transformers.Qwen2ForCausalLM(config).to(self.device, self.dtype).eval()
            ours = {f"model.{name}": tensor for name, tensor in parts.state_dict().items()
                    if name.startswith(("embed_tokens.", "layers.", "norm."))}
            missing, unexpected = llm.load_state_dict(ours, strict=False)
            if unexpected or set(missing) - {"lm_head.weight"}:
                raise Unequal(f"weights do not map: {missing} {unexpected}")
            parts.layers, parts.norm, parts.embed_tokens = None, None, llm.model.embed_tokens
            for module in (llm, parts.mm_projector, parts.audio_projector, parts.bert_gate):
                module.requires_grad_(trains)
            return SimpleNamespace(llm=llm, parts=parts)

        return SimpleNamespace(policy=build(True), reference=build(False))

    def forget_other(self):
        """Free the other arm: what is measured next is our memory."""
        self.__dict__.pop("other", None)
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()

    def clips(self, B):
        """Random frames (B, T, 3, S, S) and log-mel (B, mels, 2*A)."""
        c, random = self.model.configs, torch.Generator(self.device).manual_seed(1)
        size, T = c["siglip"]["image_size"], c["llm"]["num_frames"]
        mel = (B, c["whisper"]["num_mel_bins"], 2 * c["whisper"]["max_source_positions"])
        return (torch.rand(B, T, 3, size, size, generator=random, device=self.device) * 2 - 1,
                torch.rand(mel, generator=random, device=self.device))

    @functools.cached_property
    def prompt_ids(self):
        """Text around the two placeholders, so that the whole prompt has P tokens once the media are in."""
        c = self.model.configs
        media = c["llm"]["num_frames"] * (c["siglip"]["image_size"] // c["siglip"]["patch_size"]) ** 2 // 4
        text = self.flags.prompt_tokens - media - c["whisper"]["max_source_positions"] // 3
        if text < 3:
            raise ValueError(f"--prompt-tokens must be at least {self.flags.prompt_tokens - text + 3}: the media take that many")
        return [5, VIDEO_TOKEN, 6, AUDIO_TOKEN, *range(7, 5 + text)]

    def embed(self, model, features):
        """Tower features of B clips -> B prompts (P, D), through the projectors of `model`."""
        B = len(features[0])
        question = torch.arange(20, device=self.device).expand(B, -1)
        return model.embed_prompts([self.prompt_ids] * B, *features, question, torch.ones_like(question))

    @torch.no_grad()
    def prompts(self, B):
        with self.compute():
            return [prompt.to(self.dtype) for prompt in self.embed(self.model, self.model.encode(*self.clips(B)))]

    def sampler(self, B, G, C, kind=Sampler, compiled=None, **options):
        """A sampler as train_grpo.py makes it: on a GPU compiled and replayed as a CUDA graph."""
        return kind(self.model, B, G, self.flags.prompt_tokens, C, copy=self.working,
                    compiled=self.on_gpu if compiled is None else compiled, **options)

    def generate(self, llm, prompts, C, **options):
        """The other arm's sampling: R prompts (P, D), repeated already -> ids (R, C)."""
        embeds = torch.stack(prompts)
        mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=self.device)
        settings = dict(do_sample=True, temperature=1.0, top_k=0, top_p=1.0) | options
        return llm.generate(inputs_embeds=embeds, attention_mask=mask, max_new_tokens=C, eos_token_id=None, pad_token_id=0, **settings)

    def repeated_logps(self, llm, prompts, ids):
        """The original's scoring: G prompts (G, P, D) and ids (G, C) -> (G, C). Logits at every position, in the weights' type."""
        logits = llm(inputs_embeds=torch.cat([prompts, llm.model.embed_tokens(ids)], dim=1), use_cache=False).logits
        # row by row, as there: a log-softmax over all rows would need as much memory again
        return torch.stack([row.log_softmax(-1).gather(-1, i[:, None]).squeeze(-1)
                            for row, i in zip(logits[:, prompts.shape[1] - 1:-1], ids)])

    def close(self, ours, other):
        """Log-probabilities, or the like, of both arms -> how far they are apart, in words; too far is an error."""
        gap = (ours.detach().float() - other.detach().float()).abs().mean().item()
        if not gap <= LOGP_GAP[self.dtype]:
            raise Unequal(f"mean difference {gap:.1e}")
        return f"equal: mean difference {gap:.0e}"

    @torch.no_grad()
    def check_sampling(self, B, C):
        """Same distribution? Our samples' log-probabilities under both models; in float32 greedy tokens too."""
        G, llm, prompts = self.flags.group, self.other.policy.llm, self.prompts(B)
        ids, logps = self.sampler(B, G, min(C, 64), compiled=False)(prompts, seed=0)
        theirs = torch.stack([self.repeated_logps(llm, prompt.expand(G, -1, -1), rows) for prompt, rows in zip(prompts, ids)])
        outcome = self.close(logps, theirs)
        if self.on_gpu:  # in bf16 ties go either way
            return outcome
        ours = self.sampler(B, 1, C, temperature=0)(prompts)[0][:, 0]
        if not torch.equal(ours, self.generate(llm, prompts, C, do_sample=False, temperature=None, top_k=None, top_p=None)):
            raise Unequal("greedy tokens differ")
        return f"greedy tokens equal; {outcome}"

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
        if self.on_gpu:
            gc.collect()
            torch.cuda.empty_cache()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            function()
            self.synchronize()
            return torch.cuda.max_memory_allocated() - before
        with PeakBytes() as counter:
            function()
        return counter.peak


class ForcedLengths(Sampler):
    """Ends each row at a length given beforehand, EOS included, whatever the model says: lengths (R,)."""

    def __init__(self, *args, lengths, **options):
        self.ends = None
        super().__init__(*args, **options)
        self.ends = lengths.to(self.device) - 1  # at a fixed address, as all that a CUDA graph reads

    def _decode(self, R):
        ended = self.step >= self.ends[self.row[:R]]
        self.logits[:R, self.eos] = ended * 2e9 - 1e9
        super()._decode(R)


def forced_lengths(R, longest):
    """R lengths spread evenly over 1..longest, mean longest / 2, in an order that is always the same: (R,)."""
    lengths = torch.linspace(1, longest, R).long()
    return lengths[torch.randperm(R, generator=torch.Generator().manual_seed(0))]


class Update:
    """Our arm's GRPO update of B clips, the steps of train_grpo.py, from pixels and log-mel to the optimizer, rewards random.

    lengths (B*G,): of the completions, or None: all of C tokens. `seconds`: of the last update's phases. The learning rate
    is 0, so that all measures see the same weights; the work is the same."""

    def __init__(self, bench, B, lengths=None):
        flags = bench.flags
        self.bench, self.B, self.G, self.clips = bench, B, flags.group, bench.clips(B)
        self.eos = None if lengths is None else 2
        options = {} if lengths is None else dict(kind=ForcedLengths, lengths=lengths, eos_token_id=self.eos)
        self.parameters = [p for p in bench.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=0.0, weight_decay=0.0, fused=True)
        self.sampler = bench.sampler(B, self.G, flags.completion, **options)
        if lengths is not None:
            self.sampler.warm_up()  # rows will be compacted

    def score(self, model, b, ids):
        prompt, = self.bench.embed(model, [feature[b:b + 1] for feature in self.features])
        return completion_logps(model, prompt, ids[b])

    def __call__(self):
        bench, model, B, G = self.bench, self.bench.model, self.B, self.G
        self.seconds, self.mark = {}, time.perf_counter()
        with torch.no_grad(), bench.compute():
            self.features = model.encode(*self.clips)
            self.end("encode")
            self.sampler.refresh()
            ids, _ = self.sampler(bench.embed(model, self.features), seed=0)  # (B, G, C)
        mask = completion_mask(ids.flatten(0, 1), self.eos).view(ids.shape)
        advantages = group_advantages(torch.rand(B, G, generator=torch.Generator().manual_seed(0))).to(bench.device)
        self.end("rollout")
        with torch.no_grad(), bench.compute():
            ref_logps = [self.score(bench.reference, b, ids) for b in range(B)]
        self.end("reference")
        for b in range(B):
            with bench.compute():
                logps = self.score(model, b, ids)
            loss, parts = grpo_loss(logps, None, ref_logps[b], advantages[b], mask[b], total=B * G)
            loss.backward()
            loss.item(), parts["kl"].item(), parts["clip_share"].item()  # for the log
        self.end("backward")
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0).item()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.end("optimizer")

    def end(self, phase):
        self.bench.synchronize()
        now = time.perf_counter()
        self.seconds[phase], self.mark = now - self.mark, now


class OtherUpdate:
    """The other arm's update: `generate` over repeated prompts, scoring with the prompt repeated, logits at every position.

    encode_again: as the original, each completion's clip goes through both towers again for policy and for reference."""

    def __init__(self, bench, B, encode_again):
        self.bench, self.B, self.encode_again, self.clips = bench, B, encode_again, bench.clips(B)
        policy = bench.other.policy
        self.parameters = list(dict.fromkeys(p for part in (policy.llm, policy.parts) for p in part.parameters() if p.requires_grad))
        self.optimizer = torch.optim.AdamW(self.parameters, lr=0.0, weight_decay=0.0, fused=True)

    def score(self, arm, b, ids):
        """(G, C) of prompt b, embedded G times by the projectors too where the original does."""
        G = self.bench.flags.group
        features = [feature[b:b + 1] for feature in self.features]
        if self.encode_again:
            features = self.bench.model.encode(*(medium[b:b + 1].repeat_interleave(G, 0) for medium in self.clips))
        prompts = torch.stack(self.bench.embed(arm.parts, features))
        return self.bench.repeated_logps(arm.llm, prompts.expand(G, -1, -1), ids[b])

    def __call__(self):
        bench, B, G, arms = self.bench, self.B, self.bench.flags.group, self.bench.other
        with torch.no_grad():
            self.features = bench.model.encode(*self.clips)
            prompts = bench.embed(arms.policy.parts, self.features)
            ids = bench.generate(arms.policy.llm, [p for p in prompts for _ in range(G)], bench.flags.completion).view(B, G, -1)
            ref_logps = [self.score(arms.reference, b, ids) for b in range(B)]
        advantages = group_advantages(torch.rand(B, G, generator=torch.Generator().manual_seed(0))).to(bench.device)
        mask = torch.ones_like(ids, dtype=torch.bool)
        for b in range(B):
            loss, _ = grpo_loss(self.score(arms.policy, b, ids).float(), None, ref_logps[b].float(), advantages[b], mask[b],
                                total=B * G)
            loss.backward()
            loss.item()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0).item()
        self.optimizer.step()
        self.optimizer.zero_grad()
