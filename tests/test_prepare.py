"""prepare.py: miniature trees of each data set's layout, read back, and what it refuses.

Nothing is decoded here, so empty files are clips.
"""

import errno
import inspect
import json
import os
import runpy
import sys

import pytest
from conftest import ROOT

import prepare
from data import QUESTION_LABEL, QUESTION_REASONING, DataError, read_manifest


def touch(*paths):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def write(path, text, encoding="utf-8"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding=encoding)
    return path


def manifest(tmp_path, *flags):
    """prepare.py with these flags (--root is tmp_path/set) -> examples, as read back."""
    out = tmp_path / "manifests" / "out.json"
    prepare.main([flags[0], "--root", str(tmp_path / "set"), "--out", str(out), *flags[1:]])
    return read_manifest(out)


def labels(examples):
    """{file name: answer}"""
    return {example.video.name: example.answer for example in examples}


def refusal(tmp_path, *flags):
    with pytest.raises(DataError) as error:
        manifest(tmp_path, *flags)
    assert not (tmp_path / "manifests" / "out.json").exists()
    return str(error.value)


# ------------------------------------------------------------------------------------------------
# dfew


@pytest.fixture
def dfew(tmp_path):
    """Seven clips, one of each label, half with zeros in front; fold 2 for testing: the last."""
    split = tmp_path / "set" / "EmoLabel_DataSplit"
    lines = "".join(f"{n},{n}\n" for n in range(1, 8))
    write(split / "train(single-labeled)" / "set_1.csv", f"video_name,label\n{lines}")
    table = "video_name,label\r\n00007,7\r\n"
    write(split / "test(single-labeled)" / "set_2.csv", table, "utf-8-sig")
    clips = tmp_path / "set" / "Clip" / "original"
    touch(*(clips / f"{n}.mp4" for n in (1, 2, 3)), *(clips / f"{n:05d}.mp4" for n in (4, 5, 6, 7)))
    return tmp_path


def test_dfew_labels_and_both_spellings_of_clips(dfew, capsys):
    examples = manifest(dfew, "dfew", "--split", "train")
    assert labels(examples) == {
        "1.mp4": "happy",
        "2.mp4": "sad",
        "3.mp4": "neutral",
        "00004.mp4": "angry",
        "00005.mp4": "surprise",
        "00006.mp4": "disgust",
        "00007.mp4": "fear",
    }
    assert {(e.question, e.modality) for e in examples} == {(QUESTION_REASONING, "video_audio")}
    printed = capsys.readouterr().out.splitlines()
    assert [line.split() for line in printed[:2]] == [["angry", "1"], ["disgust", "1"]]
    assert printed[-1].split()[:4] == ["all", "7", "0", "missing"]


def test_dfew_split_and_fold_choose_the_list(dfew):
    assert labels(manifest(dfew, "dfew", "--split", "test", "--fold", "2")) == {"00007.mp4": "fear"}
    (dfew / "manifests" / "out.json").unlink()
    message = refusal(dfew, "dfew", "--split", "test")
    assert "test(single-labeled)/set_1.csv: no such file" in message


def test_label_question(dfew):
    examples = manifest(dfew, "dfew", "--split", "train", "--question", "label")
    assert {e.question for e in examples} == {QUESTION_LABEL} and examples[0].answer == "happy"


def test_missing_clips_are_an_error_or_left_out(dfew, capsys):
    for clip in (dfew / "set" / "Clip" / "original").glob("*[12345].mp4"):
        clip.unlink()
    message = refusal(dfew, "dfew", "--split", "train")
    assert message.startswith("5 of 7 clips are missing") and "--skip-missing" in message
    assert message.count(".mp4") == 3 and "00001.mp4, " in message and ", ...;" in message

    examples = manifest(dfew, "dfew", "--split", "train", "--skip-missing")
    assert list(labels(examples)) == ["00006.mp4", "00007.mp4"]
    printed = capsys.readouterr().out
    missing = [line[-9:] for line in printed.splitlines() if line.startswith("missing")]
    assert missing == [f"{n:05d}.mp4" for n in (1, 2, 3, 4, 5)]
    assert printed.splitlines()[-1].split()[:4] == ["all", "2", "5", "missing"]
    assert "happy" not in printed


def test_nothing_left_is_an_error(dfew):
    for clip in (dfew / "set" / "Clip" / "original").iterdir():
        clip.unlink()
    message = refusal(dfew, "dfew", "--split", "train", "--skip-missing")
    assert "7 clips are listed for dfew, none" in message


