"""Exponential moving average of the weights, with a growing decay."""

from typing import Any, cast

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor

from ema_seg.training.module import SegmentationModule

__all__ = ["UNAVERAGED", "GrowingAverage", "growing_average"]

UNAVERAGED = "val/miou_unaveraged"


def growing_average(decay: float, averaged: Tensor, current: Tensor, updates: Tensor) -> Tensor:
    """Return the average after one more update, with the decay min(``decay``, (1 + n) / (10 + n)).

    A constant decay of 0.999 would keep a share of 0.999ⁿ of the random initial weights, for thousands of steps.

    Args:
        decay: the largest decay, in (0, 1).
        averaged: the average so far.
        current: the weights to add, of the same shape and dtype.
        updates: number n of updates so far, an integer scalar.
    """
    return averaged + (current - averaged) * (9 / (10 + updates)).clamp_min(1 - decay)


class GrowingAverage(WeightAveraging):
    """Callback that validates, saves and tests the averaged weights, and also scores the plain ones.

    It logs the mIoU of the plain weights as ``val/miou_unaveraged``. ``val/miou``, which selects the best checkpoint,
    is that of the averaged weights. Checkpoints hold the number of updates, so that a resumed run continues the average
    bit for bit.

    Args:
        decay: the largest decay; see ``growing_average``.
    """

    def __init__(self, decay: float) -> None:
        super().__init__(avg_fn=lambda averaged, current, updates: growing_average(decay, averaged, current, updates))

    @property
    def state_key(self) -> str:
        """Name of the callback's state in a checkpoint, the same as in those of earlier versions."""
        return "EMAWeightAveraging"

    @property
    def _other(self) -> SegmentationModule:
        """Module with the weights that are swapped out: during a validation, the plain ones."""
        assert self._average_model is not None
        return cast(SegmentationModule, self._average_model.module)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Swap in the averaged weights, and reset the scores of the plain ones."""
        super().on_validation_epoch_start(trainer, pl_module)
        self._other.eval().on_validation_epoch_start()

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Score the plain weights on the same images."""
        with trainer.precision_plugin.val_step_context():
            self._other.score(batch)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the mIoU of the plain weights, and swap them in again."""
        pl_module.log(UNAVERAGED, self._other.compute_scores()["miou"])
        super().on_validation_epoch_end(trainer, pl_module)
