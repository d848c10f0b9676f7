"""The model against the numbers of the original, and against itself by another route."""

import json
import shutil

import pytest
import torch
from conftest import GOLDEN, relative_error, small_llm_config
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from model import CheckpointError, HumanOmni, published_name

EXACT = 1e-5  # largest relative error against the golden numbers, float32


@torch.no_grad()
def test_every_stage_equals_the_original(model, expected):
    features = model.vision_tower(expected["pixel_values"].flatten(0, 1)).unflatten(0, (2, 4))
    assert relative_error(features, expected["siglip"]) <= EXACT
    sound = model.audio_tower(expected["input_features"])
    assert relative_error(sound, expected["whisper"]) <= EXACT
    mask = expected["bert_attention_mask"]
    assert relative_error(model.bert_model(expected["bert_input_ids"], mask)[:, 0], expected["bert_cls"]) <= EXACT
    weights = model.branch_weights(expected["bert_input_ids"], mask)
    assert relative_error(weights, expected["branch_probs"]) <= EXACT
    projector = model.mm_projector
    assert relative_error(projector.convolved(features, "video"), expected["proj_video"]) <= EXACT
    assert relative_error(projector.convolved(features, "body"), expected["proj_body"]) <= EXACT
    assert relative_error(projector.mlp_2xgelu_face(features), expected["proj_face"]) <= EXACT  # before the halving
    video, audio = model.video_tokens(features, weights), model.audio_tokens(sound)
    assert relative_error(video, expected["video_tokens"]) <= EXACT
    assert relative_error(audio, expected["audio_tokens"]) <= EXACT
    ids = torch.cat([expected["prompt_ids"], expected["completion_ids"]], dim=1)
    embeds = model.embed_prompt(ids, video, audio)
    assert relative_error(embeds, expected["inputs_embeds"]) <= EXACT
    assert relative_error(model.logits(model(embeds)), expected["logits"]) <= EXACT


@torch.no_grad()
def test_keys_and_values_as_past_change_nothing(model, prompts):
    whole = model(prompts)
    hidden, kv = model(prompts[:, :60], return_kv=True)
    middle, more = model(prompts[:, 60:61], past=kv, return_kv=True)  # one token
    joined = [tuple(torch.cat(pair, dim=2) for pair in zip(old, new)) for old, new in zip(kv, more)]
    rest = model(prompts[:, 61:], past=joined)  # several tokens
    assert relative_error(torch.cat([hidden, middle, rest], dim=1), whole) <= EXACT


@torch.no_grad()
def test_a_later_token_changes_nothing_before_it(model, prompts):
    changed = prompts.clone()
    changed[:, 40] += 1.0
    assert torch.equal(model(prompts)[:, :40], model(changed)[:, :40])
    assert not torch.allclose(model(prompts)[:, 40:], model(changed)[:, 40:])


@torch.no_grad()
@pytest.mark.parametrize("medium", ["video", "audio", "neither"])
def test_a_prompt_may_lack_a_medium(model, expected, medium):
    ids = expected["prompt_ids"]
    keep = {"video": ids != -202, "audio": ids != -201, "neither": ids >= 0}[medium]
    video = expected["video_tokens"] if medium == "video" else None
    audio = expected["audio_tokens"] if medium == "audio" else None
    ids = ids[keep].view(2, -1)
    embeds = model.embed_prompt(ids, video, audio)
    assert embeds.shape[1] == (ids >= 0).sum(1)[0] + {"video": 16, "audio": 50, "neither": 0}[medium]
    with pytest.raises(ValueError, match="placeholder"):
        model.embed_prompt(ids, expected["video_tokens"], expected["audio_tokens"])


def test_towers_carry_no_gradient_unless_they_train(model, expected):
    model.requires_grad_(True)
    model.vision_tower.requires_grad_(False)
    model.audio_tower.requires_grad_(False)
    video, audio = model.encode(expected["pixel_values"], expected["input_features"])
    assert not video.requires_grad and not audio.requires_grad
    model.vision_tower.requires_grad_(True)
    model.audio_tower.requires_grad_(True)
    video, audio = model.encode(expected["pixel_values"], expected["input_features"])
    assert video.requires_grad and audio.requires_grad


# ------------------------------------------------------------------------------------------------
# Checkpoints


def on_disk(file):
    with safe_open(file, "pt") as tensors:
        return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}


