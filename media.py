"""Video and sound: from a file of any container and codec that FFmpeg reads to the towers' inputs.

    frames, waveform = load_clip("clip.mp4", 8)         # (T, 3, h, w) uint8, (samples,) at 16 kHz
    pixel_values     = preprocess_frames(frames, 224)   # (T, 3, 224, 224) in [-1, 1]
    input_features   = log_mel(waveform)                # (128, 3000)

A clip is used as players show it: default tracks, within the edit list, upright, in proportion.
What cannot be decoded is an error that names the file: no silence, black frame or other clip takes
its place. Shapes: T frames, S image size, h w a clip's size.
"""

import functools
import itertools
import os

import av
import numpy as np
import torch
import torch.nn.functional as F
import torchaudio

from support.errors import LFS_ADVICE, LFS_MARK, ClipError, is_file, require

SAMPLE_RATE = 16_000  # Hz, what Whisper was trained on
N_FFT, HOP = 400, 160  # samples: 25 ms windows every 10 ms
GREY = 127  # padding colour, the middle of 0..255: about 0 after normalisation

# What claims or holds more than this is no clip of one emotion, and is refused.
MAX_SIDE = 4096  # pixels: frames are padded to a square, and 8 of this size take 400 MB
MAX_SECONDS = 3600
MAX_BYTES = 1 << 30  # of a file: 35 s at 240 Mbit/s
MAX_PACKETS = 1_000_000  # an hour with 100 frames and 100 packets of sound a second has 720 000
MAX_RATE, MAX_CHANNELS = 384_000, 16  # of sound; a resampler's filter grows with the rate

# Formats, by FFmpeg's names, of files that stand for other files; and those whose header says how
# long the file is. For others FFmpeg estimates the duration from the file's size or last packet.
PLAYLISTS = {"concat", "dash", "hls", "imf", "sdp"}
STATE_DURATION = {"mov", "matroska", "avi", "flv", "aiff", "au", "caf", "flac"}

# Titles in an unknown encoding are common in old files; before version 19, PyAV refuses them.
ANY_TITLE = {"metadata_errors": "ignore"} if int(av.__version__.split(".")[0]) < 19 else {}

expect = functools.partial(require, error=ClipError)


def frame_indices(total, wanted):
    """Indices of `wanted` frames spread evenly over `total`: the middles of equal segments.

    As the published model samples: s = (total - 1) / wanted, index i = round((s i + s (i + 1)) / 2
    + 1e-6), where round takes halves to the even neighbour. Too few frames are repeated.
    """
    if total < 1 or wanted < 1:
        raise ValueError(f"frame_indices needs at least one frame, got {wanted} of {total}")
    step = (total - 1) / wanted
    return [min(round((step * i + step * (i + 1)) / 2 + 1e-6), total - 1) for i in range(wanted)]


def load_clip(path, wanted):
    """Frames and sound of a clip, from one pass over the file.

    Returns frames (T = wanted, 3, h, w) uint8 RGB and waveform (samples,) float32 mono at 16 kHz in
    about [-1, 1]; either is None when the file has no such stream. Raises ClipError for anything
    that cannot be decoded.
    """
    return decode(path, wanted)


def load_frames(path, wanted):
    """(T = wanted, 3, h, w) uint8 RGB, without the sound. Raises ClipError, also without video."""
    return present(decode(path, wanted, want_audio=False)[0], path, "video")


def load_waveform(path):
    """(samples,) float32 mono at 16 kHz, the whole clip. Raises ClipError, also without sound."""
    return present(decode(path, want_video=False)[1], path, "audio")


def present(stream, path, kind):
    """A stream that must be there: what decode returned for it, unless that is None."""
    other = "audio" if kind == "video" else "video"
    way_on = f"run with --modality {other}, or take it out of the manifest"
    expect(stream is not None, f"{path}: has no {kind} stream; {way_on}")
    return stream


def decode(path, wanted=1, want_video=True, want_audio=True):
    """(frames, waveform) as load_clip describes them; what is not wanted is None."""
    frames = waveform = None
    try:
        _check_file(path)
        with _open(path) as container:
            _check_claims(container)
            video = _best_stream(container, "video")
            audio = _best_stream(container, "audio", related=video)
            expect(video or audio, "has neither video nor audio")
            video = video if want_video else None
            audio = audio if want_audio else None
            packets, ends = _read_packets(container, {video, audio})
            if video:
                _check_complete(container, video, ends)
                frames = _decode_video(video, packets[video], wanted)
            if audio:
                _check_complete(container, audio, ends)
                waveform = _decode_audio(audio, packets[audio])
    except ClipError as error:
        raise ClipError(f"{path}: {error}") from None
    except (av.error.FFmpegError, OSError) as error:
        raise ClipError(f"{path}: cannot be decoded ({error.strerror or error})") from error
    return frames, waveform


