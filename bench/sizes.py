"""The three model sizes that are measured, as their configuration files say them."""

import json
from pathlib import Path

ROOT = Path(__file__).parent.parent

FULL_SIZE = {  # HumanOmni-0.5B
    "llm": {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
        "num_frames": 8,
        "model_type": "HumanOmni_qwen2",
        "architectures": ["HumanOmniQwen2ForCausalLM"],
        "mm_projector_type": "all_in_one_small",
        "mm_audio_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_hidden_size": 768,
        "audio_hidden_size": 1280,
    },
    "siglip": {
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "image_size": 224,
        "patch_size": 16,
        "layer_norm_eps": 1e-6,
    },
    "whisper": {
        "d_model": 1280,
        "encoder_layers": 32,
        "encoder_attention_heads": 20,
        "encoder_ffn_dim": 5120,
        "num_mel_bins": 128,
        "max_source_positions": 1500,
    },
    "bert": {
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "vocab_size": 30522,
        "max_position_embeddings": 512,
        "type_vocab_size": 2,
        "layer_norm_eps": 1e-12,
    },
}

# The same architecture: towers, language model and head in about the published proportions.
SMALL_SIZE = {
    "llm": {
        **FULL_SIZE["llm"],
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "vocab_size": 8192,
        "mm_hidden_size": 128,
        "audio_hidden_size": 256,
    },
    "siglip": {
        **FULL_SIZE["siglip"],
        "hidden_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 512,
        "image_size": 64,
        "patch_size": 8,
    },
    "whisper": {
        **FULL_SIZE["whisper"],
        "d_model": 256,
        "encoder_layers": 4,
        "encoder_attention_heads": 4,
        "encoder_ffn_dim": 1024,
        "max_source_positions": 150,
    },
    "bert": {
        **FULL_SIZE["bert"],
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 128,
    },
}


def toy_size():
    """That of the model in toy/base, on which `python train_grpo.py` works."""
    folders = {"llm": "", "siglip": "siglip", "whisper": "whisper", "bert": "bert"}
    base = ROOT / "toy" / "base"
    return {
        name: json.loads((base / folder / "config.json").read_text(encoding="utf-8"))
        for name, folder in folders.items()
    }


SHAPES = {"full": FULL_SIZE, "small": SMALL_SIZE, "toy": toy_size()}
