"""Benchmark of a training step: what the framework adds, and where the time goes.

    python benchmarks/bench_step.py

The default model and loss learn from random batches, in two ways that take turns step by step in one process:

* ``train.py``: Lightning's trainer with the module and the callbacks of a run;
* ``bare``: a loop in plain PyTorch with the same model, loss, optimiser, schedule and batches.

The parts of a step are timed in a bare loop.
"""

import argparse
import itertools
import logging
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from hydra import compose, initialize_config_dir
from lightning import Callback, LightningModule, Trainer
from measuring import (
    Spread,
    describe_run,
    markdown_table,
    missing_device,
    number,
    positive_int,
    ratio,
    run_as_markdown,
    write_result,
)
from omegaconf import OmegaConf
from torch.utils.data import DataLoader

from ema_seg.data.normalise import Normalise
from ema_seg.inference.prediction import autocast, model_input
from ema_seg.models import segmenter_from_config
from ema_seg.models.head import row_logits
from ema_seg.runtime.execution import set_execution
from ema_seg.runtime.host_memory import keep_freed_memory
from ema_seg.training.callbacks import EpochLog
from ema_seg.training.lightning_patches import ignore_warnings
from ema_seg.training.losses import build_loss
from ema_seg.training.module import SegmentationModule
from ema_seg.training.optimisation import build_optimizer, build_schedule
from ema_seg.training.trainer import build_trainer

SCHEMA = 1
NAME = "bench_step"
ROOT = Path(__file__).resolve().parents[1]
CLASSES = 19
WARMUP = 2  # steps

Batch = dict[str, Any]


class Turns(Callback):
    """Callback that takes a step of the bare loop before each step of the trainer, and times both."""

    def __init__(self, bare: Iterator[object]) -> None:
        self.seconds: dict[str, list[float]] = {"train.py": [], "bare": []}
        self._bare = bare
        self._started: float | None = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """End the time of the trainer's last step, and take one of the bare loop."""
        ended = _now(pl_module.device)
        if self._started is not None:
            self.seconds["train.py"].append(ended - self._started)
        next(self._bare)
        self._started = _now(pl_module.device)
        self.seconds["bare"].append(self._started - ended)


def random_batches(batch: int, height: int, width: int, steps: int) -> list[Batch]:
    """Return batches as the data module's workers make them."""
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "image": torch.randint(256, (batch, 3, height, width), generator=generator, dtype=torch.uint8),
            "mask": torch.randint(CLASSES, (batch, height, width), generator=generator, dtype=torch.uint8),
            "name": [str(index) for index in range(batch)],
        }
        for _ in range(steps)
    ]


def build(config: Mapping[str, Any], device: torch.device) -> tuple[torch.nn.Module, torch.nn.Module, Normalise]:
    """Build model, loss and normalisation of a configuration."""
    torch.manual_seed(0)
    model = segmenter_from_config(config, CLASSES, pretrained=False)
    settings = config["training"]
    set_execution(model, channels_last=settings["channels_last"], compile=settings["compile"])
    loss = build_loss(config["loss"], CLASSES, strips=settings["loss_strips"])
    return model.to(device).train(), loss.to(device), Normalise((0.5,) * 3, (0.25,) * 3)


def time_in_turns(config: Mapping[str, Any], batches: Sequence[Batch], device: torch.device) -> dict[str, list[float]]:
    """Train in both ways, step by step in turns, and return the seconds of the steps after the warm-up."""
    model, loss, normalise = build(config, device)
    module = SegmentationModule(
        model,
        loss,
        normalise,
        classes=[str(label) for label in range(CLASSES)],
        optimizer=config["optimizer"],
        schedule=config["schedule"],
        config=config,
    )
    turns = Turns(bare_steps(config, batches, device))
    settings = {**config["trainer"], "max_epochs": 1, "num_sanity_val_steps": 0, "limit_val_batches": 0}
    with tempfile.TemporaryDirectory() as folder:
        log = EpochLog(Path(folder, "metrics.csv"), quiet=True)
        trainer = build_trainer(settings, Path(folder), [log, turns])
        trainer.fit(module, DataLoader(batches, batch_size=None))  # type: ignore[arg-type]  # a list is a data set
    return {way: seconds[WARMUP : len(batches) - 1] for way, seconds in turns.seconds.items()}


