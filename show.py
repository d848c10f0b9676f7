"""Pictures: what the model sees of a clip, how a run went, which emotions are taken for which.

    python show.py clip CLIP --out seen.png                         frames and log-mel of a clip
    python show.py curves runs/grpo/metrics.jsonl --out curves.png  rewards, KL, ... of a run
    python show.py confusion RESULT.json --out confusion.png        truth against answer
    python show.py table RESULT.json ... --out table.png            WAR and UAR, models side by side

Or pages, one HTML file each that holds all it shows:

    python show.py run runs/grpo --out page.html              curves, groups token by token, clips
    python show.py clip CLIP --model DIR ... --out page.html  what each model says of a clip
    python show.py table RESULT.json ... --out table.html     the numbers, with bars
    python show.py clip --help                                what each of them can be told

CLIP is any media file, metrics.jsonl what train_grpo.py writes (and may still be writing), and
RESULT.json what evaluate.py writes. The ending of --out chooses the format: .png, .pdf, .svg, ...
"""

import argparse
import contextlib
import json
import os
import textwrap
from pathlib import Path

from media import HOP, SAMPLE_RATE, load_clip, log_mel, preprocess_frames
from rewards import extract_answer
from support import results
from support.errors import LFS_ADVICE, LFS_MARK, DataError, naming, require
from support.flags import run_script

# The panels of draw_curves, after the rewards: title -> metrics.
PANELS = {
    "KL to the reference (nats per token)": ["kl"],
    "entropy (nats per token)": ["entropy"],
    "validation": ["val_war", "val_format"],
    "completion length (tokens)": ["completion_length"],
    "groups with equal rewards (share)": ["zero_spread"],
    "gradient norm": ["grad_norm"],
    "rollout against scoring (nats per token)": ["mismatch"],
}


def new_figure(width, height):
    """An empty figure of so many inches, which needs no display.

    matplotlib is imported here, and not at the top: the processes that decode clips read the main
    script again when they start, and do not draw.
    """
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def write_picture(figure, path, dpi):
    """Write the figure to `path`, whole: a viewer never finds half of it.

    dpi: pixels per inch. Raises DataError for a name that no picture can have; an OSError names it.
    """
    path = Path(path)
    kind = path.suffix[1:].lower() or "png"
    known = sorted(figure.canvas.get_supported_filetypes())
    require(kind in known, f"{path}: ends with none of .{', .'.join(known)}")
    require(not path.is_dir(), f"{path}: is a folder; give the picture a name, such as seen.png")
    with whole_file(path) as partial:
        figure.savefig(partial, format=kind, dpi=dpi)


def is_page(path):
    """Whether a file of this name is a page, and no picture."""
    return Path(path).suffix.lower() in (".html", ".htm")


