"""Write a manifest, the JSON list that the other scripts read, for a data set as it is delivered.

    python prepare.py dfew    --root DFEW --split train --fold 1 --out dfew_train.json
    python prepare.py mafw    --root MAFW --split test  --fold 1 --out mafw_test.json
    python prepare.py ravdess --root RAVDESS --actors 21-24 --out ravdess.json
    python prepare.py emer    --root EMER --csv gt-eng.csv --videos MER2023/video --out emer.json
    python prepare.py cremad  --root CREMA-D --actors 1001-1070 --out cremad_train.json
    python prepare.py meld    --root MELD.Raw --split test --out meld_test.json
    python prepare.py mer     --root MER2026 --csv MER2026/track1_train.csv --out mer.json

What is expected in --root:

    dfew       Clip/original/1.mp4 or 00001.mp4, ...
               EmoLabel_DataSplit/train(single-labeled)/set_1.csv with columns video_name,label;
               also test, folds 1-5
    mafw       data/clips/00025.mp4, ...
               Train & Test Set/single/no_caption/set_1/train.txt with lines "00025.mp4 anger";
               also test, folds 1-5
    ravdess    Actor_01/01-01-03-01-01-01-01.mp4, ...; of these, speech that has both sound and
               picture. There is no official split: choose actors with --actors, other ones for
               testing than for training
    emer       one csv file, or several and --csv. First version: names,emotions,subtitles,reasons,
               where the first emotion is the answer. Second: name,chinese,english, where the
               answer is the last emotion word of the English text (EMOTION_WORDS below; 265 of
               the 332 published texts have one). Texts without an answer are counted and left
               out. Clips are name.mp4 or .avi, ... in --videos, or else in --root.
    cremad     VideoFlash/1001_DFA_ANG_XX.flv, ...; actors 1001 to 1091, chosen as for ravdess
    meld       train_sent_emo.csv with columns Emotion,Dialogue_ID,Utterance_ID and others;
               train_splits/dia0_utt0.mp4, ... Also dev_sent_emo.csv with dev_splits_complete/,
               and test_sent_emo.csv with output_repeated_splits_test/
    mer        MER2025 or MER2026: one csv file, or several and --csv, with columns name,discrete;
               or name,openset, words of which the emotion words have to agree on one label:
               other rows are counted and left out. Clips are name.mp4 or .avi, ... in --videos,
               or else in video/

emer has reasoning to imitate: <think>text</think> and <answer>word</answer> (--question label: the
word alone). The others have labels only: a prompt that asks for reasoning, and the label to reward
(--question label: the prompt for models that only name the emotion).

Paths in the manifest are relative to the manifest's own folder, so the other scripts need no
--media-root; keep it where it was written. A clip that is listed but not there is an error, or left
out with --skip-missing. Whether a clip can be decoded is not looked at: 21 clips of mafw have no
sound. Five clips of cremad and meld that are known to be broken (BROKEN below) are left out. A clip
that is listed with two labels is an error; equal entries are counted and written once.

--out has to end in .json. A file that is already there is refused, unless it is the same manifest.

To add a data set, write one function that yields (clip, label) or (clip, (reasoning, word)), and
name it in SETS; its parameters after root are the flags it takes, required if without a default.
"""

import argparse
import inspect
import io
import os
import re
from collections import Counter
from csv import DictReader
from csv import Error as CsvError
from pathlib import Path

from data import QUESTION_LABEL, QUESTION_REASONING
from rewards import format_reward, normalise
from support.errors import DataError, is_file, read_json, read_text, require, write_json
from support.flags import run_script

