"""Benchmark of the implementations of the EMA block: time and memory.

    python benchmarks/bench_ema.py                  # some shapes, in about ten minutes
    python benchmarks/bench_ema.py --shapes all     # all shapes of three decoders on two data sets

For each shape, dtype and memory layout, the published form ("reference") and its rivals, eager and compiled, are timed
in turns in one process: the forward (in inference mode), and the forward and backward (gradients of the input and of
all parameters, which have the dtype of the input). A copy of the input is timed in the same rounds. A forward at least
reads x and writes y, like a copy; a backward reads x and dy and writes dx. So the floor is one copy, and two and a half
with the backward. "triton-replayed" replays CUDA graphs of the calls: what the GPU takes when it never waits for the
host. Nothing is estimated; if an implementation cannot run, the tables give the reason.
"""

import ctypes
import gc
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from measuring import (
    LAYOUTS,
    Parser,
    Spread,
    describe_run,
    markdown_table,
    missing_device,
    number,
    number_of_sets,
    ratio,
    reason,
    run_as_markdown,
    saved_bytes,
    time_in_turns,
    write_result,
)
from torch import Tensor

from ema_seg.attention import EMA
from ema_seg.models import build_segmenter
from ema_seg.runtime.errors import ModelError, did_you_mean
from ema_seg.runtime.host_memory import keep_freed_memory

SCHEMA = 1
NAME = "bench_ema"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
IMPLEMENTATIONS = (
    "reference",
    "reference-compiled",
    "factorised",
    "factorised-compiled",
    "cpp",
    "triton",
    "triton-replayed",
)
PASSES = {"forward": "Forward", "training": "Forward and backward"}
FLOOR_IN_COPIES = {"forward": 1.0, "training": 2.5}
MIN_ROUNDS = 5
WARMUP = 1
# Largest deviation from the reference of the same dtype, relative to the reference's largest value. In float32, too, it
# allows for rounding: cuDNN's convolutions use TF32 by default.
TOLERANCE = {"float32": 1e-2, "bfloat16": 5e-2, "float16": 1e-2}

RIVALS = ("reference", "reference-compiled")
# Quantities of an implementation ("it"); larger is better for the first two, smaller for the others.
QUANTITIES = {
    "reference": "reference / it",
    "reference-compiled": "reference compiled / it",
    "floor": "it / floor",
    "saved": "saved / x",
}
LARGER_IS_BETTER = RIVALS

PEAK_METHODS = {
    "cuda": "growth of torch.cuda.max_memory_allocated",
    "cpu": "growth of the process's peak resident set, on Linux with glibc and for x of 1 MiB or more",
}
SMALLEST_FOR_RESIDENT = 2**20  # bytes of x; the process's other allocations would hide a smaller one

# Okabe and Ito's palette, distinguishable with every kind of colour vision; and a marker each.
STYLES = {
    "reference": ("#000000", "o"),
    "reference-compiled": ("#E69F00", "s"),
    "factorised": ("#56B4E9", "^"),
    "factorised-compiled": ("#0072B2", "v"),
    "cpp": ("#009E73", "D"),
    "triton": ("#D55E00", "P"),
    "triton-replayed": ("#CC79A7", "X"),
}


@dataclass(frozen=True)
class Aim:
    """Bound that the geometric mean of a quantity over the decoders' shapes should reach."""

    device: str
    dtype: str
    implementation: str
    which: str  # key of PASSES
    quantity: str  # key of QUANTITIES
    bound: float
    bound_of_worst: float | None = None  # bound at every single input

    def __str__(self) -> str:
        relation = "≥" if self.quantity in LARGER_IS_BETTER else "≤"
        each = "" if self.bound_of_worst is None else f", each {relation} {self.bound_of_worst:g}"
        return f"{relation} {self.bound:g}{each}"

    def is_met(self, mean: float, worst: float) -> bool:
        """Return whether these values reach the aim."""
        sign = 1 if self.quantity in LARGER_IS_BETTER else -1
        each = self.bound_of_worst is None or sign * worst >= sign * self.bound_of_worst
        return sign * mean >= sign * self.bound and each


