"""Processes that train or evaluate one model together, on one machine or many, whoever has started them.

``run_together`` starts them on this machine. ``started_group`` finds out whether torchrun, Slurm or submitit has
started this process as one of several, and ``joined`` then makes it a member. Within, ``place`` says which one it is,
``ema_seg.distributed.collectives`` lets it exchange values with the others, and ``first_told`` sees that of several
failures only the first is told.
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
from contextlib import contextmanager, suppress
from datetime import timedelta
from importlib import import_module
from types import FrameType
from typing import TYPE_CHECKING, Any, NamedTuple

from ema_seg.distributed.leaving import LEAVE_SIGNALS, earlier_handler
from ema_seg.errors import ConfigError, EmaSegError, Preempted, TrainingError, one_line, system_sentence
from ema_seg.host_memory import made_for_good

if TYPE_CHECKING:
    from torch.distributed import Store

__all__ = [
    "Place",
    "ProcessFailed",
    "Silent",
    "alone",
    "first_told",
    "is_alone",
    "joined",
    "place",
    "run_together",
    "started_group",
    "wait_for_all",
]

# How long processes may wait for another: for as long as one of them may measure costs or draw figures alone.
_PATIENCE = timedelta(minutes=30)
# Seconds that the others have to end by themselves, after one has failed.
_GRACE = 3.0

# PyTorch would print its stack for each connection that a process which has ended takes with it.
_QUIET = {"TORCH_CPP_LOG_LEVEL": "ERROR"}

_FAILURE = "failure"
_PR_SET_PDEATHSIG = 1  # of <linux/prctl.h>


Failure = Exception | Preempted


class Place(NamedTuple):
    """Which of the processes this one is.

    Attributes:
        rank: its number, from 0.
        size: how many there are.
        local_rank: its number among those of this machine.
        local_size: how many of them this machine has.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1


class ProcessFailed(RuntimeError):
    """One of several processes has failed for no fault of the user's; the message ends in its traceback."""


class Silent(SystemExit):
    """The end of a process whose failure another one tells, or has caused, with the status of the first to fail.

    Attributes:
        first: what has failed first; None if the process that keeps it is gone.
    """

    def __init__(self, first: Failure | None) -> None:
        super().__init__(first.exit_status if isinstance(first, EmaSegError | Preempted) else 1)
        self.first = first


_alone = False


def place() -> Place:
    """Which process this is of those that work together; of one, outside ``joined`` and while it is ``alone``."""
    distributed = sys.modules.get("torch.distributed")
    if _alone or distributed is None or not (distributed.is_available() and distributed.is_initialized()):
        return Place()
    return _place_in_environment()


@contextmanager
def alone() -> Iterator[None]:
    """For a while, be a process that works by itself: what it computes then waits for no other."""
    global _alone
    _alone = True
    try:
        yield
    finally:
        _alone = False


def is_alone() -> bool:
    """Whether this process is ``alone`` for now."""
    return _alone


def wait_for_all() -> None:
    """Go on when all of the processes have come here."""
    if place().size > 1:
        from torch import distributed

        distributed.barrier()