@torch.no_grad()
def test_save_then_load_gives_the_same_logits_and_the_published_names(model, checkpoint, prompts, tmp_path):
    model.save_pretrained(tmp_path / "saved")
    again = HumanOmni.from_pretrained(tmp_path / "saved")
    assert torch.equal(again.logits(again(prompts)), model.logits(model(prompts)))
    saved, original = on_disk(tmp_path / "saved" / "model.safetensors"), on_disk(checkpoint / "model.safetensors")
    assert all(original[name] == shape for name, shape in saved.items())
    # What the original has beyond that is never run: the last SigLIP layer, pooling heads, a classifier.
    unused = set(original) - set(saved)
    assert all(part in name for name in unused for part in ["tower"] if "bert" not in name)
    assert {name.rsplit(".", 2)[0].split(".")[-1] for name in unused if "bert" in name} == {"pooler"}
    before, after = load_file(checkpoint / "model.safetensors"), load_file(tmp_path / "saved" / "model.safetensors")
    assert all(torch.equal(before[name], tensor) for name, tensor in after.items())
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "bert/vocab.txt", "siglip/preprocessor_config.json"):
        assert (tmp_path / "saved" / name).read_bytes() == (checkpoint / name).read_bytes(), name
    kept, written = (json.loads((folder / "config.json").read_text()) for folder in (checkpoint, tmp_path / "saved"))
    assert kept == written


