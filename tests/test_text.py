"""text.py: the published tokenization, from every layout of its files; what cannot be read."""

import datetime
import json
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import GOLDEN

from checkpoint import CheckpointError
from support.errors import DataError
from support.flags import load
from text import MODALITIES, QUESTION_LABEL, QUESTION_REASONING, BertTokenizer, Tokenizer

CHECKPOINT = GOLDEN / "tiny" / "humanomni"


@pytest.fixture(scope="module")
def tokenization():
    return json.loads((GOLDEN / "tiny/tokenization.json").read_text())


def test_tokenization_matches_the_published_one(tokenization):
    tokenizer = Tokenizer(CHECKPOINT)
    question, answer = tokenization["question"], tokenization["answer"]
    assert question == QUESTION_REASONING and question.startswith(QUESTION_LABEL + "\n")
    assert tokenizer.render(question) == tokenization["prompt_text"]
    assert tokenizer.prompt_ids(question) == tokenization["prompt_ids"]
    assert tokenizer.sft_ids(question, answer) == (tokenization["full_ids"], tokenization["labels"])
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (317, 318)


def test_modalities_leave_out_the_other_line(tokenization):
    tokenizer = Tokenizer(CHECKPOINT)
    both, video, audio, text = (
        tokenizer.prompt_ids("Which emotion?", modality) for modality in MODALITIES
    )
    assert [both.count(-201), both.count(-202)] == [1, 1] and both.index(-201) < both.index(-202)
    assert [video.count(-201), video.count(-202)] == [1, 0]
    assert [audio.count(-201), audio.count(-202)] == [0, 1]
    assert min(text) >= 0
    assert "user\n<vi_start><vi_end>\nWhich emotion?\n" in tokenizer.decode(video)
    assert "user\n<au_start><au_end>\nWhich emotion?\n" in tokenizer.decode(audio)
    assert "user\nWhich emotion?\n" in tokenizer.decode(text)


def test_sft_labels_are_the_answer_and_the_end_of_turn():
    tokenizer = Tokenizer(CHECKPOINT)
    ids, labels = tokenizer.sft_ids("Which emotion?", "<answer>sad</answer>", "video")
    prompt = tokenizer.prompt_ids("Which emotion?", "video")
    assert ids[: len(prompt)] == prompt and set(labels[: len(prompt)]) == {-100}
    assert ids[len(prompt) :] == labels[len(prompt) :]
    assert labels[-2:] == [tokenizer.eos_token_id, *tokenizer.encode("\n")]
    assert tokenizer.decode(torch.tensor(labels[len(prompt) :])) == "<answer>sad</answer>\n"


@pytest.mark.parametrize("marker", ["<video>", "<audio>"])
def test_markers_in_a_question_are_an_error(marker):
    with pytest.raises(DataError, match="must not contain"):
        Tokenizer(CHECKPOINT).prompt_ids(f"{marker}\nWhich emotion?")


def test_unknown_modality():
    with pytest.raises(DataError, match="smell"):
        Tokenizer(CHECKPOINT).prompt_ids("Which emotion?", "smell")


TEXTS = [
    "Hello, world!",
    "It's we'll  two   spaces\n\n\ttabs \n end ",
    "12345 a1b2",
    "naïve Ünïcode e\u0301 中文 🙂",
    "<think>I smile.</think>\n<answer>happy</answer><|im_end|>\n",
    "",
    "...?!\r\n<<<",
    "<|im_start|>user",
]


@pytest.fixture
def broken(tmp_path):
    """A copy of the checkpoint, to take files away or break them."""
    return Path(shutil.copytree(CHECKPOINT, tmp_path / "c"))


def edit(path, *drop, **changes):
    content = json.loads(path.read_text())
    content = {key: value for key, value in content.items() if key not in drop}
    path.write_text(json.dumps({**content, **changes}))


@pytest.mark.parametrize("without", ["added_tokens.json", "tokenizer_config.json's list"])
def test_vocab_and_merges_give_the_same_tokenizer(broken, tokenization, without):
    (broken / "tokenizer.json").unlink()
    if without == "added_tokens.json":
        (broken / without).unlink()
    else:
        edit(broken / "tokenizer_config.json", "added_tokens_decoder")
    ours, theirs = Tokenizer(broken), Tokenizer(CHECKPOINT)
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text)
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text))
    assert ours.prompt_ids(tokenization["question"]) == tokenization["prompt_ids"]


