"""Execution of one job of a sweep: by one process at a time, and without ending the sweep if it fails."""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from socket import gethostname
from typing import Any

from filelock import Timeout

from ema_seg.runtime.errors import ConfigError, DataError, one_line
from ema_seg.runtime.files import write_file
from ema_seg.runtime.texts import read_json
from ema_seg.sweeps.folder import JobState, job_state, record_failure, run_lock

__all__ = ["MOST_ATTEMPTS", "Pruned", "is_settled", "lock_run", "read_job", "run_job"]

# A job that has failed is tried once more when the sweep's command is repeated.
MOST_ATTEMPTS = 2


class Pruned(Exception):
    """Exception by which a search ends a job early; its message says why."""


def is_settled(state: JobState, *, retry: bool = False) -> bool:
    """Check whether a job needs no further run: it is finished, pruned or impossible, or has failed too often.

    Args:
        state: the state of the job.
        retry: whether to run a failed job again, however often it has failed.
    """
    return state.name in ("finished", "pruned", "impossible") or (
        state.name == "failed" and state.attempts >= MOST_ATTEMPTS and not retry
    )


def read_job(run: Path) -> dict[str, Any] | None:
    """Read ``identity`` and ``overrides`` of a run that is a job of a sweep; return None for any other run.

    Raises:
        DataError: ``job.json`` is not what a sweep wrote.
    """
    try:
        job = read_json(run / "job.json", advice="remove it")
        return {"identity": job["identity"], "overrides": job["overrides"]}
    except OSError:
        return None
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{run / 'job.json'}: is not a valid job of a sweep ({one_line(error)}); remove it.") from error


@contextmanager
def lock_run(folder: Path) -> Iterator[None]:
    """Hold the lock of the run in this folder, so that no other process trains it meanwhile.

    The run may be a job of a sweep. On a file system without locks nothing is locked.

    Raises:
        ConfigError: another process is training the run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = run_lock(folder)
    try:
        lock.acquire(timeout=1)
    except Timeout:
        raise ConfigError(
            f"{folder}: another process is training this run; wait for it, or choose another hydra.run.dir."
        ) from None
    except NotImplementedError:
        yield
        return
    try:
        yield
    finally:
        lock.release()


def run_job(folder: Path, job: Mapping[str, Any], work: Callable[[bool], None], *, retry: bool = False) -> JobState:
    """Run a job unless it is settled, and record its failure instead of raising it.

    If another process runs the job, wait for it: it may be left over from a killed launcher.

    Args:
        folder: the job's folder.
        job: ``identity`` and ``overrides``, which are written to ``job.json``.
        work: trains the job and writes its report; its argument says whether there is a checkpoint to resume from. An
            ``Exception`` that it raises is written to ``failure.json``; KeyboardInterrupt and Preempted propagate.
        retry: see ``is_settled``.

    Returns:
        The state of the job afterwards.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with run_lock(folder):
        start = {
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "host": gethostname(),
            "process": os.getpid(),
        }
        write_file(folder / "job.json", (json.dumps({**job, **start}, ensure_ascii=False) + "\n").encode())
        if not is_settled(job_state(folder, locked_by_us=True), retry=retry):
            try:
                work((folder / "checkpoints" / "last.ckpt").is_file())
                (folder / "failure.json").unlink(missing_ok=True)
            except Pruned as error:
                record_failure(folder, str(error), state="pruned")
            except Exception as error:  # a bad combination must not end the sweep
                record_failure(folder, error)
    return job_state(folder)
