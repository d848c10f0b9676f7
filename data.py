"""Manifests, batches, and worker processes that decode ahead: everything between a list of clips and the model.

    examples = read_manifest("manifest.json")
    for batch in batches(Clips(examples, ...), order, batch_size=16, workers=2): ...

    python data.py show clip.mp4 --out seen.png     # a picture of what the model sees and hears of a clip

A manifest is a JSON list, in the format of the published data:

    [{"video": "happy/0001.mp4",
      "conversations": [{"from": "human", "value": "<video>\\n<audio>\\nWhich emotion ...?"},
                        {"from": "gpt",   "value": "<think>...</think>\\n<answer>happy</answer>"}]}]

Training, evaluation and inference share these functions and those of media.py (video, sound) and text.py (tokenizers), so a
clip or a prompt looks the same in all of them. Their main names can be imported from this file too.
Shapes: B prompts, T frames, P prompt length, C completion length, S image size.
"""

import argparse
import atexit
import contextlib
import hashlib
import itertools
import signal
from dataclasses import dataclass, field
from multiprocessing import connection
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import multiprocessing       # the standard one, with tensors handed over in shared memory

from distributed import WORLD
from errors import ClipError, DataError, is_file, read_json, require
from media import decode, frame_indices, load_clip, load_frames, load_waveform, log_mel, preprocess_frames, present
from text import MODALITIES, QUESTION_LABEL, QUESTION_REASONING, BertTokenizer, Tokenizer

__all__ = ["BertTokenizer", "ClipError", "Clips", "DataError", "Example", "MODALITIES", "QUESTION_LABEL", "QUESTION_REASONING", "Tokenizer",
           "batches", "frame_indices", "load_clip", "load_frames", "load_waveform", "log_mel", "preprocess_frames", "read_manifest"]

CLIP_SECONDS = 300          # a worker that needs longer for a clip hangs; a minute of 4k video takes about 30 s


@dataclass
class Example:
    """One entry of a manifest."""
    video: Path | None          # None for an entry of text only
    question: str               # without the <video> and <audio> markers
    answer: str
    modality: str               # which media the prompt holds, one of MODALITIES
    extra: dict = field(default_factory=dict)       # the entry's other keys, as they are


def read_manifest(path, media_root=None, limit=None):
    """Manifest (format: top of this file) -> list of Example, the first `limit` if given.

    Paths of clips are relative to media_root, or to the manifest's folder. Raises DataError that names file, entry
    and field; clips that do not exist are found here, all at once, and not hours into a training run.
    """
    path = Path(path)
    entries = read_json(path)
    require(isinstance(entries, list) and entries, f"{path}: should be a JSON list of one or more entries")
    root = path.parent if media_root is None else Path(media_root)
    examples = [_read_entry(entry, f"{path}: entry {i}", root) for i, entry in enumerate(entries[:limit])]
    videos = dict.fromkeys(example.video for example in examples if example.video)
    missing = [str(video) for video in videos if not is_file(video)]
    require(not missing, f"{path}: {len(missing)} of {len(videos)} clips do not exist: {', '.join(missing[:3])}"
             f"{', ...' if missing[3:] else ''}; is --media-root right? (now {root})")
    return examples


def _read_entry(entry, where, root):
    require(isinstance(entry, dict), f"{where} should be an object")
    video, turns = entry.get("video"), entry.get("conversations")
    require("video" not in entry or isinstance(video, str) and video, f"{where}: field video should be a path")
    require(isinstance(turns, list) and all(isinstance(turn, dict) for turn in turns)
             and [turn.get("from") for turn in turns] == ["human", "gpt"],
             f"{where}: field conversations should be a list of two turns, the first from human, the second from gpt")
    for number, turn in enumerate(turns):
        require(isinstance(turn.get("value"), str), f"{where}: field conversations[{number}].value should be a text")
    human, answer = turns[0]["value"], turns[1]["value"]
    modality = "_".join(medium for medium in ("video", "audio") if f"<{medium}>" in human)
    require(video or not modality, f"{where}: field video is missing, but the question has media markers")
    return Example(video=root / video if video else None,
                   question=human.replace("<video>", "").replace("<audio>", "").strip("\r\n"), answer=answer,
                   modality=modality or ("video_audio" if video else "text"),
                   extra={key: value for key, value in entry.items() if key not in ("video", "conversations")})


