"""Tests of the counts by object size, by hand and against a naive implementation of the definition."""

import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from ema_seg.evaluation import STRATA, ConfusionMatrix, count_strata, score_strata
from ema_seg.evaluation import strata as module

IGNORED = 255


def plain(prediction, target, num_classes, limits):
    """Compute the counts pixel by pixel, with a flood fill for the objects."""

    def sizes(mask):
        found = np.zeros(mask.shape, int)
        for start in zip(*np.nonzero(mask), strict=True):
            if found[start]:
                continue
            members, border = {start}, [start]
            while border:
                row, column = border.pop()
                for other in ((row + i, column + j) for i in (-1, 0, 1) for j in (-1, 0, 1)):
                    inside = 0 <= other[0] < mask.shape[0] and 0 <= other[1] < mask.shape[1]
                    if inside and mask[other] and other not in members:
                        members.add(other)
                        border.append(other)
            for member in members:
                found[member] = len(members)
        return found

    counts = {name: {"intersection": [0] * num_classes, "union": [0] * num_classes} for name in STRATA}
    labelled = target != IGNORED
    for index in range(num_classes):
        truth, claimed = target == index, (prediction == index) & labelled
        true_sizes, claimed_sizes = sizes(truth), sizes(claimed)
        for place in np.ndindex(target.shape):
            size = true_sizes[place] if truth[place] else claimed_sizes[place]
            if truth[place] or claimed[place]:
                name = list(STRATA)[sum(size >= limit for limit in limits)]
                counts[name]["union"][index] += 1
                counts[name]["intersection"][index] += int(truth[place] and claimed[place])
    return counts


def test_an_object_counts_in_the_stratum_of_its_size():
    target = np.zeros((200, 300), np.uint8)  # the background is large
    target[10:41, 10:42] = 1  # 31 × 32 pixels: small
    target[100:132, 10:42] = 1  # 32 × 32: medium
    target[100:196, 100:196] = 1  # 96 × 96: large
    counts = count_strata(target, target, 2)
    assert [counts[name]["union"][1] for name in STRATA] == [31 * 32, 32 * 32, 96 * 96]
    assert [counts[name]["union"][0] for name in STRATA] == [0, 0, (target == 0).sum()]
    assert all(counts[name]["intersection"] == counts[name]["union"] for name in STRATA)


def test_what_is_wrong_counts_where_it_was_missed_and_where_it_was_claimed():
    target, prediction = (np.zeros((200, 300), np.uint8) for _ in range(2))
    target[10:20, 10:20] = 1  # small, half of it predicted
    prediction[10:20, 10:15] = 1
    prediction[100:140, 100:140] = 1  # a false positive of medium size
    counts = count_strata(prediction, target, 2)
    assert counts["small"] == {"intersection": [0, 50], "union": [0, 100]}
    assert counts["medium"] == {"intersection": [0, 0], "union": [0, 1600]}
    # The missed half is predicted as background, as part of a large background object.
    background = 200 * 300 - 100
    assert counts["large"] == {"intersection": [background - 1600, 0], "union": [background + 50, 0]}


def test_ignored_pixels_count_nowhere_and_cut_objects():
    target, prediction = np.zeros((100, 100), np.uint8), np.zeros((100, 100), np.uint8)
    target[:, 10:14] = IGNORED
    prediction[:50, 8:16] = 1  # 400 pixels; the ignored strip removes 200 and leaves two objects of 100
    left, right = 100 * 10, 100 * 86  # background
    counts = count_strata(prediction, target, 2)
    assert sum(counts[name]["union"][1] for name in STRATA) == 200
    assert [counts[name]["union"][0] for name in STRATA] == [left, right, 0]
    nothing = count_strata(prediction, np.full_like(target, IGNORED), 2)
    assert all(counts == {"intersection": [0, 0], "union": [0, 0]} for counts in nothing.values())


def test_corners_connect():
    target = np.ones((96, 96), np.uint8)
    target[np.arange(96), np.arange(96)] = 0
    counts = count_strata(target, target, 2)
    assert [counts[name]["union"][0] for name in STRATA] == [96, 0, 0]
    diagonal = np.eye(1100, dtype=np.uint8)
    assert count_strata(diagonal, diagonal, 2)["medium"]["union"][1] == 1100


@st.composite
def masks(draw):
    shape = draw(st.tuples(st.integers(1, 9), st.integers(1, 9)))
    truth = st.sampled_from([0, 1, 2, IGNORED])
    size = shape[0] * shape[1]
    target = draw(st.lists(truth, min_size=size, max_size=size))
    prediction = draw(st.lists(st.integers(0, 3), min_size=size, max_size=size))
    return np.array(prediction, np.uint8).reshape(shape), np.array(target, np.uint8).reshape(shape)


@settings(deadline=None, max_examples=200)
@given(masks())
def test_counts_equal_a_plain_rendering_and_add_up_to_the_confusion_matrix(pair):
    prediction, target = pair
    limits, module._LIMITS = module._LIMITS, (3, 8)
    try:
        counts = count_strata(prediction, target, 4)
    finally:
        module._LIMITS = limits
    assert counts == plain(prediction, target, 4, (3, 8))
    confusion = ConfusionMatrix(4)
    confusion.update(prediction, target)
    for key in ("intersection", "union"):
        assert np.sum([counts[name][key] for name in STRATA], axis=0).tolist() == getattr(confusion, key).tolist()


def test_scores_divide_sums_over_images():
    one = {name: {"intersection": [1, 0], "union": [2, 0]} for name in STRATA}
    two = {name: {"intersection": [2, 0], "union": [2, 0]} for name in STRATA}
    scores = score_strata([one, two], 2)
    assert scores["small"][0] == 0.75
    assert math.isnan(scores["large"][1])
    assert all(math.isnan(iou) for iou in score_strata([], 2)["small"])
