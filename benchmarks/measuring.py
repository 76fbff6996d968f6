"""Shared parts of the benchmarks: timing in turns, description of the machine, command line, result files.

Machines drift: the same code may take a third longer a minute later. So rivals are timed in turns, in rounds of one
sample each, and a ratio is the median over the rounds of the ratio within a round.
"""

import argparse
import itertools
import json
import math
import os
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ema_seg.attention.ema.choice import ENVIRONMENT_VARIABLE
from ema_seg.evaluation.cost import LiveBytes
from ema_seg.evaluation.environment import describe_device, describe_environment
from ema_seg.runtime.errors import EmaSegError, one_line

__all__ = [
    "LAYOUTS",
    "Parser",
    "Spread",
    "describe_run",
    "markdown_table",
    "missing_device",
    "number",
    "number_of_sets",
    "peak_bytes",
    "positive_float",
    "positive_int",
    "ratio",
    "reason",
    "run_as_markdown",
    "saved_bytes",
    "time_in_turns",
    "write_result",
]

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}

# A sample repeats shorter calls, so that neither the clock's resolution nor the first kernel's launch on an idle device
# dominates.
_SECONDS_OF_A_SAMPLE = 5e-3
_MOST_CALLS_OF_A_SAMPLE = 1000
_FEWEST_SETS, _MOST_SETS = 3, 64
_LONGEST_REASON = 200
_DISTORTING_VARIABLES = {
    ENVIRONMENT_VARIABLE: "makes all implementations the same one",
    "TRITON_INTERPRET": "runs Triton's kernels as Python",
}


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of some samples."""

    median: float
    lower_quartile: float
    upper_quartile: float
    samples: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> "Spread":
        """Summarise the samples."""
        lower, median, upper = np.percentile(samples, [25, 50, 75]).tolist()
        return cls(median, lower, upper, len(samples))

    def as_json(self) -> dict[str, float]:
        """Return the fields by name."""
        return asdict(self)


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> Spread:
    """Summarise the ratios of two series of samples, taken round by round."""
    return Spread.of([top / bottom for top, bottom in zip(numerator, denominator, strict=True)])


def time_in_turns(
    calls: Mapping[str, Callable[[int], object]], device: torch.device, *, budget: float, min_rounds: int
) -> dict[str, list[float]]:
    """Time functions in turns, in rounds of one sample each.

    All must have been warmed up, and compiled, before. Each round has a random order; a sample is the mean time of
    enough calls to last about 5 ms, at most 1000. The call number counts on from function to function, so that the
    input set it selects is not still in a cache from the rival before.

    Args:
        calls: functions by name; each selects its input set by the call number.
        device: device they run on. On CUDA the time is that between two events, the first recorded while the device
            is idle: a function that launches its kernels more slowly than they run is charged for it.
        budget: seconds for each function, after which no further round starts.
        min_rounds: minimum number of rounds.

    Returns:
        The samples of each function, in seconds per call and in the order of the rounds.
    """
    numbers = itertools.count()
    repeats: dict[str, int] = {}
    for name, call in calls.items():
        seconds = _time(call, numbers, 1, device)
        if seconds < _SECONDS_OF_A_SAMPLE:
            seconds = _time(call, numbers, 3, device)
        repeats[name] = min(math.ceil(_SECONDS_OF_A_SAMPLE / seconds), _MOST_CALLS_OF_A_SAMPLE)

    samples: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    shuffle = random.Random(0).shuffle
    deadline = time.perf_counter() + budget * len(calls)
    rounds = 0
    with torch.compiler.set_stance("fail_on_recompile"):  # a recompilation would count as run time
        while rounds < min_rounds or time.perf_counter() < deadline:
            shuffle(order)
            for name in order:
                samples[name].append(_time(calls[name], numbers, repeats[name], device))
            rounds += 1
    return samples


def _time(call: Callable[[int], object], numbers: Iterator[int], repeats: int, device: torch.device) -> float:
    """Return the mean seconds of ``repeats`` calls in a row."""
    chosen = list(itertools.islice(numbers, repeats))
    if device.type == "cuda":
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        first.record()
        for number in chosen:
            call(number)
        last.record()
        last.synchronize()
        return first.elapsed_time(last) / 1000 / repeats
    start = time.perf_counter()
    for number in chosen:
        call(number)
    return (time.perf_counter() - start) / repeats


def number_of_sets(nbytes: int, device: torch.device) -> int:
    """Return how many tensors of ``nbytes`` fill twice the device's last-level cache; at least 3, at most 64."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else _cpu_cache()
    return min(max(_FEWEST_SETS, math.ceil(2 * cache / nbytes)), _MOST_SETS)


def _cpu_cache() -> int:
    """Return the bytes of the CPU's largest cache; 32 MiB if unknown."""
    units = {"K": 2**10, "M": 2**20}
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size[:-1]) * units[size[-1]] for size in sizes if size[-1:] in units), default=2**25)


def saved_bytes(function: Callable[[Tensor], Tensor], x: Tensor, parameters: Iterable[Tensor]) -> int:
    """Return the bytes that a forward of ``x`` saves for its backward: each storage once, without the parameters."""
    own = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = function(x)
    # Compiled code saves some tensors on the autograd node itself, where the hooks do not see them.
    for node in _nodes(y):
        for leaf in tree_leaves(getattr(node, "__dict__", {})):
            if isinstance(leaf, Tensor):
                keep(leaf)
    return sum(kept.values())