AIMS = (
    *(
        Aim("cpu", "float32", implementation, which, quantity, bound)
        for implementation in ("factorised-compiled", "cpp")  # one of the two must reach each bound
        for which, quantity, bound in (
            ("forward", "reference", 4.0),
            ("forward", "reference-compiled", 2.0),
            ("training", "reference", 2.5),
            ("training", "reference-compiled", 1.5),
        )
    ),
    *(Aim("cpu", "float32", "factorised", which, "reference", 1.5, bound_of_worst=1.0) for which in PASSES),
    *(
        Aim("cuda", dtype, "triton", which, quantity, bound)
        for dtype in ("float32", "bfloat16")
        for which, quantity, bound in (
            ("forward", "floor", 1.5),
            ("forward", "reference", 8.0),
            ("forward", "reference-compiled", 3.0),
            ("training", "floor", 2.0),
            ("training", "reference", 8.0),
            ("training", "reference-compiled", 3.0),
            ("training", "saved", 1.05),
        )
    ),
)


@dataclass(frozen=True)
class Shape:
    """Input (batch, channels, height, width) and its number of channel groups."""

    name: str
    batch: int
    channels: int
    height: int
    width: int
    groups: int
    kind: str = "decoder"  # or "awkward", which the aims exclude

    @property
    def size(self) -> tuple[int, int, int, int]:
        """Size of the input tensor: batch, channels, height, width."""
        return self.batch, self.channels, self.height, self.width


IMAGES = {
    "cityscapes-b1": (1, 3, 1024, 2048),
    "ade20k-b1": (1, 3, 512, 512),
    "ade20k-b8": (8, 3, 512, 512),
}
AWKWARD_SHAPES = (
    Shape("group-of-1", 1, 64, 128, 128, 64, "awkward"),
    Shape("group-of-64", 2, 256, 64, 64, 4, "awkward"),
    Shape("tiny", 2, 64, 7, 5, 32, "awkward"),
    Shape("one-pixel", 8, 64, 1, 1, 32, "awkward"),
)
# "cpu" and "cuda" are the default sets of these devices: groups of 8 channels (tiny: 2), on maps of many sizes.
SETS = {
    "quick": ("ade20k-b1-unet-64", "tiny"),
    "cpu": (
        "cityscapes-b1-unet-128",
        "cityscapes-b1-fpn-128",
        "ade20k-b1-unet-64",
        "ade20k-b1-unet-16",
        "ade20k-b1-deeplabv3plus-256",
        "tiny",
    ),
    "cuda": (
        "cityscapes-b1-unet-16",
        "cityscapes-b1-fpn-128",
        "ade20k-b8-unet-256",
        "ade20k-b8-unet-32",
        "ade20k-b8-deeplabv3plus-256",
        "tiny",
    ),
}


def decoder_shapes() -> list[Shape]:
    """Return the input shapes of EMA, with factor ``"auto"``, in three decoders on a ResNet-50, for ``IMAGES``.

    Names give data set, batch size, decoder and channels. The four blocks of the FPN all have the same input shape,
    which is listed once.
    """
    shapes: dict[str, Shape] = {}
    seen: list[tuple[int, torch.Size]] = []
    options = {"factor": "auto", "implementation": "reference"}
    for decoder in ("unet", "fpn", "deeplabv3plus"):
        with torch.device("meta"):  # shapes without data
            model = build_segmenter(
                decoder, classes=19, encoder="resnet50", attention="ema", attention_options=options
            ).eval()
        for module in model.modules():
            if isinstance(module, EMA):
                module.register_forward_pre_hook(lambda block, inputs: seen.append((block.groups, inputs[0].shape)))
        for data, size in IMAGES.items():
            seen.clear()
            with torch.no_grad():
                model(torch.empty(size, device="meta"))
            for groups, (batch, channels, height, width) in seen:
                name = f"{data}-{decoder}-{channels}"
                shapes[name] = Shape(name, batch, channels, height, width, groups)
    return list(shapes.values())


