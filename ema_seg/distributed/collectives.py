"""Values that the processes of a group exchange; of a process by itself, each function gives back what it is given."""

import time
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

import torch
from torch import Tensor, distributed

from ema_seg.distributed.start import place, wait_for_all
from ema_seg.errors import ConfigError

__all__ = ["agree", "gather", "global_sum", "require_shared", "sum_in_place"]

T = TypeVar("T")

# Seconds after which a file that one machine has made is taken not to come on another.
_LATENCY = 5.0


def agree(value: T) -> T:
    """The first process's value, on every process; it is pickled."""
    if place().size == 1:
        return value
    values = [value]
    distributed.broadcast_object_list(values, device=torch.device("cpu"))
    return values[0]


def gather(value: T) -> list[T]:
    """The values of all processes in their order, on every process; they are pickled."""
    size = place().size
    if size == 1:
        return [value]
    values: list[Any] = [None] * size
    # Objects travel on the device of the default backend, which for a group of both is the CPU.
    distributed.all_gather_object(values, value)
    return values


def require_shared(folder: Path) -> None:
    """See that all machines have this folder in common; on one machine, nothing is looked at.

    Raises:
        ConfigError: in every process, that a process does not see what the first one writes there.
    """
    here = place()
    if here.size == here.local_size:
        return
    # A name that no machine has looked for before, and so none remembers as missing.
    file = folder / f".shared-{agree(uuid4().hex)}"
    if here.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        file.touch()
    wait_for_all()
    seen = gather(_appears(file))
    if here.rank == 0:
        file.unlink()
    if not all(seen):
        raise ConfigError(
            f"{folder}: the run's folder must be on a disk that all machines share, but the process "
            f"{seen.index(False)} does not see what the process 0 writes there; choose another with hydra.run.dir or "
            "report.dir."
        )


def _appears(file: Path) -> bool:
    deadline = time.monotonic() + _LATENCY
    while not file.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def sum_in_place(tensor: Tensor) -> Tensor:
    """Make the tensor the sum of those of all processes."""
    if place().size > 1:
        distributed.all_reduce(tensor)
    return tensor


def global_sum(tensor: Tensor) -> Tensor:
    """The sum of the tensors of all processes, through which gradients flow.

    The gradient of a process's tensor is that of the sum of all processes' losses.
    """
    return tensor if place().size == 1 else _GlobalSum.apply(tensor)


class _GlobalSum(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, tensor: Tensor) -> Tensor:
        return sum_in_place(tensor.clone(memory_format=torch.contiguous_format))

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Tensor:
        return sum_in_place(gradients[0].clone(memory_format=torch.contiguous_format))
