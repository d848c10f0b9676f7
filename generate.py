"""Sampling: a whole update's completions at once, each prompt read once.

    1. prefill    all B prompts in one forward; their keys and values go into fixed buffers
    2. fan out    G rows per prompt, each drawing its own first token from its prompt's distribution
    3. decode     one token for every row per step; a row attends to its prompt's keys (stored once
                  for all G rows) and to its own, and nobody waits for the device between tokens
    4. compact    when every prompt has half its rows done, the others move up: the batch halves
    5. stop       when every row has met EOS (every few steps one looks), or at max_new_tokens

    ids = generate(model, prompts, num_samples=8, eos_token_id=tokenizer.eos_token_ids)

`Sampler` keeps what a training run needs again and again: a working copy of the weights, the
buffers, on a GPU the step as a CUDA graph. `generate` makes one for a single call.

Shapes: B prompts · G completions per prompt · R = B*G rows · P prompt length · C completion length
· D width · V vocabulary. This file needs torch, grpo.py and support/kv_cache.py.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from grpo import completion_mask
from support.kv_cache import LayerCache

BLOCK = 512  # words of the vocabulary that `draw` looks at together


@dataclass(frozen=True)
class Decoding:
    """How completions are drawn; the arguments of `generate`."""

    max_new_tokens: int = 512
    temperature: float = 1.0
    top_p: float = 1.0
    eos_token_id: int | tuple | None = None  # one id, or several of which any ends a row

    def __post_init__(self):
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if self.temperature < 0:
            raise ValueError(f"temperature must be at least 0, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")


def pick(weights, generator):
    """One index per row, each as likely as its weight is large: (R, n) -> (R, 1) int64."""
    ends = weights.cumsum(-1, dtype=torch.float64)
    uniform = torch.empty_like(ends[:, :1]).uniform_(generator=generator)  # (R, 1) in [0, 1)
    # right: the first whose sum is beyond the number, so never one of weight 0.
    index = torch.searchsorted(ends, uniform * ends[:, -1:], right=True)
    return index.clamp(max=weights.shape[-1] - 1)  # of NaN weights the search runs off the end


def draw(logits, temperature, top_p, generator):
    """One token per row: (R, V) float32 -> ids (R,), and their log-probabilities (R,).

    These are of the distribution that was drawn from. First a block of words is drawn, then one of
    its words: a running sum over all 150 000 would be slow. Temperature 0 is greedy, and its
    log-probabilities are those of temperature 1."""
    if temperature == 0:
        ids = logits.argmax(-1)
        return ids, logits.log_softmax(-1).gather(-1, ids[:, None]).squeeze(-1)
    logits = logits / temperature
    if top_p < 1:  # keep the likeliest tokens that together reach top_p, always the first
        ranked, order = logits.sort(dim=-1, descending=True)
        before = ranked.softmax(-1).cumsum(-1) - ranked.softmax(-1)
        logits = logits.scatter(-1, order, ranked.masked_fill(before >= top_p, -torch.inf))
    logps = logits.log_softmax(-1)
    words = F.pad(logps.exp(), (0, -logps.shape[-1] % BLOCK))
    words = words.unflatten(-1, (-1, BLOCK))  # (R, V/BLOCK, BLOCK)
    block = pick(words.sum(-1), generator)  # (R, 1)
    words = words.take_along_dim(block[..., None], dim=1).squeeze(1)  # (R, BLOCK)
    ids = (block * BLOCK + pick(words, generator)).clamp(max=logps.shape[-1] - 1)
    return ids.squeeze(-1), logps.gather(-1, ids).squeeze(-1)


class Sampler:
    """Sampling for B prompts x G completions, again and again, from a model that changes.

    model            the policy: as grpo.completion_logps describes it, and taking `positions`
    B, G             prompts per call (fewer are filled up), completions per prompt
    prompt_capacity  longest prompt; with decoding.max_new_tokens the size of the buffers
    decoding         a Decoding
    copy             a working copy of the model to sample from (bf16, say); `refresh` brings it up
                     to date. None: sample from the model itself
    replay           None, or a support.compiling.Replay, for decode steps as CUDA graphs
    """

    @torch.no_grad()
    def __init__(self, model, B, G, prompt_capacity, decoding, *, copy=None, replay=None):
        if G < 1:
            raise ValueError(f"num_samples must be at least 1, got {G}")
        self.source, self.model = model, model if copy is None else copy
        self.B, self.G, self.P, self.C = B, G, prompt_capacity, decoding.max_new_tokens
        self.decoding, self.replay, R = decoding, replay, B * G
        weight = self.model.embed_tokens.weight
        self.device, self.dtype = weight.device, weight.dtype
        self.generator = torch.Generator(self.device)
        self.eos = None  # (number of ids that end a row,); the first also fills up what is behind
        if decoding.eos_token_id is not None:
            self.eos = torch.tensor(decoding.eos_token_id, device=self.device).reshape(-1)

        # Everything a step reads and writes, at an address that stays.
        with self.device:
            self.step = torch.zeros(1, dtype=torch.long)
            self.row = torch.zeros(R, dtype=torch.long)  # the completion that each place works on
            self.done = torch.zeros(R, dtype=torch.bool)
            self.prompt_lengths = torch.zeros(R, dtype=torch.long)  # P of each row's prompt
            self.ids = torch.zeros(R, self.C, dtype=torch.long)
            self.logps = torch.zeros(R, self.C)
            # What no row may see: between a prompt's end and P, and own positions not yet written.
            self.blocked_keys = torch.zeros(R, self.P + self.C, dtype=torch.bool)
        # One token, for the shapes and types of what the model gives; not worth compiling.
        with torch.compiler.set_stance("force_eager"):
            hidden, kv = self.model(weight[None, :1], return_kv=True)
        self.logits = self.model.logits(hidden[0]).repeat(R, 1)  # (R, V), of the next token
        state = (self.step, self.blocked_keys)
        self.cache = [LayerCache(k, B, G, self.P, self.C, *state) for k, _ in kv]

    @torch.no_grad()
    def refresh(self):
        """Copy the model's weights into the working copy, in place: captured steps stay valid."""
        for ours, theirs in zip(self.model.parameters(), self.source.parameters()):
            if ours is not theirs:  # else the two share it, or are the same model
                ours.copy_(theirs)

    @torch.no_grad()
    def warm_up(self):
        """Run a step at every number of rows that compaction can lead to, before it counts."""
        self._prefill([self.model.embed_tokens.weight[: self.P]])
        G = self.G
        while G >= 1:
            self.step.zero_()
            self._run(self.B * G)
            G = G // 2

    def _decode(self, R):
        """Draw a token for the first R places, and make the logits of the one after it.

        In this order, as the logits of the first token come from the prompts."""
        temperature, top_p = self.decoding.temperature, self.decoding.top_p
        token, logp = draw(self.logits[:R], temperature, top_p, self.generator)
        if self.eos is not None:
            done = self.done[:R]
            token = torch.where(done, self.eos[0], token)  # after the end: EOS again
            done |= (token[:, None] == self.eos).any(-1)
        row = self.row[:R]
        self.ids[row, self.step] = token
        self.logps[row, self.step] = logp
        self.blocked_keys.index_fill_(1, self.P + self.step, False)
        embeds = self.model.embed_tokens(token[:, None])  # (R, 1, D)
        positions = (self.prompt_lengths[:R] + self.step)[:, None]  # (R, 1)
        hidden = self.model(embeds, past=self.cache, positions=positions)
        self.logits[:R] = self.model.logits(hidden[:, 0])
        self.step += 1

    def _run(self, R):
        if self.replay is None:
            return self._decode(R)
        written = (self.step, self.done, self.ids, self.logps, self.blocked_keys, self.logits)
        return self.replay(lambda: self._decode(R), R, written, self.generator)

    def _compact(self, G):
        """Half of each prompt's G places go on, with all rows that are unfinished -> G from now."""
        half = G // 2
        unfinished = ~self.done[: self.B * G].view(self.B, G)
        unfinished_first = unfinished.int().argsort(dim=1, descending=True, stable=True)
        places = unfinished_first[:, :half]  # (B, half), within each prompt's G
        rows = (torch.arange(self.B, device=self.device)[:, None] * G + places).flatten()
        for buffer in (self.row, self.done, self.prompt_lengths, self.logits, self.blocked_keys):
            buffer[: len(rows)] = buffer[rows]
        for layer in self.cache:
            layer.compact(places, G)
        return half

    def _prefill(self, prompts):
        """Read all prompts, and set all that a step reads to where the first token is drawn."""
        B, G, P, given = self.B, self.G, self.P, len(prompts)
        prompts = prompts + prompts[:1] * (B - given)
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=self.device)
        # Always of the buffers' shape, so that nothing is compiled again; prompts are padded on the
        # right, where causal attention does not look.
        padded = torch.stack([F.pad(prompt, (0, 0, 0, P - len(prompt))) for prompt in prompts])
        hidden, kv = self.model(padded.to(self.dtype), return_kv=True)
        for layer, (k, v) in zip(self.cache, kv):
            layer.prompt_keys.copy_(k)
            layer.prompt_values.copy_(v)
        last = hidden[torch.arange(B, device=self.device), lengths - 1]  # (B, D)

        # Rows 0..G-1 are prompt 0's, the next G prompt 1's, ... Places without a prompt are done.
        self.logits.copy_(self.model.logits(last).repeat_interleave(G, 0))
        self.prompt_lengths.copy_(lengths.repeat_interleave(G))
        self.row.copy_(torch.arange(B * G))
        self.done.copy_(self.row >= given * G)
        self.blocked_keys.fill_(True)
        self.blocked_keys[:, :P] = (
            torch.arange(P, device=self.device) >= self.prompt_lengths[:, None]
        )
        self.step.zero_()
        self.ids.fill_(0 if self.eos is None else self.eos[0])

    @torch.no_grad()
    def __call__(self, prompts, seed=None):
        """Prompts as in `generate` -> ids, and float32 log p (0 behind a row's end), (B, G, C)."""
        prompts, given, longest = list(prompts), len(prompts), max(map(len, prompts))
        if given > self.B or longest > self.P:
            sizes = f"{given} prompts of up to {longest} tokens; made for {self.B} of {self.P}"
            raise ValueError(f"this sampler got {sizes}")
        self.generator.manual_seed(torch.randint(2**62, ()).item() if seed is None else seed)
        self._prefill(prompts)
        # Asking whether rows are done makes the host wait for a GPU, so it asks now and then.
        G, every = self.G, 16 if self.device.type == "cuda" else 4
        for steps in range(1, self.C + 1):
            self._run(self.B * G)
            if self.eos is not None and steps % every == 0:
                unfinished = (~self.done[: self.B * G]).view(self.B, G).sum(1).max().item()
                if unfinished == 0:
                    break
                if unfinished <= G // 2:
                    G = self._compact(G)
        ids, logps = self.ids[: given * self.G, :steps], self.logps[: given * self.G, :steps]
        if self.eos is not None:  # cut to the longest row
            mask = completion_mask(ids, self.eos)
            steps, logps = int(mask.sum(1).max()), logps.masked_fill(~mask, 0.0)
        return tuple(x[:, :steps].reshape(given, self.G, steps).clone() for x in (ids, logps))


