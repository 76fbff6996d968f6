"""Segmentation losses and weighted sums of them.

Every loss takes logits (B, K, H, W) and train ids (B, H, W), and leaves out pixels with the ignore index.

Losses are sums over pixels, so they are computed in strips of rows (``strips.py``), with gradients in closed form. The
Lovász loss sorts all pixels of a class and needs all logits at once.

With several processes, cross-entropy, focal and Dice loss are computed over the global batch: the mean over the ranks
has the value and the gradient of a single process. OHEM and the Lovász loss sort the pixels; they are means of the
ranks' own losses.
"""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from segmentation_models_pytorch.losses import LovaszLoss
from torch import Tensor, nn
from torch.nn import functional as F

from ema_seg.data.base import IGNORE_INDEX
from ema_seg.models.head import RowLogits
from ema_seg.runtime.distributed.collectives import sum_in_place
from ema_seg.runtime.distributed.ranks import rank_info
from ema_seg.runtime.errors import ConfigError, did_you_mean
from ema_seg.training.strips import InStrips, Part, Slopes, Strip, Term

__all__ = ["WeightedSum", "build_loss", "loss_names"]


def _split(target: Tensor) -> tuple[Tensor, Tensor]:
    """Return where a pixel is labelled, and the train ids with 0 for ignored pixels; both B x H x W."""
    labelled = target != IGNORE_INDEX
    return labelled, target.where(labelled, 0)


def _global_mean(count: Tensor) -> Callable[[Tensor], Tensor]:
    """Return a function from this rank's sum to its part of the mean over the global batch.

    The mean of the parts of all ranks is that mean.

    Args:
        count: the number of this rank's labelled pixels, or the sum of their weights. If it is 0 on all ranks, so is
            the mean.
    """
    count = sum_in_place(count.clone())
    some, size, divisor = count > 0, rank_info().size, count.where(count > 0, 1)
    return lambda total: size * some * total / divisor


class CrossEntropy(Term):
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
        _check_share("loss.cross_entropy.label_smoothing", label_smoothing)
        if class_weights is not None:
            _check_class_weights(class_weights, classes)
        self.class_weights: Tensor | None
        self.register_buffer(
            "class_weights", None if class_weights is None else torch.tensor(class_weights, dtype=torch.float32)
        )
        self.label_smoothing = label_smoothing

    def prepare(self, target: Tensor, scanned: list[Tensor]) -> tuple[None, Part]:
        """Divide the sum over the pixels by their number; see ``Term.prepare``."""
        labelled, truth = _split(target)
        mean = _global_mean(self._pixel_weights(truth, labelled).sum())

        def part(strip: Strip) -> tuple[Tensor, Callable[[], Slopes]]:
            # Smoothing spreads a share evenly: a part of the loss for each class, weighted by that class.
            share, classes = self.label_smoothing, len(strip.logits)
            weights = strip.logits.new_ones(classes) if self.class_weights is None else self.class_weights
            weights = weights.to(strip.logits.dtype)
            own = (1 - share) * self._pixel_weights(strip.truth, strip.mask).to(strip.logits.dtype)
            spread = share / classes * strip.mask
            value = (own * _cross_entropy(strip)).sum()
            if share:
                of_all = weights.sum() * strip.log_normalizer - weights @ strip.logits
                value = value + (spread * of_all.where(strip.labelled, 0)).sum()

            def slopes() -> Slopes:
                others = mean(-weights[:, None] * spread) if share else None
                return Slopes(None, mean(own + weights.sum() * spread), others, mean(-own))

            return mean(value), slopes

        return None, part

    def _pixel_weights(self, truth: Tensor, labelled: Tensor) -> Tensor:
        return labelled if self.class_weights is None else self.class_weights[truth] * labelled


def _cross_entropy(strip: Strip) -> Tensor:
    """Compute the loss of each pixel, N; 0 where it is ignored."""
    return (strip.log_normalizer - strip.of_truth(strip.logits)).where(strip.labelled, 0)


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


def _check_share(key: str, share: object) -> None:
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1:
        raise ConfigError(f"{key} must be a number from 0 to 1, got {share!r}.")


