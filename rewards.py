"""The two verifiable rewards of R1-Omni: R = R_acc + R_format (paper, eq. 5), both 0 or 1, both rules on text.

A reward is a function (completion: str, label: str) -> float; `format_reward` needs no label. One of your own needs no change
here: write it into a file beside your data and give `train_grpo.py --reward file:function` (see the README).
"""

import re
import string

# The whole completion, so no text before, between or after; DOTALL because reasoning may run over several lines.
_FORMAT = re.compile(r"<think>.*</think>\s*<answer>.*</answer>", re.DOTALL)
_TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def format_reward(completion):
    """1.0 if the whole completion is <think>...</think><answer>...</answer> with each tag exactly once, else 0.0.

    White space may stand between the two parts, and nothing else anywhere outside them (paper, section 3.2)."""
    return float(_FORMAT.fullmatch(completion) is not None and all(completion.count(tag) == 1 for tag in _TAGS))


def extract_answer(completion):
    """The answer in a completion, normalised: trimmed, lower case, no trailing punctuation.

    It is the text inside the last <answer>...</answer>; a completion without such a pair is taken whole, so that
    label-only models are scored by the same rule."""
    inside = re.findall(r"<answer>((?:(?!</?answer>).)*)</answer>", completion, re.DOTALL)
    return normalise(inside[-1] if inside else completion)


def normalise(word):
    """Trimmed, lower-cased, trailing punctuation dropped: " Happy. " -> "happy"."""
    return word.strip().lower().rstrip(string.punctuation + string.whitespace)


def accuracy_reward(completion, label):
    """1.0 if the answer equals the label after normalisation, else 0.0 (paper, eq. 6)."""
    return float(extract_answer(completion) == normalise(label))
