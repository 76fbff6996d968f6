"""Effects of interventions: differences of scores to those of the model itself, with intervals over images."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ema_seg.evaluation.intervals import Array, add_whole, estimate_difference, resample, score_sums
from ema_seg.evaluation.strata import STRATA

__all__ = ["MEASURES", "Effects", "estimate_over_images", "is_decided", "score_counts"]

MEASURES = {"miou": "mIoU", "boundary_miou": "boundary mIoU", **{name: f"mIoU, {name} objects" for name in STRATA}}
"""Scores of an analysis beside the IoU of each class: what to call them, by key."""

Difference = dict[str, float] | None


def score_counts(counts: NDArray[np.int32]) -> dict[str, Any]:
    """Compute the scores of counts (N, 4, 2, K), see ``Outcome``: by the keys of ``MEASURES``, and ``iou`` by class."""
    scores = [float(score) if np.isfinite(score) else None for score in _score(counts.sum(axis=0, dtype=np.float64))]
    return {**dict(zip(MEASURES, scores, strict=False)), "iou": scores[len(MEASURES) :]}


class Effects:
    """Compares outcomes with that of the model itself on the same images.

    Args:
        counts: counts of the model itself, (N, 4, 2, K), see ``Outcome``; N is at least 2.
        replicates: number of bootstrap replicates over images, the same for all outcomes.
        seed: seed of the bootstrap.
    """

    def __init__(self, counts: NDArray[np.int32], replicates: int, seed: int) -> None:
        self._bootstrap = replicates, seed
        self._own = counts
        self._drawn = self._resample(counts)

    def of(self, counts: NDArray[np.int32]) -> dict[str, Any]:
        """Return the differences of an outcome: ``differences`` by the keys of ``MEASURES``, and ``classes``.

        Each is ``difference`` with the bounds ``low`` and ``high`` of its 95 % interval over the images; None where
        fewer than two images have a score.
        """
        exact = _score(counts.sum(axis=0, dtype=np.float64)) - _score(self._own.sum(axis=0, dtype=np.float64))
        drawn = self._resample(counts) - self._drawn
        both = (self._own + counts).sum(axis=2) > 0  # (N, 4, K)
        sizes = both[:, :3]
        scored = [sizes.any(axis=1), both[:, 3], *(sizes[:, place] for place in range(len(STRATA)))]
        images = [*(int(one.any(axis=1).sum()) for one in scored), *sizes.any(axis=1).sum(axis=0).tolist()]
        found = [estimate_over_images(*values) for values in zip(exact, drawn.T, images, strict=True)]
        return {
            "differences": dict(zip(MEASURES, found, strict=False)),
            "classes": found[len(MEASURES) :],
        }

    def _resample(self, counts: NDArray[np.int32]) -> Array:
        return resample(counts.astype(float), _score, *self._bootstrap)


def _score(sums: Array) -> Array:
    """Return the scores of sums (..., 4, 2, K): (..., M + K), the measures and the IoU of each class."""
    sizes = score_sums(add_whole(sums[..., :3, :, :]))
    boundary = score_sums(sums[..., 3, :, :])[..., :1]
    return np.concatenate([sizes[..., 0, :1], boundary, sizes[..., 1:, 0], sizes[..., 0, 1:]], axis=-1)


def estimate_over_images(difference: float, drawn: Array, images: int) -> Difference:
    """Return a difference with its 95 % interval over images; None where fewer than two images have it.

    Args:
        difference: the difference over all images.
        drawn: that of bootstrap replicates, ``nan`` where undefined.
        images: number of images behind it.
    """
    drawn = drawn[np.isfinite(drawn)]
    if not np.isfinite(difference) or images < 2 or len(drawn) < 2:
        return None
    estimate = estimate_difference([difference], float(np.var(drawn, ddof=1)), images)
    return {"difference": estimate.difference, "low": estimate.low, "high": estimate.high}


def is_decided(difference: Mapping[str, float] | None) -> bool:
    """Return whether the interval excludes zero."""
    return difference is not None and (difference["low"] > 0 or difference["high"] < 0)