@dataclass(frozen=True)
class InputSet:
    """Tensors that one call reads and writes: four of one size, dtype and layout; the first two share memory."""

    x: Tensor
    leaf: Tensor  # x, requiring a gradient
    dy: Tensor
    copy: Tensor

    @classmethod
    def random(cls, shape: Shape, dtype: str, layout: str, device: torch.device) -> "InputSet":
        """Draw the tensors from the global generator."""
        x, dy, copy = (
            torch.randn(shape.size, device=device).to(DTYPES[dtype]).contiguous(memory_format=LAYOUTS[layout])
            for _ in range(3)
        )
        return cls(x, x.detach().requires_grad_(), dy, copy)


class Candidate:
    """Implementation of EMA, with a method for each pass."""

    def __init__(self, implementation: str, shape: Shape, dtype: str, inputs: Sequence[InputSet]) -> None:
        form, _, way = implementation.partition("-")
        module = EMA(shape.channels, factor=shape.groups, implementation=form)
        generator = torch.Generator().manual_seed(0)  # the same parameters for all, none of them zero
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
        module.to(inputs[0].x.device, DTYPES[dtype])
        # fullgraph: a graph break is reported, not measured.
        self.function: Callable[[Tensor], Tensor] = (
            torch.compile(module, dynamic=False, fullgraph=True) if way == "compiled" else module
        )
        self.parameters = list(module.parameters())
        self.inputs = inputs
        self._graphs: dict[Callable[[InputSet], Tensor], list[tuple[torch.cuda.CUDAGraph, Tensor]]] = {}
        self._replays = way == "replayed"

    def forward(self, index: int) -> Tensor:
        """Compute the output for one of the input sets."""
        return self._call(self._forward, index)

    def training(self, index: int) -> Tensor:
        """Compute the gradients of one of the input sets and of the parameters; return the former."""
        return self._call(self._training, index)

    def _forward(self, inputs: InputSet) -> Tensor:
        with torch.inference_mode():
            return self.function(inputs.x)

    def _training(self, inputs: InputSet) -> Tensor:
        return torch.autograd.grad(self.function(inputs.leaf), [inputs.leaf, *self.parameters], inputs.dy)[0]

    def _call(self, compute: Callable[[InputSet], Tensor], index: int) -> Tensor:
        if not self._replays:
            return compute(self.inputs[index % len(self.inputs)])
        if compute not in self._graphs:
            self._graphs[compute] = [_capture(partial(compute, inputs)) for inputs in self.inputs]
        graph, result = self._graphs[compute][index % len(self.inputs)]
        graph.replay()
        return result

    def saved_bytes(self) -> int:
        """Return the bytes that a forward saves for its backward: each storage once, without the parameters."""
        return saved_bytes(self.function, self.inputs[0].leaf, self.parameters)


