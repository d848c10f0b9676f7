"""Errors that a user can act on: what is wrong, in which file, what to do.

And the reading and writing of small files that raises them."""

import codecs
import contextlib
import json
import os
from pathlib import Path

# How the file begins that git-lfs leaves in another's place, and what to do about it.
LFS_MARK = b"version https://git-lfs"
LFS_ADVICE = "a git-lfs pointer, not the file itself; fetch it with `git lfs pull`"


class DataError(ValueError):
    """Something in the user's files or flags is wrong; the message says what and what to do."""


class ClipError(DataError):
    """A media file that cannot be used; the message names it."""


class TrainingError(RuntimeError):
    """A run that cannot go on, though its flags and files can be used.

    The message says what was kept and what to try."""


def require(condition, message, error=DataError):
    """Raise the error with this message, unless the condition holds."""
    if not condition:
        raise error(message)


def is_file(path):
    """Path.is_file, but False for what no file can be called: too long a name, a null byte."""
    try:
        return Path(path).is_file()
    except (OSError, ValueError):
        return False


@contextlib.contextmanager
def naming(path):
    """Inside, an OSError without a file's name gets this one's: write() on a full disk has none."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def read_text(path):
    """A text file's content: UTF-8, or UTF-8 or UTF-16 with a mark in front, as Windows writes."""
    with naming(path):
        content = Path(path).read_bytes()
    require(not content.startswith(LFS_MARK), f"{path}: {LFS_ADVICE}")
    utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return content.decode("utf-16" if utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not text in UTF-8 ({error})") from error


def read_json(path, default=None):
    """A JSON file's content; of JSON lines (one value a line), a list of them.

    With a default, which is taken where there is no file, the content has to be an object."""
    if default is not None and not is_file(path):
        return default
    try:
        content = _parse_json(read_text(path))
        # Half a surrogate pair is no text: it can be neither written nor tokenised.
        json.dumps(content, ensure_ascii=False).encode()
    except DataError:
        raise
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read as JSON ({error})") from error
    require(
        default is None or isinstance(content, dict),
        f"{path}: should be a JSON object, is a {type(content).__name__}",
    )
    return content


def _parse_json(text):
    try:
        return json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        if error.msg != "Extra data":  # after a first value that is whole: JSON lines, it may be
            raise
    values = []
    for number, line in enumerate(text.split("\n"), start=1):
        try:
            if line.strip():
                values.append(json.loads(line, object_pairs_hook=_object))
        except ValueError as error:
            raise ValueError(f"in line {number}: {error}") from error
    return values


def _object(pairs):
    """A JSON object's (key, value) pairs -> dict. Of equal keys, json would take the last."""
    content = {}
    for key, value in pairs:
        if key in content:  # the value, shortened, is what to search the file for
            raise ValueError(f"key {key!r} is there twice, then as {value!r:.80}; keep one")
        content[key] = value
    return content


def write_json(path, value):
    """Write a JSON file whole or not at all; an OSError names it."""
    partial = Path(f"{path}.partial")
    text = json.dumps(value, indent=1, ensure_ascii=False, default=str) + "\n"
    with naming(path):
        try:
            partial.write_text(text, encoding="utf-8")
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
