"""Rank and world size of this process."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

__all__ = ["RankInfo", "barrier", "is_single_process", "rank_from_environment", "rank_info", "single_process"]


class RankInfo(NamedTuple):
    """Rank and world size of this process.

    Attributes:
        rank: rank in the process group, from 0.
        size: world size.
        local_rank: rank on this machine, from 0.
        local_size: number of the group's processes on this machine.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1


_single = False


def rank_info() -> RankInfo:
    """Return rank and world size; rank 0 of 1 outside ``process_group`` and inside ``single_process``."""
    distributed = sys.modules.get("torch.distributed")
    if _single or distributed is None or not (distributed.is_available() and distributed.is_initialized()):
        return RankInfo()
    return rank_from_environment()


@contextmanager
def single_process() -> Iterator[None]:
    """Make collectives no-ops inside the block, as in a single process."""
    global _single
    _single = True
    try:
        yield
    finally:
        _single = False


def is_single_process() -> bool:
    """Return whether this process is inside ``single_process``."""
    return _single


def barrier() -> None:
    """Wait until all ranks have reached this call (barrier)."""
    if rank_info().size > 1:
        from torch import distributed

        distributed.barrier()


def rank_from_environment() -> RankInfo:
    """Read torchrun's environment variables."""
    return RankInfo(*(int(os.environ[key]) for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")))
