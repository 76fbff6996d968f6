"""Boundary IoU and trimap against renderings that follow the definitions pixel by pixel."""

import math

import cv2
import numpy as np
import pytest

from ema_seg.evaluation.boundary import TRIMAP_DISTANCES, boundary_distance, count_boundaries, score_boundaries

IGNORED = 255


def blobs(seed, size, classes, *, ignored=True):
    """Draw a map of large regions with a few thin ones; return a prediction that differs from it, and the truth."""
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, classes, (4, 5), np.uint8)
    truth = cv2.resize(coarse, size[::-1], interpolation=cv2.INTER_NEAREST)
    truth[:, size[1] // 3] = classes - 1
    prediction = np.roll(truth, (2, -1), (0, 1))
    prediction[generator.random(size) < 0.05] = 0
    if ignored:
        truth[: size[0] // 4, : size[1] // 4] = IGNORED
    return prediction, truth


def reference(prediction, truth, classes):
    """Erode each class's mask step by step, as the paper does."""
    labelled = truth != IGNORED
    counts = np.zeros((2, classes), int)
    for index in range(classes):
        boundaries = []
        for labels in (truth, prediction):
            mask = (labels == index) & labelled
            eroded = np.pad(mask, 1)
            for _ in range(boundary_distance(*truth.shape)):
                height, width = mask.shape
                shifts = [eroded[y : y + height, x : x + width] for y in range(3) for x in range(3)]
                eroded = np.pad(np.logical_and.reduce(shifts), 1)
            boundaries.append(mask & ~eroded[1:-1, 1:-1])
        counts[:, index] = (boundaries[0] & boundaries[1]).sum(), (boundaries[0] | boundaries[1]).sum()
    return counts


def reference_trimap(prediction, truth, classes, limit):
    """Search the square around each pixel for another class."""
    counts = np.zeros((2, classes), int)
    for (y, x), label in np.ndenumerate(truth):
        around = truth[max(0, y - limit) : y + limit + 1, max(0, x - limit) : x + limit + 1]
        if label == IGNORED or not ((around != label) & (around != IGNORED)).any():
            continue
        counts[1, label] += 1
        if prediction[y, x] == label:
            counts[0, label] += 1
        else:
            counts[1, prediction[y, x]] += 1
    return counts


@pytest.mark.parametrize("size", [(48, 64), (37, 90), (120, 160)])
@pytest.mark.parametrize("ignored", [False, True])
def test_boundaries_are_those_of_the_paper(size, ignored):
    prediction, truth = blobs(0, size, 4, ignored=ignored)

    counts = count_boundaries(prediction, truth, 4)

    assert [counts["intersection"], counts["union"]] == reference(prediction, truth, 4).tolist()
    assert 0 < sum(counts["intersection"]) < sum(counts["union"])


@pytest.mark.parametrize("ignored", [False, True])
def test_a_trimap_is_the_pixels_with_another_class_in_the_square_around_them(ignored):
    prediction, truth = blobs(1, (40, 60), 4, ignored=ignored)

    counts = count_boundaries(prediction, truth, 4)

    for limit, found in zip(TRIMAP_DISTANCES, counts["trimap"], strict=True):
        assert found == reference_trimap(prediction, truth, 4, limit).tolist(), limit


@pytest.mark.parametrize(("size", "distance"), [((1, 1), 1), ((480, 360), 12), ((1024, 2048), 46), ((30, 40), 1)])
def test_the_width_of_a_boundary_is_a_share_of_the_diagonal(size, distance):
    assert boundary_distance(*size) == distance


@pytest.mark.parametrize(
    ("prediction", "truth", "iou"),
    [
        ([[0]], [[0]], [1, math.nan]),  # a single pixel is all boundary
        ([[1]], [[0]], [0, 0]),
        ([[0, 0]], [[IGNORED, IGNORED]], [math.nan, math.nan]),
        ([[1, 0]], [[IGNORED, 0]], [1, math.nan]),  # an ignored pixel belongs to no predicted class
        (np.zeros((9, 9), int), np.zeros((9, 9), int), [1, math.nan]),  # the border of the image is a boundary
    ],
)
def test_degenerate_images(prediction, truth, iou):
    counts = count_boundaries(np.array(prediction), np.array(truth), 2)

    scores = score_boundaries([counts])

    assert scores["boundary_iou"] == pytest.approx(iou, nan_ok=True)
    assert scores["boundary_miou"] == pytest.approx(
        np.nanmean(iou) if not all(map(math.isnan, iou)) else math.nan, nan_ok=True
    )
    assert all(map(math.isnan, scores["trimap"]["miou"]))  # no two classes meet


def test_counts_are_summed_over_the_images_before_the_division():
    images = [count_boundaries(*blobs(seed, (48, 64), 3), 3) for seed in range(3)]

    scores = score_boundaries(images)

    sums = np.sum([reference(*blobs(seed, (48, 64), 3), 3) for seed in range(3)], axis=0)
    assert scores["boundary_iou"] == pytest.approx((sums[0] / sums[1]).tolist())
    assert scores["boundary_miou"] == pytest.approx((sums[0] / sums[1]).mean())
    assert scores["trimap"]["distances"] == list(TRIMAP_DISTANCES)


def test_the_last_limit_of_a_trimap_reaches_the_whole_of_a_small_image():
    prediction, truth = blobs(2, (24, 30), 3, ignored=False)

    ((intersection, union),) = count_boundaries(prediction, truth, 3)["trimap"][-1:]

    assert intersection == [int(((truth == index) & (prediction == index)).sum()) for index in range(3)]
    assert union == [int(((truth == index) | (prediction == index)).sum()) for index in range(3)]
