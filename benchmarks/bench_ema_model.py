"""Benchmark of EMA in a whole model: its overhead in training and inference.

    python benchmarks/bench_ema_model.py
    python benchmarks/bench_ema_model.py --encoder resnet50 --decoders unet --modes eager compiled

Measures images per second of an encoder-decoder model in inference (forward in evaluation mode) and in training
(forward, cross-entropy, backward, step of SGD): without attention, with EMA in the decoder as published ("reference"),
and as chosen for the machine ("auto"). The models start from the same weights and are timed in turns. The overhead is
the median over the rounds of time / time without attention - 1, both of the same round. The model without attention
takes part twice: the overhead of its second entry is the noise of the machine.
"""

import itertools
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
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
    reason,
    run_as_markdown,
    time_in_turns,
    write_result,
)
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ema_seg.attention import EMA
from ema_seg.inference.prediction import PRECISIONS, autocast
from ema_seg.models import build_segmenter, decoder_names, model_stride
from ema_seg.runtime.errors import ConfigError, EmaSegError
from ema_seg.runtime.host_memory import keep_freed_memory

SCHEMA = 1
NAME = "bench_ema_model"
CLASSES = 19
MIN_ROUNDS = 15
WARMUP = 2
PLAIN, AGAIN = "none", "none, again"
# Arguments of build_segmenter; the attention is in the decoder.
VARIANTS: dict[str, dict[str, Any]] = {
    PLAIN: {"attention": "none"},
    "EMA, reference": {
        "attention": "ema",
        "attention_options": {"factor": "auto", "implementation": "reference"},
    },
    "EMA, auto": {"attention": "ema", "attention_options": {"factor": "auto", "implementation": "auto"}},
}
NAMES = (PLAIN, AGAIN, *(name for name in VARIANTS if name != PLAIN))
JUDGED = "EMA, auto"
AIMS = {"cpu": 0.10, "cuda": 0.03}  # the largest overhead
PASSES = {"inference": "inference", "training": "training step"}
MODES = ("eager", "compiled")
DEFAULTS: dict[str, dict[str, Any]] = {
    "cpu": {"batch": 4, "size": [352, 480], "precision": "32-true"},
    "cuda": {"batch": 8, "size": [512, 1024], "precision": "bf16-mixed"},
}


class Contestant:
    """Model with its optimiser, and a method for each pass."""

    def __init__(
        self, model: nn.Module, compiled: bool, precision: str, images: Sequence[Tensor], masks: Sequence[Tensor]
    ) -> None:
        self.model = model
        self.function: Callable[[Tensor], Tensor] = torch.compile(model, dynamic=False) if compiled else model
        # A learning rate that hardly moves the weights: only the time of the step matters.
        self.optimiser = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9)
        self.precision = precision
        self.images, self.masks = images, masks

    def inference(self, index: int) -> Tensor:
        """Compute the logits of one of the batches."""
        images = self.images[index % len(self.images)]
        with torch.inference_mode(), autocast(images.device, self.precision):
            return self.function(images)

    def training(self, index: int) -> Tensor:
        """Take a training step on one of the batches, and return its loss."""
        images, masks = self.images[index % len(self.images)], self.masks[index % len(self.masks)]
        self.optimiser.zero_grad()
        with autocast(images.device, self.precision):
            loss = cross_entropy(self.function(images), masks)
        loss.backward()
        self.optimiser.step()
        return loss


