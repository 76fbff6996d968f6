"""Check of a whole data set: ``python -m ema_seg.data.check cityscapes <root>``.

The command decodes every file of every split and checks sizes, mask values and pairing. It prints a table of class
frequencies per split, how masks and orientation tags were read, and one line per defect. The exit status is 1 if there
is a defect, else 0.
"""

import argparse
import os
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import yaml
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from ema_seg.config import LONGEST_TIMEOUT
from ema_seg.data import DATASETS, build_dataset, find_dataset_class
from ema_seg.data.base import IGNORE_INDEX, MissingSplitError, SegmentationDataset
from ema_seg.data.loading import call_with_timeout, read_each
from ema_seg.runtime.errors import DataError, EmaSegError
from ema_seg.runtime.escaping import for_terminal

__all__ = ["SplitReport", "check_split", "main"]


class _Finding(NamedTuple):
    """Result of checking one pair of files."""

    pixels: NDArray[np.int64]
    """Pixels by train id, 256."""
    defects: list[str]
    notes: list[str]


@dataclass
class SplitReport:
    """Result of checking a split."""

    split: str
    classes: tuple[str, ...]
    images: int
    defects: list[str]
    """One sentence each; empty if the split is sound."""
    pixels: NDArray[np.int64] = field(default_factory=lambda: np.zeros(256, dtype=np.int64))
    """Pixels by train id in all readable masks, 256."""
    images_with: NDArray[np.int64] = field(default_factory=lambda: np.zeros(256, dtype=np.int64))
    """Images that contain the train id, 256."""
    notes: Counter[str] = field(default_factory=Counter)
    """Number of files by the way they were read, where there is a choice."""

    def table(self) -> Table:
        """Return a table of each class's share of the labelled pixels and number of images."""
        labelled = self.pixels[:IGNORE_INDEX].sum()
        table = Table(title=f"{self.split}: {self.images} images", title_justify="left")
        table.add_column("id", justify="right")
        table.add_column("class", no_wrap=True)
        table.add_column("pixels %", justify="right")
        table.add_column("images", justify="right")
        for train_id, name in enumerate(self.classes):
            share = f"{100 * self.pixels[train_id] / labelled:.3f}" if labelled else "-"
            table.add_row(str(train_id), Text(for_terminal(name)), share, str(self.images_with[train_id]))
        ignored = 100 * self.pixels[IGNORE_INDEX] / max(self.pixels.sum(), 1)
        table.caption = f"ignored: {ignored:.3f} % of all pixels, which the percentages above leave out"
        table.caption_justify = "left"
        return table


def _check_pair(dataset: SegmentationDataset, index: int) -> _Finding:
    defects: list[str] = []
    notes: list[str] = []
    pixels = np.zeros(256, dtype=np.int64)
    image = mask = None
    try:
        image = dataset.read_image(index)
    except DataError as error:
        defects.append(str(error))
    if dataset.pairs[index].mask is None:
        return _Finding(pixels, defects, notes)
    try:
        mask = dataset.read_mask(index)
        pixels = np.bincount(mask.ravel(), minlength=256)
        if image is not None:
            dataset.check_sizes(index, image, mask)
        notes = dataset.notes(index)
    except DataError as error:
        defects.append(str(error))
    return _Finding(pixels, defects, notes)


def check_split(
    dataset: SegmentationDataset, workers: int = 0, timeout: float = 300, progress: Progress | None = None
) -> SplitReport:
    """Decode and check every file of a split.

    Args:
        dataset: The split, made with ``allow_unpaired=True``.
        workers: Worker processes; 0 checks in this one.
        timeout: Seconds that the disk may take for the files of a pair.
        progress: Progress display, or None.

    Raises:
        EmaSegError: Reading a pair exceeded the timeout, or the system killed a worker.
    """
    report = SplitReport(dataset.split, dataset.classes, len(dataset), list(dataset.unpaired))
    findings: Any = read_each(dataset, _check_pair, dataset.split, workers=workers, timeout=timeout)
    if progress is not None:
        findings = progress.track(findings, total=len(dataset), description=dataset.split)
    for finding in findings:
        report.pixels += finding.pixels
        report.images_with += finding.pixels > 0
        report.defects += finding.defects
        report.notes.update(finding.notes)
    # Without a readable mask, the defects already say why.
    if (
        report.pixels.any()
        and dataset.split not in dataset.unlabelled_splits
        and (problem := dataset.describe_problem(report.pixels))
    ):
        report.defects.append(problem)
    return report


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    options = _parse(arguments)
    try:
        datasets, defects = call_with_timeout(options.timeout, options.root, lambda: _open_splits(options))
        reports = [_check_with_progress(dataset, options) for dataset in datasets]
    except EmaSegError as error:
        print(for_terminal(str(error)), file=sys.stderr)
        return 1
    console = Console()
    for report in reports:
        console.print(report.table())
        for note, count in sorted(report.notes.items()):
            print(f"{report.split}: {count} {note}")
        defects += report.defects
    # Not the console: it would wrap long lines.
    for defect in defects:
        print(for_terminal(defect))
    print(f"{options.name} at {options.root}: {len(defects) or 'no'} defect{'' if len(defects) == 1 else 's'}")
    return 1 if defects else 0


def _check_with_progress(dataset: SegmentationDataset, options: argparse.Namespace) -> SplitReport:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        return check_split(dataset, options.workers, options.timeout, progress)


def _open_splits(options: argparse.Namespace) -> tuple[list[SegmentationDataset], list[str]]:
    """Open the requested split, or all; return them with the errors of existing splits that fail to open.

    Raises:
        EmaSegError: No split can be opened; this is the first one's error.
    """
    datasets: list[SegmentationDataset] = []
    errors: list[DataError] = []
    for split in [options.split] if options.split else find_dataset_class(options.name).splits:
        try:
            dataset = build_dataset(options.name, options.root, split, allow_unpaired=True, **options.options)
        except DataError as error:
            errors.append(error)
        else:
            datasets.append(dataset)
    if not datasets:
        raise errors[0]
    return datasets, [str(error) for error in errors if not isinstance(error, MissingSplitError)]


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m ema_seg.data.check", description="Verify every file of a data set."
    )
    parser.add_argument("name", choices=sorted(DATASETS), help="the data set")
    parser.add_argument("root", help="its folder or archive")
    parser.add_argument(
        "options",
        nargs="*",
        type=_parse_option,
        metavar="key=value",
        help="the data set's options, such as coarse=true",
    )
    parser.add_argument("--split", help="check this split only")
    parser.add_argument(
        "--workers",
        type=int,
        default=min(os.cpu_count() or 1, 8),
        help="worker processes (default: %(default)s)",
    )
    parser.add_argument(
        "--timeout",
        type=_parse_seconds,
        default=300,
        help="seconds that the disk may take, as data.timeout of a training (default: %(default)s)",
    )
    parsed = parser.parse_intermixed_args(arguments)
    parsed.options = dict(parsed.options)
    return parsed


def _parse_option(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise argparse.ArgumentTypeError(f"must have the form key=value, got {text!r}")
    return key, yaml.safe_load(value)  # the same types as in a config


def _parse_seconds(text: str) -> float:
    seconds = float(text)
    if not 0 < seconds <= LONGEST_TIMEOUT:
        raise argparse.ArgumentTypeError(
            f"must be a number of seconds above 0 and at most {LONGEST_TIMEOUT}, got {text}"
        )
    return seconds


if __name__ == "__main__":
    sys.exit(main())
