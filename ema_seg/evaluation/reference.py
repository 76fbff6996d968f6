"""Reference computation: the same small convolution whatever the model, timed beside each measurement.

A machine that is shared or throttled is slower at some times than at others. Two measurements can be compared if the
reference takes the same time beside both.
"""

import time
from collections.abc import Callable

import torch
from torch.nn import functional as F

from ema_seg.runtime.execution import tf32

__all__ = ["Reference", "time_call"]


class Reference:
    """A convolution and an addition in float32, a few milliseconds on a CPU core.

    Args:
        device: device to run on.

    Attributes:
        seconds: the times so far.
    """

    def __init__(self, device: torch.device) -> None:
        channels, side = (64, 64) if device.type == "cpu" else (256, 128)
        self._weight = torch.full((channels, channels, 3, 3), 0.01, device=device)
        self._images = torch.ones(1, channels, side, side, device=device)
        self._device = device
        self.seconds: list[float] = []
        self.time()  # warm-up
        self.seconds.clear()

    def time(self) -> None:
        """Run it once and keep its time."""
        with torch.autocast(self._device.type, enabled=False), tf32(False):
            self.seconds.append(time_call(self._compute, self._device))

    def _compute(self) -> None:
        F.conv2d(self._images, self._weight, padding=1).add_(self._images)


def time_call(call: Callable[[], object], device: torch.device) -> float:
    """Return the seconds that a call takes on a device which is idle before and after it."""
    _wait_for(device)
    start = time.perf_counter()
    call()
    _wait_for(device)
    return time.perf_counter() - start


def _wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
