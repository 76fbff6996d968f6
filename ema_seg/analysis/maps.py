"""Statistics of the weight maps of attention blocks over images."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ema_seg.analysis.effects import estimate_over_images
from ema_seg.analysis.interventions import resize
from ema_seg.analysis.signals import Signal, read_signal
from ema_seg.attention import EMA
from ema_seg.evaluation.boundary import near_boundary
from ema_seg.evaluation.intervals import resample
from ema_seg.evaluation.strata import small_objects
from ema_seg.inference.attention import without_padding

__all__ = ["REGIONS", "MapStudy"]

REGIONS = ("near boundaries", "small objects")
"""Parts of an image beside its classes: pixels near true boundaries, see ``boundary_distance``; and small objects."""


class MapStudy:
    """Statistics of the signals of a model's blocks.

    The map of a block that adds to its input is the root mean square over the channels of what it adds.

    Args:
        num_classes: K.
    """

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self._blocks: dict[str, _Block] = {}
        self._current: dict[str, Signal] = {}
        self._correlations: dict[tuple[str, str], list[float]] = {}

    def record(self, name: str, block: nn.Module, x: Tensor, y: Tensor) -> None:
        """Take the signal of a block for the current image; see ``hooked``."""
        signal = read_signal(block, x, y)
        # On the host, because some devices have no float64.
        self._current[name] = replace(signal, values=signal.values.cpu())
        found = self._blocks.setdefault(name, _Block())
        if isinstance(block, EMA):
            for branch, weights in zip(("pointwise", "spatial"), block.channel_weights(x), strict=True):
                found.channel_weights.setdefault(branch, _Moments()).add(weights[0].float().cpu())

    def finish_image(self, truth: NDArray[np.integer], stride: int) -> dict[str, NDArray[np.float32]]:
        """Add the signals of the current image to the statistics.

        Args:
            truth: train ids of the image, H x W.
            stride: the image is padded to multiples of it at the bottom and right.

        Returns:
            The map (h, w) of each block without the padding, the mean over its groups, in order of execution.
        """
        regions = self._regions(truth)
        maps = {}
        for name, signal in self._current.items():
            block = self._blocks[name]
            values = signal.values if signal.multiplies else signal.values.square().mean(dim=0, keepdim=True).sqrt()
            inside = without_padding(values, truth.shape, stride)
            block.add(signal, inside)
            maps[name] = inside.mean(dim=0).numpy()
            if values[0].numel() > 1:
                at_pixels = _at_pixels(values.mean(dim=0).numpy(), truth.shape, stride)
                block.regions.append(_region_sums(at_pixels, regions))
        for one, other in combinations(maps, 2):
            if (value := _correlation(maps[one], maps[other])) is not None:
                self._correlations.setdefault((one, other), []).append(value)
        self._current = {}
        return maps

    def means(self) -> dict[str, Tensor]:
        """Return the mean signal of each block, float32 (G, h, w) on the host, at the map's size in the first image."""
        return {name: block.signal.mean for name, block in self._blocks.items()}

    def results(self, replicates: int, seed: int) -> dict[str, Any]:
        """Return the statistics.

        Args:
            replicates: number of bootstrap replicates over images for the intervals.
            seed: seed of the bootstrap.

        Returns:
            ``blocks``, a list, and ``agreement``: the mean over images of the correlation of the maps of each pair of
            blocks, null where a map is constant.
        """
        names = list(self._blocks)
        agreement: list[list[float | None]] = [[1.0 if one == other else None for other in names] for one in names]
        for (one, other), values in self._correlations.items():
            row, column = names.index(one), names.index(other)
            agreement[row][column] = agreement[column][row] = float(np.mean(values))
        blocks = [
            {"name": name, **block.results(self.num_classes, replicates, seed)} for name, block in self._blocks.items()
        ]
        return {"blocks": blocks, "agreement": agreement}

    def _regions(self, truth: NDArray[np.integer]) -> list[NDArray[np.bool_]]:
        """Return the pixels of all labels, of each class, and of each of ``REGIONS``."""
        classes = [truth == index for index in range(self.num_classes)]
        return [truth != 255, *classes, near_boundary(truth), small_objects(truth)]


class _Mean:
    """Mean over images of signals of the size of the first; the others are resized."""

    _sum: Tensor

    def __init__(self) -> None:
        self.count = 0

    def add(self, values: Tensor) -> None:
        self._sum = values.double() if self.count == 0 else self._sum + resize(values, self._sum.shape[1:])
        self.count += 1

    @property
    def mean(self) -> Tensor:
        return (self._sum / self.count).float()


