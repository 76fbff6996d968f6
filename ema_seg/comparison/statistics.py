"""Contrasts of configurations: differences to a baseline, corrected for their number, and summaries over seeds.

Their intervals are those of ``ema_seg.evaluation.intervals``.
"""

from collections.abc import Iterable, Sequence

import numpy as np

from ema_seg.comparison.schema import Contrast, Summary
from ema_seg.evaluation.intervals import Estimate

__all__ = ["adjust_holm", "as_contrast", "correct_contrasts", "summarise"]


def as_contrast(estimate: Estimate, baseline: str, seeds: int, of_images: float) -> Contrast:
    """Return an estimate over so many seeds as a contrast to the row ``baseline``, without Holm's correction."""
    difference, low, high, p, covers = estimate
    return Contrast(
        baseline=baseline,
        difference=difference,
        of_images=of_images,
        low=low,
        high=high,
        n=seeds,
        covers=covers,
        p=p,
        p_holm=None,
    )


def correct_contrasts(contrasts: Sequence[Contrast | None]) -> None:
    """Set ``p_holm`` of the contrasts of one score in all rows; see ``adjust_holm``."""
    for contrast, p in zip(contrasts, adjust_holm([one and one["p"] for one in contrasts]), strict=True):
        if contrast is not None:
            contrast["p_holm"] = p


def summarise(values: Iterable[float | None]) -> Summary:
    """Compute mean and standard deviation of the known values; ``values`` keeps None for the others."""
    listed = list(values)
    known = [value for value in listed if value is not None]
    return Summary(
        mean=float(np.mean(known)) if known else None,
        sd=float(np.std(known, ddof=1)) if len(known) > 1 else None,
        n=len(known),
        values=listed,
    )


def adjust_holm(values: Sequence[float | None]) -> list[float | None]:
    """Adjust p-values by Holm's method, which controls the family-wise error rate (Holm 1979).

    Scandinavian Journal of Statistics 6, 65–70: https://www.jstor.org/stable/4615733.

    Args:
        values: p-values; a None takes no part and stays None.

    Returns:
        The adjusted values in the same order: the smallest times their number, the next times one fewer, and so on,
        none below the previous one and none above 1.
    """
    known = sorted((value, index) for index, value in enumerate(values) if value is not None)
    adjusted: list[float | None] = [None] * len(values)
    largest = 0.0
    for rank, (value, index) in enumerate(known):
        largest = max(largest, min(1.0, value * (len(known) - rank)))
        adjusted[index] = largest
    return adjusted
