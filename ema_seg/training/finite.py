"""Check that the losses of a training are finite, without waiting for the device in each step."""

import math

import torch
from torch import Tensor

from ema_seg.runtime.errors import TrainingError

__all__ = ["FiniteCheck"]


class FiniteCheck:
    """Losses that have not been read yet, each with the names of its batch.

    Reading a loss waits until the device has computed it, so they are read ``every`` steps, all together.

    Args:
        every: steps between two checks.
    """

    def __init__(self, every: int = 1) -> None:
        self.every = every
        self._losses: list[Tensor] = []
        self._batches: list[str] = []

    def add(self, loss: Tensor, step: int, epoch: int, names: list[str]) -> None:
        """Add the loss of a step; read the losses if it is time.

        Raises:
            TrainingError: see ``check``.
        """
        self._losses.append(loss.detach())
        self._batches.append(f"at step {step} (epoch {epoch}), in the batch of {', '.join(names)}")
        if len(self._losses) >= self.every:
            self.check()

    def check(self) -> None:
        """Read all losses.

        Raises:
            TrainingError: one is not finite; the message names the first one's step and batch.
        """
        if not self._losses:
            return
        losses, batches = torch.stack(self._losses).tolist(), self._batches
        self._losses, self._batches = [], []
        for loss, batch in zip(losses, batches, strict=True):
            if not math.isfinite(loss):
                raise TrainingError(
                    f"the loss is {loss} {batch}; lower optimizer.lr, lengthen schedule.warmup_steps, set "
                    "trainer.gradient_clip_val, or look at these samples."
                )
