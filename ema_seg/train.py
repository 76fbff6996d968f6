"""The training, in the order in which it happens.

``ema_seg/cli`` leads from a command line to ``train``, which runs on every rank. Each part is one call here and one
module of its own: data in ``ema_seg/data``, model in ``ema_seg/models``, the rest in ``ema_seg/training``; the step of
a batch is ``SegmentationModule.training_step``.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning import Callback

from ema_seg.data import SegmentationDataModule
from ema_seg.models import segmenter_from_config
from ema_seg.models.auxiliary import add_auxiliary_head
from ema_seg.models.checkpoint import check_classes
from ema_seg.runtime.distributed.preemption import Preemption
from ema_seg.runtime.distributed.ranks import rank_info
from ema_seg.runtime.escaping import for_terminal
from ema_seg.runtime.execution import set_execution
from ema_seg.training.checkpoints import (
    BestCheckpoint,
    LastCheckpoint,
    load_last,
    require_same_model,
    stopped_early,
    weights_to_match,
)
from ema_seg.training.freezing import freeze_parts
from ema_seg.training.initial import gives_encoder, initialise, load_trained
from ema_seg.training.lightning_patches import ignore_warnings
from ema_seg.training.losses import build_loss
from ema_seg.training.module import MONITORED, SegmentationModule
from ema_seg.training.start import TrainingStart
from ema_seg.training.trainer import build_callbacks, build_trainer, fit

__all__ = ["train"]


def train(
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
    settings = config["training"]
    preemption = preemption or Preemption()
    ignore_warnings()

    # Checkpoint: where a resumed run continues.
    path, saved = load_last(run) if resume else (None, None)

    # Data: files to batches.
    data = SegmentationDataModule(**config["data"])
    if path is not None and saved is not None:
        require_same_model(saved, config, run)
        advice = "use data with the checkpoint's classes, or start a new run"
        check_classes(saved["classes"], data.classes, data.dataset_name, path, advice)
    data.skipped.attach_file(run / "skipped.csv")
    data.setup("fit")

    # Model: encoder, decoder and attention blocks, and in training an auxiliary head.
    weights = weights_to_match(config, saved)
    trained = load_trained(config["init_from"]) if config.get("init_from") and not resume else None
    pretrained = not resume and (trained is None or not gives_encoder(trained.config, config))
    model = segmenter_from_config(config, data.num_classes, pretrained=pretrained, weights=weights)
    if config["model"].get("auxiliary"):
        add_auxiliary_head(model, data.num_classes)

    # Initial weights: all that fits of another run's model.
    taken = None if trained is None else initialise(model, trained, data.classes)
    if taken and not quiet and rank_info().rank == 0:
        print("\n".join(map(for_terminal, taken.splitlines())), file=sys.stderr, flush=True)

    # Frozen parts: before the devices are set up, because DDP reduces what is trainable then.
    unfreezing = freeze_parts(model, config.get("freeze") or {}, saved["epoch"] if saved else 0)
    set_execution(model, channels_last=settings["channels_last"], compile=settings["compile"])

    # Loss: features of the head's last layer and masks to a scalar.
    loss = build_loss(config["loss"], data.num_classes, strips=settings.get("loss_strips", "auto"))

    # Module: the steps of training and validation, optimiser and schedule.
    module = SegmentationModule(
        model,
        loss,
        data.normalise,
        classes=data.classes,
        palette=data.palette,
        optimizer=config["optimizer"],
        schedule=config["schedule"],
        config=config,
        frozen=unfreezing.names if unfreezing else (),
    )

    # Callbacks: checkpoints, log, pictures, weight averaging, early stopping.
    # No run resumes from the best checkpoint, and without the optimiser's state it is a third of the size. But
    # Lightning writes no averaged weights into a checkpoint of weights alone.
    weights_only = not settings["weight_averaging"]
    best = BestCheckpoint(run, monitor=MONITORED, mode="max", save_weights_only=weights_only)
    last = LastCheckpoint(run, settings.get("checkpoint_every"), preemption)
    log, *others = build_callbacks(settings, run, quiet=quiet)
    if unfreezing:
        others.append(unfreezing)
    start = TrainingStart(config, run, best, path, on_start, taken)

    # Trainer: devices, precision, number of epochs. TrainingStart comes after the log, which checks metrics.csv.
    trainer = build_trainer(config["trainer"], run, [best, last, log, start, *others, *callbacks])

    # Fit: all epochs, unless a resumed run has nothing left to train.
    if saved is not None and stopped_early(saved, trainer):
        best.load_state_dict(saved["callbacks"][best.state_key])
    else:
        fit(trainer, module, data, start, preemption)

    # Best: the checkpoint with the highest validation mIoU.
    return best.best_path()
