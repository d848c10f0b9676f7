"""Text: the checkpoint's tokenizer and chat template, and BERT's tokenizer for the branch gate.

    prompt_ids     = Tokenizer("checkpoint").prompt_ids(QUESTION_REASONING)   # with -201 video, -202 audio
    bert_ids, mask = BertTokenizer("checkpoint")([QUESTION_REASONING])

Shapes: B prompts, P prompt length, C completion length, L BERT length.
"""

import json
import re
import unicodedata
from pathlib import Path

import jinja2.sandbox
import tokenizers
import torch
from tokenizers import decoders, models, normalizers, pre_tokenizers

from errors import foreign, limits, read_json, require

MAX_TEMPLATE = 256 << 20, 5, 100_000    # bytes, seconds, characters beside the question that a chat template may take

VIDEO_TOKEN, AUDIO_TOKEN = -201, -202   # placeholders in prompt ids; the model puts the media tokens there
IGNORE = -100                           # label of positions without loss, the default of torch's cross entropy

QUESTION_LABEL = ("As an emotional recognition expert; throughout the video, which emotion conveyed by the characters "
                  "is the most obvious to you?")
QUESTION_REASONING = (f"{QUESTION_LABEL}\nOutput the thinking process in <think> </think> and final emotion in "
                      "<answer> </answer> tags.")

MEDIA_TEXT = {"video_audio": "<vi_start><video><vi_end>\n<au_start><audio><au_end>\n",
              "video": "<vi_start><video><vi_end>\n",
              "audio": "<au_start><audio><au_end>\n",
              "text": ""}
MODALITIES = tuple(MEDIA_TEXT)


def _read_tokenizer(path):
    """A tokenizer.json, without the padding and truncation that a saved one may bring along."""
    return tokenizers.Tokenizer.from_str(json.dumps(read_json(path, {}) | {"padding": None, "truncation": None}))


# How Qwen2 cuts text before merging bytes: contractions, words with the character before them, single digits,
# runs of punctuation, line ends, white space.
QWEN2_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
                 r"|\s+(?!\S)|\s+")


def _build_qwen2(path, config):
    """Qwen2's byte-level BPE from vocab.json and merges.txt, for checkpoints without a tokenizer.json."""
    vocab, merges = path / "vocab.json", path / "merges.txt"
    require(vocab.is_file() and merges.is_file(), f"{path}: has neither tokenizer.json nor vocab.json and merges.txt")
    tokenizer = tokenizers.Tokenizer(models.BPE.from_file(str(vocab), str(merges)))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(tokenizers.Regex(QWEN2_PATTERN), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    added = {number: {"content": text} for text, number in read_json(path / "added_tokens.json", {}).items()}
    added |= {int(number): token for number, token in config.get("added_tokens_decoder", {}).items()}
    for number, token in sorted(added.items()):     # in this order, as ids count on from the vocabulary's end
        tokenizer.add_special_tokens([tokenizers.AddedToken(token["content"], normalized=False)])
        require(tokenizer.token_to_id(token["content"]) == number,
                 f"{path}: the added token {token['content']} does not get its id {number}")
    return tokenizer


class _Undefined(jinja2.Undefined):
    """A name that the chat does not have may be asked about, as templates do, but not be printed as nothing."""
    __str__ = jinja2.Undefined._fail_with_undefined_error


def _read_template(path, config):
    file = path / "chat_template.jinja"
    source = file.read_text(encoding="utf-8") if file.is_file() else config.get("chat_template")
    if isinstance(source, list):    # several named ones
        source = {entry["name"]: entry["template"] for entry in source}.get("default")
    require(source and isinstance(source, str), f"{path}: has no chat template, in tokenizer_config.json or chat_template.jinja")

    def complain(message):          # templates do it with this
        raise jinja2.TemplateError(str(message))

    def refuse(context, operator, left, right):
        raise jinja2.TemplateError(f"the operator {operator} is not for chats")     # one of it can take hours

    # A template is a program that came with the checkpoint: it runs in a sandbox, and not for long.
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, undefined=_Undefined)
    environment.intercepted_binops, environment.call_binop = frozenset(["**"]), refuse
    environment.globals["raise_exception"] = complain
    with limits(*MAX_TEMPLATE[:2]):
        return environment.from_string(source)


