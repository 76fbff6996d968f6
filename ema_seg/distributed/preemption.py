"""Being asked to leave the machine, by SIGTERM, SIGUSR1 or SIGUSR2."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from ema_seg.distributed.start import LEAVE_SIGNALS, place
from ema_seg.errors import Preempted

__all__ = ["Preemption"]


class Preemption:
    """Takes the signals, and lets a training leave at the end of a step, with a checkpoint.

    Where the signals had another handler before, such as submitit's, which queues its job again, that one has the last
    word.
    """

    def __init__(self) -> None:
        self._received: int | None = None
        self._handlers: dict[int, Any] = {}
        self._deferred = False
        self._asked: Any = None  # the question to all processes, whose answer is for the next step

    @contextmanager
    def watched(self) -> Iterator["Preemption"]:
        """Take the signals, in the main thread; others never get any."""
        if threading.current_thread() is threading.main_thread():
            self._handlers = {number: signal.getsignal(number) for number in LEAVE_SIGNALS}
            for each in LEAVE_SIGNALS:
                signal.signal(each, self._receive)
        try:
            yield self
        finally:
            for number, handler in self._handlers.items():
                signal.signal(number, handler)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Leave only where ``is_due`` is asked for."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = number
        if not self._deferred:
            self.leave("; the run has not lost anything")

    def is_due(self) -> bool:
        """Whether any process has been asked to leave; the same in all of them, which have to ask equally often."""
        if place().size == 1:
            return self._received is not None
        import torch
        from torch import distributed

        # Asked at one step and answered at the next, so that no step waits for it.
        answer = False
        if self._asked is not None:
            work, votes = self._asked
            work.wait()
            answer = bool(votes.item())
        votes = torch.tensor(int(self._received is not None))
        self._asked = (distributed.all_reduce(votes, async_op=True), votes)
        return answer

    def leave(self, what: str) -> None:
        """Leave, unless an earlier handler of the signal returns.

        Raises:
            Preempted: says ``what`` has been kept.
        """
        number, self._received = self._received or signal.SIGTERM, None
        if self._asked is not None:
            self._asked[0].wait()
            self._asked = None
        handler = self._handlers.get(number)
        if callable(handler):
            handler(number, None)
            return
        raise Preempted(f"stopped by {signal.Signals(number).name}{what}.")
