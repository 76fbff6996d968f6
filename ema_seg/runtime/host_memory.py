"""Host memory settings of the process: glibc's allocator and the garbage collector."""

import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["gc_frozen_imports", "keep_freed_memory"]

# Constants of <malloc.h>.
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4

_made = False  # a flag, because gc.get_freeze_count() walks all frozen objects


def keep_freed_memory() -> bool:
    """Make glibc keep freed memory for reuse instead of returning it to the system.

    The feature maps of a model are allocated and freed in every step. The C library of most Linux systems (glibc) maps
    large blocks and unmaps them at once, so that each page of each large map is cleared and mapped anew in every step,
    which can take a quarter of a step on a CPU. Call it before the first large allocation. The process, and the data
    loading workers forked from it, then never shrink, and may grow somewhat beyond their peak need. GPU memory is not
    affected; PyTorch caches it anyway.

    Returns:
        True if it was done; other C libraries are left unchanged.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # no mallopt; on Windows CDLL(None) fails
        return False
    # -1 disables trimming; 0 disables mmap for large blocks.
    return bool(mallopt(_M_TRIM_THRESHOLD, -1)) and bool(mallopt(_M_MMAP_MAX, 0))


@contextmanager
def gc_frozen_imports() -> Iterator[None]:
    """Disable the garbage collector while the block imports libraries, then freeze all objects (``gc.freeze``).

    PyTorch, Lightning and their dependencies create almost a million permanent objects. Otherwise the collector
    traverses them again and again during the import, a sixth of the import's time, and then after each job of a sweep.
    Only the first use in a process has an effect, because a job's garbage must not be frozen.
    """
    global _made
    if _made or not gc.isenabled():
        yield
        return
    _made = True
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.freeze()
