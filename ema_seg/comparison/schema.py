"""Format of a comparison: the keys of ``comparison.json`` and the files beside it.

The numbers of a comparison come from the runs' ``report.json`` files alone; its tables, figures and page are drawn from
``comparison.json`` and the pictures beside it alone. ``comparison.json`` is strict JSON; fractions are in [0, 1], times
in seconds, memory in bytes, and null means unknown.

================  ====================================================================================
``schema``        ``"ema-seg.comparison/2"``
``created``       time of writing, ISO 8601 in UTC
``title``         name of the sweep or the folder, or the names of the runs
``folder``        folder of the sweep or of the runs; null for runs that were named one by one
``data``          ``name``, ``split``, ``images``
``classes``       the K names
``palette``       K colours
``metric``        name of the score that rows and differences are about: ``mIoU``, or another IoU
``strata``        meaning of each separate score by its name: a size of objects, or a group of classes of the sweep
``measures``      the scores beyond the mIoU that all runs have, see ``Measure``
``settings``      the keys that differ between the rows, in the order of the columns
``baseline``      the settings that name the baseline, such as {"attention": "none"}; null: no differences
``bootstrap``     ``replicates``, ``confidence``, ``seed``
``claims``        the sweep's claims with their evidence, see ``Claim``
``rows``          one for each configuration, see ``Row``
``examples``      images on which a row and its baseline disagree most, see ``Disagreement``
``environment``   ``devices``, ``packages`` (versions by name), ``python``, ``commits``: every value that occurs
``notes``         sentences for the reader, such as a warning of costs that were measured on different devices
================  ====================================================================================
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypedDict

from ema_seg.runtime.errors import DataError
from ema_seg.runtime.files import Manifest
from ema_seg.runtime.texts import read_json

__all__ = [
    "FIGURES",
    "FILES",
    "SIZES",
    "SLOWED",
    "Claim",
    "Comparison",
    "Contrast",
    "Curve",
    "Disagreement",
    "Evidence",
    "Job",
    "Measure",
    "Row",
    "Spread",
    "Summary",
    "comparison_manifest",
]

FILES = tuple(f"comparison.{suffix}" for suffix in ("json", "csv", "tex", "md", "html"))
FIGURES = tuple(
    f"figures/{name}.{suffix}"
    for name in ("pareto", "differences", "curves", "class_differences", "further", "examples")
    for suffix in ("png", "pdf")
)
"""With ``FILES``, the manifest and the pictures in ``examples/``, all files of a comparison's folder."""

SLOWED = "†"
"""Mark of costs that were measured while the machine was slower than for other rows."""

SIZES = ("small", "medium", "large")
"""Strata that are sizes of objects; the others are groups of classes."""


class Summary(TypedDict):
    """Mean and standard deviation over seeds.

    ``values`` is in the order of the row's ``seeds``, ``n`` counts the known ones; ``sd`` is null for fewer than two.
    """

    mean: float | None
    sd: float | None
    n: int
    values: list[float | None]


class Contrast(TypedDict):
    """Difference of a row to its baseline over the ``n`` seeds that both have finished.

    ``low`` and ``high`` bound the confidence interval. It covers "seeds and images" (``covers``), or only "images" for
    a single seed: then it says nothing about another training, and ``p`` is null. ``of_images`` is the variance of the
    difference over images.
    """

    baseline: str
    difference: float
    of_images: float
    low: float
    high: float
    n: int
    covers: str
    p: float | None
    p_holm: float | None


class Spread(TypedDict):
    """Variances of a difference, from a pilot of ``n`` seeds and ``of_images`` images.

    ``seeds``: of the difference between seeds, with ``degrees`` of freedom; ``images``: over images, without the part
    that more seeds average out, which is ``interaction`` for one seed. See ``ema_seg.comparison.power``.
    """

    seeds: float
    images: float
    interaction: float
    n: int
    degrees: int
    of_images: int


class Measure(TypedDict):
    """Score beyond the mIoU.

    ``percent``: it is a fraction, shown in percent. ``main``: it stands for its kind where there is room for few.
    """

    label: str
    percent: bool
    higher_is_better: bool
    main: bool


class Job(TypedDict):
    """Run of a row.

    ``state`` is "finished", "failed", "pruned", "impossible", "running", "interrupted" or "missing"; ``run`` is its
    folder (relative to the comparison's ``folder`` if inside), ``reason`` why it is not finished.
    """

    seed: int | None
    state: str
    run: str | None
    reason: str | None


