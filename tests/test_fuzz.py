"""Damaged input of every kind: each file is used as it is, or refused by one error that names it.

Files are made from good ones with fixed seeds: cut off, bytes changed, JSON fields dropped,
swapped, given other types. They are read in a process of its own, so that a crash or a hang in C
code is a failure with its seed, and not the end of the tests.

    python -m pytest tests/test_fuzz.py -m "slow or not slow" -s    # 500 files of each kind
"""

import contextlib
import copy
import faulthandler
import json
import math
import multiprocessing
import os
import random
import shutil
import struct
import time
import traceback
from collections import Counter
from dataclasses import fields
from multiprocessing import connection
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from clips import copy_streams, write_clip
from conftest import GOLDEN

import data
import evaluate
import train_grpo
import train_sft
from checkpoint import CheckpointError, published_name
from data import DataError
from support import flags

SECONDS = 30  # for one file; what takes longer hangs
CHECKPOINT = GOLDEN / "tiny" / "humanomni"
QUESTION = "Which emotion is it?"


# ------------------------------------------------------------------------------------------ damage


def damaged(rng, content, structure=None):
    """Bytes with one to three things wrong.

    structure: (start, end) of the part that says where everything else is.
    """
    content = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 3))):
        start, end = structure if structure and rng.random() < 0.7 else (0, len(content))
        end = min(end, len(content))
        if end - start < 8:
            continue
        at, run = rng.randrange(start, end), rng.choice((1, 2, 4, 16, 200))
        how = rng.choice(
            ("cut", "flip", "flip", "flip", "extreme", "extreme", "zero", "noise", "drop", "repeat")
        )
        if how == "cut":
            del content[at:]
        elif how == "flip":
            content[at] ^= 1 << rng.randrange(8)
        elif how == "extreme":
            content[at : at + 4] = rng.choice(
                (
                    b"\0\0\0\0",
                    b"\xff\xff\xff\xff",
                    b"\x7f\xff\xff\xff",
                    b"\xff\xff\xff\x7f",
                    b"\0\x10\0\0",
                )
            )
        elif how == "zero":
            content[at : at + run] = bytes(len(content[at : at + run]))
        elif how == "noise":
            content[at : at + run] = rng.randbytes(run)
        elif how == "drop":
            del content[at : at + run]
        else:
            content[at:at] = content[at : at + run]
    return bytes(content)


ODD = (
    None,
    True,
    False,
    -1,
    0,
    1,
    3,
    7,
    2**31,
    10**9,
    10**30,
    0.5,
    -1e-3,
    1e308,
    math.nan,
    math.inf,
    "",
    "x",
    "1",
    "<video>",
    "../../etc/passwd",
    "a\0b",
    "\ud800",
    "ü" * 5000,
    [],
    {},
    [1, 2],
    ["x"],
    {"type": "x"},
    {"content": 3},
    [[[[[[]]]]]],
)


def nodes(value, path=()):
    """All (path, value) inside a JSON value, itself included."""
    yield path, value
    if isinstance(value, (dict, list)):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from nodes(value[key], (*path, key))


