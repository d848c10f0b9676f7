"""The toy world is what its docstring says: the table, the manifests, the clips, the tokenizers."""

import itertools
import json
import re
import subprocess
import sys
import zlib
from collections import Counter

import av
import numpy as np
import pytest
from conftest import ROOT

from support.errors import DataError
from toy import drawing, files, world

# crc32 of each split's manifest as JSON, of seeds 0 and 1
MANIFESTS = {
    "text": [3229586862, 581265680],
    "base": [477992505, 1861922220],
    "cold_start": [3635625296, 1971383747],
    "train": [3332501301, 3522415526],
    "validation": [2329927348, 11342253],
    "test": [900791179, 1422360182],
    "test_ood": [1323293944, 2464768994],
    "swapped": [3285872507, 2434476138],
}
# frames; mean and standard deviation of the pixels; mean loudness and standard deviation of the
# sound
CLIPS = {
    "test/0000.mp4": (21, 150.04524, 89.78204, 0.1100685, 0.1483964),
    "test/0001.mp4": (27, 135.86899, 68.95068, 0.0753681, 0.0970406),
    "test_ood/0000.mp4": (30, 122.92152, 61.56630, 0.0991681, 0.1325074),
    "test_ood/0001.mp4": (22, 124.27413, 64.16776, 0.0734323, 0.0918668),
    "swapped/0000.mp4": (24, 145.39826, 82.79398, 0.0899805, 0.1193516),
    "swapped/0001.mp4": (26, 117.85024, 78.82593, 0.0323936, 0.0484053),
    "base/0000.mp4": (22, 145.23504, 91.25369, 0.1134203, 0.1519489),
    "base/0001.mp4": (21, 153.13914, 84.29266, 0.0770317, 0.0976150),
    "base/0002.mp4": (30, 139.09737, 70.67044, 0.0645358, 0.0852538),
}


def answer_word(entry):
    return re.search(r"<answer>(\w+)</answer>", entry["conversations"][1]["value"])[1]


def clips_of(split, count, **cues):
    """The first entries of a split whose face, voice or emotion are as given."""
    return [e for e in world.make_manifest(split) if all(e[k] == v for k, v in cues.items())][
        :count
    ]


def decode(path):
    """-> frames uint8 (T, H, W, 3), waveform float32 (samples,), sample rate."""
    with av.open(str(path)) as container:
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    with av.open(str(path)) as container:
        sound = [frame.to_ndarray().reshape(-1) for frame in container.decode(audio=0)]
        return frames, np.concatenate(sound), container.streams.audio[0].rate


# --- the table and the words


def test_neither_modality_alone_identifies_the_emotion():
    assert len(set(world.EMOTIONS.values())) == len(world.EMOTIONS) == 7
    faces, voices = (Counter(cues[i] for cues in world.EMOTIONS.values()) for i in (0, 1))
    assert set(faces) == set(world.FACE_TEXT) == set(drawing.POSES)
    assert set(voices) == set(world.VOICE_TEXT) == set(drawing.VOICES)
    ambiguous_face = [e for e, (face, _) in world.EMOTIONS.items() if faces[face] > 1]
    ambiguous_voice = [e for e, (_, voice) in world.EMOTIONS.items() if voices[voice] > 1]
    assert sorted(ambiguous_face) == ["angry", "disgust", "fear", "surprise"]
    assert sorted(ambiguous_voice) == ["disgust", "happy", "sad", "surprise"]


def test_words_are_open_vocabulary():
    assert set(world.WORDS) == set(world.EMOTIONS)
    assert len(set(world.ALL_WORDS)) == 21  # no word stands for two emotions
    for emotion, words in world.WORDS.items():
        assert emotion in words and sum(words.values()) == 1
    usual = sum(max(words, key=words.get) == emotion for emotion, words in world.WORDS.items())
    assert usual == 3


def test_read_statements_inverts_statements():
    for face in world.FACE_TEXT:
        for voice in world.VOICE_TEXT:
            assert world.read_statements(world.statements(face, voice)) == (face, voice)
            assert world.read_statements(world.reasoned(face, voice, "happy")) == (face, voice)
    assert world.read_statements("<answer>happy</answer>") == (None, None)
    assert world.read_statements(
        "In the audio, the voice is even. In the video, the dog smiles."
    ) == (None, "even")
    assert world.read_statements("In the video, the mouth smiles</think>") == ("smile", None)
    assert world.read_statements("") == (None, None)


