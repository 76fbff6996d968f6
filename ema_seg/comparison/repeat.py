"""Bitwise comparison of two runs."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ema_seg.models import load_checkpoint
from ema_seg.reporting import load_report
from ema_seg.runtime.errors import EmaSegError
from ema_seg.runtime.texts import read_json, read_rows, read_yaml

__all__ = ["compare_runs", "describe_comparison"]

_CHECKPOINTS = ("best.ckpt", "last.ckpt")
_TIMINGS = ("images_per_second", "seconds")
# Results of an evaluation, without its costs.
_SCORES = ("confusion_matrix", "miou", "iou", "mean_accuracy", "pixel_accuracy", "fw_iou", "size_iou")
_IDENTICAL = "identical"


def compare_runs(original: Path, repeated: Path) -> dict[str, Any]:
    """Compare weights, metrics, scores and environments of two runs of one configuration.

    Args:
        original: the first run's folder; files missing there are not compared.
        repeated: the second run's folder.

    Returns:
        In ``weights``, ``metrics`` and ``scores`` a description of the differences, "identical", or None if the
        original has none; in ``environment`` both values of each entry that differs; in ``original`` its folder.
    """
    return {
        "original": str(original),
        "weights": _compare_weights(original, repeated),
        "metrics": _compare_metrics(original / "metrics.csv", repeated / "metrics.csv"),
        "scores": _compare_scores(original, repeated),
        "environment": _compare_environments(original, repeated),
    }


def describe_comparison(comparison: Mapping[str, Any]) -> tuple[list[str], bool]:
    """Return the comparison as lines of text, and whether all compared weights, metrics and scores are identical."""
    lines = []
    for name in ("weights", "metrics", "scores"):
        found = comparison[name]
        lines.append(f"{name:8} {'not compared: missing in the original' if found is None else found}")
    for key, (before, now) in comparison["environment"].items():
        lines.append(f"         {key} was {before}, is {now}")
    return lines, all(comparison[name] in (None, _IDENTICAL) for name in ("weights", "metrics", "scores"))


def _compare_weights(original: Path, repeated: Path) -> str | None:
    found: list[str] = []
    compared = False
    for name in _CHECKPOINTS:
        path = original / "checkpoints" / name
        if not path.is_file():
            continue
        compared = True
        states = [load_checkpoint(run / "checkpoints" / name)["state_dict"] for run in (original, repeated)]
        found += [f"{name}: {text}" for text in _differences(*states)]
    return None if not compared else "; ".join(found) or _IDENTICAL


def _differences(first: Mapping[str, torch.Tensor], second: Mapping[str, torch.Tensor]) -> Iterator[str]:
    if first.keys() != second.keys():
        yield "the models have different weights"
        return
    differing = [key for key in first if not _is_same(first[key], second[key])]
    if differing:
        largest = max(differing, key=lambda key: _distance(first[key], second[key]))
        distance = _distance(first[largest], second[largest])
        yield f"{len(differing)} of {len(first)} tensors differ, most by {distance:.2g} ({largest})"


def _is_same(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Compare two tensors bit by bit, so that NaN equals itself and 0 differs from -0."""
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    pairs = [tensor.contiguous().view(-1).view(torch.uint8) for tensor in (first, second)]
    return torch.equal(*pairs)


def _distance(first: torch.Tensor, second: torch.Tensor) -> float:
    if first.shape != second.shape:
        return float("inf")
    return float((first.double() - second.double()).abs().max()) if first.numel() else 0.0


def _compare_metrics(original: Path, repeated: Path) -> str | None:
    if not original.is_file():
        return None
    before, now = _rows(original), _rows(repeated)
    if len(before) != len(now):
        return f"{len(before)} epochs, now {len(now)}"
    for first, second in zip(before, now, strict=True):
        for key, value in first.items():
            if value != second.get(key):
                return f"epoch {int(first['epoch']) + 1}: {key} was {value}, is {second.get(key)}"
    return _IDENTICAL


def _rows(path: Path) -> list[dict[str, str]]:
    return [{key: value for key, value in row.items() if key not in _TIMINGS} for row in read_rows(path)]


def _compare_scores(original: Path, repeated: Path) -> str | None:
    try:
        before = _report(original)
    except EmaSegError:
        return None
    now = _report(repeated)
    if all(before[key] == now[key] for key in _SCORES) and _scored(before) == _scored(now):
        return _IDENTICAL
    return f"mIoU was {before['miou']}, is {now['miou']}"


def _report(run: Path) -> dict[str, Any]:
    """Load a run's report from the folder that its configuration names."""
    directory = read_yaml(run / "config.yaml").get("report", {}).get("dir")
    return load_report(Path(directory or run / "report") / "report.json")


def _scored(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [{key: value for key, value in image.items() if key != "prediction"} for image in report["images"]]


def _compare_environments(original: Path, repeated: Path) -> dict[str, tuple[Any, Any]]:
    if not (original / "environment.json").is_file():
        return {}
    before, now = (dict(_flat(read_json(run / "environment.json"))) for run in (original, repeated))
    return {
        key: (before.get(key), now.get(key))
        for key in {**before, **now}
        if key != "command" and before.get(key) != now.get(key)
    }


def _flat(values: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value