class OHEM(Term):
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

    scans = True

    def __init__(self, classes: int, threshold: float = 0.7, min_kept: int = 10_000) -> None:
        super().__init__()
        if not 0 < threshold <= 1:
            raise ConfigError(f"loss.ohem.threshold must be a probability above 0 and at most 1, got {threshold}.")
        self.most = -math.log(threshold)  # least loss of a hard pixel
        self.min_kept = min_kept

    def scan(self, strip: Strip) -> Tensor:
        """Compute the loss of each pixel; -inf where it is ignored."""
        return _cross_entropy(strip).where(strip.labelled, -math.inf)

    def prepare(self, target: Tensor, scanned: list[Tensor]) -> tuple[Tensor, Part]:
        """Find the least loss of a hard pixel; see ``Term.prepare``."""
        losses = torch.cat(scanned)
        kept = max(1, min(self.min_kept * len(target), losses.numel()))
        threshold = losses.topk(kept).values[-1].clamp_max(self.most)

        def hard(losses: Tensor) -> Tensor:
            # A loss of NaN counts as hard: a training must not go on without a word.
            return ~(losses < threshold) & (losses != -math.inf)

        count = hard(losses).sum().clamp_min(1)

        value = losses.where(hard(losses), 0).sum() / count

        def part(strip: Strip) -> tuple[Tensor, Callable[[], Slopes]]:
            pixels = hard(self.scan(strip)) * strip.mask / count
            return value, lambda: Slopes(None, pixels, None, -pixels)

        return value, part


class Dice(Term):
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

    scans = True

    def scan(self, strip: Strip) -> Tensor:
        """Sum the probabilities of each class: over its own pixels, and over all labelled ones; 2 x K."""
        probabilities = strip.probabilities
        intersection = probabilities.new_zeros(self.classes)
        intersection.index_add_(0, strip.truth, strip.of_truth(probabilities))
        return torch.stack([intersection, probabilities.sum(dim=1)])

    def prepare(self, target: Tensor, scanned: list[Tensor]) -> tuple[Tensor, Part]:
        """Compute the loss from the sums of all ranks, and its derivatives by them; see ``Term.prepare``."""
        own = torch.stack(scanned).sum(dim=0)
        labelled, truth = _split(target)
        true = own.new_zeros(self.classes).index_add(0, truth.flatten(), labelled.flatten().to(own.dtype))
        intersection, predicted, true = sum_in_place(torch.cat([own, true[None]]))
        numerator, sizes = 2 * intersection + self.smooth, predicted + true + self.smooth
        denominator = sizes.clamp_min(1e-7)
        share = (true > 0) / self.classes
        value = (share * (1 - numerator / denominator)).sum()
        # Derivatives by the two sums.
        share = share * rank_info().size
        by_intersection = -2 * share / denominator
        by_predicted = share * numerator / denominator**2 * (sizes > 1e-7)

        def part(strip: Strip) -> tuple[Tensor, Callable[[], Slopes]]:
            def slopes() -> Slopes:
                truth = by_intersection[strip.truth] * strip.of_truth(strip.probabilities)
                return Slopes(by_predicted, -(by_predicted @ strip.probabilities + truth), None, truth)

            return value, slopes

        return value, part


class Focal(Term):
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
            _check_share("loss.focal.alpha", alpha)
        super().__init__()
        self.gamma = gamma
        self.alpha = alpha

    def prepare(self, target: Tensor, scanned: list[Tensor]) -> tuple[None, Part]:
        """Divide the sum over the pixels by their number; see ``Term.prepare``."""
        mean = _global_mean((target != IGNORE_INDEX).sum())

        others, own = (1.0, 1.0) if self.alpha is None else (1 - self.alpha, self.alpha)

        def part(strip: Strip) -> tuple[Tensor, Callable[[], Slopes]]:
            of_truth, each = strip.of_truth(strip.logits), strip.mask / len(strip.logits)
            # All classes as if the pixel were another one's, corrected at its own.
            correction = own * self._binary(-of_truth) - others * self._binary(of_truth)
            losses = others * self._binary(strip.logits).sum(dim=0) + correction

            def slopes() -> Slopes:
                truth = -own * self._binary_slope(-of_truth) - others * self._binary_slope(of_truth)
                return Slopes(None, None, mean(others * each) * self._binary_slope(strip.logits), mean(each * truth))

            return mean((losses * each).sum()), slopes

        return None, part

    def _binary(self, logits: Tensor) -> Tensor:
        """Compute the loss of each sigmoid whose truth is 0."""
        losses = F.softplus(logits)  # -log(1 - p)
        return losses if self.gamma == 0 else losses * logits.sigmoid() ** self.gamma

    def _binary_slope(self, logits: Tensor) -> Tensor:
        """Compute the derivative of ``_binary``."""
        sigmoid = logits.sigmoid()
        if self.gamma == 0:
            return sigmoid
        return sigmoid**self.gamma * (sigmoid + self.gamma * F.softplus(logits) * (1 - sigmoid))