def damaged_json(rng, value):
    """A JSON value with one to three fields dropped, swapped, repeated, renamed or changed."""
    value = copy.deepcopy(value)

    def holder_and_key():
        # Depth first, so that a large list does not draw every choice.
        places, depth = list(nodes(value))[1:], rng.choice((1, 1, 2, 2, 3, 4, 9))
        near = [place for place, _ in places if len(place) == depth] or [
            place for place, _ in places
        ]
        *way, key = rng.choice(near)
        holder = value
        for step in way:
            holder = holder[step]
        return holder, key

    for _ in range(rng.choice((1, 1, 2, 3))):
        if not isinstance(value, (dict, list)) or not value:
            return value
        holder, key = holder_and_key()
        how = rng.choice(
            ("drop", "swap", "retype", "retype", "retype", "repeat", "rename", "whole", "edge")
        )
        if how == "drop":
            del holder[key]
        elif how == "swap":
            other, place = holder_and_key()
            holder[key], other[place] = copy.deepcopy(other[place]), copy.deepcopy(holder[key])
        elif how == "retype":
            holder[key] = copy.deepcopy(rng.choice(ODD))
        elif how == "edge" and type(holder[key]) in (int, float):
            holder[key] = rng.choice(
                (
                    -holder[key],
                    holder[key] + 1,
                    holder[key] * 1000,
                    str(holder[key]),
                    holder[key] + 0.5,
                )
            )
        elif how == "repeat" and isinstance(holder, list):
            holder.insert(key, copy.deepcopy(holder[key]))
        elif how == "rename" and isinstance(holder, dict):
            holder[rng.choice(("x", "type", str(key) + "s", str(key).upper()))] = holder.pop(key)
        elif how == "whole" and rng.random() < 0.1:
            return copy.deepcopy(rng.choice(ODD))
    return value


def damage_json_file(rng, path):
    text = path.read_bytes()
    if rng.random() < 0.7:
        text = json.dumps(damaged_json(rng, json.loads(text))).encode()
    else:
        text = damaged(rng, text)
    path.write_bytes(text)


# ------------------------------------------------------- one kind each: damage a file, then use it
# A kind is a function (rng, folder, bases) that returns if the input was used and found whole, and
# otherwise lets the error through with the paths that it has to name, by way of `refusable`.


@contextlib.contextmanager
def refusable(*paths):
    """The error that a bad file has to be: of our classes, naming one of the paths."""
    try:
        yield
    except (DataError, CheckpointError) as error:
        assert any(str(path) in str(error) for path in paths), f"does not name {paths}: {error}"
        raise Refused from error


class Refused(Exception):
    pass


def fuzz_clips(rng, folder, bases):
    base = rng.choice(bases)
    content = base.read_bytes()
    index = content.find(b"moov")
    path = folder / f"bad{base.suffix}"
    path.write_bytes(damaged(rng, content, (index - 4, len(content)) if index > 0 else (0, 1500)))
    modality = rng.choice(("video_audio", "video_audio", "video", "audio"))
    with refusable(path):
        item = data.Clips([data.Example(path, QUESTION, "sad", modality)], 4, 32, 80, 32000)[0]
    if "video" in modality:
        assert (
            item["pixel_values"].shape == (4, 3, 32, 32) and item["pixel_values"].abs().max() <= 1
        )
    if "audio" in modality:
        assert item["input_features"].shape == (80, 200) and item["input_features"].isfinite().all()


def fuzz_manifests(rng, folder, bases):
    turns = [
        {"from": "human", "value": "<video>\n<audio>\n" + QUESTION},
        {"from": "gpt", "value": "happy"},
    ]
    for name in ("a.mp4", "b.mp4"):
        (folder / name).touch()
    path = folder / "manifest.json"
    path.write_text(
        json.dumps(
            [
                {"video": name, "conversations": turns, "label": "x"}
                for name in ("a.mp4", "b.mp4", "a.mp4")
            ]
        )
    )
    damage_json_file(rng, path)
    with refusable(path):
        examples = data.read_manifest(path)
    assert examples
    for example in examples:
        assert (
            example.video is None or example.video.is_file()
        ) and example.modality in data.MODALITIES
        assert "<video>" not in example.question and "<audio>" not in example.question
        json.dumps([example.question, example.answer, example.extra], ensure_ascii=False).encode()


