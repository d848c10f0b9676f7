"""Published checkpoints: read strictly, and written back under the same names.

    model = HumanOmni.from_pretrained("path/to/R1-Omni-0.5B")     # load(), below
    model.save_pretrained("runs/mine")                            # save()

A directory holds config.json, model.safetensors (or shards and their index), and the small files
of its tokenizers. Sizes of the three encoders come from folders of their own, or from their
tensors' shapes. Pickles are never opened.

This file needs torch, safetensors and the standard library, and `model.py` beside it: copy the two.
"""

import contextlib
import errno
import json
import math
import os
import re
import shutil
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file and the way on."""


def load(model_class, path, folders, device="cpu", dtype=torch.float32):
    """The model in the directory `path`: every tensor it needs, in its shape, and nothing unknown.

    model_class  builds the networks from their configurations: HumanOmni
    folders      "siglip", "whisper", "bert" -> a directory (Hugging Face layout) that supplies
                 what `path` lacks, or None
    dtype        of the parameters, whatever the file's

    Raises CheckpointError."""
    path = Path(path)
    folders = {name: encoder_folder(name, folder, path) for name, folder in folders.items()}
    configs = {"llm": read_llm_config(path / "config.json")}
    found = find_tensors(path, folders)
    for name, folder in folders.items():
        configs[name] = read_encoder_config(name, folder, found)
    check_layers(configs, found, path)
    with torch.device("meta"):  # shapes only: the tensors that are read become the parameters
        model = model_class(configs)
    wanted = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    check_tensors(wanted, found, path, tied=model.lm_head is None)
    tensors = read_tensors({key: found[key] for key in wanted}, device, dtype)
    model.load_state_dict(tensors, strict=True, assign=True)
    model.files = read_companions(path, folders)
    return model.eval()


def save(model, path, dtype=None):
    """Write a directory that loads alone, under the published names.

    dtype: of the tensors, None as held. Only an empty directory or a checkpoint of this model is
    replaced, and whole; CheckpointError otherwise. The new one is written and synced in a folder
    .NAME.saving beside it, and renamed when complete. A crash or a full disk leaves the old one
    whole: under its name, or, between two renames, as .NAME.saving/old, from where the next save
    puts it back."""
    path = Path(path).resolve()  # a symbolic link stays one
    check_replaceable(path)
    work = path.with_name(f".{path.name}.saving")
    new, old = work / "new", work / "old"
    try:
        _clean_up(path, work)  # after a save that was killed
        new.mkdir(parents=True)
        _write(model, new, dtype)
        for file in (*new.rglob("*"), new):
            sync(file)
        if path.exists():
            os.replace(path, old)
        os.replace(new, path)
        sync(path.parent)
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be written ({error}); what was there before is unharmed"
        ) from None
    finally:
        _clean_up(path, work)


def check_replaceable(path):
    """Raise CheckpointError if something else than an older checkpoint would be lost."""
    if not path.exists():
        return
    if path in (Path.cwd(), *Path.cwd().parents) or os.path.ismount(path):
        raise CheckpointError(
            f"{path}: is the folder you are in, one around it, or a disk's own, and cannot be "
            "replaced; choose a folder inside it"
        )
    ours = path.is_dir() and not any(path.iterdir())
    with contextlib.suppress(CheckpointError):
        ours = ours or read_config(path / "config.json").get("model_type") == MODEL_TYPE
    if not ours:
        raise CheckpointError(
            f"{path}: exists and is not a checkpoint of this model, so it is not replaced; choose "
            "another directory"
        )


def _clean_up(path, work):
    """Put back the checkpoint that a save had moved aside, if it did not come to its end."""
    if (work / "old").exists() and not path.exists():
        os.replace(work / "old", path)
    shutil.rmtree(work, ignore_errors=True)


def _write(model, folder, dtype):
    tensors = {}
    for key, tensor in model.state_dict().items():
        tensors[published_name(key)] = tensor.detach().to("cpu", dtype).contiguous()
    save_tensors(tensors, folder / "model.safetensors", {"format": "pt"})
    saved_dtype = str(tensors["model.embed_tokens.weight"].dtype).removeprefix("torch.")
    for name, config in model.configs.items():
        place = folder if name == "llm" else folder / name
        place.mkdir(exist_ok=True)
        if name == "llm":
            # transformers 5 says dtype, 4 said torch_dtype; where both stand, the first counts.
            said = [key for key in ("dtype", "torch_dtype") if key in config] or ["torch_dtype"]
            config = config | dict.fromkeys(said, saved_dtype)
        (place / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for name, content in model.files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)


def save_tensors(tensors, path, metadata=None):
    """A safetensors file that others may read as the umask says. A full disk: OSError, named.

    safetensors 0.8 itself makes its files readable by their owner alone."""
    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:
        raise OSError(errno.EIO, str(error), str(path)) from None
    umask = os.umask(0o077)  # to be read, it has to be set
    os.umask(umask)
    with contextlib.suppress(PermissionError):  # a file system without modes
        os.chmod(path, 0o666 & ~umask)


def sync(path):
    """Wait until a file, or a folder's list of entries, is on the disk itself.

    Not on Windows, which cannot be asked so."""
    if os.name == "posix":
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


# ------------------------------------------------------------------------------------------------
# Names and sizes

MODEL_TYPE = "HumanOmni_qwen2"

# Prefix of a module here -> its prefix in a published file; the first that fits counts.
PUBLISHED = {
    "vision_tower.": "model.vision_tower.vision_tower.vision_model.",
    "audio_tower.": "model.audio_tower.audio_tower.encoder.",
    "lm_head.": "lm_head.",
    "": "model.",
}
# Encoder -> its prefix here, and the prefixes its tensors may have in a directory of its own.
ENCODERS = {
    "siglip": ("vision_tower.", ("vision_model.",)),
    "whisper": ("audio_tower.", ("model.encoder.", "encoder.")),
    "bert": ("bert_model.", ("bert.", "")),
}
# In published files, but never run: SigLIP's last layer, final norm and pooling head, BERT's
# pooler, Whisper's classifier.
UNUSED = re.compile(
    r"model\.vision_tower\.vision_tower\.vision_model\.(head|post_layernorm|encoder\.layers)\..*"
    r"|model\.audio_tower\.audio_tower\.(projector|classifier)\..*"
    r"|model\.bert_model\.pooler\..*|.*\.position_ids|.*\.rotary_emb\.inv_freq"
)
# What else belongs to a checkpoint, in its main folder and those of the encoders.
COMPANIONS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
    "preprocessor_config.json",
    "processor_config.json",
)


def count_layers(shapes, prefix):
    numbers = [name[len(prefix) :].split(".")[0] for name in shapes if name.startswith(prefix)]
    return 1 + max(map(int, numbers))


# The sizes each encoder is built from, and how to read them off its tensors' shapes where no
# config.json has them.
SIZES = {
    "siglip": {
        "hidden_size": lambda s: s["embeddings.patch_embedding.weight"][0],
        "patch_size": lambda s: s["embeddings.patch_embedding.weight"][2],
        "image_size": lambda s: (
            s["embeddings.patch_embedding.weight"][2]
            * math.isqrt(s["embeddings.position_embedding.weight"][0])
        ),
        "num_hidden_layers": lambda s: count_layers(s, "encoder.layers."),
        "num_attention_heads": lambda s: s["embeddings.patch_embedding.weight"][0] // 64,
        "intermediate_size": lambda s: s["encoder.layers.0.mlp.fc1.weight"][0],
        "layer_norm_eps": lambda s: 1e-6,
    },
    "whisper": {
        "d_model": lambda s: s["conv1.weight"][0],
        "num_mel_bins": lambda s: s["conv1.weight"][1],
        "max_source_positions": lambda s: s["embed_positions.weight"][0],
        "encoder_layers": lambda s: count_layers(s, "layers."),
        "encoder_attention_heads": lambda s: s["conv1.weight"][0] // 64,
        "encoder_ffn_dim": lambda s: s["layers.0.fc1.weight"][0],
    },
    "bert": {
        "vocab_size": lambda s: s["embeddings.word_embeddings.weight"][0],
        "hidden_size": lambda s: s["embeddings.word_embeddings.weight"][1],
        "max_position_embeddings": lambda s: s["embeddings.position_embeddings.weight"][0],
        "type_vocab_size": lambda s: s["embeddings.token_type_embeddings.weight"][0],
        "num_hidden_layers": lambda s: count_layers(s, "encoder.layer."),
        "num_attention_heads": lambda s: s["embeddings.word_embeddings.weight"][1] // 64,
        "intermediate_size": lambda s: s["encoder.layer.0.intermediate.dense.weight"][0],
        "layer_norm_eps": lambda s: 1e-12,
    },
}
LLM_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "rms_norm_eps",
    "rope_theta",
    "vocab_size",
)
WIDTH_AND_HEADS = {
    "siglip": ("hidden_size", "num_attention_heads"),
    "whisper": ("d_model", "encoder_attention_heads"),
    "bert": ("hidden_size", "num_attention_heads"),
}
LAYERS = {
    "llm": "num_hidden_layers",
    "siglip": "num_hidden_layers",
    "whisper": "encoder_layers",
    "bert": "num_hidden_layers",
}

LARGEST = 2**16  # of any size in a configuration,
LONGEST = 2**20  # but for vocabularies and positions: seven times the published vocabulary
LONG = ("vocab_size", "max_position_embeddings", "max_source_positions")
# Real numbers, and between what; the others are whole.
REAL = {"rms_norm_eps": (0, 1), "layer_norm_eps": (0, 1), "rope_theta": (1, 1e12)}


def published_name(key):
    """Name of a tensor here -> its name in a published file."""
    prefix = next(prefix for prefix in PUBLISHED if key.startswith(prefix))
    return PUBLISHED[prefix] + key[len(prefix) :]


def our_name(name):
    """Name of a tensor in a published file -> its name here; "?" and the name if it is not ours."""
    for ours, theirs in PUBLISHED.items():
        if name.startswith(theirs):
            return ours + name[len(theirs) :]
    return "?" + name


# ------------------------------------------------------------------------------------------------
# Configurations


def read_config(path):
    """A JSON object from a file."""
    try:
        config = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(
            f"{path}: not found; a checkpoint directory holds config.json, model.safetensors and "
            "a tokenizer"
        ) from None
    except (ValueError, OSError, RecursionError) as error:
        refuse_pointer(path)
        raise CheckpointError(
            f"{path}: not readable as JSON ({error}); download it again"
        ) from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(config).__name__}")
    return config


def refuse_pointer(file):
    """Raise CheckpointError if git-lfs has left a pointer in the file's place."""
    if not file.is_file():
        return
    with open(file, "rb") as start:
        is_pointer = start.read(40).startswith(b"version https://git-lfs")
    if is_pointer:
        raise CheckpointError(
            f"{file}: a git-lfs pointer, not the file itself; fetch it with `git lfs pull`"
        )


