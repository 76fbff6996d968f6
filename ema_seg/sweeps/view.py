"""View of a sweep: jobs finished, running, failed and left, the remaining time, and the best so far."""

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ema_seg.runtime.escaping import for_terminal
from ema_seg.sweeps.folder import ANY, JobState, PlannedJob, job_state
from ema_seg.sweeps.job import MOST_ATTEMPTS

__all__ = ["Overview", "SweepView", "describe", "render", "survey"]

_STYLES = {"finished": "green", "failed": "red", "impossible": "red", "running": "cyan", "pruned": "yellow"}
_LEFT = ("missing", "interrupted")
# Priority of the states if not all jobs fit the terminal.
_IMPORTANCE = ("running", "failed", "interrupted", "impossible", "pruned", "missing", "finished")


class Overview(NamedTuple):
    """States of all jobs, in the plan's order."""

    jobs: Sequence[PlannedJob]
    states: Sequence[JobState]

    @property
    def counts(self) -> Counter[str]:
        """Number of jobs in each state."""
        return Counter(state.name for state in self.states)

    @property
    def is_open(self) -> bool:
        """True if a job is running or still to be run."""
        return bool(self.counts.keys() & {"running", *_LEFT})

    @property
    def best(self) -> tuple[PlannedJob, float] | None:
        """Job with the best validation mIoU so far, and that mIoU; None if there is none."""
        scored = [
            (job, state.miou) for job, state in zip(self.jobs, self.states, strict=True) if state.miou is not None
        ]
        return max(scored, key=lambda pair: pair[1], default=None)

    @property
    def remaining(self) -> timedelta | None:
        """Remaining time: epochs left times mean time per epoch, divided by the number of running jobs."""
        trained = sum(state.epoch for state in self.states)
        if not trained:
            return None
        epochs = sum(
            max((job.epochs or 0) - state.epoch, 0)
            for job, state in zip(self.jobs, self.states, strict=True)
            if state.name in (*_LEFT, "running")
        )
        seconds = epochs * sum(state.seconds for state in self.states) / trained
        return timedelta(seconds=round(seconds / max(self.counts["running"], 1)))


def survey(folder: Path, jobs: Sequence[PlannedJob]) -> Overview:
    """Read the state of every job from its folder."""
    return Overview(jobs, [job_state(folder / job.folder, job.impossible) for job in jobs])


def describe(overview: Overview) -> str:
    """Format the overview in one line."""
    counts = overview.counts
    parts = [f"{counts['finished']} of {len(overview.jobs)} jobs finished", f"{counts['running']} running"]
    parts += [f"{counts[name]} {name}" for name in ("failed", "impossible", "pruned") if counts[name]]
    parts.append(f"{sum(counts[name] for name in _LEFT)} left")
    if overview.remaining:
        parts.append(f"about {overview.remaining} to go")
    if overview.best:
        job, miou = overview.best
        parts.append(f"best so far: val mIoU {miou:.4f}, {_name(job)}")
    return ", ".join(parts)


def render(overview: Overview, most: int | None = None) -> Group:
    """Render the overview as a table of jobs, the reasons of those without a result, and a summary line.

    Args:
        overview: the overview to show.
        most: maximum number of jobs in the table; each reason is then cut to one line. None shows all of both.
    """
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column, justify in (("job", "left"), ("state", "left"), ("epoch", "right"), ("val mIoU", "right")):
        table.add_column(column, justify=justify, overflow="fold")  # type: ignore[arg-type]
    reasons = []
    for job, state in _most_important(overview, most):
        table.add_row(
            Text(for_terminal(_name(job))),
            Text("waiting" if state.name == "missing" else state.name, style=_STYLES.get(state.name, "")),
            f"{state.epoch}/{job.epochs or '?'}" if state.epoch else "",
            "" if state.miou is None else f"{state.miou:.4f}",
        )
        if state.reason:
            text = for_terminal(f"{state.name}: {_name(job)}: {_reason(state)}")
            one_line = {} if most is None else {"no_wrap": True, "overflow": "ellipsis"}
            reasons.append(Text(text, style=_STYLES[state.name], **one_line))  # type: ignore[arg-type]
    hidden = len(overview.jobs) - table.row_count
    more = [Text(f"… and {hidden} more", style="dim")] if hidden else []
    return Group(table, *more, *reasons, Text(for_terminal(describe(overview)), style="bold"))


def _most_important(overview: Overview, most: int | None) -> list[tuple[PlannedJob, JobState]]:
    """Select at most ``most`` jobs by ``_IMPORTANCE``; return them with their states, in the plan's order."""
    pairs = list(enumerate(zip(overview.jobs, overview.states, strict=True)))
    chosen = sorted(pairs, key=lambda pair: _IMPORTANCE.index(pair[1][1].name))[:most]
    return [pair for _, pair in sorted(chosen, key=lambda pair: pair[0])]


def _reason(state: JobState) -> str:
    if state.name != "failed":
        return str(state.reason)
    if state.attempts < MOST_ATTEMPTS:
        return f"{state.reason} (The same command tries it once more.)"
    return f"{state.reason} (Tried {state.attempts} times; with sweep.retry=true the same command tries it again.)"


def _name(job: PlannedJob) -> str:
    told = (f"{key}={value}" for key, value in job.overrides.items() if value != ANY)
    return " ".join(told) or job.folder


class SweepView:
    """View of a running sweep: a live table on a terminal, otherwise a line whenever a job changes its state.

    Args:
        look: returns the overview of the sweep.
        console: where to show it; standard error by default, because standard output carries results.
    """

    def __init__(self, look: Callable[[], Overview], console: Console | None = None) -> None:
        self.survey = look
        self.console = console or Console(stderr=True)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._thread:
            self._thread.join()

    def _watch(self) -> None:
        if self.console.is_terminal:
            with Live(console=self.console, auto_refresh=False, vertical_overflow="crop") as live:
                while not self._stop.wait(1):
                    live.update(self._render_to_fit(self.survey()), refresh=True)
                live.update(Text(for_terminal(describe(self.survey())), style="bold"), refresh=True)
        else:
            self._print_changes()

    def _render_to_fit(self, overview: Overview) -> Group:
        """Render as many jobs as fit the terminal, and at least one."""
        most = min(len(overview.jobs), self.console.height)
        while most > 1 and len(self.console.render_lines(render(overview, most))) >= self.console.height:
            most = 3 * most // 4
        return render(overview, most)

    def _print_changes(self) -> None:
        shown: list[str] | None = None
        ended = False
        while not ended:
            # Survey once more after the stop, to include changes of the last second.
            ended = self._stop.wait(0 if shown is None else 1)
            overview = self.survey()
            states = [state.name for state in overview.states]
            if states != shown:
                shown = states
                self.console.print(for_terminal(describe(overview)), soft_wrap=True, markup=False, highlight=False)
