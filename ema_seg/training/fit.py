"""Training of a configuration: build and check the parts, fit, return the best checkpoint."""

import json
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from ema_seg.data import SegmentationDataModule
from ema_seg.evaluation import describe_environment
from ema_seg.models import load_checkpoint, model_weights, segmenter_from_config
from ema_seg.reporting import check_classes
from ema_seg.runtime.distributed.preemption import Preemption
from ema_seg.runtime.errors import CheckpointError, ConfigError, EmaSegError, TrainingError, one_line
from ema_seg.runtime.execution import set_execution
from ema_seg.runtime.files import write_file
from ema_seg.runtime.limits import describe_memory, is_out_of_memory
from ema_seg.training.averaging import GrowingAverage
from ema_seg.training.callbacks import EpochLog, Pictures, ProgressBar
from ema_seg.training.checkpoints import (
    AtomicCheckpoints,
    BestCheckpoint,
    LastCheckpoint,
    RunEarlyStopping,
    load_last,
    replace_last,
    require_fitting_state,
    require_same_model,
    stopped_early,
)
from ema_seg.training.loggers import build_loggers
from ema_seg.training.losses import build_loss
from ema_seg.training.module import SegmentationModule
from ema_seg.training.parallel.strategy import trainer_arguments
from ema_seg.training.validation import require_validation

__all__ = ["fit"]

_MONITORED = "val/miou"

# Warnings of the libraries about themselves, or about behaviour that is intended here.
_IGNORED_WARNINGS = (
    r".*isinstance\(treespec, LeafSpec\)",
    r"Checkpoint directory .* exists and is not empty",
    r"The number of training batches .* is smaller than the logging interval",
    r"The '.*_dataloader' does not have many workers",
    r"You're resuming from a checkpoint that ended before the epoch ended",  # the data module resumes within the epoch
    r"`broadcast_buffers` is deprecated",  # some supported versions of torch lack the new name
    r"Grad strides do not match bucket view strides",  # single-channel weights: strides are ambiguous
    r"It is recommended to use `self.log\(.*sync_dist=True\)`",  # the values are equal on all ranks
)


def fit(
    config: Mapping[str, Any],
    run: Path,
    *,
    resume: bool = False,
    quiet: bool = False,
    callbacks: Sequence[Callback] = (),
    preemption: Preemption | None = None,
    on_start: Callable[[], None] = lambda: None,
) -> Path:
    """Train the model of a configuration.

    Nothing in the run's folder changes before data, model, checkpoint, optimiser and schedule have been built and
    checked, so that a rejected command leaves a run as it was.

    Args:
        config: the resolved configuration of ``train.py`` as plain data.
        run: the run's folder; receives ``environment.json``, ``metrics.csv``, ``checkpoints/`` and pictures.
        resume: continue from ``checkpoints/last.ckpt`` in that folder.
        quiet: print no line per epoch and show no progress bar.
        callbacks: further Lightning callbacks.
        preemption: receives the signals on which the training saves a checkpoint and stops; None for no preemption.
        on_start: called on every rank after all checks, just before the first step; not called if nothing is left to
            train.

    Returns:
        The checkpoint with the best validation mIoU.

    Raises:
        EmaSegError: any error that the user can correct.
    """
    preemption = preemption or Preemption()
    for message in _IGNORED_WARNINGS:
        warnings.filterwarnings("ignore", message)
    path, saved = load_last(run) if resume else (None, None)
    data = SegmentationDataModule(**config["data"])
    if path is not None and saved is not None:
        require_same_model(saved, config, run)
        check_classes(saved["classes"], data, path, "use data with the checkpoint's classes, or start a new run")
    data.skipped.attach_file(run / "skipped.csv")
    data.setup("fit")
    weights = _weights_to_match(config, saved)
    model = segmenter_from_config(config, data.num_classes, pretrained=not resume, weights=weights)
    settings = config["training"]
    set_execution(model, channels_last=settings["channels_last"], compile=settings["compile"])
    module = SegmentationModule(
        model,
        build_loss(config["loss"], data.num_classes),
        classes=data.classes,
        optimizer=config["optimizer"],
        schedule=config["schedule"],
        config=config,
    )
    # No run resumes from the best checkpoint, and without the optimiser's state it is a third of the size. But
    # Lightning writes no averaged weights into a checkpoint of weights alone.
    weights_only = not settings["weight_averaging"]
    best = BestCheckpoint(run, monitor=_MONITORED, mode="max", save_weights_only=weights_only)
    progress = not quiet and _shows_progress(settings["progress_bar"])
    last = LastCheckpoint(run, settings.get("checkpoint_every"), preemption)
    start = _Start(config, run, best, path, on_start)
    own = [best, last, EpochLog(run / "metrics.csv", quiet=quiet), start, *_callbacks(settings, run)]
    if progress:
        own.append(ProgressBar())  # Lightning's other bar cuts its metrics off on a narrow terminal
    trainer = _build_trainer(config, run, [*own, *callbacks], progress)
    try:
        if saved is not None and stopped_early(saved, trainer):
            best.load_state_dict(saved["callbacks"][best.state_key])
            return _best_checkpoint_path(best, run)
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
    return _best_checkpoint_path(best, run)