def fuzz_checkpoints(rng, folder, bases):
    shutil.copytree(CHECKPOINT, folder / "c")
    folder = folder / "c"
    weights, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    shard = folder / "model-00001-of-00001.safetensors"
    what = rng.choice(
        ("config", "config", "encoder", "header", "header", "bytes", "bytes", "index")
    )
    if what == "config":
        damage_json_file(rng, folder / "config.json")
    elif what == "encoder":
        damage_json_file(rng, folder / rng.choice(("siglip", "whisper", "bert")) / "config.json")
    elif what == "index":
        weights.rename(shard)
        index.write_text(
            json.dumps(
                {
                    "metadata": {"total_size": 1},
                    "weight_map": dict.fromkeys(read_header(shard)[0], shard.name),
                }
            )
        )
        damage_json_file(rng, index)
    elif what == "header":
        header, rest = read_header(weights)
        text = json.dumps(damaged_json(rng, header)).encode()
        weights.write_bytes(
            struct.pack("<Q", len(text) + rng.choice((0, 0, 0, 0, 1, -1))) + text + rest
        )
    else:
        content = weights.read_bytes()
        weights.write_bytes(damaged(rng, content, (0, struct.unpack("<Q", content[:8])[0] + 8)))
    with refusable(folder):
        omni = load(folder)
    check_tensors_are_the_files(omni.model, shard if shard.exists() else weights)
    use(omni)


def load(folder):
    config = SimpleNamespace(
        model=str(folder), siglip="", whisper="", bert="", device="cpu", dtype="auto"
    )
    return flags.load(config)


def read_header(path):
    """A safetensors file by hand -> its header without the metadata, and the bytes behind it."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    header.pop("__metadata__", None)
    return header, content[8 + length :]


def check_tensors_are_the_files(model, path):
    """Bit for bit, by the file's own header."""
    header, rest = read_header(path)
    for key, tensor in model.state_dict().items():
        entry = header[published_name(key)]
        raw = rest[slice(*entry["data_offsets"])]
        kind = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}[entry["dtype"]]
        stored = torch.from_numpy(np.frombuffer(raw, kind).copy()).reshape(entry["shape"])
        stored = stored.view(torch.bfloat16) if entry["dtype"] == "BF16" else stored
        assert torch.equal(stored.float().view(torch.int32), tensor.view(torch.int32)), key


@torch.no_grad()
def use(omni):
    """All that a script does with a model, once. Damaged weights may make logits of any number."""
    examples = [data.Example(GOLDEN / "media" / "clip16k.mp4", QUESTION, "sad", "video_audio")]
    clips = data.clips_of(omni.model, examples)
    batch = data.encode(omni, clips, next(data.batches(clips, [0], 1)))
    (prompt,) = data.embed(omni.model, batch)
    V = omni.model.configs["llm"]["vocab_size"]
    assert omni.model.logits(omni.model(prompt[None])).shape == (1, len(prompt), V)


def fuzz_tokenizers(rng, folder, bases):
    shutil.copytree(CHECKPOINT, folder / "c")
    folder = folder / "c"
    config = ["tokenizer_config.json", "generation_config.json", "special_tokens_map.json"]
    if rng.random() < 0.4:  # as some checkpoints come: without a tokenizer.json
        (folder / "tokenizer.json").unlink()
        if rng.random() < 0.3:  # and then added_tokens.json counts
            path = folder / "tokenizer_config.json"
            content = json.loads(path.read_text())
            content.pop("added_tokens_decoder")
            path.write_text(json.dumps(content))
        names = [*config, "vocab.json", "merges.txt", "added_tokens.json", "bert/vocab.txt"]
    else:
        names = [*config, "tokenizer.json", "tokenizer.json", "config.json"]
        names += ["bert/vocab.txt", "bert/tokenizer_config.json", "bert/tokenizer.json"]
        names += ["bert/config.json"]
    path = folder / rng.choice(names)
    if path.name == "tokenizer.json" and path.parent.name == "bert":
        data.BertTokenizer(CHECKPOINT).tokenizer.save(str(path))
        (folder / "bert" / "vocab.txt").unlink()
    if path.name == "config.json" and path.parent == folder:  # read for its eos_token_id
        (folder / "generation_config.json").unlink()
    if path.suffix == ".json":
        damage_json_file(rng, path)
    else:
        path.write_bytes(damaged(rng, path.read_bytes()))
    with refusable(folder):
        omni = load(folder)
        tokenizer = omni.tokenizer
        ids, labels = tokenizer.sft_ids(QUESTION, "<think>It is.</think>\n<answer>happy</answer>")
        question_ids, mask = omni.bert([QUESTION, "a"])
    assert len(ids) == len(labels) and [i for i in ids if i < 0] == [-201, -202]
    assert all(0 <= i < 320 for i in ids if i not in (-201, -202))
    assert all(type(i) is int and 0 <= i < 320 for i in tokenizer.eos_token_ids)
    assert tokenizer.eos_token_id in tokenizer.eos_token_ids and 0 <= tokenizer.pad_token_id < 320
    # Nothing of the text is lost, whatever the ids are.
    pieces = tokenizer.render(QUESTION).replace("<video>", "|").replace("<audio>", "|").split("|")
    for piece in pieces:
        again = tokenizer.tokenizer.decode(tokenizer.encode(piece), skip_special_tokens=False)
        assert again == piece
    assert question_ids.shape == mask.shape and question_ids.dtype == torch.int64
    use(omni)


