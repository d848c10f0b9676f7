"""Other worlds of the same faces and voices: what the labels are worth, and what they depend on.

    python -m toy --wrong 0.5               a wrong label on half of the training clips
    python -m toy --wrong 0.4 --confused    wrong in the way people are (CONFUSIONS)
    python -m toy --labelled 42             few labelled clips
    python -m toy --films                   some emotions are rare, as in films (FILMS)
    python -m toy --rule                    the label is worked out, of a face's valence and a
                                            voice's arousal; ten pairs occur only in a test
    python -m toy --scene 0.9               the wall's colour tells nine labels of ten in training,
                                            and none in the test

What a world does not change is the toy's own. Its manifests lie beside the toy's; clips are drawn
only where it needs other ones.
"""

import copy
import itertools
import random
from collections import Counter
from dataclasses import dataclass, fields

from rewards import extract_answer
from support.errors import require
from toy.drawing import write_split
from toy.world import (
    CAPTION_QUESTION,
    EMOTION_OF,
    EMOTIONS,
    FACE_TEXT,
    LABEL_QUESTION,
    REASONING_QUESTION,
    SPLITS,
    VOICE_TEXT,
    WORDS,
    Row,
    label_rows,
    make_entry,
    make_manifest,
    reasoned,
    statements,
)


@dataclass(frozen=True)
class World:
    """In what a world differs from the toy. The defaults: in nothing."""

    wrong: float = 0.0  # share of wrong labels in training and validation, of each emotion
    confused: bool = False  # wrong by CONFUSIONS, and not by any other emotion
    labelled: int = 0  # clips to train on, as many of each emotion; 0: all
    films: bool = False  # emotions in training and validation as frequent as in FILMS
    rule: bool = False  # labels by RULE; SEEN pairs alone, but for the split test_unseen
    scene: float = -1.0  # share of training clips whose wall tells the label; below 0: any walls

    def __post_init__(self):
        require(
            not self.rule or not (self.confused or self.labelled or self.films or self.scene >= 0),
            "the rule's labels are not those of --confused, --labelled, --films and --scene",
        )
        require(not self.films or not self.labelled, "--films says how many clips, --labelled too")
        wholes = range(0, SPLITS["train"] + 1, len(EMOTIONS))
        require(
            self.labelled in wholes,
            f"--labelled must be a multiple of {len(EMOTIONS)} up to {SPLITS['train']}, not "
            f"{self.labelled}",
        )
        require(self.wrong or not self.confused, "--confused needs a share of --wrong labels")

    @property
    def name(self):
        changed = []
        for f in fields(self):
            value = getattr(self, f.name)
            if value != f.default:
                changed.append(f.name if value is True else f"{f.name}_{value}")
        return "_".join(changed) or "toy"


# What is easily taken for what: the same glare or low voice, the same high voice, the same wide
# eyes, and what does not show much.
CONFUSIONS = {
    "angry": "disgust",
    "disgust": "angry",
    "sad": "disgust",
    "happy": "surprise",
    "surprise": "happy",
    "fear": "surprise",
    "neutral": "sad",
}

# Clips of each emotion among the 12 059 with a single label of DFEW (Jiang et al., 2020,
# arXiv:2008.05924).
FILMS = {
    "neutral": 2709,
    "happy": 2488,
    "angry": 2229,
    "sad": 2008,
    "surprise": 1498,
    "fear": 981,
    "disgust": 146,
}

# The rule world: (valence of the face, arousal of the voice) -> label, with the words that people
# write for it.
VALENCE = {
    "smile": "pleasant",
    "wide": "neither",
    "flat": "neither",
    "glare": "unpleasant",
    "frown": "unpleasant",
}
AROUSAL = {
    "high_fast": "high",
    "trembling": "high",
    "harsh": "high",
    "low_slow": "low",
    "even": "low",
}
RULE = {
    ("pleasant", "high"): "happy",
    ("pleasant", "low"): "neutral",
    ("neither", "high"): "surprise",
    ("neither", "low"): "bored",
    ("unpleasant", "high"): "angry",
    ("unpleasant", "low"): "sad",
}
RULE_WORDS = {label: WORDS.get(label) for label in RULE.values()}
RULE_WORDS["bored"] = {"bored": 0.25, "listless": 0.5, "indifferent": 0.25}
# Of each face three voices, and of each label some pairs on either side.
_SEEN = {
    "smile": ("high_fast", "harsh", "low_slow"),
    "wide": ("trembling", "low_slow", "even"),
    "glare": ("high_fast", "harsh", "even"),
    "frown": ("high_fast", "trembling", "low_slow"),
    "flat": ("trembling", "harsh", "even"),
}
SEEN = [(face, voice) for face, voices in _SEEN.items() for voice in voices]
UNSEEN = [pair for pair in itertools.product(VALENCE, AROUSAL) if pair not in SEEN]

# The scene world: the wall that tells an emotion, where walls tell.
WALLS = ("red", "orange", "yellow", "green", "blue", "violet", "grey")
WALL_OF = dict(zip(EMOTIONS, WALLS))


def rule_label(face, voice):
    return RULE[VALENCE[face], AROUSAL[voice]]


def stated_label(world, cues):
    """The label that a stated (face, voice) has in this world; None if it has none."""
    if None in cues:
        return None
    return rule_label(*cues) if world.rule else EMOTION_OF.get(cues)


