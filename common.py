"""What the scripts share: flags, loading, and the way from examples to embedded prompts.

    config = parse_flags(Config, __doc__, argv)                 # a dataclass of flags, made with `flag`
    model, tokenizer, bert = load(config)
    examples = read_examples(config.data, config)
    for clips in batches(clips_of(model, examples, config.fit), ...):
        features = encode_clips(model, clips)                   # the towers, once per clip
        prompts = prompts_of(model, tokenizer, bert, batch, features)

Shapes: B prompts · G completions per prompt · P prompt length · C completion length · T video frames · N patches per frame ·
A audio positions · D width of the language model.
"""

import argparse
import functools
import math
import os
import sys
import time
import zlib
from contextlib import nullcontext
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import torch
from safetensors.torch import save_file

import distributed
from data import QUESTION_LABEL, QUESTION_REASONING, BertTokenizer, Clips, DataError, Tokenizer, read_manifest
from errors import TrainingError
from grpo import completion_mask
from model import CheckpointError, HumanOmni


def flag(default, help, **more):
    """A configuration field that becomes a command-line flag with this help text; more: choices, least and most (values)."""
    return field(default=default, metadata={"help": help, **more})


def parse_flags(config_class, manual, argv=None, presets=None):
    """Command line -> config_class: each field is one flag; tuples take several values, bools a --no- form.

    presets: name -> {field: value}, chosen by --preset; flags that are given win over it."""
    parser = argparse.ArgumentParser(description=manual, formatter_class=argparse.RawDescriptionHelpFormatter)
    for f in fields(config_class):
        default = " ".join(map(str, f.default)) if isinstance(f.default, tuple) else f.default
        text = f"{f.metadata['help']} (default: {default if default != '' else 'none'})"
        options = {"default": f.default, "help": text.replace("%", "%%")}
        if isinstance(f.default, bool):
            options["action"] = argparse.BooleanOptionalAction
        elif isinstance(f.default, tuple):
            options["nargs"] = "+"
        else:
            options["type"] = type(f.default)
        if "choices" in f.metadata:
            options["choices"] = f.metadata["choices"]
        parser.add_argument("--" + f.name.replace("_", "-"), **options)
    if presets:
        parser.set_defaults(**presets.get(parser.parse_known_args(argv)[0].preset, {}))
    config = config_class(**vars(parser.parse_args(argv)))
    for f in fields(config_class):
        value, name = getattr(config, f.name), "--" + f.name.replace("_", "-")
        if isinstance(value, list) and not isinstance(f.default, tuple):
            raise DataError(f"{name} needs a value")  # argparse makes an empty list of --model=--
        if isinstance(value, float) and not math.isfinite(value):
            raise DataError(f"{name} must be a number, not {value}")
        if "least" in f.metadata and not value >= f.metadata["least"]:
            raise DataError(f"{name} must be at least {f.metadata['least']}, not {value}")
        if "most" in f.metadata and not value <= f.metadata["most"]:
            raise DataError(f"{name} must be at most {f.metadata['most']}, not {value}")
    return config


def run(main, memory_flags=()):
    """Run a script's main. What the user can mend is one message: exit code 2 for flags and files, 1 for the rest.

    memory_flags: what to change, and how, when a GPU's memory does not do."""
    def fail(message, code):
        if distributed.RANK:  # an error of all is told by rank 0, whose end is also this one's; one of this rank alone, by itself
            time.sleep(5)
            message = f"(rank {distributed.RANK}) {message}"
        print(f"error: {message}", file=sys.stderr, flush=True)
        os._exit(code) if distributed.WORLD > 1 else sys.exit(code)  # without waiting for the other ranks

    try:
        with distributed.group():
            main()
    except (DataError, CheckpointError) as error:
        fail(error, 2)
    except OSError as error:  # a folder given as a file, no permission, a full disk
        fail(f"{error.filename or 'reading or writing'}: {error.strerror or error}", 2)
    except TrainingError as error:
        fail(error, 1)
    except torch.OutOfMemoryError as error:
        peak = f" (the peak was {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB)" if torch.cuda.is_available() else ""
        fail(f"out of GPU memory{peak}. Any of these needs less: {', '.join(memory_flags)}.\n{error}", 1)
    except RuntimeError as error:
        if distributed.WORLD == 1 or not (isinstance(error, torch.distributed.DistError) or "gloo" in str(error)):
            raise
        fail("another process of this run has ended, or cannot be reached; the same command goes on from what was saved\n"
             f"({str(error).splitlines()[0][:300]})", 1)
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from what was saved", file=sys.stderr)
        sys.exit(130)


@dataclass
class Common:
    """Flags of all three scripts: the model, and what it is given."""
    model: str = flag("", "checkpoint directory")
    data: tuple = flag((), "manifests")
    media_root: str = flag("", "folder that the manifests' paths are relative to, if not the manifest's own")
    question: str = flag("reasoning", "reasoning, label, manifest (each entry's own), or the text of a question")
    modality: str = flag("manifest", "what the model is given; manifest: what each entry's text asks for",
                         choices=("manifest", "video_audio", "video", "audio"))
    fit: str = flag("pad", "how frames become square", choices=("pad", "squash"))
    limit: int = flag(0, "use only the first so many examples of every list of manifests; 0: all", least=0, most=10**9)
    siglip: str = flag("", "directory of the vision tower, if the checkpoint lacks it")
    whisper: str = flag("", "directory of the audio tower, if the checkpoint lacks it")
    bert: str = flag("", "directory of BERT, if the checkpoint lacks it")
    on_bad_clip: str = flag("stop", "skip: list clips that cannot be decoded in a file skipped.txt and go on, up to 5 %",
                            choices=("stop", "skip"))
    workers: int = flag(1, "processes that decode clips ahead; 0: none", least=0, most=128)
    seed: int = flag(0, "of everything random", least=0, most=2**31)
    device: str = flag("auto", "cpu, cuda, or auto: cuda where there is one")


