"""A toy world of seven emotions: drawn faces, synthetic voices, and everything a checkpoint needs but its weights.

An emotion is a face *and* a voice; neither alone tells all seven apart (`EMOTIONS`):

                happy      surprise   fear       angry   disgust    sad        neutral
    face        smile      wide       wide       glare   glare      frown      flat
    voice       high_fast  high_fast  trembling  harsh   low_slow   low_slow   even

A clip is an ordinary mp4 file (H.264 + AAC) of 2 to 3 seconds.  The face starts near neutral and moves into its
expression, blinking and nodding; colours, position, size, line width, speaker and noise vary from clip to clip.
Everything follows from one seed, clip by clip, whatever the number of processes.  The splits (`SPLITS`):

    text        no clips: questions and answers in all tags and words, paired at random, to pretrain a language model
    base        every face with every voice, and what the two do, in words; no emotion is named
    cold_start  <think> names face and voice, <answer> an open-vocabulary word: happy, or joyful, or cheerful
    train, validation, test    the label alone
    test_ood    other colours, lines, speakers, and more noise
    swapped     the face of one test clip with the voice of another, where the table then names another emotion

    python toy.py                              # all clips and manifests, under runs/toy
    python toy.py --splits test test_ood       # some of them
    python toy.py --sheet sheet.png            # a picture of this world
    python toy.py --base toy                   # the base model again, from its seed (about 20 minutes on 2 cores)

Left out: a photograph's light and texture, speech with words in it, faces that disagree with themselves.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import random
import re
import zlib
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import av
import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tqdm import tqdm

# ---------------------------------------------------------------------------------------------------------------------
# The world in words

EMOTIONS = {  # label: (face, voice)
    "happy": ("smile", "high_fast"), "surprise": ("wide", "high_fast"), "fear": ("wide", "trembling"),
    "angry": ("glare", "harsh"), "disgust": ("glare", "low_slow"), "sad": ("frown", "low_slow"),
    "neutral": ("flat", "even"),
}
EMOTION_OF = {cues: emotion for emotion, cues in EMOTIONS.items()}
FACE_TEXT = {"smile": "the mouth smiles", "wide": "the eyes are wide and the mouth is open",
             "glare": "the brows are drawn down in a glare", "frown": "the mouth turns down",
             "flat": "the face stays flat"}
VOICE_TEXT = {"high_fast": "the voice is high and fast", "trembling": "the voice trembles",
              "harsh": "the voice is loud and harsh", "low_slow": "the voice is low and slow",
              "even": "the voice is even"}
# What people write for an emotion when nobody gives them a list, each with its share.  The usual word is the label for
# three emotions of seven only: a model that sees and hears perfectly and then speaks like the cold start is right on
# 3/7 of the clips.  That is the room reinforcement learning has to fill.
WORDS = {
    "happy": {"happy": 0.5, "joyful": 0.25, "cheerful": 0.25},
    "angry": {"angry": 0.5, "furious": 0.25, "irritated": 0.25},
    "sad": {"sad": 0.5, "sorrowful": 0.25, "gloomy": 0.25},
    "surprise": {"surprise": 0.25, "amazed": 0.5, "astonished": 0.25},
    "fear": {"fear": 0.25, "scared": 0.5, "afraid": 0.25},
    "disgust": {"disgust": 0.25, "repelled": 0.5, "revolted": 0.25},
    "neutral": {"neutral": 0.25, "calm": 0.5, "composed": 0.25},
}
ALL_WORDS = [word for words in WORDS.values() for word in words]
LABEL_QUESTION = ("As an emotional recognition expert; throughout the video, which emotion conveyed by the characters "
                  "is the most obvious to you?")
REASONING_QUESTION = LABEL_QUESTION + ("\nOutput the thinking process in <think> </think> and final emotion in "
                                       "<answer> </answer> tags.")
CAPTION_QUESTION = "What do the face and the voice do?"
SPLITS = {"text": 1500, "base": 4000, "cold_start": 420, "train": 560, "validation": 70, "test": 210, "test_ood": 210,
          "swapped": 112}  # entries; all but text have clips
CLIP_SPLITS = tuple(split for split in SPLITS if split != "text")
WORLD = 2  # raise it when pictures, voices or manifests change, and old clips are made anew


def statements(face, voice):
    """What a face and a voice do, in words: "In the video, the mouth smiles. In the audio, the voice is even." """
    return f"In the video, {FACE_TEXT[face]}. In the audio, {VOICE_TEXT[voice]}."


def read_statements(completion):
    """The (face, voice) that a completion states; None for a cue it does not state in the words of this world."""
    def cue(pattern, texts):
        found = re.search(pattern + r",\s*([^.<]*)", completion)
        return {text: name for name, text in texts.items()}.get(found and found[1].strip())
    return cue("In the video", FACE_TEXT), cue("In the audio", VOICE_TEXT)


def follows(completion, answer):
    """Does the answer follow from what the completion states: a word, any word, for the emotion of that face and voice?"""
    emotion = EMOTION_OF.get(read_statements(completion))
    return emotion is not None and answer in WORDS[emotion]


def reasoned(face, voice, word):
    """A full answer: the statements in <think>, the word in <answer>."""
    return f"<think>{statements(face, voice)}</think>\n<answer>{word}</answer>"


# ---------------------------------------------------------------------------------------------------------------------
# Manifests

def make_manifest(split, seed=0):
    """The entries of a split, a list of dicts: video (but for text), conversations, face, voice, emotion or None.

    Proportions are exact and only the order is random: a small split must not be easier or harder by luck.
    """
    rng = random.Random(f"{split} {seed}")  # a string seeds the same way on every machine
    size, rows = SPLITS[split], []          # rows: (question, answer, face, voice, emotion, more keys)
    if split == "text":
        for i in range(size):  # face, voice and word all independent: here the model learns to speak, not to judge
            face, voice, word = rng.choice(list(FACE_TEXT)), rng.choice(list(VOICE_TEXT)), rng.choice(ALL_WORDS)
            if i % 3:
                rows.append((REASONING_QUESTION, reasoned(face, voice, word), face, voice, None, {}))
            else:
                rows.append((CAPTION_QUESTION, statements(face, voice), face, voice, None, {}))
    elif split == "base":
        pairs = itertools.cycle(itertools.product(FACE_TEXT, VOICE_TEXT))
        rows = [(CAPTION_QUESTION, statements(*pair), *pair, None, {}) for pair in itertools.islice(pairs, size)]
    elif split == "cold_start":
        for emotion, cues in EMOTIONS.items():
            for word, share in WORDS[emotion].items():
                row = (REASONING_QUESTION, reasoned(*cues, word), *cues, emotion, {})
                rows += [row] * round(share * size / len(EMOTIONS))
    elif split == "swapped":
        # The clips of the test split by emotion, to take a face from one and a voice from another.
        test = {emotion: [e["video"] for e in make_manifest("test", seed) if e["emotion"] == emotion]
                for emotion in EMOTIONS}
        for i, ((face, voice), a, b) in zip(range(size), itertools.cycle(swaps())):
            sources = {"face_from": rng.choice(test[a]), "voice_from": rng.choice(test[b])}
            emotion = EMOTION_OF[face, voice]
            rows.append((REASONING_QUESTION, emotion, face, voice, emotion, sources))
    else:
        labels = itertools.islice(itertools.cycle(EMOTIONS), size)
        rows = [(REASONING_QUESTION, emotion, *EMOTIONS[emotion], emotion, {}) for emotion in labels]
    rng.shuffle(rows)

    entries = []
    for i, (question, answer, face, voice, emotion, more) in enumerate(rows):
        video = {} if split == "text" else {"video": f"{split}/{i:04d}.mp4"}
        markers = "<video>\n<audio>\n" if video else ""
        entries.append({**video, "conversations": [{"from": "human", "value": markers + question},
                                                   {"from": "gpt", "value": answer}],
                        "face": face, "voice": voice, "emotion": emotion, **more, "world": [WORLD, seed]})
    return entries


def swaps():
    """[((face, voice), A, B)]: the face of A with the voice of B is in the table, and there it is not A.

    Every pair of cues comes twice, so that a cycle over the list is balanced over the answers.
    """
    found = {}
    for a, b in itertools.permutations(EMOTIONS, 2):
        cues = EMOTIONS[a][0], EMOTIONS[b][1]
        if EMOTION_OF.get(cues, a) != a:
            found.setdefault(cues, []).append((a, b))
    return [(cues, *pairs[i % len(pairs)]) for i in range(2) for cues, pairs in found.items()]


# ---------------------------------------------------------------------------------------------------------------------
# Faces.  Face coordinates: origin between the eyes and the mouth, x to the right, y down, 1 = half the head's width.

SIZE, FPS = 96, 10  # pixels; frames per second
#           mouth: curve  width  open | eye height | brow: height  slant (inner end down)
POSES = {
    "flat":  np.array([0.00, 0.34, 0.00, 0.13, 0.50, 0.00]),
    "smile": np.array([0.34, 0.52, 0.00, 0.11, 0.53, 0.00]),
    "frown": np.array([-0.30, 0.40, 0.00, 0.11, 0.50, -0.10]),
    "glare": np.array([0.00, 0.36, 0.00, 0.06, 0.40, 0.19]),
    "wide":  np.array([0.00, 0.16, 0.26, 0.26, 0.72, 0.00]),
}


def draw_face(face, rng, ood=False):
    """-> frames uint8 (T, 96, 96, 3), T = 20 to 30 at 10 per second."""
    # 1. Who: colours (0-255), where the head is (pixels), how thick the lines are (pixels).
    T = int(rng.integers(20, 31))
    if ood:  # masks of blue, green or violet before a dark wall, drawn with another pen
        skin = rng.permuted([rng.uniform(110, 150), rng.uniform(150, 200), rng.uniform(190, 240)])
        wall = rng.uniform(40, 110, (2, 3))
        width = rng.uniform(3.8, 4.6) if rng.random() < 0.5 else rng.uniform(7.4, 8.6)
    else:    # light to dark skin before a brighter wall
        skin = np.array([255, 224, 196]) - rng.uniform(0, 1) * np.array([80, 104, 112]) + rng.uniform(-25, 25, 3)
        wall = rng.uniform(115, 250, (2, 3))
        width = rng.uniform(4.8, 7.2)
    line, mouth_red = rng.uniform(0, 50, 3), np.array([130, 30, 40]) + rng.uniform(-20, 20, 3)
    white = 3 * [rng.uniform(235, 255)]
    scale = 43 * rng.uniform(0.9, 1.1)                    # pixels per unit of face coordinates
    centre = SIZE / 2 + rng.uniform(-3, 3, 2)

    # 2. Acting: pose (T, 6) from nearly flat to the expression, done after a quarter of the clip; then it only sways.
    time = np.arange(T) / T
    onset = np.clip((time - rng.uniform(0, 0.05)) / rng.uniform(0.15, 0.2), 0, 1)
    onset = onset * onset * (3 - 2 * onset) * rng.uniform(0.85, 1.1)
    onset *= 1 + 0.06 * np.sin(2 * np.pi * (rng.uniform(1, 2) * time + rng.random()))
    pose = POSES["flat"] + onset[:, None] * (POSES[face] - POSES["flat"])
    curve, mouth_width, mouth_open, eye, brow, slant = (p[:, None, None].astype(np.float32) for p in pose.T)
    blink = np.abs(np.arange(T) - rng.uniform(0.3, 0.95) * T) < 0.6  # one frame, sometimes two
    eye = np.where(blink[:, None, None], np.float32(0.05), eye)

    # 3. Coordinates of each pixel of each frame, (T, 96, 96): the head sways, nods and rolls a little.
    sway = np.sin(2 * np.pi * (rng.uniform(0.4, 1.2, 3) * time[:, None] + rng.random(3))) * [2.0, 1.5, 0.05]
    x0, y0, roll = (s[:, None, None].astype(np.float32) for s in sway.T)
    pixels = np.arange(SIZE, dtype=np.float32) + 0.5
    px, py = (pixels[None, None, :] - x0 - centre[0]) / scale, (pixels[None, :, None] - y0 - centre[1]) / scale
    x, y = (px + roll * py).astype(np.float32), (py - roll * px).astype(np.float32)

    # 4. Paint.  Distances are in pixels, negative inside; half a pixel each side of an edge is blended.
    half = np.float32(width / 2)
    image = np.empty((3, T, SIZE, SIZE), np.float32)  # colours first: numpy is 20 times faster on long rows
    image[:] = (wall[0] + (wall[1] - wall[0]) * (pixels / SIZE)[:, None]).T[:, None, :, None]

    def paint(rows, distance, colour):
        cover = np.clip(0.5 - distance, 0, 1)
        for plane, value in zip(image[:, :, rows], colour):
            plane += cover * (np.float32(value) - plane)

    everywhere, upper, lower = slice(None), slice(0, 64), slice(48, SIZE)  # eyes and mouth stay in their rows
    head = scale * ellipse(x, y, 0.98, 1.08)
    paint(everywhere, head, skin)
    paint(everywhere, np.abs(head) - half, line)

    u, v = np.abs(x[:, upper]) - 0.42, y[:, upper] + 0.14      # about an eye; the other one is its mirror image
    lid = scale * ellipse(u, v, 0.17 + 0.25 * np.maximum(eye - 0.13, 0), eye)
    paint(upper, lid, white)
    paint(upper, np.maximum(scale * (np.sqrt(u * u + v * v) - 0.09), lid), line)
    paint(upper, np.abs(lid) - 0.8 * half, line)
    along = np.clip(u, -0.22, 0.24)                            # the brow: a straight line from inner to outer end
    paint(upper, scale * np.hypot(u - along, v + brow - 0.14 + slant * along / 0.23) - half, line)

    u, v = x[:, lower], y[:, lower] - 0.50
    hole = scale * ellipse(u, v, 0.6 * mouth_open + 0.05, mouth_open + 1e-3)
    paint(lower, np.where(mouth_open > 0.03, hole, 9), mouth_red)
    paint(lower, np.where(mouth_open > 0.03, np.abs(hole), 9) - half, line)
    along = np.clip(u, -mouth_width, mouth_width)              # the lips: a parabola, its ends up where curve > 0
    slope = -2 * curve * along / mouth_width**2
    lips = np.hypot(u - along, (v - curve * (0.5 - (along / mouth_width) ** 2)) / np.sqrt(1 + slope**2))
    paint(lower, np.where(mouth_open > 0.08, 9, scale * lips) - half, line)
    return np.ascontiguousarray(np.clip(image + 0.5, 0, 255).astype(np.uint8).transpose(1, 2, 3, 0))


def ellipse(x, y, rx, ry):
    """Distance to an ellipse about the origin, to first order (exact on the line itself): f / |grad f|."""
    k = np.sqrt((x / rx) ** 2 + (y / ry) ** 2)
    return k * (k - 1) / np.maximum(np.sqrt((x / rx**2) ** 2 + (y / ry**2) ** 2), 1e-3)


# ---------------------------------------------------------------------------------------------------------------------
# Voices: a sum of harmonics, shaped into syllables

RATE = 16000  # samples per second
VOICES = {    # pitch in Hz; syllables per second; slide: pitch over a syllable and over the clip; loudness: RMS
    "high_fast": dict(pitch=(300, 380), syllables=(5.5, 6.5), slide=0.20, tilt=1.0, tremble=0, drive=0, loudness=0.14),
    "trembling": dict(pitch=(190, 240), syllables=(2.5, 3.5), slide=0.00, tilt=1.2, tremble=1, drive=0, loudness=0.05),
    "harsh":     dict(pitch=(130, 170), syllables=(3.5, 4.5), slide=-0.05, tilt=0.3, tremble=0, drive=3, loudness=0.30),
    "low_slow":  dict(pitch=(90, 130), syllables=(1.5, 2.0), slide=-0.20, tilt=1.2, tremble=0, drive=0, loudness=0.10),
    "even":      dict(pitch=(180, 220), syllables=(2.8, 3.2), slide=0.00, tilt=1.0, tremble=0, drive=0, loudness=0.10),
}


def draw_voice(voice, seconds, rng, ood=False):
    """-> waveform float32 (seconds * 16000,), mono, within -1 and 1."""
    # 1. Who speaks, how loud, and in what noise.
    style, n = VOICES[voice], round(seconds * RATE)
    if ood:  # deeper or higher than any speaker of the other splits, in a noisier room
        speaker = rng.uniform(0.78, 0.88) if rng.random() < 0.5 else rng.uniform(1.15, 1.3)
        noise = rng.uniform(0.012, 0.02)
    else:
        speaker, noise = rng.uniform(0.9, 1.1), 10 ** rng.uniform(-3.3, -2)  # 0.0005 to 0.01
    loudness = style["loudness"] * rng.uniform(0.8, 1.2)
    pitch, tempo = speaker * rng.uniform(*style["pitch"]), rng.uniform(*style["syllables"])
    time = np.arange(n, dtype=np.float32) / RATE

    # 2. Syllables, their tempo a little uneven: place is 0 to 1 in each.
    place = (tempo * time + 0.12 * np.sin(2 * np.pi * (0.8 * time + rng.random())) + rng.random()) % 1
    envelope = np.sin(np.pi * place) ** 0.7

    # 3. Pitch: slides up or down in each syllable and over the clip; fear shakes it, and the loudness with it.
    hertz = pitch * (1 + style["slide"] * (place - 0.5 + time / seconds - 0.5))
    shake = style["tremble"] * np.sin(2 * np.pi * (rng.uniform(7, 9) * time + rng.random()))
    hertz, envelope = hertz * (1 + 0.12 * shake), envelope * (1 + 0.8 * shake) / 1.8
    phase = np.cumsum(2 * np.pi * hertz / RATE).astype(np.float32)

    # 4. Harmonics, weaker with their number; a harsh voice is driven into clipping, and rasps.
    start, sound = rng.uniform(0, 2 * np.pi, 12), np.zeros(n, np.float32)
    for k in range(1, 13):
        if k * pitch < 0.4 * RATE:
            sound += np.sin(k * phase + np.float32(start[k - 1])) / k ** style["tilt"]
    hiss = rng.standard_normal(n, dtype=np.float32)
    if style["drive"]:
        sound = np.tanh(style["drive"] * sound) + 0.25 * hiss
    sound *= envelope
    sound *= loudness / np.sqrt(np.mean(sound**2))
    return np.clip(sound + noise * rng.standard_normal(n, dtype=np.float32), -1, 1).astype(np.float32)


# ---------------------------------------------------------------------------------------------------------------------
# Clips

def draw_clip(entry):
    """A manifest entry -> frames uint8 (T, 96, 96, 3), waveform float32 (T * 1600,).

    Face and voice have a random generator each, named by seed and clip: a swapped clip shows the very face of the one
    test clip and has the very voice of the other.
    """
    def rng(part):
        name = f"{entry.get(part + '_from', entry['video'])} {part}"
        return np.random.default_rng([entry["world"][1], zlib.crc32(name.encode())])
    ood = entry["video"].startswith("test_ood/")
    frames = draw_face(entry["face"], rng("face"), ood)
    return frames, draw_voice(entry["voice"], len(frames) / FPS, rng("voice"), ood)


def write_clip(path, frames, waveform):
    """Writes frames (T, H, W, 3) uint8 and waveform (samples,) float32 as an mp4 file: H.264 and AAC."""
    with av.open(str(path), "w", format="mp4") as container:
        video = container.add_stream("libx264", rate=FPS, options={"preset": "veryfast", "crf": "20"})
        video.height, video.width, video.pix_fmt = *frames.shape[1:3], "yuv420p"
        video.codec_context.thread_count = 1  # the pool already keeps every core busy
        audio = container.add_stream("aac", rate=RATE, layout="mono", options={"aac_coder": "fast"})
        audio.bit_rate = 48000
        sound = av.AudioFrame.from_ndarray(waveform[None], format="fltp", layout="mono")
        sound.sample_rate = RATE
        for stream, pictures in ((video, map(av.VideoFrame.from_ndarray, frames)), (audio, [sound])):
            for frame in itertools.chain(pictures, [None]):  # None: what the encoder still holds
                container.mux(stream.encode(frame))


def _make_clip(task):  # in a process of its own, so at the top level of the module
    path, entry = task
    write_clip(path, *draw_clip(entry))


def make_clips(root, splits=CLIP_SPLITS, seed=0):
    """Writes root/{split}/{i:04d}.mp4 and, last, root/{split}.json; returns {split: path of its manifest}.

    A manifest on disk means that its split is complete.  One of the same seed and world is kept as it is.
    """
    root, manifests = Path(root), {split: Path(root) / f"{split}.json" for split in splits}
    cores = min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
    # Spawned, not forked: a caller with torch loaded has threads that a fork would leave half alive.  Workers start
    # with the first task, so a call that finds everything in place costs nothing.
    with ProcessPoolExecutor(cores, multiprocessing.get_context("spawn")) as pool:
        for split, manifest in manifests.items():
            entries = make_manifest(split, seed)
            if manifest.exists():
                if json.loads(manifest.read_text(encoding="utf-8")) == entries:
                    continue
                manifest.unlink()
            tasks = [(root / entry["video"], entry) for entry in entries if "video" in entry]
            (root / split if tasks else root).mkdir(parents=True, exist_ok=True)
            done = pool.map(_make_clip, tasks, chunksize=8)
            for _ in tqdm(done, f"drawing {split}", len(tasks), unit="clip", disable=not tasks):
                pass
            write_json(manifest, entries)
    return manifests


def write_json(path, value):
    """Writes a JSON file whole or not at all."""
    partial = Path(f"{path}.partial")
    partial.write_text(json.dumps(value, indent=1, ensure_ascii=False, default=str) + "\n", encoding="utf-8")
    os.replace(partial, path)


# ---------------------------------------------------------------------------------------------------------------------
# A checkpoint directory, all but the weights

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
QWEN_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
              r"|\s+(?!\S)|\s+")
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")


def train_tokenizer():
    """-> byte-level BPE with Qwen's rules and special tokens, in which the words of this world are single tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(QWEN_SPLIT), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder, tokenizer.post_processor = decoders.ByteLevel(), processors.ByteLevel(trim_offsets=False)
    prompt = ["system\nYou are a helpful assistant.\n", "user\n<vi_start>", "<vi_end>\n<au_start>", "<au_end>\n",
              LABEL_QUESTION, REASONING_QUESTION, CAPTION_QUESTION, "assistant\n"]
    answers = [reasoned(*cues, word) for cues in itertools.product(FACE_TEXT, VOICE_TEXT) for word in ALL_WORDS]
    trainer = trainers.BpeTrainer(vocab_size=640 - len(SPECIAL_TOKENS), show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(100 * prompt + answers, trainer)
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    return tokenizer


def make_checkpoint_files(root):
    """Writes what a published checkpoint directory holds beside its weights: configurations and tokenizers."""
    root = Path(root)
    for folder in ("siglip", "whisper", "bert"):
        (root / folder).mkdir(parents=True, exist_ok=True)

    # 1. The language model's tokenizer.
    tokenizer = train_tokenizer()
    tokenizer.save(str(root / "tokenizer.json"))
    tokenizer.model.save(str(root))  # vocab.json and merges.txt
    ids = {token: tokenizer.token_to_id(token) for token in SPECIAL_TOKENS}
    plain = dict(lstrip=False, normalized=False, rstrip=False, single_word=False)
    write_json(root / "added_tokens.json", ids)
    write_json(root / "special_tokens_map.json", {
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        "eos_token": {"content": "<|im_end|>", **plain}, "pad_token": {"content": "<|endoftext|>", **plain}})
    write_json(root / "tokenizer_config.json", {
        "added_tokens_decoder": {str(i): {"content": token, **plain, "special": True} for token, i in ids.items()},
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"], "bos_token": None, "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False, "eos_token": "<|im_end|>", "errors": "replace",
        "model_max_length": 2048, "pad_token": "<|endoftext|>", "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer", "unk_token": None})

    # 2. The language model and the projectors.
    write_json(root / "config.json", dict(
        architectures=["HumanOmniQwen2ForCausalLM"], model_type="HumanOmni_qwen2", attention_dropout=0.0,
        hidden_act="silu", hidden_size=96, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, rms_norm_eps=1e-6, rope_theta=1e6, rope_scaling=None, max_position_embeddings=2048,
        max_window_layers=28, sliding_window=4096, use_sliding_window=False, tie_word_embeddings=True,
        vocab_size=tokenizer.get_vocab_size(), bos_token_id=ids["<|endoftext|>"], eos_token_id=ids["<|im_end|>"],
        initializer_range=0.02, image_aspect_ratio="pad", num_frames=4, mm_hidden_size=64, audio_hidden_size=64,
        mm_vision_tower="siglip-toy", mm_audio_tower="whisper-toy", mm_projector_type="all_in_one_small",
        mm_audio_projector_type="mlp2x_gelu", mm_vision_select_layer=-2, mm_vision_select_feature="patch",
        mm_use_x_start_end=True, use_mm_proj=True, use_cache=True, torch_dtype="float32"))
    write_json(root / "generation_config.json", {
        "eos_token_id": ids["<|im_end|>"], "pad_token_id": ids["<|endoftext|>"]})

    # 3. The towers: 64-pixel frames, 3 seconds of sound.
    write_json(root / "siglip/config.json", dict(
        architectures=["SiglipVisionModel"], model_type="siglip_vision_model", attention_dropout=0.0,
        hidden_act="gelu_pytorch_tanh", hidden_size=64, intermediate_size=128, num_hidden_layers=3,
        num_attention_heads=4, num_channels=3, image_size=64, patch_size=16, layer_norm_eps=1e-6))
    write_json(root / "siglip/preprocessor_config.json", dict(
        image_processor_type="SiglipImageProcessor", do_resize=True, do_rescale=True, do_normalize=True, resample=3,
        rescale_factor=1 / 255, image_mean=[0.5] * 3, image_std=[0.5] * 3, size={"height": 64, "width": 64}))
    write_json(root / "whisper/config.json", dict(
        architectures=["WhisperForAudioClassification"], model_type="whisper", activation_function="gelu",
        activation_dropout=0.0, attention_dropout=0.0, dropout=0.0, encoder_layerdrop=0.0, d_model=64,
        encoder_layers=2, num_hidden_layers=2, encoder_attention_heads=4, encoder_ffn_dim=128, num_mel_bins=128,
        max_source_positions=150, max_target_positions=448, decoder_layers=1, decoder_attention_heads=1,
        decoder_ffn_dim=4, classifier_proj_size=8, vocab_size=51, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=1, scale_embedding=False))
    write_json(root / "whisper/preprocessor_config.json", dict(
        feature_extractor_type="WhisperFeatureExtractor", feature_size=128, sampling_rate=RATE, hop_length=160,
        n_fft=400, chunk_length=3, n_samples=3 * RATE, nb_max_frames=300, padding_side="right", padding_value=0.0,
        return_attention_mask=False))

    # 4. BERT: single characters, for any question, and the words of ours.
    words = re.findall(r"\w+", " ".join([REASONING_QUESTION, CAPTION_QUESTION, *ALL_WORDS]).lower())
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *("##" + c for c in letters),
                  *"!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~", *sorted({word for word in words if len(word) > 1})]
    (root / "bert/vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    write_json(root / "bert/tokenizer_config.json", dict(
        tokenizer_class="BertTokenizer", do_lower_case=True, model_max_length=64))
    write_json(root / "bert/config.json", dict(
        architectures=["BertModel"], model_type="bert", attention_probs_dropout_prob=0.1, hidden_dropout_prob=0.1,
        hidden_act="gelu", hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        layer_norm_eps=1e-12, max_position_embeddings=64, type_vocab_size=2, pad_token_id=0, initializer_range=0.02,
        position_embedding_type="absolute", vocab_size=len(vocabulary)))


