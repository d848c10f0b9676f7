"""data.py: manifests, what a clip of one becomes, batches of them, and errors that help."""

import json
from pathlib import Path

import pytest
import torch
from clips import write_clip
from runs import CHECKPOINT, CLIPS

import data
from data import ClipError, DataError
from grpo import completion_logps
from support.flags import Common, load
from support.optimizer import set_trainable

GOLDEN = Path(__file__).parent / "golden"
CLIP = GOLDEN / "media/clip.mp4"


# --------------------------------------------------------------------------------------------------
# Manifests and batches


def entry(video="a.mp4", human="<video>\n<audio>\nWhich emotion?", gpt="happy", **extra):
    media = {} if video is None else {"video": video}
    return (
        media
        | {"conversations": [{"from": "human", "value": human}, {"from": "gpt", "value": gpt}]}
        | extra
    )


def write_manifest(folder, entries):
    (folder / "manifest.json").write_text(json.dumps(entries))
    return folder / "manifest.json"


def test_manifest_entries(tmp_path):
    (tmp_path / "a.mp4").touch()
    examples = data.read_manifest(
        write_manifest(
            tmp_path,
            [
                entry(label="happy", subject=3),
                entry(human="<video>\nWhich?"),
                entry(human="<audio>\n\n\nTwo\nlines?\n"),
                entry(human="Which?"),
                entry(video=None, human="Which?", gpt="<think>a</think>\n<answer>b</answer>"),
            ],
        )
    )
    assert [e.modality for e in examples] == [
        "video_audio",
        "video",
        "audio",
        "video_audio",
        "text",
    ]
    assert [e.question for e in examples] == [
        "Which emotion?",
        "Which?",
        "Two\nlines?",
        "Which?",
        "Which?",
    ]
    assert [e.video for e in examples] == [tmp_path / "a.mp4"] * 4 + [None]
    assert (
        examples[0].answer == "happy"
        and examples[4].answer == "<think>a</think>\n<answer>b</answer>"
    )
    assert examples[0].extra == {"label": "happy", "subject": 3} and examples[1].extra == {}


@pytest.mark.parametrize(
    "name, value, advice",
    [
        ("audio", "a.wav", "put the sound into the video file"),
        ("audios", ["a.wav"], "put the sound into the video file"),
        ("image", "a.jpg", "make it one entry per file, with field video"),
        ("images", ["a.jpg"], "make it one entry per file, with field video"),
        ("videos", ["b.mp4", "c.mp4"], "make it one entry per file, with field video"),
        ("start", 0, "cut the file, which is used whole"),
        ("end", 2.5, "cut the file, which is used whole"),
        ("start_time", "00:01", "cut the file, which is used whole"),
        ("end_time", "00:02", "cut the file, which is used whole"),
        ("duration", 2.5, "cut the file, which is used whole"),
        ("clip", [0, 2.5], "cut the file, which is used whole"),
        ("fps", 2, "take it out, the model decides how many frames it sees"),
    ],
)
def test_fields_that_would_change_the_clip_are_refused(tmp_path, name, value, advice):
    (tmp_path / "a.mp4").touch()
    manifest = write_manifest(tmp_path, [entry(), entry(**{name: value})])
    with pytest.raises(DataError) as caught:
        data.read_manifest(manifest)
    assert str(caught.value) == (
        f"{manifest}: entry 1: field {name} is not supported: {advice}; "
        "or rename it, if it does not change what the clip is"
    )


FIELDS = """
begin begin_time stop timestamp timestamps time span interval wav audio_start clip_start start_sec
start_frame video_segment crop bbox video_path Start startTime StartTime EndTime AUDIO FPS
"""


@pytest.mark.parametrize("name", [*FIELDS.split(), "Start Time", "start-time"])
def test_such_fields_are_refused_in_any_spelling(tmp_path, name):
    (tmp_path / "a.mp4").touch()
    manifest = write_manifest(tmp_path, [entry(**{name: "00:01"})])
    with pytest.raises(DataError, match=f"entry 0: field {name} is not supported: "):
        data.read_manifest(manifest)


@pytest.mark.parametrize("name", ["start_id", "timed", "clip_id", "audio_quality", "_", "", "ü"])
def test_names_that_only_contain_such_a_field_are_kept(tmp_path, name):
    (tmp_path / "a.mp4").touch()
    (example,) = data.read_manifest(write_manifest(tmp_path, [entry(**{name: "x"})]))
    assert example.extra == {name: "x"}


def test_such_a_field_is_named_though_others_are_missing(tmp_path):
    """An entry of another format, without field video, is told what is wrong with it."""
    for strange in ({"videos": ["a.mp4"], "messages": []}, entry(None, images=["a.jpg"])):
        with pytest.raises(DataError, match="entry 0: field (videos|images) is not supported"):
            data.read_manifest(write_manifest(tmp_path, [strange]))


