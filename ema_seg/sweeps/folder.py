"""The folder of a sweep: the plan of its jobs, and the state of each as its files tell it.

``sweep.json`` holds the plan:

============  ========================================================================================
``schema``    ``"ema-seg.sweep/1"``
``name``      of the sweep
``command``   the command line that planned it last
``baseline``  the settings that name the baseline of comparisons, such as {"attention": "none"}; or null
``groups``    classes by the name of a group, which comparisons score apart
``jobs``      for each ``identity``, ``folder``, ``overrides`` (text by key), ``epochs``, and
              ``impossible``: why it cannot be trained, or null
============  ========================================================================================

Of a job's folder ``report/report.json``, which is written last and in one step, means finished; ``failure.json`` means
failed or pruned; a lock on ``run.lock``, which the system frees when its holder dies however it dies, means running.
"""

import json
import traceback
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ema_seg.errors import DataError, EmaSegError, one_line
from ema_seg.reporting.files import write_file
from ema_seg.texts import read_json, read_rows

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

# In the overrides of a job: more than one value of the key means this job.
ANY = "*"


@dataclass(frozen=True)
class PlannedJob:
    """A job of a sweep.

    Attributes:
        identity: see ``ema_seg.sweeps.identity``.
        folder: its name in the sweep's folder.
        overrides: what tells it from the sweep's other jobs, as on the command line; ``ANY`` for a key whose value
            makes no difference to this job.
        epochs: that it is to train; None if that is not known.
        impossible: why it cannot be trained; None if it can.
    """

    identity: str
    folder: str
    overrides: dict[str, str]
    epochs: int | None = None
    impossible: str | None = None


@dataclass(frozen=True)
class Plan:
    """What ``sweep.json`` holds."""

    name: str
    command: list[str]
    baseline: dict[str, str] | None
    jobs: list[PlannedJob]
    groups: dict[str, list[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class JobState:
    """What has become of a job.

    Attributes:
        name: "finished", "failed", "pruned", "impossible", "running", "interrupted" or "missing".
        reason: why it failed, was pruned or is impossible.
        attempts: how often it failed.
        epoch: epochs that it has trained.
        seconds: that they took.
        miou: the best validation mIoU so far.
    """

    name: str
    reason: str | None = None
    attempts: int = 0
    epoch: int = 0
    seconds: float = 0.0
    miou: float | None = None


def write_plan(folder: Path, plan: Plan) -> Plan:
    """Write ``sweep.json``; jobs of an earlier plan in this folder stay in it, but for those that could not be tried.

    A job that the earlier plan has, too, keeps its folder: another command may be running it there.

    Returns:
        The plan as written.
    """
    path = folder / "sweep.json"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "sweep.lock"):
        earlier = read_plan(folder).jobs if path.is_file() else []
        folders = {job.identity: job.folder for job in earlier}
        own = [replace(job, folder=folders.get(job.identity, job.folder)) for job in plan.jobs]
        planned = {job.identity for job in own}
        tried = [job for job in earlier if not job.impossible or (folder / job.folder).is_dir()]
        kept = [job for job in tried if job.identity not in planned]
        merged = replace(plan, jobs=[*own, *kept])
        text = json.dumps({"schema": SCHEMA, **asdict(merged)}, indent=1, ensure_ascii=False) + "\n"
        write_file(path, text.encode())
    return merged


def read_plan(folder: Path) -> Plan:
    """Read ``sweep.json``.

    Raises:
        DataError: it is missing, or no plan of this version.
    """
    path = folder / "sweep.json"
    try:
        content = read_json(path)
        if content.pop("schema") != SCHEMA:
            raise ValueError("another version")
        jobs = [PlannedJob(**job) for job in content.pop("jobs")]
        for job in jobs:
            if Path(job.folder).name != job.folder or job.folder in ("", ".."):
                raise ValueError(f"{job.folder!r} is no plain name of a job's folder")
        return Plan(**content, jobs=jobs)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); give the folder of a sweep.") from error
    except (AttributeError, DataError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: is no plan of a sweep of this version ({one_line(error)}).") from error


def run_lock(folder: Path) -> FileLock:
    """The lock that a run, or a job of a sweep, holds while it is trained."""
    return FileLock(folder / "run.lock")


def job_state(folder: Path, impossible: str | None = None, *, locked_by_us: bool = False) -> JobState:
    """What has become of the job in this folder.

    Args:
        folder: the job's folder, which need not exist.
        impossible: what the plan says about the job.
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
    """Whether a process holds the lock of the run in this folder."""
    if fcntl is None:
        return _is_held(folder)
    try:
        with (folder / "run.lock").open("rb") as file:
            # Shared: who only looks must not be taken for a job by another who looks, nor keep a job from starting.
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    except OSError:  # a file that cannot be read, or a disk without locks
        return False
    return False


def _is_held(folder: Path) -> bool:
    """Whether a process holds the lock, where locks are not shared: for a moment this process takes it."""
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
    """What ``record_failure`` has written; None if nothing."""
    try:
        failure = read_json(folder / "failure.json")
        return {"state": failure["state"], "reason": failure["reason"], "attempts": int(failure["attempts"])}
    except OSError:
        return None
    except (KeyError, TypeError, ValueError, OverflowError, DataError) as error:
        return {"state": "failed", "reason": f"failure.json is unreadable ({one_line(error)})", "attempts": 1}


def record_failure(folder: Path, error: BaseException | str, state: str = "failed") -> str:
    """Write down why the job in this folder did not finish, and that it has failed once more.

    Args:
        folder: the job's folder.
        error: what ended it; a traceback is kept of errors that are not a user's mistake.
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
