"""What the scripts share: flags, the loading that they ask for, and errors told in one message.

config = parse_flags(Config, __doc__, argv)     # a dataclass of flags, made with `flag`
omni = load(config)                             # model, tokenizer, BERT's tokenizer
examples = read_examples(config.data, config)
if __name__ == "__main__":
    run_script(main)
"""

import argparse
import math
import os
import sys
import time
from dataclasses import dataclass, field, fields, replace

import torch

from checkpoint import CheckpointError
from data import QUESTION_LABEL, QUESTION_REASONING, Omni, read_manifest
from model import HumanOmni
from support import ranks
from support.errors import DataError, TrainingError
from support.precision import DTYPES, compute_dtype, prepare_gpu
from text import BertTokenizer, Tokenizer


def flag(default, help, **more):
    """A configuration field that becomes a command-line flag with this help text.

    more: choices; least and most, both allowed; above, not allowed itself."""
    return field(default=default, metadata={"help": help, **more})


def name_of(f):
    return "--" + f.name.replace("_", "-")


def add_flag(parser, f):
    """One dataclass field -> one flag; a tuple takes several values, a bool has a --no- form."""
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
    parser.add_argument(name_of(f), **options)


def check_flag(f, value):
    """Raise DataError for a value that makes no sense."""
    name, rules = name_of(f), f.metadata
    # Of `--model=--` argparse makes an empty list, or, since Python 3.13, two dashes.
    if isinstance(f.default, str) and value in ([], "--"):
        raise DataError(f"{name} needs a value")
    if isinstance(value, float) and not math.isfinite(value):
        raise DataError(f"{name} must be a number, not {value}")
    if "least" in rules and value < rules["least"]:
        raise DataError(f"{name} must be at least {rules['least']}, not {value}")
    if "most" in rules and value > rules["most"]:
        raise DataError(f"{name} must be at most {rules['most']}, not {value}")
    if "above" in rules and value <= rules["above"]:
        raise DataError(f"{name} must be more than {rules['above']}, not {value}")


