"""Segmentation losses and weighted sums of them.

Every loss takes logits (B, K, H, W) and train ids (B, H, W), and leaves out pixels with the ignore index.

Losses are sums over pixels, so they are computed in strips of rows, and the gradient of a strip is taken at once:
beside the logits and their gradient, memory holds one strip. (Fused linear cross-entropy does the same for the tokens
of a language model: Hsu et al., "Liger Kernel", https://arxiv.org/abs/2410.10989.) The Lovász loss sorts all pixels of
a class and needs them whole.

With several processes, cross-entropy, focal and Dice loss are computed over the global batch: the mean over the ranks
has the value and the gradient of a single process. OHEM and the Lovász loss sort the pixels; they are means of the
ranks' own losses.
"""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from segmentation_models_pytorch.losses import LovaszLoss
from torch import Tensor, nn
from torch.nn import functional as F

from ema_seg.data.base import IGNORE_INDEX
from ema_seg.runtime.distributed.collectives import sum_in_place
from ema_seg.runtime.distributed.ranks import rank_info
from ema_seg.runtime.errors import ConfigError, did_you_mean

__all__ = ["WeightedSum", "build_loss", "loss_names"]


Part = Callable[[Tensor, Tensor], Tensor]
"""Function of the logits and the train ids of a strip."""


