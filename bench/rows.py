"""What a measure gives back, one line of the table, or says instead."""

import importlib.util


class NotHere(Exception):
    """This measure cannot run on this machine; the message says what it needs."""


class Unequal(Exception):
    """The arms do not compute the same, so that a ratio would mean nothing."""


def need(package, install=None):
    """Raise NotHere unless the package is installed."""
    if importlib.util.find_spec(package) is None:
        raise NotHere(f"needs {package}: pip install {install or package}")


def row(ours, other=None, unit="s", note="", higher_is_better=False, **more):
    """One line of the table; without `other` there is no ratio.

    A ratio above 1 means that this code is faster, or smaller, so many times."""
    ratio = None
    if other is not None:
        ratio = ours / other if higher_is_better else other / ours
    return {"ours": ours, "other": other, "unit": unit, "ratio": ratio, "note": note, **more}
