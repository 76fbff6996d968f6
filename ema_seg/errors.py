"""The one exception family for mistakes that a user can make and correct.

Each is raised where the fact is known, with a message that is one sentence: what was found, where
(file, key, value), and what to do. The entry points print the sentence and exit with status 1, without
a traceback; a notebook sees an ordinary exception. Being asked to leave is no such mistake: Preempted stands beside it.
"""

import errno
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
    "own_cause",
    "system_sentence",
]

# What the system says without a file's name: of a disk that is written to, and of what there is no more of.
_OF_DISKS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
_OF_LIMITS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN)


def did_you_mean(name: object, known: Iterable[str], most: int = 1) -> str:
    """The end of a sentence about an unknown name: `` Did you mean 'unet'?``, or nothing if no name is near."""
    close = get_close_matches(str(name), list(known), n=most)
    return f" Did you mean {' or '.join(map(repr, close))}?" if close else ""


def one_line(error: BaseException) -> str:
    """What a library's error says, as part of a sentence: without line breaks; its type where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__


def system_sentence(error: OSError) -> str | None:
    """What the operating system says about a file, a disk or its limits; None where it speaks of something else."""
    if not error.strerror:
        return None
    if error.filename is not None:
        where = error.filename
    elif error.errno in _OF_DISKS:
        where = "a file cannot be written"
    elif error.errno in _OF_LIMITS:
        where = "the operating system has no more"
    else:
        return None
    return f"{where}: {error.strerror}."


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


class Preempted(BaseException):
    """A run was asked to leave the machine, and can go on from where it was.

    Like KeyboardInterrupt it may come at any moment, and is no ``Exception``: what handles the failures of some work,
    here or in a library, does not take it for one.

    Attributes:
        exit_status: of a process that ends so: EX_TEMPFAIL of <sysexits.h>, "try again later".
    """

    exit_status = 75


def own_cause(error: BaseException) -> EmaSegError | None:
    """Find the first error of this family among those that a library's error was raised from."""
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, EmaSegError) and id(cause) not in seen:
        seen.add(id(cause))
        cause = cause.__cause__ or cause.__context__
    return cause if isinstance(cause, EmaSegError) else None
