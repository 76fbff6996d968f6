"""Division of the work of EMA's Triton kernels: tiles, regions, waves and launches, chosen from the sizes of a call."""

from dataclasses import dataclass, replace
from functools import cache

import torch

from ema_seg.attention.ema.triton_kernels import INTERPRETED

__all__ = ["SMALLEST_TILE", "Plan", "Work", "ceil_div", "family_of", "for_single_groups", "map_dtype", "plan_work"]

# Target elements of the smallest image tile, and of a product of small matrices before it is summed. Both are larger in
# the interpreter, which takes as long for few elements as for many.
SMALLEST_TILE = 65536 if INTERPRETED else 1024
_PRODUCT = 262144 if INTERPRETED else 4096


@dataclass(frozen=True)
class Plan:
    """Compile-time constants of a call: sizes, options and tiles."""

    groups: int  # per image
    width: int  # channels per group
    last: bool  # channels-last
    taps_last: bool  # so is the weight of the 3×3 convolution
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
    partial: bool  # several regions sum along a row or a column
    stores_weights: bool  # the backward stores the weight maps, and does not compute them a second time
    store: str  # cache modifier of y and dx: ".cs" if they would take the place of x in the cache

    outputs: int  # block of channels o: width, rounded up to a power of two
    inputs: int  # block of channels c, in products with outputs and positions
    square: int  # block of channels c, in products with outputs and taps
    positions: int  # block of rows and columns


@dataclass(frozen=True)
class Work:
    """Division of a call into launches and programs.

    A wave is a number of blocks that go through all phases before the next ones start, so that they stay in the cache.
    """

    plan: Plan
    blocks: int  # of groups, in the batch
    wave: int  # blocks in a wave
    parts: int  # regions of a block from top to bottom
    spans: int  # regions of a block from left to right
    position_parts: int  # programs for the rows and columns of a group


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


