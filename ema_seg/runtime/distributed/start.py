"""Process groups that train or evaluate one model, on one machine or many.

``run_together`` starts the processes on this machine. ``detect_launcher`` detects whether torchrun, Slurm or submitit
started this process as one of several; ``process_group`` then joins the process group. Inside, ``rank_info`` returns
rank and world size, ``ema_seg.runtime.distributed.collectives`` exchanges values, and ``report_first_failure`` limits
the report of several failures to the first.
"""

import ctypes
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta
from importlib import import_module
from types import FrameType
from typing import TYPE_CHECKING, Any, NamedTuple

from ema_seg.runtime.distributed.exit_handlers import PREEMPTION_SIGNALS, foreign_handler
from ema_seg.runtime.errors import ConfigError, EmaSegError, Preempted, TrainingError, describe_os_error, one_line
from ema_seg.runtime.host_memory import gc_frozen_imports

if TYPE_CHECKING:
    from torch.distributed import Store

__all__ = [
    "ProcessFailed",
    "RankInfo",
    "SecondaryFailure",
    "barrier",
    "detect_launcher",
    "is_single_process",
    "join_launcher",
    "process_group",
    "rank_info",
    "report_first_failure",
    "run_together",
    "single_process",
]

# Timeout of collectives: the other ranks wait while rank 0 measures costs or draws figures.
_COLLECTIVE_TIMEOUT = timedelta(minutes=30)
# Seconds that the other ranks get to exit by themselves, after one has failed.
_GRACE = 3.0

# Otherwise PyTorch prints a stack trace for each connection lost to a process that has ended.
_QUIET = {"TORCH_CPP_LOG_LEVEL": "ERROR"}

_FAILURE = "failure"
_PR_SET_PDEATHSIG = 1  # of <linux/prctl.h>


Failure = Exception | Preempted


class RankInfo(NamedTuple):
    """Rank and world size of this process.

    Attributes:
        rank: rank in the process group, from 0.
        size: world size.
        local_rank: rank on this machine, from 0.
        local_size: number of the group's processes on this machine.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1


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


_single = False


def rank_info() -> RankInfo:
    """Return rank and world size; rank 0 of 1 outside ``process_group`` and inside ``single_process``."""
    distributed = sys.modules.get("torch.distributed")
    if _single or distributed is None or not (distributed.is_available() and distributed.is_initialized()):
        return RankInfo()
    return _place_in_environment()


@contextmanager
def single_process() -> Iterator[None]:
    """Make collectives no-ops inside the block, as in a single process."""
    global _single
    _single = True
    try:
        yield
    finally:
        _single = False


def is_single_process() -> bool:
    """Return whether this process is inside ``single_process``."""
    return _single


def barrier() -> None:
    """Wait until all ranks have reached this call (barrier)."""
    if rank_info().size > 1:
        from torch import distributed

        distributed.barrier()


def _place_in_environment() -> RankInfo:
    return RankInfo(*(int(os.environ[key]) for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")))


def detect_launcher() -> str | None:
    """Return "torchrun", "Slurm" or "submitit" if one started this process as one of several, else None.

    Translates Slurm's and submitit's environment variables to torchrun's, which ``process_group`` reads.
    """
    variables: Mapping[str, Any] = {}
    if "TORCHELASTIC_RUN_ID" in os.environ:
        name = "torchrun"
    # Only srun sets the number of a step's tasks: a batch script is one process, however many tasks the job has.
    elif int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        name, variables = "Slurm", _slurm()
    elif int(os.environ.get("SUBMITIT_LOCAL_NTASKS", 1)) > 1:
        name, variables = "submitit", _submitit()
    else:
        return None
    os.environ.update({key: str(value) for key, value in variables.items()})
    return name if int(os.environ["WORLD_SIZE"]) > 1 else None


def _slurm() -> dict[str, Any]:
    from lightning.fabric.plugins.environments import SLURMEnvironment

    size, first = int(os.environ["SLURM_STEP_NUM_TASKS"]), os.environ.get("SLURM_STEP_NODELIST", "127.0.0.1")
    return {
        "RANK": os.environ["SLURM_PROCID"],
        "WORLD_SIZE": size,
        "LOCAL_RANK": os.environ["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": _tasks_of_machine(size),
        "MASTER_ADDR": os.environ.get("MASTER_ADDR") or SLURMEnvironment.resolve_root_node_address(first),
        "MASTER_PORT": os.environ.get("MASTER_PORT")
        or _port(os.environ["SLURM_JOB_ID"], os.environ.get("SLURM_STEP_ID", "0")),
    }


def _tasks_of_machine(size: int) -> int:
    """Return the local world size of a Slurm step; reject steps with unequal numbers of tasks per node."""
    layout = os.environ.get("SLURM_STEP_TASKS_PER_NODE", "")  # such as 4(x2),3
    counts = {part.partition("(")[0] for part in layout.split(",")}
    if len(counts) > 1:
        raise ConfigError(
            f"Slurm: the number of tasks must be the same on every machine, got {layout}; set it with "
            "--ntasks-per-node."
        )
    return size // int(os.environ.get("SLURM_STEP_NUM_NODES", 1))


def _port(job: str, step: str = "0") -> int:
    """Return a port that all ranks of a job's step share and most other jobs and steps do not use."""
    return 15000 + (int(job) + 1009 * int(step)) % 10000


