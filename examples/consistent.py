"""A reward without a judge: does <think> name the emotion that is answered?

    python train_grpo.py ... --reward examples.consistent:consistent

It sees words (support/lexicon.py), and so is soon learned by heart: a <think> that only repeats the
answer earns it. The toy's names no emotion and never does. Nor are more rewards better rewards: in
AffectGPT-R1 (arXiv:2508.01318) all five did worse than two of them.
"""

from rewards import extract_answer, extract_think
from support.lexicon import label_of, named_emotion


def consistent(completion, label):
    named = named_emotion(extract_think(completion), {label})
    return float(named is not None and named == label_of(extract_answer(completion), {label}))