def read_llm_config(path):
    """config.json of the checkpoint, if it is of the architecture that model.py implements.

    rope_theta stands at its top, wherever the file has it."""
    config = {"tie_word_embeddings": False, "num_frames": 8, **read_config(path)}
    expected = {
        "model_type": MODEL_TYPE,
        "mm_projector_type": "all_in_one_small",
        "mm_audio_projector_type": "mlp2x_gelu",
    }
    usual = {"hidden_act": "silu", "mm_vision_select_feature": "patch"}  # may be left out
    for key, value in {**expected, **usual}.items():
        if config.get(key, usual.get(key)) != value:
            raise CheckpointError(
                f"{path}: {key} is {config.get(key)!r}, this model's is {value!r}"
            )
    config["rope_theta"] = _rope_theta(config, path)
    require_numbers(config, (*LLM_SIZES, "num_frames"), path)
    tied, frames = config["tie_word_embeddings"], config["num_frames"]
    select = config.get("mm_vision_select_layer", -2)
    if type(tied) is not bool or type(select) is not int or select >= 0 or frames > 512:
        raise CheckpointError(
            f"{path}: tie_word_embeddings {tied!r}, mm_vision_select_layer {select!r}, num_frames "
            f"{frames} should be true or false, a negative whole number, and at most 512"
        )
    D, heads = config["hidden_size"], config["num_attention_heads"]
    kv_heads = config["num_key_value_heads"]
    if D % (2 * heads) or heads % kv_heads:
        raise CheckpointError(
            f"{path}: hidden_size {D}, num_attention_heads {heads}, num_key_value_heads {kv_heads} "
            "must divide, and leave heads of even width"
        )
    return config


