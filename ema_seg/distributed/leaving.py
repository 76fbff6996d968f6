"""The signals that ask a process to leave its machine, and what it does on them where it has nothing to keep."""

import signal
import sys
from collections.abc import Callable
from types import FrameType

from ema_seg.errors import Preempted

__all__ = ["LEAVE_SIGNALS", "earlier_handler", "leave_when_asked", "stay_when_asked"]

# SIGTERM asks a process to leave its machine; Slurm sends one of the others as long before as it is told to, and
# submitit has it send the last.
LEAVE_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)

Handler = Callable[[int, FrameType | None], object]


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


def earlier_handler(number: int) -> Handler | None:
    """Who has taken a signal and has the last word on it, such as submitit, which queues its job again."""
    handler = signal.getsignal(number)
    return handler if callable(handler) and handler is not _leave else None


def _leave(number: int, frame: FrameType | None) -> None:
    print(f"stopped by {signal.Signals(number).name} outside of the training; give the command again.", file=sys.stderr)
    sys.exit(Preempted.exit_status)
