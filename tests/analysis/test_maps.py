"""Tests of the statistics of weight maps, against renderings in NumPy."""

import numpy as np
import pytest
import torch
from torch import nn

from ema_seg.analysis.maps import MapStudy
from ema_seg.attention import EMA, DynamicEMA
from ema_seg.evaluation.boundary import boundary_distance


class Weights(nn.Module):
    """Block whose weights are given, image by image."""

    def __init__(self, maps):
        super().__init__()
        self._maps = iter(maps)

    def weight_map(self, x):
        return next(self._maps)[None]


class Adding(nn.Module):
    """Block that has no weights."""


def test_spread_regions_and_agreement_are_those_of_numpy():
    generator = torch.Generator().manual_seed(0)
    maps = torch.rand(5, 3, 4, 6, generator=generator)
    other = 0.5 * maps[:, :1] + 0.2
    truths = torch.randint(3, (5, 15, 24), generator=generator).numpy().astype(np.uint8)
    truths[:, :3] = 255
    study, first, second = MapStudy(3), Weights(maps), Weights(other)
    x = torch.zeros(1, 3, 4, 6)
    for truth in truths:
        study.record("first", first, x, x)
        study.record("second", second, x, x)
        found = study.finish_image(truth, 8)  # padded to 16 x 24: four pixels for each row and column of the map

    blocks, agreement = study.results(200, 0).values()

    block, values = blocks[0], maps.numpy()
    assert (block["groups"], block["size"], block["multiplies"]) == (3, [4, 6], True)
    assert block["mean"] == pytest.approx(values.mean())
    assert (block["min"], block["max"]) == (pytest.approx(values.min()), pytest.approx(values.max()))
    expected = {
        "positions": values.reshape(5, 3, -1).std(axis=2).mean(),
        "images": values.std(axis=0).mean(),
        "groups": values.std(axis=1).mean(),
    }
    assert block["spread"] == pytest.approx(expected)
    at_pixels = np.kron(values.mean(axis=1), np.ones((4, 4)))[:, :15]
    for index, region in enumerate(block["classes"]):
        mean = at_pixels[truths == index].mean()
        assert region["mean"] == pytest.approx(mean)
        assert region["difference"] == pytest.approx(mean - at_pixels[truths != 255].mean())
        assert region["low"] < region["difference"] < region["high"]
    np.testing.assert_allclose(found["first"], values[-1].mean(axis=0), rtol=1e-6)
    torch.testing.assert_close(study.means()["first"], maps.mean(dim=0))
    correlations = [
        np.corrcoef(a.mean(axis=0).ravel(), b[0].ravel())[0, 1] for a, b in zip(values, other.numpy(), strict=True)
    ]
    assert agreement[0][1] == agreement[1][0] == pytest.approx(np.mean(correlations))


def test_the_padding_is_no_part_of_the_image():
    weights = torch.full((1, 4, 6), 0.5)
    weights[:, 3:] = 0.9  # the image ends after 12 of 16 rows
    study, block = MapStudy(2), Weights([weights] * 2)
    for _ in range(2):
        study.record("block", block, torch.zeros(1, 1, 4, 6), torch.zeros(1, 1, 4, 6))
        found = study.finish_image(np.zeros((12, 24), np.uint8), 8)

    (result,) = study.results(50, 0)["blocks"]

    assert (result["mean"], result["max"], result["spread"]["positions"]) == (0.5, 0.5, 0)
    assert found["block"].shape == (3, 6)
    assert study.means()["block"].shape == (1, 4, 6)  # static weights reach into the padding


def test_boundaries_and_small_objects_are_found():
    truth = np.zeros((200, 300), np.uint8)
    truth[60:80, 100:120] = 1  # 400 pixels, below 32²
    weights = np.where(truth == 1, 1.0, 0.25).astype(np.float32)
    study, block = MapStudy(2), Weights([torch.from_numpy(weights)[None]] * 2)
    for _ in range(2):
        study.record("block", block, torch.zeros(1, 1, 200, 300), torch.zeros(1, 1, 200, 300))
        study.finish_image(truth, 1)

    regions = study.results(50, 0)["blocks"][0]["regions"]

    assert regions["small objects"]["mean"] == pytest.approx(1)
    distance = boundary_distance(200, 300)
    near = np.zeros_like(truth, dtype=bool)
    near[60 - distance : 80 + distance, 100 - distance : 120 + distance] = True
    near[60 + distance : 80 - distance, 100 + distance : 120 - distance] = False
    assert regions["near boundaries"]["mean"] == pytest.approx(weights[near].mean(), rel=1e-3)


def test_images_of_other_sizes_are_resized_to_the_first():
    study, block = MapStudy(2), Weights([torch.full((2, 4, 6), 0.5), torch.full((2, 8, 3), 0.7)])
    for size in ((4, 6), (8, 3)):
        study.record("block", block, torch.zeros(1, 2, *size), torch.zeros(1, 2, *size))
        study.finish_image(np.zeros(size, np.uint8), 1)

    found = study.results(50, 0)["blocks"][0]

    torch.testing.assert_close(study.means()["block"], torch.full((2, 4, 6), 0.6))
    assert found["spread"] == pytest.approx({"positions": 0, "images": 0.1, "groups": 0}, abs=1e-7)


def test_a_block_that_adds_is_described_by_the_size_of_what_it_adds():
    study, block = MapStudy(2), Adding()
    x = torch.randn(1, 4, 3, 5)
    for _ in range(2):
        study.record("block", block, x, x + 2)
        study.finish_image(np.zeros((3, 5), np.uint8), 1)

    found = study.results(50, 0)["blocks"][0]

    assert (found["multiplies"], found["groups"], found["mean"]) == (False, 4, pytest.approx(2))
    assert study.means()["block"].shape == (4, 3, 5)


@pytest.mark.parametrize(("kind", "constant"), [(EMA, True), (DynamicEMA, False)])
def test_the_constant_descriptor_of_ema_is_measured(kind, constant):
    study, block = MapStudy(2), kind(16, factor=2).eval()
    nn.init.normal_(block.gn.bias)
    for _ in range(4):
        x = 3 * torch.randn(1, 16, 6, 8)
        with torch.no_grad():
            study.record("block", block, x, block(x))
        study.finish_image(np.zeros((6, 8), np.uint8), 1)

    (found,) = study.results(50, 0)["blocks"]

    assert (found["channel_weights"]["pointwise"] < 1e-6) == constant
    assert found["channel_weights"]["spatial"] > 1e-4