def parse_flags(config_class, manual, argv=None, presets=None):
    """Command line -> config_class; manual: the text of --help.

    presets: name -> {field: value}, chosen by --preset; flags that are given win over it."""
    parser = argparse.ArgumentParser(
        description=manual, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for f in fields(config_class):
        add_flag(parser, f)
    if presets:
        chosen = parser.parse_known_args(argv)[0].preset
        parser.set_defaults(**presets.get(chosen, {}))
    config = config_class(**vars(parser.parse_args(argv)))
    for f in fields(config_class):
        check_flag(f, getattr(config, f.name))
    return config


@dataclass
class Common:
    """Flags of all three scripts: the model, and what it is given."""

    model: str = flag("", "checkpoint directory")
    data: tuple = flag((), "manifests")
    media_root: str = flag("", "folder of the manifests' paths, if not the manifest's own")
    question: str = flag(
        "reasoning", "reasoning, label, manifest (each entry's own), or the text of a question"
    )
    modality: str = flag(
        "manifest",
        "what the model is given; manifest: what each entry's text asks for",
        choices=("manifest", "video_audio", "video", "audio"),
    )
    fit: str = flag("pad", "how frames become square", choices=("pad", "squash"))
    limit: int = flag(
        0, "use only the first so many examples of each list of manifests; 0: all", least=0
    )
    siglip: str = flag("", "directory of the vision tower, if the checkpoint lacks it")
    whisper: str = flag("", "directory of the audio tower, if the checkpoint lacks it")
    bert: str = flag("", "directory of BERT, if the checkpoint lacks it")
    on_bad_clip: str = flag(
        "stop",
        "skip: list clips that cannot be decoded in a file skipped.txt and go on, up to 5 %",
        choices=("stop", "skip"),
    )
    workers: int = flag(
        max(1, min(8, (os.cpu_count() or 1) // 2)),
        "processes that decode clips ahead; by default half as many as there are processors, 8 at "
        "most; 0: none",
        least=0,
        most=128,
    )
    seed: int = flag(0, "of everything random", least=0, most=2**31)
    device: str = flag("auto", "cpu, cuda, or auto: cuda where there is one")
    dtype: str = flag(
        "auto",
        "of arithmetic; what trains is kept in float32. auto: bfloat16 on a GPU that has it, "
        "float16 on older ones, float32 on a CPU",
        choices=DTYPES,
    )


def choose_device(name):
    """--device -> the name of a device that is there, a GPU's with its number.

    The number is 0, or that of the rank among its machine's ranks."""
    device = name
    if name == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        device = f"cuda:{ranks.LOCAL_RANK}"
    elif device.startswith("cuda") and ranks.WORLD > 1:
        raise DataError(
            f"--device {name}: of several processes each takes a GPU of its own; leave --device out"
        )
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch without CUDA
        reason = str(error).splitlines()[0]
        raise DataError(f"--device {device} cannot be used ({reason})") from None
    return device


def load(config, dtype=torch.float32):
    """config.model and the encoders' directories -> Omni on config.device.

    dtype: of the weights; None: that of the arithmetic, which is enough where nothing trains."""
    device = choose_device(config.device)
    arithmetic = compute_dtype(device, config.dtype)
    dtype = dtype or arithmetic
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
        prepare_gpu()
    encoders = {name: getattr(config, name) or None for name in ("siglip", "whisper", "bert")}
    model = HumanOmni.from_pretrained(config.model, **encoders, device=device, dtype=dtype)
    model.compute_dtype = arithmetic
    tokenizer, bert = Tokenizer(config.model), BertTokenizer(encoders["bert"] or config.model)
    for kind, ids, network in (("", tokenizer.ids, "llm"), ("BERT's ", bert.ids, "bert")):
        known = model.configs[network]["vocab_size"]
        if ids > known:
            raise DataError(
                f"{config.model}: {kind}tokenizer has {ids} ids, the model {known}; they do not "
                "belong together"
            )
    positions = model.configs["bert"]["max_position_embeddings"]
    bert.tokenizer.enable_truncation(min(bert.length, positions))
    return Omni(model, tokenizer, bert)


def read_examples(manifests, config):
    """Manifests -> examples, with --question, --modality and --limit applied."""
    root = config.media_root or None
    examples = [example for path in manifests for example in read_manifest(path, root)]
    return [as_asked(example, config) for example in examples[: config.limit or None]]


def as_asked(example, config):
    """The example with the question and the modality that the flags ask for."""
    named = {
        "reasoning": QUESTION_REASONING,
        "label": QUESTION_LABEL,
        "manifest": example.question,
    }
    question = named.get(config.question, config.question)
    given = config.modality == "manifest" or example.video is None  # text alone has no media
    modality = example.modality if given else config.modality
    return replace(example, question=question, modality=modality)


def fail(message, code):
    """End this process with one message; with several processes, without waiting for the others."""
    if ranks.RANK:
        # An error of all is told by rank 0, whose end is also this one's; one of this rank alone,
        # by itself, after a while.
        time.sleep(5)
        message = f"(rank {ranks.RANK}) {message}"
    print(f"error: {message}", file=sys.stderr, flush=True)
    if ranks.WORLD > 1:
        os._exit(code)
    sys.exit(code)


def run_script(main, memory_flags=""):
    """Run a script's main. What the user can mend is one message: exit code 2 for flags and files,
    1 for the rest.

    memory_flags: what to change when a GPU's memory does not do."""
    try:
        with ranks.all_ranks():
            main()
    except (DataError, CheckpointError) as error:
        fail(error, 2)
    except OSError as error:  # a folder given as a file, no permission, a full disk
        fail(f"{error.filename or 'reading or writing'}: {error.strerror or error}", 2)
    except TrainingError as error:
        fail(error, 1)
    except torch.OutOfMemoryError as error:
        peak = ""
        if torch.cuda.is_available():
            peak = f" (the peak was {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB)"
        fail(f"out of GPU memory{peak}. Any of these needs less: {memory_flags}.\n{error}", 1)
    except RuntimeError as error:
        of_a_rank = isinstance(error, torch.distributed.DistError) or "gloo" in str(error)
        if ranks.WORLD == 1 or not of_a_rank:
            raise
        fail(
            "another process of this run has ended, or cannot be reached; the same command goes on "
            f"from what was saved\n({str(error).splitlines()[0][:300]})",
            1,
        )
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from what was saved", file=sys.stderr)
        sys.exit(130)
