"""HumanOmni, the omni-modal model of R1-Omni, in one file: four networks, their assembly, loading and saving.

    frames  --> SigLIP  --> video projector (three branches) --+
    question -> BERT    --> gate: one weight per branch -------+--> video tokens --+
    log-mel --> Whisper --> average over 3, projector -------------> audio tokens --+--> Qwen2 --> hidden states
    prompt ids ---------------------------------------------------> text embeddings +

    model = HumanOmni.from_pretrained("path/to/R1-Omni-0.5B")
    video, audio = model.encode(pixel_values, input_features)                     # frozen towers: once per clip
    prompt, = model.embed_prompts([prompt_ids], video, audio, bert_ids, bert_mask)   # (P, D)
    logits = model.logits(model(prompt[None]))                                      # (1, P, V)

Module names are those of the published checkpoints, so `state_dict()` differs from a file on disk by
prefixes alone. One forward of the language model serves prefill, decoding, scoring and the reference:
the argument `past` says what the new tokens attend to besides themselves.

Shapes: B prompts · G completions per prompt · P prompt length · C completion length · T video frames ·
N patches per frame · A audio positions · D width of the language model · V vocabulary. R rows = B or B*G.
This file needs torch, safetensors and the standard library, nothing else.
"""

import copy
import json
import math
import os
import re
import shutil
from collections import OrderedDict
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.nn.attention.bias import causal_lower_right
from torch.utils.checkpoint import checkpoint

VIDEO_TOKEN, AUDIO_TOKEN = -201, -202  # placeholders in prompt ids
GATE_WIDTH = 3584  # fixed in the published model at every size
AUDIO_POOL = 3  # Whisper positions averaged into one audio token

# ------------------------------------------------------------------------------------------------
# The three encoders: SigLIP (frames), Whisper (sound), BERT (the question)


def multi_head(q, k, v, heads, mask=None):
    """Full attention of (B, L, W) queries, keys, values split into heads -> (B, L, W)."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


class SelfAttention(nn.Module):
    """Self-attention as SigLIP and Whisper name it. Whisper's keys have no bias."""

    def __init__(self, width, heads, key_bias=True):
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width, bias=key_bias)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x):
        return self.out_proj(multi_head(self.q_proj(x), self.k_proj(x), self.v_proj(x), self.heads))