def test_template_in_its_own_file(broken, tokenization):
    template = json.loads((broken / "tokenizer_config.json").read_text())["chat_template"]
    edit(broken / "tokenizer_config.json", "chat_template")
    with pytest.raises(DataError, match="chat template"):
        Tokenizer(broken)
    # The second has blocks on lines of their own, which is right only with trim_blocks and
    # lstrip_blocks.
    for source in (
        template,
        """  {% if messages[0]['role'] != 'system' %}
<|im_start|>system
You are a helpful assistant.<|im_end|>
  {% endif %}
  {% for message in messages %}
<|im_start|>{{ message['role'] }}
{{ message['content'] }}<|im_end|>
  {% endfor %}
  {% if add_generation_prompt %}
<|im_start|>assistant
  {% endif %}
""",
    ):
        (broken / "chat_template.jinja").write_text(source)
        assert Tokenizer(broken).prompt_ids(tokenization["question"]) == tokenization["prompt_ids"]


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('no such role') }}",
        "{% for %}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
    ],
)
def test_templates_that_fail_or_break_out(broken, template):
    (broken / "chat_template.jinja").write_text(template)
    with pytest.raises(DataError):
        Tokenizer(broken).prompt_ids("Which emotion?")


IM_END, ENDOFTEXT, IM_START = 317, 318, 319


@pytest.mark.parametrize(
    "generation, ends, pad",
    [
        ({"eos_token_id": IM_END, "pad_token_id": ENDOFTEXT}, {IM_END}, ENDOFTEXT),
        ({"eos_token_id": [IM_END, ENDOFTEXT]}, {IM_END, ENDOFTEXT}, ENDOFTEXT),
        ({"eos_token_id": [ENDOFTEXT, IM_END]}, {IM_END, ENDOFTEXT}, ENDOFTEXT),
        ({"eos_token_id": [IM_START, ENDOFTEXT]}, {IM_END, IM_START, ENDOFTEXT}, ENDOFTEXT),
        ({"eos_token_id": ENDOFTEXT, "pad_token_id": 7}, {IM_END, ENDOFTEXT}, 7),
        ({"eos_token_id": [7], "pad_token_id": None}, {IM_END, 7}, ENDOFTEXT),
        ({"eos_token_id": None}, {IM_END}, ENDOFTEXT),
        ({}, {IM_END}, ENDOFTEXT),
    ],
)
def test_every_end_that_the_checkpoint_names_and_the_one_that_sft_teaches(
    broken, generation, ends, pad
):
    (broken / "generation_config.json").write_text(json.dumps(generation))
    tokenizer = Tokenizer(broken)
    assert tokenizer.eos_token_id == IM_END and tokenizer.pad_token_id == pad
    assert set(tokenizer.eos_token_ids) == ends and tokenizer.eos_token_ids[0] == IM_END
    assert len(tokenizer.eos_token_ids) == len(ends)
    assert tokenizer.sft_ids("Which?", "sad")[1][-2] == IM_END


def test_the_tokenizers_own_end_is_one_too(broken):
    """As in Qwen's base checkpoints, where nothing names <|im_end|>."""
    edit(broken / "generation_config.json", eos_token_id=ENDOFTEXT)
    for eos in ("<|endoftext|>", {"content": "<|endoftext|>"}):
        edit(broken / "tokenizer_config.json", eos_token=eos)
        assert Tokenizer(broken).eos_token_ids == (IM_END, ENDOFTEXT)
    edit(broken / "generation_config.json", eos_token_id=IM_END)
    assert Tokenizer(broken).eos_token_ids == (IM_END, ENDOFTEXT)
    edit(broken / "tokenizer_config.json", "eos_token")  # then special_tokens_map.json has it
    edit(broken / "special_tokens_map.json", eos_token="<|im_start|>")
    assert Tokenizer(broken).eos_token_ids == (IM_END, IM_START)
    edit(broken / "tokenizer_config.json", eos_token="</s>")  # of no id, so never sampled
    assert Tokenizer(broken).eos_token_ids == (IM_END,)


