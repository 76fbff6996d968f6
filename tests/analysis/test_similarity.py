"""Tests of linear CKA, against the definition with Gram matrices."""

import numpy as np
import pytest
import torch
from torch import nn

from ema_seg.analysis.similarity import FeatureSimilarity, recorded_features


def literal_cka(x, y):
    """Compute the linear CKA of features (examples, p) and (examples, q) by the Gram matrices."""
    centre = np.eye(len(x)) - 1 / len(x)
    k, m = centre @ x @ x.T @ centre, centre @ y @ y.T @ centre
    return (k * m).sum() / np.sqrt((k * k).sum() * (m * m).sum())


def by_position(features):
    return np.concatenate([one[0].flatten(1).T.numpy() for one in features])


def test_accumulated_sums_give_the_cka_of_all_positions():
    generator = torch.Generator().manual_seed(0)
    ours = [torch.randn(1, 4, 5, 6, generator=generator) + 3 for _ in range(3)]
    theirs = [one[:, :3] ** 2 + torch.randn(1, 3, 5, 6, generator=generator) for one in ours]
    similarity = FeatureSimilarity()
    for one, other in zip(ours, theirs, strict=True):
        similarity.add({"stage": one, "rest": one}, {"stage": other})

    assert similarity.results() == {"stage": pytest.approx(literal_cka(by_position(ours), by_position(theirs)))}


def test_rotated_and_scaled_features_are_the_same_and_constant_ones_have_no_similarity():
    x = torch.randn(1, 8, 9, 9)
    rotation = torch.linalg.qr(torch.randn(8, 8))[0]
    similarity = FeatureSimilarity()
    similarity.add({"a": x, "b": x}, {"a": 3 * torch.einsum("ij,bjhw->bihw", rotation, x) + 5, "b": torch.ones_like(x)})

    assert similarity.results() == {"a": pytest.approx(1, abs=1e-5), "b": None}


def test_outputs_are_recorded_by_name_lists_map_by_map():
    class Maps(nn.Module):
        def forward(self, x):
            return [x, x[:, :, ::2], x[:, :, ::4]], "tokens"

    model = nn.ModuleDict({"maps": Maps(), "conv": nn.Conv2d(1, 2, 1)})
    features = {}
    with recorded_features(dict(model.items()), features):
        model["maps"](torch.zeros(1, 1, 4, 4))
        model["conv"](torch.zeros(1, 1, 4, 4))

    assert {name: tuple(maps.shape) for name, maps in features.items()} == {
        "maps 1": (1, 1, 2, 4),
        "maps 2": (1, 1, 1, 4),
        "conv": (1, 2, 4, 4),
    }