# --------------------------------------------------------------------------------------------------
# Manifests


def make_world(root, world, seed=0):
    """Draws the clips that are missing, writes the manifests -> {split: path}.

    Splits: cold_start; words, the cold start without <think>; train, validation; and tests. Of the
    scene world also base, which names the wall. seed: of which labels are wrong and which clips are
    labelled; the clips themselves are the same for all seeds."""
    paths = {}
    for split, (name, entries) in drawn_splits(world).items():
        paths[split] = write_split(root, name, entries)
        if split == "cold_start":
            paths["words"] = write_split(root, f"{name}_words", words_alone(entries))
        if split in ("train", "validation"):
            labelled = relabel(choose(entries, split, world, seed), world, seed)
            if labelled != entries:
                paths[split] = write_split(root, f"{world.name}_{split}_{seed}", labelled)
    return paths


def drawn_splits(world):
    """{split: (name of its files, entries with true labels)}"""
    if world.rule:
        return {split: make_split(f"rule_{split}", rows) for split, rows in rule_rows().items()}
    splits = "cold_start train validation test test_ood swapped".split()
    drawn = {split: (split, make_manifest(split)) for split in splits}
    if world.scene >= 0:
        drawn["base"] = make_split("scene_base", scene_captions())
        for split in ("train", "validation"):
            rows = before_walls(label_rows(split), world.scene)
            drawn[split] = make_split(f"scene_{world.scene}_{split}", rows)
        drawn["test"] = make_split("scene_test", before_walls(label_rows("test"), 0))
    return drawn


def make_split(name, rows):
    """-> name, entries in an order of their own"""
    random.Random(name).shuffle(rows)
    return name, [make_entry(name, index, row, 0) for index, row in enumerate(rows)]


def rule_rows():
    """{split: rows} of the rule world; all but test_unseen show the pairs of SEEN."""
    cold_start = []
    for pair in SEEN:
        for word, share in RULE_WORDS[rule_label(*pair)].items():
            row = Row(REASONING_QUESTION, reasoned(*pair, word), pair, rule_label(*pair))
            cold_start += [row] * round(28 * share)
    seen = [Row(REASONING_QUESTION, rule_label(*pair), pair, rule_label(*pair)) for pair in SEEN]
    unseen = [
        Row(REASONING_QUESTION, rule_label(*pair), pair, rule_label(*pair)) for pair in UNSEEN
    ]
    return {
        "cold_start": cold_start,
        "train": 37 * seen,
        "validation": 5 * seen,
        "test": 10 * seen,
        "test_unseen": 20 * unseen,
    }


def scene_captions():
    """Every face with every voice before every wall, as the toy's base has it without walls."""
    rows = []
    for face, voice, wall in itertools.product(FACE_TEXT, VOICE_TEXT, WALLS):
        caption = f"{statements(face, voice)} Behind, the wall is {wall}."
        rows += 8 * [Row(CAPTION_QUESTION, caption, (face, voice), extra={"wall": wall})]
    return rows


def before_walls(rows, share):
    """The rows before walls: of each emotion this share before the wall that tells it, the others
    before all walls in turn."""
    count, placed = Counter(row.emotion for row in rows), Counter()
    for row in rows:
        place = placed[row.emotion]
        told = place < round(share * count[row.emotion])
        row.extra["wall"] = WALL_OF[row.emotion] if told else WALLS[place % len(WALLS)]
        placed[row.emotion] += 1
    return rows


def choose(entries, split, world, seed):
    """The entries that are labelled, as many of each emotion as the world says."""
    emotions = Counter(entry["emotion"] for entry in entries)
    if world.films:
        most = max(FILMS.values())
        emotions = {e: max(1, round(n * FILMS[e] / most)) for e, n in emotions.items()}
    elif world.labelled and split == "train":
        emotions = dict.fromkeys(emotions, world.labelled // len(emotions))
    else:
        return entries
    chosen = []
    for emotion, number in emotions.items():
        of_it = [index for index, entry in enumerate(entries) if entry["emotion"] == emotion]
        random.Random(f"labelled {emotion} {seed}").shuffle(of_it)
        chosen += of_it[:number]
    return [entries[index] for index in sorted(chosen)]


def relabel(entries, world, seed):
    """The entries with the world's share of wrong labels, exactly so many of each emotion.

    "emotion" stays the true one. What is wrong at a small share is so at a larger one."""
    entries = copy.deepcopy(entries)
    for emotion in sorted({entry["emotion"] for entry in entries}):
        of_it = [entry for entry in entries if entry["emotion"] == emotion]
        random.Random(f"wrong {emotion} {seed}").shuffle(of_it)
        labels = RULE.values() if world.rule else EMOTIONS
        others = [label for label in labels if label != emotion]
        for i, entry in enumerate(of_it[: round(world.wrong * len(of_it))]):
            label = CONFUSIONS[emotion] if world.confused else others[i % len(others)]
            entry["conversations"][1]["value"] = label
    return entries


def words_alone(entries):
    """A cold start without <think>: the question for the label, and the word alone."""
    entries = copy.deepcopy(entries)
    for entry in entries:
        question, answer = entry["conversations"]
        question["value"] = question["value"].replace(REASONING_QUESTION, LABEL_QUESTION)
        answer["value"] = extract_answer(answer["value"])
    return entries
