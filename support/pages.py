"""Pages to look at: a run of GRPO, one clip under several models, results side by side.

    run_page("runs/grpo", "page.html")
    clip_page("clip.mp4", ["runs/toy/cold_start_0", "runs/grpo/best"], "page.html")
    table_page(cells, "table.html")

A page is one file: page.html beside this one, filled in, with its pictures inside. It loads
nothing, and what a model wrote is text in it, whatever it holds.
"""

import base64
import math
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import jinja2
import matplotlib
import torch
from torchvision.io import encode_jpeg

import evaluate
from checkpoint import CheckpointError, read_config
from data import QUESTION_REASONING, Example, clips_of
from rewards import extract_answer
from show import PANELS, is_page, read_lines, read_metrics, whole_file
from support.errors import DataError, is_file, read_json, require
from support.flags import as_asked, load, name_of, parse_flags

# What to look for in each panel of the curves; docs/metrics.md says more.
LOOK_FOR = {
    "reward by component": "Format first, accuracy after. Their sum could hide that one falls.",
    "KL to the reference (nats per token)": "Starts at 0 and grows slowly. A sudden jump is the "
    "policy leaving what it has learned.",
    "entropy (nats per token)": "Falls as the policy becomes sure. At 0 nothing is explored any "
    "more.",
    "validation": "Greedy answers to clips that are not trained on. The best is kept in best/.",
    "completion length (tokens)": "A completion that reaches the limit is cut off, and hardly "
    "ever has the format.",
    "groups with equal rewards (share)": "They teach nothing: too easy, or too hard.",
    "gradient norm": "Before clipping. A jump to ten times the usual is a reason to look.",
    "rollout against scoring (nats per token)": "The same weights, computed in two ways: as small "
    "as rounding, and not growing.",
}


def page_path(path):
    """The path, if a page can have it. Raises DataError."""
    path = Path(path)
    require(is_page(path), f"{path}: a page's name ends with .html")
    require(not path.is_dir(), f"{path}: is a folder; give the page a name, such as page.html")
    return path


def write_page(path, **shown):
    """Fill in page.html. shown: run, clip or table, and what it needs."""
    path = page_path(path)
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    nothing = dict.fromkeys(("run", "clip", "table"))
    page = templates.get_template("page.html").render(nothing | shown)
    with whole_file(path) as partial:
        partial.write_text(page, encoding="utf-8", errors="replace")


# --------------------------------------------------------------------------------------------------
# What a model gets of a clip


def picture(pixels):
    """(3, h, w) uint8 -> the address of a JPEG that lies in the page itself."""
    content = encode_jpeg(pixels.contiguous(), quality=92).numpy().tobytes()
    return "data:image/jpeg;base64," + base64.b64encode(content).decode()


def picture_of_mel(mel):
    """(n_mels, M) log-mel -> its address, and the seconds that it shows: those with sound."""
    sounding = (mel > mel.min()).any(dim=0).nonzero()
    mel = mel[:, : int(sounding.max()) + 1 if len(sounding) else 1]
    shares = (mel - mel.min()) / (mel.max() - mel.min()).clamp(min=1e-6)
    colours = matplotlib.colormaps["magma"](shares.flip(0).numpy(), bytes=True)[..., :3]
    return picture(torch.from_numpy(colours.copy()).permute(2, 0, 1)), mel.shape[1] / 100


def seen(clips, i):
    """Clip i as the towers get it -> what the page shows of it, or why it cannot be shown."""
    view = {"error": "", "frames": [], "mel": "", "facts": ""}
    try:
        item = clips[i]
    except DataError as error:
        return view | {"error": str(error)}
    facts = []
    if item["pixel_values"] is not None:
        pixels = ((item["pixel_values"] + 1) * 127.5).round().to(torch.uint8)  # (T, 3, S, S)
        view["frames"] = [picture(frame) for frame in pixels]
        facts.append(f"{len(pixels)} frames, {pixels.shape[-1]} × {pixels.shape[-1]}")
    if item["input_features"] is not None:
        view["mel"], seconds = picture_of_mel(item["input_features"])
        facts.append(f"{seconds:.1f} s of log-mel, {len(item['input_features'])} bands")
    return view | {"facts": " · ".join(facts)}


