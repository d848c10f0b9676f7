"""Checkpoint directories: read strictly from every layout, written back, refused by name."""

import json
import os
import shutil
import stat
import time
from pathlib import Path

import pytest
import torch
from conftest import GOLDEN, relative_error, small_llm_config
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

import checkpoint as checkpoint_files
from checkpoint import CheckpointError
from model import HumanOmni


@pytest.fixture
def broken(checkpoint, tmp_path):
    """A copy of the checkpoint, to break."""
    return Path(shutil.copytree(checkpoint, tmp_path / "c"))


def edit(path, *drop, **changes):
    config = {key: value for key, value in json.loads(path.read_text()).items() if key not in drop}
    path.write_text(json.dumps({**config, **changes}))


def edit_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


# ------------------------------------------------------------------------------------------------
# Saved, loaded, in every layout


def on_disk(file):
    with safe_open(file, "pt") as tensors:
        names = tensors.keys()
        return {name: tuple(tensors.get_slice(name).get_shape()) for name in names}


@torch.no_grad()
def test_save_then_load_gives_the_same_logits_and_the_published_names(
    model, checkpoint, prompts, tmp_path
):
    model.save_pretrained(tmp_path / "saved")
    again = HumanOmni.from_pretrained(tmp_path / "saved")
    assert torch.equal(again.logits(again(prompts)), model.logits(model(prompts)))
    saved, original = (
        on_disk(tmp_path / "saved" / "model.safetensors"),
        on_disk(checkpoint / "model.safetensors"),
    )
    assert all(original[name] == shape for name, shape in saved.items())
    # What the original has beyond that is never run: the last SigLIP layer, pooling heads, a
    # classifier.
    unused = set(original) - set(saved)
    assert all(part in name for name in unused for part in ["tower"] if "bert" not in name)
    assert {name.rsplit(".", 2)[0].split(".")[-1] for name in unused if "bert" in name} == {
        "pooler"
    }
    before, after = (
        load_file(checkpoint / "model.safetensors"),
        load_file(tmp_path / "saved" / "model.safetensors"),
    )
    assert all(torch.equal(before[name], tensor) for name, tensor in after.items())
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "bert/vocab.txt",
        "siglip/preprocessor_config.json",
    ):
        assert (tmp_path / "saved" / name).read_bytes() == (checkpoint / name).read_bytes(), name
    kept, written = (
        json.loads((folder / "config.json").read_text())
        for folder in (checkpoint, tmp_path / "saved")
    )
    assert kept == written


