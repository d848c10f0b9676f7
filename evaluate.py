"""Evaluate a checkpoint on labelled clips, or ask it about one clip.

    python evaluate.py --model DIR --data manifest.json [more.json]    WAR, UAR, recall, confusion; results as JSON
    python evaluate.py --model DIR --clip file.mp4                     prints the completion

Open vocabulary, as in the paper (section 4.2): the prompt lists no classes, the model names the emotion itself. The
answer is compared with the label after trimming, lower-casing and dropping trailing punctuation; a word outside the
label set is wrong and counted as unknown. WAR is the accuracy, UAR the mean recall over the classes that occur in
the ground truth. Decoding is greedy unless --temperature is given; --samples k then averages over k completions.
"""

import argparse
import json
import sys
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import torch
from tqdm import tqdm

from data import (QUESTION_LABEL, QUESTION_REASONING, BertTokenizer, Clips, DataError, Example, Tokenizer, batches,
                  read_manifest)
from generate import generate
from grpo import completion_mask
from model import CheckpointError, HumanOmni
from rewards import extract_answer, format_reward, normalise
from toy import read_statements

# ------------------------------------------------------------------------------------------------
# Shared by the three scripts: flags, loading, one batch


def flag(default, help, **more):
    """A configuration field that becomes a command-line flag with this help text."""
    return field(default=default, metadata={"help": help, **more})


def parse_flags(config_class, manual, argv=None):
    """Command line -> config_class: each field is one flag; tuples take several values, bools a --no- form."""
    parser = argparse.ArgumentParser(description=manual, formatter_class=argparse.RawDescriptionHelpFormatter)
    for f in fields(config_class):
        default = " ".join(map(str, f.default)) if isinstance(f.default, tuple) else f.default
        options = {"default": f.default, "help": f"{f.metadata['help']} (default: {default if default != '' else 'none'})"}
        if isinstance(f.default, bool):
            options["action"] = argparse.BooleanOptionalAction
        elif isinstance(f.default, tuple):
            options["nargs"] = "+"
        else:
            options["type"] = type(f.default)
        if "choices" in f.metadata:
            options["choices"] = f.metadata["choices"]
        parser.add_argument("--" + f.name.replace("_", "-"), **options)
    return config_class(**vars(parser.parse_args(argv)))


