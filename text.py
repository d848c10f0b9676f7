"""Text: the checkpoint's tokenizer and chat template, and BERT's tokenizer for the branch gate.

    tokenizer = Tokenizer("checkpoint")
    prompt_ids = tokenizer.prompt_ids(QUESTION_REASONING)    # with -201 for video, -202 for audio
    bert_ids, mask = BertTokenizer("checkpoint")([QUESTION_REASONING])

Files are read as transformers reads them, from any of its versions; where two of them say
different things, the one counts that counts there.

Shapes: B prompts, P prompt length, C completion length, L BERT length.
"""

import contextlib
import json
import re
import unicodedata
from pathlib import Path

import tokenizers
import torch
from tokenizers import decoders, models, normalizers, pre_tokenizers

from support.chat_template import ChatTemplate
from support.errors import DataError, read_json, read_text, require

# Placeholders in prompt ids; the model puts the media tokens there.
VIDEO_TOKEN, AUDIO_TOKEN = -201, -202
# Label of positions without loss, the default of torch's cross entropy.
IGNORE = -100

QUESTION_LABEL = (
    "As an emotional recognition expert; throughout the video, which emotion conveyed by the "
    "characters is the most obvious to you?"
)
QUESTION_REASONING = (
    f"{QUESTION_LABEL}\nOutput the thinking process in <think> </think> and final emotion in "
    "<answer> </answer> tags."
)

MEDIA_TEXT = {
    "video_audio": "<vi_start><video><vi_end>\n<au_start><audio><au_end>\n",
    "video": "<vi_start><video><vi_end>\n",
    "audio": "<au_start><audio><au_end>\n",
    "text": "",
}
MODALITIES = tuple(MEDIA_TEXT)


class Tokenizer:
    """The language model's tokenizer and chat template, from a checkpoint directory.

    `<video>` and `<audio>` are cut out of the rendered chat and become VIDEO_TOKEN and AUDIO_TOKEN;
    the pieces between them are tokenised on their own. `<vi_start>` and the like are ordinary text,
    as in the published model.

    eos_token_id   ends the answers that SFT teaches: <|im_end|>
    eos_token_ids  tuple of all ids that end a completion: that one, and those that the checkpoint
                   names in generation_config.json (or else config.json) and for its tokenizer
    pad_token_id   fills rows up
    ids            how many the model has to have
    """

    def __init__(self, path):
        self.path = path = Path(path)
        config = read_json(path / "tokenizer_config.json", {})
        self.special_tokens = _special_tokens(path, config)  # kind -> text
        self.tokenizer = _read_language_tokenizer(path, config)
        self.eos_token_id = self.tokenizer.token_to_id("<|im_end|>")
        require(
            self.eos_token_id is not None,
            f"{path}: its tokenizer has no <|im_end|>, so it is not HumanOmni's",
        )
        self.ids = max(self.tokenizer.get_vocab().values()) + 1
        self.eos_token_ids, self.pad_token_id = self._ends_and_padding()
        self.template = ChatTemplate(path, config, self.special_tokens)
        self.prompts = {}  # (question, modality) -> ids

    def _ends_and_padding(self):
        generation = read_json(self.path / "generation_config.json", {})
        named = generation.get("eos_token_id")
        if named is None:
            named = read_json(self.path / "config.json", {}).get("eos_token_id")
        ends = named if isinstance(named, list) else [named]
        if named is None:
            ends = []
        own_eos = self.tokenizer.token_to_id(self.special_tokens["eos_token"])
        own_pad = self.tokenizer.token_to_id(self.special_tokens["pad_token"])
        pads = [generation.get("pad_token_id"), own_pad, self.eos_token_id]
        pad = next(number for number in pads if number is not None)
        require(
            named != [] and all(self._has_id(number) for number in (*ends, pad)),
            f"{self.path}: eos_token_id and pad_token_id in generation_config.json (or "
            f"config.json) should be ids of tokens, not {named!r} and {pad!r}",
        )
        if own_eos is not None:
            ends = [*ends, own_eos]
        return tuple(dict.fromkeys([self.eos_token_id, *ends])), pad

    def _has_id(self, number):
        in_range = type(number) is int and 0 <= number < self.ids
        return in_range and self.tokenizer.id_to_token(number) is not None

    def encode(self, text):
        """Ids of a text without media; special tokens in it are single ids."""
        with _as_fault_of(self.path):
            ids = self.tokenizer.encode(text, add_special_tokens=False).ids
            read = self.tokenizer.decode(ids, skip_special_tokens=False)
        require(
            unicodedata.normalize("NFC", read) == unicodedata.normalize("NFC", text),
            f"{self.path}: its tokenizer loses a part of {text!r}; download it again",
        )
        return ids

    def render(self, question, modality="video_audio"):
        """The chat as text, up to where the answer begins, with <video> and <audio> in it."""
        require(
            modality in MODALITIES,
            f"modality must be one of {', '.join(MODALITIES)}, not {modality!r}",
        )
        require(
            "<video>" not in question and "<audio>" not in question,
            f"the question must not contain <video> or <audio>, they are added here: {question!r}",
        )
        require(
            not re.search("[\ud800-\udfff]", question),
            f"the question is no text in UTF-8: {question!r}",
        )
        return self.template.render(MEDIA_TEXT[modality] + question)

    def prompt_ids(self, question, modality="video_audio"):
        """Question -> list of P ids, with one VIDEO_TOKEN and AUDIO_TOKEN as the modality says."""
        if (question, modality) not in self.prompts:  # usually the same one all along
            ids, media = [], {"<video>": VIDEO_TOKEN, "<audio>": AUDIO_TOKEN}
            for piece in re.split("(<video>|<audio>)", self.render(question, modality)):
                ids += [media[piece]] if piece in media else self.encode(piece)
            self.prompts[question, modality] = ids
        return list(self.prompts[question, modality])

    def sft_ids(self, question, answer, modality="video_audio"):
        """Question, answer -> (ids, labels), lists of P + C; labels are IGNORE before the answer.

        Prompt and answer are tokenised apart: the prompt has the very ids it has at inference."""
        prompt = self.prompt_ids(question, modality)
        completion = self.encode(answer) + [self.eos_token_id] + self.encode("\n")
        return prompt + completion, [IGNORE] * len(prompt) + completion

    def decode(self, ids):
        """Ids (list or tensor) -> text, without special tokens and placeholders."""
        return self.tokenizer.decode([int(i) for i in ids if i >= 0], skip_special_tokens=True)


