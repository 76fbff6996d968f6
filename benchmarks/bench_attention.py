"""Benchmark of the attention blocks, alone and in a whole model: time and memory.

    python benchmarks/bench_attention.py
    python benchmarks/bench_attention.py --names ema cbam gam --shapes 4x64x64x64 --layouts channels_last

Covers every block of ``attention=<name>``, with the options of its configuration. Alone: parameters, multiply–adds,
peak memory, memory saved for the backward, and the time of a forward and of a forward and backward (gradients of the
input and of all parameters), relative to a copy of the input. In a model: images per second of a Unet with the block
in the decoder, in inference and in training (forward, cross-entropy, backward, step of SGD), relative to the same model
without attention. The models start from the same weights. Rivals are timed in turns, and a ratio is the median over
the rounds of the ratio within a round. The model without attention takes part twice: the overhead of its second entry
is the noise of the machine.
"""

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from bench_ema_model import CLASSES, Contestant
from measuring import (
    LAYOUTS,
    Parser,
    Spread,
    describe_run,
    markdown_table,
    missing_device,
    number,
    number_of_sets,
    positive_int,
    ratio,
    reason,
    run_as_markdown,
    saved_bytes,
    time_in_turns,
    write_result,
)
from torch import Tensor

from ema_seg.attention import attention_names, build_attention
from ema_seg.evaluation.cost import count_macs, count_parameters, measure_peak_memory
from ema_seg.inference.prediction import PRECISIONS, autocast
from ema_seg.models import build_segmenter, model_stride
from ema_seg.runtime.errors import ConfigError, EmaSegError
from ema_seg.runtime.host_memory import keep_freed_memory

SCHEMA = 1
NAME = "bench_attention"
PLAIN, AGAIN, COPY = "none", "none, again", "copy"
BLOCKS = tuple(name for name in attention_names() if name != PLAIN)
PASSES = {"inference": "inference", "training": "training step"}
CONFIGS = Path(__file__).parents[1] / "configs" / "attention"
SHAPES = ((4, 64, 64, 64), (1, 256, 32, 32))
DECODER = "unet"
MIN_ROUNDS = 15
WARMUP = 2

Shape = tuple[int, int, int, int]


def options_of(name: str) -> dict[str, Any]:
    """Read the options of ``attention=<name>``."""
    options = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text(encoding="utf-8"))
    del options["name"]
    return options


class Candidate:
    """Attention block outside a model, with a method for each pass."""

    def __init__(self, name: str, precision: str, inputs: Sequence[Tensor], layout: str) -> None:
        torch.manual_seed(0)
        self.block = build_attention(name, inputs[0].shape[1], **options_of(name))
        self.block.to(inputs[0].device).to(memory_format=LAYOUTS[layout])
        self.trained = [parameter for parameter in self.block.parameters() if parameter.requires_grad]
        self.precision = precision
        self.inputs = inputs
        self.leaves = [x.detach().requires_grad_() for x in inputs]

    def run(self, x: Tensor) -> Tensor:
        """Compute the output in the precision of the measurement."""
        with autocast(x.device, self.precision):
            return self.block(x)

    def inference(self, index: int) -> Tensor:
        """Compute the output for one of the inputs."""
        with torch.inference_mode():
            return self.run(self.inputs[index % len(self.inputs)])

    def training(self, index: int) -> Tensor:
        """Compute the gradients of one of the inputs and of the parameters; return the former."""
        leaf = self.leaves[index % len(self.leaves)]
        y = self.run(leaf)
        # An output gradient of ones serves as well as a random one, and needs no further inputs.
        return torch.autograd.grad(y, [leaf, *self.trained], torch.ones_like(y))[0]


