"""Data sets for tests of the processes that decode ahead, which import this file by its name."""

import os
import signal
import time

import torch

import data
import media

SIZES = dict(num_frames=4, image_size=32, n_mels=80, num_samples=32000)


class Numbered(data.Clips):
    """Clips that come at once, whatever their files."""

    def __init__(self, folder, count=6):
        examples = [data.Example(folder / f"{i}.mp4", "?", "sad", "video") for i in range(count)]
        super().__init__(examples, **SIZES)

    def __getitem__(self, i):
        return {"index": i, "pixel_values": torch.full((4, 3, 32, 32), float(i))}


class Deadly(Numbered):
    """Some of the clips bring their process down, in the given way."""

    def __init__(self, folder, way, *bad, count=6):
        super().__init__(folder, count)
        self.way, self.bad = way, bad

    def __getitem__(self, i):
        if i in self.bad:
            self.way()
        return super().__getitem__(i)


def be_killed():
    time.sleep(1)  # until what was made before has arrived
    os.kill(os.getpid(), signal.SIGKILL)


def crash():
    time.sleep(1)
    os._exit(7)


def hang():
    while True:
        time.sleep(1)


def crash_at_once():
    os._exit(11)


def fail():
    raise KeyError("a mistake in the program")


class Signalled(Numbered):
    """As when Ctrl-C reaches all processes of a terminal, or a scheduler ends a job."""

    def __getitem__(self, i):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        return super().__getitem__(i)


class Telling(Numbered):
    """Each item says where it was made."""

    def __getitem__(self, i):
        return {
            "index": i,
            "process": os.getpid(),
            "parent": os.getppid(),
            "inherited": hasattr(media, "left_by_the_test"),
        }
