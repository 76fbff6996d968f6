"""Losses in strips of rows: the gradient of a strip is taken at once, so that memory holds one strip of logits.

Fused linear cross-entropy does the same for the tokens of a language model (Hsu et al., "Liger Kernel",
https://arxiv.org/abs/2410.10989). Here the last layer of the segmentation head is computed in the strips, too.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ema_seg.data.base import IGNORE_INDEX
from ema_seg.models.head import RowLogits

__all__ = ["InStrips", "Part", "Slopes", "Strip", "Term"]


class Strip:
    """Some rows of one image, N pixels.

    Args:
        logits: K x N.
        labels: int64 train ids of length N.
        log_normalizer: see the attribute; None computes it when it is needed.

    Attributes:
        labelled: False where a pixel is ignored, N.
        mask: the same as 0 and 1 in the logits' dtype, N.
        truth: the train ids, with 0 for ignored pixels, N.
    """

    def __init__(self, logits: Tensor, labels: Tensor, log_normalizer: Tensor | None = None) -> None:
        self.logits = logits
        self.labelled = labels != IGNORE_INDEX
        self.mask = self.labelled.to(logits.dtype)
        self.truth = labels.where(self.labelled, 0)
        self._log_normalizer = log_normalizer
        self._probabilities: Tensor | None = None

    @property
    def log_normalizer(self) -> Tensor:
        """Logarithm of the sum of the logits' exponentials, N."""
        if self._log_normalizer is None:
            highest = self.logits.amax(dim=0)
            exponentials = (self.logits - highest).exp_()
            total = exponentials.sum(dim=0)
            self._log_normalizer = highest + total.log()
            self._probabilities = exponentials.mul_(self.mask / total)
        return self._log_normalizer

    @property
    def probabilities(self) -> Tensor:
        """Softmax of the logits, K x N; 0 for ignored pixels."""
        normalizer = self.log_normalizer
        if self._probabilities is None:
            self._probabilities = (self.logits - normalizer.where(self.labelled, torch.inf)).exp_()
        return self._probabilities

    def of_truth(self, values: Tensor) -> Tensor:
        """Return the values K x N of each pixel's own class, N."""
        return values.gather(0, self.truth[None])[0]


class Slopes(NamedTuple):
    """Gradient of a loss with respect to the logits of a strip.

    It is ``probabilities * (classes[:, None] + pixels) + others``, plus ``truth`` at each pixel's own class. Without
    ``pixels`` it is ``others`` plus ``truth``.

    Attributes:
        classes: of length K; None for 0.
        pixels: of length N.
        others: K x N; None for 0.
        truth: of length N.
    """

    classes: Tensor | None
    pixels: Tensor | None
    others: Tensor | None
    truth: Tensor


Part = Callable[[Strip], tuple[Tensor, Callable[[], Slopes]]]
"""Function that returns a strip's part of the loss, and a function that computes its gradient."""


class Term(nn.Module):
    """Loss that is computed in strips.

    ``scans`` is True if ``prepare`` needs sums over the logits of all strips.
    """

    scans = False

    def scan(self, strip: Strip) -> Tensor:
        """Return what ``prepare`` needs of a strip."""
        raise NotImplementedError

    def prepare(self, target: Tensor, scanned: list[Tensor]) -> tuple[Tensor | None, Part]:
        """Prepare the loss of a batch.

        Args:
            target: int64 train ids B x H x W.
            scanned: the results of ``scan``, if the term scans.

        Returns:
            The loss, or None if it is the sum of the parts; and the parts, whose gradients are those of the loss.
        """
        raise NotImplementedError


