"""Functions of the user's own, given on the command line as module:function."""

import importlib
import sys
import traceback
from pathlib import Path

from support.errors import DataError, TrainingError

LARGEST = 1e18  # its square, of which a group's variance is made, still fits into float32


def find_function(flag, name):
    """module:function -> the function; modules are looked for in the working directory first."""
    module, _, function = name.partition(":")
    sys.path.insert(0, "")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise DataError(
            f"{flag} {name}: cannot be found ({error}); give module:function, with module.py in "
            "this folder"
        ) from None
    finally:
        sys.path.remove("")  # wherever it is by now: the module may have put others before it
    if not callable(found):
        raise DataError(f"{flag} {name}: is a {type(found).__name__}, not a function")
    return found


def find_rewards(built_in, names):
    """name -> function(completion, label): the built-in rewards, and module:function of
    --reward."""
    rewards = dict(built_in)
    for name in names:
        function = find_function("--reward", name)
        short = name.partition(":")[2]
        if short in rewards:
            raise DataError(f"--reward {name}: there is a reward {short} already; rename it")
        rewards[short] = function
    return {name: guarded(name, function) for name, function in rewards.items()}


def guarded(name, function):
    """The reward function, of which anything but one finite number is a TrainingError.

    The error quotes completion and label, and says where in the function it happened."""

    def reward(completion, label):
        try:
            value = float(function(completion, label))
            if abs(value) <= LARGEST:  # so not nan either
                return value
            problem = f"returned {value}"
        except Exception as error:  # whatever a foreign function may raise
            where = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{Path(where.filename).name}, line {where.lineno}"
            problem = f"failed with {type(error).__name__}: {error} ({place})"
        raise TrainingError(
            f"reward {name} {problem}, where one number of at most {LARGEST:.0e} was expected, for "
            f"the label {label!r} and the completion\n{completion}"
        )

    return reward
