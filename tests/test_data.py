"""data.py: parity with the published model's preprocessing, odd clips of many kinds, and errors that help.

Golden numbers are described in golden/README.md; all other clips are written here with PyAV.
"""

import json
import shutil
from collections import Counter
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import data
import media
from data import ClipError, DataError

GOLDEN = Path(__file__).parent / "golden"
CLIP, CLIP_16K, CHECKPOINT = GOLDEN / "media/clip.mp4", GOLDEN / "media/clip16k.mp4", GOLDEN / "tiny/humanomni"


@pytest.fixture(scope="module")
def expected():
    return load_file(GOLDEN / "media/expected.safetensors")


@pytest.fixture(scope="module")
def tokenization():
    return json.loads((GOLDEN / "tiny/tokenization.json").read_text())


def write_clip(path, frames=20, size=(64, 48), video="mpeg4", audio=None, rate=16000, layout="mono", seconds=None,
               audio_first=False, frequency=440.0, levels=(0.5,), times=None, options=None):
    """A clip whose frame i is grey of brightness 10 i (blue left half), with a sine of `levels[channel]`."""
    with av.open(str(path), "w", options=options or {}) as out:
        streams = {}
        for kind in (("audio", "video") if audio_first else ("video", "audio")):
            if kind == "video" and video:
                streams[kind] = out.add_stream(video, rate=25)
                streams[kind].width, streams[kind].height = size
                streams[kind].pix_fmt = "yuvj420p" if video == "mjpeg" else "yuv420p"
                streams[kind].bit_rate = 2_000_000
            elif kind == "audio" and audio:
                streams[kind] = out.add_stream(audio, rate=rate, layout=layout)
        if video:
            for i in range(frames):
                picture = np.full((size[1], size[0], 3), 10 * i % 250, np.uint8)
                picture[:, :size[0] // 2, 2] = 255
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                frame.pts, frame.time_base = (times[i] if times else i), Fraction(1, 25)
                out.mux(streams["video"].encode(frame))
            out.mux(streams["video"].encode())
        if audio:
            stream = streams["audio"]
            count = int(rate * (frames / 25 if seconds is None else seconds))
            wave = np.sin(2 * np.pi * frequency * np.arange(count) / rate)
            samples = np.stack([level * wave for level in levels]).astype(np.float32)
            frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout=layout)
            frame.sample_rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
            fifo = av.AudioFifo()
            fifo.write(frame)
            step = stream.codec_context.frame_size or 1024
            resampler = av.AudioResampler(format=stream.codec_context.format, layout=layout, rate=rate)
            while chunk := fifo.read(step, partial=True):
                for piece in resampler.resample(chunk):
                    out.mux(stream.encode(piece))
            out.mux(stream.encode())
    return path


def brightness(frames):
    """Which frame each one is: the red channel at the right, 10 levels a frame."""
    return (frames[:, 0, 8:-8, -16:-8].float().mean((1, 2)) / 10).round().int().tolist()