def test_without_a_generation_config_the_models_end_counts(broken):
    edit(broken / "config.json", eos_token_id=[ENDOFTEXT])
    assert Tokenizer(broken).eos_token_ids == (IM_END,)
    (broken / "generation_config.json").unlink()
    assert Tokenizer(broken).eos_token_ids == (IM_END, ENDOFTEXT)


def test_padding_and_truncation_of_a_saved_tokenizer_are_ignored(broken):
    reference = Tokenizer(broken)
    reference.tokenizer.enable_truncation(5)
    reference.tokenizer.enable_padding(length=5)
    reference.tokenizer.save(str(broken / "tokenizer.json"))
    tokenizer = Tokenizer(broken)
    assert len(tokenizer.encode("Hello, world!")) > 5 and len(tokenizer.encode("a")) == 1


def test_broken_tokenizer_files(broken, tmp_path):
    (broken / "tokenizer.json").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7\n"
    )
    with pytest.raises(DataError, match="tokenizer.json.*git-lfs"):
        Tokenizer(broken)
    with pytest.raises(DataError, match="nowhere.*tokenizer.json"):
        Tokenizer(tmp_path / "nowhere")


@pytest.mark.parametrize("path", [CHECKPOINT, CHECKPOINT / "bert", GOLDEN / "tiny/bert"])
def test_bert_tokenizer(path):
    ids, mask = BertTokenizer(path)(["Hello video?", "is"])
    words = (GOLDEN / "tiny/bert/vocab.txt").read_text().split("\n")
    assert ids.dtype == mask.dtype == torch.int64
    assert [words[i] for i in ids[0]] == [
        "[CLS]",
        "h",
        "##e",
        "##l",
        "##l",
        "##o",
        "video",
        "?",
        "[SEP]",
    ]
    assert [words[i] for i in ids[1]] == ["[CLS]", "is", "[SEP]"] + ["[PAD]"] * 6
    assert mask.tolist() == [[1] * 9, [1, 1, 1, 0, 0, 0, 0, 0, 0]]


def test_bert_cuts_long_questions_and_keeps_the_end_mark():
    ids, _ = BertTokenizer(CHECKPOINT)(["video " * 200])
    assert ids.shape == (1, 64) and ids[0, -1] == 3  # 64 positions in this BERT; 3 is [SEP]


def test_bert_tokenizer_from_its_json(tmp_path):
    reference = BertTokenizer(CHECKPOINT)
    reference.tokenizer.save(str(tmp_path / "tokenizer.json"))
    questions = ["An emotion in the video", QUESTION_LABEL]
    for ours, theirs in zip(BertTokenizer(tmp_path)(questions[:1]), reference(questions[:1])):
        assert torch.equal(ours, theirs)
    ids, _ = BertTokenizer(tmp_path)(["video " * 200])
    assert ids.shape == (1, 202)  # not the truncation that was saved


def test_bert_vocabulary_not_found(broken):
    shutil.rmtree(broken / "bert")  # the language model's tokenizer.json stays
    with pytest.raises(DataError, match="--bert DIR"):
        BertTokenizer(broken)


# ------------------------------------------------------------------------------------------------
# Files that cannot be


def load_all(folder):
    flags = SimpleNamespace(
        model=str(folder), siglip="", whisper="", bert="", device="cpu", dtype="auto"
    )
    return load(flags)


@pytest.mark.parametrize(
    "file, change",
    [
        ("generation_config.json", {"eos_token_id": "317"}),
        ("generation_config.json", {"eos_token_id": 317.0}),
        ("generation_config.json", {"eos_token_id": []}),
        ("generation_config.json", {"eos_token_id": 100_000}),
        ("generation_config.json", {"pad_token_id": -1}),
        ("generation_config.json", {"eos_token_id": True}),
        ("tokenizer_config.json", {"eos_token": 5}),
        ("tokenizer_config.json", {"chat_template": 5}),
        ("tokenizer_config.json", {"chat_template": [5]}),
        ("tokenizer.json", {"model": {}}),
        ("tokenizer.json", {"decoder": None}),
        ("tokenizer.json", {"normalizer": {"type": "Lowercase"}}),
        ("bert/tokenizer_config.json", {"model_max_length": "64"}),
        ("bert/tokenizer_config.json", {"do_lower_case": "no"}),
        ("bert/config.json", {"max_position_embeddings": 0}),
    ],
)
def test_tokenizers_with_fields_that_cannot_be(broken, file, change):
    edit(broken / file, **change)
    with pytest.raises((DataError, CheckpointError), match=str(broken)):
        load_all(broken).tokenizer.prompt_ids("Which emotion?")


