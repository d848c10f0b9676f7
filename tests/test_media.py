"""media.py: parity with the published model's preprocessing, clips of many kinds, errors that help.

Golden numbers are described in golden/README.md; all other clips are written here with PyAV.
"""

import errno
import itertools
import json
import math
import os
import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from clips import brightness, copy_streams, sine_peak, write_clip, write_picture, write_sound
from safetensors.torch import load_file
from torchvision.transforms.v2 import functional as image_ops

import media
from media import ClipError

GOLDEN = Path(__file__).parent / "golden"
CLIP, CLIP_16K = GOLDEN / "media/clip.mp4", GOLDEN / "media/clip16k.mp4"


@pytest.fixture(scope="module")
def expected():
    return load_file(GOLDEN / "media/expected.safetensors")


# ------------------------------------------------------------------ parity with the golden numbers


def test_frame_indices_are_the_published_ones():
    table = json.loads((GOLDEN / "media/frame_indices.json").read_text())
    for total, row in table.items():
        for wanted, indices in row.items():
            assert indices == media.frame_indices(int(total), int(wanted)), (total, wanted)


def test_frame_indices_stay_inside_and_refuse_nothing():
    for total in range(1, 70):
        for wanted in range(1, 20):
            indices = media.frame_indices(total, wanted)
            assert len(indices) == wanted and indices == sorted(indices)
            assert indices[0] >= 0 and indices[-1] < total
    with pytest.raises(ValueError):
        media.frame_indices(0, 8)


@pytest.mark.parametrize("fit", ["pad", "squash"])
def test_frames_match_the_published_preprocessing(expected, fit):
    frames = media.load_frames(CLIP, 8)
    assert frames.shape == (8, 3, 180, 320) and frames.dtype == torch.uint8
    resized = media.resize_frames(frames, 224, fit)
    difference = (resized.int() - expected[f"frames_{fit}"].int()).abs()
    assert resized.dtype == torch.uint8
    assert difference.max() <= 2 and difference.float().mean() <= 0.02
    pixels = media.preprocess_frames(frames, 224, fit)
    assert pixels.shape == (8, 3, 224, 224) and pixels.dtype == torch.float32
    torch.testing.assert_close(pixels, resized / 127.5 - 1)
    assert pixels.min() >= -1 and pixels.max() <= 1


def test_padding_is_the_default_and_differs_from_squashing():
    frames = media.load_frames(CLIP, 2)
    pad, squash = media.preprocess_frames(frames, 64), media.preprocess_frames(frames, 64, "squash")
    assert (pad - squash).abs().mean() > 0.1
    with pytest.raises(ValueError, match="crop"):
        media.preprocess_frames(frames, 64, "crop")


def test_waveform_and_mel_match_the_published_preprocessing(expected):
    waveform = media.load_waveform(CLIP_16K)
    assert waveform.shape == expected["waveform_16k"].shape and waveform.dtype == torch.float32
    assert (waveform - expected["waveform_16k"]).norm() / expected["waveform_16k"].norm() < 1e-5
    mel = media.log_mel(waveform)
    assert mel.shape == (128, 3000) and mel.dtype == torch.float32
    reference = expected["log_mel_16k"]
    assert (mel[:, :400] - reference).abs().max() / reference.abs().max() <= 1e-4
    assert (mel[:, 400:] == mel[0, -1]).all() and abs(mel[0, -1] - reference[0, -1]) < 1e-5


def test_one_pass_gives_what_two_passes_give():
    frames, waveform = media.load_clip(CLIP, 8)
    assert torch.equal(frames, media.load_frames(CLIP, 8))
    assert torch.equal(waveform, media.load_waveform(CLIP))
    assert abs(len(waveform) - 3.39 * 16000) < 100


# ----------------------------------------------------------------------------------------- log-mel


def full_log_mel(waveform, n_mels, num_samples):
    """The plain way: transform all of the padded 30 seconds."""
    filters, window = media._mel_constants(n_mels)
    waveform = torch.nn.functional.pad(
        waveform[:num_samples], (0, max(0, num_samples - len(waveform)))
    )
    spectrum = torch.stft(waveform, 400, 160, window=window, return_complex=True)[:, :-1]
    log = (filters @ spectrum.abs() ** 2).clamp(min=1e-10).log10()
    return (torch.maximum(log, log.max() - 8) + 4) / 4