def _place_in_environment() -> Place:
    return Place(*(int(os.environ[key]) for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")))


def started_group() -> str | None:
    """What has started this process as one of several: "torchrun", "Slurm" or "submitit"; None if nothing has.

    Slurm's and submitit's variables are translated to torchrun's, which ``joined`` reads.
    """
    variables: Mapping[str, Any] = {}
    if "TORCHELASTIC_RUN_ID" in os.environ:
        name = "torchrun"
    # Only srun sets the number of a step's tasks: in a batch script, a single process runs whatever the job reserves.
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
    """Of a step that has as many tasks on each machine."""
    layout = os.environ.get("SLURM_STEP_TASKS_PER_NODE", "")  # such as 4(x2),3
    counts = {part.partition("(")[0] for part in layout.split(",")}
    if len(counts) > 1:
        raise ConfigError(
            f"Slurm has started unequal numbers of tasks on the machines ({layout}); ask for as many on each with "
            "--ntasks-per-node."
        )
    return size // int(os.environ.get("SLURM_STEP_NUM_NODES", 1))


def _port(job: str, step: str = "0") -> int:
    """The same port for all processes of a job's step, and another one for most other jobs and steps."""
    return 15000 + (int(job) + 1009 * int(step)) % 10000


def _submitit() -> dict[str, Any]:
    """Of submitit's local executor, whose tasks are on one machine."""
    size, job = os.environ["SUBMITIT_LOCAL_NTASKS"], os.environ["SUBMITIT_LOCAL_JOB_ID"]
    return {
        "RANK": os.environ["SUBMITIT_LOCAL_GLOBALID"],
        "WORLD_SIZE": size,
        "LOCAL_RANK": os.environ["SUBMITIT_LOCAL_LOCALID"],
        "LOCAL_WORLD_SIZE": size,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": _port(job),
    }


_store: "Store | None" = None  # of the group that this process has joined, where failures are told


@contextmanager
def joined() -> Iterator[None]:
    """Be one of the processes that torchrun's variables in the environment tell of.

    Raises:
        ConfigError: the first process cannot be reached.
    """
    global _store
    for key, value in _QUIET.items():
        os.environ.setdefault(key, value)
    import torch
    from torch import distributed

    here = _place_in_environment()
    if "OMP_NUM_THREADS" not in os.environ:  # torchrun has set it
        torch.set_num_threads(max(1, _usable_cores() // here.local_size))
    _store = _connect(here)
    distributed.init_process_group(
        "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
        store=_store,
        rank=here.rank,
        world_size=here.size,
        timeout=_PATIENCE,
    )
    over = threading.Event()
    watch = threading.Thread(target=_end_with_others, args=(_store.clone(), here, over), daemon=True)
    watch.start()
    try:
        yield
        if _has_failed(_store):  # this one would wait for others that are gone
            _abort()
        else:
            with first_told():
                distributed.barrier()  # nobody takes a connection away that another one still needs
            distributed.destroy_process_group()
    except BaseException:
        if _has_failed(_store):
            _abort()
            over.set()
            _leave_together(_store, here)
        raise
    finally:
        over.set()
        watch.join(_GRACE)
    _store = None


def _usable_cores() -> int:
    """Number of cores that this process may use; on macOS and Windows, of the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _end_with_others(store: "Store", here: Place, over: threading.Event) -> None:
    """End this process where another one has failed and this one does not come to know of it.

    A process that waits for what its GPU gets from another one waits in CUDA, where no signal and no exception of
    Python's arrives.
    """
    while not over.wait(1.0):
        if not _has_failed(store):
            continue
        if _are_leaving(store) and not over.wait(_GRACE / 3):
            _leave_together(store, here)  # what this one waits for may not hear of it
            os._exit(Preempted.exit_status)
        if not over.wait(_GRACE):
            _abort()
        if not over.wait(3 * _GRACE):
            os._exit(1)


def _abort() -> None:
    """Have what waits for other processes fail, as far as their connections know how to."""
    from torch import distributed

    with suppress(Exception):
        assert distributed.group.WORLD is not None
        distributed.group.WORLD.abort()


def _leave_together(store: "Store", here: Place) -> None:
    """Where the processes were asked to leave, wait a moment for all to know it.

    Slurm ends the others when the first one has gone, and with that one may go the store.
    """
    with suppress(Exception):  # not all come, or the process that holds the store has ended
        if _are_leaving(store):
            store.set(f"leaving/{here.rank}", "")
            store.wait([f"leaving/{rank}" for rank in range(here.size)], timedelta(seconds=_GRACE))


def _are_leaving(store: "Store") -> bool:
    """Whether what has failed first was asked to."""
    try:
        return isinstance(_told(store.get(_FAILURE).decode()), Preempted)
    except Exception:  # the process that holds the store has ended
        return False


def _has_failed(store: "Store") -> bool:
    try:
        return store.check([_FAILURE])
    except Exception:  # the process that holds the store has ended
        return True


@contextmanager
def first_told() -> Iterator[None]:
    """Let the exception pass that is the first of all processes; of the others ``Silent`` comes instead.

    The others mostly fail for having lost the first. Outside ``joined`` every exception passes.
    """
    try:
        yield
    except (Exception, Preempted) as error:
        if _store is None:
            raise
        word = _word(error)
        try:
            first = _store.compare_set(_FAILURE, "", word).decode()
        except Exception:  # the process that holds the store has ended, and so has failed first
            raise Silent(None) from error
        if first != word:
            raise Silent(_told(first)) from error
        raise


def _connect(here: Place) -> "Store":
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
            f"the process {here.rank} of {here.size} cannot reach the first one at {os.environ['MASTER_ADDR']}, port "
            f"{os.environ['MASTER_PORT']} ({one_line(error)[:200]}); see that the machines reach each other there."
        ) from error
    return PrefixStore(f"ema-seg/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def _word(error: Failure) -> str:
    """An exception as text, from which ``_told`` makes it again if it is one of ours."""
    if isinstance(error, OSError) and (sentence := system_sentence(error)) is not None:
        error = TrainingError(sentence)
    own = type(error).__module__.startswith("ema_seg.")
    return json.dumps(
        {
            "rank": place().rank,
            "class": [type(error).__module__, type(error).__qualname__] if own else None,
            "message": str(error) if own else f"{type(error).__name__}: {one_line(error)}",
            "traceback": None if own else "".join(traceback.format_exception(error)),
        }
    )


def _told(text: str) -> Failure:
    word = json.loads(text)
    if word["class"] is None:
        return ProcessFailed(f"{word['message']}, in the process {word['rank']}:\n{word['traceback']}")
    module, name = word["class"]
    failure: Failure = getattr(import_module(module), name)(word["message"])
    return failure


def run_together(work: Callable[..., object], count: int, *arguments: Any) -> None:
    """Call ``work(*arguments)`` in ``count`` new processes of this machine that are ``joined``, and wait for their end.

    Where one fails, the others are ended within seconds. Where this process is killed, they end by themselves.

    Args:
        work: a function that a bare interpreter can import.
        count: number of processes.
        *arguments: what ``pickle`` takes.

    Raises:
        EmaSegError: what the first process to fail has raised.
        ProcessFailed: the first process to fail has raised something else.
        TrainingError: a process was killed.
        Preempted: the processes were asked to leave, as this one was; those that had nothing to keep are said to have
            been stopped.
    """
    from torch.distributed import PrefixStore, TCPStore

    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    task = pickle.dumps((work, arguments, sys.argv))
    processes = [_start(rank, count, server.port) for rank in range(count)]
    try:
        with _passed_on(processes) as passed:
            for process in processes:
                _hand_over(process, task)
            codes = _wait(processes)
    finally:
        _end(processes)
    if not any(codes):
        return
    failure = _failure(PrefixStore("ema-seg/0", server), codes, passed)
    if passed and isinstance(failure, Preempted):
        handler = earlier_handler(passed[0])
        if handler is not None:
            handler(passed[0], None)
    raise failure


@contextmanager
def _passed_on(processes: Sequence[subprocess.Popen[bytes]]) -> Iterator[list[int]]:
    """Pass the signals that ask to leave on to the processes, which know what to keep; gives those that have come."""
    passed: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield passed
        return

    def pass_on(number: int, frame: FrameType | None) -> None:
        passed.append(number)
        for process in processes:
            process.send_signal(number)

    earlier = {number: signal.signal(number, pass_on) for number in LEAVE_SIGNALS}
    try:
        yield passed
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


def _start(rank: int, count: int, port: int) -> subprocess.Popen[bytes]:
    # Not through multiprocessing, which would run the main script once more in every process, and in joblib's processes
    # passes on a way to start that bare interpreters do not know.
    variables = {
        "RANK": rank,
        "WORLD_SIZE": count,
        "LOCAL_RANK": rank,
        "LOCAL_WORLD_SIZE": count,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "GROUP_RANK": 0,
        "TORCHELASTIC_RESTART_COUNT": 0,  # that of an earlier torchrun would hide what the processes say
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
    with suppress(BrokenPipeError), process.stdin:  # its end is noticed soon enough
        process.stdin.write(task)


def _be_member(parent: int) -> None:
    """What a process of ``run_together`` does: the work that comes on standard input."""
    if sys.platform == "linux":
        # Have the system kill this process when its parent ends, however it does.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before
            sys.exit(1)
    try:
        with made_for_good():
            work, arguments, sys.argv = pickle.loads(sys.stdin.buffer.read())  # noqa: S301, from the parent alone
        _work_together(work, arguments)
    except KeyboardInterrupt:  # which the parent has seen, too
        sys.exit(130)


def _work_together(work: Callable[..., object], arguments: Sequence[Any]) -> None:
    try:
        with joined(), first_told():
            work(*arguments)
    except (Exception, Preempted) as error:  # has been told
        raise Silent(error) from None


def _wait(processes: Sequence[subprocess.Popen[bytes]]) -> list[int]:
    """Wait for all processes to end, or for the first to fail; returns the exit status of each, 0 of those alive."""
    while True:
        codes = [process.poll() for process in processes]
        if any(codes) or None not in codes:
            return [code or 0 for code in codes]
        time.sleep(0.05)


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Let the processes end by themselves for a while, then kill those that hang."""
    deadline = time.monotonic() + _GRACE
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _failure(store: "Store", codes: Sequence[int], passed: Sequence[int]) -> Failure:
    """Why processes that ended with these codes, and have been passed these signals, have failed."""
    for number in passed:
        if -number in codes:  # where nothing was to be kept
            return Preempted(f"stopped by {signal.Signals(number).name}; what was written before it is there.")
    told = store.check([_FAILURE])
    # The word of a process that has lost another one is not the reason, if that one was killed. But NCCL may abort one
    # that waits for another which has failed.
    for rank, code in enumerate(codes):
        if code < 0 and not (told and code == -signal.SIGABRT):
            return TrainingError(
                f"the process {rank} of {len(codes)} was killed ({_signal_name(-code)}); if the system did so for want "
                "of memory, lower data.batch_size or data.workers."
            )
    if not told and Preempted.exit_status in codes:  # of a process that could not raise it
        return Preempted("stopped; what was written before it is there.")
    if not told:
        rank, code = next((rank, code) for rank, code in enumerate(codes) if code)
        return ProcessFailed(f"the process {rank} of {len(codes)} ended with status {code} and without a word")
    return _told(store.get(_FAILURE).decode())


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
