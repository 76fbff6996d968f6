"""Being asked to leave: what becomes of the signal, whatever runs when it comes."""

import signal
import subprocess
import sys

import pytest

# Python drops what is raised here, as in all that frees an object.
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


# Within a training the last word is its own, also where the process would have left before.
@pytest.mark.parametrize("earlier", ["", "exit_handlers.install_exit_handlers()"])
def test_a_process_leaves_also_where_what_its_handler_raises_is_dropped(earlier):
    done = run(earlier, 60)

    assert done.returncode == 75
    assert done.stderr.splitlines()[-1] == "error: stopped by SIGTERM; the run has not lost anything."


# A library may make an exception of its own of what the signal has raised, and may go on.
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
    """As submitit's, which leaves the decision to another signal."""
    done = run(f"signal.signal(signal.SIGTERM, lambda number, frame: print('passed over', number)){later}", 0.5)

    assert done.returncode == 0, done.stderr
    assert done.stdout == f"passed over {int(signal.SIGTERM)}\n"
