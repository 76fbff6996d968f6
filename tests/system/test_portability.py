"""The project without features that only some systems have; the tests run on Linux and hide them."""

import os

import pytest
import torch
from filelock import FileLock

from ema_seg.runtime import limits
from ema_seg.runtime.distributed.group import _usable_cores
from ema_seg.sweeps import folder, is_running
from tests.conftest import QUICK

# Modules, and names of os and signal, that Windows or macOS lack. The project is imported again without them; the
# libraries are not, because they support each system in ways of their own.
HIDDEN = """
import os, signal, sys

own = ("ema_seg", "hydra_plugins")
for name in [name for name in sys.modules if name.partition(".")[0] in own]:
    if not name.startswith("ema_seg.attention"):  # its operators are registered once
        del sys.modules[name]
for name in ("fcntl", "grp", "pwd", "resource", "termios"):
    sys.modules[name] = None
for name in ("fork", "getloadavg", "killpg", "sched_getaffinity", "setsid", "sysconf"):
    delattr(os, name)
for name in ("SIGHUP", "SIGKILL", "SIGUSR1", "SIGUSR2", "pthread_sigmask", "sigwaitinfo", "sigtimedwait"):
    delattr(signal, name)
"""


def test_a_training_and_an_evaluation_do_without_what_only_some_systems_have(entry, camvid_root, tmp_path):
    for script, called in (("one", "train"), ("two", "eval")):
        program = f"{HIDDEN}\nfrom ema_seg.cli.{called} import main\n"
        program += "from ema_seg.runtime.distributed import exit_handlers\n"
        program += "assert exit_handlers.PREEMPTION_SIGNALS == (signal.SIGTERM,)\n"
        program += "exit_handlers.install_exit_handlers()\nmain()\n"
        (tmp_path / f"{script}.py").write_text(program)
    run = tmp_path / "run"
    data = ("data=camvid", f"data.root={camvid_root}", f"hydra.run.dir={run}")

    status, err = entry.run(*QUICK, *data, "epochs=1", script=tmp_path / "one")
    assert status == 0, err
    status, err = entry.run(f"run={run}", f"report.dir={tmp_path / 'again'}", script=tmp_path / "two")
    assert status == 0, err

    assert (run / "report" / "report.json").is_file()
    assert (tmp_path / "again" / "report.json").is_file()


def test_a_run_is_seen_to_run_where_locks_are_not_shared(monkeypatch, tmp_path):
    monkeypatch.setattr(folder, "fcntl", None)
    assert not is_running(tmp_path)

    with FileLock(tmp_path / "run.lock"):
        assert is_running(tmp_path)

    assert not is_running(tmp_path)


@pytest.mark.parametrize(("owner", "name"), [(limits, "resource"), (os, "sysconf")])
def test_memory_is_described_as_far_as_the_system_tells(owner, name, monkeypatch):
    assert "GiB" in limits.describe_memory(torch.device("cpu"))
    if owner is limits:
        monkeypatch.setattr(owner, name, None)
    else:
        monkeypatch.delattr(owner, name)

    assert limits.describe_memory(torch.device("cpu")) == "cpu"


def test_cores_are_counted_where_the_system_does_not_tell_which_a_process_may_use(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 6)

    assert _usable_cores() == 6
