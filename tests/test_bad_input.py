"""Input that is wrong on purpose, one guard at a time: huge claims, dying workers, sizes, flags.

tests/test_fuzz.py damages files at random; here each file is made to hit one limit.
"""

import dataclasses
import importlib
import json
import multiprocessing
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from conftest import GOLDEN, ROOT
from safetensors.torch import save_file
from test_data import examples_of, write_clip
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter
from workers import (
    SIZES,
    Deadly,
    Numbered,
    Signalled,
    Telling,
    be_killed,
    crash,
    crash_at_once,
    fail,
    hang,
)

import data
import evaluate
import media
import prepare
import train_grpo
import train_sft
from data import ClipError, DataError
from support import ahead
from support.flags import run_script

CHECKPOINT = GOLDEN / "tiny" / "humanomni"
CLIP = GOLDEN / "media" / "clip16k.mp4"


# --------------------------------------------------------------------------------------------------
# Workers that die or hang


@pytest.fixture
def quick(monkeypatch):
    """torch looks after its workers every 5 s; a tenth of that will do here."""
    monkeypatch.setattr(_MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (0.5,))
    monkeypatch.setattr(ahead, "CLIP_SECONDS", 2)


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize(
    "way, message",
    [
        (be_killed, r"/3.mp4: .*ended with exit code -9 \(killed: out of memory\?\)"),
        (crash, "/3.mp4: .*ended with exit code 7"),
        (hang, "/3.mp4: .*did not finish in 2 s"),
    ],
)
def test_a_worker_that_dies_or_hangs_is_an_error_with_the_clip_at_hand(
    tmp_path, quick, way, message, workers
):
    others = set(multiprocessing.active_children())
    start, log = time.time(), tmp_path / "skipped.txt"
    clips = Deadly(tmp_path, way, 3)
    stream = data.batches(clips, [0, 1, 2, 3, 4, 5], 2, workers, skip_log=log)
    assert [item["index"] for item in next(stream)] == [0, 1]
    # In spite of skip_log: the machine has a problem, not the clip.
    with pytest.raises(ClipError, match=message) as caught:
        next(stream)
    assert [f"{i}.mp4" in str(caught.value) for i in (0, 1, 2, 4, 5)] == [False] * 5
    assert time.time() - start < 40
    assert set(multiprocessing.active_children()) <= others
    assert not log.exists()


def test_the_clip_in_hand_is_blamed_and_not_those_that_die_with_their_worker(tmp_path, quick):
    """A worker runs ahead of the model; what it has finished is lost with it, and still due."""
    clips = Deadly(tmp_path, crash_at_once, 10, count=16)
    with pytest.raises(ClipError, match="/10.mp4: .*ended with exit code 11") as caught:
        for _ in data.batches(clips, range(16), 4, workers=1):
            time.sleep(0.5)  # the model at work
    assert str(caught.value).count(".mp4") == 1


def test_of_several_dead_workers_all_clips_in_hand_are_named(tmp_path):
    watched = ahead.Watched(Numbered(tmp_path), workers=3)
    watched.in_hand[:] = torch.tensor([[41, 2], [42, 3], [43, 4]])  # process, clip
    told = ahead._told(watched, {41: 7, 43: 7})
    assert told.startswith(f"{tmp_path}/2.mp4 or {tmp_path}/4.mp4: ")
    watched.in_hand[0, 1] = -1  # it had finished its clip
    assert ahead._told(watched, {41: 7}).startswith("no clip in hand: ")


def test_a_mistake_of_the_program_in_a_worker_is_not_the_clips(tmp_path):
    with pytest.raises(KeyError, match="a mistake in the program"):
        list(data.batches(Deadly(tmp_path, fail, 3), [1, 3], 1, workers=1))