# ---------------------------------------------------------------------------------------------------------------------
# Commands

def draw_sheet(path, seed=0, frames=6):
    """Draws a picture of the world: for each emotion a clip of the ordinary kind and one of test_ood."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(len(EMOTIONS), 2 * (frames + 2), figsize=(4 * frames, 1.35 * len(EMOTIONS)),
                                gridspec_kw={"width_ratios": 2 * ([1] * frames + [2, 0.15])})
    for row, emotion in zip(axes, EMOTIONS):
        for split, cells in (("test", row[:frames + 2]), ("test_ood", row[frames + 2:])):
            clip = next(e for e in make_manifest(split, seed) if e["emotion"] == emotion)
            pictures, waveform = draw_clip(clip)
            for cell, i in zip(cells, np.linspace(0, len(pictures) - 1, frames).round().astype(int)):
                cell.imshow(pictures[i])
            cells[frames].specgram(waveform, NFFT=512, Fs=RATE, noverlap=352, vmin=-120, vmax=-30)
            cells[frames].set_ylim(0, 4000)
            cells[frames].set_aspect("auto")
            cells[0].set_title(f"{emotion} ({split}): {clip['face']}, {clip['voice']}", loc="left", fontsize=9)
            for cell in cells:
                cell.axis("off")
    figure.tight_layout(pad=0.3)
    figure.savefig(path, dpi=80)


# ---------------------------------------------------------------------------------------------------------------------
# Models: the three stages of the paper in miniature.  train_sft.py is imported where it is used: it reads this file in
# its turn, by way of evaluate.py.

BASE = Path(__file__).parent / "toy"  # the base model as shipped
ROOT = Path("runs/toy")


def new_model(root, seed=0):
    """Writes a checkpoint with random weights and the toy's sizes, tokenizer and vocabulary to the folder root."""
    import torch
    from model import HumanOmni, read_companions, read_config
    make_checkpoint_files(root)
    folders = {name: Path(root) / name for name in ("siglip", "whisper", "bert")}
    torch.manual_seed(seed)
    model = HumanOmni({"llm": read_config(Path(root) / "config.json"),
                       **{name: read_config(folder / "config.json") for name, folder in folders.items()}})
    for embedding in (model.embed_tokens, model.vision_tower.embeddings.position_embedding, model.audio_tower.embed_positions):
        torch.nn.init.normal_(embedding.weight, std=0.02)  # torch's own std of 1 would drown what they are added to
    model.files = read_companions(root, folders)
    model.save_pretrained(root)