def measure(
    decoder: str,
    encoder: str,
    layout: str,
    mode: str,
    device: torch.device,
    *,
    batch: int,
    size: tuple[int, int],
    precision: str,
    budget: float,
) -> dict[str, Any]:
    """Measure an encoder–decoder model with each of ``VARIANTS``.

    Returns:
        A dict of plain values: ``decoder``, ``layout``, ``mode``; ``auto``, the implementation that it chose; and
        ``rows`` by attention and pass. A row holds ``not_run``, the reason; or, as spreads, the ``seconds`` of a
        batch, the ``images_per_second`` and the ``overhead`` over no attention, as a fraction.

    Raises:
        EmaSegError: the model does not exist, or ``size`` is not a multiple of its stride.
    """
    if missing := missing_device(device):
        return _not_measured(decoder, layout, mode, missing)
    torch.compiler.reset()
    generator = torch.Generator().manual_seed(0)
    images = [torch.randn(batch, 3, *size, generator=generator).to(device, memory_format=LAYOUTS[layout])]
    count = number_of_sets(images[0].nbytes, device)
    images += [torch.randn_like(images[0]) for _ in range(count - 1)]
    masks = [torch.randint(CLASSES, (batch, *size), generator=generator).to(device) for _ in range(count)]
    contestants = {}
    for name, arguments in VARIANTS.items():
        torch.manual_seed(0)
        model = build_segmenter(decoder, classes=CLASSES, encoder=encoder, **arguments)
        if size[0] % model_stride(model) or size[1] % model_stride(model):
            raise ConfigError(
                f"--size: this model needs a height and width that are multiples of {model_stride(model)}."
            )
        model.to(device).to(memory_format=LAYOUTS[layout])
        contestants[name] = Contestant(model, mode == "compiled", precision, images, masks)

    rows: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in NAMES}
    for which in PASSES:
        calls = {}
        for name, contestant in contestants.items():
            contestant.model.train(which == "training")
            call = getattr(contestant, which)
            try:
                for index in range(WARMUP):
                    call(index)
            except Exception as error:  # a compiler or kernel may raise anything; the table shows it
                rows[name][which] = {"not_run": reason(error)}
            else:
                rows[name][which] = {}
                calls[name] = call
        rows[AGAIN][which] = rows[PLAIN][which].copy()
        if PLAIN in calls:
            calls[AGAIN] = calls[PLAIN]
        samples = time_in_turns(calls, device, budget=budget, min_rounds=MIN_ROUNDS)
        for name, seconds in samples.items():
            row = rows[name][which]
            row["seconds"] = Spread.of(seconds).as_json()
            row["images_per_second"] = Spread.of([batch / second for second in seconds]).as_json()
            if PLAIN in samples:
                pairs = zip(seconds, samples[PLAIN], strict=True)
                row["overhead"] = Spread.of([second / plain - 1 for second, plain in pairs]).as_json()
    taken = _implementation(contestants[JUDGED].model, images[0], precision)
    return {"decoder": decoder, "layout": layout, "mode": mode, "auto": taken, "rows": rows}


def _not_measured(decoder: str, layout: str, mode: str, why: str) -> dict[str, Any]:
    rows = {name: {which: {"not_run": why} for which in PASSES} for name in NAMES}
    return {"decoder": decoder, "layout": layout, "mode": mode, "auto": None, "rows": rows}


def _implementation(model: nn.Module, images: Tensor, precision: str) -> str:
    """Return the implementation that the EMA blocks of a model choose for its device and dtype."""
    block = next(module for module in model.modules() if isinstance(module, EMA))
    channels = block.groups * block.conv1x1.in_channels
    return block.implementation_for(images.new_empty(1, channels, 1, 1, dtype=PRECISIONS[precision]))


def judge(results: Sequence[dict[str, Any]], device: torch.device) -> list[dict[str, Any]]:
    """Return the aim with each overhead reached; ``reached`` and ``met`` are None if not measured."""
    judged = []
    for result, which in itertools.product(results, PASSES):
        overhead = result["rows"][JUDGED][which].get("overhead")
        reached = None if overhead is None else overhead["median"]
        setting = {key: result[key] for key in ("decoder", "layout", "mode")}
        judged.append(
            setting
            | {"attention": JUDGED, "pass": which, "at_most": AIMS[device.type], "reached": reached}
            | {"met": None if reached is None else reached <= AIMS[device.type]}
        )
    return judged


