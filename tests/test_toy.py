"""The toy world is what its docstring says: the table, the manifests, the clips, the tokenizers."""

import json
import re
import sys
from collections import Counter
from pathlib import Path

import av
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import toy


def answer_word(entry):
    return re.search(r"<answer>(\w+)</answer>", entry["conversations"][1]["value"])[1]


def clips_of(split, count, **cues):
    """The first entries of a split whose face, voice or emotion are as given."""
    return [e for e in toy.make_manifest(split) if all(e[k] == v for k, v in cues.items())][:count]


def decode(path):
    """-> frames uint8 (T, H, W, 3), waveform float32 (samples,), sample rate."""
    with av.open(str(path)) as container:
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    with av.open(str(path)) as container:
        sound = [frame.to_ndarray().reshape(-1) for frame in container.decode(audio=0)]
        return frames, np.concatenate(sound), container.streams.audio[0].rate


# --- the table and the words

def test_neither_modality_alone_identifies_the_emotion():
    assert len(set(toy.EMOTIONS.values())) == len(toy.EMOTIONS) == 7
    faces, voices = (Counter(cues[i] for cues in toy.EMOTIONS.values()) for i in (0, 1))
    assert set(faces) == set(toy.FACE_TEXT) == set(toy.POSES)
    assert set(voices) == set(toy.VOICE_TEXT) == set(toy.VOICES)
    ambiguous_face = [e for e, (face, _) in toy.EMOTIONS.items() if faces[face] > 1]
    ambiguous_voice = [e for e, (_, voice) in toy.EMOTIONS.items() if voices[voice] > 1]
    assert sorted(ambiguous_face) == ["angry", "disgust", "fear", "surprise"]
    assert sorted(ambiguous_voice) == ["disgust", "happy", "sad", "surprise"]


def test_words_are_open_vocabulary():
    assert set(toy.WORDS) == set(toy.EMOTIONS)
    assert len(set(toy.ALL_WORDS)) == 21  # no word stands for two emotions
    for emotion, words in toy.WORDS.items():
        assert emotion in words and sum(words.values()) == 1
    usual = sum(max(words, key=words.get) == emotion for emotion, words in toy.WORDS.items())
    assert usual == 3


def test_read_statements_inverts_statements():
    for face in toy.FACE_TEXT:
        for voice in toy.VOICE_TEXT:
            assert toy.read_statements(toy.statements(face, voice)) == (face, voice)
            assert toy.read_statements(toy.reasoned(face, voice, "happy")) == (face, voice)
    assert toy.read_statements("<answer>happy</answer>") == (None, None)
    assert toy.read_statements("In the audio, the voice is even. In the video, the dog smiles.") == (None, "even")
    assert toy.read_statements("In the video, the mouth smiles</think>") == ("smile", None)
    assert toy.read_statements("") == (None, None)


def test_follows():
    think = "<think>In the video, {}. In the audio, {}.</think>\n<answer>"
    wide, high = toy.FACE_TEXT["wide"], toy.VOICE_TEXT["high_fast"]
    assert all(toy.follows(think.format(wide, high), word) for word in toy.WORDS["surprise"])  # any of its words
    assert not toy.follows(think.format(wide, high), "fear")
    assert not toy.follows(think.format(toy.FACE_TEXT["flat"], high), "happy")  # no emotion has this face and this voice
    assert not toy.follows("<answer>surprise</answer>", "surprise")  # nothing to follow from


# --- manifests

@pytest.mark.parametrize("split", toy.SPLITS)
def test_manifest_format(split):
    entries = toy.make_manifest(split)
    assert len(entries) == toy.SPLITS[split]
    assert entries == toy.make_manifest(split) != toy.make_manifest(split, seed=1)
    assert json.loads(json.dumps(entries)) == entries  # so that one on disk can be compared
    for i, entry in enumerate(entries):
        human, gpt = entry["conversations"]
        assert (human["from"], gpt["from"]) == ("human", "gpt")
        if split == "text":
            assert "video" not in entry and "<video>" not in human["value"]
        else:
            assert entry["video"] == f"{split}/{i:04d}.mp4" and human["value"].startswith("<video>\n<audio>\n")
        if entry["emotion"]:
            assert toy.EMOTION_OF[entry["face"], entry["voice"]] == entry["emotion"]


def test_base_and_text_name_no_emotion_that_could_be_learned():
    base = toy.make_manifest("base")
    assert set(Counter((e["face"], e["voice"]) for e in base).values()) == {160}  # 4000 / 25
    assert all(e["emotion"] is None for e in base)
    assert all(e["conversations"][1]["value"] == toy.statements(e["face"], e["voice"]) for e in base)
    assert not any(word in e["conversations"][1]["value"] for e in base for word in toy.ALL_WORDS)
    text = [e for e in toy.make_manifest("text") if "<answer>" in e["conversations"][1]["value"]]
    assert len(text) == 1000
    truths = {(*cues, word) for emotion, cues in toy.EMOTIONS.items() for word in toy.WORDS[emotion]}
    hits = sum((e["face"], e["voice"], answer_word(e)) in truths for e in text)
    assert hits / len(text) < 0.08  # 7/25 pairs in the table * 3/21 words = 0.04