def test_saving_replaces_a_checkpoint_whole_and_casts(model, tmp_path):
    model.save_pretrained(tmp_path / "saved")
    (tmp_path / "saved" / "stale.txt").write_text("of an older run")
    model.save_pretrained(tmp_path / "saved", torch.bfloat16)
    assert not (tmp_path / "saved" / "stale.txt").exists()
    assert {t.dtype for t in load_file(tmp_path / "saved" / "model.safetensors").values()} == {
        torch.bfloat16
    }
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["saved"]  # no temporary left behind
    HumanOmni.from_pretrained(tmp_path / "saved")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        model.save_pretrained(tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").exists()


@torch.no_grad()
@pytest.mark.parametrize(
    "layout",
    [
        "separate",
        "bert prefixed, old names",
        "whisper with decoder",
        "dual-encoder siglip",
        "sharded",
        "bf16",
        "fp16",
    ],
)
def test_every_layout_loads_to_the_same_model(layout, model, checkpoint, prompts, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "c")
    tensors, options, tolerance = load_file(checkpoint / "model.safetensors"), {}, 0.0
    prefixes = {
        "siglip": "model.vision_tower.vision_tower.",
        "whisper": "model.audio_tower.audio_tower.",
        "bert": "model.bert_model.",
    }

    def separate(encoder, rename=lambda name: name, extra=()):
        """Move an encoder's tensors into a directory of its own."""
        shutil.copytree(GOLDEN / "tiny" / encoder, tmp_path / encoder)
        shutil.rmtree(tmp_path / "c" / encoder)
        own = {
            rename(name): t
            for name, t in load_file(GOLDEN / "tiny" / encoder / "model.safetensors").items()
        }
        save_file({**own, **dict(extra)}, tmp_path / encoder / "model.safetensors")
        for name in [name for name in tensors if name.startswith(prefixes[encoder])]:
            del tensors[name]
        options[encoder] = tmp_path / encoder

    if layout == "separate":
        for encoder in prefixes:
            separate(encoder)
    elif layout.startswith("bert"):
        separate(
            "bert",
            lambda name: (
                "bert."
                + name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
                    "LayerNorm.bias", "LayerNorm.beta"
                )
            ),
            {"cls.predictions.bias": torch.zeros(3)}.items(),
        )
    elif layout.startswith("whisper"):
        separate(
            "whisper",
            lambda name: "model." + name if name.startswith("encoder.") else name,
            {
                "model.decoder.layers.0.fc1.weight": torch.zeros(3, 3),
                "proj_out.weight": torch.zeros(2, 2),
            }.items(),
        )
    elif layout.startswith("dual"):
        separate(
            "siglip",
            extra={
                "text_model.head.weight": torch.zeros(2, 2),
                "logit_scale": torch.zeros(1),
            }.items(),
        )
        config = json.loads((tmp_path / "siglip" / "config.json").read_text())
        (tmp_path / "siglip" / "config.json").write_text(
            json.dumps({"model_type": "siglip", "vision_config": config, "text_config": {}})
        )
    elif layout == "bf16":
        tensors, tolerance = {name: t.bfloat16() for name, t in tensors.items()}, 0.05
    elif layout == "fp16":
        tensors, tolerance = {name: t.half() for name, t in tensors.items()}, 0.01
    if layout == "sharded":
        (tmp_path / "c" / "model.safetensors").unlink()
        names = sorted(tensors)
        shards = {
            "model-00001-of-00002.safetensors": names[::2],
            "model-00002-of-00002.safetensors": names[1::2],
        }
        for file, part in shards.items():
            save_file({name: tensors[name] for name in part}, tmp_path / "c" / file)
        weight_map = {name: file for file, part in shards.items() for name in part}
        (tmp_path / "c" / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": weight_map})
        )
    else:
        save_file(tensors, tmp_path / "c" / "model.safetensors")
    again = HumanOmni.from_pretrained(tmp_path / "c", **options)
    for name, tensor in model.state_dict().items():
        assert relative_error(again.state_dict()[name], tensor) <= tolerance / 5, name
    assert relative_error(again.logits(again(prompts)), model.logits(model(prompts))) <= tolerance
    # What was put together from several places is whole when it is saved.
    again.save_pretrained(tmp_path / "whole")
    HumanOmni.from_pretrained(tmp_path / "whole")
    assert (tmp_path / "whole" / "bert" / "vocab.txt").exists()


def test_the_checkpoints_own_tensors_win_over_a_directorys(model, checkpoint, tmp_path):
    shutil.copytree(GOLDEN / "tiny" / "bert", tmp_path / "bert")
    own = load_file(tmp_path / "bert" / "model.safetensors")
    save_file({name: t + 1 for name, t in own.items()}, tmp_path / "bert" / "model.safetensors")
    again = HumanOmni.from_pretrained(checkpoint, bert=tmp_path / "bert")
    assert all(torch.equal(again.state_dict()[name], t) for name, t in model.state_dict().items())


def test_an_untied_head_is_its_own_tensor(tmp_path):
    torch.manual_seed(0)
    model = HumanOmni(small_llm_config(tie_word_embeddings=False))
    model.save_pretrained(tmp_path / "untied")
    assert "lm_head.weight" in on_disk(tmp_path / "untied" / "model.safetensors")
    again = HumanOmni.from_pretrained(tmp_path / "untied")
    hidden = torch.randn(2, 16)
    assert torch.equal(again.logits(hidden), model.logits(hidden))


