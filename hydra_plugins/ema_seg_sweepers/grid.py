"""Sweeper of ``python train.py -m``: a grid of jobs that resumes, survives failed jobs and ends in a comparison."""

import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hydra.core.override_parser.types import Override

from ema_seg.cli.command_line import reports_errors
from ema_seg.runtime.errors import ConfigError
from ema_seg.sweeps import ANY, PlannedJob, setting_text

from .base import FolderSweeper, by_dotted_key

# The overrides of a job, and those that distinguish it from the others.
Combination = tuple[list[str], dict[str, str]]

# Fewer seeds hardly show how much seeds vary; the sequential interval is made for as many.
_FEWEST_SEEDS = 3


class GridSweeper(FolderSweeper):
    """Sweeper over every combination of the command line's values, ``sweep.grid`` and ``sweep.variants``.

    The same command again runs unfinished jobs: interrupted ones from their last checkpoint, failed ones once more.
    """

    @reports_errors
    def sweep(self, arguments: list[str]) -> None:
        """Plan the jobs, report impossible ones, run the others, and compare."""
        self.open_folder(arguments)
        combinations = list(self._combinations(arguments))
        if self.settings["until"] is not None:
            self._check_sequential(combinations)
        planned = [self.plan_job(overrides, distinguishing) for overrides, distinguishing in combinations]
        overrides_of: dict[str, list[str]] = {}
        for job, (overrides, _) in zip(planned, combinations, strict=True):
            overrides_of.setdefault(job.identity, overrides)
        jobs = self.write_plan(self.merge_duplicates(planned))
        for job in jobs:
            if job.impossible:
                chosen = " ".join(f"{key}={value}" for key, value in job.overrides.items())
                print(f"impossible: {chosen}: {job.impossible}", file=sys.stderr)
        self._launch_unsettled(jobs, overrides_of)
        if self.settings["until"] is not None:
            jobs = self._add_seeds(combinations, jobs, overrides_of)
        self.close(jobs)

    def _launch_unsettled(self, jobs: list[PlannedJob], overrides_of: Mapping[str, list[str]]) -> None:
        self.launch({job.folder: overrides_of[job.identity] for job in jobs if not self.is_settled(job)}, jobs)

    def _check_sequential(self, combinations: Sequence[Combination]) -> None:
        """Raise ConfigError unless there are seeds to begin with and a baseline to compare with."""
        if len(seeds := _seeds(combinations)) < _FEWEST_SEEDS:
            raise ConfigError(
                f"sweep.until: needs {_FEWEST_SEEDS} seeds to begin with, got {len(seeds) or 1}; give seed=0,1,2."
            )
        baseline = self.baseline or {"attention": "none"}
        rows = [chosen for _, chosen in combinations]
        if not any(all(chosen.get(key) == value for key, value in baseline.items()) for chosen in rows):
            named = ", ".join(f"{key}={value}" for key, value in baseline.items())
            raise ConfigError(
                f"sweep.until: needs a baseline, and no job has {named}; add it, or name another with sweep.baseline."
            )

    def _add_seeds(
        self, combinations: Sequence[Combination], jobs: list[PlannedJob], overrides_of: dict[str, list[str]]
    ) -> list[PlannedJob]:
        """Run further seeds, one after the other, of rows whose interval is wide and of their baselines.

        Seeds that an interrupted command has added are finished, too.

        Returns:
            All jobs of the command.
        """
        until, most, given = self.settings["until"] / 100, self.settings["max_seeds"], _seeds(combinations)
        templates = [(texts, chosen) for texts, chosen in combinations if chosen["seed"] == str(given[0])]
        for seed in range(given[-1] + 1, given[-1] + 1 + most - len(given)):
            wide = self._wide_jobs(until)
            added = []
            for texts, chosen in templates:
                overrides = [f"seed={seed}" if text == f"seed={given[0]}" else text for text in texts]
                job = self.plan_job(overrides, {**chosen, "seed": str(seed)})
                is_wide = any(known.folder in wide for known in jobs if _is_same_row(known.overrides, chosen))
                begun = any(known.identity == job.identity for known in self.earlier) and not self.is_settled(job)
                if is_wide or begun:
                    overrides_of.setdefault(job.identity, overrides)
                    added.append(job)
            if not added:
                return jobs
            jobs = self.write_plan([*jobs, *self.merge_duplicates(added)])
            self._launch_unsettled(jobs, overrides_of)
        if self._wide_jobs(until):
            print(
                f"sweep.until={self.settings['until']}: some intervals are wider with {most} seeds; raise "
                "sweep.max_seeds to add more.",
                file=sys.stderr,
            )
        return jobs

    def _wide_jobs(self, until: float) -> set[str]:
        """Return the folders of all jobs of rows with a half width above ``until``, and of their baselines."""
        from ema_seg.comparison.compare import compare_runs
        from ema_seg.comparison.runs import read_folder

        if not any(self.folder.glob("*/report/report.json")):  # all jobs have failed
            return set()
        rows = {row["label"]: row for row in compare_runs(read_folder(self.folder))["rows"]}
        wide = [row for row in rows.values() if row["contrast"] and _half_width(row["contrast"]) > until]
        bases = [rows[row["contrast"]["baseline"]] for row in wide if row["contrast"]]
        return {str(job["run"]) for row in (*wide, *bases) for job in row["jobs"]}

    def _combinations(self, arguments: Sequence[str]) -> Iterator[Combination]:
        """Yield the overrides of each job, and those that distinguish it from the others."""
        given, settings = self.parse(arguments), self.settings
        own = {override.key_or_group for override in given}
        grid = [
            f"{key}={_joined(key, values)}" for key, values in by_dotted_key(settings["grid"]).items() if key not in own
        ]
        axes = [_axis(override) for override in [*self.parse(grid), *given]]
        if settings["variants"]:
            axes.append(_variants(settings["variants"]))
        # The seed is the outermost loop, so that every configuration runs once before any runs twice.
        axes.sort(key=lambda axis: axis[0] != "seed")
        # Keys that distinguish the folder's earlier jobs also distinguish these from them.
        known = {name for job in self.earlier for name in job.overrides}
        swept = [name for name, values in axes if len(values) > 1 or name in known]
        for values in itertools.product(*(values for _, values in axes)):
            chosen = {name: label for (name, _), (label, _) in zip(axes, values, strict=True)}
            told_apart = {name: label for name, label in chosen.items() if name in swept}
            seed = {"seed": told_apart.pop("seed")} if "seed" in told_apart else {}
            yield [text for _, texts in values for text in texts], {**told_apart, **seed}


