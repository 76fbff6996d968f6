"""Runs of a comparison: finished ones with their report, others with the reason why they are not."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ema_seg.comparison.further import read_further
from ema_seg.reporting.report import load_report
from ema_seg.runtime.errors import DataError, one_line
from ema_seg.sweeps.folder import job_state, read_plan

__all__ = ["Result", "Run", "Runs", "load_result", "read_folder", "read_runs"]

_NEEDED = {
    *("attention", "config", "created", "curves", "data", "environment", "gmacs", "iou", "job", "miou", "palette"),
    *("parameters", "seed", "size_miou", "throughput"),
}


@dataclass(frozen=True)
class Result:
    """Report as a comparison uses it, with its long lists as arrays.

    Attributes:
        path: path of ``report.json``.
        report: its content without the images.
        names: names of the N images.
        miou: float64 (N,): mIoU of each image, ``nan`` where it has none.
        counts: int32 (N, strata, 2, K): pixels of intersection and union of each class in each stratum, which add up
            to those of the whole image.
        predictions: path of each image's predicted mask relative to ``report.json``, or None.
        further: counts of each image for the scores beyond the mIoU, see ``ema_seg.comparison.further``.
    """

    path: Path
    report: Mapping[str, Any]
    names: Sequence[str]
    miou: NDArray[np.float64]
    counts: NDArray[np.int32]
    predictions: Sequence[str | None]
    further: Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Run:
    """Run of a comparison.

    Attributes:
        folder: folder of the run.
        state: "finished" if there is a ``result``, else see ``ema_seg.comparison.schema.Job``.
        reason: why it is not finished.
        result: its report.
        overrides: the overrides that distinguish it from the other jobs of its sweep, as on the command line; None for
            a run that was not read as a job of a sweep.
    """

    folder: Path
    state: str
    reason: str | None = None
    result: Result | None = None
    overrides: Mapping[str, str] | None = None

    @property
    def seed(self) -> int | None:
        """Seed of the training; None if it is not known."""
        if self.result is not None:
            return self.result.report["seed"]
        text = (self.overrides or {}).get("seed", "")
        return int(text) if text.isdecimal() else None


@dataclass(frozen=True)
class Runs:
    """Runs of a comparison, with their title, folder, baseline and groups of classes.

    Attributes:
        title: name of the sweep or the folder, or the names of the runs.
        folder: folder of the sweep or of the runs; None for runs that were named one by one.
        runs: the runs, in the order of their rows.
        baseline: settings that name the sweep's baseline; None for the default of ``match_runs``.
        notes: sentences about reports that were left out and sweeps that were not read as such.
        groups: names of the classes of each group that gets a score, by the group's name; classes that the data do not
            have are ignored.
        claims: claims of the sweep, see ``ema_seg.config.SweepClaim``.
        until: half width in points that ended the sweep, which makes its intervals sequential; None for a fixed number
            of seeds.
        metric: name of the score that the results' IoU stands for, see ``ema_seg.comparison.metric``.
    """

    title: str
    folder: Path | None
    runs: Sequence[Run]
    baseline: Mapping[str, str] | None = None
    notes: Sequence[str] = ()
    groups: Mapping[str, Sequence[str]] = field(default_factory=dict)
    claims: Sequence[Mapping[str, Any]] = ()
    until: float | None = None
    metric: str = "mIoU"


def read_folder(folder: Path) -> Runs:
    """Read the runs of a sweep, or all runs in a folder.

    With a ``sweep.json``, the runs are its jobs in any state; a job whose report cannot be read counts as failed.
    Without one, every readable ``*/report/report.json`` and ``*/*/report/report.json`` is a finished run.

    Raises:
        DataError: the folder does not exist or has no finished run.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; give the folder of a sweep.")
    notes: list[str] = []
    if (folder / "sweep.json").is_file():
        plan = read_plan(folder)
        runs = [_read_job(folder / job.folder, job.impossible, job.overrides, notes) for job in plan.jobs]
        found = Runs(plan.name, folder, runs, plan.baseline, notes, plan.groups, plan.claims, plan.until)
    else:
        paths = sorted({*folder.glob("*/report/report.json"), *folder.glob("*/*/report/report.json")})
        runs = [_read_job(path.parents[1], None, None, notes) for path in paths]
        for plan_path in sorted(folder.glob("*/sweep.json")):
            notes.append(
                f"{plan_path.parent} is a sweep: its finished jobs are grouped by their settings here, its other jobs "
                "are not shown, and its baseline and groups are not used."
            )
        # Without a readable report, a run's configuration, and so its row, is unknown.
        found = Runs(folder.resolve().name, folder, [run for run in runs if run.result], None, notes)
    if not any(run.result for run in found.runs):
        states = ", ".join(f"{sum(run.state == state for run in found.runs)} {state}" for state in _states(found.runs))
        jobs = (
            f"no job is finished ({states}); run or resume the sweep first"
            if found.runs
            else "no */report/report.json in it can be read; give the folder of a sweep or of runs"
        )
        told = f" {notes[0]}" if notes else ""
        raise DataError(f"{folder}: {jobs}.{told}")
    return found


