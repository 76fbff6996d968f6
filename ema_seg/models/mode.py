"""How a model is run: its layout, its compilation, and evaluation mode for a while."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

__all__ = ["evaluation_mode", "set_execution"]


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
