"""Bytes that EMA's Triton kernels move between a GPU's memory and its L2 cache, counted without a GPU.

    python benchmarks/bench_ema_traffic.py

The programs of all launches that the plan for an H200 contains load and store their regions, one program after the
other, in a model of the cache: whole rows of a region, the least recently used of which makes room. A pass is as many
bytes as x has. A forward needs at least two, forward and backward five. A test compares the model with the loads and
stores of the kernels in Triton's interpreter, which takes minutes for a sixteenth of such a map.
"""

import argparse
import inspect
import itertools
from collections import OrderedDict
from collections.abc import Iterator, Sequence

import torch
from bench_ema import DTYPES
from measuring import LAYOUTS, markdown_table

from ema_seg.attention.ema import triton_launch, triton_plan
from ema_seg.attention.ema.triton_plan import Plan, Work, ceil_div, map_dtype

PROCESSORS, CACHE = 132, 50 * 2**20  # of an H200
ROWS = 8  # that the model loads and stores at a time

# Shape, and channels per group.
SHAPES = {
    "cityscapes-b1-unet-16, Cg 1": ((1, 16, 1024, 2048), 1),
    "cityscapes-b1-unet-16, Cg 2": ((1, 16, 1024, 2048), 2),
    "cityscapes-b1-unet-16, Cg 4": ((1, 16, 1024, 2048), 4),
    "cityscapes-b1-unet-16, Cg 8": ((1, 16, 1024, 2048), 8),
    "cityscapes-b8-fpn-128, Cg 4": ((8, 128, 256, 512), 4),
    "ade20k-b8-deeplabv3plus-256, Cg 8": ((8, 256, 128, 128), 8),
    "ade20k-b8-unet-32, Cg 1": ((8, 32, 512, 512), 1),
}
# Tensors of the size of x, and maps of the groups, that the programs of a phase load and store.
LOADS = {
    "means": ("x",),
    "moments": ("x",),
    "output": ("x",),
    "logit": ("x", "dy"),
    "products": ("x", "dy"),
    "input": ("x", "dy", "dlogits", "weights"),
}
STORES = {"output": ("y",), "logit": ("dlogits", "weights"), "products": ("dlogits", "weights"), "input": ("dx",)}
RESULTS = ("y", "dx")  # which the plan may keep out of the cache
MAPS = ("dlogits", "weights")
# Sums of rows and columns that a region has in float32: stored by these phases, loaded by the next one.
SUMS = {"means": 1, "products": 3}


class Cache:
    """Write-back cache that counts the bytes it fetches and writes back."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._held: OrderedDict[object, tuple[int, bool]] = OrderedDict()  # size in bytes; whether it was written
        self._used = 0
        self.moved = 0

    def touch(self, key: object, size: int, stored: bool = False) -> None:
        """Load or store something of ``size`` bytes."""
        held = self._held.pop(key, None)
        if held is None:
            self._used += size
            self.moved += 0 if stored else size
        self._held[key] = size, stored or (held is not None and held[1])
        while self._used > self._size:
            _, (evicted, written) = self._held.popitem(last=False)
            self._used -= evicted
            self.moved += evicted if written else 0

    def empty(self) -> None:
        """Write back what has been stored."""
        self.moved += sum(size for size, written in self._held.values() if written)
        self._held.clear()
        self._used = 0


def passes(
    shape: tuple[int, int, int, int],
    width: int,
    dtype: torch.dtype,
    last: bool,
    *,
    processors: int = PROCESSORS,
    cache_size: int = CACHE,
) -> tuple[float, float]:
    """Return the passes over x of a forward, and of forward and backward, for groups of ``width`` channels."""
    before, triton_plan._device = triton_plan._device, lambda device: (processors, cache_size)
    try:
        options = {"last": last, "taps_last": last, "groups": shape[1] // width, "dynamic": False, "eps": 1e-5}
        cache = Cache(cache_size)
        counts = []
        for backward in (False, True):
            work = triton_plan.plan_work(shape, dtype, torch.device("cpu"), backward=backward, **options)
            kernel = triton_launch._backward_kernels if backward else triton_launch._forward_kernel
            launches = inspect.unwrap(kernel)(shape, dtype, torch.device("cpu"), **options)[0].launches
            for launch in launches:
                phase, first = launch.constants["PHASE"], launch.numbers[3]
                for program in programs(phase, launch.grid, work.plan):
                    run(cache, phase, first, program, shape, dtype, work)
            cache.empty()
            counts.append(cache.moved / (torch.Size(shape).numel() * dtype.itemsize))
    finally:
        triton_plan._device = before
    return counts[0], counts[1]


def programs(phase: str, grid: Sequence[int], plan: Plan) -> Iterator[tuple[int, int, int]]:
    """Return the (block, region, chunk of channels) of a launch's programs in their order, as ``_block`` and others."""
    blocks, regions, chunks = (*grid, 1, 1)[:3]
    reverse = phase == "moments" or phase == ("products" if plan.tile_channels < plan.width else "input")
    for chunk, region, block in itertools.product(range(chunks), range(regions), range(blocks)):
        yield (blocks - 1 - block, regions - 1 - region, chunk) if reverse else (block, region, chunk)


