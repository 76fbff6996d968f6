"""Tests of the C++ counts against those without kernels, on maps that are easy and on maps that are not."""

import numpy as np
import pytest
from numpy.typing import NDArray

from ema_seg.evaluation import ConfusionMatrix
from ema_seg.evaluation.counting import count_pixels, countable
from ema_seg.evaluation.strata import count_strata, count_strata_by_class
from ema_seg.runtime.errors import DataError, ModelError

Maps = tuple[NDArray[np.uint8], NDArray[np.uint8]]


def noise(seed: int, height: int = 90, width: int = 130, classes: int = 4) -> Maps:
    """Return maps of single pixels, and of squares that grow with the seed, so that all strata occur."""
    generator = np.random.default_rng(seed)
    size = 1 + 20 * (seed % 3)
    small = generator.integers(0, classes, (2, -(-height // size), -(-width // size)))
    prediction, truth = small.repeat(size, 1).repeat(size, 2)[:, :height, :width].astype(np.uint8)
    truth[generator.random((height, width)) < 0.1] = 255
    return prediction.copy(), truth


def spiral(size: int = 41) -> Maps:
    """Return an object whose runs join only at its end."""
    truth = np.zeros((size, size), np.uint8)
    top, left, bottom, right = 0, 0, size - 1, size - 1
    while top < bottom and left < right:
        truth[top, left : right + 1] = truth[top : bottom + 1, right] = truth[bottom, left : right + 1] = 1
        truth[top + 2 : bottom + 1, left] = 1
        truth[top + 1, left] = 0
        truth[top + 2, left : left + 2] = 1
        top, left, bottom, right = top + 2, left + 2, bottom - 2, right - 2
    return np.roll(truth, 1, axis=0), truth


CASES: dict[str, Maps] = {
    **{f"noise {seed}": noise(seed) for seed in range(6)},
    "spiral": spiral(),
    "checkerboard": (np.indices((9, 9)).sum(0).astype(np.uint8) % 2, np.zeros((9, 9), np.uint8)),
    "all ignored": (np.ones((5, 6), np.uint8), np.full((5, 6), 255, np.uint8)),
    "one row": (np.array([[0, 1, 1, 0]], np.uint8), np.array([[0, 1, 255, 0]], np.uint8)),
    "one column": (np.array([[0], [1], [1]], np.uint8), np.array([[1], [1], [255]], np.uint8)),
    "every class": (np.arange(255, dtype=np.uint8)[None], np.arange(255, dtype=np.uint8)[None, ::-1].copy()),
    "a single pixel": (np.zeros((1, 1), np.uint8), np.zeros((1, 1), np.uint8)),
    "not contiguous": (noise(7)[0][::2, ::3], noise(7)[1][::2, ::3]),
}


@pytest.mark.parametrize("case", CASES)
def test_the_kernels_count_as_numpy_and_opencv_do(case: str) -> None:
    prediction, truth = CASES[case]
    classes = 255 if case == "every class" else 4
    assert countable(prediction, truth, classes, 255)
    matrix = np.zeros((classes, classes), np.int64)
    labelled = truth != 255
    np.add.at(matrix, (truth[labelled], prediction[labelled]), 1)

    assert np.array_equal(count_pixels(prediction, truth, classes, 255), matrix)
    assert count_strata(prediction, truth, classes) == count_strata_by_class(prediction, truth, classes)


@pytest.mark.parametrize("dtype", [np.int64, np.uint8])
def test_a_label_that_is_no_class_is_named_by_either(dtype: type) -> None:
    confusion = ConfusionMatrix(3)
    truth = np.zeros((4, 4), dtype)
    truth[2, 1] = 7
    with pytest.raises(DataError, match="classes from 0 to 2 or the ignore index 255, got 7"):
        confusion.update(np.zeros((4, 4), dtype), truth)
    assert not confusion.matrix.any()


def test_labels_that_a_byte_cannot_hold_are_not_counted_as_bytes() -> None:
    confusion = ConfusionMatrix(3)
    with pytest.raises(DataError, match="got 256"):
        confusion.update(np.zeros((2, 2), np.int64), np.full((2, 2), 256))


def test_objects_of_no_class_are_refused() -> None:
    with pytest.raises(ModelError, match="labels and predictions must be below 2"):
        count_strata(np.full((4, 4), 254, np.uint8), np.zeros((4, 4), np.uint8), 2)
