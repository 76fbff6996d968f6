"""Base class of the sweepers: a folder that the same command finds again, job identities, and launching."""

import hashlib
import os
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import HydraException
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from ema_seg.cli.command_line import plain_config, quoted
from ema_seg.cli.trust import require_printable
from ema_seg.config import Sweep, SweepClaim, check_settings
from ema_seg.runtime.errors import ConfigError, EmaSegError, Preempted, one_line
from ema_seg.sweeps import (
    ANY,
    Plan,
    PlannedJob,
    hash_config,
    is_settled,
    job_name,
    job_state,
    machine_keys,
    read_plan,
    record_failure,
    setting_text,
    write_plan,
)
from ema_seg.sweeps.view import SweepView, render, survey

ROOT = Path(__file__).resolve().parents[2]

# Keys that, like machine keys, are left out of the name of a sweep's folder: they change where or how far the sweep
# runs, or how it is compared, but not which sweep it is. The other keys of ``sweep`` are part of the name.
_UNNAMED_KEYS = (
    *("seed", "launcher", "hydra"),
    *("sweep.trials", "sweep.parallel", "sweep.retry", "sweep.baseline", "sweep.groups", "sweep.claims"),
    *("sweep.until", "sweep.max_seeds"),
    "sweep.deal_devices",
)


