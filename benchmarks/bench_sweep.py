"""Benchmark of a sweep: overhead of a job beyond its training, compared with single runs.

    python benchmarks/bench_sweep.py

Trains the same few jobs twice on a small generated data set: in one sweep on the serial launcher, and one
``python train.py`` after the other, as a shell loop over overrides does. A job's overhead is the total wall time minus
the time of all epochs in ``metrics.csv``, divided by the number of jobs: the start of Python and of the libraries,
planning, data, model, checkpoints, test, cost measurement (cut to 0.1 s), report, and a share of the sweep's final
comparison, which the loop does not make.
"""

import argparse
import csv
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from measuring import describe_run, markdown_table, number, positive_int, run_as_markdown, write_result

SCHEMA = 1
NAME = "bench_sweep"
ROOT = Path(__file__).resolve().parents[1]
AIM = 3.0  # seconds of overhead per job of a sweep

OVERRIDES = (
    "data=street",
    "data.height=64",
    "data.width=128",
    "data.train_images=16",
    "data.val_images=4",
    "data.test_images=4",
    "data.batch_size=4",
    "data.evaluation_batch_size=2",
    "data.workers=0",
    "data.augmentation.crop.height=64",
    "data.augmentation.crop.width=64",
    "model.encoder_weights=null",
    "epochs=2",
    "logger=none",
    "training.pictures_every=0",
    "evaluation.budget=0.1",
    "trainer=cpu",
)


def train(*overrides: str) -> float:
    """Run ``python train.py`` and return its wall time in seconds."""
    start = time.perf_counter()
    command = [sys.executable, str(ROOT / "train.py"), *overrides]  # -m comes first, if at all
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        sys.exit(f"error: {' '.join(command)} ends with status {done.returncode}:\n{done.stderr}")
    return time.perf_counter() - start


def trained_seconds(folder: Path) -> float:
    """Return the seconds of all epochs of the runs in a folder."""
    seconds = 0.0
    for path in folder.glob("*/metrics.csv"):
        with path.open(newline="") as file:
            seconds += sum(float(row["seconds"]) for row in csv.DictReader(file))
    return seconds


def measure(folder: Path, attention: Sequence[str], seeds: int, overrides: Sequence[str]) -> dict[str, Any]:
    """Measure wall time, time of the epochs and overhead per job, of the sweep and of single runs."""
    jobs = [(block, seed) for seed in range(seeds) for block in attention]
    common = (*OVERRIDES, f"data.root={folder / 'data'}", *overrides)
    train(*common, f"hydra.run.dir={folder / 'first'}")  # generates the data set, and fills the system's caches
    swept = train(
        "-m", *common, f"hydra.sweep.dir={folder / 'sweep'}", f"attention={','.join(attention)}",
        f"seed={','.join(map(str, range(seeds)))}",
    )  # fmt: skip
    single = sum(
        train(*common, f"hydra.run.dir={folder / 'single' / f'{block}{seed}'}", f"attention={block}", f"seed={seed}")
        for block, seed in jobs
    )
    ways = {"one sweep": (swept, folder / "sweep"), "one run after the other": (single, folder / "single")}
    result: dict[str, Any] = {
        way: {
            "seconds": seconds,
            "trained": trained_seconds(place),
            "overhead": (seconds - trained_seconds(place)) / len(jobs),
        }
        for way, (seconds, place) in ways.items()
    }
    return {"jobs": len(jobs), "ways": result, "ratio": single / swept}


def as_markdown(record: dict[str, Any]) -> str:
    """Format the table of a result."""
    result = record["result"]
    table = markdown_table(
        ["", "seconds in all", "of these in epochs", "overhead for a job, s"],
        [
            [way, number(row["seconds"]), number(row["trained"]), number(row["overhead"])]
            for way, row in result["ways"].items()
        ],
        text_columns=1,
    )
    return (
        f"# What a job costs beyond its training\n\n{run_as_markdown(record['run'])}\n"
        f"{result['jobs']} jobs of two epochs{''.join(f', {text}' for text in record['overrides'])}.\n\n{table}\n"
        f"The runs one after the other take {number(result['ratio'])} times as long as the sweep. Aim: at most {AIM:g} "
        "s for a job of a sweep.\n"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="What a job of a sweep costs beyond its training.")
    parser.add_argument("--attention", nargs="+", default=["none", "se", "ema"], help="default: none se ema")
    parser.add_argument("--seeds", type=positive_int, default=4, help="default: %(default)s")
    parser.add_argument("--overrides", nargs="+", default=[], help="further overrides of train.py, such as model=fpn")
    parser.add_argument("--output", type=Path, default=Path("runs", NAME), help="default: %(default)s")
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    run = describe_run(torch.device("cpu"))
    with tempfile.TemporaryDirectory() as folder:
        result = measure(Path(folder), options.attention, options.seeds, options.overrides)
    record = {"schema": SCHEMA, "run": run, "overrides": options.overrides, "result": result}
    write_result(options.output, NAME, record, as_markdown(record))
    print(as_markdown(record))
    print(f"Written to {options.output}.")


if __name__ == "__main__":
    main()
