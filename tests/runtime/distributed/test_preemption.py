"""Preemption signals: the exception that their handler raises is lost, or another handler was installed before."""

import signal
import subprocess
import sys

import pytest

# Python drops exceptions that are raised in a destructor.
DROPPED = """
import os, signal, time
from ema_seg.runtime.distributed import exit_handlers, preemption

class Freed:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)

preemption._FORCED_EXIT_SECONDS = 0.1
{earlier}
with preemption.Preemption().watched():
    Freed()
    time.sleep({seconds})
"""


def run(earlier, seconds):
    program = DROPPED.format(earlier=earlier, seconds=seconds)
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)


# Inside ``watched`` the training's handler replaces the exit handlers that were installed before.
@pytest.mark.parametrize("earlier", ["", "exit_handlers.install_exit_handlers()"])
def test_a_process_leaves_also_where_what_its_handler_raises_is_dropped(earlier):
    done = run(earlier, 60)

    assert done.returncode == 75
    assert done.stderr.splitlines()[-1] == "error: stopped by SIGTERM; the run has not lost anything."


# A library may replace the SystemExit by an exception of its own, or catch it and continue.
SWALLOWED = """
import os, signal, time
from ema_seg.runtime.distributed import exit_handlers

exit_handlers._FORCED_EXIT_SECONDS = 0.1
exit_handlers.install_exit_handlers()
with exit_handlers.exit_if_preempted():
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
    except SystemExit:
        {then}
"""


@pytest.mark.parametrize("then", ["raise AttributeError", "pass", "time.sleep(60)", "os.kill(os.getpid(), 15)"])
def test_a_process_that_is_asked_to_leave_ends_so_whatever_is_made_of_it(then):
    program = SWALLOWED.format(then=then)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30)

    assert done.returncode == 75
    assert done.stderr == "stopped by SIGTERM while no training was running; run the same command again.\n"


@pytest.mark.parametrize("later", ["", "; exit_handlers.install_exit_handlers()"])
def test_a_process_goes_on_where_an_earlier_handler_has_it_go_on(later):
    """An earlier handler, such as submitit's for SIGTERM, may let the process continue."""
    done = run(f"signal.signal(signal.SIGTERM, lambda number, frame: print('passed over', number)){later}", 0.5)

    assert done.returncode == 0, done.stderr
    assert done.stdout == f"passed over {int(signal.SIGTERM)}\n"