def peak_bytes(call: Callable[[], object], resident: Sequence[Tensor], device: torch.device) -> int:
    """Return the peak memory of a call in bytes, beyond the ``resident`` tensors.

    On CUDA it is the allocator's, elsewhere that of the tensors alive between two operations.
    """
    if device.type != "cuda":
        with LiveBytes(resident) as live:
            before = live.live
            call()
        return live.peak - before
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    return torch.cuda.max_memory_allocated(device) - before


def _nodes(y: Tensor) -> Iterator[Any]:
    """Yield the nodes of the autograd graph of ``y``."""
    waiting: list[Any] = [y.grad_fn]
    seen = set()
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting.extend(following for following, _ in node.next_functions)
            yield node


def missing_device(device: torch.device) -> str | None:
    """Return why nothing can run on the device; None if it is available."""
    return "no CUDA device" if device.type == "cuda" and not torch.cuda.is_available() else None


def reason(error: BaseException) -> str:
    """Shorten an error's message to fit a table."""
    text = one_line(error) if isinstance(error, EmaSegError) else f"{type(error).__name__}: {one_line(error)}"
    return text if len(text) <= _LONGEST_REASON else f"{text[: _LONGEST_REASON - 1]}…"


def describe_run(device: torch.device) -> dict[str, Any]:
    """Return ``describe_environment`` with the date, the CPU, triton's version and the load average."""
    missing = missing_device(device)
    environment = describe_environment("cpu" if missing else device)
    if missing:
        environment["device"] = {"type": device.type, "name": missing}
    environment["packages"]["triton"] = _version("triton")
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **environment,
        "cpu": describe_device("cpu")["name"],
        "load_average_before": os.getloadavg()[0],
    }


def run_as_markdown(run: Mapping[str, Any]) -> str:
    """Format ``describe_run`` as the lines above a table."""
    packages, git = run["packages"], run["git"]
    commit = "no commit" if git is None else git["commit"][:12] + " and changes" * git["dirty"]
    host = "" if run["device"]["type"] == "cpu" else f" on a host with {run['cpu']}"
    command = " ".join(run["command"])
    return (
        f"{run['date']}: {run['device']['name']}{host}, {run['threads']} threads; ema-seg {packages['ema-seg']} "
        f"({commit}), torch {packages['torch']}, triton {packages['triton']}, Python {run['python']}; "
        f"load average before: {run['load_average_before']:.2f}.\n\n    {command}\n"
    )


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def number(value: float) -> str:
    """Format a number with three significant digits or, from 1000 on, all integer digits; without an exponent."""
    decimals = 2 - math.floor(math.log10(value)) if value > 0 else 0
    return f"{value:.{max(decimals, 0)}f}"


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]], *, text_columns: int) -> str:
    """Format a table; the first ``text_columns`` columns are left-aligned, the others right-aligned."""
    rule = ["---" if column < text_columns else "---:" for column in range(len(header))]
    lines = [header, rule, *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def write_result(folder: Path, name: str, result: Mapping[str, Any], markdown: str) -> None:
    """Write ``<name>.json`` and ``<name>.md``."""
    (folder / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (folder / f"{name}.md").write_text(markdown, encoding="utf-8")


class Parser(argparse.ArgumentParser):
    """Argument parser with the options of every benchmark; it reports a mistake in one sentence."""

    def __init__(self, description: str, name: str, *, budget: float) -> None:
        super().__init__(description=description)
        self.add_argument(
            "--device",
            choices=("cpu", "cuda"),
            default="cuda" if torch.cuda.is_available() else "cpu",
            help="where to measure; default here: %(default)s",
        )
        self.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS), help="default: both")
        self.add_argument(
            "--output",
            type=Path,
            default=Path("runs", name),
            help="folder of the files it writes; default: %(default)s",
        )
        self.add_argument(
            "--budget", type=positive_float, default=budget, help="seconds per measurement; default: %(default)s"
        )
        self.add_argument(
            "--threads",
            type=positive_int,
            default=torch.get_num_threads(),
            help="threads on the CPU; default here: %(default)s",
        )

    def error(self, message: str) -> NoReturn:
        """Print the mistake without the usage, and exit with status 2."""
        self.exit(2, f"error: {message}{'' if message.endswith(('.', '?')) else '.'}\n")

    def options(self, arguments: Sequence[str] | None) -> argparse.Namespace:
        """Parse the command line, make the output folder and set the number of threads."""
        options = self.parse_args(arguments)
        for variable, consequence in _DISTORTING_VARIABLES.items():
            if os.environ.get(variable):
                self.error(f"the environment variable {variable} is set, which {consequence}; unset it")
        try:
            options.output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            self.error(f"--output {options.output}: the folder cannot be made ({error.strerror})")
        torch.set_num_threads(options.threads)
        options.device = torch.device(options.device)
        return options


def positive_float(text: str) -> float:
    """Parse a number above zero."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return value


def positive_int(text: str) -> int:
    """Parse a whole number above zero."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)
