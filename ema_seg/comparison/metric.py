"""Metric of a comparison: another IoU than that of all pixels and classes, over runs that are there already.

The counts of the metric take the place of those of the images, so that all statistics, tables and figures are about it.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ema_seg.comparison.pictures import open_dataset
from ema_seg.comparison.runs import Result, Runs
from ema_seg.data.source import IMAGE_FORMATS
from ema_seg.evaluation.intervals import score_sums
from ema_seg.runtime.errors import ConfigError, DataError, EmaSegError, did_you_mean, one_line
from ema_seg.runtime.progress import track

__all__ = ["with_metric"]

_BOUNDARY = "boundary_iou"


def with_metric(runs: Runs, metric: str) -> Runs:
    """Return runs whose scores are those of a metric.

    Args:
        runs: the runs.
        metric: ``miou``; ``boundary_iou``, which is counted from predictions and truth where a report lacks it; the
            name of a group of classes of the sweep; or a list of classes, as in ``[pole,sign symbol]``.

    Raises:
        ConfigError: there is no such metric or class.
        DataError: a report lacks the boundaries, and its predictions or the data cannot be read.
    """
    if metric == "miou":
        return runs
    first = next(run.result for run in runs.runs if run.result is not None)
    if metric == _BOUNDARY:
        counted = [run if run.result is None else replace(run, result=_boundaries(run.result)) for run in runs.runs]
        return replace(runs, runs=counted, metric="boundary mIoU")
    names = _classes_of(metric, runs.groups, first.report["classes"])
    chosen = [replace(run, result=run.result and _of_classes(run.result, names)) for run in runs.runs]
    label = metric if metric in runs.groups else ", ".join(names)
    return replace(runs, runs=chosen, metric=f"mIoU of {label}")


def _classes_of(metric: str, groups: Mapping[str, Sequence[str]], classes: Sequence[str]) -> list[str]:
    listed = None if metric in groups else re.fullmatch(r"\[(.+)\]", metric)
    if not listed and metric not in groups:
        known = ["miou", _BOUNDARY, *groups]
        raise ConfigError(
            f"metric={metric}: must be one of {', '.join(known)}, or a list of classes, such as "
            f"[{','.join(classes[:2])}].{did_you_mean(metric, known)}"
        )
    names = [name.strip() for name in listed[1].split(",")] if listed else list(groups[metric])
    for name in names:
        if listed and name not in classes:
            raise ConfigError(
                f"metric={metric}: must list classes of the data, got {name!r}; choose from {', '.join(classes)}."
                f"{did_you_mean(name, classes)}"
            )
    found = [name for name in names if name in classes]
    if not found:
        raise ConfigError(f"metric={metric}: the data has none of its classes ({', '.join(names)}); choose another.")
    return found


def _of_classes(result: Result, names: Sequence[str]) -> Result:
    """Set the counts of all other classes to zero."""
    kept = np.array([name in names for name in result.report["classes"]])
    return _with_counts(result, np.where(kept, result.counts, 0), result.report["strata"])


def _boundaries(result: Result) -> Result:
    if "boundary" in result.further:
        counts = result.further["boundary"][:, :1].astype(np.int32)
    else:
        counts = _count_again(result)
    return _with_counts(result, counts, {})


def _with_counts(result: Result, counts: NDArray[np.int32], strata: Mapping[str, str]) -> Result:
    """Return a result with the counts (N, strata, 2, K) and their scores; without strata there is one."""
    whole = counts.sum(axis=1)
    mean, *iou = score_sums(whole.sum(axis=0).astype(float)).tolist()
    of_strata = score_sums(counts.sum(axis=0).astype(float))[:, 0].tolist()
    report = {
        **result.report,
        "miou": _defined(mean),
        "iou": [_defined(value) for value in iou],
        "strata": strata,
        "size_miou": {name: _defined(value) for name, value in zip(strata, of_strata, strict=False)},
    }
    return replace(result, report=report, counts=counts, miou=score_sums(whole.astype(float))[:, 0])


def _defined(value: float) -> float | None:
    return None if np.isnan(value) else value


def _count_again(result: Result) -> NDArray[np.int32]:
    """Count the boundaries of the predicted masks that lie beside a report."""
    from ema_seg.evaluation.boundary import count_boundaries  # imports OpenCV

    data = result.report["data"]
    advice = "evaluate the run with eval.py evaluation.boundary=true"
    try:
        dataset = open_dataset(data, result.report["config"].get("data", {}))
    except (EmaSegError, OSError) as error:
        raise DataError(
            f"{result.path}: has no boundary scores, and its data cannot be read ({one_line(error).rstrip('.')}); "
            f"{advice}."
        ) from error
    places = {dataset.name(index): index for index in range(len(dataset))}
    classes = len(result.report["classes"])
    counts = np.zeros((len(result.names), 1, 2, classes), np.int32)
    images = list(zip(result.names, result.predictions, strict=True))
    for row, (name, path) in zip(counts, track(images, str(result.path.parent), shown=True), strict=True):
        if path is None or name not in places:
            raise DataError(f"{result.path}: has no boundary scores, and no prediction or truth of {name}; {advice}.")
        try:
            with Image.open(result.path.parent / path, formats=IMAGE_FORMATS) as mask:
                prediction = np.asarray(mask)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise DataError(f"{result.path.parent / path}: cannot be read ({one_line(error)}); {advice}.") from error
        truth = dataset.read_mask(places[name])
        if prediction.shape != truth.shape:
            raise DataError(
                f"{result.path.parent / path}: the mask has the shape {prediction.shape}, expected {truth.shape} as "
                f"its truth; {advice}."
            )
        found: Any = count_boundaries(prediction, truth, classes)
        row[0] = found["intersection"], found["union"]
    return counts
