"""The two verifiable rewards of R1-Omni: R = R_acc + R_format (paper, eq. 5), both 0 or 1.

Both are rules on text. A reward is a function (completion: str, label: str) -> float;
`format_reward` needs no label. One of your own needs no change here: write it into a file in the
folder you start from, and name file and function, `train_grpo.py --reward my_rewards:short`.
"""

import re
import unicodedata

# The whole completion: no text before, between or after. DOTALL: reasoning may run over lines.
_FORMAT = re.compile(r"<think>.*</think>\s*<answer>.*</answer>", re.DOTALL)
_TAGS = ("<think>", "</think>", "<answer>", "</answer>")

# The first one: what stands behind it is no longer the thinking.
_THINK = re.compile(r"<think>(.*?)</think>", re.DOTALL)
# An answer that holds no other: of nested ones, the innermost.
_ANSWER = re.compile(r"<answer>((?:(?!</?answer>).)*)</answer>", re.DOTALL)

# Invisible, though Unicode does not class them with the control and format characters: the
# grapheme joiner, Hangul fillers, variation selectors.
_FILLERS = {"\u034f", "\u115f", "\u1160", "\u3164", "\uffa0", *map(chr, range(0xFE00, 0xFE10))}


def format_reward(completion):
    """1.0 if the whole completion is <think>...</think><answer>...</answer>, else 0.0.

    Each tag stands there exactly once. White space may stand between the two parts, and nothing
    else anywhere outside them (paper, section 3.2)."""
    each_once = all(completion.count(tag) == 1 for tag in _TAGS)
    return float(each_once and _FORMAT.fullmatch(completion) is not None)


def accuracy_reward(completion, label):
    """1.0 if the answer equals the label, both normalised, else 0.0 (paper, eq. 6).

    An empty answer is never right."""
    answer = extract_answer(completion)
    return float(answer != "" and answer == normalise(label))


def extract_answer(completion):
    """The answer in a completion, normalised.

    It is the text inside the last <answer>...</answer>; a completion without such a pair is taken
    whole, so that label-only models are scored by the same rule."""
    answers = _ANSWER.findall(completion)
    return normalise(answers[-1] if answers else completion)


def extract_think(completion):
    """The text inside the first <think>...</think>, as it is; "" if there is none."""
    found = _THINK.search(completion)
    return found[1] if found else ""


def normalise(text):
    """What of an answer is compared: " **Happy!** " -> "happy". Empty if nothing is left.

    Ours, the paper has no such rule: one answer is written in many ways, and a group in which they
    score differently teaches punctuation. So these do not count: case; what stands around the
    words and is neither letter nor digit (punctuation of any alphabet, quotation marks, Markdown's
    emphasis, emoji), but for the minus of a number; how wide or of how many parts a letter is
    (NFKC); invisible characters; how much white space there is."""
    text = "".join(c for c in text if c.isspace() or not _is_invisible(c))
    text = unicodedata.normalize("NFKC", text).casefold()
    text = unicodedata.normalize("NFKC", text)
    words = [i for i, c in enumerate(text) if _kind(c) in "LN"]
    if not words:
        return ""
    start, end = words[0], words[-1] + 1
    while end < len(text) and _kind(text[end]) == "M":  # vowel signs and accents of the last letter
        end += 1
    is_negative = text[start].isdigit() and text[:start].endswith(("-", "\N{MINUS SIGN}"))
    return "-" * is_negative + " ".join(text[start:end].split())


def _kind(character):
    """Unicode's class: L letter, N number, M mark on a letter, P punctuation, S symbol, ..."""
    return unicodedata.category(character)[0]


def _is_invisible(character):
    return unicodedata.category(character) in ("Cc", "Cf") or character in _FILLERS
