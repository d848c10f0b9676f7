"""The model against the numbers of the original, and against itself by another route."""

from types import SimpleNamespace

import pytest
import torch
from conftest import relative_error

from checkpoint import published_name
from data import read_questions
from model import HumanOmni, attend

EXACT = 1e-5  # largest relative error against the golden numbers, float32


@torch.no_grad()
def test_every_stage_equals_the_original(model, expected):
    features = model.vision_tower(expected["pixel_values"].flatten(0, 1)).unflatten(0, (2, 4))
    assert relative_error(features, expected["siglip"]) <= EXACT
    sound = model.audio_tower(expected["input_features"])
    assert relative_error(sound, expected["whisper"]) <= EXACT
    mask = expected["bert_attention_mask"]
    assert (
        relative_error(model.read_question(expected["bert_input_ids"], mask), expected["bert_cls"])
        <= EXACT
    )
    weights = model.branch_weights(expected["bert_input_ids"], mask)
    assert relative_error(weights, expected["branch_probs"]) <= EXACT
    projector = model.mm_projector
    assert relative_error(projector.convolved(features, "video"), expected["proj_video"]) <= EXACT
    assert relative_error(projector.convolved(features, "body"), expected["proj_body"]) <= EXACT
    assert (
        relative_error(projector.mlp_2xgelu_face(features), expected["proj_face"]) <= EXACT
    )  # before the halving
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
    assert (
        embeds.shape[1] == (ids >= 0).sum(1)[0] + {"video": 16, "audio": 50, "neither": 0}[medium]
    )
    with pytest.raises(ValueError, match="placeholder"):
        model.embed_prompt(ids, expected["video_tokens"], expected["audio_tokens"])


def test_towers_carry_no_gradient_unless_they_train(model, expected):
    model.requires_grad_(True)
    model.vision_tower.requires_grad_(False)
    model.audio_tower.requires_grad_(False)
    video, audio = model.encode(expected["pixel_values"], expected["input_features"])
    assert not video.requires_grad and not audio.requires_grad
    model.audio_tower.requires_grad_(True)
    video, audio = model.encode(expected["pixel_values"], expected["input_features"])
    assert not video.requires_grad and audio.requires_grad  # each tower by itself
    model.vision_tower.requires_grad_(True)
    video, audio = model.encode(expected["pixel_values"], expected["input_features"])
    assert video.requires_grad and audio.requires_grad


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(ours, theirs, tolerance):
    assert ours.keys() == theirs.keys() and len(ours) > 20
    for name, gradient in theirs.items():
        assert relative_error(ours[name], gradient) <= tolerance, name


@pytest.fixture
def asked(expected):
    """BERT ids and masks of six prompts' questions, of which three are distinct."""
    questions, masks = expected["bert_input_ids"], expected["bert_attention_mask"]
    questions = torch.cat([questions, questions.roll(1, dims=1)])[[0, 1, 0, 1, 2, 0]]
    return questions, masks[[0, 1, 0, 1, 0, 0]]


@pytest.fixture
def mixed(model, expected, asked):
    """Arguments of embed_prompts for six prompts, with both media, one or none; three questions."""
    torch.manual_seed(0)
    for encoder in (model.vision_tower, model.audio_tower, model.bert_model):
        encoder.requires_grad_(False)
    video, audio = model.encode(expected["pixel_values"], expected["input_features"])
    both, other = expected["prompt_ids"].tolist()
    silent, blind = [i for i in both if i != -202], [i for i in other if i != -201]
    ids = [both, silent, blind, [5, 6, 7], other, both]
    return (
        ids,
        [video[0], video[1], None, None, video[1], video[1]],
        [audio[0], None, audio[1], None, audio[0], audio[1]],
        model.read_question(*asked),
    )


