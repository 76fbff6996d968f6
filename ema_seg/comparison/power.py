"""Power of a comparison: how many seeds a difference needs, from the variances that a pilot shows.

See ``ema_seg.evaluation.intervals`` for the test. The variance of the mean difference over n seeds is
``seeds / n + images + interaction / n``: ``seeds`` is the variance of the difference between seeds, ``images`` the part
of the images' variance that more seeds do not average out, and ``interaction`` the part that they do. The estimated
variance counts the interaction twice, as ``seeds`` contains it, too.
"""

from collections.abc import Iterable

import numpy as np
from scipy import stats

from ema_seg.comparison.schema import Spread

__all__ = [
    "MOST_SEEDS",
    "find_power",
    "pool_spreads",
    "seeds_needed",
    "seeds_range",
    "smallest_difference",
    "split_variance",
]

MOST_SEEDS = 1000
"""More seeds are not considered."""


def split_variance(seeds: float, mean_of_seeds: float, of_seeds: float, count: int, images: int) -> Spread:
    """Split the variance over images into the part that more seeds average out and the part that they do not.

    Args:
        seeds: variance of the difference between seeds.
        mean_of_seeds: variance over images of the mean difference of ``count`` seeds.
        of_seeds: variance over images of the difference at one seed, the mean over the seeds.
        count: number of seeds, at least 2.
        images: number of images.
    """
    interaction = max(of_seeds - mean_of_seeds, 0.0) * count / (count - 1)
    own = max(mean_of_seeds - interaction / count, 0.0)
    return Spread(seeds=seeds, images=own, interaction=interaction, n=count, degrees=count - 1, of_images=images)


def pool_spreads(spreads: Iterable[Spread]) -> Spread:
    """Average the variances of several differences, weighted by their degrees of freedom."""
    listed = list(spreads)
    weights = [spread["degrees"] for spread in listed]
    seeds, images, interaction = (
        float(np.average([spread[key] for spread in listed], weights=weights))
        for key in ("seeds", "images", "interaction")
    )
    return Spread(
        seeds=seeds,
        images=images,
        interaction=interaction,
        n=max(spread["n"] for spread in listed),
        degrees=sum(weights),
        of_images=listed[0]["of_images"],
    )


def find_power(difference: float, seeds: int, spread: Spread, confidence: float = 0.95) -> float:
    """Return the probability that a difference is significant with so many seeds.

    Args:
        difference: the true difference.
        seeds: n, at least 2.
        spread: the variances.
        confidence: 1 - the significance level, without Holm's correction.
    """
    of_seeds = spread["seeds"] / seeds
    of_images = spread["images"] + spread["interaction"] / seeds
    true = of_seeds + spread["images"]
    if true <= 0:
        return float(difference != 0)
    estimated = of_seeds + of_images
    parts = of_seeds**2 / (seeds - 1) + of_images**2 / max(spread["of_images"] - 1, 1)
    tests = [(estimated, estimated**2 / parts if parts > 0 else seeds - 1), (of_seeds, seeds - 1)]
    shift = abs(difference) / true**0.5
    powers = []
    for variance, freedom in tests:
        limit = float(stats.t.ppf((1 + confidence) / 2, freedom)) * (variance / true) ** 0.5
        other_side = np.nan_to_num(stats.nct.cdf(-limit, freedom, shift))  # scipy has nan for some that are next to 0
        powers.append(float(stats.nct.sf(limit, freedom, shift) + other_side))
    return min(powers)


def seeds_needed(
    difference: float, spread: Spread, power: float = 0.8, confidence: float = 0.95, most: int = MOST_SEEDS
) -> int | None:
    """Return the smallest number of seeds that shows a difference with this power; None if ``most`` do not."""
    low, high = 1, 2
    while find_power(difference, high, spread, confidence) < power:
        if high >= most:
            return None
        low, high = high, min(2 * high, most)
    while high - low > 1:
        middle = (low + high) // 2
        enough = find_power(difference, middle, spread, confidence) >= power
        low, high = (low, middle) if enough else (middle, high)
    return high


def smallest_difference(seeds: int, spread: Spread, power: float = 0.8, confidence: float = 0.95) -> float:
    """Return the smallest difference that so many seeds show with this power."""
    high = 1e-6
    while find_power(high, seeds, spread, confidence) < power:
        high *= 2
    low = high / 2
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if find_power(middle, seeds, spread, confidence) >= power else (middle, high)
    return high


def seeds_range(
    difference: float, spread: Spread, power: float = 0.8, confidence: float = 0.95, coverage: float = 0.8
) -> tuple[int | None, int | None]:
    """Return the seeds needed at both ends of the interval of the variance between seeds, which is chi-squared."""
    degrees = spread["degrees"]
    ends = [degrees / float(stats.chi2.ppf(share, degrees)) for share in ((1 + coverage) / 2, (1 - coverage) / 2)]
    few, many = (
        seeds_needed(difference, {**spread, "seeds": factor * spread["seeds"]}, power, confidence) for factor in ends
    )
    return few, many
