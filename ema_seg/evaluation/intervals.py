"""Statistics of the difference between two configurations: its confidence interval and p-value.

A difference varies with the *training* (another seed gives another model) and with the *images* (another sample from
the same streets gives other scores). The design is crossed, not nested: every seed of every configuration is scored on
the same images. Let n be the number of seeds and N that of images, d(s) the difference of mIoU of two configurations at
seed s, and D the mean of d(s). The variance of D is estimated as the sum of two parts:

* *seeds*: var(d)/n, with n - 1 in the denominator of var. A bootstrap that draws n - 1 of n seeds with replacement,
  the number that makes it unbiased for few seeds (Rao & Wu 1988, https://doi.org/10.1080/01621459.1988.10478591), tends
  to this value; the formula is free of the bootstrap's noise.
* *images*: the variance of D over bootstrap replicates that draw N - 1 of N images with replacement, the same ones for
  all configurations and seeds. A bootstrap is needed because mIoU is not a mean over images: pixels are summed before
  the division, and a class without a pixel in a replicate drops out of its mean.

Drawing seeds and images within one replicate (the pigeonhole bootstrap: Owen 2007,
https://doi.org/10.1214/07-AOAS122) would count the interaction of seeds and images three times; the sum of the two
parts counts it twice. The interval is thus a little too wide rather than too narrow.

The interval is D ± t · √(seeds + images), where t is the quantile of Student's distribution for the degrees of
freedom of a sum of two estimated variances with n - 1 and N - 1 of them (Satterthwaite 1946,
https://doi.org/10.2307/3002019). It is never narrower than the interval of the paired t-test over seeds,
D ± t(n - 1) · √seeds: Satterthwaite's approximation is overconfident where few seeds happen to agree, and the t-test is
exact for another training on the same images. docs/comparison.md compares the coverage of the interval with that of
others in simulations.

Where seeds are added until the interval is narrow, it ends too often at a variance that happens to be small. Of such
sweeps that begin with three seeds, an interval computed at 95 % covers the difference in 90 % at worst, where about ten
seeds are needed. So a *sequential* interval is computed at 98 %, and its p-value is multiplied by 2.5: then the worst
coverage is 95 % again.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtr, stdtrit

__all__ = [
    "SEQUENTIAL",
    "Array",
    "Estimate",
    "add_groups",
    "add_whole",
    "draw_weights",
    "estimate_difference",
    "resample",
    "score_sums",
    "weigh_counts",
]

Array = NDArray[np.float64]

SEQUENTIAL = 0.4
"""Share of the error rate that a sequential interval is computed at."""

# Memory of a chunk of weights; the memory of a chunk's scores grows with it and with the number of jobs.
_CHUNK_BYTES = 2**20


class Estimate(NamedTuple):
    """Difference with its confidence interval, which covers "seeds and images" or only "images" (``covers``).

    ``p`` is the two-sided p-value of no difference; None where the interval does not cover the seeds.
    """

    difference: float
    low: float
    high: float
    p: float | None
    covers: str


def draw_weights(images: int, replicates: int, seed: int) -> Iterator[Array]:
    """Draw how often each image occurs in each replicate of a bootstrap.

    A replicate draws N - 1 of the N images with replacement: then the variance over replicates is unbiased for a mean.

    Args:
        images: N, at least 2.
        replicates: R, the total number.
        seed: the same seed gives the same weights.

    Yields:
        Counts as float64 of shape (r, N), for r of the R replicates at a time.
    """
    generator = np.random.default_rng(seed)
    chunk = max(_CHUNK_BYTES // (8 * images), 1)
    for start in range(0, replicates, chunk):
        rows = min(chunk, replicates - start)
        drawn = generator.integers(images, size=(rows, images - 1)) + images * np.arange(rows)[:, None]
        yield np.bincount(drawn.ravel(), minlength=rows * images).reshape(rows, images).astype(float)


def weigh_counts(weights: Array, counts: Array) -> Array:
    """Sum the images' counts in each replicate.

    This is one matrix product, exact in float64 up to sums of 2^53 pixels.

    Args:
        weights: (r, N), see ``draw_weights``.
        counts: counts of each image, (N, ...).

    Returns:
        The sums, (r, ...).
    """
    return (weights @ counts.reshape(len(counts), -1)).reshape(len(weights), *counts.shape[1:])


def resample(counts: Array, score: Callable[[Array], Array], replicates: int, seed: int) -> Array:
    """Return the scores (R, ...) of bootstrap replicates over images; see ``draw_weights`` and ``weigh_counts``.

    Args:
        counts: counts of each image, (N, ...).
        score: computes scores from the sums of replicates, (r, ...).
        replicates: see ``draw_weights``.
        seed: see ``draw_weights``.
    """
    drawn = draw_weights(len(counts), replicates, seed)
    return np.concatenate([score(weigh_counts(weights, counts)) for weights in drawn])


def add_whole(sums: Array) -> Array:
    """Prepend the sum of the strata, the whole: (..., strata, 2, K) to (..., 1 + strata, 2, K)."""
    return np.concatenate([sums.sum(axis=-3, keepdims=True), sums], axis=-3)


def score_sums(sums: Array) -> Array:
    """Compute the mean IoU and the IoU of each class, by the rules of ``ema_seg.evaluation.ConfusionMatrix``.

    Args:
        sums: pixels of intersection and union of each of K classes, (..., 2, K).

    Returns:
        (..., 1 + K): the mean over the classes that have a union, then the IoU of each; ``nan`` where there is none.
    """
    intersection, union = sums[..., 0, :], sums[..., 1, :]
    has_union = union > 0
    iou = np.divide(intersection, union, out=np.zeros_like(intersection, dtype=float), where=has_union)
    with np.errstate(invalid="ignore"):
        mean = iou.sum(axis=-1) / has_union.sum(axis=-1)
    iou[~has_union] = np.nan
    return np.concatenate([mean[..., None], iou], axis=-1)


def add_groups(scores: Array, groups: Sequence[Sequence[int]]) -> Array:
    """Append the mean IoU of groups of classes to the scores: (..., 1 + K) to (..., 1 + K + groups).

    Args:
        scores: see ``score_sums``.
        groups: class indices of each group; classes without an IoU are left out of its mean.
    """
    means = []
    for group in groups:
        members = scores[..., [1 + index for index in group]]
        scored = np.isfinite(members)
        with np.errstate(invalid="ignore"):
            means.append(np.where(scored, members, 0).sum(axis=-1) / scored.sum(axis=-1))
    return np.stack([*np.moveaxis(scores, -1, 0), *means], axis=-1) if means else scores


def estimate_difference(
    differences: Sequence[float] | Array,
    image_variance: float,
    images: int,
    confidence: float = 0.95,
    *,
    sequential: bool = False,
) -> Estimate:
    """Estimate the mean difference over seeds and its interval; see this module's docstring.

    Args:
        differences: difference of two configurations trained with the same seed, for each of n seeds.
        image_variance: variance of the mean difference over replicates that draw images.
        images: N, at least 2.
        confidence: confidence level of the interval.
        sequential: seeds were added until the interval was narrow.

    Returns:
        The estimate. For one seed its interval covers the images alone. Without any variance, as between copies of
        one run, the interval is a point; for several seeds ``p`` is then 1 if the difference is zero, else 0.
    """
    values = np.asarray(differences, dtype=float)
    seeds, difference = len(values), float(np.mean(values))
    seed_variance = float(np.var(values, ddof=1)) / seeds if seeds > 1 else 0.0
    variance = seed_variance + image_variance
    covers = "seeds and images" if seeds > 1 else "images"
    if variance == 0:
        p = float(difference == 0) if seeds > 1 else None
        return Estimate(difference, difference, difference, p, covers)
    parts = image_variance**2 / (images - 1)
    if seeds > 1:
        parts += seed_variance**2 / (seeds - 1)
    # The squares of very small variances underflow to zero.
    freedom = variance**2 / parts if parts > 0 else float(max(seeds - 1, 1))
    tests = [(variance**0.5, freedom)]
    if seeds > 1:
        tests.append((seed_variance**0.5, float(seeds - 1)))
    error = (1 - confidence) * (SEQUENTIAL if sequential else 1)
    half = max(deviation * float(stdtrit(df, 1 - error / 2)) for deviation, df in tests)
    p = None
    if seeds > 1:
        p = max(2 * float(stdtr(df, -abs(difference) / deviation)) for deviation, df in tests if deviation > 0)
        p = min(1.0, p / SEQUENTIAL) if sequential else p
    return Estimate(difference, difference - half, difference + half, p, covers)
