"""Segmentation losses and weighted sums of them.

Every loss takes logits (B, K, H, W) and train ids (B, H, W), and leaves out pixels with the ignore index.

With several processes, cross-entropy, focal and Dice loss are computed over the global batch: the mean over the ranks
has the value and the gradient of a single process. OHEM and the Lovász loss sort the pixels; they are means of the
ranks' own losses.
"""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from segmentation_models_pytorch.losses import FocalLoss, LovaszLoss
from torch import Tensor, nn
from torch.nn import functional as F

from ema_seg.data.base import IGNORE_INDEX
from ema_seg.runtime.distributed.collectives import global_sum, sum_in_place
from ema_seg.runtime.distributed.ranks import rank_info
from ema_seg.runtime.errors import ConfigError, did_you_mean

__all__ = ["WeightedSum", "build_loss", "loss_names"]


def _global_mean(total: Tensor, count: Tensor) -> Tensor:
    """Return this rank's part of a mean over the global batch: the mean of all parts is that mean.

    Args:
        total: the sum over this rank's pixels, a scalar.
        count: their number, or the sum of their weights; not part of the graph. If it is 0 on all ranks, the mean is 0.
    """
    count = sum_in_place(count.clone())
    return rank_info().size * total * (count > 0) / count.where(count > 0, 1)


def _cross_entropy(logits: Tensor, target: Tensor, *, reduction: str, **options: Any) -> Tensor:
    """Compute torch's cross-entropy of images: a sum, or one value per pixel, B x H x W ("none")."""
    options["ignore_index"] = IGNORE_INDEX
    if logits.is_cuda and torch.are_deterministic_algorithms_enabled():
        losses = cross_entropy_by_rows(logits, target, **options)
        return losses.sum() if reduction == "sum" else losses
    return F.cross_entropy(logits, target, reduction=reduction, **options)


def cross_entropy_by_rows(logits: Tensor, target: Tensor, **options: Any) -> Tensor:
    """Compute torch's cross-entropy of each pixel, B x H x W, with the kernel for a list of samples.

    The kernel for images sums in the order in which its threads finish; torch rejects it on CUDA in deterministic mode.
    """
    rows = logits.movedim(1, -1).flatten(0, -2)
    return F.cross_entropy(rows, target.flatten(), reduction="none", **options).view(target.shape)


class CrossEntropy(nn.Module):
    """Mean cross-entropy over the labelled pixels.

    Args:
        classes: number K of classes.
        class_weights: K factors of 0 or more, one per class; the mean is then weighted. A batch whose labelled
            pixels all weigh 0 has a loss of 0.
        label_smoothing: share of the probability spread evenly over all classes.
    """

    def __init__(
        self, classes: int, class_weights: Sequence[float] | None = None, label_smoothing: float = 0.0
    ) -> None:
        super().__init__()
        if class_weights is not None:
            _check_class_weights(class_weights, classes)
        self.class_weights: Tensor | None
        self.register_buffer(
            "class_weights", None if class_weights is None else torch.tensor(class_weights, dtype=torch.float32)
        )
        self.label_smoothing = label_smoothing

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Compute the scalar loss."""
        total = _cross_entropy(
            logits, target, reduction="sum", weight=self.class_weights, label_smoothing=self.label_smoothing
        )
        labels = target[target != IGNORE_INDEX]
        weights = torch.ones_like(labels) if self.class_weights is None else self.class_weights[labels]
        return _global_mean(total, weights.sum())


def _check_class_weights(weights: Sequence[float], classes: int) -> None:
    key = "loss.cross_entropy.class_weights"
    if not isinstance(weights, Sequence) or isinstance(weights, str):
        raise ConfigError(f"{key}={weights!r} must be a list of one weight per class, or null.")
    if len(weights) != classes:
        raise ConfigError(f"{key}: {len(weights)} weights for {classes} classes; give one each.")
    for weight in weights:
        _check_weight(f"{key}={list(weights)}: a weight", weight)
    if not any(weights):
        raise ConfigError(f"{key}={list(weights)}: all weights are 0, so nothing is learned; give one above 0.")


def _check_weight(key: str, weight: object) -> None:
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < math.inf:
        raise ConfigError(f"{key} must be a number of 0 or more, got {weight!r}.")


class OHEM(nn.Module):
    """Cross-entropy over the hard pixels only (online hard example mining).

    Paper: Wu et al., "High-performance Semantic Segmentation Using Very Deep Fully Convolutional Networks",
    https://arxiv.org/abs/1604.04339

    A pixel is hard if the predicted probability of its class is at most ``threshold``. If there are fewer than
    ``min_kept`` times the number of images, the loss takes that many of the batch's hardest pixels instead.

    Args:
        classes: number K of classes (unused, for the common signature).
        threshold: probability in (0, 1].
        min_kept: number of pixels per image of the batch.
    """

    def __init__(self, classes: int, threshold: float = 0.7, min_kept: int = 10_000) -> None:
        super().__init__()
        if not 0 < threshold <= 1:
            raise ConfigError(f"loss.ohem.threshold must be a probability above 0 and at most 1, got {threshold}.")
        self.threshold = threshold
        self.min_kept = min_kept

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Compute the scalar loss."""
        losses = _cross_entropy(logits, target, reduction="none")
        losses = losses[target != IGNORE_INDEX]
        kept = max(1, min(self.min_kept * len(target), losses.numel()))
        hardest = losses.detach().topk(kept).values[-1]
        threshold = -torch.log(torch.tensor(self.threshold, device=losses.device, dtype=losses.dtype))
        return losses[losses >= torch.minimum(threshold, hardest)].mean()