def _rope_theta(config, path):
    """The base of rotary positions; other kinds of them than the plain one are refused.

    transformers 4 writes rope_theta and, for what is not plain, rope_scaling; 5 writes both into
    rope_parameters, whose rope_theta counts."""
    theta = config.get("rope_theta")
    for key in ("rope_parameters", "rope_scaling"):
        parameters = config.get(key) or {}
        if not isinstance(parameters, dict):
            raise CheckpointError(f"{path}: {key} is {parameters!r}, expected an object")
        kind = parameters.get("rope_type", parameters.get("type", "default"))
        if kind != "default":
            raise CheckpointError(
                f"{path}: {key} has the rope_type {kind!r}, this model's is 'default'"
            )
        theta = parameters.get("rope_theta", theta)
    return theta


def read_encoder_config(name, folder, found):
    """An encoder's config.json; sizes it does not state come from the shapes of its tensors.

    The number of heads does not show in them: it is width / 64, as in all published sizes."""
    file, ours = folder / "config.json", ENCODERS[name][0]
    config = read_config(file) if file.exists() else {}
    if isinstance(config.get("vision_config"), dict):
        # A dual encoder's file: the vision half, without its default values.
        config = config["vision_config"]
    shapes = {key[len(ours) :]: at.shape for key, at in found.items() if key.startswith(ours)}
    for key, from_shapes in SIZES[name].items():
        if key in config:
            continue
        try:
            config[key] = from_shapes(shapes)
        except (KeyError, ValueError, IndexError):
            raise CheckpointError(
                f"{folder}: neither a config.json nor tensors tell the {name} encoder's {key}; "
                f"name its directory with --{name} DIR"
            ) from None
    require_numbers(config, SIZES[name], file)
    width, heads = (config[key] for key in WIDTH_AND_HEADS[name])
    if width % heads:
        raise CheckpointError(f"{file}: a width of {width} cannot be split into {heads} heads")
    return config


