"""The one exception family for mistakes that a user can make and correct.

Each is raised where the fact is known, with a message that is one sentence: what was found, where
(file, key, value), and what to do. The entry points print the sentence and exit with status 1, without
a traceback; a notebook sees an ordinary exception.
"""

from collections.abc import Iterable
from difflib import get_close_matches

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "EmaSegError",
    "ModelError",
    "Preempted",
    "TrainingError",
    "did_you_mean",
    "one_line",
]


def did_you_mean(name: object, known: Iterable[str], most: int = 1) -> str:
    """The end of a sentence about an unknown name: `` Did you mean 'unet'?``, or nothing if no name is near."""
    close = get_close_matches(str(name), list(known), n=most)
    return f" Did you mean {' or '.join(map(repr, close))}?" if close else ""


def one_line(error: BaseException) -> str:
    """What a library's error says, as part of a sentence: without line breaks; its type where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__


class EmaSegError(Exception):
    """Base of every error that states what a user can do about it.

    Attributes:
        exit_status: of an entry point that ends so.
    """

    exit_status = 1


class ConfigError(EmaSegError, ValueError):
    """A configuration key or a constructor argument has a value that cannot work."""


class DataError(EmaSegError):
    """A data set's folder or one of its files is not what its format says."""


class CheckpointError(EmaSegError):
    """A checkpoint or weight file is missing, unreadable or does not fit the model."""


class ModelError(EmaSegError, ValueError):
    """A model cannot be built or run with the given arguments or input."""


class TrainingError(EmaSegError):
    """Training cannot go on, for example because the loss is no longer finite."""


class Preempted(EmaSegError):
    """A run was asked to leave the machine, and can go on from where it was.

    Attributes:
        exit_status: of a process that ends so: EX_TEMPFAIL of <sysexits.h>, "try again later".
    """

    exit_status = 75
