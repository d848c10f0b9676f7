"""Video and sound: from a file of any container and codec that FFmpeg reads to the tensors that the towers take.

    frames, waveform = load_clip("clip.mp4", 8)             # (T, 3, h, w) uint8, (samples,) at 16 kHz
    pixel_values     = preprocess_frames(frames, 224)       # (T, 3, 224, 224) in [-1, 1]
    input_features   = log_mel(waveform)                    # (128, 3000)

What cannot be decoded is an error that names the file: no silence, black frame or other clip takes its place.
Shapes: T frames, S image size, h w a clip's size.
"""

import functools
import itertools
from collections import Counter
from pathlib import Path

import av
import numpy as np
import torch
import torchaudio
from torchvision.transforms.v2 import functional as image_ops

from errors import ClipError, DataError, is_file, limits, require

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
    return decode(path, wanted)


def load_frames(path, wanted):
    """(T = wanted, 3, h, w) uint8 RGB, leaving the sound alone. Raises ClipError, also without a video stream."""
    return present(decode(path, wanted, want_audio=False)[0], path, "video")


def load_waveform(path):
    """(samples,) float32 mono at 16 kHz, the whole clip. Raises ClipError, also without an audio stream."""
    return present(decode(path, want_video=False)[1], path, "audio")


def present(stream, path, kind):
    require(stream is not None, f"{path}: has no {kind} stream; run with --modality "
             f"{'audio' if kind == 'video' else 'video'}, or take it out of the manifest", ClipError)
    return stream


def decode(path, wanted=1, want_video=True, want_audio=True):
    require(is_file(path), f"{path}: no such file", ClipError)
    size = Path(path).stat().st_size
    require(size <= MAX_BYTES, f"{path}: a file of {size >> 20} MiB, at most {MAX_BYTES >> 20} are read; cut it", ClipError)
    try:
        with _open(path) as container:
            # A cover picture counts as a video stream in some containers; it says nothing about a face.
            videos = [s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
            audios = container.streams.audio
            claim = max((s.frames for s in (*videos, *audios)), default=0)
            require(claim <= MAX_PACKETS and (container.duration or 0) <= MAX_SECONDS * av.time_base,
                     f"{path}: claims {claim} packets and {(container.duration or 0) / av.time_base:.0f} s, at most {MAX_PACKETS} "
                     f"and {MAX_SECONDS} s are read; cut it", ClipError)
            require(videos or audios, f"{path}: has neither video nor audio", ClipError)
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
    with limits(MAX_OPENING):
        container = av.open(str(path), metadata_errors="ignore", options=options)
    require(not {"concat", "dash", "hls", "imf", "sdp"} & {*container.format.name.split(",")},
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
        require(stream.codec_context, f"{path}: its {stream.type} is in no format that can be decoded; convert it", ClipError)
    if video:
        _check_size(path, video.codec_context)
        video.codec_context.options = {"max_pixels": str(MAX_SIDE ** 2)}    # if the stream turns out larger than its file says
    packets = list(itertools.islice(container.demux(streams), MAX_PACKETS + 1))     # still compressed
    require(len(packets) <= MAX_PACKETS, f"{path}: holds more than {MAX_PACKETS} packets; cut it", ClipError)
    counts = _count_packets(packets)
    for stream in streams:                      # only mp4 is exact about what it should hold (but packs PCM otherwise)
        held = counts[stream.index, False] + counts[stream.index, True]
        exact = "mp4" in container.format.name and (stream is video or stream.codec_context.name == "aac")
        require(not exact or held * 10 >= stream.frames * 9,
                 f"{path}: holds {held} of {stream.frames} {stream.type} packets; is it cut off?", ClipError)
    if video:
        video.codec_context.thread_count = 1    # clips are decoded in many processes at once, not in many threads
        total = counts[video.index, False]
        require(total, f"{path}: its video stream is empty", ClipError)
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
    require(refused * 20 <= len(packets), f"{path}: {refused} of {len(packets)} packets are damaged (or their frames larger than "
             f"{MAX_SIDE} x {MAX_SIDE} pixels)", ClipError)
    if video:
        require(seen * 2 >= total or seen > indices[-1],
                 f"{path}: only {seen} of {total} video frames can be decoded", ClipError)
        if seen <= indices[-1]:                 # ends a little early: repeat the last frame
            frames |= {i: to_rgb.reformat(last_frame, format="rgb24", threads=1).to_ndarray() for i in indices if i >= seen}
        frames = torch.from_numpy(np.stack([frames[i] for i in indices])).permute(0, 3, 1, 2)   # (T, 3, h, w)
    if audio:
        chunks += resampler.resample(None)      # what the resampler still holds, otherwise the end is lost
        chunks = [chunk.to_ndarray() for chunk in chunks if chunk is not None]                  # (channels, n) each
        require(sum(chunk.shape[1] for chunk in chunks), f"{path}: its audio stream is empty; run with "
                 "--modality video, or take it out of the manifest", ClipError)
        waveform = torch.from_numpy(np.concatenate(chunks, axis=1).mean(axis=0))                # (samples,)
        require(waveform.abs().max() < 1e6, f"{path}: its sound is not a sound, samples go up to {waveform.abs().max():.0e}", ClipError)
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
