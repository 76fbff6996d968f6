"""From a configuration to a trained model: build the parts, fit, name the best checkpoint."""

import json
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging, ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from ema_seg.data import SegmentationDataModule
from ema_seg.errors import CheckpointError, ConfigError, TrainingError, one_line
from ema_seg.evaluation import describe_environment
from ema_seg.models import load_checkpoint, segmenter_from_config
from ema_seg.models.mode import set_execution
from ema_seg.training.callbacks import EpochLog, Pictures
from ema_seg.training.loggers import build_logger
from ema_seg.training.losses import build_loss
from ema_seg.training.module import SegmentationModule
from ema_seg.training.strategy import trainer_arguments

__all__ = ["fit"]

_MONITORED = "val/miou"

# Warnings of the libraries about themselves, or about what is meant to be so here.
_NOISE = (
    r".*isinstance\(treespec, LeafSpec\)",
    r"Checkpoint directory .* exists and is not empty",
    r"The number of training batches .* is smaller than the logging interval",
    r"The '.*_dataloader' does not have many workers",
    r"`broadcast_buffers` is deprecated",  # the new name is not in every torch that we support
    r"Grad strides do not match bucket view strides",  # of weights with a single channel, where strides say nothing
    r"It is recommended to use `self.log\(.*sync_dist=True\)`",  # what is logged without is the same everywhere
)


def fit(
    config: Mapping[str, Any],
    run: Path,
    *,
    resume: bool = False,
    quiet: bool = False,
    callbacks: Sequence[Callback] = (),
) -> Path:
    """Train what ``config`` describes.

    Args:
        config: the resolved configuration of ``train.py`` as plain data.
        run: the run's folder; receives ``environment.json``, ``metrics.csv``, ``checkpoints/`` and pictures.
        resume: continue from ``checkpoints/last.ckpt`` in that folder.
        quiet: print no line per epoch and show no progress bar.
        callbacks: Lightning's, besides the run's own.

    Returns:
        The checkpoint with the best validation mIoU.

    Raises:
        EmaSegError: whatever a user can correct, from the parts that find it.
    """
    for message in _NOISE:
        warnings.filterwarnings("ignore", message)
    data = SegmentationDataModule(**config["data"])
    data.setup("fit")
    model = segmenter_from_config(config, data.num_classes, pretrained=not resume)
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
    # Nothing goes on from the best: without the optimiser's state it is a third of the size. Lightning leaves the
    # averaged weights, too, out of a checkpoint of weights alone.
    weights_only = not settings["weight_averaging"]
    best = RunCheckpoint(run, "best", monitor=_MONITORED, mode="max", save_weights_only=weights_only)
    last = run / "checkpoints" / "last.ckpt"
    saved = load_checkpoint(last) if resume else None  # also for its complaint: Lightning's is a traceback
    progress = not quiet and _shows_progress(settings["progress_bar"])
    last_keeper = RunCheckpoint(run, "last", save_on_train_epoch_end=True)
    own = [best, last_keeper, EpochLog(run / "metrics.csv", quiet=quiet), *_callbacks(settings, run)]
    if progress:
        own.append(TQDMProgressBar())  # Lightning's other bar cuts its metrics off on a narrow terminal
    trainer = _build_trainer(config, run, [*own, *callbacks], progress)
    _log_configuration(trainer, config)
    _write_environment(run, trainer)
    if saved is not None and _has_stopped(saved, trainer):
        best.load_state_dict(saved["callbacks"][best.state_key])
        return _best(best, run)
    try:
        trainer.fit(module, data, ckpt_path=str(last) if resume else None, weights_only=True)
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            f"the memory does not suffice for data.batch_size={data.batch_size}; lower it, lower "
            "data.augmentation.crop.height and width, or set trainer.precision=bf16-mixed."
        ) from error
    return _best(best, run)


class AtomicCheckpoints(TorchCheckpointIO):
    """Writes a checkpoint beside its place, to the disk, and then renames it: a kill leaves the old one or the new one.

    Lightning's own way passes through the system's folder for temporary files, which may be another disk.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """See the class."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.partial")
        with partial.open("wb") as file:
            try:
                torch.save(checkpoint, file)
            except RuntimeError as error:
                # torch closes its archive even where writing it has failed, and then reports the unfinished archive
                # instead of the reason, such as Ctrl-C.
                raise error.__context__ or error from None
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)


