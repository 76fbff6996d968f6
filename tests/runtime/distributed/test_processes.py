import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from torch.distributed import HashStore

from ema_seg.runtime.distributed import group, spawn
from ema_seg.runtime.distributed.group import ProcessFailed, SecondaryFailure
from ema_seg.runtime.distributed.launchers import detect_launcher
from ema_seg.runtime.distributed.ranks import RankInfo, rank_info
from ema_seg.runtime.distributed.spawn import run_together
from ema_seg.runtime.errors import ConfigError, Preempted, TrainingError
from tests.conftest import ROOT, free_port, is_alive
from tests.runtime.distributed import workers


def test_processes_know_their_place_and_exchange_values(tmp_path):
    run_together(workers.exchange, 2, tmp_path)

    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert (first.pop("place"), second.pop("place")) == ([0, 2, 0, 2], [1, 2, 1, 2])
    assert not list((tmp_path / "disk").iterdir())
    for rank, result in enumerate((first, second)):
        together, apart, alone = result.pop("shared")
        assert (together, alone) == (True, False)
        assert apart.startswith(f"{tmp_path / f'disk-{rank}'}: the run's folder must be on a disk that all machines")
        assert "process 1 does not see the files that process 0 writes" in apart
    assert first == second == {"agreed": "of 0", "gathered": [0, 1], "sum": 11}
    assert rank_info() == RankInfo(0, 1, 0, 1)


@pytest.mark.parametrize(
    ("how", "kind", "message"),
    [
        ("mistake", ConfigError, r"^seed=-1 is none\.$"),
        ("hang", ConfigError, r"^seed=-1 is none\.$"),
        ("error", ProcessFailed, r"^KeyError: 'what was not foreseen', in process 1:\nTraceback .*workers\.py"),
        ("killed", TrainingError, r"^process 1 of 2 was killed \(SIGKILL\)"),
    ],
)
def test_a_process_that_fails_ends_the_others_with_its_word(how, kind, message, monkeypatch, tmp_path):
    """The current folder shadows a library's module, and variables of an earlier torchrun are set."""
    (tmp_path / "json.py").write_text("raise SystemExit(4)")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")

    with pytest.raises(kind, match=f"(?s){message}") as caught:
        run_together(workers.fail, 2, how)

    assert type(caught.value) is kind


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "/data/a.png"), "/data/a.png: No such file or"),
        (OSError(errno.ENOSPC, "No space left on device"), "a file cannot be written: No space left on device."),
    ],
)
def test_what_the_operating_system_says_is_told_in_a_sentence(error, message):
    told = group.deserialize_error(group.serialize_error(error))

    assert type(told) is TrainingError
    assert str(told).startswith(message)


@pytest.mark.parametrize(
    ("word", "codes", "passed", "message"),
    [
        (ConfigError("seed=-1 is none."), [1, -signal.SIGABRT], [], "seed=-1 is none."),
        (ConnectionError("lost"), [1, -signal.SIGKILL], [], r"process 1 of 2 was killed \(SIGKILL\)"),
        (ConnectionError("lost"), [1, -signal.SIGBUS], [], r"process 1 of 2 was killed \(SIGBUS\)"),
        (None, [0, -signal.SIGABRT], [], r"process 1 of 2 was killed \(SIGABRT\)"),
        (None, [75, 0], [], "stopped; the files written so far are kept."),
        (None, [0, -signal.SIGUSR1], [signal.SIGUSR1], "stopped by SIGUSR1; the files written so far are kept."),
    ],
)
def test_the_reason_is_what_failed_first(word, codes, passed, message):
    store = HashStore()
    if word is not None:
        store.set("failure", group.serialize_error(word))

    with pytest.raises((Exception, Preempted), match=f"^{message}"):
        raise spawn._failure(store, codes, passed)


def test_processes_that_are_asked_to_leave_wait_for_each_other_and_end_with_the_same_status():
    store, first = HashStore(), Preempted("stopped by SIGUSR1.")
    store.set("failure", group.serialize_error(first))
    leaving = threading.Thread(target=group._leave_together, args=(store, RankInfo(0, 2, 0, 1)))

    leaving.start()
    leaving.join(0.2)
    assert leaving.is_alive()
    group._leave_together(store, RankInfo(1, 2, 0, 1))
    leaving.join(1)

    assert not leaving.is_alive()
    assert [SecondaryFailure(error).code for error in (first, ConfigError("seed=-1 is none."), None)] == [75, 1, 1]