def test_a_batch_may_mix_modalities(model, mixed):
    """Prompts with both media, one or none, embedded together, equal the same one at a time."""
    ids, video, audio, question = mixed
    together = model.embed_prompts(*mixed)
    alone = []
    for b in range(6):
        media = [None if m[b] is None else m[b][None] for m in (video, audio)]
        alone += model.embed_prompts([ids[b]], *media, question[b : b + 1])
    # 16 video and 50 audio tokens stand where a placeholder stood
    media_tokens = [64, 15, 49, 0, 64, 64]
    for prompt, one, own_ids, more in zip(together, alone, ids, media_tokens):
        assert len(prompt) == len(own_ids) + more
        assert relative_error(prompt, one) <= 1e-6
    weights = [torch.randn(prompt.shape) for prompt in together]
    losses = [sum((p * w).sum() for p, w in zip(prompts, weights)) for prompts in (together, alone)]
    assert_same_gradients(*[gradients(model, loss) for loss in losses], EXACT)
    for lacking in (1, 2):  # features without a place for them, and a place without features
        wrong = list(mixed)
        wrong[lacking] = wrong[lacking][-1:] + wrong[lacking][:-1]
        with pytest.raises(ValueError, match="placeholder"):
            model.embed_prompts(*wrong)


def test_stacked_features_and_a_list_of_them_are_the_same(model, expected):
    video, audio = model.encode(expected["pixel_values"], expected["input_features"])
    question = model.read_question(expected["bert_input_ids"], expected["bert_attention_mask"])
    ids = expected["prompt_ids"].tolist()
    text = [[i for i in row if i >= 0] for row in ids]
    for rows, stacked, listed in [
        (ids, (video, audio), (list(video), list(audio))),
        (text, (None, None), ([None, None], [None, None])),
    ]:
        for one, other in zip(
            model.embed_prompts(rows, *stacked, question),
            model.embed_prompts(rows, *listed, list(question)),
        ):
            assert torch.equal(one, other)


def test_bert_runs_once_per_distinct_question(model, asked):
    rows = []
    model.bert_model.register_forward_hook(lambda module, inputs, output: rows.append(len(output)))
    texts = ["a", "b", "a", "b", "c", "a"]  # as `asked` repeats them

    def bert(questions):
        which = [texts.index(question) for question in questions]
        return [x[which] for x in asked]

    readings = read_questions(SimpleNamespace(model=model, bert=bert), texts)
    assert rows == [3]
    assert relative_error(torch.stack(readings), model.read_question(*asked)) <= 1e-6


def test_readings_of_questions_change_no_gradient(model, mixed, asked, monkeypatch):
    """Against BERT and gate run for every prompt, in float64: float32 rounds gradients by more
    than 1e-6."""
    model.double()
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    ids, video, audio, _ = mixed
    video, audio = ([None if x is None else x.double() for x in m] for m in (video, audio))
    seen = [0, 1, 4, 5]
    weights = torch.randn(4, 16, 48)
    clips = torch.stack([video[b] for b in seen])
    slow = model.video_tokens(clips, model.branch_weights(*(x[seen] for x in asked)))
    prompts = model.embed_prompts(ids, video, audio, model.read_question(*asked))
    starts = [ids[b].index(-201) for b in seen]
    fast = torch.stack([prompts[b][start : start + 16] for b, start in zip(seen, starts)])
    assert relative_error(fast, slow) <= 1e-6
    ours = gradients(model, (fast * weights).sum())
    theirs = gradients(model, (slow * weights).sum())
    assert "bert_gate.0.weight" in theirs
    # Text and sound are in the same prompts, but not in this loss.
    assert all(not gradient.any() for name, gradient in ours.items() if name not in theirs)
    assert_same_gradients({name: ours[name] for name in theirs}, theirs, 1e-6)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_rows_follow_their_own_prompts(model, prompts, checkpointing):
    """Several prompts with unequal numbers of rows, in any order, equal one prompt at a time."""
    torch.manual_seed(0)
    model.gradient_checkpointing = checkpointing
    prompts = torch.cat([prompts, prompts.flip(1)[:1]]).requires_grad_()  # (3, P, D)
    rows = torch.tensor([2, 0, 0, 1, 2, 0])
    tokens, weights = torch.randn(6, 5, 48), torch.randn(6, 5, 48)

    _, kv = model(prompts, return_kv=True)
    together = model(tokens, past=kv, prompt_of=rows)
    alone = torch.empty_like(together)
    for b in range(3):
        _, kv = model(prompts[b : b + 1], return_kv=True)
        alone[rows == b] = model(tokens[rows == b], past=kv)
    assert relative_error(together, alone) <= EXACT
    ours, theirs = [], []
    for output, found in ((together, ours), (alone, theirs)):
        prompts.grad = None
        found += [gradients(model, (output * weights).sum()), prompts.grad]
    assert_same_gradients(ours[0], theirs[0], EXACT)
    assert relative_error(ours[1], theirs[1]) <= EXACT