# ------------------------------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop("model.norm.weight"), "1 missing tensors, such as model.norm.weight"),
        (
            lambda t: [t.pop(n) for n in list(t) if "audio_tower" in n and "fc1" in n],
            "--whisper DIR",
        ),
        (lambda t: t.pop("model.bert_model.embeddings.LayerNorm.bias"), "--bert DIR"),
        (
            lambda t: t.update({"model.layers.7.mlp.up_proj.weight": torch.zeros(2, 2)}),
            "unknown tensors, such as model.layers.7",
        ),
        (
            lambda t: t.update({"adapter.weight": torch.zeros(2)}),
            "unknown tensors, such as adapter.weight",
        ),
        (
            lambda t: t.update({"model.norm.weight": torch.zeros(7)}),
            r"model.norm.weight in .* is \(7,\), expected \(48,\)",
        ),
    ],
)
def test_loading_is_strict(broken, change, message):
    edit_tensors(broken, change)
    with pytest.raises(CheckpointError, match=message):
        HumanOmni.from_pretrained(broken)


def test_what_is_not_a_checkpoint_is_named(broken, tmp_path):
    file = broken / "model.safetensors"
    whole = file.read_bytes()
    for content, message in [
        (whole[:-100], "not a complete safetensors file"),
        (b"", "not a complete safetensors file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git-lfs pointer"),
    ]:
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match=message):
            HumanOmni.from_pretrained(broken)
    config = (broken / "config.json").read_bytes()
    (broken / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match="config.json: a git-lfs pointer"):
        HumanOmni.from_pretrained(broken)
    (broken / "config.json").write_bytes(config)
    file.unlink()
    (broken / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(CheckpointError, match="never opened"):
        HumanOmni.from_pretrained(broken)
    with pytest.raises(CheckpointError, match="config.json: not found"):
        HumanOmni.from_pretrained(tmp_path / "nowhere")
    file.write_bytes(whole)
    config = json.loads((broken / "config.json").read_text())
    for key, value in [
        ("model_type", "qwen2"),
        ("mm_projector_type", "linear"),
        ("hidden_size", "48"),
        ("num_key_value_heads", 3),
    ]:
        (broken / "config.json").write_text(json.dumps({**config, key: value}))
        with pytest.raises(CheckpointError, match=key):
            HumanOmni.from_pretrained(broken)
    (broken / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="--siglip"):
        HumanOmni.from_pretrained(broken, siglip=tmp_path / "nowhere")


def test_json_too_deep_to_read(broken):
    (broken / "config.json").write_text("[" * 100_000 + "]" * 100_000)
    with pytest.raises(CheckpointError, match="config.json"):
        HumanOmni.from_pretrained(broken)


@pytest.mark.parametrize(
    "file, change",
    [
        ("config.json", {"num_hidden_layers": 10**6}),
        ("config.json", {"num_hidden_layers": 10**12}),
        ("config.json", {"hidden_size": 10**9}),
        ("config.json", {"hidden_size": 48.0}),
        ("config.json", {"vocab_size": float("nan")}),
        ("config.json", {"vocab_size": True}),
        ("config.json", {"rope_theta": float("inf")}),
        ("config.json", {"rms_norm_eps": 1e6}),
        ("config.json", {"num_attention_heads": 48}),
        ("config.json", {"tie_word_embeddings": "false"}),
        ("config.json", {"mm_vision_select_layer": "-2"}),
        ("config.json", {"mm_vision_select_layer": 1}),
        ("config.json", {"num_frames": 10**6}),
        ("config.json", {"num_frames": "8"}),
        ("config.json", {"rope_scaling": {"type": "linear", "factor": 4}}),
        ("config.json", {"hidden_act": "gelu"}),
        ("whisper/config.json", {"encoder_layers": 10**6}),
        ("bert/config.json", {"num_hidden_layers": 900_000}),
        ("siglip/config.json", {"patch_size": 10**6, "image_size": 1}),
        ("siglip/config.json", {"num_attention_heads": 5}),
        ("bert/config.json", {"layer_norm_eps": -1}),
        ("whisper/config.json", {"d_model": 10**40}),
    ],
)
def test_sizes_that_cannot_be_are_refused_at_once(broken, file, change):
    edit(broken / file, **change)
    start = time.time()
    with pytest.raises(CheckpointError, match=str(broken)):
        HumanOmni.from_pretrained(broken)
    assert time.time() - start < 20


def test_a_layer_number_in_a_tensors_name_counts_no_layers(broken):
    """Without a config.json, an encoder's layers are counted by their names."""
    tensors = load_file(broken / "model.safetensors")
    tensors["model.bert_model.encoder.layer.9000000.output.dense.bias"] = torch.zeros(3)
    save_file(tensors, broken / "model.safetensors")
    (broken / "bert" / "config.json").unlink()
    with pytest.raises(
        CheckpointError,
        match="num_hidden_layers (of bert )?is 9000001|num_attention_heads",
    ):
        HumanOmni.from_pretrained(broken)


@pytest.mark.parametrize(
    "name",
    [
        "../../../etc/passwd",
        "/etc/passwd",
        "sub/model.safetensors",
        "..",
        "",
        3,
        "pytorch_model.bin",
        None,
    ],
)
def test_an_index_names_files_beside_it_only(broken, name):
    (broken / "model.safetensors").unlink()
    (broken / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"model.norm.weight": name}})
    )
    with pytest.raises(
        CheckpointError, match="index.json: its weight_map should name safetensors files"
    ):
        HumanOmni.from_pretrained(broken)