@contextlib.contextmanager
def whole_file(path):
    """Inside, the name of a file to write, which takes the place of `path` when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    with naming(path):
        try:
            yield partial
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------------
# What the model sees of a clip


def draw_seen(path, out, num_frames=8, size=224, n_mels=128, fit="pad"):
    """Draw a clip's frames and log-mel, both as the towers get them, into the picture `out`.

    num_frames: T; size: pixels of a side; fit: "pad" or "squash". Raises ClipError.
    """
    frames, waveform = load_clip(path, num_frames)
    figure = new_figure(max(8.5, 1.6 * num_frames), 4.4)
    above, below = figure.subfigures(2, 1, height_ratios=(1, 1.4))
    if frames is None:
        above.suptitle("no video stream", fontsize=10)
    else:
        draw_frames(above, preprocess_frames(frames, size, fit), fit)
    if waveform is None:
        below.suptitle("no audio stream", fontsize=10)
    else:
        draw_mel(below, log_mel(waveform, n_mels), len(waveform) / SAMPLE_RATE)
    write_picture(figure, out, dpi=80)


def draw_frames(figure, pixels, fit):
    """pixels (T, 3, S, S), float in [-1, 1]: the frames side by side."""
    axes = figure.subplots(1, len(pixels), squeeze=False)[0]
    for number, (axis, frame) in enumerate(zip(axes, pixels)):
        axis.imshow((frame.permute(1, 2, 0) / 2 + 0.5).numpy())
        axis.set_axis_off()
        axis.set_title(f"frame {number}", fontsize=8)
    title = f"pixel_values {tuple(pixels.shape)}: {len(pixels)} frames spread over the clip, {fit}"
    figure.suptitle(title, fontsize=10)


def draw_mel(figure, mel, seconds):
    """mel (n_mels, M), one column per 10 ms: the columns that `seconds` of sound fill."""
    n_mels, columns = mel.shape
    rate = SAMPLE_RATE // HOP
    room = columns / rate
    note = f"after {seconds:.1f} s silence up to {room:.0f} s"
    if seconds >= room:
        seconds = room
        note = f"the first {room:.0f} s"
    sound = mel[:, : max(1, round(rate * seconds))]
    axis = figure.subplots()
    axis.imshow(sound.numpy(), origin="lower", aspect="auto", extent=(0, seconds, 0, n_mels))
    axis.set(xlabel="seconds", ylabel="mel band")
    title = f"input_features {tuple(mel.shape)}: log-mel at {rate} frames a second; {note}"
    figure.suptitle(title, fontsize=10)


# ------------------------------------------------------------------------------------------------
# How a run goes


def group_text(update, example, completions, rewards, advantages):
    """One prompt, and its group's best and worst completion, as text for the terminal.

    example: data.Example; completions: G texts; rewards: {name: (G,)}; advantages (G,).
    """
    indent = " " * 11
    label = extract_answer(example.answer)
    lines = [f"\n── update {update} · {example.video} · label: {label}"]
    lines += textwrap.wrap(
        example.question, 100, initial_indent="   asked   ", subsequent_indent=indent
    )
    ranked = advantages.argsort(descending=True).tolist()
    for i in (ranked[0], ranked[-1]):
        parts = "  ".join(f"{name} {values[i].item():.3g}" for name, values in rewards.items())
        lines.append(f"   {parts}  advantage {advantages[i].item():+.2f}")
        lines.append(textwrap.indent(completions[i], indent))
    return "\n".join(lines)


def draw_curves(metrics, path):
    """Draw the run so far as one picture. metrics: one dict per update, as in metrics.jsonl."""
    newest = metrics[-1] if metrics else {}
    components = [name for name in newest if name.startswith("reward_")]
    panels = {"reward by component": components, **PANELS}
    figure = new_figure(16, 6.5)
    for axis, (title, names) in zip(figure.subplots(2, 4).flat, panels.items()):
        axis.set(title=title, xlabel="update")
        axis.grid(alpha=0.3)
        draw_lines(axis, names, metrics)
    write_picture(figure, path, dpi=110)


def draw_lines(axis, names, metrics):
    """One line per metric, over the updates that measured it."""
    for name in names:
        measured = [line for line in metrics if line.get(name) is not None]
        updates = [line["update"] for line in measured]
        values = [line[name] for line in measured]
        # Few points are marked: a single one would not be seen.
        marker = "o" if len(values) <= 20 else None
        if measured:
            axis.plot(updates, values, marker=marker, label=name)
    if axis.lines:
        axis.legend(fontsize=8)
    else:
        axis.text(0.5, 0.5, "not measured", ha="center", transform=axis.transAxes)


def read_lines(path):
    """A file of JSON lines that may still be written -> its objects. Raises DataError."""
    try:
        content = Path(path).read_bytes()
        require(not content.startswith(LFS_MARK), f"{path}: {LFS_ADVICE}")
        # What follows the last newline is a line that is still being written. It may end inside a
        # character, so it goes before the rest is decoded.
        whole = content[: content.rfind(b"\n") + 1].decode("utf-8-sig")
        lines = [json.loads(line) for line in whole.split("\n")[:-1]]
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not text in UTF-8 ({error})") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: cannot be read as JSON lines ({error})") from error
    return [line for line in lines if isinstance(line, dict)]


def read_metrics(path):
    """metrics.jsonl of train_grpo.py -> one dict per update. Raises DataError."""
    updates = [line for line in read_lines(path) if "update" in line]
    require(updates, f"{path}: holds no update yet; is it the metrics.jsonl of train_grpo.py?")
    return updates


# ------------------------------------------------------------------------------------------------
# Which emotions are taken for which


def confusion_counts(metrics):
    """-> labels, and one list of counts per true label: answers with each label, then others."""
    labels = list(metrics["recall"])
    table = []
    for label in labels:
        answers = metrics["confusion"][label]
        known = [answers.get(other, 0) for other in labels]
        unknown = sum(answers.values()) - sum(known)
        table.append([*known, unknown])
    return labels, table


def draw_confusion(metrics, path):
    """Draw the confusion table; colour is the share of the row. metrics: evaluate.score's."""
    labels, table = confusion_counts(metrics)
    # No larger than a poster, also where every clip has a label of its own.
    figure = new_figure(min(60, 1.5 + 0.7 * len(labels)), min(60, 1 + 0.6 * len(labels)))
    axis = figure.subplots()
    shares = [[count / max(1, sum(counts)) for count in counts] for counts in table]
    axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for y, counts in enumerate(table):
        for x, count in enumerate(counts):
            color = "white" if shares[y][x] > 0.5 else "black"
            if count:
                axis.text(x, y, count, ha="center", va="center", fontsize=8, color=color)
    # Labels are texts of the user: a $ in them is no mathematics.
    axis.set_xticks(
        range(len(labels) + 1), [*labels, "unknown"], rotation=45, ha="right", parse_math=False
    )
    axis.set_yticks(range(len(labels)), labels, parse_math=False)
    title = f"WAR {100 * metrics['war']:.1f}, UAR {100 * metrics['uar']:.1f}"
    axis.set(xlabel="answer", ylabel="truth", title=title)
    write_picture(figure, path, dpi=110)