def as_markdown(record: dict[str, Any]) -> str:
    """Format the table of a result."""
    settings = record["settings"]
    height, width = settings["size"]
    aim = AIMS[record["run"]["device"]["type"]]
    rows = []
    for result, which in itertools.product(record["results"], PASSES):
        place = [result["decoder"], result["layout"], result["mode"], PASSES[which]]
        for name, passes in result["rows"].items():
            row = passes[which]
            if "not_run" in row:
                rows.append([*place, name, f"not run: {row['not_run']}", "–", "–", "–"])
                continue
            overhead, verdict = "–", "–"
            if name != PLAIN and "overhead" in row:
                overhead = _spread(row["overhead"], lambda value: f"{100 * value:.1f}")
            if name == JUDGED and "overhead" in row:
                verdict = f"≤ {100 * aim:g}: {'met' if row['overhead']['median'] <= aim else 'missed'}"
            milliseconds = _spread(row["seconds"], lambda value: number(1000 * value))
            shown = f"{name}: {result['auto']}" if name == JUDGED else name
            rows.append([*place, shown, milliseconds, number(row["images_per_second"]["median"]), overhead, verdict])
    header = ["decoder", "layout", "mode", "pass", "attention", "ms per batch", "images/s", "overhead, %", "aim"]
    return "\n".join(
        [
            "# EMA in whole models\n",
            run_as_markdown(record["run"]),
            f"Encoder {settings['encoder']}, batches of {settings['batch']} images of {height}×{width}, precision "
            f"{settings['precision']}. Median (quartiles); overhead: median over rounds of time / time without "
            "attention of the same round - 1.\n",
            markdown_table(header, rows, text_columns=5),
        ]
    )


def _spread(spread: dict[str, float], text: Callable[[float], str]) -> str:
    return f"{text(spread['median'])} ({text(spread['lower_quartile'])} to {text(spread['upper_quartile'])})"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser("Images per second of whole models without and with EMA in the decoder.", NAME, budget=6.0)
    parser.add_argument(
        "--decoders",
        nargs="+",
        choices=decoder_names(),
        default=["unet", "fpn"],
        metavar="NAME",
        help=f"{', '.join(decoder_names())}; default: unet fpn",
    )
    parser.add_argument("--encoder", default="tu-tf_efficientnet_lite0", help="default: %(default)s")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=["eager"], help="default: eager")
    parser.add_argument("--batch", type=positive_int, help="images in a batch; default: 4, on CUDA 8")
    parser.add_argument(
        "--size", nargs=2, type=positive_int, metavar=("HEIGHT", "WIDTH"), help="default: 352 480, on CUDA 512 1024"
    )
    parser.add_argument("--precision", choices=PRECISIONS, help="default: 32-true, on CUDA bf16-mixed")
    options = parser.options(arguments)
    settings = {name: getattr(options, name) or default for name, default in DEFAULTS[options.device.type].items()}
    record: dict[str, Any] = {
        "schema": SCHEMA,
        "run": describe_run(options.device),
        "settings": {"encoder": options.encoder} | settings,
        "results": [],
    }
    plan = list(itertools.product(options.modes, options.decoders, options.layouts))
    for place, (mode, decoder, layout) in enumerate(plan, start=1):
        start = time.perf_counter()
        try:
            result = measure(decoder, options.encoder, layout, mode, options.device, **settings, budget=options.budget)
        except EmaSegError as error:
            parser.error(str(error))
        except Exception as error:  # such as out of memory: another model may still fit
            result = _not_measured(decoder, layout, mode, reason(error))
        record["results"].append(result)
        record["aims"] = judge(record["results"], options.device)
        # Write after every model, so that an interrupted run keeps its results.
        write_result(options.output, NAME, record, as_markdown(record))
        seconds = time.perf_counter() - start
        print(f"{place}/{len(plan)} {decoder}, {layout}, {mode}: {seconds:.0f} s", file=sys.stderr, flush=True)
    print(as_markdown(record))
    print(f"Written to {options.output}.")


if __name__ == "__main__":
    keep_freed_memory()  # as train.py and eval.py do
    main()
