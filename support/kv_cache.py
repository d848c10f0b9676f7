"""The keys and values of a decode step: buffers that stay where they are, one object per layer.

`model(embeds, past=[LayerCache, ...])` calls `attend` of each in place of its own attention; see
generate.py, which makes and fills them.

Shapes: B prompts · G completions per prompt · R = B*G rows · P prompt length · C completion length
· hd head width. This file needs torch alone.
"""

import torch


class LayerCache:
    """One layer's keys and values while decoding: of the B prompts, and of the rows' own tokens.

    Buffers of fixed size, so that nothing is compiled or captured again when lengths change."""

    def __init__(self, like, B, G, P, C, step, blocked_keys):
        """like (1, kv_heads, L, hd): any keys, for their shape and type. step (1,) and blocked_keys
        (R, P + C) are the sampler's: which step this is, and what no row may see."""
        _, kv_heads, _, hd = like.shape
        self.prompt_keys = like.new_zeros(B, kv_heads, P, hd)
        self.prompt_values = like.new_zeros(B, kv_heads, P, hd)
        # A line for each prompt, key head and completion, in this order: the lines that are left
        # after compaction are again (B, kv_heads, fewer G), without gaps.
        self.keys = like.new_zeros(B * kv_heads * G, C, hd)
        self.values = like.new_zeros(B * kv_heads * G, C, hd)
        self.step, self.blocked_keys = step, blocked_keys

    def write(self, k, v):
        """Keep a new token's keys and values: each (lines, hd), of the lines in use.

        self.keys[:n][:, step] = k would do the same, but torch.compile then copies all n lines out
        of the buffer and back."""
        lines = torch.arange(len(k), device=k.device)
        self.keys[lines, self.step] = k
        self.values[lines, self.step] = v

    def attend(self, q, k, v):
        """One new token per row: q (R, heads, 1, hd); k, v (R, kv_heads, 1, hd) -> as q.

        One softmax over two sets of scores. The G rows of a prompt, and the query heads that share
        a key head, are folded into one axis: the prompt's keys are read once, not G times."""
        R, heads, _, hd = q.shape
        B, kv_heads, P, _ = self.prompt_keys.shape
        G = R // B

        def by_prompt(x):  # -> (B, kv_heads, G, heads that share a key head, hd)
            return x.view(B, G, kv_heads, -1, hd).transpose(1, 2)

        self.write(by_prompt(k).flatten(0, 3), by_prompt(v).flatten(0, 3))
        keys = self.keys[: R * kv_heads].unflatten(0, (B, kv_heads, G))
        values = self.values[: R * kv_heads].unflatten(0, (B, kv_heads, G))
        q = by_prompt(q) * hd**-0.5
        to_prompt = q.flatten(2, 3) @ self.prompt_keys.mT  # (B, kv_heads, G*shared, P)
        to_own = q @ keys.mT  # (B, kv_heads, G, shared, C)
        scores = torch.cat([to_prompt.unflatten(2, (G, -1)), to_own], dim=-1).float()
        blocked = self.blocked_keys[:R].view(B, 1, G, 1, -1)
        weights = scores.masked_fill(blocked, -torch.inf).softmax(-1).to(q.dtype)
        on_prompt, on_own = weights.tensor_split([P], dim=-1)
        attended = (on_prompt.flatten(2, 3) @ self.prompt_values).view_as(q) + on_own @ values
        return attended.transpose(1, 2).reshape(R, heads, 1, hd)

    def compact(self, places, G):
        """Keep of each prompt's G completions those at places (B, half), in this order."""
        B, kv_heads, _, _ = self.prompt_keys.shape
        first = torch.arange(B * kv_heads, device=places.device).view(B, kv_heads, 1) * G
        lines = (first + places[:, None]).flatten()  # (B*kv_heads*half,)
        self.keys[: len(lines)] = self.keys[lines]
        self.values[: len(lines)] = self.values[lines]
