"""HumanOmni, the omni-modal model of R1-Omni, in one file: four networks and their assembly.

    frames   --> SigLIP  --> video projector (three branches) -+
    question --> BERT    --> gate: one weight per branch ------+-> video tokens -+
    log-mel  --> Whisper --> average over 3, projector ----------> audio tokens -+-> Qwen2 -> hidden
    prompt ids ------------------------------------------------> text embeddings +

    model = HumanOmni.from_pretrained("path/to/R1-Omni-0.5B")
    video, audio = model.encode(pixel_values, input_features)  # frozen towers: once per clip
    question = model.read_question(bert_ids, bert_mask)  # frozen too: once per question
    (prompt,) = model.embed_prompts([prompt_ids], video, audio, question)  # (P, D)
    logits = model.logits(model(prompt[None]))  # (1, P, V)

Module names are those of the published checkpoints, so `state_dict()` differs from a file on disk
by prefixes alone. One forward of the language model serves prefill, decoding, scoring and the
reference: the argument `past` says what the new tokens attend to besides themselves.

Shapes: B prompts · G completions per prompt · P prompt length · C completion length · T frames ·
N patches per frame (side*side) · A audio positions · D width of the language model · V vocabulary ·
R rows, B or B*G · L tokens of any kind · hd width of a head. `c` is a network's configuration.
This file needs torch and the standard library; loading and saving stand in checkpoint.py.
"""

import copy
import math
from collections import OrderedDict
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.bias import causal_lower_right
from torch.utils.checkpoint import checkpoint as recompute_in_backward

VIDEO_TOKEN, AUDIO_TOKEN = -201, -202  # placeholders in prompt ids
GATE_WIDTH = 3584  # fixed in the published model at every size
AUDIO_POOL = 3  # Whisper positions averaged into one audio token
named = lambda **modules: nn.ModuleDict(modules)  # a level of the published names, and no more