class SiglipLayer(nn.Module):
    def __init__(self, c):
        super().__init__()
        width = c["hidden_size"]
        self.layer_norm1 = nn.LayerNorm(width, eps=c["layer_norm_eps"])
        self.self_attn = SelfAttention(width, c["num_attention_heads"])
        self.layer_norm2 = nn.LayerNorm(width, eps=c["layer_norm_eps"])
        self.mlp = nn.Sequential(OrderedDict(
            fc1=nn.Linear(width, c["intermediate_size"]),
            act=nn.GELU(approximate="tanh"),
            fc2=nn.Linear(c["intermediate_size"], width)))

    def forward(self, x):
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class VisionTower(nn.Module):
    """SigLIP up to hidden state number `select_layer` (-2: the last layer and the final norm never run)."""

    def __init__(self, c, select_layer=-2):
        super().__init__()
        width, patch = c["hidden_size"], c["patch_size"]
        self.embeddings = nn.ModuleDict(dict(
            patch_embedding=nn.Conv2d(3, width, patch, stride=patch),
            position_embedding=nn.Embedding((c["image_size"] // patch) ** 2, width)))
        layers = c["num_hidden_layers"] + 1 + select_layer  # hidden state 0 is the embedding
        self.encoder = nn.ModuleDict(dict(layers=nn.ModuleList(SiglipLayer(c) for _ in range(layers))))

    def forward(self, pixel_values):
        """(B*T, 3, H, W) in [-1, 1] -> (B*T, N, width)."""
        patches = self.embeddings.patch_embedding
        x = patches(pixel_values.to(patches.weight.dtype)).flatten(2).transpose(1, 2)  # (B*T, N, width)
        x = x + self.embeddings.position_embedding.weight
        for layer in self.encoder.layers:
            x = layer(x)
        return x


class WhisperLayer(nn.Module):
    def __init__(self, c):
        super().__init__()
        width = c["d_model"]
        self.self_attn_layer_norm = nn.LayerNorm(width)
        self.self_attn = SelfAttention(width, c["encoder_attention_heads"], key_bias=False)
        self.final_layer_norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, c["encoder_ffn_dim"])
        self.fc2 = nn.Linear(c["encoder_ffn_dim"], width)

    def forward(self, x):
        x = x + self.self_attn(self.self_attn_layer_norm(x))
        return x + self.fc2(F.gelu(self.fc1(self.final_layer_norm(x))))


class AudioTower(nn.Module):
    """Whisper's encoder, final norm included."""

    def __init__(self, c):
        super().__init__()
        width = c["d_model"]
        self.conv1 = nn.Conv1d(c["num_mel_bins"], width, 3, padding=1)
        self.conv2 = nn.Conv1d(width, width, 3, stride=2, padding=1)
        self.embed_positions = nn.Embedding(c["max_source_positions"], width)
        self.layers = nn.ModuleList(WhisperLayer(c) for _ in range(c["encoder_layers"]))
        self.layer_norm = nn.LayerNorm(width)

    def forward(self, input_features):
        """(B, mels, 2*A) log-mel -> (B, A, width). The length is fixed: Whisper pads sound with silence."""
        positions = self.embed_positions.weight
        if input_features.shape[-1] != 2 * len(positions):
            raise ValueError(f"log-mel has {input_features.shape[-1]} frames, the audio tower takes {2 * len(positions)}")
        x = F.gelu(self.conv1(input_features.to(positions.dtype)))
        x = F.gelu(self.conv2(x)).transpose(1, 2) + positions  # (B, A, width)
        for layer in self.layers:
            x = layer(x)
        return self.layer_norm(x)


class BertLayer(nn.Module):
    def __init__(self, c):
        super().__init__()
        width, inner, eps = c["hidden_size"], c["intermediate_size"], c["layer_norm_eps"]
        self.heads = c["num_attention_heads"]
        self.attention = nn.ModuleDict({
            "self": nn.ModuleDict({name: nn.Linear(width, width) for name in ("query", "key", "value")}),
            "output": nn.ModuleDict(dict(dense=nn.Linear(width, width), LayerNorm=nn.LayerNorm(width, eps=eps)))})
        self.intermediate = nn.ModuleDict(dict(dense=nn.Linear(width, inner)))
        self.output = nn.ModuleDict(dict(dense=nn.Linear(inner, width), LayerNorm=nn.LayerNorm(width, eps=eps)))

    def forward(self, x, mask):
        own, after = self.attention["self"], self.attention["output"]
        mixed = multi_head(own["query"](x), own["key"](x), own["value"](x), self.heads, mask)
        x = after["LayerNorm"](x + after["dense"](mixed))
        return self.output["LayerNorm"](x + self.output["dense"](F.gelu(self.intermediate["dense"](x))))


class Bert(nn.Module):
    """BERT without pooler and without dropout: with dropout the policy would differ from itself."""

    def __init__(self, c):
        super().__init__()
        width = c["hidden_size"]
        self.embeddings = nn.ModuleDict(dict(
            word_embeddings=nn.Embedding(c["vocab_size"], width),
            position_embeddings=nn.Embedding(c["max_position_embeddings"], width),
            token_type_embeddings=nn.Embedding(c["type_vocab_size"], width),
            LayerNorm=nn.LayerNorm(width, eps=c["layer_norm_eps"])))
        self.encoder = nn.ModuleDict(dict(layer=nn.ModuleList(BertLayer(c) for _ in range(c["num_hidden_layers"]))))

    def forward(self, input_ids, attention_mask):
        """(B, L) ids and 0/1 mask -> (B, L, width) of the last layer."""
        e, length = self.embeddings, input_ids.shape[1]
        x = e.word_embeddings(input_ids) + e.position_embeddings.weight[:length] + e.token_type_embeddings.weight[0]
        x = e.LayerNorm(x)
        mask = attention_mask[:, None, None, :].bool()  # every query may look at the real keys
        for layer in self.encoder.layer:
            x = layer(x, mask)
        return x


# ------------------------------------------------------------------------------------------------
# Video projector `all_in_one_small`


class ConvNorm(nn.Module):
    """Convolution without bias, then LayerNorm over channels (published under the name `bn`)."""

    def __init__(self, inputs, outputs, kernel=1, groups=1):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, groups=groups, bias=False)
        self.bn = nn.LayerNorm(outputs, eps=1e-5)

    def forward(self, x):
        return self.bn(self.conv(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Bottleneck(nn.Module):
    """RegNet bottleneck: 1x1, depth-wise 3x3, squeeze-excite, 1x1, all beside a shortcut."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.conv1 = ConvNorm(inputs, outputs)
        self.conv2 = ConvNorm(outputs, outputs, kernel=3, groups=outputs)
        squeezed = round(0.25 * inputs)  # of the block's input, not of the layer it acts on
        self.se = nn.ModuleDict(dict(fc1=nn.Conv2d(outputs, squeezed, 1), fc2=nn.Conv2d(squeezed, outputs, 1)))
        self.conv3 = ConvNorm(outputs, outputs)
        self.downsample = ConvNorm(inputs, outputs) if inputs != outputs else nn.Identity()

    def forward(self, x):
        y = F.silu(self.conv2(F.silu(self.conv1(x))))
        scale = self.se.fc2(F.silu(self.se.fc1(y.mean((2, 3), keepdim=True)))).sigmoid()
        return F.silu(self.conv3(y * scale) + self.downsample(x))


def stage(inputs, outputs):
    return nn.Sequential(OrderedDict(b1=Bottleneck(inputs, outputs), b2=Bottleneck(outputs, outputs)))


def mlp2x_gelu(inputs, outputs):
    return nn.Sequential(nn.Linear(inputs, outputs), nn.GELU(), nn.Linear(outputs, outputs))


class VideoProjector(nn.Module):
    """Three views of the same patches, each (B, T*N/4, D) in (t, h, w) order: video and body (convolutions over
    space and time) and face (per patch)."""

    def __init__(self, width, D):
        super().__init__()
        for name in ("video", "body"):
            self.add_module(f"s1_{name}", stage(width, D))
            self.add_module(f"sampler_{name}", nn.Sequential(
                nn.Conv3d(D, D, kernel_size=2, stride=(1, 2, 2), padding=(1, 0, 0)), nn.SiLU()))
            self.add_module(f"s2_{name}", stage(D, D))
            self.add_module(f"readout_{name}", mlp2x_gelu(D, D))
        self.mlp_2xgelu_face = mlp2x_gelu(width, D)

    def convolved(self, x, name):
        """(B, T, N, width) -> (B, T*N/4, D) through the branch `name`."""
        s1, sampler, s2, readout = (getattr(self, f"{part}_{name}") for part in ("s1", "sampler", "s2", "readout"))
        B, T, N, _ = x.shape
        side = math.isqrt(N)
        x = s1(x.reshape(B * T, side, side, -1).permute(0, 3, 1, 2))  # (B*T, D, side, side)
        x = x.unflatten(0, (B, T)).transpose(1, 2)  # (B, D, T, side, side)
        x = sampler(x)[:, :, :T]  # padding in time makes T+1 steps; step t has seen frames t-1 and t
        x = s2(x.transpose(1, 2).flatten(0, 1))  # (B*T, D, side/2, side/2)
        x = x.unflatten(0, (B, T)).permute(0, 1, 3, 4, 2).flatten(1, 3)  # (B, T*N/4, D)
        return readout(x)

    def face(self, x):
        """(B, T, N, width) -> (B, T*N/4, D): per patch, then each frame's grid halved bilinearly."""
        B, T, N, _ = x.shape
        side = math.isqrt(N)
        x = self.mlp_2xgelu_face(x).flatten(0, 1).unflatten(1, (side, side)).permute(0, 3, 1, 2)
        x = F.interpolate(x, size=(side // 2, side // 2), mode="bilinear", align_corners=False)
        return x.unflatten(0, (B, T)).permute(0, 1, 3, 4, 2).flatten(1, 3)

    def forward(self, features, weights):
        """(B, T, N, width), (B, 3) -> (B, T*N/4, D), the weighted sum of the branches."""
        branches = torch.stack([self.convolved(features, "video"), self.convolved(features, "body"), self.face(features)])
        return torch.einsum("cbnd,bc->bnd", branches, weights.to(branches.dtype))


# ------------------------------------------------------------------------------------------------
# Language model (Qwen2)


class RMSNorm(nn.Module):
    def __init__(self, width, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x):
        x32 = x.float()  # squares of bf16 activations lose too much
        normed = (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)
        return (self.weight * normed).to(x.dtype)  # float32 master weights do not widen a bf16 stream


def rotate(x, rope):
    """Rotary position embedding: pairs (i, i + hd/2) of each head turned by position * theta^(-2i/hd).

    x (R, heads, L, hd); rope: cos and sin, each (R or 1, 1, L, hd) float32."""
    cos, sin = rope
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)


def attend(q, k, v, past=None):
    """Causal attention of L new tokens, which follow `past`.

    q (R, heads, L, hd); k, v (R, kv_heads, L, hd) -> (R, heads, L, hd). past is one of
      None              nothing came before;
      (k, v)            keys and values of B prompts, (B, kv_heads, P, hd), each shared by R/B rows, gradients and all;
      any other object  its method attend(q, k, v) decides (the static cache of generate.py).
    """
    if past is not None and not isinstance(past, tuple):
        return past.attend(q, k, v)
    if past is not None:
        k, v = (torch.cat([old.repeat_interleave(len(new) // len(old), 0), new], dim=2) for old, new in zip(past, (k, v)))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))  # grouped queries share keys
    L, S = q.shape[2], k.shape[2]
    if L == S:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    # New token i sees the S - L old ones and new ones 0..i: the causal triangle sits in the lower right corner.
    if q.is_cuda:
        mask = causal_lower_right(L, S)  # not a tensor of L x S: it selects the flash kernel
    else:
        mask = torch.ones(L, S, dtype=torch.bool, device=q.device).tril(S - L)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        D, heads, kv_heads = c["hidden_size"], c["num_attention_heads"], c["num_key_value_heads"]
        self.head_dim = D // heads
        self.q_proj = nn.Linear(D, D)
        self.k_proj = nn.Linear(D, kv_heads * self.head_dim)
        self.v_proj = nn.Linear(D, kv_heads * self.head_dim)
        self.o_proj = nn.Linear(D, D, bias=False)

    def forward(self, x, rope, past):
        q, k, v = (proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
                   for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, rope), rotate(k, rope)
        return self.o_proj(attend(q, k, v, past).transpose(1, 2).flatten(2)), (k, v)


class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        D, inner = c["hidden_size"], c["intermediate_size"]
        self.gate_proj = nn.Linear(D, inner, bias=False)
        self.up_proj = nn.Linear(D, inner, bias=False)
        self.down_proj = nn.Linear(inner, D, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.input_layernorm = RMSNorm(c["hidden_size"], c["rms_norm_eps"])
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c["hidden_size"], c["rms_norm_eps"])
        self.mlp = MLP(c)

    def forward(self, x, rope, past):
        attended, kv = self.self_attn(self.input_layernorm(x), rope, past)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x)), kv


# ------------------------------------------------------------------------------------------------
# The omni model


def pool_audio(features):
    """(B, A, width) -> (B, A/3, width), the mean of three neighbours."""
    return F.avg_pool1d(features.transpose(1, 2), AUDIO_POOL).transpose(1, 2)


class HumanOmni(nn.Module):
    """configs: the dictionaries of config.json ("llm") and of the three encoders ("siglip", "whisper", "bert"),
    with the keys of their Hugging Face files."""

    def __init__(self, configs):
        super().__init__()
        self.configs = configs
        self.files = {}  # what else belongs to the checkpoint directory (tokenizer, ...): relative name -> bytes
        c, siglip, whisper, bert = (configs[name] for name in ("llm", "siglip", "whisper", "bert"))
        D = c["hidden_size"]
        self.vision_tower = VisionTower(siglip, c.get("mm_vision_select_layer", -2))
        self.audio_tower = AudioTower(whisper)
        self.bert_model = Bert(bert)
        self.bert_gate = nn.Sequential(nn.Linear(bert["hidden_size"], GATE_WIDTH), nn.GELU(), nn.Linear(GATE_WIDTH, 3))
        self.mm_projector = VideoProjector(siglip["hidden_size"], D)
        self.audio_projector = mlp2x_gelu(whisper["d_model"], D)
        self.embed_tokens = nn.Embedding(c["vocab_size"], D)
        self.layers = nn.ModuleList(DecoderLayer(c) for _ in range(c["num_hidden_layers"]))
        self.norm = RMSNorm(D, c["rms_norm_eps"])
        self.gradient_checkpointing = False
        self.lm_head = None if c["tie_word_embeddings"] else nn.Linear(D, c["vocab_size"], bias=False)

    def trainable_copy(self, dtype):
        """A frozen copy, in another type maybe, of what trains; towers and BERT are shared with it, not copied.

        For the GRPO reference and for sampling."""
        shared = (self.vision_tower, self.audio_tower, self.bert_model)
        twin = copy.deepcopy(self, {id(tower): tower for tower in shared})  # deepcopy leaves alone what it "has copied"
        for child in twin.children():
            if child not in shared:
                child.requires_grad_(False).to(dtype)
        return twin

    @property
    def device(self):
        return self.embed_tokens.weight.device

    def encode(self, pixel_values, input_features):
        """Both towers, once per clip, without gradient unless a tower trains.

        (B, T, 3, H, W) and (B, mels, 2*A), either None -> (B, T, N, width) and, pooled, (B, A/3, width), or None."""
        video = audio = None
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.vision_tower.embeddings.patch_embedding.weight.requires_grad):
            if pixel_values is not None:
                video = self.vision_tower(pixel_values.flatten(0, 1)).unflatten(0, pixel_values.shape[:2])
            if input_features is not None:
                audio = pool_audio(self.audio_tower(input_features))
        return video, audio

    def branch_weights(self, input_ids, attention_mask):
        """BERT ids and mask (B, L) of the question -> (B, 3) weights of the video branches, summing to 1."""
        cls = self.bert_model(input_ids, attention_mask)[:, 0]
        return self.bert_gate(cls).float().softmax(-1)

    def video_tokens(self, features, weights):
        """(B, T, N, width), (B, 3) -> (B, T*N/4, D)."""
        return self.mm_projector(features, weights)

    def audio_tokens(self, features):
        """(B, A, width) -> (B, A/3, D)."""
        return self.audio_projector(pool_audio(features))

    def embed_prompt(self, prompt_ids, video_tokens=None, audio_tokens=None):
        """(B, L) ids, one -201 / -202 per row where the video (B, n, D) / audio (B, m, D) tokens go -> (B, P, D).

        Tokens that have no place in the prompt, and places without tokens, are a ValueError."""
        media = {VIDEO_TOKEN: video_tokens, AUDIO_TOKEN: audio_tokens}
        for placeholder, tokens in media.items():
            counts = (prompt_ids == placeholder).sum(1)
            if (counts != (tokens is not None)).any():
                raise ValueError(f"each prompt needs {int(tokens is not None)} placeholder {placeholder}, found {counts.tolist()}")
        text = self.embed_tokens(prompt_ids.clamp(min=0))  # (B, L, D); the places' own embeddings are cut out below
        rows = []
        for b, ids in enumerate(prompt_ids.tolist()):
            places = sorted((ids.index(p), tokens[b]) for p, tokens in media.items() if tokens is not None)
            pieces, start = [], 0
            for place, tokens in places:
                pieces += [text[b, start:place], tokens.to(text.dtype)]
                start = place + 1
            rows.append(torch.cat([*pieces, text[b, start:]]))
        return torch.stack(rows)

    def prompt_length(self, prompt_ids):
        """P of these ids (a list): how many positions they take once the clip's tokens stand in their places."""
        c, siglip = self.configs["llm"], self.configs["siglip"]
        side = siglip["image_size"] // siglip["patch_size"]
        video = c.get("num_frames", 8) * (side // 2) ** 2
        audio = self.configs["whisper"]["max_source_positions"] // AUDIO_POOL
        return sum({VIDEO_TOKEN: video, AUDIO_TOKEN: audio}.get(i, 1) for i in prompt_ids)

    def embed_prompts(self, prompt_ids, video, audio, question_ids, question_mask):
        """The whole way from tower features to embedded prompts, with gradient into projectors, gate and embedding.

        prompt_ids: B lists of ids, of unequal length maybe; video (B, T, N, width) and audio (B, A/3, width) from
        `encode`, or None; question_ids, question_mask (B, L) for BERT -> list of B tensors (P_i, D)."""
        if video is not None:
            video = self.video_tokens(video, self.branch_weights(question_ids, question_mask))
        if audio is not None:
            audio = self.audio_projector(audio)
        return [self.embed_prompt(torch.tensor([ids], device=self.device),
                                  None if video is None else video[b:b + 1], None if audio is None else audio[b:b + 1])[0]
                for b, ids in enumerate(prompt_ids)]

    def forward(self, inputs_embeds, past=None, positions=None, return_kv=False):
        """The language model, causal: (R, L, D) -> hidden states after the final norm (R, L, D).

        past       one entry per layer, each as in `attend`: what the new tokens follow;
        positions  (R or 1, L) of the new tokens; default: on from the end of `past`;
        return_kv  also return the new tokens' keys and values, [(k, v)] per layer, ready to be `past`.
        """
        if positions is None:
            start = past[0][0].shape[2] if past else 0
            positions = torch.arange(start, start + inputs_embeds.shape[1], device=inputs_embeds.device)[None]
        rope = self.rope(positions)
        x, kv = inputs_embeds, []
        if torch.is_autocast_enabled(x.device.type):  # float32 weights, bf16 arithmetic: the residual stream too
            x = x.to(torch.get_autocast_dtype(x.device.type))
        for i, layer in enumerate(self.layers):
            arguments = (x, rope, past[i] if past else None)
            if self.gradient_checkpointing and torch.is_grad_enabled():  # keep the layer's input only, run it again in backward
                x, layer_kv = checkpoint(layer, *arguments, use_reentrant=False, preserve_rng_state=False)
            else:
                x, layer_kv = layer(*arguments)
            if return_kv:
                kv.append(layer_kv)
        x = self.norm(x)
        return (x, kv) if return_kv else x

    def rope(self, positions):
        """(R, L) -> cos, sin, each (R, 1, L, hd) in float32: bf16 cannot count to a thousand."""
        hd = self.layers[0].self_attn.head_dim
        frequencies = self.configs["llm"]["rope_theta"] ** -(torch.arange(0, hd, 2, device=positions.device).float() / hd)
        angles = (positions[..., None].float() * frequencies).repeat(1, 1, 2)[:, None]
        return angles.cos(), angles.sin()

    def logits(self, hidden):
        """(..., D) -> (..., V) in float32: a bf16 log-softmax blurs a small KL beyond use."""
        head = self.embed_tokens if self.lm_head is None else self.lm_head
        with torch.autocast(hidden.device.type, enabled=False):
            if hidden.is_cuda and hidden.dtype == head.weight.dtype == torch.bfloat16 and not torch.is_grad_enabled():
                # The same numbers without a float32 copy of the head at every sampled token: the products of bf16
                # numbers are exact in float32, and are summed there.
                rows = hidden.reshape(-1, hidden.shape[-1])
                return torch.mm(rows, head.weight.T, out_dtype=torch.float32).view(*hidden.shape[:-1], -1)
            return F.linear(hidden.float(), head.weight.float())

    # --------------------------------------------------------------------------------------------
    # Checkpoints

    @classmethod
    def from_pretrained(cls, path, *, siglip=None, whisper=None, bert=None, device="cpu", dtype=torch.float32):
        """Load a directory of the published layout, strictly: every tensor the model needs, in its shape, and
        nothing unknown. siglip, whisper, bert: directories (Hugging Face layout) that supply what `path` lacks."""
        path = Path(path)
        folders = {"siglip": siglip, "whisper": whisper, "bert": bert}
        for name, folder in folders.items():
            if folder and not Path(folder).is_dir():
                raise CheckpointError(f"{folder}: no such directory (given as --{name})")
            folders[name] = Path(folder or path / name)
        llm = read_llm_config(path / "config.json")
        found = find_tensors(path, folders)
        configs = {"llm": llm, **{name: read_encoder_config(name, folder, found) for name, folder in folders.items()}}
        check_layers(configs, found, path)
        try:
            with torch.device("meta"):  # shapes only: the tensors that are read become the parameters
                model = cls(configs)
        except (ArithmeticError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{path}: no model has the sizes in its configurations ({error}); download them again") from error
        wanted = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
        check_tensors(wanted, found, path, tied=model.lm_head is None)
        tensors, files = {}, {}
        for key in wanted:
            file, name, _ = found[key]
            files[file] = files.get(file) or open_tensors(file, device)
            tensor = files[file].get_tensor(name)
            if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
                raise CheckpointError(f"{file}: {name} is {tensor.dtype}; float32, float16 and bfloat16 are read")
            tensors[key] = tensor.to(dtype)
        model.load_state_dict(tensors, strict=True, assign=True)
        model.files = read_companions(path, folders)
        return model.eval()

    def save_pretrained(self, path, dtype=None):
        """Write a directory that loads alone, under the published names. dtype: of the tensors, None as held.

        It is written beside `path`, synced and renamed when complete: a crash or a full disk leaves the old one whole, under
        its name or, if it comes between two renames, as PATH.old."""
        path = Path(path).absolute()
        if path.exists() and any(path.iterdir()) and not (path / "config.json").exists():
            raise CheckpointError(f"{path}: exists and is not a checkpoint, so it is not replaced; choose another directory")
        temporary, old = path.with_name(path.name + ".tmp"), path.with_name(path.name + ".old")
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            self._write(temporary, dtype)
            for file in (*temporary.rglob("*"), temporary):
                sync(file)
            if path.exists():
                shutil.rmtree(old, ignore_errors=True)
                os.replace(path, old)
            os.replace(temporary, path)
            sync(path.parent)
            shutil.rmtree(old, ignore_errors=True)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise CheckpointError(f"{path}: cannot be written ({error}); what was there before is unharmed") from None

    def _write(self, folder, dtype):
        tensors = {published_name(key): t.detach().to("cpu", dtype).contiguous() for key, t in self.state_dict().items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        saved_dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
        for name, config in self.configs.items():
            place = folder if name == "llm" else folder / name
            place.mkdir(exist_ok=True)
            config = {**config, "torch_dtype": saved_dtype} if name == "llm" else config
            (place / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")
        for name, content in self.files.items():
            (folder / name).write_bytes(content)


def sync(path):
    """Wait until a file, or a folder's list of entries, is on the disk itself (not on Windows, which cannot be asked so)."""
    if os.name == "posix":
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file and the way on."""


# Prefix of a module here -> its prefix in a published file; the first that fits counts.
PUBLISHED = {"vision_tower.": "model.vision_tower.vision_tower.vision_model.",
             "audio_tower.": "model.audio_tower.audio_tower.encoder.", "lm_head.": "lm_head.", "": "model."}
# Encoder -> its prefix here, and the prefixes its tensors may have in a directory of its own.
ENCODERS = {"siglip": ("vision_tower.", ["vision_model."]), "whisper": ("audio_tower.", ["model.encoder.", "encoder."]),
            "bert": ("bert_model.", ["bert.", ""])}
# In published files, but never run: SigLIP's last layer, final norm and pooling head, BERT's pooler, Whisper's classifier.
UNUSED = re.compile(r"model\.vision_tower\.vision_tower\.vision_model\.(head|post_layernorm|encoder\.layers)\..*"
                    r"|model\.audio_tower\.audio_tower\.(projector|classifier)\..*"
                    r"|model\.bert_model\.pooler\..*|.*\.position_ids|.*\.rotary_emb\.inv_freq")
# What else belongs to a checkpoint, in its main folder and those of the encoders.
COMPANIONS = ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "vocab.txt",
              "added_tokens.json", "special_tokens_map.json", "chat_template.jinja", "preprocessor_config.json")


def layer_count(shapes, prefix):
    return 1 + max(int(name[len(prefix):].split(".")[0]) for name in shapes if name.startswith(prefix))


# The sizes each encoder is built from, and how to read them off its tensors' shapes where no config.json has them.
SIZES = {
    "siglip": {
        "hidden_size": lambda s: s["embeddings.patch_embedding.weight"][0],
        "patch_size": lambda s: s["embeddings.patch_embedding.weight"][2],
        "image_size": lambda s: s["embeddings.patch_embedding.weight"][2] * math.isqrt(s["embeddings.position_embedding.weight"][0]),
        "num_hidden_layers": lambda s: layer_count(s, "encoder.layers."),
        "num_attention_heads": lambda s: s["embeddings.patch_embedding.weight"][0] // 64,
        "intermediate_size": lambda s: s["encoder.layers.0.mlp.fc1.weight"][0],
        "layer_norm_eps": lambda s: 1e-6},
    "whisper": {
        "d_model": lambda s: s["conv1.weight"][0],
        "num_mel_bins": lambda s: s["conv1.weight"][1],
        "max_source_positions": lambda s: s["embed_positions.weight"][0],
        "encoder_layers": lambda s: layer_count(s, "layers."),
        "encoder_attention_heads": lambda s: s["conv1.weight"][0] // 64,
        "encoder_ffn_dim": lambda s: s["layers.0.fc1.weight"][0]},
    "bert": {
        "vocab_size": lambda s: s["embeddings.word_embeddings.weight"][0],
        "hidden_size": lambda s: s["embeddings.word_embeddings.weight"][1],
        "max_position_embeddings": lambda s: s["embeddings.position_embeddings.weight"][0],
        "type_vocab_size": lambda s: s["embeddings.token_type_embeddings.weight"][0],
        "num_hidden_layers": lambda s: layer_count(s, "encoder.layer."),
        "num_attention_heads": lambda s: s["embeddings.word_embeddings.weight"][1] // 64,
        "intermediate_size": lambda s: s["encoder.layer.0.intermediate.dense.weight"][0],
        "layer_norm_eps": lambda s: 1e-12},
}
LLM_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "rms_norm_eps",
             "rope_theta", "vocab_size")


def published_name(key):
    """Name of a tensor here -> its name in a published file."""
    prefix = next(prefix for prefix in PUBLISHED if key.startswith(prefix))
    return PUBLISHED[prefix] + key[len(prefix):]


def read_config(path):
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: not found; a checkpoint directory holds config.json, model.safetensors and a tokenizer") from None
    except (ValueError, OSError, RecursionError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error}); download it again") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(config).__name__}")
    return config


LARGEST = 2 ** 20  # of any size in a configuration: seven times the published vocabulary
REAL = {"rms_norm_eps": (0, 1), "layer_norm_eps": (0, 1), "rope_theta": (1, 1e12)}  # the others are whole numbers


def require_numbers(config, keys, path):
    def fits(key, value):
        if key in REAL:
            return type(value) in (int, float) and REAL[key][0] < value < REAL[key][1]
        return type(value) is int and 0 < value <= LARGEST  # type, not isinstance: True is an int

    bad = [f"{key} is {config.get(key)!r}"[:200] for key in keys if not fits(key, config.get(key))]
    if bad:
        raise CheckpointError(f"{path}: {', '.join(bad)}; expected positive numbers, whole for sizes and up to {LARGEST}")


def read_llm_config(path):
    """config.json of the checkpoint, if it is of the architecture that this file implements."""
    config = {"tie_word_embeddings": False, **read_config(path)}
    expected = {"model_type": "HumanOmni_qwen2", "mm_projector_type": "all_in_one_small", "mm_audio_projector_type": "mlp2x_gelu"}
    usual = {"hidden_act": "silu", "rope_scaling": None, "mm_vision_select_feature": "patch"}  # may be left out
    for key, value in {**expected, **usual}.items():
        if config.get(key, usual.get(key)) != value:
            raise CheckpointError(f"{path}: {key} is {config.get(key)!r}, this model's is {value!r}")
    require_numbers({"num_frames": 8, **config}, (*LLM_SIZES, "num_frames"), path)
    select = config.get("mm_vision_select_layer", -2)
    if type(config["tie_word_embeddings"]) is not bool or type(select) is not int or select >= 0 or config.get("num_frames", 8) > 512:
        raise CheckpointError(f"{path}: tie_word_embeddings {config['tie_word_embeddings']!r}, mm_vision_select_layer {select!r}, num_frames "
                              f"{config.get('num_frames', 8)} should be true or false, a negative whole number, and at most 512")
    D, heads, kv_heads = (config[key] for key in ("hidden_size", "num_attention_heads", "num_key_value_heads"))
    if D % (2 * heads) or heads % kv_heads:
        raise CheckpointError(f"{path}: hidden_size {D}, num_attention_heads {heads}, num_key_value_heads {kv_heads} must divide, "
                              "and leave heads of even width")
    return config


def read_encoder_config(name, folder, found):
    """An encoder's config.json; sizes it does not state come from the shapes of its tensors (heads: width / 64)."""
    file, ours = folder / "config.json", ENCODERS[name][0]
    config = read_config(file) if file.exists() else {}
    if isinstance(config.get("vision_config"), dict):  # a dual encoder's file: the vision half, without its default values
        config = config["vision_config"]
    shapes = {key[len(ours):]: shape for key, (_, _, shape) in found.items() if key.startswith(ours)}
    for key, from_shapes in SIZES[name].items():
        if key not in config:
            try:
                config[key] = from_shapes(shapes)
            except (KeyError, ValueError, IndexError):
                raise CheckpointError(f"{folder}: neither a config.json nor tensors tell the {name} encoder's {key}; "
                                      f"name its directory with --{name} DIR") from None
    require_numbers(config, SIZES[name], file)
    width, heads = (config[key] for key in SIZES[name] if key in WIDTH_AND_HEADS)
    if width % heads:
        raise CheckpointError(f"{file}: a width of {width} cannot be split into {heads} heads")
    return config


WIDTH_AND_HEADS = ("hidden_size", "num_attention_heads", "d_model", "encoder_attention_heads")
LAYERS = {"llm": "num_hidden_layers", "siglip": "num_hidden_layers", "whisper": "encoder_layers", "bert": "num_hidden_layers"}


def check_layers(configs, found, path):
    """Before anything is built: a layer has several tensors, so there cannot be more layers than tensors."""
    for name, key in LAYERS.items():
        if configs[name][key] > len(found):
            raise CheckpointError(f"{path}: {key} of {name} is {configs[name][key]}, but there are only {len(found)} tensors")


def open_tensors(file, device="cpu"):
    """A safetensors file, opened lazily; what is not one is named. Pickles are never opened."""
    try:
        return safe_open(file, "pt", device=str(device))
    except FileNotFoundError:
        raise CheckpointError(f"{file}: not found; weights are read from model.safetensors or model.safetensors.index.json "
                              "(convert .bin files first: they are pickles and never opened here)") from None
    except (SafetensorError, OSError) as error:
        with open(file if file.is_file() else os.devnull, "rb") as f:
            if f.read(40).startswith(b"version https://git-lfs"):
                raise CheckpointError(f"{file}: a git-lfs pointer, not the weights; fetch them with `git lfs pull`") from None
        raise CheckpointError(f"{file}: not a complete safetensors file ({error}); download it again") from None


def tensor_files(folder):
    """The safetensors files of a directory: one, or the shards that its index names."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return [folder / "model.safetensors"]
    weight_map = read_config(index).get("weight_map")
    names = sorted(set(map(str, weight_map.values()))) if isinstance(weight_map, dict) else []
    if not names or not all(Path(name).name == name and name.endswith(".safetensors") for name in names):
        raise CheckpointError(f"{index}: its weight_map should name safetensors files beside it, not {names[:3]}; download it again")
    return [folder / name for name in names]


def find_tensors(path, folders):
    """All tensors of the checkpoint and of the encoders' directories: our key -> (file, name in it, shape).

    The checkpoint wins; a directory supplies only what the checkpoint lacks. The checkpoint's names that are nothing
    of ours stand under "?" + name."""
    def tensors(files):
        for file in files:
            content = open_tensors(file)
            for name in content.keys():
                yield name, (file, name, tuple(content.get_slice(name).get_shape()))

    found = {}
    for name, where in tensors(tensor_files(path)):
        ours = next((ours + name[len(theirs):] for ours, theirs in PUBLISHED.items() if name.startswith(theirs)), "?" + name)
        if ours in found:
            raise CheckpointError(f"{where[0]}: its {name} is in {found[ours][0]} too, as {found[ours][1]}; download the checkpoint again")
        found[ours] = where
    for encoder, folder in folders.items():
        if folder == path / encoder and not any(file.exists() for file in tensor_files(folder)):
            continue  # the checkpoint's own folder may hold a configuration alone
        ours, prefixes = ENCODERS[encoder]
        for name, where in tensors(tensor_files(folder)):
            # A dual encoder's text half, a decoder and the like do not start with the prefix of what is used.
            prefix = next((prefix for prefix in prefixes if name.startswith(prefix)), None)
            if prefix is not None:
                name = name[len(prefix):].replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
                found.setdefault(ours + name, where)
    return found


def check_tensors(wanted, found, path, tied):
    """One error with all that is missing, mis-shaped or unknown, and the flag that mends it."""
    missing = [key for key in wanted if key not in found]
    problems = []
    for encoder, (prefix, _) in {**ENCODERS, "": ("", None)}.items():
        group = [key for key in missing if key.startswith(prefix)]
        missing = [key for key in missing if key not in group]
        if group:
            hint = f"; name a directory that has them with --{encoder} DIR" if encoder else ""
            problems.append(f"{len(group)} missing tensors, such as {published_name(group[0])}{hint}")
    misshaped = [f"{found[key][1]} in {found[key][0]} is {found[key][2]}, expected {shape}"
                 for key, shape in wanted.items() if key in found and found[key][2] != shape]
    if misshaped:
        problems.append(f"{len(misshaped)} mis-shaped tensors, such as {misshaped[0]}")
    unknown = [name for key, (file, name, _) in found.items()
               if key not in wanted and file.parent == path and not UNUSED.fullmatch(name) and not (tied and key == "lm_head.weight")]
    if unknown:
        problems.append(f"{len(unknown)} unknown tensors, such as {unknown[0]}")
    if problems:
        raise CheckpointError(f"{path}: does not fit its configuration:\n  " + "\n  ".join(problems))


def read_companions(path, folders):
    """The small files that make a checkpoint directory complete, to be written back when it is saved."""
    places = {"": path, **{name + "/": folder for name, folder in folders.items()}}
    return {prefix + name: (folder / name).read_bytes()
            for prefix, folder in places.items() for name in COMPANIONS if (folder / name).is_file()}
