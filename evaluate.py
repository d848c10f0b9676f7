"""Evaluate checkpoints on labelled clips, or ask one about one clip.

    python evaluate.py --model DIR --data dfew.json mafw.json     WAR, UAR, recall, confusion per manifest
    python evaluate.py --model DIR --clip file.mp4                prints the completion
    python evaluate.py --table runs/evaluate/*/*.json             the paper's table from saved results

Open vocabulary, as in the paper (section 4.2): the prompt lists no classes, the model names the emotion itself. The
answer is compared with the label after trimming, lower-casing and dropping trailing punctuation; a word outside the
label set is wrong and counted as unknown. --aliases also says how many are right if anger counts as angry. WAR is the
accuracy, UAR the mean recall over the classes that occur in the ground truth. Decoding is greedy unless --temperature
is given; --samples k then averages over k completions per clip.

Results go to --out, per manifest NAME: NAME.json with the metrics, the settings and every raw completion, and
NAME_confusion.png. An interrupted evaluation goes on from NAME.partial.jsonl.
"""

import glob
import json
import os
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import matplotlib
import torch
from tqdm import tqdm

from common import Common, as_asked, clips_of, compute, decode, encode_clips, flag, load, parse_flags, prompts_of, read_examples, run
from data import QUESTION_REASONING, DataError, Example, batches
from distributed import RANK, WORLD, first, gather, own
from generate import generate
from grpo import completion_mask
from rewards import extract_answer, format_reward
from toy import follows, read_statements, write_json

matplotlib.use("Agg")  # draws to files; no display needed
import matplotlib.pyplot as plt  # noqa: E402


@torch.no_grad()
def evaluate(model, tokenizer, bert, examples, *, fit="pad", batch_size=32, workers=0, max_new_tokens=512, temperature=0.0,
             top_p=1.0, samples=1, seed=0, title="evaluate", log=None, skip_log=None):
    """Complete every example's prompt: a list of rows, one per completion, in the order of the examples.

    log: a JSONL file that gets every row as soon as it is there; examples that it holds already are not done again.
    With several processes each does its share, and all get the rows."""
    rows = first(lambda: [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()[1:]]) if log else []
    done = {index for index, count in Counter(row["index"] for row in rows).items() if count == samples}
    rows = [row for row in rows if row["index"] in done]
    order = [i for i in range(len(examples)) if i not in done]
    order, rows = order[RANK::WORLD], rows if RANK == 0 else []
    with tqdm(total=len(examples), initial=len(done), desc=title, unit="clip", leave=False, disable=RANK > 0) as progress, compute(model):
        for clips in batches(clips_of(model, examples, fit), order, batch_size, workers, skip_log=skip_log):
            if not clips:  # all of them bad
                continue
            batch = [examples[clip["index"]] for clip in clips]
            prompts = prompts_of(model, tokenizer, bert, batch, encode_clips(model, clips))
            ids = generate(model, prompts, samples, max_new_tokens, temperature, top_p, tokenizer.eos_token_id,
                           seed + clips[0]["index"]).cpu()  # (B, G, C)
            new = []
            for clip, example, group in zip(clips, batch, ids):
                for row in group:
                    text, ended = decode(tokenizer, row)
                    length = int(completion_mask(row[None], tokenizer.eos_token_id).sum())
                    cues = {cue: example.extra[cue] for cue in ("face", "voice") if cue in example.extra}  # the toy knows them
                    new.append({"index": clip["index"], "video": str(example.video), "label": extract_answer(example.answer),
                                "completion": text, "tokens": length, "truncated": not ended, **cues})
            rows += new
            if log:
                with open(own(log), "a", encoding="utf-8") as file:
                    file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in new))
            progress.update(len(batch))
    return sorted(gather(rows), key=lambda row: row["index"])


# Other words for the same label, in the data sets' usual spelling. Only used on request.
ALIASES = {"anger": "angry", "happiness": "happy", "joy": "happy", "joyful": "happy", "sadness": "sad", "fearful": "fear",
           "scared": "fear", "afraid": "fear", "surprised": "surprise", "disgusted": "disgust", "contempt": "contemptuous",
           "anxiety": "anxious", "helplessness": "helpless", "disappointment": "disappointed", "calmness": "calm"}


