"""Evaluate checkpoints on labelled clips, or ask one about one clip.

    python evaluate.py --model DIR --data dfew.json mafw.json     WAR, UAR, recall, confusion
    python evaluate.py --model DIR --clip file.mp4                prints the completion
    python evaluate.py --model DIR --clip a.mp4 folder/           also writes answers.jsonl
    python evaluate.py --table runs/evaluate/*/*.json             the paper's table from results

Open vocabulary, as in the paper (section 4.2): the prompt lists no classes, the model names the
emotion itself. The answer is compared with the label as rewards.py does it; a word outside the
label set is wrong and counted as unknown. --aliases also says how many are right if anger counts as
angry. WAR is the accuracy, UAR the mean recall over the classes that occur in the ground truth. Of
explanations it counts EEA, EPC and FCR (support/lexicon.py).
Decoding is greedy unless --temperature is given; --samples k then averages over k completions per
clip.

--check module:function adds what a data set knows about its clips: function(row) -> {name: bool},
with row = {"completion", "label", "extra": the manifest entry's other keys}; means are reported.
For the toy: --check toy.world:check_statements.

Results go to --out, per manifest NAME: NAME.json with the metrics, the settings and every raw
completion, and NAME_confusion.png. An interrupted evaluation goes on from NAME.partial.jsonl.
"""

import glob
import json
import os
import zlib
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm

from data import QUESTION_REASONING, Example, batches, clips_of, completion_text, embed, encode
from generate import Decoding, generate
from grpo import completion_mask
from rewards import extract_answer, extract_think, format_reward
from show import confusion_counts, draw_confusion, read_lines, whole_file
from support.custom import find_function
from support.errors import DataError, naming, require, write_json
from support.flags import Common, as_asked, flag, load, parse_flags, read_examples, run_script
from support.lexicon import explanation_metrics
from support.precision import autocast
from support.ranks import RANK, WORLD, gather_from_ranks, on_first_rank, rank_file
from support.results import results_table
from support.sampler import sampler_of


@dataclass
class Settings:
    """How completions for an evaluation are made."""

    max_new_tokens: int = 512
    temperature: float = 0.0  # 0 is greedy
    top_p: float = 1.0
    samples: int = 1  # completions per clip
    seed: int = 0
    batch_size: int = 32  # clips at a time
    workers: int = 0  # processes that decode ahead
    compile: bool = True  # on a GPU
    check: object = None  # function(row) -> {name: bool}, or None


# --------------------------------------------------------------------------------------------------
# Completions


@torch.no_grad()
def evaluate(omni, clips, settings, title="evaluate", log=None, skip_log=None):
    """Complete every clip's prompt: a list of rows, one per completion, in the clips' order.

    log: a JSONL file that gets every row as soon as it is there; clips that it holds already are
    not done again. skip_log: as in `data.batches`. With several processes each does its share, and
    all get the rows."""
    rows = on_first_rank(lambda: read_log(log, settings.samples)) if log else []
    done = {row["index"] for row in rows}
    order = [i for i in range(len(clips)) if i not in done]
    rows = rows if RANK == 0 else []
    progress = tqdm(
        total=len(clips),
        initial=len(done),
        desc=title,
        unit="clip",
        leave=False,
        disable=RANK > 0,
    )
    own = order[RANK::WORLD]
    with progress:
        draw = drawing(omni, clips.examples, settings) if own else None
        for items in batches(clips, own, settings.batch_size, settings.workers, skip_log):
            if not items:  # all of them bad
                continue
            new = complete(omni, clips, items, settings, draw)
            rows += new
            if log:
                append_rows(rank_file(log), new)
            progress.update(len(items))
    return sorted(gather_from_ranks(rows), key=lambda row: row["index"])


def drawing(omni, examples, settings):
    """-> function(prompts, seed) -> ids (B, G, C): on a GPU one sampler for all batches, compiled;
    elsewhere there would be nothing to keep."""
    B, G, eos = settings.batch_size, settings.samples, omni.tokenizer.eos_token_ids
    how = (settings.max_new_tokens, settings.temperature, settings.top_p, eos)
    if omni.model.device.type != "cuda":
        return lambda prompts, seed: generate(omni.model, prompts, G, *how, seed)
    sampler = sampler_of(omni, examples, B, G, Decoding(*how), settings.compile)
    return lambda prompts, seed: sampler(prompts, seed)[0]