def measure_blocks(
    names: Sequence[str], shape: Shape, layout: str, device: torch.device, precision: str, budget: float
) -> dict[str, Any]:
    """Measure blocks on inputs of one shape and layout.

    Returns:
        A dict of plain values: ``shape``, ``layout``, ``bytes_of_x`` and ``rows`` by block. A row holds ``not_run``,
        the reason; or the number of ``parameters``; ``macs`` of the forward; the ``peak`` bytes of a forward, as
        ``measure_peak_memory`` counts them; the bytes ``saved`` for the backward; and by pass the ``seconds`` and
        their ratio to those of a ``copy`` of the input, as spreads.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).to(device, memory_format=LAYOUTS[layout])
    inputs = [x, *(torch.randn_like(x) for _ in range(number_of_sets(x.nbytes, device) - 1))]
    copies = [torch.empty_like(x) for x in inputs]
    rows: dict[str, dict[str, Any]] = {}
    candidates = {}
    for name in names:
        try:
            candidate = Candidate(name, precision, inputs, layout)
            rows[name] = _facts(candidate, x)
            for which in PASSES:
                candidate.block.train(which == "training")
                for index in range(WARMUP):
                    getattr(candidate, which)(index)
            candidates[name] = candidate
        except Exception as error:  # the table shows why a block cannot be built or run
            rows[name] = {"not_run": reason(error)}
    for which in PASSES:
        calls: dict[str, Callable[[int], object]] = {
            COPY: lambda index: copies[index % len(copies)].copy_(inputs[index % len(inputs)])
        }
        for name, candidate in candidates.items():
            candidate.block.train(which == "training")
            calls[name] = getattr(candidate, which)
        samples = time_in_turns(calls, device, budget=budget, min_rounds=MIN_ROUNDS)
        for name in candidates:
            rows[name][which] = {
                "seconds": Spread.of(samples[name]).as_json(),
                COPY: ratio(samples[name], samples[COPY]).as_json(),
            }
    return {"shape": list(shape), "layout": layout, "bytes_of_x": x.nbytes, "rows": rows}


def _facts(candidate: Candidate, x: Tensor) -> dict[str, Any]:
    """Measure parameters, MACs and memory, which need no timing."""
    block = candidate.block.train()
    saved = saved_bytes(candidate.run, candidate.leaves[0], block.parameters())
    block.eval()
    with autocast(x.device, candidate.precision):
        return {
            "parameters": count_parameters(block)["total"],
            "macs": count_macs(block, x),
            "peak": measure_peak_memory(block, x),
            "saved": saved,
        }


def measure_models(
    names: Sequence[str],
    layout: str,
    device: torch.device,
    *,
    encoder: str,
    batch: int,
    size: tuple[int, int],
    precision: str,
    budget: float,
) -> dict[str, Any]:
    """Measure a Unet without attention and with each block in its decoder.

    Returns:
        A dict of plain values: ``layout`` and ``rows`` by attention. A row holds ``not_run``, the reason; or the
        number of ``parameters``, the ``macs`` of an image, and by pass the ``seconds`` of a batch, the
        ``images_per_second`` and the ``overhead`` over no attention, as a fraction; as spreads.

    Raises:
        EmaSegError: the encoder does not exist, or ``size`` is not a multiple of the model's stride.
    """
    generator = torch.Generator().manual_seed(0)
    images = [torch.randn(batch, 3, *size, generator=generator).to(device, memory_format=LAYOUTS[layout])]
    count = number_of_sets(images[0].nbytes, device)
    images += [torch.randn_like(images[0]) for _ in range(count - 1)]
    masks = [torch.randint(CLASSES, (batch, *size), generator=generator).to(device) for _ in range(count)]
    rows: dict[str, dict[str, Any]] = {}
    contestants = {}
    for name in (PLAIN, *names):
        torch.manual_seed(0)
        try:
            model = build_segmenter(
                DECODER, classes=CLASSES, encoder=encoder, attention=name, attention_options=options_of(name)
            )
            stride = model_stride(model)
            if size[0] % stride or size[1] % stride:
                raise ConfigError(f"--size: this model needs a height and width that are multiples of {stride}.")
            model.to(device).to(memory_format=LAYOUTS[layout]).eval()
            with autocast(device, precision):
                macs = count_macs(model, images[0][:1])
            rows[name] = {"parameters": count_parameters(model)["total"], "macs": macs}
            contestants[name] = contestant = Contestant(model, False, precision, images, masks)
            for which in PASSES:
                model.train(which == "training")
                for index in range(WARMUP):
                    getattr(contestant, which)(index)
        except Exception as error:
            if name == PLAIN:  # all overheads are relative to it
                raise
            contestants.pop(name, None)
            rows[name] = {"not_run": reason(error)}
        if name == PLAIN:
            rows[AGAIN] = rows[PLAIN].copy()
    for which in PASSES:
        for contestant in contestants.values():
            contestant.model.train(which == "training")
        calls = {name: getattr(contestant, which) for name, contestant in contestants.items()}
        calls[AGAIN] = calls[PLAIN]
        samples = time_in_turns(calls, device, budget=budget, min_rounds=MIN_ROUNDS)
        for name, seconds in samples.items():
            pairs = zip(seconds, samples[PLAIN], strict=True)
            rows[name][which] = {
                "seconds": Spread.of(seconds).as_json(),
                "images_per_second": Spread.of([batch / second for second in seconds]).as_json(),
                "overhead": Spread.of([second / plain - 1 for second, plain in pairs]).as_json(),
            }
    return {"layout": layout, "rows": rows}


def as_markdown(record: dict[str, Any]) -> str:
    """Format the tables of a result."""
    settings = record["settings"]
    parts = [
        "# What attention blocks cost\n",
        run_as_markdown(record["run"]),
        f"Precision {settings['precision']}. Times and ratios: median (quartiles); a ratio is the median over rounds "
        "of the ratio within a round.\n",
    ]
    if record["blocks"]:
        parts.append(
            "## Alone\n\nPer batch. Copy: a copy of the input x, in the same rounds. Peak: weights, input and whatever "
            "else a forward without gradients holds at once; kept: for the backward; both relative to the bytes "
            "of x.\n"
        )
    for result in record["blocks"]:
        shape = "×".join(map(str, result["shape"]))
        parts.append(f"### {shape}, {result['layout']}\n\n{_table_of_blocks(result)}")
    if record["models"]:
        height, width = settings["size"]
        parts.append(
            f"## In a Unet\n\nEncoder {settings['encoder']}, the block after each block of the decoder, batches of "
            f"{settings['batch']} images of {height}×{width}. Overhead: time / time without attention of the same "
            f"round - 1; that of “{AGAIN}” is noise. GMACs: of an image.\n"
        )
    for result in record["models"]:
        parts.append(f"### {result['layout']}\n\n{_table_of_models(result)}")
    return "\n".join(parts)


def _table_of_blocks(result: dict[str, Any]) -> str:
    rows = []
    for name, row in result["rows"].items():
        if "not_run" in row:
            rows.append([name, f"not run: {row['not_run']}", *["–"] * 7])
            continue
        times = [
            cell
            for which in PASSES
            for cell in (_spread(row[which]["seconds"], 1000), number(row[which][COPY]["median"]))
        ]
        memory = [number(row[key] / result["bytes_of_x"]) for key in ("peak", "saved")]
        rows.append([name, f"{row['parameters']:,}", number(row["macs"] / 1e6), *times, *memory])
    header = ["block", "parameters", "MMACs", "forward, ms", "/ copy", "and backward, ms", "/ copy", "peak / x"]
    return markdown_table([*header, "kept / x"], rows, text_columns=1)


def _table_of_models(result: dict[str, Any]) -> str:
    rows = []
    for name, row in result["rows"].items():
        if "not_run" in row:
            rows.append([name, f"not run: {row['not_run']}", *["–"] * 5])
            continue
        cells = [name, f"{row['parameters']:,}", number(row["macs"] / 1e9)]
        for which in PASSES:
            cells.append(number(row[which]["images_per_second"]["median"]))
            cells.append("–" if name == PLAIN else _spread(row[which]["overhead"], 100, "{:.1f}".format))
        rows.append(cells)
    header = ["attention", "parameters", "GMACs"]
    header += [f"{shown}: {what}" for shown in PASSES.values() for what in ("images/s", "overhead, %")]
    return markdown_table(header, rows, text_columns=1)


def _spread(spread: dict[str, float], factor: float, text: Callable[[float], str] = number) -> str:
    median, lower, upper = (text(factor * spread[key]) for key in ("median", "lower_quartile", "upper_quartile"))
    return f"{median} ({lower} to {upper})"


def shape_of(text: str) -> Shape:
    """Parse a shape like ``4x64x64x64``."""
    sizes = text.split("x")
    if len(sizes) != 4 or not all(size.isdecimal() and int(size) for size in sizes):
        raise argparse.ArgumentTypeError(f"{text!r} is not a shape like 4x64x64x64 (batch, channels, height, width)")
    batch, channels, height, width = map(int, sizes)
    return batch, channels, height, width


def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser("What each attention block costs, alone and in a whole model.", NAME, budget=1.0)
    parser.add_argument(
        "--names",
        nargs="+",
        choices=BLOCKS,
        default=list(BLOCKS),
        metavar="NAME",
        help=f"{', '.join(BLOCKS)}; default: all",
    )
    parser.add_argument(
        "--shapes",
        nargs="*",
        type=shape_of,
        default=list(SHAPES),
        metavar="BxCxHxW",
        help="of the input of a block alone; none for models only; default: 4x64x64x64 1x256x32x32",
    )
    parser.add_argument("--encoder", default="tu-tf_efficientnet_lite0", help="of the model; default: %(default)s")
    parser.add_argument("--batch", type=positive_int, default=4, help="images in a batch; default: %(default)s")
    parser.add_argument(
        "--size",
        nargs=2,
        type=positive_int,
        default=[256, 256],
        metavar=("HEIGHT", "WIDTH"),
        help="of the images; default: 256 256",
    )
    parser.add_argument("--precision", choices=PRECISIONS, default="32-true", help="default: %(default)s")
    options = parser.options(arguments)
    if missing := missing_device(options.device):
        parser.error(f"--device {options.device}: there is {missing}")
    device, precision, budget = options.device, options.precision, options.budget
    model = {"encoder": options.encoder, "batch": options.batch, "size": tuple(options.size), "precision": precision}
    record: dict[str, Any] = {
        "schema": SCHEMA,
        "run": describe_run(device),
        "settings": model | {"decoder": DECODER, "options": {name: options_of(name) for name in options.names}},
        "blocks": [],
        "models": [],
    }
    plan: list[tuple[Shape | None, str]] = list(itertools.product([*options.shapes, None], options.layouts))
    for place, (shape, layout) in enumerate(plan, start=1):
        start = time.perf_counter()
        try:
            if shape is None:
                record["models"].append(measure_models(options.names, layout, device, **model, budget=budget))
            else:
                record["blocks"].append(measure_blocks(options.names, shape, layout, device, precision, budget))
        except EmaSegError as error:
            parser.error(str(error))
        # Write after every part, so that an interrupted run keeps its results.
        write_result(options.output, NAME, record, as_markdown(record))
        what = DECODER if shape is None else "x".join(map(str, shape))
        print(f"{place}/{len(plan)} {what}, {layout}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    print(as_markdown(record))
    print(f"Written to {options.output}.")


if __name__ == "__main__":
    keep_freed_memory()  # as train.py and eval.py do
    main()
