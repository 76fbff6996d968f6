"""Tests of the comparison of two masks."""

import math

import numpy as np
import pytest

from ema_seg.demo.comparing import compare, require_common_classes
from ema_seg.inference.segmenter import Segmentation
from ema_seg.runtime.errors import ConfigError


def result(mask, classes, image=None):
    mask = np.array(mask, np.uint8)
    image = np.zeros((*mask.shape, 3), np.uint8) if image is None else image
    return Segmentation(image, mask, classes, ((0, 0, 0),) * len(classes))


def test_classes_are_compared_by_name_and_unknown_ones_are_not():
    first = result([[0, 1, 2, 2], [0, 0, 1, 1]], ("sky", "road", "tree"))
    second = result([[1, 0, 0, 1], [0, 2, 1, 0]], ("road", "sky", "car"))

    found = compare(first, second)

    assert found.compared.tolist() == [[True, True, False, False], [True, False, True, True]]
    assert found.differing.tolist() == [[False, False, False, False], [True, False, True, False]]
    assert found.share == pytest.approx(2 / 5)
    assert found.pairs == (("sky", "road", 0.2), ("road", "sky", 0.2))


def test_the_drawing_marks_the_differing_pixels_alone():
    image = np.full((1, 3, 3), 100, np.uint8)
    found = compare(result([[0, 1, 2]], ("a", "b", "c"), image), result([[0, 0, 0]], ("a", "b"), image))

    drawn = np.array(found.draw(image))

    assert drawn[0, 0].tolist() == [114, 114, 114]  # grey
    assert len(set(drawn[0, 1].tolist())) > 1  # marked
    assert drawn[0, 2].tolist() == [0, 0, 0]  # not compared


def test_equal_masks_do_not_differ_and_masks_without_common_classes_have_no_share():
    classes = ("a", "b")
    assert compare(result([[0, 1]], classes), result([[0, 1]], classes)).share == 0
    assert math.isnan(compare(result([[0]], classes), result([[1]], ("a", "c"))).share)


def test_pictures_in_two_orientations_and_models_without_common_classes_are_refused():
    with pytest.raises(ConfigError, match="different orientations"):
        compare(result([[0, 0]], ("a",)), result([[0], [0]], ("a",)))
    with pytest.raises(ConfigError, match="other: has no class of the same name as run"):
        require_common_classes(("a", "b"), ("c",))
    require_common_classes(("a", "b"), ("c", "b"))
