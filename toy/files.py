"""A checkpoint directory of the toy, all but the weights: configurations and tokenizers, in the
files and fields of the published ones."""

import itertools
import re
from pathlib import Path

from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from support.errors import write_json
from text import QWEN2_PATTERN
from toy.drawing import RATE
from toy.world import (
    ALL_WORDS,
    CAPTION_QUESTION,
    FACE_TEXT,
    LABEL_QUESTION,
    REASONING_QUESTION,
    VOICE_TEXT,
    reasoned,
)

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# fmt: off
# The language model and the projectors, but for what the tokenizer says.
HUMANOMNI = {
    "architectures": ["HumanOmniQwen2ForCausalLM"], "model_type": "HumanOmni_qwen2",
    "attention_dropout": 0.0, "hidden_act": "silu",
    "hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6, "rope_theta": 1e6, "rope_scaling": None, "max_position_embeddings": 2048,
    "max_window_layers": 28, "sliding_window": 4096, "use_sliding_window": False,
    "tie_word_embeddings": True, "initializer_range": 0.02,
    "image_aspect_ratio": "pad", "num_frames": 4,
    "mm_hidden_size": 64, "audio_hidden_size": 64,
    "mm_vision_tower": "siglip-toy", "mm_audio_tower": "whisper-toy",
    "mm_projector_type": "all_in_one_small", "mm_audio_projector_type": "mlp2x_gelu",
    "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch",
    "mm_use_x_start_end": True, "use_mm_proj": True, "use_cache": True, "torch_dtype": "float32",
}
# The towers: 64-pixel frames, 3 seconds of sound.
SIGLIP = {
    "architectures": ["SiglipVisionModel"], "model_type": "siglip_vision_model",
    "attention_dropout": 0.0, "hidden_act": "gelu_pytorch_tanh",
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_channels": 3, "image_size": 64, "patch_size": 16, "layer_norm_eps": 1e-6,
}
SIGLIP_PICTURES = {
    "image_processor_type": "SiglipImageProcessor",
    "do_resize": True, "do_rescale": True, "do_normalize": True, "resample": 3,
    "rescale_factor": 1 / 255, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
    "size": {"height": 64, "width": 64},
}
WHISPER = {
    "architectures": ["WhisperForAudioClassification"], "model_type": "whisper",
    "activation_function": "gelu", "activation_dropout": 0.0, "attention_dropout": 0.0,
    "dropout": 0.0, "encoder_layerdrop": 0.0, "scale_embedding": False,
    "d_model": 64, "encoder_layers": 2, "num_hidden_layers": 2, "encoder_attention_heads": 4,
    "encoder_ffn_dim": 128, "num_mel_bins": 128, "max_source_positions": 150,
    # A decoder that is never made, and so as small as can be.
    "max_target_positions": 448, "decoder_layers": 1, "decoder_attention_heads": 1,
    "decoder_ffn_dim": 4, "classifier_proj_size": 8, "vocab_size": 51, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
}
WHISPER_SOUND = {
    "feature_extractor_type": "WhisperFeatureExtractor", "feature_size": 128,
    "sampling_rate": RATE, "hop_length": 160, "n_fft": 400,
    "chunk_length": 3, "n_samples": 3 * RATE, "nb_max_frames": 300,
    "padding_side": "right", "padding_value": 0.0, "return_attention_mask": False,
}
# The branch gate's reader, but for its vocabulary's size.
BERT = {
    "architectures": ["BertModel"], "model_type": "bert",
    "attention_probs_dropout_prob": 0.1, "hidden_dropout_prob": 0.1, "hidden_act": "gelu",
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "layer_norm_eps": 1e-12, "max_position_embeddings": 64, "type_vocab_size": 2, "pad_token_id": 0,
    "initializer_range": 0.02, "position_embedding_type": "absolute",
}
# fmt: on


def make_checkpoint_files(root):
    """Writes what a published checkpoint directory holds beside its weights."""
    root = Path(root)
    for folder in ("siglip", "whisper", "bert"):
        (root / folder).mkdir(parents=True, exist_ok=True)

    tokenizer = train_tokenizer()
    write_tokenizer(root, tokenizer)
    end, stop = (tokenizer.token_to_id(token) for token in ("<|endoftext|>", "<|im_end|>"))
    size = tokenizer.get_vocab_size()
    vocabulary = {"vocab_size": size, "bos_token_id": end, "eos_token_id": stop}
    write_json(root / "config.json", HUMANOMNI | vocabulary)
    write_json(root / "generation_config.json", {"eos_token_id": stop, "pad_token_id": end})

    write_json(root / "siglip/config.json", SIGLIP)
    write_json(root / "siglip/preprocessor_config.json", SIGLIP_PICTURES)
    write_json(root / "whisper/config.json", WHISPER)
    write_json(root / "whisper/preprocessor_config.json", WHISPER_SOUND)

    words = bert_vocabulary()
    (root / "bert/vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    reader = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": 64}
    write_json(root / "bert/tokenizer_config.json", reader)
    write_json(root / "bert/config.json", BERT | {"vocab_size": len(words)})


def train_tokenizer():
    """-> byte-level BPE with Qwen's rules and special tokens, in which the words of this world are
    single tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    prompt = [
        "system\nYou are a helpful assistant.\n",
        "user\n<vi_start>",
        "<vi_end>\n<au_start>",
        "<au_end>\n",
        LABEL_QUESTION,
        REASONING_QUESTION,
        CAPTION_QUESTION,
        "assistant\n",
    ]
    sentences = itertools.product(FACE_TEXT, VOICE_TEXT, ALL_WORDS)
    answers = [reasoned(face, voice, word) for face, voice, word in sentences]
    trainer = trainers.BpeTrainer(
        vocab_size=640 - len(SPECIAL_TOKENS),
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(100 * prompt + answers, trainer)
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    return tokenizer


def write_tokenizer(root, tokenizer):
    """The tokenizer in the files of a published Qwen2."""
    tokenizer.save(str(root / "tokenizer.json"))
    tokenizer.model.save(str(root))  # vocab.json and merges.txt
    ids = {token: tokenizer.token_to_id(token) for token in SPECIAL_TOKENS}
    write_json(root / "added_tokens.json", ids)

    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    special_tokens = {
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        "eos_token": {"content": "<|im_end|>", **plain},
        "pad_token": {"content": "<|endoftext|>", **plain},
    }
    write_json(root / "special_tokens_map.json", special_tokens)

    added = {str(i): {"content": token, **plain, "special": True} for token, i in ids.items()}
    config = {
        "added_tokens_decoder": added,
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        "bos_token": None,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 2048,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    write_json(root / "tokenizer_config.json", config)


def bert_vocabulary():
    """-> BERT's word pieces: single characters, for any question, and the words of ours."""
    text = " ".join([REASONING_QUESTION, CAPTION_QUESTION, *ALL_WORDS]).lower()
    words = {word for word in re.findall(r"\w+", text) if len(word) > 1}
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    return [
        *("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"),
        *letters,
        *(f"##{letter}" for letter in letters),
        *"!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~",
        *sorted(words),
    ]
