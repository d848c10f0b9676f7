"""Measure what this code costs on this machine. So far: loading and answering at full size.

    python bench.py                 the published 0.5B shape with random weights in bf16: writes 2.7 GB to a temporary
                                    folder, loads it, answers about one clip; prints one table and one JSON line
    python bench.py --clip my.mp4   with a clip of your own

Loading runs in a process of its own, so that its peak memory is that of loading. Random weights cost what trained ones
do; their answers mean nothing, so a fixed number of tokens is made. Tokenizer and BERT vocabulary are the toy's.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parent
FULL_SIZE = {  # HumanOmni-0.5B
    "llm": dict(hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2,
                rms_norm_eps=1e-6, rope_theta=1e6, vocab_size=151936, tie_word_embeddings=True, num_frames=8,
                model_type="HumanOmni_qwen2", architectures=["HumanOmniQwen2ForCausalLM"], mm_projector_type="all_in_one_small",
                mm_audio_projector_type="mlp2x_gelu", mm_vision_select_layer=-2, mm_hidden_size=768, audio_hidden_size=1280),
    "siglip": dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072, image_size=224,
                   patch_size=16, layer_norm_eps=1e-6),
    "whisper": dict(d_model=1280, encoder_layers=32, encoder_attention_heads=20, encoder_ffn_dim=5120, num_mel_bins=128,
                    max_source_positions=1500),
    "bert": dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072, vocab_size=30522,
                 max_position_embeddings=512, type_vocab_size=2, layer_norm_eps=1e-12),
}


def write_full_size(folder):
    """A random checkpoint of the published shape, in bf16, with the toy's tokenizer and vocabulary."""
    from model import HumanOmni, read_companions
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = HumanOmni(FULL_SIZE)
    torch.set_default_dtype(torch.float32)
    torch.nn.init.normal_(model.embed_tokens.weight, std=0.02)
    model.files = {name: content for name, content in read_companions(ROOT / "toy", {"bert": ROOT / "toy" / "bert"}).items()
                   if "preprocessor" not in name}
    model.save_pretrained(folder)


def peak_gib():
    """Largest resident memory of this process so far, pages of mapped files included."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux: unlike getrusage, not that of the process that started this one
        return int(status.read_text().split("VmHWM:")[1].split()[0]) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (2**10 if sys.platform == "linux" else 1) / 2**30


def load_and_answer(folder, clip, tokens, dtype):
    """Load the checkpoint and answer about one clip; returns seconds and GiB."""
    from data import QUESTION_REASONING, Example, batches
    from evaluate import Config, clips_of, encode_clips, load, prompts_of
    from generate import generate
    figures, before = {"start_gib": peak_gib()}, time.perf_counter()
    model, tokenizer, bert = load(Config(model=folder), dtype=getattr(torch, dtype))
    figures["load_s"], figures["loaded_gib"] = time.perf_counter() - before, peak_gib()
    example = Example(Path(clip), QUESTION_REASONING, "", "video_audio")
    with torch.no_grad():
        mark = time.perf_counter()
        clips = next(batches(clips_of(model, [example], "pad"), [0], 1))
        figures["decode_s"], mark = time.perf_counter() - mark, time.perf_counter()
        features = encode_clips(model, clips)
        figures["towers_s"], mark = time.perf_counter() - mark, time.perf_counter()
        prompt, = prompts_of(model, tokenizer, bert, [example], features)
        generate(model, [prompt], max_new_tokens=1)
        figures["prompt_tokens"] = len(prompt)
        figures["prefill_s"], mark = time.perf_counter() - mark, time.perf_counter()
        generate(model, [prompt], max_new_tokens=tokens)
        figures["decode_tokens_per_s"] = (tokens - 1) / (time.perf_counter() - mark - figures["prefill_s"])
    figures["peak_gib"] = peak_gib()
    return figures


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clip", default=str(ROOT / "tests" / "golden" / "media" / "clip.mp4"), help="clip to answer about")
    parser.add_argument("--tokens", type=int, default=64, help="length of the answer (default: 64)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of the weights in memory (default: float32)")
    parser.add_argument("--loaded", metavar="DIR", help=argparse.SUPPRESS)  # the measured process itself
    args = parser.parse_args()
    if args.loaded:
        print(json.dumps(load_and_answer(args.loaded, args.clip, args.tokens, args.dtype)))
        return
    with tempfile.TemporaryDirectory() as folder:
        print("writing a full-size checkpoint with random weights ...")
        write_full_size(Path(folder) / "model")
        size = (Path(folder) / "model" / "model.safetensors").stat().st_size / 1e9
        command = [sys.executable, __file__, "--loaded", str(Path(folder) / "model"), "--clip", args.clip, "--tokens", str(args.tokens),
                   "--dtype", args.dtype]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    figures = json.loads(done.stdout.splitlines()[-1])
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    figures = {"device": device, "torch": torch.__version__, "dtype": args.dtype, "file_gb": size, **figures}
    for name, value in figures.items():
        print(f"{name:22}{value:.2f}" if isinstance(value, float) else f"{name:22}{value}")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