# ------------------------------------------------------------------------------------------------
# Several models


def draw_scores(cells, path):
    """Draw what support/results.py has of several models: a bar for each on each data set, WAR left
    and UAR right (the paper's Figure 2)."""
    sets = list(dict.fromkeys(name for row in cells.values() for name in row))
    figure = new_figure(12, 4)
    width = 0.8 / len(cells)
    handles = {}  # a legend of their labels would lack the models whose path begins with "_"
    for axis, (number, title) in zip(figure.subplots(1, 2), enumerate(("WAR", "UAR"))):
        for place, (model, row) in enumerate(cells.items()):
            known = [x for x, name in enumerate(sets) if name in row]
            heights = [row[sets[x]][number] for x in known]
            left = [x - 0.4 + width * (place + 0.5) for x in known]
            bars = handles[model.replace("$", r"\$")] = axis.bar(left, heights, width)
            axis.bar_label(bars, fmt="%.0f", fontsize=8)
        axis.set_xticks(range(len(sets)), sets, parse_math=False)
        axis.set(title=title, ylim=(0, 105), ylabel="percent")
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3)
    write_picture(figure, path, dpi=110)


# ------------------------------------------------------------------------------------------------
# The script


def parse_args(argv=None):
    """Command line -> what to draw (args.picture), from what, and where to; args.flags: what is
    evaluate.py's."""
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    pictures = parser.add_subparsers(dest="picture", required=True)

    run = pictures.add_parser("run", help="a page about a run of train_grpo.py")
    run.add_argument("run", help="its folder")
    run.add_argument("--out", help="the page (default: page.html in that folder)")

    clip = pictures.add_parser("clip", help="frames and log-mel of a clip, as the towers get them")
    clip.add_argument("clip", help="a media file")
    clip.add_argument("--out", help="the picture (default: seen.png), or page (page.html)")
    clip.add_argument(
        "--model",
        nargs="+",
        metavar="DIR",
        help="checkpoints: a page with what each of them gets and says; evaluate.py's flags go on "
        "to it, as far as they are about one clip",
    )
    clip.add_argument(
        "--frames",
        type=int,
        choices=range(1, 65),
        metavar="1..64",
        help="frames the model takes (default: 8; the toy's takes 4); not with --model",
    )
    clip.add_argument(
        "--size",
        type=int,
        choices=range(16, 1025),
        metavar="16..1024",
        help="pixels of a side (default: 224; the toy's are 64); not with --model",
    )
    clip.add_argument(
        "--fit",
        default="pad",
        choices=("pad", "squash"),
        help="how frames become square (default: pad)",
    )

    curves = pictures.add_parser("curves", help="the metrics of a run of train_grpo.py")
    curves.add_argument("metrics", help="its metrics.jsonl")
    curves.add_argument("--out", default="curves.png", help="the picture (default: curves.png)")

    confusion = pictures.add_parser("confusion", help="truth against answer")
    confusion.add_argument("result", help="a results file of evaluate.py")
    confusion.add_argument(
        "--out", default="confusion.png", help="the picture (default: confusion.png)"
    )

    table = pictures.add_parser("table", help="WAR and UAR of several models, side by side")
    table.add_argument("results", nargs="+", help="results files of evaluate.py")
    table.add_argument("--published", action="store_true", help="the paper's models, too")
    table.add_argument("--out", default="table.png", help="picture or page (default: table.png)")
    args, args.flags = parser.parse_known_args(argv)
    if args.flags and not getattr(args, "model", None):
        parser.error(f"unrecognized arguments: {' '.join(args.flags)}")
    if args.picture == "clip" and args.model and (args.frames or args.size):
        parser.error("--frames and --size do not go with --model: they are the model's own")
    return args


def pages():
    from support import pages  # here, as evaluate.py and the training scripts draw with this file

    return pages


def main(argv=None):
    args = parse_args(argv)
    if args.picture == "run":
        args.out = args.out or str(Path(args.run) / "page.html")
        pages().run_page(args.run, args.out)
    if args.picture == "clip" and args.model:
        args.out = args.out or "page.html"
        pages().clip_page(args.clip, args.model, args.out, ["--fit", args.fit, *args.flags])
    elif args.picture == "clip":
        args.out = args.out or "seen.png"
        require(not is_page(args.out), f"{args.out}: a page of a clip needs --model DIR")
        draw_seen(args.clip, args.out, args.frames or 8, args.size or 224, fit=args.fit)
    if args.picture == "curves":
        draw_curves(read_metrics(args.metrics), args.out)
    if args.picture == "confusion":
        names = ("war", "uar", "recall", "confusion")
        draw_confusion(results.read_result(args.result, names)[2], args.out)
    if args.picture == "table":
        draw = pages().table_page if is_page(args.out) else draw_scores
        draw(results.scores_of(args.results, args.published), args.out)
    print(f"written: {args.out}")


if __name__ == "__main__":
    run_script(main)