TEMPLATE = json.loads((CHECKPOINT / "tokenizer_config.json").read_text())["chat_template"]
SNIPPETS = [
    "{{ ''.__class__.__mro__ }}",
    "{% for i in range(10**9) %}",
    "{% for i in range(99999) %}",
    "{% endfor %}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ nothing }}",
    "{% if tools %}",
    "{% endif %}",
    "{% else %}",
    "{{ messages }}",
    "{{ messages[0].content }}",
    "<video>",
    "{{ messages[7].content }}",
    "{{ 1 / 0 }}",
    "{% include 'x' %}",
    "{{ raise_exception('no') }}",
    "{{ cycler.__init__.__globals__ }}",
    "{{ messages[0].pop('content') }}",
    "{{ messages[0].content | replace('<audio>', '') }}",
    "{% set messages = [] %}",
    "{% break %}",
    "{% continue %}",
    "{% generation %}",
    "{% endgeneration %}",
    "{{ messages | tojson(indent=2) }}",
    "{{ nothing | tojson }}",
    "{{ strftime_now('%d %b %Y') }}",
    "{{ strftime_now(3) }}",
    "{{ 'a' * 99999 }}",
    "{% set ns = namespace(x='a') %}{% for i in range(9) %}{% set ns.x = ns.x ~ 'b' %}{% endfor %}",
    "{{ tools }}",
    "{{ bos_token }}",
    "{% filter upper %}",
    "{% endfilter %}",
    "{#",
    "}}",
    "{{",
    "\0",
    "{{ self }}",
    "{{ lipsum(n=100) }}",
    "{{ range(100000) | list }}",
]


def fuzz_templates(rng, folder, bases):
    shutil.copytree(CHECKPOINT, folder / "c", ignore=shutil.ignore_patterns("*.safetensors"))
    path = folder / "c" / "chat_template.jinja"
    pieces = [piece for block in TEMPLATE.split("{%") for piece in ("{%", block)][1:]
    for _ in range(rng.choice((1, 1, 2))):
        how, at = (
            rng.choice(("insert", "insert", "drop", "swap", "bytes", "repeat")),
            rng.randrange(len(pieces)),
        )
        if how == "insert":
            pieces.insert(at, rng.choice(SNIPPETS))
        elif how == "drop":
            del pieces[at]
        elif how == "swap":
            other = rng.randrange(len(pieces))
            pieces[at], pieces[other] = pieces[other], pieces[at]
        elif how == "repeat":
            pieces.insert(at, pieces[at])
        else:
            pieces[at] = damaged(rng, pieces[at].encode()).decode(errors="ignore")
    path.write_text("".join(pieces), newline="")
    with refusable(path.parent):
        tokenizer = data.Tokenizer(path.parent)
        ids = {modality: tokenizer.prompt_ids(QUESTION, modality) for modality in data.MODALITIES}
    for modality, row in ids.items():
        assert (row.count(-201), row.count(-202)) == ("video" in modality, "audio" in modality)
        assert QUESTION in tokenizer.decode(row)