def test_a_tensor_that_is_there_twice(broken):
    (broken / "model.safetensors").rename(broken / "c.safetensors")
    norm = load_file(broken / "c.safetensors")["model.norm.weight"]
    save_file({"model.norm.weight": norm + 1}, broken / "b.safetensors")
    names = {"model.norm.weight": "b.safetensors", "x": "c.safetensors"}
    (broken / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    with pytest.raises(CheckpointError, match="model.norm.weight is in .*b.safetensors too"):
        HumanOmni.from_pretrained(broken)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.float64])
def test_weights_of_other_kinds_are_not_converted_in_silence(broken, dtype):
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(dtype)
    save_file(tensors, broken / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"model.safetensors: model.norm.weight is {dtype}"):
        HumanOmni.from_pretrained(broken)


# ------------------------------------------------------------------------------------------------
# Configurations as transformers 4 and 5 write them

V5 = {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}, "dtype": "bfloat16"}


@pytest.mark.parametrize(
    "drop, changes",
    [
        (("rope_theta", "rope_scaling", "torch_dtype"), V5),
        (("rope_theta", "rope_scaling"), {"rope_parameters": {"rope_theta": 1e6}}),
        (("rope_scaling",), {}),
        (("rope_scaling",), {"rope_scaling": {"rope_type": "default"}}),
        (("rope_scaling",), {"rope_scaling": {"type": "default"}}),
        (("rope_scaling",), {"rope_scaling": {}, "rope_parameters": None}),
        (("rope_theta",), {"rope_scaling": {"rope_type": "default", "rope_theta": 1e6}}),
        # Where both stand, the newer counts.
        ((), {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}),
    ],
)
@torch.no_grad()
def test_every_spelling_of_plain_rope_is_the_same_model(broken, model, prompts, drop, changes):
    edit(broken / "config.json", *drop, **changes)
    again = HumanOmni.from_pretrained(broken)
    assert torch.equal(again.logits(again(prompts)), model.logits(model(prompts)))
    again.save_pretrained(broken.with_name("saved"))
    saved = HumanOmni.from_pretrained(broken.with_name("saved"))
    assert torch.equal(saved.logits(saved(prompts)), model.logits(model(prompts)))


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("kind", ["rope_type", "type"])
@pytest.mark.parametrize("name", ["linear", "dynamic", "yarn", "llama3", "mrope"])
def test_other_kinds_of_rope_are_refused_by_name(broken, key, kind, name):
    edit(broken / "config.json", **{key: {kind: name, "factor": 2.0, "rope_theta": 1e6}})
    with pytest.raises(CheckpointError, match=f"config.json: {key} has the rope_type '{name}'"):
        HumanOmni.from_pretrained(broken)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({}, "rope_theta is None"),
        ({"rope_parameters": {"rope_type": "default"}}, "rope_theta is None"),
        ({"rope_parameters": {"rope_theta": "1e6"}}, "rope_theta is '1e6'"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "rope_theta is None"),
        ({"rope_parameters": [1e6]}, "rope_parameters is"),
        ({"rope_scaling": "default"}, "rope_scaling is 'default'"),
    ],
)
def test_rope_that_says_nothing_is_refused(broken, changes, message):
    edit(broken / "config.json", "rope_theta", **changes)
    with pytest.raises(CheckpointError, match=f"config.json: .*{message}"):
        HumanOmni.from_pretrained(broken)


