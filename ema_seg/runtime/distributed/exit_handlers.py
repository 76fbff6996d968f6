"""Exit handlers for the preemption signals, for a process that has no state to save."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from ema_seg.runtime.errors import Preempted

__all__ = [
    "PREEMPTION_SIGNALS",
    "exit_if_preempted",
    "force_exit_after",
    "foreign_handler",
    "ignore_exit_signals",
    "install_exit_handlers",
]

# SIGTERM is the usual one; Slurm can send one of the others some time before the job's limit (sbatch --signal), and
# submitit makes it send SIGUSR2. Windows has only SIGTERM.
PREEMPTION_SIGNALS = tuple(signal.Signals[name] for name in ("SIGTERM", "SIGUSR1", "SIGUSR2") if hasattr(signal, name))
# Seconds until a forced exit: long enough for the processes of a sweep's jobs to exit first.
_FORCED_EXIT_SECONDS = 15.0

Handler = Callable[[int, FrameType | None], object]

_preempted = False


def install_exit_handlers() -> None:
    """Install handlers that print a message and exit with status 75; call it in the main thread.

    Handlers that a library, such as submitit, has installed before are kept.
    """
    for number in PREEMPTION_SIGNALS:
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, _exit_preempted)


def ignore_exit_signals() -> None:
    """Ignore the signals that ``install_exit_handlers`` handles, once all results are written."""
    for number in PREEMPTION_SIGNALS:
        if signal.getsignal(number) is _exit_preempted:
            signal.signal(number, signal.SIG_IGN)


@contextmanager
def exit_if_preempted() -> Iterator[None]:
    """Exit with status 75 after a preemption signal, even if a library has replaced the SystemExit.

    OmegaConf replaces an exception that interrupts its change of a configuration by one of its own.
    """
    try:
        yield
    finally:
        if _preempted:
            sys.exit(Preempted.exit_status)


def force_exit_after(seconds: float, word: str | None = None) -> threading.Timer:
    """Force an exit with status 75 after ``seconds``, unless the returned timer is cancelled; print ``word`` first.

    A SystemExit alone may be lost: Python drops exceptions in destructors, and a library may catch it.
    """
    timer = threading.Timer(seconds, _force_exit, [word])
    timer.daemon = True
    timer.start()
    return timer


def foreign_handler(number: int) -> Handler | None:
    """Return the handler that a library has installed, such as submitit's, which requeues its job; else None."""
    handler = signal.getsignal(number)
    return handler if callable(handler) and handler is not _exit_preempted else None


def _exit_preempted(number: int, frame: FrameType | None) -> None:
    global _preempted
    if not _preempted:
        name = signal.Signals(number).name
        print(f"stopped by {name} while no training was running; run the same command again.", file=sys.stderr)
        force_exit_after(_FORCED_EXIT_SECONDS)
    _preempted = True
    sys.exit(Preempted.exit_status)


def _force_exit(word: str | None) -> None:
    if word:
        print(word, file=sys.stderr, flush=True)
    os._exit(Preempted.exit_status)