class Clips(torch.utils.data.Dataset):
    """The media of a manifest's examples, decoded when asked for.

    Item i is a dict: index i; pixel_values (T, 3, S, S) float32 and input_features (n_mels, num_samples / 160)
    float32, each None when the example's modality leaves it out. Raises ClipError.

    cache: a folder of tower features, one file per clip. An item then has a key `cache_file` too, and, where that
    file exists, `features` in place of the media: the clip is not even decoded. The file's name is a digest of all
    that the features depend on: the media file, frames, fit, and `towers`, a fingerprint of the towers' weights.
    """

    def __init__(self, examples, num_frames, image_size, n_mels, num_samples, fit="pad", cache=None, towers=""):
        self.examples, self.num_frames, self.image_size = examples, num_frames, image_size
        self.n_mels, self.num_samples, self.fit, self.cache, self.towers = n_mels, num_samples, fit, cache, towers

    def cache_file(self, i):
        path = self.examples[i].video
        require(is_file(path), f"{path}: no such file", ClipError)
        facts = (str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns, self.examples[i].modality, self.num_frames,
                 self.image_size, self.n_mels, self.num_samples, self.fit, self.towers)
        return Path(self.cache) / (hashlib.sha256(repr(facts).encode()).hexdigest()[:32] + ".safetensors")

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, i):
        path, modality = self.examples[i].video, self.examples[i].modality
        want_video, want_audio = "video" in modality, "audio" in modality
        item = dict(index=i, pixel_values=None, input_features=None)
        if self.cache and path:
            item["cache_file"] = self.cache_file(i)
            if item["cache_file"].exists():
                try:
                    features = load_file(item["cache_file"])
                except (SafetensorError, OSError) as error:
                    raise DataError(f"{item['cache_file']}: cannot be read ({error}); delete it, it is made again") from error
                require({*features} == {name for name in ("video", "audio") if name in modality},
                         f"{item['cache_file']}: does not hold the features of {modality}; delete it, it is made again")
                return {**item, "features": (features.get("video"), features.get("audio"))}
        if want_video or want_audio:
            frames, waveform = decode(path, self.num_frames, want_video, want_audio)
        if want_video:
            item["pixel_values"] = preprocess_frames(present(frames, path, "video"), self.image_size, self.fit)
        if want_audio:
            item["input_features"] = log_mel(present(waveform, path, "audio"), self.n_mels, self.num_samples)
        return item


def _load_item(dataset, index):
    """One item, or its DataError as a value: torch would wrap a raised one into a page of worker traceback."""
    try:
        return dataset[index]
    except DataError as error:
        return error


@contextlib.contextmanager
def _signals_wait():
    """Inside, no signal is answered: not in the middle of a fork, nor by a child with the handlers of its parent."""
    if not hasattr(signal, "pthread_sigmask"):      # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _work(dataset, pipe):
    """A worker process: indices come in through the pipe, items go out, as long as the main process lives."""
    for number in (signal.SIGINT, signal.SIGTERM):      # the main process's to answer, though a terminal sends them to all
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
    with contextlib.suppress(EOFError, BrokenPipeError):
        while pipe in connection.wait([pipe, multiprocessing.parent_process().sentinel]):
            pipe.send(_load_item(dataset, pipe.recv()))


def _load_ahead(dataset, order, workers, ahead):
    """Yield _load_item(dataset, i) for i in order, while `workers` processes are up to `ahead` items further.

    Each has a pipe of its own, and items in turn: if one dies (out of memory, a crash in a codec) or hangs, it is clear
    over which clip, and nobody waits for it.
    """
    team = []
    try:
        for _ in range(workers):
            ours, theirs = multiprocessing.Pipe()
            process = multiprocessing.Process(target=_work, args=(dataset, theirs), daemon=True)
            with _signals_wait():           # a team holds only what has been started, and all of that
                process.start()
                team.append((ours, process))
            theirs.close()
            atexit.register(process.kill)                   # at the latest
        for place in range(len(order) + ahead):
            if place < len(order):
                with contextlib.suppress(OSError):      # a dead worker: said when its turn comes
                    team[place % workers][0].send(order[place])
            if (due := place - ahead) < 0:
                continue
            pipe, process = team[due % workers]
            ready, item = connection.wait([pipe, process.sentinel], CLIP_SECONDS), None
            with contextlib.suppress(EOFError, OSError):        # it ended, in the middle of a message maybe
                item = pipe.recv() if pipe in ready else None
            if item is None:
                clip = dataset.examples[order[due]].video or f"entry {order[due]}"
                process.join(1)
                end = f"did not finish in {CLIP_SECONDS} s" if process.exitcode is None else f"ended with exit code {process.exitcode}"
                raise ClipError(f"{clip}: the process that decoded it {end}{' (killed: out of memory?)' if process.exitcode == -9 else ''}; "
                                "take the clip out of the manifest if it happens again, or try fewer --workers")
            yield item
    finally:
        for _, process in team:
            process.kill()
            process.join(1)


