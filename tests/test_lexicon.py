"""Emotion words: what a text names, and the three counts of what an explanation is worth."""

import pytest

from evaluate import ALIASES, score
from support.lexicon import LABEL_OF, WORDS, explanation_metrics, label_of, named_emotion


def test_a_word_stands_for_one_label():
    assert len(LABEL_OF) == sum(len(words.split()) for words in WORDS.values())
    assert all(LABEL_OF[label] == label for label in WORDS)


def test_the_lexicon_agrees_with_the_aliases():
    for word, label in ALIASES.items():
        if word in LABEL_OF and label != "calm":
            assert LABEL_OF[word] == label


@pytest.mark.parametrize(
    "text, named",
    [
        ("Her smile is warm, and she is DELIGHTED.", "happy"),
        ("The voice trembles.", None),
        ("", None),
        ("She is not angry; she looks sad.", "sad"),
        ("There is no sign of fear. He is amazed.", "surprise"),
        ("He isn’t happy.", None),
        ("Anger, then fear, then fear.", "fear"),
        ("At first joy, in the end sorrow.", "sad"),  # of equals the last
        ("unhappy", "sad"),
        ("an angrier man", None),  # whole words
    ],
)
def test_what_a_text_names(text, named):
    assert named_emotion(text) == named


def test_a_label_of_the_data_set_stands_for_itself():
    assert named_emotion("She is calm.") == "neutral"
    assert named_emotion("She is calm.", {"calm", "neutral"}) == "calm"


@pytest.mark.parametrize(
    "labels, word, label",
    [
        ({"sadness", "anger", "joy"}, "sad", "sadness"),
        ({"sadness", "anger", "joy"}, "sadness", "sadness"),
        ({"sadness", "anger", "joy"}, "furious", "anger"),
        ({"sadness", "anger", "joy"}, "afraid", "fear"),  # no label of theirs, but an emotion
        ({"anger", "angry"}, "anger", "anger"),  # two labels stay two
        ({"anger", "angry"}, "furious", "angry"),
        ({"excitement", "happiness"}, "excitement", "excitement"),
        ({"excitement", "happiness"}, "glad", "happiness"),  # the first of them in WORDS
        ({"calm", "neutral"}, "composed", "neutral"),
        ({"calm"}, "composed", "calm"),
        ({"pride", "sad"}, "pride", "pride"),  # a word that the lexicon lacks
        ({"pride", "sad"}, "sorrow", "sad"),
        ({"pride", "sad"}, "proud", None),
        ((), "sadness", "sad"),
    ],
)
def test_a_word_stands_for_the_data_sets_own_label(labels, word, label):
    assert label_of(word, labels) == label
    assert named_emotion(f"There is {word}.", labels) == label


def row(label, think, answer):
    completion = f"<think>{think}</think><answer>{answer}</answer>"
    return {"label": label, "completion": completion, "index": 0, "tokens": 5, "truncated": False}


def test_explanations_by_hand():
    rows = [
        row("happy", "She is glad.", "happy"),  # all three
        row("happy", "She is glad.", "joyful"),  # explains the label and its answer; not right
        row("happy", "She is glad.", "sad"),  # explains the label, answers otherwise
        row("happy", "She mourns in sorrow.", "sad"),  # consistent and wrong
        row("happy", "She smiles.", "happy"),  # names nothing
        {**row("happy", "", ""), "completion": "happy"},  # explains nothing
    ]
    expected = {"explained": 4 / 6, "eea": 3 / 6, "epc": 3 / 6, "fcr": 1 / 6}
    assert explanation_metrics(rows) == expected
    assert expected.items() <= score(rows).items()
    assert explanation_metrics(rows[4:]) == {}


@pytest.mark.parametrize(
    "label, think",
    [
        ("sadness", "She looks sad; her sorrow is plain."),
        ("anger", "He is furious, an angry man."),
        ("joy", "She is happy."),
        ("fearful", "He shows fear."),
        ("calm", "She is composed."),
        ("sad", "She is full of sadness."),
    ],
)
def test_labels_that_are_other_words_for_the_lexicons(label, think):
    rows = [row(label, think, label), row(label, "He is disgusted.", label)]
    half = {"explained": 1, "eea": 0.5, "epc": 0.5, "fcr": 0.5}
    assert explanation_metrics(rows) == half
    assert explanation_metrics([*rows, *rows[:1], row("disgust", "", label)])["eea"] == 0.5


def test_a_check_that_knows_better_has_the_last_word():
    rows = [{**row("happy", "She is glad.", "happy"), "checks": {"eea": False, "epc": True}}]
    scores = score(rows)
    assert scores["eea"] == 0 and scores["epc"] == 1 and scores["fcr"] == 1


def test_weighted_f1_by_hand():
    rows = [row("happy", "", answer) for answer in ("happy", "happy", "sad")]
    rows += [row("sad", "", "sad"), row("fear", "", "joyful")]
    # happy: precision 1, recall 2/3, F1 0.8; sad: 1/2, 1, 2/3; fear: 0. Weights 3/5, 1/5, 1/5.
    assert score(rows)["weighted_f1"] == pytest.approx(3 / 5 * 0.8 + 1 / 5 * 2 / 3)