def test_a_tokenizer_that_panics(broken):
    """Its library ends in Rust with an exception that `except Exception` does not see."""
    edit(
        broken / "tokenizer.json",
        pre_tokenizer={
            "type": "Split",
            "pattern": {"Regex": "(i+)+$"},
            "behavior": "Isolated",
            "invert": False,
        },
    )
    tokenizer = Tokenizer(broken)
    with pytest.raises(DataError, match=f"{broken}: its tokenizer cannot be used .PanicException"):
        tokenizer.encode("i" * 40 + "!")


def test_a_vocabulary_that_lacks_a_letter_loses_no_text(broken):
    content = json.loads((broken / "tokenizer.json").read_text())
    content["model"]["vocab"] = {
        token: i for token, i in content["model"]["vocab"].items() if "W" not in token
    }
    content["model"]["merges"] = []
    (broken / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="loses a part of 'Which emotion"):
        Tokenizer(broken).encode("Which emotion?")


def test_ids_that_the_model_does_not_have(broken):
    content = json.loads((broken / "tokenizer.json").read_text())
    content["model"]["vocab"]["?"] = 320
    (broken / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="tokenizer has 321 ids, the model 320"):
        load_all(broken)


def test_a_bert_vocabulary_of_another_bert(broken):
    with open(broken / "bert" / "vocab.txt", "a") as file:
        file.write("word\n")
    with pytest.raises(DataError, match="BERT's tokenizer has .* ids"):
        load_all(broken)


def test_questions_are_cut_to_what_the_model_takes_wherever_the_vocabulary_lies(broken):
    """Beside the language model's files, whose config.json says 2048; this BERT has 64."""
    (broken / "bert" / "vocab.txt").rename(broken / "vocab.txt")
    (broken / "tokenizer.json").unlink()  # vocab.json and merges.txt hold the language model's
    assert load_all(broken).bert(["video " * 200])[0].shape == (1, 64)


# ------------------------------------------------------------------------------------------------
# Chat templates

CONTENT = "{{ messages[0].content }}"


@pytest.mark.parametrize(
    "template, message",
    [
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ cycler.__init__.__globals__ }}", "unsafe"),
        ("{{ raise_exception.__globals__ }}", "unsafe"),
        ("{{ raise_exception('only one turn') }}", "only one turn"),
        ("{% for i in range(10**9) %}x{% endfor %}", "Range too big"),
        ("{% for i in range(1000000000) %}x{% endfor %}", "Range too big"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{" + "(" * 5000 + "1" + ")" * 5000 + "}}", "RecursionError"),
        (CONTENT + "{{ 'a' * 200000 }}", "no more than 100000 characters"),
        ("hello", "should repeat"),
        ("{{ content }}", "'content' is undefined"),
        (CONTENT + "{{ nothing }}", "'nothing' is undefined"),
        (CONTENT * 2, "should repeat"),
        (CONTENT + "<video>", "should repeat"),
        ("{{ messages[0].content | replace('<video>', '') }}", "should repeat"),
        ("{{ messages[0].content | replace('Which', 'What') }}", "should repeat"),
        ("{% include '/etc/passwd' %}", "loader"),
        ("{{ messages[0].update(content='x') }}", "unsafe|is_safe|not callable|safely"),
        ("{% for %}", "not valid"),
    ],
)
def test_templates_that_break_out_or_lose_the_question(broken, template, message):
    (broken / "chat_template.jinja").write_text(template)
    start = time.time()
    with pytest.raises(DataError, match=f"(?s){broken}: its chat template.*({message})"):
        Tokenizer(broken).prompt_ids("Which emotion?")
    assert time.time() - start < 20


def test_templates_may_ask_for_what_is_not_there(broken):
    (broken / "chat_template.jinja").write_text(
        "{% if tools %}{{ tools }}{% endif %}{% if system is defined %}x{% endif %}" + CONTENT
    )
    assert Tokenizer(broken).render("Which emotion?", "text") == "Which emotion?"


