"""Benchmark of a comparison: time from a hundred reports to tables, figures and page.

    python benchmarks/bench_comparison.py
    python benchmarks/bench_comparison.py --classes 150 --images 2000

Writes a sweep of made-up runs (``--configurations`` times ``--seeds`` report.json files of ``--images`` images) into a
temporary folder and compares it: first the stages one by one in this process, then the user's command as a whole,
start of Python included. The rival of the statistics is the literal bootstrap: it draws images with
``numpy.random.Generator.choice`` and adds up their counts one by one, in a few replicates of the same runs. The
benchmark checks that both give the same scores for the same draws.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import describe_run, markdown_table, number, positive_int, run_as_markdown, write_result

from ema_seg.comparison.compare import REPLICATES, compare_runs, match_runs
from ema_seg.comparison.files import write_comparison
from ema_seg.comparison.pictures import draw_examples
from ema_seg.comparison.runs import Result, read_folder
from ema_seg.evaluation import STRATA, ConfusionMatrix, Evaluation
from ema_seg.evaluation.intervals import add_whole, draw_weights, score_sums, weigh_counts
from ema_seg.inference.masks import encode_mask
from ema_seg.reporting import build_report

SCHEMA = 1
NAME = "bench_comparison"
EPOCHS = 50
AIM = 30.0  # seconds, for the default sweep on two cores


def write_sweep(folder: Path, *, configurations: int, seeds: int, images: int, classes: int) -> None:
    """Write a sweep of made-up runs: blocks that differ a little, on images with about half of the classes each."""
    rng = np.random.default_rng(0)
    size = np.floor(rng.gamma(1, 3000, (images, 1, classes)) * (rng.random((images, 1, classes)) < 0.5))
    # Most pixels belong to large objects.
    shares = np.array([0.1, 0.2, 0.7])[:, None]
    ease = rng.normal(1.5, 0.6, (images, 1, 1)) + rng.normal(0, 0.5, (1, 1, classes))
    truth = size.sum(axis=(0, 1))
    palette = rng.integers(0, 256, (classes, 3)).tolist()
    (folder / "mask.png").write_bytes(encode_mask(rng.integers(0, classes, (256, 512)), palette))
    jobs = []
    for configuration in range(configurations):
        attention = "none" if configuration == 0 else f"block{configuration:02d}"
        effect = 0.0 if configuration == 0 else rng.normal(0.05, 0.05)
        for seed in range(seeds):
            noise = rng.normal(0, 0.03) + rng.normal(0, 0.3, (images, 1, 1))
            found = np.floor(size * shares / (1 + np.exp(-ease - effect - noise)))
            missed = np.floor(size * shares) - found
            union = found + missed + np.roll(missed, 1, axis=2)
            name = f"{attention}_seed{seed}"
            jobs.append({"identity": name, "folder": name, "overrides": {"attention": attention, "seed": str(seed)}})
            report = _report(attention, seed, found, union, truth, palette)
            path = folder / name / "report" / "report.json"
            path.parent.mkdir(parents=True)
            path.write_text(json.dumps(report), encoding="utf-8")
    plan = {"schema": "ema-seg.sweep/1", "name": NAME, "command": sys.argv, "baseline": {"attention": "none"}}
    (folder / "sweep.json").write_text(json.dumps(plan | {"jobs": jobs}), encoding="utf-8")


def _report(
    attention: str, seed: int, found: np.ndarray, union: np.ndarray, truth: np.ndarray, palette: list[list[int]]
) -> dict[str, Any]:
    """Build a report from counts (images, strata, classes)."""
    classes = found.shape[2]
    confusion = ConfusionMatrix(classes)
    right = found.sum(axis=(0, 1))
    confusion.matrix += torch.from_numpy(np.diag(right).astype(np.int64))
    # Missed pixels are predicted as the next class: the rows must add up to the same truth in every run.
    confusion.matrix += torch.from_numpy(np.roll(np.diag(truth - right), 1, axis=1).astype(np.int64))
    whole = np.stack([found.sum(axis=1), union.sum(axis=1)], axis=1)
    miou = score_sums(whole)[:, 0].tolist()
    records: list[Any] = [
        {
            "name": f"city/{index:06d}",
            "miou": miou[index],
            "pixel_accuracy": 0.5,
            "intersection": whole[index, 0].astype(int).tolist(),
            "union": whole[index, 1].astype(int).tolist(),
            "strata": {
                name: {
                    "intersection": found[index, stratum].astype(int).tolist(),
                    "union": union[index, stratum].astype(int).tolist(),
                }
                for stratum, name in enumerate(STRATA)
            },
        }
        for index in range(len(found))
    ]
    forward = {
        "batch_size": 8,
        "images_per_second": 50.0,
        "latency": {"median": 0.16, "p95": 0.2},
        "peak_memory": 2**28,
    }
    environment = {"python": "3", "packages": {"torch": "2"}, "threads": 2, "git": None}
    return build_report(
        Evaluation(confusion, records),
        {
            "parameters": {"total": 5_000_000, "trainable": 5_000_000},
            "gmacs": 2.4,
            "throughput": {
                "device": "none",
                "precision": "32-true",
                "memory_format": "channels_last",
                "size": [256, 512],
                "forward": [forward],
            },
        },
        classes=[f"class {index}" for index in range(classes)],
        palette=palette,
        data={"name": "made up", "root": "/nowhere", "split": "val"},
        model={"decoder": "unet"},
        attention={"name": attention},
        environment=environment,
        config={"seed": seed, "attention": {"name": attention}},
        curves={
            column: (np.arange(EPOCHS) if column == "epoch" else np.linspace(0, 1, EPOCHS) + 0.01 * seed).tolist()
            for column in ("epoch", "train/loss", "val/miou")
        },
        predictions=["../../mask.png"] * len(found),
    )


def literal_scores(rng: np.random.Generator, counts: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """Compute one bootstrap replicate image by image; return the drawn images and the scores of every run."""
    images, runs = counts.shape[:2]
    drawn = rng.choice(images, size=images - 1, replace=True)
    scores = []
    for run in range(runs):
        sums = np.zeros(counts.shape[2:])
        for image in drawn:
            sums += counts[image, run]
        scores.append(score_sums(add_whole(sums)))
    return drawn, scores


def measure_statistics(results: Sequence[Result], literal_replicates: int) -> dict[str, Any]:
    """Measure the seconds per bootstrap replicate of all runs, as matrix products and literally.

    Raises:
        AssertionError: the two bootstraps give different scores.
    """
    counts = np.stack([result.counts for result in results], axis=1).astype(float)
    start = time.perf_counter()
    for weights in draw_weights(len(counts), REPLICATES, seed=0):
        score_sums(add_whole(weigh_counts(weights, counts)))
    ours = (time.perf_counter() - start) / REPLICATES

    rng = np.random.default_rng(0)
    start = time.perf_counter()
    replicates = [literal_scores(rng, counts) for _ in range(literal_replicates)]
    literal = (time.perf_counter() - start) / literal_replicates
    for drawn, scores in replicates:
        weights = np.bincount(drawn, minlength=len(counts))[None].astype(float)
        np.testing.assert_array_equal(score_sums(add_whole(weigh_counts(weights, counts)))[0], scores)
    return {"seconds_per_replicate": ours, "literal_seconds_per_replicate": literal, "ratio": literal / ours}


def measure(folder: Path, literal_replicates: int) -> dict[str, Any]:
    """Measure the seconds of each stage, of the whole command, and of the literal bootstrap."""
    seconds: dict[str, float] = {}

    def timed(stage: str, function: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        value = function()
        seconds[stage] = time.perf_counter() - start
        return value

    output = folder / "comparison"
    runs = timed("read", lambda: read_folder(folder))
    comparison = timed("statistics", lambda: compare_runs(runs))
    matches = match_runs(runs).rows
    comparison["examples"], _ = timed("pictures", lambda: draw_examples(comparison["examples"], matches, output))
    timed("figures, tables and page", lambda: write_comparison(comparison, output))
    command = [sys.executable, "-m", "ema_seg.comparison", str(folder), "--output", str(folder / "again")]
    timed("whole command", lambda: subprocess.run(command, check=True, capture_output=True))
    results = [run.result for run in runs.runs if run.result is not None]
    return {"seconds": seconds, "bootstrap": measure_statistics(results, literal_replicates)}


def as_markdown(record: dict[str, Any]) -> str:
    """Format the table of a result."""
    return "\n".join(_lines(record))


def _lines(record: dict[str, Any]) -> Iterator[str]:
    settings, result = record["settings"], record["result"]
    yield "# From reports to their comparison\n"
    yield run_as_markdown(record["run"])
    yield (
        f"{settings['configurations']} configurations × {settings['seeds']} seeds, {settings['images']} images, "
        f"{settings['classes']} classes, {REPLICATES:,} replicates.\n"
    )
    yield markdown_table(
        ["stage", "seconds"],
        [[stage, number(value)] for stage, value in result["seconds"].items()],
        text_columns=1,
    )
    bootstrap = result["bootstrap"]
    yield (
        f"The bootstrap as matrix products: {number(1000 * bootstrap['seconds_per_replicate'])} ms for a replicate of "
        f"all runs; drawn and added up image by image: {number(1000 * bootstrap['literal_seconds_per_replicate'])} ms, "
        f"{bootstrap['ratio']:.0f} times as long, with the same scores."
    )
    whole = result["seconds"]["whole command"]
    yield f"Aim: {AIM:g} s for 20 × 5 runs of 500 images and 19 classes on 2 cores; here {number(whole)} s.\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Time from the reports of a sweep to their comparison.")
    for name, default in (("configurations", 20), ("seeds", 5), ("images", 500), ("classes", 19)):
        parser.add_argument(f"--{name}", type=positive_int, default=default, help="default: %(default)s")
    parser.add_argument("--literal", type=positive_int, default=3, help="replicates of the rival; default: %(default)s")
    parser.add_argument("--output", type=Path, default=Path("runs", NAME), help="default: %(default)s")
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    settings = {name: getattr(options, name) for name in ("configurations", "seeds", "images", "classes")}
    with tempfile.TemporaryDirectory() as folder:
        write_sweep(Path(folder), **settings)
        run = describe_run(torch.device("cpu"))
        record = {
            "schema": SCHEMA,
            "run": run,
            "settings": settings,
            "result": measure(Path(folder), options.literal),
        }
    write_result(options.output, NAME, record, as_markdown(record))
    print(as_markdown(record))
    print(f"Written to {options.output}.")


if __name__ == "__main__":
    main()