class BertTokenizer:
    """BERT's WordPiece for the branch gate, from tokenizer.json or vocab.txt.

    They lie in `path` or in its folder bert/.

    ids     how many the model has to have
    length  longest text in ids, the end cut off
    """

    def __init__(self, path):
        self.path = folder = _bert_folder(Path(path))
        config = read_json(folder / "tokenizer_config.json", {})
        self.tokenizer = _read_bert_tokenizer(folder, config)
        pad, _, start, end = (self.tokenizer.token_to_id(token) for token in BERT_TOKENS)
        positions = read_json(folder / "config.json", {}).get("max_position_embeddings", 512)
        longest = config.get("model_max_length", 512)
        for number in (positions, longest):
            require(
                type(number) in (int, float) and number >= 3,
                f"{folder}: max_position_embeddings in its config.json and model_max_length in its "
                f"tokenizer_config.json should be numbers from 3 on, not {number!r}",
            )
        self.length = int(min(positions, longest, 2**20))
        with _as_fault_of(folder):
            self.tokenizer.enable_truncation(self.length)
            self.tokenizer.enable_padding(pad_id=pad)
        self.ids = max(self.tokenizer.get_vocab().values()) + 1
        ids, _ = self(["a"])
        require(
            ids.shape[1] > 2 and [ids[0, 0], ids[0, -1]] == [start, end],
            f"{folder}: its tokenizer does not put a text between [CLS] and [SEP], as BERT's does",
        )

    def __call__(self, questions):
        """B questions -> input_ids, attention_mask, both (B, L) int64, padded to the longest."""
        with _as_fault_of(self.path):
            encoded = self.tokenizer.encode_batch(list(questions))
        ids, mask = [e.ids for e in encoded], [e.attention_mask for e in encoded]
        return torch.tensor(ids), torch.tensor(mask)


# ------------------------------------------------------------------------------------------------
# Tokenizer files

# How Qwen2 cuts text before merging bytes: contractions, words with the character before them,
# single digits, runs of punctuation, line ends, white space.
QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BERT_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")


@contextlib.contextmanager
def _as_fault_of(path):
    """What the tokenizers library cannot do with a file is one DataError that names it.

    The library says so by bare Exceptions, and by panics, which are no Exceptions at all. A class
    of its own, as TypeError, is a mistake of the program that calls it, and passes."""
    try:
        yield
    except BaseException as error:
        if type(error) is not Exception and type(error).__name__ != "PanicException":
            raise
        raise DataError(
            f"{path}: its tokenizer cannot be used ({type(error).__name__}: {error}); download it "
            "again"
        ) from error


