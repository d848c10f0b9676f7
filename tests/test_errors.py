"""Small files as people and Windows write them, manifests among them; errors that name the file."""

import errno
import json
import os
from pathlib import Path

import pytest

from data import read_manifest
from support.errors import DataError, naming, read_json, read_text, write_json

# ------------------------------------------------------------------------------------------------
# Reading


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le"])
def test_marks_of_windows_editors(tmp_path, encoding):
    path = tmp_path / "a.json"
    mark = "\ufeff" if encoding == "utf-16-le" else ""
    path.write_text(mark + '{"a": "ü"}', encoding=encoding)
    assert read_json(path) == read_json(path, {}) == {"a": "ü"}
    assert read_text(path) == '{"a": "ü"}'


@pytest.mark.parametrize(
    "text",
    [
        '{"a": 1}\n{"a": 2}\n',
        '{"a": 1}\r\n{"a": 2}',
        '\n{"a": 1}\n\n{"a": 2}\n\n',
        '[{"a": 1},\n {"a": 2}]',
    ],
)
def test_json_lines(tmp_path, text):
    (tmp_path / "a.json").write_text(text, newline="")
    assert read_json(tmp_path / "a.json") == [{"a": 1}, {"a": 2}]


def test_line_ends_inside_of_a_text_are_none_of_json_lines(tmp_path):
    (tmp_path / "a.json").write_text('"a\u2028b\x85c"\n"d"', encoding="utf-8")
    assert read_json(tmp_path / "a.json") == ["a\u2028b\x85c", "d"]


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "cannot be read as JSON"),
        (b"{", "cannot be read as JSON"),
        (b'{"a": 1}\n{"a": 2', "cannot be read as JSON .in line 2"),
        (b'{"a": 1} and more', "cannot be read as JSON .in line 1"),
        (b"\xff\xff", "is not text in UTF-8"),
        (b"\xff\xfea", "is not text in UTF-8"),
        (b'"\\ud800"', "cannot be read as JSON"),
        (b'{"a": 1, "b": 2, "a": "c"}', "key 'a' is there twice, then as 'c'; keep one"),
        (b'[{"a": {"b": 1, "b": 1}}]', "key 'b' is there twice"),
        (b'{"a": 1}\n{"a": 2, "a": 3}', "in line 2: key 'a' is there twice"),
        (b"[" * 100_000 + b"]" * 100_000, "cannot be read as JSON"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7\n", "git lfs pull"),
    ],
)
def test_what_is_no_json_is_named_for_what_it_is(tmp_path, content, message):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(DataError, match=f"a.json: .*{message}") as caught:
        read_json(tmp_path / "a.json")
    assert ("git-lfs" in str(caught.value)) == content.startswith(b"version")


def test_of_a_long_value_that_is_there_twice_the_beginning_is_shown(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"b": 1})[:-1] + f', "b": "{"x" * 1000}"}}')
    with pytest.raises(DataError, match=r"key 'b' is there twice, then as 'x{79}; keep one"):
        read_json(tmp_path / "a.json")


def test_the_same_key_in_two_objects_is_none_twice(tmp_path):
    (tmp_path / "a.json").write_text('{"a": {"a": 1}, "b": [{"a": 2}, {"a": 3}]}')
    assert read_json(tmp_path / "a.json") == {"a": {"a": 1}, "b": [{"a": 2}, {"a": 3}]}


def test_a_file_that_is_not_there_or_no_object(tmp_path):
    assert read_json(tmp_path / "a.json", {}) == {}
    for path in (tmp_path / "a.json", tmp_path):
        with pytest.raises(
            DataError, match=f"{path}: cannot be read .(No such file|Is a directory)"
        ):
            read_json(path)
    (tmp_path / "a.json").write_text("[]")
    with pytest.raises(DataError, match="a.json: should be a JSON object, is a list"):
        read_json(tmp_path / "a.json", {})


# ------------------------------------------------------------------------------------------------
# Manifests


def entry(video="a.mp4", answer="sad"):
    turns = [{"from": "human", "value": "<video>?"}, {"from": "gpt", "value": answer}]
    return {"video": video, "conversations": turns}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("lines", [True, False])
def test_manifests_with_marks_and_of_lines(tmp_path, encoding, lines, count):
    (tmp_path / "a.mp4").touch()
    entries = [entry(answer=answer) for answer in ("sad", "glücklich")[:count]]
    text = "\n".join(map(json.dumps, entries)) if lines else json.dumps(entries, indent=1)
    (tmp_path / "m.json").write_text(text, encoding=encoding)
    examples = read_manifest(tmp_path / "m.json")
    assert [example.answer for example in examples] == ["sad", "glücklich"][:count]
    assert examples[0].video == tmp_path / "a.mp4"


