"""The measures with targets: G on a GPU at full size, C and K on any machine.

Each is a function of a Bench that first checks that both arms compute the same, and returns a row.

Shapes: B prompts · G completions per prompt · R = B*G rows · P prompt length · C completion length
· D width · V vocabulary.
"""

import argparse
import functools
import statistics
from collections import Counter

import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.arms import OtherUpdate, Update, forced_lengths
from bench.memory import FAKE, PeakBytes
from bench.rows import NotHere, Unequal, need, row
from bench.sizes import FULL_SIZE
from bench.workbench import Bench
from data import embed, frame_indices, load_clip
from generate import Decoding
from grpo import chunked_logps, completion_logps, token_logps
from model import HumanOmni
from support.precision import autocast

PRESETS = {
    "small": {
        "prompt_tokens": 192,
        "new_tokens": 16,
        "rows": 16,
        "prompts": 2,
        "group": 8,
        "completion": 8,
        "micro_batch": 4,
        "chunk": 128,
        "repeats": 5,
    },
    "full": {
        "prompt_tokens": 952,
        "new_tokens": 256,
        "rows": 64,
        "prompts": 16,
        "group": 8,
        "completion": 512,
        "micro_batch": 1,
        "chunk": 512,
        "repeats": 5,
    },
}


def check_sampling(bench, B, C):
    """Do both arms draw from one distribution? -> in words.

    Our samples' log-probabilities are compared under both models; in float32 greedy tokens too."""
    G, other, prompts = bench.flags.group, bench.other.policy, bench.prompts(B)
    sampler = bench.eager_sampler(B, G, Decoding(min(C, 64)))
    ids, logps = sampler(prompts, seed=0)
    with torch.no_grad():
        theirs = [other.logps(p.expand(G, -1, -1), group) for p, group in zip(prompts, ids)]
    outcome = bench.close(logps, torch.stack(theirs))
    if bench.on_gpu:  # in bf16 ties go either way
        return outcome
    ours, _ = bench.sampler(B, 1, Decoding(C, temperature=0))(prompts)
    greedy = {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}
    if not torch.equal(ours[:, 0], other.generate(prompts, C, **greedy)):
        raise Unequal("greedy tokens differ")
    return f"greedy tokens equal; {outcome}"


@functools.cache
def sampling(bench, rows, **options):
    """Tokens per second of `rows` rows, prefill included. options: of the other arm's generate."""
    G, C = bench.flags.group, bench.flags.new_tokens
    B = rows // G
    outcome = check_sampling(bench, B, C)
    prompts, sampler = bench.prompts(B), bench.sampler(B, G, Decoding(C))
    repeated = [prompt for prompt in prompts for _ in range(G)]
    ours, other = bench.medians(
        lambda: sampler(prompts, seed=0),
        lambda: bench.other.policy.generate(repeated, C, **options),
    )
    note = f"{rows} rows; {outcome}"
    return row(rows * C / ours, rows * C / other, "tokens/s", note, higher_is_better=True)


