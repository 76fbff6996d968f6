"""Fused Triton kernels of EMA's short form for CUDA devices, listed as ``triton`` in ``operator.KERNELS``."""

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ema_seg.attention.ema.factorised import compute_dtype
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
    Work,
    ceil_div,
    family_of,
    for_single_groups,
    map_dtype,
    plan_work,
)
from ema_seg.runtime.distributed.ranks import rank_info
from ema_seg.runtime.errors import one_line

__all__ = ["TUNING_VARIABLE", "backward", "forward", "unavailable"]

TUNING_VARIABLE = "EMA_SEG_TUNING"

_OPTIONS = {"num_warps": 8, "maxnreg": 128}
_ALIGNMENT = 16  # bytes; Triton compiles wider loads for pointers that are multiples of it
_BLOCK_OF_SUMS = 64  # entries of the parameters' gradients that a program sums


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


_TUNED = {forward_kernel: _tuned(forward_kernel), backward_kernel: _tuned(backward_kernel)}


@dataclass(frozen=True)
class _Launch:
    """Launch of one phase of a kernel."""

    grid: tuple[int, ...]
    numbers: tuple[int, ...]  # arguments between the tensors and the constants
    constants: dict[str, Any]


class _Kernel:
    """Kernel with its launches for inputs of one size, layout, dtype and device.

    The first call compiles the launches and keeps them. The next ones hand addresses to what has been compiled:
    Triton's way from a call to its kernel takes ten times as long, more than the work on a small map.
    """

    def __init__(self, kernel: Any, launches: list[_Launch]) -> None:
        self._kernel = kernel
        self.launches = launches
        self._device = 0
        # The function that launches it, its grid, its binary, and its arguments after the tensors.
        self._compiled: list[tuple[Any, tuple[int, ...], tuple[Any, Any], tuple[Any, ...]]] = []

    def launch(self, tensors: list[Tensor], scratch: Tensor, areas: "_Areas") -> None:
        """Launch the kernel, whose first arguments are the tensors and the areas of the scratch memory."""
        addresses = [tensor.data_ptr() for tensor in tensors]
        aligned = not any(address % _ALIGNMENT for address in addresses)
        if self._compiled and aligned and not _tunes():
            start = scratch.data_ptr()
            addresses += [start + offset for offset in areas.offsets]
            stream = triton.runtime.driver.active.get_current_stream(self._device)
            for launch, grid, binary, rest in self._compiled:
                launch(*grid, stream, *binary, None, None, None, *addresses, *rest)
            return
        tensors = [*tensors, *areas.split(scratch)]
        if _tunes():
            self._launch_tuned(tensors)
            return
        if not INTERPRETED:
            _compile_together(self._kernel, self.launches, tensors)
        compiled = [
            self._kernel[launch.grid](*tensors, *launch.numbers, **launch.constants, **_OPTIONS)
            for launch in self.launches
        ]
        if aligned and not INTERPRETED:
            self._device = triton.runtime.driver.active.get_current_device()
            self._compiled = [
                (
                    kernel.run,
                    (*launch.grid, 1, 1)[:3],
                    (kernel.function, kernel.packed_metadata),
                    (*launch.numbers, *launch.constants.values()),
                )
                for kernel, launch in zip(compiled, self.launches, strict=True)
            ]

    def _launch_tuned(self, tensors: list[Tensor]) -> None:
        tuned = _TUNED.get(self._kernel)
        for launch in self.launches:
            # The other phases have no tile.
            if tuned is not None and launch.constants["PHASE"] not in _PHASES_OF_GROUPS:
                constants = {name: value for name, value in launch.constants.items() if name != "TILE"}
                tuned[launch.grid](*tensors, *launch.numbers, **constants)
            else:
                self._kernel[launch.grid](*tensors, *launch.numbers, **launch.constants, **_OPTIONS)


def _tunes() -> bool:
    """Return whether kernels are tuned now.

    Not in deterministic mode, in which the order of sums must not depend on trials, and not while a CUDA graph is
    captured, which the trials would abort.
    """
    return any(_TUNED.values()) and not (
        torch.are_deterministic_algorithms_enabled() or torch.cuda.is_current_stream_capturing()
    )


_announced = False