def choose_device(name):
    """--device -> the name of a device that is there, a GPU's with its number: 0, or that of the rank among its machine's."""
    device = name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        device = f"cuda:{distributed.LOCAL_RANK}"
    elif device.startswith("cuda") and distributed.WORLD > 1:
        raise DataError(f"--device {name}: of several processes each takes a GPU of its own; leave --device out")
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # no such device; AssertionError: torch without CUDA
        raise DataError(f"--device {device} cannot be used ({str(error).splitlines()[0]})") from None
    return device


def load(config, dtype=torch.float32):
    """config.model and the encoders' directories -> (model, tokenizer, BERT's tokenizer) on config.device."""
    device = choose_device(config.device)
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32: exact for products of bf16 numbers, such as the float32 head's
    encoders = {name: getattr(config, name) or None for name in ("siglip", "whisper", "bert")}
    model = HumanOmni.from_pretrained(config.model, **encoders, device=device, dtype=dtype)
    tokenizer, bert = Tokenizer(config.model), BertTokenizer(encoders["bert"] or config.model)
    for name, ids, c in (("", tokenizer.ids, model.configs["llm"]), ("BERT's ", bert.ids, model.configs["bert"])):
        if ids > c["vocab_size"]:
            raise DataError(f"{config.model}: {name}tokenizer has {ids} ids, the model {c['vocab_size']}; they do not belong together")
    bert.tokenizer.enable_truncation(min(bert.length, model.configs["bert"]["max_position_embeddings"]))
    return model, tokenizer, bert


def compute_dtype(device):
    """bfloat16 where the device has it in hardware, else float32. Weights that train stay float32 either way."""
    fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if fast else torch.float32


def compute(model):
    """Context for everything that runs the model: arithmetic in compute_dtype over the weights as they are."""
    return torch.autocast("cuda", torch.bfloat16) if compute_dtype(model.device) == torch.bfloat16 else nullcontext()


def read_examples(manifests, config):
    """Manifests -> examples, with --question, --modality and --limit applied."""
    examples = [e for path in manifests for e in read_manifest(path, config.media_root or None)]
    return [as_asked(e, config) for e in examples[:config.limit or None]]


def as_asked(example, config):
    """The example with the question and the modality that the flags ask for."""
    named = {"reasoning": QUESTION_REASONING, "label": QUESTION_LABEL, "manifest": example.question}
    question = named.get(config.question, config.question)
    modality = example.modality if config.modality == "manifest" else config.modality
    return replace(example, question=question, modality=modality)


def clips_of(model, examples, fit, cache=None):
    """The examples' media, decoded to what this model takes; cache: a folder of tower features, or None."""
    c = model.configs
    positions = c["whisper"]["max_source_positions"]  # 10 ms log-mel frames, two per position, 160 samples each
    towers = ""
    if cache:
        Path(cache).mkdir(parents=True, exist_ok=True)
        weights = [*model.vision_tower.parameters(), *model.audio_tower.parameters()]
        towers = functools.reduce(lambda crc, w: zlib.crc32(w.detach().cpu().view(torch.uint8).numpy(), crc), weights, 0)
    return Clips(examples, c["llm"].get("num_frames", 8), c["siglip"]["image_size"], c["whisper"]["num_mel_bins"], 320 * positions,
                 fit, cache, towers)


def encode_clips(model, clips):
    """A batch from `data.batches` -> tower features (B, T, N, width) and (B, A/3, width); None for an absent medium.

    Clips that came with their features are not encoded; the others' features go into the cache, if there is one."""
    def stack(tensors):
        if all(tensor is None for tensor in tensors):
            return None
        if any(tensor is None for tensor in tensors):
            raise DataError("one batch mixes clips with and without a medium; choose one with --modality")
        return torch.stack([tensor.to(model.device) for tensor in tensors])  # cached ones come from disk

    new = [clip for clip in clips if "features" not in clip]
    if new:
        encoded = model.encode(*(stack([clip[key] for clip in new]) for key in ("pixel_values", "input_features")))
        for i, clip in enumerate(new):
            clip["features"] = [None if medium is None else medium[i] for medium in encoded]
            if "cache_file" in clip:
                tensors = {name: t.cpu().contiguous() for name, t in zip(("video", "audio"), clip["features"]) if t is not None}
                partial = clip["cache_file"].with_suffix(f".{os.getpid()}")  # renamed when whole: others may read at any time
                save_file(tensors, partial)
                os.replace(partial, clip["cache_file"])
    return [stack([clip["features"][medium] for clip in clips]) for medium in (0, 1)]


def question_inputs(model, bert, examples):
    """BERT's ids and mask (B, L) for the examples' questions."""
    return [tensor.to(model.device) for tensor in bert([e.question for e in examples])]


def prompts_of(model, tokenizer, bert, examples, features):
    """Examples and their tower features -> list of B embedded prompts (P_i, D)."""
    ids = [tokenizer.prompt_ids(e.question, e.modality) for e in examples]
    return model.embed_prompts(ids, *features, *question_inputs(model, bert, examples))


def decode(tokenizer, ids):
    """(C,) sampled ids -> text up to the first EOS, and whether there was one."""
    mask = completion_mask(ids[None], tokenizer.eos_token_id)[0]
    return tokenizer.decode(ids[mask].tolist()), bool((ids == tokenizer.eos_token_id).any())
