"""Tests of the differences of an intervention and their intervals."""

import numpy as np
import pytest

from ema_seg.analysis.effects import MEASURES, Effects, is_decided, score_counts
from ema_seg.analysis.interventions import count_masks
from ema_seg.evaluation.boundary import count_boundaries, score_boundaries
from ema_seg.evaluation.strata import count_strata, score_strata


def counts_of(masks, truths, classes=3):
    return np.stack([count_masks(mask, truth, classes) for mask, truth in zip(masks, truths, strict=True)])


@pytest.fixture(scope="module")
def masks():
    """Make truths of 12 images with objects of two sizes, predictions with some errors, and others with more."""
    rng = np.random.default_rng(0)
    truths = np.zeros((12, 60, 80), np.uint8)
    truths[:, 20:, :50] = 1
    for truth in truths:
        row, column = rng.integers(0, 40, 2)
        truth[row : row + 12, column : column + 12] = 2
    truths[:, :2] = 255
    own, worse = (
        np.where(rng.random(truths.shape) < share, rng.integers(3, size=truths.shape), truths) for share in (0.1, 0.3)
    )
    return np.where(own == 255, 0, own), np.where(worse == 255, 0, worse), truths


def test_scores_are_those_of_the_evaluation(masks):
    own, _, truths = masks
    strata = [count_strata(mask, truth, 3) for mask, truth in zip(own, truths, strict=True)]
    boundaries = [count_boundaries(mask, truth, 3) for mask, truth in zip(own, truths, strict=True)]

    scores = score_counts(counts_of(own, truths))

    assert scores["boundary_miou"] == pytest.approx(score_boundaries(boundaries)["boundary_miou"])
    for name, values in score_strata(strata, 3).items():
        expected = np.nanmean(values) if np.isfinite(values).any() else None
        assert scores[name] == (None if expected is None else pytest.approx(expected))
    iou = [
        ((own == index) & (truths == index)).sum() / (((own == index) | (truths == index)) & (truths != 255)).sum()
        for index in range(3)
    ]
    assert scores["iou"] == pytest.approx(iou)
    assert scores["miou"] == pytest.approx(np.mean(iou))


def test_the_interval_is_that_of_a_literal_bootstrap(masks):
    own, worse, truths = masks
    counts = [counts_of(one, truths) for one in (own, worse)]

    found = Effects(counts[0], 4000, 0).of(counts[1])

    difference = found["differences"]["miou"]
    assert set(found["differences"]) == set(MEASURES)
    exact = score_counts(counts[1])["miou"] - score_counts(counts[0])["miou"]
    assert difference["difference"] == pytest.approx(exact)
    assert is_decided(difference)
    assert difference["high"] < 0
    rng = np.random.default_rng(1)
    draws = [rng.integers(12, size=11) for _ in range(500)]
    drawn = [score_counts(counts[1][draw])["miou"] - score_counts(counts[0][draw])["miou"] for draw in draws]
    half = 2.201 * np.std(drawn, ddof=1)  # t quantile, 11 degrees of freedom
    assert (difference["high"] - difference["low"]) / 2 == pytest.approx(half, rel=0.1)
    for index, value in enumerate(found["classes"]):
        expected = score_counts(counts[1])["iou"][index] - score_counts(counts[0])["iou"][index]
        assert value["difference"] == pytest.approx(expected)


def test_no_change_is_a_point_and_what_has_no_score_is_undefined(masks):
    own, _, truths = masks
    counts = counts_of(own, truths, classes=4)

    found = Effects(counts, 100, 0).of(counts)

    assert found["differences"]["miou"] == {"difference": 0, "low": 0, "high": 0}
    assert not is_decided(found["differences"]["miou"])
    assert found["classes"][3] is None
    assert score_counts(counts)["iou"][3] is None
    assert not is_decided(None)
