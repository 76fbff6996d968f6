"""The confusion matrix, from which every score derives.

The definitions are those of the two benchmarks' own tools: pixel-level evaluation in Cityscapes' scripts
(https://github.com/mcordts/cityscapesScripts) and the development kit of ADE20K's scene parsing challenge
(https://github.com/CSAILVision/sceneparsing). Pixels are counted over the whole data set before
any division. Pixels whose truth is the ignore index are not counted, whatever the prediction.
"""

from typing import TypedDict

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from ema_seg.evaluation.counting import count_pixels, countable
from ema_seg.runtime.errors import ConfigError, DataError, ModelError

__all__ = ["ConfusionMatrix", "Scores", "mean_of_defined", "ratio"]


class Scores(TypedDict):
    """Scores of ``ConfusionMatrix.compute``: fractions in [0, 1], ``nan`` where undefined."""

    miou: float
    iou: list[float]
    mean_accuracy: float
    pixel_accuracy: float
    fw_iou: float


class ConfusionMatrix:
    """Counts of pixels by true and predicted class.

    Attributes:
        num_classes: K, the number of classes.
        ignore_index: the true label whose pixels are left out.
        matrix: int64 tensor K x K on the CPU; row = true class, column = predicted class. It is the whole
            state: add the matrices of several ranks to score their union.
    """

    def __init__(self, num_classes: int, ignore_index: int = 255) -> None:
        if num_classes < 1:
            raise ConfigError(f"num_classes={num_classes}: a confusion matrix needs at least one class.")
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.matrix = torch.zeros(num_classes, num_classes, dtype=torch.int64)

    def update(self, prediction: Tensor | ArrayLike, target: Tensor | ArrayLike) -> None:
        """Count the pixels of one or more images.

        Args:
            prediction: predicted class ids; any integer type, shape and device.
            target: true class ids of the same shape.

        Raises:
            ModelError: the shapes differ, a type is not integer, or a labelled pixel's prediction lies outside [0, K).
            DataError: a true label is neither in [0, K) nor the ignore index.
        """
        if countable(prediction, target, self.num_classes, self.ignore_index):
            matrix = count_pixels(prediction, target, self.num_classes, self.ignore_index)  # type: ignore[arg-type]
            if matrix is not None:
                self.matrix += torch.from_numpy(matrix)
                return
        prediction, target = _as_integers(prediction, "prediction"), _as_integers(target, "target")
        if prediction.shape != target.shape:
            raise ModelError(
                f"the prediction must have the target's shape {tuple(target.shape)}, got {tuple(prediction.shape)}; "
                "resize it before counting."
            )
        target = target.to(prediction.device)
        labelled = target != self.ignore_index
        truth, predicted = target[labelled].long(), prediction[labelled].long()
        if truth.numel() == 0:
            return
        if found := self._outside(truth):
            raise DataError(
                f"the target must hold classes from 0 to {self.num_classes - 1} or the ignore index "
                f"{self.ignore_index}, got {found}; check the label files or the number of classes."
            )
        if found := self._outside(predicted):
            raise ModelError(
                f"the prediction must hold classes from 0 to {self.num_classes - 1}, got {found}; "
                "use a model with the data set's number of classes."
            )
        pairs = truth * self.num_classes + predicted
        counts = torch.bincount(pairs, minlength=self.num_classes**2)
        self.matrix += counts.view_as(self.matrix).to(self.matrix.device)

    def merge(self, other: "ConfusionMatrix") -> None:
        """Add the counts of another matrix over the same classes.

        Raises:
            ConfigError: the numbers of classes differ.
        """
        if other.num_classes != self.num_classes:
            raise ConfigError(
                "confusion matrices: must have the same number of classes, "
                f"got {self.num_classes} and {other.num_classes}."
            )
        self.matrix += other.matrix.to(self.matrix.device)

    def compute(self) -> Scores:
        """Derive the scores from the counts.

        * ``iou`` of a class: intersection / union of its true and predicted pixels. A class without a pixel
          in truth or prediction has no union and so no IoU (``nan``); one that is predicted but never occurs
          scores 0.
        * ``miou``: the mean over the classes that have an IoU.
        * ``mean_accuracy``: the mean accuracy (recall) over the classes that occur in the truth.
        * ``pixel_accuracy``: the fraction of labelled pixels predicted correctly.
        * ``fw_iou``: the mean IoU, weighted by the frequency of each class in the truth.

        Without any labelled pixel every score is ``nan``.
        """
        matrix = self.matrix.cpu().numpy()
        correct, truth = matrix.diagonal(), matrix.sum(axis=1)
        iou = ratio(correct, self.union)
        occurs = truth > 0
        return Scores(
            miou=mean_of_defined(iou),
            iou=iou.tolist(),
            mean_accuracy=mean_of_defined(ratio(correct, truth)[occurs]),
            pixel_accuracy=float(ratio(correct.sum(), truth.sum())),
            fw_iou=float(ratio((truth[occurs] * iou[occurs]).sum(), truth.sum())),
        )

    @property
    def intersection(self) -> np.ndarray:
        """Correctly predicted pixels of each class, int64 of length K."""
        return self.matrix.cpu().numpy().diagonal().copy()

    @property
    def union(self) -> np.ndarray:
        """Pixels of each class in truth or prediction, int64 of length K."""
        matrix = self.matrix.cpu().numpy()
        return matrix.sum(axis=0) + matrix.sum(axis=1) - matrix.diagonal()

    @property
    def absent(self) -> list[int]:
        """Classes that occur in neither truth nor prediction, which the mean IoU leaves out."""
        return np.flatnonzero(self.union == 0).tolist()

    def _outside(self, labels: Tensor) -> str | None:
        """Return the lowest label if it is negative, else the highest if it is K or more, as text; else None."""
        low, high = (int(bound) for bound in labels.aminmax())
        if low < 0:
            return str(low)
        return str(high) if high >= self.num_classes else None


def _as_integers(labels: Tensor | ArrayLike, role: str) -> Tensor:
    if not isinstance(labels, Tensor):
        array = np.asarray(labels)
        if not np.issubdtype(array.dtype, np.integer):
            raise ModelError(f"the {role} must have an integer dtype (class ids), got {array.dtype}.")
        # A copy also removes negative strides and read-only memory, which torch does not support.
        return torch.from_numpy(np.array(array, dtype=np.int64, order="C"))
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ModelError(f"the {role} must have an integer dtype (class ids), got {labels.dtype}.")
    return labels


def ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Divide part by whole in float64; nan where both are 0."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.true_divide(part, whole)


def mean_of_defined(values: np.ndarray) -> float:
    """Return the mean of the values that are not nan; nan if there are none."""
    defined = values[~np.isnan(values)]
    return float(np.mean(defined)) if len(defined) else float("nan")