def sample(model, prompts, num_samples, decoding, seed=None):
    """As `generate`, with a Decoding -> ids and their log-probabilities, (B, G, C) each."""
    sampler = Sampler(model, len(prompts), num_samples, max(map(len, prompts)), decoding)
    return sampler(prompts, seed)


def generate(
    model,
    prompts,
    num_samples=1,
    max_new_tokens=512,
    temperature=1.0,
    top_p=1.0,
    eos_token_id=None,
    seed=None,
):
    """Sample completions of embedded prompts.

    prompts       (B, P, D), or a list of B tensors (P_i, D) of unequal length
    num_samples   G completions per prompt
    temperature   1 samples from the model's own distribution, 0 takes the likeliest token (greedy)
    top_p         < 1 samples from the smallest set of tokens with that probability; leave at 1 for
                  training, where log-probabilities must be those of the distribution sampled from
    eos_token_id  a row ends with its first EOS, and repeats EOS after it; one id, or several of
                  which any ends a row (the first is what is repeated); None: no row ends early
    seed          repeats the same samples on the same machine

    Returns ids (B, G, C) int64, C = the longest row."""
    decoding = Decoding(max_new_tokens, temperature, top_p, eos_token_id)
    return sample(model, prompts, num_samples, decoding, seed)[0]