def train_base(out, seed=0, root=ROOT):
    """The base model, from nothing: first the language model on text alone, so that it can speak before it sees, then
    everything but BERT on what face and voice do.  Plays the part of HumanOmni-0.5B, which was pretrained elsewhere.
    """
    import train_sft
    from distributed import first
    clips, work = first(lambda: make_clips(root, ("text", "base"))), Path(root) / f"base_{seed}"
    first(lambda: new_model(work / "new", seed))
    common = ["--seed", str(seed), "--batch-size", "32"]
    train_sft.main(["--model", str(work / "new"), "--data", str(clips["text"]), "--out", str(work / "text"),
                    "--steps", "400", "--lr", "3e-3", "--save-dtype", "float32", *common])
    train_sft.main(["--model", str(work / "text"), "--data", str(clips["base"]), "--out", str(out), "--train-towers",
                    "--steps", "900", "--lr", "1e-3", *common])
    first(lambda: (Path(out) / "text_metrics.jsonl").write_bytes((work / "text" / "metrics.jsonl").read_bytes()))


def train_cold_start(base, out, seed=0, root=ROOT):
    """The cold start: a few hundred clips with reasoning, towers frozen from here on (paper, section 3.1)."""
    import train_sft
    from distributed import first
    clips = first(lambda: make_clips(root, ("cold_start",)))
    train_sft.main(["--model", str(base), "--data", str(clips["cold_start"]), "--out", str(out), "--steps", "240",
                    "--lr", "1e-3", "--seed", str(seed)])


