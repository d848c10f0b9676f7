"""show.py: pictures and pages of clips, runs and results, with what is in them, and what it
refuses."""

import errno
import json
import math
import os
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import matplotlib.image
import pytest
import torch
from conftest import GOLDEN, ROOT
from matplotlib.text import Text
from runs import CHECKPOINT, CLIPS, EVALUATE, GRPO, stop_in_update, write_manifest
from test_data import write_clip

import evaluate
import show
import train_grpo
from data import QUESTION_REASONING, Example
from grpo import grpo_loss
from support import pages, results, updates
from support.errors import ClipError, DataError
from support.run import make_room


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
    with pytest.raises(ClipError, match="is a folder"):
        show.main(["clip", str(tmp_path), "--out", str(tmp_path / "seen.png")])
    with pytest.raises(DataError, match="page.html: a page of a clip needs --model DIR"):
        show.main(["clip", CLIPS[0], "--out", str(tmp_path / "page.html")])
    assert os.listdir(tmp_path) == []


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


def test_a_line_that_is_cut_off_inside_a_character_is_left_out(tmp_path):
    file = tmp_path / "completions.jsonl"
    file.write_bytes('\ufeff{"a": "é\u2028"}\n{"a": "é'.encode()[:-1])
    assert show.read_lines(file) == [{"a": "é\u2028"}]