def run(main):
    """Run a script's main; an error that is the user's to mend is one message and exit code 2, not a traceback."""
    try:
        main()
    except (DataError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


@dataclass
class Common:
    """Flags of all three scripts: the model, and what it is given."""
    model: str = flag("", "checkpoint directory")
    data: tuple = flag((), "manifests")
    media_root: str = flag("", "folder that the manifests' paths are relative to, if not the manifest's own")
    question: str = flag("reasoning", "reasoning, label, manifest (each entry's own), or the text of a question")
    modality: str = flag("manifest", "what the model is given; manifest: what each entry's text asks for",
                         choices=("manifest", "video_audio", "video", "audio"))
    fit: str = flag("pad", "how frames become square", choices=("pad", "squash"))
    limit: int = flag(0, "use only the first so many examples of --data; 0: all")
    siglip: str = flag("", "directory of the vision tower, if the checkpoint lacks it")
    whisper: str = flag("", "directory of the audio tower, if the checkpoint lacks it")
    bert: str = flag("", "directory of BERT, if the checkpoint lacks it")
    workers: int = flag(1, "processes that decode clips ahead")
    seed: int = flag(0, "of everything random")
    device: str = flag("auto", "cpu, cuda, or auto: cuda where there is one")


def load(config, dtype=torch.float32):
    """config.model and the encoders' directories -> (model, tokenizer, BERT's tokenizer) on config.device."""
    device = config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    encoders = {name: getattr(config, name) or None for name in ("siglip", "whisper", "bert")}
    model = HumanOmni.from_pretrained(config.model, **encoders, device=device, dtype=dtype)
    return model, Tokenizer(config.model), BertTokenizer(encoders["bert"] or config.model)


def compute_dtype(model):
    """bf16 arithmetic over float32 weights where the device is fast at it; a context manager."""
    return torch.autocast("cuda", torch.bfloat16) if model.device.type == "cuda" else nullcontext()


def read_examples(manifests, config):
    """Manifests -> examples, with --question, --modality and --limit applied."""
    examples = [e for path in manifests for e in read_manifest(path, config.media_root or None)]
    return [as_asked(e, config) for e in examples[:config.limit or None]]


def as_asked(example, config):
    """The example with the question and the modality that the flags ask for."""
    question = {"reasoning": QUESTION_REASONING, "label": QUESTION_LABEL, "manifest": example.question}.get(config.question, config.question)
    modality = example.modality if config.modality == "manifest" else config.modality
    return replace(example, question=question, modality=modality)


def clips_of(model, examples, fit):
    """The examples' media, decoded to what this model takes."""
    c = model.configs
    positions = c["whisper"]["max_source_positions"]  # 10 ms log-mel frames, two per position, 160 samples each
    return Clips(examples, c["llm"].get("num_frames", 8), c["siglip"]["image_size"], c["whisper"]["num_mel_bins"], 320 * positions, fit)


def encode_clips(model, clips):
    """A batch from `data.batches` -> tower features (B, T, N, width) and (B, A, width); None for an absent medium."""
    def stack(key):
        if any(clip[key] is None for clip in clips):
            if any(clip[key] is not None for clip in clips):
                raise DataError("one batch mixes clips with and without a medium; choose one with --modality")
            return None
        return torch.stack([clip[key] for clip in clips]).to(model.device)

    return model.encode(stack("pixel_values"), stack("input_features"))


def question_inputs(model, bert, examples):
    """BERT's ids and mask (B, L) for the examples' questions."""
    return [tensor.to(model.device) for tensor in bert([e.question for e in examples])]


def prompts_of(model, tokenizer, bert, examples, features):
    """Examples and their tower features -> list of B embedded prompts (P_i, D)."""
    ids = [tokenizer.prompt_ids(e.question, e.modality) for e in examples]
    return model.embed_prompts(ids, *features, *question_inputs(model, bert, examples))


def decode(tokenizer, ids):
    """(C,) sampled ids -> text up to the first EOS, and whether there was one."""
    mask = completion_mask(ids[None], tokenizer.eos_token_id)[0]
    return tokenizer.decode(ids[mask].tolist()), bool((ids == tokenizer.eos_token_id).any())


# ------------------------------------------------------------------------------------------------
# Evaluation


@torch.no_grad()
def evaluate(model, tokenizer, bert, examples, *, fit="pad", batch_size=32, workers=0, max_new_tokens=512, temperature=0.0,
             top_p=1.0, samples=1, seed=0, title="evaluate"):
    """Complete every example's prompt and score the answers: a dict of metrics (see `score`) with all raw completions."""
    rows = []
    with tqdm(total=len(examples), desc=title, unit="clip", leave=False) as progress, compute_dtype(model):
        for clips in batches(clips_of(model, examples, fit), range(len(examples)), batch_size, workers):
            batch = [examples[clip["index"]] for clip in clips]
            prompts = prompts_of(model, tokenizer, bert, batch, encode_clips(model, clips))
            ids = generate(model, prompts, samples, max_new_tokens, temperature, top_p, tokenizer.eos_token_id,
                           seed + len(rows)).cpu()  # (B, G, C)
            for example, group in zip(batch, ids):
                for row in group:
                    text, ended = decode(tokenizer, row)
                    rows.append({"video": str(example.video), "label": extract_answer(example.answer), "completion": text,
                                 "tokens": int(completion_mask(row[None], tokenizer.eos_token_id).sum()), "truncated": not ended,
                                 **{cue: example.extra[cue] for cue in ("face", "voice") if cue in example.extra}})
            progress.update(len(batch))
    return {**score(rows), "completions": rows}


def score(rows):
    """Rows with "label", "completion", "tokens", "truncated" -> metrics.

    Rows of the toy also say what face and voice did; then the share of true statements in the reasoning is known."""
    labels = sorted({row["label"] for row in rows})
    pairs = Counter((row["label"], extract_answer(row["completion"])) for row in rows)
    count = Counter(row["label"] for row in rows)
    recall = {label: pairs[label, label] / count[label] for label in labels}
    answers = [extract_answer(row["completion"]) for row in rows]
    metrics = {
        "n": len(rows),
        "war": sum(pairs[label, label] for label in labels) / len(rows),
        "uar": sum(recall.values()) / len(recall),
        "format": sum(format_reward(row["completion"]) for row in rows) / len(rows),
        "mean_length": sum(row["tokens"] for row in rows) / len(rows),
        "unknown": sum(answer not in count for answer in answers),
        "unformatted": sum(not format_reward(row["completion"]) for row in rows),
        "truncated": sum(row["truncated"] for row in rows),
        "recall": recall,
        "confusion": {label: {answer: n for (true, answer), n in sorted(pairs.items()) if true == label} for label in labels},
    }
    if all("face" in row and "voice" in row for row in rows):
        stated = [read_statements(row["completion"]) for row in rows]
        metrics["face_true"] = sum(face == row["face"] for (face, _), row in zip(stated, rows)) / len(rows)
        metrics["voice_true"] = sum(voice == row["voice"] for (_, voice), row in zip(stated, rows)) / len(rows)
    return metrics


def report(result):
    """The metrics as text: a summary, then recall and answers per class."""
    labels = list(result["recall"])
    lines = [f"n {result['n']}   WAR {100 * result['war']:.2f}   UAR {100 * result['uar']:.2f}   "
             f"format {100 * result['format']:.1f} %   mean length {result['mean_length']:.1f} tokens",
             f"unknown words {result['unknown']}   unformatted {result['unformatted']}   truncated {result['truncated']}"]
    if "face_true" in result:
        lines.append(f"statements true: face {100 * result['face_true']:.1f} %   voice {100 * result['voice_true']:.1f} %")
    width = max(map(len, [*labels, "unknown"])) + 1
    lines += ["", "recall, and how often each answer was given (rows: truth)",
              " " * width + "recall " + "".join(f"{label:>{width}}" for label in [*labels, "unknown"])]
    for label in labels:
        answers = result["confusion"][label]
        counts = [answers.get(other, 0) for other in labels]
        counts.append(sum(answers.values()) - sum(counts))
        lines.append(f"{label:<{width}}{100 * result['recall'][label]:6.1f} " + "".join(f"{n:>{width}}" for n in counts))
    return "\n".join(lines)


@dataclass
class Config(Common):
    clip: str = flag("", "one media file to answer about, instead of --data")
    out: str = flag("runs/evaluate.json", "where the metrics and every raw completion are written")
    temperature: float = flag(0.0, "0 is greedy")
    top_p: float = flag(1.0, "nucleus sampling, with a temperature")
    samples: int = flag(1, "completions per clip, with a temperature")
    max_new_tokens: int = flag(512, "longest completion")
    batch_size: int = flag(16, "clips at a time")


def main(argv=None):
    config = parse_flags(Config, __doc__, argv)
    if not config.model or bool(config.data) == bool(config.clip):
        raise DataError("needs --model DIR and one of --data MANIFEST and --clip FILE")
    model, tokenizer, bert = load(config)
    if config.clip:
        if not Path(config.clip).is_file():
            raise DataError(f"{config.clip}: no such file")
        examples = [as_asked(Example(Path(config.clip), QUESTION_REASONING, "", "video_audio"), config)]
    else:
        examples = read_examples(config.data, config)
    result = evaluate(model, tokenizer, bert, examples, fit=config.fit, batch_size=config.batch_size, workers=config.workers,
                      max_new_tokens=config.max_new_tokens, temperature=config.temperature, top_p=config.top_p,
                      samples=config.samples, seed=config.seed)
    if config.clip:
        for row in result["completions"]:
            print(row["completion"])
        return
    print(report(result))
    out = Path(config.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"config": vars(config), **result}, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"\nwritten: {out}")


if __name__ == "__main__":
    run(main)