class FolderSweeper(Sweeper):
    """Sweeper with a folder named after the sweep, and in it a folder for each job, named after its configuration."""

    def __init__(self) -> None:
        self.config: DictConfig | None = None
        self.launcher: Launcher | None = None
        self.hydra_context: HydraContext | None = None
        self.task_function: TaskFunction | None = None
        self.folder = Path()
        self.named: list[str] = []  # the overrides that name the sweep
        self.earlier: list[PlannedJob] = []  # jobs of an earlier plan in the folder

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Store Hydra's arguments; ``open_folder`` creates the launcher, whose settings may contain the folder."""
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config

    def open_folder(self, arguments: Sequence[str]) -> None:
        """Check the sweep's settings, name and create its folder, and create the launcher."""
        assert self.config is not None and self.hydra_context is not None and self.task_function is not None
        overrides = self.parse(arguments)
        for override in overrides:
            if override.key_or_group == "report.dir":
                raise ConfigError(
                    f"{override.input_line}: each job of a sweep writes its report into its own folder; remove "
                    "report.dir."
                )
        check_settings(self.settings, Sweep, "sweep.")
        for place, claim in enumerate(self.settings.get("claims") or []):
            check_settings(claim, SweepClaim, f"sweep.claims[{place}].")
        self.named = sorted(str(override.input_line) for override in overrides if self._names_sweep(override))
        if self.config.sweep.id is None:
            with open_dict(self.config):
                self.config.sweep.id = hashlib.sha256("\n".join(self.named).encode()).hexdigest()[:6]
        self.folder = Path(str(self.config.hydra.sweep.dir)).absolute()
        with open_dict(self.config):
            self.config.hydra.sweep.dir = str(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        if (self.folder / "sweep.json").is_file():
            self.earlier = read_plan(self.folder).jobs
        # For launchers that start new interpreters, which would not find the project's modules.
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        os.environ["PYTHONPATH"] = os.pathsep.join(paths)
        OmegaConf.resolve(self.config.hydra.launcher)
        require_printable(self.config.hydra.launcher)
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=self.hydra_context, task_function=self.task_function, config=self.config
        )

    @property
    def settings(self) -> dict[str, Any]:
        """Section ``sweep`` of the configuration as plain data."""
        assert self.config is not None
        settings = OmegaConf.to_container(self.config.sweep)
        assert isinstance(settings, dict)
        return settings  # type: ignore[return-value]  # all of its keys are texts

    @property
    def baseline(self) -> dict[str, str] | None:
        """Settings of the baseline as on the command line; None for the default one."""
        settings = self.settings["baseline"]
        return settings and {str(key): setting_text(value) for key, value in settings.items()}

    def _names_sweep(self, override: Override) -> bool:
        assert self.config is not None
        left_out = [*_UNNAMED_KEYS, *(key for key in machine_keys(self.config) if key != "sweep")]
        key = override.key_or_group.replace("/", ".")
        return key != "sweep" and not any(key == name or key.startswith(f"{name}.") for name in left_out)

    def parse(self, texts: Sequence[str]) -> list[Override]:
        """Parse overrides with Hydra's parser."""
        assert self.hydra_context is not None
        return OverridesParser.create(config_loader=self.hydra_context.config_loader).parse_overrides(list(texts))

    def plan_job(self, overrides: Sequence[str], distinguishing: Mapping[str, str]) -> PlannedJob:
        """Compose and check a job's configuration; return the job with its identity, or why it is impossible.

        Args:
            overrides: all overrides of the job.
            distinguishing: the overrides that distinguish it from the other jobs, text by key.
        """
        assert self.hydra_context is not None and self.config is not None
        key, epochs, impossible = hashlib.sha256(repr(sorted(overrides)).encode()).hexdigest()[:12], None, None
        try:
            composed = self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))
            with open_dict(composed):
                del composed["hydra"]
            config = plain_config(composed)
            key, epochs = hash_config(config), config["epochs"]
            check(config)
        except EmaSegError as error:
            impossible = str(error)
        except (HydraException, OmegaConfBaseException) as error:
            impossible = one_line(error)
        except Exception as error:  # a bad combination must not end the sweep
            impossible = f"{type(error).__name__}: {one_line(error)}"
        return PlannedJob(key, job_name(distinguishing, key), dict(distinguishing), epochs, impossible)

    def merge_duplicates(self, jobs: Sequence[PlannedJob]) -> list[PlannedJob]:
        """Merge jobs of the same identity into the first; overrides in which they differ become ``ANY``."""
        united: dict[str, PlannedJob] = {}
        for job in jobs:
            known = united.setdefault(job.identity, job)
            if known.overrides != job.overrides:
                told = {
                    key: value if job.overrides.get(key) == value else ANY for key, value in known.overrides.items()
                }
                united[job.identity] = replace(known, overrides=told, folder=job_name(told, job.identity))
        return list(united.values())

    def is_settled(self, job: PlannedJob) -> bool:
        """Check whether a job needs no further run."""
        return is_settled(job_state(self.folder / job.folder, job.impossible), retry=self.settings["retry"])

    def write_plan(self, jobs: Sequence[PlannedJob]) -> list[PlannedJob]:
        """Write the plan of the sweep and return the jobs with the folders that they keep."""
        settings = self.settings
        claims = settings.get("claims") or []
        plan = Plan(
            str(settings["name"]),
            sys.argv,
            self.baseline,
            list(jobs),
            settings["groups"],
            claims,
            settings.get("until"),
        )
        return write_plan(self.folder, plan).jobs[: len(jobs)]

    def launch(self, jobs: Mapping[str, Sequence[str]], shown: Sequence[PlannedJob]) -> None:
        """Run jobs until each has a report or a recorded failure, even if its process is killed.

        Args:
            jobs: the overrides of each job, by the name of its folder.
            shown: the jobs of the command, which the live view shows.

        Raises:
            ConfigError: the launcher cannot start any job.
        """
        waiting, deaths = dict(jobs), Counter[str]()
        try:
            with SweepView(lambda: survey(self.folder, shown)):
                while waiting:
                    again = self._launch_once(waiting, deaths)
                    waiting = {name: overrides for name, overrides in waiting.items() if name in again}
        except (KeyboardInterrupt, SystemExit) as end:  # Lightning turns Ctrl-C into SystemExit
            print("interrupted; run the same command again to resume.", file=sys.stderr)
            preempted = isinstance(end, SystemExit) and end.code == Preempted.exit_status
            sys.exit(Preempted.exit_status if preempted else 130)

    def _launch_once(self, jobs: Mapping[str, Sequence[str]], deaths: Counter[str]) -> set[str]:
        """Launch jobs and wait for them; return the names of those to launch again.

        Args:
            jobs: see ``launch``.
            deaths: number of times each job's process died; updated in place.
        """
        assert self.launcher is not None
        before = {name: self._job_start_time(name) for name in jobs}
        results: Sequence[JobReturn] = []
        death = "its process ended without an error message"
        try:
            batch = [self._arguments(name, overrides) for name, overrides in jobs.items()]
            results = self.launcher.launch(batch, initial_job_idx=0)
        except Exception as error:  # launchers raise different errors if a process is killed
            death = f"its process ended ({type(error).__name__}: {_reason(error)[:300]})"
        for name, result in zip(jobs, results, strict=False):
            if result.status is JobStatus.FAILED:  # before the job could record its failure
                record_failure(self.folder / name, result._return_value)
        # A launcher may give up at the first death while its other jobs still run.
        while any(job_state(self.folder / name).name == "running" for name in jobs):
            time.sleep(1)
        started = {name for name in jobs if self._job_start_time(name) != before[name]}
        if not started and not results:
            raise ConfigError(f"hydra.launcher: no job started because {death}; check the launcher's settings.")
        ended = {name for name in started if job_state(self.folder / name).name in ("interrupted", "missing")}
        deaths.update(ended)
        # One killed process may end the launcher's others too: only a second death counts as the job's failure.
        for name in ended:
            if deaths[name] > 1:
                record_failure(self.folder / name, death)
        return {name for name in ended if deaths[name] == 1} | (set() if results else jobs.keys() - started)

    def _job_start_time(self, name: str) -> int | None:
        try:
            return (self.folder / name / "job.json").stat().st_mtime_ns
        except OSError:
            return None

    def _arguments(self, name: str, overrides: Sequence[str]) -> list[str]:
        return [
            *overrides,
            f"sweep.job='{name}'",
            f"hydra.sweep.dir={quoted(self.folder)}",
            f"hydra.sweep.subdir='{name}'",
        ]

    def close(self, jobs: Sequence[PlannedJob]) -> None:
        """Print the states of the command's jobs, and compare all jobs of the folder if any is finished.

        Exit with status 1 unless each of the command's jobs is finished or pruned.
        """
        from ema_seg.comparison.files import report_comparison
        from ema_seg.comparison.runs import read_folder

        overview, plan = survey(self.folder, jobs), read_plan(self.folder)
        Console(stderr=True).print(render(overview))
        if others := len(plan.jobs) - len(jobs):
            print(
                f"The folder has {others} more {'job' if others == 1 else 'jobs'} of earlier commands: "
                f"python -m ema_seg.sweeps {self.folder}",
                file=sys.stderr,
            )
        if survey(self.folder, plan.jobs).counts["finished"]:
            page = report_comparison(read_folder(self.folder), self.folder / "comparison").with_suffix(".html")
            print(f"comparison: {page}")
        print(f"sweep: {self.folder}")
        if overview.counts.keys() - {"finished", "pruned"}:
            sys.exit(1)


def _reason(error: Exception) -> str:
    """Return an error's message; if it contains a traceback, as submitit's do, the error that ends it."""
    _, traceback, rest = str(error).rpartition("Traceback (most recent call last):")
    ends = [line for line in rest.splitlines() if line and not line.startswith(" ")]
    return ends[0] if traceback and ends else one_line(error)


def by_dotted_key(settings: Mapping[str, Any] | None, prefix: str = "") -> dict[str, Any]:
    """Flatten settings to dotted keys: ``+sweep.grid.optimizer.lr=…`` makes nested sections of one key."""
    flat: dict[str, Any] = {}
    for key, value in (settings or {}).items():
        flat |= by_dotted_key(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def check(config: dict[str, Any]) -> None:
    """Raise an error if a job's configuration or model is invalid."""
    from ema_seg.cli.checks import check_config, check_model  # late, for ``--help`` to answer at once

    check_config(config)
    check_model(config)