def _check_file(path):
    """Refuse what FFmpeg would only call invalid."""
    expect(not os.path.isdir(path), "is a folder; give a file in it")
    expect(is_file(path), "no such file")
    with open(path, "rb") as file:
        expect(file.read(len(LFS_MARK)) != LFS_MARK, LFS_ADVICE)


def _open(path):
    # "file:", for a name like "12:30.mp4" would be taken for a protocol and its address.
    options = {"max_pixels": str(MAX_SIDE**2), "protocol_whitelist": "file"}
    return av.open(f"file:{path}", options=options, **ANY_TITLE)


def _check_claims(container):
    """Refuse what says from the start that it is no clip."""
    is_list = PLAYLISTS & set(container.format.name.split(","))
    expect(not is_list, "is a playlist, which stands for other files; list those")
    size, most = (container.size or 0) >> 20, MAX_BYTES >> 20
    expect(size <= most, f"a file of {size} MiB, at most {most} are read; cut it")
    # Packets of the index, not the streams' counts: for PCM, those are of samples.
    packets = max((len(stream.index_entries) for stream in container.streams), default=0)
    seconds = (container.duration or 0) / av.time_base
    fits = packets <= MAX_PACKETS and seconds <= MAX_SECONDS
    most = f"at most {MAX_PACKETS} and {MAX_SECONDS} s are read"
    expect(fits, f"claims {packets} packets and {seconds:.0f} s, {most}; cut it")


def _best_stream(container, kind, related=None):
    """The stream of a kind that players take: the default one, of the related one's program."""
    # A cover picture counts as a video stream in some containers; it says nothing about a face.
    cover = av.stream.Disposition.attached_pic
    streams = [s for s in container.streams if s.type == kind and not s.disposition & cover]
    best = container.streams.best(kind, related=related)
    return best if best in streams else next(iter(streams), None)


def _read_packets(container, wanted):
    """Read the file once -> {stream: packets} of the wanted streams, {stream: end} of all.

    Packets are still compressed. The end is that of the last packet, in the stream's time base.
    """
    packets, starts, ends = {stream: [] for stream in wanted}, {}, {}
    for count, packet in enumerate(container.demux(), 1):
        expect(count <= MAX_PACKETS, f"holds more than {MAX_PACKETS} packets; cut it")
        stream = packet.stream
        if stream in packets:
            packets[stream].append(packet)
        start = packet.dts if packet.pts is None else packet.pts
        if packet.size and start is not None:
            # What lasts for an unknown time lasts as long as the one before.
            lasts = packet.duration or start - starts.get(stream, start)
            starts[stream] = start
            ends[stream] = max(ends.get(stream, start), start + lasts)
    return packets, ends


def _check_complete(container, stream, ends):
    """Refuse a file that ends before its header says, by more than a tenth (and 0.1 s)."""
    name = container.format.name
    if name == "mpegts":  # has no header, but is a row of packets of one size
        whole = any(container.size % size == 0 for size in (188, 192, 204))
        expect(whole, "ends in the middle of a packet; is it cut off?")
    if not STATE_DURATION & set(name.split(",")):
        return
    # FFmpeg shortens the duration of avi and caf to what is there, but leaves their count.
    stated = stream.frames if name in ("avi", "caf") else stream.duration or 0
    start = stream.start_time or 0
    held = ends.get(stream, start) - start
    _check_duration(held * stream.time_base, stated * stream.time_base, stream.type)
    # Some containers state only the duration of the longest stream.
    held = max((end * other.time_base for other, end in ends.items()), default=0)
    _check_duration(held, (container.duration or 0) / av.time_base, "data")


def _check_duration(held, stated, kind):
    seconds = f"{float(held):.1f} of {float(stated):.1f} s of {kind}"
    expect(held + 0.1 >= 0.9 * stated, f"holds {seconds}; is it cut off?")


def _decoded(packets):
    """Frames of one stream. Like any player, pass over a damaged packet, but not over many."""
    what = f"damaged (or their frames larger than {MAX_SIDE} x {MAX_SIDE} pixels)"
    damaged = 0
    for packet in packets:  # the last, an empty one, flushes the decoder
        try:
            frames = packet.decode()
        except av.error.FFmpegError:
            damaged += 1
            expect(damaged * 20 <= len(packets), f"{damaged} of {len(packets)} packets are {what}")
        else:
            yield from frames


