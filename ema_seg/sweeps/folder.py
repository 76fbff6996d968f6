"""Folder of a sweep: the plan of its jobs, and the state of each job, which follows from its files.

``sweep.json`` holds the plan:

============  ========================================================================================
``schema``    ``"ema-seg.sweep/1"``
``name``      name of the sweep
``command``   the command line that wrote the plan last
``baseline``  the settings that name the baseline of comparisons, such as {"attention": "none"}; or null
``groups``    classes of each group that gets a score in comparisons, by the group's name
``claims``    claims that comparisons judge, see ``ema_seg.config.SweepClaim``
``until``     half width in points up to which seeds were added, or null
``jobs``      ``identity``, ``folder``, ``overrides`` (text by key) and ``epochs`` of each job, and
              ``impossible``: why it cannot be trained, or null
============  ========================================================================================

In a job's folder, ``report/report.json``, which is written last and atomically, means finished; ``failure.json`` means
failed or pruned; a lock on ``run.lock``, which the system releases when its holder dies, means running.
"""

import json
import traceback
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ema_seg.runtime.errors import DataError, EmaSegError, one_line
from ema_seg.runtime.files import write_file
from ema_seg.runtime.texts import read_json, read_rows

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = [
    "ANY",
    "JobState",
    "Plan",
    "PlannedJob",
    "is_running",
    "job_state",
    "read_failure",
    "read_plan",
    "record_failure",
    "run_lock",
    "write_plan",
]

SCHEMA = "ema-seg.sweep/1"

# Value of an override that stands for several: all of them give the same job.
ANY = "*"


@dataclass(frozen=True)
class PlannedJob:
    """Job in the plan of a sweep.

    Attributes:
        identity: see ``ema_seg.sweeps.identity``.
        folder: name of its folder in the sweep's folder.
        overrides: the overrides that distinguish it from the sweep's other jobs, as on the command line; ``ANY`` for a
            key of which several values give this job.
        epochs: number of epochs to train; None if that is not known.
        impossible: why it cannot be trained; None if it can.
    """

    identity: str
    folder: str
    overrides: dict[str, str]
    epochs: int | None = None
    impossible: str | None = None


@dataclass(frozen=True)
class Plan:
    """Content of ``sweep.json``."""

    name: str
    command: list[str]
    baseline: dict[str, str] | None
    jobs: list[PlannedJob]
    groups: dict[str, list[str]] = field(default_factory=dict)
    claims: list[dict[str, Any]] = field(default_factory=list)
    until: float | None = None


@dataclass(frozen=True)
class JobState:
    """State of a job.

    Attributes:
        name: "finished", "failed", "pruned", "impossible", "running", "interrupted" or "missing".
        reason: why it failed, was pruned or is impossible.
        attempts: number of times it failed or was pruned.
        epoch: number of epochs trained.
        seconds: time that these epochs took.
        miou: best validation mIoU so far.
    """

    name: str
    reason: str | None = None
    attempts: int = 0
    epoch: int = 0
    seconds: float = 0.0
    miou: float | None = None


def write_plan(folder: Path, plan: Plan) -> Plan:
    """Write ``sweep.json``; keep the jobs of an earlier plan, except impossible ones without a folder.

    A job of the earlier plan keeps its folder: another command may be running it there.

    Returns:
        The plan as written.
    """
    path = folder / "sweep.json"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "sweep.lock"):
        before = read_plan(folder) if path.is_file() else replace(plan, jobs=[])
        earlier = before.jobs
        folders = {job.identity: job.folder for job in earlier}
        own = [replace(job, folder=folders.get(job.identity, job.folder)) for job in plan.jobs]
        planned = {job.identity for job in own}
        tried = [job for job in earlier if not job.impossible or (folder / job.folder).is_dir()]
        kept = [job for job in tried if job.identity not in planned]
        # A sweep whose seeds depended on its results stays one.
        merged = replace(plan, jobs=[*own, *kept], until=plan.until if plan.until is not None else before.until)
        text = json.dumps({"schema": SCHEMA, **asdict(merged)}, indent=1, ensure_ascii=False) + "\n"
        write_file(path, text.encode())
    return merged