def test_the_gradient_of_many_rows_is_summed_in_float32():
    """In bf16 a sum of 500 rows would stop growing where a row is less than half its rounding."""
    torch.manual_seed(0)
    q, k, v = (torch.rand(500, 2, 1, 4).bfloat16() for _ in range(3))
    prompt = [torch.rand(1, 2, 3, 4).bfloat16().requires_grad_() for _ in range(2)]
    own = [x.detach().repeat(500, 1, 1, 1).requires_grad_() for x in prompt]
    attend(q, k, v, tuple(prompt), torch.ones(500, 1).bfloat16()).sum().backward()
    attend(q, k, v, tuple(own), torch.eye(500).bfloat16()).sum().backward()
    for shared, single in zip(prompt, own):
        assert relative_error(shared.grad.double(), single.grad.double().sum(0, True)) <= 2**-8


@torch.no_grad()
def test_without_rows_every_prompt_has_as_many_in_order(model, prompts):
    _, kv = model(prompts, return_kv=True)
    embeds = model.embed_tokens(torch.randint(0, 300, (6, 5)))
    rows = torch.tensor([0, 0, 0, 1, 1, 1])
    assert torch.equal(model(embeds, past=kv), model(embeds, past=kv, prompt_of=rows))


def test_full_size_has_the_published_counts():
    """HumanOmni-0.5B by shape only."""
    llm = {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
        "mm_vision_select_layer": -2,
    }
    siglip = {
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "image_size": 224,
        "patch_size": 16,
        "layer_norm_eps": 1e-6,
    }
    whisper = {
        "d_model": 1280,
        "encoder_layers": 32,
        "encoder_attention_heads": 20,
        "encoder_ffn_dim": 5120,
        "num_mel_bins": 128,
        "max_source_positions": 1500,
    }
    bert = {
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "vocab_size": 30522,
        "max_position_embeddings": 512,
        "type_vocab_size": 2,
        "layer_norm_eps": 1e-12,
    }
    with torch.device("meta"):
        model = HumanOmni({"llm": llm, "siglip": siglip, "whisper": whisper, "bert": bert})
    count = {}
    for name, parameter in model.named_parameters():
        part = name.split(".")[0]
        count[part] = count.get(part, 0) + parameter.numel()
    assert sum(count.values()) == 1_358_082_371
    assert count["embed_tokens"] + count["layers"] + count["norm"] == 494_032_768
    assert (count["mm_projector"], count["audio_projector"], count["bert_gate"]) == (
        34_762_944,
        1_951_488,
        2_766_851,
    )
    names = {published_name(name) for name in model.state_dict()}
    assert (
        sum(name.startswith("model.bert_model.") for name in names) == 199 - 2
    )  # all but the pooler's two
    for name in (
        "model.embed_tokens.weight",
        "model.layers.23.mlp.down_proj.weight",
        "model.mm_projector.s1_body.b1.downsample.conv.weight",
        "model.mm_projector.sampler_video.0.weight",
        "model.audio_projector.2.bias",
        "model.bert_gate.0.weight",
        "model.vision_tower.vision_tower.vision_model.encoder.layers.10.mlp.fc2.bias",
        "model.audio_tower.audio_tower.encoder.layers.31.fc2.bias",
    ):
        assert name in names
    assert (
        not any("encoder.layers.11." in name for name in names if "vision_tower" in name)
        and "lm_head.weight" not in names
    )
