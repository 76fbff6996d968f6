"""What the sweepers share: a folder that the same command finds again, jobs known by what they are, their launch."""

import hashlib
import os
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
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

from configs.command_line import plain_config
from ema_seg.errors import ConfigError, EmaSegError, one_line
from ema_seg.sweeps import Plan, PlannedJob, identity, job_name, job_state, read_plan, record_failure, write_plan
from ema_seg.sweeps.view import SweepView, render, survey

ROOT = Path(__file__).resolve().parents[2]

# Overrides that change where or how far a sweep goes, but not which sweep it is: its folder's name leaves them out.
_NOT_OF_THE_NAME = (
    r"(seed|resume|launcher|logger|data\.root|data\.workers|trainer\.accelerator|training\.progress_bar|sweep|"
    r"sweep\.trials|evaluation\.(device|budget)|hydra[./].*)="
)


class FolderSweeper(Sweeper):
    """A sweeper whose jobs live in a folder named by the sweep, each in a folder named by its configuration."""

    def __init__(self) -> None:
        self.config: DictConfig | None = None
        self.launcher: Launcher | None = None
        self.hydra_context: HydraContext | None = None
        self.task_function: TaskFunction | None = None
        self.folder = Path()
        self.earlier: dict[str, PlannedJob] = {}  # the jobs that the folder has a plan of, by identity

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Keep what Hydra hands over; the launcher is made when the folder is known, which its settings may name."""
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config

    def open_folder(self, arguments: Sequence[str]) -> None:
        """Name the folder after the sweep and what it fixes, and make the launcher."""
        assert self.config is not None and self.hydra_context is not None and self.task_function is not None
        if self.config.report.dir is not None:
            raise ConfigError(
                f"report.dir={self.config.report.dir}: the jobs of a sweep each keep their own; leave it out."
            )
        if self.config.sweep.id is None:
            named = sorted(text for text in arguments if not re.match(_NOT_OF_THE_NAME, text.lstrip("+~")))
            with open_dict(self.config):
                self.config.sweep.id = hashlib.sha256("\n".join(named).encode()).hexdigest()[:6]
        self.folder = Path(str(self.config.hydra.sweep.dir)).absolute()
        with open_dict(self.config):
            self.config.hydra.sweep.dir = str(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        if (self.folder / "sweep.json").is_file():
            self.earlier = {job.identity: job for job in read_plan(self.folder).jobs}
        # For launchers whose processes start from a bare interpreter, which does not know where train.py lies.
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        os.environ["PYTHONPATH"] = os.pathsep.join(paths)
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=self.hydra_context, task_function=self.task_function, config=self.config
        )

    def parse(self, texts: Sequence[str]) -> list[Override]:
        """Overrides as Hydra reads them."""
        assert self.hydra_context is not None
        return OverridesParser.create(config_loader=self.hydra_context.config_loader).parse_overrides(list(texts))

    def plan_job(self, overrides: Sequence[str], told_apart_by: Mapping[str, str]) -> PlannedJob:
        """Compose a job's configuration, see what can be said against it, and give it its name.

        Args:
            overrides: all of the job's.
            told_apart_by: what tells it from the other jobs, text by key.
        """
        assert self.hydra_context is not None and self.config is not None
        key, epochs, impossible = hashlib.sha256(repr(sorted(overrides)).encode()).hexdigest()[:12], None, None
        try:
            composed = self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))
            with open_dict(composed):
                del composed["hydra"]
            config = plain_config(composed)
            key, epochs = identity(config), config["epochs"]
            check(config)
        except EmaSegError as error:
            impossible = str(error)
        except (HydraException, OmegaConfBaseException) as error:
            impossible = one_line(error)
        except Exception as error:  # whatever else a combination brings about is no reason to lose the others
            impossible = f"{type(error).__name__}: {one_line(error)}"
        folder = self.earlier[key].folder if key in self.earlier else job_name(told_apart_by, key)
        job = PlannedJob(key, folder, dict(told_apart_by), epochs, impossible)
        self.earlier.setdefault(key, job)  # another combination that means the same is this job, in this folder
        return job

    def write_plan(self, jobs: Sequence[PlannedJob]) -> Plan:
        """Write down what is going to be run; every job once, also if two combinations mean the same."""
        assert self.config is not None
        unique = list({job.identity: job for job in reversed(jobs)}.values())[::-1]
        settings = OmegaConf.to_container(self.config.sweep)
        assert isinstance(settings, dict)
        plan = Plan(str(settings["name"]), sys.argv, settings["baseline"], unique, settings["groups"])
        return write_plan(self.folder, plan)

    def launch(self, jobs: Mapping[str, Sequence[str]], shown: Sequence[PlannedJob]) -> None:
        """Run jobs, and see that each ends in a report or a reason, also if its process is killed.

        Args:
            jobs: the overrides of each, by the name of its folder.
            shown: the jobs that the live view shows.

        Raises:
            ConfigError: the launcher cannot start any.
        """
        assert self.launcher is not None
        waiting, deaths = dict(jobs), Counter[str]()
        with SweepView(self.folder, shown):
            while waiting:
                before = {name: self._start_of(name) for name in waiting}
                results: Sequence[JobReturn] = []
                death = "its process ended without a word"
                try:
                    batch = [self._arguments(name, overrides) for name, overrides in waiting.items()]
                    results = self.launcher.launch(batch, initial_job_idx=0)
                except (KeyboardInterrupt, SystemExit):  # Lightning turns the one into the other
                    print("interrupted; the same command goes on where it was left.", file=sys.stderr)
                    sys.exit(130)
                except Exception as error:  # whatever a launcher says when one of its processes is killed
                    death = f"its process was ended ({type(error).__name__}: {one_line(error)[:300]})"
                for name, result in zip(waiting, results, strict=False):
                    if result.status is JobStatus.FAILED:  # before the job could take care of itself
                        record_failure(self.folder / name, result._return_value)
                started = [name for name in waiting if self._start_of(name) != before[name]]
                if not started and not results:
                    raise ConfigError(f"the launcher could not start any job: {death}.")
                ended = [name for name in started if job_state(self.folder / name).name in ("interrupted", "missing")]
                deaths.update(ended)
                # A launcher whose process is killed may end its others too: only the second time it was the job.
                for name in ended:
                    if deaths[name] > 1:
                        record_failure(self.folder / name, death)
                again = [name for name in ended if deaths[name] == 1]
                waiting = {
                    name: overrides
                    for name, overrides in waiting.items()
                    if name in again or (name not in started and not results)
                }

    def _start_of(self, name: str) -> int | None:
        try:
            return (self.folder / name / "job.json").stat().st_mtime_ns
        except OSError:
            return None

    def _arguments(self, name: str, overrides: Sequence[str]) -> list[str]:
        return [
            *overrides,
            f"sweep.job='{name}'",
            f"hydra.sweep.dir='{self.folder}'",
            f"hydra.sweep.subdir='{name}'",
        ]

    def close(self, jobs: Sequence[PlannedJob], plan: Plan) -> None:
        """Compare all that the folder has, and say what has become of it.

        Exits with status 1 unless each of ``jobs``, the command's own, is finished or was pruned.
        """
        from ema_seg.reporting.comparison_files import report_comparison
        from ema_seg.reporting.runs import read_folder

        overview = survey(self.folder, plan.jobs)
        Console(stderr=True).print(render(overview))
        if overview.counts["finished"]:
            page = report_comparison(read_folder(self.folder), self.folder / "comparison").with_suffix(".html")
            print(f"comparison: {page}")
        print(f"sweep: {self.folder}")
        if survey(self.folder, jobs).counts.keys() - {"finished", "pruned"}:
            sys.exit(1)


def check(config: dict[str, Any]) -> None:
    """See ``ema_seg.training.check_config``; imported late, for ``--help`` to answer at once."""
    from ema_seg.training import check_config

    check_config(config)
