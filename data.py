"""Manifests, and the way from their clips to embedded prompts.

    examples = read_manifest("manifest.json")
    clips = clips_of(omni.model, examples)                         # what the model takes of each
    for items in batches(clips, order, batch_size=16, workers=2):  # decoded ahead
        batch = encode(omni, clips, items)                         # through the towers, once
        prompts = embed(omni.model, batch)                         # a list of B tensors (P, D)

A manifest is a JSON list, in the format of the published data:

    [{"video": "happy/0001.mp4",
      "conversations": [{"from": "human", "value": "<video>\\n<audio>\\nWhich emotion ...?"},
                        {"from": "gpt",   "value": "<think>...</think>\\n<answer>happy</answer>"}]}]

Training, evaluation and inference share these functions and those of media.py (video, sound) and
text.py (tokenizers), so a clip or a prompt looks the same in all of them. The main names of those
two can be imported from this file too.

Shapes: B prompts · P prompt length · C completion length · T video frames · N patches per frame ·
A audio positions · D width of the language model; S image size.
"""

import functools
import hashlib
import math
import os
import re
import zlib
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from checkpoint import save_tensors
from grpo import completion_mask
from media import (
    decode,
    frame_indices,
    load_clip,
    load_frames,
    load_waveform,
    log_mel,
    preprocess_frames,
    present,
)
from rewards import extract_answer
from support.ahead import load_ahead
from support.clock import timed
from support.errors import ClipError, DataError, is_file, naming, read_json, require
from support.ranks import WORLD
from text import MODALITIES, QUESTION_LABEL, QUESTION_REASONING, BertTokenizer, Tokenizer

__all__ = [  # of media.py and text.py, for those who import them from here
    "MODALITIES",
    "QUESTION_LABEL",
    "QUESTION_REASONING",
    "BertTokenizer",
    "Tokenizer",
    "frame_indices",
    "load_clip",
    "load_frames",
    "load_waveform",
    "log_mel",
    "preprocess_frames",
]

# Fields in which other formats say what a clip is, and what to do about each here. They are
# refused: if they were ignored, the model would see or hear something else than is meant. In any
# spelling: startTime and "Start Time" are start_time.
NOT_READ = {
    "put the sound into the video file": "audio audios audio_path audio_file sound wav",
    "make it one entry per file, with field video": "image images videos video_path",
    "cut the file, which is used whole": (
        "start end stop begin time start_time end_time begin_time start_sec end_sec "
        "start_frame end_frame timestamp timestamps video_start video_end audio_start audio_end "
        "clip_start clip_end offset duration span interval clip segment video_segment"
    ),
    "crop the picture in the file, which is used whole": "crop bbox",
    "take it out, the model decides how many frames it sees": "fps num_frames nframes max_frames",
}


def _plain(name):
    """A field's name in small letters and without what joins its words."""
    return re.sub(r"[\W_]", "", name).lower()


ADVICE_OF = {_plain(name): advice for advice, names in NOT_READ.items() for name in names.split()}

# Bytes of tower features that may stay in memory, for each set of clips, so that later epochs
# neither decode nor encode: more than all of the toy's, some 290 clips' at full size.
KEEP_BYTES = 2 << 30


@dataclass
class Omni:
    """A model and the two tokenizers that belong to it."""

    model: torch.nn.Module  # HumanOmni
    tokenizer: Tokenizer
    bert: BertTokenizer


@dataclass
class Example:
    """One entry of a manifest."""

    video: Path | None  # None for an entry of text only
    question: str  # without the <video> and <audio> markers
    answer: str
    modality: str  # which media the prompt holds, one of MODALITIES
    extra: dict = field(default_factory=dict)  # the entry's other keys, as they are