def score(rows, aliases=False):
    """Rows of `evaluate` -> metrics. With aliases, words of ALIASES count as the label they stand for.

    Rows of the toy also say what face and voice did. Then it is known what the paper can only ask (section 5.2): how often
    the statements in <think> are true, and how often the answer follows from them, true or not."""
    if not rows:
        raise DataError("no clip could be evaluated")
    same = ALIASES.get if aliases else lambda word, default: default
    true = [same(row["label"], row["label"]) for row in rows]
    answers = [extract_answer(row["completion"]) for row in rows]
    answers = [same(answer, answer) for answer in answers]
    count, pairs = Counter(true), Counter(zip(true, answers))
    recall = {label: pairs[label, label] / count[label] for label in sorted(count)}
    n = len(rows)
    metrics = {
        "n": len({row["index"] for row in rows}),  # clips; with --samples there are several rows of each
        "completions": n,
        "war": sum(pairs[label, label] for label in count) / n,
        "uar": sum(recall.values()) / len(recall),
        "format": sum(format_reward(row["completion"]) for row in rows) / n,
        "mean_length": sum(row["tokens"] for row in rows) / n,
        "unknown": sum(answer not in count for answer in answers),
        "unformatted": sum(not format_reward(row["completion"]) for row in rows),
        "truncated": sum(row["truncated"] for row in rows),
        "recall": recall,
        "confusion": {label: {answer: k for (truth, answer), k in sorted(pairs.items()) if truth == label} for label in recall},
    }
    if all("face" in row and "voice" in row for row in rows):
        stated = [read_statements(row["completion"]) for row in rows]
        metrics["face_true"] = sum(face == row["face"] for (face, _), row in zip(stated, rows)) / n
        metrics["voice_true"] = sum(voice == row["voice"] for (_, voice), row in zip(stated, rows)) / n
        metrics["follows"] = sum(follows(row["completion"], extract_answer(row["completion"])) for row in rows) / n
    return metrics


# ------------------------------------------------------------------------------------------------
# Reports


def confusion_counts(metrics):
    """-> labels, and one list of counts per true label: answers with each label, then unknown words."""
    labels = list(metrics["recall"])
    table = []
    for label in labels:
        answers = metrics["confusion"][label]
        known = [answers.get(other, 0) for other in labels]
        table.append([*known, sum(answers.values()) - sum(known)])
    return labels, table


def report(metrics):
    """The metrics as text: a summary, then recall and answers per class."""
    several = f" ({metrics['completions']} completions)" if metrics["completions"] > metrics["n"] else ""
    lines = [f"n {metrics['n']}{several}   WAR {100 * metrics['war']:.2f}   UAR {100 * metrics['uar']:.2f}   "
             f"format {100 * metrics['format']:.1f} %   mean length {metrics['mean_length']:.1f} tokens",
             f"unknown words {metrics['unknown']}   unformatted {metrics['unformatted']}   truncated {metrics['truncated']}"]
    if "face_true" in metrics:
        lines.append(f"statements true: face {100 * metrics['face_true']:.1f} %   voice {100 * metrics['voice_true']:.1f} %"
                     f"   answer follows from them: {100 * metrics['follows']:.1f} %")
    labels, table = confusion_counts(metrics)
    width = max(map(len, [*labels, "unknown"])) + 1
    lines += ["", "recall, and how often each answer was given (rows: truth)",
              " " * width + " recall" + "".join(f"{label:>{width}}" for label in [*labels, "unknown"])]
    for label, counts in zip(labels, table):
        lines.append(f"{label:<{width}}{100 * metrics['recall'][label]:7.1f}" + "".join(f"{k:>{width}}" for k in counts))
    return "\n".join(lines)


def draw_confusion(metrics, path):
    """The confusion table as a picture; colour is the share of the row."""
    labels, table = confusion_counts(metrics)
    figure, axis = plt.subplots(figsize=(1.5 + 0.7 * len(labels), 1 + 0.6 * len(labels)))
    axis.imshow([[k / max(1, sum(counts)) for k in counts] for counts in table], cmap="Blues", vmin=0, vmax=1)
    for y, counts in enumerate(table):
        for x, k in enumerate(counts):
            axis.text(x, y, k, ha="center", va="center", fontsize=8, color="white" if k > 0.5 * sum(counts) else "black")
    axis.set_xticks(range(len(labels) + 1), [*labels, "unknown"], rotation=45, ha="right")
    axis.set_yticks(range(len(labels)), labels)
    axis.set(xlabel="answer", ylabel="truth", title=f"WAR {100 * metrics['war']:.1f}, UAR {100 * metrics['uar']:.1f}")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


