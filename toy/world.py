"""The words and rules of the toy world, and the manifests that follow from them.

To try another world, change the constants below.
"""

import itertools
import random
import re
from dataclasses import dataclass, field

from rewards import extract_answer

# Raise it when pictures, voices or manifests change, and old clips are made anew. World 3 draws
# what world 2 drew (the shipped base is made with that), into files that are the same everywhere.
WORLD = 3

# label: (face, voice)
EMOTIONS = {
    "happy": ("smile", "high_fast"),
    "surprise": ("wide", "high_fast"),
    "fear": ("wide", "trembling"),
    "angry": ("glare", "harsh"),
    "disgust": ("glare", "low_slow"),
    "sad": ("frown", "low_slow"),
    "neutral": ("flat", "even"),
}
EMOTION_OF = {cues: emotion for emotion, cues in EMOTIONS.items()}
FACE_TEXT = {
    "smile": "the mouth smiles",
    "wide": "the eyes are wide and the mouth is open",
    "glare": "the brows are drawn down in a glare",
    "frown": "the mouth turns down",
    "flat": "the face stays flat",
}
VOICE_TEXT = {
    "high_fast": "the voice is high and fast",
    "trembling": "the voice trembles",
    "harsh": "the voice is loud and harsh",
    "low_slow": "the voice is low and slow",
    "even": "the voice is even",
}
# What people write for an emotion when nobody gives them a list, each with its share. The usual
# word is the label for three emotions of seven only: a model that sees and hears perfectly and then
# speaks like the cold start is right on 3/7 of the clips. That is the room reinforcement learning
# has to fill.
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

# The first two are text.py's, repeated so that whoever draws clips need not load torch.
LABEL_QUESTION = (
    "As an emotional recognition expert; throughout the video, which emotion conveyed by the "
    "characters is the most obvious to you?"
)
REASONING_QUESTION = (
    f"{LABEL_QUESTION}\nOutput the thinking process in <think> </think> and final emotion in "
    "<answer> </answer> tags."
)
CAPTION_QUESTION = "What do the face and the voice do?"

# Entries of each split; all but text have clips.
SPLITS = {
    "text": 1500,
    "base": 4000,
    "cold_start": 420,
    "train": 560,
    "validation": 70,
    "test": 210,
    "test_ood": 210,
    "swapped": 112,
}
CLIP_SPLITS = tuple(split for split in SPLITS if split != "text")


# --------------------------------------------------------------------------------------------------
# Statements: what a completion says, and whether it is true


def statements(face, voice):
    """What a face and a voice do, in words:
    "In the video, the mouth smiles. In the audio, the voice is even." """
    return f"In the video, {FACE_TEXT[face]}. In the audio, {VOICE_TEXT[voice]}."


def reasoned(face, voice, word):
    """A full answer: the statements in <think>, the word in <answer>."""
    return f"<think>{statements(face, voice)}</think>\n<answer>{word}</answer>"


def read_statements(completion):
    """The (face, voice) that a completion states; None for a cue it does not state in the words of
    this world."""
    face = read_cue(completion, "In the video", FACE_TEXT)
    voice = read_cue(completion, "In the audio", VOICE_TEXT)
    return face, voice


def read_cue(completion, opening, texts):
    """The name in `texts` of what follows the opening words, or None."""
    found = re.search(opening + r",\s*([^.<]*)", completion)
    names = {text: name for name, text in texts.items()}
    return names.get(found[1].strip()) if found else None


def follows(completion, answer):
    """Does the answer follow from what the completion states: a word, any word, for the emotion of
    that face and voice?"""
    emotion = EMOTION_OF.get(read_statements(completion))
    return emotion is not None and answer in WORDS[emotion]


def check_statements(row):
    """What is known here and can only be asked elsewhere (paper, section 5.2): are the statements
    of a completion true, and does its answer follow from them, true or not?

    row: a dict with "completion", "label" and "extra", the further keys of its manifest entry.
    Returns {"face_true", "voice_true", "eea", "epc", "fcr"}, bools: the statements are true; the
    emotion that follows from them is the label, is what the answer means, and both with the answer
    right. {} where the entry does not say what face and voice do.
    """
    extra = row["extra"]
    if "face" not in extra or "voice" not in extra:
        return {}
    completion = row["completion"]
    face, voice = read_statements(completion)
    answer, label = extract_answer(completion), row["label"]
    right = EMOTION_OF.get((face, voice)) == label
    return {
        "face_true": face == extra["face"],
        "voice_true": voice == extra["voice"],
        "eea": right,
        "epc": follows(completion, answer),
        "fcr": right and answer == label,
    }