def read_manifest(path, media_root=None, limit=None):
    """Manifest (format: top of this file, or an entry a line) -> list of Example, the first
    `limit` if given. Other keys of an entry are its `extra`, but for those in NOT_READ.

    Paths of clips are relative to media_root, or to the manifest's folder. Raises DataError that
    names file, entry and field; clips that do not exist are found here, all at once, and not hours
    into a training run.
    """
    path = Path(path)
    entries = read_json(path)
    if isinstance(entries, dict) and "conversations" in entries:  # a single line
        entries = [entries]
    require(
        isinstance(entries, list) and entries,
        f"{path}: should be a JSON list of one or more entries",
    )
    root = path.parent if media_root is None else Path(media_root)
    examples = [
        _read_entry(entry, f"{path}: entry {i}", root) for i, entry in enumerate(entries[:limit])
    ]
    videos = dict.fromkeys(example.video for example in examples if example.video)
    missing = [str(video) for video in videos if not is_file(video)]
    for video in missing:
        require(not os.path.isdir(video), f"{path}: {video} is a folder; list the files in it")
    require(
        not missing,
        f"{path}: {len(missing)} of {len(videos)} clips do not exist: {', '.join(missing[:3])}"
        f"{', ...' if missing[3:] else ''}; is --media-root right? (now {root})",
    )
    return examples


def _read_entry(entry, where, root):
    require(isinstance(entry, dict), f"{where} should be an object")
    for name, value in entry.items():
        advice = ADVICE_OF.get(_plain(name))
        # A field without a value says nothing: tables are filled up with null.
        require(
            advice is None or value in (None, "", [], {}),
            f"{where}: field {name} is not supported: {advice}; or rename it, if it does not "
            "change what the clip is",
        )
    video, turns = entry.get("video"), entry.get("conversations")
    require(
        "video" not in entry or isinstance(video, str) and video,
        f"{where}: field video should be a path",
    )
    require(
        isinstance(turns, list)
        and all(isinstance(turn, dict) for turn in turns)
        and [turn.get("from") for turn in turns] == ["human", "gpt"],
        f"{where}: field conversations should be a list of two turns, the first from human, the "
        "second from gpt",
    )
    for number, turn in enumerate(turns):
        require(
            isinstance(turn.get("value"), str),
            f"{where}: field conversations[{number}].value should be a text",
        )
    human, answer = turns[0]["value"], turns[1]["value"]
    modality = "_".join(medium for medium in ("video", "audio") if f"<{medium}>" in human)
    require(
        video or not modality,
        f"{where}: field video is missing, but the question has media markers",
    )
    require(
        not video or extract_answer(answer),
        f"{where}: field conversations[1].value has an empty answer, which nothing could match: "
        f"{answer!r}",
    )
    if video and "\\" in video and not is_file(root / video):  # a path as Windows writes it
        video = video.replace("\\", "/")
    return Example(
        video=root / video if video else None,
        question=human.replace("<video>", "").replace("<audio>", "").strip("\r\n"),
        answer=answer,
        modality=modality or ("video_audio" if video else "text"),
        extra={key: value for key, value in entry.items() if key not in ("video", "conversations")},
    )


