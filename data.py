"""Clips, text and manifests: everything between files on disk and the tensors the model takes.

    frames, waveform = load_clip("clip.mp4", 8)             # (T, 3, h, w) uint8, (samples,) at 16 kHz
    pixel_values     = preprocess_frames(frames, 224)       # (T, 3, 224, 224) in [-1, 1]
    input_features   = log_mel(waveform)                    # (128, 3000)
    prompt_ids       = Tokenizer("checkpoint").prompt_ids(QUESTION_REASONING)   # with -201 video, -202 audio
    bert_ids, mask   = BertTokenizer("checkpoint")([QUESTION_REASONING])        # for the branch gate

A manifest is a JSON list, in the format of the published data:

    [{"video": "happy/0001.mp4",
      "conversations": [{"from": "human", "value": "<video>\\n<audio>\\nWhich emotion ...?"},
                        {"from": "gpt",   "value": "<think>...</think>\\n<answer>happy</answer>"}]}]

Training, evaluation and inference share these functions, so a clip or a prompt looks the same in all of them.
What cannot be read is an error that names the file: no silence, black frame or other clip takes its place.
Shapes: B prompts, T frames, P prompt length, C completion length, L BERT length, S image size, h w a clip's size.
"""

import atexit
import contextlib
import functools
import hashlib
import itertools
import json
import re
import signal
import sys
import time
import unicodedata
from collections import Counter
from dataclasses import dataclass, field
from multiprocessing import connection
from pathlib import Path

import av
import jinja2.sandbox
import numpy as np
import tokenizers
import torch
import torchaudio
from safetensors import SafetensorError
from safetensors.torch import load_file
from tokenizers import decoders, models, normalizers, pre_tokenizers
from torch import multiprocessing       # the standard one, with tensors handed over in shared memory
from torchvision.transforms.v2 import functional as image_ops

try:
    import resource
except ImportError:         # Windows: no memory limits
    resource = None

SAMPLE_RATE = 16_000        # Hz, what Whisper was trained on
N_FFT, HOP = 400, 160       # samples: 25 ms windows every 10 ms
GREY = 127                  # padding colour, the middle of 0..255: about 0 after normalisation

# What claims or holds more than this is no clip of one emotion, and is refused before it takes memory or time.
MAX_SIDE = 4096             # pixels: frames are padded to a square, and 8 of this size take 400 MB
MAX_SECONDS = 3600
MAX_BYTES = 1 << 30         # of a file: 35 s at 240 Mbit/s
MAX_PACKETS = 1_000_000     # of all streams: an hour with 100 frames and 100 packets of sound a second has 720 000
MAX_RATE, MAX_CHANNELS = 384_000, 16    # of sound; a resampler's filter grows with the rate
MAX_OPENING = 512 << 20     # bytes for reading a file's index
CLIP_SECONDS = 300          # a worker that needs longer for a clip hangs; a minute of 4k video takes about 30 s
MAX_TEMPLATE = 256 << 20, 5, 100_000    # bytes, seconds, characters beside the question that a chat template may take

VIDEO_TOKEN, AUDIO_TOKEN = -201, -202   # placeholders in prompt ids; the model puts the media tokens there
IGNORE = -100                           # label of positions without loss, the default of torch's cross entropy

QUESTION_LABEL = ("As an emotional recognition expert; throughout the video, which emotion conveyed by the characters "
                  "is the most obvious to you?")
QUESTION_REASONING = (f"{QUESTION_LABEL}\nOutput the thinking process in <think> </think> and final emotion in "
                      "<answer> </answer> tags.")

MEDIA_TEXT = {"video_audio": "<vi_start><video><vi_end>\n<au_start><audio><au_end>\n",
              "video": "<vi_start><video><vi_end>\n",
              "audio": "<au_start><audio><au_end>\n",
              "text": ""}
MODALITIES = tuple(MEDIA_TEXT)


class DataError(ValueError):
    """Something in the user's files or flags is wrong; the message says what and what to do."""


