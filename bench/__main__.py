"""Measure this code against the usual ways of doing the same, side by side on one machine, with random weights.

    python bench.py                             --preset small: a small model, any CPU, under two minutes
    python bench.py --preset full               the published 0.5B shape, on one GPU (pip install transformers first)
    python bench.py --only G1 C4                some measures by name; --help lists them
    python bench.py --only load                 a full-size checkpoint written, loaded and asked about one clip
    python bench.py --fit                       what fits on which card, counted and not measured

The other arm is `transformers` (Qwen2ForCausalLM with our weights), or our own model used in the plain way. Both arms are
first checked to compute the same; then they are timed in turns, and medians are compared: a ratio above 1 means that this
code is faster, or smaller, so many times. Prints one table, and one JSON line last. Exit code 1 if a measure fails or its
arms disagree.

`transformers` (for G1, G2, G3, G5, G6, C3) and `decord` (for C4) are needed by the other arm only and are not in
requirements.txt; without them those lines say so. Sizes come from the preset; flags that are given win.

Shapes: B prompts · G completions per prompt · R = B*G rows · P prompt length · C completion length · T video frames ·
D width · V vocabulary.
"""

import argparse
import functools
import gc
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from arms import Bench, ForcedLengths, NotHere, OtherUpdate, Unequal, Update, forced_lengths, need
from fit import FULL_SIZE, PeakBytes
from grpo import chunked_logps, completion_logps, token_logps
from model import HumanOmni

ROOT = Path(__file__).parent
PRESETS = {
    "small": dict(
        prompt_tokens=192,
        new_tokens=16,
        rows=16,
        prompts=2,
        group=8,
        completion=8,
        chunk=128,
        repeats=5,
    ),
    "full": dict(
        prompt_tokens=952,
        new_tokens=256,
        rows=64,
        prompts=16,
        group=8,
        completion=512,
        chunk=512,
        repeats=5,
    ),
}
SIZES = dict(
    prompt_tokens="P",
    new_tokens="tokens per row where only sampling or only scoring is timed",
    rows="of G2 and G4/64",
    prompts="B of an update",
    group="G",
    completion="longest completion of an update",
    chunk="positions per chunk of logits",
    repeats="timings per arm",
)


def row(ours, other=None, unit="s", note="", higher_is_better=False, **more):
    """One line of the table; without `other` there is no ratio."""
    ratio = None if other is None else ours / other if higher_is_better else other / ours
    return {"ours": ours, "other": other, "unit": unit, "ratio": ratio, "note": note, **more}


# ------------------------------------------------------------------------------------------------
# G: on a GPU at full size these have targets


@functools.cache
def sampling(bench, rows, **options):
    """Tokens per second of `rows` rows, prefill included, ours against transformers; options: of its generate."""
    G, C = bench.flags.group, bench.flags.new_tokens
    B = rows // G
    outcome = bench.check_sampling(B, C)
    prompts, sampler, llm = bench.prompts(B), bench.sampler(B, G, C), bench.other.policy.llm
    repeated = [prompt for prompt in prompts for _ in range(G)]
    ours, other = bench.medians(
        lambda: sampler(prompts, seed=0), lambda: bench.generate(llm, repeated, C, **options)
    )
    return row(
        rows * C / ours,
        rows * C / other,
        "tokens/s",
        f"{rows} rows; {outcome}",
        higher_is_better=True,
    )


