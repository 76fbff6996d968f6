"""Benchmark of training on more devices: speed-up, and time lost to communication and to waiting for data.

    python benchmarks/bench_scaling.py                      # 1, 2, 4, … processes, up to the GPUs of this machine
    python benchmarks/bench_scaling.py --processes 1 2 --batch 2 data.augmentation.crop.height=64 …
    python benchmarks/bench_scaling.py --accelerator cpu    # 1 and 2 processes on the CPU, to see that it runs

Each number of processes takes the training steps of ``train.py``, with the same batch size per process, in three ways:
on batches from the data set ("data"); on one batch again and again ("one batch"); and on that batch without collectives
for gradients, statistics and loss ("alone"). A barrier precedes and ends each sample. The first way minus the second is
the cost of waiting for data; the second minus the third is the cost of communication and of waiting for other ranks.

The second and third way are timed in turns. The first is timed before them, without a break and from an emptied queue:
batches that the workers prefetch between samples would flatter the rate. The workers have exited before the other two
are timed.

Overrides of ``train.py``'s configuration choose model, data and precision. The benchmark does not use Lightning's loop,
which logs and shows progress.
"""

import argparse
import json
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from hydra import compose, initialize_config_dir
from measuring import describe_run, markdown_table, number, positive_int, run_as_markdown, write_result
from omegaconf import OmegaConf
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ema_seg.data import SegmentationDataModule
from ema_seg.data.normalise import Normalise
from ema_seg.inference.prediction import autocast, model_input
from ema_seg.models import segmenter_from_config
from ema_seg.models.head import row_logits
from ema_seg.runtime.distributed.ranks import barrier, rank_info, single_process
from ema_seg.runtime.distributed.spawn import run_together
from ema_seg.runtime.errors import EmaSegError, Preempted
from ema_seg.runtime.execution import set_execution
from ema_seg.training.losses import build_loss
from ema_seg.training.optimisation import build_optimizer
from ema_seg.training.parallel.sync_batch_norm import SyncLayers

SCHEMA = 1
NAME = "bench_scaling"
ROOT = Path(__file__).resolve().parents[1]