def read_plan(folder: Path) -> Plan:
    """Read ``sweep.json``.

    Raises:
        DataError: the file is missing, or is not a plan of this version.
    """
    path = folder / "sweep.json"
    try:
        content = read_json(path)
        if content.pop("schema") != SCHEMA:
            raise ValueError(f"its schema is not {SCHEMA!r}")
        jobs = [PlannedJob(**job) for job in content.pop("jobs")]
        for job in jobs:
            if Path(job.folder).name != job.folder or job.folder in ("", ".."):
                raise ValueError(f"a job's folder must be a plain name, got {job.folder!r}")
        return Plan(**content, jobs=jobs)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); give the folder of a sweep.") from error
    except (AttributeError, DataError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{path}: is not a sweep plan of this version ({one_line(error).rstrip('.')}); restore it, or choose "
            "another folder."
        ) from error


def run_lock(folder: Path) -> FileLock:
    """Return the lock that a run, or a job of a sweep, holds while it is trained."""
    return FileLock(folder / "run.lock")


def job_state(folder: Path, impossible: str | None = None, *, locked_by_us: bool = False) -> JobState:
    """Read the state of the job in this folder from its files.

    Args:
        folder: the job's folder, which need not exist.
        impossible: ``PlannedJob.impossible`` of the job.
        locked_by_us: the caller holds the job's lock, which therefore does not mean that the job is running.
    """
    if impossible is not None:
        return JobState("impossible", impossible)
    if not folder.is_dir():
        return JobState("missing")
    progress = _progress(folder)
    if (folder / "report" / "report.json").is_file():
        return JobState("finished", **progress)
    if not locked_by_us and is_running(folder):
        return JobState("running", **progress)
    failure = read_failure(folder)
    if failure is not None:
        return JobState(failure["state"], failure["reason"], failure["attempts"], **progress)
    started = (folder / "metrics.csv").exists() or (folder / "checkpoints").exists()
    return JobState("interrupted" if started else "missing", **progress)


def is_running(folder: Path) -> bool:
    """Check whether a process holds the lock of the run in this folder."""
    if fcntl is None:
        return _is_locked(folder)
    try:
        with (folder / "run.lock").open("rb") as file:
            # A shared lock, so that two checks at the same time do not take each other for a job.
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    except OSError:  # a file that cannot be read, or a disk without locks
        return False
    return False


def _is_locked(folder: Path) -> bool:
    """Check whether a process holds the lock by taking it for a moment, on systems without shared locks."""
    if not (folder / "run.lock").exists():
        return False
    try:
        with run_lock(folder).acquire(blocking=False):
            return False
    except Timeout:
        return True
    except (NotImplementedError, OSError):  # a file that cannot be read, or a disk without locks
        return False


def _progress(folder: Path) -> dict[str, Any]:
    try:
        rows = read_rows(folder / "metrics.csv")
        scores = [float(row["val/miou"]) for row in rows if row["val/miou"]]
        seconds = sum(float(row["seconds"]) for row in rows)
    except (OSError, KeyError, TypeError, ValueError, DataError):
        return {"epoch": 0, "seconds": 0.0, "miou": None}
    return {"epoch": len(rows), "seconds": seconds, "miou": max(scores, default=None)}


def read_failure(folder: Path) -> dict[str, Any] | None:
    """Read the ``failure.json`` of ``record_failure``; return None if there is none."""
    try:
        failure = read_json(folder / "failure.json")
        return {"state": failure["state"], "reason": failure["reason"], "attempts": int(failure["attempts"])}
    except OSError:
        return None
    except (KeyError, TypeError, ValueError, OverflowError, DataError) as error:
        return {"state": "failed", "reason": f"failure.json is unreadable ({one_line(error)})", "attempts": 1}


def record_failure(folder: Path, error: BaseException | str, state: str = "failed") -> str:
    """Write to ``failure.json`` why the job in this folder did not finish, and count the attempt.

    Args:
        folder: the job's folder.
        error: the error, or the reason as text; an error that is not a user's mistake is kept with its traceback.
        state: "failed" or "pruned".

    Returns:
        The reason, one sentence.
    """
    earlier = read_failure(folder)
    known = isinstance(error, str | EmaSegError)
    reason = str(error) if known else f"{type(error).__name__}: {one_line(error)}"  # type: ignore[arg-type]
    failure = {
        "state": state,
        "reason": reason,
        "attempts": 1 + (earlier["attempts"] if earlier else 0),
        "traceback": None if known else "".join(traceback.format_exception(error)),  # type: ignore[arg-type]
    }
    write_file(folder / "failure.json", (json.dumps(failure, indent=1, ensure_ascii=False) + "\n").encode())
    return reason