@torch.no_grad()
def decode_bandwidth(bench, rows):
    """Bytes that one decode step must read (weights, live keys and values), over its time, against a big copy's."""
    G, C, P = bench.flags.group, bench.flags.new_tokens, bench.flags.prompt_tokens
    B = rows // G
    sampler = bench.sampler(B, G, C)
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
    kv = sum(2 * layer.keys[0, :, 0].nbytes for layer in sampler.cache)  # per token
    rate = steps * (weights + kv * (B * P + rows * C // 2)) / step
    return row(
        rate / 1e9,
        2 * source.nbytes / copying / 1e9,
        "GB/s",
        f"{rows} rows; {1e3 * step / steps:.3f} ms per step; other: copy",
        higher_is_better=True,
    )


def updates(bench, B, encode_again):
    """Seconds of one update of B prompts, all completions of full length."""
    ours, other = Update(bench, B), OtherUpdate(bench, B, encode_again)
    with torch.no_grad(), bench.compute():
        ours.features = other.features = bench.model.encode(*ours.clips)
        ids = torch.randint(bench.vocab, (B, bench.flags.group, 16), device=bench.device)
        outcome = bench.close(
            ours.score(bench.model, 0, ids), other.score(bench.other.policy, 0, ids)
        )
    times = bench.medians(ours, other)
    phases = ", ".join(f"{name} {seconds:.2f}" for name, seconds in ours.seconds.items())
    return row(*times, "s", f"{B} prompts x {bench.flags.group}; {outcome}; ours: {phases}")


def shared(model, prompt, ids, chunk=512):
    return completion_logps(model, prompt, ids, chunk)


def repeated(model, prompt, ids):
    """The plain way: the prompt before every completion, logits at every position."""
    embeds = torch.cat([prompt.expand(len(ids), -1, -1), model.embed_tokens(ids)], dim=1)
    return token_logps(model.logits(model(embeds))[:, len(prompt) - 1 : -1], ids)


def repeated_chunked(model, prompt, ids):
    """The prompt before every completion, but logits where they are needed and in chunks."""
    embeds = torch.cat([prompt.expand(len(ids), -1, -1), model.embed_tokens(ids)], dim=1)
    hidden = model(embeds)[:, len(prompt) - 1 : -1]
    return chunked_logps(model, hidden.flatten(0, 1), ids.flatten()).view(ids.shape)


def scoring(bench, other_way):
    """Seconds of scoring one group, forward and backward, on one shared prompt against another way."""
    model, (prompt,) = bench.model, bench.prompts(1)
    ids = torch.randint(
        bench.vocab, (bench.flags.group, bench.flags.new_tokens), device=bench.device
    )

    def run(way, backward=True):
        with torch.set_grad_enabled(backward):
            with bench.compute():
                logps = way(model, prompt, ids)
            if backward:
                logps.sum().backward()
                model.zero_grad()
        return logps

    outcome = bench.close(run(shared, False), run(other_way, False))
    return row(*bench.medians(lambda: run(shared), lambda: run(other_way)), "s", outcome)


def logps_operation(model, n, chunk, device, dtype):
    """-> two functions: log-probabilities of n tokens from hidden states, with backward, in chunks and at once."""
    hidden = torch.randn(
        n, model.embed_tokens.embedding_dim, device=device, dtype=dtype
    ).requires_grad_()
    ids = torch.zeros(n, dtype=torch.long, device=device)
    return (
        lambda: torch.autograd.grad(chunked_logps(model, hidden, ids, chunk).sum(), hidden)[0],
        lambda: torch.autograd.grad(token_logps(model.logits(hidden), ids).sum(), hidden)[0],
    )


def logps_memory(bench):
    """Peak bytes of the log-probabilities of one group with backward: in chunks, and with logits at every position of prompt
    and completions, as the original has them. Without a GPU, counted on fake tensors at full size."""
    G, P, C = bench.flags.group, bench.flags.prompt_tokens, bench.flags.completion
    chunked, full = logps_operation(
        bench.model, 3 * bench.flags.chunk // 2, bench.flags.chunk, bench.device, bench.dtype
    )
    outcome, note = bench.close(chunked(), full()), ""
    if bench.on_gpu:
        peaks = [
            bench.peak_bytes(arm)
            for n, pick in ((G * C, 0), (G * (P + C), 1))
            for arm in [
                logps_operation(bench.model, n, bench.flags.chunk, bench.device, bench.dtype)[pick]
            ]
        ]
    else:
        full_size, note = PRESETS["full"], "counted at full size; "
        G, P, C = (full_size[name] for name in ("group", "prompt_tokens", "completion"))
        with FakeTensorMode():
            model = HumanOmni(FULL_SIZE)
            peaks = [
                bench.peak_bytes(
                    logps_operation(model, n, full_size["chunk"], bench.device, torch.bfloat16)[
                        pick
                    ]
                )
                for n, pick in ((G * C, 0), (G * (P + C), 1))
            ]
    return row(*(peak / 2**30 for peak in peaks), "GiB", note + outcome)


@functools.cache
def whole_update(bench):
    """Our update alone in memory, completions of forced lengths: the same list every time."""
    bench.forget_other()
    if bench.on_gpu:
        torch.cuda.reset_peak_memory_stats()
    B, G, C = (getattr(bench.flags, name) for name in ("prompts", "group", "completion"))
    lengths = forced_lengths(B * G, C)
    update, phases = Update(bench, B, lengths), []
    seconds = []
    for _ in range(2 + bench.flags.repeats):
        seconds.append(bench.seconds(update))
        phases.append(update.seconds)
    median = {name: statistics.median(p[name] for p in phases[2:]) for name in phases[0]}
    note = (
        f"{B} prompts x {G}, lengths {lengths.float().mean():.0f} on average, longest {lengths.max()}; "
        + ", ".join(f"{name} {value:.2f}" for name, value in median.items())
    )
    peaks = (
        (torch.cuda.max_memory_reserved(), torch.cuda.max_memory_allocated())
        if bench.on_gpu
        else None
    )
    return statistics.median(seconds[2:]), note, peaks


def update_memory(bench):
    bench.needs_gpu()
    _, note, (reserved, allocated) = whole_update(bench)
    return row(
        reserved / 2**30,
        unit="GiB",
        note=f"reserved; {allocated / 2**30:.1f} allocated; {note.split(';')[0]}",
    )


def update_seconds(bench):
    seconds, note, _ = whole_update(bench)
    return row(seconds, unit="s", note=note)


# ------------------------------------------------------------------------------------------------
# C: on any machine


def flops_ratio(bench):
    """Counted at the published shape, on fake tensors: scoring one group with backward, P 240, C 48, G 8."""
    totals = []
    with FakeTensorMode():
        model = HumanOmni(FULL_SIZE)
        prompt, ids = (
            torch.zeros(240, FULL_SIZE["llm"]["hidden_size"]),
            torch.zeros(8, 48, dtype=torch.long),
        )
        for way in (shared, repeated):
            with FlopCounterMode(display=False) as counter:
                way(model, prompt, ids).sum().backward()
            totals.append(counter.get_total_flops() / 1e12)
    return row(
        *totals, "TFLOP", "counted at the 0.5B shape, P 240, C 48, G 8, forward and backward"
    )


def tower_calls(bench):
    """How often an update encodes each of its clips, and the largest tensor that the log-probabilities make."""
    calls, model, chunk = Counter(), bench.model, bench.flags.chunk
    hooks = [
        tower.register_forward_hook(
            lambda tower, args, output, name=name: calls.update({name: len(args[0])})
        )
        for name, tower in (("vision", model.vision_tower), ("audio", model.audio_tower))
    ]
    update = Update(bench, 2)
    calls.clear()
    update()
    for hook in hooks:
        hook.remove()
    per_clip = max(calls["vision"] / 2 / model.configs["llm"]["num_frames"], calls["audio"] / 2)
    chunked, _ = logps_operation(model, 3 * chunk, chunk, bench.device, bench.dtype)
    with PeakBytes() as counter:
        chunked()
    if counter.largest > chunk * bench.vocab:
        raise Unequal(
            f"the log-probabilities make a tensor of {counter.largest} elements, more than {chunk} x {bench.vocab}"
        )
    return row(
        per_clip,
        1 + 2 * bench.flags.group,
        "calls",
        f"other: 1 + 2G by the original's design; largest tensor of the log-probabilities "
        f"{counter.largest} elements = {counter.largest / bench.vocab:.0f} x V, chunk {chunk}",
    )


def cpu_sampling(bench):
    """One group at the published prompt length: how often the prompt is read counts as much as how fast a token is."""
    if bench.on_gpu:
        raise NotHere("is a measure of the CPU: --device cpu")
    published = Bench(
        argparse.Namespace(
            **vars(bench.flags) | {"prompt_tokens": PRESETS["full"]["prompt_tokens"]}
        )
    )
    result = sampling(published, bench.flags.group)
    return result | {"note": f"P {published.flags.prompt_tokens}; {result['note']}"}


def clip_decoding(bench):
    """Clip -> 8 frames and 16 kHz mono sound, from opening the file on; one thread each."""
    need("av"), need("decord")
    import decord
    from data import frame_indices, load_clip

    path = bench.flags.clip

    def by_decord():
        video = decord.VideoReader(path, ctx=decord.cpu(0), num_threads=1)
        frames = video.get_batch(frame_indices(len(video), 8)).asnumpy()
        return frames, decord.AudioReader(path, ctx=decord.cpu(0), sample_rate=16000, mono=True)[
            :
        ].asnumpy()

    frames, sound = load_clip(path, 8)
    theirs, their_sound = (torch.from_numpy(x) for x in by_decord())
    pixels = (frames.permute(0, 2, 3, 1).float() - theirs.float()).abs().mean().item()
    # decord resamples packet by packet, which shifts the sound by a few samples; so the likeness at the best shift counts.
    their_sound = their_sound.flatten()
    n = len(sound) + len(their_sound)
    likeness = torch.fft.irfft(
        torch.fft.rfft(sound, n).conj() * torch.fft.rfft(their_sound, n), n
    ) / (sound.norm() * their_sound.norm())
    best, shift = likeness.max().item(), min(int(likeness.argmax()), n - int(likeness.argmax()))
    outcome = (
        f"pixels differ by {pixels:.2f} of 255; sound correlates {best:.3f} at a shift of {shift} samples; "
        f"{len(sound)} and {len(their_sound)} samples"
    )
    if pixels > 3 or best < 0.95 or shift > 32 or abs(len(sound) - len(their_sound)) > 1600:
        raise Unequal(outcome)
    return row(*bench.medians(lambda: load_clip(path, 8), by_decord), "s", outcome)


# ------------------------------------------------------------------------------------------------
# O: what each optimisation brings, our own code with it and without


def shared_prefill(bench):
    """One new token: the prompts read once, against read once per completion."""
    B, G = bench.flags.prompts, bench.flags.group
    once, again, prompts = bench.sampler(B, G, 1), bench.sampler(B * G, 1, 1), bench.prompts(B)
    every = [prompt for prompt in prompts for _ in range(G)]
    return row(
        *bench.medians(lambda: once(prompts, seed=0), lambda: again(every, seed=0)),
        "s",
        f"{B} prompts x {G}",
    )


def one_rollout(bench):
    """All prompts of an update sampled together, against prompt by prompt."""
    B, G, C = bench.flags.prompts, bench.flags.group, bench.flags.completion
    together, alone, prompts = bench.sampler(B, G, C), bench.sampler(1, G, C), bench.prompts(B)
    return row(
        *bench.medians(
            lambda: together(prompts, seed=0),
            lambda: [alone([prompt], seed=0) for prompt in prompts],
        ),
        "s",
        f"{B} prompts x {G}",
    )


def compaction(bench):
    """Finished rows left out as soon as half of the places are enough, against all rows to the end."""

    class Uncompacted(ForcedLengths):
        def _compact(self, G):
            return G

    B, G, C = bench.flags.prompts, bench.flags.group, bench.flags.completion
    lengths, prompts = forced_lengths(B * G, C), bench.prompts(B)
    samplers = [
        bench.sampler(B, G, C, kind=kind, lengths=lengths, eos_token_id=2)
        for kind in (ForcedLengths, Uncompacted)
    ]
    found = [
        ((sampler(prompts, seed=0)[0] != 2).sum(-1) + 1).flatten().tolist() for sampler in samplers
    ]
    if not found[0] == found[1] == lengths.tolist():
        raise Unequal("the rows do not have the lengths that were asked for")
    return row(
        *bench.medians(*(functools.partial(sampler, prompts, seed=0) for sampler in samplers)),
        "s",
        "lengths as asked for",
    )


def compiled_step(bench):
    """The decode step compiled and replayed as a CUDA graph, against eager."""
    bench.needs_gpu()
    (B, G, C), prompts = (
        (bench.flags.prompts, bench.flags.group, bench.flags.new_tokens),
        bench.prompts(bench.flags.prompts),
    )
    samplers = [bench.sampler(B, G, C, compiled=compiled) for compiled in (True, False)]
    return row(
        *bench.medians(*(functools.partial(sampler, prompts, seed=0) for sampler in samplers)),
        "s",
        f"{B * G} rows",
    )


@torch.no_grad()
def head_type(bench):
    """Logits of all rows: bf16 products summed in float32, against a float32 copy of the head at every step."""
    bench.needs_gpu()
    head = bench.working.embed_tokens.weight
    hidden = torch.randn(bench.flags.rows, head.shape[1], device=bench.device, dtype=head.dtype)
    outcome = bench.close(bench.working.logits(hidden), hidden.float() @ head.float().T)
    return row(
        *bench.medians(
            lambda: bench.working.logits(hidden), lambda: hidden.float() @ head.float().T
        ),
        "s",
        outcome,
    )


def chunked_seconds(bench):
    n = bench.flags.group * bench.flags.new_tokens
    chunked, full = logps_operation(bench.model, n, bench.flags.chunk, bench.device, bench.dtype)
    outcome = bench.close(chunked(), full())
    peaks = [bench.peak_bytes(arm) / 2**20 for arm in (chunked, full)]
    return row(
        *bench.medians(chunked, full),
        "s",
        f"{outcome}; {peaks[0]:.0f} against {peaks[1]:.0f} MiB, both of {n} positions",
    )


def checkpointing(bench):
    """Scoring with backward, layers computed again in backward, against kept."""
    model, (prompt,) = bench.model, bench.prompts(1)
    ids = torch.randint(
        bench.vocab, (bench.flags.group, bench.flags.new_tokens), device=bench.device
    )

    def run(again):
        model.gradient_checkpointing = again
        with bench.compute():
            logps = completion_logps(model, prompt, ids)
        logps.sum().backward()
        model.zero_grad()
        model.gradient_checkpointing = False

    arms = [functools.partial(run, again) for again in (True, False)]
    peaks = [bench.peak_bytes(arm) / 2**20 for arm in arms]
    return row(*bench.medians(*arms), "s", f"{peaks[0]:.0f} against {peaks[1]:.0f} MiB")


def fused_adamw(bench):
    arms = []
    for fused in (True, False):
        parameters = [
            p.detach().clone().requires_grad_() for p in bench.model.parameters() if p.requires_grad
        ]
        for p in parameters:
            p.grad = torch.ones_like(p)
        arms.append(
            (torch.optim.AdamW(parameters, lr=1e-6, weight_decay=0.0, fused=fused).step, parameters)
        )
    times = bench.medians(*(step for step, _ in arms))
    return row(
        *times,
        "s",
        bench.close(
            *(torch.stack([p.detach().mean() for p in parameters]) for _, parameters in arms)
        ),
    )


# ------------------------------------------------------------------------------------------------
# Loading and answering at full size


def write_full_size(folder):
    """A random checkpoint of the published shape, in bf16, with the toy's tokenizer and vocabulary."""
    from model import HumanOmni, read_companions

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = HumanOmni(FULL_SIZE)
    torch.set_default_dtype(torch.float32)
    torch.nn.init.normal_(model.embed_tokens.weight, std=0.02)
    model.files = {
        name: content
        for name, content in read_companions(ROOT / "toy", {"bert": ROOT / "toy" / "bert"}).items()
        if "preprocessor" not in name
    }
    model.save_pretrained(folder)


def peak_gib():
    """Largest resident memory of this process so far, pages of mapped files included."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux: unlike getrusage, not that of the process that started this one
        return int(status.read_text().split("VmHWM:")[1].split()[0]) / 2**20
    return (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        * (2**10 if sys.platform == "linux" else 1)
        / 2**30
    )


def load_and_answer(folder, clip, tokens, dtype):
    """Load the checkpoint and answer about one clip; returns seconds and GiB."""
    from data import QUESTION_REASONING, Example, batches
    from common import clips_of, encode_clips, load, prompts_of
    from evaluate import Config
    from generate import generate

    figures, before = {"start_gib": peak_gib()}, time.perf_counter()
    model, tokenizer, bert = load(Config(model=folder), dtype=getattr(torch, dtype))
    figures["load_s"], figures["loaded_gib"] = time.perf_counter() - before, peak_gib()
    example = Example(Path(clip), QUESTION_REASONING, "", "video_audio")
    with torch.no_grad():
        mark = time.perf_counter()
        clips = next(batches(clips_of(model, [example], "pad"), [0], 1))
        figures["decode_s"], mark = time.perf_counter() - mark, time.perf_counter()
        features = encode_clips(model, clips)
        figures["towers_s"], mark = time.perf_counter() - mark, time.perf_counter()
        (prompt,) = prompts_of(model, tokenizer, bert, [example], features)
        generate(model, [prompt], max_new_tokens=1)
        figures["prompt_tokens"] = len(prompt)
        figures["prefill_s"], mark = time.perf_counter() - mark, time.perf_counter()
        generate(model, [prompt], max_new_tokens=tokens)
        figures["decode_tokens_per_s"] = (tokens - 1) / (
            time.perf_counter() - mark - figures["prefill_s"]
        )
    figures["peak_gib"] = peak_gib()
    return figures


def loading(bench):
    """Loading runs in a process of its own, so that its peak memory is that of loading. Random weights cost what trained ones
    do; a fixed number of tokens is made. Tokenizer and BERT vocabulary are the toy's."""
    with tempfile.TemporaryDirectory() as folder:
        write_full_size(Path(folder) / "model")
        size = (Path(folder) / "model" / "model.safetensors").stat().st_size / 1e9
        command = [
            sys.executable,
            __file__,
            "--loaded",
            str(Path(folder) / "model"),
            "--clip",
            bench.flags.clip,
            "--tokens",
            str(bench.flags.tokens),
            "--dtype",
            bench.flags.dtype,
        ]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    figures = json.loads(done.stdout.splitlines()[-1]) | {"file_gb": size}
    return row(
        figures["load_s"],
        unit="s",
        note=f"{bench.flags.dtype}; " + ", ".join(f"{k} {v:.2f}" for k, v in figures.items()),
        figures=figures,
    )


@dataclass
class Measure:
    """A line of the table. at_most: the target is for `ours` and not for the ratio; anywhere: not on a GPU at full size alone."""

    name: str
    what: str
    function: Callable
    target: float | None = None
    stretch: float | None = None
    at_most: bool = False
    anywhere: bool = False


MEASURES = [
    Measure("G9", "update: peak memory", update_memory, 20, 16, at_most=True),
    Measure("G10", "update: seconds", update_seconds, 2.0, 1.5, at_most=True),
    Measure(
        "G1",
        "sampling, one group, vs generate",
        lambda bench: sampling(bench, bench.flags.group),
        12,
        25,
    ),
    Measure(
        "G2",
        "sampling, more rows, vs generate",
        lambda bench: sampling(bench, bench.flags.rows),
        10,
        20,
    ),
    Measure(
        "G3",
        "as G1, vs static cache",
        lambda bench: sampling(bench, bench.flags.group, cache_implementation="static"),
        2,
        3,
    ),
    Measure(
        "G4/8",
        "decode bandwidth, one group",
        lambda bench: decode_bandwidth(bench, bench.flags.group),
        0.40,
        0.50,
    ),
    Measure(
        "G4/64",
        "decode bandwidth, more rows",
        lambda bench: decode_bandwidth(bench, bench.flags.rows),
        0.50,
        0.65,
    ),
    Measure(
        "G5",
        "one-prompt step vs the original's",
        lambda bench: updates(bench, 1, encode_again=True),
        10,
        20,
    ),
    Measure(
        "G6",
        "update vs generate + repeated prompt",
        lambda bench: updates(bench, bench.flags.prompts, encode_again=False),
        5,
        9,
    ),
    Measure(
        "G7", "scoring: shared vs repeated prompt", lambda bench: scoring(bench, repeated), 2.3, 2.8
    ),
    Measure("G8", "log-probabilities: peak memory", logps_memory, 8, 20),
    Measure("C1", "scoring: FLOPs", flops_ratio, 3.0, anywhere=True),
    Measure("C2", "tower calls per clip and update", tower_calls, 1, at_most=True, anywhere=True),
    Measure("C3", "sampling on a CPU vs generate", cpu_sampling, 1.3, 2.0, anywhere=True),
    Measure("C4", "clip to frames and sound vs decord", clip_decoding, 1.0, 1.5, anywhere=True),
    Measure("O1", "prompt read once for G completions", shared_prefill),
    Measure("O2", "one rollout for all prompts", one_rollout),
    Measure("O3", "rows compacted", compaction),
    Measure("O4", "compiled decode step, CUDA graph", compiled_step),
    Measure("O5", "bf16 head, float32 sums", head_type),
    Measure(
        "O6",
        "shared prompt, logits chunked in both",
        lambda bench: scoring(bench, repeated_chunked),
    ),
    Measure("O7", "logits in chunks: seconds", chunked_seconds),
    Measure("O8", "gradient checkpointing: seconds", checkpointing),
    Measure("O9", "fused AdamW", fused_adamw),
    Measure("load", "a full-size checkpoint: load, answer", loading),
]


def measure_one(bench, measure):
    """Its line of the table; what went wrong stands in `status`, and `failed` says that it did."""
    try:
        result = {"status": "ok", **measure.function(bench)}
    except NotHere as missing:
        result = {"status": str(missing)}
    except Unequal as difference:
        result = {"status": f"NOT EQUAL: {difference}", "failed": True}
    except Exception as error:  # the others go on; the exit code says that one failed
        traceback.print_exc()
        result = {"status": f"FAILED: {type(error).__name__}: {error}", "failed": True}
    if measure.target is not None:
        result |= {
            "target": measure.target,
            "stretch": measure.stretch,
            "met": met(bench, measure, result),
        }
    gc.collect()
    torch._dynamo.reset()
    if bench.on_gpu:
        torch.cuda.empty_cache()
    return result


def met(bench, measure, result):
    """ "yes" or "no", or "-" where the target says nothing: it is for one GPU and the full size."""
    counts = measure.anywhere or bench.on_gpu and bench.flags.preset == "full"
    value = result.get("ours" if measure.at_most else "ratio")
    if value is None or not counts:
        return "-"
    return (
        "yes" if (value <= measure.target if measure.at_most else value >= measure.target) else "no"
    )


def line(measure, result):
    """One measure as text."""

    def number(value, width):
        return f"{'' if value is None else f'{value:.4g}':>{width}}"

    text = (
        f"{measure.name:6}{measure.what:38}"
        + number(result.get("ours"), 10)
        + number(result.get("other"), 10)
        + f" {result.get('unit', ''):9}"
        + number(result.get("ratio"), 7)
        + f"{'<= ' if measure.at_most else ''}".rjust(5)
        + f"{number(measure.target, 5)}{number(measure.stretch, 7)}  {result.get('met', '')}"
    )
    return (
        text.rstrip()
        + f"\n        {result.get('note') if result['status'] == 'ok' else result['status']}"
    )


def device_name():
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    names = (
        [
            text.split(":")[1].strip()
            for text in info.read_text().splitlines()
            if text.startswith("model name")
        ]
        if info.exists()
        else []
    )
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"


def version(package):
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def parse(argv):
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="measures:\n" + "\n".join(f"  {m.name:6}{m.what}" for m in MEASURES),
    )
    parser.add_argument("--preset", default="small", choices=tuple(PRESETS))
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="measures to make (default: all but load)"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--fit", action="store_true", help="print what fits on which card, and stop"
    )
    for name, text in SIZES.items():
        defaults = ", ".join(f"{preset} {values[name]}" for preset, values in PRESETS.items())
        parser.add_argument(
            "--" + name.replace("_", "-"), type=int, help=f"{text} (default: {defaults})"
        )
    parser.add_argument(
        "--clip",
        default=str(ROOT / "tests" / "golden" / "media" / "clip.mp4"),
        help="clip of C4 and load",
    )
    parser.add_argument(
        "--tokens", type=int, default=64, help="load: length of the answer (default: 64)"
    )
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=("float32", "bfloat16"),
        help="load: of the weights in memory (default: float32)",
    )
    parser.add_argument(
        "--loaded", metavar="DIR", help=argparse.SUPPRESS
    )  # the process that `load` measures
    parser.set_defaults(**PRESETS[parser.parse_known_args(argv)[0].preset])
    flags = parser.parse_args(argv)
    groups = {m.name for m in MEASURES} | {m.name.split("/")[0] for m in MEASURES}
    if unknown := set(flags.only or ()) - groups:
        parser.error(f"no such measure: {', '.join(sorted(unknown))}")
    if flags.rows % flags.group:
        parser.error(f"--rows {flags.rows} must be a multiple of --group {flags.group}")
    return flags