DFEW_LABELS = {
    "1": "happy",
    "2": "sad",
    "3": "neutral",
    "4": "angry",
    "5": "surprise",
    "6": "disgust",
    "7": "fear",
}
MAFW_LABELS = {
    "anger": "angry",
    "disgust": "disgust",
    "fear": "fear",
    "happiness": "happy",
    "neutral": "neutral",
    "sadness": "sad",
    "surprise": "surprise",
    "contempt": "contemptuous",
    "anxiety": "anxious",
    "helplessness": "helpless",
    "disappointment": "disappointed",
}
RAVDESS_LABELS = {
    "01": "neutral",
    "02": "calm",
    "03": "happy",
    "04": "sad",
    "05": "angry",
    "06": "fear",
    "07": "disgust",
    "08": "surprise",
}
CREMAD_LABELS = {
    "ANG": "angry",
    "DIS": "disgust",
    "FEA": "fear",
    "HAP": "happy",
    "NEU": "neutral",
    "SAD": "sad",
}
MELD_LABELS = {
    "anger": "angry",
    "disgust": "disgust",
    "fear": "fear",
    "joy": "happy",
    "neutral": "neutral",
    "sadness": "sad",
    "surprise": "surprise",
}
MER_LABELS = {word: word for word in ("neutral", "angry", "happy", "sad", "worried", "surprise")}
RAVDESS_ACTORS, CREMAD_ACTORS = range(1, 24 + 1), range(1001, 1091 + 1)
MELD_FOLDERS = {
    "train": "train_splits",
    "dev": "dev_splits_complete",
    "test": "output_repeated_splits_test",
}
SPLITS = {"dfew": "train or test", "mafw": "train or test", "meld": "train, dev or test"}
# Published, but not what their names say: CREMA-D's README lists four, MELD's issue 39 the last.
BROKEN = {
    "VideoFlash/1064_IEO_DIS_MD.flv": "one minute, with all emotions",
    "VideoFlash/1064_TIE_SAD_XX.flv": "has no duration",
    "VideoFlash/1076_MTI_NEU_XX.flv": "very short, no sound",
    "VideoFlash/1076_MTI_SAD_XX.flv": "very short, no sound, an error as its picture",
    "train_splits/dia125_utt3.mp4": "cannot be opened",
}
# The label words of the sets above. Not calm and neutral, which mostly describe voices and faces.
EMOTION_WORDS = {
    "happy": "happy happily happiness joy joyful",
    "sad": "sad sadly sadness sorrow sorrowful",
    "angry": "angry angrily anger",
    "surprise": "surprise surprised",
    "disgust": "disgust disgusted",
    "fear": "fear fearful afraid",
    "worried": "worried worry worries",
    "anxious": "anxious anxiety",
    "contemptuous": "contemptuous contempt",
    "helpless": "helpless helplessness",
    "disappointed": "disappointed disappointment",
}
LABEL_OF = {form: label for label, forms in EMOTION_WORDS.items() for form in forms.split()}
EMER_COLUMNS = [("names", "emotions", "reasons"), ("name", "english"), ("names", "english")]
MER_COLUMNS = [("name", "discrete"), ("name", "openset")]
VIDEO_ENDINGS = [".mp4", ".avi", ".mkv", ".webm", ".flv"]

# ------------------------------------------------------------------------------------------------
# Reading, shared by the data sets


def read_table(path):
    """A file's text."""
    require(is_file(path), f"{path}: no such file (--help shows what is expected in --root)")
    return read_text(path)


def read_csv(path, layouts):
    """Yield ("file: line n", row as a dict) of a csv file.

    layouts: tuples of column names; the header has to hold all of one of them.
    """
    # strict: a forgotten quote would otherwise swallow the rest of the file into one field.
    text = io.StringIO(read_table(path), newline="")
    reader = DictReader(text, skipinitialspace=True, strict=True)
    try:
        header = reader.fieldnames or []
        if not any(set(layout) <= set(header) for layout in layouts):
            found = ",".join(header) or "missing"
            wanted = " or ".join(",".join(layout) for layout in layouts)
            raise DataError(f"{path}: line 1: columns are {found}, should be {wanted}")
        for row in reader:
            where = f"{path}: line {reader.line_num}"
            # What DictReader makes of fields too many or too few.
            if None in row or None in row.values():
                columns = ",".join(header)
                raise DataError(f"{where}: should have {len(header)} fields: {columns}")
            yield where, row
    except CsvError as error:
        # In the entry that begins after the last good one.
        raise DataError(
            f"{path}: line {reader.line_num + 1}: {error}; is a quote missing or not doubled?"
        ) from error


