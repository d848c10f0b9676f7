"""Decode clips in other processes while the model works: torch's DataLoader, watched.

    for item in load_ahead(dataset, order, workers=2): ...      # dataset[i] for i in order

A codec can crash its process or hang in it. Each process therefore notes which clip it has in hand,
so that an error names that clip and no other.
"""

import atexit
import contextlib
import os
import signal
import sys
import threading
from multiprocessing import active_children, parent_process, resource_tracker
from multiprocessing.connection import wait

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from support.errors import ClipError, DataError

# A process that needs longer for a clip hangs; a minute of 4k video takes about 30 s.
CLIP_SECONDS = 300
# What takes long to import, once for all processes: the server that they are forked from has it.
PRELOAD = ["torch", "torchaudio", "av", "safetensors.torch"]


def item_or_error(dataset, index):
    """One item, or its DataError as a value: torch would wrap a raised one into a worker's
    traceback."""
    try:
        return dataset[index]
    except DataError as error:
        return error


class Watched(Dataset):
    """A dataset whose items are made in worker processes, and what each process has in hand."""

    def __init__(self, dataset, workers):
        self.dataset, self.seconds = dataset, CLIP_SECONDS
        # (workers, 2): a process and the index of its item, -1 when it has none
        self.in_hand = torch.full((workers, 2), -1).share_memory_()

    def __getitem__(self, index):
        own = self.in_hand[get_worker_info().id]
        own[0], own[1] = os.getpid(), index
        if hasattr(signal, "alarm"):  # ends a process that hangs, wherever it does (not on Windows)
            signal.alarm(self.seconds)
        item = item_or_error(self.dataset, index)
        if hasattr(signal, "alarm"):
            signal.alarm(0)
        own[1] = -1
        return item

    def __len__(self):
        return len(self.dataset)


@contextlib.contextmanager
def _signals_held_back():
    """Inside, SIGINT and SIGTERM wait: a process that is half started could not be ended.

    Those that are started inside leave both signals to the main process for good."""
    if threading.current_thread() is not threading.main_thread():  # which alone gets them
        yield
        return
    came, numbers = [], (signal.SIGINT, signal.SIGTERM)
    handlers = [signal.signal(number, lambda number, _: came.append(number)) for number in numbers]
    resource_tracker.ensure_running()  # as starting it further down would unblock them
    mask = None
    if hasattr(signal, "pthread_sigmask"):  # not on Windows
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        if mask is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in zip(numbers, handlers):
            signal.signal(number, handler)
        for number in came:
            signal.raise_signal(number)


def _end_with_main(_):
    """Have this worker end when the main process does, by whatever.

    torch's own watch is on the server, which in turn lives for as long as a worker does."""
    main = parent_process().sentinel

    def watch():
        wait([main])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _as_it_is(item):
    return item


def load_ahead(dataset, order, workers):
    """Yield dataset[i] for i in order, or its DataError as a value.

    `workers` processes are a few items ahead each; 0: all is done here. A process that dies or
    hangs is a ClipError, also raised, which names what it had in hand: `dataset.examples[i].video`.

    The processes are never forked from this one, whose threads and FFmpeg's a fork would leave half
    alive: they come from a server process that has only imported what they need."""
    if not workers or not order:
        yield from (item_or_error(dataset, i) for i in order)
        return
    method = "spawn" if sys.platform == "win32" else "forkserver"
    context = torch.multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload(PRELOAD)
    watched = Watched(dataset, workers)
    loader = DataLoader(
        watched,
        batch_size=None,
        sampler=order,
        num_workers=workers,
        prefetch_factor=max(2, 16 // workers),
        multiprocessing_context=context,
        collate_fn=_as_it_is,
        worker_init_fn=_end_with_main,
        generator=torch.Generator(),  # whose seed is never used, in place of torch's own
    )
    others, team = set(active_children()), set()
    try:
        with _signals_held_back():  # at its end a script's handler may raise
            items = iter(loader)
            team = set(active_children()) - others
            for process in team:
                atexit.register(process.kill)  # at the latest
        yield from items
    except (RuntimeError, OSError, EOFError) as error:
        wait([process.sentinel for process in team], timeout=1)  # it may be dying just now
        dead = {process.pid: process.exitcode for process in team if process.exitcode is not None}
        if not dead:
            raise  # a mistake in this program, with the worker's traceback
        raise ClipError(_told(watched, dead)) from error
    finally:
        for process in team:
            process.kill()
            process.join()
            atexit.unregister(process.kill)


def _told(watched, dead):
    """What to say of processes that ended. dead: process id -> exit code."""
    known = [(pid, index) for pid, index in watched.in_hand.tolist() if pid in dead and index >= 0]
    clips = [str(watched.dataset.examples[i].video or f"entry {i}") for _, i in known]
    code = dead[known[0][0]] if known else next(iter(dead.values()))
    if hasattr(signal, "SIGALRM") and code == -signal.SIGALRM:
        end = f"did not finish in {watched.seconds} s"
    else:
        end = f"ended with exit code {code}"
        if hasattr(signal, "SIGKILL") and code == -signal.SIGKILL:
            end += " (killed: out of memory?)"
    return (
        f"{' or '.join(clips) or 'no clip in hand'}: the process that decoded it {end}; take the "
        "clip out of the manifest if it happens again, or try fewer --workers"
    )
