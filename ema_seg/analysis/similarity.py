"""Similarity of the features of two models: linear CKA.

Kornblith et al., "Similarity of Neural Network Representations Revisited", ICML 2019, https://arxiv.org/abs/1905.00414.
The examples are the positions of all images.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["FeatureSimilarity", "recorded_features"]


class FeatureSimilarity:
    """Linear CKA of two models' features by stage, accumulated over images."""

    def __init__(self) -> None:
        self._sums: dict[str, _CrossSums] = {}

    def add(self, ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
        """Add the features of an image, (1, C, h, w) by stage; a stage that only one model has is left out."""
        for stage, features in ours.items():
            other = theirs.get(stage)
            if other is not None and features.shape[2:] == other.shape[2:] and features.shape[1] and other.shape[1]:
                self._sums.setdefault(stage, _CrossSums()).add(_by_position(features), _by_position(other))

    def results(self) -> dict[str, float | None]:
        """Return the CKA of each stage, from 0 to 1; None where the features of a model are constant."""
        return {stage: sums.cka() for stage, sums in self._sums.items()}


class _CrossSums:
    """Sums of products of the features of both models, (positions, p) and (positions, q)."""

    def __init__(self) -> None:
        self.count = 0
        self.totals: list[Tensor] = []
        self.products: list[Tensor] = []

    def add(self, ours: Tensor, theirs: Tensor) -> None:
        totals = [ours.sum(dim=0), theirs.sum(dim=0)]
        products = [ours.T @ ours, theirs.T @ theirs, ours.T @ theirs]
        self.totals = totals if self.count == 0 else [a + b for a, b in zip(self.totals, totals, strict=True)]
        self.products = products if self.count == 0 else [a + b for a, b in zip(self.products, products, strict=True)]
        self.count += len(ours)

    def cka(self) -> float | None:
        ours, theirs = self.totals
        pairs = [(ours, ours), (theirs, theirs), (ours, theirs)]
        norms = [
            float((product - torch.outer(one, other) / self.count).square().sum())
            for product, (one, other) in zip(self.products, pairs, strict=True)
        ]
        return norms[2] / (norms[0] * norms[1]) ** 0.5 if min(norms[:2]) > 0 else None


@contextmanager
def recorded_features(modules: Mapping[str, nn.Module], features: dict[str, Tensor]) -> Iterator[None]:
    """Record the outputs of modules in ``features``; a list of feature maps as ``<name> 0`` and so on.

    The input, which smp's encoders return as their first map, is left out.
    """

    def record(name: str, inputs: tuple[Any, ...], output: Any) -> None:
        maps = output[0] if isinstance(output, tuple) else output
        if isinstance(maps, Tensor):
            features[name] = maps
        else:
            features.update({f"{name} {place}": found for place, found in enumerate(maps) if found is not inputs[0]})

    handles = [
        module.register_forward_hook(lambda _, inputs, output, name=name: record(name, inputs, output))
        for name, module in modules.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _by_position(features: Tensor) -> Tensor:
    """Return features (1, C, h, w) as float64 (positions, C), on the host because some devices have no float64."""
    return features[0].flatten(1).T.to("cpu", torch.float64)
