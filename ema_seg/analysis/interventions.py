"""Interventions: the scores of a model whose attention blocks are changed, without training.

Each intervention asks what a part of the block is good for. The other blocks and all other layers stay as trained, so
an intervention shows what the trained model relies on, which is not what a model trained without it would lose.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._pytree import tree_leaves, tree_map

from ema_seg.analysis.schema import ALL_BLOCKS, INTERVENTIONS
from ema_seg.analysis.signals import Signal, neutral_values, recorded_signals, replaced_signals
from ema_seg.evaluation.boundary import count_boundaries
from ema_seg.evaluation.strata import STRATA, count_strata
from ema_seg.models.placement import modules_before_attention

__all__ = ["Outcome", "Sample", "count_masks", "resize", "reused_outputs", "run_interventions"]

_BLUR = 1 / 16

Key = tuple[str, str]
Predict = Callable[[Tensor], NDArray[np.integer]]


class Sample(NamedTuple):
    """Image (uint8 RGB 3 x H x W) with its train ids (H x W, 255 = ignored)."""

    name: str
    image: Tensor
    mask: NDArray[np.integer]


@dataclass
class Outcome:
    """Result of an intervention, or of the model itself.

    Attributes:
        counts: pixels of each image, int32 (N, 4, 2, K): intersection and union of each class for each size of objects
            and for the boundaries; see ``count_masks``.
        changed: share of each image's labelled pixels whose class is not that of the model itself, (N,).
        example: of the image with the most changed pixels that were or became right: its place in the sequence, the
            prediction and that of the model itself, H x W.
    """

    counts: NDArray[np.int32]
    changed: NDArray[np.float64]
    example: tuple[int, NDArray[np.integer], NDArray[np.integer]] | None = None


def count_masks(prediction: NDArray[np.integer], truth: NDArray[np.integer], num_classes: int) -> NDArray[np.int32]:
    """Count the pixels of an image: (4, 2, K), see ``Outcome``.

    The sizes add up to the whole image; the boundaries are those of ``ema_seg.evaluation.boundary``.
    """
    strata = count_strata(prediction, truth, num_classes)
    rows: list[Mapping[str, Any]] = [
        *(strata[name] for name in STRATA),
        count_boundaries(prediction, truth, num_classes),
    ]
    return np.array([[row["intersection"], row["union"]] for row in rows], np.int32)


def run_interventions(
    model: nn.Module,
    blocks: Mapping[str, nn.Module],
    samples: Iterable[Sample],
    predict: Predict,
    means: Mapping[str, Tensor],
    num_classes: int,
    before: Sample,
) -> tuple[Outcome, dict[Key, Outcome]]:
    """Predict each image with the model itself and with each intervention on each block, and on all blocks.

    Args:
        model: the model, in evaluation mode.
        blocks: its attention blocks by name.
        samples: the images, in an order in which neighbours are unlike each other: the signal of an image is swapped
            for that of the one before it.
        predict: predicts the classes of an image with the model, H x W.
        means: mean signal of each block over the images, (G, h, w).
        num_classes: K.
        before: the image before the first one.

    Returns:
        The outcome of the model itself, and those of the interventions by (block, intervention). A single block is not
        repeated as all blocks.
    """
    targets = {name: {name: block} for name, block in blocks.items()}
    if len(blocks) > 1:
        targets[ALL_BLOCKS] = dict(blocks)
    keys: list[Key | None] = [None, *((target, name) for target in targets for name in INTERVENTIONS)]
    outcomes = _Outcomes(keys, num_classes)

    def signals_of(image: Tensor) -> tuple[dict[str, Signal], NDArray[np.integer]]:
        signals: dict[str, Signal] = {}
        with recorded_signals(blocks, signals):
            return signals, predict(image)

    previous, _ = signals_of(before.image)
    with reused_outputs(modules_before_attention(model)), closing(outcomes):
        for sample in samples:
            own, prediction = signals_of(sample.image)
            masks: dict[Key | None, NDArray[np.integer]] = {None: prediction}
            for target, chosen in targets.items():
                for name in INTERVENTIONS:
                    with replaced_signals(chosen, partial(_change, name, means, previous)):
                        masks[target, name] = predict(sample.image)
            outcomes.add(masks, sample.mask)
            previous = own
        return outcomes.collected()


class _Outcomes:
    """Counts masks in a thread, while the model predicts the next image."""

    def __init__(self, keys: Sequence[Key | None], num_classes: int) -> None:
        self._keys = keys
        self._num_classes = num_classes
        self._thread = ThreadPoolExecutor(1, "counter")
        self._waiting: list[Future[None]] = []
        self._counts: dict[Key | None, list[NDArray[np.int32]]] = {key: [] for key in keys}
        self._changed: dict[Key | None, list[float]] = {key: [] for key in keys}
        self._examples: dict[Key | None, tuple[int, NDArray[np.integer], NDArray[np.integer]]] = {}
        self._most: dict[Key | None, int] = {}

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(cancel_futures=True)

    def add(self, masks: Mapping[Key | None, NDArray[np.integer]], truth: NDArray[np.integer]) -> None:
        """Count the masks of the next image; wait for those of the one before."""
        self._wait()
        self._waiting.append(self._thread.submit(self._count, masks, truth))

    def collected(self) -> tuple[Outcome, dict[Key, Outcome]]:
        """Return the outcome of the model itself, and those of the interventions."""
        self._wait()
        return self._outcome(None), {key: self._outcome(key) for key in self._keys if key is not None}

    def _outcome(self, key: Key | None) -> Outcome:
        return Outcome(np.stack(self._counts[key]), np.array(self._changed[key]), self._examples.get(key))

    def _wait(self) -> None:
        while self._waiting:
            self._waiting.pop().result()

    def _count(self, masks: Mapping[Key | None, NDArray[np.integer]], truth: NDArray[np.integer]) -> None:
        own, labelled = masks[None], truth != 255
        place = len(self._counts[None])
        for key, mask in masks.items():
            self._counts[key].append(count_masks(mask, truth, self._num_classes))
            changed = (mask != own) & labelled
            self._changed[key].append(float(changed.sum() / max(labelled.sum(), 1)))
            mattered = int((changed & ((mask == truth) | (own == truth))).sum())
            if mattered > self._most.get(key, 0):
                self._most[key] = mattered
                self._examples[key] = (place, mask, own)


def _change(name: str, means: Mapping[str, Tensor], others: Mapping[str, Signal], block: str, signal: Signal) -> Tensor:
    """Return the values (G, h, w) that an intervention puts in the place of those of a block's signal."""
    values = signal.values
    if name == "off":
        return neutral_values(signal)
    if name == "uniform":
        return values.mean(dim=(1, 2), keepdim=True)
    if name == "blurred":
        return _blur(values)
    return resize(means[block].to(values) if name == "static" else others[block].values, values.shape[1:])


