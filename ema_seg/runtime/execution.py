"""Execution modes of a model: deterministic algorithms, TF32, evaluation mode, memory format, compilation."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ema_seg.runtime.errors import ConfigError

__all__ = ["deterministic_algorithms", "evaluation_mode", "set_execution", "tf32"]

# Part of torch's message that follows the name of the operation.
_UNREPEATABLE = " does not have a deterministic implementation"


@contextmanager
def deterministic_algorithms(wanted: bool) -> Iterator[None]:
    """Restrict torch to deterministic algorithms inside the block if ``wanted``, else allow all.

    The earlier setting is restored afterwards.

    Raises:
        ConfigError: an operation inside the block has no deterministic algorithm.
    """
    before = torch.are_deterministic_algorithms_enabled()
    # Without it, cuBLAS may share its workspace between streams. Set in any case: cuBLAS reads it once, at a process's
    # first matrix product on a GPU, and a later job of a sweep may want determinism.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(wanted)
    try:
        yield
    except RuntimeError as error:
        if _UNREPEATABLE not in str(error):
            raise
        raise ConfigError(
            f"reproducible=true: {str(error).partition(_UNREPEATABLE)[0].split()[-1]}, which this model or loss needs, "
            "has no deterministic implementation on this device; choose another model.decoder, attention or loss, or "
            "set reproducible=false."
        ) from error
    finally:
        torch.use_deterministic_algorithms(before)


@contextmanager
def tf32(wanted: bool | None) -> Iterator[None]:
    """Multiply float32 numbers in TF32, with 10 bits of mantissa, where a GPU can; the setting is restored afterwards.

    Args:
        wanted: True for convolutions and matrix products, False for neither, None for PyTorch's current setting, by
            default convolutions alone.
    """
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    if wanted is not None:
        torch.set_float32_matmul_precision("high" if wanted else "highest")
        torch.backends.cudnn.allow_tf32 = wanted
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode, and restore the mode of every module afterwards.

    ``model.train()`` is not enough: it would also unfreeze normalisation layers that are frozen on purpose.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def set_execution(model: nn.Module, *, channels_last: bool, compile: bool) -> None:
    """Convert the weights to channels-last and compile the model for static shapes, each if set; in place.

    Training crops all have one size; each new size of an evaluation image triggers a recompilation.
    """
    if channels_last:
        model.to(memory_format=torch.channels_last)
    if compile:
        model.compile(dynamic=False)