def plan_work(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    *,
    last: bool,
    taps_last: bool,
    groups: int,
    dynamic: bool,
    eps: float,
    backward: bool,
) -> Work:
    """Divide the work on an input of this size, layout and dtype."""
    batch, channels, height, width = shape
    processors, cache_size = _device(device)
    itemsize, per_group = dtype.itemsize, channels // groups

    # Tensors of a wave in the cache: x and y, or x, dy, dx and the maps of the groups.
    stores_weights = per_group > 4
    tensors = 3 + (1 + stores_weights) * map_dtype(dtype).itemsize / (per_group * itemsize) if backward else 2.0
    too_large = 64 * height * width * tensors > cache_size
    tile_groups, tile_channels, tile_columns = _tile(shape, itemsize, groups, last, too_large, processors)

    # Fusing pays if launches would take longer than the work. Larger maps are better spread over more programs.
    blocks = batch * ceil_div(groups, tile_groups)
    pixels_of_block = tile_groups * per_group * height * width
    fused = pixels_of_block <= _LARGEST_FUSED
    wave, parts, spans = max(1, blocks), 1, 1  # an empty batch needs a plan, too
    if not fused:
        wave = _blocks_of_wave(wave, pixels_of_block * itemsize, tensors, cache_size)
        rows_of_tile = max(1, SMALLEST_TILE // (tile_groups * tile_channels * tile_columns))
        tiles = ceil_div(height, rows_of_tile), ceil_div(width, tile_columns)
        parts, spans = _regions(max(1, ceil_div(2 * processors, wave)), tiles, (height, width))

    outputs = power_of_two(per_group)
    positions = min(64, max(16, _PRODUCT // outputs**2))
    plan = Plan(
        groups=groups,
        width=per_group,
        last=last,
        taps_last=taps_last,
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
        partial=max(parts, spans) > 1,
        stores_weights=stores_weights,
        store=".cs" if wave * pixels_of_block * itemsize * tensors > cache_size else "",
        outputs=outputs,
        inputs=min(outputs, max(1, _PRODUCT // (outputs * positions))),
        square=min(outputs, max(1, _PRODUCT // (outputs * 16))),
        positions=positions,
    )
    position_parts = ceil_div(2 * processors, wave * tile_groups) if not fused else 1
    most = ceil_div(height + width, positions)
    return Work(plan, blocks, wave, parts, spans, min(max(1, position_parts), most))


def _tile(
    shape: tuple[int, int, int, int], itemsize: int, groups: int, last: bool, too_large: bool, processors: int
) -> tuple[int, int, int]:
    """Return the groups of a tile, the channels of each group and the columns.

    A tile reads along the contiguous axis: whole rows of up to 256 columns, or channels of 64 bytes (32 if the image is
    ``too_large`` for the cache), the sizes of memory transactions. It holds whole groups of up to 16 channels, so that
    the sum over a group's channels needs no second pass. Tiles of small images hold more groups.
    """
    batch, channels, height, width = shape
    per_group = channels // groups
    tile_groups, tile_channels = 1, power_of_two(per_group)
    if last:
        tile_channels = min(tile_channels, 64)
        tile_groups = max(1, 64 // itemsize // tile_channels)
        if too_large:
            tile_groups = max(1, tile_groups // 2)
        tile_columns = min(power_of_two(width), max(1, SMALLEST_TILE // (tile_channels * tile_groups)), 32)
    elif per_group <= 16:
        tile_columns = min(power_of_two(width), 256, max(1, SMALLEST_TILE // (2 * tile_channels)))
    else:
        tile_columns = min(power_of_two(width), 256)
        tile_channels = min(tile_channels, max(1, SMALLEST_TILE // (tile_columns * power_of_two(height))))
    filled = tile_channels * tile_columns * power_of_two(height)
    if filled < SMALLEST_TILE and tile_channels >= per_group:
        occupying = batch * groups // max(1, 4 * processors)  # more groups in a program would leave processors idle
        tile_groups = max(tile_groups, min(SMALLEST_TILE // filled, 1 << max(0, occupying.bit_length() - 1)))
    return min(tile_groups, power_of_two(groups)), tile_channels, tile_columns


def map_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the backward's maps for an input of ``dtype``.

    bfloat16 has the range of float32, and rounds the gradient of the input anyway. The interpreter would truncate.
    """
    if dtype == torch.float16 or (INTERPRETED and dtype == torch.bfloat16):
        return torch.float32
    return dtype


_LARGEST_FUSED = 2**15  # elements of a block, 32 tiles for a program to take through each phase
_SMALLEST_WAVE = 2**23  # bytes of x; less would not occupy a GPU for as long as the launches take


def _blocks_of_wave(blocks: int, bytes_of_block: int, tensors: float, cache_size: int) -> int:
    """Return the number of blocks that fit in the cache, or all blocks if these are too few for a wave."""
    fitting = max(1, int(cache_size / (bytes_of_block * tensors)))
    if fitting >= blocks or fitting * bytes_of_block < _SMALLEST_WAVE:
        return blocks
    return ceil_div(blocks, ceil_div(blocks, fitting))


def _regions(programs: int, tiles: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """Divide an image into ``programs`` regions, or as many as it has tiles, with as few partial sums as possible.

    No region is empty: the kernels give each the same number of rows, and of tiles from left to right, rounded up.
    """
    (rows, columns), (height, width) = tiles, size
    options = []
    for spans in {ceil_div(columns, ceil_div(columns, 1 << power)) for power in range(columns.bit_length() + 1)}:
        parts = min(rows, ceil_div(programs, spans))
        parts = ceil_div(height, ceil_div(height, parts))
        options.append((-min(parts * spans, programs), parts * width + spans * height, parts, spans))
    return min(options)[2:]


def family_of(shape: tuple[int, int, int, int], work: Work) -> int:
    """Return a number shared by inputs for which one choice of tile and warps is good."""
    plan = work.plan
    family = 2 * plan.last + plan.dynamic
    for size in (*shape[2:], plan.width, plan.tile_groups, plan.tile_channels, work.parts, work.spans):
        family = 32 * family + size.bit_length()
    return family % (1 << 31)


@cache
def for_single_groups(plan: Plan) -> Plan:
    """Return the plan of the phases that have one program per group."""
    return replace(plan, tile_groups=1)