def complete(omni, clips, items, settings, draw):
    """Items of `data.batches` -> rows, `samples` per item."""
    batch = encode(omni, clips, items)
    with autocast(omni.model):
        prompts = embed(omni.model, batch)
        ids = draw(prompts, settings.seed + items[0]["index"]).cpu()  # (B, G, C)
    lengths = completion_mask(ids, omni.tokenizer.eos_token_ids).sum(-1)  # (B, G)
    rows = []
    for b, (item, example) in enumerate(zip(items, batch.examples)):
        for g in range(settings.samples):
            text, ended = completion_text(omni.tokenizer, ids[b, g])
            row = {
                "index": item["index"],
                "video": str(example.video),
                "label": extract_answer(example.answer),
                "completion": text,
                "tokens": int(lengths[b, g]),
                "truncated": not ended,
            }
            if settings.check:
                row["checks"] = settings.check({**row, "extra": example.extra})
            rows.append(row)
    return rows


def append_rows(log, rows):
    with naming(log), open(log, "a", encoding="utf-8") as file:
        file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_log(log, samples):
    """The rows of an unfinished evaluation, of clips that have all their samples."""
    _, *rows = read_lines(log)
    counts = Counter(row["index"] for row in rows)
    return [row for row in rows if counts[row["index"]] == samples]


# Other words for the same label, in the data sets' usual spelling. Only used on request.
ALIASES = {
    "anger": "angry",
    "happiness": "happy",
    "joy": "happy",
    "joyful": "happy",
    "sadness": "sad",
    "fearful": "fear",
    "scared": "fear",
    "afraid": "fear",
    "surprised": "surprise",
    "disgusted": "disgust",
    "contempt": "contemptuous",
    "anxiety": "anxious",
    "helplessness": "helpless",
    "disappointment": "disappointed",
    "calmness": "calm",
}


def score(rows, aliases=False):
    """Rows of `evaluate` -> metrics. With aliases, words of ALIASES count as what they stand for.

    What a check said of the rows is averaged under its own names. Of the toy it is known what the
    paper can only ask (section 5.2), how often the statements in <think> are true, and what follows
    from them: its eea, epc and fcr take the place of those that support/lexicon.py counts."""
    if not rows:
        raise DataError("no clip could be evaluated")
    labels = [row["label"] for row in rows]
    answers = [extract_answer(row["completion"]) for row in rows]
    if aliases:
        labels = [ALIASES.get(label, label) for label in labels]
        answers = [ALIASES.get(answer, answer) for answer in answers]
    count, pairs = Counter(labels), Counter(zip(labels, answers))
    recall = {label: pairs[label, label] / count[label] for label in sorted(count)}
    given = Counter(answers)
    n = len(rows)
    metrics = {
        "n": len({row["index"] for row in rows}),  # clips; with --samples each has several rows
        "completions": n,
        "war": sum(pairs[label, label] for label in count) / n,
        "uar": sum(recall.values()) / len(recall),
        # F1 = 2 TP / (2 TP + FN + FP), weighted by how frequent a class is
        "weighted_f1": sum(
            count[label] / n * 2 * pairs[label, label] / (count[label] + given[label])
            for label in count
        ),
        "recall": recall,
        "confusion": {
            label: {answer: k for (true, answer), k in sorted(pairs.items()) if true == label}
            for label in recall
        },
        "unknown": sum(answer not in count for answer in answers),
        "unformatted": sum(format_reward(row["completion"]) == 0 for row in rows),
        "format": sum(format_reward(row["completion"]) for row in rows) / n,
        "truncated": sum(row["truncated"] for row in rows),
        "mean_length": sum(row["tokens"] for row in rows) / n,
    }
    metrics |= explanation_metrics(rows)
    checks = [row["checks"] for row in rows if row.get("checks")]
    for name in checks[0] if checks else ():
        require(name not in KNOWN_METRICS, f"--check says {name}, a metric already; rename it")
        metrics[name] = sum(check[name] for check in checks) / len(checks)
    return metrics


# --------------------------------------------------------------------------------------------------
# Reports


def percent(share):
    return f"{100 * share:.1f} %"


