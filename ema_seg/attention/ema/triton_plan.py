"""Division of the work of EMA's Triton kernels: tiles, programs and launches, chosen from the sizes of a call."""

from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from ema_seg.attention.ema.triton_kernels import INTERPRETED

__all__ = ["SMALLEST_TILE", "Plan", "ceil_div", "family_of", "for_single_groups", "plan_work", "power_of_two"]

# Target elements of the smallest image tile, and of a product of small matrices before it is summed. Both are larger in
# the interpreter, which takes as long for few elements as for many.
SMALLEST_TILE = 65536 if INTERPRETED else 1024
_PRODUCT = 262144 if INTERPRETED else 4096


@dataclass(frozen=True)
class Plan:
    """Compile-time constants of a call: sizes, options, and the division of the work."""

    groups: int  # per image
    width: int  # channels per group
    last: bool  # channels-last
    dynamic: bool
    eps: float

    tile_groups: int
    tile_channels: int  # per group
    tile_columns: int
    tile_rows: int  # at most
    tiled: bool  # an image has more columns than a tile
    fold: int  # columns that are consecutive in a thread's registers
    unit: int  # power of two that divides the number of columns

    fused: bool  # all phases in one launch
    strips: int  # strips of rows, in the phases that make maps
    parts: int  # strips of rows, in the phases that sum along columns

    outputs: int  # block of channels o: width, rounded up to a power of two
    inputs: int  # block of channels c, in products with outputs and positions
    square: int  # block of channels c, in products with outputs and taps
    positions: int  # block of rows and columns


def power_of_two(value: int) -> int:
    """Round a positive number up to a power of two."""
    return 1 << (value - 1).bit_length()


def ceil_div(dividend: int, divisor: int) -> int:
    """Divide and round up."""
    return -(-dividend // divisor)


@cache
def _device(device: torch.device) -> tuple[int, int]:
    """Return the number of multiprocessors, and the bytes of their L2 cache."""
    if INTERPRETED:
        return 0, 0
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, properties.L2_cache_size


def plan_work(x: Tensor, groups: int, dynamic: bool, eps: float, tensors: int) -> Plan:
    """Divide the work on ``x``; ``tensors`` counts the tensors of its size that are read repeatedly."""
    layout = tuple(x.shape), x.element_size(), not x.is_contiguous()
    return _plan_for(*layout, groups, dynamic, eps, tensors, *_device(x.device))


@cache
def _plan_for(
    shape: tuple[int, int, int, int],
    itemsize: int,
    last: bool,
    groups: int,
    dynamic: bool,
    eps: float,
    tensors: int,
    processors: int,
    cache_size: int,
) -> Plan:
    batch, channels, height, width = shape
    per_group = channels // groups

    # A tile reads along the contiguous axis: whole rows of up to 256 columns, or channels of 64 bytes (32 if there are
    # few programs), the sizes of memory transactions. Tiles of small images hold more channels and groups.
    if last:
        tile_channels = min(power_of_two(per_group), 64)
        tile_groups = max(1, 64 // itemsize // tile_channels)
        if 2 * batch * ceil_div(groups, tile_groups) < processors:
            tile_groups = max(1, tile_groups // 2)
        tile_columns = min(power_of_two(width), max(1, SMALLEST_TILE // (tile_channels * tile_groups)), 32)
    else:
        tile_columns = min(power_of_two(width), 256)
        tile_channels = min(power_of_two(per_group), max(1, SMALLEST_TILE // (tile_columns * power_of_two(height))))
        tile_groups = 1
    filled = tile_channels * tile_columns * power_of_two(height)
    if filled < SMALLEST_TILE and tile_channels >= per_group:
        occupying = batch * groups // max(1, 4 * processors)  # more groups in a program would leave processors idle
        tile_groups = max(tile_groups, min(SMALLEST_TILE // filled, 1 << max(0, occupying.bit_length() - 1)))
    tile_groups = min(tile_groups, power_of_two(groups))
    tile = tile_groups * tile_channels * tile_columns

    # Fusing pays if launches would take longer than the work, or if the blocks in flight stay in the cache. Larger maps
    # are better spread over more programs.
    blocks = max(1, batch) * ceil_div(groups, tile_groups)  # an empty batch needs a plan, too
    pixels_of_block = tile_groups * per_group * height * width
    at_a_time = min(blocks, 2 * processors) * pixels_of_block * itemsize * tensors
    fused = pixels_of_block <= 32768 or (2 * blocks >= processors and at_a_time <= cache_size)
    strips = parts = 1
    if not fused:
        most = power_of_two(ceil_div(height, max(1, SMALLEST_TILE // tile)))
        strips = min(most, power_of_two(ceil_div(4 * processors, blocks)))
        chunks = ceil_div(per_group, tile_channels)
        parts = min(most, 64, power_of_two(ceil_div(2 * processors, blocks * chunks)))

    outputs = power_of_two(per_group)
    positions = min(64, max(16, _PRODUCT // outputs**2))
    return Plan(
        groups=groups,
        width=per_group,
        last=last,
        dynamic=dynamic,
        eps=eps,
        tile_groups=tile_groups,
        tile_channels=tile_channels,
        tile_columns=tile_columns,
        tile_rows=power_of_two(height),
        tiled=width > tile_columns,
        fold=1 if last else min(tile_columns, 16 // max(itemsize, 4)),
        unit=min(width & -width, 16),
        fused=fused,
        strips=strips,
        parts=parts,
        outputs=outputs,
        inputs=min(outputs, max(1, _PRODUCT // (outputs * positions))),
        square=min(outputs, max(1, _PRODUCT // (outputs * 16))),
        positions=positions,
    )


@cache
def family_of(shape: tuple[int, int, int, int], plan: Plan) -> int:
    """Return a number shared by inputs for which one choice of tile and warps is good."""
    family = 2 * plan.last + plan.dynamic
    for size in (*shape[2:], plan.width, plan.tile_groups, plan.tile_channels, plan.strips, plan.parts):
        family = 32 * family + size.bit_length()
    return family % (1 << 31)


@cache
def for_single_groups(plan: Plan) -> Plan:
    """Return the plan of the phases that have one program per group."""
    return replace(plan, tile_groups=1)
