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
    for step in range(20):  # small blocks may cut the first ones to pieces
        if step == 15:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.zeros(2**24)  # 64 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(page_faults(), keep_freed_memory(), page_faults())
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these settings")
def test_freed_memory_is_reused_without_page_faults():
    run = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    before, done, after = run.stdout.split()

    assert done == "True"
    assert int(before) > 5 * 16  # 5 steps with at least one page fault per 4 MiB
    assert int(after) < int(before) / 5


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
