"""What trains, and one optimizer step: AdamW on float32 weights, the same for both training
scripts."""

import json
from dataclasses import dataclass

import torch
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

from support.clock import timed
from support.errors import TrainingError, naming
from support.ranks import rank_file, sum_gradients_over_ranks, true_on_any_rank

# float16: the first scale of the loss, and after how many steps without an overflow it is doubled.
FIRST_SCALE, STEPS_AT_SCALE = 2.0**16, 2000


def set_trainable(model, towers=False):
    """Freeze BERT, and the towers unless they are to train; what is frozen is held in the type of
    arithmetic.

    -> {name: parameter} of what trains, in float32, as small steps need it."""
    frozen = [model.bert_model]
    if not towers:
        frozen += [model.vision_tower, model.audio_tower]
    model.requires_grad_(True)
    for encoder in frozen:
        encoder.requires_grad_(False)
        encoder.to(model.compute_dtype)
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@dataclass
class Evidence:
    """What an optimizer step rests on, for the case that something in it is not finite."""

    number: int  # of the step
    must_be_finite: dict  # name -> number or tensor
    story: dict  # JSON-able: what went in and what came out; written to a file in that case


def not_finite(values):
    """Those names of {name: number or tensor} that hold a NaN or an infinity."""
    return [name for name, x in values.items() if not torch.as_tensor(x).isfinite().all()]


class Optimizer:
    """AdamW without weight decay, and what surrounds its step.

    parameters  name -> parameter (float32), whose gradients have been added up by backward()
    config      flags lr, clip_norm, offload_optimizer, skip_nonfinite
    folder      of the run: what led to a NaN is written there
    dtype       of arithmetic. float16 has no numbers below 6e-8, where many gradients are: losses
                are scaled up for backward, by as much as just does not overflow
    facts       of the run: the scale is kept there, and saved with it
    """

    def __init__(self, parameters, config, folder, dtype=torch.float32, facts=None):
        self.parameters, self.config, self.folder = parameters, config, folder
        self.scales_loss, self.facts = dtype == torch.float16, {} if facts is None else facts
        self.adamw = torch.optim.AdamW(
            parameters.values(), lr=config.lr, weight_decay=0.0, fused=True
        )
        self.device = next(iter(parameters.values())).device
        self.parked = {}  # (parameter, name of a moment) -> its place in main memory

    def _moments(self):
        for parameter, state in self.adamw.state.items():
            for name in [name for name, tensor in state.items() if tensor.dim()]:
                yield parameter, name, state

    def park_moments(self):
        """Between steps AdamW's moments are where --offload-optimizer wants them."""
        if not self.config.offload_optimizer:
            return
        on_gpu = self.device.type == "cuda"
        for parameter, name, state in self._moments():
            if (parameter, name) not in self.parked:  # pinned: a GPU reads and writes it itself
                place = torch.empty_like(state[name], device="cpu", pin_memory=on_gpu)
                self.parked[parameter, name] = place
            self.parked[parameter, name].copy_(state[name], non_blocking=True)
            state[name] = self.parked[parameter, name]
        if on_gpu:
            torch.cuda.synchronize()  # what is in main memory now may be saved

    def fetch_moments(self):
        for _, name, state in self._moments():
            state[name] = state[name].to(self.device, non_blocking=True)

    @property
    def loss_scale(self):
        return self.facts.get("loss_scale", FIRST_SCALE) if self.scales_loss else 1.0

    def backward(self, loss):
        """loss.backward(); `step` undoes the scale."""
        (loss * self.loss_scale).backward()

    def _adjust_scale(self, overflow):
        """Halve the loss's scale after an overflow, double it after many steps without one."""
        steps = 0 if overflow else self.facts.get("steps_at_scale", 0) + 1
        if overflow or steps == STEPS_AT_SCALE:
            self.facts["loss_scale"] = self.loss_scale * (0.5 if overflow else 2.0)
            steps = 0
        self.facts["steps_at_scale"] = steps

    @timed("optimizer")
    def step(self, lr, evidence):
        """One step with the gradients at hand, which are gone afterwards -> metrics.

        lr  learning rate of this step

        Something that is not finite, the gradient included, is a TrainingError, or, with
        --skip-nonfinite, a step left out. Without a gradient (nothing to learn from this batch)
        there is no step either: AdamW would move the weights by momentum alone."""
        parameters = list(self.parameters.values())
        sum_gradients_over_ranks(parameters)
        gradients = [p.grad for p in parameters if p.grad is not None]
        left_out, metrics = not gradients, {}
        if self.scales_loss and gradients:
            torch._foreach_div_(gradients, self.loss_scale)
        norm = clip_grad_norm_(parameters, self.config.clip_norm)
        if self.scales_loss and gradients:
            metrics["loss_scale"] = self.loss_scale
            # At a scale of 1, or under a loss that is none either, it is no overflow.
            overflow = self.loss_scale > 1 and not norm.isfinite()
            overflow = overflow and not true_on_any_rank(not_finite(evidence.must_be_finite))
            self._adjust_scale(overflow)
            left_out = left_out or overflow
        if not left_out:
            left_out = not self._all_finite(evidence, norm)
        if not left_out:
            for group in self.adamw.param_groups:
                group["lr"] = lr
            self.fetch_moments()
            self.adamw.step()
            self.park_moments()
        self.adamw.zero_grad()
        return {"grad_norm": norm.item(), "lr": lr, "steps_left_out": int(left_out), **metrics}

    def _all_finite(self, evidence, norm):
        broken = not_finite({**evidence.must_be_finite, "gradient norm": norm})
        if not true_on_any_rank(broken):  # all ranks leave the step out, or none
            return True
        broken = broken or ["another rank's numbers"]
        file = rank_file(self.folder / f"nonfinite_{evidence.number:06}.json")
        story = {"not_finite": broken, **evidence.story}
        text = json.dumps(story, indent=1, ensure_ascii=False, default=str)
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