def test_saving_replaces_a_checkpoint_whole_and_casts(model, tmp_path):
    model.save_pretrained(tmp_path / "saved")
    (tmp_path / "saved" / "stale.txt").write_text("of an older run")
    model.save_pretrained(tmp_path / "saved", torch.bfloat16)
    assert not (tmp_path / "saved" / "stale.txt").exists()
    assert {t.dtype for t in load_file(tmp_path / "saved" / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["saved"]  # no temporary left behind
    HumanOmni.from_pretrained(tmp_path / "saved")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        model.save_pretrained(tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").exists()


@torch.no_grad()
@pytest.mark.parametrize("layout", ["separate", "bert prefixed, old names", "whisper with decoder", "dual-encoder siglip", "sharded", "bf16", "fp16"])
def test_every_layout_loads_to_the_same_model(layout, model, checkpoint, prompts, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "c")
    tensors, options, tolerance = load_file(checkpoint / "model.safetensors"), {}, 0.0
    prefixes = {"siglip": "model.vision_tower.vision_tower.", "whisper": "model.audio_tower.audio_tower.", "bert": "model.bert_model."}

    def separate(encoder, rename=lambda name: name, extra=()):
        """Move an encoder's tensors into a directory of its own."""
        shutil.copytree(GOLDEN / "tiny" / encoder, tmp_path / encoder)
        shutil.rmtree(tmp_path / "c" / encoder)
        own = {rename(name): t for name, t in load_file(GOLDEN / "tiny" / encoder / "model.safetensors").items()}
        save_file({**own, **dict(extra)}, tmp_path / encoder / "model.safetensors")
        for name in [name for name in tensors if name.startswith(prefixes[encoder])]:
            del tensors[name]
        options[encoder] = tmp_path / encoder

    if layout == "separate":
        for encoder in prefixes:
            separate(encoder)
    elif layout.startswith("bert"):
        separate("bert", lambda name: "bert." + name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"),
                 {"cls.predictions.bias": torch.zeros(3)}.items())
    elif layout.startswith("whisper"):
        separate("whisper", lambda name: "model." + name if name.startswith("encoder.") else name,
                 {"model.decoder.layers.0.fc1.weight": torch.zeros(3, 3), "proj_out.weight": torch.zeros(2, 2)}.items())
    elif layout.startswith("dual"):
        separate("siglip", extra={"text_model.head.weight": torch.zeros(2, 2), "logit_scale": torch.zeros(1)}.items())
        config = json.loads((tmp_path / "siglip" / "config.json").read_text())
        (tmp_path / "siglip" / "config.json").write_text(json.dumps({"model_type": "siglip", "vision_config": config, "text_config": {}}))
    elif layout == "bf16":
        tensors, tolerance = {name: t.bfloat16() for name, t in tensors.items()}, 0.05
    elif layout == "fp16":
        tensors, tolerance = {name: t.half() for name, t in tensors.items()}, 0.01
    if layout == "sharded":
        (tmp_path / "c" / "model.safetensors").unlink()
        names = sorted(tensors)
        shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
        for file, part in shards.items():
            save_file({name: tensors[name] for name in part}, tmp_path / "c" / file)
        weight_map = {name: file for file, part in shards.items() for name in part}
        (tmp_path / "c" / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
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


@pytest.fixture
def broken(checkpoint, tmp_path):
    """A copy of the checkpoint to break, and a function that changes its tensors."""
    shutil.copytree(checkpoint, tmp_path / "c")

    def change(edit):
        tensors = load_file(checkpoint / "model.safetensors")
        edit(tensors)
        save_file(tensors, tmp_path / "c" / "model.safetensors")

    return tmp_path / "c", change


@pytest.mark.parametrize("edit, message", [
    (lambda t: t.pop("model.norm.weight"), "1 missing tensors, such as model.norm.weight"),
    (lambda t: [t.pop(n) for n in list(t) if "audio_tower" in n and "fc1" in n], "--whisper DIR"),
    (lambda t: t.pop("model.bert_model.embeddings.LayerNorm.bias"), "--bert DIR"),
    (lambda t: t.update({"model.layers.7.mlp.up_proj.weight": torch.zeros(2, 2)}), "unknown tensors, such as model.layers.7"),
    (lambda t: t.update({"adapter.weight": torch.zeros(2)}), "unknown tensors, such as adapter.weight"),
    (lambda t: t.update({"model.norm.weight": torch.zeros(7)}), r"model.norm.weight in .* is \(7,\), expected \(48,\)"),
])
def test_loading_is_strict(broken, edit, message):
    folder, change = broken
    change(edit)
    with pytest.raises(CheckpointError, match=message):
        HumanOmni.from_pretrained(folder)


def test_what_is_not_a_checkpoint_is_named(broken, tmp_path):
    folder, _ = broken
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for content, message in [(whole[:-100], "not a complete safetensors file"), (b"", "not a complete safetensors file"),
                             (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git-lfs pointer")]:
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match=message):
            HumanOmni.from_pretrained(folder)
    file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(CheckpointError, match="never opened"):
        HumanOmni.from_pretrained(folder)
    with pytest.raises(CheckpointError, match="config.json: not found"):
        HumanOmni.from_pretrained(tmp_path / "nowhere")
    file.write_bytes(whole)
    config = json.loads((folder / "config.json").read_text())
    for key, value in [("model_type", "qwen2"), ("mm_projector_type", "linear"), ("hidden_size", "48"), ("num_key_value_heads", 3)]:
        (folder / "config.json").write_text(json.dumps({**config, key: value}))
        with pytest.raises(CheckpointError, match=key):
            HumanOmni.from_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="--siglip"):
        HumanOmni.from_pretrained(folder, siglip=tmp_path / "nowhere")


def test_full_size_has_the_published_counts():
    """HumanOmni-0.5B by shape only."""
    llm = dict(hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2,
               rms_norm_eps=1e-6, rope_theta=1e6, vocab_size=151936, tie_word_embeddings=True, mm_vision_select_layer=-2)
    siglip = dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072, image_size=224, patch_size=16,
                  layer_norm_eps=1e-6)
    whisper = dict(d_model=1280, encoder_layers=32, encoder_attention_heads=20, encoder_ffn_dim=5120, num_mel_bins=128,
                   max_source_positions=1500)
    bert = dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072, vocab_size=30522,
                max_position_embeddings=512, type_vocab_size=2, layer_norm_eps=1e-12)
    with torch.device("meta"):
        model = HumanOmni(dict(llm=llm, siglip=siglip, whisper=whisper, bert=bert))
    count = {}
    for name, parameter in model.named_parameters():
        part = name.split(".")[0]
        count[part] = count.get(part, 0) + parameter.numel()
    assert sum(count.values()) == 1_358_082_371
    assert count["embed_tokens"] + count["layers"] + count["norm"] == 494_032_768
    assert (count["mm_projector"], count["audio_projector"], count["bert_gate"]) == (34_762_944, 1_951_488, 2_766_851)
    names = {published_name(name) for name in model.state_dict()}
    assert sum(name.startswith("model.bert_model.") for name in names) == 199 - 2  # all but the pooler's two
    for name in ("model.embed_tokens.weight", "model.layers.23.mlp.down_proj.weight", "model.mm_projector.s1_body.b1.downsample.conv.weight",
                 "model.mm_projector.sampler_video.0.weight", "model.audio_projector.2.bias", "model.bert_gate.0.weight",
                 "model.vision_tower.vision_tower.vision_model.encoder.layers.10.mlp.fc2.bias",
                 "model.audio_tower.audio_tower.encoder.layers.31.fc2.bias"):
        assert name in names
    assert not any("encoder.layers.11." in name for name in names if "vision_tower" in name) and "lm_head.weight" not in names


def test_an_untied_head_is_its_own_tensor(tmp_path):
    torch.manual_seed(0)
    model = HumanOmni(small_llm_config(tie_word_embeddings=False))
    model.save_pretrained(tmp_path / "untied")
    assert "lm_head.weight" in on_disk(tmp_path / "untied" / "model.safetensors")
    again = HumanOmni.from_pretrained(tmp_path / "untied")
    hidden = torch.randn(2, 16)
    assert torch.equal(again.logits(hidden), model.logits(hidden))