@pytest.mark.parametrize("value", [None, "", [], {}])
def test_such_a_field_without_a_value_says_nothing(tmp_path, value):
    (tmp_path / "a.mp4").touch()
    manifest = write_manifest(tmp_path, [entry(audio=value, end=value, id=7)])
    (example,) = data.read_manifest(manifest)
    assert example.extra == {"audio": value, "end": value, "id": 7}


def test_manifest_media_root_and_limit(tmp_path):
    (tmp_path / "media").mkdir()
    (tmp_path / "media/a.mp4").touch()
    manifest = write_manifest(tmp_path, [entry(), entry(), entry("not_there.mp4")])
    examples = data.read_manifest(manifest, tmp_path / "media", limit=2)
    assert [e.video for e in examples] == [tmp_path / "media/a.mp4"] * 2
    with pytest.raises(DataError, match="manifest.json: 2 of 2 clips.*a.mp4.*--media-root"):
        data.read_manifest(manifest)


def test_a_folder_is_no_clip(tmp_path):
    (tmp_path / "folder").mkdir()
    manifest = write_manifest(tmp_path, [entry("gone.mp4"), entry("folder")])
    with pytest.raises(DataError, match="manifest.json: .*/folder is a folder; list the files"):
        data.read_manifest(manifest)


def test_missing_clips_are_counted_and_the_first_named(tmp_path):
    with pytest.raises(DataError, match=r"5 of 5 clips.*0.mp4.*1.mp4.*2.mp4, \.\.\.") as caught:
        data.read_manifest(write_manifest(tmp_path, [entry(f"{i}.mp4") for i in range(5)]))
    assert "4.mp4" not in str(caught.value)


@pytest.mark.parametrize(
    "bad, message",
    [
        ("a text", "entry 1 should be an object"),
        ({"video": "a.mp4"}, "entry 1: field conversations"),
        (
            {"video": "a.mp4", "conversations": [{"from": "human", "value": "Which?"}]},
            "entry 1: field conversations",
        ),
        ({"video": "a.mp4", "conversations": ["Which?", "happy"]}, "entry 1: field conversations"),
        (entry(video=3), "entry 1: field video"),
        (entry(video=""), "entry 1: field video"),
        (entry(video=None), "entry 1: field video is missing"),
        (entry(gpt=None), r"entry 1: field conversations\[1\].value"),
    ],
)
def test_manifest_errors_name_entry_and_field(tmp_path, bad, message):
    (tmp_path / "a.mp4").touch()
    with pytest.raises(DataError, match=f"manifest.json: {message}"):
        data.read_manifest(write_manifest(tmp_path, [entry(), bad]))


@pytest.mark.parametrize("content", ["{", "{}", "[]"])
def test_manifests_that_are_none(tmp_path, content):
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(DataError, match="manifest.json"):
        data.read_manifest(tmp_path / "manifest.json")
    with pytest.raises(DataError, match="nowhere.json"):
        data.read_manifest(tmp_path / "nowhere.json")


def examples_of(path, *modalities):
    return [data.Example(path, "Which emotion?", "happy", modality) for modality in modalities]


SIZES = dict(num_frames=4, image_size=32, n_mels=80, num_samples=32000)


def test_clips_load_what_the_modality_needs():
    clips = data.Clips(
        examples_of(CLIP, "video_audio", "video", "audio") + examples_of(None, "text"), **SIZES
    )
    both, video, audio, text = items = [clips[i] for i in range(len(clips))]
    assert [item["index"] for item in items] == [0, 1, 2, 3]
    assert both["pixel_values"].shape == (4, 3, 32, 32) and both["input_features"].shape == (
        80,
        200,
    )
    assert (
        torch.equal(video["pixel_values"], both["pixel_values"]) and video["input_features"] is None
    )
    assert (
        torch.equal(audio["input_features"], both["input_features"])
        and audio["pixel_values"] is None
    )
    assert text["pixel_values"] is None and text["input_features"] is None
    squashed = data.Clips(examples_of(CLIP, "video"), fit="squash", **SIZES)[0]["pixel_values"]
    assert not torch.equal(squashed, video["pixel_values"])


def test_a_needed_stream_that_is_missing_is_an_error(tmp_path):
    silent = write_clip(tmp_path / "silent.mp4")
    clips = data.Clips(examples_of(silent, "video_audio", "audio", "video"), **SIZES)
    for i in (0, 1):
        with pytest.raises(ClipError, match="silent.mp4.*--modality video"):
            clips[i]
    assert clips[2]["pixel_values"].shape == (4, 3, 32, 32)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_keep_the_order_and_leave_the_random_state_alone(tmp_path, workers):
    clips = data.Clips(
        [
            data.Example(
                write_clip(tmp_path / f"{i}.mkv", frames=3, video="ffv1", size=(32 + i, 32)),
                "Which?",
                "sad",
                "video",
            )
            for i in range(5)
        ],
        **SIZES,
    )
    state = torch.get_rng_state()
    loaded = list(data.batches(clips, [3, 0, 4, 4, 1], 2, workers))
    assert torch.equal(state, torch.get_rng_state())
    assert [[item["index"] for item in batch] for batch in loaded] == [[3, 0], [4, 4], [1]]
    for item in sum(loaded, []):
        assert torch.equal(item["pixel_values"], clips[item["index"]]["pixel_values"])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("room", [0, 1, 3, 9])