def run(
    cache: Cache,
    phase: str,
    first: int,
    program: tuple[int, int, int],
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    work: Work,
) -> None:
    """Load and store in the cache what a program does, as the kernels' functions of the same names."""
    plan, (block, region, chunk) = work.plan, program
    _, _, height, width = shape
    channels = plan.tile_groups * min(plan.tile_channels, plan.width)
    chunks = ceil_div(plan.width, plan.tile_channels)
    sums = {"gates": "means", "small": "products"}.get(phase)
    if sums is not None and work.parts * work.spans > 1:  # the program of a group loads what the regions have summed
        group = first + block
        per_image = ceil_div(plan.groups, plan.tile_groups)
        of_group = group // plan.groups * per_image + group % plan.groups // plan.tile_groups
        for place in range(work.parts * work.spans):
            for part_of_channels in range(chunks):
                cache.touch((sums, of_group, place, part_of_channels), _bytes_of_sums(sums, shape, channels, work))
    if phase not in LOADS:
        return
    part, span = divmod(region, work.spans)
    rows, columns = ceil_div(height, work.parts), ceil_div(ceil_div(width, plan.tile_columns), work.spans)
    columns = min(columns * plan.tile_columns, width - span * columns * plan.tile_columns)
    of_phase = (chunk,) if phase in ("means", "moments", "products") else tuple(range(chunks))
    for row in range(part * rows, min((part + 1) * rows, height), ROWS):
        pixels = min(ROWS, min((part + 1) * rows, height) - row) * columns
        for stored, names in ((False, LOADS[phase]), (True, STORES.get(phase, ()))):
            for name in names:
                if name in MAPS:
                    maps = plan.stores_weights or name != "weights"
                    size = plan.tile_groups * pixels * map_dtype(dtype).itemsize
                    if maps and not (phase == "products" and chunks > 1 and stored):
                        cache.touch((name, block, region, row), size, stored)  # a wave takes the place of the last one
                    continue
                for part_of_channels in of_phase:
                    size = channels * pixels * dtype.itemsize
                    if name in RESULTS and plan.store == ".cs":
                        cache.moved += size
                    else:
                        cache.touch((name, first + block, region, row, part_of_channels), size, stored)
    if phase in SUMS and work.parts * work.spans > 1:
        cache.touch((phase, first + block, region, chunk), _bytes_of_sums(phase, shape, channels, work), stored=True)


def _bytes_of_sums(phase: str, shape: tuple[int, int, int, int], channels: int, work: Work) -> int:
    """Return the bytes of a region's sums along rows and columns."""
    return 4 * SUMS[phase] * channels * (shape[2] // work.parts + shape[3] // work.spans)


def main() -> None:
    parser = argparse.ArgumentParser(description="Bytes that EMA's Triton kernels move between memory and L2 cache.")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), metavar="NAME")
    options = parser.parse_args()
    rows = []
    for name, layout in itertools.product(options.shapes, LAYOUTS):
        shape, width = SHAPES[name]
        row = [name, layout]
        for dtype in ("bfloat16", "float32"):
            counted = passes(shape, width, DTYPES[dtype], layout == "channels_last")
            megabytes = torch.Size(shape).numel() * DTYPES[dtype].itemsize / 1e6
            row += [f"{megabytes:.0f}", *(f"{value:.1f}" for value in counted)]
        rows.append(row)
    header = ["shape", "layout"]
    header += [f"{dtype}: {name}" for dtype in ("bf16", "fp32") for name in ("MB of x", "forward", "both")]
    print(markdown_table(header, rows, text_columns=2))


if __name__ == "__main__":
    main()
