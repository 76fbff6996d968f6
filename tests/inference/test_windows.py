"""Tests of the prediction of large images in windows."""

import itertools

import pytest
import torch

from ema_seg.inference.windows import OVERLAP, blend_windows, window_layout


@pytest.mark.parametrize("length", [1, 300, 301, 450, 473, 1000, 1001, 5000])
def test_windows_cover_a_length_and_share_a_few_pixels(length):
    starts, size = window_layout(length, 300)

    assert size <= 300
    assert starts[0] == 0
    assert starts[-1] + size == length
    shared = [before + size - after for before, after in itertools.pairwise(starts)]
    assert set(shared) <= {OVERLAP, OVERLAP + 1, OVERLAP + 2}


def colours_of(part):
    """Predict logits that depend on the pixel alone."""
    return torch.cat([part.double(), part[:1].double().square()])


@pytest.mark.parametrize(("height", "width"), [(200, 300), (700, 301), (301, 700), (1100, 950)])
def test_a_model_that_sees_single_pixels_predicts_the_same_in_windows(height, width):
    image = torch.rand(3, height, width)
    whole = colours_of(image)

    found = torch.full_like(whole, float("nan"))
    times = torch.zeros(height, width, dtype=torch.int64)
    for top, left, logits in blend_windows(image, 300, colours_of):
        place = slice(top, top + logits.shape[1]), slice(left, left + logits.shape[2])
        found[:, *place] = logits
        times[place] += 1

    assert times.eq(1).all()
    torch.testing.assert_close(found, whole)


def test_one_window_changes_nothing():
    image = torch.rand(3, 20, 30)
    ((top, left, logits),) = blend_windows(image, 300, colours_of)

    assert (top, left) == (0, 0)
    assert torch.equal(logits, colours_of(image))


def test_windows_fade_into_each_other():
    image = torch.zeros(3, 8, 1000)
    numbers = iter(range(100))

    def numbered(part):
        return torch.full((1, *part.shape[1:]), float(next(numbers)))

    line = torch.cat([logits[0, 0] for _, _, logits in blend_windows(image, 300, numbered)])

    steps = line.diff()
    assert line[0] == 0
    assert line[-1] == len(window_layout(1000, 300)[0]) - 1
    assert steps.min() >= 0
    assert steps.max() <= 1 / OVERLAP + 1e-6
