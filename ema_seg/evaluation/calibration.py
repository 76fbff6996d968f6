"""Calibration: agreement of a model's confidence with its accuracy.

The confidence of a pixel is the probability (softmax) of the predicted class. Pixels whose truth is ignored are left
out. All scores are over the pixels of all images:

* *expected calibration error* (Guo et al., "On Calibration of Modern Neural Networks", ICML 2017,
  https://arxiv.org/abs/1706.04599): the mean over 15 equal bins of confidence of |accuracy - mean confidence|, weighted
  by the pixels of the bin. A bin contains its upper limit.
* *negative log-likelihood*: the mean of -log of the probability of the true class, in nats.
* *Brier score* (1950): the mean of the squared distance between the probabilities and the truth, from 0 to 2.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ema_seg.evaluation.confusion import ratio
from ema_seg.inference.classes import most_likely_classes
from ema_seg.models.head import Logits, RowLogits

__all__ = ["BINS", "CalibrationCounts", "Certainty", "classify", "count_calibration", "score_calibration"]

BINS = 15


class Certainty(NamedTuple):
    """Confidence of a model in an image.

    Attributes:
        confidence: probability of the predicted class, float32 H x W.
        sums: sums over the labelled pixels of negative log-likelihood and Brier score in each strip, float32 S x 2.
    """

    confidence: Tensor
    sums: Tensor


class CalibrationCounts(TypedDict):
    """Sums over the labelled pixels of an image.

    ``pixels``, ``confidence`` and ``correct`` have a value for each bin of confidence: the number of pixels, the sum of
    their confidence, and the number of correct ones. ``nll`` and ``brier`` are sums over all of them.
    """

    pixels: list[int]
    confidence: list[float]
    correct: list[int]
    nll: float
    brier: float


@torch.inference_mode()
def classify(logits: Logits, target: Tensor, ignore_index: int = 255) -> tuple[Tensor, Certainty]:
    """Compute the most likely class of each pixel of an image, and the model's confidence in it.

    Args:
        logits: 1 x K x H x W, K at most 256.
        target: true class ids in [0, K) or the ignore index, uint8 H x W.
        ignore_index: the true label whose pixels are left out of the sums.

    Returns:
        The class ids as of ``most_likely_classes``, and the certainty, both on the logits' device.
    """
    device, classes = logits.device, logits.shape[1]
    # A last layer that is a convolution is computed once for both.
    upsampled = isinstance(logits, RowLogits) and logits.scale != 1
    computed = most_likely_classes(logits) if upsampled else None
    ids = torch.empty(logits.shape[2:], dtype=torch.uint8, device=device) if computed is None else computed
    confidence = torch.empty(logits.shape[2:], device=device)
    sums = []
    target = target.to(device, non_blocking=True)
    for first, last, rows in logits.strips():
        if computed is None:
            ids[first:last] = most_likely_classes(RowLogits(rows[None]))
        log_probability = rows.log_softmax(dim=0)
        own = ids[first:last].long()
        confidence[first:last] = log_probability.gather(0, own[None])[0].exp_()
        truth = target[first:last]
        labelled = truth != ignore_index
        log_of_truth = log_probability.gather(0, truth.long().clamp_max(classes - 1)[None])[0]
        squares = log_probability.exp_().square_().sum(dim=0)
        brier = squares - 2 * log_of_truth.exp() + 1
        sums.append(torch.stack([-log_of_truth, brier]).where(labelled, 0).sum(dim=(1, 2)))
    return ids, Certainty(confidence, torch.stack(sums))


def count_calibration(
    prediction: NDArray[np.integer],
    target: NDArray[np.integer],
    confidence: NDArray[np.float32],
    sums: NDArray[np.float32],
    ignore_index: int = 255,
) -> CalibrationCounts:
    """Count the labelled pixels of an image by confidence.

    Args:
        prediction: predicted class ids, H x W.
        target: true class ids or the ignore index, H x W.
        confidence: probability of the predicted class, H x W.
        sums: see ``Certainty``.
        ignore_index: the true label whose pixels are left out.
    """
    labelled = target != ignore_index
    sure, correct = confidence[labelled], (prediction == target)[labelled]
    # A probability that overflowed is nan; its sums make the scores undefined.
    bins = np.clip(np.ceil(np.nan_to_num(sure) * BINS).astype(np.intp) - 1, 0, BINS - 1)
    nll, brier = sums.sum(axis=0, dtype=float).tolist()
    return CalibrationCounts(
        pixels=np.bincount(bins, minlength=BINS).tolist(),
        confidence=np.bincount(bins, sure, BINS).tolist(),
        correct=np.bincount(bins[correct], minlength=BINS).tolist(),
        nll=nll,
        brier=brier,
    )


def score_calibration(images: Sequence[CalibrationCounts]) -> dict[str, Any]:
    """Compute the scores over some images, at least one; ``nan`` without a labelled pixel.

    Returns:
        ``ece``, ``nll``, ``brier``, and ``reliability``: ``pixels`` of each bin, their mean ``confidence`` and their
        ``accuracy`` (``nan`` for an empty bin).
    """
    pixels, confidence, correct = (
        np.sum([image[key] for image in images], axis=0) for key in ("pixels", "confidence", "correct")
    )
    total = pixels.sum()
    nll, brier = (sum(image[key] for image in images) for key in ("nll", "brier"))
    return {
        "ece": float(ratio(np.abs(correct - confidence).sum(), total)),
        "nll": float(ratio(np.asarray(nll), total)),
        "brier": float(ratio(np.asarray(brier), total)),
        "reliability": {
            "pixels": pixels.tolist(),
            "confidence": ratio(confidence, pixels).tolist(),
            "accuracy": ratio(correct, pixels).tolist(),
        },
    }
