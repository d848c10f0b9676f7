"""Processes that tests start, and end.

A server without threads forks them, as a process that has run torch or FFmpeg must not be forked.
It has imported the scripts, so that a child is there at once. What a child does is a function of
this file, which it imports by its name."""

import functools
import importlib
import io
import multiprocessing
import os
import resource
import runpy
import signal
import sys
from multiprocessing import forkserver
from pathlib import Path

import torch
from conftest import ROOT

from model import HumanOmni
from support import ahead, flags, run_evaluation

CONTEXT = multiprocessing.get_context("forkserver")
LOG = "children.log"
ahead.PRELOAD += ["train_grpo", "train_sft"]


def start(work, *arguments):
    """A process that calls the function; what it prints goes into the file LOG."""
    CONTEXT.set_forkserver_preload(ahead.PRELOAD)
    here = os.getcwd()
    os.chdir(ROOT)  # where the server finds the scripts
    with ahead._signals_held_back():
        forkserver.ensure_running()
    os.chdir(here)
    process = CONTEXT.Process(target=_call, args=(work, *arguments))
    process.start()
    return process


def _call(work, *arguments):
    torch.set_num_threads(1)  # with others, last bits differ
    # The processes that decode ahead come from the same server; another takes seconds to start.
    forkserver._forkserver.ensure_running = lambda: None
    sys.stdout = sys.stderr = open(LOG, "a", buffering=1)  # noqa: SIM115
    work(*arguments)


def code_of(process):
    """The exit code of a process that ends by itself."""
    process.join(timeout=300)
    assert process.exitcode is not None, "still running"
    return process.exitcode


def finish(work, *arguments):
    code = code_of(start(work, *arguments))
    assert code == 0, Path(LOG).read_text()[-3000:]


# --------------------------------------------------------------------------------------------------
# What they do


def run_script(name, arguments, *prepare):
    """python NAME.py ARGUMENTS, after prepare[0](*prepare[1:]); no curves are drawn."""
    run_evaluation.draw_curves = lambda metrics, path: None
    run_and_draw(name, arguments, *prepare)


def run_and_draw(name, arguments, *prepare):
    """The same with curves, which take longer than the rest of a small run."""
    if prepare:
        prepare[0](*prepare[1:])
    importlib.import_module(name).main(arguments)


def run_rank(rank, world, port, out, script, arguments):
    """The script as rank `rank` of `world`, without a launcher; what it prints goes into `out`."""
    where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world}
    where |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in where.items()}
    # The server has imported our own modules as a process that is alone; torch can stay.
    for name, module in list(sys.modules.items()):
        file = Path(getattr(module, "__file__", None) or "/")
        if file.is_relative_to(ROOT) and "site-packages" not in file.parts:
            del sys.modules[name]
    sys.argv = [script, *arguments]
    with open(out, "w", buffering=1) as sys.stdout:
        runpy.run_path(str(ROOT / script), run_name="__main__")


def save_changed(checkpoint, folder, *prepare):
    """Save the checkpoint, with each word's embedding one larger, to the folder."""
    model = HumanOmni.from_pretrained(checkpoint)
    with torch.no_grad():
        model.embed_tokens.weight.add_(1)
    if prepare:
        prepare[0](*prepare[1:])
    model.save_pretrained(folder)


def note_end(work, *arguments):
    """Call the function as a script's main; how that ends goes into the file "message"."""
    sys.stdout = sys.stderr = said = io.StringIO()
    code = 0
    try:
        flags.run_script(lambda: work(*arguments))
    except SystemExit as end:
        code = end.code
    limit_file_size(resource.RLIM_INFINITY)
    Path("message").write_text(f"{said.getvalue()}\nexit code {code}\n")


def at_call(owner, name, call, act):
    """From its call-th call on, the function owner.name is act(function, its arguments).

    owner: a module, or module:class."""
    module, _, inside = owner.partition(":")
    place = importlib.import_module(module)
    place = getattr(place, inside) if inside else place
    original, calls = getattr(place, name), []

    def changed(*arguments, **more):
        calls.append(1)
        if len(calls) < call:
            return original(*arguments, **more)
        return act(functools.partial(original, **more), arguments)

    setattr(place, name, changed)


def kill_at(owner, name, call):
    """The call-th call of owner.name is this process's last; what saves a file has written half."""

    def die(original, arguments):
        if name.startswith("save_"):
            original(*arguments)
            os.truncate(arguments[1], os.path.getsize(arguments[1]) // 2)
        os.kill(os.getpid(), signal.SIGKILL)

    at_call(owner, name, call, die)


def limit_file_size(size):
    """From here on, writing more than this into a file fails, as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def limit_file_size_at(owner, name, call, size):
    """From its call-th call on, owner.name finds the disk full."""

    def limited(original, arguments):
        limit_file_size(size)
        return original(*arguments)

    at_call(owner, name, call, limited)