def test_items_that_are_kept_are_not_made_again(tmp_path, monkeypatch, workers, room):
    """As many as there is room for, over several passes; an error is one for all of them."""
    (tmp_path / "bad.mp4").write_text("no clip")
    examples = examples_of(CLIP, "audio", "video", "video_audio", "audio")
    clips = data.Clips(examples, **SIZES, keep=room)
    order = [3, 0, 0, 2, 1, 3, 2, 2, 0, 1]
    made, load_ahead = [], data.load_ahead

    def counted(dataset, indices, workers):
        made.extend(indices)
        return load_ahead(dataset, indices, workers)

    monkeypatch.setattr(data, "load_ahead", counted)
    expected = [clips[i] for i in range(4)]
    for number in range(2):
        made.clear()
        loaded = list(data.batches(clips, order, 3, workers))
        indices = [[item["index"] for item in batch] for batch in loaded]
        assert indices == [[3, 0, 0], [2, 1, 3], [2, 2, 0], [1]]
        for item in sum(loaded, []):
            for name in ("pixel_values", "input_features"):
                a, b = item[name], expected[item["index"]][name]
                assert a is b is None or torch.equal(a, b)
        kept = [3, 0, 2, 1][:room]  # those that came first
        assert sorted(clips.kept) == sorted(kept)
        again = [i for place, i in enumerate(order) if i not in kept or place == order.index(i)]
        assert made == (again if number == 0 else [i for i in order if i not in kept])


def test_a_clip_that_cannot_be_used_stays_one_where_items_are_kept(tmp_path):
    (tmp_path / "bad.mp4").write_text("no clip")
    examples = examples_of(CLIP, "audio") * 20 + examples_of(tmp_path / "bad.mp4", "audio")
    clips = data.Clips(examples, **SIZES, keep=50)
    log = tmp_path / "skipped.txt"
    for _ in range(2):
        loaded = list(data.batches(clips, [20, 1, 20, 2], 2, skip_log=log))
        assert [[item["index"] for item in batch] for batch in loaded] == [[1], [2]]
        assert len(log.read_text().splitlines()) == 1
    with pytest.raises(ClipError, match="bad.mp4"):
        next(data.batches(clips, [20], 1))


@pytest.mark.parametrize("workers", [0, 2])
def test_errors_cross_processes_with_just_their_message(tmp_path, workers):
    bad = tmp_path / "bad.mp4"
    bad.write_text("no clip")
    clips = data.Clips(examples_of(CLIP, "video") + examples_of(bad, "video"), **SIZES)
    stream = data.batches(clips, [0, 1, 0], 1, workers)
    assert next(stream)[0]["index"] == 0
    with pytest.raises(ClipError) as caught:
        next(stream)
    assert str(caught.value).startswith(str(bad)) and "\n" not in str(caught.value)


def test_kept_features_have_the_gradients_of_computed_ones():
    """Values and gradients, in a second pass that neither decodes nor encodes, as in one that
    does."""
    omni = load(Common(model=CHECKPOINT))
    examples = [data.Example(Path(clip), data.QUESTION_LABEL, "", "video_audio") for clip in CLIPS]
    ids = torch.randint(0, 300, (2, 3, 7), generator=torch.Generator().manual_seed(0))
    set_trainable(omni.model)

    def second_pass(keep):
        clips = data.clips_of(omni.model, examples, keep=keep)
        for items in data.batches(clips, [0, 1, 0, 1], 2):
            batch = data.encode(omni, clips, items)
        assert len(clips.kept) == (2 if keep else 0)
        prompts = torch.stack(data.embed(omni.model, batch))
        logps = completion_logps(omni.model, prompts, ids)
        omni.model.zero_grad()
        logps.sum().backward()
        return logps, [p.grad for p in omni.model.parameters() if p.grad is not None]

    (kept, kept_gradients), (computed, gradients) = second_pass(True), second_pass(False)
    assert torch.allclose(kept, computed, atol=1e-6)
    largest = max(gradient.abs().max() for gradient in gradients)
    assert len(kept_gradients) == len(gradients) > 100
    for a, b in zip(kept_gradients, gradients):
        assert (a - b).abs().max() <= 1e-6 * max(1.0, largest)
