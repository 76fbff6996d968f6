"""Scores near the boundaries of classes, where thin and small objects are lost that the mean IoU hides.

Boundary IoU: Cheng et al., "Boundary IoU: Improving Object-Centric Image Segmentation Evaluation", CVPR 2021,
https://arxiv.org/abs/2103.16562. The boundary of a class is the pixels of its mask that an erosion by a 3 x 3 square, d
times, removes; outside of the image there is no class. d is 2 % of the image's diagonal, at least 1 pixel. Pixels whose
truth is ignored belong to no class, in truth and prediction. Intersections and unions are summed over the images.

Trimap: the mean IoU of the pixels whose distance to the nearest true boundary is below a limit. The distance of a pixel
is the number of steps to the nearest pixel of another class, diagonal ones included, so that it is 1 beside a boundary.
The border of the image and ignored pixels are no boundary.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

import cv2
import numpy as np
from numpy.typing import NDArray

from ema_seg.evaluation.confusion import mean_of_defined, ratio

__all__ = [
    "TRIMAP_DISTANCES",
    "BoundaryCounts",
    "boundary_distance",
    "count_boundaries",
    "near_boundary",
    "score_boundaries",
]

TRIMAP_DISTANCES = (1, 2, 4, 8, 16, 32)
"""Limits of the trimap, in pixels."""

_SHARE_OF_DIAGONAL = 0.02
_NO_CLASS = 255


class BoundaryCounts(TypedDict):
    """Pixels of each of the K classes near boundaries of an image.

    ``intersection`` and ``union`` are those of the boundaries; ``trimap`` holds, for each of ``TRIMAP_DISTANCES``, a
    pair of intersection and union of the pixels up to that distance.
    """

    intersection: list[int]
    union: list[int]
    trimap: list[list[list[int]]]


def boundary_distance(height: int, width: int) -> int:
    """Return d, the width of a boundary in pixels, for an image of this size."""
    return max(1, round(_SHARE_OF_DIAGONAL * math.hypot(height, width)))


def count_boundaries(
    prediction: NDArray[np.integer], target: NDArray[np.integer], num_classes: int, ignore_index: int = 255
) -> BoundaryCounts:
    """Count the pixels near the boundaries of an image.

    Args:
        prediction: predicted class ids in [0, K), H x W.
        target: true class ids in [0, K) or the ignore index, H x W.
        num_classes: K, at most 255.
        ignore_index: the true label whose pixels are left out.
    """
    ignored = target == ignore_index
    truth, found = (np.where(ignored, _NO_CLASS, labels).astype(np.uint8) for labels in (target, prediction))
    distance = boundary_distance(*truth.shape)

    def count(labels: NDArray[np.uint8], chosen: NDArray[np.bool_]) -> NDArray[np.int64]:
        return np.bincount(labels[chosen], minlength=_NO_CLASS + 1)[:num_classes]

    in_truth, in_found = _boundary(truth, distance), _boundary(found, distance)
    right = truth == found
    intersection = count(truth, in_truth & in_found & right)
    union = count(truth, in_truth) + count(found, in_found) - intersection

    steps = _steps_to_another_class(truth)
    trimap = []
    for limit in TRIMAP_DISTANCES:
        near = (steps <= limit) & ~ignored
        both = count(truth, near & right)
        trimap.append([both.tolist(), (count(truth, near) + count(found, near) - both).tolist()])
    return BoundaryCounts(intersection=intersection.tolist(), union=union.tolist(), trimap=trimap)


def near_boundary(labels: NDArray[np.integer], ignore_index: int = 255) -> NDArray[np.bool_]:
    """Return the labelled pixels up to ``boundary_distance`` from a boundary of the class ids H x W."""
    known = np.where(labels == ignore_index, _NO_CLASS, labels).astype(np.uint8)
    return (_steps_to_another_class(known) <= boundary_distance(*labels.shape)) & (labels != ignore_index)


def score_boundaries(images: Sequence[BoundaryCounts]) -> dict[str, Any]:
    """Compute the scores over some images, at least one.

    Returns:
        ``boundary_iou`` (of each class; ``nan`` where it has no boundary), ``boundary_miou``, and ``trimap``: the
        ``distances`` in pixels and the ``miou`` up to each.
    """
    iou = _iou(images)
    bands = [
        _iou([{"intersection": image["trimap"][index][0], "union": image["trimap"][index][1]} for image in images])
        for index in range(len(TRIMAP_DISTANCES))
    ]
    return {
        "boundary_iou": iou.tolist(),
        "boundary_miou": mean_of_defined(iou),
        "trimap": {"distances": list(TRIMAP_DISTANCES), "miou": [mean_of_defined(band) for band in bands]},
    }


def _boundary(labels: NDArray[np.uint8], distance: int) -> NDArray[np.bool_]:
    """Return the pixels that an erosion of their own class removes, for all classes at once.

    A pixel stays if the square around it has one label: its lowest and its highest label are the same.
    """
    square = np.ones((2 * distance + 1, 2 * distance + 1), np.uint8)
    padded = np.pad(labels, distance, constant_values=_NO_CLASS)
    inside = np.s_[distance:-distance, distance:-distance]
    same: NDArray[np.bool_] = cv2.erode(padded, square)[inside] == cv2.dilate(padded, square)[inside]
    return ~same & (labels != _NO_CLASS)


def _steps_to_another_class(labels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return the distance of each pixel to the nearest one of another class, in steps; infinity without any."""
    square = np.ones((3, 3), np.uint8)
    # Ignored pixels take the label of a neighbour: they are no boundary.
    ignored = labels == _NO_CLASS
    low = cv2.erode(np.where(ignored, 255, labels), square)
    high = cv2.dilate(np.where(ignored, 0, labels), square)
    beside = (low != high) & ~ignored
    if not beside.any():
        return np.full(labels.shape, np.inf, np.float32)
    return 1 + cv2.distanceTransform((~beside).astype(np.uint8), cv2.DIST_C, 3)


def _iou(counts: Sequence[Mapping[str, Any]]) -> NDArray[np.float64]:
    intersection, union = (np.sum([image[key] for image in counts], axis=0) for key in ("intersection", "union"))
    return ratio(intersection, union)
