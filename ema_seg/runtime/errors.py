"""The one exception family for mistakes that a user can make and correct.

Each is raised where the fact is known, with a message that is one sentence: what was found, where
(file, key, value), and what to do. The entry points print the sentence and exit with status 1, without
a traceback; a notebook sees an ordinary exception. Preempted is no mistake and not part of the family.
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
    "describe_os_error",
    "did_you_mean",
    "one_line",
    "own_cause",
]

# errno values that carry no file name: disk errors, exhausted resources.
_OF_DISKS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
_OF_LIMITS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN)


def did_you_mean(name: object, known: Iterable[str], most: int = 1) -> str:
    """Return `` Did you mean 'unet'?`` with the closest known names, to end a message; empty if none is close."""
    close = get_close_matches(str(name), list(known), n=most)
    return f" Did you mean {' or '.join(map(repr, close))}?" if close else ""


def one_line(error: BaseException) -> str:
    """Return an error's message without line breaks; the name of its type if the message is empty."""
    return " ".join(str(error).split()) or type(error).__name__


def describe_os_error(error: OSError) -> str | None:
    """Describe a file, disk or resource-limit error in one sentence; return None for other errors."""
    if not error.strerror:
        return None
    if error.filename is not None:
        where = error.filename
    elif error.errno in _OF_DISKS:
        where = "a file cannot be written"
    elif error.errno in _OF_LIMITS:
        where = "a limit of the operating system is reached"
    else:
        return None
    return f"{where}: {error.strerror}."


class EmaSegError(Exception):
    """Base of every error that states what a user can do about it.

    Attributes:
        exit_status: exit status of an entry point that ends with this error.
    """

    exit_status = 1


class ConfigError(EmaSegError, ValueError):
    """Invalid value of a configuration key or a constructor argument."""


class DataError(EmaSegError):
    """Data set folder or file that does not match its format."""


class CheckpointError(EmaSegError):
    """Checkpoint or weight file that is missing, unreadable or does not fit the model."""


class ModelError(EmaSegError, ValueError):
    """Arguments or input with which a model cannot be built or run."""


class TrainingError(EmaSegError):
    """Failure of a training that cannot continue, for example because the loss is no longer finite."""


class Preempted(BaseException):
    """Preemption of a run, which can be resumed.

    Like KeyboardInterrupt it may come at any moment and is not an ``Exception``: ``except Exception``, here or in a
    library, does not catch it.

    Attributes:
        exit_status: exit status of a preempted process: EX_TEMPFAIL of <sysexits.h>, "try again later".
    """

    exit_status = 75


def own_cause(error: BaseException) -> EmaSegError | None:
    """Return the first error of this family in a library error's chain of causes and contexts, or None."""
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, EmaSegError) and id(cause) not in seen:
        seen.add(id(cause))
        cause = cause.__cause__ or cause.__context__
    return cause if isinstance(cause, EmaSegError) else None