def _capture(call: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """Capture a call in a CUDA graph; return the graph and the result that a replay computes again.

    Raises:
        ModelError: there is no CUDA device.
    """
    if not torch.cuda.is_available():
        raise ModelError("CUDA graphs need a CUDA device")
    call()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph, result


def measure(
    shape: Shape, dtype: str, layout: str, device: torch.device, implementations: Sequence[str], budget: float
) -> dict[str, Any]:
    """Measure implementations on inputs of one shape, dtype and layout.

    Returns:
        A dict of plain values: ``shape``, ``dtype``, ``layout``; ``bytes_of_x`` and the number of ``input_sets``;
        ``floor``, seconds by pass; and ``rows``, by implementation and pass. A row holds ``not_run``, the reason; or
        the seconds of the ``first_call``, in which it is compiled; the ``deviation`` from the reference, relative to
        its largest value; ``seconds``; ``reference``, ``reference-compiled`` and ``floor`` as in ``QUANTITIES``;
        and for training the bytes ``saved`` for the backward, and ``peak``, the peak bytes beyond x, dy and the
        parameters (None where it cannot be measured). Times and ratios are spreads.
    """
    missing = missing_device(device)
    if missing:
        return _not_measured(shape, dtype, layout, implementations, missing)
    torch.compiler.reset()  # compile each shape from scratch
    torch.manual_seed(0)
    inputs = [InputSet.random(shape, dtype, layout, device)]
    count = number_of_sets(inputs[0].x.nbytes, device)
    inputs += [InputSet.random(shape, dtype, layout, device) for _ in range(count - 1)]
    original = Candidate("reference", shape, dtype, inputs)
    candidates = {name: Candidate(name, shape, dtype, inputs) for name in implementations}

    rows: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in implementations}
    floors = {}
    for which in PASSES:
        expected = getattr(original, which)(0)
        calls: dict[str, Callable[[int], object]] = {"copy": lambda index: _copy(inputs[index % count])}
        for name, candidate in candidates.items():
            call = getattr(candidate, which)
            try:
                rows[name][which] = _warm_up(call, expected, TOLERANCE[dtype])
            except Exception as error:  # a compiler or kernel may raise anything; the table shows it
                rows[name][which] = {"not_run": reason(error)}
            else:
                calls[name] = call
        del expected
        samples = time_in_turns(calls, device, budget=budget, min_rounds=MIN_ROUNDS)
        floor = [FLOOR_IN_COPIES[which] * seconds for seconds in samples.pop("copy")]
        floors[which] = Spread.of(floor).as_json()
        for name, seconds in samples.items():
            row = rows[name][which]
            row |= {"seconds": Spread.of(seconds).as_json(), "floor": ratio(seconds, floor).as_json()}
            row |= {rival: ratio(samples[rival], seconds).as_json() for rival in RIVALS if rival in samples}
    for name, candidate in candidates.items():
        if "seconds" in rows[name]["training"]:
            rows[name]["training"] |= {
                "saved": candidate.saved_bytes(),
                "peak": _peak_bytes(partial(candidate.training, 0), inputs[0].x.nbytes, device),
            }
    return {
        "shape": asdict(shape),
        "dtype": dtype,
        "layout": layout,
        "bytes_of_x": inputs[0].x.nbytes,
        "input_sets": count,
        "floor": floors,
        "rows": rows,
    }


def _not_measured(shape: Shape, dtype: str, layout: str, implementations: Sequence[str], why: str) -> dict[str, Any]:
    rows = {name: {which: {"not_run": why} for which in PASSES} for name in implementations}
    return {"shape": asdict(shape), "dtype": dtype, "layout": layout, "rows": rows}


def _copy(inputs: InputSet) -> None:
    inputs.copy.copy_(inputs.x)


def _warm_up(call: Callable[[int], Tensor], expected: Tensor, tolerance: float) -> dict[str, float]:
    """Compile and warm up, and compare the first result with the reference.

    Raises:
        ModelError: the result differs from the reference by more than rounding, so that its speed means nothing.
    """
    start = time.perf_counter()
    result = call(0)
    if result.shape != expected.shape or result.dtype != expected.dtype:
        raise ModelError(f"the result is {tuple(result.shape)} in {result.dtype}")
    deviation = ((result.float() - expected.float()).abs().max() / expected.float().abs().max()).item()
    first_call = time.perf_counter() - start  # .item() has synchronised the device
    if not deviation <= tolerance:
        raise ModelError(f"the result deviates from the reference by {deviation:.2g} times its largest value")
    for index in range(WARMUP):
        call(index)
    return {"first_call": first_call, "deviation": deviation}