def test_cold_start_deals_the_words_by_their_shares():
    entries = toy.make_manifest("cold_start")
    for emotion, words in toy.WORDS.items():
        dealt = Counter(answer_word(e) for e in entries if e["emotion"] == emotion)
        assert dealt == {word: 60 * share for word, share in words.items()}


@pytest.mark.parametrize("split", ["train", "validation", "test", "test_ood"])
def test_labels_are_balanced(split):
    entries = toy.make_manifest(split)
    assert set(Counter(e["emotion"] for e in entries).values()) == {toy.SPLITS[split] // 7}
    assert all(e["conversations"][1]["value"] == e["emotion"] for e in entries)


def test_swapped_asks_for_another_emotion_of_the_table():
    emotion_of = {e["video"]: e["emotion"] for e in toy.make_manifest("test")}
    entries = toy.make_manifest("swapped")
    for entry in entries:
        a, b = emotion_of[entry["face_from"]], emotion_of[entry["voice_from"]]
        assert a != b
        assert (entry["face"], entry["voice"]) == (toy.EMOTIONS[a][0], toy.EMOTIONS[b][1])
        assert entry["conversations"][1]["value"] == toy.EMOTION_OF[entry["face"], entry["voice"]] != a
    assert Counter(e["emotion"] for e in entries) == dict.fromkeys(["surprise", "fear", "angry", "disgust"], 28)


# --- clips

def test_same_seed_same_arrays():
    entry, other = toy.make_manifest("test")[0], toy.make_manifest("test", seed=1)[0]
    frames, waveform = toy.draw_clip(entry)
    again = toy.draw_clip(entry)
    assert frames.tobytes() == again[0].tobytes() and waveform.tobytes() == again[1].tobytes()
    assert frames.tobytes() != toy.draw_clip({**other, "face": entry["face"]})[0].tobytes()
    assert frames.dtype == np.uint8 and frames.shape[1:] == (96, 96, 3)
    assert waveform.dtype == np.float32 and np.abs(waveform).max() <= 1


def test_swapped_clip_shows_the_very_face_of_a_test_clip():
    entry = toy.make_manifest("swapped")[0]
    source = next(e for e in toy.make_manifest("test") if e["video"] == entry["face_from"])
    assert np.array_equal(toy.draw_clip(entry)[0], toy.draw_clip(source)[0])
    assert not np.array_equal(toy.draw_clip(entry)[1], toy.draw_clip(source)[1])


def test_faces_act():
    for face in set(toy.FACE_TEXT) - {"flat"}:
        for entry in clips_of("base", 3, face=face):
            frames = toy.draw_clip(entry)[0].astype(float)
            assert 20 <= len(frames) <= 30
            change = np.abs(np.diff(frames, axis=0)).mean(axis=(1, 2, 3))
            assert change.min() > 0                                  # a video, not a picture
            assert change[:len(frames) // 4 + 1].sum() > 0.2 * change.sum()
            assert np.abs(frames[0] - frames[-1]).mean() > 3         # and it does not end as it began


def test_voices_differ_in_pitch_and_loudness():
    pitch, loudness = {}, {}
    for voice in toy.VOICE_TEXT:
        waves = [toy.draw_clip(e)[1] for e in clips_of("base", 5, voice=voice)]
        pitch[voice] = np.mean([strongest_hertz(w) for w in waves])
        loudness[voice] = np.mean([np.sqrt(np.mean(w**2)) for w in waves])
    assert pitch["low_slow"] < 140 < 160 < pitch["even"] < 240 < 260 < pitch["high_fast"] < 480
    assert max(loudness, key=loudness.get) == "harsh" and min(loudness, key=loudness.get) == "trembling"


def strongest_hertz(waveform):
    """The frequency, up to 500 Hz, with the most power."""
    power = np.abs(np.fft.rfft(waveform)) ** 2
    hertz = np.fft.rfftfreq(len(waveform), 1 / toy.RATE)
    return hertz[np.argmax(power * (hertz < 500))]


def test_ood_has_other_colours_lines_speakers_and_more_noise():
    def measure(split):
        walls, lines, pitches, noises = [], [], [], []
        for entry in clips_of(split, 12, face="flat", voice="even"):
            frames, waveform = toy.draw_clip(entry)
            walls.append(frames[:, :4, :4].mean())                          # a corner is wall
            lines.append((frames.max(axis=3) < 70)[:, 24:72, 24:72].mean())  # dark share of the middle of the face
            pitches.append(strongest_hertz(waveform))
            spectrum = np.abs(np.fft.rfft(waveform)) / len(waveform)
            noises.append(np.sqrt(np.mean(spectrum[len(spectrum) // 2:] ** 2)))  # above 4 kHz an even voice is silent
        return np.array(walls), np.array(lines), np.array(pitches), np.array(noises)
    (walls, lines, pitches, noises), (walls2, lines2, pitches2, noises2) = measure("test"), measure("test_ood")
    assert walls2.max() < 112 < 114 < walls.min()
    assert lines2.std() > 1.5 * lines.std()
    assert (pitches2.min() < pitches.min() or pitches2.max() > pitches.max()) and pitches2.std() > pitches.std()
    assert noises2.mean() > 2 * noises.mean()


def test_clips_on_disk(tmp_path, monkeypatch):
    """Decodable, with both streams, 2 to 3 s, true to the arrays; made once, and anew for another seed."""
    monkeypatch.setitem(toy.SPLITS, "test", 7)
    monkeypatch.setitem(toy.SPLITS, "text", 7)
    manifests = toy.make_clips(tmp_path, ["test", "text"])
    assert manifests == {"test": tmp_path / "test.json", "text": tmp_path / "text.json"}
    entries = json.loads(manifests["test"].read_text())
    assert entries == toy.make_manifest("test") and sorted(p.name for p in tmp_path.iterdir()) == [
        "test", "test.json", "text.json"]
    for entry in entries:
        frames, waveform = toy.draw_clip(entry)
        shown, heard, rate = decode(tmp_path / entry["video"])
        assert rate == 16000 and shown.shape == frames.shape and 20 <= len(shown) <= 30
        assert np.abs(shown.astype(float) - frames).mean() < 6             # H.264 at crf 20, half the colour
        assert 0 <= len(heard) - len(waveform) < 3 * 1024                  # AAC works in blocks of 1024
        level = np.sqrt(np.mean(waveform**2))
        assert 0.8 * level < np.sqrt(np.mean(heard**2)) < 1.25 * level

    clip = tmp_path / entries[0]["video"]
    before = clip.stat().st_mtime_ns
    toy.make_clips(tmp_path, ["test"])
    assert clip.stat().st_mtime_ns == before
    clip.write_bytes(b"")
    toy.make_clips(tmp_path, ["test"], seed=1)
    assert clip.stat().st_size > 0 and json.loads(manifests["test"].read_text())[0]["world"] == [toy.WORLD, 1]


# --- the checkpoint directory

@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoint")
    toy.make_checkpoint_files(root)
    return root


def test_checkpoint_files(checkpoint, tmp_path):
    toy.make_checkpoint_files(tmp_path)
    files = sorted(p.relative_to(checkpoint) for p in checkpoint.rglob("*") if p.is_file())
    assert len(files) == 15 and sum((checkpoint / f).stat().st_size for f in files) < 100_000
    for file in files:  # deterministic
        assert (tmp_path / file).read_bytes() == (checkpoint / file).read_bytes()
    config = json.loads((checkpoint / "config.json").read_text())
    tokenizer = toy.Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    assert config["vocab_size"] == tokenizer.get_vocab_size() < 640
    assert tokenizer.token_to_id("<|im_end|>") == config["eos_token_id"]
    assert tokenizer.token_to_id("<|endoftext|>") == config["bos_token_id"]
    towers = {name: json.loads((checkpoint / name / "config.json").read_text())
              for name in ("siglip", "whisper", "bert")}
    assert config["mm_hidden_size"] == towers["siglip"]["hidden_size"]
    assert config["audio_hidden_size"] == towers["whisper"]["d_model"]
    assert towers["bert"]["vocab_size"] == len((checkpoint / "bert/vocab.txt").read_text().split("\n")) - 1


def test_tokenizer_knows_the_words_of_this_world(checkpoint):
    tokenizer = toy.Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    texts = [toy.REASONING_QUESTION, toy.CAPTION_QUESTION, "<vi_start><vi_end>\n<au_start>", "Ünknown 42 \u2713\n"]
    texts += [toy.reasoned(*cues, word) for cues in toy.EMOTIONS.values() for word in toy.ALL_WORDS]
    for text in texts:
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    for word in toy.ALL_WORDS:  # one token for the word (with the > before it), so that an answer is one choice
        assert f">{word}" in tokenizer.encode(f"<answer>{word}</answer>").tokens
    for text in [*toy.FACE_TEXT.values(), *toy.VOICE_TEXT.values()]:
        assert len(tokenizer.encode(" " + text).ids) == len(text.split())
    assert len(tokenizer.encode("<|im_start|>user").ids) == 2


def test_bert_covers_the_questions(checkpoint):
    vocabulary = set((checkpoint / "bert/vocab.txt").read_text().split("\n"))
    for question in (toy.LABEL_QUESTION, toy.REASONING_QUESTION, toy.CAPTION_QUESTION):
        pieces = re.findall(r"\w+|[^\w\s]", question.lower())
        assert set(pieces) <= vocabulary and len(pieces) <= 62  # 64 positions with [CLS] and [SEP]


def test_what_stands_twice_is_the_same():
    """toy.py repeats two texts of text.py, so that its drawing processes need not load torch."""
    import text
    assert (toy.LABEL_QUESTION, toy.REASONING_QUESTION) == (text.QUESTION_LABEL, text.QUESTION_REASONING)
    assert toy.QWEN_SPLIT == text.QWEN2_PATTERN