def _weights_to_match(config: Mapping[str, Any], saved: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return the weights of the resumed or repeated run, if any; the model must match their shapes."""
    if saved is None and config.get("rerun"):
        original = Path(config["rerun"]) / "checkpoints" / "best.ckpt"
        saved = load_checkpoint(original) if original.is_file() else None
    return None if saved is None else model_weights(saved)


class _Start(Callback):
    """Start of a training: runs the last checks, starts the loggers, writes ``environment.json``, calls ``on_start``.

    It comes after ``EpochLog``, which checks ``metrics.csv``.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        run: Path,
        best: BestCheckpoint,
        checkpoint: Path | None,
        on_start: Callable[[], None],
    ) -> None:
        self.config, self.run, self.best = config, run, best
        self.checkpoint, self.on_start = checkpoint, on_start
        # Passed to Lightning later, because it would start them before it restores a checkpoint.
        self.loggers = build_loggers(run, config.get("logger", {}))
        self.reached = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Run the last checks and start writing; the optimiser's state and the loaders exist by now.

        Raises:
            CheckpointError: the optimiser's restored state does not fit the model.
            ConfigError: the training would end before its first validation, or a logger cannot be started.
        """
        self.reached = True
        if self.checkpoint is not None:
            require_fitting_state(trainer.optimizers[0], self.checkpoint)
        if not self.best.best_model_path:
            require_validation(trainer)
        trainer.loggers = self.loggers
        _log_configuration(trainer, self.config)
        if self.checkpoint is not None:
            replace_last(self.checkpoint)
        _write_environment(self.run, trainer)
        self.on_start()


def _is_restore_error(error: Exception) -> bool:
    """Return whether an error comes from restoring a state, and neither from the machine nor from our own checks."""
    if isinstance(error, RuntimeError):
        return "state_dict" in str(error)
    known = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
    return isinstance(error, known) and not isinstance(error, EmaSegError)


def _callbacks(settings: Mapping[str, Any], run: Path) -> list[Callback]:
    callbacks: list[Callback] = []
    if settings["pictures_every"]:
        callbacks.append(Pictures(run / "pictures", every=settings["pictures_every"]))
    if settings["weight_averaging"]:
        callbacks.append(GrowingAverage(settings["weight_averaging"]))
    if settings["early_stopping"]:
        callbacks.append(RunEarlyStopping(_MONITORED, settings["early_stopping"]))
    return callbacks


def _shows_progress(setting: bool | str) -> bool:
    return sys.stdout.isatty() if setting == "auto" else bool(setting)


def _build_trainer(config: Mapping[str, Any], run: Path, callbacks: list[Callback], progress: bool) -> Trainer:
    arguments, plugins = trainer_arguments(config["trainer"])
    try:
        trainer = Trainer(
            **arguments,
            default_root_dir=run,
            logger=False,
            callbacks=callbacks,
            enable_progress_bar=progress,
            plugins=[AtomicCheckpoints(), *plugins],
            enable_model_summary=False,
        )
    except (MisconfigurationException, TypeError, ValueError) as error:
        raise _trainer_error(error) from error
    _patch_lightning(trainer)
    return trainer


def _trainer_error(error: Exception) -> ConfigError:
    return ConfigError(f"trainer: Lightning refuses these settings: {one_line(error)}")


def _patch_lightning(trainer: Trainer) -> None:
    """Override three private hooks that Lightning has no setting for.

    - ``register_signal_handlers``: :class:`Preemption` handles the signals. Lightning's handler ends a training without
      a checkpoint, and broadcasts the signal to the other ranks, even in the middle of another collective.
    - ``_broadcast_sigterm_tensor``: before every step it broadcasts whether rank 0 got a signal, and so synchronises
      the GPU with the CPU.
    - ``_iteration_based_training``: a training with max_steps resumes at the end of an epoch like any other. Lightning
      would end that epoch again.
    """
    for owner, name, answer in (
        (trainer._signal_connector, "register_signal_handlers", None),
        (trainer.fit_loop.epoch_loop, "_broadcast_sigterm_tensor", None),
        (trainer.fit_loop, "_iteration_based_training", False),
    ):
        assert callable(getattr(owner, name))
        vars(owner)[name] = lambda answer=answer: answer


def _log_configuration(trainer: Trainer, config: Mapping[str, Any]) -> None:
    for logger in trainer.loggers:
        try:
            logger.log_hyperparams(dict(config))
        except Exception as error:  # no account, no server, no disk: each logger has its own type
            raise ConfigError(
                f"logger: {type(logger).__name__} cannot be started ({one_line(error)[:300]}); correct that, or choose "
                "another logger."
            ) from error


def _write_environment(run: Path, trainer: Trainer) -> None:
    if trainer.is_global_zero:
        environment = describe_environment(trainer.strategy.root_device)
        write_file(run / "environment.json", f"{json.dumps(environment, indent=2)}\n".encode())


def _best_checkpoint_path(keeper: BestCheckpoint, run: Path) -> Path:
    best = Path(keeper.best_model_path)
    if not keeper.best_model_path or not best.is_file():
        raise CheckpointError(
            f"{run}: the training ended before its first validation, so no checkpoint was chosen as the best; raise "
            f"trainer.max_time or trainer.max_steps, and continue with resume={run}."
        )
    return best
