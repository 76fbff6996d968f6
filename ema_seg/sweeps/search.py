"""A search for good settings with Optuna: the study lies in the sweep's folder, and gives hopeless trials up early."""

import logging
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import optuna
from lightning import Callback, LightningModule, Trainer
from optuna.distributions import BaseDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from ema_seg.distributed.collectives import agree
from ema_seg.errors import ConfigError
from ema_seg.sweeps.folder import JobState
from ema_seg.sweeps.job import Pruned, is_settled

__all__ = ["GiveUp", "Search"]


class Search:
    """The study of a sweep, made if there is none yet, that maximises the best validation mIoU.

    The sampler (TPE) starts from its seed anew at every trial, so that a search that was interrupted goes on as it
    would have.

    Args:
        folder: of the sweep.
        seed: of the sampler.
        grace: number of trials, and of epochs in each, before a trial is given up for being worse than the median of
            the earlier trials at the same epoch.
    """

    def __init__(self, folder: Path, *, seed: int, grace: int) -> None:
        optuna.logging.set_verbosity(logging.WARNING)
        folder.mkdir(parents=True, exist_ok=True)
        self.seed, self.grace = seed, grace
        self.study = optuna.create_study(
            study_name="search",
            storage=JournalStorage(JournalFileBackend(str(folder / "search.journal"))),
            pruner=optuna.pruners.MedianPruner(n_startup_trials=grace, n_warmup_steps=grace),
            direction="maximize",
            load_if_exists=True,
        )
        self.folder = folder

    def check_space(self, space: Mapping[str, BaseDistribution], overrides: Sequence[str]) -> None:
        """A ConfigError if the trials that are there already are of another search.

        Args:
            space: what is searched.
            overrides: all that names the search, on the command line.
        """
        known = self.study.user_attrs.get("overrides")
        if known is None:
            self.study.set_user_attr("overrides", list(overrides))
        elif known != list(overrides):
            raise ConfigError(
                f"{self.folder}: the search in this folder was started with {' '.join(known)}, and not with "
                f"{' '.join(overrides)}; choose another sweep.id."
            )
        for trial in self.study.trials[:1]:
            if trial.distributions != space:
                raise ConfigError(
                    f"{self.folder}: the {len(self.study.trials)} trials in this folder searched "
                    f"{_described(trial.distributions)}, and not {_described(space)}; choose another sweep.id."
                )

    def ask(self, number: int, space: Mapping[str, BaseDistribution]) -> dict[str, Any]:
        """The settings of a trial: those that it has already, or new ones."""
        if number < len(self.study.trials):
            return self.study.trials[number].params
        # The sampler is asked beside the study, to which the trial then comes with all its settings at once: a kill
        # between two of them would leave a trial that nobody can finish.
        sampler = optuna.samplers.TPESampler(seed=self.seed + number, n_startup_trials=max(self.grace, 1))
        beside = optuna.create_study(sampler=sampler, direction="maximize")
        beside.add_trials(self.study.trials)
        chosen = beside.ask(dict(space)).params
        self.study.add_trial(
            optuna.trial.create_trial(state=TrialState.RUNNING, params=chosen, distributions=dict(space))
        )
        return chosen

    def tell(self, number: int, state: JobState) -> None:
        """Let the study know what has become of a trial, once that is final and unless it knows."""
        if self.study.trials[number].state.is_finished() or not is_settled(state):
            return
        if state.name == "finished" and state.miou is not None:
            self.study.tell(number, state.miou)
        else:
            self.study.tell(number, state=TrialState.PRUNED if state.name == "pruned" else TrialState.FAIL)


class GiveUp(Callback):
    """Tells the study the score of every epoch, and ends the trial that it calls hopeless.

    Of several processes that train the trial, the first asks and all end.

    Args:
        folder: of the sweep.
        number: the trial's.
        seed: see ``Search``.
        grace: see ``Search``.
    """

    def __init__(self, folder: Path, number: int, *, seed: int, grace: int) -> None:
        self.folder, self.number, self.seed, self.grace = folder, number, seed, grace

    @cached_property
    def study(self) -> optuna.Study:
        """Opened where it is asked, once, because an open one cannot be handed to another process."""
        return Search(self.folder, seed=self.seed, grace=self.grace).study

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report, and ask.

        Raises:
            Pruned: the trial is to be given up.
        """
        epoch, score = trainer.current_epoch, float(trainer.callback_metrics["val/miou"])
        if reason := agree(self._ask(epoch, score) if trainer.is_global_zero else None):
            raise Pruned(reason)

    def _ask(self, epoch: int, score: float) -> str | None:
        """Why the trial is to be given up; None if it is not."""
        known = self.study.trials[self.number]
        if known.state.is_finished():  # it has failed for good before, and is tried again all the same
            return None
        trial = optuna.trial.Trial(self.study, known._trial_id)
        if epoch not in known.intermediate_values:  # by an earlier part of a resumed trial
            trial.report(score, epoch)
        if not trial.should_prune():
            return None
        best = max([score, *known.intermediate_values.values()])
        return f"given up after epoch {epoch + 1}: at best val mIoU {best:.4f}, below earlier trials' median"


def _described(space: Mapping[str, BaseDistribution]) -> str:
    return ", ".join(f"{key}={distribution}" for key, distribution in space.items())