@pytest.mark.parametrize(
    "text, expected",
    [
        ("video_name,label\n1,1\n2,8\n", "set_1.csv: line 3: unknown label '8'; known are 1, 2,"),
        ("video_name,label\n1\n", "set_1.csv: line 2: should have 2 fields"),
        ("video_name,label\n1,1,1\n", "set_1.csv: line 2: should have 2 fields"),
        (
            "video_name,label\nface.mp4,1\n",
            "set_1.csv: line 2: video_name 'face.mp4' should be a whole number",
        ),
        (
            'video_name,label\n1,"1\n2,2\n',
            "set_1.csv: line 2: unexpected end of data; is a quote missing",
        ),
        (
            "order,label\n1,1\n",
            "set_1.csv: line 1: columns are order,label, should be video_name,label",
        ),
        ("", "set_1.csv: line 1: columns are missing"),
    ],
)
def test_malformed_csv(dfew, text, expected):
    write(dfew / "set" / "EmoLabel_DataSplit" / "train(single-labeled)" / "set_1.csv", text)
    assert expected in refusal(dfew, "dfew", "--split", "train")


# ------------------------------------------------------------------------------------------------
# mafw


@pytest.fixture
def mafw(tmp_path):
    words = [
        "anger",
        "disgust",
        "fear",
        "happiness",
        "neutral",
        "sadness",
        "surprise",
        "contempt",
        "anxiety",
        "helplessness",
        "disappointment",
    ]
    lists = tmp_path / "set" / "Train & Test Set" / "single" / "no_caption" / "set_1"
    write(lists / "train.txt", "".join(f"{n:05d}.mp4 {word}\n" for n, word in enumerate(words)))
    write(lists / "test.txt", "00003.mp4 happiness\n\n")
    touch(*(tmp_path / "set" / "data" / "clips" / f"{n:05d}.mp4" for n in range(len(words))))
    return tmp_path


def test_mafw_maps_all_label_words(mafw):
    examples = manifest(mafw, "mafw", "--split", "train", "--fold", "1")
    assert [e.answer for e in examples] == [
        "angry",
        "disgust",
        "fear",
        "happy",
        "neutral",
        "sad",
        "surprise",
        "contemptuous",
        "anxious",
        "helpless",
        "disappointed",
    ]
    assert [e.video.name for e in examples] == [f"{n:05d}.mp4" for n in range(11)]
    (mafw / "manifests" / "out.json").unlink()
    assert labels(manifest(mafw, "mafw", "--split", "test")) == {"00003.mp4": "happy"}


@pytest.mark.parametrize(
    "line, expected",
    [
        ("00001.mp4 joy", "train.txt: line 2: unknown label 'joy'; known are anger,"),
        ("00001.mp4", "train.txt: line 2: should be like \"00025.mp4 anger\", is '00001.mp4'"),
        ("00001.mp4 anger fear", "train.txt: line 2: should be like"),
    ],
)
def test_malformed_list(mafw, line, expected):
    lists = mafw / "set" / "Train & Test Set" / "single" / "no_caption" / "set_1"
    write(lists / "train.txt", f"00000.mp4 anger\n{line}\n")
    assert expected in refusal(mafw, "mafw", "--split", "train")


@pytest.mark.parametrize("name", ["dfew", "mafw"])
@pytest.mark.parametrize("fold", ["0", "6"])
def test_wrong_fold(tmp_path, name, fold):
    (tmp_path / "set").mkdir()
    message = refusal(tmp_path, name, "--split", "train", "--fold", fold)
    assert message == f"--fold {fold}: there are folds 1 to 5"


@pytest.mark.parametrize("name", ["dfew", "mafw"])
def test_there_is_no_dev_split(tmp_path, name):
    (tmp_path / "set").mkdir()
    message = refusal(tmp_path, name, "--split", "dev")
    assert message == "--split dev: there are train and test"


# ------------------------------------------------------------------------------------------------
# ravdess


@pytest.fixture
def ravdess(tmp_path):
    """Actors 1, 2, 3 and 24: a clip per emotion with sound and picture, and other kinds.

    Kinds: speech; without sound; without picture; song. Beside them files that are no clips.
    """
    for actor in (1, 2, 3, 24):
        folder = tmp_path / "set" / f"Actor_{actor:02d}"
        for kind in ("01-01", "02-01", "03-01", "01-02"):
            for emotion in range(1, 9):
                touch(folder / f"{kind}-{emotion:02d}-01-01-01-{actor:02d}.mp4")
        touch(folder / f"._01-01-01-01-01-01-{actor:02d}.mp4")
        touch(folder / f"03-01-01-01-01-01-{actor:02d}.wav")
    return tmp_path


