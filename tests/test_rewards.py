"""Rewards by hand."""

import pytest

from rewards import accuracy_reward, extract_answer, format_reward


@pytest.mark.parametrize("completion, reward", [
    ("<think>why</think><answer>happy</answer>", 1),
    ("<think>why</think>\n<answer>happy</answer>", 1),
    ("<think>two\nlines</think> \n\t<answer>happy</answer>", 1),
    ("<think></think><answer></answer>", 1),  # form, not content
    ("<think>why</think><answer>happy</answer>\n", 0),  # the whole completion
    ("\n<think>why</think><answer>happy</answer>", 0),
    ("<answer>happy</answer>", 0),
    ("<think>why</think>", 0),
    ("happy", 0),
    ("", 0),
    ("so: <think>why</think><answer>happy</answer>", 0),
    ("<think>why</think><answer>happy</answer> I am sure", 0),
    ("<think>why</think> and <answer>happy</answer>", 0),
    ("<answer>happy</answer><think>why</think>", 0),
    ("<think>why</think><think>more</think><answer>happy</answer>", 0),
    ("<think>why</think><answer>happy</answer><answer>sad</answer>", 0),
    ("<think>why</think><answer>happy", 0),
    ("<think><answer>sad</answer></think><answer>happy</answer>", 0),
    ("<THINK>why</THINK><answer>happy</answer>", 0),
])
def test_format(completion, reward):
    assert format_reward(completion) == reward and isinstance(format_reward(completion), float)


@pytest.mark.parametrize("completion, label, reward", [
    ("<think>x</think><answer>happy</answer>", "happy", 1),
    ("<think>x</think><answer> Happy.\n</answer>", "happy", 1),
    ("<answer>sad</answer> no: <answer>happy</answer>", "happy", 1),  # the last one
    ("<answer>happy</answer> no: <answer>sad</answer>", "happy", 0),
    ("<answer>sad <answer>happy</answer>", "happy", 1),
    ("<answer>happy!?)</answer>", "happy", 1),
    ("<answer>happiness</answer>", "happy", 0),
    ("<answer>happy and sad</answer>", "happy", 0),
    ("Happy!", "happy", 1),  # a label-only model
    ("I think happy", "happy", 0),
    ("<answer></answer>", "happy", 0),
    ("<answer>happy", "happy", 0),  # not closed: the whole text counts
    ("<answer>happy</answer>", "Happy", 1),  # labels are normalised too
    ("", "happy", 0),
])
def test_accuracy(completion, label, reward):
    assert accuracy_reward(completion, label) == reward and isinstance(accuracy_reward(completion, label), float)


def test_answer():
    assert extract_answer("<think>a</think>\n<answer>\n Very Happy ?!\n</answer>") == "very happy"
    assert extract_answer("Angry.") == "angry"
