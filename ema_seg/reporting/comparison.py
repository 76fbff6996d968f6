"""Many runs to one comparison: what differs, by how much, and whether the difference stands up.

A comparison is drawn up from the ``report.json`` files of runs alone, and every table, figure and page of it from
``comparison.json`` alone. ``comparison.json`` is strict JSON; fractions are in [0, 1], times in seconds, memory in
bytes, and null stands for what is not known.

================  ====================================================================================
``schema``        ``"ema-seg.comparison/1"``
``created``       time of writing, ISO 8601 in UTC
``title``         a few words
``folder``        the sweep's folder, or null
``data``          ``name``, ``split``, ``images``
``classes``       the K names
``palette``       K colours
``strata``        what is scored apart, by its name: objects of a size, and groups of classes that the sweep names
``settings``      the keys that differ between the rows, in the order of the columns
``baseline``      the settings that name the baseline, such as {"attention": "none"}; null: no differences
``bootstrap``     ``replicates``, ``confidence``, ``seed``
``rows``          one for each configuration, see ``Row``
``examples``      images on which a row and its baseline disagree most, see ``Disagreement``
``environment``   ``devices``, ``packages`` (versions by name), ``python``, ``commits``: every value that occurs
``notes``         sentences that a reader has to know, such as costs measured on different devices
================  ====================================================================================
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypedDict

from ema_seg.errors import DataError
from ema_seg.reporting.files import Manifest
from ema_seg.texts import read_json

__all__ = [
    "FIGURES",
    "FILES",
    "SIZES",
    "Comparison",
    "Contrast",
    "Curve",
    "Disagreement",
    "Job",
    "Row",
    "Summary",
    "comparison_manifest",
]

FILES = tuple(f"comparison.{suffix}" for suffix in ("json", "csv", "tex", "md", "html"))
FIGURES = tuple(
    f"figures/{name}.{suffix}"
    for name in ("pareto", "differences", "curves", "class_differences", "examples")
    for suffix in ("png", "pdf")
)
"""With ``FILES`` and the pictures in ``examples/`` all that a comparison's folder holds."""

SIZES = ("small", "medium", "large")
"""The strata that are sizes of objects; others are groups of classes."""


class Summary(TypedDict):
    """A number over the seeds: ``values`` in the order of ``seeds`` of the row's finished jobs; sd is null for one."""

    mean: float | None
    sd: float | None
    n: int
    values: list[float | None]


class Contrast(TypedDict):
    """A row's difference to its baseline over the ``n`` seeds that both have finished.

    ``low`` and ``high`` bound the interval; ``covers`` says what it covers: "seeds and images", or "images" where
    there is one seed only, whose interval says nothing about training anew, and whose ``p`` is null.
    """

    baseline: str
    difference: float
    low: float
    high: float
    n: int
    covers: str
    p: float | None
    p_holm: float | None


class Job(TypedDict):
    """One run of a row: ``state`` is "finished", "failed", "pruned", "impossible", "running", "interrupted", "missing".

    ``run`` is its folder (relative to the comparison's ``folder`` if inside), ``reason`` why it is not finished.
    """

    seed: int | None
    state: str
    run: str | None
    reason: str | None


class Curve(TypedDict):
    """A column of ``metrics.csv`` over the epochs: mean, lowest and highest of the seeds that reached the epoch."""

    epoch: list[int]
    mean: list[float]
    low: list[float]
    high: list[float]


class Row(TypedDict):
    """One configuration.

    ``label`` is unique; ``settings`` holds the value of each key that differs; ``classes`` and ``strata`` hold for each
    class name and each stratum ``score`` (a ``Summary`` of its IoU, or of the stratum's mIoU) and ``contrast`` (a
    ``Contrast`` without Holm's correction across them, or null). ``cost`` holds ``images_per_second``, ``latency``,
    ``memory`` (all for batch ``cost_batch_size``), ``parameters`` and ``gmacs``. ``curves`` is by column.
    """

    label: str
    settings: dict[str, Any]
    baseline: bool
    jobs: list[Job]
    seeds: list[int | None]
    miou: Summary
    contrast: Contrast | None
    classes: dict[str, dict[str, Any]]
    strata: dict[str, dict[str, Any]]
    cost: dict[str, Summary]
    cost_batch_size: int | None
    curves: dict[str, Curve]


class Disagreement(TypedDict):
    """An image on which a row differs most from its baseline, ``kind`` "best" (the row wins most) or "worst".

    ``difference`` is the row's mIoU of the image minus the baseline's, meaned over the common seeds; the files show the
    seed ``seed``: paths relative to ``comparison.json`` of ``image``, ``truth``, ``prediction`` and ``baseline`` as
    pictures of one size, each null where it cannot be had.
    """

    row: str
    baseline: str
    kind: str
    name: str
    seed: int | None
    difference: float
    files: dict[str, str | None]


class Comparison(TypedDict):
    """What ``comparison.json`` holds: see the text of this module."""

    schema: str
    created: str
    title: str
    folder: str | None
    data: dict[str, Any]
    classes: list[str]
    palette: list[list[int]]
    strata: dict[str, str]
    settings: list[str]
    baseline: dict[str, Any] | None
    bootstrap: dict[str, Any]
    rows: list[Row]
    examples: list[Disagreement]
    environment: dict[str, Any]
    notes: list[str]


def comparison_manifest(directory: Path) -> Manifest:
    """The files that comparisons have written into a folder."""
    return Manifest(directory, _files_without_manifest)


def _files_without_manifest(directory: Path) -> Iterator[str]:
    """The files of a comparison that is older than manifests."""
    try:
        comparison = read_json(directory / "comparison.json")
        if not str(comparison["schema"]).startswith("ema-seg.comparison/"):
            return
        pictures = [str(file) for example in comparison["examples"] for file in example["files"].values()]
    except (OSError, AttributeError, KeyError, TypeError, DataError):
        return
    yield from (*FILES, *FIGURES)
    yield from (picture for picture in pictures if picture.startswith("examples/"))
