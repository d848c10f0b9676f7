"""Processes that tests start, and end.

A server without threads forks them, as a process that has run torch or FFmpeg must not be forked.
It has imported the scripts, so that a child is there at once. What a child does is a function of
this file, which it imports by its name."""

import importlib
import multiprocessing
import os
import resource
import signal
import sys
from multiprocessing import forkserver
from pathlib import Path

import torch
from conftest import ROOT

from support import ahead

CONTEXT = multiprocessing.get_context("forkserver")
LOG = "children.log"
# The processes that decode ahead come from the same server.
ahead.PRELOAD += ["train_grpo", "train_sft"]


def start(work, *arguments):
    """A process that calls the function; what it prints goes into the file LOG."""
    CONTEXT.set_forkserver_preload(ahead.PRELOAD)
    here = os.getcwd()
    os.chdir(ROOT)  # where the server finds the scripts
    with ahead._signals_blocked():
        forkserver.ensure_running()
    os.chdir(here)
    process = CONTEXT.Process(target=_call, args=(work, *arguments))
    process.start()
    return process


def _call(work, *arguments):
    torch.set_num_threads(1)  # with others, last bits differ
    sys.stdout = sys.stderr = open(LOG, "a", buffering=1)
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
    """python NAME.py ARGUMENTS, after prepare[0](*prepare[1:])."""
    if prepare:
        prepare[0](*prepare[1:])
    importlib.import_module(name).main(arguments)


def kill_at(owner, name, call):
    """The call-th call of the function owner.name is this process's last.

    owner: a module, or module:class. A function that saves a file writes half of it first."""
    module, _, inside = owner.partition(":")
    place = importlib.import_module(module)
    place = getattr(place, inside) if inside else place
    original, calls = getattr(place, name), []

    def deadly(*arguments, **more):
        calls.append(1)
        if len(calls) < call:
            return original(*arguments, **more)
        if name.startswith("save_"):
            original(*arguments, **more)
            os.truncate(arguments[1], os.path.getsize(arguments[1]) // 2)
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(place, name, deadly)


def limit_file_size(size):
    """From here on writing more than this into a file fails, as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def limit_file_size_at(owner, name, size):
    """The function owner.name meets a full disk."""
    place = importlib.import_module(owner)
    original = getattr(place, name)

    def limited(*arguments, **more):
        limit_file_size(size)
        return original(*arguments, **more)

    setattr(place, name, limited)


def note_error(work, *arguments):
    """Call the function, and write what it raises into the file "message"."""
    try:
        work(*arguments)
    except Exception as error:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        Path("message").write_text(f"{type(error).__name__}: {error}")
    else:
        sys.exit(1)


def save_changed(checkpoint, folder, *prepare):
    """Save the checkpoint, with each word's embedding one larger, to the folder."""
    from model import HumanOmni

    model = HumanOmni.from_pretrained(checkpoint)
    with torch.no_grad():
        model.embed_tokens.weight.add_(1)
    if prepare:
        prepare[0](*prepare[1:])
    model.save_pretrained(folder)