# --- The three encoders: SigLIP (frames), Whisper (sound), BERT (the question) --------------------
def split_heads(x, heads):
    """(R, L, heads*hd) -> (R, heads, L, hd)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def multi_head(q, k, v, heads, mask=None):
    """Full attention of queries, keys, values (B, L, width), split into heads -> (B, L, width)."""
    q, k, v = split_heads(q, heads), split_heads(k, heads), split_heads(v, heads)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


class SelfAttention(nn.Module):
    def __init__(self, width, heads, key_bias=True):  # Whisper's keys have no bias
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj = nn.Linear(width, width), nn.Linear(width, width, bias=key_bias)
        self.v_proj, self.out_proj = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x):
        return self.out_proj(multi_head(self.q_proj(x), self.k_proj(x), self.v_proj(x), self.heads))


class SiglipLayer(nn.Module):
    def __init__(self, c):
        super().__init__()
        width, inner, eps = c["hidden_size"], c["intermediate_size"], c["layer_norm_eps"]
        self.layer_norm1 = nn.LayerNorm(width, eps=eps)
        self.self_attn = SelfAttention(width, c["num_attention_heads"])
        self.layer_norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = named(fc1=nn.Linear(width, inner), fc2=nn.Linear(inner, width))

    def forward(self, x):
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp.fc2(F.gelu(self.mlp.fc1(self.layer_norm2(x)), approximate="tanh"))


class VisionTower(nn.Module):
    def __init__(self, c, select_layer=-2):
        super().__init__()
        width, patch = c["hidden_size"], c["patch_size"]
        patches = nn.Conv2d(3, width, patch, stride=patch)
        positions = nn.Embedding((c["image_size"] // patch) ** 2, width)
        self.embeddings = named(patch_embedding=patches, position_embedding=positions)
        # Up to hidden state `select_layer` (0 is the embedding): at -2 the last layer never runs.
        layers = c["num_hidden_layers"] + 1 + select_layer
        self.encoder = named(layers=nn.Sequential(*[SiglipLayer(c) for _ in range(layers)]))

    def forward(self, pixel_values):
        """(B*T, 3, H, W) in [-1, 1] -> (B*T, N, width)."""
        to_patches = self.embeddings.patch_embedding
        x = to_patches(pixel_values.to(to_patches.weight.dtype))  # (B*T, width, side, side)
        x = x.flatten(2).transpose(1, 2)  # (B*T, N, width)
        return self.encoder.layers(x + self.embeddings.position_embedding.weight)


class WhisperLayer(nn.Module):
    def __init__(self, c):
        super().__init__()
        width, inner = c["d_model"], c["encoder_ffn_dim"]
        self.self_attn_layer_norm = nn.LayerNorm(width)
        self.self_attn = SelfAttention(width, c["encoder_attention_heads"], key_bias=False)
        self.final_layer_norm = nn.LayerNorm(width)
        self.fc1, self.fc2 = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x):
        x = x + self.self_attn(self.self_attn_layer_norm(x))
        return x + self.fc2(F.gelu(self.fc1(self.final_layer_norm(x))))


class AudioTower(nn.Module):
    def __init__(self, c):
        super().__init__()
        width = c["d_model"]
        self.conv1 = nn.Conv1d(c["num_mel_bins"], width, 3, padding=1)
        self.conv2 = nn.Conv1d(width, width, 3, stride=2, padding=1)
        self.embed_positions = nn.Embedding(c["max_source_positions"], width)
        self.layers = nn.Sequential(*[WhisperLayer(c) for _ in range(c["encoder_layers"])])
        self.layer_norm = nn.LayerNorm(width)

    def forward(self, input_features):
        """Log-mel (B, mels, 2*A) -> (B, A, width). A is fixed: Whisper pads sound with silence."""
        positions = self.embed_positions.weight  # (A, width)
        frames, wanted = input_features.shape[-1], 2 * len(positions)
        if frames != wanted:
            raise ValueError(f"log-mel has {frames} frames, the audio tower takes {wanted}")
        x = F.gelu(self.conv1(input_features.to(positions.dtype)))  # (B, width, 2*A)
        x = F.gelu(self.conv2(x)).transpose(1, 2) + positions  # (B, A, width)
        return self.layer_norm(self.layers(x))


class BertLayer(nn.Module):
    def __init__(self, c):
        super().__init__()
        width, inner, eps = c["hidden_size"], c["intermediate_size"], c["layer_norm_eps"]
        self.heads = c["num_attention_heads"]
        query, key, value = (nn.Linear(width, width) for _ in range(3))
        after = named(dense=nn.Linear(width, width), LayerNorm=nn.LayerNorm(width, eps=eps))
        self.attention = named(self=named(query=query, key=key, value=value), output=after)
        self.intermediate = named(dense=nn.Linear(width, inner))
        self.output = named(dense=nn.Linear(inner, width), LayerNorm=nn.LayerNorm(width, eps=eps))

    def forward(self, x, mask):
        own, after = self.attention.self, self.attention.output
        mixed = multi_head(own.query(x), own.key(x), own.value(x), self.heads, mask)
        x = after.LayerNorm(x + after.dense(mixed))  # norm after the sum, unlike the others
        return self.output.LayerNorm(x + self.output.dense(F.gelu(self.intermediate.dense(x))))


class Bert(nn.Module):
    def __init__(self, c):
        super().__init__()
        width, layers = c["hidden_size"], c["num_hidden_layers"]
        self.embeddings = named(
            word_embeddings=nn.Embedding(c["vocab_size"], width),
            position_embeddings=nn.Embedding(c["max_position_embeddings"], width),
            token_type_embeddings=nn.Embedding(c["type_vocab_size"], width),
            LayerNorm=nn.LayerNorm(width, eps=c["layer_norm_eps"]),
        )
        self.encoder = named(layer=nn.ModuleList(BertLayer(c) for _ in range(layers)))

    def forward(self, input_ids, attention_mask):
        """(B, L) ids, 0/1 mask -> (B, L, width). No dropout: a policy would differ from itself."""
        e = self.embeddings
        x = e.word_embeddings(input_ids) + e.position_embeddings.weight[: input_ids.shape[1]]
        x = e.LayerNorm(x + e.token_type_embeddings.weight[0])  # (B, L, width)
        mask = attention_mask[:, None, None, :].bool()  # every query may look at the real keys
        for layer in self.encoder.layer:
            x = layer(x, mask)
        return x


# --- The video projector (published as `all_in_one_small`) ----------------------------------------
class ConvNorm(nn.Module):
    def __init__(self, inputs, outputs, kernel=1, groups=1):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, padding="same", groups=groups, bias=False)
        self.bn = nn.LayerNorm(outputs, eps=1e-5)  # over channels, in spite of its name

    def forward(self, x):
        return self.bn(self.conv(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Bottleneck(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.conv1 = ConvNorm(inputs, outputs)
        self.conv2 = ConvNorm(outputs, outputs, kernel=3, groups=outputs)  # depth-wise
        squeezed = round(0.25 * inputs)  # of the block's input, not of the layer it acts on
        self.se = named(fc1=nn.Conv2d(outputs, squeezed, 1), fc2=nn.Conv2d(squeezed, outputs, 1))
        self.conv3 = ConvNorm(outputs, outputs)
        self.downsample = ConvNorm(inputs, outputs) if inputs != outputs else nn.Identity()

    def forward(self, x):
        """RegNet's bottleneck: (B*T, inputs, side, side) -> (B*T, outputs, side, side)."""
        y = F.silu(self.conv2(F.silu(self.conv1(x))))
        mean = y.mean((2, 3), keepdim=True)  # (B*T, outputs, 1, 1)
        scale = self.se.fc2(F.silu(self.se.fc1(mean))).sigmoid()  # squeeze and excite
        return F.silu(self.conv3(y * scale) + self.downsample(x))


