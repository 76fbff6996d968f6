"""Processes on this machine that train or evaluate one model together."""

import ctypes
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TYPE_CHECKING, Any

from ema_seg.runtime.distributed.exit_handlers import PREEMPTION_SIGNALS, foreign_handler
from ema_seg.runtime.distributed.group import (
    FAILURE,
    GRACE,
    QUIET,
    Failure,
    ProcessFailed,
    SecondaryFailure,
    deserialize_error,
    process_group,
    report_first_failure,
)
from ema_seg.runtime.errors import Preempted, TrainingError
from ema_seg.runtime.host_memory import gc_frozen_imports

if TYPE_CHECKING:
    from torch.distributed import Store

__all__ = ["run_together"]

_PR_SET_PDEATHSIG = 1  # of <linux/prctl.h>


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
        env={**QUIET, **os.environ, **{key: str(value) for key, value in variables.items()}},
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
    """Wait ``GRACE`` seconds for the processes to exit by themselves, then kill the rest."""
    deadline = time.monotonic() + GRACE
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
    told = store.check([FAILURE])
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
    return deserialize_error(store.get(FAILURE).decode())


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
