"""Sweeper of ``python train.py -m``: a grid of jobs that resumes, survives failed jobs and ends in a comparison."""

import itertools
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hydra.core.override_parser.types import Override

from ema_seg.cli.command_line import reports_errors
from ema_seg.runtime.errors import ConfigError

from .base import FolderSweeper, by_dotted_key


class GridSweeper(FolderSweeper):
    """Sweeper over every combination of the command line's values, ``sweep.grid`` and ``sweep.variants``.

    The same command again runs unfinished jobs: interrupted ones from their last checkpoint, failed ones once more.
    """

    @reports_errors
    def sweep(self, arguments: list[str]) -> None:
        """Plan the jobs, report impossible ones, run the others, and compare."""
        self.open_folder(arguments)
        combinations = list(self._combinations(arguments))
        planned = [self.plan_job(overrides, distinguishing) for overrides, distinguishing in combinations]
        overrides_of: dict[str, list[str]] = {}
        for job, (overrides, _) in zip(planned, combinations, strict=True):
            overrides_of.setdefault(job.identity, overrides)
        jobs = self.write_plan(self.merge_duplicates(planned))
        for job in jobs:
            if job.impossible:
                chosen = " ".join(f"{key}={value}" for key, value in job.overrides.items())
                print(f"impossible: {chosen}: {job.impossible}", file=sys.stderr)
        self.launch({job.folder: overrides_of[job.identity] for job in jobs if not self.is_settled(job)}, jobs)
        self.close(jobs)

    def _combinations(self, arguments: Sequence[str]) -> Iterator[tuple[list[str], dict[str, str]]]:
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


def _joined(key: str, values: Any) -> str:
    """Format values of ``sweep.grid`` as on the command line; a text may be a sweep such as ``range(1,4)``."""
    if values == []:
        raise ConfigError(f"sweep.grid.{key}: must have at least one value, got []; add values, or remove the key.")
    if not isinstance(values, list):
        return _text(values)
    return ",".join(f"'{value}'" if _is_plain(value) and "," in value else _text(value) for value in values)


def _is_plain(value: Any) -> bool:
    """Check whether Hydra would end this value at a comma in it."""
    return isinstance(value, str) and value[:1] not in ("[", "{", "'", '"') and "(" not in value


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _unquoted(text: str) -> str:
    return text.strip("'\"")
