"""Scores beyond the mIoU, for reports that have them: boundaries, calibration and corruptions.

Each score is a function of counts that are summed over the images, so its intervals are those of the mIoU: see
``ema_seg.evaluation.intervals``.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ema_seg.comparison.schema import Measure
from ema_seg.comparison.statistics import as_contrast, correct_contrasts, summarise
from ema_seg.evaluation.intervals import Array, estimate_difference, resample, score_sums

if TYPE_CHECKING:
    from ema_seg.comparison.compare import Match

__all__ = ["compare_further", "read_further"]

Counts = NDArray[Any]
Further = dict[str, dict[str, Any]]


class _Family(NamedTuple):
    """Scores of one kind.

    Attributes:
        name: key of the images' records that hold the counts.
        title: what to call them.
        setting: the setting of ``eval.py`` that counts them.
        read: counts of each image, (N, ...), from the records of the images and the number of classes.
        score: scores (..., S) of sums (..., counts).
        measures: the S scores of a report by key; empty if it has none.
    """

    name: str
    title: str
    setting: str
    read: Callable[[Sequence[Mapping[str, Any]], int], Counts]
    score: Callable[[Array], Array]
    measures: Callable[[Mapping[str, Any]], dict[str, Measure]]


def read_further(images: Sequence[Mapping[str, Any]], classes: int) -> dict[str, Counts]:
    """Read the counts of all scores that the records of a report's images have, by the family's name."""
    present = [family for family in _FAMILIES if images and all(family.name in image for image in images)]
    return {family.name: family.read(images, classes) for family in present}


def compare_further(
    matches: Sequence["Match"], replicates: int, seed: int, confidence: float, *, sequential: bool = False
) -> tuple[dict[str, Measure], dict[str, Further], list[str]]:
    """Compute the scores and contrasts beyond the mIoU.

    Args:
        matches: the rows of a comparison.
        replicates: see ``compare_matches``.
        seed: see ``compare_matches``.
        confidence: confidence level of the intervals.
        sequential: see ``estimate_difference``.

    Returns:
        The measures by key; by a row's label the scores and contrasts by the key of the measure; and notes on scores
        that only some runs have.
    """
    measures: dict[str, Measure] = {}
    rows: dict[str, Further] = {match.label: {} for match in matches}
    notes = []
    results = [result for match in matches for result in match.results.values()]
    for family in _FAMILIES:
        known = [result for result in results if family.name in result.further]
        if 0 < len(known) < len(results):
            notes.append(
                f"{family.title}: not compared, because only {len(known)} of {len(results)} runs have them; evaluate "
                f"the others with eval.py {family.setting}."
            )
        if not known or len(known) < len(results):
            continue
        own = family.measures(known[0].report)
        if any(list(family.measures(result.report)) != list(own) for result in known):
            notes.append(
                f"{family.title}: not compared, because the runs have them in different forms; evaluate all with one "
                f"version of eval.py {family.setting}."
            )
            continue
        measures |= own
        scored = {id(result): _resample(family, result.further[family.name], replicates, seed) for result in known}
        for match in matches:
            values = [scored[id(result)].exact for result in match.results.values()]
            for place, key in enumerate(own):
                score = summarise(float(value[place]) if np.isfinite(value[place]) else None for value in values)
                rows[match.label][key] = {"score": score, "contrast": None}
            _add_contrasts(match, list(own), scored, rows[match.label], confidence, sequential)
    for key in measures:
        correct_contrasts([row[key]["contrast"] for row in rows.values()])
    return measures, rows, notes


class _Scored(NamedTuple):
    """Scores of a run (S,), of bootstrap replicates over its images (R, S) and of each image (N, S).

    They are ``nan`` where undefined.
    """

    exact: Array
    replicates: Array
    images: Array


def _resample(family: _Family, counts: Counts, replicates: int, seed: int) -> _Scored:
    exact = counts.astype(float)
    drawn = resample(exact, family.score, replicates, seed)
    return _Scored(family.score(exact.sum(axis=0)), drawn, family.score(exact))


def _add_contrasts(
    match: "Match",
    keys: Sequence[str],
    scored: Mapping[int, _Scored],
    row: Further,
    confidence: float,
    sequential: bool,
) -> None:
    if match.baseline is None:
        return
    pairs = [(scored[id(match.results[seed])], scored[id(match.baseline.results[seed])]) for seed in match.common_seeds]
    for place, key in enumerate(keys):
        differences = np.array([ours.exact[place] - theirs.exact[place] for ours, theirs in pairs])
        defined = np.isfinite(differences)
        images = sum(np.isfinite(np.array([one.images[:, place] for pair in pairs for one in pair])).any(axis=0))
        if not defined.any() or images < 2:
            continue
        drawn = np.array([ours.replicates[:, place] - theirs.replicates[:, place] for ours, theirs in pairs])[defined]
        mean = drawn.mean(axis=0)
        variance = float(np.var(mean[np.isfinite(mean)], ddof=1))
        estimate = estimate_difference(differences[defined], variance, int(images), confidence, sequential=sequential)
        row[key]["contrast"] = as_contrast(estimate, match.baseline.label, int(defined.sum()), variance)


def _read_boundaries(images: Sequence[Mapping[str, Any]], classes: int) -> Counts:
    """Return the counts (N, 1 + distances, 2, K): of the boundaries, then of each band of the trimap."""
    rows = [
        [[image["boundary"]["intersection"], image["boundary"]["union"]], *image["boundary"]["trimap"]]
        for image in images
    ]
    return np.array(rows, np.float32)


def _boundary_measures(report: Mapping[str, Any]) -> dict[str, Measure]:
    if "boundary_miou" not in report:
        return {}
    measures = {"boundary_miou": Measure(label="boundary mIoU", percent=True, higher_is_better=True, main=True)}
    for distance in report["trimap"]["distances"]:
        label = f"mIoU up to {distance} px from a boundary"
        measures[f"trimap_{distance}"] = Measure(label=label, percent=True, higher_is_better=True, main=False)
    return measures


def _read_calibration(images: Sequence[Mapping[str, Any]], classes: int) -> Counts:
    """Return the counts (N, 3, bins + 1): pixels, confidence and correct ones by bin; then pixels, nll and Brier."""
    rows = []
    for image in images:
        counts = image["calibration"]
        total = [sum(counts["pixels"]), counts["nll"], counts["brier"]]
        bins = [counts[key] for key in ("pixels", "confidence", "correct")]
        rows.append([[*values, last] for values, last in zip(bins, total, strict=True)])
    return np.array(rows, float)


def _score_calibration(sums: Array) -> Array:
    pixels = sums[..., 0, -1]
    with np.errstate(invalid="ignore", divide="ignore"):
        ece = np.abs(sums[..., 2, :-1] - sums[..., 1, :-1]).sum(axis=-1) / pixels
        return np.stack([ece, sums[..., 1, -1] / pixels, sums[..., 2, -1] / pixels], axis=-1)


def _calibration_measures(report: Mapping[str, Any]) -> dict[str, Measure]:
    if "ece" not in report:
        return {}
    return {
        "ece": Measure(label="expected calibration error", percent=True, higher_is_better=False, main=True),
        "nll": Measure(label="negative log-likelihood", percent=False, higher_is_better=False, main=True),
        "brier": Measure(label="Brier score", percent=False, higher_is_better=False, main=True),
    }


def _read_corruptions(images: Sequence[Mapping[str, Any]], classes: int) -> Counts:
    """Return the counts (N, 1 + kinds, severities, 2, K); first those of the image itself, for all severities."""
    kinds = list(images[0]["corruptions"])
    severities = len(images[0]["corruptions"][kinds[0]])
    counts = np.zeros((len(images), 1 + len(kinds), severities, 2, classes), np.float32)
    for row, image in zip(counts, images, strict=True):
        row[0] = [image["intersection"], image["union"]]
        for place, kind in enumerate(kinds, 1):
            for severity, (present, intersection, union) in enumerate(image["corruptions"][kind]):
                row[place, severity][:, present] = intersection, union
    return counts


def _score_corruptions(sums: Array) -> Array:
    miou = score_sums(sums)[..., 0].mean(axis=-1)  # over severities
    clean, kinds = miou[..., 0], miou[..., 1:]
    mean = kinds.mean(axis=-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.concatenate([np.stack([mean, 1 - mean / clean], axis=-1), kinds], axis=-1)


def _corruption_measures(report: Mapping[str, Any]) -> dict[str, Measure]:
    if "corruptions" not in report:
        return {}
    measures = {
        "corrupted_miou": Measure(label="mIoU, corrupted", percent=True, higher_is_better=True, main=True),
        "corruption_drop": Measure(label="lost by corruption", percent=True, higher_is_better=False, main=True),
    }
    for kind in report["corruptions"]:
        measures[kind] = Measure(label=f"mIoU, {kind}", percent=True, higher_is_better=True, main=False)
    return measures


_FAMILIES = (
    _Family(
        "boundary",
        "Boundaries",
        "evaluation.boundary=true",
        _read_boundaries,
        lambda sums: score_sums(sums)[..., 0],
        _boundary_measures,
    ),
    _Family(
        "calibration",
        "Calibration",
        "evaluation.calibration=true",
        _read_calibration,
        _score_calibration,
        _calibration_measures,
    ),
    _Family(
        "corruptions",
        "Corruptions",
        "evaluation.corruptions=standard",
        _read_corruptions,
        _score_corruptions,
        _corruption_measures,
    ),
)