def stage(inputs, outputs):
    b1, b2 = Bottleneck(inputs, outputs), Bottleneck(outputs, outputs)
    return nn.Sequential(OrderedDict(b1=b1, b2=b2))


def mlp2x_gelu(inputs, outputs):
    return nn.Sequential(nn.Linear(inputs, outputs), nn.GELU(), nn.Linear(outputs, outputs))


class VideoProjector(nn.Module):
    def __init__(self, width, D):
        super().__init__()
        for branch in ("video", "body"):
            self.add_module(f"s1_{branch}", stage(width, D))
            halve = nn.Conv3d(D, D, kernel_size=2, stride=(1, 2, 2), padding=(1, 0, 0))
            self.add_module(f"sampler_{branch}", nn.Sequential(halve, nn.SiLU()))
            self.add_module(f"s2_{branch}", stage(D, D))
            self.add_module(f"readout_{branch}", mlp2x_gelu(D, D))
        self.mlp_2xgelu_face = mlp2x_gelu(width, D)

    def convolved(self, x, branch):
        """(B, T, N, width) -> (B, T*N/4, D) over space and time, by `branch`: video or body."""
        parts = ("s1", "sampler", "s2", "readout")
        s1, sampler, s2, readout = (getattr(self, f"{part}_{branch}") for part in parts)
        T, side = x.shape[1], math.isqrt(x.shape[2])
        x = x.flatten(0, 1).transpose(1, 2)  # (B*T, width, N)
        x = s1(x.unflatten(2, (side, side)))  # (B*T, D, side, side)
        x = x.unflatten(0, (-1, T)).transpose(1, 2)  # (B, D, T, side, side)
        x = sampler(x)[:, :, :T]  # padding makes T+1 steps; step t has seen frames t-1 and t
        x = s2(x.transpose(1, 2).flatten(0, 1))  # (B*T, D, side/2, side/2)
        x = x.flatten(2).transpose(1, 2)  # (B*T, N/4, D)
        return readout(x.unflatten(0, (-1, T)).flatten(1, 2))  # (B, T*N/4, D)

    def face(self, x):
        """(B, T, N, width) -> (B, T*N/4, D): per patch, then each frame's grid halved."""
        T, side = x.shape[1], math.isqrt(x.shape[2])
        x = self.mlp_2xgelu_face(x).flatten(0, 1).transpose(1, 2)  # (B*T, D, N)
        x = x.unflatten(2, (side, side))  # (B*T, D, side, side)
        x = F.interpolate(x, size=(side // 2, side // 2), mode="bilinear", align_corners=False)
        x = x.flatten(2).transpose(1, 2)  # (B*T, N/4, D)
        return x.unflatten(0, (-1, T)).flatten(1, 2)  # (B, T*N/4, D)

    def forward(self, features, weights):
        """(B, T, N, width), (B, 3) -> (B, T*N/4, D): three views of the same patches, weighted."""
        video, body = self.convolved(features, "video"), self.convolved(features, "body")
        branches = torch.stack([video, body, self.face(features)])  # (3, B, T*N/4, D)
        return torch.einsum("cbnd,bc->bnd", branches, weights.to(branches.dtype))


# --- The language model, Qwen2 --------------------------------------------------------------------
class RMSNorm(nn.Module):
    def __init__(self, width, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x):
        x32 = x.float()  # squares of bf16 activations lose too much
        normed = (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)
        return (self.weight * normed).to(x.dtype)  # float32 weights do not widen a bf16 stream


def rotate(x, rope):
    """Rotary embedding: pairs (i, i + hd/2) of each head turned by position * theta^(-2i/hd).
    x (R, heads, L, hd); rope: cos and sin, each (R or 1, 1, L, hd) float32 -> as x."""
    cos, sin = rope
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)


def attend(q, k, v, past=None, follows=None):
    """Causal attention of L new tokens, which come after `past`.

    q (R, heads, L, hd); k, v (R, kv_heads, L, hd) -> (R, heads, L, hd). past is one of
      None              nothing came before;
      (k, v)            of B prompts of one length, (B, kv_heads, P, hd), gradients and all; follows
                        (R, B) is 1 where a row follows a prompt, 0 elsewhere;
      any other object  its method attend(q, k, v) decides (the cache of support/kv_cache.py)."""
    if past is None or isinstance(past, tuple):
        return causal_attention(q, k, v, past, follows)
    return past.attend(q, k, v)


# Attention is one kernel already, and the compiler cannot look into a causal bias.
@torch.compiler.disable
def causal_attention(q, k, v, past, follows):
    """As `attend`, after nothing or after keys and values."""
    if past is not None:
        # A product, as its backward adds up a prompt's rows in float32 and always in one order.
        old_k, old_v = (torch.einsum("rb,bhpd->rhpd", follows, old) for old in past)
        k, v = torch.cat([old_k, k], dim=2), torch.cat([old_v, v], dim=2)  # (R, kv_heads, P+L, hd)
    L, S = q.shape[2], k.shape[2]
    if L == S:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    # New token i sees the S - L old ones and new ones 0..i: a causal triangle in the lower right.
    if q.is_cuda:
        mask = causal_lower_right(L, S)  # not a tensor of L x S: it selects the flash kernel
    else:
        mask = torch.ones(L, S, dtype=torch.bool, device=q.device).tril(S - L)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


class DecoderLayer(nn.Module):
    def __init__(self, c):
        super().__init__()
        D, inner, eps = c["hidden_size"], c["intermediate_size"], c["rms_norm_eps"]
        self.heads, self.kv_heads = c["num_attention_heads"], c["num_key_value_heads"]
        kv_width = D // self.heads * self.kv_heads
        self.input_layernorm = RMSNorm(D, eps)
        q, k, v = nn.Linear(D, D), nn.Linear(D, kv_width), nn.Linear(D, kv_width)
        self.self_attn = named(q_proj=q, k_proj=k, v_proj=v, o_proj=nn.Linear(D, D, bias=False))
        self.post_attention_layernorm = RMSNorm(D, eps)
        gate, up = nn.Linear(D, inner, bias=False), nn.Linear(D, inner, bias=False)
        self.mlp = named(gate_proj=gate, up_proj=up, down_proj=nn.Linear(inner, D, bias=False))

    def forward(self, x, rope, past, follows):
        """(R, L, D) -> (R, L, D), and the new tokens' keys and values (R, kv_heads, L, hd)."""
        attn, mlp = self.self_attn, self.mlp
        h = self.input_layernorm(x)
        q = rotate(split_heads(attn.q_proj(h), self.heads), rope)  # (R, heads, L, hd)
        k = rotate(split_heads(attn.k_proj(h), self.kv_heads), rope)  # (R, kv_heads, L, hd)
        v = split_heads(attn.v_proj(h), self.kv_heads)
        h = attend(q, k, v, past, follows).transpose(1, 2).flatten(2)  # (R, L, D)
        x = x + attn.o_proj(h)
        h = self.post_attention_layernorm(x)
        return x + mlp.down_proj(F.silu(mlp.gate_proj(h)) * mlp.up_proj(h)), (k, v)


# --- The omni model -------------------------------------------------------------------------------
def pool_audio(features):
    """(B, A, width) -> (B, A/3, width), the mean of three neighbours."""
    return F.avg_pool1d(features.transpose(1, 2), AUDIO_POOL).transpose(1, 2)


class HumanOmni(nn.Module):
    """configs: "llm" (config.json), "siglip", "whisper", "bert" -> their Hugging Face configs."""

    def __init__(self, configs):
        super().__init__()
        self.configs = configs
        self.files = {}  # the rest of the checkpoint (tokenizer, ...): relative name -> bytes
        c, siglip, whisper, bert = (configs[name] for name in ("llm", "siglip", "whisper", "bert"))
        D, V = c["hidden_size"], c["vocab_size"]
        self.vision_tower = VisionTower(siglip, c.get("mm_vision_select_layer", -2))
        self.audio_tower = AudioTower(whisper)
        self.bert_model = Bert(bert)
        wide, three = nn.Linear(bert["hidden_size"], GATE_WIDTH), nn.Linear(GATE_WIDTH, 3)
        self.bert_gate = nn.Sequential(wide, nn.GELU(), three)
        self.mm_projector = VideoProjector(siglip["hidden_size"], D)
        self.audio_projector = mlp2x_gelu(whisper["d_model"], D)
        self.embed_tokens = nn.Embedding(V, D)
        self.layers = nn.ModuleList(DecoderLayer(c) for _ in range(c["num_hidden_layers"]))
        self.norm = RMSNorm(D, c["rms_norm_eps"])
        self.lm_head = None if c["tie_word_embeddings"] else nn.Linear(D, V, bias=False)
        self.gradient_checkpointing = False
        self.compute_dtype = torch.float32  # of arithmetic over float32 weights: --dtype

    def frozen_copy(self, dtype):
        """A frozen copy of what trains, in `dtype`; both towers and BERT are shared, not copied."""
        shared = (self.vision_tower, self.audio_tower, self.bert_model)
        # The memo says that these have been copied already, each as itself: so they are shared.
        twin = copy.deepcopy(self, {id(module): module for module in shared})
        for child in set(twin.children()) - set(shared):
            child.requires_grad_(False).to(dtype)
        return twin

    @property
    def device(self):
        return self.embed_tokens.weight.device

    def encode(self, pixel_values, input_features):
        """Both towers, once per clip; the features of a frozen one carry no gradient.

        (B, T, 3, H, W) in [-1, 1] and log-mel (B, mels, 2*A), either may be None
        -> (B, T, N, width) and, pooled, (B, A/3, width), or None."""
        video = audio = None
        if pixel_values is not None:
            video = self.vision_tower(pixel_values.flatten(0, 1))  # (B*T, N, width)
            video = video.unflatten(0, pixel_values.shape[:2])  # (B, T, N, width)
        if input_features is not None:
            audio = pool_audio(self.audio_tower(input_features))
        return video, audio

    def read_question(self, input_ids, attention_mask):
        """BERT ids and mask (B, L) of questions -> (B, width), its state of the first token."""
        return self.bert_model(input_ids, attention_mask)[:, 0]

    def weigh_branches(self, question):
        """BERT's reading of questions (B, width) -> (B, 3) weights of the branches, sum 1."""
        return self.bert_gate(question).float().softmax(-1)

    def branch_weights(self, input_ids, attention_mask):
        """BERT ids and mask (B, L) of questions -> (B, 3) weights of the branches, sum 1."""
        return self.weigh_branches(self.read_question(input_ids, attention_mask))

    def video_tokens(self, features, weights):
        """(B, T, N, width), (B, 3) -> (B, T*N/4, D)."""
        return self.mm_projector(features, weights)

    def audio_tokens(self, features):
        """(B, A, width), not pooled -> (B, A/3, D)."""
        return self.audio_projector(pool_audio(features))

    def prompt_length(self, prompt_ids):
        """P of a list of ids: how many positions they take once the clip's tokens are in place."""
        c, siglip, whisper = (self.configs[name] for name in ("llm", "siglip", "whisper"))
        side = siglip["image_size"] // siglip["patch_size"] // 2
        video = c.get("num_frames", 8) * side**2
        audio = whisper["max_source_positions"] // AUDIO_POOL
        return sum({VIDEO_TOKEN: video, AUDIO_TOKEN: audio}.get(token, 1) for token in prompt_ids)

    def embed_prompt(self, prompt_ids, video_tokens=None, audio_tokens=None):
        """(B, L) ids -> (B, P, D): one -201 / -202 per row gives way to its video (B, n, D) / audio
        (B, m, D) tokens. A place without tokens, or tokens without a place, is a ValueError."""
        media = {VIDEO_TOKEN: video_tokens, AUDIO_TOKEN: audio_tokens}
        text_ids = prompt_ids.clamp(min=0).to(self.device, non_blocking=True)
        text = self.embed_tokens(text_ids)  # (B, L, D)
        prompts = []
        for b, ids in enumerate(prompt_ids.tolist()):
            pieces = list(text[b].split(1))  # L times (1, D); those of placeholders are replaced
            for place, tokens in media.items():
                wanted, found = int(tokens is not None), ids.count(place)
                if found != wanted:
                    raise ValueError(f"a prompt needs {wanted} placeholder {place}, found {found}")
                if wanted:
                    pieces[ids.index(place)] = tokens[b].to(text.dtype)
            prompts.append(torch.cat(pieces))  # (P, D)
        return torch.stack(prompts)

    def embed_prompts(self, prompt_ids, video, audio, question):
        """From tower features to prompts, with gradient into projectors, gate and embedding.

        prompt_ids    B lists of ids, of unequal length maybe
        video, audio  from `encode`, (T, N, width) and (A/3, width) per prompt: stacked, or a list
                      with None for a prompt that lacks the medium; None: all lack it
        question      from `read_question`, (width,) per prompt: stacked, or a list
        -> list of B tensors (P_i, D)."""
        B, video_tokens, audio_tokens = len(prompt_ids), {}, {}
        seen = [b for b in range(B) if video is not None and video[b] is not None]
        heard = [b for b in range(B) if audio is not None and audio[b] is not None]
        if seen:
            weights = self.weigh_branches(torch.stack([question[b] for b in seen]))  # (seen, 3)
            tokens = self.video_tokens(torch.stack([video[b] for b in seen]), weights)
            video_tokens = dict(zip(seen, tokens.split(1)))  # of prompt b: (1, T*N/4, D)
        if heard:
            tokens = self.audio_projector(torch.stack([audio[b] for b in heard]))
            audio_tokens = dict(zip(heard, tokens.split(1)))  # of prompt b: (1, A/3, D)
        prompts = []
        for b, ids in enumerate(prompt_ids):
            media = video_tokens.get(b), audio_tokens.get(b)
            # The ids stay in main memory, where embed_prompt looks for placeholders.
            prompts.append(self.embed_prompt(torch.tensor([ids]), *media)[0])
        return prompts

    def forward(self, inputs_embeds, past=None, prompt_of=None, positions=None, return_kv=False):
        """The language model, causal: (R, L, D) -> hidden states after the final norm (R, L, D).

        past       one entry per layer, each as in `attend`: what the new tokens follow
        prompt_of  (R,) int64: the prompt in `past` that each row follows; None: R/B rows each
        positions  (R or 1, L) of the new tokens; None: on from the end of `past`, or, beside any
                   other object than keys and values, from 0
        return_kv  also return their keys and values, [(k, v)] per layer, ready to be `past`"""
        x, kv, device = inputs_embeds, [], inputs_embeds.device
        (R, L, _), start, follows = x.shape, 0, None
        if past and isinstance(past[0], tuple):
            keys, _ = past[0]
            B, _, start, _ = keys.shape
            if prompt_of is None:
                prompt_of = torch.arange(R, device=device) // (R // B)
            # (R, B): 1 where a row follows a prompt
            follows = (prompt_of[:, None] == torch.arange(B, device=device)).to(keys.dtype)
        if positions is None:
            positions = torch.arange(start, start + L, device=device)[None]  # (1, L)
        c = self.configs["llm"]
        hd = c["hidden_size"] // c["num_attention_heads"]
        exponents = torch.arange(0, hd, 2, device=device).float() / hd
        angles = positions[..., None].float() * c["rope_theta"] ** -exponents  # (R or 1, L, hd/2)
        angles = angles.repeat(1, 1, 2)[:, None]  # (R or 1, 1, L, hd)
        rope = angles.cos(), angles.sin()  # float32: bf16 cannot count to a thousand
        if torch.is_autocast_enabled(device.type):
            # float32 weights, bf16 arithmetic: the residual stream too
            x = x.to(torch.get_autocast_dtype(device.type))
        recompute = partial(recompute_in_backward, use_reentrant=False, preserve_rng_state=False)
        for layer, layer_past in zip(self.layers, past or [None] * len(self.layers)):
            if self.gradient_checkpointing and torch.is_grad_enabled():
                layer = partial(recompute, layer)  # keep its input only, run it again in backward
            x, layer_kv = layer(x, rope, layer_past, follows)
            if return_kv:
                kv.append(layer_kv)
        x = self.norm(x)
        return (x, kv) if return_kv else x

    def logits(self, hidden):
        """(..., D) -> (..., V) in float32: a bf16 log-softmax blurs a small KL beyond use."""
        weight = (self.embed_tokens if self.lm_head is None else self.lm_head).weight
        in_half = hidden.dtype == weight.dtype != torch.float32  # bf16 or float16
        with torch.autocast(hidden.device.type, enabled=False):
            if hidden.is_cuda and in_half and not torch.is_grad_enabled():
                # The same numbers without a float32 copy of the head at every sampled token: the
                # products of such numbers are exact in float32, and are summed there.
                x = hidden.reshape(-1, hidden.shape[-1])
                return torch.mm(x, weight.T, out_dtype=torch.float32).view(*hidden.shape[:-1], -1)
            return F.linear(hidden.float(), weight.float())

    @classmethod
    def from_pretrained(
        cls, path, *, siglip=None, whisper=None, bert=None, device="cpu", dtype=torch.float32
    ):
        """Load a directory of the published layout, strictly: see `checkpoint.load`."""
        import checkpoint  # here, so that the networks alone need torch and nothing else

        folders = {"siglip": siglip, "whisper": whisper, "bert": bert}
        return checkpoint.load(cls, path, folders, device, dtype)

    def save_pretrained(self, path, dtype=None):
        """Write a directory that loads alone, under the published names: see `checkpoint.save`."""
        import checkpoint

        checkpoint.save(self, path, dtype)
