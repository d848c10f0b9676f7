"""More than one process: the same scripts, started with torchrun. With one process nothing here does anything: skip it.

    torchrun --nproc_per_node=8 train_grpo.py ...

Each rank encodes, samples and scores its own prompts of an update. Its losses are divided by the counts of the *whole* update,
so gradients are right when they have been added up, however unequal the ranks' completions are. All ranks then take the same
step; rank 0 writes the files and prints. Objects go from rank to rank, errors too, so that one cause is one message.
"""

import contextlib
import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from errors import DataError

RANK, WORLD, LOCAL_RANK = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
BUCKET = 12  # tensors per all_reduce: as many as a layer of the language model has, 60 MB at full size


@contextlib.contextmanager
def group():
    """Inside, the ranks know each other; those after the first print nothing to standard output."""
    if WORLD > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=timedelta(minutes=30))
        sys.stdout = sys.stdout if RANK == 0 else open(os.devnull, "w")
    yield
    if WORLD > 1:
        dist.destroy_process_group()


def share(order, size, flag):
    """Of every batch of `size` in `order`, this rank's part, one after the other; and the size of such a part."""
    if size % WORLD:
        raise DataError(f"{flag} {size} cannot be shared out equally among {WORLD} processes")
    return [i for start in range(0, len(order), size) for i in order[start:start + size][RANK::WORLD]], size // WORLD


def own(path):
    """The name of this rank's own file beside rank 0's."""
    return path.with_name(f"{path.stem}.rank{RANK}{path.suffix}") if RANK and path else path


def add(values):
    """{name: number} -> their sums over the ranks."""
    if WORLD == 1:
        return values
    sums = torch.tensor(list(values.values()), dtype=torch.float64)
    dist.all_reduce(sums)
    return dict(zip(values, sums.tolist()))


def mean(values, weight):
    """{name: mean over `weight` things of this rank} -> means over all ranks' things."""
    if WORLD == 1:
        return values
    sums = add({**{name: value * weight for name, value in values.items()}, None: weight})
    return {name: sums[name] / sums[None] for name in values}


def gather(items):
    """A list of each rank -> all of them in one list."""
    parts = [items] * WORLD
    if WORLD > 1:
        dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


def first(make):
    """make() on rank 0 alone; its result, or its error, on all."""
    if WORLD == 1:
        return make()
    outcome = [None, None]
    if RANK == 0:
        try:
            outcome[0] = make()
        except Exception as error:  # raised again below, on every rank
            outcome[1] = error
    dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def add_gradients(parameters):
    """Replace every gradient by its sum over the ranks; one that a rank has not is 0 there, if any rank has one."""
    if WORLD == 1 or not add({"any": any(parameter.grad is not None for parameter in parameters)})["any"]:
        return
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    grads = [parameter.grad for parameter in parameters]
    for start in range(0, len(grads), BUCKET):
        flat = parameters_to_vector(grads[start:start + BUCKET])
        dist.all_reduce(flat)
        vector_to_parameters(flat, grads[start:start + BUCKET])