def measure(config: dict[str, Any], cuda: bool, steps: int, rounds: int, path: str) -> None:
    """Time the three ways in each rank; rank 0 writes the seconds of each sample, by way."""
    warnings.simplefilter("ignore")  # torch warns about names and strides
    here = rank_info()
    device = torch.device("cuda", here.local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    data = SegmentationDataModule(**config["data"])
    data.setup("fit")
    loader = data.train_dataloader()
    batches = _endless(loader)
    batch = next(batches)
    by_itself = stepper(config, data.num_classes, data.normalise, device, together=False)
    together = stepper(config, data.num_classes, data.normalise, device, together=True) if here.size > 1 else by_itself
    calls = {"one batch": lambda: together(batch), "alone": lambda: by_itself(batch)}
    for call in calls.values():
        _time(call, steps, device)  # warms up
    ahead = loader.num_workers * (loader.prefetch_factor or 0)
    samples = {"data": time_with_data(batches, together, loader.num_workers, ahead, steps, rounds, device)}
    del data, loader, batches  # also stops the workers
    samples |= {way: [] for way in calls}
    for _ in range(rounds):
        for way, call in calls.items():
            samples[way].append(_time(call, steps, device))
    if here.rank == 0:
        Path(path).write_text(json.dumps({"samples": samples, "run": describe_run(device)}), encoding="utf-8")


def _endless(loader: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    while True:
        yield from loader


def time_with_data(
    batches: Iterator[Mapping[str, Any]],
    step: Callable[[Mapping[str, Any]], None],
    workers: int,
    ahead: int,
    steps: int,
    rounds: int,
    device: torch.device,
) -> list[float]:
    """Measure the seconds per step on new batches, in samples without a break.

    Args:
        batches: batches from the workers.
        step: function that takes a training step.
        workers: number of workers; 0 loads in this process.
        ahead: number of batches that the workers prefetch.
        steps: steps per sample, rounded up to a multiple of ``workers``: one batch of each may be ready at once.
        rounds: number of samples.
        device: device of the steps.
    """
    turn = max(1, workers)
    for _ in range(ahead + 1):
        next(batches)
    for _ in range(turn):  # fast workers fill the queue again
        step(next(batches))
    return [_time(lambda: step(next(batches)), -(-steps // turn) * turn, device) for _ in range(rounds)]


def stepper(
    config: Mapping[str, Any], classes: int, normalise: Normalise, device: torch.device, *, together: bool
) -> Callable[[Mapping[str, Any]], None]:
    """Build a model and return its training step; ``together`` trains it with DDP, else without collectives."""
    torch.manual_seed(config["seed"])
    segmenter = segmenter_from_config(config, classes)
    settings = config["training"]
    set_execution(segmenter, channels_last=settings["channels_last"], compile=settings["compile"])
    loss = build_loss(config["loss"], classes, strips=settings["loss_strips"]).to(device)
    model: nn.Module = segmenter.to(device).train()
    optimizer = build_optimizer(segmenter, **config["optimizer"])
    if together:
        if config["trainer"]["sync_batchnorm"]:
            model = SyncLayers(cuda=device.type == "cuda").apply(model)
        model = DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)
    precision = config["trainer"]["precision"]

    def step(batch: Mapping[str, Any]) -> None:
        images, masks = (batch[key].to(device, non_blocking=True) for key in ("image", "mask"))
        with nullcontext() if together else single_process():
            with autocast(device, precision):
                logits = row_logits(model, model_input(segmenter, images, normalise))
            loss(logits, masks).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _time(step: Callable[[], None], steps: int, device: torch.device) -> float:
    """Return the seconds per step of ``steps`` steps, between two barriers."""
    barrier()
    start = time.perf_counter()
    for _ in range(steps):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    barrier()
    return (time.perf_counter() - start) / steps


def summarise(counts: Sequence[int], batch: int, found: Sequence[Mapping[str, list[float]]]) -> list[dict[str, Any]]:
    """Compute a row for each number of processes.

    Args:
        counts: the numbers of processes; speed-ups are relative to the first.
        batch: batch size of one process.
        found: seconds of each sample by way, for each number.
    """
    rows = []
    first = counts[0] * batch / float(np.median(found[0]["data"]))
    for count, samples in zip(counts, found, strict=True):
        data, one_batch, by_itself = (float(np.median(samples[way])) for way in ("data", "one batch", "alone"))
        rate = count * batch / data
        rows.append(
            {
                "processes": count,
                "images_per_second": rate,
                "speedup": rate / first,
                "efficiency": rate / first * counts[0] / count,
                "data_share": max(0.0, 1 - one_batch / data),
                "communication_share": max(0.0, (one_batch - by_itself) / data) if count > 1 else 0.0,
            }
        )
    return rows


def as_markdown(record: Mapping[str, Any]) -> str:
    """Format the table of a result."""
    settings = record["settings"]
    table = markdown_table(
        ["processes", "images/s", "speed-up", "efficiency", "waiting for data", "communication"],
        [
            [
                str(row["processes"]),
                number(row["images_per_second"]),
                number(row["speedup"]),
                f"{row['efficiency']:.0%}",
                f"{row['data_share']:.0%}",
                f"{row['communication_share']:.0%}",
            ]
            for row in record["result"]
        ],
        text_columns=1,
    )
    return (
        f"# Training on more devices\n\n{run_as_markdown(record['run'])}\n"
        f"{settings['model']}, {settings['precision']}, a batch of {settings['batch']} for each process, crops of "
        f"{settings['crop']}, {settings['workers']} workers for each. Shares are of the time of a step.\n\n{table}"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Images per second of training on 1 to N devices.")
    parser.add_argument("overrides", nargs="*", help="of train.py's configuration, such as model=fpn")
    parser.add_argument("--processes", type=positive_int, nargs="+", help="default: 1, 2, 4, … and all GPUs")
    parser.add_argument("--batch", type=positive_int, default=8, help="for each process; default: %(default)s")
    parser.add_argument("--steps", type=positive_int, default=5, help="of a sample; default: %(default)s")
    parser.add_argument("--rounds", type=positive_int, default=7, help="default: %(default)s")
    parser.add_argument("--accelerator", choices=["auto", "cpu"], default="auto", help="default: %(default)s")
    parser.add_argument("--output", type=Path, default=Path("runs", NAME), help="default: %(default)s")
    options = parser.parse_args(arguments)
    gpus = torch.cuda.device_count() if options.accelerator == "auto" else 0
    counts = sorted(set(options.processes or _numbers(gpus or 2)))
    if gpus and counts[-1] > gpus:
        parser.error(f"--processes {counts[-1]} is more than the {gpus} GPUs of this machine")
    options.output.mkdir(parents=True, exist_ok=True)
    try:
        record = _measure_all(options, counts, cuda=gpus > 0)
    except (EmaSegError, Preempted) as error:
        parser.exit(error.exit_status, f"error: {error}\n")
    write_result(options.output, NAME, record, as_markdown(record))
    print(as_markdown(record))
    print(f"Written to {options.output}.")


def _measure_all(options: argparse.Namespace, counts: Sequence[int], *, cuda: bool) -> dict[str, Any]:
    # Import by module name: the new processes cannot unpickle a function of __main__.
    from bench_scaling import measure as work

    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        composed = compose("train", ["trainer=ddp", *options.overrides])
    config = cast(dict[str, Any], OmegaConf.to_container(composed, resolve=True))
    for key in ("mean", "std"):
        config["data"][key] = config["data"][key] or [0.5, 0.5, 0.5]
    found, run = [], {}
    with tempfile.TemporaryDirectory() as folder:
        for count in counts:
            path = str(Path(folder, f"{count}.json"))
            config["data"]["batch_size"] = count * options.batch
            run_together(work, count, config, cuda, options.steps, options.rounds, path)
            measured = json.loads(Path(path).read_text(encoding="utf-8"))
            found.append(measured["samples"])
            run = measured["run"]
    crop = config["data"]["augmentation"].get("crop") or {}
    return {
        "schema": SCHEMA,
        "run": run,
        "settings": {
            "model": f"{config['model']['decoder']} on {config['model']['encoder']}, {config['attention']['name']}",
            "precision": config["trainer"]["precision"],
            "batch": options.batch,
            "crop": f"{crop.get('height')} x {crop.get('width')}",
            "workers": config["data"]["workers"],
        },
        "samples": found,
        "result": summarise(counts, options.batch, found),
    }


def _numbers(devices: int) -> list[int]:
    """Return the powers of two up to ``devices``, and ``devices`` itself."""
    powers = [2**power for power in range(devices.bit_length()) if 2**power <= devices]
    return sorted({*powers, devices})


if __name__ == "__main__":
    main()
