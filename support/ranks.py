"""More than one process: the scripts started with torchrun. With one, nothing here does anything.

    torchrun --nproc_per_node=8 train_grpo.py ...

Each rank encodes, samples and scores its own prompts of an update. Its losses are divided by the
counts of the *whole* update, so gradients are right when they have been added up, however unequal
the ranks' completions are. All ranks then take the same step; rank 0 writes the files and prints.
Objects go from rank to rank, errors too, so that one cause is one message.
"""

import contextlib
import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from support.errors import DataError

RANK = int(os.environ.get("RANK", 0))
WORLD = int(os.environ.get("WORLD_SIZE", 1))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))
# Tensors per all_reduce: as many as a layer of the language model has, 60 MB at full size.
BUCKET = 12


@contextlib.contextmanager
def all_ranks():
    """Inside, the ranks know each other; those after the first print nothing to standard output."""
    if WORLD > 1:
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=30))
        sys.stdout = sys.stdout if RANK == 0 else open(os.devnull, "w")  # noqa: SIM115
    yield
    leave_together()


def leave_together():
    """The last that every rank calls: a process that ends with gloo's threads alive may abort.

    Not after an error, which may be of this rank alone: NCCL would wait for the others."""
    if WORLD > 1:
        dist.destroy_process_group()


def share_of_rank(order, size, flag):
    """Of every batch of `size` in `order`, this rank's part, one after the other; and its size.

    A size that cannot be shared out equally is a DataError that names the flag."""
    if size % WORLD:
        raise DataError(f"{flag} {size} cannot be shared out equally among {WORLD} processes")
    own = []
    for start in range(0, len(order), size):
        own += order[start : start + size][RANK::WORLD]
    return own, size // WORLD


def rank_file(path):
    """The name of this rank's own file beside rank 0's."""
    return path.with_name(f"{path.stem}.rank{RANK}{path.suffix}") if RANK else path


def sum_over_ranks(values):
    """{name: number} -> their sums over the ranks."""
    if WORLD == 1:
        return values
    sums = torch.tensor(list(values.values()), dtype=torch.float64)
    dist.all_reduce(sums)
    return dict(zip(values, sums.tolist()))


def true_on_any_rank(condition):
    """Is it so on one rank at least? Then all ranks do what follows, and stay in step."""
    return sum_over_ranks({"condition": int(bool(condition))})["condition"] > 0


def mean_over_ranks(values, weight):
    """{name: mean over `weight` things of this rank} -> means over all ranks' things."""
    if WORLD == 1:
        return values
    totals = {name: value * weight for name, value in values.items()}
    sums = sum_over_ranks({**totals, "weight of all": weight})
    return {name: sums[name] / sums["weight of all"] for name in values}


def gather_from_ranks(items):
    """A list of each rank -> all of them in one list."""
    parts = [items] * WORLD
    if WORLD > 1:
        dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


def on_first_rank(make):
    """make() on rank 0 alone; its result, or its error, on all."""
    if WORLD == 1:
        return make()
    result = error = None
    if RANK == 0:
        try:
            result = make()
        except Exception as raised:  # whatever it is: raised again below, on every rank
            error = raised
    outcome = [result, error]
    dist.broadcast_object_list(outcome)
    result, error = outcome
    if error is not None:
        raise error
    return result


def sum_gradients_over_ranks(parameters):
    """Replace every gradient by its sum over the ranks; one that a rank lacks counts as 0."""
    parameters = list(parameters)
    if WORLD == 1 or not true_on_any_rank(any(p.grad is not None for p in parameters)):
        return
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    gradients = [parameter.grad for parameter in parameters]
    for start in range(0, len(gradients), BUCKET):
        flat = parameters_to_vector(gradients[start : start + BUCKET])
        dist.all_reduce(flat)
        vector_to_parameters(flat, gradients[start : start + BUCKET])