def label_of(code, labels, where):
    if code not in labels:
        raise DataError(f"{where}: unknown label {code!r}; known are {', '.join(labels)}")
    return labels[code]


def number_in(row, column, where):
    text = row[column].strip()
    if not re.fullmatch("[0-9]{1,9}", text):
        raise DataError(f"{where}: {column} {text!r} should be a whole number")
    return int(text)


def check_split(split, fold):
    if split not in ("train", "test"):
        raise DataError(f"--split {split}: there are train and test")
    if not 1 <= fold <= 5:
        raise DataError(f"--fold {fold}: there are folds 1 to 5")


def csv_file(root, csv):
    """The file that --csv names, or else the only one in root."""
    if csv is not None:
        return Path(csv)
    tables = files_in(root, ".csv")
    if len(tables) != 1:
        raise DataError(f"{root}: holds {len(tables)} csv files; say which one with --csv")
    return tables[0]


def first_existing(folder, names):
    """The first of these files that is there; if none is, the first: it is reported as missing."""
    paths = [folder / name for name in names]
    return next((path for path in paths if is_file(path)), paths[0])


def clip_named(name, folder, where):
    """The clip of this name, whatever its ending."""
    name = name.strip()
    if not name:
        raise DataError(f"{where}: the clip's name is empty")
    if Path(name).suffix in VIDEO_ENDINGS:
        return folder / name
    return first_existing(folder, [name + ending for ending in VIDEO_ENDINGS])


def files_in(folder, ending):
    """Its files of this ending, sorted by name. Not ._*, which macOS leaves in folders."""
    return sorted(folder.glob(f"[!.]*{ending}"))


def fields_of(clip, pattern, example):
    """The groups of a regular expression that the clip's name, without its ending, has to match."""
    match = re.fullmatch(pattern, clip.stem, re.ASCII)
    if not match:
        raise DataError(
            f"{clip}: name should be {example}; is it from this data set? If not, move it away"
        )
    return match.groups()


def chosen_actors(actors, known, present, root):
    """The numbers that --actors names, or else all that are present.

    known: a range, the data set's actors. Raises DataError for one that is not present."""
    if actors is None:
        return sorted(present)
    wanted = actor_numbers(",".join(actors), known)
    for actor in wanted:
        if actor not in present:
            raise DataError(
                f"{root}: has no clips of actor {actor}; unpack them, or leave it out of --actors"
            )
    return wanted


def actor_numbers(text, known):
    """Text such as "1-3,21" -> [1, 2, 3, 21]."""
    numbers = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*([0-9]{1,4})(?:-([0-9]{1,4}))?\s*", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
        if not known[0] <= first <= last <= known[-1]:
            raise DataError(
                f"--actors {text}: {part!r} is no actor or range from {known[0]} to {known[-1]}, "
                f"such as {known[0]}-{known[19]} or {known[20]},{known[21]},{known[-1]}"
            )
        numbers |= set(range(first, last + 1))
    return sorted(numbers)


# ------------------------------------------------------------------------------------------------
# One function per data set


def dfew(root, split, fold=1):
    check_split(split, fold)
    clips = root / "Clip" / "original"
    table = root / "EmoLabel_DataSplit" / f"{split}(single-labeled)" / f"set_{fold}.csv"
    for where, row in read_csv(table, [("video_name", "label")]):
        number = number_in(row, "video_name", where)
        clip = first_existing(clips, [f"{number:05d}.mp4", f"{number}.mp4"])
        yield clip, label_of(row["label"].strip(), DFEW_LABELS, where)


def mafw(root, split, fold=1):
    check_split(split, fold)
    path = root / "Train & Test Set" / "single" / "no_caption" / f"set_{fold}" / f"{split}.txt"
    for number, line in enumerate(read_table(path).splitlines(), start=1):
        where, words = f"{path}: line {number}", line.split()
        if not words:
            continue
        if len(words) != 2:
            raise DataError(f'{where}: should be like "00025.mp4 anger", is {line.strip()!r}')
        name, label = words
        yield root / "data" / "clips" / name, label_of(label, MAFW_LABELS, where)


