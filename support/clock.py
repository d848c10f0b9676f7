"""Where a step's time goes: seconds per phase.

@timed("rollout")                   # also: with timed("rollout"): ...
def sample_groups(...): ...

metrics |= lap()                    # {"seconds": 1.9, "seconds_rollout": 0.4, ...}
"""

import contextlib
import time
from collections import Counter

import torch

_seconds = Counter()
_start = time.perf_counter()


@contextlib.contextmanager
def timed(phase):
    """Seconds inside count for `phase`, less those of phases within; entered again, it goes on."""
    start, before = time.perf_counter(), _seconds.total()
    yield
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()  # otherwise the time would show up in a later phase
    inside = _seconds.total() - before
    _seconds[phase] += time.perf_counter() - start - inside


def lap():
    """The phases since the last call, and all seconds since then, as metrics."""
    global _start
    now = time.perf_counter()
    metrics = {"seconds": now - _start}
    metrics |= {f"seconds_{phase}": seconds for phase, seconds in _seconds.items()}
    _seconds.clear()
    _start = now
    return metrics
