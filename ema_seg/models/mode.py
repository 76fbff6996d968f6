"""How a model is run: its layout, its compilation, and evaluation mode for a while."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

__all__ = ["deterministic_algorithms", "evaluation_mode", "set_execution"]


@contextmanager
def deterministic_algorithms(wanted: bool) -> Iterator[None]:
    """For a while, let torch use only algorithms that give the same bits each time, or any; afterwards as before."""
    before = torch.are_deterministic_algorithms_enabled()
    if wanted:
        # Read when cuBLAS is first used; without it, it may share its memory between streams.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(wanted)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode and every module back into its own mode afterwards.

    Module by module, because ``model.train()`` would also wake normalisation layers that are frozen on purpose.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def set_execution(model: nn.Module, *, channels_last: bool, compile: bool) -> None:
    """Lay the weights out for channels-last convolutions, and compile the model for static shapes; in place.

    Training crops all have one size; evaluation images may not, and each new size is compiled anew.
    """
    if channels_last:
        model.to(memory_format=torch.channels_last)
    if compile:
        model.compile(dynamic=False)