def ravdess(root, actors=None):
    folders = {int(folder.name[-2:]): folder for folder in root.glob("Actor_[0-9][0-9]")}
    if not folders:
        raise DataError(f"{root}: holds no folder Actor_01 or the like; is --root right?")
    for actor in chosen_actors(actors, RAVDESS_ACTORS, folders, root):
        folder, found = folders[actor], 0
        # Modality, vocal channel, emotion; intensity, statement, repetition; actor.
        pattern = rf"(\d\d)-(\d\d)-(\d\d)-\d\d-\d\d-\d\d-{actor:02d}"
        example = f"seven two-digit numbers, the last of them {actor:02d}"
        for clip in files_in(folder, ".mp4"):
            modality, channel, emotion = fields_of(clip, pattern, example)
            # Sound and picture, not one of them; speech, not song.
            if modality == "01" and channel == "01":
                found += 1
                yield clip, label_of(emotion, RAVDESS_LABELS, clip)
        if found != 60:
            print(f"note: {folder} holds {found} speech clips with sound, the published one 60")


def cremad(root, actors=None):
    folder = root / "VideoFlash"
    clips = files_in(folder, ".flv")
    if not clips:
        raise DataError(f"{folder}: holds no 1001_DFA_ANG_XX.flv or the like; is --root right?")
    if len(clips) != 7442:
        print(f"note: {folder} holds {len(clips)} clips, the published one 7442")
    # Actor; sentence; emotion; level.
    pattern, example = r"(\d{4})_[A-Z]{3}_([A-Z]{3})_[A-Z]{2}", "like 1001_DFA_ANG_XX.flv"
    fields = [fields_of(clip, pattern, example) for clip in clips]
    present = {int(actor) for actor, _ in fields}
    wanted = chosen_actors(actors, CREMAD_ACTORS, present, root)
    for clip, (actor, emotion) in zip(clips, fields):
        if int(actor) in wanted:
            yield clip, label_of(emotion, CREMAD_LABELS, clip)


def meld(root, split):
    folder = root / MELD_FOLDERS[split]
    others = len(list(folder.glob("final_videos_test*.mp4")))
    if others:
        print(
            f"note: {folder} holds {others} clips final_videos_test*.mp4, which are not used; "
            "docs/data_sets.md says why"
        )
    table = root / f"{split}_sent_emo.csv"
    for where, row in read_csv(table, [("Emotion", "Dialogue_ID", "Utterance_ID")]):
        dialogue = number_in(row, "Dialogue_ID", where)
        utterance = number_in(row, "Utterance_ID", where)
        clip = folder / f"dia{dialogue}_utt{utterance}.mp4"
        yield clip, label_of(row["Emotion"].strip(), MELD_LABELS, where)


def emer(root, csv=None, videos=None):
    folder = Path(videos).resolve() if videos else root
    for where, row in read_csv(csv_file(root, csv), EMER_COLUMNS):
        clip = clip_named(row.get("names") or row.get("name") or "", folder, where)
        if "emotions" in row:
            yield clip, (row["reasons"].strip(), first_emotion(row["emotions"]))
        else:
            yield clip, (row["english"].strip(), last_emotion(row["english"]))


def first_emotion(text):
    """The first of a list of words, in plain writing or in Python's."""
    word = re.split("[,;，、]", text)[0]
    return normalise(word.strip(" []'\""))


def last_emotion(text):
    """The label of the last emotion word of an English text, as conclusions come last; or ""."""
    labels = emotions_in(text)
    return labels[-1] if labels else ""


def mer(root, csv=None, videos=None):
    folder = Path(videos).resolve() if videos else root / "video"
    for where, row in read_csv(csv_file(root, csv), MER_COLUMNS):
        clip = clip_named(row["name"], folder, where)
        if "discrete" in row:
            word = row["discrete"].strip()
            yield clip, word and label_of(word, MER_LABELS, where)
        else:
            yield clip, agreed_emotion(row["openset"])