@pytest.mark.parametrize(
    "samples", [1, 199, 201, 15600, 15601, 15700, 15900, 16000, 54272, 95999, 96000, 100000]
)
@pytest.mark.parametrize("num_samples, n_mels", [(96000, 80), (480000, 128)])
def test_skipping_the_silence_changes_nothing(samples, num_samples, n_mels):
    waveform = 0.1 * torch.randn(samples, generator=torch.Generator().manual_seed(samples))
    mel = media.log_mel(waveform, n_mels, num_samples)
    assert mel.shape == (n_mels, num_samples // 160)
    assert torch.equal(mel, full_log_mel(waveform, n_mels, num_samples))


def test_mel_of_silence_is_constant():
    mel = media.log_mel(torch.zeros(5000), num_samples=32000)
    torch.testing.assert_close(mel, torch.full((128, 200), (-10 + 4) / 4))


def test_mel_shows_a_sine_at_its_place():
    time = torch.arange(32000) / 16000
    low, high = (
        media.log_mel(torch.sin(2 * torch.pi * frequency * time), num_samples=32000)[
            :, 100
        ].argmax()
        for frequency in (300, 3000)
    )
    assert 5 < low < 25 and 75 < high < 95 and low * 3 < high


# ------------------------------------------------------------------------------ clips of all kinds


CODECS = {
    "a.mp4": {"video": "libx264", "audio": "aac", "layout": "stereo", "rate": 48000},
    "b.mkv": {"video": "libx264", "audio": "libopus", "rate": 48000},
    "c.avi": {"video": "mpeg4", "audio": "libmp3lame", "layout": "stereo", "rate": 44100},
    "d.webm": {"video": "libvpx-vp9", "audio": "libopus", "rate": 48000},
    "e.flv": {"video": "flv", "audio": "libmp3lame", "rate": 44100},
    "f.mkv": {"video": "ffv1", "audio": "pcm_s16le", "rate": 8000},
    "g.mp4": {"video": "mpeg4", "audio": "aac", "audio_first": True},
    "h.avi": {"video": "mjpeg", "audio": "pcm_s16le", "rate": 11025},
    "i.mov": {"video": "mpeg4", "audio": "pcm_s16le", "rate": 22050},
}


@pytest.mark.parametrize("name", CODECS)
def test_containers_and_codecs(tmp_path, name):
    levels = (0.5, 0.5) if CODECS[name].get("layout") == "stereo" else (0.5,)
    path = write_clip(tmp_path / name, frames=22, levels=levels, **CODECS[name])
    frames, waveform = media.load_clip(path, 4)
    assert frames.shape == (4, 3, 48, 64) and frames.dtype == torch.uint8
    assert brightness(frames) == media.frame_indices(22, 4)
    red, _, blue = frames[0, :, :, :24].float().mean((1, 2))
    assert blue > red + 100  # RGB: the left is blue
    assert waveform.dtype == torch.float32 and waveform.ndim == 1
    assert abs(len(waveform) / 16000 - 22 / 25) < 0.15  # codecs add padding
    frequency, amplitude = sine_peak(waveform)
    assert abs(frequency - 440) < 5 and 0.42 < amplitude < 0.58
    assert torch.equal(frames, media.load_frames(path, 4))
    assert torch.equal(waveform, media.load_waveform(path))


@pytest.mark.parametrize("rate", [8000, 16000, 22050, 48000])
def test_resampling_keeps_every_sample(tmp_path, rate):
    waveform = media.load_waveform(
        write_clip(tmp_path / "a.mkv", audio="pcm_s16le", rate=rate, seconds=2)
    )
    assert abs(len(waveform) - 32000) <= 1  # lossy packet borders or a lost tail would show
    time = torch.arange(len(waveform)) / 16000
    error = waveform - 0.5 * torch.sin(2 * torch.pi * 440 * time)
    assert error[100:-100].abs().max() < 2e-3


@pytest.mark.parametrize(
    "layout, levels",
    [
        ("mono", (0.5,)),
        ("stereo", (0.8, 0.0)),
        ("5.1", (0.9,) * 6),
        ("5.1", (0.6, 0.0, 0.0, 0.0, 0.0, 0.0)),
    ],
)
def test_channels_are_averaged(tmp_path, layout, levels):
    path = write_clip(
        tmp_path / "a.mkv", audio="pcm_s16le", rate=48000, layout=layout, levels=levels
    )
    frequency, amplitude = sine_peak(media.load_waveform(path))
    assert abs(frequency - 440) < 5
    assert amplitude == pytest.approx(sum(levels) / len(levels), abs=0.01)


def test_one_frame_is_repeated(tmp_path):
    path = write_clip(tmp_path / "a.mp4", frames=1)
    frames, waveform = media.load_clip(path, 4)
    assert waveform is None and frames.shape == (4, 3, 48, 64) and (frames == frames[:1]).all()


def test_short_clip_repeats_indices(tmp_path):
    frames = media.load_frames(write_clip(tmp_path / "a.mp4", frames=5), 8)
    assert brightness(frames) == [0, 1, 1, 2, 2, 3, 3, 4]


def test_variable_frame_rate_counts_frames_not_time(tmp_path):
    times = [0, 1, 2, 3, 4, 5, 40, 41, 42, 90]
    frames = media.load_frames(write_clip(tmp_path / "a.mkv", frames=10, times=times), 5)
    assert brightness(frames) == media.frame_indices(10, 5)


def test_decoding_that_ends_early_repeats_the_last_frame(tmp_path, monkeypatch):
    whole = media._decoded
    monkeypatch.setattr(media, "_decoded", lambda packets: itertools.islice(whole(packets), 20))
    a_little = write_clip(tmp_path / "a.mkv", frames=24)
    expected = [min(i, 19) for i in media.frame_indices(24, 12)]
    assert brightness(media.load_frames(a_little, 12)) == expected
    most = write_clip(tmp_path / "b.mkv", frames=100)
    with pytest.raises(ClipError, match="only 20 of 100"):
        media.load_frames(most, 12)


def test_more_than_thirty_seconds(tmp_path):
    path = write_clip(tmp_path / "a.mkv", frames=10, audio="pcm_s16le", rate=8000, seconds=32)
    waveform = media.load_waveform(path)
    assert abs(len(waveform) - 32 * 16000) <= 1
    mel = media.log_mel(waveform)
    assert mel.shape == (128, 3000) and torch.equal(mel, media.log_mel(waveform[:480000]))


@pytest.mark.parametrize("width, height", [(33, 20), (20, 33), (101, 100), (50, 50)])
def test_padding_centres_like_the_published_one(width, height):
    frames = torch.full((2, 3, height, width), 200, dtype=torch.uint8)
    side = max(width, height)
    padded = media.resize_frames(frames, side)  # no resizing left to do: the borders are exact
    left, top = (side - width) // 2, (side - height) // 2
    inside = torch.zeros(side, side, dtype=torch.bool)
    inside[top : top + height, left : left + width] = True
    assert (padded[..., inside] == 200).all() and (padded[..., ~inside] == 127).all()


def test_odd_sizes(tmp_path):
    path = write_clip(tmp_path / "a.mkv", size=(75, 41), video="ffv1")
    frames = media.load_frames(path, 3)
    assert frames.shape == (3, 3, 41, 75) and brightness(frames) == media.frame_indices(20, 3)
    assert media.preprocess_frames(frames, 64).shape == (3, 3, 64, 64)


@pytest.mark.parametrize("h, w, size", [(90, 161, 64), (20, 33, 224), (70, 70, 70), (1, 300, 9)])
def test_resizing_is_torchvisions(h, w, size):
    frames = torch.randint(256, (3, h, w, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    bicubic = image_ops.InterpolationMode.BICUBIC
    theirs = image_ops.resize(frames, [size, size], interpolation=bicubic, antialias=True)
    assert torch.equal(media.resize_frames(frames, size, "squash"), theirs)


def test_resizing_is_antialiased():
    board = (torch.arange(256)[:, None] + torch.arange(256)[None]) % 2 * 255
    small = media.resize_frames(board.to(torch.uint8).expand(1, 3, 256, 256), 32)
    assert (small.int() - 127).abs().max() <= 2  # without it: black and white stripes


# ----------------------------------------------------------------------- media that cannot be used


def test_missing_streams(tmp_path):
    silent = write_clip(tmp_path / "silent.mp4")
    frames, waveform = media.load_clip(silent, 2)
    assert frames is not None and waveform is None
    with pytest.raises(ClipError, match="silent.mp4.*no audio.*--modality video"):
        media.load_waveform(silent)
    blind = write_clip(tmp_path / "blind.mp4", video=None, audio="aac")
    frames, waveform = media.load_clip(blind, 2)
    assert frames is None and waveform is not None
    with pytest.raises(ClipError, match="blind.mp4.*no video.*--modality audio"):
        media.load_frames(blind, 2)


def cut(source, target, share):
    content = source.read_bytes()
    target.write_bytes(content[: int(len(content) * share) | 1])  # in the middle of a packet
    return target


@pytest.mark.parametrize(
    "make",
    [
        lambda folder: folder / "bad.mp4",
        lambda folder: (
            folder.joinpath("bad.mp4").write_text("This is no clip.\n" * 200) and folder / "bad.mp4"
        ),
        lambda folder: folder.joinpath("bad.mp4").touch() or folder / "bad.mp4",
        lambda folder: folder.joinpath("bad.mp4").mkdir() or folder / "bad.mp4",
        lambda folder: cut(write_clip(folder / "a.mp4", audio="aac"), folder / "bad.mp4", 0.5),
        lambda folder: cut(
            write_clip(
                folder / "a.mp4", frames=100, audio="aac", options={"movflags": "faststart"}
            ),
            folder / "bad.mp4",
            0.8,
        ),
    ],
    ids=["missing", "text", "empty", "folder", "truncated", "truncated with its index in front"],
)
def test_what_is_no_clip_is_an_error_that_names_the_file(tmp_path, make):
    path = make(tmp_path)
    for load in (
        lambda: media.load_clip(path, 4),
        lambda: media.load_frames(path, 4),
        lambda: media.load_waveform(path),
    ):
        with pytest.raises(ClipError, match="bad.mp4"):
            load()


def test_what_is_no_file_or_stands_for_one_is_named_for_what_it_is(tmp_path):
    with pytest.raises(ClipError, match=f"^{tmp_path}: is a folder; give a file in it$"):
        media.load_clip(tmp_path, 4)
    with pytest.raises(ClipError, match="gone.mp4: no such file$"):
        media.load_clip(tmp_path / "gone.mp4", 4)
    pointer = tmp_path / "1001_DFA_ANG_XX.flv"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7\n")
    with pytest.raises(ClipError, match="XX.flv: a git-lfs pointer, .* `git lfs pull`$"):
        media.load_clip(pointer, 4)


def test_a_file_that_may_not_be_read_is_a_clip_that_cannot_be(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(media, "open", refuse, raising=False)
    with pytest.raises(ClipError, match=r"clip.mp4: cannot be decoded \(Permission denied\)$"):
        media.load_clip(CLIP, 2)


def test_damaged_packets(tmp_path):
    """Noise in the middle of the file: an error or, for a spot, the other frames; never a crash."""
    path = write_clip(tmp_path / "a.mkv", frames=60, video="ffv1")
    content = bytearray(path.read_bytes())
    spot = len(content) // 2
    content[spot : spot + 40] = bytes(40)
    (tmp_path / "spot.mkv").write_bytes(content)
    assert media.load_frames(tmp_path / "spot.mkv", 4).shape[0] == 4
    noise = np.random.default_rng(0).integers(0, 256, len(content) // 2, dtype=np.uint8).tobytes()
    content[spot // 2 : spot // 2 + len(noise)] = noise
    (tmp_path / "noise.mkv").write_bytes(content)
    with pytest.raises(ClipError, match="noise.mkv"):
        media.load_frames(tmp_path / "noise.mkv", 60)


def test_an_audio_stream_without_samples(tmp_path):
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as out:
        stream = out.add_stream("mpeg4", rate=25)
        out.add_stream("pcm_s16le", rate=16000)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        write_picture(out, stream, np.zeros((48, 64, 3), np.uint8), 0)
        out.mux(stream.encode())
    assert len(media.load_frames(path, 2)) == 2
    with pytest.raises(ClipError, match="a.mkv.*audio stream is empty.*--modality video"):
        media.load_clip(path, 2)


# ------------------------------------------------------------- what is shown is what is used


def test_sound_keeps_its_end_on_every_version_of_pyav():
    """The last packet of an mp4's sound is decoded whole, as the published model's decoder did."""
    assert len(media.load_waveform(CLIP_16K)) == 53 * 1024
    with av.open(str(CLIP)) as container:
        packets = container.streams.audio[0].frames
    assert len(media.load_waveform(CLIP)) == math.ceil((packets - 1) * 1024 * 16000 / 44100)


def copied_from(source, target, first, count=1000, options=None):
    """What ffmpeg -ss -t -c copy leaves of frames at 25 a second: packets before the first one too.

    They lie outside of the new file's edit list; it still needs the key frame among them.
    """

    def shift(packet):
        offset = round(Fraction(first, 25) / packet.time_base)
        packet.pts -= offset
        packet.dts -= offset
        return packet.pts * packet.time_base < Fraction(count, 25)

    return copy_streams(source, target, shift, options)


@pytest.mark.parametrize("sound", ["aac", "pcm_s16le"])
@pytest.mark.parametrize(
    "video, first, count",
    [("libx264", first, 99) for first in (1, 3, 8, 11, 12, 13, 19)]  # has B-frames
    + [("mpeg4", 1, 5), ("mpeg4", 8, 8), ("mpeg4", 11, 13), ("mpeg4", 12, 12), ("mpeg4", 13, 8)],
)
def test_a_losslessly_cut_clip_is_what_lies_inside_its_edit_list(
    tmp_path, video, first, count, sound
):
    source = write_clip(tmp_path / "a.mov", frames=24, video=video, audio=sound, rate=48000)
    clip = copied_from(source, tmp_path / "cut.mov", first, count)
    count = min(count, 24 - first)
    with av.open(str(clip)) as container:
        assert container.streams.video[0].frames > count  # were counted as missing
    frames, waveform = media.load_clip(clip, 8)
    assert brightness(frames) == [first + i for i in media.frame_indices(count, 8)]
    assert count / 25 <= len(waveform) / 16000 < count / 25 + 2 * 1024 / 48000  # whole packets
    expected = media.load_waveform(source)[round(first / 25 * 16000) :][: len(waveform)]
    # The decoder needs a packet to settle, and the cut may lie between two samples.
    difference = (waveform[: len(expected)] - expected)[1024:]
    assert difference.abs().max() < 0.1
    assert torch.equal(frames, media.load_frames(clip, 8))
    assert torch.equal(waveform, media.load_waveform(clip))


@pytest.mark.parametrize("share", [0.5, 0.8])
def test_a_losslessly_cut_clip_that_is_cut_off_is_refused(tmp_path, share):
    source = write_clip(tmp_path / "a.mp4", frames=100, video="libx264", audio="aac")
    whole = copied_from(source, tmp_path / "b.mp4", 8, options={"movflags": "faststart"})
    assert len(media.load_frames(whole, 4)) == 4
    bad = cut(whole, tmp_path / "bad.mp4", share)
    with pytest.raises(ClipError, match="bad.mp4: holds .* s of video; is it cut off"):
        media.load_frames(bad, 4)
    with pytest.raises(ClipError, match="bad.mp4: holds .* s of audio; is it cut off"):
        media.load_waveform(bad)


@pytest.mark.parametrize("name", ["a.avi", "a.mov", "a.aiff", "a.caf", "a.wav", "a.mkv"])
def test_pcm_is_counted_in_packets_not_in_samples(tmp_path, monkeypatch, name):
    """More samples than the limit of packets, though far fewer packets."""
    codec = "pcm_s16be" if name == "a.aiff" else "pcm_s16le"
    monkeypatch.setattr(media, "MAX_PACKETS", 1000)
    path = write_clip(tmp_path / name, video=None, audio=codec, seconds=4)
    assert len(media.load_waveform(path)) == 64000
    monkeypatch.setattr(media, "MAX_SECONDS", 3)
    with pytest.raises(ClipError, match="claims .* 4 s, at most 1000 and 3 s"):
        media.load_waveform(path)


def test_a_minute_of_pcm(tmp_path):
    path = write_clip(tmp_path / "a.mov", video=None, audio="pcm_s16le", seconds=63)
    assert len(media.load_waveform(path)) == 63 * 16000 > media.MAX_PACKETS


def test_too_many_packets_of_a_compressed_codec_are_refused_by_the_index(tmp_path, monkeypatch):
    path = write_clip(tmp_path / "a.mp4", frames=60, audio="aac")
    monkeypatch.setattr(media, "MAX_PACKETS", 59)
    with pytest.raises(ClipError, match="a.mp4: claims 60 packets"):
        media.load_clip(path, 4)


def effective(waveform):
    """Amplitude of a sine, in the middle and over all: some encoders overshoot here and there."""
    return math.sqrt(2) * waveform[len(waveform) // 4 : 3 * len(waveform) // 4].std().item()


LAYOUTS = {1: "mono", 2: "stereo", 6: "5.1", 7: "6.1", 8: "7.1", 12: "7.1.4", 16: "hexadecagonal"}
SOUND = {
    "a.wav": "pcm_s16le",
    "a.mkv": "pcm_f32le",
    "a.flac": "flac",
    "a.mp4": "aac",
    "a.ogg": "libopus",
}


@pytest.mark.parametrize(
    "name, channels",
    [
        (name, channels)
        for name in SOUND
        for channels in LAYOUTS
        if channels <= 8 or name in ("a.wav", "a.mkv")  # other encoders know up to 8
    ],
)
def test_any_number_of_channels_is_averaged(tmp_path, name, channels):
    """Eight or more planes, as some decoders give them, once ended the process."""
    levels = [0.8] + [0.0] * (channels - 1)
    form = {"audio": SOUND[name], "layout": LAYOUTS[channels], "levels": levels}
    waveform = media.load_waveform(write_clip(tmp_path / name, video=None, rate=48000, **form))
    assert abs(sine_peak(waveform)[0] - 440) < 5
    assert effective(waveform) == pytest.approx(0.8 / channels, rel=0.05)


@pytest.mark.parametrize("mask", [None, 0, 0x3, 0x600, 0x2D63F, 0x7FFFFFFF])
@pytest.mark.parametrize("channels", [1, 2, 3, 5, 8, 9, 11, 16])
def test_layouts_without_a_name_are_averaged(tmp_path, channels, mask):
    """A wav says which loudspeakers its channels are for, or nothing, or nonsense."""
    wave = (16000 * np.sin(2 * np.pi * 440 * np.arange(8000) / 16000)).astype("<i2")
    samples = np.zeros((8000, channels), "<i2")
    samples[:, -1] = wave
    form = struct.pack("<HHIIHH", 1, channels, 16000, 32000 * channels, 2 * channels, 16)
    if mask is not None:
        guid = bytes.fromhex("0100000000001000800000aa00389b71")  # PCM
        form = struct.pack("<H", 0xFFFE) + form[2:] + struct.pack("<HHI", 22, 16, mask) + guid
    body = b"WAVEfmt " + struct.pack("<I", len(form)) + form
    body += b"data" + struct.pack("<I", samples.nbytes) + samples.tobytes()
    path = tmp_path / "a.wav"
    path.write_bytes(b"RIFF" + struct.pack("<I", len(body)) + body)
    waveform = media.load_waveform(path)
    expected = torch.from_numpy(wave.astype(np.float32) / 32768 / channels)
    torch.testing.assert_close(waveform, expected, rtol=0, atol=1e-6)


def corners(folder, name="corners.mp4", **options):
    """A clip of 64 x 48 pixels with red, green, blue and white corners, and those frames."""
    path = folder / name
    picture = np.zeros((48, 64, 3), np.uint8)
    picture[:24, :32, 0] = picture[:24, 32:, 1] = picture[24:, :32, 2] = 255
    picture[24:, 32:] = 255
    with av.open(str(path), "w") as out:
        stream = out.add_stream(options.get("video", "mpeg4"), rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, options.get("pix_fmt", "yuv420p")
        stream.bit_rate = 2_000_000
        for i in range(4):
            write_picture(out, stream, picture, i)
        out.mux(stream.encode())
    return path, media.load_frames(path, 2)


ONE = 65536
TURNS = {
    "not at all": ((ONE, 0, 0, ONE), lambda x: x),
    "to the right": ((0, ONE, -ONE, 0), lambda x: x.transpose(2, 3).flip(3)),
    "to the left": ((0, -ONE, ONE, 0), lambda x: x.transpose(2, 3).flip(2)),
    "half": ((-ONE, 0, 0, -ONE), lambda x: x.flip(2, 3)),
    "mirrored": ((-ONE, 0, 0, ONE), lambda x: x.flip(3)),
    "upside down": ((ONE, 0, 0, -ONE), lambda x: x.flip(2)),
    "mirrored and to the left": ((0, ONE, ONE, 0), lambda x: x.transpose(2, 3)),
    "mirrored and to the right": ((0, -ONE, -ONE, 0), lambda x: x.transpose(2, 3).flip(2, 3)),
    "a matrix of zeros": ((0, 0, 0, 0), lambda x: x),
}


@pytest.mark.parametrize("turn", TURNS)
def test_frames_are_turned_as_the_file_says(tmp_path, turn):
    """Phones store what their sensor sees, and how to hold it."""
    (a, b, c, d), turned = TURNS[turn]
    path, stored = corners(tmp_path)
    content = bytearray(path.read_bytes())
    at = content.index(b"tkhd") + 44  # the track's display matrix
    content[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(content)
    assert torch.equal(media.load_frames(path, 2), turned(stored))


@pytest.mark.parametrize(
    "orientation, turned",
    [
        (1, lambda x: x),
        (3, lambda x: x.flip(2, 3)),
        (6, lambda x: x.transpose(2, 3).flip(3)),
        (8, lambda x: x.transpose(2, 3).flip(2)),
    ],
)
def test_pictures_are_turned_as_their_exif_says(tmp_path, orientation, turned):
    """Motion JPEG of a camera. PyAV before 19 cannot list such a frame's side data."""
    path, stored = corners(tmp_path, "a.mjpeg", video="mjpeg", pix_fmt="yuvj420p")
    entry = struct.pack("<HHIHH", 0x112, 3, 1, orientation, 0)
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 1) + entry + bytes(4)
    marker = b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif
    path.write_bytes(path.read_bytes().replace(b"\xff\xd8", b"\xff\xd8" + marker))
    assert torch.equal(media.load_frames(path, 2), turned(stored))


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.ts", "a.avi"])
@pytest.mark.parametrize("aspect, width", [("2/1", 96), ("1/1", 48), ("64/45", 68), ("8/9", 43)])
def test_pixels_that_are_not_square_are_shown_as_wide_as_they_are(tmp_path, name, aspect, width):
    video = "mpeg4" if name == "a.avi" else "libx264"
    path = write_clip(tmp_path / name, video=video, size=(48, 64), aspect=Fraction(aspect))
    frames = media.load_frames(path, 3)
    assert frames.shape == (3, 3, 64, width)
    assert brightness(frames) == media.frame_indices(20, 3)


def test_wide_pixels_do_not_get_around_the_limit_of_size(tmp_path):
    path = write_clip(tmp_path / "a.mp4", frames=2, size=(64, 200), aspect=Fraction(100))
    with pytest.raises(ClipError, match="6400 x 200 pixels"):
        media.load_frames(path, 2)


def write_tracks(path, kind, default):
    """Three tracks of one kind, of 300, 900 and 1500 Hz or of three shades; one is the default."""
    with av.open(str(path), "w") as out:
        streams = []
        for track in range(3):
            if kind == "audio":
                stream = out.add_stream("pcm_s16le", rate=16000, layout="mono")
            else:
                stream = out.add_stream("mpeg4", rate=25)
                stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
            flag = av.stream.Disposition.default if track == default else 0
            stream.disposition = getattr(flag, "value", flag)
            streams.append(stream)
        for track, stream in enumerate(streams):
            if kind == "audio":
                wave = 9000 * np.sin(np.arange(16000) / 16000 * 2 * np.pi * (300 + 600 * track))
                frame = av.AudioFrame.from_ndarray(wave.astype(np.int16)[None], layout="mono")
                frame.sample_rate = 16000
                out.mux(stream.encode(frame))
            else:
                for i in range(5):
                    picture = np.full((48, 64, 3), 50 * (track + 1), np.uint8)
                    write_picture(out, stream, picture, i)
            out.mux(stream.encode())
    return path


@pytest.mark.parametrize("default", [0, 1, 2])
def test_the_default_track_is_used(tmp_path, default):
    """Films have commentary and dubs, in any order."""
    sound = write_tracks(tmp_path / "a.mkv", "audio", default)
    assert sine_peak(media.load_waveform(sound))[0] == pytest.approx(300 + 600 * default, abs=5)
    picture = write_tracks(tmp_path / "b.mkv", "video", default)
    assert brightness(media.load_frames(picture, 2)) == [5 * (default + 1)] * 2


def test_a_cover_picture_is_no_video(tmp_path):
    with av.open(str(tmp_path / "a.mp4"), "w") as out:
        sound = out.add_stream("aac", rate=16000, layout="mono")
        cover = out.add_stream("mjpeg", rate=25)
        cover.width, cover.height, cover.pix_fmt = 64, 48, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic.value
        write_picture(out, cover, np.zeros((48, 64, 3), np.uint8), 0)
        out.mux(cover.encode())
        write_sound(out, sound, np.zeros((16000, 1)))
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert len(container.streams.video) == 1
    frames, waveform = media.load_clip(tmp_path / "a.mp4", 2)
    assert frames is None and len(waveform) >= 16000


@pytest.mark.parametrize(
    "name, codec, pix_fmt",
    [
        ("a.mkv", "ffv1", "gray"),
        ("a.mkv", "ffv1", "yuv444p16le"),
        ("a.mkv", "ffv1", "yuva420p"),
        ("a.mp4", "libx264", "yuv420p10le"),
        ("a.mov", "png", "monob"),
        ("a.mov", "png", "rgba64be"),
        ("a.avi", "rawvideo", "uyvy422"),
        ("a.png", "png", "rgb24"),
        ("a%03d.png", "png", "rgb24"),
    ],
)
def test_pixels_of_any_format(tmp_path, name, codec, pix_fmt):
    path = tmp_path / "write.me"
    container = "image2" if name.endswith("png") else {"a.mkv": "matroska"}.get(name, name[2:])
    with av.open(str(path), "w", format=container, options={"update": "1"}) as out:
        stream = out.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, pix_fmt
        write_picture(out, stream, np.full((48, 64, 3), 200, np.uint8), 0)
        out.mux(stream.encode())
    frames = media.load_frames(path.rename(tmp_path / name), 2)
    assert frames.shape == (2, 3, 48, 64)
    assert frames.float().mean() == pytest.approx(200, abs=2)  # "monob" has to mix black and white


def joined(target, *parts):
    """Recorders and WebRTC leave files like this one, whose parts are in one stream."""
    target.write_bytes(b"".join(part.read_bytes() for part in parts))
    return target


@pytest.mark.parametrize(
    "name, codec", [("a.ts", "mp2"), ("a.ts", "aac"), ("a.aac", "aac"), ("a.ac3", "ac3")]
)
def test_sound_that_changes_its_format_midway_is_all_used(tmp_path, name, codec):
    parts = [("stereo", 48000, (0.2, 0.8)), ("mono", 48000, (0.5,)), ("mono", 32000, (0.5,))]
    files = []
    for layout, rate, levels in parts:
        file = tmp_path / f"{layout}{rate}_{name}"
        form = {"audio": codec, "rate": rate, "layout": layout, "levels": levels}
        files.append(write_clip(file, video=None, seconds=1, **form))
    waveform = media.load_waveform(joined(tmp_path / name, *files))
    alone = [media.load_waveform(file) for file in files]
    assert len(waveform) == pytest.approx(sum(map(len, alone)), abs=4096)
    for second in (0.5, 1.6, 2.6):
        part = waveform[int(second * 16000) :][:6400]
        assert abs(sine_peak(part)[0] - 440) < 10
        assert effective(part) == pytest.approx(0.5, rel=0.1)


def test_pictures_that_change_their_size_midway_are_brought_to_one(tmp_path):
    """The largest height and width; what has other proportions keeps them, between grey borders."""
    sizes = [(32, 32), (64, 64), (64, 32)]
    files = []
    for size in sizes:
        file = tmp_path / f"{size}.mjpeg"
        files.append(write_clip(file, frames=4, video="mjpeg", size=size))
    frames = media.load_frames(joined(tmp_path / "a.mjpeg", *files), 12)
    assert frames.shape == (12, 3, 64, 64)
    assert brightness(frames[:8]) == [0, 1, 2, 3] * 2
    wide = frames[8:]
    assert brightness(wide[:, :, 16:48]) == [0, 1, 2, 3]
    borders = torch.cat([wide[:, :, :16], wide[:, :, 48:]], 2)
    assert (borders == media.GREY).all()
    assert not torch.equal(frames[0, 2, :, :24], frames[0, 0, :, :24])  # blue left, as stored


def test_a_transport_stream_that_changes_its_size_midway(tmp_path):
    files = []
    for side in (32, 64):
        file = tmp_path / f"{side}.ts"
        files.append(write_clip(file, frames=12, video="libx264", size=(side, side)))
    frames = media.load_frames(joined(tmp_path / "a.ts", *files), 8)
    assert frames.shape == (8, 3, 64, 64)
    assert brightness(frames) == [i % 12 for i in media.frame_indices(24, 8)]


# -------------------------------------------------------------------------- files that are cut off

STATED = {
    "a.mkv": {"video": "libx264", "audio": "libopus", "rate": 48000},
    "a.webm": {"video": "libvpx", "audio": "libopus", "rate": 48000},
    "a.avi": {"video": "mpeg4", "audio": "libmp3lame", "rate": 44100},
    "b.avi": {"video": "mjpeg", "audio": "pcm_s16le"},
    "a.flv": {"video": "flv", "audio": "libmp3lame", "rate": 44100},
    "b.flv": {"video": "libx264", "audio": "aac", "rate": 44100},
    "a.ts": {"video": "libx264", "audio": "aac"},
    "a.m2ts": {"video": "mpeg2video", "audio": "ac3", "rate": 48000},
    "a.mp4": {"video": "libx264", "audio": "aac", "options": {"movflags": "faststart"}},
    "a.mov": {"video": "mpeg4", "audio": "pcm_s16le", "options": {"movflags": "faststart"}},
    "a.mka": {"video": None, "audio": "flac"},
    "a.aiff": {"video": None, "audio": "pcm_s16be"},
    "a.caf": {"video": None, "audio": "pcm_s16le"},
    "a.au": {"video": None, "audio": "pcm_s16be"},
    "a.flac": {"video": None, "audio": "flac"},
}


@pytest.mark.parametrize("name", STATED)
def test_what_ends_before_its_header_says_is_an_error(tmp_path, name):
    whole = write_clip(tmp_path / name, frames=50, **STATED[name])
    _, waveform = media.load_clip(whole, 4)
    assert len(waveform) / 16000 == pytest.approx(2, abs=0.15)
    for share in (0.5, 0.8):
        with pytest.raises(ClipError, match="bad.*is it cut off"):
            media.load_clip(cut(whole, tmp_path / f"bad{whole.suffix}", share), 4)


def test_a_live_recording_says_nothing_of_its_end(tmp_path):
    kinds = {"video": "libx264", "audio": "libopus", "rate": 48000, "options": {"live": "1"}}
    whole = write_clip(tmp_path / "a.mkv", frames=100, **kinds)
    with av.open(str(whole)) as container:
        assert container.duration is None
    frames, waveform = media.load_clip(cut(whole, tmp_path / "b.mkv", 0.5), 4)
    assert len(frames) == 4 and 1.5 < len(waveform) / 16000 < 2.5


@pytest.mark.parametrize("name", [name for name in STATED if STATED[name]["video"]])
@pytest.mark.parametrize(
    "form",
    [
        {"frames": 10, "seconds": 3},
        {"frames": 75, "seconds": 0.5},
        {"times": range(50, 60), "seconds": 1},
        {"times": [0, 1, 2, 3, 4, 5, 40, 41, 42, 90], "seconds": 3},
        {"times": [0, 25, 50], "audio": None},
        {"times": [0, 1, 2, 3, 4], "audio": None},
    ],
    ids=["long sound", "short sound", "late video", "variable rate", "a frame a second", "few"],
)
def test_streams_of_unlike_length_are_whole(tmp_path, name, form):
    """Nothing is missing where a stream is shorter, comes later, or ends with a still."""
    path = write_clip(tmp_path / name, **{**STATED[name], **form})
    count = len(form.get("times") or range(form["frames"]))
    frames, waveform = media.load_clip(path, 3)
    assert brightness(frames) == [i % 25 for i in media.frame_indices(count, 3)]
    if waveform is not None:
        assert len(waveform) / 16000 == pytest.approx(form["seconds"], abs=0.15)


# --------------------------------------------------------------------------------- names and titles


@pytest.mark.parametrize(
    "name",
    ["12:30.mp4", "S01E02: title.mp4", "http:a.mp4", "file:a.mp4", "a%d.mp4", "-i.mp4", "é?#.mp4"],
)
def test_any_name_is_read(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    frames, waveform = media.load_clip(write_clip(Path("a.mp4"), audio="aac").rename(name), 2)
    assert len(frames) == 2 and len(waveform) > 10000


def test_a_name_that_is_no_text_is_read(tmp_path):
    path = tmp_path / os.fsdecode(b"\xff\xfe.mp4")
    write_clip(tmp_path / "a.mp4").rename(path)
    assert len(media.load_frames(path, 2)) == 2


@pytest.mark.parametrize("name", ["a.avi", "a.mkv", "a.flv"])
def test_a_title_in_an_unknown_encoding_is_passed_over(tmp_path, name):
    path = tmp_path / name
    video = "flv" if name == "a.flv" else "mpeg4"
    with av.open(str(path), "w") as out:
        out.metadata["title"] = "Ueberraschung"
        stream = out.add_stream(video, rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        write_picture(out, stream, np.zeros((48, 64, 3), np.uint8), 0)
        out.mux(stream.encode())
    content = path.read_bytes()
    assert b"Ueberraschung" in content
    path.write_bytes(content.replace(b"Ueberraschung", b"\xdcberraschun\xff "))
    assert len(media.load_frames(path, 2)) == 2


@pytest.mark.parametrize("error", [TypeError, ValueError, KeyError, MemoryError])
@pytest.mark.parametrize("place", ["_open", "_picture", "_stack"])
def test_a_mistake_of_the_program_is_no_fault_of_the_clip(monkeypatch, place, error):
    def mistaken(*arguments):
        raise error("open() got an unexpected keyword argument")

    monkeypatch.setattr(media, place, mistaken)
    with pytest.raises(error) as caught:
        media.load_clip(CLIP, 2)
    assert not isinstance(caught.value, ClipError)
