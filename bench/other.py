"""The other arm: transformers' Qwen2ForCausalLM with our weights, used in the usual way.

Eager `generate`, the prompt repeated for every completion, logits at every position. Projectors
are this code's in both arms.
"""

import torch

from bench.rows import Unequal, need

SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "rms_norm_eps",
    "vocab_size",
    "tie_word_embeddings",
)


def qwen2(model, dtype=torch.float32):
    """Our language model as transformers': the same weights under their names."""
    need("transformers")
    import transformers

    llm = model.configs["llm"]
    config = transformers.Qwen2Config(
        **{name: llm[name] for name in SIZES},
        max_position_embeddings=32768,
        bos_token_id=None,
        eos_token_id=None,
        rope_parameters={"rope_type": "default", "rope_theta": llm["rope_theta"]},
    )
    theirs = transformers.Qwen2ForCausalLM(config).to(model.device, dtype).eval()
    ours = {
        f"model.{name}": tensor
        for name, tensor in model.state_dict().items()
        if name.startswith(("embed_tokens.", "layers.", "norm."))
    }
    missing, unexpected = theirs.load_state_dict(ours, strict=False)
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise Unequal(f"weights do not map: {missing} {unexpected}")
    return theirs


class OtherModel:
    """llm: transformers' model. parts: ours without a language model, for its projectors."""

    def __init__(self, model, dtype, trains):
        self.llm = qwen2(model, dtype)
        self.parts = model.frozen_copy(dtype)
        self.parts.layers, self.parts.norm = None, None
        self.parts.embed_tokens = self.llm.model.embed_tokens
        projectors = (self.parts.mm_projector, self.parts.audio_projector, self.parts.bert_gate)
        for module in (self.llm, *projectors):
            module.requires_grad_(trains)

    def parameters(self):
        """All that train, each once."""
        everything = [*self.llm.parameters(), *self.parts.parameters()]
        return [p for p in dict.fromkeys(everything) if p.requires_grad]

    def generate(self, prompts, C, **options):
        """R prompts (P, D), repeated already -> ids (R, C). options: of transformers' generate."""
        embeds = torch.stack(prompts)
        sampling = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
        return self.llm.generate(
            inputs_embeds=embeds,
            attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device),
            max_new_tokens=C,
            eos_token_id=None,
            pad_token_id=0,
            **(sampling | options),
        )

    def logps(self, prompts, ids):
        """The original's scoring: prompts (G, P, D) and ids (G, C) -> (G, C).

        Logits at every position, in the weights' type."""
        embeds = torch.cat([prompts, self.llm.model.embed_tokens(ids)], dim=1)
        logits = self.llm(inputs_embeds=embeds, use_cache=False).logits
        before_completions = logits[:, prompts.shape[1] - 1 : -1]
        # Row by row, as there: a log-softmax over all rows would need as much memory again.
        logps = [
            row.log_softmax(-1).gather(-1, i[:, None]).squeeze(-1)
            for row, i in zip(before_completions, ids)
        ]
        return torch.stack(logps)
