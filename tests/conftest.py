"""What several test files share: the small golden checkpoint, and the numbers that the original
model computes on it."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # `pytest` without `python -m` works too
GOLDEN = ROOT / "tests" / "golden"
torch.set_num_threads(1)  # the models are tiny: threads cost more than they bring


@pytest.fixture(autouse=True)
def curves(request, monkeypatch):
    """Drawing them takes longer than the rest of a small run: only tests marked "curves" do."""
    from support import run_evaluation

    if request.node.get_closest_marker("curves") is None:
        monkeypatch.setattr(run_evaluation, "draw_curves", lambda metrics, path: None)


@pytest.fixture(scope="session")
def checkpoint():
    return GOLDEN / "tiny" / "humanomni"


@pytest.fixture
def model(checkpoint):
    from model import HumanOmni

    return HumanOmni.from_pretrained(checkpoint)


@pytest.fixture(scope="session")
def expected():
    return load_file(GOLDEN / "tiny" / "expected.safetensors")


@pytest.fixture(scope="session")
def grpo_expected():
    return load_file(GOLDEN / "tiny" / "grpo_expected.safetensors")


@pytest.fixture
def prompts(model, expected):
    """(2, P, D): the two golden prompts, embedded."""
    with torch.no_grad():
        features = model.encode(expected["pixel_values"], expected["input_features"])
        question = expected["bert_input_ids"], expected["bert_attention_mask"]
        return torch.stack(
            model.embed_prompts(
                expected["prompt_ids"].tolist(),
                *features,
                model.read_question(*question),
            )
        )


def relative_error(value, reference):
    """Largest deviation, as a share of the largest reference value."""
    assert value.shape == reference.shape, (value.shape, reference.shape)
    return ((value - reference).abs().max() / reference.abs().max()).item()


def small_llm_config(**changes):
    """Configurations of a model of the published architecture with very small numbers, for tests
    that need their own."""
    llm = dict(
        model_type="HumanOmni_qwen2",
        mm_projector_type="all_in_one_small",
        mm_audio_projector_type="mlp2x_gelu",
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
        vocab_size=24,
        tie_word_embeddings=True,
        num_frames=2,
    )
    siglip = dict(
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=32,
        patch_size=8,
        layer_norm_eps=1e-6,
    )
    whisper = dict(
        d_model=8,
        encoder_layers=1,
        encoder_attention_heads=2,
        encoder_ffn_dim=16,
        num_mel_bins=8,
        max_source_positions=9,
    )
    bert = dict(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        vocab_size=20,
        max_position_embeddings=16,
        type_vocab_size=2,
        layer_norm_eps=1e-12,
    )
    return {"llm": {**llm, **changes}, "siglip": siglip, "whisper": whisper, "bert": bert}
