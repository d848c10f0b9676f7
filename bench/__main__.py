"""This code against the usual ways of doing the same, side by side on one machine, random weights.

    python -m bench                     --preset small: a small model, any CPU, about two minutes
    python -m bench --preset full       the published 0.5B shape, on one GPU
    python -m bench --only G1 C4        some measures by name; --help lists them
    python -m bench --only T3           an update against TRL's GRPOTrainer, on a CPU
    python -m bench --only load         a full-size checkpoint written, loaded, asked about one clip
    python -m bench --fit               what fits on which card, counted and not measured

The other arm is `transformers` (Qwen2ForCausalLM with our weights), TRL, or our own model used in
the plain way. Both arms are first checked to compute the same; then they are timed in turns, and
medians are compared: a ratio above 1 means that this code is faster, or smaller, so many times.
Prints one table, and one JSON line last. Exit code 1 if a measure fails or its arms disagree.

Packages that the other arm alone needs are not in requirements.txt; without them those lines say
so. They are transformers (G1, G2, G3, G5, G6, C3), decord (C4) and TRL (T3). Sizes come from the
preset; flags that are given win.

Shapes: B prompts · G completions per prompt · R = B*G rows · P prompt length · C completion length
"""

import argparse
import gc
import importlib.metadata
import json
import os
import platform
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from bench import full_size, measures, memory, switches, trl_arm
from bench.measures import PRESETS
from bench.rows import NotHere, Unequal
from bench.sizes import ROOT
from bench.workbench import Bench

CLIP = ROOT / "tests" / "golden" / "media" / "clip.mp4"
SIZES = {
    "prompt_tokens": "P",
    "new_tokens": "tokens per row where only sampling or only scoring is timed",
    "rows": "of G2 and G4/64",
    "prompts": "B of an update",
    "group": "G",
    "completion": "longest completion of an update",
    "micro_batch": "prompts scored at a time",
    "chunk": "positions per chunk of logits",
    "repeats": "timings per arm",
}


@dataclass
class Measure:
    """A line of the table. Targets of G are for one GPU at full size, others for any machine."""

    name: str
    what: str
    function: Callable  # Bench -> row
    target: float | None = None
    stretch: float | None = None
    at_most: bool = False  # the target is for `ours`, not for the ratio
    if_asked: bool = False  # made only with --only

    @property
    def names(self):
        """What it can be asked for by: G4/8 by G4 too."""
        return {self.name, self.name.split("/")[0]}


def sampling_static(bench):
    return measures.sampling(bench, bench.flags.group, cache_implementation="static")


def group_of(measure):
    return lambda bench: measure(bench, bench.flags.group)


def rows_of(measure):
    return lambda bench: measure(bench, bench.flags.rows)


def original_step(bench):
    return measures.updates(bench, 1, encode_again=True)


def usual_update(bench):
    return measures.updates(bench, bench.flags.prompts, encode_again=False)


def scoring_of(other_way):
    return lambda bench: measures.scoring(bench, other_way)


def trl_of(preset):
    return lambda bench: trl_arm.against_trl(bench, preset)


MEASURES = [
    Measure("G9", "update: peak memory", measures.update_memory, 20, 16, at_most=True),
    Measure("G10", "update: seconds", measures.update_seconds, 2.0, 1.5, at_most=True),
    Measure("G1", "sampling, one group, vs generate", group_of(measures.sampling), 12, 25),
    Measure("G2", "sampling, more rows, vs generate", rows_of(measures.sampling), 10, 20),
    Measure("G3", "as G1, vs static cache", sampling_static, 2, 3),
    Measure("G4/8", "decode bandwidth, one group", group_of(measures.bandwidth), 0.40, 0.50),
    Measure("G4/64", "decode bandwidth, more rows", rows_of(measures.bandwidth), 0.50, 0.65),
    Measure("G5", "one-prompt step vs the original's", original_step, 10, 20),
    Measure("G6", "update vs generate + repeated prompt", usual_update, 5, 9),
    Measure("G7", "scoring: shared vs repeated prompt", scoring_of(measures.repeated), 2.3, 2.8),
    Measure("G8", "log-probabilities: peak memory", measures.logps_memory, 8, 20),
    Measure("C1", "scoring: FLOPs", measures.flops_ratio, 3.0),
    Measure("C2", "tower calls per clip and update", measures.tower_calls, 1, at_most=True),
    Measure("C3", "sampling on a CPU vs generate", measures.cpu_sampling, 1.3, 2.0),
    Measure("C4", "clip to frames and sound vs decord", measures.clip_decoding, 1.0, 1.5),
    Measure("K2", "padding among scored positions", measures.padding, 20, 10, at_most=True),
    Measure("O1", "prompt read once for G completions", switches.shared_prefill),
    Measure("O2", "one rollout for all prompts", switches.one_rollout),
    Measure("O3", "rows compacted", switches.compaction),
    Measure("O4", "compiled decode step, CUDA graph", switches.compiled_step),
    Measure("O5", "bf16 head, float32 sums", switches.head_type),
    Measure("O6", "as G7, logits chunked in both", scoring_of(switches.repeated_chunked)),
    Measure("O7", "logits in chunks: seconds", switches.chunked_seconds),
    Measure("O8", "gradient checkpointing: seconds", switches.checkpointing),
    Measure("O9", "fused AdamW", switches.fused_adamw),
    Measure("O10", "prompts scored together", switches.prompts_together),
    Measure("T3/toy", "update vs TRL, toy's size", trl_of("toy"), 4, 8, if_asked=True),
    Measure("T3/256", "update vs TRL, width 256", trl_of("small"), 6, 8, if_asked=True),
    Measure("load", "full-size checkpoint: load, answer", full_size.loading, if_asked=True),
]