def prepare(seed=0, root=ROOT):
    """What `python train_grpo.py` needs and nobody gave: a cold-started model, and training, validation, test manifests.

    Whatever exists is used as it is; a cold start made from another base or world is made anew.
    """
    from distributed import first  # imports torch; the drawing processes do without
    clips = first(lambda: make_clips(root, ("train", "validation", "test", "test_ood", "swapped")))
    base = BASE
    if not (base / "model.safetensors").exists():
        base = Path(root) / f"base_{seed}" / "trained"
        if not (base / "model.safetensors").exists():
            train_base(base, seed, root)
    model = Path(root) / f"cold_start_{seed}"
    made_from = {"base": zlib.crc32((base / "model.safetensors").read_bytes()), "world": WORLD, "seed": seed}
    stamp = model / "made_from.json"
    if not stamp.exists() or json.loads(stamp.read_text(encoding="utf-8")) != made_from:
        train_cold_start(base, model, seed, root)
        first(lambda: write_json(stamp, made_from))
    return model, clips


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/toy", help="folder for clips and manifests")
    parser.add_argument("--seed", type=int, default=0, help="of the world, or of the base model's training")
    parser.add_argument("--splits", nargs="+", choices=SPLITS, default=list(SPLITS), help="which splits to make")
    parser.add_argument("--sheet", metavar="PNG", help="only draw a picture of the world to this file")
    parser.add_argument("--base", metavar="DIR", help="train the base model from nothing and write it to this folder")
    args = parser.parse_args()
    if args.base:
        return train_base(args.base, args.seed, args.out)
    if args.sheet:
        return draw_sheet(args.sheet, args.seed)
    for split, manifest in make_clips(args.out, args.splits, args.seed).items():
        clips = list((Path(args.out) / split).glob("*.mp4"))
        print(f"{manifest}: {SPLITS[split]} entries, {sum(c.stat().st_size for c in clips) / 1e6:.1f} MB of clips")


if __name__ == "__main__":
    main()
