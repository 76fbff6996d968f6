"""Preemption of a training by SIGTERM, SIGUSR1 or SIGUSR2 (Windows: SIGTERM)."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from ema_seg.runtime.distributed.exit_handlers import PREEMPTION_SIGNALS, Handler, force_exit_after, foreign_handler
from ema_seg.runtime.distributed.ranks import rank_info
from ema_seg.runtime.errors import Preempted

__all__ = ["Preemption"]

_NOTHING_LOST = "; the run has not lost anything"
# Seconds until a forced exit, where there is no state to save.
_FORCED_EXIT_SECONDS = 5.0


class Preemption:
    """Signal handler that lets a training exit at the end of a step, with a checkpoint.

    Handlers installed before, such as submitit's, which requeues its job, are called last.
    """

    def __init__(self) -> None:
        self._received: int | None = None
        self._earlier: dict[int, Handler | None] = {}
        self._deferred = False
        self._asked: Any = None  # the pending all-reduce, read at the next step
        self._last_resort: threading.Timer | None = None

    @contextmanager
    def watched(self) -> Iterator["Preemption"]:
        """Handle the signals inside the block; only in the main thread, because Python delivers signals to no other."""
        handlers: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            self._earlier = {number: foreign_handler(number) for number in PREEMPTION_SIGNALS}
            handlers = {number: signal.signal(number, self._receive) for number in PREEMPTION_SIGNALS}
        try:
            yield self
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            if self._last_resort is not None:
                self._last_resort.cancel()

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Only record signals inside the block, for ``is_due``, instead of exiting at once.

        Raises:
            Preempted: a rank has received a signal that the block has not acted on; raised at its end.
        """
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False
        if self.is_due(now=True):
            self.leave(_NOTHING_LOST)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = number
        if self._deferred:
            return
        if self._earlier[number] is None:
            self._last_resort = force_exit_after(
                _FORCED_EXIT_SECONDS, f"error: {_describe_stop(number, _NOTHING_LOST)}"
            )
        self.leave(_NOTHING_LOST)

    def is_due(self, *, now: bool = False) -> bool:
        """Return whether any rank has received a signal: an all-reduce, so all ranks must call it equally often.

        Args:
            now: wait for the answer, which covers all signals so far; otherwise return the answer as of the previous
                call, so that no step waits.
        """
        if rank_info().size == 1:
            return self._received is not None
        import torch
        from torch import distributed

        answer = self._answer()
        votes = torch.tensor(int(self._received is not None))
        self._asked = (distributed.all_reduce(votes, async_op=True), votes)
        return self._answer() or answer if now else answer

    def _answer(self) -> bool:
        if self._asked is None:
            return False
        (work, votes), self._asked = self._asked, None
        work.wait()
        return bool(votes.item())

    def leave(self, what: str) -> None:
        """Call the signal's earlier handler if there is one, else raise.

        Raises:
            Preempted: there was no earlier handler; the message names the signal and ends in ``what``.
        """
        number, self._received = self._received or signal.SIGTERM, None
        self._answer()
        handler = self._earlier.get(number)
        if handler is not None:
            handler(number, None)
            return
        raise Preempted(_describe_stop(number, what))


def _describe_stop(number: int, what: str) -> str:
    return f"stopped by {signal.Signals(number).name}{what}."
