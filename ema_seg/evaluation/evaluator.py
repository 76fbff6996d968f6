"""Evaluation of a model on a data set: one confusion matrix, and a record of each image."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ema_seg.data.normalise import Normalise
from ema_seg.evaluation.boundary import BoundaryCounts, count_boundaries
from ema_seg.evaluation.calibration import CalibrationCounts, Certainty, count_calibration
from ema_seg.evaluation.confusion import ConfusionMatrix
from ema_seg.evaluation.counter import Counter, count_predictions
from ema_seg.evaluation.robustness import CorruptionCounts
from ema_seg.evaluation.strata import StratumCounts, count_strata
from ema_seg.inference.protocol import PLAIN, PredictionProtocol
from ema_seg.runtime.distributed.collectives import gather, sum_in_place
from ema_seg.runtime.errors import DataError

__all__ = ["Evaluation", "ImageRecord", "image_counter", "require_labels", "score_images"]


class ImageRecord(TypedDict):
    """Scores of one image, and its counts, from which the mean IoU of any subset can be computed.

    ``strata`` holds the counts by object size; ``boundary``, ``calibration`` and ``corruptions``, if set, those near
    boundaries, by confidence and of corrupted images: see ``strata``, ``boundary``, ``calibration`` and ``robustness``.
    """

    name: str
    miou: float
    pixel_accuracy: float
    intersection: list[int]
    union: list[int]
    strata: dict[str, StratumCounts]
    boundary: NotRequired[BoundaryCounts]
    calibration: NotRequired[CalibrationCounts]
    corruptions: NotRequired[CorruptionCounts]


@dataclass(frozen=True)
class Evaluation:
    """Result of ``score_images``.

    Attributes:
        confusion: the counts over all images.
        images: one record for each image, in the data set's order.
    """

    confusion: ConfusionMatrix
    images: list[ImageRecord]


def score_images(
    model: nn.Module,
    loader: Iterable[Mapping[str, Any]],
    classes: Sequence[str],
    *,
    stride: int,
    normalise: Normalise,
    device: torch.device | str,
    precision: str | int = "32-true",
    protocol: PredictionProtocol = PLAIN,
    boundary: bool = False,
    calibration: bool = False,
    progress: bool = True,
    on_prediction: Callable[[str, NDArray[np.integer]], object] | None = None,
) -> Evaluation:
    """Predict every image at its own size and count the pixels.

    With several ranks, each predicts the images of its own loader, which yields every
    world-size-th image from its rank on. Every rank returns the result for all images.

    The model is moved to the device and run in evaluation mode; every module's mode is restored afterwards.

    Args:
        model: maps float B x 3 x H x W to logits B x K x H x W.
        loader: batches of lists ``image`` (uint8 RGB 3 x H x W), ``mask`` (uint8 H x W) and ``name``.
        classes: the names of the K classes.
        stride: the model's stride; height and width are padded to multiples of it.
        normalise: the normalisation that the model was trained with.
        device: device to run on.
        precision: see ``autocast``.
        protocol: how an image is predicted; by default whole, once, at its own size.
        boundary: also count the pixels near boundaries.
        calibration: also count the pixels by confidence.
        progress: show a progress bar if the output is a terminal.
        on_prediction: called with the name and the predicted class ids, H x W, of each image of this rank, in the
            loader's order and in a thread of its own; predictions are not kept otherwise.

    Raises:
        DataError: the loaders of all ranks yield no image, or a mask holds a label that is neither a class nor 255.
        ModelError: the model predicts another number of classes than the data set has, or cannot predict an image
            (see ``predict``).
    """
    device = torch.device(device)
    model.to(device)
    total = ConfusionMatrix(len(classes))
    counter = image_counter(total, on_prediction, boundary=boundary, calibration=calibration)
    records = count_predictions(
        model,
        loader,
        counter,
        "Evaluating",
        stride=stride,
        normalise=normalise,
        device=device,
        precision=precision,
        protocol=protocol,
        progress=progress,
    )
    sum_in_place(total.matrix)
    turns = zip_longest(*gather(records))
    everyones = [record for turn in turns for record in turn if record is not None]
    if not everyones:
        raise DataError("data: the split has no image to evaluate; set another data.evaluation_split.")
    return Evaluation(total, everyones)


def image_counter(
    total: ConfusionMatrix,
    on_prediction: Callable[[str, NDArray[np.integer]], object] | None = None,
    *,
    boundary: bool = False,
    calibration: bool = False,
) -> Counter[ImageRecord]:
    """Return a counter of all that an evaluation records of an image.

    Args:
        total: receives the counts of all images.
        on_prediction: see ``score_images``.
        boundary: see ``score_images``.
        calibration: see ``score_images``.
    """

    def count(
        name: str, prediction: NDArray[np.integer], truth: NDArray[np.integer], certainty: Certainty | None = None
    ) -> ImageRecord:
        confusion = ConfusionMatrix(total.num_classes)
        confusion.update(prediction, truth)
        total.merge(confusion)
        if on_prediction is not None:
            on_prediction(name, prediction)
        record = _record(name, confusion, prediction, truth)
        if boundary:
            record["boundary"] = count_boundaries(prediction, truth, total.num_classes, total.ignore_index)
        if certainty is not None:
            confidence, sums = certainty.confidence.numpy(), certainty.sums.numpy()
            record["calibration"] = count_calibration(prediction, truth, confidence, sums, total.ignore_index)
        return record

    return Counter(total.num_classes, count, certainty=calibration)


def _record(
    name: str, confusion: ConfusionMatrix, prediction: NDArray[np.integer], truth: NDArray[np.integer]
) -> ImageRecord:
    scores = confusion.compute()
    return ImageRecord(
        name=name,
        miou=scores["miou"],
        pixel_accuracy=scores["pixel_accuracy"],
        intersection=confusion.intersection.tolist(),
        union=confusion.union.tolist(),
        strata=count_strata(prediction, truth, confusion.num_classes, confusion.ignore_index),
    )


def require_labels(evaluation: Evaluation, root: Path, split: str) -> None:
    """Check that a pixel was scored.

    Raises:
        DataError: the split has no labelled pixel.
    """
    if not evaluation.confusion.matrix.any():
        raise DataError(
            f"{root}: the split {split!r} has no labelled pixel (the labels of a test split are often withheld); "
            "choose another with data.evaluation_split."
        )
