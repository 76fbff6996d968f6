"""Running one job of a sweep: once, whole, and without harm to the others."""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from socket import gethostname
from typing import Any

from filelock import Timeout

from ema_seg.errors import ConfigError, DataError, one_line
from ema_seg.reporting.files import write_file
from ema_seg.sweeps.folder import JobState, job_state, record_failure, run_lock
from ema_seg.texts import read_json

__all__ = ["MOST_ATTEMPTS", "Pruned", "hold_run", "is_settled", "read_job", "run_job"]

# A job that has failed is tried once more when the sweep's command is given again.
MOST_ATTEMPTS = 2


class Pruned(Exception):
    """Raised by a search that gives up a job early; the message says why."""


def is_settled(state: JobState, *, retry: bool = False) -> bool:
    """Whether a job in this state is not to be run: it is done, or would fail again.

    Args:
        state: of the job.
        retry: a failed job is to be run again, however often it has failed.
    """
    return state.name in ("finished", "pruned", "impossible") or (
        state.name == "failed" and state.attempts >= MOST_ATTEMPTS and not retry
    )


def read_job(run: Path) -> dict[str, Any] | None:
    """``identity`` and ``overrides`` of a run that is a job of a sweep; None of any other run."""
    try:
        job = read_json(run / "job.json", advice="remove it")
        return {"identity": job["identity"], "overrides": job["overrides"]}
    except OSError:
        return None
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{run / 'job.json'}: is not what a sweep wrote ({one_line(error)}); remove it.") from error


@contextmanager
def hold_run(folder: Path) -> Iterator[None]:
    """Keep the run in this folder, which may be a job of a sweep, from being trained by another process meanwhile.

    A disk that knows no locks is trusted.

    Raises:
        ConfigError: another process is training it.
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
    """Do the work of a job unless it is done already, and keep whatever goes wrong to the job.

    A job that another process runs is waited for: that process may be what is left of a killed launcher.

    Args:
        folder: the job's folder.
        job: ``identity`` and ``overrides``, which ``job.json`` keeps with the run.
        work: does it, and leaves a report; its argument says whether there is a checkpoint to go on from. What it
            raises is written to ``failure.json``, but for what ends the whole process, such as KeyboardInterrupt or
            Preempted.
        retry: see ``is_settled``.

    Returns:
        The state in which the job is left.
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
            except Exception as error:  # whatever a combination may bring about
                record_failure(folder, error)
    return job_state(folder)