# The name of an axis, and a label and the overrides of each of its values.
Axis = tuple[str, list[tuple[str, list[str]]]]


def _axis(override: Override) -> Axis:
    key = override.get_key_element()
    if override.is_delete():
        return key, [("", [key])]
    if not override.is_sweep_override():
        text = override.get_value_element_as_str()
        return key.lstrip("+"), [(_unquoted(text), [f"{key}={text}"])]
    if not override.is_discrete_sweep():
        raise ConfigError(
            f"{override.input_line}: a grid needs single values, got an interval; list them, or search with "
            "sweep=search."
        )
    return key.lstrip("+"), [(_unquoted(text), [f"{key}={text}"]) for text in override.sweep_string_iterator()]


def _variants(variants: Mapping[str, str | Sequence[str]]) -> Axis:
    return "variant", [
        (name, texts.split() if isinstance(texts, str) else list(texts)) for name, texts in variants.items()
    ]


def _seeds(combinations: Sequence[Combination]) -> list[int]:
    return sorted({int(seed) for _, chosen in combinations if (seed := chosen.get("seed", "")).isdecimal()})


def _is_same_row(overrides: Mapping[str, str], chosen: Mapping[str, str]) -> bool:
    return all(value in (ANY, chosen.get(key)) for key, value in overrides.items() if key != "seed")


def _half_width(contrast: Mapping[str, Any]) -> float:
    return (float(contrast["high"]) - float(contrast["low"])) / 2


def _joined(key: str, values: Any) -> str:
    """Format values of ``sweep.grid`` as on the command line; a text may be a sweep such as ``range(1,4)``."""
    if values == []:
        raise ConfigError(f"sweep.grid.{key}: must have at least one value, got []; add values, or remove the key.")
    if not isinstance(values, list):
        return setting_text(values)
    return ",".join(f"'{value}'" if _is_plain(value) and "," in value else setting_text(value) for value in values)


def _is_plain(value: Any) -> bool:
    """Check whether Hydra would end this value at a comma in it."""
    return isinstance(value, str) and value[:1] not in ("[", "{", "'", '"') and "(" not in value


def _unquoted(text: str) -> str:
    return text.strip("'\"")
