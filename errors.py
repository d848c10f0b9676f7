"""Errors that a user can act on, and the guards that raise them: what is wrong, in which file, and what to do."""

import contextlib
import json
import sys
import time
from pathlib import Path

try:
    import resource
except ImportError:         # Windows: no memory limits
    resource = None


class DataError(ValueError):
    """Something in the user's files or flags is wrong; the message says what and what to do."""


class ClipError(DataError):
    """A media file that cannot be used; the message names it."""


class TrainingError(RuntimeError):
    """A run that cannot go on, though its flags and files can be used; the message says what was kept and what to try."""


def require(condition, message, error=DataError):
    if not condition:
        raise error(message)


def is_file(path):
    """Path.is_file, but False for what no file can be called: too long a name, a null byte, half a surrogate pair."""
    try:
        return Path(path).is_file()
    except (OSError, ValueError):
        return False


@contextlib.contextmanager
def limits(size, seconds=None):
    """Inside, the process may grow by `size` bytes (on Linux), and Python code may take `seconds`: else MemoryError, TimeoutError."""
    def clock(frame, event, argument):      # called at every line that starts in here
        if time.monotonic() > deadline:
            raise TimeoutError(f"takes more than {seconds} s")
        return clock

    deadline, tracer, statm = time.monotonic() + (seconds or 0), sys.gettrace(), Path("/proc/self/statm")
    if resource and statm.exists():
        old = soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        most = int(statm.read_text().split()[0]) * resource.getpagesize() + size
        resource.setrlimit(resource.RLIMIT_AS, (most if soft == resource.RLIM_INFINITY else min(soft, most), hard))
    try:
        if seconds:
            sys.settrace(clock)
        yield
    finally:
        sys.settrace(tracer)
        if resource and statm.exists():
            resource.setrlimit(resource.RLIMIT_AS, old)


def read_json(path, default=None):
    """A JSON file's content; `default`, if given, where the file does not exist."""
    if default is not None and not path.is_file():
        return default
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        json.dumps(content, ensure_ascii=False).encode()    # half a surrogate pair is no text: it cannot be written or tokenised
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read as JSON ({error}); a git-lfs pointer? run git lfs pull") from error
    require(default is None or isinstance(content, dict), f"{path}: should be a JSON object, is a {type(content).__name__}")
    return content


@contextlib.contextmanager
def foreign(path, what):
    """Whatever a foreign file makes go wrong inside is one DataError that names the file.

    The tokenizers library and templates raise anything, the former bare Exceptions, and panics, which are no Exceptions at
    all; a field of the wrong type is a TypeError, AttributeError, KeyError, ... wherever it is used.
    """
    try:
        yield
    except DataError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise DataError(f"{path}: {what} ({type(error).__name__}: {error}); download it again") from error