def _peak_bytes(call: Callable[[], object], nbytes: int, device: torch.device) -> int | None:
    """Return the peak bytes of a call on ``nbytes`` beyond those held before; None if it cannot be measured."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    if nbytes < SMALLEST_FOR_RESIDENT:
        return None
    try:
        return _resident_growth(call)
    except (AttributeError, OSError):  # not glibc, or not Linux
        return None


def _resident_growth(call: Callable[[], object]) -> int:
    ctypes.CDLL(None).malloc_trim(0)  # freed memory still held would hide the call's allocations
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _resident("VmRSS")
    call()
    return max(0, _resident("VmHWM") - before)


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def quantities(result: dict[str, Any], name: str, which: str) -> dict[str, float]:
    """Return the measured ``QUANTITIES``, with medians for ratios."""
    row = result["rows"][name][which]
    values = {quantity: row[quantity]["median"] for quantity in (*RIVALS, "floor") if quantity in row}
    if "saved" in row:
        values["saved"] = row["saved"] / result["bytes_of_x"]
    return values


def average(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return geometric means over shapes and layouts, and the worst value, by kind, dtype, pass, implementation."""
    members: dict[tuple[str, str, str, str], list[dict[str, float]]] = {}
    for result in results:
        for which, name in itertools.product(PASSES, result["rows"]):
            if values := quantities(result, name, which):
                key = (result["shape"]["kind"], result["dtype"], which, name)
                members.setdefault(key, []).append(values)

    def mean(quantity: str, values: list[float]) -> dict[str, float]:
        worst = min(values) if quantity in LARGER_IS_BETTER else max(values)
        return {"mean": statistics.geometric_mean(values), "worst": worst}

    return [
        {"kind": kind, "dtype": dtype, "pass": which, "implementation": name, "inputs": len(dicts)}
        | {
            quantity: mean(quantity, found)
            for quantity in QUANTITIES
            if (found := [values[quantity] for values in dicts if quantity in values])
        }
        for (kind, dtype, which, name), dicts in members.items()
    ]


def judge(means: Sequence[dict[str, Any]], device: torch.device) -> list[dict[str, Any]]:
    """Return the aims for a device with the values reached; ``reached`` and ``met`` are None if not measured."""
    judged = []
    for aim in AIMS:
        if aim.device == device.type:
            key = ("decoder", aim.dtype, aim.which, aim.implementation)
            found = [
                mean for mean in means if (mean["kind"], mean["dtype"], mean["pass"], mean["implementation"]) == key
            ]
            reached = found[0].get(aim.quantity) if found else None
            met = None if reached is None else aim.is_met(**reached)
            judged.append(asdict(aim) | {"text": str(aim), "reached": reached, "met": met})
    return judged


def as_markdown(record: dict[str, Any]) -> str:
    """Format the tables of a result."""
    parts = [
        "# EMA block: time and memory\n",
        run_as_markdown(record["run"]),
        "Time: median (quartiles) in ms; ratios: median over rounds of the ratio within a round. Floor: a copy of x, "
        "two and a half with the backward. Saved: bytes kept for the backward; peak: bytes held at most beyond x, dy "
        f"and parameters ({record['peak_method']}); both relative to the bytes of x.\n",
    ]
    settings = {(result["dtype"], result["layout"]): None for result in record["results"]}
    for (dtype, layout), which in itertools.product(settings, PASSES):
        chosen = [result for result in record["results"] if (result["dtype"], result["layout"]) == (dtype, layout)]
        parts += [f"## {PASSES[which]}, {dtype}, {layout}\n", _table_of_times(chosen, which)]
    parts += ["## Geometric means (worst)\n", _table_of_means(record["means"])]
    if record["aims"]:
        parts += ["## Aims, for the means over the shapes of decoders\n", _table_of_aims(record["aims"])]
    return "\n".join(parts)


