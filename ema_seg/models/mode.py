"""How a model is run: its layout, its compilation, and evaluation mode for a while."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ema_seg.errors import ConfigError

__all__ = ["deterministic_algorithms", "evaluation_mode", "set_execution"]

# What torch says of an operation, after its name.
_UNREPEATABLE = " does not have a deterministic implementation"


@contextmanager
def deterministic_algorithms(wanted: bool) -> Iterator[None]:
    """For a while, let torch use only algorithms that give the same bits each time, or any; afterwards as before.

    Raises:
        ConfigError: there is none for an operation within.
    """
    before = torch.are_deterministic_algorithms_enabled()
    # Without it, cuBLAS may share its memory between streams. Set even if not wanted, because it is read when a process
    # first multiplies matrices on a GPU, which a later job of a sweep may want to repeat.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(wanted)
    try:
        yield
    except RuntimeError as error:
        if _UNREPEATABLE not in str(error):
            raise
        raise ConfigError(
            f"reproducible=true: {str(error).partition(_UNREPEATABLE)[0].split()[-1]}, which this model or loss needs, "
            "gives other bits each time on this device; choose another model.decoder, attention or loss, or "
            "reproducible=false."
        ) from error
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
