"""Segmentation heads whose last layer can be computed for a few rows of the image at a time.

The last layer of a head makes the logits: a bilinear upsampling of logits at a lower resolution, or a convolution of a
few channels at the image's resolution. Its output is by far the largest tensor of a model with many classes, and a loss
or a prediction needs only a few rows of it at once.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from segmentation_models_pytorch.base import SegmentationHead as SmpHead
from segmentation_models_pytorch.decoders.dpt.decoder import DPTSegmentationHead as SmpDPTHead
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = [
    "DPTHead",
    "Logits",
    "RowLogits",
    "RowStream",
    "SegmentationHead",
    "bytes_at_once",
    "row_logits",
    "splittable_head",
]


# Bytes of the logits that are computed at once: on a CPU about the size of a core's caches.
_BYTES_AT_ONCE = {"cpu": 2**22}
_GPU_BYTES_AT_ONCE = 2**27


class SegmentationHead(nn.Sequential):
    """Head of segmentation-models-pytorch: convolution, bilinear upsampling or none, and no activation.

    Args:
        head: smp's head, whose layers, weights and names of weights it takes.

    Attributes:
        deferred: if True, ``forward`` returns the input of the last layer instead of the logits.
        scale: factor of the upsampling; 1 for none.
    """

    def __init__(self, head: SmpHead) -> None:
        super().__init__(*head.children())
        self.deferred = False
        self.scale: float = getattr(head[1], "scale_factor", 1)

    @property
    def last_conv(self) -> nn.Conv2d | None:
        """The convolution, if it is the last layer."""
        return self[0] if self.scale == 1 else None  # type: ignore[return-value]

    def forward(self, features: Tensor) -> Tensor:
        """Compute the logits of features (B, C, h, w), or the input of the last layer."""
        if not self.deferred:
            return super().forward(features)
        return features if self.scale == 1 else self[0](features)


class DPTHead(nn.Module):
    """DPT's head in segmentation-models-pytorch: convolutions and bilinear upsampling; see ``SegmentationHead``."""

    last_conv: nn.Conv2d | None = None

    def __init__(self, head: SmpDPTHead) -> None:
        super().__init__()
        self.head = head.head
        self.deferred = False
        self.scale: float = head.upsampling_factor

    def forward(self, features: Tensor) -> Tensor:
        """Compute the logits of features (B, C, h, w), or the input of the last layer."""
        logits = self.head(features)
        return logits if self.deferred else _upsample(logits, self.scale)


def splittable_head(head: nn.Module) -> nn.Module:
    """Return smp's head as one whose last layer can be deferred; any other module unchanged."""
    if isinstance(head, SmpHead):
        return SegmentationHead(head)
    return DPTHead(head) if isinstance(head, SmpDPTHead) else head