def _table_of_times(results: Sequence[dict[str, Any]], which: str) -> str:
    memory = which == "training"
    header = [
        "shape",
        "size /groups",
        "implementation",
        "ms",
        "it / floor",
        "reference / it",
        "reference compiled / it",
    ]
    rows = []
    for result in results:
        size = "{batch}×{channels}×{height}×{width} /{groups}".format(**result["shape"])
        place = [result["shape"]["name"], size]
        empty = ["–"] * (5 if memory else 3)
        if "floor" in result:
            rows.append([*place, "floor", _spread(result["floor"][which], 1000), *empty])
        for name, passes in result["rows"].items():
            row = passes[which]
            if "not_run" in row:
                rows.append([*place, name, f"not run: {row['not_run']}", *empty])
                continue
            ratios = [number(row[key]["median"]) if key in row else "–" for key in ("floor", *RIVALS)]
            if memory:
                ratios += [
                    "–" if row[key] is None else number(row[key] / result["bytes_of_x"]) for key in ("saved", "peak")
                ]
            rows.append([*place, name, _spread(row["seconds"], 1000), *ratios])
    return markdown_table([*header, "saved / x", "peak / x"] if memory else header, rows, text_columns=3)


def _spread(spread: dict[str, float], factor: float) -> str:
    median, lower, upper = (number(factor * spread[key]) for key in ("median", "lower_quartile", "upper_quartile"))
    return f"{median} ({lower}–{upper})"


def _table_of_means(means: Sequence[dict[str, Any]]) -> str:
    rows = [
        [
            mean["kind"],
            mean["dtype"],
            PASSES[mean["pass"]],
            mean["implementation"],
            str(mean["inputs"]),
            *(_mean(mean.get(quantity)) for quantity in QUANTITIES),
        ]
        for mean in means
    ]
    header = ["shapes", "dtype", "pass", "implementation", "inputs", *QUANTITIES.values()]
    return markdown_table(header, rows, text_columns=4)


def _mean(mean: dict[str, float] | None) -> str:
    return "–" if mean is None else f"{number(mean['mean'])} ({number(mean['worst'])})"


def _table_of_aims(aims: Sequence[dict[str, Any]]) -> str:
    rows = [
        [
            aim["dtype"],
            PASSES[aim["which"]],
            aim["implementation"],
            QUANTITIES[aim["quantity"]],
            aim["text"],
            "not run" if aim["reached"] is None else _mean(aim["reached"]),
            {True: "met", False: "missed", None: "–"}[aim["met"]],
        ]
        for aim in aims
    ]
    header = ["dtype", "pass", "implementation", "quantity", "aim", "reached (worst)", "verdict"]
    return markdown_table(header, rows, text_columns=4)


