"""EMA as published: the definition that every faster implementation is compared with."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import conv2d

from ema_seg.runtime.errors import ModelError

__all__ = ["Parameters", "cross", "forward", "normalise"]


class Parameters(NamedTuple):
    """The six parameters of the block, for groups of Cg channels."""

    w1: Tensor  # weight of the 1×1 convolution (Cg, Cg, 1, 1)
    b1: Tensor  # its bias (Cg,)
    w3: Tensor  # weight of the 3×3 convolution (Cg, Cg, 3, 3)
    b3: Tensor  # its bias (Cg,)
    gamma: Tensor  # weight of the normalisation (Cg,)
    beta: Tensor  # bias of the normalisation (Cg,)

    def to(self, dtype: torch.dtype) -> "Parameters":
        """Convert all of them to one dtype."""
        return Parameters(*(parameter.to(dtype) for parameter in self))


def forward(x: Tensor, parameters: Parameters, groups: int, eps: float, dynamic: bool) -> Tensor:
    """Re-weight ``x`` (B, C, H, W); differentiable to any order.

    Args:
        x: floating point (B, C, H, W).
        parameters: the block's, in x's dtype.
        groups: number of channel groups.
        eps: number that the normalisation adds to the variance.
        dynamic: pool the descriptor of the 1×1 branch before the normalisation instead of after it.

    Raises:
        ModelError: x and the parameters differ in dtype, and autocast is disabled.
    """
    device = x.device.type
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    if x.dtype != parameters.w1.dtype and not autocast:
        raise ModelError(
            f"EMA's parameters are {parameters.w1.dtype} and the input is {x.dtype}, but the implementation "
            "'reference' needs one dtype; convert one to the other."
        )
    w1, b1, w3, b3, gamma, beta = parameters
    batch, channels, height, width = x.shape
    grouped = x.reshape(batch * groups, channels // groups, height, width)

    # Plain means, because the backward of adaptive average pooling is not deterministic on CUDA.
    rows = grouped.mean(dim=3, keepdim=True)
    columns = grouped.mean(dim=2, keepdim=True).transpose(2, 3)
    gates = conv2d(torch.cat([rows, columns], dim=2), w1, b1).sigmoid()
    row_gate, column_gate = gates.split([height, width], dim=2)

    gated = grouped * row_gate * column_gate.transpose(2, 3)
    x1 = normalise(gated, gamma, beta, eps)
    x2 = conv2d(grouped, w3, b3, padding=1)
    weights = cross(gated if dynamic else x1, x2) + cross(x2, x1)
    return (grouped * weights.sigmoid()).reshape(batch, channels, height, width)


def normalise(features: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Tensor:
    """Apply GroupNorm with one channel per group."""
    # The module and nn.functional's reject a single group of one pixel; torch.group_norm normalises it to zero.
    return torch.group_norm(features, features.shape[1], gamma, beta, eps)


def cross(descriptor: Tensor, features: Tensor) -> Tensor:
    """Sum the channels of ``features``, weighted by the softmax of ``descriptor``'s channel means.

    Both are (N, Cg, H, W); the result is (N, 1, H, W).
    """
    count, channels, height, width = features.shape
    weights = descriptor.mean(dim=(2, 3)).softmax(dim=1).unsqueeze(1)
    return (weights @ features.reshape(count, channels, height * width)).reshape(count, 1, height, width)