def measure_one(bench, measure):
    """Its line of the table; what went wrong stands in `status`, and `failed` says that it did."""
    start = time.perf_counter()
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
        result |= {"target": measure.target, "stretch": measure.stretch}
        result["met"] = met(bench, measure, result)
    gc.collect()
    if bench.on_gpu:
        torch.cuda.empty_cache()
    return result | {"took": round(time.perf_counter() - start, 1)}


def met(bench, measure, result):
    """ "yes" or "no", or "-" where the target says nothing."""
    counts = measure.name[0] != "G" or bench.on_gpu and bench.flags.preset == "full"
    value = result.get("ours" if measure.at_most else "ratio")
    if value is None or not counts:
        return "-"
    good = value <= measure.target if measure.at_most else value >= measure.target
    return "yes" if good else "no"


def line(measure, result):
    """One measure as text."""

    def number(value, width):
        return f"{'' if value is None else f'{value:.4g}':>{width}}"

    text = (
        f"{measure.name:7}{measure.what:38}"
        + number(result.get("ours"), 10)
        + number(result.get("other"), 10)
        + f" {result.get('unit', ''):9}"
        + number(result.get("ratio"), 7)
        + f"{'<= ' if measure.at_most else ''}".rjust(5)
        + f"{number(measure.target, 5)}{number(measure.stretch, 7)}  {result.get('met', '')}"
    )
    told = result.get("note") if result["status"] == "ok" else result["status"]
    return f"{text.rstrip()}\n        {told}"


def device_name():
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info, name = Path("/proc/cpuinfo"), platform.machine()
    if info.exists():
        lines = info.read_text().splitlines()
        names = [text.split(":")[1].strip() for text in lines if text.startswith("model name")]
        name = names[0] if names else name
    return f"{name}, {os.cpu_count()} cores"


def version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def parse(argv):
    lines = [f"  {measure.name:7}{measure.what}" for measure in MEASURES]
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="measures:\n" + "\n".join(lines),
    )
    text = "measures to make (default: all but T3 and load)"
    parser.add_argument("--only", nargs="+", metavar="NAME", help=text)
    parser.add_argument("--preset", default="small", choices=tuple(PRESETS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    text = "print what fits on which card, and stop"
    parser.add_argument("--fit", action="store_true", help=text)
    for name, text in SIZES.items():
        defaults = ", ".join(f"{preset} {sizes[name]}" for preset, sizes in PRESETS.items())
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, type=int, help=f"{text} (default: {defaults})")
    parser.add_argument("--clip", default=str(CLIP), help="clip of C4 and load")
    text = "load: length of the answer (default: 64)"
    parser.add_argument("--tokens", type=int, default=64, help=text)
    text = "load: of the weights in memory (default: float32)"
    choices = ("float32", "bfloat16")
    parser.add_argument("--dtype", default="float32", choices=choices, help=text)
    # The process that `load` measures.
    parser.add_argument("--loaded", metavar="DIR", help=argparse.SUPPRESS)
    parser.set_defaults(**PRESETS[parser.parse_known_args(argv)[0].preset])
    flags = parser.parse_args(argv)
    known = {name for measure in MEASURES for name in measure.names}
    if unknown := set(flags.only or ()) - known:
        parser.error(f"no such measure: {', '.join(sorted(unknown))}")
    if flags.rows % flags.group:
        parser.error(f"--rows {flags.rows} must be a multiple of --group {flags.group}")
    return flags


def main(argv=None):
    flags = parse(argv)
    if flags.loaded:
        figures = full_size.load_and_answer(flags.loaded, flags.clip, flags.tokens, flags.dtype)
        print(json.dumps(figures))
        return 0
    if flags.fit:
        memory.main()
        return 0
    bench, results = Bench(flags), {}
    sizes = {name: getattr(flags, name) for name in SIZES}
    told = ", ".join(f"{name} {size}" for name, size in sizes.items())
    print(f"{device_name()}; preset {flags.preset} on {flags.device}; {told}")
    print(f"{'':45}{'ours':>10}{'other':>10} {'':9}{'ratio':>7}{'target':>10}{'stretch':>8}  met")
    for measure in MEASURES:
        if measure.names & set(flags.only) if flags.only else not measure.if_asked:
            results[measure.name] = measure_one(bench, measure)
            print(line(measure, results[measure.name]), flush=True)
    summary = {
        "device": device_name(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "trl": version("trl"),
        "preset": flags.preset,
        "sizes": sizes,
        "threads": torch.get_num_threads(),
        "measures": results,
    }
    print(json.dumps(summary))
    return int(any(result.get("failed") for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
