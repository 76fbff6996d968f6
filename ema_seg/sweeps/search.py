"""A search for good settings with Optuna: the study lies in the sweep's folder, and gives hopeless trials up early."""

import logging
from pathlib import Path
from typing import Any

import optuna
from lightning import Callback, LightningModule, Trainer
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from ema_seg.sweeps.job import Pruned

__all__ = ["GiveUp", "open_study"]


def open_study(folder: Path, *, seed: int, trial: int, grace: int) -> optuna.Study:
    """The study of a search, made if there is none yet, that maximises the best validation mIoU.

    The sampler (TPE) starts from its seed anew at every trial, so that a search that was interrupted goes on as it
    would have.

    Args:
        folder: of the sweep.
        seed: of the sampler.
        trial: number of the trial that the study is opened for.
        grace: number of trials, and of epochs in each, before a trial is given up for being worse than the median of
            the earlier trials at the same epoch.
    """
    optuna.logging.set_verbosity(logging.WARNING)
    folder.mkdir(parents=True, exist_ok=True)
    return optuna.create_study(
        study_name="search",
        storage=JournalStorage(JournalFileBackend(str(folder / "search.journal"))),
        sampler=optuna.samplers.TPESampler(seed=seed + trial, n_startup_trials=max(grace, 1)),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=grace, n_warmup_steps=grace),
        direction="maximize",
        load_if_exists=True,
    )


class GiveUp(Callback):
    """Tells the study the score of every epoch, and ends the trial that it calls hopeless.

    Args:
        study: see ``open_study``.
        trial: the trial's number.
    """

    def __init__(self, study: optuna.Study, trial: int) -> None:
        self.trial = optuna.trial.Trial(study, study.trials[trial]._trial_id)
        self.reported = set(study.trials[trial].intermediate_values)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report, and ask.

        Raises:
            Pruned: the trial is to be given up.
        """
        epoch = trainer.current_epoch
        score: Any = trainer.callback_metrics["val/miou"]
        if epoch not in self.reported:  # by an earlier part of a resumed trial
            self.trial.report(float(score), epoch)
        if self.trial.should_prune():
            raise Pruned(
                f"given up after epoch {epoch + 1} with val mIoU {float(score):.4f}, below earlier trials' median"
            )