# --------------------------------------------------------------------------------------------------
# A run

# What is raised where a file of a run lacks a key, or holds a text in a number's place.
UNEXPECTED = (
    *(LookupError, TypeError, ValueError, AttributeError, ArithmeticError),
    jinja2.UndefinedError,
)


def run_page(folder, out):
    """A page about a run of train_grpo.py, also one that goes on. Raises DataError."""
    folder = Path(folder)
    metrics_file = folder / "metrics.jsonl"
    require(
        is_file(metrics_file),
        f"{metrics_file}: no such file; give the --out folder of a run of train_grpo.py",
    )
    metrics = read_metrics(metrics_file)
    configs = [line["config"] for line in read_lines(metrics_file) if "config" in line]
    require(configs, f"{metrics_file}: does not begin with the run's flags")
    completions = folder / "completions.jsonl"
    groups = read_lines(completions) if is_file(completions) else []
    results = read_json(folder / "results.json", {})
    try:
        write_page(out, run=view_of_run(folder, configs[-1], metrics, groups, results))
    except (DataError, CheckpointError):
        raise
    except UNEXPECTED as error:
        raise DataError(
            f"{folder}: its metrics.jsonl, results.json or completions.jsonl is not as "
            f"train_grpo.py writes it ({type(error).__name__}: {error}); move one of the last two "
            "away, and the page does without"
        ) from error


def view_of_run(folder, config, metrics, groups, results):
    """What a run's files hold -> what the page shows of it."""
    run = {
        "name": str(folder),
        "config": config,
        "updates": len(metrics),
        "finished": bool(results),
        "tests": tests_of(results),
        "charts": charts_of(metrics),
        "groups": [view_of_group(group, config) for group in groups if "pieces" in group],
        "clips": pairs_of(results),
    }
    shown = [*run["groups"], *run["clips"]]
    for view, media in zip(shown, media_of(folder, shown, config["fit"])):
        view["media"] = media
    return run


def media_of(folder, views, fit):
    """What the run's model got of each view's clip; without a checkpoint, nothing yet."""
    saved = [folder / name for name in ("last", "best") if (folder / name).exists()]
    if not saved:
        return [None] * len(views)
    say_if_none_is_found(views)
    names = {"llm": "", "siglip": "siglip", "whisper": "whisper"}
    configs = {name: read_config(saved[0] / place / "config.json") for name, place in names.items()}
    examples = [Example(Path(view["video"]), "", "", view["modality"]) for view in views]
    model = SimpleNamespace(configs=configs, device=torch.device("cpu"))  # its sizes are enough
    clips = clips_of(model, examples, fit)
    return [seen(clips, i) for i in range(len(views))]


def say_if_none_is_found(views):
    """A run keeps its clips' paths as training was given them."""
    clips = [Path(view["video"]) for view in views if view["modality"] != "text"]
    if clips and not any(clip.is_absolute() or is_file(clip) for clip in clips):
        print(
            f"no clip is found, {clips[0]} for one: their paths are relative to where training "
            "was started; run this there"
        )


def tests_of(results):
    """results.json -> a row per test and moment, in the order in which they are printed."""
    if not results:
        return []
    return [
        {"test": name, "when": when, **results[when][name]}
        for name in results["before"]
        for when in ("before", "after")
    ]


def pairs_of(results):
    """results.json -> what was said of a few clips of each test, before and after."""
    pairs = []
    for test, before in results.get("before", {}).items():
        after = {row["index"]: row for row in results["after"][test].get("examples", ())}
        for row in before.get("examples", ()):
            if row["index"] in after:
                said = {"before": row, "after": after[row["index"]]}
                answers = [
                    {"when": when, **said_in(row["completion"])} for when, row in said.items()
                ]
                facts = {key: row[key] for key in ("video", "label", "modality")}
                pairs.append({"test": test, "answers": answers, **facts})
    return pairs