class _Moments:
    """Variance over images, of tensors of the size of the first; the others are resized."""

    def __init__(self) -> None:
        self.count = 0

    def add(self, values: Tensor) -> None:
        if self.count == 0:
            self.first = values.double()
            self._sum, self._squares = torch.zeros_like(self.first), torch.zeros_like(self.first)
        if values.ndim == 3:
            values = resize(values, self.first.shape[1:])
        # Relative to the first image, so that the variance of what does not vary is exactly zero.
        difference = values.double() - self.first
        self._sum += difference
        self._squares += difference.square()
        self.count += 1

    @property
    def spread(self) -> float:
        """Standard deviation over the images, averaged over all values."""
        variance = self._squares / self.count - (self._sum / self.count).square()
        return float(variance.clamp_min(0).sqrt().mean())


@dataclass
class _Block:
    multiplies: bool = True
    shape: tuple[int, ...] = ()
    signal: _Mean = field(default_factory=_Mean)
    map: _Moments = field(default_factory=_Moments)
    mean: list[float] = field(default_factory=list)
    low: list[float] = field(default_factory=list)
    high: list[float] = field(default_factory=list)
    positions: list[float] = field(default_factory=list)
    groups: list[float] = field(default_factory=list)
    regions: list[NDArray[np.float64]] = field(default_factory=list)
    channel_weights: dict[str, _Moments] = field(default_factory=dict)

    def add(self, signal: Signal, values: Tensor) -> None:
        """Add a signal and its map (G, h, w), G = 1 for a block that adds."""
        self.multiplies = signal.multiplies
        self.shape = self.shape or tuple(signal.values.shape)
        self.signal.add(signal.values)
        self.map.add(values)
        wide = values.double()
        self.mean.append(float(wide.mean()))
        self.low.append(float(wide.min()))
        self.high.append(float(wide.max()))
        self.positions.append(float(wide.flatten(1).std(dim=1, correction=0).mean()))
        self.groups.append(float(wide.std(dim=0, correction=0).mean()))

    def results(self, num_classes: int, replicates: int, seed: int) -> dict[str, Any]:
        groups, height, width = self.shape
        regions = _compare_regions(np.array(self.regions), replicates, seed) if self.regions else []
        return {
            "multiplies": self.multiplies,
            "groups": groups,
            "size": [height, width],
            "mean": float(np.mean(self.mean)),
            "min": min(self.low),
            "max": max(self.high),
            "spread": {
                "positions": float(np.mean(self.positions)),
                "images": self.map.spread,
                "groups": float(np.mean(self.groups)),
            },
            "classes": regions[:num_classes],
            "regions": dict(zip(REGIONS, regions[num_classes:], strict=False)),
            "channel_weights": {branch: moments.spread for branch, moments in self.channel_weights.items()},
        }


def _at_pixels(cells: NDArray[np.float32], size: Sequence[int], stride: int) -> NDArray[np.float32]:
    """Return the map (h, w) of the padded image at each pixel of the image, which has the value of its cell."""
    places = [
        np.arange(length) * count // (length + -length % stride)
        for length, count in zip(size, cells.shape, strict=True)
    ]
    return cells[np.ix_(*places)]


def _region_sums(weights: NDArray[np.float32], regions: Sequence[NDArray[np.bool_]]) -> NDArray[np.float64]:
    """Return the sum of the weights and the number of pixels of each region, (regions, 2)."""
    return np.array([[weights[region].sum(dtype=np.float64), region.sum()] for region in regions])


def _compare_regions(sums: NDArray[np.float64], replicates: int, seed: int) -> list[dict[str, float] | None]:
    """Compare the mean weight of each region but the first with that of the first, all labelled pixels.

    Args:
        sums: see ``_region_sums``, (N, regions, 2).
        replicates: see ``MapStudy.results``.
        seed: see ``MapStudy.results``.

    Returns:
        ``mean``, its ``difference`` and the 95 % interval over images; None for a region without pixels.
    """

    def means(totals: NDArray[np.float64]) -> NDArray[np.float64]:
        with np.errstate(invalid="ignore", divide="ignore"):
            found: NDArray[np.float64] = totals[..., 0] / totals[..., 1]
        return found

    whole = means(sums.sum(axis=0))
    drawn = resample(sums, means, replicates, seed)
    rows: list[dict[str, float] | None] = []
    for place in range(1, len(whole)):
        occurring = int((sums[:, place, 1] > 0).sum())
        found = estimate_over_images(whole[place] - whole[0], drawn[:, place] - drawn[:, 0], occurring)
        rows.append(found and {"mean": float(whole[place]), **found})
    return rows


def _correlation(one: NDArray[np.float32], other: NDArray[np.float32]) -> float | None:
    """Correlate two maps at the size of the smaller one; None if one is constant."""
    small, large = sorted((one, other), key=lambda values: values.size)
    shrunk = torch.nn.functional.adaptive_avg_pool2d(torch.from_numpy(large)[None], small.shape)[0].numpy()
    if min(np.ptp(small), np.ptp(shrunk)) == 0:
        return None
    return float(np.corrcoef(small.ravel(), shrunk.ravel())[0, 1])