class RunCheckpoint(ModelCheckpoint):
    """Keeps one checkpoint of a run under a fixed name, also when the run's folder has been moved.

    Two of these, because Lightning's own ``save_last`` skips epochs that are not the best.
    """

    def __init__(self, run: Path, name: str, **arguments: Any) -> None:
        super().__init__(run / "checkpoints", filename=name, enable_version_counter=False, **arguments)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the earlier part's record of the best, which Lightning would drop with the old folder's name."""
        super().load_state_dict(_relocate(state_dict, str(state_dict["dirpath"]), str(self.dirpath)))


class RunEarlyStopping(EarlyStopping):
    """Goes on with the patience that a resumed run is given, where Lightning's would take that of the earlier part."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take all but the patience."""
        super().load_state_dict({**state_dict, "patience": self.patience})


def _relocate(value: Any, old: str, new: str) -> Any:
    """The same record with every path in the folder ``old`` in the folder ``new`` instead."""
    if isinstance(value, str):
        return new + value[len(old) :] if value.startswith(old) else value
    if isinstance(value, dict):
        return {_relocate(key, old, new): _relocate(item, old, new) for key, item in value.items()}
    return value


def _callbacks(settings: Mapping[str, Any], run: Path) -> list[Callback]:
    callbacks: list[Callback] = []
    if settings["pictures_every"]:
        callbacks.append(Pictures(run / "pictures", every=settings["pictures_every"]))
    if settings["weight_averaging"]:
        callbacks.append(EMAWeightAveraging(decay=settings["weight_averaging"]))
    if settings["early_stopping"]:
        callbacks.append(RunEarlyStopping(_MONITORED, patience=settings["early_stopping"], mode="max"))
    return callbacks


def _shows_progress(setting: bool | str) -> bool:
    return sys.stdout.isatty() if setting == "auto" else bool(setting)


def _build_trainer(config: Mapping[str, Any], run: Path, callbacks: list[Callback], progress: bool) -> Trainer:
    arguments, plugins = trainer_arguments(config["trainer"])
    try:
        return Trainer(
            **arguments,
            default_root_dir=run,
            logger=build_logger(run, **config["logger"]),
            callbacks=callbacks,
            enable_progress_bar=progress,
            plugins=[AtomicCheckpoints(), *plugins],
            enable_model_summary=False,
        )
    except (MisconfigurationException, TypeError, ValueError) as error:
        raise ConfigError(f"trainer: Lightning refuses these settings: {one_line(error)}") from error


def _log_configuration(trainer: Trainer, config: Mapping[str, Any]) -> None:
    for logger in trainer.loggers:
        try:
            logger.log_hyperparams(dict(config))
        except Exception as error:  # no account, no server, no disk: each logger has its own for it
            raise ConfigError(
                f"logger={config['logger']['name']} cannot be started: {one_line(error)[:300]}; correct "
                "that, or choose another logger."
            ) from error


def _write_environment(run: Path, trainer: Trainer) -> None:
    if trainer.is_global_zero:
        environment = describe_environment(trainer.strategy.root_device)
        (run / "environment.json").write_text(json.dumps(environment, indent=2) + "\n")


def _has_stopped(saved: Mapping[str, Any], trainer: Trainer) -> bool:
    """Whether the training ended early before this checkpoint was made; Lightning would train one epoch more."""
    trained = saved["epoch"] + 1 >= (trainer.min_epochs or 0) and saved["global_step"] >= (trainer.min_steps or 0)
    return trained and any(
        saved["callbacks"].get(stopper.state_key, {}).get("wait_count", 0) >= stopper.patience
        for stopper in trainer.early_stopping_callbacks
    )


def _best(keeper: ModelCheckpoint, run: Path) -> Path:
    best = Path(keeper.best_model_path)
    if not keeper.best_model_path or not best.is_file():
        raise CheckpointError(
            f"{run}: no checkpoint was chosen as the best, because no validation ran; "
            "set trainer.check_val_every_n_epoch no larger than epochs."
        )
    return best
