"""Example images: a model's best, median and worst predictions."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NotRequired, Protocol, TypedDict

import numpy as np
import torch
from torch import nn

from ema_seg.data.normalise import Normalise
from ema_seg.evaluation.evaluator import ImageRecord
from ema_seg.inference.classes import most_likely_classes
from ema_seg.inference.prediction import autocast
from ema_seg.inference.protocol import PLAIN, PredictionProtocol
from ema_seg.runtime.execution import evaluation_mode

__all__ = ["Example", "choose_examples", "predict_example", "predict_examples"]


class Example(TypedDict):
    """Image to draw: uint8 RGB H x W x 3, with its masks as integers H x W (255 = ignored).

    ``weight_map`` is the weight of each pixel in an attention block, float H x W.
    """

    title: str
    image: np.ndarray
    truth: np.ndarray
    prediction: np.ndarray
    weight_map: NotRequired[np.ndarray]


class Samples(Protocol):
    """Data set of transformed samples, by index."""

    def __getitem__(self, index: int) -> Mapping[str, Any]: ...


def choose_examples(records: Sequence[ImageRecord]) -> dict[str, int]:
    """Pick the images with the best, the median and the worst mean IoU.

    Images without a labelled pixel have no score and are skipped. No image is picked twice, so fewer than three
    scored images give fewer examples.

    Returns:
        Index into ``records`` by "best", "median" and "worst", in this order.
    """
    scored = [index for index, record in enumerate(records) if not math.isnan(record["miou"])]
    ranked = sorted(scored, key=lambda index: -records[index]["miou"])
    places = {"best": 0, "worst": len(ranked) - 1, "median": len(ranked) // 2}
    chosen: dict[str, int] = {}
    for label, place in places.items():
        if ranked and ranked[place] not in chosen.values():
            chosen[label] = ranked[place]
    return {label: chosen[label] for label in ("best", "median", "worst") if label in chosen}


def predict_examples(
    model: nn.Module,
    dataset: Samples,
    records: Sequence[ImageRecord],
    *,
    normalise: Normalise,
    stride: int,
    device: torch.device | str,
    precision: str | int = "32-true",
    protocol: PredictionProtocol = PLAIN,
) -> list[Example]:
    """Predict the best, median and worst image again, so that an evaluation need not keep its predictions.

    Args:
        model: the model that was evaluated.
        dataset: the data set that was evaluated, with its evaluation transform.
        records: the evaluation's records, in the data set's order.
        normalise: the normalisation that the model was trained with.
        stride: see ``score_images``.
        device: see ``score_images``.
        precision: see ``score_images``.
        protocol: see ``score_images``.
    """
    device = torch.device(device)
    examples: list[Example] = []
    with evaluation_mode(model), autocast(device, precision):
        for label, index in choose_examples(records).items():
            sample, score = dataset[index], records[index]["miou"]
            title = f"{label}: {sample['name']}, mIoU {100 * score:.1f}%"
            examples.append(predict_example(model, sample, title, stride, normalise, protocol))
    return examples


def predict_example(
    model: nn.Module,
    sample: Mapping[str, Any],
    title: str,
    stride: int,
    normalise: Normalise,
    protocol: PredictionProtocol = PLAIN,
) -> Example:
    """Predict one image for drawing; see ``predict_examples``. The caller sets the model's mode and precision."""
    (logits,) = protocol.predict(model, [sample["image"]], stride, normalise)
    return Example(
        title=title,
        image=sample["image"].permute(1, 2, 0).numpy(),
        truth=sample["mask"].numpy(),
        prediction=most_likely_classes(logits).cpu().numpy(),
    )
