"""Sampling: a whole update's completions at once, each prompt read once, no wait for the device between tokens.

    1. prefill     all B prompts in one forward; their keys and values go into buffers of fixed size at a fixed place
    2. fan out     G rows per prompt, each drawing its own first token from the prompt's one distribution
    3. decode      one token for every row per step; a row attends to its prompt's keys (stored once for all G rows)
                   and to its own
    4. compact     when every prompt has half its rows done, the others move together and the batch halves
    5. stop        when every row has met EOS, or at max_new_tokens

    ids = generate(model, prompts, num_samples=8, max_new_tokens=512, eos_token_id=tokenizer.eos_token_id)

`Sampler` keeps what a training run needs again and again: a working copy of the weights in the compute type, the
buffers, the compiled step, which a GPU replays as a CUDA graph. `generate` makes one for a single call, not compiled.

Shapes: B prompts · G completions per prompt · R = B*G rows · P prompt length · C completion length · D width ·
V vocabulary; hd head width.
"""

import torch
from torch.nn.utils.rnn import pad_sequence


class LayerCache:
    """One layer's keys and values while decoding: of the B prompts, and of the rows' own tokens.

    Both are buffers of fixed size, so that nothing is compiled or captured again when lengths change."""

    def __init__(self, keys, B, G, P, C, state):
        """keys (B, kv_heads, L, hd): any, for their shape and type; state: the sampler, for `step` and `hidden_keys`."""
        kv_heads, hd = keys.shape[1], keys.shape[3]
        self.prompt_keys, self.prompt_values = (keys.new_zeros(B, kv_heads, P, hd) for _ in range(2))
        self.keys, self.values = (keys.new_zeros(B * G, kv_heads, C, hd) for _ in range(2))
        self.state = state

    def attend(self, q, k, v):
        """One new token per row: q (R, heads, 1, hd), k, v (R, kv_heads, 1, hd) -> (R, heads, 1, hd).

        One softmax over two sets of scores. The G rows of a prompt, and the query heads that share a key head,
        are folded into one axis, so that the prompt's keys are read once, not G times, and never copied."""
        R, heads, _, hd = q.shape
        B, kv_heads, P, _ = self.prompt_keys.shape
        G, shared = R // B, heads // kv_heads
        keys, values = self.keys[:R], self.values[:R]  # after compaction, fewer rows than there is room for
        keys.index_copy_(2, self.state.step, k)
        values.index_copy_(2, self.state.step, v)

        def by_prompt(x):  # (R, kv_heads, shared, n) -> (B, kv_heads, G*shared, n)
            return x.unflatten(0, (B, G)).transpose(1, 2).flatten(2, 3)

        def by_row(x):  # and back
            return x.unflatten(2, (G, shared)).transpose(1, 2).flatten(0, 1)

        q = q.view(R, kv_heads, shared, hd) * hd**-0.5
        to_prompt = by_row(by_prompt(q) @ self.prompt_keys.transpose(2, 3))  # (R, kv_heads, shared, P)
        to_own = q @ keys.transpose(2, 3)  # (R, kv_heads, shared, C)
        scores = torch.cat([to_prompt, to_own], dim=-1).float()
        weights = scores.masked_fill(self.state.hidden_keys[:R], -torch.inf).softmax(-1).to(q.dtype)
        on_prompt, on_own = weights.split([P, weights.shape[-1] - P], dim=-1)
        return (by_row(by_prompt(on_prompt) @ self.prompt_values) + on_own @ values).reshape(R, heads, 1, hd)


def draw(logits, temperature, top_p, generator):
    """One token per row: (R, V) float32 -> ids (R,), and their log-probabilities under the distribution drawn from.

    Division by exponential noise and arg-max draw exactly from the softmax (the Gumbel trick) without a sort and
    without waiting for the device. Temperature 0 is greedy."""
    if temperature == 0:
        ids = logits.argmax(-1)
        return ids, logits.log_softmax(-1).gather(-1, ids[:, None]).squeeze(-1)
    logits = logits / temperature
    if top_p < 1:  # keep the likeliest tokens that together reach top_p, always the first
        ranked, order = logits.sort(dim=-1, descending=True)
        before = ranked.softmax(-1).cumsum(-1) - ranked.softmax(-1)
        logits = logits.scatter(-1, order, ranked.masked_fill(before >= top_p, -torch.inf))
    logps = logits.log_softmax(-1)
    noise = torch.empty_like(logps).exponential_(generator=generator)
    ids = (logps.exp() / noise).argmax(-1)
    return ids, logps.gather(-1, ids[:, None]).squeeze(-1)


