"""load: a checkpoint of the published size, written with random weights, loaded and asked.

Random weights cost what trained ones do; a fixed number of tokens is made. Tokenizer and BERT
vocabulary are the toy's.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import data
from bench.rows import row
from bench.sizes import FULL_SIZE, ROOT
from checkpoint import read_companions
from generate import generate
from model import HumanOmni
from support.flags import Common, load


def write_full_size(folder):
    """A random checkpoint of the published shape, in bf16."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = HumanOmni(FULL_SIZE)
    torch.set_default_dtype(torch.float32)
    torch.nn.init.normal_(model.embed_tokens.weight, std=0.02)
    base = ROOT / "toy" / "base"
    files = read_companions(base, {"bert": base / "bert"})
    model.files = {name: file for name, file in files.items() if "preprocessor" not in name}
    model.save_pretrained(folder)


def peak_gib():
    """Largest resident memory of this process so far, pages of mapped files included."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux: unlike getrusage, not that of the process that started this one
        return int(status.read_text().split("VmHWM:")[1].split()[0]) / 2**20
    unit = 2**10 if sys.platform == "linux" else 1
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class Stopwatch:
    def __init__(self):
        self.start = time.perf_counter()

    def lap(self):
        """Seconds since the last call."""
        before, self.start = self.start, time.perf_counter()
        return self.start - before


@torch.no_grad()
def load_and_answer(folder, clip, tokens, dtype):
    """Load the checkpoint and answer about one clip -> {name: seconds, GiB, ...}."""
    figures, watch = {"start_gib": peak_gib()}, Stopwatch()
    omni = load(Common(model=folder), dtype=getattr(torch, dtype))
    figures |= {"load_s": watch.lap(), "loaded_gib": peak_gib()}
    example = data.Example(Path(clip), data.QUESTION_REASONING, "", "video_audio")
    clips = data.clips_of(omni.model, [example])
    watch.lap()
    items = next(data.batches(clips, [0], 1))
    figures["decode_s"] = watch.lap()
    batch = data.encode(omni, clips, items)
    figures["towers_s"] = watch.lap()
    prompts = data.embed(omni.model, batch)
    generate(omni.model, prompts, max_new_tokens=1)
    figures |= {"prompt_tokens": len(prompts[0]), "prefill_s": watch.lap()}
    generate(omni.model, prompts, max_new_tokens=tokens)
    decoding = watch.lap() - figures["prefill_s"]
    return figures | {"decode_tokens_per_s": (tokens - 1) / decoding, "peak_gib": peak_gib()}


def loading(bench):
    """Loading runs in a process of its own, so that its peak memory is that of loading."""
    flags = bench.flags
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        write_full_size(model)
        size = (model / "model.safetensors").stat().st_size / 1e9
        command = [sys.executable, "-m", "bench", "--loaded", str(model), "--dtype", flags.dtype]
        command += ["--clip", str(Path(flags.clip).resolve()), "--tokens", str(flags.tokens)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    figures = json.loads(done.stdout.splitlines()[-1]) | {"file_gb": size}
    told = ", ".join(f"{name} {value:.2f}" for name, value in figures.items())
    return row(figures["load_s"], unit="s", note=f"{flags.dtype}; {told}", figures=figures)