def _decode_video(video, packets, wanted):
    """(T = wanted, 3, h, w) uint8 RGB. Decodes no further than the last frame that is wanted."""
    decoder = video.codec_context
    expect(decoder, "its video is in no format that can be decoded; convert it")
    _check_size(decoder.width, decoder.height)
    # The stream may turn out larger than its file says.
    decoder.options = {"max_pixels": str(MAX_SIDE**2)}
    # Clips are decoded in many processes at once, not in many threads.
    decoder.thread_count = 1
    # Files need not say how many frames they hold: mkv, webm and flv store no number, avi counts
    # frames that are not there. What an edit list leaves out is read, but dropped by the decoder.
    total = sum(1 for packet in packets if packet.size and not packet.is_discard)
    expect(total, "its video stream is empty")
    indices = frame_indices(total, wanted)

    # One converter for all frames: making it costs more than using it.
    to_rgb = av.video.reformatter.VideoReformatter()
    aspect = video.sample_aspect_ratio or 1  # of a pixel: width / height
    pictures, seen, frame = {}, 0, None
    for frame in _decoded(packets):
        if seen in indices:
            pictures[seen] = _picture(frame, aspect, to_rgb)
        seen += 1
        if seen > indices[-1]:
            break
    last = min(seen - 1, indices[-1])
    enough = last == indices[-1] or seen * 2 >= total
    expect(enough, f"only {seen} of {total} video frames can be decoded")
    if last not in pictures:  # it ends a little early: the last frame is repeated
        pictures[last] = _picture(frame, aspect, to_rgb)
    return _stack([pictures[min(i, last)] for i in indices])


def _check_size(width, height):
    size = f"{width} x {height} pixels, at most {MAX_SIDE} a side are decoded"
    expect(max(width, height) <= MAX_SIDE, f"frames of {size}; scale it down")


def _picture(frame, aspect, to_rgb):
    """(h, w, 3) uint8 RGB of a decoded frame as players show it: upright, with square pixels."""
    width = max(1, round(frame.width * aspect))
    _check_size(width, frame.height)
    # No threads: starting them costs more than they bring.
    picture = to_rgb.reformat(frame, width=width, format="rgb24", threads=1).to_ndarray()
    try:
        matrix = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:  # before version 19, PyAV stumbles over side data that it does not know
        return np.rot90(picture, round(frame.rotation / 90))
    if matrix is None:
        return picture
    # A point (x, y) is shown at (a x + c y, b x + d y): a quarter turn, a mirror image, or both.
    a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5]
    if abs(b) > abs(a):
        picture, a, d = picture.swapaxes(0, 1), c, b
    return picture[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]


def _stack(pictures):
    """Pictures (h, w, 3) -> (T, 3, h, w). If sizes differ, the largest, with grey borders."""
    sizes = {picture.shape[:2] for picture in pictures}
    if len(sizes) == 1:
        return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
    height, width = (max(sides) for sides in zip(*sizes))
    frames = []
    for picture in pictures:
        frame = torch.from_numpy(picture.copy()).permute(2, 0, 1)[None]
        scale = min(height / frame.shape[2], width / frame.shape[3])
        fitted = [max(1, round(side * scale)) for side in frame.shape[2:]]
        frames.append(_pad(_resize(frame, *fitted), height, width))
    return torch.cat(frames)


def _decode_audio(audio, packets):
    """(samples,) float32 mono at 16 kHz: the mean of all channels."""
    expect(audio.codec_context, "its audio is in no format that can be decoded; convert it")
    if "mov" in audio.container.format.name:
        _keep_the_end(packets)
    chunks, samples = [], 0
    most = f"at most {MAX_CHANNELS} and {MAX_RATE} Hz are decoded"
    # A resampler for each form of the sound, which may change midway.
    form = lambda f: (f.sample_rate, f.layout.nb_channels, f.layout.name, f.format.name)
    for (rate, channels, *_), frames in itertools.groupby(_decoded(packets), form):
        fits = rate <= MAX_RATE and channels <= MAX_CHANNELS
        expect(fits, f"{channels} channels of sound at {rate} Hz, {most}; convert it")
        # For rate and sample type only: FFmpeg's own mix of float channels is not normalised, and
        # would clip. Packed ("flt"), as PyAV reads planes of up to 7 channels. A second at a time.
        resampler = av.AudioResampler(format="flt", rate=SAMPLE_RATE, frame_size=SAMPLE_RATE)
        for frame in itertools.chain(frames, [None]):  # None: what the resampler still holds
            for chunk in resampler.resample(frame):
                chunks.append(chunk.to_ndarray().reshape(-1, channels).mean(axis=1))
                samples += len(chunks[-1])
            too_long = samples > MAX_SECONDS * SAMPLE_RATE
            expect(not too_long, f"sound of more than {MAX_SECONDS} s; cut it")
    way_on = "run with --modality video, or take it out of the manifest"
    expect(samples, f"its audio stream is empty; {way_on}")
    waveform = torch.from_numpy(np.concatenate(chunks))
    loudest = waveform.abs().max()
    expect(loudest < 1e6, f"its sound is not a sound, samples go up to {loudest:.0e}")
    return waveform


