"""The toy's command line; `toy/__init__.py` says what it does."""

import argparse
from dataclasses import fields
from pathlib import Path

import numpy as np

import toy
from support.flags import run_script
from toy.drawing import RATE, draw_clip, make_clips
from toy.stages import train_base
from toy.world import EMOTIONS, SPLITS, make_manifest
from toy.worlds import World, make_world


def draw_sheet(path, seed=0, frames=6):
    """Draws a picture of the world: for each emotion a clip of the ordinary kind and one of
    test_ood."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = frames + 2  # of a clip: its frames, its spectrogram, a gap
    figure, axes = plt.subplots(
        len(EMOTIONS),
        2 * columns,
        figsize=(4 * frames, 1.35 * len(EMOTIONS)),
        gridspec_kw={"width_ratios": 2 * ([1] * frames + [2, 0.15])},
    )
    for row, emotion in zip(axes, EMOTIONS):
        for split, cells in (("test", row[:columns]), ("test_ood", row[columns:])):
            draw_row(cells, emotion, split, seed)
    figure.tight_layout(pad=0.3)
    figure.savefig(path, dpi=80)


def draw_row(cells, emotion, split, seed):
    """A split's first clip of an emotion: some frames, then the sound as a spectrogram."""
    clip = next(entry for entry in make_manifest(split, seed) if entry["emotion"] == emotion)
    pictures, waveform = draw_clip(clip)
    *frames, sound, _ = cells
    shown = np.linspace(0, len(pictures) - 1, len(frames)).round().astype(int)
    for cell, i in zip(frames, shown):
        cell.imshow(pictures[i])
    sound.specgram(waveform, NFFT=512, Fs=RATE, noverlap=352, vmin=-120, vmax=-30)
    sound.set_ylim(0, 4000)
    sound.set_aspect("auto")
    title = f"{emotion} ({split}): {clip['face']}, {clip['voice']}"
    frames[0].set_title(title, loc="left", fontsize=9)
    for cell in cells:
        cell.axis("off")


def share(text):
    """A flag's value from 0 to 1."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be from 0 to 1, not {text}")
    return value


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m toy",
        description=toy.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--out", default="runs/toy", help="folder for clips and manifests")
    add("--seed", type=int, default=0, help="of the world, or of the base model's training")
    add("--splits", nargs="+", choices=SPLITS, default=list(SPLITS), help="which splits to make")
    add("--sheet", metavar="PNG", help="only draw a picture of the world to this file")
    add("--base", metavar="DIR", help="train the base model from nothing and write it there")
    worlds = parser.add_argument_group("other worlds (toy/worlds.py)")
    add = worlds.add_argument
    add("--wrong", type=share, default=0.0, help="share of wrong labels in train and validation")
    add("--confused", action="store_true", help="wrong as people are, not by any other emotion")
    add("--labelled", type=int, default=0, help="clips to train on, a multiple of 7; 0: all")
    add("--films", action="store_true", help="emotions in train as frequent as in films")
    add("--rule", action="store_true", help="labels by a rule, some pairs only in test_unseen")
    add("--scene", type=share, default=-1.0, help="share of train whose wall tells the label")
    args = parser.parse_args(argv)
    if args.base:
        return train_base(args.base, args.seed, args.out)
    if args.sheet:
        return draw_sheet(args.sheet, args.seed)
    world = World(**{f.name: getattr(args, f.name) for f in fields(World)})
    if world != World():
        for split, manifest in make_world(args.out, world, args.seed).items():
            print(f"{split:12}{manifest}")
        return None
    for split, manifest in make_clips(args.out, args.splits, args.seed).items():
        size = sum(clip.stat().st_size for clip in (Path(args.out) / split).glob("*.mp4"))
        print(f"{manifest}: {SPLITS[split]} entries, {size / 1e6:.1f} MB of clips")


if __name__ == "__main__":
    run_script(main)