def test_signals_do_not_end_a_worker_nor_change_its_items(tmp_path):
    """A training script catches both signals to finish its update; its workers get them too."""
    before = [signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        loaded = list(data.batches(Signalled(tmp_path), [0, 1, 2, 3], 2, workers=2))
    finally:
        for number, handler in zip((signal.SIGINT, signal.SIGTERM), before):
            signal.signal(number, handler)
    items = [item for batch in loaded for item in batch]
    assert [item["index"] for item in items] == [0, 1, 2, 3]
    expected = [Numbered(tmp_path)[i]["pixel_values"] for i in range(4)]
    assert all(torch.equal(item["pixel_values"], x) for item, x in zip(items, expected))


def test_workers_start_after_a_clip_was_decoded_here(monkeypatch):
    """FFmpeg's filter graph has threads; a copy of it in a forked worker waited for them for ever,
    once the worker's garbage collector came to it."""
    graph = av.AudioResampler(format="flt", rate=16000)
    data.load_clip(CLIP, 4)
    monkeypatch.setattr(ahead, "CLIP_SECONDS", 60)
    clips = data.Clips(examples_of(CLIP, "video_audio", "audio"), **SIZES)
    loaded = list(data.batches(clips, [0, 1, 0, 1], 2, workers=2))
    assert [[item["index"] for item in batch] for batch in loaded] == [[0, 1], [0, 1]]
    assert torch.equal(loaded[1][0]["pixel_values"], clips[0]["pixel_values"])
    assert torch.equal(loaded[1][1]["input_features"], clips[1]["input_features"])
    del graph


def test_workers_are_no_copies_of_this_process(tmp_path, monkeypatch):
    monkeypatch.setattr(media, "left_by_the_test", av.AudioResampler(format="flt"), raising=False)
    items = [item for (item,) in data.batches(Telling(tmp_path), [0, 1], 1, workers=1)]
    assert [item["inherited"] for item in items] == [False, False]
    assert {item["process"] for item in items} != {os.getpid()}
    if sys.platform == "linux":  # of a server, which has no thread but its own
        server = items[0]["parent"]
        assert server != os.getpid()
        assert len(list(Path(f"/proc/{server}/task").iterdir())) == 1


def test_workers_end_with_the_loop_and_with_the_main_process(tmp_path):
    stream = data.batches(Numbered(tmp_path), [0, 1, 2], 1, 2)
    next(stream)
    assert len(multiprocessing.active_children()) == 2
    stream.close()
    assert not multiprocessing.active_children()
    script = f"""
import os, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import data, multiprocessing, workers
from pathlib import Path
next(stream := data.batches(workers.Numbered(Path("x")), [0, 1, 2], 1, 2))
print(*(p.pid for p in multiprocessing.active_children()), flush=True)
os.kill(os.getpid(), 9)
"""
    done = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    left = pids = done.stdout.split()
    deadline = time.time() + 20
    while left and time.time() < deadline:
        time.sleep(0.1)
        left = [pid for pid in pids if alive(pid)]
    assert len(pids) == 2 and not left


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


# --------------------------------------------------------------------------------------------------
# Going on in the middle


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_from_the_middle_are_those_of_the_whole(tmp_path, workers):
    (tmp_path / "bad.mp4").write_text("no clip")
    examples = examples_of(CLIP, "audio") * 20 + examples_of(tmp_path / "bad.mp4", "audio")
    clips = data.Clips(examples, **SIZES)
    order, log = [3, 20, 5, 1, 0, 2, 7], tmp_path / "skipped.txt"
    log.write_text("a clip of another run\n")
    whole = indices(data.batches(clips, order, 2, workers, skip_log=log))
    assert whole == [[3], [5, 1], [0, 2], [7]]
    (line,) = log.read_text().splitlines()
    assert "bad.mp4" in line
    for start in (1, 2, 3, 4):
        rest = data.batches(clips, order, 2, workers, skip_log=log, start=start)
        assert indices(rest) == whole[start:]
    # Batches keep their number.
    alone = data.batches(clips, [3, 20, 1], 1, workers, skip_log=log)
    assert indices(alone) == [[3], [], [1]]


def indices(batches):
    return [[item["index"] for item in batch] for batch in batches]


def test_the_list_of_bad_clips_and_its_limit_go_on(tmp_path):
    bad = [tmp_path / f"bad{i}.mp4" for i in range(3)]
    for path in bad:
        path.write_text("no clip")
    clips = data.Clips(sum((examples_of(path, "audio") for path in [CLIP] * 37 + bad), []), **SIZES)
    order, log = [0, 37, 1, 38, 2, 39], tmp_path / "skipped.txt"  # 2 of 40 are 5 %, 3 are more
    stream = data.batches(clips, order, 2, skip_log=log)
    next(stream)
    next(stream)
    assert len(log.read_text().splitlines()) == 2
    with pytest.raises(DataError, match="3 of 40 clips cannot be used"):
        next(data.batches(clips, order, 2, skip_log=log, start=2))
    assert [name in log.read_text() for name in ("bad0", "bad1", "bad2")] == [True] * 3
    # From the beginning: a list of its own.
    assert next(data.batches(clips, order, 2, skip_log=log))
    assert len(log.read_text().splitlines()) == 1


# --------------------------------------------------------------------------------------------------
# Clips that claim much


def patched(path, *patches):
    """The file with bytes written at (marker, offset behind it), of the marker's first
    occurrence."""
    content = bytearray(path.read_bytes())
    for marker, offset, value in patches:
        at = content.find(marker)
        assert at > 0, marker
        content[at + offset : at + offset + len(value)] = value
    path.write_bytes(content)
    return path


def huge_index(folder):
    """An mp4 whose sample table says: 2**26 samples of one byte. Its index would take 2.4 GB."""
    path, count = folder / "bad.mp4", struct.pack(">I", 2**26)
    shutil.copy(CLIP, path)
    return patched(
        path, (b"stsz", 8, struct.pack(">II", 1, 2**26)), (b"stsc", 16, count), (b"stts", 12, count)
    )


def huge_avi(folder, side):
    """Motion JPEG whose avi header and whose pictures say side x side."""
    path = write_clip(folder / "bad.avi", video="mjpeg", frames=3)
    content, size = path.read_bytes(), struct.pack(">HH", side, side)
    at = content.find(b"\xff\xc0")
    while at > 0:
        content = content[: at + 5] + size + content[at + 9 :]
        at = content.find(b"\xff\xc0", at + 1)
    path.write_bytes(content)
    return patched(path, (b"strf", 12, struct.pack("<II", side, side)))


def wav(folder, rate, channels=1, seconds=None, size=100_000):
    path, block = folder / "bad.wav", 2 * channels
    header = struct.pack("<IHHIIHH", 16, 1, channels, rate, min(rate * block, 2**32 - 1), block, 16)
    path.write_bytes(
        b"RIFF"
        + struct.pack("<I", 36 + size)
        + b"WAVEfmt "
        + header
        + b"data"
        + struct.pack("<I", size)
        + bytes(size)
    )
    return path


def y4m(folder, width, height, frames=1):
    path = folder / "bad.y4m"
    picture = b"FRAME\n" + bytes(width * height * 3 // 2 if width * height < 1e6 else 1000)
    path.write_bytes(
        f"YUV4MPEG2 W{width} H{height} F25:1 Ip A1:1 C420jpeg\n".encode() + picture * frames
    )
    return path


def text_file(folder, name, text):
    (folder / name).write_text(text)
    return folder / name


CLAIMS = {
    "an index of 2**26 samples": (huge_index, "claims 67108864 packets.*at most 1000000"),
    "16000 x 16000 pictures": (
        lambda f: huge_avi(f, 16000),
        "damaged .or their frames larger than 4096 x 4096 pixels",
    ),
    "65500 x 65500 pictures": (lambda f: huge_avi(f, 65500), "bad.avi"),
    "15000 x 15000 raw frames": (lambda f: y4m(f, 15000, 15000), "15000 x 15000 pixels"),
    "long and thin": (
        lambda f: y4m(f, 50000, 2, 3),
        "50000 x 2 pixels",
    ),  # padded to a square, 2.5 gigapixels
    "14 hours of sound": (lambda f: wav(f, 1), "50000 s, at most 1000000 and 3600 s"),
    "a rate of 2 GHz": (lambda f: wav(f, 2**31 - 1), "2147483647 Hz, at most 16 and 384000 Hz"),
    "40 channels": (lambda f: wav(f, 48000, 40), "40 channels"),
    "a list of other files": (
        lambda f: (
            shutil.copy(CLIP, f / "other.mp4")
            and text_file(f, "bad.mp4", "ffconcat version 1.0\nfile other.mp4\n")
        ),
        "is a playlist",
    ),
    "a stream": (
        lambda f: (
            shutil.copy(CLIP, f / "other.mp4")
            and text_file(
                f,
                "bad.m3u8",
                f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{f}/other.mp4\n#EXT-X-ENDLIST\n",
            )
        ),
        "bad.m3u8",
    ),
}

MEASURE = """
import resource, sys, time
sys.path.insert(0, sys.argv[1])
import data
kib = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
data.load_clip(sys.argv[2], 2)  # what a good clip takes is not the point
before, start = kib(), time.process_time()
try:
    print("decoded", [None if x is None else x.shape for x in data.load_clip(sys.argv[3], 8)])
except data.ClipError as error:
    print(error)
print(round(time.process_time() - start, 1), (kib() - before) // 1024)
"""


@pytest.mark.parametrize("claim", CLAIMS)
def test_what_claims_to_be_huge_is_refused_before_memory_is_taken(tmp_path, claim):
    make, message = CLAIMS[claim]
    path = Path(make(tmp_path))
    with pytest.raises(ClipError, match=message) as caught:
        data.load_clip(path, 8)
    assert str(path) in str(caught.value)


def test_refusing_costs_nothing(tmp_path):
    """Peak memory and processor time of who meets the most expensive one: without the limit 2.4 GB
    and 5 s."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(ROOT), str(CLIP), str(huge_index(tmp_path))],
        capture_output=True,
        text=True,
    )
    *_, message, cost = done.stdout.strip().split("\n")
    seconds, megabytes = map(float, cost.split())
    assert "claims 67108864 packets" in message and seconds < 4 and megabytes < 600, done


def test_what_turns_out_huge_while_decoding_is_refused(tmp_path, monkeypatch):
    """A file that says nothing of its length or size: limits are lowered, instead of writing
    hours."""
    sound = write_clip(tmp_path / "a.mkv", video=None, audio="pcm_s16le", seconds=3)
    monkeypatch.setattr(media, "MAX_SECONDS", 10)
    assert len(data.load_waveform(sound)) == 48000
    monkeypatch.setattr(media, "_open", lambda path: av.open(str(path)))
    monkeypatch.setattr(media, "MAX_SECONDS", 2)
    with av.open(str(sound)) as container:  # a live recording: no duration
        assert container.duration / 1e6 == pytest.approx(3, abs=0.1)
    monkeypatch.setattr(media.av, "time_base", 10**9, raising=False)  # so that the claim passes
    with pytest.raises(ClipError, match="a.mkv: sound of more than 2 s"):
        data.load_waveform(sound)


def test_more_packets_than_can_be(tmp_path, monkeypatch):
    path = write_clip(tmp_path / "a.mkv", frames=60)
    monkeypatch.setattr(media, "MAX_PACKETS", 59)
    with pytest.raises(ClipError, match="a.mkv: holds more than 59 packets"):
        data.load_frames(path, 4)


@pytest.mark.parametrize("side, message", [(5000, "damaged|5000 x 5000")])
def test_a_size_that_changes_half_way(tmp_path, side, message):
    """Two pictures of 32 x 32, then two of another size in the same stream. (tests/test_media.py
    has those that can be brought to one.)"""
    small, large = (
        write_clip(tmp_path / f"{size}.avi", video="mjpeg", frames=2, size=(size, size))
        for size in (32, side)
    )
    pictures = []
    for path in (small, large):
        with av.open(str(path)) as container:
            pictures += [bytes(packet) for packet in container.demux(video=0) if packet.size]
    (tmp_path / "bad.mjpeg").write_bytes(b"".join(pictures))
    with pytest.raises(ClipError, match=f"bad.mjpeg.*({message})"):
        data.load_frames(tmp_path / "bad.mjpeg", 4)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
def test_sound_that_is_no_number(tmp_path, value):
    """Floating-point PCM can hold anything; one such sample would make the whole spectrogram
    nan."""
    path = write_clip(tmp_path / "a.wav", video=None, audio="pcm_f32le", seconds=1)
    content = bytearray(path.read_bytes())
    content[5000:5004] = struct.pack("<f", value)
    path.write_bytes(content)
    with pytest.raises(ClipError, match="a.wav: its sound is not a sound"):
        data.load_waveform(path)


def test_a_codec_that_nobody_knows(tmp_path):
    path = write_clip(tmp_path / "a.avi", video="mpeg4", frames=3)
    content = path.read_bytes()
    path.write_bytes(content.replace(b"FMP4", b"Q?7x").replace(b"fmp4", b"Q?7x"))
    with pytest.raises(ClipError, match="a.avi"):
        data.load_frames(path, 2)


# --------------------------------------------------------------------------------------------------
# Cached features


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: file.write_bytes(file.read_bytes()[:-1]),
        lambda file: file.write_bytes(b""),
        lambda file: save_file({"video": torch.zeros(2, 3, 4)}, file),
    ],
)
def test_a_damaged_feature_cache_is_an_error_that_names_the_file(tmp_path, damage):
    clips = data.Clips(examples_of(CLIP, "audio"), **SIZES, cache=tmp_path)
    file = clips.cache_file(0)
    save_file({"audio": torch.zeros(3, 4)}, file)
    assert clips[0]["audio"].shape == (3, 4)
    damage(file)
    with pytest.raises(DataError, match=f"{file}.*delete it") as caught:
        clips[0]
    assert not isinstance(caught.value, ClipError)  # the clip is good: not one to be left out


# --------------------------------------------------------------------------------------------------
# Flags


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--temperature", "nan"], "--temperature must be a number"),
        (["--temperature", "inf"], "--temperature must be a number"),
        (["--temperature", "-1"], "--temperature must be at least 0"),
        (["--top-p", "1.5"], "--top-p must be at most 1"),
        (["--top-p", "0"], "--top-p must be more than 0"),
        (["--workers", "100000"], "--workers must be at most 128"),
        (["--seed", "-1"], "--seed must be at least 0"),
        (["--seed", "9" * 30], "--seed must be at most"),
        (["--max-new-tokens", "1000000000"], "--max-new-tokens must be at most"),
        (["--model=--"], "--model needs a value"),
        (
            ["--device", "abacus", "--model", str(CHECKPOINT), "--data", "x.json"],
            "--device abacus cannot be used",
        ),
    ],
)
def test_flags_out_of_range_are_named(arguments, message):
    with pytest.raises(DataError, match=message):
        evaluate.main(arguments)


NUMBERS = [
    pytest.param(script, f, id=f"{script.__name__}-{f.name}")
    for script in (train_grpo, train_sft, evaluate)
    for f in dataclasses.fields(script.Config)
    if type(f.default) in (int, float)
]


@pytest.mark.parametrize("script, f", NUMBERS)
def test_every_number_has_a_bound_and_what_is_below_it_is_refused_by_name(script, f):
    name, rules = "--" + f.name.replace("_", "-"), f.metadata
    assert ("least" in rules) + ("above" in rules) == 1
    # 0 often switches a thing off; nothing is counted or measured in negative numbers.
    assert rules.get("least", 1) >= 0 and rules.get("above", 0) >= 0
    refused = ["-1", "-3", "-2147483648"]
    if "above" in rules:
        refused.append(str(rules["above"]))
    elif rules["least"]:
        refused.append("0")
    if type(f.default) is float:
        refused += ["-1e-9", "nan", "inf", "-inf"]
    for value in refused:
        with pytest.raises(DataError, match=f"^{name} must be "):
            script.main([f"{name}={value}"])
    if "most" in rules:
        with pytest.raises(DataError, match=f"^{name} must be at most {rules['most']}, not "):
            script.main([f"{name}={rules['most'] + 1}"])


@pytest.mark.parametrize(
    "script, name, value, message",
    [
        (train_grpo, "--updates", "-3", "at least 0, not -3"),
        (train_grpo, "--lr", "-1", "more than 0, not -1.0"),
        (train_grpo, "--lr", "0", "more than 0, not 0.0"),
        (train_grpo, "--clip-norm", "0", "more than 0, not 0.0"),
        (train_grpo, "--beta", "-0.04", "at least 0, not -0.04"),
        (train_grpo, "--clip-high", "-0.1", "at least 0, not -0.1"),
        (train_grpo, "--group", "1", "at least 2, not 1"),
        (train_sft, "--epochs", "-1", "at least 0, not -1.0"),
        (train_sft, "--micro-batch", "-2", "at least 0, not -2"),
        (train_sft, "--save-every", "0", "at least 1, not 0"),
        (evaluate, "--samples", "0", "at least 1, not 0"),
        (evaluate, "--limit", "-5", "at least 0, not -5"),
    ],
)
def test_numbers_that_make_no_sense(script, name, value, message):
    with pytest.raises(DataError, match=f"^{name} must be {message}$"):
        script.main([name, value])


@pytest.mark.parametrize(
    "arguments",
    [
        ["--limit", "many"],
        ["--limit"],
        ["--fit", "crop"],
        ["--nothing"],
        ["--top-p", ""],
        ["loose"],
    ],
)
def test_flags_that_are_none_end_with_code_2(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        evaluate.main(arguments)
    assert caught.value.code == 2 and "error: " in capsys.readouterr().err


def test_what_the_user_can_mend_or_did_is_one_line(capsys):
    def ends(raised):
        def main():
            raise raised

        with pytest.raises(SystemExit) as caught:
            run_script(main)
        return caught.value.code, capsys.readouterr().err

    assert ends(IsADirectoryError(21, "Is a directory", "x.json")) == (
        2,
        "error: x.json: Is a directory\n",
    )
    assert ends(OSError(28, "No space left on device")) == (
        2,
        "error: reading or writing: No space left on device\n",
    )
    assert ends(KeyboardInterrupt()) == (
        130,
        "\nstopped; the same command goes on from what was saved\n",
    )
    with pytest.raises(ZeroDivisionError):  # a mistake of ours keeps its traceback
        run_script(lambda: 1 / 0)


@pytest.mark.parametrize(
    "script, arguments, name",
    [
        ("evaluate", ["--model", str(CHECKPOINT), "--data", "{folder}"], "{folder}"),
        (
            "evaluate",
            ["--model", str(CHECKPOINT), "--data", "{manifest}", "--out", "{manifest}"],
            "{manifest}",
        ),
        ("train_sft", ["--model", "{manifest}", "--data", "{manifest}"], "{manifest}"),
        ("train_grpo", ["--model", str(CHECKPOINT), "--data", "{manifest}", "--lr", "nan"], "--lr"),
        (
            "prepare",
            ["dfew", "--root", "{folder}", "--split", "test", "--out", "{manifest}/x.json"],
            "{folder}",
        ),
    ],
)
def test_scripts_end_with_one_error_and_code_2(
    tmp_path, capsys, monkeypatch, script, arguments, name
):
    monkeypatch.chdir(tmp_path)
    manifest, folder = tmp_path / "m.json", tmp_path / "folder"
    turns = [{"from": "human", "value": "<video>?"}, {"from": "gpt", "value": "sad"}]
    manifest.write_text(json.dumps([{"video": str(CLIP), "conversations": turns}]))
    folder.mkdir()
    arguments, name = (
        [a.format(manifest=manifest, folder=folder) for a in arguments],
        name.format(manifest=manifest, folder=folder),
    )
    with pytest.raises(SystemExit) as caught:
        run_script(lambda: importlib.import_module(script).main(arguments))
    message = capsys.readouterr().err
    assert caught.value.code == 2 and message.startswith("error: ") and name in message


def test_prepare_names_what_cannot_be(tmp_path):
    table = tmp_path / "EmoLabel_DataSplit" / "test(single-labeled)" / "set_1.csv"
    table.parent.mkdir(parents=True)
    command = [
        "dfew",
        "--root",
        str(tmp_path),
        "--split",
        "test",
        "--out",
        str(tmp_path / "m.json"),
    ]
    table.write_text("video_name,label\n" + "1" * 5000 + ",1\n")
    with pytest.raises(DataError, match="set_1.csv: line 2"):
        prepare.main(command)
    names = tmp_path / "Train & Test Set" / "single" / "no_caption" / "set_1" / "test.txt"
    names.parent.mkdir(parents=True)
    for name in ("x" * 5000, "a\0b.mp4"):
        names.write_text(f"{name} anger\n")
        with pytest.raises(DataError, match="1 of 1 clips are missing"):
            prepare.main(["mafw", *command[1:]])
