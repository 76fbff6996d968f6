"""``python train.py -m sweep=search``: Optuna chooses the settings of each job from the results of those before."""

from collections.abc import Sequence
from typing import Any

from hydra.core.override_parser.types import IntervalSweep, Override
from omegaconf import OmegaConf

from configs.command_line import reports_errors
from ema_seg.errors import ConfigError
from ema_seg.sweeps import PlannedJob, is_settled, job_state

from .base import FolderSweeper


class SearchSweeper(FolderSweeper):
    """Trials over the sweeps on the command line, such as ``optimizer.lr='interval(1e-4,1e-2)'``, and ``sweep.space``.

    The same command again goes on where the search was left; with a higher ``sweep.trials`` it goes further.
    """

    @reports_errors
    def sweep(self, arguments: list[str]) -> None:
        """Ask for settings, run them, tell the result, until there are enough trials."""
        self.open_folder(arguments)
        try:
            import optuna

            from ema_seg.sweeps.search import open_study
        except ImportError as error:
            raise ConfigError(f"sweep=search needs Optuna ({error}); pip install 'ema-seg[search]'.") from error
        assert self.config is not None
        settings: Any = OmegaConf.to_container(self.config.sweep)
        fixed, space = self._split(arguments, settings["space"])
        if not space:
            raise ConfigError("sweep.space is empty; name what to search, such as optimizer.lr='interval(1e-4,1e-2)'.")
        options = {"seed": settings["seed"], "grace": settings["grace"]}

        jobs: list[PlannedJob] = []
        while len(jobs) < settings["trials"]:
            batch: dict[str, list[str]] = {}
            told: dict[int, PlannedJob] = {}
            for number in range(len(jobs), min(len(jobs) + settings["parallel"], settings["trials"])):
                study = open_study(self.folder, trial=number, **options)
                # A trial that is there already is of an earlier call of the command, perhaps cut off in it.
                known = study.trials[number] if number < len(study.trials) else None
                chosen = known.params if known else _suggest(study.ask(), space)
                overrides = [*fixed, *(f"{key}={value}" for key, value in chosen.items()), f"sweep.trial={number}"]
                job = self.plan_job(overrides, {key.lstrip("+"): str(value) for key, value in chosen.items()})
                jobs.append(job)
                if not is_settled(job_state(self.folder / job.folder, job.impossible)):
                    batch[job.folder] = overrides
                if known is None or not known.state.is_finished():
                    told[number] = job
            plan = self.write_plan(jobs)
            self.launch(batch, plan.jobs)
            for number, job in told.items():
                state = job_state(self.folder / job.folder, job.impossible)
                outcome = {"finished": optuna.trial.TrialState.COMPLETE, "pruned": optuna.trial.TrialState.PRUNED}
                verdict = outcome.get(state.name, optuna.trial.TrialState.FAIL)
                value = state.miou if verdict is optuna.trial.TrialState.COMPLETE else None
                study.tell(number, value, state=verdict)
        self.close(jobs, plan)

    def _split(self, arguments: Sequence[str], space: dict[str, str]) -> tuple[list[str], list[Override]]:
        """What all trials share, and what is searched; the command line goes before the configuration."""
        given = self.parse(arguments)
        fixed = [text for text, override in zip(arguments, given, strict=True) if not override.is_sweep_override()]
        own = {override.key_or_group for override in given}
        configured = self.parse([f"{key}={value}" for key, value in space.items() if key not in own])
        return fixed, [override for override in [*configured, *given] if override.is_sweep_override()]


def _suggest(trial: Any, space: Sequence[Override]) -> dict[str, Any]:
    """A value for every override of the space: a number of an interval, the text of a choice."""
    chosen: dict[str, Any] = {}
    for override in space:
        key, value = override.get_key_element(), override.value()
        if isinstance(value, IntervalSweep):
            chosen[key] = trial.suggest_float(key, value.start, value.end, log="log" in value.tags)
        else:
            chosen[key] = trial.suggest_categorical(key, list(override.sweep_string_iterator()))
    return chosen
