"""Time that the host takes for a call of EMA's Triton kernels, measured without a GPU.

    python benchmarks/bench_ema_host.py

A driver that is not there compiles the kernels for compute capability 9.0, and a launch does nothing: what is timed is
the way of a call in eager mode from the block to the driver. On small maps a GPU waits for it. The rival takes Triton's
own way from a kernel's call to its launch. Inputs are of a size whose phases are fused in one launch, and of one that
has a launch for each phase.
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # before Triton is imported

import torch
import triton
from measuring import (
    LAYOUTS,
    Parser,
    Spread,
    describe_run,
    markdown_table,
    ratio,
    run_as_markdown,
    time_in_turns,
    write_result,
)
from triton.backends.compiler import GPUTarget

from ema_seg.attention import EMA
from ema_seg.attention.ema import triton_launch, triton_plan
from ema_seg.runtime.host_memory import keep_freed_memory

NAME = "bench_ema_host"
PROCESSORS, CACHE = 132, 50 * 2**20  # of an H200
SHAPES = {"fused": ((8, 256, 16, 16), 32), "a launch per phase": ((1, 32, 256, 256), 4)}  # and groups
MIN_ROUNDS = 9


class StubDriver:
    """Driver of a device of compute capability 9.0 that accepts every binary and runs none."""

    def __init__(self) -> None:
        self.launches = 0
        self.utils = SimpleNamespace(
            load_binary=lambda *_: (1, 1, 32, 0, 1024),
            unload_module=lambda *_: None,
            get_device_properties=lambda _: {"max_shared_mem": 232448},
        )

    def get_current_target(self) -> GPUTarget:
        """Return the device's target."""
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        """Return the number of the only device."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """Return the default stream."""
        return 0

    def launcher_cls(self, source: object, metadata: object) -> Callable[..., None]:
        """Return the function that launches a kernel."""
        return self._launch

    def _launch(self, *_: object) -> None:
        self.launches += 1


@contextlib.contextmanager
def stub_gpu() -> Iterator[StubDriver]:
    """Take CPU tensors for those of a GPU; yield the driver."""
    driver = StubDriver()
    before = triton_plan._device, triton_launch.unavailable
    triton.runtime.driver.set_active(driver)
    triton_plan._device, triton_launch.unavailable = lambda device: (PROCESSORS, CACHE), lambda x: None
    try:
        yield driver
    finally:
        triton_plan._device, triton_launch.unavailable = before


class Block:
    """EMA block with its input, for calls one after the other."""

    def __init__(self, shape: tuple[int, int, int, int], groups: int, layout: str, direct: bool) -> None:
        memory_format = LAYOUTS[layout]
        self._block = EMA(shape[1], factor=groups, implementation="triton").to(memory_format=memory_format)
        x = torch.zeros(shape, dtype=torch.bfloat16).contiguous(memory_format=memory_format)
        self._x, self._leaf, self._dy = x, x.clone().requires_grad_(), torch.ones_like(x)
        self._inputs = [self._leaf, *self._block.parameters()]
        self._direct = direct

    def forward(self, _: int) -> None:
        """Compute the output."""
        with self._way(), torch.inference_mode():
            self._block(self._x)

    def training(self, _: int) -> None:
        """Compute the output and all gradients."""
        with self._way():
            torch.autograd.grad(self._block(self._leaf), self._inputs, self._dy)

    def _way(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self._direct else _tritons_own_way()


@contextlib.contextmanager
def _tritons_own_way() -> Iterator[None]:
    before, triton_launch._ALIGNMENT = triton_launch._ALIGNMENT, 2**62  # no address is a multiple of it
    try:
        yield
    finally:
        triton_launch._ALIGNMENT = before


def measure(layouts: Sequence[str], budget: float) -> list[dict[str, Any]]:
    """Measure each shape and layout; times are in seconds."""
    rows = []
    with stub_gpu() as driver:
        triton_launch.empty_kernel[(1,)]()
        for name, (shape, groups) in SHAPES.items():
            for layout in layouts:
                blocks = {way: Block(shape, groups, layout, way == "direct") for way in ("direct", "Triton")}
                for which in ("forward", "training"):
                    calls = {way: getattr(block, which) for way, block in blocks.items()}
                    for call in calls.values():
                        call(0)
                    before = driver.launches
                    calls["direct"](0)
                    launches = driver.launches - before
                    samples = time_in_turns(calls, torch.device("cpu"), budget=budget, min_rounds=MIN_ROUNDS)
                    rows.append(
                        {
                            "shape": shape,
                            "case": name,
                            "layout": layout,
                            "pass": which,
                            "launches": launches,
                            "seconds": {way: Spread.of(seconds).as_json() for way, seconds in samples.items()},
                            "ratio": ratio(samples["Triton"], samples["direct"]).as_json(),
                        }
                    )
    return rows


def as_markdown(record: dict[str, Any]) -> str:
    """Format the record as a table."""
    rows = [
        [
            f"{'×'.join(map(str, row['shape']))}, {row['case']}",
            row["layout"],
            {"forward": "forward", "training": "forward and backward"}[row["pass"]],
            str(row["launches"]),
            *(f"{1e6 * row['seconds'][way]['median']:.0f}" for way in ("direct", "Triton")),
            f"{row['ratio']['median']:.1f}",
        ]
        for row in record["rows"]
    ]
    header = ["input", "layout", "pass", "launches", "µs per call", "µs with Triton's own launch", "ratio"]
    return f"{run_as_markdown(record['run'])}\n{markdown_table(header, rows, text_columns=3)}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser("Time of the host for a call of EMA's Triton kernels, without a GPU.", NAME, budget=2)
    options = parser.options(arguments)
    torch.set_num_threads(1)
    record = {"run": describe_run(torch.device("cpu")), "rows": measure(options.layouts, options.budget)}
    write_result(Path(options.output), NAME, record, as_markdown(record))
    print(as_markdown(record))


if __name__ == "__main__":
    keep_freed_memory()
    main()
