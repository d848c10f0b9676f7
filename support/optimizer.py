"""What trains, and one optimizer step: AdamW on float32 weights, the same for both training
scripts."""

import json

import torch
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

from support.clock import timed
from support.errors import TrainingError, naming
from support.precision import compute_dtype
from support.ranks import rank_file, sum_gradients_over_ranks, true_on_any_rank


def set_trainable(model, towers=False):
    """Freeze BERT, and the towers unless they are to train -> name -> parameter of what trains."""
    frozen = [model.bert_model]
    if not towers:
        frozen += [model.vision_tower, model.audio_tower]
    model.requires_grad_(True)
    for encoder in frozen:
        encoder.requires_grad_(False)
        encoder.to(compute_dtype(model.device))  # float32 is for what takes small steps
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


class Optimizer:
    """AdamW without weight decay, and what surrounds its step.

    parameters  name -> parameter (float32), whose gradients have been added up by backward()
    config      flags lr, clip_norm, offload_optimizer, skip_nonfinite
    folder      of the run: what led to a NaN is written there
    """

    def __init__(self, parameters, config, folder):
        self.parameters, self.config, self.folder = parameters, config, folder
        self.adamw = torch.optim.AdamW(
            parameters.values(), lr=config.lr, weight_decay=0.0, fused=True
        )
        self.device = next(iter(parameters.values())).device
        self.resting = "cpu" if config.offload_optimizer else self.device

    def rest(self):
        """Between steps: AdamW's moments where they are not in the way."""
        self.move_moments(self.resting)

    def move_moments(self, device):
        """AdamW's moments to a device: to the GPU for a step, away where a phase needs the room."""
        for state in self.adamw.state.values():
            moments = {name: tensor for name, tensor in state.items() if tensor.dim()}
            state.update({name: tensor.to(device) for name, tensor in moments.items()})

    @timed("optimizer")
    def step(self, lr, finite, story):
        """One step with the gradients at hand, which are gone afterwards -> metrics.

        lr      learning rate of this step
        finite  name -> number or tensor; unless all are finite, and the gradient too, there is no
                step: TrainingError, or only a word with --skip-nonfinite
        story   JSON-able dict of what went in and came out, written to a file in that case; its
                first entry is the number of the step

        Without a gradient (nothing to learn from this batch) there is no step either: AdamW would
        move the weights by momentum alone."""
        parameters = list(self.parameters.values())
        sum_gradients_over_ranks(parameters)
        left_out = all(parameter.grad is None for parameter in parameters)
        norm = clip_grad_norm_(parameters, self.config.clip_norm)
        if not left_out:
            left_out = not self._all_finite({**finite, "gradient norm": norm}, story)
        if not left_out:
            for group in self.adamw.param_groups:
                group["lr"] = lr
            self.move_moments(self.device)
            self.adamw.step()
            self.rest()
        self.adamw.zero_grad()
        return {"grad_norm": norm.item(), "lr": lr, "steps_left_out": int(left_out)}

    def _all_finite(self, values, story):
        broken = [name for name, x in values.items() if not torch.as_tensor(x).isfinite().all()]
        if not true_on_any_rank(broken):  # all ranks leave the step out, or none
            return True
        broken = broken or ["another rank's numbers"]
        number = next(iter(story.values()))
        file = rank_file(self.folder / f"nonfinite_{number:06}.json")
        text = json.dumps(
            {"not_finite": broken, **story}, indent=1, ensure_ascii=False, default=str
        )
        with naming(file):
            file.write_text(text + "\n", encoding="utf-8")
        message = f"{' and '.join(broken)} not finite; what went in and came out is in {file}"
        if not self.config.skip_nonfinite:
            raise TrainingError(
                f"{message}. Weights are as saved before. Lower --lr or --clip-norm, or pass over "
                "such steps with --skip-nonfinite"
            )
        tqdm.write(f"step left out: {message}")
        return False
