"""Costs of a comparison measured again: all configurations on this machine, in turns, one forward pass each.

Speeds that were measured hours apart on a shared machine differ by more than a block costs. In turns, a disturbance
slows all configurations alike.
"""

import os
import random
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ema_seg.comparison.configurations import group_runs
from ema_seg.comparison.runs import Result, Run, Runs
from ema_seg.evaluation.cost import forward_entry, random_images
from ema_seg.evaluation.environment import describe_device
from ema_seg.evaluation.reference import Reference, time_call
from ema_seg.inference.loading import load_model
from ema_seg.inference.prediction import autocast, memory_format_of
from ema_seg.runtime.errors import DataError
from ema_seg.runtime.execution import set_execution
from ema_seg.runtime.limits import reraise_out_of_memory
from ema_seg.runtime.progress import track

__all__ = ["with_costs"]

_WARM_UP, _ROUNDS = 2, 15
_PAUSE = 0.1  # seconds; onnxruntime's threads spin for a while after their work


def with_costs(runs: Runs, *, rounds: int = _ROUNDS) -> Runs:
    """Measure the forward passes of each configuration's first finished run, in turns, for all of its runs.

    Images per second, latency and reference computation are new; parameters and GMACs stay those of the reports, and so
    does the memory if it was measured on such a device.

    Args:
        runs: the runs.
        rounds: number of timed passes of each configuration.

    Raises:
        EmaSegError: a checkpoint cannot be loaded, or its images do not fit into memory.
    """
    groups = [
        [run for run in configuration.runs if run.result is not None] for configuration in group_runs(runs.runs)[1]
    ]
    groups = [group for group in groups if group]
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load > 0.5 * (os.cpu_count() or 1):
        print(f"warning: other processes use this machine (load average {load:.1f}); end them first.", file=sys.stderr)
    inputs: dict[object, Tensor] = {}
    timed = [_prepare(group[0], inputs) for group in groups]
    device = timed[0].device
    reference = Reference(device)
    seconds: list[list[float]] = [[] for _ in timed]
    references: list[list[float]] = [[] for _ in timed]
    order, shuffle = list(range(len(timed))), random.Random(0).shuffle
    for model in timed:
        for _ in range(_WARM_UP):
            model.forward()
    for _ in track(range(rounds), "Measuring in turns", shown=True):
        shuffle(order)
        for place in order:
            time.sleep(_PAUSE)
            reference.time()
            references[place].append(reference.seconds[-1])
            seconds[place].append(time_call(timed[place].forward, device))
    measured = {
        id(run): _with_forward(run, timed[place], seconds[place], references[place])
        for place, group in enumerate(groups)
        for run in group
    }
    machine = f"{describe_device(device)['name']} with {torch.get_num_threads()} CPU threads"
    note = (
        f"Images/s and latency were measured again for this comparison: {rounds} forward passes of each configuration, "
        f"in turns, on {machine}; load average before {load:.1f}."
    )
    return replace(runs, runs=[measured.get(id(run), run) for run in runs.runs], notes=[*runs.notes, note])


class _Timed(NamedTuple):
    """Forward pass of a configuration, its device and the size of its batch."""

    forward: Callable[[], Any]
    device: torch.device
    batch_size: int


def _prepare(run: Run, inputs: dict[object, Tensor]) -> _Timed:
    """Load a run's model; ``inputs`` holds the images of all models, which share those of equal size and layout."""
    assert run.result is not None
    throughput = run.result.report["throughput"]
    loaded = load_model(_checkpoint(run.result), "auto", "device")
    set_execution(
        loaded.model,
        channels_last=throughput["memory_format"] == "channels_last",
        compile=bool(throughput.get("compiled")) and not loaded.exported,
    )
    batch_size = throughput["forward"][-1]["batch_size"]
    key = (batch_size, *throughput["size"], loaded.stride, memory_format_of(loaded.model))
    if key not in inputs:
        size = tuple(throughput["size"])
        inputs[key] = random_images(loaded.model, batch_size, size, loaded.stride, loaded.device)
    images = inputs[key]
    precision = "32-true" if loaded.exported else throughput["precision"]

    def forward() -> None:
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode())
            stack.enter_context(autocast(loaded.device, precision))
            stack.enter_context(reraise_out_of_memory(images, f"compare without {run.folder}"))
            loaded.model(images)

    return _Timed(forward, loaded.device, batch_size)


def _checkpoint(result: Result) -> Path:
    """Return the checkpoint that a report names, or the file of that name in the run's folder."""
    named = Path(str(result.report.get("checkpoint")))
    folder = result.path.parents[1]
    for path in (folder / "checkpoints" / named.name, folder / named.name, named):
        if path.is_file():
            return path
    raise DataError(
        f"{result.path}: its checkpoint {named} is missing, which remeasure=true needs; restore it, or compare without."
    )


def _with_forward(run: Run, timed: _Timed, seconds: list[float], references: list[float]) -> Run:
    assert run.result is not None
    report = run.result.report
    device = describe_device(timed.device)["name"]
    same = device == report["throughput"]["device"]
    memory = report["throughput"]["forward"][-1]["peak_memory"] if same else None  # not that of another device
    entry = forward_entry(timed.batch_size, seconds, _WARM_UP, memory, references)
    throughput = {**report["throughput"], "device": device, "forward": [entry]}
    environment = {**report["environment"], "threads": torch.get_num_threads()}
    job = report["job"] and {key: value for key, value in report["job"].items() if key != "launcher"}
    changed = {**report, "throughput": throughput, "environment": environment, "job": job}
    return replace(run, result=replace(run.result, report=changed))