# How a template may say the golden prompt, each with what transformers gives templates.
TURN = "'<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n'"
END = "'<|im_end|>\n<|im_start|>assistant\n'"
GOLDEN_TEMPLATE = f"{{{{ {TURN} + messages[0].content + {END} }}}}"


def with_template(folder, template):
    edit(folder / "tokenizer_config.json", "chat_template")
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return Tokenizer(folder)


@pytest.mark.parametrize(
    "template",
    [
        GOLDEN_TEMPLATE,
        "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}"
        + GOLDEN_TEMPLATE
        + "{% endfor %}",
        "{% for i in range(3) %}{% if i != 1 %}{% continue %}{% endif %}"
        + GOLDEN_TEMPLATE
        + "{% endfor %}",
        "{% generation %}" + GOLDEN_TEMPLATE + "{% endgeneration %}",
        "{% set x = '' %}{% generation %}{% set x = 'y' %}{% endgeneration %}{{ x }}"
        + GOLDEN_TEMPLATE,
        "{% if tools is not none or documents is not none %}{{ tools }}{% endif %}"
        + GOLDEN_TEMPLATE,
        "{{ bos_token }}{{ sep_token }}" + GOLDEN_TEMPLATE,
        GOLDEN_TEMPLATE.replace("'<|im_end|>", "eos_token + '"),
        "{% if pad_token != '<|endoftext|>' or unk_token != pad_token %}x{% endif %}"
        + GOLDEN_TEMPLATE,
        "{% set ns = namespace(found=false) %}{% for m in messages %}"
        "{% set ns.found = m.role == 'user' %}{% endfor %}{% if ns.found %}"
        + GOLDEN_TEMPLATE
        + "{% endif %}",
        "\ufeff" + GOLDEN_TEMPLATE,  # a mark of Windows editors, no part of the prompt
    ],
)
def test_templates_with_what_transformers_gives_them(broken, tokenization, template):
    tokenizer = with_template(broken, template)
    assert tokenizer.render(tokenization["question"]) == tokenization["prompt_text"]
    assert tokenizer.prompt_ids(tokenization["question"]) == tokenization["prompt_ids"]


@pytest.mark.parametrize(
    "expression, expected",
    [
        ("{'b': '<ü>', 'a': [1, none, true]} | tojson", '{"b": "<ü>", "a": [1, null, true]}'),
        ("{'b': 1, 'a': 2} | tojson(sort_keys=true)", '{"a": 2, "b": 1}'),
        ("['ü'] | tojson(ensure_ascii=true)", '["\\u00fc"]'),
        ("[1, 2] | tojson(indent=2)", "[\n  1,\n  2\n]"),
        ("{'a': [1, 2]} | tojson(separators=(',', ':'))", '{"a":[1,2]}'),
        ("messages | tojson | length > 20", "True"),
        ("strftime_now('%Y') | int > 2000", "True"),
    ],
)
def test_the_helpers_of_templates(broken, expression, expected):
    tokenizer = with_template(broken, f"{{{{ {expression} }}}}" + CONTENT)
    assert tokenizer.render("?", "text") == expected + "?"


def test_the_date_is_todays(broken):
    before = datetime.date.today()
    text = with_template(broken, "{{ strftime_now('%Y-%m-%d') }}" + CONTENT).render("?", "text")
    assert before <= datetime.date.fromisoformat(text[:10]) <= datetime.date.today()


def test_a_template_complains_in_its_own_words(broken):
    tokenizer = with_template(broken, "{{ raise_exception('no system turn') }}")
    with pytest.raises(DataError, match="cannot be rendered .TemplateError: no system turn"):
        tokenizer.render("Which emotion?")