def test_ravdess_takes_speech_with_sound_and_picture(ravdess, capsys):
    examples = manifest(ravdess, "ravdess", "--actors", "2")
    words = ["neutral", "calm", "happy", "sad", "angry", "fear", "disgust", "surprise"]
    expected = {f"01-01-{n:02d}-01-01-01-02.mp4": word for n, word in enumerate(words, start=1)}
    assert labels(examples) == expected
    printed = capsys.readouterr().out
    assert "Actor_02 holds 8 speech clips with sound, the published one 60" in printed


@pytest.mark.parametrize(
    "flags, expected",
    [
        ((), [1, 2, 3, 24]),
        (("--actors", "1-3"), [1, 2, 3]),
        (("--actors", "24,1"), [1, 24]),
        (("--actors", "2-3,24"), [2, 3, 24]),
        (("--actors", "1", "3"), [1, 3]),
    ],
)
def test_ravdess_actors(ravdess, flags, expected):
    examples = manifest(ravdess, "ravdess", *flags)
    assert len(examples) == 8 * len(expected)
    folders = [e.video.parent.name for e in examples[::8]]
    assert folders == [f"Actor_{actor:02d}" for actor in expected]


def test_ravdess_refuses_actors_that_are_not_there(ravdess):
    for actors in ("0", "25", "3-1", "1-25", "x", "1-", ""):
        message = refusal(ravdess, "ravdess", "--actors", actors)
        assert f"--actors {actors}: " in message
        assert "from 1 to 24, such as 1-20 or 21,22,24" in message
    assert "has no clips of actor 4;" in refusal(ravdess, "ravdess", "--actors", "1-4")


@pytest.mark.parametrize(
    "name, expected",
    [
        ("01-01-09-01-01-01-01.mp4", "unknown label '09'"),
        ("01-01-01.mp4", "seven two-digit numbers"),
        ("01-01-01-01-01-01-02.mp4", "seven two-digit numbers, the last of them 01"),
    ],
)
def test_ravdess_refuses_other_names(ravdess, name, expected):
    touch(ravdess / "set" / "Actor_01" / name)
    message = refusal(ravdess, "ravdess", "--actors", "1")
    assert f"Actor_01/{name}: " in message and expected in message


def test_ravdess_in_the_wrong_folder(tmp_path):
    (tmp_path / "set").mkdir()
    assert "holds no folder Actor_01" in refusal(tmp_path, "ravdess")


# ------------------------------------------------------------------------------------------------
# emer

FIRST = """names,emotions,subtitles,reasons
sample_1,angry,Go.,"In the video, he said ""go"". He is happy elsewhere."
sample_2,"['Worried', 'dissatisfied']",,She frowns.
sample_3,"happy, grateful",Thanks.,She smiles.
"""
SECOND = """{},chinese,english
sample_1,他笑。,He looks sad at first. Therefore he feels joyful.
sample_2,她生气。,"Her voice is calm, full of Anger."
sample_3,他说话。,He says that the unhappyish weather is neutral.
sample_4,她害怕。,She fears nothing; her disappointment shows
"""