def sine_peak(waveform):
    """Frequency (Hz) and amplitude of the strongest sine in the middle of a waveform."""
    middle = waveform[len(waveform) // 4: 3 * len(waveform) // 4]
    spectrum = torch.fft.rfft(middle * torch.hann_window(len(middle))).abs()
    return spectrum.argmax().item() * 16000 / len(middle), middle.abs().max().item()


# --------------------------------------------------------------------------------------- parity with the golden numbers

def test_frame_indices_are_the_published_ones():
    table = json.loads((GOLDEN / "media/frame_indices.json").read_text())
    for total, row in table.items():
        for wanted, indices in row.items():
            assert data.frame_indices(int(total), int(wanted)) == indices, (total, wanted)


def test_frame_indices_stay_inside_and_refuse_nothing():
    for total in range(1, 70):
        for wanted in range(1, 20):
            indices = data.frame_indices(total, wanted)
            assert len(indices) == wanted and indices == sorted(indices)
            assert 0 <= indices[0] and indices[-1] < total
    with pytest.raises(ValueError):
        data.frame_indices(0, 8)


@pytest.mark.parametrize("fit", ["pad", "squash"])
def test_frames_match_the_published_preprocessing(expected, fit):
    frames = data.load_frames(CLIP, 8)
    assert frames.shape == (8, 3, 180, 320) and frames.dtype == torch.uint8
    resized = media.resize_frames(frames, 224, fit)
    difference = (resized.int() - expected[f"frames_{fit}"].int()).abs()
    assert resized.dtype == torch.uint8
    assert difference.max() <= 2 and difference.float().mean() <= 0.02
    pixels = data.preprocess_frames(frames, 224, fit)
    assert pixels.shape == (8, 3, 224, 224) and pixels.dtype == torch.float32
    torch.testing.assert_close(pixels, resized / 127.5 - 1)
    assert pixels.min() >= -1 and pixels.max() <= 1


def test_padding_is_the_default_and_differs_from_squashing():
    frames = data.load_frames(CLIP, 2)
    pad, squash = data.preprocess_frames(frames, 64), data.preprocess_frames(frames, 64, "squash")
    assert (pad - squash).abs().mean() > 0.1
    with pytest.raises(ValueError, match="crop"):
        data.preprocess_frames(frames, 64, "crop")


def test_waveform_and_mel_match_the_published_preprocessing(expected):
    waveform = data.load_waveform(CLIP_16K)
    assert waveform.shape == expected["waveform_16k"].shape and waveform.dtype == torch.float32
    assert (waveform - expected["waveform_16k"]).norm() / expected["waveform_16k"].norm() < 1e-5
    mel = data.log_mel(waveform)
    assert mel.shape == (128, 3000) and mel.dtype == torch.float32
    reference = expected["log_mel_16k"]
    assert (mel[:, :400] - reference).abs().max() / reference.abs().max() <= 1e-4
    assert (mel[:, 400:] == mel[0, -1]).all() and abs(mel[0, -1] - reference[0, -1]) < 1e-5


def test_one_pass_gives_what_two_passes_give():
    frames, waveform = data.load_clip(CLIP, 8)
    assert torch.equal(frames, data.load_frames(CLIP, 8))
    assert torch.equal(waveform, data.load_waveform(CLIP))
    assert abs(len(waveform) - 3.39 * 16000) < 100


def test_tokenization_matches_the_published_one(tokenization):
    tokenizer = data.Tokenizer(CHECKPOINT)
    question, answer = tokenization["question"], tokenization["answer"]
    assert data.QUESTION_REASONING == question and question.startswith(data.QUESTION_LABEL + "\n")
    assert tokenizer.render(question) == tokenization["prompt_text"]
    assert tokenizer.prompt_ids(question) == tokenization["prompt_ids"]
    assert tokenizer.sft_ids(question, answer) == (tokenization["full_ids"], tokenization["labels"])
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (317, 318)


# -------------------------------------------------------------------------------------------------------------- log-mel

def full_log_mel(waveform, n_mels, num_samples):
    """The plain way: transform all of the padded 30 seconds."""
    filters, window = media._mel_constants(n_mels)
    waveform = torch.nn.functional.pad(waveform[:num_samples], (0, max(0, num_samples - len(waveform))))
    spectrum = torch.stft(waveform, 400, 160, window=window, return_complex=True)[:, :-1]
    log = (filters @ spectrum.abs() ** 2).clamp(min=1e-10).log10()
    return (torch.maximum(log, log.max() - 8) + 4) / 4


@pytest.mark.parametrize("samples", [1, 199, 201, 15600, 15601, 15700, 15900, 16000, 54272, 95999, 96000, 100000])
@pytest.mark.parametrize("num_samples, n_mels", [(96000, 80), (480000, 128)])
def test_skipping_the_silence_changes_nothing(samples, num_samples, n_mels):
    waveform = 0.1 * torch.randn(samples, generator=torch.Generator().manual_seed(samples))
    mel = data.log_mel(waveform, n_mels, num_samples)
    assert mel.shape == (n_mels, num_samples // 160)
    assert torch.equal(mel, full_log_mel(waveform, n_mels, num_samples))


def test_mel_of_silence_is_constant():
    mel = data.log_mel(torch.zeros(5000), num_samples=32000)
    torch.testing.assert_close(mel, torch.full((128, 200), (-10 + 4) / 4))


def test_mel_shows_a_sine_at_its_place():
    time = torch.arange(32000) / 16000
    low, high = (data.log_mel(torch.sin(2 * torch.pi * frequency * time), num_samples=32000)[:, 100].argmax()
                 for frequency in (300, 3000))
    assert 5 < low < 25 and 75 < high < 95 and low * 3 < high


# --------------------------------------------------------------------------------------------------- clips of all kinds

@pytest.mark.parametrize("name, codecs", [
    ("a.mp4", dict(video="libx264", audio="aac", rate=48000, layout="stereo", levels=(0.5, 0.5))),
    ("b.mkv", dict(video="libx264", audio="libopus", rate=48000)),
    ("c.avi", dict(video="mpeg4", audio="libmp3lame", rate=44100, layout="stereo", levels=(0.5, 0.5))),
    ("d.webm", dict(video="libvpx-vp9", audio="libopus", rate=48000)),
    ("e.flv", dict(video="flv", audio="libmp3lame", rate=44100)),
    ("f.mkv", dict(video="ffv1", audio="pcm_s16le", rate=8000)),
    ("g.mp4", dict(video="mpeg4", audio="aac", audio_first=True)),
    ("h.avi", dict(video="mjpeg", audio="pcm_s16le", rate=11025)),
    ("i.mov", dict(video="mpeg4", audio="pcm_s16le", rate=22050)),
], ids=lambda value: value if isinstance(value, str) else "")
def test_containers_and_codecs(tmp_path, name, codecs):
    path = write_clip(tmp_path / name, frames=22, **codecs)
    frames, waveform = data.load_clip(path, 4)
    assert frames.shape == (4, 3, 48, 64) and frames.dtype == torch.uint8
    assert brightness(frames) == data.frame_indices(22, 4)
    assert frames[0, 2, :, :24].float().mean() > frames[0, 0, :, :24].float().mean() + 100     # RGB: the left is blue
    assert waveform.dtype == torch.float32 and waveform.ndim == 1
    assert abs(len(waveform) / 16000 - 22 / 25) < 0.15                                         # codecs add padding
    frequency, amplitude = sine_peak(waveform)
    assert abs(frequency - 440) < 5 and 0.42 < amplitude < 0.58
    assert torch.equal(frames, data.load_frames(path, 4)) and torch.equal(waveform, data.load_waveform(path))


@pytest.mark.parametrize("rate", [8000, 16000, 22050, 48000])
def test_resampling_keeps_every_sample(tmp_path, rate):
    waveform = data.load_waveform(write_clip(tmp_path / "a.mkv", audio="pcm_s16le", rate=rate, seconds=2))
    assert abs(len(waveform) - 32000) <= 1                      # lossy packet borders or a lost tail would show
    time = torch.arange(len(waveform)) / 16000
    error = waveform - 0.5 * torch.sin(2 * torch.pi * 440 * time)
    assert error[100:-100].abs().max() < 2e-3


@pytest.mark.parametrize("layout, levels", [("mono", (0.5,)), ("stereo", (0.8, 0.0)), ("5.1", (0.9,) * 6),
                                            ("5.1", (0.6, 0.0, 0.0, 0.0, 0.0, 0.0))])
def test_channels_are_averaged(tmp_path, layout, levels):
    path = write_clip(tmp_path / "a.mkv", audio="pcm_s16le", rate=48000, layout=layout, levels=levels)
    frequency, amplitude = sine_peak(data.load_waveform(path))
    assert abs(frequency - 440) < 5
    assert amplitude == pytest.approx(sum(levels) / len(levels), abs=0.01)


def test_one_frame_is_repeated(tmp_path):
    path = write_clip(tmp_path / "a.mp4", frames=1)
    frames, waveform = data.load_clip(path, 4)
    assert waveform is None and frames.shape == (4, 3, 48, 64) and (frames == frames[:1]).all()


def test_short_clip_repeats_indices(tmp_path):
    frames = data.load_frames(write_clip(tmp_path / "a.mp4", frames=5), 8)
    assert brightness(frames) == [0, 1, 1, 2, 2, 3, 3, 4]


def test_variable_frame_rate_counts_frames_not_time(tmp_path):
    times = [0, 1, 2, 3, 4, 5, 40, 41, 42, 90]
    frames = data.load_frames(write_clip(tmp_path / "a.mkv", frames=10, times=times), 5)
    assert brightness(frames) == data.frame_indices(10, 5)


def test_decoding_that_ends_early_repeats_the_last_frame(tmp_path, monkeypatch):
    path = write_clip(tmp_path / "a.mkv", frames=20)
    monkeypatch.setattr(media, "_count_packets", lambda path: Counter({(0, False): 24}))
    assert brightness(data.load_frames(path, 12)) == [min(i, 19) for i in data.frame_indices(24, 12)]
    monkeypatch.setattr(media, "_count_packets", lambda path: Counter({(0, False): 100}))      # most is missing
    with pytest.raises(ClipError, match="only 20 of 100"):
        data.load_frames(path, 12)


def test_a_clip_cut_without_encoding_it_anew(tmp_path):
    """Its mp4 still holds the frames before the cut, back to the last key frame; they are not part of the clip."""
    source = write_clip(tmp_path / "a.mp4", frames=24, video="libx264")
    with av.open(str(source)) as whole, av.open(str(tmp_path / "cut.mp4"), "w") as out:
        stream = whole.streams.video[0]
        copy = out.add_stream_from_template(stream)
        shift = round(8 / 25 / stream.time_base)
        for packet in whole.demux(stream):
            if packet.size:
                packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, copy
                out.mux(packet)
    assert brightness(data.load_frames(tmp_path / "cut.mp4", 8)) == [8 + i for i in data.frame_indices(16, 8)]


def test_more_than_thirty_seconds(tmp_path):
    path = write_clip(tmp_path / "a.mkv", frames=10, audio="pcm_s16le", rate=8000, seconds=32)
    waveform = data.load_waveform(path)
    assert abs(len(waveform) - 32 * 16000) <= 1
    mel = data.log_mel(waveform)
    assert mel.shape == (128, 3000) and torch.equal(mel, data.log_mel(waveform[:480000]))


@pytest.mark.parametrize("width, height", [(33, 20), (20, 33), (101, 100), (50, 50)])
def test_padding_centres_like_the_published_one(width, height):
    frames = torch.full((2, 3, height, width), 200, dtype=torch.uint8)
    side = max(width, height)
    padded = media.resize_frames(frames, side)                   # no resizing left to do: the borders are exact
    left, top = (side - width) // 2, (side - height) // 2
    inside = torch.zeros(side, side, dtype=torch.bool)
    inside[top:top + height, left:left + width] = True
    assert (padded[..., inside] == 200).all() and (padded[..., ~inside] == 127).all()


def test_odd_sizes(tmp_path):
    path = write_clip(tmp_path / "a.mkv", size=(75, 41), video="ffv1")
    frames = data.load_frames(path, 3)
    assert frames.shape == (3, 3, 41, 75) and brightness(frames) == data.frame_indices(20, 3)
    assert data.preprocess_frames(frames, 64).shape == (3, 3, 64, 64)


def test_resizing_is_antialiased():
    board = (torch.arange(256)[:, None] + torch.arange(256)[None]) % 2 * 255
    small = media.resize_frames(board.to(torch.uint8).expand(1, 3, 256, 256), 32)
    assert (small.int() - 127).abs().max() <= 2                 # without it: black and white stripes


# -------------------------------------------------------------------------------------------- media that cannot be used

def test_missing_streams(tmp_path):
    silent, blind = write_clip(tmp_path / "silent.mp4"), write_clip(tmp_path / "blind.mp4", video=None, audio="aac")
    frames, waveform = data.load_clip(silent, 2)
    assert frames is not None and waveform is None
    frames, waveform = data.load_clip(blind, 2)
    assert frames is None and waveform is not None
    with pytest.raises(ClipError, match="silent.mp4.*no audio.*--modality video"):
        data.load_waveform(silent)
    with pytest.raises(ClipError, match="blind.mp4.*no video.*--modality audio"):
        data.load_frames(blind, 2)


def cut(source, target, share):
    content = source.read_bytes()
    target.write_bytes(content[:int(len(content) * share)])
    return target


@pytest.mark.parametrize("make", [
    lambda folder: folder / "bad.mp4",
    lambda folder: folder.joinpath("bad.mp4").write_text("This is no clip.\n" * 200) and folder / "bad.mp4",
    lambda folder: folder.joinpath("bad.mp4").touch() or folder / "bad.mp4",
    lambda folder: folder.joinpath("bad.mp4").mkdir() or folder / "bad.mp4",
    lambda folder: cut(write_clip(folder / "a.mp4", audio="aac"), folder / "bad.mp4", 0.5),
    lambda folder: cut(write_clip(folder / "a.mp4", frames=100, audio="aac", options={"movflags": "faststart"}),
                       folder / "bad.mp4", 0.8),
], ids=["missing", "text", "empty", "folder", "truncated", "truncated with its index in front"])
def test_what_is_no_clip_is_an_error_that_names_the_file(tmp_path, make):
    path = make(tmp_path)
    for load in (lambda: data.load_clip(path, 4), lambda: data.load_frames(path, 4), lambda: data.load_waveform(path)):
        with pytest.raises(ClipError, match="bad.mp4"):
            load()


def test_damaged_packets(tmp_path):
    """Noise in the middle of the file: an error or, for a spot, the other frames; never a crash."""
    path = write_clip(tmp_path / "a.mkv", frames=60, video="ffv1")
    content = bytearray(path.read_bytes())
    spot = len(content) // 2
    content[spot:spot + 40] = bytes(40)
    (tmp_path / "spot.mkv").write_bytes(content)
    assert data.load_frames(tmp_path / "spot.mkv", 4).shape[0] == 4
    noise = np.random.default_rng(0).integers(0, 256, len(content) // 2, dtype=np.uint8).tobytes()
    content[spot // 2:spot // 2 + len(noise)] = noise
    (tmp_path / "noise.mkv").write_bytes(content)
    with pytest.raises(ClipError, match="noise.mkv"):
        data.load_frames(tmp_path / "noise.mkv", 60)


def test_an_audio_stream_without_samples(tmp_path):
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as out:
        picture, sound = out.add_stream("mpeg4", rate=25), out.add_stream("pcm_s16le", rate=16000)
        picture.width, picture.height, picture.pix_fmt = 64, 48, "yuv420p"
        out.mux(picture.encode(av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8), format="rgb24")))
        out.mux(picture.encode())
    assert len(data.load_frames(path, 2)) == 2
    with pytest.raises(ClipError, match="a.mkv.*audio stream is empty.*--modality video"):
        data.load_clip(path, 2)


# ------------------------------------------------------------------------------------------------------------ tokenizer

def test_modalities_leave_out_the_other_line(tokenization):
    tokenizer = data.Tokenizer(CHECKPOINT)
    both, video, audio, text = (tokenizer.prompt_ids("Which emotion?", modality) for modality in data.MODALITIES)
    assert [both.count(-201), both.count(-202)] == [1, 1] and both.index(-201) < both.index(-202)
    assert [video.count(-201), video.count(-202)] == [1, 0]
    assert [audio.count(-201), audio.count(-202)] == [0, 1]
    assert min(text) >= 0
    assert "user\n<vi_start><vi_end>\nWhich emotion?\n" in tokenizer.decode(video)
    assert "user\n<au_start><au_end>\nWhich emotion?\n" in tokenizer.decode(audio)
    assert "user\nWhich emotion?\n" in tokenizer.decode(text)


def test_sft_labels_are_the_answer_and_the_end_of_turn():
    tokenizer = data.Tokenizer(CHECKPOINT)
    ids, labels = tokenizer.sft_ids("Which emotion?", "<answer>sad</answer>", "video")
    prompt = tokenizer.prompt_ids("Which emotion?", "video")
    assert ids[:len(prompt)] == prompt and set(labels[:len(prompt)]) == {-100}
    assert ids[len(prompt):] == labels[len(prompt):]
    assert labels[-2:] == [tokenizer.eos_token_id, *tokenizer.encode("\n")]
    assert tokenizer.decode(torch.tensor(labels[len(prompt):])) == "<answer>sad</answer>\n"


@pytest.mark.parametrize("marker", ["<video>", "<audio>"])
def test_markers_in_a_question_are_an_error(marker):
    with pytest.raises(DataError, match="must not contain"):
        data.Tokenizer(CHECKPOINT).prompt_ids(f"{marker}\nWhich emotion?")


def test_unknown_modality():
    with pytest.raises(DataError, match="smell"):
        data.Tokenizer(CHECKPOINT).prompt_ids("Which emotion?", "smell")


TEXTS = ["Hello, world!", "It's we'll  two   spaces\n\n\ttabs \n end ", "12345 a1b2", "naïve Ünïcode e\u0301 中文 🙂",
         "<think>I smile.</think>\n<answer>happy</answer><|im_end|>\n", "", "...?!\r\n<<<", "<|im_start|>user"]


@pytest.fixture
def checkpoint(tmp_path):
    """A copy of the checkpoint's small files, to take some away."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(CHECKPOINT, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


@pytest.mark.parametrize("without", ["added_tokens.json", "tokenizer_config.json's list"])
def test_vocab_and_merges_give_the_same_tokenizer(checkpoint, tokenization, without):
    (checkpoint / "tokenizer.json").unlink()
    if without == "added_tokens.json":
        (checkpoint / without).unlink()
    else:
        edit_json(checkpoint / "tokenizer_config.json", lambda config: config.pop("added_tokens_decoder"))
    ours, theirs = data.Tokenizer(checkpoint), data.Tokenizer(CHECKPOINT)
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text)
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text))
    assert ours.prompt_ids(tokenization["question"]) == tokenization["prompt_ids"]


def edit_json(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_template_in_its_own_file(checkpoint, tokenization):
    template = json.loads((checkpoint / "tokenizer_config.json").read_text())["chat_template"]
    edit_json(checkpoint / "tokenizer_config.json", lambda config: config.pop("chat_template"))
    with pytest.raises(DataError, match="chat template"):
        data.Tokenizer(checkpoint)
    # The second has blocks on lines of their own, which is right only with trim_blocks and lstrip_blocks.
    for source in (template, """  {% if messages[0]['role'] != 'system' %}
<|im_start|>system
You are a helpful assistant.<|im_end|>
  {% endif %}
  {% for message in messages %}
<|im_start|>{{ message['role'] }}
{{ message['content'] }}<|im_end|>
  {% endfor %}
  {% if add_generation_prompt %}
<|im_start|>assistant
  {% endif %}
"""):
        (checkpoint / "chat_template.jinja").write_text(source)
        assert data.Tokenizer(checkpoint).prompt_ids(tokenization["question"]) == tokenization["prompt_ids"]


@pytest.mark.parametrize("template", ["{{ raise_exception('no such role') }}", "{% for %}",
                                      "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ messages.append(1) }}"])
def test_templates_that_fail_or_break_out(checkpoint, template):
    (checkpoint / "chat_template.jinja").write_text(template)
    with pytest.raises(DataError):
        data.Tokenizer(checkpoint).prompt_ids("Which emotion?")


@pytest.mark.parametrize("generation, expected_ids", [
    ({"eos_token_id": [317, 318], "pad_token_id": 318}, (317, 318)), ({"eos_token_id": [319, 318]}, (319, 318)),
    ({"eos_token_id": [318, 317]}, (317, 318)), ({}, (317, 318)),
    ({"eos_token_id": 318, "pad_token_id": 319}, (318, 319))])
def test_end_and_padding_tokens(checkpoint, generation, expected_ids):
    (checkpoint / "generation_config.json").write_text(json.dumps(generation))
    tokenizer = data.Tokenizer(checkpoint)
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == expected_ids


def test_padding_and_truncation_of_a_saved_tokenizer_are_ignored(checkpoint):
    reference = data.Tokenizer(checkpoint)
    reference.tokenizer.enable_truncation(5)
    reference.tokenizer.enable_padding(length=5)
    reference.tokenizer.save(str(checkpoint / "tokenizer.json"))
    tokenizer = data.Tokenizer(checkpoint)
    assert len(tokenizer.encode("Hello, world!")) > 5 and len(tokenizer.encode("a")) == 1


def test_broken_tokenizer_files(checkpoint, tmp_path):
    (checkpoint / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7\n")
    with pytest.raises(DataError, match="tokenizer.json.*git-lfs"):
        data.Tokenizer(checkpoint)
    with pytest.raises(DataError, match="nowhere.*tokenizer.json"):
        data.Tokenizer(tmp_path / "nowhere")


@pytest.mark.parametrize("path", [CHECKPOINT, CHECKPOINT / "bert", GOLDEN / "tiny/bert"])
def test_bert_tokenizer(path):
    ids, mask = data.BertTokenizer(path)(["Hello video?", "is"])
    words = (GOLDEN / "tiny/bert/vocab.txt").read_text().split("\n")
    assert ids.dtype == mask.dtype == torch.int64
    assert [words[i] for i in ids[0]] == ["[CLS]", "h", "##e", "##l", "##l", "##o", "video", "?", "[SEP]"]
    assert [words[i] for i in ids[1]] == ["[CLS]", "is", "[SEP]"] + ["[PAD]"] * 6
    assert mask.tolist() == [[1] * 9, [1, 1, 1, 0, 0, 0, 0, 0, 0]]


def test_bert_cuts_long_questions_and_keeps_the_end_mark():
    ids, _ = data.BertTokenizer(CHECKPOINT)(["video " * 200])
    assert ids.shape == (1, 64) and ids[0, -1] == 3             # 64 positions in this BERT; 3 is [SEP]


def test_bert_tokenizer_from_its_json(tmp_path):
    reference = data.BertTokenizer(CHECKPOINT)
    reference.tokenizer.save(str(tmp_path / "tokenizer.json"))
    questions = ["An emotion in the video", data.QUESTION_LABEL]
    for ours, theirs in zip(data.BertTokenizer(tmp_path)(questions[:1]), reference(questions[:1])):
        assert torch.equal(ours, theirs)
    ids, _ = data.BertTokenizer(tmp_path)(["video " * 200])
    assert ids.shape == (1, 202)                                # not the truncation that was saved


def test_bert_vocabulary_not_found(checkpoint):
    shutil.rmtree(checkpoint / "bert")                          # the language model's tokenizer.json stays
    with pytest.raises(DataError, match="--bert DIR"):
        data.BertTokenizer(checkpoint)


# ------------------------------------------------------------------------------------------------ manifests and batches

def entry(video="a.mp4", human="<video>\n<audio>\nWhich emotion?", gpt="happy", **extra):
    media = {} if video is None else {"video": video}
    return media | {"conversations": [{"from": "human", "value": human}, {"from": "gpt", "value": gpt}]} | extra


def write_manifest(folder, entries):
    (folder / "manifest.json").write_text(json.dumps(entries))
    return folder / "manifest.json"


def test_manifest_entries(tmp_path):
    (tmp_path / "a.mp4").touch()
    examples = data.read_manifest(write_manifest(tmp_path, [
        entry(label="happy", subject=3), entry(human="<video>\nWhich?"), entry(human="<audio>\n\n\nTwo\nlines?\n"),
        entry(human="Which?"), entry(video=None, human="Which?", gpt="<think>a</think>\n<answer>b</answer>")]))
    assert [e.modality for e in examples] == ["video_audio", "video", "audio", "video_audio", "text"]
    assert [e.question for e in examples] == ["Which emotion?", "Which?", "Two\nlines?", "Which?", "Which?"]
    assert [e.video for e in examples] == [tmp_path / "a.mp4"] * 4 + [None]
    assert examples[0].answer == "happy" and examples[4].answer == "<think>a</think>\n<answer>b</answer>"
    assert examples[0].extra == {"label": "happy", "subject": 3} and examples[1].extra == {}


def test_manifest_media_root_and_limit(tmp_path):
    (tmp_path / "media").mkdir()
    (tmp_path / "media/a.mp4").touch()
    manifest = write_manifest(tmp_path, [entry(), entry(), entry("not_there.mp4")])
    examples = data.read_manifest(manifest, tmp_path / "media", limit=2)
    assert [e.video for e in examples] == [tmp_path / "media/a.mp4"] * 2
    with pytest.raises(DataError, match="manifest.json: 2 of 2 clips.*a.mp4.*--media-root"):
        data.read_manifest(manifest)


def test_missing_clips_are_counted_and_the_first_named(tmp_path):
    with pytest.raises(DataError, match=r"5 of 5 clips.*0.mp4.*1.mp4.*2.mp4, \.\.\.") as caught:
        data.read_manifest(write_manifest(tmp_path, [entry(f"{i}.mp4") for i in range(5)]))
    assert "4.mp4" not in str(caught.value)


@pytest.mark.parametrize("bad, message", [
    ("a text", "entry 1 should be an object"),
    ({"video": "a.mp4"}, "entry 1: field conversations"),
    ({"video": "a.mp4", "conversations": [{"from": "human", "value": "Which?"}]}, "entry 1: field conversations"),
    ({"video": "a.mp4", "conversations": ["Which?", "happy"]}, "entry 1: field conversations"),
    (entry(video=3), "entry 1: field video"), (entry(video=""), "entry 1: field video"),
    (entry(video=None), "entry 1: field video is missing"),
    (entry(gpt=None), r"entry 1: field conversations\[1\].value"),
])
def test_manifest_errors_name_entry_and_field(tmp_path, bad, message):
    (tmp_path / "a.mp4").touch()
    with pytest.raises(DataError, match=f"manifest.json: {message}"):
        data.read_manifest(write_manifest(tmp_path, [entry(), bad]))


@pytest.mark.parametrize("content", ["{", "{}", "[]"])
def test_manifests_that_are_none(tmp_path, content):
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(DataError, match="manifest.json"):
        data.read_manifest(tmp_path / "manifest.json")
    with pytest.raises(DataError, match="nowhere.json"):
        data.read_manifest(tmp_path / "nowhere.json")


def examples_of(path, *modalities):
    return [data.Example(path, "Which emotion?", "happy", modality) for modality in modalities]


SIZES = dict(num_frames=4, image_size=32, n_mels=80, num_samples=32000)


def test_clips_load_what_the_modality_needs():
    clips = data.Clips(examples_of(CLIP, "video_audio", "video", "audio") + examples_of(None, "text"), **SIZES)
    both, video, audio, text = items = [clips[i] for i in range(len(clips))]
    assert [item["index"] for item in items] == [0, 1, 2, 3]
    assert both["pixel_values"].shape == (4, 3, 32, 32) and both["input_features"].shape == (80, 200)
    assert torch.equal(video["pixel_values"], both["pixel_values"]) and video["input_features"] is None
    assert torch.equal(audio["input_features"], both["input_features"]) and audio["pixel_values"] is None
    assert text["pixel_values"] is None and text["input_features"] is None
    squashed = data.Clips(examples_of(CLIP, "video"), fit="squash", **SIZES)[0]["pixel_values"]
    assert not torch.equal(squashed, video["pixel_values"])


def test_a_needed_stream_that_is_missing_is_an_error(tmp_path):
    silent = write_clip(tmp_path / "silent.mp4")
    clips = data.Clips(examples_of(silent, "video_audio", "audio", "video"), **SIZES)
    for i in (0, 1):
        with pytest.raises(ClipError, match="silent.mp4.*--modality video"):
            clips[i]
    assert clips[2]["pixel_values"].shape == (4, 3, 32, 32)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_keep_the_order_and_leave_the_random_state_alone(tmp_path, workers):
    clips = data.Clips([data.Example(write_clip(tmp_path / f"{i}.mkv", frames=3, video="ffv1", size=(32 + i, 32)),
                                     "Which?", "sad", "video") for i in range(5)], **SIZES)
    state = torch.get_rng_state()
    loaded = list(data.batches(clips, [3, 0, 4, 4, 1], 2, workers))
    assert torch.equal(state, torch.get_rng_state())
    assert [[item["index"] for item in batch] for batch in loaded] == [[3, 0], [4, 4], [1]]
    for item in sum(loaded, []):
        assert torch.equal(item["pixel_values"], clips[item["index"]]["pixel_values"])


@pytest.mark.parametrize("workers", [0, 2])
def test_errors_cross_processes_with_just_their_message(tmp_path, workers):
    bad = tmp_path / "bad.mp4"
    bad.write_text("no clip")
    clips = data.Clips(examples_of(CLIP, "video") + examples_of(bad, "video"), **SIZES)
    stream = data.batches(clips, [0, 1, 0], 1, workers)
    assert next(stream)[0]["index"] == 0
    with pytest.raises(ClipError) as caught:
        next(stream)
    assert str(caught.value).startswith(str(bad)) and "\n" not in str(caught.value)


# --------------------------------------------------------------------------------------------- what the model sees

@pytest.mark.parametrize("streams", [dict(audio="aac"), dict(), dict(video=None, audio="aac")])
def test_show_draws_what_there_is(tmp_path, capsys, streams):
    write_clip(tmp_path / "a.mp4", **streams)
    data.main(["show", str(tmp_path / "a.mp4"), "--out", str(tmp_path / "new" / "seen.png"), "--frames", "3", "--size", "32"])
    assert (tmp_path / "new" / "seen.png").stat().st_size > 5_000 and "seen.png" in capsys.readouterr().out


def test_show_names_what_cannot_be_shown(tmp_path):
    with pytest.raises(ClipError, match="b.mp4: no such file"):
        data.main(["show", str(tmp_path / "b.mp4"), "--out", str(tmp_path / "seen.png")])
    assert not (tmp_path / "seen.png").exists()