class ClipError(DataError):
    """A media file that cannot be used; the message names it."""


def _require(condition, message, error=DataError):
    if not condition:
        raise error(message)


def is_file(path):
    """Path.is_file, but False for what no file can be called: too long a name, a null byte, half a surrogate pair."""
    try:
        return Path(path).is_file()
    except (OSError, ValueError):
        return False


@contextlib.contextmanager
def _limits(size, seconds=None):
    """Inside, the process may grow by `size` bytes (on Linux), and Python code may take `seconds`: else MemoryError, TimeoutError."""
    def clock(frame, event, argument):      # called at every line that starts in here
        if time.monotonic() > deadline:
            raise TimeoutError(f"takes more than {seconds} s")
        return clock

    deadline, tracer, statm = time.monotonic() + (seconds or 0), sys.gettrace(), Path("/proc/self/statm")
    if resource and statm.exists():
        old = soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        most = int(statm.read_text().split()[0]) * resource.getpagesize() + size
        resource.setrlimit(resource.RLIMIT_AS, (most if soft == resource.RLIM_INFINITY else min(soft, most), hard))
    try:
        if seconds:
            sys.settrace(clock)
        yield
    finally:
        sys.settrace(tracer)
        if resource and statm.exists():
            resource.setrlimit(resource.RLIMIT_AS, old)


# --------------------------------------------------------------------------------------------- video and audio

def frame_indices(total, wanted):
    """Indices of `wanted` frames spread evenly over a clip of `total` frames: the middles of equal segments.

    As the published model samples: s = (total - 1) / wanted, index i = round(((s i) + s (i + 1)) / 2 + 1e-6),
    where round takes halves to the even neighbour. A clip shorter than `wanted` repeats indices.
    """
    if total < 1 or wanted < 1:
        raise ValueError(f"frame_indices needs at least one frame and one wanted frame, got {total} and {wanted}")
    step = (total - 1) / wanted
    return [min(round((step * i + step * (i + 1)) / 2 + 1e-6), total - 1) for i in range(wanted)]


def load_clip(path, wanted):
    """Frames and sound of a clip, from one pass over the file.

    Returns frames (T = wanted, 3, h, w) uint8 RGB and waveform (samples,) float32 mono at 16 kHz in about [-1, 1];
    either is None when the file has no such stream. Raises ClipError for anything that cannot be decoded.
    """
    return _decode(path, wanted)


def load_frames(path, wanted):
    """(T = wanted, 3, h, w) uint8 RGB, leaving the sound alone. Raises ClipError, also without a video stream."""
    return _present(_decode(path, wanted, want_audio=False)[0], path, "video")


def load_waveform(path):
    """(samples,) float32 mono at 16 kHz, the whole clip. Raises ClipError, also without an audio stream."""
    return _present(_decode(path, want_video=False)[1], path, "audio")


def _present(stream, path, kind):
    _require(stream is not None, f"{path}: has no {kind} stream; run with --modality "
             f"{'audio' if kind == 'video' else 'video'}, or take it out of the manifest", ClipError)
    return stream