def said_in(completion):
    return {"text": completion, "answer": extract_answer(completion)}


# --------------------------------------------------------------------------------------------------
# Curves


def charts_of(metrics):
    """The panels of show.draw_curves, for the page to draw."""
    rewards = [name for name in metrics[-1] if name.startswith("reward_")]
    panels = {"reward by component": rewards, **PANELS}
    return [chart(title, names, metrics) for title, names in panels.items()]


def chart(title, names, metrics):
    """-> lines of (x, y) from 0 to 100, y downwards, over the updates that measured the metric."""
    lines, first, last = [], metrics[0]["update"], metrics[-1]["update"]
    for name in names:
        points = [(line["update"], line[name]) for line in metrics if line.get(name) is not None]
        if points:
            lines.append({"name": name, "points": points, "last": points[-1][1]})
    values = [value for line in lines for _, value in line["points"]]
    top, bottom = round_up(max(values, default=0)), 0 - round_up(-min(values, default=0))
    if top == bottom:  # all 0
        top = 1.0
    for line in lines:
        line["points"] = [
            (
                round(100 * (update - first) / max(1, last - first), 2),
                round(100 * (top - value) / (top - bottom), 2),
            )
            for update, value in line["points"]
        ]
    scale = [f"{value:.3g}" for value in (top, (top + bottom) / 2, bottom)]
    note = LOOK_FOR.get(title, "")
    return {"title": title, "note": note, "lines": lines, "scale": scale, "ends": (first, last)}


def round_up(value):
    """The next of 1, 2, 2.5, 5, 10, 20, ...; 0 for what is not above 0."""
    if value <= 0:
        return 0.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 2.5, 5, 10, 20) if value <= step * power * 1.000001)


# --------------------------------------------------------------------------------------------------
# A group, token by token

# Of log pi_ref - log pi: e^20 is 5e8, and e^710 is no float any more.
LARGEST_GAP = 20.0


def pulls(advantage, logps, ref_logps, beta):
    """What the gradient of grpo.grpo_loss asks of each token of a completion, in a rollout's first
    step: its objective's derivative by log pi.

    The objective of a token is min(ratio A, clip(ratio) A) - beta KL. In the first step the ratio
    pi / pi_old is 1, inside the clip, and its derivative by log pi is the ratio: so A remains. The
    KL is k3 (grpo.per_token_kl), e^d - d - 1 with d = log pi_ref - log pi, whose derivative by
    log pi is 1 - e^d. Together

        pull = A - beta (1 - e^d)        e^d = pi_ref / pi

    A token that is likelier than under the reference is pulled back, a less likely one is held up.
    The loss's gradient is -pull / (tokens of the completion) / (completions of the update).

    logps, ref_logps: a number per token; ref_logps may be None -> a list of pulls, and of the KL's
    parts in them, -beta (1 - e^d), where d is at most LARGEST_GAP."""
    parts = [0.0] * len(logps)
    if beta and ref_logps is not None:
        gaps = [min(ref - logp, LARGEST_GAP) for logp, ref in zip(logps, ref_logps)]
        parts = [beta * math.expm1(gap) for gap in gaps]
    return [advantage + part for part in parts], parts


def view_of_group(group, config):
    """A line of completions.jsonl with tokens -> what the page shows: completions by advantage."""
    beta = config["beta"] if config["kl"] == "loss" else 0.0
    completions = []
    for g, advantage in enumerate(group["advantages"]):
        completion = {
            "advantage": advantage,
            "rewards": {name: values[g] for name, values in group["rewards"].items()},
            "ended": group["ended"][g],
            "learns": group["ended"][g] or not config["mask_truncated"],
        }
        refs = group["ref_logps"][g] if group["ref_logps"] else None
        completion["tokens"] = tokens_of(
            completion, group["pieces"][g], group["logps"][g], refs, beta
        )
        completions.append(completion)
    colour(completions)
    completions.sort(key=lambda completion: -completion["advantage"])
    facts = {key: group[key] for key in ("update", "video", "label", "question", "modality")}
    return {**facts, "completions": completions, "equal": not any(group["advantages"])}


