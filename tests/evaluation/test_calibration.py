"""Calibration scores against a rendering in NumPy, pixel by pixel."""

import math

import numpy as np
import pytest
import torch

from ema_seg.evaluation.calibration import BINS, classify, count_calibration, score_calibration
from ema_seg.inference.classes import most_likely_classes
from ema_seg.models.head import RowLogits

IGNORED = 255


def reference(images):
    """Compute the scores from the logits (K, H, W) and the truth of each image."""
    confidences, rights, nll, brier = [], [], [], []
    for logits, truth in images:
        for y, x in np.ndindex(*truth.shape):
            if truth[y, x] == IGNORED:
                continue
            exponents = np.exp(logits[:, y, x].astype(float) - logits[:, y, x].max())
            probabilities = exponents / exponents.sum()
            predicted = probabilities.argmax()
            confidences.append(probabilities[predicted])
            rights.append(predicted == truth[y, x])
            nll.append(-math.log(probabilities[truth[y, x]]))
            brier.append(((probabilities - np.eye(len(probabilities))[truth[y, x]]) ** 2).sum())
    confidences, rights = np.array(confidences), np.array(rights)
    ece = 0.0
    for index in range(BINS):
        inside = (confidences > index / BINS) & (confidences <= (index + 1) / BINS)
        if inside.any():
            ece += inside.mean() * abs(rights[inside].mean() - confidences[inside].mean())
    return {"ece": ece, "nll": np.mean(nll), "brier": np.mean(brier)}


def count(logits, truth):
    rows = RowLogits(torch.from_numpy(logits)[None])
    ids, certainty = classify(rows, torch.from_numpy(truth))
    assert torch.equal(ids, most_likely_classes(rows))
    return count_calibration(ids.numpy(), truth, certainty.confidence.numpy(), certainty.sums.numpy())


@pytest.mark.parametrize("classes", [1, 2, 11])
@pytest.mark.parametrize("sharpness", [0.1, 1, 8])
def test_equals_the_rendering(classes, sharpness):
    generator = np.random.default_rng(classes)
    images = []
    for size in ((9, 13), (1, 1), (20, 4)):
        truth = generator.integers(0, classes, size).astype(np.uint8)
        logits = generator.normal(size=(classes, *size)) + (np.arange(classes)[:, None, None] == truth)
        truth[generator.random(size) < 0.2] = IGNORED
        images.append(((sharpness * logits).astype(np.float32), truth))
    found, expected = score_calibration([count(*image) for image in images]), reference(images)
    assert {key: found[key] for key in expected} == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert sum(found["reliability"]["pixels"]) == sum((truth != IGNORED).sum() for _, truth in images)


@pytest.mark.parametrize("scale", [4, 2])
def test_an_upsampled_map_gives_the_same_as_its_logits(scale):
    torch.manual_seed(0)
    rows = RowLogits(torch.randn(1, 6, 12, 16), scale=scale, size=(12 * scale - 3, 16 * scale - 1))
    truth = torch.randint(0, 6, rows.shape[2:], dtype=torch.uint8)
    ids, certainty = classify(rows, truth)
    whole = rows.whole()[0]
    assert torch.equal(ids, whole.argmax(0))
    torch.testing.assert_close(certainty.confidence, whole.softmax(0).amax(0), atol=1e-5, rtol=1e-5)
    nll = torch.nn.functional.cross_entropy(whole[None], truth[None].long(), reduction="sum")
    torch.testing.assert_close(certainty.sums[:, 0].sum(), nll, atol=1e-2, rtol=1e-4)


def test_a_certain_and_correct_model_is_perfect():
    truth = np.array([[0, 1, IGNORED]], np.uint8)
    logits = np.array([[[60, 0, 0]], [[0, 60, 60]]], np.float32)
    found = score_calibration([count(logits, truth)])
    assert found["ece"] == found["nll"] == found["brier"] == 0
    assert found["reliability"]["pixels"] == [0] * (BINS - 1) + [2]


def test_a_certain_and_wrong_model_is_as_wrong_as_can_be():
    found = score_calibration([count(np.array([[[60]], [[0]]], np.float32), np.array([[1]], np.uint8))])
    assert (found["ece"], found["nll"], found["brier"]) == pytest.approx((1, 60, 2))


def test_ignored_pixels_of_any_logits_are_left_out():
    logits = np.array([[[1, 5]], [[0, -np.inf]]], np.float32)
    found = score_calibration([count(logits, np.array([[0, IGNORED]], np.uint8))])
    alone = score_calibration([count(logits[:, :, :1], np.array([[0]], np.uint8))])
    assert {**found, "reliability": None} == {**alone, "reliability": None}


def test_no_labelled_pixel_gives_no_score():
    found = score_calibration([count(np.zeros((3, 2, 2), np.float32), np.full((2, 2), IGNORED, np.uint8))])
    assert all(math.isnan(found[key]) for key in ("ece", "nll", "brier"))
    assert all(math.isnan(value) for value in found["reliability"]["accuracy"])