def test_follows():
    think = "<think>In the video, {}. In the audio, {}.</think>\n<answer>"
    wide, high = world.FACE_TEXT["wide"], world.VOICE_TEXT["high_fast"]
    for word in world.WORDS["surprise"]:  # any of its words
        assert world.follows(think.format(wide, high), word)
    assert not world.follows(think.format(wide, high), "fear")
    # no emotion has this face and this voice
    assert not world.follows(think.format(world.FACE_TEXT["flat"], high), "happy")
    # nothing to follow from
    assert not world.follows("<answer>surprise</answer>", "surprise")


def test_check_statements():
    """Against what the manifest says of the clip: a false statement, and an answer that follows
    from it."""
    entry = {"face": "wide", "voice": "trembling"}

    def check(face, voice, word, extra=entry):
        completion = world.reasoned(face, voice, word)
        return world.check_statements({"completion": completion, "label": "fear", "extra": extra})

    def found(face_true, voice_true, eea, epc, fcr):
        return dict(face_true=face_true, voice_true=voice_true, eea=eea, epc=epc, fcr=fcr)

    assert check("wide", "trembling", "fear") == found(True, True, True, True, True)
    assert check("wide", "trembling", "scared") == found(True, True, True, True, False)
    assert check("wide", "trembling", "surprise") == found(True, True, True, False, False)
    assert check("wide", "high_fast", "surprise") == found(True, False, False, True, False)
    assert check("flat", "trembling", "fear") == found(False, True, False, False, False)
    assert check("wide", "trembling", "fear", {}) == {}  # another data set
    assert check("wide", "trembling", "fear", {"face": "wide"}) == {}
    row = {"completion": "<answer>fear</answer>", "label": "fear", "extra": entry}
    assert world.check_statements(row) == found(False, False, False, False, False)


# --- manifests


@pytest.mark.parametrize("split", world.SPLITS)
def test_manifest_format(split):
    entries = world.make_manifest(split)
    assert len(entries) == world.SPLITS[split]
    assert entries == world.make_manifest(split) != world.make_manifest(split, seed=1)
    assert json.loads(json.dumps(entries)) == entries  # so that one on disk can be compared
    for i, entry in enumerate(entries):
        human, gpt = entry["conversations"]
        assert (human["from"], gpt["from"]) == ("human", "gpt")
        if split == "text":
            assert "video" not in entry and "<video>" not in human["value"]
        else:
            assert entry["video"] == f"{split}/{i:04d}.mp4"
            assert human["value"].startswith("<video>\n<audio>\n")
        if entry["emotion"]:
            assert world.EMOTION_OF[entry["face"], entry["voice"]] == entry["emotion"]


@pytest.mark.parametrize("split", world.SPLITS)
def test_manifest_is_the_one_of_this_world(split):
    """Bit for bit what published results were made with. A change here asks for another WORLD, for
    new numbers, and maybe for a new base."""
    assert world.WORLD == 3
    checksums = [
        zlib.crc32(json.dumps(world.make_manifest(split, seed)).encode()) for seed in (0, 1)
    ]
    assert checksums == MANIFESTS[split]


def test_base_and_text_name_no_emotion_that_could_be_learned():
    base = world.make_manifest("base")
    assert set(Counter((e["face"], e["voice"]) for e in base).values()) == {160}  # 4000 / 25
    assert all(e["emotion"] is None for e in base)
    for e in base:
        answer = e["conversations"][1]["value"]
        assert answer == world.statements(e["face"], e["voice"])
        assert not any(word in answer for word in world.ALL_WORDS)
    text = [e for e in world.make_manifest("text") if "<answer>" in e["conversations"][1]["value"]]
    assert len(text) == 1000
    truths = {
        (*cues, word) for emotion, cues in world.EMOTIONS.items() for word in world.WORDS[emotion]
    }
    hits = sum((e["face"], e["voice"], answer_word(e)) in truths for e in text)
    assert hits / len(text) < 0.08  # 7/25 pairs in the table * 3/21 words = 0.04


def test_cold_start_deals_the_words_by_their_shares():
    entries = world.make_manifest("cold_start")
    for emotion, words in world.WORDS.items():
        dealt = Counter(answer_word(e) for e in entries if e["emotion"] == emotion)
        assert dealt == {word: 60 * share for word, share in words.items()}