VALUES = [
    "",
    "0",
    "1",
    "-1",
    "3",
    "2.5",
    "nan",
    "inf",
    "-inf",
    "1e400",
    "1e-400",
    "-1e-3",
    "10" * 30,
    "x",
    "none",
    "paper",
    "cpu",
    "True",
    "--",
    "-",
    "é",
    "0x10",
    "1_0",
    " 1",
    "1,5",
    "\udcff",
    "/",
    "..",
    "/dev/null/x",
]


def fuzz_flags(rng, folder, bases):
    module = rng.choice((evaluate, train_grpo, train_sft))
    names = [f.name.replace("_", "-") for f in fields(module.Config)]
    argv = []
    for _ in range(rng.randrange(1, 4)):
        name = rng.choice(names)
        name = rng.choice((name, name, name, name, "no-" + name, name[:3], name + "x"))
        argv += rng.choice(
            ([f"--{name}", rng.choice(VALUES)],) * 6
            + ([f"--{name}={rng.choice(VALUES)}"], [f"--{name}"], [rng.choice(VALUES)])
        )
    message = folder / "message"
    try:
        with (
            open(message, "w", errors="backslashreplace") as file,
            contextlib.redirect_stderr(file),
        ):
            config = flags.parse_flags(module.Config, "", argv, getattr(module, "PRESETS", None))
    except SystemExit as stop:
        assert stop.code == 2 and "error: " in message.read_text(), (argv, message.read_text())
        raise Refused from stop
    except DataError as error:
        assert str(error).startswith("--"), error
        raise Refused from error
    for f in fields(config):
        value = getattr(config, f.name)
        assert type(value) in (
            type(f.default),
            list if isinstance(f.default, tuple) else type(f.default),
        ), (f.name, value)
        assert not isinstance(value, float) or math.isfinite(value)
        assert value >= f.metadata.get("least", value) and value <= f.metadata.get("most", value)
        assert "choices" not in f.metadata or value in f.metadata["choices"]


KINDS = {
    name.removeprefix("fuzz_"): function
    for name, function in list(globals().items())
    if name.startswith("fuzz_")
}


# -------------------------------------------------------------------------------------- the runner


class Reader:
    """The process that reads the files; a new one after a crash or a hang.

    It is spawned, never forked: decoders and matrix products leave threads here, and a fork copies
    their locks, but not the threads that would open them. One serves all kinds, as starting it
    takes seconds.
    """

    def __init__(self, seconds=SECONDS):
        self.seconds = seconds
        self.process = None

    def read(self, use, seed, root, bases):
        """ "decoded", "refused", a traceback, or how the process ended."""
        if self.process is None:
            self.start()
        self.pipe.send((use, seed, root, bases))
        if not connection.wait([self.pipe, self.process.sentinel], self.seconds):
            self.stop()
            return f"hangs for {self.seconds} s"
        try:
            return self.pipe.recv()
        except EOFError:
            self.process.join()
            outcome = f"died, exit code {self.process.exitcode}"
            self.process = None
            return outcome

    def start(self):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()
        assert self.pipe.recv() == "ready"

    def stop(self):
        if self.process:
            self.process.kill()
            self.process.join()
            self.process = None


