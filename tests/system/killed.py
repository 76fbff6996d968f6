"""``train.py`` with a SIGKILL at a given moment: tests/system/killed.py <moment> <overrides of train.py>."""

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from ema_seg.cli import train
from ema_seg.training import checkpoints
from ema_seg.training.module import SegmentationModule


def kill_at(owner: Any, name: str, moment: Callable[..., bool]) -> None:
    """Patch a function to kill the process after the first call for whose arguments ``moment`` returns True."""
    function = getattr(owner, name)

    def fatal(*arguments: Any, **keywords: Any) -> Any:
        result = function(*arguments, **keywords)
        if moment(*arguments):
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, fatal)


def after_step(epoch: int, step: int) -> None:
    """Kill after a step of an epoch, when its checkpoint, if one is due, has been written."""

    def reached(callback: Any, trainer: Any, module: Any, outputs: Any, batch: Any, batch_index: int) -> bool:
        return (trainer.current_epoch, batch_index) == (epoch, step)

    kill_at(checkpoints.LastCheckpoint, "on_train_batch_end", reached)


def after_epoch(epoch: int) -> None:
    kill_at(
        checkpoints.LastCheckpoint, "on_train_epoch_end", lambda callback, trainer, *_: trainer.current_epoch == epoch
    )


def in_validation(epoch: int) -> None:
    kill_at(SegmentationModule, "validation_step", lambda module, *_: module.current_epoch == epoch)


def in_checkpoint(number: int) -> None:
    """Kill at the ``number``-th replacement of ``last.ckpt``, right after it has been linked as ``previous.ckpt``."""
    written = iter(range(1, 1000))
    kill_at(checkpoints, "_link", lambda *_: next(written) == number)


if __name__ == "__main__":
    name, *numbers = sys.argv.pop(1).split(":")
    globals()[name](*map(int, numbers))
    train.main()