@pytest.mark.parametrize("keys", [("torch_dtype",), ("dtype",), ("dtype", "torch_dtype"), ()])
def test_the_saved_dtype_is_said_in_the_files_own_words(broken, keys):
    """A dtype of old beside a new torch_dtype would win in transformers 5."""
    edit(broken / "config.json", "torch_dtype", **dict.fromkeys(keys, "float32"))
    HumanOmni.from_pretrained(broken).save_pretrained(broken, torch.bfloat16)
    config = json.loads((broken / "config.json").read_text())
    said = {key: value for key, value in config.items() if "dtype" in key}
    assert said == dict.fromkeys(keys or ["torch_dtype"], "bfloat16")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_configurations_saved_by_windows_editors(broken, encoding):
    for name in ("config.json", "bert/config.json"):
        path = broken / name
        path.write_text(path.read_text(), encoding=encoding)
    HumanOmni.from_pretrained(broken)


# ------------------------------------------------------------------------------------------------
# An older thing beside a newer one


@pytest.mark.parametrize("shards", ["whole", "gone", "broken index"])
def test_one_file_counts_and_not_an_index_of_older_shards(broken, model, shards):
    tensors = load_file(broken / "model.safetensors")
    shard = broken / "model-00001-of-00001.safetensors"
    index = broken / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(tensors, shard.name)}))
    if shards == "whole":
        save_file({name: torch.zeros_like(t) for name, t in tensors.items()}, shard)
    if shards == "broken index":
        index.write_text("{")
    again = HumanOmni.from_pretrained(broken)
    assert all(torch.equal(again.state_dict()[name], t) for name, t in model.state_dict().items())


def test_one_file_counts_in_an_encoders_directory_too(checkpoint, broken, tmp_path, model):
    shutil.copytree(GOLDEN / "tiny" / "bert", tmp_path / "bert")
    edit_tensors(broken, lambda t: [t.pop(name) for name in list(t) if "bert_model" in name])
    own = load_file(tmp_path / "bert" / "model.safetensors")
    save_file({name: t + 1 for name, t in own.items()}, tmp_path / "bert" / "old.safetensors")
    index = {"weight_map": dict.fromkeys(own, "old.safetensors")}
    (tmp_path / "bert" / "model.safetensors.index.json").write_text(json.dumps(index))
    again = HumanOmni.from_pretrained(broken, bert=tmp_path / "bert")
    assert all(torch.equal(again.state_dict()[name], t) for name, t in model.state_dict().items())


# ------------------------------------------------------------------------------------------------
# What saving does to files


@pytest.fixture
def umask():
    """A function that sets it, and sets it back in the end."""
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("mask", [0o022, 0o002, 0o027, 0o077, 0o000])
def test_weights_are_as_readable_as_their_neighbours(model, tmp_path, umask, mask):
    umask(mask)
    model.save_pretrained(tmp_path / "saved")
    checkpoint_files.save_tensors({"a": torch.zeros(2)}, tmp_path / "a.safetensors", {"b": "c"})
    files = [file for file in (tmp_path / "saved").rglob("*") if file.is_file()]
    assert {mode(file) for file in (*files, tmp_path / "a.safetensors")} == {0o666 & ~mask}
    folders = [tmp_path / "saved", tmp_path / "saved" / "bert"]
    assert {mode(folder) for folder in folders} == {0o777 & ~mask}
    assert os.umask(mask) == mask
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() == {"b": "c"}