def resize(values: Tensor, size: Sequence[int]) -> Tensor:
    """Resize a map (G, h, w) bilinearly; unchanged if it has the size already."""
    if tuple(values.shape[1:]) == tuple(size):
        return values
    return functional.interpolate(values[None], size=tuple(size), mode="bilinear")[0]


def _blur(values: Tensor) -> Tensor:
    """Blur maps (G, h, w) with a Gaussian, renormalised at the border."""
    deviation = max(1.0, _BLUR * min(values.shape[1:]))
    rows, columns = (_gaussian(size, deviation, values) for size in values.shape[1:])
    return rows @ values @ columns.T


def _gaussian(size: int, deviation: float, like: Tensor) -> Tensor:
    """Return the weights (size, size) of each position of a line for each other one."""
    places = torch.arange(size, dtype=like.dtype, device=like.device)
    weights = torch.exp(-0.5 * ((places[:, None] - places) / deviation) ** 2)
    return weights / weights.sum(dim=1, keepdim=True)


@contextmanager
def reused_outputs(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Let each module run once for calls with the same arguments in a row."""
    changed = list(modules)
    for module in changed:
        module.forward = _Remembered(module.forward)
    try:
        yield
    finally:
        for module in changed:
            del module.forward


class _Remembered:
    """Function that keeps its last arguments and result."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._arguments: list[Any] = []
        self._result: Any = None

    def __call__(self, *positional: Any, **named: Any) -> Any:
        arguments = tree_leaves((positional, named))
        if len(arguments) != len(self._arguments) or not all(map(_equal, arguments, self._arguments)):
            self._arguments, self._result = arguments, self._function(*positional, **named)
        # Copies, because a layer may work in place.
        return tree_map(lambda value: value.clone() if isinstance(value, Tensor) else value, self._result)


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and torch.equal(one, other)
    return one is other