def test_paths_of_windows(tmp_path):
    (tmp_path / "happy" / "loud").mkdir(parents=True)
    for name in ("happy/loud/a.mp4", "b\\c.mp4"):  # the second is a file's name, as it stands
        (tmp_path / name).touch()
    entries = [entry("happy\\loud\\a.mp4"), entry("b\\c.mp4")]
    (tmp_path / "m.json").write_text(json.dumps(entries))
    videos = [example.video for example in read_manifest(tmp_path / "m.json")]
    assert videos == [tmp_path / "happy" / "loud" / "a.mp4", tmp_path / "b\\c.mp4"]
    (tmp_path / "m.json").write_text(json.dumps([entry("sad\\x.mp4")]))
    with pytest.raises(DataError, match="m.json: 1 of 1 clips do not exist: .*sad/x.mp4"):
        read_manifest(tmp_path / "m.json")


def test_a_clip_that_is_there_twice_is_refused(tmp_path):
    for name in ("a.mp4", "b.mp4"):
        (tmp_path / name).touch()
    text = json.dumps([entry()]).replace("{", '{"video": "b.mp4", ', 1)
    (tmp_path / "m.json").write_text(text)
    with pytest.raises(DataError, match="m.json: .*key 'video' is there twice, then as 'a.mp4'"):
        read_manifest(tmp_path / "m.json")


@pytest.mark.parametrize(
    "answer",
    [
        "",
        " ",
        "\n",
        "...",
        "“”",
        "**",
        "\u200b",
        "<answer></answer>",
        "<think>a</think><answer>!</answer>",
    ],
)
def test_an_empty_label_is_refused_where_the_manifest_is_read(tmp_path, answer):
    (tmp_path / "a.mp4").touch()
    (tmp_path / "m.json").write_text(json.dumps([entry(), entry(answer=answer)]))
    with pytest.raises(DataError, match=r"m.json: entry 1: .*\[1\].value has an empty answer"):
        read_manifest(tmp_path / "m.json")


@pytest.mark.parametrize(
    "answer", ["No tags. At all!", "<answer>sad", "0", "悲しい", "<think>a</think>"]
)
def test_long_texts_and_short_ones_are_no_empty_labels(tmp_path, answer):
    (tmp_path / "a.mp4").touch()
    (tmp_path / "m.json").write_text(json.dumps([entry(answer=answer)]))
    assert read_manifest(tmp_path / "m.json")[0].answer == answer


def test_an_entry_of_text_only_has_no_label(tmp_path):
    turns = [{"from": "human", "value": "?"}, {"from": "gpt", "value": "..."}]
    (tmp_path / "m.json").write_text(json.dumps([{"conversations": turns}]))
    assert read_manifest(tmp_path / "m.json")[0].answer == "..."


@pytest.mark.parametrize(
    "change",
    [{"video": "a\0b.mp4"}, {"video": "x" * 5000}, {"video": "\ud800.mp4"}, {"label": "\udfff"}],
)
def test_names_and_texts_that_cannot_be(tmp_path, change):
    (tmp_path / "a.mp4").touch()
    turns = [{"from": "human", "value": "<video>?"}, {"from": "gpt", "value": "sad"}]
    (tmp_path / "m.json").write_text(
        json.dumps([{"video": "a.mp4", "conversations": turns, **change}])
    )
    with pytest.raises(DataError, match="m.json"):
        read_manifest(tmp_path / "m.json")


# ------------------------------------------------------------------------------------------------
# Writing


def test_an_error_of_write_gets_its_files_name(tmp_path):
    with pytest.raises(OSError) as caught, naming(tmp_path / "a"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert caught.value.filename == str(tmp_path / "a")
    assert str(tmp_path / "a") in str(caught.value)
    with pytest.raises(OSError) as caught, naming(tmp_path / "a"):
        (tmp_path / "b").read_text()
    assert caught.value.filename == str(tmp_path / "b")
    with pytest.raises(KeyError), naming(tmp_path / "a"):
        raise KeyError("x")


def test_write_json_is_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_json(path, {"a": "ü", "path": path})
    assert read_json(path) == {"a": "ü", "path": str(path)}
    assert path.read_text(encoding="utf-8") == f'{{\n "a": "ü",\n "path": "{path}"\n}}\n'
    before = path.read_text(encoding="utf-8")
    with pytest.raises(TypeError):  # a mistake before anything is written
        write_json(path, {("a", "b"): 1})

    def full(*_, **more):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for owner, name in ((os, "replace"), (Path, "write_text")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, full)
            with pytest.raises(OSError, match="No space left") as caught:
                write_json(path, {"a": 2})
        assert caught.value.filename == str(path) and path.read_text(encoding="utf-8") == before
        assert [file.name for file in tmp_path.iterdir()] == ["a.json"]
