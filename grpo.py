"""Group Relative Policy Optimization: the maths, as pure functions of tensors.

One update, in the order train_grpo.py does it (numbers as in the README):

    1. (generate.py)       sample G completions of each prompt from the policy
    2. (rewards.py)        reward each completion
    3. completion_logps    log pi(token) of every sampled token under the reference
    4. group_advantages    A = (r - mean) / std within the group         paper, eq. 4
    5. completion_logps    the same under the policy, with gradient
       per_token_kl        how far the policy is from the reference      paper, eq. 3 (k3 estimator)
    6. grpo_loss           make likelier what did better than its group, stay near the reference

The defaults are the paper's. What other work does differently stands beside it as an argument:
`scale` (Dr. GRPO, arXiv:2503.20783), `token_mean`, `clip_high` and a mask without truncated
completions (DAPO, arXiv:2503.14476), KL in the reward (InstructGPT, arXiv:2203.02155).

Shapes: B prompts · G completions per prompt · R = B*G rows · P prompt length · C completion length
· D width · V vocabulary. This file needs torch alone and knows nothing of video or sound: it works
with any causal language model.
"""

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


def group_advantages(rewards, eps=1e-4, scale=True):
    """How much better than its group is each completion, in standard deviations? (paper, eq. 4)

    rewards (B, G) float -> (B, G). The std is the unbiased one; eps keeps a group of equal rewards
    from being 0/0. G < 2 has no group to compare with: ValueError.

    scale=False (Dr. GRPO) leaves out the division, which gives the largest advantages to groups
    that nearly always fail or nearly always succeed, although they have least to teach."""
    if rewards.dim() != 2 or rewards.shape[1] < 2:
        shape = tuple(rewards.shape)
        raise ValueError(f"rewards must be (B, G) with G >= 2 completions per prompt, got {shape}")
    # A group of equal rewards is exactly 0 from here on, whatever its mean rounds to.
    rewards = rewards - rewards[:, :1]
    deviation = rewards - rewards.mean(dim=1, keepdim=True)
    return deviation / (rewards.std(dim=1, keepdim=True) + eps) if scale else deviation


def kl_in_reward(rewards, logps, ref_logps, mask, beta):
    """rewards - beta * (log pi - log pi_ref) of the whole completion: the KL as part of the reward.

    rewards (B, G); logps, ref_logps, mask (B, G, C), of the policy that sampled -> (B, G). The k1
    estimator, whose gradient is right here and zero on average in the loss; use it with beta=0 in
    grpo_loss. Both log-probabilities must come from the same kind of pass: differences in rounding
    alone would become advantages, divided as they are by the group's std."""
    return rewards - beta * torch.where(mask, logps - ref_logps, 0.0).sum(-1)


def completion_mask(completion_ids, eos_token_id):
    """Which tokens count: all up to and including the first EOS. (..., C) ids -> (..., C) bool.

    By position, never by value: the EOS itself must get a gradient (or the model never learns to
    stop), and padding may well be the same id. eos_token_id: one id, or several of which any ends a
    completion; None: every token counts."""
    if eos_token_id is None:
        return torch.ones_like(completion_ids, dtype=torch.bool)
    eos = torch.as_tensor(eos_token_id, device=completion_ids.device)
    is_eos = torch.isin(completion_ids, eos).int()
    eos_before = is_eos.cumsum(dim=-1) - is_eos  # number of EOS strictly before each position
    return eos_before == 0


def token_logps(logits, ids):
    """log softmax(logits)[ids] in float32. (..., V), (...) -> (...)."""
    flat = F.cross_entropy(logits.float().flatten(0, -2), ids.flatten(), reduction="none")
    return -flat.view(ids.shape)


