"""Collectives: broadcast, all-gather and all-reduce; without communication in a single process."""

import time
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

import torch
from torch import Tensor, distributed

from ema_seg.runtime.distributed.ranks import barrier, rank_info
from ema_seg.runtime.errors import ConfigError

__all__ = ["broadcast", "gather", "require_shared", "sum_in_place"]

T = TypeVar("T")

# Seconds until a file that one machine has created must be visible on another.
_LATENCY = 5.0


def broadcast(value: T) -> T:
    """Broadcast rank 0's value to every rank, pickled."""
    if rank_info().size == 1:
        return value
    values = [value]
    distributed.broadcast_object_list(values, device=torch.device("cpu"))
    return values[0]


def gather(value: T) -> list[T]:
    """Gather the values of all ranks, in rank order, on every rank (all-gather of pickled objects)."""
    size = rank_info().size
    if size == 1:
        return [value]
    values: list[Any] = [None] * size
    # Objects travel on the default backend's device: the CPU for a group with gloo and NCCL.
    distributed.all_gather_object(values, value)
    return values


def require_shared(folder: Path) -> None:
    """Check that all machines share this folder; on one machine, skip the check.

    Raises:
        ConfigError: a rank does not see a file that rank 0 creates in the folder; raised on every rank.
    """
    here = rank_info()
    if here.size == here.local_size:
        return
    # A new name: a file system may cache that a file does not exist.
    file = folder / f".shared-{broadcast(uuid4().hex)}"
    if here.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        file.touch()
    barrier()
    seen = gather(_appears(file))
    if here.rank == 0:
        file.unlink()
    if not all(seen):
        raise ConfigError(
            f"{folder}: the run's folder must be on a disk that all machines share, but process {seen.index(False)} "
            "does not see the files that process 0 writes there; choose another with hydra.run.dir or report.dir."
        )


def _appears(file: Path) -> bool:
    deadline = time.monotonic() + _LATENCY
    while not file.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def sum_in_place(tensor: Tensor) -> Tensor:
    """Sum the tensor over all ranks, in place (all-reduce)."""
    if rank_info().size > 1:
        distributed.all_reduce(tensor)
    return tensor
