"""The signals that ask a process to leave its machine, and what it does on them where it has nothing to keep."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from ema_seg.errors import Preempted

__all__ = [
    "LEAVE_SIGNALS",
    "as_asked",
    "earlier_handler",
    "leave_if_stuck",
    "leave_when_asked",
    "stay_when_asked",
]

# SIGTERM asks a process to leave its machine; Slurm sends one of the others as long before as it is told to, and
# submitit has it send the last. Windows has only the first.
LEAVE_SIGNALS = tuple(signal.Signals[name] for name in ("SIGTERM", "SIGUSR1", "SIGUSR2") if hasattr(signal, name))
# Seconds that a process may take to leave: those that it has started for the jobs of a sweep end before it.
_PATIENCE = 15.0

Handler = Callable[[int, FrameType | None], object]

_asked = False


def leave_when_asked() -> None:
    """From now on leave at once, with a word and the status that asks for another try; in the main thread.

    Signals that somebody else has taken, such as submitit, stay theirs.
    """
    for number in LEAVE_SIGNALS:
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, _leave)


def stay_when_asked() -> None:
    """From now on pass over the signals that ``leave_when_asked`` has taken: all is done, and the end is near."""
    for number in LEAVE_SIGNALS:
        if signal.getsignal(number) is _leave:
            signal.signal(number, signal.SIG_IGN)


@contextmanager
def as_asked() -> Iterator[None]:
    """End as a process that was asked to leave does, also where a library has made something else of its leaving.

    OmegaConf does, whose own exceptions follow from any that comes while a configuration is half changed.
    """
    try:
        yield
    finally:
        if _asked:
            sys.exit(Preempted.exit_status)


def leave_if_stuck(seconds: float, word: str | None = None) -> threading.Timer:
    """Leave after a while, with a word, unless the timer is cancelled or the process has ended.

    Python drops what is raised while it frees an object, and some library may catch it.
    """
    timer = threading.Timer(seconds, _end, [word])
    timer.daemon = True
    timer.start()
    return timer


def earlier_handler(number: int) -> Handler | None:
    """Who has taken a signal and has the last word on it, such as submitit, which queues its job again."""
    handler = signal.getsignal(number)
    return handler if callable(handler) and handler is not _leave else None


def _leave(number: int, frame: FrameType | None) -> None:
    global _asked
    if not _asked:
        name = signal.Signals(number).name
        print(f"stopped by {name} outside of the training; give the command again.", file=sys.stderr)
        leave_if_stuck(_PATIENCE)
    _asked = True
    sys.exit(Preempted.exit_status)


def _end(word: str | None) -> None:
    if word:
        print(word, file=sys.stderr, flush=True)
    os._exit(Preempted.exit_status)