def agreed_emotion(text):
    """The label of all emotion words of a list, in any writing; "" if they have none or several."""
    # What is named in a list is an emotion, unlike in a text: neutral too.
    labels = {*emotions_in(text), *re.findall("neutral", text.lower())}
    return labels.pop() if len(labels) == 1 else ""


def emotions_in(text):
    """The labels of an English text's emotion words, in its order."""
    words = re.findall("[a-z]+", text.lower())
    return [LABEL_OF[word] for word in words if word in LABEL_OF]


SETS = {reader.__name__: reader for reader in (dfew, mafw, ravdess, emer, cremad, meld, mer)}

# ------------------------------------------------------------------------------------------------
# Clips and their labels -> manifest


def few(names):
    return ", ".join(names[:3]) + (", ..." if names[3:] else "")


def answer_of(target):
    """The word of a target, which is a label or (reasoning, word)."""
    return target[1] if isinstance(target, tuple) else target


def is_complete(target):
    """Reasoning without its text or its word teaches nothing, nor does an empty label."""
    return all(target) if isinstance(target, tuple) else bool(target)


def entry_of(clip, target, question, folder):
    """One entry of a manifest in `folder`; question: "reasoning" or "label"."""
    ask = QUESTION_REASONING if question == "reasoning" else QUESTION_LABEL
    answer = answer_of(target)
    if isinstance(target, tuple) and question == "reasoning":
        answer = f"<think>{target[0]}</think>\n<answer>{answer}</answer>"
        if not format_reward(answer):
            raise DataError(
                f"{clip}: its text has <think> or <answer> tags of its own; take them out"
            )
    return {
        "video": Path(os.path.relpath(clip, folder)).as_posix(),
        "conversations": [
            {"from": "human", "value": f"<video>\n<audio>\n{ask}"},
            {"from": "gpt", "value": answer},
        ],
    }


def without_broken(listed):
    """[(clip, target), ...] -> the same without the clips that are known to be broken."""
    rest = []
    for clip, target in listed:
        problem = BROKEN.get(f"{clip.parent.name}/{clip.name}")
        if problem:
            print(f"known to be broken, left out: {clip} ({problem})")
        else:
            rest.append((clip, target))
    return rest


def without_repeats(listed):
    """[(clip, target), ...] -> the same with equal ones once.

    Raises DataError for a clip with two labels. Two texts that end in one label are both kept.
    """
    labels = {}
    for clip, target in listed:
        label = answer_of(target)
        first = labels.setdefault(clip, label)
        if label != first:
            raise DataError(f"{clip}: is listed as {first} and as {label}; take one of them out")
    once = list(dict.fromkeys(listed))
    if len(once) < len(listed):
        print(f"{len(listed) - len(once)} of {len(listed)} entries left out, equal to earlier ones")
    return once


def usable_clips(listed, skip_missing, mend):
    """[(clip, target), ...] -> those that are complete and there, and the missing clips' paths.

    Raises DataError for a clip with two labels, and for missing clips without skip_missing.
    mend: the flags that may be wrong.
    """
    incomplete = [clip.stem for clip, target in listed if not is_complete(target)]
    if incomplete:
        print(
            f"{len(incomplete)} of {len(listed)} entries left out, "
            f"without a text or a clear emotion: {few(incomplete)}"
        )
    complete = without_repeats([(clip, target) for clip, target in listed if is_complete(target)])
    usable, missing = [], []
    for clip, target in complete:
        if is_file(clip):
            usable.append((clip, target))
        else:
            missing.append(str(clip))
    if missing and not skip_missing:
        raise DataError(
            f"{len(missing)} of {len(complete)} clips are missing: {few(missing)}; "
            f"mend {mend}, or leave them out with --skip-missing"
        )
    return usable, missing