class Tokenizer:
    """The language model's tokenizer and chat template, from a checkpoint directory.

    `<video>` and `<audio>` are cut out of the rendered chat and become VIDEO_TOKEN and AUDIO_TOKEN; the pieces
    between them are tokenised on their own. `<vi_start>` and the like are ordinary text, as in the published model.
    """

    def __init__(self, path):
        self.path = path = Path(path)
        self.prompts = {}       # question, modality -> ids
        config, generation = (read_json(path / f"{name}_config.json", {}) for name in ("tokenizer", "generation"))
        file = path / "tokenizer.json"
        with foreign(path, "its tokenizer cannot be used"):
            self.tokenizer = _read_tokenizer(file) if file.is_file() else _build_qwen2(path, config)
            names = {name: config.get(name) or "" for name in ("bos_token", "eos_token", "pad_token")}
            self.names = {name: text["content"] if isinstance(text, dict) else text for name, text in names.items()}
            self.end_of_turn = self.tokenizer.token_to_id("<|im_end|>")
            require(self.end_of_turn is not None, f"{path}: its tokenizer has no <|im_end|>, so it is not HumanOmni's")
            eos, pad = (generation.get(name, self.tokenizer.token_to_id(self.names[name.removesuffix("_id")]))
                        for name in ("eos_token_id", "pad_token_id"))
            if isinstance(eos, list):       # several may end a text; training teaches the end of the turn
                eos = self.end_of_turn if self.end_of_turn in eos else eos[0]
            self.eos_token_id = self.end_of_turn if eos is None else eos
            self.pad_token_id = self.eos_token_id if pad is None else pad
            for number in (self.eos_token_id, self.pad_token_id):
                require(type(number) is int and self.tokenizer.id_to_token(number) is not None,
                         f"{path}/generation_config.json: eos_token_id and pad_token_id should be ids of tokens, not {number!r}")
            self.ids = max(self.tokenizer.get_vocab().values()) + 1     # how many the model has to have
        with foreign(path, "its chat template is not valid"):
            self.template = _read_template(path, config)

    def encode(self, text):
        """Ids of a text without media; special tokens in it are single ids."""
        with foreign(self.path, "its tokenizer cannot be used"):
            ids = self.tokenizer.encode(text, add_special_tokens=False).ids
            read, given = (unicodedata.normalize("NFC", t) for t in (self.tokenizer.decode(ids, skip_special_tokens=False), text))
        require(read == given, f"{self.path}: its tokenizer loses a part of {text!r}; download it again")
        return ids

    def render(self, question, modality="video_audio"):
        """The chat as text, up to where the answer begins, with <video> and <audio> still in it."""
        require(modality in MODALITIES, f"modality must be one of {', '.join(MODALITIES)}, not {modality!r}")
        require("<video>" not in question and "<audio>" not in question,
                 f"the question must not contain <video> or <audio>, they are added here: {question!r}")
        content = MEDIA_TEXT[modality] + question
        with foreign(self.path, "its chat template cannot be rendered"), limits(*MAX_TEMPLATE[:2]):
            text = self.template.render(messages=[{"role": "user", "content": content}], add_generation_prompt=True, **self.names)
        markers = [text.count(marker) == content.count(marker) for marker in ("<video>", "<audio>")]
        require(content.strip() in text and all(markers) and len(text) <= len(content) + MAX_TEMPLATE[2], f"{self.path}: its chat "
                 f"template should repeat {content!r} once and add no more than {MAX_TEMPLATE[2]} characters, gives {text[:300]!r}")
        return text

    def prompt_ids(self, question, modality="video_audio"):
        """Question -> list of P ids, one VIDEO_TOKEN and AUDIO_TOKEN among them as the modality says."""
        if (question, modality) not in self.prompts:        # usually the same one all along
            ids, media = [], {"<video>": VIDEO_TOKEN, "<audio>": AUDIO_TOKEN}
            for piece in re.split("(<video>|<audio>)", self.render(question, modality)):
                ids += [media[piece]] if piece in media else self.encode(piece)
            self.prompts[question, modality] = ids
        return list(self.prompts[question, modality])

    def sft_ids(self, question, answer, modality="video_audio"):
        """Question and answer -> (ids, labels), lists of P + C; labels are IGNORE before the answer.

        Prompt and answer are tokenised apart, so that the prompt has the very ids it has at inference.
        """
        prompt = self.prompt_ids(question, modality)
        completion = self.encode(answer) + [self.end_of_turn] + self.encode("\n")
        return prompt + completion, [IGNORE] * len(prompt) + completion

    def decode(self, ids):
        """Ids (list or tensor) -> text, without special tokens and placeholders."""
        return self.tokenizer.decode([int(i) for i in ids if i >= 0], skip_special_tokens=True)


class BertTokenizer:
    """BERT's WordPiece for the branch gate, from tokenizer.json or vocab.txt in `path` or in its folder bert/."""

    def __init__(self, path):
        # bert/ first: a checkpoint's own tokenizer.json is the language model's.
        self.path = path
        with foreign(path, "its BERT vocabulary cannot be used"):
            folders = [f for f in (Path(path) / "bert", Path(path)) if (f / "vocab.txt").is_file()
                       or read_json(f / "tokenizer.json", {}).get("model", {}).get("type") == "WordPiece"]
            require(folders, f"{path}: has no BERT vocabulary (tokenizer.json or vocab.txt, there or in its folder "
                     "bert/); pass a BERT directory with --bert DIR")
            self.path = folder = folders[0]
            config = read_json(folder / "tokenizer_config.json", {})
            if (folder / "tokenizer.json").is_file():
                self.tokenizer = _read_tokenizer(folder / "tokenizer.json")
            else:
                vocab = models.WordPiece.read_file(str(folder / "vocab.txt"))
                self.tokenizer = tokenizers.BertWordPieceTokenizer(vocab, lowercase=config.get("do_lower_case", True))
            special = [self.tokenizer.token_to_id(token) for token in ("[PAD]", "[UNK]", "[CLS]", "[SEP]")]
            require(None not in special, f"{folder}: its vocabulary is not BERT's, it lacks [PAD], [UNK], [CLS] or [SEP]")
            positions = read_json(folder / "config.json", {}).get("max_position_embeddings", 512)
            self.length = min(positions, config.get("model_max_length", 512))
            self.tokenizer.enable_truncation(self.length)
            self.tokenizer.enable_padding(pad_id=special[0])
            self.ids = max(self.tokenizer.get_vocab().values()) + 1
        ids, _ = self(["a"])
        require([ids[0, 0], ids[0, -1]] == special[2:], f"{folder}: its tokenizer does not put a text between [CLS] and [SEP], as BERT's does")

    def __call__(self, questions):
        """B questions -> input_ids, attention_mask, both (B, L) int64; cut to the model's length, padded to L."""
        with foreign(self.path, "its BERT vocabulary cannot be used"):
            encoded = self.tokenizer.encode_batch(list(questions))
            return torch.tensor([e.ids for e in encoded]), torch.tensor([e.attention_mask for e in encoded])
