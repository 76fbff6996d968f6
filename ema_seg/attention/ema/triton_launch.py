"""Fused Triton kernels of EMA's short form for CUDA devices, listed as ``triton`` in ``operator.KERNELS``."""

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ema_seg.attention.ema.reference import Parameters
from ema_seg.attention.ema.triton_kernels import (
    INTERPRETED,
    PLANES_OF_BACKWARD,
    PLANES_OF_FORWARD,
    backward_kernel,
    empty_kernel,
    forward_kernel,
    parameters_kernel,
    triton,  # None where it is not installed
)
from ema_seg.attention.ema.triton_plan import (
    SMALLEST_TILE,
    Plan,
    ceil_div,
    family_of,
    for_single_groups,
    plan_work,
    power_of_two,
)
from ema_seg.runtime.distributed.ranks import rank_info
from ema_seg.runtime.errors import one_line

__all__ = ["TUNING_VARIABLE", "backward", "forward", "unavailable"]

TUNING_VARIABLE = "EMA_SEG_TUNING"

_DEFAULTS = {"TILE": SMALLEST_TILE, "num_warps": 8, "maxnreg": 128}


def _tuned(kernel: Any) -> Any:
    """Autotune tile, warps and registers of a kernel, once for each phase and family of inputs, if requested.

    The trials compile four times as much, and take minutes before a training's first steps.
    """
    if triton is None or INTERPRETED or not os.environ.get(TUNING_VARIABLE):
        return None
    configs = [
        triton.Config({"TILE": tile}, num_warps=warps, maxnreg=registers)
        for tile, warps, registers in ((1024, 8, None), (1024, 8, 128), (2048, 8, None), (2048, 16, None))
    ]
    return triton.autotune(configs, key=["PHASE", "family"], cache_results=True)(kernel)


_tuned_forward_kernel = _tuned(forward_kernel)
_tuned_backward_kernel = _tuned(backward_kernel)


