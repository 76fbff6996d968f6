"""Selection of the EMA implementation for an input."""

import os
from functools import cache

import torch
from torch import Tensor

from ema_seg.attention.ema.operator import KERNELS, import_kernels
from ema_seg.runtime.errors import ConfigError, ModelError, did_you_mean

__all__ = ["ENVIRONMENT_VARIABLE", "IMPLEMENTATIONS", "check_name", "select_implementation"]

IMPLEMENTATIONS = ("auto", "reference", *KERNELS)
ENVIRONMENT_VARIABLE = "EMA_SEG_IMPLEMENTATION"


def check_name(name: str, where: str) -> None:
    """Check that an implementation has this name.

    Args:
        name: the user's value.
        where: the option or environment variable that holds it.

    Raises:
        ConfigError: no implementation has this name.
    """
    if name not in IMPLEMENTATIONS:
        raise ConfigError(
            f"{where}: must be one of {', '.join(IMPLEMENTATIONS)}, got {name!r}."
            f"{did_you_mean(str(name), IMPLEMENTATIONS)}"
        )


def select_implementation(requested: str, x: Tensor) -> str:
    """Return the implementation that computes ``x``.

    Args:
        requested: one of ``IMPLEMENTATIONS``; the environment variable, if set, overrides it.
        x: the input; only its device and dtype matter.

    Returns:
        One of ``IMPLEMENTATIONS`` other than ``"auto"``.

    Raises:
        ConfigError: the environment variable names no implementation.
        ModelError: the requested implementation cannot compute ``x``; the message says why.
    """
    from_environment = os.environ.get(ENVIRONMENT_VARIABLE)
    name = from_environment or requested
    check_name(name, ENVIRONMENT_VARIABLE if from_environment else "attention.implementation")
    chosen, problem = _choose(name, x.device, x.dtype)
    if problem is not None:
        remedy = (
            f"set the environment variable {ENVIRONMENT_VARIABLE}, which requests it, to auto"
            if from_environment
            else "set attention.implementation=auto, or, for a saved model, the environment variable "
            f"{ENVIRONMENT_VARIABLE}=auto"
        )
        raise ModelError(f"EMA's implementation {name!r} cannot be used: {problem}; {remedy}.")
    return chosen


@torch.compiler.assume_constant_result  # the search for a C++ compiler cannot be traced
def _choose(name: str, device: torch.device, dtype: torch.dtype) -> tuple[str, str | None]:
    """Return the implementation, and why it cannot be used, or None if it can."""
    if name == "auto":
        return next(kernels for kernels in KERNELS if _reason_unavailable(kernels, device, dtype) is None), None
    return name, _reason_unavailable(name, device, dtype) if name in KERNELS else None


@cache
def _reason_unavailable(kernels: str, device: torch.device, dtype: torch.dtype) -> str | None:
    return import_kernels(kernels).unavailable(torch.empty(0, dtype=dtype, device=device))
