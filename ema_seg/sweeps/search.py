"""Hyperparameter search with Optuna: the study is kept in the sweep's folder and prunes poor trials."""

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

from ema_seg.runtime.distributed.collectives import broadcast
from ema_seg.runtime.errors import ConfigError
from ema_seg.sweeps.folder import JobState
from ema_seg.sweeps.job import Pruned, is_settled

__all__ = ["OptunaStudy", "PruningCallback"]


class OptunaStudy:
    """Optuna study of a sweep, created if there is none yet, that maximises the best validation mIoU.

    The sampler (TPE) is seeded with ``seed`` plus the trial's number at every trial, so that an interrupted search
    resumes as if it had not stopped.

    Args:
        folder: the sweep's folder.
        seed: seed of the sampler.
        grace: number of trials, and of epochs in each, before a trial is pruned for being worse than the median of
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
        """Check that existing trials are of this search; at first use, store the overrides that name it.

        Args:
            space: distribution of each searched key.
            overrides: the overrides on the command line that name the search.

        Raises:
            ConfigError: the trials in the folder are of another search.
        """
        known = self.study.user_attrs.get("overrides")
        if known is None:
            self.study.set_user_attr("overrides", list(overrides))
        elif known != list(overrides):
            raise ConfigError(
                f"{self.folder}: the search here was started with {' '.join(known)}, got {' '.join(overrides)}; choose "
                "another sweep.id."
            )
        for trial in self.study.trials[:1]:
            if trial.distributions != space:
                raise ConfigError(
                    f"{self.folder}: the trials here ({len(self.study.trials)}) searched "
                    f"{_described(trial.distributions)}, got {_described(space)}; choose another sweep.id."
                )

    def ask(self, number: int, space: Mapping[str, BaseDistribution]) -> dict[str, Any]:
        """Return the settings of a trial: those that it has already, or new ones."""
        if number < len(self.study.trials):
            return self.study.trials[number].params
        # Sample in a copy of the study, then add the trial with all its settings at once: a kill between two settings
        # would leave a trial that cannot be finished.
        sampler = optuna.samplers.TPESampler(seed=self.seed + number, n_startup_trials=max(self.grace, 1))
        beside = optuna.create_study(sampler=sampler, direction="maximize")
        beside.add_trials(self.study.trials)
        chosen = beside.ask(dict(space)).params
        self.study.add_trial(
            optuna.trial.create_trial(state=TrialState.RUNNING, params=chosen, distributions=dict(space))
        )
        return chosen

    def tell(self, number: int, state: JobState) -> None:
        """Report the result of a trial to the study, if the job is settled and the study does not have it yet."""
        if self.study.trials[number].state.is_finished() or not is_settled(state):
            return
        if state.name == "finished" and state.miou is not None:
            self.study.tell(number, state.miou)
        else:
            self.study.tell(number, state=TrialState.PRUNED if state.name == "pruned" else TrialState.FAIL)


class PruningCallback(Callback):
    """Callback that reports every validation score to the study and ends the trial if the study prunes it.

    With several ranks, rank 0 asks the study and broadcasts the answer.

    Args:
        folder: the sweep's folder.
        number: the trial's number.
        seed: see ``OptunaStudy``.
        grace: see ``OptunaStudy``.
    """

    def __init__(self, folder: Path, number: int, *, seed: int, grace: int) -> None:
        self.folder, self.number, self.seed, self.grace = folder, number, seed, grace

    @cached_property
    def study(self) -> optuna.Study:
        """Study of the search, opened at first use because an open one cannot be sent to another process."""
        return OptunaStudy(self.folder, seed=self.seed, grace=self.grace).study

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report the score, and end the trial if the study prunes it.

        Raises:
            Pruned: the study prunes the trial.
        """
        epoch, score = trainer.current_epoch, float(trainer.callback_metrics["val/miou"])
        if reason := broadcast(self._ask(epoch, score) if trainer.is_global_zero else None):
            raise Pruned(reason)

    def _ask(self, epoch: int, score: float) -> str | None:
        """Report the score; return why the trial is pruned, or None if it is not."""
        known = self.study.trials[self.number]
        if known.state.is_finished():  # it failed for good before and is retried
            return None
        trial = optuna.trial.Trial(self.study, known._trial_id)
        if epoch not in known.intermediate_values:  # else a resumed trial reported it before
            trial.report(score, epoch)
        if not trial.should_prune():
            return None
        best = max([score, *known.intermediate_values.values()])
        return f"stopped after epoch {epoch + 1}: best val mIoU {best:.4f} is below the earlier trials' median"


def _described(space: Mapping[str, BaseDistribution]) -> str:
    return ", ".join(f"{key}={distribution}" for key, distribution in space.items())