class Dice(nn.Module):
    """Mean over the classes of 1 - Dice coefficient, each over the global batch; a class without a pixel counts as 0.

    Args:
        classes: number K of classes.
        smooth: added to numerator and denominator; 0 or more.
    """

    def __init__(self, classes: int, smooth: float = 1.0) -> None:
        _check_weight("loss.dice.smooth", smooth)
        super().__init__()
        self.classes = classes
        self.smooth = smooth

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Compute the scalar loss."""
        labelled = target != IGNORE_INDEX
        truth = F.one_hot(target.where(labelled, 0), self.classes).permute(0, 3, 1, 2) * labelled[:, None]
        probabilities = logits.softmax(dim=1) * labelled[:, None]
        sums = [part.sum(dim=(0, 2, 3)) for part in (probabilities * truth, probabilities, truth.to(logits.dtype))]
        intersection, predicted, true = global_sum(torch.stack(sums))
        dice = (2 * intersection + self.smooth) / (predicted + true + self.smooth).clamp_min(1e-7)
        return ((1 - dice) * (true > 0)).mean()


class Focal(nn.Module):
    """Mean focal loss over the labelled pixels and the classes, with one sigmoid per class.

    Paper: Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017, https://arxiv.org/abs/1708.02002

    Args:
        classes: number K of classes (unused, for the common signature).
        gamma: focusing exponent, 0 or more; a larger one lowers the weight of easy pixels.
        alpha: weight of a class's own pixels, from 0 to 1; all others weigh 1 - alpha. None for equal weights.
    """

    def __init__(self, classes: int, gamma: float = 2.0, alpha: float | None = None) -> None:
        _check_weight("loss.focal.gamma", gamma)
        if alpha is not None:
            _check_weight("loss.focal.alpha", alpha)
            if alpha > 1:
                raise ConfigError(f"loss.focal.alpha must be a number from 0 to 1, got {alpha!r}.")
        super().__init__()
        self.sum = FocalLoss("multiclass", alpha=alpha, gamma=gamma, ignore_index=IGNORE_INDEX, reduction="sum")

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Compute the scalar loss."""
        return _global_mean(self.sum(logits, target), (target != IGNORE_INDEX).sum())


def _lovasz(classes: int, per_image: bool = False) -> nn.Module:
    return LovaszLoss("multiclass", per_image=per_image, ignore_index=IGNORE_INDEX)


_LOSSES: dict[str, Callable[..., nn.Module]] = {
    "cross_entropy": CrossEntropy,
    "ohem": OHEM,
    "dice": Dice,
    "focal": Focal,
    "lovasz": _lovasz,
}
# Losses that all-reduce: every rank must call them.
_GLOBAL = ("cross_entropy", "dice", "focal")


def loss_names() -> tuple[str, ...]:
    """Return the names of the losses for ``build_loss``."""
    return tuple(_LOSSES)


class WeightedSum(nn.Module):
    """Weighted sum of losses, computed in float32, or in float64 for float64 logits."""

    def __init__(self, terms: Mapping[str, tuple[float, nn.Module]]) -> None:
        super().__init__()
        self.weights = {name: weight for name, (weight, _) in terms.items()}
        self.losses = nn.ModuleDict({name: loss for name, (_, loss) in terms.items()})

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Compute the scalar loss of logits (B, K, H, W) against train ids (B, H, W) of any integer dtype."""
        target = target.long()
        labels = (target != IGNORE_INDEX).sum()
        own, all_labels = bool(labels), bool(sum_in_place(labels))
        nothing = logits.float().sum() * 0.0
        if not all_labels:
            # No labelled pixel on any rank: return 0 instead of NaN.
            return nothing
        with torch.autocast(logits.device.type, enabled=False):
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            return torch.stack(
                [
                    self.weights[name] * loss(logits, target) if own or name in _GLOBAL else nothing
                    for name, loss in self.losses.items()
                ]
            ).sum()


def build_loss(terms: Mapping[str, Mapping[str, Any] | None], classes: int) -> WeightedSum:
    """Build the weighted sum of losses that ``terms`` describes.

    Args:
        terms: for each loss by name its ``weight`` (default 1) and its own options; None leaves the loss
            out. Example: ``{"cross_entropy": {"weight": 1.0}, "dice": {"weight": 0.5}}``.
        classes: number K of classes.

    Raises:
        ConfigError: a name, an option or a weight is invalid, or no loss has a weight above 0.
    """
    built: dict[str, tuple[float, nn.Module]] = {}
    for name, options in terms.items():
        if options is None:
            continue
        if name not in _LOSSES:
            raise ConfigError(
                f"loss.{name}: there is no such loss; choose from {', '.join(_LOSSES)}.{did_you_mean(name, _LOSSES)}"
            )
        if not isinstance(options, Mapping):
            raise ConfigError(
                f"loss.{name}={options!r}: must be a section of settings; set loss.{name}.weight={options!r}."
            )
        settings = dict(options)
        weight = settings.pop("weight", 1.0)
        _check_weight(f"loss.{name}.weight", weight)
        known = [key for key in inspect.signature(_LOSSES[name]).parameters if key != "classes"]
        for key in settings:
            if key not in known:
                raise ConfigError(
                    f"loss.{name}.{key}: there is no such option; choose from weight, {', '.join(known)}."
                )
        built[name] = (float(weight), _LOSSES[name](classes, **settings))
    if not built:
        raise ConfigError(f"loss: must have at least one term, got none; add one of {', '.join(_LOSSES)}.")
    if not any(weight for weight, _ in built.values()):
        raise ConfigError(
            f"loss: the weight of each term ({', '.join(built)}) is 0, so nothing is learned; raise one of them."
        )
    return WeightedSum(built)