def _compile_together(kernel: Any, launches: list[_Launch], tensors: list[Tensor]) -> None:
    """Compile the launches of a kernel on all cores, and print a line at the first time in this process."""
    global _announced
    if not _announced and rank_info().rank == 0:
        print("compiling EMA's Triton kernels, once for each size of a feature map", file=sys.stderr, flush=True)
    _announced = True
    different = {tuple(launch.constants.items()): launch for launch in launches}
    with ThreadPoolExecutor(os.cpu_count()) as pool, triton.AsyncCompileMode(pool):
        for launch in different.values():
            kernel.warmup(*tensors, *launch.numbers, grid=(1,), **launch.constants, **_OPTIONS)


class _Areas:
    """Areas of one scratch memory, each for some elements of a dtype."""

    def __init__(self, areas: list[tuple[int, torch.dtype]], dtype: torch.dtype) -> None:
        self._areas = areas
        self._dtype = dtype
        self.offsets: list[int] = []  # in bytes
        self._bytes = 0
        for elements, of_area in areas:
            self.offsets.append(self._bytes)
            self._bytes += ceil_div(elements * of_area.itemsize, 128) * 128

    def allocate(self, like: Tensor) -> Tensor:
        """Allocate the scratch memory on the device of a tensor."""
        return like.new_empty(self._bytes // self._dtype.itemsize)

    def split(self, scratch: Tensor) -> list[Tensor]:
        """Return the areas of a scratch memory, one-dimensional."""
        size = self._dtype.itemsize
        return [
            scratch[offset // size : ceil_div(offset + elements * dtype.itemsize, size)].view(dtype)
            for offset, (elements, dtype) in zip(self.offsets, self._areas, strict=True)
        ]


_PHASES_OF_GROUPS = ("gates", "mixing", "small")  # one group per program, and no tile


def _launches(
    shape: tuple[int, int, int, int], work: Work, phases: dict[str, tuple[int, ...]], first: int, last: int
) -> list[_Launch]:
    """Return the launches of phases for the blocks from ``first`` to ``last``; each has the second axes of its grid."""
    batch, channels, height, width = shape
    plan = work.plan
    launches = []
    for phase, axes in phases.items():
        of_groups = phase in _PHASES_OF_GROUPS
        start, end = (_first_group(block, plan) for block in (first, last)) if of_groups else (first, last)
        numbers = height, width // plan.unit, batch * channels, start, work.parts, work.spans, family_of(shape, work)
        constants = {"plan": for_single_groups(plan) if of_groups else plan, "PHASE": phase, "TILE": SMALLEST_TILE}
        launches.append(_Launch((end - start, *axes), numbers, constants))
    return launches


def _first_group(block: int, plan: Plan) -> int:
    """Return the first group of a block, counted through the batch."""
    image, of_image = divmod(block, ceil_div(plan.groups, plan.tile_groups))
    return image * plan.groups + of_image * plan.tile_groups


@cache
def _forward_kernel(
    shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device, **options: Any
) -> tuple[_Kernel, _Areas]:
    """Return the launches of the forward, and its scratch memory; the options are those of ``plan_work``."""
    work = plan_work(shape, dtype, device, backward=False, **options)
    plan = work.plan
    batch, channels, height, width = shape
    count, regions = batch * channels, work.parts * work.spans
    image_phase = regions, ceil_div(plan.width, plan.tile_channels)
    phases = {
        "means": image_phase,
        "gates": (ceil_div(height + width, plan.positions),),
        "moments": image_phase,
        "mixing": (),
        "output": (regions,),
    }
    if plan.fused:
        phases = {"all": ()}
    launches = []
    for first in range(0, work.blocks, work.wave):
        launches += _launches(shape, work, phases, first, min(first + work.wave, work.blocks))
    acc = compute_dtype(dtype)
    sizes = (
        count * (height + width),  # gates
        PLANES_OF_FORWARD * count,  # mixing
        plan.partial * max(work.parts, work.spans) * count * (height + width),  # mean_parts
        2 * regions * count,  # moment_parts
    )
    return _Kernel(forward_kernel, launches), _Areas([(size, acc) for size in sizes], acc)


def forward(x: Tensor, parameters: Parameters, groups: int, eps: float, dynamic: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Re-weight ``x``; see ``operator.Kernels``."""
    batch, channels, height, width = x.shape
    number, of_group = batch * groups, channels // groups
    kernel, areas = _forward_kernel(**_kind(x, parameters, groups, eps, dynamic))
    y = _empty_like(x)
    means = parameters.w1.new_empty((number, of_group, height + width))
    moments = parameters.w1.new_empty((2, number, of_group))
    with torch.cuda.device_of(x):
        kernel.launch([x, y, means, moments, *parameters], areas.allocate(parameters.w1), areas)
    return y if y.dtype == x.dtype else y.to(x.dtype), means, moments


@cache
def _backward_kernels(
    shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device, **options: Any
) -> tuple[_Kernel, _Areas, _Kernel]:
    """Return the launches of the backward, its scratch memory, and the launch that sums over the groups."""
    work = plan_work(shape, dtype, device, backward=True, **options)
    plan = work.plan
    batch, channels, height, width = shape
    number, count, regions = batch * plan.groups, batch * channels, work.parts * work.spans
    chunks = ceil_div(plan.width, plan.tile_channels)
    phases: dict[str, tuple[int, ...]] = {
        "products": (regions, chunks),
        "small": (work.position_parts,),
        "input": (regions,),
    }
    if chunks > 1:
        phases = {"logit": (regions,), **phases}
    if plan.fused:
        launches = _launches(shape, work, {"all": ()}, 0, work.blocks)
    else:
        positions = ceil_div(height + width, plan.positions)
        launches = _launches(shape, work, {"mixing": (1 + positions,)}, 0, work.blocks)
        for first in range(0, work.blocks, work.wave):
            launches += _launches(shape, work, phases, first, min(first + work.wave, work.blocks))
    acc, of_maps = compute_dtype(dtype), map_dtype(dtype)
    maps = work.wave * plan.tile_groups * height * width
    areas = [
        (count * (height + width), acc),  # gates
        (PLANES_OF_BACKWARD * count, acc),  # mixing
        (plan.stores_weights * maps, of_maps),  # weights
        (maps, of_maps),  # dlogits
        (regions * number, acc),  # dlogit_parts
        (max(work.parts, work.spans) * 3 * count * (height + width), acc),  # sum_parts
        (regions * 10 * count, acc),  # product_parts
        (count * (height + width), acc),  # dmeans
        (number * 4 * plan.width, acc),  # shares
        (number * work.position_parts * (plan.width + 1) * plan.width, acc),  # position_shares
    ]
    programs = (
        9 * ceil_div(plan.width, plan.inputs)
        + ceil_div((plan.width + 1) * plan.width, _BLOCK_OF_SUMS)
        + ceil_div(2 * plan.width, _BLOCK_OF_SUMS)
        + 1
    )
    numbers = number, work.position_parts, height, width
    constants = {"plan": for_single_groups(plan), "BLOCK": _BLOCK_OF_SUMS}
    sums = _Kernel(parameters_kernel, [_Launch((programs,), numbers, constants)])
    return _Kernel(backward_kernel, launches), _Areas(areas, acc), sums


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
    kernel, areas, sums = _backward_kernels(**_kind(x, parameters, groups, eps, dynamic))
    dx = _empty_like(x)
    gradients = Parameters(*map(torch.empty_like, parameters))
    scratch = areas.allocate(parameters.w1)
    with torch.cuda.device_of(x):
        kernel.launch([dy, x, dx, means, moments, *parameters], scratch, areas)
        sums.launch([parameters.beta, *gradients], scratch, areas)
    return dx if dx.dtype == x.dtype else dx.to(x.dtype), gradients


def _kind(x: Tensor, parameters: Parameters, groups: int, eps: float, dynamic: bool) -> dict[str, Any]:
    """Return the arguments of ``plan_work`` for a call, but for its direction."""
    return {
        "shape": tuple(x.shape),
        "dtype": x.dtype,
        "device": x.device,
        "last": not x.is_contiguous(),
        "taps_last": not parameters.w3.is_contiguous(),
        "groups": groups,
        "dynamic": dynamic,
        "eps": eps,
    }


def _empty_like(x: Tensor) -> Tensor:
    """Allocate a result, in float32 for bfloat16 in the interpreter, which would truncate instead of rounding."""
    if INTERPRETED and x.dtype == torch.bfloat16:
        return torch.empty_like(x, dtype=torch.float32)
    return torch.empty_like(x)


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
