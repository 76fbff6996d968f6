"""The Lightning trainer of a run: its construction, its callbacks, and errors of fitting as sentences."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
from lightning import Callback, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from ema_seg.data import SegmentationDataModule
from ema_seg.runtime.distributed.preemption import Preemption
from ema_seg.runtime.errors import CheckpointError, ConfigError, EmaSegError, TrainingError, one_line
from ema_seg.runtime.limits import describe_memory, is_out_of_memory
from ema_seg.training.averaging import GrowingAverage
from ema_seg.training.callbacks import EpochLog, KernelSearch, Pictures, ProgressBar
from ema_seg.training.checkpoints import AtomicCheckpoints, RunEarlyStopping
from ema_seg.training.lightning_patches import patch_trainer
from ema_seg.training.module import MONITORED, SegmentationModule
from ema_seg.training.parallel.strategy import trainer_arguments
from ema_seg.training.start import TrainingStart

__all__ = ["build_callbacks", "build_trainer", "fit"]


def build_callbacks(settings: Mapping[str, Any], run: Path, *, quiet: bool) -> list[Callback]:
    """Build the callbacks for the log, pictures, weight averaging, early stopping and progress.

    Args:
        settings: ``training`` of a configuration.
        run: the run's folder; receives ``metrics.csv`` and ``pictures/``.
        quiet: print no line per epoch and show no progress bar.
    """
    callbacks: list[Callback] = [EpochLog(run / "metrics.csv", quiet=quiet)]
    if settings["pictures_every"]:
        callbacks.append(Pictures(run / "pictures", every=settings["pictures_every"]))
    if settings["weight_averaging"]:
        callbacks.append(GrowingAverage(settings["weight_averaging"]))
    if settings["early_stopping"]:
        callbacks.append(RunEarlyStopping(MONITORED, settings["early_stopping"]))
    shown = sys.stdout.isatty() if settings["progress_bar"] == "auto" else settings["progress_bar"]
    if shown and not quiet:
        callbacks.append(ProgressBar())  # Lightning's other bar cuts its metrics off on a narrow terminal
    return callbacks


def build_trainer(settings: Mapping[str, Any], run: Path, callbacks: Sequence[Callback]) -> Trainer:
    """Build Lightning's trainer.

    Args:
        settings: ``trainer`` of a configuration.
        run: the run's folder.
        callbacks: all callbacks of the training.

    Raises:
        ConfigError: Lightning rejects the settings.
    """
    arguments, plugins = trainer_arguments(settings)
    if settings.get("benchmark") is None and not settings.get("deterministic"):
        callbacks = [*callbacks, KernelSearch()]
    try:
        trainer = Trainer(
            **arguments,
            default_root_dir=run,
            logger=False,
            callbacks=list(callbacks),
            enable_progress_bar=any(isinstance(callback, ProgressBar) for callback in callbacks),
            plugins=[AtomicCheckpoints(), *plugins],
            enable_model_summary=False,
        )
    except (MisconfigurationException, TypeError, ValueError) as error:
        raise _trainer_error(error) from error
    patch_trainer(trainer)
    return trainer


def fit(
    trainer: Trainer,
    module: SegmentationModule,
    data: SegmentationDataModule,
    start: TrainingStart,
    preemption: Preemption,
) -> None:
    """Run the training loop from the checkpoint that ``start`` names, or from the beginning.

    Raises:
        CheckpointError: the checkpoint's state does not fit the training.
        ConfigError: Lightning rejects the settings.
        TrainingError: the memory does not suffice.
        KeyboardInterrupt: on Ctrl-C.
    """
    path = start.checkpoint
    try:
        with data.worker_errors_converted(), preemption.deferred():
            trainer.fit(module, data, ckpt_path=path, weights_only=True)
    except MisconfigurationException as error:
        raise _trainer_error(error) from error
    except SystemExit as end:
        if isinstance(end.__context__, KeyboardInterrupt):  # Lightning turns Ctrl-C into a silent exit
            raise KeyboardInterrupt from None
        raise
    except Exception as error:
        if path is not None and not start.reached and _is_restore_error(error):
            raise CheckpointError(
                f"ckpt={path}: its state does not fit a training with these settings ({one_line(error)[:200]}); "
                "restore the file and the settings, or start a new run."
            ) from error
        if not isinstance(error, RuntimeError | MemoryError | cv2.error) or not is_out_of_memory(error):
            raise
        raise TrainingError(
            f"data.batch_size={data.batch_size}: out of memory with batches of {module.crops} "
            f"({describe_memory(trainer.strategy.root_device)}); lower it (auto finds the largest that fits on a GPU, "
            "and trainer.accumulate_grad_batches makes up for it), lower data.augmentation.crop.height and width, or "
            "set trainer.precision=bf16-mixed."
        ) from error


def _is_restore_error(error: Exception) -> bool:
    """Return whether an error comes from restoring a state, and neither from the machine nor from our own checks."""
    if isinstance(error, RuntimeError):
        return "state_dict" in str(error)
    known = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
    return isinstance(error, known) and not isinstance(error, EmaSegError)


def _trainer_error(error: Exception) -> ConfigError:
    return ConfigError(f"trainer: Lightning refuses these settings: {one_line(error)}")