def _read_tokenizer(path):
    """A tokenizer.json, without the padding and truncation that a saved one may bring along."""
    content = read_json(path, {}) | {"padding": None, "truncation": None}
    with _as_fault_of(path):
        return tokenizers.Tokenizer.from_str(json.dumps(content))


def _read_with(read, *files):
    """What a function of the tokenizers library reads from files."""
    for file in files:
        read_text(file)  # a git-lfs pointer, and what is no text, is named for what it is
    with _as_fault_of(" and ".join(map(str, files))):
        return read(*map(str, files))


def _read_language_tokenizer(path, config):
    """tokenizer.json, or else Qwen2's byte-level BPE from vocab.json and merges.txt."""
    if (path / "tokenizer.json").is_file():
        return _read_tokenizer(path / "tokenizer.json")
    vocab, merges = path / "vocab.json", path / "merges.txt"
    require(
        vocab.is_file() and merges.is_file(),
        f"{path}: has neither tokenizer.json nor vocab.json and merges.txt",
    )
    tokenizer = tokenizers.Tokenizer(_read_with(models.BPE.from_file, vocab, merges))
    tokenizer.normalizer = normalizers.NFC()
    cut = pre_tokenizers.Split(tokenizers.Regex(QWEN2_PATTERN), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([cut, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    for number, token in sorted(_added_tokens(path, config)):
        # In this order, as ids count on from the vocabulary's end.
        with _as_fault_of(path):
            tokenizer.add_special_tokens([tokenizers.AddedToken(token, normalized=False)])
        require(
            tokenizer.token_to_id(token) == number,
            f"{path}: the added token {token} does not get its id {number}",
        )
    return tokenizer


def _added_tokens(path, config):
    """[(id, text)] from tokenizer_config.json, or, in older checkpoints, added_tokens.json."""
    file, added = path / "tokenizer_config.json", config.get("added_tokens_decoder")
    try:
        if added is None:
            file = path / "added_tokens.json"
            tokens = [(number, text) for text, number in read_json(file, {}).items()]
        else:
            tokens = [(int(number), token["content"]) for number, token in added.items()]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{file}: its added tokens are not ids and texts ({error!r})") from error
    for number, text in tokens:
        require(
            type(number) is int and isinstance(text, str),
            f"{file}: its added tokens should be ids and texts, not {number!r} and {text!r}",
        )
    return tokens


def _special_tokens(path, config):
    """Kind of token -> its text, "" where there is none, as a chat template may print them."""
    older = read_json(path / "special_tokens_map.json", {})
    tokens = {}
    for kind in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"):
        token = config.get(f"{kind}_token", older.get(f"{kind}_token"))
        if isinstance(token, dict):
            token = token.get("content", token)
        require(
            token is None or isinstance(token, str),
            f"{path}: the {kind}_token of its tokenizer should be a text, not {token!r}",
        )
        tokens[f"{kind}_token"] = token or ""
    return tokens


def _bert_folder(path):
    """The folder with BERT's vocabulary: bert/, or the path itself.

    In this order: a checkpoint's own tokenizer.json is the language model's."""
    for folder in (path / "bert", path):
        model = read_json(folder / "tokenizer.json", {}).get("model")
        is_wordpiece = isinstance(model, dict) and model.get("type") == "WordPiece"
        if is_wordpiece or (folder / "vocab.txt").is_file():
            return folder
    raise DataError(
        f"{path}: has no BERT vocabulary (tokenizer.json or vocab.txt, there or in its folder "
        "bert/); pass a BERT directory with --bert DIR"
    )


def _read_bert_tokenizer(folder, config):
    tokenizer, lower = None, config.get("do_lower_case", True)
    if (folder / "tokenizer.json").is_file():
        tokenizer = _read_tokenizer(folder / "tokenizer.json")
        vocab = tokenizer.get_vocab()
    else:
        vocab = _read_with(models.WordPiece.read_file, folder / "vocab.txt")
    require(
        set(BERT_TOKENS) <= vocab.keys(),
        f"{folder}: its vocabulary is not BERT's, it lacks one of {', '.join(BERT_TOKENS)}",
    )
    require(
        type(lower) is bool,
        f"{folder}/tokenizer_config.json: do_lower_case should be true or false, not {lower!r}",
    )
    if tokenizer is None:
        tokenizer = tokenizers.BertWordPieceTokenizer(vocab, lowercase=lower)
    return tokenizer