class InStrips(torch.autograd.Function):
    """Weighted sum of terms, computed in strips of rows together with its gradient.

    Apply it to the logits (``RowLogits``), the int64 train ids B x H x W, the terms with their weights, the rows in a
    strip, whether the gradient is needed, and ``logits.inputs``.
    """

    @staticmethod
    def forward(
        context: Any,
        logits: RowLogits,
        target: Tensor,
        terms: Sequence[tuple[float, Term]],
        rows: int,
        learns: bool,
        *inputs: Tensor,
    ) -> Tensor:
        """Compute the loss, and the gradients of the inputs if they are needed."""
        dtype = torch.promote_types(logits.features.dtype, torch.float32)
        total = torch.zeros((), dtype=dtype, device=target.device)

        scanned: dict[Term, list[Tensor]] = {term: [] for _, term in terms if term.scans}
        normalizers: list[Tensor] = []
        for place in _places(logits, target, rows) if scanned else ():
            computed = place.compute(place.sources())
            strip = Strip(computed[0].flatten(1), place.labels)
            for term, results in scanned.items():
                results.append(term.scan(strip))
            normalizers.append(strip.log_normalizer)

        parts: list[tuple[float, Part, bool]] = []
        for weight, term in terms:
            value, part = term.prepare(target, scanned.get(term, []))
            if value is not None:
                total += weight * value
            if value is None or learns:
                parts.append((weight, part, value is None))

        gradients: list[Tensor] = []
        if learns:
            dtypes = _sum_dtypes(inputs)
            gradients = [torch.zeros_like(tensor, dtype=dtype) for tensor, dtype in zip(inputs, dtypes, strict=True)]
        for number, place in enumerate(_places(logits, target, rows) if parts else ()):
            with torch.set_grad_enabled(learns):
                sources = place.sources(learns)
                computed = place.compute(sources)
            normalizer = normalizers[number] if normalizers else None
            strip = Strip(computed.detach()[0].flatten(1), place.labels, normalizer)
            slopes: list[tuple[float, Slopes]] = []
            for weight, part, counts in parts:
                value, compute_slopes = part(strip)
                if counts:
                    total += weight * value
                if learns:
                    slopes.append((weight, compute_slopes()))
            if learns:
                gradient = _gradient(strip, slopes).view(computed.shape)
                into = [place.rows_of(gradients[0]), *gradients[1:]]
                for whole, own in zip(into, torch.autograd.grad(computed, sources, gradient), strict=True):
                    whole += own
        context.gradients, context.dtypes = gradients, [tensor.dtype for tensor in inputs]
        return total

    @staticmethod
    def backward(context: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients, multiplied by that of the loss."""
        gradients, context.gradients = context.gradients, None
        if gradients is None:
            raise RuntimeError("The loss's gradient is gone after its first backward; compute the loss again.")
        scaled = [gradient.mul_(outer[0]).to(dtype) for gradient, dtype in zip(gradients, context.dtypes, strict=True)]
        return None, None, None, None, None, *scaled


class _Place(NamedTuple):
    """Place of a strip: the image's index and logits, the strip's labels, its first row and its end."""

    image_index: int
    image: RowLogits
    labels: Tensor
    first: int
    last: int

    def rows_of(self, features: Tensor) -> Tensor:
        """Return the rows of a batch's features, or of their gradient, that the strip's logits depend on."""
        start, stop = self.image.feature_rows(self.first, self.last)
        return features[self.image_index : self.image_index + 1, :, start:stop]

    def sources(self, learns: bool = False) -> list[Tensor]:
        """Return the inputs of the strip's logits, detached."""
        inputs = self.image.inputs_of(self.first, self.last)
        dtypes = _sum_dtypes(inputs)
        return [tensor.detach().to(dtype).requires_grad_(learns) for tensor, dtype in zip(inputs, dtypes, strict=True)]

    def compute(self, sources: Sequence[Tensor]) -> Tensor:
        """Compute the strip's logits, 1 x K x rows x W."""
        # Gradients of a mean over millions of pixels are too small for float16.
        dtype = torch.float32 if self.image.dtype == torch.float16 else None
        return self.image.compute(sources, self.first, self.last, dtype)


def _places(logits: RowLogits, target: Tensor, rows: int) -> Iterator[_Place]:
    for index, (image, labels) in enumerate(zip(logits.images(), target, strict=True)):
        for first in range(0, len(labels), rows):
            strip = labels[first : first + rows]
            yield _Place(index, image, strip.flatten(), first, first + len(strip))


def _sum_dtypes(inputs: Sequence[Tensor]) -> list[torch.dtype]:
    """Return the dtypes in which the gradients of features and weights are summed.

    The gradient of a mean over millions of pixels is too small for float16 before the loss scale multiplies it. Those
    of the weights are sums over all strips.
    """
    features, *weights = (tensor.dtype for tensor in inputs)
    first = torch.float32 if features == torch.float16 else features
    return [first, *(torch.promote_types(dtype, torch.float32) for dtype in weights)]


def _gradient(strip: Strip, slopes: Sequence[tuple[float, Slopes]]) -> Tensor:
    """Sum weighted gradients with respect to the logits of a strip, K x N."""
    sums: list[Tensor | None] = []
    for field in zip(*(found for _, found in slopes), strict=True):
        terms = [weight * value for (weight, _), value in zip(slopes, field, strict=True) if value is not None]
        sums.append(sum(terms[1:], start=terms[0]) if terms else None)
    classes, pixels, others, truth = sums
    gradient = others
    if pixels is not None:
        gradient = strip.probabilities * (pixels if classes is None else classes[:, None] + pixels)
        if others is not None:
            gradient += others
    assert gradient is not None
    assert truth is not None
    return gradient.scatter_add_(0, strip.truth[None], truth[None])