def manifest_at(out):
    """The entries of the manifest that is already at --out; None if nothing is there.

    Raises DataError for anything else, such as a data set's own file, and for a wrong name.
    """
    if out.is_dir():
        raise DataError(
            f"{out}: is a folder; --out should be the manifest's own name, "
            f"such as {out / 'manifest.json'}"
        )
    require(out.suffix == ".json", f"{out}: is no name for a manifest; --out should end in .json")
    if not out.exists():
        return None
    try:
        found = read_json(out)
    except DataError:
        found = None
    require(
        isinstance(found, list) and all(is_entry(entry) for entry in found),
        f"{out}: is not a manifest of prepare.py, so it is left as it is; choose another --out",
    )
    return found


def is_entry(value):
    return isinstance(value, dict) and {"video", "conversations"} <= value.keys()


# ------------------------------------------------------------------------------------------------
# The script


def parse_args(argv=None):
    """Command line -> all flags, and a dict of those given that are not for every data set."""
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument("set", choices=SETS, help="the data set")
    parser.add_argument("--root", required=True, help="its folder")
    parser.add_argument("--out", required=True, help="the manifest to write")
    parser.add_argument(
        "--question",
        choices=("reasoning", "label"),
        default="reasoning",
        help="what the prompt asks for (default: reasoning)",
    )
    parser.add_argument(
        "--skip-missing",
        action="store_true",
        help="list clips that are not there, and leave them out",
    )
    own = parser.add_argument_group("of some data sets")
    own.add_argument(
        "--split", choices=("train", "dev", "test"), help="dfew, mafw, meld (dev: meld only)"
    )
    own.add_argument("--fold", type=int, help="dfew, mafw: 1 to 5 (default: 1)")
    own.add_argument(
        "--actors",
        nargs="+",
        help="ravdess, cremad: such as 1-20 or 21,22,24 (default: all that are there)",
    )
    own.add_argument("--csv", help="emer, mer: the labels (default: the one csv file in --root)")
    own.add_argument("--videos", help="emer, mer: the clips' folder (default: --root; mer: video/)")
    args = parser.parse_args(argv)
    given = {name: value for name, value in vars(args).items() if value is not None}
    for name in ("set", "root", "out", "question", "skip_missing"):
        del given[name]
    return args, given


def check_flags(name, given):
    """Flags of another data set are refused, not ignored -> the parameters that this one takes."""
    _root, *parameters = inspect.signature(SETS[name]).parameters.values()
    takes = {parameter.name: parameter for parameter in parameters}
    for flag in sorted(given.keys() - takes.keys()):
        known = ", ".join(f"--{own}" for own in takes)
        raise DataError(f"{name} has no --{flag}; it takes {known}")
    for flag, parameter in takes.items():
        if parameter.default is parameter.empty and flag not in given:
            choices = f": {SPLITS[name]}" if flag == "split" and name in SPLITS else ""
            raise DataError(f"{name} needs --{flag}{choices}")
    return takes


def main(argv=None):
    args, given = parse_args(argv)
    takes = check_flags(args.set, given)
    root, out = Path(args.root).resolve(), Path(args.out)
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; --root should be where {args.set} lies")
    earlier = manifest_at(out)

    listed = without_broken(SETS[args.set](root, **given))
    mend = "--root or --videos" if "videos" in takes else "--root"
    clips, missing = usable_clips(listed, args.skip_missing, mend)
    if not clips:
        raise DataError(
            f"{root}: {len(listed)} clips are listed for {args.set}, none of them can be used"
        )

    out.parent.mkdir(parents=True, exist_ok=True)
    # Real folders on both sides: ".." after a link leads to where the link points.
    folder = out.parent.resolve()
    entries = [entry_of(clip, target, args.question, folder) for clip, target in clips]
    require(
        earlier in (None, entries),
        f"{out}: is another manifest; delete it or choose another --out",
    )
    write_json(out, entries)
    for clip in missing:
        print(f"missing, left out: {clip}")
    counts = Counter(answer_of(target) for _, target in clips)
    # The most frequent first; of equals by name.
    for label, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        print(f"{label:<14}{count:>6}")
    print(f"{'all':<14}{len(clips):>6}   {len(missing)} missing   written: {out}")


if __name__ == "__main__":
    run_script(main)