def report(metrics):
    """The metrics as text: a summary, then recall and answers per class."""
    several = ""
    if metrics["completions"] > metrics["n"]:
        several = f" ({metrics['completions']} completions)"
    lines = [
        f"n {metrics['n']}{several}   WAR {100 * metrics['war']:.2f}   "
        f"UAR {100 * metrics['uar']:.2f}   weighted F1 {100 * metrics['weighted_f1']:.2f}   "
        f"format {percent(metrics['format'])}   mean length {metrics['mean_length']:.1f} tokens",
        f"unknown words {metrics['unknown']}   unformatted {metrics['unformatted']}   "
        f"truncated {metrics['truncated']}",
    ]
    checks = [name for name in metrics if name not in KNOWN_METRICS]
    if checks:
        lines.append("   ".join(f"{name} {percent(metrics[name])}" for name in checks))
    labels, table = confusion_counts(metrics)
    columns = [*labels, "unknown"]
    width = max(map(len, columns)) + 1
    lines += ["", "recall, and how often each answer was given (rows: truth)"]
    lines.append(" " * width + " recall" + "".join(f"{label:>{width}}" for label in columns))
    for label, counts in zip(labels, table):
        numbers = "".join(f"{k:>{width}}" for k in counts)
        lines.append(f"{label:<{width}}{100 * metrics['recall'][label]:7.1f}{numbers}")
    return "\n".join(lines)


KNOWN_METRICS = {
    "n",
    "completions",
    "war",
    "uar",
    "weighted_f1",
    "recall",
    "confusion",
    "unknown",
    "unformatted",
    "format",
    "truncated",
    "mean_length",
}


def unique_names(manifests):
    """Names for the manifests' results: the files', with as many folders as tell them apart."""
    paths = [Path(path).resolve() for path in manifests]
    if len(set(paths)) < len(paths):
        raise DataError(f"a manifest is given twice: {' '.join(map(str, manifests))}")
    for depth in range(1, max((len(path.parts) for path in paths), default=0)):
        names = ["_".join(path.with_suffix("").parts[1:][-depth:]) for path in paths]
        if len({name.casefold() for name in names}) == len(paths):
            return names
    return [f"{number}_{path.stem}" for number, path in enumerate(paths, start=1)]


# --------------------------------------------------------------------------------------------------
# The script


@dataclass
class Config(Common):
    clip: tuple = flag((), "media files, or folders of them, to answer about, instead of --data")
    out: str = flag("runs/evaluate", "folder for the results")
    temperature: float = flag(0.0, "0 is greedy", least=0, most=100)
    top_p: float = flag(1.0, "nucleus sampling, with a temperature; up to 1", above=0, most=1)
    samples: int = flag(1, "completions per clip, with a temperature", least=1, most=4096)
    max_new_tokens: int = flag(512, "longest completion", least=1, most=32768)
    batch_size: int = flag(16, "clips at a time", least=1, most=4096)
    compile: bool = flag(True, "on a GPU: compile the layers, replay sampling as a CUDA graph")
    aliases: bool = flag(False, "also score with anger = angry, fearful = fear, ...")
    check: str = flag("", "module:function that says more about each completion (see above)")
    modality_report: bool = flag(
        False, "evaluate with both media, video alone and audio alone, side by side"
    )
    table: tuple = flag((), "result files to print as one table; nothing is evaluated")
    published: bool = flag(False, "the paper's Table 1 below --table")


# What may differ when an evaluation goes on: where and how, not what.
RESUME_WITH = (
    *("data", "clip", "table", "published", "out", "workers", "device", "on_bad_clip"),
    *("aliases", "modality_report", "batch_size", "compile"),
)


def settings_of(config):
    check = find_function("--check", config.check) if config.check else None
    names = "max_new_tokens temperature top_p samples seed batch_size workers compile".split()
    return Settings(**{name: getattr(config, name) for name in names}, check=check)


def log_header(config):
    """All that the rows of an evaluation depend on beside the clips, JSON-able."""
    weights = Path(config.model).glob("*.safetensors")
    # A retrained model is another model.
    header = {"weights_changed": max((file.stat().st_mtime for file in weights), default=0)}
    header |= {key: value for key, value in asdict(config).items() if key not in RESUME_WITH}
    if config.temperature:  # then the batch decides what is drawn
        header["batch_size"] = config.batch_size
    return header