@dataclass
class Clips(torch.utils.data.Dataset):
    """The media of a manifest's examples, decoded when asked for.

    Item i is a dict: index i; pixel_values (T, 3, S, S) float32 and input_features (n_mels,
    num_samples / 160) float32, each None when the example's modality leaves it out; video and
    audio, None until `encode` puts the towers' features there. Raises ClipError.

    cache: a folder of tower features, one file per clip. An item whose file exists comes with its
    features in place of the media: the clip is not even decoded. The file's name is a digest of all
    that the features depend on: the media file, frames, fit, and `towers`, a fingerprint of the
    towers' weights.
    """

    examples: list
    num_frames: int
    image_size: int
    n_mels: int
    num_samples: int  # at 16 kHz, a multiple of 160
    fit: str = "pad"
    cache: str | None = None
    towers: str = ""
    keep: int = 0  # how many items `batches` may hold on to for the next time they are asked for
    kept: dict = field(default_factory=dict)  # index -> item

    def __getstate__(self):
        return {**self.__dict__, "kept": {}}  # a worker process decodes, it keeps nothing

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, i):
        path, modality = self.examples[i].video, self.examples[i].modality
        want_video, want_audio = "video" in modality, "audio" in modality
        item = {"index": i, "cache_file": None}
        item |= dict.fromkeys(("pixel_values", "input_features", "video", "audio"))
        if self.cache and path:
            item["cache_file"] = self.cache_file(i)
            if item["cache_file"].exists():
                return item | read_features(item["cache_file"], modality)
        if want_video or want_audio:
            frames, waveform = decode(path, self.num_frames, want_video, want_audio)
        if want_video:
            frames = present(frames, path, "video")
            item["pixel_values"] = preprocess_frames(frames, self.image_size, self.fit)
        if want_audio:
            waveform = present(waveform, path, "audio")
            item["input_features"] = log_mel(waveform, self.n_mels, self.num_samples)
        return item

    def cache_file(self, i):
        """Where the features of clip i are, or will be."""
        path = self.examples[i].video
        require(is_file(path), f"{path}: no such file", ClipError)
        status = path.stat()
        facts = [str(path.resolve()), status.st_size, status.st_mtime_ns]
        facts += [self.examples[i].modality, self.num_frames, self.image_size]
        facts += [self.n_mels, self.num_samples, self.fit, self.towers]
        name = hashlib.sha256(repr(facts).encode()).hexdigest()[:32]
        return Path(self.cache) / f"{name}.safetensors"


def read_features(file, modality):
    """The towers' features of one clip from the cache -> {"video": ..., "audio": ...}."""
    again = "delete it, it is made again"
    try:
        features = load_file(file)
    except (SafetensorError, OSError) as error:
        raise DataError(f"{file}: cannot be read ({error}); {again}") from error
    wanted = {name for name in ("video", "audio") if name in modality}
    require(set(features) == wanted, f"{file}: does not hold the features of {modality}; {again}")
    return features