@pytest.mark.parametrize(
    "text, message",
    [
        (None, r"cannot be read \(No such file"),
        ("", "holds no update yet"),
        ('{"config": {}}\n', "holds no update yet"),
        ('{"step": 1, "loss": 2.0}\n[]\n', "is it the metrics.jsonl of train_grpo.py"),
        ("no json\n", "cannot be read as JSON lines"),
        (b"\xff\xfe\n", "is not text"),
        ("version https://git-lfs.github.com/spec/v1\noid", "a git-lfs pointer"),
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
    "settings": {"model": "a"},
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
    """100 labels at full size would be 70 inches; more than 900, and matplotlib would refuse."""
    show.draw_confusion(diagonal([f"label {number}" for number in range(100)]), "confusion.png")
    assert figures[0].get_size_inches().max() <= 60
    assert len(figures[0].axes[0].texts) == 100


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
# Several models


def write_result(path, model, name, war, uar):
    metrics = {"war": war, "uar": uar, "n": 10, "unknown": 1, "unformatted": 0, "truncated": 0}
    result = {"name": name, "settings": {"model": model}, "metrics": metrics}
    path.write_text(json.dumps(result))
    return str(path)


@pytest.fixture
def result_files(tmp_path):
    return [
        write_result(tmp_path / "1.json", "before", "dfew_test", 0.25, 0.125),
        write_result(tmp_path / "2.json", "after <b>", "dfew_test", 0.75, 0.5),
        write_result(tmp_path / "3.json", "after <b>", "other", 1.0, 1.0),
    ]


def test_scores_of_several_models(result_files):
    cells = results.scores_of(result_files)
    assert cells == {
        "before": {"DFEW": (25.0, 12.5)},
        "after <b>": {"DFEW": (75.0, 50.0), "other": (100.0, 100.0)},
    }
    published = results.scores_of(result_files, published=True)
    assert published["R1-Omni (published)"]["RAVDESS"] == (43.00, 44.69)


def test_scores_are_bars(result_files, figures):
    show.draw_scores(results.scores_of(result_files), "table.png")
    war, uar = figures[0].axes
    for axis, title, expected in ((war, "WAR", [25, 75, 100]), (uar, "UAR", [12.5, 50, 100])):
        assert axis.get_title() == title
        assert [bar.get_height() for bar in axis.patches] == expected
        middles = [bar.get_x() + bar.get_width() / 2 for bar in axis.patches]
        # Of two models the first stands left of the data set's mark, the second right.
        assert middles == pytest.approx([-0.2, 0.2, 1.2])
        assert [label.get_text() for label in axis.get_xticklabels()] == ["DFEW", "other"]
    assert {"before", "after <b>"} <= set(texts_of(figures[0]))


def test_a_model_of_any_name_is_in_the_legend(figures):
    models = ["_hidden", "$x$", "shown"]
    show.draw_scores({model: {"DFEW": (50, 40)} for model in models}, "table.png")
    (legend,) = figures[0].legends
    shown = [text.get_text() for text in legend.get_texts()]
    assert shown == ["_hidden", r"\$x\$", "shown"]


@pytest.mark.parametrize("name", ["table.png", "table.html"])
def test_a_table_of_files(result_files, tmp_path, capsys, name):
    out = tmp_path / "new" / name
    show.main(["table", *result_files, "--published", "--out", str(out)])
    assert name in capsys.readouterr().out and os.listdir(out.parent) == [name]
    if name.endswith("png"):
        assert read_picture(out).ndim == 3
        return
    page = read_page(out)
    assert "after <b> 75.00 50.00 100.00 100.00 – – – –" in page.text
    assert "EMER-SFT (published) 38.66 35.31 – – 38.39 28.02 29.00 27.19" in page.text
    with pytest.raises(DataError, match="nothing.json: cannot be read"):
        show.main(["table", str(tmp_path / "nothing.json"), "--out", str(out)])


# ------------------------------------------------------------------------------------------------
# Pages


class Page(HTMLParser):
    """A page as a browser reads it: its elements, and its text with single spaces."""

    def __init__(self, path):
        super().__init__()
        self.source, self.elements, self.pieces = path.read_text(encoding="utf-8"), [], []
        self.feed(self.source)
        self.text = " ".join(" ".join(self.pieces).split())

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.pieces.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def read_page(path):
    """A page, and it loads nothing: pictures lie in it, and no other element names an address."""
    page = Page(path)
    for word in ("http:", "https:", "url(", "@import"):
        assert word not in page.source, word
    for tag, attributes in page.elements:
        assert not {"href", "action", "data", "srcset", "poster"} & attributes.keys(), tag
        assert tag == "img" or "src" not in attributes, tag
        assert not any(name.startswith("on") for name in attributes), tag
    assert all(image["src"].startswith("data:image/jpeg;base64,") for image in page.all("img"))
    assert len(page.all("script")) == len(page.all("style")) == len(page.all("main")) == 1
    return page


def variety(completion, label):
    """A reward that tells random completions apart."""
    return len(set(completion)) / 10


def train(folder, out, more=""):
    """A small GRPO run with a KL that is felt."""
    manifest = write_manifest(folder / "manifest.json")
    flags = "--updates 4 --group 3 --max-new-tokens 6 --lr 1e-2 --beta 0.5 --save-every 2"
    paths = ["--data", manifest, "--test", manifest, "--out", str(out)]
    train_grpo.main([*GRPO, *flags.split(), *paths, *more.split()])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run that nothing has disturbed."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(train_grpo.REWARDS, "variety", variety)
        train(folder, folder / "grpo")
    return folder / "grpo"


def read_groups(run):
    return [json.loads(line) for line in (run / "completions.jsonl").read_text().splitlines()]


def test_a_run_keeps_three_groups_token_by_token(finished):
    groups = read_groups(finished)
    assert [group["update"] for group in groups] == [1, 2, 4]
    for group in groups:
        assert group["question"] == QUESTION_REASONING and group["modality"] == "video_audio"
        assert len(group["pieces"]) == len(group["completions"]) == 3
        for g, pieces in enumerate(group["pieces"]):
            counts = {len(pieces), len(group["logps"][g]), len(group["ref_logps"][g])}
            assert counts == {group["tokens"][g]}
            if all("\ufffd" not in piece for piece in pieces):
                shown = "".join(pieces).removesuffix("<|im_end|>").removesuffix("<|endoftext|>")
                assert shown == group["completions"][g]
    # In the first update the policy is the reference.
    assert groups[0]["logps"][0] == pytest.approx(groups[0]["ref_logps"][0], abs=1e-4)
    assert groups[2]["logps"][0] != pytest.approx(groups[2]["ref_logps"][0], abs=1e-2)
    # The one whose rewards differ most: with --log-completions, of all groups of the update.
    assert any(groups[0]["advantages"])


def test_an_interrupted_run_keeps_the_same_groups(finished, tmp_path, monkeypatch):
    monkeypatch.setitem(train_grpo.REWARDS, "variety", variety)
    with monkeypatch.context() as patch:
        stop_in_update(patch, 4)  # its group is written, its state is not
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path, tmp_path / "grpo")
    assert [group["update"] for group in read_groups(tmp_path / "grpo")] == [1, 2, 4]
    with open(tmp_path / "grpo" / "completions.jsonl", "a") as file:
        file.write('{"update": 4, "vid')  # killed while it wrote
    train(tmp_path, tmp_path / "grpo")
    assert read_groups(tmp_path / "grpo") == read_groups(finished)


def log_in(folder, **more):
    """The log of a run's second update that is to come."""
    config = train_grpo.Config(updates=2, **more)
    return updates.CompletionLog(SimpleNamespace(folder=folder, step=1, config=config), None)


def test_completions_that_cannot_be_read_are_named(tmp_path):
    file = tmp_path / "completions.jsonl"
    file.write_text('{"update": 1}\n{"update": 2}\n')
    log_in(tmp_path)
    assert file.read_text() == '{"update": 1}\n'
    file.write_text("no json\n")
    with pytest.raises(DataError, match=r"completions.jsonl: is not as this run wrote it"):
        log_in(tmp_path)


@pytest.mark.parametrize("all_of_them, lines", [(False, []), (True, [2, 2])])
def test_other_ranks_write_all_their_groups_or_none(tmp_path, monkeypatch, all_of_them, lines):
    monkeypatch.setattr(updates, "RANK", 1)
    monkeypatch.setattr(updates, "group_facts", lambda update, rollout, b: {"update": update})
    rollout = train_grpo.Rollout([None] * 2, *[None] * 5)
    log_in(tmp_path, log_completions=all_of_them).add(2, rollout)
    found = read_groups(tmp_path) if (tmp_path / "completions.jsonl").exists() else []
    assert [group["update"] for group in found] == lines


def test_pulls_by_hand():
    half, quarter = math.log(0.5), math.log(0.25)
    # A - beta (1 - pi_ref / pi): twice as likely as before is pulled back, half as likely held up.
    pull, parts = pages.pulls(1.0, [half, quarter, half], [quarter, half, half], beta=0.2)
    assert pull == pytest.approx([1.0 - 0.2 * 0.5, 1.0 + 0.2 * 1.0, 1.0])
    assert parts == pytest.approx([-0.1, 0.2, 0.0])
    assert pages.pulls(-1.5, [half], None, beta=0.2) == ([-1.5], [0.0])
    assert pages.pulls(-1.5, [half], [quarter], beta=0.0) == ([-1.5], [0.0])
    # However much less likely a token has become, it is a number.
    _, parts = pages.pulls(1.0, [-900.0, -half], [half, -900.0], beta=0.2)
    assert parts == pytest.approx([0.2 * math.exp(pages.LARGEST_GAP), -0.2])


def test_pulls_are_the_losss_gradient():
    torch.manual_seed(0)
    logps, ref_logps = -3 * torch.rand(2, 2, 5), -3 * torch.rand(2, 2, 5)
    advantages = torch.tensor([[1.0, -1.0], [0.5, -0.5]])
    lengths = torch.tensor([[5, 3], [1, 4]])
    mask = torch.arange(5) < lengths[..., None]
    logps.requires_grad_()
    loss, _ = grpo_loss(logps, None, ref_logps, advantages, mask, beta=0.3)
    loss.backward()
    for b, g in ((0, 0), (0, 1), (1, 0), (1, 1)):
        n = int(lengths[b, g])
        facts = logps[b, g, :n].tolist(), ref_logps[b, g, :n].tolist()
        pull, _ = pages.pulls(advantages[b, g].item(), *facts, beta=0.3)
        expected = -logps.grad[b, g, :n] * n * 4  # 4 completions
        assert pull == pytest.approx(expected.tolist(), abs=1e-5)


CONFIG = {"beta": 0.2, "kl": "loss", "mask_truncated": False}


def group_by_hand():
    """Of two completions the second is the better one; the first is cut off."""
    half, quarter = math.log(0.5), math.log(0.25)
    return {
        **{"update": 3, "video": "a.mp4", "label": "sad", "question": "?", "modality": "video"},
        "rewards": {"accuracy": [0.0, 1.0]},
        "advantages": [-0.5, 0.5],
        "ended": [False, True],
        "pieces": [["fear", " "], ["sad", "\n"]],
        "logps": [[half, -0.0], [half, half]],
        "ref_logps": [[quarter, 0.0], [quarter, half]],
    }


def asked(view, name):
    """The colours of all tokens, completion by completion."""
    return [[token["asked"][name] for token in c["tokens"]] for c in view["completions"]]


def test_a_group_is_ranked_and_coloured():
    view = pages.view_of_group(group_by_hand(), CONFIG)
    assert [c["advantage"] for c in view["completions"]] == [0.5, -0.5]
    assert [c["rewards"] for c in view["completions"]] == [{"accuracy": 1.0}, {"accuracy": 0.0}]
    # Shares of the largest advantage, at most 1: -0.5 - 0.1 is more.
    assert asked(view, "pull") == [[0.8, 1.0], [-1.0, -1.0]]
    assert asked(view, "kl") == [[-1.0, 0.0], [-1.0, 0.0]]  # -0.1 is the largest of all
    # Shares of 0.6 / 2. A token that was sure has nothing left to be learned.
    assert asked(view, "logit") == [[0.667, 0.833], [-1.0, 0.0]]
    first = view["completions"][0]["tokens"]
    assert first[0]["said"] == (
        "'sad' · log π -0.693 (50.0%) · reference -1.386 (25.0%) · pull +0.400 = A +0.500 and "
        "KL -0.100"
    )
    assert first[1]["text"] == "⏎\n"


def test_what_has_no_gradient_has_no_colour():
    view = pages.view_of_group(group_by_hand(), CONFIG | {"mask_truncated": True})
    assert asked(view, "pull") == [[0.8, 1.0], [0.0, 0.0]]
    assert [c["learns"] for c in view["completions"]] == [True, False]
    for change in ({"kl": "reward"}, {"beta": 0.0}):
        view = pages.view_of_group(group_by_hand(), CONFIG | change)
        assert asked(view, "pull") == [[1.0, 1.0], [-1.0, -1.0]]
        assert asked(view, "kl") == [[0.0, 0.0], [0.0, 0.0]]
    equal = group_by_hand() | {"advantages": [0.0, 0.0], "ref_logps": None}
    view = pages.view_of_group(equal, CONFIG)
    assert view["equal"] and asked(view, "pull") == [[0.0, 0.0], [0.0, 0.0]]


def test_curves_of_a_page_by_hand():
    metrics = [{"update": 1, "kl": 0.0}, {"update": 3, "kl": 0.3, "x": -1.5}, {"update": 5}]
    chart = pages.chart("KL", ["kl", "x"], metrics)
    # From -2 to 0.5, from update 1 to 5; y grows downwards.
    assert chart["scale"] == ["0.5", "-0.75", "-2"] and chart["ends"] == (1, 5)
    assert [line["points"] for line in chart["lines"]] == [[(0, 20), (50, 8)], [(50, 80)]]
    assert chart["lines"][0]["last"] == 0.3
    assert pages.chart("KL", ["nothing"], metrics)["lines"] == []
    flat = pages.chart("KL", ["kl"], metrics[:1])
    assert flat["scale"] == ["1", "0.5", "0"] and flat["lines"][0]["points"] == [(0, 100)]
    assert [pages.round_up(x) for x in (0, 1, 1.01, 0.21, 30, 1e-7)] == [0, 1, 2, 0.25, 50, 1e-7]


def test_the_page_of_a_run(finished, capsys):
    show.main(["run", str(finished)])
    assert "page.html" in capsys.readouterr().out
    page = read_page(finished / "page.html")
    groups, results = read_groups(finished), json.loads((finished / "results.json").read_text())
    for update, group in zip((1, 2, 4), groups):
        assert f"Update {update} · label: {group['label']}" in page.text
    tokens = page.all("i")
    assert len(tokens) == sum(sum(group["tokens"]) for group in groups)
    assert all("log π" in token["title"] and "pull" in token["title"] for token in tokens)
    # The keyboard reaches each completion, and from there its tokens.
    assert [token["tabindex"] for token in tokens].count("0") == 3 * len(groups)
    for when in ("before", "after"):
        assert f"{when} {100 * results[when]['manifest']['war']:.2f}" in page.text
    # Six clips before and after, three groups: four frames and a log-mel each.
    assert len(page.all("img")) == (6 + 3) * (4 + 1)
    assert page.text.count("4 frames, 64 × 64") == 6 + 3
    assert set(pages.LOOK_FOR) == {"reward by component", *show.PANELS}
    assert all(" ".join(sentence.split()) in page.text for sentence in pages.LOOK_FOR.values())
    # A later run in this folder keeps the page with the rest.
    make_room(finished)
    assert (finished.parent / "grpo.1" / "page.html").exists()
    (finished.parent / "grpo.1").rename(finished)


def test_results_hold_the_same_clips_before_and_after(finished, tmp_path):
    results = json.loads((finished / "results.json").read_text())
    before, after = (results[when]["manifest"]["examples"] for when in ("before", "after"))
    assert [row["index"] for row in before] == [row["index"] for row in after] == list(range(6))
    assert [row["completion"] for row in before] != [row["completion"] for row in after]
    assert all(row["video"] in CLIPS and row["modality"] == "video_audio" for row in before)
    evaluation = ["--data", str(finished.parent / "manifest.json"), "--out", str(tmp_path)]
    words = [*EVALUATE, *evaluation, "--model", str(finished / "last"), "--max-new-tokens", "6"]
    evaluate.main(words)
    rows = json.loads((tmp_path / "manifest.json").read_text())["completions"]
    assert [row["completion"] for row in rows] == [row["completion"] for row in after]


HOSTILE = (
    "</i></pre><script>alert(1)</script><img src=x onerror='alert(2)'>\" onclick=\"alert(3) &amp;"
)


def copied(finished, folder, **changes):
    """A run's folder with other files in it: name -> text, or None for none."""
    for name in ("metrics.jsonl", "completions.jsonl", "results.json"):
        (folder / name).write_text((finished / name).read_text())
    for name, text in changes.items():
        path = folder / name.replace("_", ".")
        path.write_text(text) if text is not None else path.unlink()
    return folder


def test_what_a_model_wrote_stays_text(finished, tmp_path):
    (group, *_), results = read_groups(finished), (finished / "results.json").read_text()
    group["pieces"][0][0] = group["label"] = group["video"] = HOSTILE
    results = json.loads(results)
    results["before"]["manifest"]["examples"][0] |= {"completion": HOSTILE, "label": HOSTILE}
    texts = {"completions_jsonl": json.dumps(group) + "\n", "results_json": json.dumps(results)}
    show.main(["run", str(copied(finished, tmp_path, **texts))])
    page = read_page(tmp_path / "page.html")  # no element and no attribute came of it
    assert page.text.count(HOSTILE) == 5
    assert any(repr(HOSTILE)[:30] in token["title"] for token in page.all("i"))
    # A token with a bidi override turns itself around, and none behind it.
    assert ".tokens i, pre { unicode-bidi: isolate; }" in page.source


def test_the_page_of_a_run_that_goes_on(finished, tmp_path, capsys):
    """No checkpoint, no results, no group yet, a clip that has gone."""
    run = copied(finished, tmp_path, results_json=None)
    show.main(["run", str(run), "--out", str(tmp_path / "a.html")])
    page = read_page(tmp_path / "a.html")
    assert "No checkpoint is saved yet" in page.text and "The run goes on" in page.text
    assert len(page.all("i")) and not page.all("img")
    (run / "completions.jsonl").unlink()
    show.main(["run", str(run), "--out", str(tmp_path / "b.html")])
    assert "No group has been kept" in read_page(tmp_path / "b.html").text
    (run / "last").symlink_to(finished / "last")
    (group, *_) = read_groups(finished)
    (run / "completions.jsonl").write_text(json.dumps(group | {"video": "gone.mp4"}) + "\n")
    show.main(["run", str(run), "--out", str(tmp_path / "c.html")])
    assert "gone.mp4: no such file" in read_page(tmp_path / "c.html").text
    assert "no clip is found, gone.mp4 for one: their paths are relative" in capsys.readouterr().out


def test_only_where_all_clips_are_lost_the_folder_is_wrong(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.mp4").touch()
    here, gone = ({"video": name, "modality": "video"} for name in ("a.mp4", "gone.mp4"))
    text = {"video": "None", "modality": "text"}
    for views in ([here, gone], [gone | {"video": "/gone.mp4"}], [text], []):
        pages.say_if_none_is_found(views)
        assert capsys.readouterr().out == ""
    pages.say_if_none_is_found([text, gone])
    assert "gone.mp4 for one" in capsys.readouterr().out


def test_a_run_without_its_files_is_refused(finished, tmp_path):
    with pytest.raises(DataError, match=r"no/metrics.jsonl: no such file; give the --out folder"):
        show.main(["run", str(tmp_path / "no")])
    run = copied(finished, tmp_path, results_json='{"before": {"x": {}}}')
    with pytest.raises(DataError, match="results.json or completions.jsonl is not as train_grpo"):
        show.main(["run", str(run)])
    run = copied(finished, tmp_path, results_json="{")
    with pytest.raises(DataError, match="results.json: cannot be read as JSON"):
        show.main(["run", str(run)])
    run = copied(finished, tmp_path, completions_jsonl='{"pieces": 1}\n')
    with pytest.raises(DataError, match="results.json or completions.jsonl is not as train_grpo"):
        show.main(["run", str(run)])
    assert not (tmp_path / "page.html").exists() and not (tmp_path / "no").exists()


def first_line_without(file, name):
    config, *lines = file.read_text().splitlines(keepends=True)
    config = json.loads(config)
    del config["config"][name]
    return "".join([json.dumps(config) + "\n", *lines])


def results_with(file, **changes):
    results = json.loads(file.read_text())
    results["after"]["manifest"] |= changes
    return json.dumps(results)


@pytest.mark.parametrize(
    "name, edited, message",
    [
        ("metrics", lambda file: first_line_without(file, "fit"), "KeyError: 'fit'"),
        ("metrics", lambda file: first_line_without(file, "updates_per_rollout"), "Undefined"),
        ("metrics", lambda file: file.read_text().replace('"kl": 0', '"kl": "x", "": 0'), "Type"),
        ("results", lambda file: file.read_text().replace('"format"', '"old"'), "'format'"),
        ("results", lambda file: results_with(file, war=None), "TypeError"),
    ],
)
def test_files_of_a_run_that_were_edited_are_named(finished, tmp_path, name, edited, message):
    run = copied(finished, tmp_path)
    (file,) = run.glob(f"{name}.json*")
    file.write_text(edited(file))
    files = "metrics.jsonl, results.json or completions.jsonl is not as train_grpo.py"
    with pytest.raises(DataError, match=f"{files}.*{message}"):
        show.main(["run", str(run)])
    assert not (run / "page.html").exists()


def test_a_clip_under_several_models(finished, tmp_path, capsys):
    out, models = tmp_path / "page.html", [CHECKPOINT, str(finished / "last")]
    words = ["clip", CLIPS[0], "--model", *models, "--max-new-tokens", "5", "--out", str(out)]
    show.main(words)
    page = read_page(out)
    for model in models:
        capsys.readouterr()
        evaluate.main([*EVALUATE, "--model", model, "--clip", CLIPS[0], "--max-new-tokens", "5"])
        said = capsys.readouterr().out
        assert model in page.text and " ".join(said.split()) in page.text
    # Both get the same: it is there once.
    assert len(page.all("img")) == 4 + 1 and page.text.count("4 frames, 64 × 64") == 1
    assert page.text.count(QUESTION_REASONING.split("\n")[0]) == 1
    more = ["--modality", "audio", "--question", "Who <b>is</b> it?"]
    show.main([*words, *more])
    page = read_page(out)
    assert len(page.all("img")) == 1 and "Who <b>is</b> it?" in page.text


@pytest.mark.parametrize(
    "words, error, message",
    [
        (["a.mp4", "--model", CHECKPOINT], ClipError, "a.mp4: no such file"),
        ([CLIPS[0], "--model", "nowhere"], ValueError, "nowhere/config.json: not found"),
        ([CLIPS[0], "--model", CHECKPOINT, "--max-new-tokens", "0"], DataError, "at least 1"),
        ([CLIPS[0], "--model", CHECKPOINT, "--out", "a.png"], DataError, "ends with .html"),
        (
            [CLIPS[0], "--model", CHECKPOINT, *"--clip b.mp4 --data z.json --aliases".split()],
            DataError,
            "--data, --clip, --aliases: of no use for the page",
        ),
        ([CLIPS[0], "--model", CHECKPOINT, "--workers", "3"], DataError, "--workers: of no use"),
    ],
)
def test_a_clip_page_that_cannot_be_made(tmp_path, monkeypatch, words, error, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message):
        show.main(["clip", *words])
    assert os.listdir(tmp_path) == []


def test_other_flags_are_unknown_without_models(capsys):
    with pytest.raises(SystemExit):
        show.main(["clip", CLIPS[0], "--question", "label"])
    assert "unrecognized arguments: --question label" in capsys.readouterr().err


def test_frames_are_not_chosen_where_the_models_are(capsys):
    with pytest.raises(SystemExit):
        show.main(["clip", CLIPS[0], "--model", CHECKPOINT, "--frames", "3"])
    assert "--frames and --size do not go with --model" in capsys.readouterr().err


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
    drawn = {show.parse_args(words[: words.index("--out") + 2]).picture for words in commands}
    assert drawn == {"clip", "curves", "confusion", "table", "run"}
