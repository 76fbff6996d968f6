"""Tests of the statistics on simulated runs with a known true difference.

The simulation draws the counts that reports hold: pixels of intersection and union per image, class, seed and
configuration. So the tests cover the non-linear mIoU, with classes that are absent from some images.
"""

import itertools
import math
from functools import cache

import numpy as np
import pytest
from scipy import stats

from ema_seg.comparison.statistics import adjust_holm
from ema_seg.evaluation import ConfusionMatrix
from ema_seg.evaluation.intervals import add_groups, draw_weights, estimate_difference, score_sums, weigh_counts

IMAGES = 120
# Standard deviations of the difference in logit of the configurations: over seeds, over images, of the interaction.
BALANCES = {
    "seeds": (0.1, 0.0, 0.0),
    "seeds and a little of all": (0.1, 0.3, 0.3),
    "images": (0.02, 0.8, 0.3),
    "interaction": (0.02, 0.1, 0.8),
    "all": (0.05, 0.5, 0.5),
}


def simulate(rng, seeds, effect, balance, images=IMAGES):
    """Simulate counts (images, 2 configurations, seeds, 2, 5 classes); the last class is in 40 % of the images."""
    seed_effect, image_effect, interaction = balance
    classes = 5
    size = np.floor(rng.gamma(2, 400, (images, classes)) * (rng.random((images, classes)) < [1, 1, 0.9, 0.7, 0.4]))
    ease = rng.normal(0, 0.6, (images, 1)) + np.linspace(1.5, 0, classes)
    shift = effect + rng.normal(0, 1, (images, 1)) * image_effect
    counts = np.empty((images, 2, seeds, 2, classes))
    for configuration, seed in itertools.product((0, 1), range(seeds)):
        noise = rng.normal(0, seed_effect) + rng.normal(0, interaction, (images, 1))
        share = 1 / (1 + np.exp(-ease - (configuration - 0.5) * shift - noise / math.sqrt(2)))
        found = np.floor(size * share)
        counts[:, configuration, seed, 0] = found
        # Missed pixels of a class are predicted as the next class.
        counts[:, configuration, seed, 1] = size + np.roll(size - found, 1, axis=1)
    return counts


@cache
def true_difference(effect, balance):
    """Estimate the expected difference of mIoU from many images and seeds."""
    rng = np.random.default_rng(99)
    differences = []
    for _ in range(20):
        miou = score_sums(simulate(rng, 30, effect, balance, images=2000).sum(axis=0))[..., 0]
        differences.append(np.mean(miou[1] - miou[0]))
    return np.mean(differences)


def analyse(counts, replicates=300, seed=0):
    miou = score_sums(counts.sum(axis=0))[..., 0]
    drawn = []
    for weights in draw_weights(len(counts), replicates, seed):
        scores = score_sums(weigh_counts(weights, counts))[..., 0]
        drawn.append((scores[:, 1] - scores[:, 0]).mean(axis=1))
    return estimate_difference(miou[1] - miou[0], np.concatenate(drawn).var(ddof=1), len(counts))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("balance", "seeds"), [*((name, 3) for name in BALANCES), ("interaction", 2), ("all", 2), ("all", 5)]
)
def test_the_interval_covers_the_truth_as_often_as_it_says(seeds, balance):
    balance = BALANCES[balance]
    truth = true_difference(0.1, balance)
    rng = np.random.default_rng(1)
    estimates = [analyse(simulate(rng, seeds, 0.1, balance), seed=index) for index in range(500)]
    coverage = np.mean([estimate.low <= truth <= estimate.high for estimate in estimates])
    # Two seeds estimate their variance so poorly that the interval must be too wide where that variance is small.
    assert 0.93 <= coverage <= (1.0 if seeds == 2 else 0.99)


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize("balance", [(0.05, 0, 0.5), (0, 0, 1)])
def test_the_same_configuration_twice_rarely_looks_different(seeds, balance):
    rng = np.random.default_rng(2)
    estimates = [analyse(simulate(rng, seeds, 0.0, balance), seed=index) for index in range(1000)]
    assert np.mean([estimate.p < 0.05 for estimate in estimates]) <= 0.05


def test_an_interval_excludes_zero_exactly_where_p_is_below_the_level():
    rng = np.random.default_rng(3)
    estimates = [analyse(simulate(rng, 3, 0.1, BALANCES["all"]), replicates=50, seed=index) for index in range(200)]
    below = [estimate.p < 0.05 for estimate in estimates]
    assert below == [not estimate.low <= 0 <= estimate.high for estimate in estimates]
    assert 10 < sum(below) < 190