def batches(dataset, order, batch_size, workers=0, skip_log=None, start=0):
    """Yield lists of batch_size items dataset[i] for i in `order` (the last list may be shorter), from batch `start` on.

    `workers` processes decode ahead, about one batch; with 0 it happens here. Workers share out clips, not
    batches, so the first batch comes early. Errors of the data arrive as they were raised. Batch k is
    order[k * batch_size:(k + 1) * batch_size], less the clips left out: empty if all of them are.

    skip_log: a file; clips that cannot be used are then listed there and left out. More than 5 % of the data set's clips (of
    this process's share, where there are several) is an error all the same: then something else is wrong, and so is a worker
    that dies or hangs. With a `start`, the list goes on; else it begins anew.
    """
    order, skip_log = list(order), skip_log and Path(skip_log)
    skipped = set()
    if skip_log and skip_log.exists():
        if start:
            skipped |= set(skip_log.read_text(encoding="utf-8").splitlines())
        else:
            skip_log.unlink()
    rest = order[start * batch_size:]
    ahead = min(max(batch_size, 2 * workers), 32 * workers)     # few enough for the messages to fit into the pipes
    items = _load_ahead(dataset, rest, workers, ahead) if workers else (_load_item(dataset, i) for i in rest)
    items = iter(items)
    while batch := list(itertools.islice(items, batch_size)):
        good = []
        for item in batch:
            if not isinstance(item, DataError):
                good.append(item)
                continue
            if not skip_log or not isinstance(item, ClipError):
                raise item
            skipped.add(str(item))
            skip_log.parent.mkdir(parents=True, exist_ok=True)
            skip_log.write_text("\n".join(sorted(skipped)) + "\n", encoding="utf-8")
            if len(skipped) > 0.05 * len(dataset) / WORLD:  # of several processes, each has its share of the clips
                raise DataError(f"{len(skipped)} of {len(dataset)} clips cannot be used, more than 5 %; they are listed in {skip_log}")
        yield good


# ------------------------------------------------------------------------------------------------ what the model sees

def draw_seen(path, out, num_frames=8, size=224, n_mels=128, fit="pad"):
    """Draw a clip's frames and log-mel, both as the towers get them, into the picture `out`."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    frames, waveform = load_clip(path, num_frames)
    figure = plt.figure(figsize=(1.6 * num_frames, 4.4), layout="constrained")
    rows = figure.subfigures(2, 1, height_ratios=(1, 1.4))
    if frames is None:
        rows[0].suptitle("no video stream", fontsize=10)
    else:
        pixels = preprocess_frames(frames, size, fit)   # (T, 3, S, S)
        for i, (axis, picture) in enumerate(zip(rows[0].subplots(1, num_frames), pixels)):
            axis.imshow((picture.permute(1, 2, 0) / 2 + 0.5).numpy())
            axis.set_axis_off()
            axis.set_title(f"frame {i}", fontsize=8)
        rows[0].suptitle(f"pixel_values {tuple(pixels.shape)}: {num_frames} frames spread over the clip, {fit}", fontsize=10)
    if waveform is None:
        rows[1].suptitle("no audio stream", fontsize=10)
    else:
        mel = log_mel(waveform, n_mels)                 # (n_mels, 3000): 30 s, of which the clip's part is drawn
        seconds = min(30.0, len(waveform) / 16_000)
        axis = rows[1].subplots()
        axis.imshow(mel[:, :max(1, round(100 * seconds))].numpy(), origin="lower", aspect="auto", extent=(0, seconds, 0, n_mels))
        axis.set(xlabel="seconds", ylabel="mel band")
        rows[1].suptitle(f"input_features {tuple(mel.shape)}: log-mel at 100 frames a second; after {seconds:.1f} s silence up to 30 s", fontsize=10)
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=80)
    plt.close(figure)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    show = parser.add_subparsers(dest="command", required=True).add_parser("show", help="draw what the model sees and hears of a clip")
    show.add_argument("clip", help="a media file")
    show.add_argument("--out", default="seen.png", help="the picture to write (default: seen.png)")
    show.add_argument("--frames", type=int, default=8, choices=range(1, 65), metavar="1..64", help="frames the model takes (default: 8)")
    show.add_argument("--size", type=int, default=224, choices=range(16, 1025), metavar="16..1024", help="pixels of a side (default: 224)")
    show.add_argument("--fit", default="pad", choices=("pad", "squash"), help="how frames become square (default: pad)")
    args = parser.parse_args(argv)
    draw_seen(args.clip, args.out, args.frames, args.size, fit=args.fit)
    print(f"written: {args.out}")


if __name__ == "__main__":
    from common import run
    run(main)