def _decode(path, wanted=1, want_video=True, want_audio=True):
    _require(is_file(path), f"{path}: no such file", ClipError)
    size = Path(path).stat().st_size
    _require(size <= MAX_BYTES, f"{path}: a file of {size >> 20} MiB, at most {MAX_BYTES >> 20} are read; cut it", ClipError)
    try:
        with _open(path) as container:
            # A cover picture counts as a video stream in some containers; it says nothing about a face.
            videos = [s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
            audios = container.streams.audio
            claim = max((s.frames for s in (*videos, *audios)), default=0)
            _require(claim <= MAX_PACKETS and (container.duration or 0) <= MAX_SECONDS * av.time_base,
                     f"{path}: claims {claim} packets and {(container.duration or 0) / av.time_base:.0f} s, at most {MAX_PACKETS} "
                     f"and {MAX_SECONDS} s are read; cut it", ClipError)
            _require(videos or audios, f"{path}: has neither video nor audio", ClipError)
            return _decode_streams(container, path, videos[0] if want_video and videos else None,
                                   audios[0] if want_audio and audios else None, wanted)
    except DataError:
        raise
    except MemoryError as error:        # FFmpeg's own are of this class too
        raise ClipError(f"{path}: reading it takes more memory than a clip should; is it damaged?") from error
    # ValueError, TypeError: size or sound format changes half-way, or has no name
    except (av.error.FFmpegError, ValueError, TypeError) as error:
        raise ClipError(f"{path}: cannot be decoded ({getattr(error, 'strerror', None) or error})") from error


def _open(path):
    # Titles in an unknown encoding are common in old files, and are of no interest here.
    options = {"max_pixels": str(MAX_SIDE ** 2), "protocol_whitelist": "file"}
    with _limits(MAX_OPENING):
        container = av.open(str(path), metadata_errors="ignore", options=options)
    _require(not {"concat", "dash", "hls", "imf", "sdp"} & {*container.format.name.split(",")},
             f"{path}: is a playlist, which stands for other files; list those", ClipError)
    return container


def _check_size(path, picture):
    if max(picture.width, picture.height) > MAX_SIDE:
        raise ClipError(f"{path}: frames of {picture.width} x {picture.height} pixels, at most {MAX_SIDE} a side are decoded; scale it down")


def _check_sound(path, frame, samples):
    if frame.sample_rate > MAX_RATE or frame.layout.nb_channels > MAX_CHANNELS:
        raise ClipError(f"{path}: {frame.layout.nb_channels} channels of sound at {frame.sample_rate} Hz, at most {MAX_CHANNELS} and "
                        f"{MAX_RATE} Hz are decoded; convert it")
    if samples > MAX_SECONDS * frame.sample_rate:
        raise ClipError(f"{path}: sound of more than {MAX_SECONDS} s; cut it")


def _decode_streams(container, path, video, audio, wanted):
    frames, seen, chunks = {}, 0, []            # frames: index -> (h, w, 3); seen: video frames decoded so far
    to_rgb = av.video.reformatter.VideoReformatter()        # one for all frames, without threads: making those costs more
    refused = samples = 0
    streams = [stream for stream in (video, audio) if stream]
    if not streams:                             # an empty list would mean all of them to demux()
        return None, None
    for stream in streams:
        _require(stream.codec_context, f"{path}: its {stream.type} is in no format that can be decoded; convert it", ClipError)
    if video:
        _check_size(path, video.codec_context)
        video.codec_context.options = {"max_pixels": str(MAX_SIDE ** 2)}    # if the stream turns out larger than its file says
    packets = list(itertools.islice(container.demux(streams), MAX_PACKETS + 1))     # still compressed
    _require(len(packets) <= MAX_PACKETS, f"{path}: holds more than {MAX_PACKETS} packets; cut it", ClipError)
    counts = _count_packets(packets)
    for stream in streams:                      # only mp4 is exact about what it should hold (but packs PCM otherwise)
        held = counts[stream.index, False] + counts[stream.index, True]
        exact = "mp4" in container.format.name and (stream is video or stream.codec_context.name == "aac")
        _require(not exact or held * 10 >= stream.frames * 9,
                 f"{path}: holds {held} of {stream.frames} {stream.type} packets; is it cut off?", ClipError)
    if video:
        video.codec_context.thread_count = 1    # clips are decoded in many processes at once, not in many threads
        total = counts[video.index, False]
        _require(total, f"{path}: its video stream is empty", ClipError)
        indices = frame_indices(total, wanted)
    if audio:
        # Only rate and sample type: libswresample's own down-mix of floats is not normalised and would clip.
        resampler = av.AudioResampler(format="fltp", rate=SAMPLE_RATE, frame_size=SAMPLE_RATE)     # given out second by second

    for packet in packets:
        if packet.stream is video and seen > indices[-1]:       # all frames are there
            if audio:
                continue
            break
        try:
            decoded = packet.decode()           # the last, empty packet of a stream flushes the decoder
        except av.error.FFmpegError:
            refused += 1
            continue
        for frame in decoded:
            if packet.stream is audio:
                samples += frame.samples
                _check_sound(path, frame, samples)
                chunks += resampler.resample(frame)
                continue
            _check_size(path, frame)
            if seen in indices:
                frames[seen] = to_rgb.reformat(frame, format="rgb24", threads=1).to_ndarray()
            last_frame, seen = frame, seen + 1

    # Like any player, pass over a damaged packet, but not over many.
    _require(refused * 20 <= len(packets), f"{path}: {refused} of {len(packets)} packets are damaged (or their frames larger than "
             f"{MAX_SIDE} x {MAX_SIDE} pixels)", ClipError)
    if video:
        _require(seen * 2 >= total or seen > indices[-1],
                 f"{path}: only {seen} of {total} video frames can be decoded", ClipError)
        if seen <= indices[-1]:                 # ends a little early: repeat the last frame
            frames |= {i: to_rgb.reformat(last_frame, format="rgb24", threads=1).to_ndarray() for i in indices if i >= seen}
        frames = torch.from_numpy(np.stack([frames[i] for i in indices])).permute(0, 3, 1, 2)   # (T, 3, h, w)
    if audio:
        chunks += resampler.resample(None)      # what the resampler still holds, otherwise the end is lost
        chunks = [chunk.to_ndarray() for chunk in chunks if chunk is not None]                  # (channels, n) each
        _require(sum(chunk.shape[1] for chunk in chunks), f"{path}: its audio stream is empty; run with "
                 "--modality video, or take it out of the manifest", ClipError)
        waveform = torch.from_numpy(np.concatenate(chunks, axis=1).mean(axis=0))                # (samples,)
        _require(waveform.abs().max() < 1e6, f"{path}: its sound is not a sound, samples go up to {waveform.abs().max():.0e}", ClipError)
    return frames if video else None, waveform if audio else None


def _count_packets(packets):
    """Packets, which for video are frames, by (stream index, discarded).

    Files need not say it: mkv, webm and flv store no number, avi counts frames that are not there, and mp4 those
    before the start of a clip that was cut without encoding it anew.
    """
    return Counter((packet.stream.index, packet.is_discard) for packet in packets if packet.size)


def resize_frames(frames, size, fit="pad"):
    """(T, 3, h, w) uint8 -> (T, 3, S, S) uint8, bicubic with antialiasing.

    fit "pad" keeps the proportions of faces: first a square with grey borders. "squash" stretches instead.
    """
    if fit == "pad":
        height, width = frames.shape[-2:]
        side = max(height, width)
        left, top = (side - width) // 2, (side - height) // 2      # an odd difference: the larger part goes behind
        frames = image_ops.pad(frames, [left, top, side - width - left, side - height - top], fill=GREY)
    elif fit != "squash":
        raise ValueError(f"fit must be pad or squash, not {fit!r}")
    return image_ops.resize(frames, [size, size], interpolation=image_ops.InterpolationMode.BICUBIC, antialias=True)


def preprocess_frames(frames, size, fit="pad"):
    """(T, 3, h, w) uint8 -> (T, 3, S, S) float32 in [-1, 1], as SigLIP wants it."""
    return resize_frames(frames, size, fit).contiguous().float() / 127.5 - 1


@functools.lru_cache
def _mel_constants(n_mels):
    """Whisper's (n_mels, 201) triangular filters, Slaney's scale and area, 0 to 8 kHz, and its (400,) Hann window."""
    filters = torchaudio.functional.melscale_fbanks(N_FFT // 2 + 1, 0.0, SAMPLE_RATE / 2, n_mels, SAMPLE_RATE,
                                                    norm="slaney", mel_scale="slaney")
    return filters.T.contiguous(), torch.hann_window(N_FFT)


def log_mel(waveform, n_mels=128, num_samples=480_000):
    """Whisper's spectrogram: (samples,) float32 at 16 kHz -> (n_mels, num_samples / 160) float32 in about [-1, 1.5].

    The waveform is cut or padded with zeros to num_samples, a multiple of 160. Only the part with sound is
    transformed; the power of the rest is 0, whatever the transform, so a 3 s clip costs a tenth of 30 s.
    """
    filters, window = _mel_constants(n_mels)
    waveform = waveform[:num_samples]
    # Whole seconds, and 400 zeros or more behind the sound: a frame reaches 200 samples back, and the reflection at
    # the end has to mirror zeros.
    sounding = min(num_samples, -(-(len(waveform) + N_FFT) // SAMPLE_RATE) * SAMPLE_RATE)
    waveform = torch.nn.functional.pad(waveform, (0, sounding - len(waveform)))
    spectrum = torch.stft(waveform, N_FFT, HOP, window=window, return_complex=True)[:, :-1]
    mel = filters @ spectrum.abs() ** 2                                             # (n_mels, sounding / 160)
    mel = torch.nn.functional.pad(mel, (0, (num_samples - sounding) // HOP))        # (n_mels, num_samples / 160)
    log = mel.clamp(min=1e-10).log10()
    return (torch.maximum(log, log.max() - 8) + 4) / 4                              # at most 80 dB below the loudest


# --------------------------------------------------------------------------------------------------------- text

def _read_json(path, default=None):
    """A JSON file's content; `default`, if given, where the file does not exist."""
    if default is not None and not path.is_file():
        return default
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        json.dumps(content, ensure_ascii=False).encode()    # half a surrogate pair is no text: it cannot be written or tokenised
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read as JSON ({error}); a git-lfs pointer? run git lfs pull") from error
    _require(default is None or isinstance(content, dict), f"{path}: should be a JSON object, is a {type(content).__name__}")
    return content


@contextlib.contextmanager
def _foreign(path, what):
    """Whatever a foreign file makes go wrong inside is one DataError that names the file.

    The tokenizers library and templates raise anything, the former bare Exceptions, and panics, which are no Exceptions at
    all; a field of the wrong type is a TypeError, AttributeError, KeyError, ... wherever it is used.
    """
    try:
        yield
    except DataError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise DataError(f"{path}: {what} ({type(error).__name__}: {error}); download it again") from error


def _read_tokenizer(path):
    """A tokenizer.json, without the padding and truncation that a saved one may bring along."""
    return tokenizers.Tokenizer.from_str(json.dumps(_read_json(path, {}) | {"padding": None, "truncation": None}))


# How Qwen2 cuts text before merging bytes: contractions, words with the character before them, single digits,
# runs of punctuation, line ends, white space.
QWEN2_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
                 r"|\s+(?!\S)|\s+")


def _build_qwen2(path, config):
    """Qwen2's byte-level BPE from vocab.json and merges.txt, for checkpoints without a tokenizer.json."""
    vocab, merges = path / "vocab.json", path / "merges.txt"
    _require(vocab.is_file() and merges.is_file(), f"{path}: has neither tokenizer.json nor vocab.json and merges.txt")
    tokenizer = tokenizers.Tokenizer(models.BPE.from_file(str(vocab), str(merges)))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(tokenizers.Regex(QWEN2_PATTERN), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    added = {number: {"content": text} for text, number in _read_json(path / "added_tokens.json", {}).items()}
    added |= {int(number): token for number, token in config.get("added_tokens_decoder", {}).items()}
    for number, token in sorted(added.items()):     # in this order, as ids count on from the vocabulary's end
        tokenizer.add_special_tokens([tokenizers.AddedToken(token["content"], normalized=False)])
        _require(tokenizer.token_to_id(token["content"]) == number,
                 f"{path}: the added token {token['content']} does not get its id {number}")
    return tokenizer


class _Undefined(jinja2.Undefined):
    """A name that the chat does not have may be asked about, as templates do, but not be printed as nothing."""
    __str__ = jinja2.Undefined._fail_with_undefined_error


def _read_template(path, config):
    file = path / "chat_template.jinja"
    source = file.read_text(encoding="utf-8") if file.is_file() else config.get("chat_template")
    if isinstance(source, list):    # several named ones
        source = {entry["name"]: entry["template"] for entry in source}.get("default")
    _require(source and isinstance(source, str), f"{path}: has no chat template, in tokenizer_config.json or chat_template.jinja")

    def complain(message):          # templates do it with this
        raise jinja2.TemplateError(str(message))

    def refuse(context, operator, left, right):
        raise jinja2.TemplateError(f"the operator {operator} is not for chats")     # one of it can take hours

    # A template is a program that came with the checkpoint: it runs in a sandbox, and not for long.
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, undefined=_Undefined)
    environment.intercepted_binops, environment.call_binop = frozenset(["**"]), refuse
    environment.globals["raise_exception"] = complain
    with _limits(*MAX_TEMPLATE[:2]):
        return environment.from_string(source)


class Tokenizer:
    """The language model's tokenizer and chat template, from a checkpoint directory.

    `<video>` and `<audio>` are cut out of the rendered chat and become VIDEO_TOKEN and AUDIO_TOKEN; the pieces
    between them are tokenised on their own. `<vi_start>` and the like are ordinary text, as in the published model.
    """

    def __init__(self, path):
        self.path = path = Path(path)
        self.prompts = {}       # question, modality -> ids
        config, generation = (_read_json(path / f"{name}_config.json", {}) for name in ("tokenizer", "generation"))
        file = path / "tokenizer.json"
        with _foreign(path, "its tokenizer cannot be used"):
            self.tokenizer = _read_tokenizer(file) if file.is_file() else _build_qwen2(path, config)
            names = {name: config.get(name) or "" for name in ("bos_token", "eos_token", "pad_token")}
            self.names = {name: text["content"] if isinstance(text, dict) else text for name, text in names.items()}
            self.end_of_turn = self.tokenizer.token_to_id("<|im_end|>")
            _require(self.end_of_turn is not None, f"{path}: its tokenizer has no <|im_end|>, so it is not HumanOmni's")
            eos, pad = (generation.get(name, self.tokenizer.token_to_id(self.names[name.removesuffix("_id")]))
                        for name in ("eos_token_id", "pad_token_id"))
            if isinstance(eos, list):       # several may end a text; training teaches the end of the turn
                eos = self.end_of_turn if self.end_of_turn in eos else eos[0]
            self.eos_token_id = self.end_of_turn if eos is None else eos
            self.pad_token_id = self.eos_token_id if pad is None else pad
            for number in (self.eos_token_id, self.pad_token_id):
                _require(type(number) is int and self.tokenizer.id_to_token(number) is not None,
                         f"{path}/generation_config.json: eos_token_id and pad_token_id should be ids of tokens, not {number!r}")
            self.ids = max(self.tokenizer.get_vocab().values()) + 1     # how many the model has to have
        with _foreign(path, "its chat template is not valid"):
            self.template = _read_template(path, config)

    def encode(self, text):
        """Ids of a text without media; special tokens in it are single ids."""
        with _foreign(self.path, "its tokenizer cannot be used"):
            ids = self.tokenizer.encode(text, add_special_tokens=False).ids
            read, given = (unicodedata.normalize("NFC", t) for t in (self.tokenizer.decode(ids, skip_special_tokens=False), text))
        _require(read == given, f"{self.path}: its tokenizer loses a part of {text!r}; download it again")
        return ids

    def render(self, question, modality="video_audio"):
        """The chat as text, up to where the answer begins, with <video> and <audio> still in it."""
        _require(modality in MODALITIES, f"modality must be one of {', '.join(MODALITIES)}, not {modality!r}")
        _require("<video>" not in question and "<audio>" not in question,
                 f"the question must not contain <video> or <audio>, they are added here: {question!r}")
        content = MEDIA_TEXT[modality] + question
        with _foreign(self.path, "its chat template cannot be rendered"), _limits(*MAX_TEMPLATE[:2]):
            text = self.template.render(messages=[{"role": "user", "content": content}], add_generation_prompt=True, **self.names)
        markers = [text.count(marker) == content.count(marker) for marker in ("<video>", "<audio>")]
        _require(content.strip() in text and all(markers) and len(text) <= len(content) + MAX_TEMPLATE[2], f"{self.path}: its chat "
                 f"template should repeat {content!r} once and add no more than {MAX_TEMPLATE[2]} characters, gives {text[:300]!r}")
        return text

    def prompt_ids(self, question, modality="video_audio"):
        """Question -> list of P ids, one VIDEO_TOKEN and AUDIO_TOKEN among them as the modality says."""
        if (question, modality) not in self.prompts:        # usually the same one all along
            ids, media = [], {"<video>": VIDEO_TOKEN, "<audio>": AUDIO_TOKEN}
            for piece in re.split("(<video>|<audio>)", self.render(question, modality)):
                ids += [media[piece]] if piece in media else self.encode(piece)
            self.prompts[question, modality] = ids
        return list(self.prompts[question, modality])

    def sft_ids(self, question, answer, modality="video_audio"):
        """Question and answer -> (ids, labels), lists of P + C; labels are IGNORE before the answer.

        Prompt and answer are tokenised apart, so that the prompt has the very ids it has at inference.
        """
        prompt = self.prompt_ids(question, modality)
        completion = self.encode(answer) + [self.end_of_turn] + self.encode("\n")
        return prompt + completion, [IGNORE] * len(prompt) + completion

    def decode(self, ids):
        """Ids (list or tensor) -> text, without special tokens and placeholders."""
        return self.tokenizer.decode([int(i) for i in ids if i >= 0], skip_special_tokens=True)


class BertTokenizer:
    """BERT's WordPiece for the branch gate, from tokenizer.json or vocab.txt in `path` or in its folder bert/."""

    def __init__(self, path):
        # bert/ first: a checkpoint's own tokenizer.json is the language model's.
        self.path = path
        with _foreign(path, "its BERT vocabulary cannot be used"):
            folders = [f for f in (Path(path) / "bert", Path(path)) if (f / "vocab.txt").is_file()
                       or _read_json(f / "tokenizer.json", {}).get("model", {}).get("type") == "WordPiece"]
            _require(folders, f"{path}: has no BERT vocabulary (tokenizer.json or vocab.txt, there or in its folder "
                     "bert/); pass a BERT directory with --bert DIR")
            self.path = folder = folders[0]
            config = _read_json(folder / "tokenizer_config.json", {})
            if (folder / "tokenizer.json").is_file():
                self.tokenizer = _read_tokenizer(folder / "tokenizer.json")
            else:
                vocab = models.WordPiece.read_file(str(folder / "vocab.txt"))
                self.tokenizer = tokenizers.BertWordPieceTokenizer(vocab, lowercase=config.get("do_lower_case", True))
            special = [self.tokenizer.token_to_id(token) for token in ("[PAD]", "[UNK]", "[CLS]", "[SEP]")]
            _require(None not in special, f"{folder}: its vocabulary is not BERT's, it lacks [PAD], [UNK], [CLS] or [SEP]")
            positions = _read_json(folder / "config.json", {}).get("max_position_embeddings", 512)
            self.length = min(positions, config.get("model_max_length", 512))
            self.tokenizer.enable_truncation(self.length)
            self.tokenizer.enable_padding(pad_id=special[0])
            self.ids = max(self.tokenizer.get_vocab().values()) + 1
        ids, _ = self(["a"])
        _require([ids[0, 0], ids[0, -1]] == special[2:], f"{folder}: its tokenizer does not put a text between [CLS] and [SEP], as BERT's does")

    def __call__(self, questions):
        """B questions -> input_ids, attention_mask, both (B, L) int64; cut to the model's length, padded to L."""
        with _foreign(self.path, "its BERT vocabulary cannot be used"):
            encoded = self.tokenizer.encode_batch(list(questions))
            return torch.tensor([e.ids for e in encoded]), torch.tensor([e.attention_mask for e in encoded])


# ---------------------------------------------------------------------------------------- manifests and batches

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
    entries = _read_json(path)
    _require(isinstance(entries, list) and entries, f"{path}: should be a JSON list of one or more entries")
    root = path.parent if media_root is None else Path(media_root)
    examples = [_read_entry(entry, f"{path}: entry {i}", root) for i, entry in enumerate(entries[:limit])]
    videos = dict.fromkeys(example.video for example in examples if example.video)
    missing = [str(video) for video in videos if not is_file(video)]
    _require(not missing, f"{path}: {len(missing)} of {len(videos)} clips do not exist: {', '.join(missing[:3])}"
             f"{', ...' if missing[3:] else ''}; is --media-root right? (now {root})")
    return examples


def _read_entry(entry, where, root):
    _require(isinstance(entry, dict), f"{where} should be an object")
    video, turns = entry.get("video"), entry.get("conversations")
    _require("video" not in entry or isinstance(video, str) and video, f"{where}: field video should be a path")
    _require(isinstance(turns, list) and all(isinstance(turn, dict) for turn in turns)
             and [turn.get("from") for turn in turns] == ["human", "gpt"],
             f"{where}: field conversations should be a list of two turns, the first from human, the second from gpt")
    for number, turn in enumerate(turns):
        _require(isinstance(turn.get("value"), str), f"{where}: field conversations[{number}].value should be a text")
    human, answer = turns[0]["value"], turns[1]["value"]
    modality = "_".join(medium for medium in ("video", "audio") if f"<{medium}>" in human)
    _require(video or not modality, f"{where}: field video is missing, but the question has media markers")
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
        _require(is_file(path), f"{path}: no such file", ClipError)
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
                _require({*features} == {name for name in ("video", "audio") if name in modality},
                         f"{item['cache_file']}: does not hold the features of {modality}; delete it, it is made again")
                return {**item, "features": (features.get("video"), features.get("audio"))}
        if want_video or want_audio:
            frames, waveform = _decode(path, self.num_frames, want_video, want_audio)
        if want_video:
            item["pixel_values"] = preprocess_frames(_present(frames, path, "video"), self.image_size, self.fit)
        if want_audio:
            item["input_features"] = log_mel(_present(waveform, path, "audio"), self.n_mels, self.num_samples)
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
    batches, so the first batch comes early. Errors of the data arrive as they were raised. An item's key "position"
    is its place in `order`: batch k is order[k * batch_size:(k + 1) * batch_size], less the clips left out.

    skip_log: a file; clips that cannot be used are then listed there and left out. More than 5 % of the data set's clips
    is an error all the same: then something else is wrong, and so is a worker that dies or hangs. With a `start`, the list
    goes on; else it begins anew.
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
    items = zip(itertools.count(start * batch_size), items)
    while batch := list(itertools.islice(items, batch_size)):
        good = []
        for position, item in batch:
            if not isinstance(item, DataError):
                good.append({**item, "position": position})
                continue
            if not skip_log or not isinstance(item, ClipError):
                raise item
            skipped.add(str(item))
            skip_log.parent.mkdir(parents=True, exist_ok=True)
            skip_log.write_text("\n".join(sorted(skipped)) + "\n", encoding="utf-8")
            if len(skipped) > 0.05 * len(dataset):
                raise DataError(f"{len(skipped)} of {len(dataset)} clips cannot be used, more than 5 %; they are listed in {skip_log}")
        if good:
            yield good