def test_seeds_make_the_interval_narrower():
    rng = np.random.default_rng(4)
    widths = {}
    for seeds in (2, 3, 5, 10):
        estimates = [analyse(simulate(rng, seeds, 0.1, BALANCES["all"]), seed=index) for index in range(40)]
        widths[seeds] = np.mean([estimate.high - estimate.low for estimate in estimates])
    assert widths[2] > widths[3] > widths[5] > widths[10]


def test_pairing_removes_what_both_configurations_share():
    counts = simulate(np.random.default_rng(5), 3, 0.1, (0.02, 0.1, 0.1))
    paired = analyse(counts)
    # Permute the images of the second configuration: its scores stay the same, but the pairing is lost.
    apart = counts.copy()
    apart[:, 1] = np.random.default_rng(0).permutation(counts[:, 1])
    unpaired = analyse(apart)
    assert unpaired.difference == pytest.approx(paired.difference)
    assert unpaired.high - unpaired.low > 2 * (paired.high - paired.low)


def literal_replicate(rng, counts, seeds=True):
    """Compute one replicate of the hierarchical bootstrap, drawing and summing image by image."""
    images, _, n = counts.shape[:3]
    chosen = rng.integers(n, size=n - 1) if seeds else range(n)
    sums = np.zeros(counts.shape[1:])
    for image in rng.integers(images, size=images - 1):
        sums += counts[image]
    differences = []
    for seed in chosen:
        mious = []
        for configuration in (0, 1):
            intersection, union = sums[configuration, seed]
            mious.append(np.mean([i / u for i, u in zip(intersection, union, strict=True) if u > 0]))
        differences.append(mious[1] - mious[0])
    return np.mean(differences)


def test_the_image_bootstrap_equals_a_literal_one():
    counts = simulate(np.random.default_rng(6), 3, 0.1, BALANCES["all"], images=12)
    rng = np.random.default_rng(7)
    literal = np.var([literal_replicate(rng, counts, seeds=False) for _ in range(4000)], ddof=1)
    drawn = []
    for weights in draw_weights(12, 4000, seed=1):
        scores = score_sums(weigh_counts(weights, counts))[..., 0]
        drawn.append((scores[:, 1] - scores[:, 0]).mean(axis=1))
    # The variance of 4,000 replicates has a standard error of 2 to 3 %.
    assert np.concatenate(drawn).var(ddof=1) == pytest.approx(literal, rel=0.1)


def test_drawing_seeds_too_adds_their_variance_and_the_interaction_once_more():
    counts = simulate(np.random.default_rng(8), 4, 0.1, (0.3, 0.5, 0.5), images=40)
    rng = np.random.default_rng(9)
    literal = np.var([literal_replicate(rng, counts) for _ in range(6000)], ddof=1)
    miou = score_sums(counts.sum(axis=0))[..., 0]
    seed_variance = (miou[1] - miou[0]).var(ddof=1) / 4
    scores = np.concatenate(
        [score_sums(weigh_counts(weights, counts))[..., 0] for weights in draw_weights(40, 6000, seed=1)]
    )
    covariance = np.cov((scores[:, 1] - scores[:, 0]).T)
    image_variance = covariance.sum() / 4**2
    interaction = (np.trace(covariance) - 4 * image_variance) / 3 / 4
    assert literal == pytest.approx(seed_variance + image_variance + interaction, rel=0.1)


def test_weights_are_draws_of_one_image_fewer_and_follow_the_seed():
    chunks = list(draw_weights(7, 1000, seed=3))
    weights = np.concatenate(chunks)
    assert weights.shape == (1000, 7)
    assert (weights.sum(axis=1) == 6).all()
    assert weights.mean() == pytest.approx(6 / 7)
    assert weights.var(axis=0) == pytest.approx(np.full(7, 6 * 6 / 49), rel=0.15)
    assert np.array_equal(weights, np.concatenate(list(draw_weights(7, 1000, seed=3))))
    assert not np.array_equal(weights, np.concatenate(list(draw_weights(7, 1000, seed=4))))


def test_weights_come_in_chunks_of_bounded_memory():
    chunks = list(draw_weights(100_000, 100, seed=0))
    assert len(chunks) > 1
    assert max(chunk.nbytes for chunk in chunks) <= 2**20
    assert sum(map(len, chunks)) == 100


def test_sums_are_exact_beyond_single_precision():
    counts = np.full((3, 2, 1), 2.0**24 + 1)
    (weights,) = draw_weights(3, 1, seed=0)
    assert weigh_counts(weights, counts).ravel().tolist() == [2 * (2**24 + 1)] * 2


