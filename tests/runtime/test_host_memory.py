"""Host memory settings, tested in subprocesses because a process cannot undo them."""

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource
import torch
from ema_seg.runtime.host_memory import keep_freed_memory

def page_faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

done = {call}
for step in range(20):  # small blocks may cut the first ones to pieces
    if step == 15:
        before = page_faults()
    torch.zeros(2**24)  # 64 MiB
print(done, page_faults() - before)
"""


def faults(call):
    run = subprocess.run([sys.executable, "-c", PROGRAM.format(call=call)], capture_output=True, text=True, check=True)
    done, count = run.stdout.split()
    return done == "True", int(count)


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told to")
def test_freed_memory_is_used_again_without_asking_the_system():
    _, given_back = faults("False")
    done, kept = faults("keep_freed_memory()")

    assert done
    assert given_back > 5 * 16  # 5 steps with at least one page fault per 4 MiB
    assert kept < given_back / 5


COLLECTIONS = """
import gc
from ema_seg.runtime.host_memory import gc_frozen_imports

rounds = []
gc.callbacks.append(lambda phase, info: rounds.append(phase))
with gc_frozen_imports():
    kept = [[] for _ in range(100_000)]
during, frozen = len(rounds), gc.get_freeze_count()
with gc_frozen_imports():  # the libraries are there; this is a job's garbage
    garbage = [[] for _ in range(100_000)]
print(during, len(rounds) > 0, frozen >= 100_000, gc.get_freeze_count() == frozen, gc.isenabled())
"""


def test_the_collector_passes_over_libraries_but_not_over_what_comes_later():
    run = subprocess.run([sys.executable, "-c", COLLECTIONS], capture_output=True, text=True, check=True)

    assert run.stdout.split() == ["0", "True", "True", "True", "True"]