def start_log(path, header):
    """A log to go on with: created, or an unfinished one of the same header.

    Lines that are not whole are dropped, those of other ranks' logs taken in."""
    header = json.loads(json.dumps(header, default=str))
    parts = sorted(path.parent.glob(f"{glob.escape(path.stem)}.rank*.jsonl"))
    lines = [line for file in (path, *parts) if file.exists() for line in read_lines(file)]
    lines = lines or [header]
    if lines[0] != header:
        other = [name for name in header if lines[0].get(name) != header[name]]
        raise DataError(
            f"{path}: an unfinished evaluation with other settings, weights, clips or another "
            f"manifest ({', '.join(other)}); delete it or choose another --out"
        )
    partial = path.with_suffix(".new")
    partial.unlink(missing_ok=True)
    append_rows(partial, lines)
    os.replace(partial, path)
    for part in parts:
        part.unlink()
    return path


def evaluate_manifest(omni, config, manifest, name):
    """Evaluate one manifest and write its results -> metrics."""
    out = Path(config.out)
    checksum = zlib.crc32(Path(manifest).read_bytes())
    header = {"manifest": str(manifest), "manifest_checksum": checksum, **log_header(config)}
    out.mkdir(parents=True, exist_ok=True)
    log = on_first_rank(lambda: start_log(out / f"{name}.partial.jsonl", header))
    skip_log = None
    if config.on_bad_clip == "skip":
        skip_log = rank_file(out / f"{name}.skipped.txt")
    clips = clips_of(omni.model, read_examples([manifest], config), config.fit)
    rows = evaluate(omni, clips, settings_of(config), name, log, skip_log)
    metrics = score(rows)
    result = {"name": name, "settings": header, "metrics": metrics, "completions": rows}
    if config.aliases:
        result["metrics_with_aliases"] = score(rows, aliases=True)
    on_first_rank(lambda: write_json(out / f"{name}.json", result))
    on_first_rank(lambda: draw_confusion(metrics, out / f"{name}_confusion.png"))
    rank_file(log).unlink(missing_ok=True)  # not before the results are there
    print(f"\n{name}\n{report(metrics)}")
    if config.aliases:
        loose = result["metrics_with_aliases"]
        print(
            f"\nwith aliases: WAR {100 * loose['war']:.2f}   UAR {100 * loose['uar']:.2f}   "
            f"unknown words {loose['unknown']}"
        )
    say_what_is_left_out(out, name)
    return metrics


def say_what_is_left_out(out, name):
    for file in sorted(out.glob(f"{glob.escape(name)}.skipped*.txt")):
        print(f"\nclips left out are listed in {file}")


def ask(omni, config, files, log=None, skip_log=None):
    """What the model says of media files: a row of `evaluate` for each."""
    example = as_asked(Example(Path(), QUESTION_REASONING, "", "video_audio"), config)
    clips = clips_of(omni.model, [replace(example, video=Path(f)) for f in files], config.fit)
    settings = settings_of(config)
    if len(files) == 1:  # compiling, and starting processes, would take longer than answering
        settings = replace(settings, batch_size=1, compile=False, workers=0)
    return evaluate(omni, clips, settings, "answer", log, skip_log)


def answerer(folder, **flags):
    """A checkpoint, ready to be asked about clips.

        answer = answerer("runs/grpo/best")
        think, word = answer("clip.mp4")
        answers = answer(["a.mp4", "b.mp4"])    # a list of such pairs

    flags: this script's, as question="label" or device="cpu". Clips are decoded in this process:
    workers=4 does it ahead in four others, which read the script that asks again, so that it needs
    an `if __name__ == "__main__":`. Raises ClipError for a file that cannot be used."""
    config = Config(model=str(folder), **{"workers": 0, **flags})
    require(config.samples == 1, "a clip gets one answer here: leave samples out")
    omni = load(config, dtype=None)

    def answer(clips):
        one = isinstance(clips, (str, os.PathLike))
        rows = ask(omni, config, [clips] if one else list(clips))
        pairs = [(extract_think(text), extract_answer(text)) for text in completions(rows)]
        return pairs[0] if one else pairs

    return answer


def completions(rows):
    return [row["completion"] for row in rows]


ANSWERS = "answers.jsonl"
MEDIA = set(".mp4 .avi .mkv .mov .webm .flv .mpg .mpeg .m4v .wmv .ts .wav .mp3 .m4a .flac".split())


def is_media(path):
    """Hidden files are none: macOS leaves ._NAME.mp4 beside NAME.mp4."""
    return path.is_file() and path.suffix.lower() in MEDIA and not path.name.startswith(".")


