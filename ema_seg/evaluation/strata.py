"""Scores by the size of objects, because large objects hide small ones in the mean.

An *object* is an 8-connected component of one class, and its size the number of its labelled pixels; the limits of the
strata are those of COCO (https://cocodataset.org/#detection-eval). For a class and a stratum

* the *intersection* is the correctly predicted pixels of the true objects of that size;
* the *union* is all pixels of those objects, and the wrongly predicted pixels that lie in predicted objects of
  that size.

So every pixel of a class's intersection and union counts in exactly one stratum: the strata add up to the counts of the
confusion matrix. Pixels whose truth is ignored are not counted, and are removed from the prediction before its objects
are found.
"""

from typing import TypedDict

import cv2
import numpy as np
from numpy.typing import NDArray

from ema_seg.evaluation.counting import count_objects, countable

__all__ = ["STRATA", "StratumCounts", "count_strata", "count_strata_by_class", "score_strata", "small_objects"]

STRATA = {
    "small": "objects under 32² pixels",
    "medium": "objects from 32² to under 96² pixels",
    "large": "objects from 96² pixels",
}
"""Meaning of each stratum by name, in order of size."""

_LIMITS = (32**2, 96**2)


class StratumCounts(TypedDict):
    """Pixels of each of the K classes in one stratum."""

    intersection: list[int]
    union: list[int]


def count_strata(
    prediction: NDArray[np.integer], target: NDArray[np.integer], num_classes: int, ignore_index: int = 255
) -> dict[str, StratumCounts]:
    """Count the intersection and the union of each class in each stratum.

    Args:
        prediction: predicted class ids in [0, K), H x W.
        target: true class ids in [0, K) or the ignore index, H x W.
        num_classes: K.
        ignore_index: the true label whose pixels are left out.

    Returns:
        The counts by the names of ``STRATA``.
    """
    if countable(prediction, target, num_classes, ignore_index):
        return _by_name(*count_objects(prediction, target, num_classes, ignore_index, _LIMITS))  # type: ignore[arg-type]
    return count_strata_by_class(prediction, target, num_classes, ignore_index)


def count_strata_by_class(
    prediction: NDArray[np.integer], target: NDArray[np.integer], num_classes: int, ignore_index: int = 255
) -> dict[str, StratumCounts]:
    """Count the strata one class after the other, where there are no kernels; see ``count_strata``."""
    intersection = np.zeros((len(STRATA), num_classes), np.int64)
    union = np.zeros_like(intersection)
    labelled = target != ignore_index
    right = prediction == target
    occurring = np.zeros(num_classes, bool)
    occurring[target[labelled]] = True
    occurring[prediction[labelled]] = True
    for index in np.flatnonzero(occurring):
        truth = target == index
        truly, found = _by_size(truth, right)
        intersection[:, index], union[:, index] = found, truly
        claimed = (prediction == index) & labelled
        union[:, index] += _by_size(claimed, ~truth)[1]
    return _by_name(intersection, union)


def _by_name(intersection: NDArray[np.int64], union: NDArray[np.int64]) -> dict[str, StratumCounts]:
    return {
        name: StratumCounts(intersection=inside.tolist(), union=whole.tolist())
        for name, inside, whole in zip(STRATA, intersection, union, strict=True)
    }


def small_objects(labels: NDArray[np.integer], ignore_index: int = 255) -> NDArray[np.bool_]:
    """Return the pixels of small objects, H x W, for class ids H x W."""
    small = np.zeros(labels.shape, bool)
    for index in np.unique(labels[labels != ignore_index]):
        _, objects = cv2.connectedComponents((labels == index).view(np.uint8), connectivity=8)
        sizes = np.bincount(objects.ravel())
        sizes[0] = _LIMITS[0]  # all that is not of the class
        small |= (sizes < _LIMITS[0])[objects]
    return small


def score_strata(images: list[dict[str, StratumCounts]], num_classes: int) -> dict[str, list[float]]:
    """Compute the IoU of each class in each stratum over some images; ``nan`` where a class has no pixel."""
    scores = {}
    for name in STRATA:
        totals = {
            key: np.sum([image[name][key] for image in images], axis=0, dtype=np.int64) + np.zeros(num_classes)
            for key in ("intersection", "union")
        }
        with np.errstate(invalid="ignore"):
            scores[name] = (totals["intersection"] / totals["union"]).tolist()
    return scores


def _by_size(mask: NDArray[np.bool_], chosen: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Count in each stratum the pixels of the mask's objects of that size, and the ``chosen`` ones among them."""
    pixels = mask.view(np.uint8)
    left, top, width, height = cv2.boundingRect(pixels)
    if width == 0:
        return np.zeros(len(STRATA), np.int64), np.zeros(len(STRATA), np.int64)
    # Most classes lie in a small part of an image, and the cost of labelling grows with the pixels.
    box = np.s_[top : top + height, left : left + width]
    # OpenCV's own statistics take ten times as long as the labels, because they hold more than sizes.
    count, labels = cv2.connectedComponents(pixels[box], connectivity=8)
    inside = np.flatnonzero(mask[box])
    found = labels.ravel()[inside]
    sizes = np.bincount(found, minlength=count)
    hits = np.bincount(found[chosen[box].ravel()[inside]], minlength=count)
    stratum = np.searchsorted(_LIMITS, sizes, side="right")
    return _totals(stratum, sizes), _totals(stratum, hits)


def _totals(stratum: NDArray[np.intp], pixels: NDArray[np.integer]) -> NDArray[np.int64]:
    # bincount adds weights in float64, which is exact up to 2^53 pixels.
    return np.bincount(stratum, weights=pixels, minlength=len(STRATA)).astype(np.int64)