def _submitit() -> dict[str, Any]:
    """Return torchrun's variables for submitit's local executor, whose tasks are on one machine."""
    size, job = os.environ["SUBMITIT_LOCAL_NTASKS"], os.environ["SUBMITIT_LOCAL_JOB_ID"]
    return {
        "RANK": os.environ["SUBMITIT_LOCAL_GLOBALID"],
        "WORLD_SIZE": size,
        "LOCAL_RANK": os.environ["SUBMITIT_LOCAL_LOCALID"],
        "LOCAL_WORLD_SIZE": size,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": _port(job),
    }


_store: "Store | None" = None  # of the process group; holds the first failure


@contextmanager
def process_group() -> Iterator[None]:
    """Join the process group that torchrun's environment variables describe, for the duration of the block.

    Raises:
        ConfigError: rank 0 cannot be reached.
    """
    global _store
    for key, value in _QUIET.items():
        os.environ.setdefault(key, value)
    import torch
    from torch import distributed

    here = _place_in_environment()
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
    """Wait up to ``_GRACE`` seconds until all ranks know of a preemption; return at once for other failures.

    Slurm ends the other tasks when the first one has exited, and the store may end with it.
    """
    with suppress(Exception):  # a timeout, or the store's host has ended
        if _are_leaving(store):
            store.set(f"leaving/{here.rank}", "")
            store.wait([f"leaving/{rank}" for rank in range(here.size)], timedelta(seconds=_GRACE))


def _are_leaving(store: "Store") -> bool:
    """Return whether the first failure is a preemption."""
    try:
        return isinstance(deserialize_error(store.get(_FAILURE).decode()), Preempted)
    except Exception:  # the store's host has ended
        return False


def _has_failed(store: "Store") -> bool:
    try:
        return store.check([_FAILURE])
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
            first = _store.compare_set(_FAILURE, "", word).decode()
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
    word = json.loads(text)
    if word["class"] is None:
        return ProcessFailed(f"{word['message']}, in process {word['rank']}:\n{word['traceback']}")
    module, name = word["class"]
    failure: Failure = getattr(import_module(module), name)(word["message"])
    return failure


def run_together(work: Callable[..., object], count: int, *arguments: Any) -> None:
    """Run ``work(*arguments)`` in ``count`` new processes of this machine, as a process group, and wait for them.

    If one fails, the others are killed within seconds. If this process is killed, they exit by themselves.

    Args:
        work: a function that a bare interpreter can import.
        count: world size.
        *arguments: picklable arguments.

    Raises:
        EmaSegError: the first failure, if it is one of this package's errors.
        ProcessFailed: the first failure is any other exception, or a process exited without reporting one.
        TrainingError: a process was killed, or the operating system refused a file or a resource.
        Preempted: a preemption signal, usually one passed on by this process, has ended the processes.
    """
    from torch.distributed import PrefixStore, TCPStore

    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    task = pickle.dumps((work, arguments, sys.argv))
    processes = [_start(rank, count, server.port) for rank in range(count)]
    try:
        with _forward_signals(processes) as passed:
            for process in processes:
                _hand_over(process, task)
            codes = _wait(processes)
    finally:
        _terminate(processes)
    if not any(codes):
        return
    failure = _failure(PrefixStore("ema-seg/0", server), codes, passed)
    if passed and isinstance(failure, Preempted):
        handler = foreign_handler(passed[0])
        if handler is not None:
            handler(passed[0], None)
    raise failure