# --------------------------------------------------------------------------------------------------
# Manifests


@dataclass
class Row:
    """A manifest entry before it has its place in the split, and with it its clip."""

    question: str
    answer: str
    cues: tuple  # (face, voice)
    emotion: str | None = None  # None: not asked for
    extra: dict = field(default_factory=dict)  # further keys: a swapped clip's sources, a wall


def make_manifest(split, seed=0):
    """The entries of a split, a list of dicts: video (but for text), conversations, face, voice,
    emotion or None.

    Proportions are exact and only the order is random: a small split must not be easier or harder
    by luck.
    """
    rng = random.Random(f"{split} {seed}")  # a string seeds the same way on every machine
    if split == "text":
        rows = text_rows(rng)
    elif split == "base":
        rows = base_rows()
    elif split == "cold_start":
        rows = cold_start_rows()
    elif split == "swapped":
        rows = swapped_rows(rng, seed)
    else:
        rows = label_rows(split)
    rng.shuffle(rows)
    return [make_entry(split, index, row, seed) for index, row in enumerate(rows)]


def text_rows(rng):
    """Face, voice and word all independent: here the model learns to speak, not to judge."""
    rows = []
    for i in range(SPLITS["text"]):
        face, voice = rng.choice(list(FACE_TEXT)), rng.choice(list(VOICE_TEXT))
        word = rng.choice(ALL_WORDS)
        if i % 3:
            rows.append(Row(REASONING_QUESTION, reasoned(face, voice, word), (face, voice)))
        else:
            rows.append(Row(CAPTION_QUESTION, statements(face, voice), (face, voice)))
    return rows


def base_rows():
    """Every face with every voice, in turn."""
    pairs = itertools.cycle(itertools.product(FACE_TEXT, VOICE_TEXT))
    return [
        Row(CAPTION_QUESTION, statements(*cues), cues)
        for cues in itertools.islice(pairs, SPLITS["base"])
    ]


def cold_start_rows():
    """As many of each emotion; its words by their shares."""
    rows = []
    for emotion, cues in EMOTIONS.items():
        for word, share in WORDS[emotion].items():
            row = Row(REASONING_QUESTION, reasoned(*cues, word), cues, emotion)
            rows += [row] * round(share * SPLITS["cold_start"] / len(EMOTIONS))
    return rows


def label_rows(split):
    """The emotions in turn, each with its label for an answer."""
    emotions = itertools.islice(itertools.cycle(EMOTIONS), SPLITS[split])
    return [Row(REASONING_QUESTION, emotion, EMOTIONS[emotion], emotion) for emotion in emotions]


def swapped_rows(rng, seed):
    """The face of one clip of the test split, the voice of another, and what the table says of the
    two together."""
    clips = {emotion: [] for emotion in EMOTIONS}
    for entry in make_manifest("test", seed):
        clips[entry["emotion"]].append(entry["video"])
    rows = []
    for cues, a, b in itertools.islice(itertools.cycle(swaps()), SPLITS["swapped"]):
        extra = {"face_from": rng.choice(clips[a]), "voice_from": rng.choice(clips[b])}
        emotion = EMOTION_OF[cues]
        rows.append(Row(REASONING_QUESTION, emotion, cues, emotion, extra))
    return rows


def swaps():
    """[((face, voice), A, B)]: the face of A with the voice of B is in the table, and there it is
    not A.

    Every pair of cues comes twice, so that a cycle over the list is balanced over the answers.
    """
    found = {}
    for a, b in itertools.permutations(EMOTIONS, 2):
        cues = EMOTIONS[a][0], EMOTIONS[b][1]
        if EMOTION_OF.get(cues, a) != a:
            found.setdefault(cues, []).append((a, b))
    return [(cues, *pairs[i % len(pairs)]) for i in range(2) for cues, pairs in found.items()]


def make_entry(split, index, row, seed):
    """A row as it stands in the manifest of its split."""
    video = {} if split == "text" else {"video": f"{split}/{index:04d}.mp4"}
    markers = "<video>\n<audio>\n" if video else ""
    face, voice = row.cues
    return {
        **video,
        "conversations": [
            {"from": "human", "value": markers + row.question},
            {"from": "gpt", "value": row.answer},
        ],
        "face": face,
        "voice": voice,
        "emotion": row.emotion,
        **row.extra,
        "world": [WORLD, seed],
    }