@torch.no_grad()
def bandwidth(bench, rows):
    """Bytes that a decode step must read (weights, live keys and values), over its time.

    Against those of a big copy."""
    G, C, P = bench.flags.group, bench.flags.new_tokens, bench.flags.prompt_tokens
    B = rows // G
    sampler = bench.sampler(B, G, Decoding(C))
    sampler(bench.prompts(B), seed=0)
    steps = max(1, C // 4)  # around the middle of the completion

    def decode():
        sampler.step.fill_((C - steps) // 2)
        for _ in range(steps):
            sampler._run(rows)

    source = torch.empty(2**30 if bench.on_gpu else 2**27, dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    step, copying = bench.medians(decode, lambda: target.copy_(source))
    llm = [sampler.model.embed_tokens, sampler.model.layers, sampler.model.norm]
    weights = sum(p.nbytes for module in llm for p in module.parameters())
    kv = sum(2 * layer.prompt_keys[0, :, 0].nbytes for layer in sampler.cache)  # per token
    rate = steps * (weights + kv * (B * P + rows * C // 2)) / step
    copy_rate = 2 * source.nbytes / copying
    note = f"{rows} rows; {1e3 * step / steps:.3f} ms per step; other: copy"
    return row(rate / 1e9, copy_rate / 1e9, "GB/s", note, higher_is_better=True)


def phases(seconds):
    """{"seconds_rollout": 0.4, ...} as text."""
    named = {name.removeprefix("seconds_"): value for name, value in seconds.items()}
    return ", ".join(f"{name} {value:.2f}" for name, value in named.items() if name != "seconds")


def updates(bench, B, encode_again):
    """Seconds of one update of B prompts, all completions of full length."""
    ours, other = Update(bench, B), OtherUpdate(bench, B, encode_again)
    ids = bench.random_ids(1, bench.flags.group, 16)
    with torch.no_grad():
        other.batch = bench.encode(ours.clips)
        with autocast(bench.model):
            prompt = embed(bench.model, other.batch)[0]
            logps = completion_logps(bench.model, prompt, ids)
        outcome = bench.close(logps[0], other.score(bench.other.policy, 0, ids[0]))
    times = bench.medians(ours, other)
    note = f"{B} prompts x {bench.flags.group}; {outcome}; ours: {phases(ours.seconds)}"
    return row(*times, "s", note)


def shared(model, prompt, ids, chunk=512):
    """prompt (P, D), ids (G, C) -> (G, C): our way, the prompt once."""
    return completion_logps(model, prompt, ids, chunk=chunk)


def repeated(model, prompt, ids):
    """The plain way: the prompt before every completion, logits at every position."""
    embeds = torch.cat([prompt.expand(len(ids), -1, -1), model.embed_tokens(ids)], dim=1)
    return token_logps(model.logits(model(embeds))[:, len(prompt) - 1 : -1], ids)


def scoring(bench, other_way):
    """Seconds of scoring one group and of its backward pass, on a shared prompt or another way."""
    model, (prompt,) = bench.model, bench.prompts(1)
    ids = bench.random_ids(bench.flags.group, bench.flags.new_tokens)

    def logps(way):
        with autocast(model):
            return way(model, prompt, ids)

    def run(way):
        logps(way).sum().backward()
        model.zero_grad()

    with torch.no_grad():
        outcome = bench.close(logps(shared), logps(other_way))
    return row(*bench.medians(lambda: run(shared), lambda: run(other_way)), "s", outcome)


def logps_operation(model, n, chunk, device, dtype):
    """Log-probabilities of n tokens from hidden states, with backward -> two functions.

    The first makes the logits in chunks, the second at once."""
    D = model.embed_tokens.embedding_dim
    hidden = torch.randn(n, D, device=device, dtype=dtype).requires_grad_()
    ids = torch.zeros(n, dtype=torch.long, device=device)

    def gradient(logps):
        return torch.autograd.grad(logps.sum(), hidden)[0]

    return (
        lambda: gradient(chunked_logps(model, hidden, ids, chunk)),
        lambda: gradient(token_logps(model.logits(hidden), ids)),
    )


def logps_peaks(bench, model, sizes, dtype):
    """Peak GiB for the completions of a group, and for all positions of a group's rows at once."""
    G, P, C, chunk = (sizes[name] for name in ("group", "prompt_tokens", "completion", "chunk"))
    chunked, _ = logps_operation(model, G * C, chunk, bench.device, dtype)
    _, full = logps_operation(model, G * (P + C), chunk, bench.device, dtype)
    return bench.peak_bytes(chunked) / 2**30, bench.peak_bytes(full) / 2**30


def logps_memory(bench):
    """Peak bytes of the log-probabilities of one group with backward.

    In chunks, against logits at every position of prompt and completions, as the original has them.
    Without a GPU, counted on fake tensors at full size."""
    chunk = bench.flags.chunk
    chunked, full = logps_operation(bench.model, 3 * chunk // 2, chunk, bench.device, bench.dtype)
    outcome = bench.close(chunked(), full())
    if bench.on_gpu:
        peaks = logps_peaks(bench, bench.model, vars(bench.flags), bench.dtype)
        return row(*peaks, "GiB", outcome)
    with FAKE:
        peaks = logps_peaks(bench, HumanOmni(FULL_SIZE), PRESETS["full"], torch.bfloat16)
    return row(*peaks, "GiB", f"counted at full size; {outcome}")


@functools.cache
def whole_update(bench):
    """Our update alone in memory, completions of forced lengths: the same list every time.

    -> seconds, a note, and on a GPU reserved and allocated bytes at their peak"""
    bench.forget_other()
    if bench.on_gpu:
        torch.cuda.reset_peak_memory_stats()
    B, G = bench.flags.prompts, bench.flags.group
    lengths = forced_lengths(B * G, bench.flags.completion)
    update = Update(bench, B, lengths)
    times = []
    for _ in range(2 + bench.flags.repeats):
        seconds = bench.seconds(update)
        times.append(update.seconds | {"seconds": seconds})
    median = {name: statistics.median(t[name] for t in times[2:]) for name in times[0]}
    mean, longest = lengths.float().mean(), lengths.max()
    note = f"{B} prompts x {G}, lengths {mean:.0f} on average, longest {longest}"
    peaks = None
    if bench.on_gpu:
        peaks = torch.cuda.max_memory_reserved(), torch.cuda.max_memory_allocated()
    return median, note, peaks


def update_memory(bench):
    bench.needs_gpu()
    _, note, (reserved, allocated) = whole_update(bench)
    note = f"reserved; {allocated / 2**30:.1f} allocated; {note}"
    return row(reserved / 2**30, unit="GiB", note=note)


def update_seconds(bench):
    median, note, _ = whole_update(bench)
    return row(median["seconds"], unit="s", note=f"{note}; {phases(median)}")


def flops_ratio(bench):
    """Counted at the published shape: scoring one group with backward, P 240, C 48, G 8."""
    with FAKE:
        model = HumanOmni(FULL_SIZE)
        prompt = torch.zeros(240, FULL_SIZE["llm"]["hidden_size"])
    ids = torch.zeros(8, 48, dtype=torch.long)
    totals = []
    for way in (shared, repeated):
        with FlopCounterMode(display=False) as counter:
            way(model, prompt, ids).sum().backward()
        totals.append(counter.get_total_flops() / 1e12)
    note = "counted at the 0.5B shape, P 240, C 48, G 8, forward and backward"
    return row(*totals, "TFLOP", note)


def tower_calls(bench):
    """How often an update encodes each of its clips, and the log-probabilities' largest tensor."""
    model, chunk, calls = bench.model, bench.flags.chunk, Counter()
    towers = {"vision": model.vision_tower, "audio": model.audio_tower}
    update = Update(bench, 2)

    def count(name):
        return lambda tower, args, output: calls.update({name: len(args[0])})

    hooks = [tower.register_forward_hook(count(name)) for name, tower in towers.items()]
    update()
    for hook in hooks:
        hook.remove()
    per_clip = max(calls["vision"] / 2 / model.configs["llm"]["num_frames"], calls["audio"] / 2)
    chunked, _ = logps_operation(model, 3 * chunk, chunk, bench.device, bench.dtype)
    with PeakBytes() as counter:
        chunked()
    if counter.largest > chunk * bench.vocab:
        raise Unequal(f"a tensor of {counter.largest} elements, more than {chunk} x {bench.vocab}")
    note = (
        f"other: 1 + 2G by the original's design; largest tensor of the log-probabilities "
        f"{counter.largest} elements = {counter.largest / bench.vocab:.0f} x V, chunk {chunk}"
    )
    return row(per_clip, 1 + 2 * bench.flags.group, "calls", note)


def cpu_sampling(bench):
    """One group at the published prompt length.

    How often the prompt is read counts there as much as how fast a token is."""
    if bench.on_gpu:
        raise NotHere("is a measure of the CPU: --device cpu")
    sizes = {"prompt_tokens": PRESETS["full"]["prompt_tokens"]}
    published = Bench(argparse.Namespace(**(vars(bench.flags) | sizes)))
    result = sampling(published, bench.flags.group)
    return result | {"note": f"P {published.flags.prompt_tokens}; {result['note']}"}


def clip_decoding(bench):
    """Clip -> 8 frames and 16 kHz mono sound, from opening the file on; one thread each."""
    need("av")
    need("decord")
    import decord

    path = bench.flags.clip

    def by_decord():
        video = decord.VideoReader(path, ctx=decord.cpu(0), num_threads=1)
        frames = video.get_batch(frame_indices(len(video), 8)).asnumpy()
        sound = decord.AudioReader(path, ctx=decord.cpu(0), sample_rate=16000, mono=True)
        return frames, sound[:].asnumpy()

    frames, sound = load_clip(path, 8)
    their_frames, their_sound = (torch.from_numpy(x) for x in by_decord())
    pixels = (frames.permute(0, 2, 3, 1).float() - their_frames.float()).abs().mean().item()
    their_sound = their_sound.flatten()
    likeness, shift = best_correlation(sound, their_sound)
    outcome = (
        f"pixels differ by {pixels:.2f} of 255; sound correlates {likeness:.3f} at a shift of "
        f"{shift} samples; {len(sound)} and {len(their_sound)} samples"
    )
    same_length = abs(len(sound) - len(their_sound)) <= 1600
    if pixels > 3 or likeness < 0.95 or shift > 32 or not same_length:
        raise Unequal(outcome)
    return row(*bench.medians(lambda: load_clip(path, 8), by_decord), "s", outcome)


def best_correlation(a, b):
    """Correlation of two sounds at the shift where they are most alike, and that shift.

    decord resamples packet by packet, which shifts the sound by a few samples."""
    n = len(a) + len(b)
    spectrum = torch.fft.rfft(a, n).conj() * torch.fft.rfft(b, n)
    likeness = torch.fft.irfft(spectrum, n) / (a.norm() * b.norm())
    shift = int(likeness.argmax())
    return likeness.max().item(), min(shift, n - shift)


class CountedModel:
    """The least that completion_logps asks of a model: it only counts what it is given."""

    def __init__(self):
        self.positions = self.head_rows = 0

    def __call__(self, embeds, past=None, prompt_of=None, return_kv=False):
        if past is not None:
            self.positions += embeds.shape[0] * embeds.shape[1]
        return (embeds, []) if return_kv else embeds

    def embed_tokens(self, ids):
        return torch.zeros(*ids.shape, 1)

    def logits(self, hidden):
        self.head_rows += len(hidden)
        return hidden


def padding(bench):
    """Share of padding among the scored positions, and rows of the head, lengths as in G10.

    Counted for full size and its --micro-batch."""
    B, G, C, micro_batch = (
        PRESETS["full"][name] for name in ("prompts", "group", "completion", "micro_batch")
    )
    lengths = forced_lengths(B * G, C).view(B, G)
    mask = torch.arange(C) < lengths[..., None]  # (B, G, C)
    model = CountedModel()
    for part in mask.split(micro_batch):
        completion_logps(model, torch.zeros(len(part), 1, 1), torch.zeros_like(part).long(), part)
    live = int(mask.sum())
    if model.head_rows != live:
        raise Unequal(f"{model.head_rows} rows reach the head, for {live} live tokens")
    # The prompt's last state is each row's first position.
    scored = model.positions + B * G
    longest = mask.sum(-1).amax(-1).sum().item() * G
    note = (
        f"of {scored} positions, {B} x {G}, lengths {live / B / G:.0f} on average, longest {C}; "
        f"rows of the head = live tokens; other: each group padded to its longest"
    )
    return row(100 * (1 - live / scored), 100 * (1 - live / longest), "%", note)