@dataclass(frozen=True)
class RowLogits:
    """Logits B x K x H x W, computed for a few rows at a time.

    Attributes:
        features: the input of the head's last layer, B x C x h x w.
        weights: weight and bias of the last layer, if it is a convolution (stride 1, same size).
        scale: factor by which the last layer upsamples, with aligned corners; 1 for none. It may be a fraction if its
            product with h and w is whole. Without a convolution and an upsampling the features are the logits.
        size: H and W, if the logits are cropped at the bottom or right.
        dtype: dtype in which the model computes the convolution, if it differs from that of the features.
    """

    features: Tensor
    weights: tuple[Tensor, ...] = ()
    scale: float = 1
    size: tuple[int, int] | None = None
    dtype: torch.dtype | None = None

    @property
    def shape(self) -> torch.Size:
        """The logits' shape (B, K, H, W)."""
        batch, channels, height, width = self.features.shape
        classes = len(self.weights[0]) if self.weights else channels
        return torch.Size((batch, classes, *(self.size or (int(height * self.scale), int(width * self.scale)))))

    @property
    def device(self) -> torch.device:
        """The logits' device."""
        return self.features.device

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """The tensors that the logits are computed from."""
        return self.features, *self.weights

    def crop(self, height: int, width: int) -> "RowLogits":
        """Return the logits of the upper left ``height`` x ``width`` pixels."""
        return replace(self, size=(height, width))

    def images(self) -> "list[RowLogits]":
        """Return the logits of each image of the batch, 1 x K x H x W."""
        return [replace(self, features=features) for features in self.features.split(1)]

    def whole(self) -> Tensor:
        """Compute all logits at once, as the head does."""
        dtype = self.dtype or self.features.dtype
        logits = self.features
        if self.weights:
            weights = [weight.to(dtype) for weight in self.weights]
            logits = _conv2d(logits.to(dtype), weights, (self._halo, self._halo))
        height, width = self.shape[2:]
        return _upsample(logits, self.scale)[..., :height, :width]

    def feature_rows(self, first: int, last: int) -> tuple[int, int]:
        """Return the range of the feature rows that the logits of rows ``first`` to ``last`` depend on."""
        height = self.features.shape[2]
        if self.scale == 1:
            return max(0, first - self._halo), min(height, last + self._halo)
        return int(first * self._step), min(height, int((last - 1) * self._step) + 2)

    def rows_at_once(self) -> int:
        """Return the number of rows of an image that suits the device."""
        _, classes, _, width = self.shape
        row = classes * width * max(4, self.features.element_size())
        return max(1, bytes_at_once(self.device) // max(1, row))

    def strips(self) -> Iterator[tuple[int, int, Tensor]]:
        """Yield the logits of one image in strips: the first row, the end, and a float32 tensor K x rows x W."""
        count, height = self.rows_at_once(), self.shape[2]
        for first in range(0, height, count):
            last = min(height, first + count)
            with torch.autocast(self.device.type, enabled=False):
                rows = self.compute(self.inputs_of(first, last), first, last)[0]
            yield first, last, rows

    def inputs_of(self, first: int, last: int) -> list[Tensor]:
        """Return the inputs of the logits of rows ``first`` to ``last``, as ``compute`` takes them."""
        start, stop = self.feature_rows(first, last)
        return [self.features[:, :, start:stop], *self.weights]

    def compute(self, inputs: Sequence[Tensor], first: int, last: int, dtype: torch.dtype | None = None) -> Tensor:
        """Compute the logits of some rows of one image.

        Args:
            inputs: see ``inputs_of``.
            first: first row of the logits.
            last: end of the rows.
            dtype: dtype of a convolution; None for the model's.

        Returns:
            A float32 tensor 1 x K x rows x W; float64 for float64 features.
        """
        features, *weights = inputs
        result = torch.promote_types(features.dtype, torch.float32)
        if weights:
            dtype = dtype or self.dtype or features.dtype
            logits = self._convolve(features.to(dtype), [weight.to(dtype) for weight in weights], first, last)
            logits = logits.to(result)
        elif self.scale == 1:
            logits = features.to(result)
        else:
            logits = self._interpolate(features.to(result), first, last)
        return logits[..., : self.shape[3]]

    def _convolve(self, features: Tensor, weights: Sequence[Tensor], first: int, last: int) -> Tensor:
        start, stop = self.feature_rows(first, last)
        above, below = self._halo - (first - start), self._halo - (stop - last)
        if above or below:
            features = F.pad(features, (0, 0, above, below))
        return _conv2d(features, weights, (0, self._halo))

    def _interpolate(self, features: Tensor, first: int, last: int) -> Tensor:
        start, stop = self.feature_rows(first, last)
        # PyTorch interpolates the channels-last layout fastest, and its gradient. Later operations are faster in the
        # other one.
        size = (stop - start, int(features.shape[3] * self.scale))
        wide = F.interpolate(_channels_last(features), size=size, mode="bilinear", align_corners=True)
        if wide.requires_grad:
            wide.register_hook(_channels_last)
        wide = _transposed(wide.permute(0, 2, 3, 1).flatten(1, 2)).view(wide.shape)
        # The weight of a feature row is 1 - its distance, in rows.
        dtype = torch.float32 if features.device.type == "mps" else torch.float64  # Apple's GPUs have no float64
        positions = torch.arange(first, last, dtype=dtype, device=features.device) * self._step
        rows = torch.arange(start, stop, dtype=dtype, device=features.device)
        weights = (1 - (positions[:, None] - rows).abs()).clamp_min(0).to(wide.dtype)
        return weights @ wide

    @property
    def _halo(self) -> int:
        """The feature rows above and below a row of logits that it depends on."""
        return self.weights[0].shape[2] // 2 if self.weights else 0

    @property
    def _step(self) -> float:
        """Distance of two rows of the logits, in rows of the features."""
        height = self.features.shape[2]
        return (height - 1) / (height * self.scale - 1)


@dataclass(frozen=True)
class RowStream:
    """Logits of one image, 1 x K x H x W, that are computed while they are read, once.

    Attributes:
        shape: (1, K, H, W).
        device: their device.
        rows: the strips, see ``RowLogits.strips``.
    """

    shape: torch.Size
    device: torch.device
    rows: Iterator[tuple[int, int, Tensor]]

    def strips(self) -> Iterator[tuple[int, int, Tensor]]:
        """Return the strips; see ``RowLogits.strips``."""
        return self.rows


Logits = RowLogits | RowStream


def bytes_at_once(device: torch.device) -> int:
    """Return how many bytes of logits are computed at once on a device."""
    return _BYTES_AT_ONCE.get(device.type, _GPU_BYTES_AT_ONCE)


def row_logits(model: nn.Module, images: Tensor) -> RowLogits:
    """Run a model up to the last layer of its head.

    An attribute of the head defers that layer during the call, so no other thread may run the model then.

    Args:
        model: maps float images (B, 3, H, W) to logits (B, K, H, W). Without a ``SegmentationHead`` or ``DPTHead`` the
            whole model is run.
        images: its input.
    """
    head = next((module for module in model.modules() if isinstance(module, SegmentationHead | DPTHead)), None)
    if head is None:
        return RowLogits(model(images))
    with _deferred(head):
        features = model(images)
    conv, device = head.last_conv, features.device.type
    weights = [] if conv is None else [tensor for tensor in (conv.weight, conv.bias) if tensor is not None]
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    return RowLogits(features, tuple(weights), head.scale, dtype=dtype)


@contextmanager
def _deferred(head: SegmentationHead | DPTHead) -> Iterator[None]:
    head.deferred = True
    try:
        yield
    finally:
        head.deferred = False


def _conv2d(features: Tensor, weights: Sequence[Tensor], padding: tuple[int, int]) -> Tensor:
    return F.conv2d(features, weights[0], weights[1] if len(weights) > 1 else None, padding=padding)


def _channels_last(image: Tensor) -> Tensor:
    """Return 1 x C x H x W in the channels-last layout."""
    if image.is_contiguous(memory_format=torch.channels_last):
        return image
    _, channels, height, width = image.shape
    return _transposed(image.flatten(2)).view(1, height, width, channels).permute(0, 3, 1, 2)


def _transposed(matrix: Tensor) -> Tensor:
    """Copy 1 x m x n to 1 x n x m, as a matrix, because PyTorch copies in blocks only those."""
    return matrix[0].t().contiguous()[None]


def _upsample(logits: Tensor, scale: float) -> Tensor:
    if scale == 1:
        return logits
    return F.interpolate(logits, scale_factor=scale, mode="bilinear", align_corners=True)