def main(argv=None):
    flags = parse(argv)
    if flags.loaded:
        print(json.dumps(load_and_answer(flags.loaded, flags.clip, flags.tokens, flags.dtype)))
        return 0
    if flags.fit:
        import fit

        fit.main()
        return 0
    bench, results = Bench(flags), {}
    print(
        f"{device_name()}; preset {flags.preset} on {flags.device}; "
        + ", ".join(f"{name} {getattr(flags, name)}" for name in SIZES)
    )
    print(f"{'':44}{'ours':>10}{'other':>10} {'':9}{'ratio':>7}{'target':>10}{'stretch':>8}  met")
    for measure in MEASURES:
        if (
            {measure.name, measure.name.split("/")[0]} & set(flags.only)
            if flags.only
            else measure.name != "load"
        ):
            start = time.perf_counter()
            results[measure.name] = measure_one(bench, measure)
            results[measure.name]["took"] = round(time.perf_counter() - start, 1)
            print(line(measure, results[measure.name]), flush=True)
    print(
        json.dumps(
            {
                "device": device_name(),
                "torch": torch.__version__,
                "transformers": version("transformers"),
                "preset": flags.preset,
                "sizes": {name: getattr(flags, name) for name in SIZES},
                "threads": torch.get_num_threads(),
                "measures": results,
            }
        )
    )
    return int(any(result.get("failed") for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
