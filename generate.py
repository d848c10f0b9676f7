"""Sampling: a whole update's completions at once, each prompt read once.

    1. prefill     all B prompts in one forward; their keys and values are kept
    2. fan out     G rows per prompt, each drawing its own first token from the prompt's one distribution
    3. decode      one token for every row per step; a row attends to its prompt's keys (stored once for all G) and
                   to its own, which go into a buffer of fixed size at a fixed place
    4. stop        when every row has met EOS, or at max_new_tokens

    ids = generate(model, prompts, num_samples=8, max_new_tokens=512, eos_token_id=tokenizer.eos_token_id)

Shapes: B prompts · G completions per prompt · R = B*G rows · P prompt length · C completion length · D width ·
V vocabulary; hd head width.
"""

import torch
from torch.nn.utils.rnn import pad_sequence


class DecodeCache:
    """One layer's keys and values while decoding: the prompts' part, and the rows' own part."""

    def __init__(self, keys, values, num_samples, capacity, state):
        """keys, values (B, kv_heads, P, hd) of the prompts; capacity: own tokens per row; state: see `generate`."""
        B, kv_heads, _, hd = keys.shape
        self.prompt_keys, self.prompt_values, self.state = keys, values, state
        self.keys = keys.new_zeros(B * num_samples, kv_heads, capacity, hd)
        self.values = torch.zeros_like(self.keys)

    def attend(self, q, k, v):
        """One new token per row: q (R, heads, 1, hd), k, v (R, kv_heads, 1, hd) -> (R, heads, 1, hd).

        One softmax over two sets of scores. The G rows of a prompt, and the query heads that share a key head,
        are folded into one axis, so that the prompt's keys are read once, not G times, and never copied."""
        self.keys.index_copy_(2, self.state["step"], k)
        self.values.index_copy_(2, self.state["step"], v)
        B, kv_heads, P, hd = self.prompt_keys.shape
        R, heads, shared = q.shape[0], q.shape[1], q.shape[1] // k.shape[1]
        q = q.view(R, kv_heads, shared, hd) * hd**-0.5
        grouped = q.view(B, R // B, kv_heads, shared, hd).transpose(1, 2).reshape(B, kv_heads, -1, hd)
        to_prompt = grouped @ self.prompt_keys.transpose(2, 3)  # (B, kv_heads, G*shared, P)
        to_prompt = to_prompt.view(B, kv_heads, R // B, shared, P).transpose(1, 2).reshape(R, kv_heads, shared, P)
        to_own = q @ self.keys.transpose(2, 3)  # (R, kv_heads, shared, capacity)
        scores = torch.cat([to_prompt, to_own], dim=-1).float().masked_fill(self.state["hidden"], -torch.inf)
        weights = scores.softmax(-1).to(q.dtype)
        on_prompt, on_own = weights.split([P, weights.shape[-1] - P], dim=-1)
        on_prompt = on_prompt.view(B, R // B, kv_heads, shared, P).transpose(1, 2).reshape(B, kv_heads, -1, P)
        from_prompt = on_prompt @ self.prompt_values  # (B, kv_heads, G*shared, hd)
        from_prompt = from_prompt.view(B, kv_heads, R // B, shared, hd).transpose(1, 2).reshape(R, kv_heads, shared, hd)
        return (from_prompt + on_own @ self.values).view(R, heads, 1, hd)


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


@torch.no_grad()
def sample(model, prompts, num_samples=1, max_new_tokens=512, temperature=1.0, top_p=1.0, eos_token_id=None, seed=None):
    """As `generate`, and the log-probability of every sampled token: ids (B, G, C), logps (B, G, C) float32."""
    prompts = list(prompts)
    B, G, device = len(prompts), num_samples, prompts[0].device
    if G < 1 or max_new_tokens < 1:
        raise ValueError(f"num_samples and max_new_tokens must be at least 1, got {G} and {max_new_tokens}")
    if temperature < 0 or not 0 < top_p <= 1:
        raise ValueError(f"temperature must be >= 0 and top_p in (0, 1], got {temperature} and {top_p}")
    generator = None if seed is None else torch.Generator(device).manual_seed(seed)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)

    # 1. Prefill. Prompts of unequal length are padded on the right, where causal attention does not look.
    hidden, kv = model(pad_sequence(prompts, batch_first=True), return_kv=True)
    last = hidden[torch.arange(B, device=device), lengths - 1]  # (B, D)
    P = hidden.shape[1]

    # 2. Fan out: rows 0..G-1 are prompt 0's, the next G prompt 1's, and so on.
    logits = model.logits(last).repeat_interleave(G, 0)  # (R, V)
    lengths = lengths.repeat_interleave(G)
    # What every layer's cache reads: where this step's keys go, and which keys no row may see (padding between a
    # prompt's end and P; own positions not yet written).
    hidden_keys = torch.ones(B * G, 1, 1, P + max_new_tokens, dtype=torch.bool, device=device)
    hidden_keys[..., :P] = torch.arange(P, device=device) >= lengths[:, None, None, None]
    state = {"step": torch.zeros(1, dtype=torch.long, device=device), "hidden": hidden_keys}
    cache = [DecodeCache(k, v, G, max_new_tokens, state) for k, v in kv]

    # 3. Decode.
    ids, logps, done = [], [], torch.zeros(B * G, dtype=torch.bool, device=device)
    check_every = 16 if device.type == "cuda" else 1  # asking whether all are done makes the host wait for the GPU
    for step in range(max_new_tokens):
        token, logp = draw(logits, temperature, top_p, generator)
        if eos_token_id is not None:
            token = torch.where(done, eos_token_id, token)  # after the end: EOS again
            done = done | (token == eos_token_id)
        ids.append(token)
        logps.append(logp)
        if step + 1 == max_new_tokens or (eos_token_id is not None and step % check_every == 0 and done.all()):
            break
        state["step"].fill_(step)
        state["hidden"][..., P + step] = False
        positions = (lengths + step)[:, None]
        hidden = model(model.embed_tokens(token[:, None]), past=cache, positions=positions)  # (R, 1, D)
        logits = model.logits(hidden[:, 0])

    # 4. Cut to the longest row.
    ids, logps = torch.stack(ids, 1), torch.stack(logps, 1)
    if eos_token_id is not None:
        longest = int((ids != eos_token_id).sum(1).max()) + 1
        ids, logps = ids[:, :longest], logps[:, :longest]
    return ids.view(B, G, -1), logps.view(B, G, -1)


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