def files_of(clips):
    """Files and folders -> files, those of a folder in the order of their names."""
    files = []
    for clip in map(Path, clips):
        found = [clip]
        if clip.is_dir():
            found = sorted(file for file in clip.iterdir() if is_media(file))
            if not found:
                raise DataError(f"{clip}: holds no media file ({' '.join(sorted(MEDIA))})")
        files += found
    return files


def answer_clips(omni, config):
    """Print what the model says of each clip; of several, or a folder, also write it to --out."""
    files, out = files_of(config.clip), Path(config.out)
    if files == [Path(config.clip[0])]:
        print("\n".join(completions(ask(omni, config, files))))
        return
    out.mkdir(parents=True, exist_ok=True)
    header = log_header(config) | {"clips": list(map(str, files))}
    log = on_first_rank(lambda: start_log(out / "answers.partial.jsonl", header))
    skip_log = rank_file(out / "answers.skipped.txt") if config.on_bad_clip == "skip" else None
    rows = ask(omni, config, files, log, skip_log)
    lines = []
    for row in rows:
        text = row["completion"]
        said = {"think": extract_think(text), "answer": extract_answer(text), "completion": text}
        lines.append(json.dumps({"clip": row["video"], **said}, ensure_ascii=False) + "\n")
        print(f"{row['video']}\n{text}\n")

    def write():
        with whole_file(out / ANSWERS) as partial:
            partial.write_text("".join(lines), encoding="utf-8")

    on_first_rank(write)
    rank_file(log).unlink(missing_ok=True)  # not before the answers are there
    print(f"written to {out / ANSWERS}")
    say_what_is_left_out(out, "answers")


def tasks_of(config):
    """What --data and --modality-report ask for: name of the result -> manifest, flags."""
    tasks = {}
    for manifest, name in zip(config.data, unique_names(config.data)):
        if not config.modality_report:
            tasks[name] = (manifest, config)
            continue
        for medium in ("video_audio", "video", "audio"):
            tasks[f"{name}.{medium}"] = (manifest, replace(config, modality=medium))
    return tasks


def check_result(file, manifest, model):
    """Raise DataError if the file is there, and is no earlier result of this model and manifest."""
    if not file.exists():
        return
    for name, path in (("manifest", manifest), ("model", model)):
        try:
            earlier = json.loads(file.read_text(encoding="utf-8"))["settings"][name]
            same = Path(earlier).resolve() == Path(path).resolve()
        except (OSError, ValueError, KeyError, TypeError):
            same = False
        require(same, f"{file}: is not a result of {path}; choose another --out")


def check_clip_flags(config):
    """Raise DataError for flags that --clip has no use for, and for answers that are there."""
    for name in ("aliases", "check", "modality_report"):
        require(not getattr(config, name), f"--{name.replace('_', '-')} is for --data, not --clip")
    answers = Path(config.out) / ANSWERS
    require(
        files_of(config.clip) == [Path(config.clip[0])] or not answers.exists(),
        f"{answers}: is there already; delete it or choose another --out",
    )


def main(argv=None):
    config = parse_flags(Config, __doc__, argv)
    if config.table:
        print(results_table(config.table, config.published))
        return
    if not config.model or bool(config.data) == bool(config.clip):
        raise DataError("needs --model DIR and one of --data MANIFEST and --clip FILE")
    if config.samples > 1 and not config.temperature:
        raise DataError("--samples needs a --temperature: greedy completions are all the same")
    tasks = tasks_of(config)
    for name, (manifest, _) in tasks.items():
        check_result(Path(config.out) / f"{name}.json", manifest, config.model)
    if config.clip:
        check_clip_flags(config)
    omni = load(config, dtype=None)
    if config.clip:
        answer_clips(omni, config)
        return
    lines = [f"{'':32}{'WAR':>8}{'UAR':>8}{'n':>8}{'unknown':>9}{'unformatted':>13}"]
    for name, (manifest, asked) in tasks.items():
        metrics = evaluate_manifest(omni, asked, manifest, name)
        lines.append(
            f"{name:32}{100 * metrics['war']:8.2f}{100 * metrics['uar']:8.2f}"
            f"{metrics['n']:8}{metrics['unknown']:9}{metrics['unformatted']:13}"
        )
    print("\n" + "\n".join(lines) + f"\n\nresults: {config.out}")


if __name__ == "__main__":
    run_script(main, "a smaller --batch-size or --max-new-tokens, fewer --samples")
