"""Values that the processes of a group exchange; of a process by itself, each function gives back what it is given."""

from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from ema_seg.distributed.start import place

__all__ = ["agree", "gather", "global_sum", "sum_in_place"]

T = TypeVar("T")


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