class Sampler:
    """Sampling for B prompts x G completions, again and again, from a model that changes in between.

    model           the policy: a model with the interface that grpo.completion_logps describes, and `positions`
    B, G            prompts per call (fewer are filled up) and completions per prompt
    prompt_capacity longest prompt, max_new_tokens longest completion: the buffers are made for these, at once
    copy            a working copy of the model to sample from (bf16, say); `refresh` brings it up to date.
                    None: sample from the model itself
    compiled        compile the decode step, and on a GPU capture it as a CUDA graph, once per number of rows
    """

    @torch.no_grad()
    def __init__(self, model, B, G, prompt_capacity, max_new_tokens, *, temperature=1.0, top_p=1.0, eos_token_id=None,
                 copy=None, compiled=False):
        if G < 1 or max_new_tokens < 1:
            raise ValueError(f"num_samples and max_new_tokens must be at least 1, got {G} and {max_new_tokens}")
        if temperature < 0 or not 0 < top_p <= 1:
            raise ValueError(f"temperature must be >= 0 and top_p in (0, 1], got {temperature} and {top_p}")
        self.source, self.model = model, model if copy is None else copy
        self.B, self.G, self.P, self.C = B, G, prompt_capacity, max_new_tokens
        self.temperature, self.top_p, self.eos = temperature, top_p, eos_token_id
        weight = next(self.model.embed_tokens.parameters())
        R, device, self.dtype = B * G, weight.device, weight.dtype
        self.device, self.generator = device, torch.Generator(device)
        # Everything a step reads and writes, at an address that stays.
        self.step = torch.zeros(1, dtype=torch.long, device=device)
        self.row = torch.zeros(R, dtype=torch.long, device=device)  # which of the R completions each place works on
        self.done = torch.zeros(R, dtype=torch.bool, device=device)
        self.lengths = torch.zeros(R, dtype=torch.long, device=device)  # of the rows' prompts
        self.ids = torch.zeros(R, self.C, dtype=torch.long, device=device)
        self.logps = torch.zeros(R, self.C, device=device)
        # Keys no row may see: padding between a prompt's end and P; own positions not yet written.
        self.hidden_keys = torch.ones(R, 1, 1, self.P + self.C, dtype=torch.bool, device=device)
        hidden, kv = self.model(torch.zeros(1, 1, weight.shape[1], dtype=self.dtype, device=device), return_kv=True)
        self.logits = self.model.logits(hidden[0]).repeat(R, 1)  # (R, V), of the next token
        self.cache = [LayerCache(k, B, G, self.P, self.C, self) for k, _ in kv]
        self.compiled, self.graphs = compiled, {}
        self.pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
        self.forward = torch.compile(self._forward, dynamic=False) if compiled else self._forward

    @torch.no_grad()
    def refresh(self):
        """Copy the model's weights into the working copy, in place: what was captured stays valid."""
        if self.model is not self.source:
            for ours, theirs in zip(self.model.parameters(), self.source.parameters()):
                if ours is not theirs:
                    ours.copy_(theirs)

    @torch.no_grad()
    def warm_up(self):
        """Compile, and capture, for every number of rows that compaction can lead to; the first rollout then starts at once."""
        G = self.G
        while self.compiled and G >= 1:
            self.step.zero_()
            self._run(self.B * G)
            G = G // 2

    def _forward(self, token, positions):
        hidden = self.model(self.model.embed_tokens(token[:, None]), past=self.cache, positions=positions[:, None])
        return self.model.logits(hidden[:, 0])  # (R, V)

    def _decode(self, R):
        """Draw a token for the first R places, and make the logits of the one after it."""
        token, logp = draw(self.logits[:R], self.temperature, self.top_p, self.generator)
        done = self.done[:R]
        if self.eos is not None:
            token = token.masked_fill(done, self.eos)  # after the end: EOS again
            done |= token == self.eos
        row = self.row[:R]
        self.ids[row, self.step] = token
        self.logps[row, self.step] = logp
        self.hidden_keys.index_fill_(3, self.P + self.step, False)
        self.logits[:R] = self.forward(token, self.lengths[:R] + self.step)
        self.step += 1

    def _run(self, R):
        """One step, replayed from a CUDA graph on a GPU."""
        if not (self.compiled and self.device.type == "cuda"):
            return self._decode(R)
        if R not in self.graphs:
            state = [t.clone() for t in (self.step, self.done, self.ids, self.logps, self.hidden_keys, self.logits)]
            self._decode(R)  # compiles; nothing may be allocated for the first time during capture
            graph = torch.cuda.CUDAGraph()
            graph.register_generator_state(self.generator)
            with torch.cuda.graph(graph, pool=self.pool):  # one memory pool: only one graph runs at a time
                self._decode(R)
            for t, saved in zip((self.step, self.done, self.ids, self.logps, self.hidden_keys, self.logits), state):
                t.copy_(saved)
            self.graphs[R] = graph
        self.graphs[R].replay()

    def _compact(self, G):
        """Move each prompt's unfinished rows to the front if half of its places are enough; returns G as it is then."""
        live = (~self.done[:self.B * G]).view(self.B, G)
        if G == 1 or int(live.sum(1).max()) > G // 2:
            return G
        half = G // 2
        front = live.int().argsort(dim=1, descending=True, stable=True)[:, :half]  # (B, half), unfinished first
        places = (front + torch.arange(self.B, device=self.device)[:, None] * G).flatten()
        R = self.B * half
        for buffer in (self.row, self.done, self.lengths, self.logits, self.hidden_keys):
            buffer[:R] = buffer[places]
        for layer in self.cache:
            layer.keys[:R], layer.values[:R] = layer.keys[places], layer.values[places]
        return half

    @torch.no_grad()
    def __call__(self, prompts, seed=None):
        """Prompts as in `generate` -> ids (B, G, C) and the sampled tokens' log-probabilities (B, G, C) float32."""
        prompts = list(prompts)
        wanted, B, G = len(prompts), self.B, self.G
        if wanted > B or max(map(len, prompts)) > self.P:
            raise ValueError(f"{wanted} prompts of up to {max(map(len, prompts))} tokens; this sampler is made for {B} of up to {self.P}")
        self.generator.manual_seed(torch.randint(2**62, ()).item() if seed is None else seed)
        device = self.device

        # 1. Prefill. Prompts of unequal length are padded on the right, where causal attention does not look.
        hidden, kv = self.model(pad_sequence(prompts, batch_first=True).to(self.dtype), return_kv=True)
        for layer, (k, v) in zip(self.cache, kv):
            layer.prompt_keys[:wanted, :, :k.shape[2]], layer.prompt_values[:wanted, :, :v.shape[2]] = k, v
        lengths = torch.tensor([len(p) for p in prompts] + [1] * (B - wanted), device=device)
        last = hidden[torch.arange(wanted, device=device), lengths[:wanted] - 1]  # (wanted, D)

        # 2. Fan out: rows 0..G-1 are prompt 0's, the next G prompt 1's, and so on. Places without a prompt are done.
        self.logits[:wanted * G] = self.model.logits(last).repeat_interleave(G, 0)
        self.lengths.copy_(lengths.repeat_interleave(G))
        self.row.copy_(torch.arange(B * G, device=device))
        self.done.copy_(torch.arange(B * G, device=device) >= wanted * G)
        self.hidden_keys.fill_(True)
        self.hidden_keys[..., :self.P] = torch.arange(self.P, device=device) >= self.lengths[:, None, None, None]
        self.step.zero_()
        self.ids.fill_(0 if self.eos is None else self.eos)

        # 3. to 5. Asking whether rows are done makes the host wait for a GPU, so it asks now and then.
        every = 16 if device.type == "cuda" else 4
        for step in range(1, self.C + 1):
            self._run(B * G)
            if self.eos is not None and step % every == 0:
                if self.done[:B * G].all():  # after compaction the places behind are not in use
                    break
                G = self._compact(G)
        ids, logps = self.ids[:wanted * self.G, :step], self.logps[:wanted * self.G, :step]
        if self.eos is not None:  # cut to the longest row
            longest = int((ids != self.eos).sum(1).max()) + 1
            ids, logps = ids[:, :longest], logps[:, :longest]
        return ids.unflatten(0, (wanted, -1)).clone(), logps.unflatten(0, (wanted, -1)).clone()