def bare_steps(
    config: Mapping[str, Any], batches: Sequence[Batch], device: torch.device, *, parts: bool = False
) -> Iterator[tuple[str, float]]:
    """Train in a bare loop and yield the time after each step; or at its start and after each part."""
    model, loss, normalise = build(config, device)
    optimizer = build_optimizer(model, **config["optimizer"])
    schedule = build_schedule(optimizer, len(batches), **config["schedule"])
    precision = config["trainer"]["precision"] or "32-true"
    for batch in batches:
        if parts:
            yield "start", _now(device)
        images, masks = (batch[key].to(device, non_blocking=True) for key in ("image", "mask"))
        with autocast(device, precision):
            images = model_input(model, images, normalise)
            if parts:
                yield "bytes to the device, normalisation", _now(device)
            logits = row_logits(model, images)
            if parts:
                yield "forward to the head's last layer", _now(device)
            value = loss(logits, masks)
        if parts:
            yield "last layer and loss, with their gradient", _now(device)
        value.backward()
        if parts:
            yield "backward of all else", _now(device)
        torch.nn.utils.get_total_norm([weight.grad for weight in model.parameters() if weight.grad is not None])
        if parts:
            yield "gradient norm, for the log", _now(device)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        yield "optimiser and schedule", _now(device)


def measure_parts(config: Mapping[str, Any], batches: Sequence[Batch], device: torch.device) -> dict[str, float]:
    """Return the seconds of each part of a step."""
    seconds: dict[str, list[float]] = defaultdict(list)
    for (_, before), (part, after) in itertools.pairwise(bare_steps(config, batches, device, parts=True)):
        if part != "start":
            seconds[part].append(after - before)
    return {part: Spread.of(samples[WARMUP:]).median for part, samples in seconds.items()}


def _now(device: torch.device) -> float:
    """Return the time at which the device is idle."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def as_markdown(record: Mapping[str, Any]) -> str:
    """Format the results as tables."""
    rows = [
        [
            way,
            number(1000 * result["seconds"]["median"]),
            *(number(result["ratio"][part]) for part in ("median", "lower_quartile", "upper_quartile")),
        ]
        for way, result in record["ways"].items()
    ]
    whole = sum(record["parts"].values())
    parts = [[part, number(1000 * seconds), number(100 * seconds / whole)] for part, seconds in record["parts"].items()]
    return (
        f"# A training step\n\n{run_as_markdown(record['run'])}\nBatches of {record['batch']}.\n\n"
        f"{markdown_table(['', 'ms per step', '/ bare', 'lower quartile', 'upper quartile'], rows, text_columns=1)}\n"
        f"{markdown_table(['part of a bare step', 'ms', '%'], parts, text_columns=1)}"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="A training step: what the framework adds.")
    parser.add_argument("--batch", type=positive_int, default=8, help="default: %(default)s")
    parser.add_argument("--height", type=positive_int, default=160, help="of a crop (default: %(default)s)")
    parser.add_argument("--width", type=positive_int, default=320, help="of a crop (default: %(default)s)")
    parser.add_argument("--steps", type=positive_int, default=30, help="timed steps (default: %(default)s)")
    parser.add_argument("--threads", type=positive_int, default=torch.get_num_threads(), help="default: %(default)s")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    parser.add_argument("--overrides", nargs="*", default=[], help="settings of train.py, such as attention=none")
    parser.add_argument("--output", type=Path, default=Path("runs", NAME), help="default: %(default)s")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    if missing := missing_device(device):
        parser.error(f"--device {options.device}: {missing}")
    options.output.mkdir(parents=True, exist_ok=True)
    keep_freed_memory()  # as train.py does
    torch.set_num_threads(options.threads)
    ignore_warnings()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        trainer = "cpu" if device.type == "cpu" else "gpu"
        composed = compose("train", [f"trainer={trainer}", *options.overrides])
    config = cast(dict[str, Any], OmegaConf.to_container(composed, resolve=True))
    batches = random_batches(options.batch, options.height, options.width, options.steps + WARMUP + 1)

    samples = time_in_turns(config, batches, device)
    ways = {
        way: {"seconds": Spread.of(seconds).as_json(), "ratio": ratio(seconds, samples["bare"]).as_json()}
        for way, seconds in samples.items()
    }
    record = {
        "schema": SCHEMA,
        "run": describe_run(device),
        "batch": f"{options.batch} crops of {options.height} x {options.width}",
        "ways": ways,
        "parts": measure_parts(config, batches[: WARMUP + 8], device),
    }
    write_result(options.output, NAME, record, as_markdown(record))
    print(as_markdown(record))
    print(f"Written to {options.output}.")


if __name__ == "__main__":
    main()
