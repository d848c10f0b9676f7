"""Rewards by hand."""

import pytest

from rewards import accuracy_reward, extract_answer, extract_think, format_reward, normalise


@pytest.mark.parametrize(
    "completion, reward",
    [
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
    ],
)
def test_format(completion, reward):
    assert format_reward(completion) == reward and isinstance(format_reward(completion), float)


@pytest.mark.parametrize(
    "completion, label, reward",
    [
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
    ],
)
def test_accuracy(completion, label, reward):
    assert accuracy_reward(completion, label) == reward and isinstance(
        accuracy_reward(completion, label), float
    )


def test_answer():
    assert extract_answer("<think>a</think>\n<answer>\n Very Happy ?!\n</answer>") == "very happy"
    assert extract_answer("Angry.") == "angry"


@pytest.mark.parametrize(
    "answer",
    [
        # punctuation and quotation marks of any alphabet, on either side
        *("happy.", "happy。", "happy！", "happy…", "happy؟", "happy।", "¡happy!", "¿happy?"),
        *('"happy"', "'happy'", "“happy”", "„happy“", "«happy»", "「happy」", "‹happy›", "´happy´"),
        *("(happy)", "[happy]", "{happy}", "<happy>", "-happy-", "– happy", "• happy", "· happy"),
        # Markdown and decoration
        *("**happy**", "*happy*", "__happy__", "_happy_", "`happy`", "```happy```", "***happy***"),
        *("# happy", "> happy", "- happy", "~~happy~~", "**happy.**", "“**happy**”。"),
        *("happy 😊", "😊happy", "✅ happy", "★happy★", "$happy$", "happy®"),
        # the same letters, differently made
        *("HAPPY", "Happy", "ｈａｐｐｙ", "ＨＡＰＰＹ！", "𝐡𝐚𝐩𝐩𝐲", "ⓗⓐⓟⓟⓨ"),
        # what nobody sees
        *("happy\u200b", "\ufeffhappy", "hap\u00adpy", "\u2060happy\u200d", "happy\ufe0f"),
        *("\u200ehappy\u200f", "happy\u3164", "hap\u034fpy", "\x00happy\x07"),
        # white space
        *(" happy\n", "\u3000happy\u00a0", "\thappy\r\n", "\u2028happy"),
    ],
)
def test_one_answer_written_in_many_ways(answer):
    assert normalise(answer) == "happy"
    assert accuracy_reward(f"<think>t</think>\n<answer>{answer}</answer>", "happy") == 1.0
    assert accuracy_reward("<think>t</think>\n<answer>happy</answer>", answer) == 1.0
    assert accuracy_reward(f"<think>t</think>\n<answer>{answer}</answer>", "sad") == 0.0


@pytest.mark.parametrize(
    "a, b",
    [
        ("cafe\u0301", "café"),  # composed and decomposed
        ("STRASSE", "straße"),
        ("ΧΑΡΆΣ", "χαράς"),
        ("very\n  happy", "Very happy"),
        ("다행", "\u1103\u1161\u1112\u1162\u11bc"),
        ("ﬁne", "fine"),
        ("“快乐”。", "快乐"),
        ("दुखी।", "दुखी"),
        ("\N{MINUS SIGN}1", "-1"),
        ("**-1**", "－１"),
    ],
)
def test_the_same_answer(a, b):
    assert normalise(a) == normalise(b) != ""
    assert accuracy_reward(a, b) == accuracy_reward(b, a) == 1.0


@pytest.mark.parametrize(
    "a, b",
    [
        ("happy", "unhappy"),
        ("happy, sad", "happy sad"),  # between words, punctuation counts
        ("not happy", "happy"),
        ("दुखी", "दुख"),  # a vowel sign at the end is a part of its letter
        ("สุขี", "สุข"),
        ("cafe", "café"),
        ("-1", "1"),
        ("1.5", "15"),
        ("C", "Ç"),
    ],
)
def test_other_answers(a, b):
    assert accuracy_reward(a, b) == accuracy_reward(b, a) == 0.0


@pytest.mark.parametrize("empty", ["", " ", "...", "**", "“”", "\u200b", "😊", "\u3164", "´"])
def test_an_empty_answer_is_never_right(empty):
    assert normalise(empty) == extract_answer(f"<answer>{empty}</answer>") == ""
    for label in ("", empty, "happy"):
        assert accuracy_reward(f"<think>t</think><answer>{empty}</answer>", label) == 0.0
        assert accuracy_reward(empty, label) == 0.0


def test_thinking_is_what_stands_in_the_first_pair_of_tags():
    assert extract_think("<think>\nshe smiles </think><answer>happy</answer>") == "\nshe smiles "
    assert extract_think("<think>a</think> <think>b</think>") == "a"
    assert extract_think("<think>cut off") == extract_think("happy") == ""