def _launch(
    kernel: Any, tuned: Any, grids: dict[str, tuple[int, ...]], x: Tensor, tensors: tuple[Tensor, ...], plan: Plan
) -> None:
    """Launch phases of a kernel, each on its grid; compile them together first if they are new.

    Nothing is tuned in deterministic mode, in which the order of sums must not depend on trials, and during CUDA graph
    capture, which the trials would abort.
    """
    batch, channels, height, width = shape = tuple(x.shape)
    arguments = (*tensors, height, width // plan.unit, batch * channels, family_of(shape, plan))
    tunes = tuned is not None and not (
        torch.are_deterministic_algorithms_enabled() or torch.cuda.is_current_stream_capturing()
    )
    # These phases have one program per group, and no tile.
    alone = [phase for phase in grids if phase in ("gates", "mixing", "small")]
    plans = {phase: for_single_groups(plan) if phase in alone else plan for phase in grids}
    if not (INTERPRETED or tunes):
        _compile_together(kernel, x.device, x.dtype, arguments, plans)
    for phase, grid in grids.items():
        if tunes and phase not in alone:
            tuned[grid](*arguments, plan=plan, PHASE=phase)
        else:
            kernel[grid](*arguments, plan=plans[phase], PHASE=phase, **_DEFAULTS)


_compiled: set[tuple[Any, ...]] = set()


def _compile_together(
    kernel: Any, device: torch.device, dtype: torch.dtype, arguments: tuple[Any, ...], plans: dict[str, Plan]
) -> None:
    """Compile phases of a kernel on all cores, and print a line at the first time in this process."""
    key = kernel.__name__, device, dtype, tuple(plans.items())
    if key in _compiled:
        return
    if not _compiled and rank_info().rank == 0:
        print("compiling EMA's Triton kernels, once for each size of a feature map", file=sys.stderr, flush=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool, triton.AsyncCompileMode(pool):
        for phase, plan in plans.items():
            kernel.warmup(*arguments, grid=(1,), plan=plan, PHASE=phase, **_DEFAULTS)
    _compiled.add(key)


def forward(x: Tensor, parameters: Parameters, groups: int, eps: float, dynamic: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Re-weight ``x``; see ``operator.Kernels``."""
    batch, channels, height, width = x.shape
    plan = plan_work(x, groups, dynamic, eps, tensors=1)
    number, count = batch * groups, batch * channels
    y = _empty_like(x)
    new_empty = parameters.w1.new_empty
    means = new_empty((number, plan.width, height + width))
    moments = new_empty((2, number, plan.width))
    gates = torch.empty_like(means)
    mixing = new_empty((PLANES_OF_FORWARD, count))
    column_parts = means if plan.parts == 1 else new_empty((plan.parts, count, width))
    moment_parts = new_empty((plan.parts, 2, count))

    blocks = batch * ceil_div(groups, plan.tile_groups)
    chunks = ceil_div(plan.width, plan.tile_channels)
    grids = {
        "means": (blocks, plan.parts, chunks),
        "gates": (number, ceil_div(height + width, plan.positions)),
        "moments": (blocks, plan.parts, chunks),
        "mixing": (number,),
        "output": (blocks, plan.strips),
    }
    if plan.fused:
        grids = {"all": (blocks,)}
    tensors = (x, y, means, moments, *parameters, gates, mixing, column_parts, moment_parts)
    with torch.cuda.device_of(x):
        _launch(forward_kernel, _tuned_forward_kernel, grids, x, tensors, plan)
    return y.to(x.dtype), means, moments


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
    batch, channels, height, width = x.shape
    plan = plan_work(x, groups, dynamic, eps, tensors=3)  # x, dy, and maps of the groups
    number, count = batch * groups, batch * channels
    dx = _empty_like(x)
    new_empty = parameters.w1.new_empty
    gates, dmeans = torch.empty_like(means), torch.empty_like(means)
    mixing = new_empty((PLANES_OF_BACKWARD, count))
    weights, dlogits = new_empty((number, height, width)), new_empty((number, height, width))
    dlogit_parts = new_empty((plan.strips, number))
    row_sums = new_empty((3, count, height))
    column_parts = new_empty((plan.parts, 3, count, width))
    product_parts = new_empty((plan.parts, 10, count))
    shares = new_empty((number, plan.width + 5, plan.width))

    blocks = batch * ceil_div(groups, plan.tile_groups)
    grids = {
        "mixing": (number, 1 + ceil_div(height + width, plan.positions)),
        "logit": (blocks, plan.strips),
        "products": (blocks, plan.parts, ceil_div(plan.width, plan.tile_channels)),
        "small": (number,),
        "input": (blocks, plan.strips),
    }
    if plan.fused:
        grids = {"all": (blocks,)}
    results = (dlogit_parts, row_sums, column_parts, product_parts, dmeans, shares)
    tensors = (dy, x, dx, means, moments, *parameters, gates, mixing, weights, dlogits, *results)
    gradients = Parameters(*map(torch.empty_like, parameters))
    entries = (plan.width + 3) * plan.width
    block = min(256, power_of_two(entries))
    programs = 9 * ceil_div(plan.width, plan.inputs) + ceil_div(entries, block) + 1
    with torch.cuda.device_of(x):
        _launch(backward_kernel, _tuned_backward_kernel, grids, x, tensors, plan)
        arguments = (mixing, shares, parameters.beta, *gradients, number, height, width)
        parameters_kernel[(programs,)](*arguments, plan=for_single_groups(plan), BLOCK=block)
    return dx.to(x.dtype), gradients


def _empty_like(x: Tensor) -> Tensor:
    """Allocate a result, in float32 for bfloat16 in the interpreter, which would truncate instead of rounding."""
    return torch.empty_like(x, dtype=torch.float32 if INTERPRETED and x.dtype == torch.bfloat16 else x.dtype)


def unavailable(x: Tensor) -> str | None:
    """Return why these kernels cannot compute ``x``, as a clause, or None if they can."""
    dtype = str(x.dtype).removeprefix("torch.")
    if triton is None:
        return "triton is not installed"
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        return f"the kernels do not support {dtype}"
    if INTERPRETED:
        return None if x.device.type == "cpu" else f"Triton's interpreter needs a tensor on cpu, got {x.device.type}"
    if x.device.type != "cuda":
        return f"the tensor is on {x.device.type}, and these kernels are for CUDA"
    if torch.version.cuda is None:
        return "this build of PyTorch is not for CUDA"
    capability = torch.cuda.get_device_capability(x.device)
    if capability < ((8, 0) if x.dtype == torch.bfloat16 else (7, 0)):
        return f"{torch.cuda.get_device_name(x.device)} is too old for kernels in {dtype}"
    return _launch_problem(x.device)


@cache
def _launch_problem(device: torch.device) -> str | None:
    """Return why no kernel can be launched on a device, as a clause, or None.

    Triton compiles C code at its first launch, which needs a compiler and Python's headers.
    """
    try:
        with torch.cuda.device(device):
            empty_kernel[(1,)]()
    except Exception as error:  # from a compiler that is missing to a driver that is too old
        return f"Triton cannot launch a kernel on {device} ({one_line(error)})"
    return None
