"""EMA as published: the definition that every faster implementation is compared with."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import conv2d

from ema_seg.runtime.errors import ModelError

__all__ = ["Parameters", "channel_weights", "cross", "forward", "normalise"]


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
    batch, channels, height, width = x.shape
    grouped = x.reshape(batch * groups, channels // groups, height, width)
    pooled, x1, x2 = _branches(grouped, parameters, eps, dynamic)
    weights = cross(pooled, x2) + cross(x2, x1)
    return (grouped * weights.sigmoid()).reshape(batch, channels, height, width)


def channel_weights(x: Tensor, parameters: Parameters, groups: int, eps: float, dynamic: bool) -> tuple[Tensor, Tensor]:
    """Compute the softmax of each branch, (B · groups, Cg), the 1×1 branch first; arguments as in ``forward``."""
    grouped = x.reshape(len(x) * groups, -1, *x.shape[2:])
    pooled, _, x2 = _branches(grouped, parameters, eps, dynamic)
    return _softmax_of_means(pooled), _softmax_of_means(x2)


def _branches(grouped: Tensor, parameters: Parameters, eps: float, dynamic: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Compute what the softmax of the 1×1 branch pools, and the features of both branches, (N, Cg, H, W) each."""
    w1, b1, w3, b3, gamma, beta = parameters
    # Plain means, because the backward of adaptive average pooling is not deterministic on CUDA.
    rows = grouped.mean(dim=3, keepdim=True)
    columns = grouped.mean(dim=2, keepdim=True).transpose(2, 3)
    gates = conv2d(torch.cat([rows, columns], dim=2), w1, b1).sigmoid()
    row_gate, column_gate = gates.split(list(grouped.shape[2:]), dim=2)

    gated = grouped * row_gate * column_gate.transpose(2, 3)
    x1 = normalise(gated, gamma, beta, eps)
    return (gated if dynamic else x1), x1, conv2d(grouped, w3, b3, padding=1)


def normalise(features: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Tensor:
    """Apply GroupNorm with one channel per group."""
    # The module and nn.functional's reject a single group of one pixel; torch.group_norm normalises it to zero.
    return torch.group_norm(features, features.shape[1], gamma, beta, eps)


def cross(descriptor: Tensor, features: Tensor) -> Tensor:
    """Sum the channels of ``features``, weighted by the softmax of ``descriptor``'s channel means.

    Both are (N, Cg, H, W); the result is (N, 1, H, W).
    """
    count, channels, height, width = features.shape
    weights = _softmax_of_means(descriptor).unsqueeze(1)
    return (weights @ features.reshape(count, channels, height * width)).reshape(count, 1, height, width)


def _softmax_of_means(descriptor: Tensor) -> Tensor:
    return descriptor.mean(dim=(2, 3)).softmax(dim=1)
