"""Benchmark of the scoring: from the input of a head's last layer to counts, strata and the mask's file.

    python benchmarks/full_size.py <folder>
    python benchmarks/bench_scoring.py <folder> [--camvid <folder>]

The truths are those of the generated validation images at their own size; the logits are made from them with noise, at
the resolution of a decoder's last layer. Two ways take turns in one process, and must give the same counts and files:

* ``strips``: this project's scoring: the classes are found a few rows at a time, and counted in C++;
* ``whole``: the same on all logits at once: upsampling, ``argmax``, ``bincount`` of the labelled pixels, and OpenCV's
  connected components, one class after the other.

``further`` is ``strips`` with the counts of ``evaluation.boundary`` and ``evaluation.calibration``.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from full_size import DATA_SETS
from measuring import (
    Spread,
    describe_run,
    markdown_table,
    number,
    peak_bytes,
    positive_float,
    positive_int,
    ratio,
    run_as_markdown,
    time_in_turns,
    write_result,
)
from torch import Tensor

from ema_seg.data import build_dataset
from ema_seg.evaluation import ConfusionMatrix
from ema_seg.evaluation.boundary import count_boundaries
from ema_seg.evaluation.calibration import classify, count_calibration
from ema_seg.evaluation.strata import count_strata, count_strata_by_class
from ema_seg.inference.classes import most_likely_classes
from ema_seg.inference.masks import encode_mask
from ema_seg.models.head import RowLogits
from ema_seg.runtime.host_memory import keep_freed_memory

SCHEMA = 1
NAME = "bench_scoring"
SCALES = {"fpn": 4, "pspnet": 8}  # decoders by the factor of their last upsampling
IMAGES = 4

Scored = tuple[np.ndarray, dict[str, Any], bytes]
Image = tuple[RowLogits, Tensor]


def read_images(name: str, root: Path, scale: int, device: torch.device) -> list[Image]:
    """Return logits and truths of validation images; the logits are cropped as after padding to the stride."""
    dataset = build_dataset(name, root, "val")
    generator = torch.Generator().manual_seed(0)
    images = []
    for index in range(min(IMAGES, len(dataset))):
        truth = torch.from_numpy(dataset.read_mask(index))
        height, width = truth.shape
        rows, columns = (-(-side // scale) for side in truth.shape)
        small = truth[::scale, ::scale].long()
        classes = dataset.num_classes
        one_hot = torch.nn.functional.one_hot(small.where(small < classes, 0), classes).permute(2, 0, 1)
        logits = 6.0 * one_hot + torch.randn(classes, rows, columns, generator=generator)
        features = logits[None].contiguous(memory_format=torch.channels_last)
        images.append((RowLogits(features.to(device), scale=scale, size=(height, width)), truth))
    return images


def read_palette(name: str, root: Path) -> Sequence[Sequence[int]]:
    """Return the colours of the classes."""
    return build_dataset(name, root, "val").palette


def in_strips(logits: RowLogits, truth: Tensor, palette: Sequence[Sequence[int]]) -> Scored:
    """Score one image as an evaluation does."""
    return _score(most_likely_classes(logits).cpu().numpy(), logits, truth, palette)


def with_further(logits: RowLogits, truth: Tensor, palette: Sequence[Sequence[int]]) -> Scored:
    """Score one image, its boundaries and its probabilities as an evaluation does."""
    ids, certainty = classify(logits, truth)
    prediction, target = ids.cpu().numpy(), truth.numpy()
    count_boundaries(prediction, target, logits.shape[1])
    count_calibration(prediction, target, certainty.confidence.cpu().numpy(), certainty.sums.cpu().numpy())
    return _score(prediction, logits, truth, palette)


def _score(prediction: np.ndarray, logits: RowLogits, truth: Tensor, palette: Sequence[Sequence[int]]) -> Scored:
    confusion = ConfusionMatrix(logits.shape[1])
    confusion.update(prediction, truth.numpy())
    strata = count_strata(prediction, truth.numpy(), logits.shape[1])
    return confusion.matrix.numpy(), dict(strata), encode_mask(prediction, palette)


def whole(logits: RowLogits, truth: Tensor, palette: Sequence[Sequence[int]]) -> Scored:
    """Score one image from all its logits."""
    classes = logits.shape[1]
    prediction = logits.whole()[0].argmax(dim=0)
    device_truth = truth.to(prediction.device)
    labelled = device_truth != 255
    pairs = device_truth[labelled].long() * classes + prediction[labelled]
    matrix = torch.bincount(pairs, minlength=classes**2).view(classes, classes).cpu()
    mask = prediction.byte().cpu().numpy()
    return matrix.numpy(), dict(count_strata_by_class(mask, truth.numpy(), classes)), encode_mask(mask, palette)


def measure(
    images: Sequence[Image], palette: Sequence[Sequence[int]], device: torch.device, budget: float
) -> dict[str, Any]:
    """Measure seconds and peak memory per image, both ways."""
    ways: dict[str, Callable[[RowLogits, Tensor, Sequence[Sequence[int]]], Scored]]
    ways = {"strips": in_strips, "further": with_further, "whole": whole}
    for logits, truth in images:
        (matrix, *rest), *others = (score(logits, truth, palette) for score in ways.values())
        if any(not np.array_equal(matrix, other) or rest != more for other, *more in others):
            raise AssertionError("the ways differ")
    logits, truth = images[0]
    resident = [logits.features, truth]
    peaks = {
        way: peak_bytes(lambda score=score: score(logits, truth, palette), resident, device)
        for way, score in ways.items()
    }
    calls = {
        way: (lambda call, score=score: score(*images[call % len(images)], palette)) for way, score in ways.items()
    }
    samples = time_in_turns(calls, device, budget=budget, min_rounds=3)
    return {
        way: {
            "seconds": Spread.of(samples[way]).as_json(),
            "speedup": ratio(samples["whole"], samples[way]).as_json(),
            "peak": peaks[way],
        }
        for way in ways
    }


def as_markdown(record: Mapping[str, Any]) -> str:
    """Format the results as a table."""
    rows = [
        [
            data,
            decoder,
            *(number(1000 * ways[way]["seconds"]["median"]) for way in ("strips", "whole")),
            number(ways["strips"]["speedup"]["median"]),
            number(1000 * (ways["further"]["seconds"]["median"] - ways["strips"]["seconds"]["median"])),
            *(number(ways[way]["peak"] / 2**20) for way in ("strips", "whole")),
            number(ways["whole"]["peak"] / ways["strips"]["peak"]),
        ]
        for data, by_decoder in record["results"].items()
        for decoder, ways in by_decoder.items()
    ]
    header = [
        "images",
        "last layer of",
        "ms in strips",
        "whole",
        "times as fast",
        "more ms with boundaries and calibration",
        "peak MiB in strips",
        "whole",
        "ratio",
    ]
    return (
        f"# From the input of the last layer to the scores\n\n{run_as_markdown(record['run'])}\n"
        f"{markdown_table(header, rows, text_columns=2)}\nPeak is the memory of PyTorch's tensors beyond the input.\n"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="From the input of the last layer to the scores.")
    parser.add_argument("folder", type=Path, help="folder that benchmarks/full_size.py has written")
    parser.add_argument("--data", nargs="+", choices=DATA_SETS, default=list(DATA_SETS), help="default: all")
    parser.add_argument("--camvid", type=Path, help="folder of CamVid to measure on, too")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    parser.add_argument("--threads", type=positive_int, default=1, help="default: %(default)s")
    parser.add_argument("--budget", type=positive_float, default=10, help="seconds per way (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("runs", NAME), help="default: %(default)s")
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    keep_freed_memory()  # as eval.py does
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    results: dict[str, Any] = {}
    roots = {name: options.folder / DATA_SETS[name] for name in options.data}
    if options.camvid:
        roots["camvid"] = options.camvid
    for name, root in roots.items():
        palette = read_palette(name, root)
        results[name] = {
            decoder: measure(read_images(name, root, scale, device), palette, device, options.budget)
            for decoder, scale in SCALES.items()
        }
    record = {"schema": SCHEMA, "run": describe_run(device), "results": results}
    write_result(options.output, NAME, record, as_markdown(record))
    print(as_markdown(record))
    print(f"Written to {options.output}.")


if __name__ == "__main__":
    main()