def require_numbers(config, keys, path):
    """Raise CheckpointError unless config holds a sensible number for each key."""

    def fits(key):
        value = config.get(key)
        if key in REAL:
            least, most = REAL[key]
            return type(value) in (int, float) and least < value < most
        # type, not isinstance: True is an int
        return type(value) is int and 0 < value <= (LONGEST if key in LONG else LARGEST)

    bad = [f"{key} is {config.get(key)!r}"[:200] for key in keys if not fits(key)]
    if bad:
        raise CheckpointError(
            f"{path}: {', '.join(bad)}; expected positive numbers, whole for sizes and up to "
            f"{LARGEST}, {LONGEST} for vocabularies and positions"
        )


def check_layers(configs, found, path):
    """Before anything is built: a layer has several tensors, so layers are fewer than tensors."""
    for name, key in LAYERS.items():
        if configs[name][key] > len(found):
            raise CheckpointError(
                f"{path}: {key} of {name} is {configs[name][key]}, but there are only "
                f"{len(found)} tensors"
            )


# ------------------------------------------------------------------------------------------------
# Tensors and other files


class Stored(NamedTuple):
    """Where a tensor lies."""

    file: Path
    name: str  # in the file
    shape: tuple


def encoder_folder(name, folder, path):
    """The directory that was given for an encoder, or else its folder inside the checkpoint."""
    if folder and not Path(folder).is_dir():
        raise CheckpointError(f"{folder}: no such directory (given as --{name})")
    return Path(folder or path / name)