def sample(model, prompts, num_samples=1, max_new_tokens=512, temperature=1.0, top_p=1.0, eos_token_id=None, seed=None):
    """As `generate`, and the log-probability of every sampled token: ids (B, G, C), logps (B, G, C) float32."""
    prompts = list(prompts)
    sampler = Sampler(model, len(prompts), num_samples, max(map(len, prompts)), max_new_tokens, temperature=temperature,
                      top_p=top_p, eos_token_id=eos_token_id)
    return sampler(prompts, seed)


def generate(model, prompts, num_samples=1, max_new_tokens=512, temperature=1.0, top_p=1.0, eos_token_id=None, seed=None):
    """Sample completions of embedded prompts.

    prompts       (B, P, D), or a list of B tensors (P_i, D) of unequal length
    num_samples   G completions per prompt
    temperature   1 samples from the model's own distribution, 0 takes the likeliest token (greedy)
    top_p         < 1 samples from the smallest set of tokens with that probability; leave at 1 for training, where
                  the log-probabilities must be those of the distribution that was sampled
    eos_token_id  a row ends with its first EOS, and repeats EOS after it; None: no row ends early
    seed          repeats the same samples on the same machine

    Returns ids (B, G, C) int64, C = the longest row.
    """
    return sample(model, prompts, num_samples, max_new_tokens, temperature, top_p, eos_token_id, seed)[0]
