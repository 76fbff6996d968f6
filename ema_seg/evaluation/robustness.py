"""Scores of corrupted images: the mIoU of each kind of corruption, and how far it falls."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ema_seg.data.corruptions import CORRUPTIONS, SEVERITIES
from ema_seg.data.normalise import Normalise
from ema_seg.evaluation.confusion import ConfusionMatrix, mean_of_defined, ratio
from ema_seg.evaluation.counter import Counter, count_predictions
from ema_seg.inference.protocol import PLAIN, PredictionProtocol
from ema_seg.runtime.distributed.collectives import gather

__all__ = ["CorruptionCounts", "count_corruptions", "score_corruptions"]

CorruptionCounts = dict[str, list[list[list[int]]]]
"""Of an image, by kind of corruption and for each severity: the classes in truth or prediction, and the pixels of
their intersection and union."""


def count_corruptions(
    model: nn.Module,
    loader: Iterable[Mapping[str, Any]],
    num_classes: int,
    *,
    stride: int,
    normalise: Normalise,
    device: torch.device | str,
    precision: str | int = "32-true",
    protocol: PredictionProtocol = PLAIN,
    progress: bool = True,
) -> dict[str, CorruptionCounts]:
    """Predict corrupted images and count their pixels.

    Args:
        model: see ``score_images``.
        loader: batches of corrupted samples, see ``CorruptedDataset``; with several ranks those of this rank.
        num_classes: K.
        stride: see ``score_images``.
        normalise: see ``score_images``.
        device: see ``score_images``.
        precision: see ``score_images``.
        protocol: see ``score_images``.
        progress: see ``score_images``.

    Returns:
        The counts of all ranks by the name of the image.
    """
    counter = Counter(num_classes, lambda name, prediction, truth: (name, _count(prediction, truth, num_classes)))
    counted = count_predictions(
        model,
        loader,
        counter,
        "Corruptions",
        stride=stride,
        normalise=normalise,
        device=device,
        precision=precision,
        protocol=protocol,
        progress=progress,
    )
    images: dict[str, CorruptionCounts] = {}
    missing: list[list[int]] = [[], [], []]  # of an image that could not be read again: no class
    for name, counts in (item for part in gather(counted) for item in part):
        kind, severity, image = name.split("/", 2)
        kinds = images.setdefault(image, {kind: [missing] * len(SEVERITIES) for kind in CORRUPTIONS})
        kinds[kind][SEVERITIES.index(int(severity))] = counts
    return images


def score_corruptions(images: Sequence[CorruptionCounts], num_classes: int, clean: float) -> dict[str, Any]:
    """Compute the scores over some images, at least one.

    Args:
        images: their counts.
        num_classes: K.
        clean: mIoU of the same images without corruption.

    Returns:
        ``corrupted_miou``, the mean over all kinds and severities; ``corruption_drop``, 1 - corrupted_miou / clean; and
        ``corruptions``, by kind its ``group`` and the ``miou`` of each severity.
    """
    kinds = {}
    for kind, corruption in CORRUPTIONS.items():
        miou = []
        for place in range(len(SEVERITIES)):
            sums = np.zeros((2, num_classes), np.int64)
            for image in images:
                classes, *counts = image[kind][place]
                sums[:, classes] += counts
            miou.append(mean_of_defined(ratio(*sums)))
        kinds[kind] = {"group": corruption.group, "miou": miou}
    mean = mean_of_defined(np.array([miou for kind in kinds.values() for miou in kind["miou"]]))
    drop = 1 - mean / clean if clean > 0 else float("nan")
    return {"corrupted_miou": mean, "corruption_drop": drop, "corruptions": kinds}


def _count(prediction: NDArray[np.integer], truth: NDArray[np.integer], num_classes: int) -> list[list[int]]:
    confusion = ConfusionMatrix(num_classes)
    confusion.update(prediction, truth)
    (classes,) = np.nonzero(confusion.union)
    return [classes.tolist(), confusion.intersection[classes].tolist(), confusion.union[classes].tolist()]
