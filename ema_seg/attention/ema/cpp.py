"""Fused CPU kernels of EMA's short form, compiled at their first use.

They use the OpenMP runtime that PyTorch has loaded, with as many threads as PyTorch.
"""

import ctypes
import struct
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from ema_seg.attention.ema.reference import Parameters
from ema_seg.runtime.cpp import Library, load_library
from ema_seg.runtime.errors import ModelError

__all__ = ["backward", "forward", "unavailable"]

_SOURCE = Path(__file__).parent / "kernels" / "ema.cpp"
# As in run_in of ema.cpp and in struct Call of layout.h.
_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_CALL = struct.Struct("=9qd17Q")


def unavailable(x: Tensor) -> str | None:
    """Return why these kernels cannot compute ``x``, as a clause, or None if they can; compile them if needed."""
    if x.device.type != "cpu":
        return f"the tensor is on {x.device}, and these kernels are for CPUs"
    if x.dtype not in _DTYPES:
        return f"the kernels do not support {x.dtype}"
    return _load_kernels().problem


def forward(x: Tensor, parameters: Parameters, groups: int, eps: float, dynamic: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Re-weight ``x``; see ``operator.Kernels``."""
    batch, channels, height, width = x.shape
    count, y = batch * groups, torch.empty_like(x)
    means = parameters.w1.new_empty((count, channels // groups, height + width))
    moments = parameters.w1.new_empty((2, count, channels // groups))
    contiguous = _with_contiguous_w3(parameters)
    _call_kernel("ema_forward", (x, None, y, means, moments, *contiguous), groups, eps, dynamic)
    return y, means, moments


def backward(
    dy: Tensor,
    x: Tensor,
    means: Tensor,
    moments: Tensor,
    parameters: Parameters,
    groups: int,
    eps: float,
    dynamic: bool,
) -> tuple[Tensor, Parameters]:
    """Compute the gradients of ``x`` and of the parameters; see ``operator.Kernels``."""
    contiguous = _with_contiguous_w3(parameters)
    dx, gradients = torch.empty_like(x), Parameters(*map(torch.empty_like, contiguous))
    _call_kernel("ema_backward", (x, dy, dx, means, moments, *contiguous, *gradients), groups, eps, dynamic)
    if contiguous.w3 is not parameters.w3:
        gradients = gradients._replace(w3=torch.empty_like(parameters.w3).copy_(gradients.w3))
    return dx, gradients


def _with_contiguous_w3(parameters: Parameters) -> Parameters:
    return parameters._replace(w3=parameters.w3.contiguous())


def _call_kernel(function: str, tensors: tuple[Tensor | None, ...], groups: int, eps: float, dynamic: bool) -> None:
    x = tensors[0]
    assert x is not None
    library = _load_kernels()
    if library.loaded is None or x.dtype not in _DTYPES:
        raise ModelError(f"EMA's C++ kernels cannot be used: {unavailable(x)}.")
    addresses = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
    missing = (tensor for tensor, address in zip(tensors, addresses, strict=True) if tensor is not None and not address)
    if any(tensor.numel() for tensor in missing):
        raise ModelError("EMA's C++ kernels cannot compute tensors without storage, such as those of a FakeTensorMode.")
    addresses += [0] * (17 - len(addresses))
    numbers = (groups, _DTYPES[x.dtype], not x.is_contiguous(), dynamic, torch.get_num_threads())
    if getattr(library.loaded, function)(_CALL.pack(*x.shape, *numbers, eps, *addresses)):
        raise ModelError(
            f"EMA's C++ kernels: out of memory for an input of shape {tuple(x.shape)}; use a smaller batch."
        )


@cache
def _load_kernels() -> Library:
    library = load_library(_SOURCE, "-ffp-contract=fast")
    if library.loaded is not None:
        for function in (library.loaded.ema_forward, library.loaded.ema_backward):
            function.argtypes, function.restype = [ctypes.c_char_p], ctypes.c_int
    return library
