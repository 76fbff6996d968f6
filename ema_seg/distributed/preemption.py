"""Being asked to leave the machine, by SIGTERM, SIGUSR1 or SIGUSR2 (Windows: SIGTERM)."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from ema_seg.distributed.leaving import LEAVE_SIGNALS, Handler, earlier_handler, leave_if_stuck
from ema_seg.distributed.start import place
from ema_seg.errors import Preempted

__all__ = ["Preemption"]

_NOTHING_LOST = "; the run has not lost anything"
# Seconds that a process may take to leave where there is nothing to keep.
_PATIENCE = 5.0


class Preemption:
    """Takes the signals, and lets a training leave at the end of a step, with a checkpoint.

    Where somebody had taken the signals before, such as submitit, which queues its job again, they have the last word.
    """

    def __init__(self) -> None:
        self._received: int | None = None
        self._earlier: dict[int, Handler | None] = {}
        self._deferred = False
        self._asked: Any = None  # the question to all processes, whose answer is for the next step
        self._last_resort: threading.Timer | None = None

    @contextmanager
    def watched(self) -> Iterator["Preemption"]:
        """Take the signals, in the main thread; others never get any."""
        handlers: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            self._earlier = {number: earlier_handler(number) for number in LEAVE_SIGNALS}
            handlers = {number: signal.signal(number, self._receive) for number in LEAVE_SIGNALS}
        try:
            yield self
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            if self._last_resort is not None:
                self._last_resort.cancel()

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Leave only where ``is_due`` is asked for, or at the end.

        Raises:
            Preempted: at the end, if a process has been asked to leave since.
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
            self._last_resort = leave_if_stuck(_PATIENCE, f"error: {_sentence(number, _NOTHING_LOST)}")
        self.leave(_NOTHING_LOST)

    def is_due(self, *, now: bool = False) -> bool:
        """Whether any process has been asked to leave; the same in all of them, which have to ask equally often.

        Args:
            now: know what all have been asked so far; otherwise, so that no step waits for the answer, what they had
                been when this was asked before.
        """
        if place().size == 1:
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
        """Leave, unless an earlier handler of the signal returns.

        Raises:
            Preempted: says ``what`` has been kept.
        """
        number, self._received = self._received or signal.SIGTERM, None
        self._answer()
        handler = self._earlier.get(number)
        if handler is not None:
            handler(number, None)
            return
        raise Preempted(_sentence(number, what))


def _sentence(number: int, what: str) -> str:
    return f"stopped by {signal.Signals(number).name}{what}."
