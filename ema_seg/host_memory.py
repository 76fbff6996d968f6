"""How the process deals with memory: with what it has freed, and with what it never frees."""

import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["keep_freed_memory", "made_for_good"]

# Numbers of <malloc.h>.
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4

_made = False  # see made_for_good; the collector would count what it passes over


def keep_freed_memory() -> bool:
    """Make the process keep what it frees, to use it again, instead of giving it back to the system.

    The feature maps of a model are allocated and freed in every step. The C library of most Linux systems (glibc) gets
    large blocks from the system and gives them back at once, so that each page of each large map is cleared and mapped
    anew in every step, which can take a quarter of a step on a CPU. Call it before the first large allocation.
    The process, and the loading processes that are forked from it, then never shrink, and may grow somewhat beyond what
    they need at once. Memory of a GPU is not concerned; PyTorch keeps that anyway.

    Returns:
        Whether it was done; other C libraries are left as they are.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # no such function; on Windows there is no program to look in
        return False
    # -1 turns trimming off; 0 leaves no block to be mapped by itself.
    return bool(mallopt(_M_TRIM_THRESHOLD, -1)) and bool(mallopt(_M_MMAP_MAX, 0))


@contextmanager
def made_for_good() -> Iterator[None]:
    """Import libraries within: the garbage collector passes over what has been made until then.

    PyTorch, Lightning and what they bring make almost a million objects that stay. Without this, the collector walks
    through them again and again while they are made, a sixth of the time that it takes, and then after each job of a
    sweep. Only the first use in a process does so, for the garbage of a job is not to stay.
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