def _keep_the_end(packets):
    """Have the last packet of an mp4's sound decoded whole, with what filled it up.

    So did the published model's decoder and PyAV up to 18; PyAV 19 cuts it to the edit list.
    """
    for packet in packets:
        if packet.has_sidedata("skip_samples"):
            skip = packet.get_sidedata("skip_samples")
            numbers = bytearray(skip)  # uint32: samples to skip at the start, at the end; two flags
            numbers[4:8] = bytes(4)
            skip.update(bytes(numbers))
            packet.set_sidedata(skip)


def resize_frames(frames, size, fit="pad"):
    """(T, 3, h, w) uint8 -> (T, 3, S, S) uint8, bicubic with antialiasing.

    fit "pad" keeps the proportions of faces: first a square with grey borders. "squash" stretches.
    """
    if fit == "pad":
        side = max(frames.shape[-2:])
        frames = _pad(frames, side, side)
    elif fit != "squash":
        raise ValueError(f"fit must be pad or squash, not {fit!r}")
    return _resize(frames, size, size)


def _pad(frames, height, width):
    """Grey borders around (..., h, w), which stays in the middle."""
    below, right = height - frames.shape[-2], width - frames.shape[-1]
    top, left = below // 2, right // 2  # of an odd difference, the larger part goes behind
    borders = (left, right - left, top, below - top)
    return F.pad(frames, borders, value=GREY)


def _resize(frames, height, width):
    # What torchvision's resize calls, which takes a second to import.
    return F.interpolate(frames, (height, width), mode="bicubic", antialias=True)


def preprocess_frames(frames, size, fit="pad"):
    """(T, 3, h, w) uint8 -> (T, 3, S, S) float32 in [-1, 1], as SigLIP wants it."""
    return resize_frames(frames, size, fit).contiguous().float() / 127.5 - 1


@functools.lru_cache
def _mel_constants(n_mels):
    """Whisper's (n_mels, 201) triangular filters, of Slaney's scale and area, and (400,) window."""
    filters = torchaudio.functional.melscale_fbanks(
        N_FFT // 2 + 1, 0.0, SAMPLE_RATE / 2, n_mels, SAMPLE_RATE, norm="slaney", mel_scale="slaney"
    )
    return filters.T.contiguous(), torch.hann_window(N_FFT)


def log_mel(waveform, n_mels=128, num_samples=480_000):
    """Whisper's spectrogram: (samples,) float32 at 16 kHz -> (n_mels, num_samples / 160) float32.

    The waveform is cut or padded with zeros to num_samples, a multiple of 160; values come out in
    about [-1, 1.5]. Only the part with sound is transformed: the power of the rest is 0, whatever
    the transform, so a 3 s clip costs a tenth of 30 s.
    """
    filters, window = _mel_constants(n_mels)
    waveform = waveform[:num_samples]
    # Whole seconds, and 400 zeros or more behind the sound: a frame reaches 200 samples back, and
    # the reflection at the end has to mirror zeros.
    sounding = min(num_samples, -(-(len(waveform) + N_FFT) // SAMPLE_RATE) * SAMPLE_RATE)
    waveform = F.pad(waveform, (0, sounding - len(waveform)))
    spectrum = torch.stft(waveform, N_FFT, HOP, window=window, return_complex=True)[:, :-1]
    mel = filters @ spectrum.abs() ** 2  # (n_mels, sounding / 160)
    mel = F.pad(mel, (0, (num_samples - sounding) // HOP))
    log = mel.clamp(min=1e-10).log10()  # (n_mels, num_samples / 160)
    return (torch.maximum(log, log.max() - 8) + 4) / 4  # at most 80 dB below the loudest