PUBLISHED = {  # the paper's Table 1: WAR, UAR
    "HumanOmni-0.5B": {"DFEW": (22.64, 19.44), "MAFW": (20.18, 13.52), "RAVDESS": (7.33, 9.38)},
    "EMER-SFT": {"DFEW": (38.66, 35.31), "MAFW": (38.39, 28.02), "RAVDESS": (29.00, 27.19)},
    "MAFW-DFEW-SFT": {"DFEW": (60.23, 44.39), "MAFW": (50.44, 30.39), "RAVDESS": (29.33, 30.75)},
    "R1-Omni": {"DFEW": (65.83, 56.27), "MAFW": (57.68, 40.04), "RAVDESS": (43.00, 44.69)},
}


def results_table(files, published=False):
    """Saved results -> the paper's layout (rows: checkpoints, columns: data sets) in Markdown, with the counts below."""
    cells, counts, columns = {}, [], []
    for file in files:
        try:
            result = json.loads(Path(file).read_text(encoding="utf-8"))
            model, data, metrics = result["settings"]["model"], result["name"], result["metrics"]
            data = next((known for known in PUBLISHED["R1-Omni"] if data.lower().startswith(known.lower())), data)  # dfew_test: DFEW
            cells.setdefault(model, {})[data] = (100 * metrics["war"], 100 * metrics["uar"])
            counts.append(f"| {model} | {data} | " + " | ".join(str(metrics[key]) for key in ("n", "unknown", "unformatted", "truncated")) + " |")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{file}: not a result of evaluate.py ({type(error).__name__}: {error})") from None
        columns += [data] * (data not in columns)
    if published:
        cells |= {f"{name} (published)": row for name, row in PUBLISHED.items()}
        columns += [data for data in PUBLISHED["R1-Omni"] if data not in columns]
    lines = ["| method | " + " | ".join(f"{data} WAR | {data} UAR" for data in columns) + " |", "|---" * (1 + 2 * len(columns)) + "|"]
    for model, row in cells.items():
        values = (f"{row[data][0]:.2f} | {row[data][1]:.2f}" if data in row else "– | –" for data in columns)
        lines.append(f"| {model} | " + " | ".join(values) + " |")
    lines += ["", "| method | data | n | unknown words | unformatted | truncated |", "|---|---|---|---|---|---|", *counts]
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------
# The script


@dataclass
class Config(Common):
    clip: str = flag("", "one media file to answer about, instead of --data")
    out: str = flag("runs/evaluate", "folder for the results")
    temperature: float = flag(0.0, "0 is greedy", least=0, most=100)
    top_p: float = flag(1.0, "nucleus sampling, with a temperature; in (0, 1]", least=1e-6, most=1)
    samples: int = flag(1, "completions per clip, with a temperature", least=1, most=4096)
    max_new_tokens: int = flag(512, "longest completion", least=1, most=32768)
    batch_size: int = flag(16, "clips at a time", least=1, most=4096)
    aliases: bool = flag(False, "also score with anger = angry, fearful = fear, ...")
    modality_report: bool = flag(False, "evaluate with both media, video alone and audio alone, side by side")
    table: tuple = flag((), "result files to print as one table; nothing is evaluated")
    published: bool = flag(False, "the paper's Table 1 below --table")