@pytest.fixture
def emer(tmp_path):
    names = ["sample_1.mp4", "sample_2.avi", "sample_3.avi", "sample_4.avi"]
    touch(*(tmp_path / "set" / name for name in names))
    return tmp_path


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_emer_first_version(emer, encoding):
    write(emer / "set" / "gt.csv", FIRST, encoding)
    examples = manifest(emer, "emer")
    assert labels(examples) == {
        "sample_1.mp4": '<think>In the video, he said "go". He is happy elsewhere.</think>\n'
        "<answer>angry</answer>",
        "sample_2.avi": "<think>She frowns.</think>\n<answer>worried</answer>",
        "sample_3.avi": "<think>She smiles.</think>\n<answer>happy</answer>",
    }
    assert {e.question for e in examples} == {QUESTION_REASONING}
    (emer / "manifests" / "out.json").unlink()
    answers = [e.answer for e in manifest(emer, "emer", "--question", "label")]
    assert answers == ["angry", "worried", "happy"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("column", ["name", "names"])
def test_emer_second_version(emer, column, encoding, capsys):
    write(emer / "set" / "gt.csv", SECOND.format(column), encoding)
    assert labels(manifest(emer, "emer")) == {
        "sample_1.mp4": "<think>He looks sad at first. Therefore he feels joyful.</think>\n"
        "<answer>happy</answer>",
        "sample_2.avi": "<think>Her voice is calm, full of Anger.</think>\n<answer>angry</answer>",
        "sample_4.avi": "<think>She fears nothing; her disappointment shows</think>\n"
        "<answer>disappointed</answer>",
    }
    printed = capsys.readouterr().out
    assert "1 of 4 entries left out" in printed and "sample_3" in printed
    assert printed.splitlines()[-1].split()[:2] == ["all", "3"]


def test_emer_without_word_or_text_is_left_out(emer, capsys):
    rows = "sample_1,[],,He.\nsample_2,sad,, \nsample_3,sad,,She.\n"
    write(emer / "set" / "gt.csv", f"names,emotions,subtitles,reasons\n{rows}")
    assert list(labels(manifest(emer, "emer"))) == ["sample_3.avi"]
    left_out = "2 of 3 entries left out, without a text or a clear emotion: sample_1, sample_2\n"
    assert left_out in capsys.readouterr().out


def test_emer_csv_and_clips_elsewhere(emer):
    table = write(emer / "texts" / "eng.csv", FIRST)
    (emer / "set").rename(emer / "clips")
    (emer / "set").mkdir()
    flags = "emer", "--csv", str(table)
    message = refusal(emer, *flags)
    assert message.startswith("3 of 3 clips are missing")
    assert "--videos" in message and "sample_1.mp4" in message
    examples = manifest(emer, *flags, "--videos", str(emer / "clips"))
    assert examples[0].video.resolve() == emer.resolve() / "clips" / "sample_1.mp4"
    assert len(examples) == 3


def test_emer_refusals(emer):
    assert "holds 0 csv files; say which one with --csv" in refusal(emer, "emer")
    assert "none.csv: no such file" in refusal(emer, "emer", "--csv", "none.csv")
    table = write(emer / "set" / "a.csv", "names,emotions,subtitles,reasons\n ,sad,,He.\n")
    assert "a.csv: line 2: the clip's name is empty" in refusal(emer, "emer")
    write(table, "names,emotions\nsample_1,sad\n")
    wanted = "names,emotions,reasons or name,english"
    expected = f"a.csv: line 1: columns are names,emotions, should be {wanted}"
    assert expected in refusal(emer, "emer")
    write(table, "names,emotions,subtitles,reasons\nsample_1,sad,,So <answer>sad</answer>\n")
    assert "sample_1.mp4: its text has <think> or <answer> tags" in refusal(emer, "emer")
    table.write_bytes("names,emotions,reasons\nsample_1,verärgert,.\n".encode("latin-1"))
    assert "a.csv: is not text in UTF-8" in refusal(emer, "emer")
    write(emer / "set" / "b.csv", FIRST)
    assert "holds 2 csv files" in refusal(emer, "emer")


# ------------------------------------------------------------------------------------------------
# cremad


@pytest.fixture
def cremad(tmp_path):
    """Actors 1001, 1064 and 1091: a clip per emotion; the last also one that is known to be broken.

    Beside them files that are no clips.
    """
    folder = tmp_path / "set" / "VideoFlash"
    for actor in (1001, 1064, 1091):
        for emotion in ("ANG", "DIS", "FEA", "HAP", "NEU", "SAD"):
            touch(folder / f"{actor}_IEO_{emotion}_XX.flv")
        touch(folder / f"._{actor}_IEO_ANG_XX.flv", folder / f"{actor}_IEO_ANG_XX.wav")
    touch(folder / "1064_IEO_DIS_MD.flv", folder / "1064_TIE_SAD_XX.flv")
    return tmp_path


def test_cremad_labels_are_in_the_names(cremad, capsys):
    assert labels(manifest(cremad, "cremad", "--actors", "1001")) == {
        "1001_IEO_ANG_XX.flv": "angry",
        "1001_IEO_DIS_XX.flv": "disgust",
        "1001_IEO_FEA_XX.flv": "fear",
        "1001_IEO_HAP_XX.flv": "happy",
        "1001_IEO_NEU_XX.flv": "neutral",
        "1001_IEO_SAD_XX.flv": "sad",
    }
    printed = capsys.readouterr().out
    assert "VideoFlash holds 20 clips, the published one 7442" in printed
    assert "broken" not in printed


def test_cremad_leaves_out_what_is_known_to_be_broken(cremad, capsys):
    names = set(labels(manifest(cremad, "cremad")))
    assert len(names) == 18
    assert not names & {"1064_IEO_DIS_MD.flv", "1064_TIE_SAD_XX.flv"}
    printed = capsys.readouterr().out
    assert printed.count("known to be broken, left out: ") == 2
    assert "VideoFlash/1064_IEO_DIS_MD.flv (one minute, with all emotions)\n" in printed
    assert "VideoFlash/1064_TIE_SAD_XX.flv (has no duration)\n" in printed
    assert printed.splitlines()[-1].split()[:4] == ["all", "18", "0", "missing"]


@pytest.mark.parametrize(
    "flags, expected",
    [
        (("--actors", "1064,1091"), {"1064", "1091"}),
        (("--actors", "1001", "1064"), {"1001", "1064"}),
        (("--actors", "1091-1091"), {"1091"}),
        ((), {"1001", "1064", "1091"}),
    ],
)
def test_cremad_actors(cremad, flags, expected):
    assert {name[:4] for name in labels(manifest(cremad, "cremad", *flags))} == expected


def test_cremad_refuses_actors_that_are_not_there(cremad):
    for actors in ("1", "1000-1001", "1091-1092", "1064-1001", "x"):
        message = refusal(cremad, "cremad", "--actors", actors)
        assert f"--actors {actors}: " in message
        assert "from 1001 to 1091, such as 1001-1020 or 1021,1022,1091" in message
    message = refusal(cremad, "cremad", "--actors", "1001-1002")
    assert "has no clips of actor 1002;" in message and "--actors" in message


@pytest.mark.parametrize(
    "name, expected",
    [
        ("1001_IEO_SUR_XX.flv", "unknown label 'SUR'; known are ANG, DIS,"),
        ("1001_IEO_ANG.flv", "name should be like 1001_DFA_ANG_XX.flv"),
        ("holiday.flv", "name should be like 1001_DFA_ANG_XX.flv"),
    ],
)
def test_cremad_refuses_other_names(cremad, name, expected):
    touch(cremad / "set" / "VideoFlash" / name)
    message = refusal(cremad, "cremad")
    assert f"VideoFlash/{name}: " in message and expected in message


def test_cremad_in_the_wrong_folder(tmp_path):
    (tmp_path / "set").mkdir()
    assert "VideoFlash: holds no 1001_DFA_ANG_XX.flv or the like" in refusal(tmp_path, "cremad")


# ------------------------------------------------------------------------------------------------
# meld

MELD_HEADER = (
    "Sr No.,Utterance,Speaker,Emotion,Sentiment,Dialogue_ID,Utterance_ID,Season,Episode,"
    "StartTime,EndTime\n"
)


def meld_row(emotion, dialogue, utterance):
    """A line as it is published, with commas in quotes."""
    return (
        f'1,"Well, no.",Ross,{emotion},x,{dialogue},{utterance},3,9,"0:04:42,198","0:04:42,824"\n'
    )


@pytest.fixture
def meld(tmp_path):
    """train: an utterance per emotion, and the broken clip; dev: one that is missing; test: two,
    one of the same name as the broken one, with another file of its name beside it."""
    root = tmp_path / "set"
    emotions = ["anger", "disgust", "fear", "joy", "neutral", "sadness", "surprise"]
    rows = [meld_row(emotion, 0, n) for n, emotion in enumerate(emotions)]
    rows.append(meld_row("neutral", 125, 3))
    write(root / "train_sent_emo.csv", MELD_HEADER + "".join(rows))
    touch(*(root / "train_splits" / f"dia0_utt{n}.mp4" for n in range(7)))
    touch(root / "train_splits" / "dia125_utt3.mp4")

    rows = [meld_row("neutral", 110, 7), meld_row("fear", 0, 0)]
    write(root / "dev_sent_emo.csv", MELD_HEADER + "".join(rows))
    touch(root / "dev_splits_complete" / "dia0_utt0.mp4")

    rows = [meld_row("joy", 93, 5), meld_row("anger", 125, 3)]
    write(root / "test_sent_emo.csv", MELD_HEADER + "".join(rows))
    test = root / "output_repeated_splits_test"
    touch(test / "dia93_utt5.mp4", test / "._dia93_utt5.mp4", test / "dia125_utt3.mp4")
    touch(test / "final_videos_testdia93_utt5.mp4", test / "._final_videos_testdia93_utt5.mp4")
    return tmp_path


def test_meld_maps_all_labels_and_leaves_out_the_broken_clip(meld, capsys):
    assert labels(manifest(meld, "meld", "--split", "train")) == {
        "dia0_utt0.mp4": "angry",
        "dia0_utt1.mp4": "disgust",
        "dia0_utt2.mp4": "fear",
        "dia0_utt3.mp4": "happy",
        "dia0_utt4.mp4": "neutral",
        "dia0_utt5.mp4": "sad",
        "dia0_utt6.mp4": "surprise",
    }
    printed = capsys.readouterr().out
    assert "train_splits/dia125_utt3.mp4 (cannot be opened)\n" in printed
    assert "final_videos_test" not in printed


def test_meld_broken_clip_may_have_been_removed(meld):
    (meld / "set" / "train_splits" / "dia125_utt3.mp4").unlink()
    assert len(manifest(meld, "meld", "--split", "train")) == 7


def test_meld_missing_clip_of_dev(meld):
    message = refusal(meld, "meld", "--split", "dev")
    assert message.startswith("1 of 2 clips are missing: ") and "dia110_utt7.mp4; mend" in message
    examples = manifest(meld, "meld", "--split", "dev", "--skip-missing")
    assert labels(examples) == {"dia0_utt0.mp4": "fear"}


def test_meld_test_takes_the_clips_named_as_the_others(meld, capsys):
    examples = manifest(meld, "meld", "--split", "test")
    assert labels(examples) == {"dia93_utt5.mp4": "happy", "dia125_utt3.mp4": "angry"}
    printed = capsys.readouterr().out
    assert "holds 1 clips final_videos_test*.mp4, which are not used" in printed
    assert "broken" not in printed


@pytest.mark.parametrize(
    "text, expected",
    [
        (
            MELD_HEADER + meld_row("calm", 0, 0),
            "dev_sent_emo.csv: line 2: unknown label 'calm'; known are anger,",
        ),
        (
            MELD_HEADER + meld_row("joy", "0x", 0),
            "dev_sent_emo.csv: line 2: Dialogue_ID '0x' should be a whole number",
        ),
        (
            MELD_HEADER + meld_row("joy", 0, ""),
            "dev_sent_emo.csv: line 2: Utterance_ID '' should be a whole number",
        ),
        (
            "Utterance,Emotion\nNo.,joy\n",
            "columns are Utterance,Emotion, should be Emotion,Dialogue_ID,Utterance_ID",
        ),
    ],
)
def test_meld_malformed(meld, text, expected):
    write(meld / "set" / "dev_sent_emo.csv", text)
    assert expected in refusal(meld, "meld", "--split", "dev")


def test_meld_clip_with_two_labels(meld):
    rows = meld_row("joy", 0, 0) + meld_row("fear", 1, 0) + meld_row("anger", 0, 0)
    write(meld / "set" / "dev_sent_emo.csv", MELD_HEADER + rows)
    # Also of missing clips: which label is right has to be settled before they are unpacked.
    message = refusal(meld, "meld", "--split", "dev", "--skip-missing")
    assert "dev_splits_complete/dia0_utt0.mp4: is listed as happy and as angry;" in message


def test_meld_without_its_table(meld):
    (meld / "set" / "test_sent_emo.csv").unlink()
    assert "set/test_sent_emo.csv: no such file" in refusal(meld, "meld", "--split", "test")


# ------------------------------------------------------------------------------------------------
# mer


@pytest.fixture
def mer(tmp_path):
    folder = tmp_path / "set" / "video"
    touch(*(folder / f"sample_{n}.mp4" for n in range(6)), folder / "sample_6.avi")
    return tmp_path


def test_mer_discrete_labels_are_the_answers(mer, capsys):
    words = ["neutral", "angry", "happy", "sad", "worried", "surprise"]
    rows = "".join(f"sample_{n},{word},-0.5\n" for n, word in enumerate(words))
    write(mer / "set" / "track1_train_disdim.csv", f"name,discrete,valence\n{rows}sample_6,,1\n")
    expected = {f"sample_{n}.mp4": word for n, word in enumerate(words)}
    examples = manifest(mer, "mer")
    assert labels(examples) == expected
    assert {(e.question, e.modality) for e in examples} == {(QUESTION_REASONING, "video_audio")}
    printed = capsys.readouterr().out
    assert "1 of 7 entries left out, without a text or a clear emotion: sample_6\n" in printed


def test_mer_open_words_have_to_agree(mer, capsys):
    """All three ways in which published files write a list."""
    table = """name,openset
sample_0,"['excited', 'joyful', 'Happy']"
sample_1,"[concern, worry]"
sample_2,"shocked,serious,angry"
sample_3,"['happy', 'sad']"
sample_4,"['suspect', 'unhappy']"
sample_5,['neutral']
sample_6,[]
"""
    write(mer / "set" / "track2_train_human.csv", table)
    assert labels(manifest(mer, "mer")) == {
        "sample_0.mp4": "happy",
        "sample_1.mp4": "worried",
        "sample_2.mp4": "angry",
        "sample_5.mp4": "neutral",
    }
    left_out = "3 of 7 entries left out, without a text or a clear emotion: sample_3, sample_4, "
    assert left_out in capsys.readouterr().out


def test_mer_csv_and_clips_elsewhere(mer):
    write(mer / "set" / "subtitle_chieng.csv", "name,chinese,english\nsample_0,,\n")
    table = write(mer / "set" / "track1_train.csv", "name,discrete\nsample_6,sad\n")
    assert "holds 2 csv files; say which one with --csv" in refusal(mer, "mer")
    flags = "mer", "--csv", str(table)
    assert labels(manifest(mer, *flags)) == {"sample_6.avi": "sad"}
    (mer / "set" / "video").rename(mer / "clips")
    (mer / "manifests" / "out.json").unlink()
    message = refusal(mer, *flags)
    assert "set/video/sample_6.mp4; mend --root or --videos" in message
    examples = manifest(mer, *flags, "--videos", str(mer / "clips"))
    assert labels(examples) == {"sample_6.avi": "sad"}


def test_a_clip_that_is_listed_twice(mer, capsys):
    table = write(mer / "set" / "track1.csv", "name,discrete\nsample_0,happy\nsample_0,sad\n")
    message = refusal(mer, "mer")
    assert message.endswith("sample_0.mp4: is listed as happy and as sad; take one of them out")
    # The same clip in another writing, and a row without a label, which contradicts none.
    write(table, "name,discrete\nsample_0,sad\nsample_1,sad\nsample_0.mp4,sad\nsample_0,\n")
    assert [e.video.name for e in manifest(mer, "mer")] == ["sample_0.mp4", "sample_1.mp4"]
    printed = capsys.readouterr().out
    assert "1 of 3 entries left out, equal to earlier ones\n" in printed
    assert printed.splitlines()[-1].split()[:2] == ["all", "2"]


def test_two_texts_of_a_clip_are_both_kept_if_they_agree(emer):
    rows = "sample_1,sad,,He.\nsample_1,sad,,Tears.\nsample_1,sad,,He.\n"
    table = write(emer / "set" / "gt.csv", f"names,emotions,subtitles,reasons\n{rows}")
    assert ["He." in e.answer for e in manifest(emer, "emer")] == [True, False]
    (emer / "manifests" / "out.json").unlink()
    write(table, f"names,emotions,subtitles,reasons\n{rows}sample_1,happy,,He.\n")
    assert "sample_1.mp4: is listed as sad and as happy;" in refusal(emer, "emer")


def test_files_that_macos_leaves_are_no_tables(mer):
    write(mer / "set" / "track1.csv", "name,discrete\nsample_0,happy\n")
    touch(mer / "set" / "._track1.csv")
    assert labels(manifest(mer, "mer")) == {"sample_0.mp4": "happy"}


@pytest.mark.parametrize(
    "text, expected",
    [
        ("name,discrete\nsample_0,joy\n", "line 2: unknown label 'joy'; known are neutral, angry,"),
        ("name,discrete\n,sad\n", "line 2: the clip's name is empty"),
        ("name\nsample_0\n", "columns are name, should be name,discrete or name,openset"),
    ],
)
def test_mer_malformed(mer, text, expected):
    write(mer / "set" / "track1.csv", text)
    message = refusal(mer, "mer")
    assert "track1.csv: " in message and expected in message


# ------------------------------------------------------------------------------------------------
# all of them


def test_flags_of_other_sets_are_refused_not_ignored(tmp_path):
    (tmp_path / "set").mkdir()
    message = refusal(tmp_path, "ravdess", "--split", "train")
    assert message == "ravdess has no --split; it takes --actors"
    message = refusal(tmp_path, "mafw", "--split", "test", "--actors", "1")
    assert message == "mafw has no --actors; it takes --split, --fold"
    assert refusal(tmp_path, "cremad", "--fold", "1") == "cremad has no --fold; it takes --actors"
    for name in ("dfew", "mafw"):
        assert refusal(tmp_path, name) == f"{name} needs --split: train or test"
    assert refusal(tmp_path, "meld") == "meld needs --split: train, dev or test"


def test_wrong_folders(mafw):
    flags = ["mafw", "--split", "test"]
    nowhere = "nowhere: no such folder; --root should be where mafw lies"
    with pytest.raises(DataError, match=nowhere):
        prepare.main([*flags, "--root", str(mafw / "nowhere"), "--out", str(mafw / "m.json")])
    with pytest.raises(DataError, match="is a folder; --out should be"):
        prepare.main([*flags, "--root", str(mafw / "set"), "--out", str(mafw)])


def test_out_does_not_replace_the_data_set(meld, cremad):
    meld_flags = ["meld", "--root", str(meld / "set"), "--split", "train"]
    cremad_flags = ["cremad", "--root", str(cremad / "set")]
    table = meld / "set" / "train_sent_emo.csv"
    clip = cremad / "set" / "VideoFlash" / "1001_IEO_ANG_XX.flv"
    for flags, out in [
        (meld_flags, table),
        (cremad_flags, clip),
        (cremad_flags, cremad / "new.jsonl"),
        (cremad_flags, cremad / "new"),
    ]:
        before = out.exists() and out.read_bytes()
        with pytest.raises(DataError, match=f"{out}: .* --out should end in .json"):
            prepare.main([*flags, "--out", str(out)])
        assert (out.exists() and out.read_bytes()) == before


@pytest.mark.parametrize("text", ["", "name,discrete", "{}", '[{"video": "a.mp4"}]', "[1]"])
def test_out_does_not_replace_other_files(mafw, monkeypatch, text):
    out = write(mafw / "manifests" / "out.json", text)
    # Found before any file of the data set is read.
    monkeypatch.setattr(prepare, "read_text", None)
    with pytest.raises(DataError, match="out.json: is not a manifest of prepare.py, .* --out"):
        manifest(mafw, "mafw", "--split", "test")
    assert out.read_text() == text


def test_out_does_not_replace_another_manifest(ravdess):
    everyone = manifest(ravdess, "ravdess")
    out = ravdess / "manifests" / "out.json"
    before = out.read_bytes()
    with pytest.raises(DataError, match="out.json: is another manifest; delete it or choose"):
        manifest(ravdess, "ravdess", "--actors", "1,2")
    assert out.read_bytes() == before
    # The same one again is no loss.
    assert manifest(ravdess, "ravdess", "--actors", "1-3,24") == everyone
    assert out.read_bytes() == before


def test_paths_are_relative_to_the_manifest_even_through_links(mafw, monkeypatch):
    """Both folders can be moved together; a link to the manifest's does not lead "../" astray."""
    (mafw / "deep" / "er").mkdir(parents=True)
    (mafw / "link").symlink_to(mafw / "deep" / "er", target_is_directory=True)
    monkeypatch.chdir(mafw)
    prepare.main(["mafw", "--root", "set", "--out", "link/m.json", "--split", "test"])
    entries = json.loads((mafw / "deep" / "er" / "m.json").read_text())
    assert [entry["video"] for entry in entries] == ["../../set/data/clips/00003.mp4"]
    assert read_manifest("link/m.json")[0].video.is_file()


def test_a_failed_write_leaves_the_old_manifest(mafw, monkeypatch):
    manifest(mafw, "mafw", "--split", "test")

    def fail(*_):
        raise OSError(errno.ENOSPC, "disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full: .*out.json'"):
        manifest(mafw, "mafw", "--split", "test")
    assert len(read_manifest(mafw / "manifests" / "out.json")) == 1


def test_adding_a_set_is_one_function(tmp_path, monkeypatch):
    def mine(root, fold):
        yield root / "a.mp4", "calm"
        yield root / "b.mp4", (f"It lies in fold {fold}.", "calm")

    touch(tmp_path / "set" / "a.mp4", tmp_path / "set" / "b.mp4")
    monkeypatch.setitem(prepare.SETS, "mine", mine)
    assert refusal(tmp_path, "mine") == "mine needs --fold"
    answers = [e.answer for e in manifest(tmp_path, "mine", "--fold", "9")]
    assert answers == ["calm", "<think>It lies in fold 9.</think>\n<answer>calm</answer>"]


def test_script_prints_one_line_and_exits_with_2(tmp_path, monkeypatch, capsys):
    flags = ["mafw", "--root", str(tmp_path), "--split", "train", "--out", "m.json"]
    monkeypatch.setattr(sys, "argv", ["prepare.py", *flags])
    # In this process: a new one would only import torch again.
    with pytest.raises(SystemExit) as exit:
        runpy.run_path(str(ROOT / "prepare.py"), run_name="__main__")
    error = capsys.readouterr().err
    assert exit.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
    assert "Train & Test Set/single/no_caption/set_1/train.txt: no such file" in error


def test_run_lines_of_the_manual_are_valid():
    lines = [line for line in prepare.__doc__.splitlines() if line.startswith("    python ")]
    assert len(lines) == len(prepare.SETS)
    for line in lines:
        _, script, *flags = line.split()
        args, given = prepare.parse_args(flags)
        assert script == "prepare.py"
        assert given.keys() <= inspect.signature(prepare.SETS[args.set]).parameters.keys()
