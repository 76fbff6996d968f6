"""``python train.py -m``: a grid of jobs that resumes, outlives its failures, and ends in a comparison."""

import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hydra.core.override_parser.types import Override
from omegaconf import OmegaConf

from configs.command_line import reports_errors
from ema_seg.errors import ConfigError
from ema_seg.sweeps import is_settled, job_state

from .base import FolderSweeper


class GridSweeper(FolderSweeper):
    """Every combination of the values on the command line and of the configuration's ``sweep.grid`` and ``.variants``.

    The same command again runs what is not finished: interrupted jobs from their last checkpoint, failed ones once.
    """

    @reports_errors
    def sweep(self, arguments: list[str]) -> None:
        """Plan, tell what is impossible, run the rest, and compare."""
        self.open_folder(arguments)
        combinations = list(self._combinations(arguments))
        planned = [self.plan_job(overrides, told_apart_by) for overrides, told_apart_by in combinations]
        plan = self.write_plan(planned)
        for job in planned:
            if job.impossible:
                chosen = " ".join(f"{key}={value}" for key, value in job.overrides.items())
                print(f"impossible: {chosen}: {job.impossible}", file=sys.stderr)
        to_do = {
            job.folder: overrides
            for job, (overrides, _) in zip(planned, combinations, strict=True)
            if not is_settled(job_state(self.folder / job.folder, job.impossible))
        }
        self.launch(to_do, plan.jobs)
        self.close(planned, plan)

    def _combinations(self, arguments: Sequence[str]) -> Iterator[tuple[list[str], dict[str, str]]]:
        """The overrides of each job, and those that tell it from the others."""
        assert self.config is not None
        given = self.parse(arguments)
        settings: Any = OmegaConf.to_container(self.config.sweep)
        own = {override.key_or_group for override in given}
        grid = [f"{key}={_joined(values)}" for key, values in settings["grid"].items() if key not in own]
        axes = [_axis(override) for override in [*self.parse(grid), *given]]
        if settings["variants"]:
            axes.append(_variants(settings["variants"]))
        # The seed turns slowest, so that every configuration has been run once before any is run twice.
        axes.sort(key=lambda axis: axis[0] != "seed")
        # What the folder's earlier jobs differ in tells these from them, too.
        known = {name for job in self.earlier.values() for name in job.overrides}
        swept = [name for name, values in axes if len(values) > 1 or name in known]
        for values in itertools.product(*(values for _, values in axes)):
            chosen = {name: label for (name, _), (label, _) in zip(axes, values, strict=True)}
            told_apart = {name: label for name, label in chosen.items() if name in swept}
            seed = {"seed": told_apart.pop("seed")} if "seed" in told_apart else {}
            yield [text for _, texts in values for text in texts], {**told_apart, **seed}


# The name of an axis; for each of its values a label and the overrides that it stands for.
Axis = tuple[str, list[tuple[str, list[str]]]]


def _axis(override: Override) -> Axis:
    key = override.get_key_element()
    if override.is_delete():
        return key, [("", [key])]
    if not override.is_sweep_override():
        return key.lstrip("+"), [(str(override.value()), [f"{key}={override.get_value_element_as_str()}"])]
    if not override.is_discrete_sweep():
        raise ConfigError(
            f"{override.input_line}: an interval has no end of values; name them, or search with sweep=search."
        )
    return key.lstrip("+"), [(_unquoted(text), [f"{key}={text}"]) for text in override.sweep_string_iterator()]


def _variants(variants: Mapping[str, str | Sequence[str]]) -> Axis:
    return "variant", [
        (name, texts.split() if isinstance(texts, str) else list(texts)) for name, texts in variants.items()
    ]


def _joined(values: Any) -> str:
    return ",".join(map(str, values)) if isinstance(values, list) else str(values)


def _unquoted(text: str) -> str:
    return text.strip("'\"")
