"""Process group of a training or an evaluation, and the report of its first failure."""

import json
import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta
from importlib import import_module
from typing import TYPE_CHECKING

from ema_seg.runtime.distributed.launchers import detect_launcher
from ema_seg.runtime.distributed.ranks import RankInfo, rank_from_environment, rank_info
from ema_seg.runtime.errors import ConfigError, EmaSegError, Preempted, TrainingError, describe_os_error, one_line

if TYPE_CHECKING:
    from torch.distributed import Store

__all__ = [
    "FAILURE",
    "GRACE",
    "QUIET",
    "Failure",
    "ProcessFailed",
    "SecondaryFailure",
    "deserialize_error",
    "join_launcher",
    "process_group",
    "report_first_failure",
    "serialize_error",
]

# Timeout of collectives: the other ranks wait while rank 0 measures costs or draws figures.
_COLLECTIVE_TIMEOUT = timedelta(minutes=30)
# Seconds that the other ranks get to exit by themselves, after one has failed.
GRACE = 3.0
# Otherwise PyTorch prints a stack trace for each connection lost to a process that has ended.
QUIET = {"TORCH_CPP_LOG_LEVEL": "ERROR"}
# Key of the first failure in the group's store.
FAILURE = "failure"

Failure = Exception | Preempted


class ProcessFailed(RuntimeError):
    """Unexpected failure of a rank; the message ends in its traceback, if the rank has reported one."""


class SecondaryFailure(SystemExit):
    """Exit of a process whose failure another process reports or has caused, with the first failure's exit status.

    Attributes:
        first: the first failure of the group; None if the process that hosts the store is gone.
    """

    def __init__(self, first: Failure | None) -> None:
        super().__init__(first.exit_status if isinstance(first, EmaSegError | Preempted) else 1)
        self.first = first


_store: "Store | None" = None  # of the process group; holds the first failure


@contextmanager
def process_group() -> Iterator[None]:
    """Join the process group that torchrun's environment variables describe, for the duration of the block.

    Raises:
        ConfigError: rank 0 cannot be reached.
    """
    global _store
    for key, value in QUIET.items():
        os.environ.setdefault(key, value)
    import torch
    from torch import distributed

    here = rank_from_environment()
    if "OMP_NUM_THREADS" not in os.environ:  # torchrun sets it
        torch.set_num_threads(max(1, _usable_cores() // here.local_size))
    _store = _connect(here)
    distributed.init_process_group(
        "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
        store=_store,
        rank=here.rank,
        world_size=here.size,
        timeout=_COLLECTIVE_TIMEOUT,
    )
    try:
        yield
        if _has_failed(_store):  # the barrier would wait for ranks that are gone
            _abort()
        else:
            with report_first_failure():
                distributed.barrier()  # no rank closes a connection that another needs
            distributed.destroy_process_group()
    except BaseException:
        if _has_failed(_store):
            _abort()
            _leave_together(_store, here)
        raise
    _store = None


@contextmanager
def join_launcher() -> Iterator[str | None]:
    """Join the process group if torchrun, Slurm or submitit started us; yield the launcher's name, else None."""
    started_by = detect_launcher()
    with process_group() if started_by else nullcontext():
        yield started_by


def _usable_cores() -> int:
    """Return the number of cores that this process may use; on macOS and Windows, the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _abort() -> None:
    """Abort pending collectives, as far as the backend supports it."""
    from torch import distributed

    with suppress(Exception):
        assert distributed.group.WORLD is not None
        distributed.group.WORLD.abort()


def _leave_together(store: "Store", here: RankInfo) -> None:
    """Wait up to ``GRACE`` seconds until all ranks know of a preemption; return at once for other failures.

    Slurm ends the other tasks when the first one has exited, and the store may end with it.
    """
    with suppress(Exception):  # a timeout, or the store's host has ended
        if _are_leaving(store):
            store.set(f"leaving/{here.rank}", "")
            store.wait([f"leaving/{rank}" for rank in range(here.size)], timedelta(seconds=GRACE))


def _are_leaving(store: "Store") -> bool:
    """Return whether the first failure is a preemption."""
    try:
        return isinstance(deserialize_error(store.get(FAILURE).decode()), Preempted)
    except Exception:  # the store's host has ended
        return False


def _has_failed(store: "Store") -> bool:
    try:
        return store.check([FAILURE])
    except Exception:  # the store's host has ended
        return True


@contextmanager
def report_first_failure() -> Iterator[None]:
    """Re-raise the exception in the rank that failed first; raise ``SecondaryFailure`` in the others.

    The others mostly fail because they lost the first. Without a process group every exception passes.
    """
    try:
        yield
    except (Exception, Preempted) as error:
        if _store is None:
            raise
        word = serialize_error(error)
        try:
            first = _store.compare_set(FAILURE, "", word).decode()
        except Exception:  # the store's host has ended, so it failed first
            raise SecondaryFailure(None) from error
        if first != word:
            raise SecondaryFailure(deserialize_error(first)) from error
        raise


def _connect(here: RankInfo) -> "Store":
    from torch.distributed import PrefixStore, TCPStore

    hosted = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        store = TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            here.size,
            is_master=here.rank == 0 and not hosted,
            timeout=timedelta(minutes=5),
        )
    except (OSError, RuntimeError) as error:
        raise ConfigError(
            f"process {here.rank} of {here.size} cannot connect to process 0 at {os.environ['MASTER_ADDR']}, port "
            f"{os.environ['MASTER_PORT']} ({one_line(error)[:200]}); check that the machines reach each other there."
        ) from error
    return PrefixStore(f"ema-seg/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def serialize_error(error: Failure) -> str:
    """Serialise an exception to JSON, from which ``deserialize_error`` restores it if it is one of this package's."""
    if isinstance(error, OSError) and (sentence := describe_os_error(error)) is not None:
        error = TrainingError(sentence)
    own = type(error).__module__.startswith("ema_seg.")
    return json.dumps(
        {
            "rank": rank_info().rank,
            "class": [type(error).__module__, type(error).__qualname__] if own else None,
            "message": str(error) if own else f"{type(error).__name__}: {one_line(error)}",
            "traceback": None if own else "".join(traceback.format_exception(error)),
        }
    )


def deserialize_error(text: str) -> Failure:
    """Restore an exception from the JSON of ``serialize_error``; one that is not this package's as ProcessFailed."""
    word = json.loads(text)
    if word["class"] is None:
        return ProcessFailed(f"{word['message']}, in process {word['rank']}:\n{word['traceback']}")
    module, name = word["class"]
    failure: Failure = getattr(import_module(module), name)(word["message"])
    return failure