class Term(nn.Module):
    """Loss that is computed in strips.

    ``scans`` is True if ``prepare`` needs sums over the logits of all strips.
    """

    scans = False

    def scan(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return what ``prepare`` needs of a strip."""
        raise NotImplementedError

    def prepare(self, target: Tensor, scanned: list[Tensor]) -> tuple[Tensor | None, Part]:
        """Prepare the loss of a batch.

        Args:
            target: int64 train ids B x H x W.
            scanned: the results of ``scan``, if the term scans.

        Returns:
            The loss, or None if it is the sum of the parts; and a function of a strip, whose gradients are those of the
            loss.
        """
        raise NotImplementedError


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
        weights = self.class_weights
        mean = _global_mean((labelled if weights is None else weights[truth] * labelled).sum())

        def part(logits: Tensor, target: Tensor) -> Tensor:
            weight = None if weights is None else weights.to(logits.dtype)
            options = {"weight": weight, "label_smoothing": self.label_smoothing}
            return mean(_cross_entropy(logits, target, reduction="sum", **options))

        return None, part


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

    def scan(self, logits: Tensor, target: Tensor) -> Tensor:
        """Compute the loss of each pixel; -inf where it is ignored."""
        losses = _cross_entropy(logits, target, reduction="none")
        return losses.masked_fill(target == IGNORE_INDEX, -math.inf)

    def prepare(self, target: Tensor, scanned: list[Tensor]) -> tuple[Tensor, Part]:
        """Find the least loss of a hard pixel; see ``Term.prepare``."""
        losses = torch.cat([strip.flatten() for strip in scanned])
        kept = max(1, min(self.min_kept * len(target), losses.numel()))
        threshold = losses.topk(kept).values[-1].clamp_max(self.most)

        def hard(losses: Tensor) -> Tensor:
            # A loss of NaN counts as hard: a training must not go on without a word.
            return ~(losses < threshold) & (losses != -math.inf)

        count = hard(losses).sum().clamp_min(1)

        def mean(losses: Tensor) -> Tensor:
            return losses.where(hard(losses), 0).sum() / count

        return mean(losses), lambda logits, target: mean(self.scan(logits, target))


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

    def scan(self, logits: Tensor, target: Tensor) -> Tensor:
        """Sum the probabilities of each class: over its own pixels, and over all labelled ones; 2 x K."""
        mask, truth = _split(target)
        labelled, probabilities = mask.to(logits.dtype), logits.softmax(dim=1)
        of_truth = probabilities.gather(1, truth[:, None])[:, 0] * labelled
        intersection = logits.new_zeros(self.classes).index_add(0, truth.flatten(), of_truth.flatten())
        return torch.stack([intersection, torch.einsum("bkhw,bhw->k", probabilities, labelled)])

    def prepare(self, target: Tensor, scanned: list[Tensor]) -> tuple[Tensor, Part]:
        """Compute the loss from the sums of all ranks, and its derivatives by them; see ``Term.prepare``."""
        own = torch.stack(scanned).sum(dim=0)
        labelled, truth = _split(target)
        true = own.new_zeros(self.classes).index_add(0, truth.flatten(), labelled.flatten().to(own.dtype))
        intersection, predicted, true = sum_in_place(torch.cat([own, true[None]]))
        numerator, sizes = 2 * intersection + self.smooth, predicted + true + self.smooth
        denominator = sizes.clamp_min(1e-7)
        share = (true > 0) / self.classes
        slopes = torch.stack([-2 * share / denominator, share * numerator / denominator**2 * (sizes > 1e-7)])
        slopes = slopes * rank_info().size

        def part(logits: Tensor, target: Tensor) -> Tensor:
            return (slopes * self.scan(logits, target)).sum()

        return (share * (1 - numerator / denominator)).sum(), part


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
            _check_weight("loss.focal.alpha", alpha)
            if alpha > 1:
                raise ConfigError(f"loss.focal.alpha must be a number from 0 to 1, got {alpha!r}.")
        super().__init__()
        self.gamma = gamma
        self.alpha = alpha

    def prepare(self, target: Tensor, scanned: list[Tensor]) -> tuple[None, Part]:
        """Divide the sum over the pixels by their number; see ``Term.prepare``."""
        mean = _global_mean((target != IGNORE_INDEX).sum())

        def part(logits: Tensor, target: Tensor) -> Tensor:
            labelled, truth = _split(target)
            of_truth = logits.gather(1, truth[:, None])
            others, own = (1.0, 1.0) if self.alpha is None else (1 - self.alpha, self.alpha)
            # All classes as if the pixel were another one's, corrected at its own.
            losses = others * self._binary(logits).sum(dim=1)
            losses = losses - others * self._binary(of_truth)[:, 0] + own * self._binary(-of_truth)[:, 0]
            return mean((losses * labelled).sum() / logits.shape[1])

        return None, part

    def _binary(self, logits: Tensor) -> Tensor:
        """Compute the loss of each sigmoid whose truth is 0."""
        losses = F.softplus(logits)  # -log(1 - p)
        return losses if self.gamma == 0 else losses * logits.sigmoid() ** self.gamma


def _lovasz(classes: int, per_image: bool = False) -> nn.Module:
    return LovaszLoss("multiclass", per_image=per_image, ignore_index=IGNORE_INDEX)


_LOSSES: dict[str, Callable[..., nn.Module]] = {
    "cross_entropy": CrossEntropy,
    "ohem": OHEM,
    "dice": Dice,
    "focal": Focal,
    "lovasz": _lovasz,
}
# Bytes of the logits in a strip, in the loss's dtype.
_STRIP_BYTES = {"cpu": 2**21, "cuda": 2**27}


def loss_names() -> tuple[str, ...]:
    """Return the names of the losses for ``build_loss``."""
    return tuple(_LOSSES)


class WeightedSum(nn.Module):
    """Weighted sum of losses, computed in float32, or in float64 for float64 logits.

    Args:
        terms: weight and loss by name.
        rows: rows in a strip; None chooses them by the size of the logits.
    """

    def __init__(self, terms: Mapping[str, tuple[float, nn.Module]], rows: int | None = None) -> None:
        super().__init__()
        self.weights = {name: weight for name, (weight, _) in terms.items()}
        self.losses = nn.ModuleDict({name: loss for name, (_, loss) in terms.items()})
        self.rows = rows

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Compute the scalar loss of logits (B, K, H, W) against train ids (B, H, W) of any integer dtype.

        Its gradient is computed with it, so the backward can run once.
        """
        target = target.long()
        terms = [(self.weights[name], loss) for name, loss in self.losses.items()]
        with torch.autocast(logits.device.type, enabled=False):
            strips = [(weight, loss) for weight, loss in terms if isinstance(loss, Term)]
            total: Tensor = _InStrips.apply(logits, target, strips, self.rows or _strip_rows(logits))
            whole = [(weight, loss) for weight, loss in terms if not isinstance(loss, Term)]
            # A mean over no pixel would be NaN.
            if whole and bool((target != IGNORE_INDEX).any()):
                logits = logits.to(total.dtype)
                total = total + torch.stack([weight * loss(logits, target) for weight, loss in whole]).sum()
            return total


def _strip_rows(logits: Tensor) -> int:
    batch, classes, _, width = logits.shape
    row = batch * classes * width * max(4, logits.element_size())
    return max(1, _STRIP_BYTES.get(logits.device.type, 2**27) // max(1, row))


class _InStrips(torch.autograd.Function):
    """Weighted sum of terms, computed in strips of rows together with its gradient."""

    @staticmethod
    def forward(context: Any, logits: Tensor, target: Tensor, terms: Sequence[tuple[float, Term]], rows: int) -> Tensor:
        dtype = torch.promote_types(logits.dtype, torch.float32)
        strips = list(zip(logits.split(rows, dim=2), target.split(rows, dim=1), strict=True))
        learns = context.needs_input_grad[0]

        total = torch.zeros((), dtype=dtype, device=logits.device)
        parts: list[tuple[float, Part, bool]] = []
        for weight, term in terms:
            scanned = [term.scan(strip.to(dtype), labels) for strip, labels in strips] if term.scans else []
            value, part = term.prepare(target, scanned)
            if value is not None:
                total += weight * value
            if value is None or learns:
                parts.append((weight, part, value is None))

        # The gradient of a mean over millions of pixels is too small for float16 before the loss scale multiplies it.
        stored = dtype if logits.dtype == torch.float16 else logits.dtype
        gradient = torch.zeros_like(logits, dtype=stored) if learns else None
        gradients = [None] * len(strips) if gradient is None else gradient.split(rows, dim=2)
        for (strip, labels), into in zip(strips, gradients, strict=True):
            strip = strip.to(dtype).detach().requires_grad_(learns)
            with torch.set_grad_enabled(learns):
                values = [weight * part(strip, labels) for weight, part, _ in parts]
                learned = sum(values)
            for value, (_, _, counts) in zip(values, parts, strict=True):
                if counts:
                    total += value.detach()
            if into is not None and isinstance(learned, Tensor):
                into.copy_(torch.autograd.grad(learned, strip)[0])
        context.gradient, context.dtype = gradient, logits.dtype
        return total

    @staticmethod
    def backward(context: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        gradient, context.gradient = context.gradient, None
        if gradient is None:
            raise RuntimeError("The loss's gradient is gone after its first backward; compute the loss again.")
        return gradient.mul_(outer[0]).to(context.dtype), None, None, None


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