@pytest.mark.parametrize("split", ["train", "validation", "test", "test_ood"])
def test_labels_are_balanced(split):
    entries = world.make_manifest(split)
    assert set(Counter(e["emotion"] for e in entries).values()) == {world.SPLITS[split] // 7}
    assert all(e["conversations"][1]["value"] == e["emotion"] for e in entries)


def test_swapped_asks_for_another_emotion_of_the_table():
    emotion_of = {e["video"]: e["emotion"] for e in world.make_manifest("test")}
    entries = world.make_manifest("swapped")
    for entry in entries:
        a, b = emotion_of[entry["face_from"]], emotion_of[entry["voice_from"]]
        assert a != b
        cues = entry["face"], entry["voice"]
        assert cues == (world.EMOTIONS[a][0], world.EMOTIONS[b][1])
        assert entry["conversations"][1]["value"] == world.EMOTION_OF[cues] != a
    answers = ["surprise", "fear", "angry", "disgust"]
    assert Counter(e["emotion"] for e in entries) == dict.fromkeys(answers, 28)


# --- clips


def test_same_seed_same_arrays():
    entry, other = world.make_manifest("test")[0], world.make_manifest("test", seed=1)[0]
    frames, waveform = drawing.draw_clip(entry)
    again = drawing.draw_clip(entry)
    assert frames.tobytes() == again[0].tobytes() and waveform.tobytes() == again[1].tobytes()
    assert frames.tobytes() != drawing.draw_clip({**other, "face": entry["face"]})[0].tobytes()
    assert frames.dtype == np.uint8 and frames.shape[1:] == (96, 96, 3)
    assert waveform.dtype == np.float32 and np.abs(waveform).max() <= 1


def test_swapped_clip_shows_the_very_face_of_a_test_clip():
    entry = world.make_manifest("swapped")[0]
    source = next(e for e in world.make_manifest("test") if e["video"] == entry["face_from"])
    assert np.array_equal(drawing.draw_clip(entry)[0], drawing.draw_clip(source)[0])
    assert not np.array_equal(drawing.draw_clip(entry)[1], drawing.draw_clip(source)[1])


def test_faces_act():
    for face in set(world.FACE_TEXT) - {"flat"}:
        for entry in clips_of("base", 3, face=face):
            frames = drawing.draw_clip(entry)[0].astype(float)
            assert 20 <= len(frames) <= 30
            change = np.abs(np.diff(frames, axis=0)).mean(axis=(1, 2, 3))
            assert change.min() > 0  # a video, not a picture
            assert change[: len(frames) // 4 + 1].sum() > 0.2 * change.sum()
            assert np.abs(frames[0] - frames[-1]).mean() > 3  # and it does not end as it began


def test_voices_differ_in_pitch_and_loudness():
    pitch, loudness = {}, {}
    for voice in world.VOICE_TEXT:
        waves = [drawing.draw_clip(e)[1] for e in clips_of("base", 5, voice=voice)]
        pitch[voice] = np.mean([strongest_hertz(w) for w in waves])
        loudness[voice] = np.mean([np.sqrt(np.mean(w**2)) for w in waves])
    assert pitch["low_slow"] < 140 < 160 < pitch["even"] < 240 < 260 < pitch["high_fast"] < 480
    assert max(loudness, key=loudness.get) == "harsh"
    assert min(loudness, key=loudness.get) == "trembling"


def strongest_hertz(waveform):
    """The frequency, up to 500 Hz, with the most power."""
    power = np.abs(np.fft.rfft(waveform)) ** 2
    hertz = np.fft.rfftfreq(len(waveform), 1 / drawing.RATE)
    return hertz[np.argmax(power * (hertz < 500))]


def test_ood_has_other_colours_lines_speakers_and_more_noise():
    def measure(split):
        walls, lines, pitches, noises = [], [], [], []
        for entry in clips_of(split, 12, face="flat", voice="even"):
            frames, waveform = drawing.draw_clip(entry)
            walls.append(frames[:, :4, :4].mean())  # a corner is wall
            # dark share of the middle of the face
            lines.append((frames.max(axis=3) < 70)[:, 24:72, 24:72].mean())
            pitches.append(strongest_hertz(waveform))
            spectrum = np.abs(np.fft.rfft(waveform)) / len(waveform)
            # above 4 kHz an even voice is silent
            noises.append(np.sqrt(np.mean(spectrum[len(spectrum) // 2 :] ** 2)))
        return np.array(walls), np.array(lines), np.array(pitches), np.array(noises)

    walls, lines, pitches, noises = measure("test")
    walls2, lines2, pitches2, noises2 = measure("test_ood")
    assert walls2.max() < 112 < 114 < walls.min()
    assert lines2.std() > 1.5 * lines.std()
    assert pitches2.min() < pitches.min() or pitches2.max() > pitches.max()
    assert pitches2.std() > pitches.std()
    assert noises2.mean() > 2 * noises.mean()


def test_clips_on_disk(tmp_path, monkeypatch):
    """Decodable, with both streams, 2 to 3 s, true to the arrays; made once, and anew for another
    seed."""
    monkeypatch.setitem(world.SPLITS, "test", 7)
    monkeypatch.setitem(world.SPLITS, "text", 7)
    manifests = drawing.make_clips(tmp_path, ["test", "text"])
    assert manifests == {"test": tmp_path / "test.json", "text": tmp_path / "text.json"}
    entries = json.loads(manifests["test"].read_text())
    assert entries == world.make_manifest("test")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["test", "test.json", "text.json"]
    for entry in entries:
        frames, waveform = drawing.draw_clip(entry)
        shown, heard, rate = decode(tmp_path / entry["video"])
        assert rate == 16000 and shown.shape == frames.shape and 20 <= len(shown) <= 30
        assert np.abs(shown.astype(float) - frames).mean() < 6  # H.264 at crf 20, half the colour
        assert 0 <= len(heard) - len(waveform) < 3 * 1024  # AAC works in blocks of 1024
        level = np.sqrt(np.mean(waveform**2))
        assert 0.8 * level < np.sqrt(np.mean(heard**2)) < 1.25 * level

    clip = tmp_path / entries[0]["video"]
    before = clip.stat().st_mtime_ns
    drawing.make_clips(tmp_path, ["test"])
    assert clip.stat().st_mtime_ns == before
    clip.write_bytes(b"")
    drawing.make_clips(tmp_path, ["test"], seed=1)
    assert clip.stat().st_size > 0
    assert json.loads(manifests["test"].read_text())[0]["world"] == [world.WORLD, 1]


def test_clips_are_the_ones_of_this_world():
    """What is drawn is what the shipped base was trained on, up to the last digits in which
    processors differ."""
    for split in ("test", "test_ood", "swapped", "base"):
        for entry in world.make_manifest(split)[: 3 if split == "base" else 2]:
            frames, waveform = drawing.draw_clip(entry)
            T, *numbers = CLIPS[entry["video"]]
            found = frames.mean(), frames.std(), np.abs(waveform).mean(), waveform.std()
            assert len(frames) == T and found == pytest.approx(numbers, rel=1e-4)


def test_clips_are_the_same_however_many_are_drawn_at_once(tmp_path, monkeypatch):
    """Each file, byte for byte."""
    monkeypatch.setitem(world.SPLITS, "test", 14)
    for cores in (1, 4):
        monkeypatch.setattr(drawing, "available_cores", lambda cores=cores: cores)
        drawing.make_clips(tmp_path / str(cores), ["test"])
    for entry in world.make_manifest("test"):
        alone, together = (tmp_path / cores / entry["video"] for cores in ("1", "4"))
        assert alone.read_bytes() == together.read_bytes()


def test_an_interrupted_split_is_drawn_again(tmp_path, monkeypatch):
    """Stopped after a few clips: no manifest, no clip begun after that; then all of them."""
    monkeypatch.setitem(world.SPLITS, "test", 70)
    write_clip, count = drawing.write_clip, itertools.count()

    def stopped(path, frames, waveform):
        if next(count) == 3:
            raise KeyboardInterrupt
        write_clip(path, frames, waveform)

    monkeypatch.setattr(drawing, "write_clip", stopped)
    with pytest.raises(KeyboardInterrupt):
        drawing.make_clips(tmp_path, ["test"])
    assert not (tmp_path / "test.json").exists()
    assert len(list(tmp_path.glob("test/*.mp4"))) < 20
    monkeypatch.setattr(drawing, "write_clip", write_clip)
    drawing.make_clips(tmp_path, ["test"])
    assert len(list(tmp_path.glob("test/*.mp4"))) == 70


@pytest.mark.parametrize("content", ['[{"video": "mine.mp4"}]', "{}", "[1]", "7", '["world"]'])
def test_a_manifest_that_is_not_the_toys_stays(tmp_path, content):
    manifest = tmp_path / "text.json"
    manifest.write_text(content)
    with pytest.raises(DataError, match="text.json: is not a toy's; choose another --out"):
        drawing.make_clips(tmp_path, ["text"])
    assert manifest.read_text() == content


# --- the checkpoint directory


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoint")
    files.make_checkpoint_files(root)
    return root


def test_checkpoint_files(checkpoint, tmp_path):
    files.make_checkpoint_files(tmp_path)
    names = sorted(p.relative_to(checkpoint) for p in checkpoint.rglob("*") if p.is_file())
    assert len(names) == 15 and sum((checkpoint / f).stat().st_size for f in names) < 100_000
    for file in names:  # deterministic
        assert (tmp_path / file).read_bytes() == (checkpoint / file).read_bytes()
    config = json.loads((checkpoint / "config.json").read_text())
    tokenizer = files.Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    assert config["vocab_size"] == tokenizer.get_vocab_size() < 640
    assert tokenizer.token_to_id("<|im_end|>") == config["eos_token_id"]
    assert tokenizer.token_to_id("<|endoftext|>") == config["bos_token_id"]
    towers = {
        name: json.loads((checkpoint / name / "config.json").read_text())
        for name in ("siglip", "whisper", "bert")
    }
    assert config["mm_hidden_size"] == towers["siglip"]["hidden_size"]
    assert config["audio_hidden_size"] == towers["whisper"]["d_model"]
    vocabulary = (checkpoint / "bert/vocab.txt").read_text().split("\n")
    assert towers["bert"]["vocab_size"] == len(vocabulary) - 1


def test_checkpoint_files_are_the_shipped_ones(checkpoint):
    """But for the type that the shipped weights are stored in."""
    shipped = ROOT / "toy" / "base"
    for path in checkpoint.rglob("*.*"):
        made, found = path.read_text(), (shipped / path.relative_to(checkpoint)).read_text()
        if path.suffix == ".json":
            made, found = json.loads(made), json.loads(found)
        if path.name == "config.json" and path.parent == checkpoint:
            assert found.pop("torch_dtype") == "bfloat16" and made.pop("torch_dtype") == "float32"
        assert made == found, path.name


def test_tokenizer_knows_the_words_of_this_world(checkpoint):
    tokenizer = files.Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    texts = [
        world.REASONING_QUESTION,
        world.CAPTION_QUESTION,
        "<vi_start><vi_end>\n<au_start>",
        "Ünknown 42 \u2713\n",
    ]
    texts += [
        world.reasoned(*cues, word) for cues in world.EMOTIONS.values() for word in world.ALL_WORDS
    ]
    for text in texts:
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    # one token for the word (with the > before it), so that an answer is one choice
    for word in world.ALL_WORDS:
        assert f">{word}" in tokenizer.encode(f"<answer>{word}</answer>").tokens
    for text in [*world.FACE_TEXT.values(), *world.VOICE_TEXT.values()]:
        assert len(tokenizer.encode(" " + text).ids) == len(text.split())
    assert len(tokenizer.encode("<|im_start|>user").ids) == 2


def test_bert_covers_the_questions(checkpoint):
    vocabulary = set((checkpoint / "bert/vocab.txt").read_text().split("\n"))
    for question in (world.LABEL_QUESTION, world.REASONING_QUESTION, world.CAPTION_QUESTION):
        pieces = re.findall(r"\w+|[^\w\s]", question.lower())
        assert set(pieces) <= vocabulary and len(pieces) <= 62  # 64 positions with [CLS] and [SEP]


def test_what_stands_twice_is_the_same(checkpoint):
    """world.py repeats two texts of text.py, so that whoever draws clips need not load torch."""
    import text

    ours = world.LABEL_QUESTION, world.REASONING_QUESTION
    assert ours == (text.QUESTION_LABEL, text.QUESTION_REASONING)
    tokenizer = json.loads((checkpoint / "tokenizer.json").read_text())
    split = tokenizer["pre_tokenizer"]["pretokenizers"][0]
    assert split["pattern"]["Regex"] == text.QWEN2_PATTERN


def test_drawing_does_without_torch():
    code = "import sys, toy.drawing; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


# --- the command line


def test_command_line(tmp_path, capsys):
    """A split, with its manifest and a line that says so; a picture; help."""
    from toy.__main__ import main

    main(["--out", str(tmp_path), "--splits", "text", "--seed", "3"])
    assert capsys.readouterr().out == f"{tmp_path / 'text.json'}: 1500 entries, 0.0 MB of clips\n"
    assert json.loads((tmp_path / "text.json").read_text()) == world.make_manifest("text", 3)
    main(["--sheet", str(tmp_path / "sheet.png")])
    picture = (tmp_path / "sheet.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 100_000
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    assert "usage: python -m toy" in capsys.readouterr().out


def test_command_line_names_the_file_at_fault(tmp_path):
    (tmp_path / "text.json").write_text("{}")
    command = [sys.executable, "-m", "toy", "--out", str(tmp_path), "--splits", "text"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and str(tmp_path / "text.json") in done.stderr
    assert "Traceback" not in done.stderr