def tokens_of(completion, pieces, logps, refs, beta):
    """-> a dict per token: its text, what is said about it, and what its gradient asks for."""
    advantage, tokens = completion["advantage"], []
    both = pulls(advantage, logps, refs, beta)
    for text, logp, ref, pull, kl in zip(pieces, logps, refs or [None] * len(logps), *both):
        said = [repr(text), f"log π {logp + 0.0:.3f} ({math.exp(logp):.1%})"]
        if ref is not None:
            said.append(f"reference {ref + 0.0:.3f} ({math.exp(ref):.1%})")
        if completion["learns"]:
            said.append(f"pull {signed(pull)} = A {signed(advantage)} and KL {signed(kl)}")
        else:
            pull = kl = 0.0
        asked = {"pull": pull, "kl": kl, "logit": pull * (1 - math.exp(logp))}
        shown = text.replace("\n", "⏎\n")
        tokens.append({"text": shown, "said": " · ".join(said), "asked": asked})
    return tokens


def signed(number):
    return f"{round(number, 3) + 0.0:+.3f}"  # + 0.0: no "-0.000"


def colour(completions):
    """Adds the tokens' colours, from -1 to 1 as the group's largest numbers are."""
    everything = [token["asked"] for completion in completions for token in completion["tokens"]]
    largest = {
        name: max((abs(asked[name]) for asked in everything), default=0)
        for name in ("pull", "kl", "logit")
    }
    # A single token's KL may be huge, and is nothing but rounding in the first update.
    scale = max(abs(completion["advantage"]) for completion in completions) or largest["pull"] or 1
    scales = {
        "pull": scale,
        "kl": max(largest["kl"], 0.02 * scale),
        "logit": min(largest["logit"], scale) or 1,
    }
    for asked in everything:
        for name, unit in scales.items():
            asked[name] = round(max(-1, min(1, asked[name] / unit)), 3)


# --------------------------------------------------------------------------------------------------
# One clip under several models, and results side by side

# Those of evaluate.py's flags that say what one clip's answer is.
USED = (
    *("model", "siglip", "whisper", "bert", "device", "dtype", "question", "modality", "fit"),
    *("max_new_tokens", "temperature", "top_p", "samples", "seed"),
)


def check_used(config):
    """Raise DataError for flags that the page of one clip has no use for."""
    default = evaluate.Config(workers=0)
    unused = [
        name_of(f)
        for f in fields(config)
        if f.name not in USED and getattr(config, f.name) != getattr(default, f.name)
    ]
    require(not unused, f"{', '.join(unused)}: of no use for the page of a clip; leave it out")


def clip_page(path, models, out, flags=()):
    """What checkpoints get of one clip, and say. flags: words of evaluate.py's command line."""
    page_path(out)  # before models are loaded
    inputs = []  # one for all, unless they have different sizes
    for model in models:
        # One clip is decoded sooner than a process starts that could decode it ahead.
        words = ["--workers", "0", *flags, "--model", str(model)]
        config = parse_flags(evaluate.Config, evaluate.__doc__, words)
        check_used(config)
        omni = load(config, dtype=None)
        rows = evaluate.ask(omni, config, [path])
        example = as_asked(Example(Path(path), QUESTION_REASONING, "", "video_audio"), config)
        media = seen(clips_of(omni.model, [example], config.fit), 0)
        if media not in [other["media"] for other in inputs]:
            inputs.append({"media": media, "answers": []})
        (same,) = [other for other in inputs if other["media"] == media]
        same["answers"] += [{"model": str(model), **said_in(row["completion"])} for row in rows]
    write_page(out, clip={"name": str(path), "question": example.question, "inputs": inputs})


def table_page(cells, out):
    """cells: model -> {data set: (WAR, UAR)}, in percent."""
    sets = list(dict.fromkeys(name for row in cells.values() for name in row))
    write_page(out, table={"sets": sets, "cells": cells})