def start_log(path, settings):
    """A log to go on with: created, or an unfinished one of the same settings, less lines that are not whole."""
    header = json.dumps(settings, default=str)
    parts = sorted(path.parent.glob(f"{glob.escape(path.stem)}.rank*.jsonl"))  # of an evaluation by several processes
    files = [file for file in (path, *parts) if path.exists()]
    lines = [line for file in files for line in file.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
    if lines and lines[0].strip() != header:
        raise DataError(f"{path}: an unfinished evaluation with other settings; delete it or choose another --out")
    partial = path.with_suffix(".new")
    partial.write_text("".join(lines) or header + "\n", encoding="utf-8")
    os.replace(partial, path)
    for part in parts:
        part.unlink()
    return path


# What may differ when an evaluation goes on: where and how, not what.
RESUME_WITH = ("data", "clip", "table", "published", "out", "batch_size", "workers", "device", "on_bad_clip", "aliases", "modality_report")


def evaluate_manifest(config, loaded, manifest, modality, name):
    """Evaluate one manifest and write its results; returns the metrics."""
    config = replace(config, modality=modality)
    out, weights = Path(config.out), Path(config.model)
    changed = max((f.stat().st_mtime for f in weights.glob("*.safetensors")), default=0)  # a retrained model is another model
    settings = {"manifest": str(manifest), "weights_changed": changed,
                **{key: value for key, value in asdict(config).items() if key not in RESUME_WITH}}
    out.mkdir(parents=True, exist_ok=True)
    log = first(lambda: start_log(out / f"{name}.partial.jsonl", settings))
    skip_log = own(out / f"{name}.skipped.txt") if config.on_bad_clip == "skip" else None
    rows = evaluate(*loaded, read_examples([manifest], config), fit=config.fit, batch_size=config.batch_size, workers=config.workers,
                    max_new_tokens=config.max_new_tokens, temperature=config.temperature, top_p=config.top_p, samples=config.samples,
                    seed=config.seed, title=name, log=log, skip_log=skip_log)
    metrics = score(rows)
    result = {"name": name, "settings": settings, "metrics": metrics, "completions": rows}
    if config.aliases:
        result["metrics_with_aliases"] = score(rows, aliases=True)
    first(lambda: write_json(out / f"{name}.json", result))
    first(lambda: draw_confusion(metrics, out / f"{name}_confusion.png"))
    own(log).unlink(missing_ok=True)  # not before the results are there
    print(f"\n{name}\n{report(metrics)}")
    if config.aliases:
        loose = result["metrics_with_aliases"]
        print(f"\nwith aliases: WAR {100 * loose['war']:.2f}   UAR {100 * loose['uar']:.2f}   unknown words {loose['unknown']}")
    for file in sorted(out.glob(f"{glob.escape(name)}.skipped*.txt")):
        print(f"\nclips left out are listed in {file}")
    return metrics


def main(argv=None):
    config = parse_flags(Config, __doc__, argv)
    if config.table:
        print(results_table(config.table, config.published))
        return
    if not config.model or bool(config.data) == bool(config.clip):
        raise DataError("needs --model DIR and one of --data MANIFEST and --clip FILE")
    if config.samples > 1 and not config.temperature:
        raise DataError("--samples needs a --temperature: greedy completions are all the same")
    loaded = load(config)
    if config.clip:
        example = as_asked(Example(Path(config.clip), QUESTION_REASONING, "", "video_audio"), config)
        for row in evaluate(*loaded, [example], fit=config.fit, max_new_tokens=config.max_new_tokens, temperature=config.temperature,
                            top_p=config.top_p, samples=config.samples, seed=config.seed):
            print(row["completion"])
        return
    modalities = ("video_audio", "video", "audio") if config.modality_report else (config.modality,)
    stems = Counter(Path(path).stem for path in config.data)
    reports = []
    for path in map(Path, config.data):
        base = path.stem if stems[path.stem] == 1 else f"{path.parent.name}_{path.stem}"  # dfew/test.json, mafw/test.json
        for modality in modalities:
            name = f"{base}.{modality}" if config.modality_report else base
            metrics = evaluate_manifest(config, loaded, path, modality, name)
            reports.append(f"{name:32}{100 * metrics['war']:8.2f}{100 * metrics['uar']:8.2f}"
                           f"{metrics['n']:8}{metrics['unknown']:9}{metrics['unformatted']:13}")
    print(f"\n{'':32}{'WAR':>8}{'UAR':>8}{'n':>8}{'unknown':>9}{'unformatted':>13}\n" + "\n".join(reports))
    print(f"\nresults: {config.out}")


if __name__ == "__main__":
    run(main, ("a smaller --batch-size", "a smaller --max-new-tokens", "fewer --samples"))
