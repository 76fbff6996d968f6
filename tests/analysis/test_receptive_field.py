"""Tests of the effective receptive field on models whose field is known."""

import numpy as np
import pytest
import torch
from torch import nn

from ema_seg.analysis.receptive_field import receptive_field
from ema_seg.data.normalise import Normalise

PLAIN = Normalise((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def box(size, classes=2):
    """Make a convolution that averages over a square, one class with the other sign."""
    conv = nn.Conv2d(3, classes, size, padding=size // 2, bias=False)
    nn.init.constant_(conv.weight, 1.0)
    conv.weight.data[1:] *= -1
    return conv


def images(count=3, size=(40, 60)):
    return list(torch.randint(256, (count, 3, *size), dtype=torch.uint8))


@pytest.mark.parametrize(("size", "half"), [(1, 1), (9, 7), (21, 15)])
def test_a_box_holds_all_of_the_field_and_half_of_it_in_half_the_area(size, half):
    field = receptive_field(box(size), images(), 1, PLAIN)

    assert field.side(1.0 - 1e-9) == size
    assert field.side(0.5) == half  # 7² of 9² is the first above a half, 15² of 21²
    assert field.area(0.5) == pytest.approx(half**2 / (40 * 60))
    assert field.profile.sum() == pytest.approx(1)
    assert np.count_nonzero(field.picture) == size**2
    assert field.picture[20, 30] == field.picture.max()


def test_a_global_mean_reaches_the_whole_image_and_the_area_ends_at_its_border():
    class Global(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = box(1)

        def forward(self, x):
            return self.conv(x + x.mean(dim=(2, 3), keepdim=True) * 1000)

    field = receptive_field(Global(), images(), 8, PLAIN)

    assert field.area(1.0 - 1e-9) == 1
    assert field.side(0.5) > 20


def test_what_all_classes_share_is_not_counted():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.own, self.shared = box(3), box(25)

        def forward(self, x):
            return self.own(x) + 100 * self.shared(x)[:, :1]

    field = receptive_field(Shared(), images(), 1, PLAIN)

    assert field.side(0.95) == 3


def test_images_of_several_sizes_count_the_same():
    several = [*images(2), *images(2, (24, 24))]

    field = receptive_field(box(9), several, 1, PLAIN)

    assert field.side(1.0 - 1e-9) == 9
    assert field.size == (40, 60)
    assert field.profile.sum() == pytest.approx(1)
