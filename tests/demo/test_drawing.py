"""Tests of the page's tables and pictures."""

import re

import numpy as np
import pytest

from ema_seg.demo.drawing import areas_table, draw_weights, range_bar, reduced
from ema_seg.inference.segmenter import Segmentation


def test_areas_are_sorted_with_colours_and_names_are_escaped():
    mask = np.array([[2, 2, 2, 0]], np.uint8)
    palette = ((1, 2, 3), (4, 5, 6), (7, 8, 9))
    result = Segmentation(np.zeros((1, 4, 3), np.uint8), mask, ("sky", "car", "<script>"), palette)

    table, missing = areas_table(result).split("<details")

    assert re.findall(r"rgb\((.*?)\).*?</i>(.*?)</td><td>(.*?)</td>", table) == [
        ("7, 8, 9", "&lt;script&gt;", "75.00%"),
        ("1, 2, 3", "sky", "25.00%"),
    ]
    assert "not found: 1 of 3 classes" in missing
    assert "car" in missing


def test_a_map_is_drawn_without_its_padding():
    image = np.zeros((8, 12, 3), np.uint8)
    weights = np.array([[0.2, 0.4], [0.3, 0.9]], np.float32)  # of 16 x 16 pixels

    drawing, low, high = draw_weights(image, weights, 16)

    assert drawing.size == (12, 8)
    assert (low, high) == pytest.approx((0.2, 0.4))  # the lower row is padding
    bright = np.asarray(drawing.convert("L"), int)
    assert bright[0, -1] > bright[0, 0]
    assert "0.2000" in range_bar(low, high)


def test_a_flat_map_and_a_large_picture_are_drawn():
    drawing, low, high = draw_weights(np.zeros((100, 3300, 3), np.uint8), np.full((4, 104), 0.5, np.float32), 32)

    assert low == high == 0.5
    assert drawing.size == (1600, 48)
    assert reduced(drawing) is drawing