def read_runs(paths: Sequence[Path]) -> Runs:
    """Read runs by their folders, or by their ``report.json``; the first is the baseline.

    Raises:
        DataError: a run has no report, or its report cannot be read.
    """
    runs = []
    for path in paths:
        report = path
        if path.is_dir():
            report = path / "report" / "report.json"
            # eval.py can write a report outside a run's folder.
            if not report.is_file() and (path / "report.json").is_file():
                report = path / "report.json"
        result = load_result(report)
        folder = report.parent.parent if report.parent.name == "report" else report.parent
        runs.append(Run(folder, "finished", result=result))
    return Runs(" and ".join(run.folder.resolve().name for run in runs), None, runs)


def load_result(path: Path) -> Result:
    """Read a ``report.json`` as a comparison uses it.

    Raises:
        DataError: the file cannot be read, or is not a complete report of this version.
    """
    report = load_report(path)
    try:
        images = report.pop("images")
        strata = list(report["strata"])
        counts = [
            [[image["strata"][name][key] for key in ("intersection", "union")] for name in strata] for image in images
        ]
        result = Result(
            path=path,
            report=report,
            names=[image["name"] for image in images],
            miou=np.array([image["miou"] for image in images], dtype=float),
            counts=np.array(counts, dtype=np.int32),
            predictions=[image["prediction"] for image in images],
            further=read_further(images, len(report["classes"])),
        )
        whole = np.array([[image["intersection"], image["union"]] for image in images], dtype=np.int32)
        if whole.shape != (len(images), 2, len(report["classes"])) or (result.counts.sum(axis=1) != whole).any():
            raise ValueError("the pixel counts of the images are inconsistent")
        if missing := sorted(_NEEDED.difference(report)):
            raise KeyError(f"{missing[0]} is missing")
        if not report["throughput"]["forward"]:
            raise ValueError("throughput.forward is empty")
        if len({len(column) for column in (report["curves"] or {}).values()}) > 1:
            raise ValueError("the curves have different lengths")
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{path}: is not a complete report ({one_line(error)}); write it again with eval.py."
        ) from error
    return result


def _read_job(folder: Path, impossible: str | None, overrides: Mapping[str, str] | None, notes: list[str]) -> Run:
    state = job_state(folder, impossible)
    if state.name != "finished":
        return Run(folder, state.name, state.reason, overrides=overrides)
    try:
        return Run(folder, "finished", result=load_result(folder / "report" / "report.json"), overrides=overrides)
    except DataError as error:
        notes.append(f"Left out: {error}")
        return Run(folder, "failed", str(error), overrides=overrides)


def _states(runs: Sequence[Run]) -> list[str]:
    return list(dict.fromkeys(run.state for run in runs))