@contextmanager
def _forward_signals(processes: Sequence[subprocess.Popen[bytes]]) -> Iterator[list[int]]:
    """Forward preemption signals to the processes, which save their state; yield the list of signals received."""
    passed: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield passed
        return

    def pass_on(number: int, frame: FrameType | None) -> None:
        passed.append(number)
        for process in processes:
            process.send_signal(number)

    earlier = {number: signal.signal(number, pass_on) for number in PREEMPTION_SIGNALS}
    try:
        yield passed
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


def _start(rank: int, count: int, port: int) -> subprocess.Popen[bytes]:
    # Not multiprocessing: it would run the main script again in every process, and within joblib's workers it passes on
    # a start method that a bare interpreter does not know.
    variables = {
        "RANK": rank,
        "WORLD_SIZE": count,
        "LOCAL_RANK": rank,
        "LOCAL_WORLD_SIZE": count,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "GROUP_RANK": 0,
        "TORCHELASTIC_RESTART_COUNT": 0,  # an inherited one would change the store's prefix
        "TORCHELASTIC_USE_AGENT_STORE": True,
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    return subprocess.Popen(
        # -P: without it, modules of the current directory would come before all others.
        [sys.executable, "-P", "-c", f"from {__name__} import _be_member; _be_member({os.getpid()})"],
        env={**_QUIET, **os.environ, **{key: str(value) for key, value in variables.items()}},
        stdin=subprocess.PIPE,
    )


def _hand_over(process: subprocess.Popen[bytes], task: bytes) -> None:
    assert process.stdin is not None
    with suppress(BrokenPipeError), process.stdin:  # _wait notices a process that has ended
        process.stdin.write(task)


def _be_member(parent: int) -> None:
    """Run the pickled work from standard input, in a process of ``run_together``."""
    if sys.platform == "linux":
        # Have the kernel kill this process when its parent ends, even by SIGKILL.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before the prctl
            sys.exit(1)
    try:
        with gc_frozen_imports():
            work, arguments, sys.argv = pickle.loads(sys.stdin.buffer.read())  # noqa: S301, from the parent alone
        _work_together(work, arguments)
    except KeyboardInterrupt:  # the parent receives it, too
        sys.exit(130)


def _work_together(work: Callable[..., object], arguments: Sequence[Any]) -> None:
    try:
        with process_group(), report_first_failure():
            work(*arguments)
    except (Exception, Preempted) as error:  # the parent reports it
        raise SecondaryFailure(error) from None


def _wait(processes: Sequence[subprocess.Popen[bytes]]) -> list[int]:
    """Wait until all processes have ended or one has failed; return each exit status, 0 for those still running."""
    while True:
        codes = [process.poll() for process in processes]
        if any(codes) or None not in codes:
            return [code or 0 for code in codes]
        time.sleep(0.05)


def _terminate(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Wait ``_GRACE`` seconds for the processes to exit by themselves, then kill the rest."""
    deadline = time.monotonic() + _GRACE
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _failure(store: "Store", codes: Sequence[int], passed: Sequence[int]) -> Failure:
    """Return the error for these exit statuses, after these signals were passed on."""
    for number in passed:
        if -number in codes:  # it had no handler yet, and no state to save
            return Preempted(f"stopped by {signal.Signals(number).name}; the files written so far are kept.")
    told = store.check([_FAILURE])
    # A killed process comes first: the recorded failure may only be the loss of it. But NCCL may abort a rank (SIGABRT)
    # that waits for one whose failure is recorded.
    for rank, code in enumerate(codes):
        if code < 0 and not (told and code == -signal.SIGABRT):
            return TrainingError(
                f"process {rank} of {len(codes)} was killed ({_signal_name(-code)}); if the system ran out of memory, "
                "lower data.batch_size or data.workers."
            )
    if not told and Preempted.exit_status in codes:  # from os._exit, which records no failure
        return Preempted("stopped; the files written so far are kept.")
    if not told:
        rank, code = next((rank, code) for rank, code in enumerate(codes) if code)
        return ProcessFailed(
            f"process {rank} of {len(codes)} exited with status {code} without an error message; see its output above."
        )
    return deserialize_error(store.get(_FAILURE).decode())


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