class Curve(TypedDict):
    """Mean, lowest and highest value over seeds of a column of ``metrics.csv``, at the epochs that all of them have."""

    epoch: list[int]
    mean: list[float]
    low: list[float]
    high: list[float]


class Row(TypedDict):
    """Row of a comparison: one configuration.

    ``score`` is that of the comparison's metric. ``spread`` holds the variances of its difference; null for fewer than
    two common seeds. ``seeds_to_decide`` is the number of seeds that would show the difference with a power of 80 % if
    it were the true one; null if it is significant already, or if no number would.

    ``label`` is unique; ``settings`` holds the value of each key that differs. ``classes`` and ``strata`` hold, by
    name, ``score`` (a ``Summary`` of the class's IoU or the stratum's mIoU) and ``contrast`` (a ``Contrast`` without
    Holm's correction, or null); ``further`` holds the same by the key of each of the comparison's ``measures``, with
    Holm's correction over the rows. ``cost`` holds ``images_per_second``, ``latency``, ``memory`` (all three for
    batches of ``cost_batch_size``, which is null if it differs between seeds), ``parameters``, ``gmacs`` and
    ``reference``, seconds of the reference computation beside them; ``slowed`` says that it was slower for this row
    than for others. ``curves`` is by column.
    """

    label: str
    settings: dict[str, Any]
    baseline: bool
    jobs: list[Job]
    seeds: list[int | None]
    score: Summary
    contrast: Contrast | None
    spread: Spread | None
    seeds_to_decide: int | None
    classes: dict[str, dict[str, Any]]
    strata: dict[str, dict[str, Any]]
    further: dict[str, dict[str, Any]]
    cost: dict[str, Summary]
    cost_batch_size: int | None
    slowed: bool
    curves: dict[str, Curve]


class Disagreement(TypedDict):
    """Image on which a row gains most ("best", see ``kind``) or loses most ("worst") against its baseline.

    ``difference`` is the row's mIoU on the image minus the baseline's, averaged over the common seeds. ``files`` holds
    the paths, relative to ``comparison.json``, of ``image``, ``truth``, ``prediction`` and ``baseline`` at the seed
    ``seed``: pictures of one size, null where there is none.
    """

    row: str
    baseline: str
    kind: str
    name: str
    seed: int | None
    difference: float
    files: dict[str, str | None]


class Evidence(TypedDict):
    """Difference that bears on a claim, with its sign turned so that a positive one supports the claim.

    ``contrast`` says which row is over which, ``quantity`` what differs. ``unit`` is "points" (a difference of
    fractions, shown times 100), "%" (a relative difference) or empty. ``p_holm`` is corrected over the claim's evidence
    that ``decides``. An ``exact`` difference has no variance, and no p. ``verdict`` is "supported", "contradicted" or
    "undecided"; ``seeds_more`` is the number of further seeds that would show the difference with a power of 80 %, null
    if that is not known.
    """

    contrast: str
    quantity: str
    unit: str
    difference: float
    low: float
    high: float
    n: int
    p: float | None
    p_holm: float | None
    exact: bool
    decides: bool
    verdict: str
    seeds_more: int | None


class Claim(TypedDict):
    """Claim of a sweep: the sentence, the verdict, the evidence, and what evidence is ``missing``."""

    claim: str
    verdict: str
    seeds_more: int | None
    evidence: list[Evidence]
    missing: list[str]


class Comparison(TypedDict):
    """Content of ``comparison.json``: see this module's docstring."""

    schema: str
    created: str
    title: str
    folder: str | None
    data: dict[str, Any]
    classes: list[str]
    palette: list[list[int]]
    metric: str
    strata: dict[str, str]
    measures: dict[str, Measure]
    settings: list[str]
    baseline: dict[str, Any] | None
    bootstrap: dict[str, Any]
    claims: list[Claim]
    rows: list[Row]
    examples: list[Disagreement]
    environment: dict[str, Any]
    notes: list[str]


def comparison_manifest(directory: Path) -> Manifest:
    """Return the manifest of the files that comparisons have written into a folder."""
    return Manifest(directory, _files_without_manifest)


def _files_without_manifest(directory: Path) -> Iterator[str]:
    """Yield the files of a comparison that was written before there were manifests."""
    try:
        comparison = read_json(directory / "comparison.json")
        if not str(comparison["schema"]).startswith("ema-seg.comparison/"):
            return
        pictures = [str(file) for example in comparison["examples"] for file in example["files"].values()]
    except (OSError, AttributeError, KeyError, TypeError, DataError):
        return
    yield from (*FILES, *FIGURES)
    yield from (picture for picture in pictures if picture.startswith("examples/"))
