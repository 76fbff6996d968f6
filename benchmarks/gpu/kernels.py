"""EMA's Triton kernels against the published form in float64, as JSON.

Scratch memory and results are filled with NaN first, so that a kernel that reads what nothing has written is found.
Each case runs twice and must give the same bits.
"""

import argparse
import json
import multiprocessing
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ema_seg.attention import EMA, DynamicEMA
from ema_seg.runtime.execution import tf32
from ema_seg.runtime.files import write_file

# Largest relative deviation (Euclidean norms) of the output and of the input's gradient; ten times as much for those of
# the parameters, which are sums over all pixels.
LIMITS = {"float64": 1e-10, "float32": 2e-5, "float16": 2e-3, "bfloat16": 1e-2}
BLOCKS = {"EMA": EMA, "DynamicEMA": DynamicEMA}


class Case(NamedTuple):
    """An input and a block."""

    shape: tuple[int, int, int, int]
    groups: int
    dtype: str
    layout: str
    block: str = "EMA"


SHAPES = [
    ((2, 64, 7, 5), 32),
    ((8, 64, 1, 1), 32),
    ((2, 256, 32, 32), 32),
    ((3, 30, 65, 33), 6),
    ((2, 128, 64, 64), 32),
    ((2, 256, 64, 64), 4),
    ((8, 32, 256, 256), 32),
    ((1, 32, 256, 257), 32),
    ((1, 16, 512, 512), 16),
    ((1, 16, 1024, 2048), 16),
]


def cases(device: torch.device) -> list[Case]:
    """Return the cases: all shapes in two dtypes, some in all; a small one on a CPU, where Triton interprets."""
    shapes = [((2, 8, 7, 5), 2)] if device.type == "cpu" else SHAPES
    found = [
        Case(shape, groups, dtype, layout)
        for shape, groups in shapes
        for dtype, layout in (("bfloat16", "channels_last"), ("float32", "contiguous_format"))
    ]
    for shape, groups in shapes[:4]:
        found.append(Case(shape, groups, "float16", "channels_last"))
        found.append(Case(shape, groups, "float64", "contiguous_format"))
        found.append(Case(shape, groups, "float32", "channels_last", "DynamicEMA"))
    return found


def check(case: Case, device: torch.device) -> dict[str, Any]:
    """Compare forward and backward of a case; return the deviations, or the error."""
    torch.set_num_threads(1)
    row: dict[str, Any] = case._asdict()
    try:
        with tf32(False):
            row |= _compare(case, device)
    except Exception as error:
        return row | {"ok": False, "error": "".join(traceback.format_exception(error))[-1000:]}
    limit = LIMITS[case.dtype]
    row["ok"] = row["y"] <= limit and row["dx"] <= limit and row["parameters"] <= 10 * limit and row["repeats"]
    return row


def _compare(case: Case, device: torch.device) -> dict[str, Any]:
    torch.manual_seed(0)
    block = BLOCKS[case.block]
    ours = block(case.shape[1], factor=case.groups, implementation="triton").to(device)
    if case.dtype == "float64":
        ours.double()
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.copy_(0.5 * torch.randn_like(parameter))
    published = block(case.shape[1], factor=case.groups, implementation="reference").to(device).double()
    published.load_state_dict({name: value.double() for name, value in ours.state_dict().items()})
    x = torch.randn(case.shape, device=device).to(getattr(torch, case.dtype))
    x = x.contiguous(memory_format=getattr(torch, case.layout)).requires_grad_()
    dy = torch.randn_like(x)

    allocators = Tensor.new_empty, torch.empty_like

    def poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def filled(*arguments: Any, **options: Any) -> Tensor:
            tensor = allocate(*arguments, **options)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return filled

    def both() -> list[Tensor]:
        y = ours(x)
        return [y, *torch.autograd.grad(y, [x, *ours.parameters()], dy)]

    Tensor.new_empty, torch.empty_like = map(poisoned, allocators)
    try:
        first, again = both(), both()
    finally:
        Tensor.new_empty, torch.empty_like = allocators
    exact = x.detach().double().contiguous().requires_grad_()
    y = published(exact)
    expected = [y, *torch.autograd.grad(y, [exact, *published.parameters()], dy.double())]
    deviations = [
        ((own.double() - right).norm() / right.norm().clamp_min(1e-30)).item()
        for own, right in zip(first, expected, strict=True)
    ]
    repeats = all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    return {"y": deviations[0], "dx": deviations[1], "parameters": max(deviations[2:]), "repeats": repeats}


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare EMA's Triton kernels with the published form.")
    parser.add_argument("--device", default="cuda", help="default: %(default)s")
    parser.add_argument("--processes", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    options = parser.parse_args()
    device = torch.device(options.device)
    rows = []
    with ProcessPoolExecutor(options.processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        for row in pool.map(partial(check, device=device), cases(device)):
            rows.append(row)
            write_file(options.output, json.dumps(rows, indent=1).encode())  # whole even if the time is up
    failed = [row for row in rows if not row["ok"]]
    for row in failed:
        print(row)
    print(f"{len(rows) - len(failed)} of {len(rows)} agree")
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