def _lovasz(classes: int, per_image: bool = False) -> nn.Module:
    return LovaszLoss("multiclass", per_image=per_image, ignore_index=IGNORE_INDEX)


_LOSSES: dict[str, Callable[..., nn.Module]] = {
    "cross_entropy": CrossEntropy,
    "ohem": OHEM,
    "dice": Dice,
    "focal": Focal,
    "lovasz": _lovasz,
}


def loss_names() -> tuple[str, ...]:
    """Return the names of the losses for ``build_loss``."""
    return tuple(_LOSSES)


class WeightedSum(nn.Module):
    """Weighted sum of losses, computed in float32, or in float64 for float64 logits.

    Args:
        terms: weight and loss by name.
        strips: rows in a strip; "auto" chooses them by the size of the logits, "off" computes all logits at once.
    """

    def __init__(
        self, terms: Mapping[str, tuple[float, nn.Module]], strips: int | Literal["auto", "off"] = "auto"
    ) -> None:
        super().__init__()
        self.weights = {name: weight for name, (weight, _) in terms.items()}
        self.losses = nn.ModuleDict({name: loss for name, (_, loss) in terms.items()})
        self.strips = strips

    def forward(self, logits: Tensor | RowLogits, target: Tensor) -> Tensor:
        """Compute the scalar loss of logits (B, K, H, W) against train ids (B, H, W) of any integer dtype.

        Its gradient is computed with it, so the backward can run once.
        """
        target = target.long()
        terms = [(self.weights[name], loss) for name, loss in self.losses.items()]
        in_strips = [(weight, loss) for weight, loss in terms if isinstance(loss, Term)]
        at_once = [(weight, loss) for weight, loss in terms if not isinstance(loss, Term)]
        if isinstance(logits, RowLogits) and (at_once or self.strips == "off"):
            logits = logits.whole()
        rows = logits if isinstance(logits, RowLogits) else RowLogits(logits)
        batch, _, *sides = rows.shape
        if tuple(target.shape) != (batch, *sides):
            raise ValueError(f"the target must have the logits' size {(batch, *sides)}, got {tuple(target.shape)}")
        with torch.autocast(target.device.type, enabled=False):
            height = self.strips if isinstance(self.strips, int) else rows.shape[2]
            if self.strips == "auto":
                height = rows.rows_at_once()
            learns = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in rows.inputs)
            total: Tensor = InStrips.apply(rows, target, in_strips, height, learns, *rows.inputs)
            # A mean over no pixel would be NaN.
            if at_once and bool((target != IGNORE_INDEX).any()):
                assert isinstance(logits, Tensor)
                logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
                total = total + torch.stack([weight * loss(logits, target) for weight, loss in at_once]).sum()
            return total


def build_loss(
    terms: Mapping[str, Mapping[str, Any] | None], classes: int, *, strips: int | Literal["auto", "off", False] = "auto"
) -> WeightedSum:
    """Build the weighted sum of losses that ``terms`` describes.

    Args:
        terms: for each loss by name its ``weight`` (default 1) and its own options; None leaves the loss
            out. Example: ``{"cross_entropy": {"weight": 1.0}, "dice": {"weight": 0.5}}``.
        classes: number K of classes.
        strips: see ``WeightedSum``; False is "off", as YAML reads it.

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
    return WeightedSum(built, strips or "off")
