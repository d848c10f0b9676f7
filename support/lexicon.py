"""Which emotion does a text name? A small lexicon of emotion words, for any data set.

    named_emotion("Her smile is warm; she is delighted.")           "happy"
    explanation_metrics(rows)                                       {"eea": ..., "epc": ..., ...}

Without a judge it sees words only: not irony, not "his smile fades", not a word it does not have.
"""

import re
from collections import Counter

from rewards import extract_answer, extract_think

# Label -> words for it, in the labels of DFEW, MAFW, RAVDESS and MER. The label itself comes
# first: `label_of` takes them in this order.
WORDS = {
    "happy": "happy happily happiness joy joyful joyfully cheerful cheerfully delight delighted "
    "glad pleased amused amusement excited excitement elated",
    "sad": "sad sadly sadness sorrow sorrowful sorrowfully grief grieving gloomy unhappy depressed "
    "dejected mournful heartbroken downcast",
    "angry": "angry angrily anger furious furiously fury rage enraged irritated irritation annoyed "
    "annoyance outraged hostile hostility resentful",
    "fear": "fear fearful fearfully afraid scared frightened fright terrified terror panic "
    "panicked",
    "surprise": "surprise surprised surprisingly amazed amazement astonished astonishment shocked "
    "startled stunned",
    "disgust": "disgust disgusted repelled revolted revulsion repulsed repulsion loathing",
    "neutral": "neutral neutrality calm calmly calmness composed emotionless impassive",
    "contemptuous": "contemptuous contempt scorn scornful disdain disdainful",
    "anxious": "anxious anxiously anxiety nervous nervously nervousness uneasy uneasiness",
    "worried": "worried worry worrying concerned",
    "helpless": "helpless helplessly helplessness powerless",
    "disappointed": "disappointed disappointment",
}
LABEL_OF = {word: label for label, words in WORDS.items() for word in words.split()}
NEGATIONS = {"no", "not", "never", "neither", "nor", "without", "isn't", "doesn't", "aren't"}


def label_of(word, labels=()):
    """The label that a word stands for; None if it stands for none.

    labels: those of the data set, in its own words. One of them stands for itself, any other word
    for the first in WORDS that means the same and is one of them, else for the lexicon's label."""
    if word in labels:
        return word
    if word not in LABEL_OF:
        return None
    label = LABEL_OF[word]
    return next((other for other in WORDS[label].split() if other in labels), label)


def named_emotion(text, labels=()):
    """The label that a text names most often, on a tie the last; None if it names none.

    A word does not count if one of the three before it is a negation."""
    words = re.findall(r"[\w']+", text.casefold().replace("’", "'"))
    named = []
    for place, word in enumerate(words):
        if not NEGATIONS & set(words[max(0, place - 3) : place]):
            named.append(label_of(word, labels))
    counts = Counter(label for label in named if label)
    last_first = list(dict.fromkeys(label for label in reversed(named) if label))
    return max(last_first, key=counts.get, default=None)


def explanation_metrics(rows):
    """What the explanations of completions are worth (ERV, arXiv:2510.23506, without its judge):

    eea   explanation emotion accuracy: <think> names the label
    epc   explanation-prediction consistency: <think> names the answer
    fcr   faithful consistency rate: <think> and the answer both name the label
    explained   <think> names any emotion

    rows: dicts with "completion" and "label". Shares of all completions; {} if no <think> names
    any emotion, as in the toy, which is asked in another way (toy.world.check_statements)."""
    labels = {row["label"] for row in rows}
    counts = Counter()
    for row in rows:
        named = named_emotion(extract_think(row["completion"]), labels)
        if named is None:
            continue
        answer = extract_answer(row["completion"])
        right = named == label_of(row["label"], labels)
        counts["explained"] += 1
        counts["eea"] += right
        counts["epc"] += named == label_of(answer, labels)
        counts["fcr"] += right and answer == row["label"]
    names = ("explained", "eea", "epc", "fcr") if counts else ()
    return {name: counts[name] / len(rows) for name in names}