def test_scores_follow_the_confusion_matrix():
    rng = np.random.default_rng(10)
    for _ in range(20):
        matrix = ConfusionMatrix(5)
        matrix.update(rng.integers(0, rng.integers(1, 6), 30), rng.integers(0, rng.integers(1, 6), 30))
        expected = matrix.compute()
        scores = score_sums(np.stack([matrix.intersection, matrix.union]))
        np.testing.assert_allclose(scores, [expected["miou"], *expected["iou"]])
    assert np.isnan(score_sums(np.zeros((2, 3)))).all()


def test_one_seed_covers_images_alone():
    estimate = estimate_difference([0.02], 0.01**2, 500)
    assert estimate.covers == "images"
    assert estimate.p is None
    assert estimate.high == pytest.approx(0.02 + stats.t.ppf(0.975, 499) * 0.01)


def test_copies_of_one_run_do_not_differ():
    assert estimate_difference([0.0, 0.0, 0.0], 0.0, 500) == (0, 0, 0, 1, "seeds and images")
    assert estimate_difference([0.0], 0.0, 500) == (0, 0, 0, None, "images")
    assert estimate_difference([1e-160, 3e-160], 0.0, 500).low < 0


def test_the_interval_is_never_narrower_than_the_t_test_over_seeds():
    values = [0.01, 0.03, 0.02]
    alone = estimate_difference(values, 0.0, 500)
    test = stats.ttest_1samp(values, 0)
    assert alone.p == pytest.approx(test.pvalue)
    assert (alone.low, alone.high) == pytest.approx(tuple(test.confidence_interval()))
    # With a small image variance, Satterthwaite's approximation alone would narrow the interval.
    more = estimate_difference(values, 0.004**2, 500)
    assert more.low <= alone.low
    assert more.p >= alone.p


def test_holm_by_hand():
    assert adjust_holm([0.01, None, 0.04, 0.03, 0.005]) == pytest.approx([0.03, None, 0.06, 0.06, 0.02], nan_ok=True)
    assert adjust_holm([0.9, 0.8]) == [1.0, 1.0]
    assert adjust_holm([]) == []


def test_groups_of_classes_have_the_mean_of_those_that_have_a_score():
    scores = np.array([[0.5, 0.2, 0.4, np.nan], [0.5, np.nan, 0.6, np.nan]])

    with_groups = add_groups(scores, [[0, 1], [2], [1, 2]])

    np.testing.assert_array_equal(with_groups[:, :4], scores)
    np.testing.assert_allclose(with_groups[:, 4:], [[0.3, np.nan, 0.4], [0.6, np.nan, 0.6]])
    assert add_groups(scores, []) is scores


def stopped_sweeps(deviation, of_images, effect, until=0.5, first=3, most=20, sweeps=4000):
    """Simulate sweeps that add seeds until the interval is narrow; return coverage, false positives and mean seeds."""
    rng = np.random.default_rng(5)
    covered, significant, seeds = [], [], []
    for _ in range(sweeps):
        image_part = rng.normal(0, of_images)  # the same for all seeds
        differences = effect + image_part + rng.normal(0, deviation, most)
        # The variance over images is estimated from 100 of them.
        variance = of_images**2 * rng.chisquare(99) / 99
        for count in range(first, most + 1):
            estimate = estimate_difference(differences[:count], variance, 100, sequential=True)
            if (estimate.high - estimate.low) / 2 <= until:
                break
        covered.append(estimate.low <= effect <= estimate.high)
        significant.append(estimate.p < 0.05)
        seeds.append(count)
    return np.mean(covered), np.mean(significant), np.mean(seeds)


@pytest.mark.slow
@pytest.mark.parametrize(("deviation", "of_images"), [(0.5, 0.0), (0.7, 0.0), (0.5, 0.15)])
def test_intervals_stay_honest_where_seeds_are_added_until_they_are_narrow(deviation, of_images):
    covered, false, _ = stopped_sweeps(deviation, of_images, effect=0.0)

    assert covered >= 0.93
    assert false <= 0.05


def test_a_sequential_interval_excludes_zero_exactly_where_p_is_below_the_level():
    for differences in ([0.010, 0.012, 0.011], [0.010, 0.014, 0.005], [0.02, 0.01, 0.0]):
        plain, wider = (estimate_difference(differences, 1e-6, 100, sequential=one) for one in (False, True))
        assert wider.low < plain.low
        assert wider.p == pytest.approx(min(1, 2.5 * plain.p))
        assert (wider.low > 0) == (wider.p < 0.05)