def test_processes_end_when_the_one_that_started_them_is_killed():
    program = (
        "from ema_seg.runtime.distributed.spawn import run_together; from tests.runtime.distributed import workers;"
        "run_together(workers.sleep, 2)"
    )
    starter = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    while len(children := _children(starter.pid)) < 2:
        time.sleep(0.02)

    starter.kill()
    starter.wait()

    deadline = time.monotonic() + 10
    while any(is_alive(child) for child in children):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_whoever_had_a_signal_first_has_the_last_word(tmp_path):
    """A handler that was installed before, such as submitit's, which requeues the job, runs after the ranks' exit."""
    alive = []

    def queue_again(number, frame):
        alive.extend(is_alive(json.loads(file.read_text())) for file in tmp_path.iterdir())
        raise InterruptedError(number)

    def ask():
        while len([file for file in tmp_path.iterdir() if file.read_text()]) < 2:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGUSR2)

    earlier = signal.signal(signal.SIGUSR2, queue_again)
    try:
        threading.Thread(target=ask).start()
        with pytest.raises(InterruptedError):
            run_together(workers.leave, 2, tmp_path)
    finally:
        signal.signal(signal.SIGUSR2, earlier)

    assert alive == [False, False]


def test_the_end_of_the_first_process_is_quiet_in_the_others():
    """Rank 0 hosts the store; the launcher reports its loss, so the other ranks exit without a message."""
    codes, words = start_two("first killed")

    assert codes == [-signal.SIGKILL, 1]
    assert words == ["", ""]


def start_two(how):
    """Start two ranks as torchrun or srun would; return their exit statuses and their standard errors."""
    program = (
        "from ema_seg.runtime.distributed.group import process_group, report_first_failure\n"
        "from tests.runtime.distributed import workers\n"
        f"with process_group(), report_first_failure(): workers.fail({how!r})"
    )
    group = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program],
            env={**os.environ, **group, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    words = [process.communicate(timeout=60)[1] for process in processes]
    return [process.returncode for process in processes], words


def _children(parent):
    return [int(text) for text in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]


@pytest.mark.parametrize(
    ("variables", "name", "expected"),
    [
        ({}, None, {}),
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_JOB_ID": "7"}, None, {}),  # a batch script, without srun
        (
            {
                "SLURM_STEP_NUM_TASKS": "8",
                "SLURM_STEP_NUM_NODES": "2",
                "SLURM_STEP_NODELIST": "gpu[17-18]",
                "SLURM_PROCID": "5",
                "SLURM_LOCALID": "1",
                "SLURM_JOB_ID": "1234567",
                "SLURM_STEP_ID": "2",
                "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
            },
            "Slurm",
            {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "gpu17"}
            | {"MASTER_PORT": "21585"},
        ),
        (
            {
                "SUBMITIT_LOCAL_NTASKS": "2",
                "SUBMITIT_LOCAL_GLOBALID": "1",
                "SUBMITIT_LOCAL_LOCALID": "1",
                "SUBMITIT_LOCAL_JOB_ID": "31415",
            },
            "submitit",
            {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"},
        ),
        ({"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "2", "RANK": "1"}, "torchrun", {"RANK": "1"}),
        ({"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "1", "RANK": "0"}, None, {}),
    ],
)
def test_whoever_has_started_the_processes_is_known(monkeypatch, variables, name, expected):
    monkeypatch.setattr(os, "environ", dict(variables))

    assert detect_launcher() == name
    assert {key: os.environ[key] for key in expected} == expected


def test_machines_have_as_many_tasks_of_slurm(monkeypatch):
    layout = {"SLURM_STEP_NUM_TASKS": "3", "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_TASKS_PER_NODE": "2,1"}
    monkeypatch.setattr(os, "environ", {**layout, "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "7"})

    with pytest.raises(ConfigError, match=r"must be the same on every machine, got 2,1; .*--ntasks-per-node"):
        detect_launcher()


def test_a_process_that_ends_without_a_word_is_named():
    program = "from ema_seg.runtime.distributed.spawn import run_together; import os; run_together(os._exit, 2, 3)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, stdin=subprocess.DEVNULL)

    assert done.returncode == 1
    assert "exited with status 3 without an error message" in done.stderr
    assert signal.SIGKILL.name not in done.stderr