def test_where_templates_lie_and_which_one_counts(broken):
    """From the oldest layout to the newest; each wins over those before it."""
    edit(broken / "tokenizer_config.json", "chat_template")
    (broken / "additional_chat_templates").mkdir()
    (broken / "additional_chat_templates" / "tool_use.jinja").write_text("of tools " + CONTENT)
    (broken / "chat_template.json").write_text(json.dumps({"chat_template": "json " + CONTENT}))
    assert Tokenizer(broken).render("?", "text") == "json ?"
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": CONTENT + "!"}]
    edit(broken / "tokenizer_config.json", chat_template=named)
    assert Tokenizer(broken).render("?", "text") == "?!"
    edit(broken / "tokenizer_config.json", chat_template="config " + CONTENT)
    assert Tokenizer(broken).render("?", "text") == "config ?"
    (broken / "chat_template.jinja").write_text("jinja " + CONTENT)
    assert Tokenizer(broken).render("?", "text") == "jinja ?"
    (broken / "additional_chat_templates" / "default.jinja").write_text("default " + CONTENT)
    assert Tokenizer(broken).render("?", "text") == "default ?"


# ------------------------------------------------------------------------------------------------
# An older thing beside a newer one


def test_the_tokenizer_as_transformers_5_saves_it(broken, tokenization):
    """One tokenizer.json, the template in a file, and little in tokenizer_config.json."""
    for name in ("vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json"):
        (broken / name).unlink()
    config = json.loads((broken / "tokenizer_config.json").read_text())
    (broken / "chat_template.jinja").write_text(config["chat_template"])
    config = {
        "backend": "tokenizers",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "extra_special_tokens": ["<|im_start|>", "<|im_end|>"],
        "model_max_length": 10**30,
        "is_local": True,
        "tokenizer_class": "Qwen2Tokenizer",
    }
    (broken / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer(broken)
    question, answer = tokenization["question"], tokenization["answer"]
    assert tokenizer.sft_ids(question, answer) == (tokenization["full_ids"], tokenization["labels"])
    assert (tokenizer.eos_token_ids, tokenizer.pad_token_id) == ((IM_END,), ENDOFTEXT)


def test_tokenizer_json_counts_and_not_older_files_beside_it(broken, tokenization):
    (broken / "vocab.json").write_text('{"a": 0}')
    (broken / "merges.txt").write_text("#version: 0.2\n")
    (broken / "added_tokens.json").write_text('{"<|im_end|>": 1}')
    assert Tokenizer(broken).prompt_ids(tokenization["question"]) == tokenization["prompt_ids"]


def test_added_tokens_of_the_config_count_and_not_an_older_list(broken, tokenization):
    (broken / "tokenizer.json").unlink()
    added = {"<|im_end|>": 317, "<|endoftext|>": 318, "<|im_start|>": 319, "<old>": 320}
    (broken / "added_tokens.json").write_text(json.dumps(added))
    tokenizer = Tokenizer(broken)
    assert tokenizer.ids == 320 and len(tokenizer.encode("<old>")) > 1
    assert tokenizer.prompt_ids(tokenization["question"]) == tokenization["prompt_ids"]


# ------------------------------------------------------------------------------------------------
# Whose fault it is


def test_a_mistake_of_the_program_is_not_told_as_a_fault_of_the_file():
    tokenizer, bert = Tokenizer(CHECKPOINT), BertTokenizer(CHECKPOINT)
    for mistake in (lambda: tokenizer.encode(3), lambda: tokenizer.encode(None), lambda: bert([3])):
        with pytest.raises(TypeError):
            mistake()


def test_half_a_surrogate_pair_is_the_questions_fault():
    with pytest.raises(DataError, match="the question is no text in UTF-8"):
        Tokenizer(CHECKPOINT).prompt_ids("Which \udcff?")


@pytest.mark.parametrize(
    "added",
    [
        5,
        [1],
        {"317": "<|im_end|>"},
        {"317": {"content": 5}},
        {"317": {}},
        {"x": {"content": "y"}},
    ],
)
def test_added_tokens_that_cannot_be(broken, added):
    (broken / "tokenizer.json").unlink()
    edit(broken / "tokenizer_config.json", added_tokens_decoder=added)
    with pytest.raises(DataError, match=f"{broken}/tokenizer_config.json: its added tokens"):
        Tokenizer(broken)


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt", "bert/vocab.txt", "tokenizer.json"])
def test_pointers_of_git_lfs_are_named(broken, name):
    if name != "tokenizer.json":
        (broken / "tokenizer.json").unlink()
    (broken / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7\n")
    with pytest.raises(DataError, match=f"{broken / name}: a git-lfs pointer.*git lfs pull"):
        load_all(broken)
