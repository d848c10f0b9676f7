"""Run by test_distributed.py, under torchrun or alone: one step of a training script on completions
that are given; every parameter's gradient, as the optimizer gets it, goes into a file.

    python tests/ranks.py FILE train_grpo|train_sft ARGUMENTS OF THE SCRIPT
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent.parent))
import support.sampler
import train_grpo
import train_sft
from generate import Sampler
from support.flags import run_script
from support.ranks import RANK, WORLD

EOS = 317
# Of 4 prompts, 2 each: the odd ones', which rank 1 of 2 gets, are much longer.
COMPLETIONS = torch.tensor(
    [
        [[5, EOS, EOS, EOS, EOS, EOS, EOS], [EOS, EOS, EOS, EOS, EOS, EOS, EOS]],
        [[9, 8, 7, 6, 5, 4, 3], [70, 71, 72, 73, 74, EOS, EOS]],
        [[11, 12, EOS, EOS, EOS, EOS, EOS], [13, 14, EOS, EOS, EOS, EOS, EOS]],
        [[40, 41, 42, 43, 44, 45, EOS], [50, 51, 52, 53, 54, 55, 56]],
    ]
)


class GivenCompletions(Sampler):
    def __call__(self, prompts, seed=None):
        ids = COMPLETIONS[RANK::WORLD]
        longest = int((ids != EOS).sum(-1).max())
        ids = ids[:, :, : longest + 1]  # as the sampler does it, each rank has a C of its own
        return ids, torch.full(ids.shape, -5.0)


def variety(completion, label):
    return float(len(set(completion)))


def main():
    file, script, *arguments = sys.argv[1:]
    step = torch.optim.AdamW.step

    def keep_gradients(self, *args, **more):
        parameters = [p for group in self.param_groups for p in group["params"]]
        gradients = {f"{i:03}": p.grad for i, p in enumerate(parameters) if p.grad is not None}
        if RANK == 0 and not Path(file).exists():
            save_file({name: gradient.clone() for name, gradient in gradients.items()}, file)
        return step(self, *args, **more)

    torch.optim.AdamW.step = keep_gradients
    support.sampler.Sampler = GivenCompletions
    train_grpo.check_first_update = lambda *_: None  # the completions are given, not sampled
    scripts = {"train_grpo": train_grpo, "train_sft": train_sft}
    run_script(lambda: scripts[script].main(arguments))


if __name__ == "__main__":
    main()