def chunked_logps(model, hidden, ids, chunk=512):
    """log pi of each id given the hidden state before it: (n, D), (n,) -> (n,) float32.

    Logits are made for `chunk` positions at a time and, where there are more, made again in the
    backward pass: chunk x V numbers live instead of n x V (for each call that is to be
    differentiated)."""

    def through_head(hidden, ids):
        return token_logps(model.logits(hidden), ids)

    if len(ids) <= chunk:
        return through_head(hidden, ids)
    pieces = [
        checkpoint(through_head, h, i, use_reentrant=False, preserve_rng_state=False)
        for h, i in zip(hidden.split(chunk), ids.split(chunk))
    ]
    return torch.cat(pieces)


def length_buckets(lengths, min_share=0.7, slack=8):
    """Row numbers in lists, longest first: a list's rows run together, padded to its longest.

    lengths: one int per row. A row opens a new list if it is shorter than `min_share` of the list's
    longest row, and by more than `slack` tokens: a list of its own costs a pass of its own."""
    buckets = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        longest = lengths[buckets[-1][0]] if buckets else None
        if longest is None or lengths[row] < min(min_share * longest, longest - slack):
            buckets.append([])
        buckets[-1].append(row)
    return buckets


def completion_logps(model, prompt_embeds, completion_ids, mask=None, chunk=512):
    """log pi(token | prompt, tokens before) of all completions; a prompt runs through once.

    prompt_embeds (B, P, D) and completion_ids (B, G, C) int64 -> (B, G, C) float32, or, of a single
    prompt, (P, D) or (1, P, D) and (G, C) -> (G, C). mask, shaped like the ids: the tokens that are
    wanted; the others come back as 0, and a row stops at its last wanted token. The mask is looked
    at in main memory: one that lies on a GPU is waited for.

    Asks of `model` four things, which any causal language model can offer:
        model(embeds, return_kv=True)            hidden states (B, P, D), keys and values `kv`
        model(embeds, past=kv, prompt_of=index)  hidden states (r, L, D); row i follows prompt
                                                 index[i]
        model.embed_tokens(ids)                  (r, L) -> (r, L, D)
        model.logits(hidden)                     (..., D) -> (..., V)
    Gradients flow through `kv` into the prompt, summed over its G rows: value and gradient are
    those of the prompt repeated G times, for B * (P + G*C) positions instead of B * G * (P + C).
    """
    prompts = prompt_embeds.reshape(-1, *prompt_embeds.shape[-2:])  # (B, P, D)
    C = completion_ids.shape[-1]
    wanted = torch.ones(completion_ids.shape) if mask is None else mask.cpu()
    wanted = wanted.reshape(-1, C) > 0  # (R, C)
    # Where each row's last wanted token ends; 0 for a row without any.
    ends = (wanted * torch.arange(1, C + 1)).amax(dim=1).tolist()
    R, G = len(wanted), len(wanted) // len(prompts)

    def there(tensor):  # to the model's device, without waiting for it
        return tensor.to(prompts.device, non_blocking=True)

    ids = there(completion_ids.reshape(-1, C))  # (R, C)
    prompt_hidden, kv = model(prompts, return_kv=True)
    pieces, places = [], []
    for bucket in length_buckets(ends):
        longest = max(1, ends[bucket[0]])
        # Only wanted positions reach the head, which is the largest layer of all.
        i, position = wanted[bucket, :longest].nonzero(as_tuple=True)  # i: row within the bucket
        bucket = torch.tensor(bucket)  # (r,) row numbers
        prompt_of = there(bucket // G)  # (r,) the prompt that each row follows
        bucket_ids = ids[there(bucket), :longest]  # (r, longest)
        # The state at position t predicts token t + 1: the prompt's last state predicts every row's
        # first token, and the last token is never an input.
        hidden = prompt_hidden[prompt_of, -1:]  # (r, 1, D)
        if longest > 1:
            inputs = model.embed_tokens(bucket_ids[:, :-1])
            after = model(inputs, past=kv, prompt_of=prompt_of)
            hidden = torch.cat([hidden, after], dim=1)  # (r, longest, D)
        place = there(i * longest + position)
        states, next_ids = hidden.flatten(0, 1).index_select(0, place), bucket_ids.flatten()[place]
        pieces.append(chunked_logps(model, states, next_ids, chunk))
        places.append(bucket[i] * C + position)
    # Back to (R, C), 0 elsewhere; index_put passes the gradient on.
    logps = torch.zeros(R * C, device=ids.device)
    logps = logps.index_put((there(torch.cat(places)),), torch.cat(pieces))
    return logps.view(completion_ids.shape)


def per_token_kl(logps, ref_logps):
    """KL[policy || reference] per token by the k3 estimator exp(d) - d - 1 with d = ref - policy.

    (..., C), (..., C) -> (..., C). Its value is unbiased under samples of the policy, never
    negative, 0 where both agree. As a loss its gradient is that of KL[reference || policy], which
    has the same minimum; that of the simpler k1 = -d would be zero on average."""
    d = ref_logps - logps
    return torch.expm1(d) - d  # exp(d) - d - 1 would round small values to less than 0


def grpo_loss(
    logps,
    old_logps,
    ref_logps,
    advantages,
    mask,
    beta=0.04,
    clip_eps=0.2,
    *,
    clip_high=None,
    token_mean=False,
    total=None,
):
    """Loss of a batch of completions, and what to log about it.

        loss = mean over completions of the mean over their tokens of
               -(min(ratio A, clip(ratio) A) - beta KL)

    logps       (rows, C) or (B, G, C) float32 with gradient: the policy
    old_logps   alike, of the policy that sampled them, or None: this is the first step after the
                rollout, so the ratio is 1 in value; its gradient is that of logps
    ref_logps   alike, of the frozen reference, or None: no KL term
    advantages  (rows,) or (B, G); they and the mask may lie in main memory
    mask        like logps, bool or 0/1: the tokens that count. Leave truncated completions out
                (DAPO), and they are not punished for what they had no room to say
    clip_high   the ratio's clip above 1, if not clip_eps (DAPO): room for rare tokens
    token_mean  mean over all tokens at once (DAPO): long completions count more, all tokens alike
    total       completions (with token_mean: tokens that count) of the whole update, if this batch
                is a part of it: then the losses, kl and clip_share of its parts add up. Default:
                this batch is all. Completions without a token that counts are counted all the same

    Returns the scalar loss and a dict of detached scalars, averaged like it: kl, clip_share (tokens
    where the clip stops the gradient); and completion_length (tokens per row of this batch).
    """
    mask = mask.to(logps, non_blocking=True)  # to its type and its device
    advantages = advantages.reshape(logps.shape[:-1])[..., None].to(logps, non_blocking=True)
    lengths = mask.sum(dim=-1)
    if total is None:
        total = lengths.sum().clamp(min=1) if token_mean else lengths.numel()

    def average(per_token):
        # where() and not a product: what stands after a row's end, were it inf, must not count
        sums = torch.where(mask > 0, per_token, 0.0).sum(dim=-1)
        return (sums if token_mean else sums / lengths.clamp(min=1)).sum() / total

    ratio = torch.exp(logps - (logps.detach() if old_logps is None else old_logps))
    clipped = ratio.clamp(1 - clip_eps, 1 + (clip_eps if clip_high is None else clip_high))
    # min: the pessimistic side. With A > 0 it stops pushing a token up that is up already, with
    # A < 0 it stops pushing one down that is down; one that has gone the wrong way is never
    # clipped.
    objective = torch.min(ratio * advantages, clipped * advantages)
    kl = torch.zeros_like(logps) if ref_logps is None else per_token_kl(logps, ref_logps)
    loss = -average(objective - beta * kl)
    with torch.no_grad():
        stopped = (clipped * advantages < ratio * advantages).to(logps.dtype)
        metrics = {
            "kl": average(kl).detach(),
            "clip_share": average(stopped),
            "completion_length": lengths.mean(),
        }
    return loss, metrics