def draw(results: Sequence[dict[str, Any]], dtype: str, title: str) -> Figure:
    """Draw time / floor: a row for each shape and layout, a panel for each pass."""
    chosen = [result for result in results if result["dtype"] == dtype and "floor" in result]
    measured = {
        name for result in chosen for name in result["rows"] for which in PASSES if quantities(result, name, which)
    }
    names = [name for name in STYLES if name in measured]
    figure = Figure(figsize=(12, 2.0 + 0.62 * len(chosen)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(PASSES), sharey=True)
    for axes, which in zip(panels, PASSES, strict=True):
        for place in range(0, len(chosen), 2):
            axes.axhspan(place - 0.5, place + 0.5, color="0.95", zorder=0)
        axes.axvline(1, color="0.5", linewidth=1, zorder=1)
        for order, name in enumerate(names):
            colour, marker = STYLES[name]
            # Each implementation has its own line within a row, so that equal times stay apart.
            shift = 0.8 * ((order + 0.5) / len(names) - 0.5)
            found = [
                (place + shift, result["rows"][name][which]["floor"])
                for place, result in enumerate(chosen)
                if "floor" in result["rows"][name][which]
            ]
            if found:
                places, spreads = zip(*found, strict=True)
                axes.hlines(
                    places,
                    [spread["lower_quartile"] for spread in spreads],
                    [spread["upper_quartile"] for spread in spreads],
                    color=colour,
                    linewidth=1.2,
                    zorder=2,
                )
                medians = [spread["median"] for spread in spreads]
                axes.plot(medians, places, marker, color=colour, markersize=5, label=name.replace("-", ", "), zorder=3)
        axes.set_xscale("log")
        low, high = axes.get_xlim()
        axes.set_xlim(min(low, 0.8), max(high, 12))
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 500 else (1,)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(axis="x", color="0.85", linewidth=0.6, zorder=0)
        axes.set_xlabel("time / floor")
        axes.set_title(PASSES[which], fontsize=11)
        axes.spines[["top", "right"]].set_visible(False)
    labels = [
        "{name}\n{batch}×{channels}×{height}×{width} /{groups}, ".format(**result["shape"]) + result["layout"]
        for result in chosen
    ]
    panels[0].set_yticks(range(len(chosen)), labels, fontsize=8)
    panels[0].set_ylim(len(chosen) - 0.5, -0.5)
    handles = {
        label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=len(names), frameon=False)
    figure.suptitle(title, fontsize=12)
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser("Time and memory of the implementations of the EMA block.", NAME, budget=0.3)
    parser.add_argument(
        "--dtypes",
        nargs="+",
        choices=DTYPES,
        metavar="DTYPE",
        help=f"{_list(DTYPES)}; default: float32, on CUDA bfloat16 too",
    )
    parser.add_argument(
        "--shapes",
        nargs="+",
        metavar="NAME",
        help=f"{_list(SETS)}, all, or names of shapes (a wrong one lists them); default: the device's set",
    )
    parser.add_argument(
        "--implementations",
        nargs="+",
        choices=IMPLEMENTATIONS,
        default=list(IMPLEMENTATIONS),
        metavar="NAME",
        help=f"{_list(IMPLEMENTATIONS)}; default: all",
    )
    options = parser.options(arguments)
    device = options.device
    shapes = _chosen_shapes(parser, options.shapes or [device.type])
    dtypes = options.dtypes or (["float32", "bfloat16"] if device.type == "cuda" else ["float32"])

    record: dict[str, Any] = {
        "schema": SCHEMA,
        "run": describe_run(device),
        "floor_in_copies": FLOOR_IN_COPIES,
        "peak_method": PEAK_METHODS[device.type],
        "results": [],
    }
    plan = list(itertools.product(dtypes, options.layouts, shapes))
    for place, (dtype, layout, shape) in enumerate(plan, start=1):
        start = time.perf_counter()
        try:
            result = measure(shape, dtype, layout, device, options.implementations, options.budget)
        except Exception as error:  # such as out of memory: the other shapes may still fit
            result = _not_measured(shape, dtype, layout, options.implementations, reason(error))
        record["results"].append(result)
        record["means"] = average(record["results"])
        record["aims"] = judge(record["means"], device)
        # Write after every shape, so that an interrupted run keeps its results.
        write_result(options.output, NAME, record, as_markdown(record))
        seconds = time.perf_counter() - start
        print(f"{place}/{len(plan)} {shape.name}, {dtype}, {layout}: {seconds:.0f} s", file=sys.stderr, flush=True)
    print(as_markdown(record))
    for dtype in dtypes:
        if any("floor" in result for result in record["results"] if result["dtype"] == dtype):
            title = f"EMA block, {dtype}, {record['run']['device']['name']}, torch {torch.__version__}"
            draw(record["results"], dtype, title).savefig(options.output / f"{NAME}_{dtype}.png", dpi=150)
    print(f"Written to {options.output}.")


def _list(names: Iterable[str]) -> str:
    return ", ".join(names)


def _chosen_shapes(parser: Parser, names: Sequence[str]) -> list[Shape]:
    known = {shape.name: shape for shape in (*decoder_shapes(), *AWKWARD_SHAPES)}
    sets = SETS | {"all": tuple(known)}
    chosen = dict.fromkeys(itertools.chain.from_iterable(sets.get(name, (name,)) for name in names))
    for name in chosen:
        if name not in known:
            hint = did_you_mean(name, (*known, *sets))
            parser.error(f"--shapes: there is no {name!r}; choose among {_list(sets)}, or {_list(known)}.{hint}")
    return [known[name] for name in chosen]


if __name__ == "__main__":
    keep_freed_memory()  # as train.py and eval.py do
    main()