def test_a_full_disk_names_its_file(model, tmp_path, monkeypatch):
    def full(tensors, path, metadata):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    model.save_pretrained(tmp_path / "saved")
    before = (tmp_path / "saved" / "model.safetensors").read_bytes()
    monkeypatch.setattr(checkpoint_files, "save_file", full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        checkpoint_files.save_tensors({}, tmp_path / "a.safetensors")
    assert caught.value.filename == str(tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=f"{tmp_path}/saved: .*No space left.*unharmed"):
        model.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "model.safetensors").read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["saved"]


def test_a_mistake_of_ours_is_no_full_disk(tmp_path):
    with pytest.raises((TypeError, ValueError)):
        checkpoint_files.save_tensors({"a": 1}, tmp_path / "a.safetensors")


def test_folders_that_are_not_the_checkpoints_stay(model, tmp_path):
    """Whatever a user keeps beside a checkpoint, under names that a program might take."""
    model.save_pretrained(tmp_path / "saved")
    for name in ("saved.old", "saved.tmp", "saved.1", ".saved"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.txt").write_text("years of work")
    model.save_pretrained(tmp_path / "saved")
    assert len(list(tmp_path.rglob("thesis.txt"))) == 4 == len(list(tmp_path.iterdir())) - 1


@pytest.mark.parametrize(
    "make",
    [
        lambda folder: (folder / "config.json").write_text('{"model_type": "qwen2"}'),
        lambda folder: (folder / "config.json").write_text("a web page's"),
        lambda folder: (folder / "config.json").mkdir(),
        lambda folder: (folder / "notes").mkdir(),
        lambda folder: (folder / ".git").write_text("gitdir: elsewhere"),
        lambda folder: folder.rmdir() or folder.write_text("a file"),
    ],
)
def test_what_is_no_checkpoint_of_this_model_is_not_replaced(model, tmp_path, make):
    folder = tmp_path / "mine"
    folder.mkdir()
    make(folder)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(CheckpointError, match="mine: exists and is not a checkpoint"):
        model.save_pretrained(folder)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("target", [".", "..", "full"])
def test_the_folder_one_is_in_is_not_replaced(model, tmp_path, monkeypatch, target):
    folder = tmp_path / "full" / "inside"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    target = tmp_path / "full" if target == "full" else target
    with pytest.raises(CheckpointError, match="the folder you are in, one around it"):
        model.save_pretrained(target)
    assert Path.cwd() == folder and not list(folder.iterdir())


def test_a_symbolic_link_stays_one(model, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "saved")
    for dtype in (torch.float32, torch.bfloat16):
        model.save_pretrained(tmp_path / "link", dtype)
        assert (tmp_path / "link").is_symlink()
        config = json.loads((tmp_path / "disk" / "saved" / "config.json").read_text())
        assert config["torch_dtype"] == str(dtype).removeprefix("torch.")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["disk", "link"]
    assert [file.name for file in (tmp_path / "disk").iterdir()] == ["saved"]


def test_what_a_save_killed_between_its_renames_moved_aside_is_put_back(model, tmp_path):
    model.save_pretrained(tmp_path / "saved")
    (tmp_path / ".saved.saving" / "new").mkdir(parents=True)
    (tmp_path / "saved").rename(tmp_path / ".saved.saving" / "old")
    with pytest.raises(TypeError):
        model.save_pretrained(tmp_path / "saved", dtype="no dtype")
    assert HumanOmni.from_pretrained(tmp_path / "saved")
    assert [file.name for file in tmp_path.iterdir()] == ["saved"]


def test_chat_templates_of_every_layout_are_saved_again(broken, tmp_path):
    files = {
        "chat_template.json": '{"chat_template": "a"}',
        "chat_template.jinja": "b",
        "additional_chat_templates/default.jinja": "c",
        "additional_chat_templates/tool_use.jinja": "d",
    }
    (broken / "additional_chat_templates").mkdir()
    for name, content in files.items():
        (broken / name).write_text(content)
    HumanOmni.from_pretrained(broken).save_pretrained(tmp_path / "saved")
    assert {name: (tmp_path / "saved" / name).read_text() for name in files} == files
