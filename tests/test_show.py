"""show.py: pictures of clips, runs and results, with what is in them, and what it refuses."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import pytest
import torch
from conftest import GOLDEN, ROOT
from matplotlib.text import Text
from test_data import write_clip

import show
from data import QUESTION_REASONING, Example
from support.errors import ClipError, DataError


def read_picture(path):
    """(height, width, channels); reading fails for half a picture."""
    return matplotlib.image.imread(path)


def texts_of(figure):
    """All that is written in a figure: titles, ticks, legends, counts."""
    return [text.get_text() for text in figure.findobj(Text)]


@pytest.fixture
def figures(monkeypatch):
    """The figures that were drawn, in place of files."""
    drawn = []
    monkeypatch.setattr(show, "write_picture", lambda figure, path, dpi: drawn.append(figure))
    return drawn


# ------------------------------------------------------------------------------------------------
# What the model sees of a clip


@pytest.mark.parametrize("streams", [{"audio": "aac"}, {}, {"video": None, "audio": "aac"}])
def test_show_draws_what_there_is(tmp_path, capsys, streams):
    clip = write_clip(tmp_path / "a.mp4", **streams)
    out = tmp_path / "new" / "seen.png"
    show.main(["clip", str(clip), "--out", str(out), "--frames", "3", "--size", "32"])
    assert out.stat().st_size > 5_000 and "seen.png" in capsys.readouterr().out
    assert read_picture(out).ndim == 3
    assert os.listdir(out.parent) == ["seen.png"]


def test_show_names_what_cannot_be_shown(tmp_path):
    with pytest.raises(ClipError, match="b.mp4: no such file"):
        show.main(["clip", str(tmp_path / "b.mp4"), "--out", str(tmp_path / "seen.png")])
    assert not (tmp_path / "seen.png").exists()


@pytest.mark.parametrize("frames", [1, 2])
def test_what_is_drawn_is_what_the_towers_get(figures, frames):
    clip = GOLDEN / "media" / "clip.mp4"
    show.draw_seen(clip, "seen.png", num_frames=frames, size=48, fit="squash")
    (figure,) = figures
    above, below = figure.subfigs
    pixels, waveform = show.load_clip(clip, frames)
    pixels = show.preprocess_frames(pixels, 48, "squash")
    assert len(above.axes) == frames
    for axis, frame in zip(above.axes, pixels):
        drawn = torch.tensor(axis.images[0].get_array())
        assert torch.equal(drawn, frame.permute(1, 2, 0) / 2 + 0.5)
    mel = show.log_mel(waveform)
    drawn = torch.tensor(below.axes[0].images[0].get_array())
    assert len(drawn[0]) == pytest.approx(len(waveform) / 160, abs=1)
    assert torch.equal(drawn, mel[:, : len(drawn[0])])
    texts = texts_of(figure)
    assert any(f"pixel_values ({frames}, 3, 48, 48)" in text for text in texts)
    assert any("input_features (128, 3000)" in text for text in texts)


@pytest.mark.parametrize("seconds, note", [(2, "after 2.0 s silence up to 3 s"), (3, "first 3 s")])
def test_sound_that_does_not_fill_its_room_is_said_to_end(seconds, note):
    figure = show.new_figure(5, 3)
    show.draw_mel(figure, torch.rand(8, 300), seconds)
    assert note in figure.get_suptitle()
    assert figure.axes[0].images[0].get_array().shape == (8, 100 * seconds)


# ------------------------------------------------------------------------------------------------
# How a run goes


def metrics_line(update, **more):
    line = {"update": update, "reward": 1.5, "reward_accuracy": 0.5, "reward_format": 1.0}
    line |= {"kl": 0.1, "completion_length": 20.0, "zero_spread": 0.25, "entropy": 0.5}
    return line | {"grad_norm": 1.0, "mismatch": 1e-7} | more


def axis_with(figure, title):
    (axis,) = [axis for axis in figure.axes if axis.get_title() == title]
    return axis


def points_of(axis):
    """{label: [(x, y), ...]} of an axis."""
    return {line.get_label(): list(zip(*line.get_data())) for line in axis.lines}


def test_curves_show_each_metric_where_it_was_measured(figures):
    show.draw_curves(
        [
            metrics_line(1, kl=0.0),
            metrics_line(2, kl=0.5, mismatch=2e-7, val_war=0.3, val_format=1.0),
            metrics_line(4, kl=None, reward_accuracy=0.75),
        ],
        "curves.png",
    )
    (figure,) = figures
    rewards = points_of(axis_with(figure, "reward by component"))
    assert rewards == {
        "reward_accuracy": [(1, 0.5), (2, 0.5), (4, 0.75)],
        "reward_format": [(1, 1.0), (2, 1.0), (4, 1.0)],
    }
    kl = axis_with(figure, "KL to the reference (nats per token)")
    assert points_of(kl) == {"kl": [(1, 0.0), (2, 0.5)]}
    mismatch = axis_with(figure, "rollout against scoring (nats per token)")
    assert points_of(mismatch) == {"mismatch": [(1, 1e-7), (2, 2e-7), (4, 1e-7)]}
    validation = points_of(axis_with(figure, "validation"))
    assert validation == {"val_war": [(2, 0.3)], "val_format": [(2, 1.0)]}


def test_curves_without_some_metrics(figures):
    """A run without a reference and a validation, of a file that knows no mismatch."""
    line = metrics_line(1, kl=None)
    del line["mismatch"]
    show.draw_curves([line], "curves.png")
    show.draw_curves([], "curves.png")
    one, none = figures
    assert texts_of(one).count("not measured") == 3
    assert texts_of(none).count("not measured") == len(none.axes) == 8


def test_curves_of_a_file(tmp_path, capsys):
    """Also of a run that still goes on: its last line may be half written."""
    lines = [{"config": {"lr": 1e-3}}, metrics_line(1), metrics_line(2)]
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"update": 3, "rew')
    out = tmp_path / "curves.png"
    show.main(["curves", str(file), "--out", str(out)])
    assert out.stat().st_size > 10_000 and "curves.png" in capsys.readouterr().out
    assert read_picture(out).ndim == 3
    assert [line["update"] for line in show.read_metrics(file)] == [1, 2]


@pytest.mark.parametrize(
    "text, message",
    [
        (None, r"cannot be read \(No such file"),
        ("", "holds no update yet"),
        ('{"config": {}}\n', "holds no update yet"),
        ('{"step": 1, "loss": 2.0}\n[]\n', "is it the metrics.jsonl of train_grpo.py"),
        ("no json\n", "cannot be read as JSON lines"),
        (b"\xff\xfe\n", "is not text"),
    ],
)
def test_curves_of_something_else_are_refused(tmp_path, text, message):
    file = tmp_path / "metrics.jsonl"
    if text is not None:
        file.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(DataError, match=message) as error:
        show.main(["curves", str(file), "--out", str(tmp_path / "curves.png")])
    assert str(error.value).startswith(str(file))
    assert not (tmp_path / "curves.png").exists()


def test_a_sample_is_shown_with_its_parts():
    example = Example(Path("a/b.mp4"), QUESTION_REASONING, "sad", "video_audio")
    texts = ["<think>x</think>\n<answer>sad</answer>", "", "<answer>happy</answer>"]
    rewards = {"accuracy": torch.tensor([1.0, 0.0, 0.0]), "format": torch.tensor([1.0, 0.0, 0.0])}
    advantages = torch.tensor([1.15, -0.58, -0.57])
    shown = show.group_text(7, example, texts, rewards, advantages).splitlines()
    assert shown[1] == "── update 7 · a/b.mp4 · label: sad"
    # The prompt is there once.
    assert shown[2].startswith("   asked   As an emotional")
    assert sum("asked" in line for line in shown) == 1
    # The second is the worst, not the third.
    best, worst = (i for i, line in enumerate(shown) if "advantage" in line)
    assert shown[best : best + 3] == [
        "   accuracy 1  format 1  advantage +1.15",
        "           <think>x</think>",
        "           <answer>sad</answer>",
    ]
    assert shown[worst] == "   accuracy 0  format 0  advantage -0.58"


# ------------------------------------------------------------------------------------------------
# Which emotions are taken for which


RESULT = {
    "name": "test",
    "metrics": {
        "war": 0.5,
        "uar": 0.4,
        "recall": {"angry": 0.0, "happy": 0.5, "sad": 1.0},
        "confusion": {
            "angry": {"sad": 1},
            "happy": {"happy": 2, "joyful": 1, "sad": 1},
            "sad": {"sad": 1},
        },
    },
}


def test_confusion_counts_by_hand():
    labels, table = show.confusion_counts(RESULT["metrics"])
    assert labels == ["angry", "happy", "sad"]
    # Answers angry, happy, sad, and words that are no label.
    assert table == [[0, 0, 1, 0], [0, 2, 1, 1], [0, 0, 1, 0]]


def test_confusion_shows_counts_and_shares(figures):
    show.draw_confusion(RESULT["metrics"], "confusion.png")
    (axis,) = figures[0].axes
    shares = [[0, 0, 1, 0], [0, 0.5, 0.25, 0.25], [0, 0, 1, 0]]
    assert axis.images[0].get_array().tolist() == shares
    counts = {text.get_position(): text.get_text() for text in axis.texts}
    assert counts == {(2, 0): "1", (1, 1): "2", (2, 1): "1", (3, 1): "1", (2, 2): "1"}
    assert [text.get_text() for text in axis.get_yticklabels()] == ["angry", "happy", "sad"]
    assert axis.get_xticklabels()[-1].get_text() == "unknown"
    assert axis.get_title() == "WAR 50.0, UAR 40.0"


def test_confusion_of_a_file(tmp_path, capsys):
    result, out = tmp_path / "test.json", tmp_path / "new" / "confusion.png"
    result.write_text(json.dumps(RESULT))
    show.main(["confusion", str(result), "--out", str(out)])
    assert read_picture(out).ndim == 3 and "confusion.png" in capsys.readouterr().out


def diagonal(labels):
    """Metrics of a model that is always right."""
    confusion = {label: {label: 1} for label in labels}
    return {"war": 1, "uar": 1, "recall": dict.fromkeys(labels, 1), "confusion": confusion}


def test_a_dollar_in_labels_is_no_mathematics(tmp_path):
    show.draw_confusion(diagonal(["$x_$", r"$\frac$"]), tmp_path / "confusion.png")
    assert read_picture(tmp_path / "confusion.png").ndim == 3


def test_a_label_for_each_clip_is_still_a_picture(figures):
    """Of 1000 labels at full size matplotlib would refuse to make a picture."""
    show.draw_confusion(diagonal([f"label {number}" for number in range(1000)]), "confusion.png")
    assert figures[0].get_size_inches().max() <= 60
    assert len(figures[0].axes[0].texts) == 1000


@pytest.mark.parametrize(
    "text, message",
    [
        (None, "cannot be read"),
        ("{", "cannot be read as JSON"),
        ("[1]", "is no result of evaluate.py"),
        ('{"metrics": 3}', "is no result of evaluate.py"),
        ('{"metrics": {"war": 0.5}}', "is no result of evaluate.py"),
    ],
)
def test_confusion_of_something_else_is_refused(tmp_path, text, message):
    file = tmp_path / "result.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(DataError, match=message) as error:
        show.main(["confusion", str(file), "--out", str(tmp_path / "confusion.png")])
    assert str(error.value).startswith(str(file))


# ------------------------------------------------------------------------------------------------
# All of them


def test_a_picture_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    out = tmp_path / "curves.png"
    show.draw_curves([metrics_line(1)], out)
    before = out.read_bytes()

    def fail(*_):
        raise OSError(errno.ENOSPC, "disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full: .*curves.png'"):
        show.draw_curves([metrics_line(1), metrics_line(2)], out)
    assert out.read_bytes() == before
    assert os.listdir(tmp_path) == ["curves.png"]


@pytest.mark.parametrize(
    "name, start", [("a.pdf", b"%PDF"), ("a", b"\x89PNG"), ("a.PNG", b"\x89PNG")]
)
def test_the_ending_chooses_the_format(tmp_path, name, start):
    show.draw_confusion(RESULT["metrics"], tmp_path / name)
    assert (tmp_path / name).read_bytes().startswith(start)
    assert os.listdir(tmp_path) == [name]


def test_names_that_no_picture_can_have(tmp_path):
    with pytest.raises(DataError, match=r"a\.mp4: ends with none of \..*\.png"):
        show.draw_confusion(RESULT["metrics"], tmp_path / "a.mp4")
    with pytest.raises(DataError, match="is a folder; give the picture a name"):
        show.draw_confusion(RESULT["metrics"], tmp_path)
    assert os.listdir(tmp_path) == []


def test_script_prints_one_line_and_exits_with_2(tmp_path):
    arguments = [sys.executable, str(ROOT / "show.py"), "clip", "nowhere.mp4"]
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: nowhere.mp4: no such file")
    assert done.stderr.count("\n") == 1


def test_importing_it_does_not_import_matplotlib():
    code = "import sys, show; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_run_lines_of_the_manual_are_valid():
    lines = [line.split() for line in show.__doc__.splitlines() if "  python " in line]
    commands = [line[2:] for line in lines if "--out" in line]
    assert {show.parse_args(words[: words.index("--out") + 2]).picture for words in commands} == {
        "clip",
        "curves",
        "confusion",
    }