def clips_of(model, examples, fit="pad", cache=None, keep=False):
    """The examples' media, decoded to what this model takes.

    cache: a folder for the towers' features, or None. keep: hold on to them in memory, as many as
    fit into KEEP_BYTES; for towers that are frozen, on a CPU."""
    llm, siglip, whisper = (model.configs[name] for name in ("llm", "siglip", "whisper"))
    towers = 0
    if cache:
        Path(cache).mkdir(parents=True, exist_ok=True)
        weights = [*model.vision_tower.parameters(), *model.audio_tower.parameters()]
        towers = functools.reduce(_add_to_checksum, weights, 0)
    num_frames, positions = llm.get("num_frames", 8), whisper["max_source_positions"]
    patches = (siglip["image_size"] // siglip["patch_size"]) ** 2
    numbers = num_frames * patches * siglip["hidden_size"] + positions // 3 * whisper["d_model"]
    return Clips(
        examples,
        num_frames=num_frames,
        image_size=siglip["image_size"],
        n_mels=whisper["num_mel_bins"],
        num_samples=320 * positions,  # two log-mel frames, of 160 samples each, per position
        fit=fit,
        cache=cache,
        towers=str(towers),
        keep=KEEP_BYTES // (4 * numbers) if keep and model.device.type == "cpu" else 0,
    )


def _add_to_checksum(checksum, weight):
    return zlib.crc32(weight.detach().cpu().view(torch.uint8).numpy(), checksum)


def data_order(n, wanted, seed):
    """Indices of `wanted` of n examples: pass after pass over all, each in an order of its own."""
    order = []
    for epoch in range(math.ceil(wanted / n)):
        generator = torch.Generator().manual_seed(1000 * seed + epoch)
        order += torch.randperm(n, generator=generator).tolist()
    return order[:wanted]


class SkipLog:
    """The file that lists clips which cannot be used, where a run is to go on without them."""

    def __init__(self, path, clips, resumed):
        """path: None if such a clip is to stop the run. resumed: the list goes on, else it is
        new."""
        self.path = path and Path(path)
        # Of several processes, each has its share of the clips.
        self.most = 0.05 * len(clips) / WORLD
        self.clips, self.skipped = clips, set()
        if self.path and self.path.exists():
            if resumed:
                self.skipped |= set(self.path.read_text(encoding="utf-8").splitlines())
            else:
                self.path.unlink()

    def usable(self, item):
        """Is the item one? A ClipError is listed, or raised if there is no list; others are
        raised."""
        if not isinstance(item, DataError):
            return True
        if not self.path or not isinstance(item, ClipError):
            raise item
        self.skipped.add(str(item))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with naming(self.path):
            self.path.write_text("\n".join(sorted(self.skipped)) + "\n", encoding="utf-8")
        if len(self.skipped) > self.most:
            raise DataError(
                f"{len(self.skipped)} of {len(self.clips)} clips cannot be used, more than 5 %; "
                f"they are listed in {self.path}"
            )
        return False


def batches(clips, order, batch_size, workers=0, skip_log=None, start=0):
    """Yield lists of batch_size items clips[i] for i in `order`, from batch number `start` on.

    `workers` processes decode ahead; with 0 it happens here. Batch k is
    order[k * batch_size : (k + 1) * batch_size] (the last may be shorter), less the clips left out:
    empty if all of them are.

    skip_log: a file; clips that cannot be used are then listed there and left out, else their error
    is raised. More than 5 % of the clips (of this process's share, where there are several) is an
    error all the same: then something else is wrong. With a `start`, the list goes on.
    """
    skip_log = SkipLog(skip_log, clips, resumed=start > 0)
    order = list(order)[start * batch_size :]
    # The workers have to know in advance what will not be asked of them: what is kept by then.
    kept, to_decode = set(clips.kept), []
    for i in order:
        if i in kept:
            continue
        to_decode.append(i)
        if len(kept) < clips.keep:
            kept.add(i)
    decoded = load_ahead(clips, to_decode, workers)
    for place in range(0, len(order), batch_size):
        items = []
        for i in order[place : place + batch_size]:
            item = clips.kept[i] if i in clips.kept else next(decoded)
            if len(clips.kept) < clips.keep:
                clips.kept[i] = item
            items.append(item)
        yield [item for item in items if skip_log.usable(item)]


# --------------------------------------------------------------------------------------------------
# From clips to embedded prompts


@dataclass
class Batch:
    """B prompts: what is asked, and what the frozen towers made of the clips."""

    examples: list  # B Example
    prompt_ids: list  # B lists of ids, -201 where the video tokens go and -202 for the audio tokens
    prompt_lengths: list  # B ints: P of each prompt, once it is embedded
    question: list  # B tensors (width,), BERT's reading of the question
    video: list  # B tensors (T, N, width), None for a prompt without
    audio: list  # B tensors (A/3, width), None for a prompt without

    def __len__(self):
        return len(self.examples)


def encode(omni, clips, items, prompt_ids=None):
    """Items of `batches` -> Batch: each clip goes through the frozen towers once, each question
    through BERT.

    prompt_ids: B lists of ids, if not those of the examples' questions. Prompts may differ in what
    media they have. In the items the features replace the media; new ones go into the cache too."""
    # One by one where they are kept: their last bits must not depend on the company a clip was in
    # when it came first, which a resumed run could not repeat.
    groups = [[item] for item in items] if clips.keep else [items]
    for group in groups:
        run_towers(omni.model, group)
    examples = [clips.examples[item["index"]] for item in items]
    if prompt_ids is None:
        prompt_ids = [omni.tokenizer.prompt_ids(e.question, e.modality) for e in examples]
    device = omni.model.device
    return Batch(
        examples=examples,
        prompt_ids=prompt_ids,
        prompt_lengths=[omni.model.prompt_length(ids) for ids in prompt_ids],
        question=read_questions(omni, [example.question for example in examples]),
        video=[None if item["video"] is None else item["video"].to(device) for item in items],
        audio=[None if item["audio"] is None else item["audio"].to(device) for item in items],
    )


def read_questions(omni, questions):
    """B texts -> list of B tensors (width,): each distinct one through BERT, which is frozen."""
    distinct = list(dict.fromkeys(questions))
    inputs = (x.to(omni.model.device) for x in omni.bert(distinct))
    readings = dict(zip(distinct, omni.model.read_question(*inputs)))
    return [readings[question] for question in questions]


@timed("encode")
def run_towers(model, items):
    """Put the towers' features into the items, in place of their media."""
    new = [item for item in items if item["video"] is None and item["audio"] is None]
    with_video = [item for item in new if item["pixel_values"] is not None]
    with_audio = [item for item in new if item["input_features"] is not None]
    if with_video:
        frames = torch.stack([item["pixel_values"] for item in with_video]).to(model.device)
        for item, features in zip(with_video, model.encode(frames, None)[0]):
            item.update(video=features, pixel_values=None)
    if with_audio:
        mels = torch.stack([item["input_features"] for item in with_audio]).to(model.device)
        for item, features in zip(with_audio, model.encode(None, mels)[1]):
            item.update(audio=features, input_features=None)
    for item in new:
        if item["cache_file"]:
            features = {name: item[name] for name in ("video", "audio") if item[name] is not None}
            features = {name: f.cpu().contiguous() for name, f in features.items()}
            # Renamed when whole: other processes may read it at any time.
            partial = item["cache_file"].with_suffix(f".{os.getpid()}")
            save_tensors(features, partial)
            os.replace(partial, item["cache_file"])


def longest_prompt(omni, examples):
    """The largest P of the examples' prompts."""
    asked = {(example.question, example.modality) for example in examples}
    prompts = [omni.tokenizer.prompt_ids(*pair) for pair in asked]
    return max(omni.model.prompt_length(ids) for ids in prompts)


def embed(model, batch):
    """Batch -> list of B prompts (P_i, D), through projectors, gate and embedding, which train."""
    return model.embed_prompts(batch.prompt_ids, batch.video, batch.audio, batch.question)


def completion_text(tokenizer, ids):
    """(C,) sampled ids, in main memory -> text up to the first EOS, and whether there was one.

    Special tokens inside a completion are part of it, and get a gradient, but not of its text."""
    mask = completion_mask(ids, tokenizer.eos_token_ids)
    ended = torch.isin(ids, torch.tensor(tokenizer.eos_token_ids)).any()
    return tokenizer.decode(ids[mask].tolist()), bool(ended)


# --------------------------------------------------------------------------------------------------
# Parts of a batch


def parts_of(batch, size):
    """Indices of the batch's prompts, in lists of one length P, of `size` at most; 0: no limit."""
    by_length = {}
    for b, length in enumerate(batch.prompt_lengths):
        by_length.setdefault(length, []).append(b)
    parts = []
    for same in by_length.values():
        step = size or len(same)
        parts += [same[start : start + step] for start in range(0, len(same), step)]
    return parts


def indices(chosen, device):
    """A list of indices as a tensor on a device, without waiting for the device."""
    return torch.tensor(chosen).to(device, non_blocking=True)


def take(record, chosen):
    """The same record, a Batch or one that holds it, of some of its prompts.

    chosen: indices of prompts. Every field has one entry per prompt: tensors are indexed, lists
    picked from, dicts and records inside alike; None stays None."""
    if record is None:
        return None
    if isinstance(record, torch.Tensor):
        return record[indices(chosen, record.device)]
    if isinstance(record, list):
        return [record[i] for i in chosen]
    if isinstance(record, dict):
        return {name: take(value, chosen) for name, value in record.items()}
    return replace(
        record, **{f.name: take(getattr(record, f.name), chosen) for f in fields(record)}
    )