def serve(pipe):
    """What a Reader's process does: jobs in, outcomes out."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # decoders and panics are loud
    faulthandler.disable()
    torch.set_num_threads(1)
    pipe.send("ready")
    while True:
        use, seed, root, bases = pipe.recv()
        kind = use.__name__.removeprefix("fuzz_")
        folder = Path(root) / f"{kind}_{seed}"
        folder.mkdir()
        try:
            use(random.Random(f"{kind} {seed}"), folder, bases)
            outcome = "decoded"
        except Refused:
            outcome = "refused"
        except BaseException:  # whatever it is, it is to be shown: panics are no Exceptions
            outcome = traceback.format_exc()
        shutil.rmtree(folder)
        pipe.send(outcome)


def run(reader, use, seeds, root, bases):
    """How many were decoded and refused; and the failures, which are neither."""
    outcomes, failures = Counter(), []
    for seed in seeds:
        outcome = reader.read(use, seed, root, bases)
        if outcome in ("decoded", "refused"):
            outcomes[outcome] += 1
        else:
            failures.append(f"{use.__name__}, seed {seed}: {outcome}")
    return outcomes, failures


@pytest.fixture(scope="module")
def reader():
    reader = Reader()
    yield reader
    reader.stop()


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    faststart = {"movflags": "faststart"}
    forms = {
        "a.mp4": {"video": "mpeg4", "audio": "aac", "options": faststart},
        "b.avi": {"video": "mjpeg", "audio": "pcm_s16le"},
        "c.avi": {"video": "mpeg4", "audio": "libmp3lame", "rate": 44100},
        "d.mkv": {"video": "libx264", "audio": "flac"},
        "e.webm": {"video": "libvpx", "audio": "libopus", "rate": 48000},
        "f.flv": {"video": "flv", "audio": "libmp3lame", "rate": 44100},
        "g.wav": {"video": None, "audio": "pcm_f32le"},
        "h.ogg": {"video": None, "audio": "libopus", "rate": 48000},
        "i.ts": {"video": "libx264", "audio": "aac"},
        "j.mov": {"video": "mpeg4", "audio": "pcm_s16le", "options": faststart},
        "k.flac": {"video": None, "audio": "flac", "layout": "7.1", "levels": [0.1] * 8},
        "l.caf": {"video": None, "audio": "pcm_s16le"},
    }
    clips = [GOLDEN / "media" / "clip16k.mp4", GOLDEN / "media" / "clip.mp4"]
    for name, form in forms.items():
        clips.append(write_clip(folder / name, frames=12, size=(48, 32), **form))

    def cut(packet):  # leaves an edit list
        packet.pts -= round(0.2 / packet.time_base)
        packet.dts -= round(0.2 / packet.time_base)
        return True

    return [*clips, copy_streams(folder / "a.mp4", folder / "m.mp4", cut, faststart)]


@pytest.mark.parametrize("count", [20, pytest.param(500, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", KINDS)
def test_whatever_is_wrong_is_refused_by_name(kind, count, reader, bases, tmp_path, capsys):
    count = int(os.environ.get("FUZZ", count))
    first = 1000 if count != 20 else 0  # other files than those of the short run
    seeds = range(first, first + count)
    outcomes, failures = run(reader, KINDS[kind], seeds, tmp_path, bases)
    with capsys.disabled():
        print(f" {kind}: {outcomes['decoded']} decoded, {outcomes['refused']} refused", end="")
    assert not failures, f"{len(failures)} of {count}:\n" + "\n".join(failures[:10])
    # The damage is neither harmless nor total.
    assert outcomes["refused"] and (outcomes["decoded"] or count == 20)


def misbehave(rng, folder, bases):
    """In four ways, and well with other seeds."""
    seed = int(folder.name.split("_")[1])
    if seed == 1:
        os.kill(os.getpid(), 11)
    elif seed == 2:
        time.sleep(60)
    elif seed == 3:
        with refusable(folder / "it"):
            raise DataError("something is wrong")
    elif seed == 4:
        raise KeyError("video")


def test_the_runner_sees_hangs_deaths_and_wrong_errors(reader, tmp_path, monkeypatch):
    """A test that cannot fail is none: the ways to fail, failing."""
    monkeypatch.setattr(reader, "seconds", 1)
    outcomes, failures = run(reader, misbehave, (0, 5, 3, 4, 1, 2), tmp_path, None)
    assert outcomes == {"decoded": 2}
    found = zip(("does not name", "KeyError", "exit code -11", "hangs"), failures, strict=True)
    assert [word in failure for word, failure in found] == [True] * 4
