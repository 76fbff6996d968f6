"""Sweeper of ``python train.py -m sweep=search``: Optuna chooses each job's settings from earlier results."""

from collections.abc import Mapping, Sequence
from typing import Any

from hydra.core.override_parser.types import IntervalSweep, Override

from ema_seg.cli.command_line import reports_errors
from ema_seg.runtime.errors import ConfigError, one_line
from ema_seg.runtime.extras import install_command
from ema_seg.sweeps import PlannedJob, job_state

from .base import FolderSweeper, by_dotted_key


class SearchSweeper(FolderSweeper):
    """Sweeper over ``sweep.space`` and the command line's sweeps, such as ``optimizer.lr='interval(1e-4,1e-2)'``.

    The same command again resumes the search; a higher ``sweep.trials`` extends it.
    """

    @reports_errors
    def sweep(self, arguments: list[str]) -> None:
        """Run trials with settings from the study and report their results to it, until there are enough."""
        self.open_folder(arguments)
        try:
            from ema_seg.sweeps.search import OptunaStudy
        except ImportError as error:
            raise ConfigError(f"sweep=search: needs Optuna ({error}); run {install_command('search')}.") from error
        settings = self.settings
        fixed, space = self._split(arguments, by_dotted_key(settings["space"]))
        search = OptunaStudy(self.folder, seed=settings["seed"], grace=settings["grace"])
        search.check_space(_distributions(space), self.named)

        jobs: list[PlannedJob] = []  # one for each trial; two may be the same
        plan: list[PlannedJob] = []
        overrides_of: dict[str, list[str]] = {}
        while len(jobs) < settings["trials"]:
            first = len(jobs)
            for number in range(first, min(first + settings["parallel"], settings["trials"])):
                chosen = search.ask(number, _distributions(space))
                values = {key: str(value) for key, value in chosen.items()}
                overrides = [*fixed, *(f"{key}={value}" for key, value in values.items()), f"sweep.trial={number}"]
                job = self.plan_job(overrides, {key.lstrip("+"): value for key, value in values.items()})
                jobs.append(job)
                overrides_of.setdefault(job.identity, overrides)
            plan = self.write_plan(self.merge_duplicates(jobs))
            new = {job.identity for job in jobs[first:]}
            to_do = [job for job in plan if job.identity in new and not self.is_settled(job)]
            self.launch({job.folder: overrides_of[job.identity] for job in to_do}, plan)
            states = {job.identity: job_state(self.folder / job.folder, job.impossible) for job in plan}
            for number, job in enumerate(jobs[first:], first):
                search.tell(number, states[job.identity])
        self.close(plan)

    def _split(self, arguments: Sequence[str], space: Mapping[str, Any]) -> tuple[list[str], list[Override]]:
        """Split overrides into those that all trials share and those to search; the command line takes precedence."""
        given = self.parse(arguments)
        own = {override.key_or_group for override in given}
        configured = self.parse([f"{key}={value}" for key, value in space.items() if key not in own])
        for override in configured:
            if not override.is_sweep_override():
                raise ConfigError(
                    f"sweep.space.{override.input_line}: must have several values, such as interval(low,high) or "
                    "a,b,c, got one."
                )
        searched = [*configured, *(override for override in given if override.is_sweep_override())]
        for override in searched:
            if override.key_or_group == "seed":
                raise ConfigError(
                    f"{override.input_line}: a search must have one seed, or it would choose the luckiest; set seed=0, "
                    "and train the best settings with several seeds."
                )
        if not searched:
            raise ConfigError(
                "sweep.space: must have at least one key, got none; add one, such as "
                "optimizer.lr='interval(1e-4,1e-2)'."
            )
        fixed = [text for text, override in zip(arguments, given, strict=True) if not override.is_sweep_override()]
        return fixed, searched


def _distributions(space: Sequence[Override]) -> dict[str, Any]:
    """Return Optuna's distributions by key: of floats (ints if the interval is cast to int), or of a choice's texts."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    distributions: dict[str, Any] = {}
    for override in space:
        key, value = override.get_key_element(), override.value()
        try:
            if isinstance(value, IntervalSweep):
                kind = IntDistribution if isinstance(value.start, int) else FloatDistribution
                distributions[key] = kind(value.start, value.end, log="log" in value.tags)  # type: ignore[arg-type]
            else:
                distributions[key] = CategoricalDistribution(list(override.sweep_string_iterator()))
        except ValueError as error:
            raise ConfigError(
                f"{override.input_line}: cannot be searched ({one_line(error).rstrip('.')}); correct the values."
            ) from error
    return distributions