def tensor_files(folder):
    """The safetensors files of a directory: one, or the shards that its index names.

    Where there are both, an index of older shards it may be, the one file counts, as it does for
    transformers."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists() or not index.exists():
        return [single]
    weight_map = read_config(index).get("weight_map")
    names = sorted(set(map(str, weight_map.values()))) if isinstance(weight_map, dict) else []
    beside = [name for name in names if Path(name).name == name and name.endswith(".safetensors")]
    if not names or beside != names:
        raise CheckpointError(
            f"{index}: its weight_map should name safetensors files beside it, not {names[:3]}; "
            "download it again"
        )
    return [folder / name for name in names]


def open_tensors(file, device="cpu"):
    """A safetensors file, opened lazily; what is not one is named."""
    try:
        return safe_open(file, "pt", device=str(device))
    except FileNotFoundError:
        raise CheckpointError(
            f"{file}: not found; weights are read from model.safetensors, or from the shards that "
            "model.safetensors.index.json names (convert .bin files first: they are pickles and "
            "never opened here)"
        ) from None
    except (SafetensorError, OSError) as error:
        refuse_pointer(file)
        raise CheckpointError(
            f"{file}: not a complete safetensors file ({error}); download it again"
        ) from None


def list_tensors(folder):
    """All tensors in a directory, one Stored after the other."""
    for file in tensor_files(folder):
        content = open_tensors(file)
        for name in content.keys():  # noqa: SIM118 (it is no dict)
            yield Stored(file, name, tuple(content.get_slice(name).get_shape()))


def find_tensors(path, folders):
    """All tensors of the checkpoint and of the encoders' directories: our name -> Stored.

    The checkpoint wins; a directory supplies only what the checkpoint lacks."""
    found = {}
    for stored in list_tensors(path):
        ours = our_name(stored.name)
        if ours in found:
            raise CheckpointError(
                f"{stored.file}: its {stored.name} is in {found[ours].file} too, as "
                f"{found[ours].name}; download the checkpoint again"
            )
        found[ours] = stored
    for encoder, folder in folders.items():
        if folder == path / encoder and not any(file.exists() for file in tensor_files(folder)):
            continue  # the checkpoint's own folder may hold a configuration alone
        ours, prefixes = ENCODERS[encoder]
        for stored in list_tensors(folder):
            name = stored.name.replace("LayerNorm.gamma", "LayerNorm.weight")
            name = name.replace("LayerNorm.beta", "LayerNorm.bias")
            # A dual encoder's text half, a decoder and the like start with none of the prefixes.
            prefix = next((prefix for prefix in prefixes if name.startswith(prefix)), None)
            if prefix is not None:
                found.setdefault(ours + name[len(prefix) :], stored)
    return found


def check_tensors(wanted, found, path, tied):
    """One error with all that is missing, mis-shaped or unknown, and the flag that mends it.

    wanted: our name -> shape; tied: the head is the embedding, whatever the file holds for it."""
    missing = [key for key in wanted if key not in found]
    misshaped = [key for key in wanted if key in found and found[key].shape != wanted[key]]
    spare = [key for key in found if key not in wanted and not (tied and key == "lm_head.weight")]
    in_checkpoint = [found[key].name for key in spare if found[key].file.parent == path]
    unknown = [name for name in in_checkpoint if not UNUSED.fullmatch(name)]

    problems = []
    for encoder, (prefix, _) in ENCODERS.items():
        group = [key for key in missing if key.startswith(prefix)]
        missing = [key for key in missing if key not in group]
        if group:
            problems.append(
                f"{len(group)} missing tensors, such as {published_name(group[0])}; name a "
                f"directory that has them with --{encoder} DIR"
            )
    if missing:
        problems.append(f"{len(missing)} missing tensors, such as {published_name(missing[0])}")
    if misshaped:
        stored = found[misshaped[0]]
        problems.append(
            f"{len(misshaped)} mis-shaped tensors, such as {stored.name} in {stored.file} is "
            f"{stored.shape}, expected {wanted[misshaped[0]]}"
        )
    if unknown:
        problems.append(f"{len(unknown)} unknown tensors, such as {unknown[0]}")
    if problems:
        lines = "\n  ".join(problems)
        raise CheckpointError(f"{path}: does not fit its configuration:\n  {lines}")


def read_tensors(stored, device, dtype):
    """Our name -> Stored becomes our name -> tensor on the device, of the dtype."""
    files, tensors = {}, {}
    for key, (file, name, _) in stored.items():
        if file not in files:
            files[file] = open_tensors(file, device)
        tensor = files[file].get_tensor(name)
        if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise CheckpointError(
                f"{file}: {name} is {tensor.dtype}; float32, float16 and bfloat16 are read"
            )
        # A copy lies where torch puts it, not where the file happens to: a frozen copy of the model
        # then computes the same bits.
        tensors[key] = tensor.to(dtype, copy=True)
    return tensors


def read_companions(path, folders):
    """The small files that make a directory complete, to be written back when it is saved.

    Name relative to the checkpoint -> bytes."""
    companions = {}
    for prefix, folder in (("", path), *folders.items()):
        for pattern in COMPANIONS:
            for file in folder.glob(pattern):
                if file.is_file():
                    name = Path(prefix, file.relative_to(folder)).as_posix()
                    companions[name] = file.read_bytes()
    return companions
