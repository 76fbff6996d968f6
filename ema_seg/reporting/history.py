"""Curves and skipped samples of a training, for the report of its run."""

from pathlib import Path
from typing import Any

from ema_seg.data import SegmentationDataModule
from ema_seg.data.loading import read_skipped
from ema_seg.reporting.curves import read_metrics

__all__ = ["describe_data", "read_curves"]


def read_curves(run: str | None) -> dict[str, list[float | None]] | None:
    """Read the columns of a run's ``metrics.csv``; return None without a run or without the file."""
    if run is None or not (Path(run) / "metrics.csv").is_file():
        return None
    rows = read_metrics(Path(run))
    columns = dict.fromkeys(key for row in rows for key in row)
    return {column: [row.get(column) for row in rows] for column in columns}


def describe_data(data: SegmentationDataModule, run: str | None) -> dict[str, Any]:
    """Describe the data of a report: data set, folder, split, and the samples skipped here and in the run by split."""
    skipped = {data.evaluation_split: sorted(name for _, name in data.skipped.samples)}
    return {
        "name": data.dataset_name,
        "root": str(data.test_dataset.root),
        "split": data.evaluation_split,
        "skipped": {**_read_skipped_names(run), **skipped},
    }


def _read_skipped_names(run: str | None) -> dict[str, list[str]]:
    """Read the names of the samples that a run skipped, by split."""
    names: dict[str, list[str]] = {}
    for split, name in read_skipped(Path(run) / "skipped.csv") if run is not None else ():
        names.setdefault(split, []).append(name)
    return names
