"""Efficient Multi-scale Attention (EMA).

Paper: Ouyang et al., "Efficient Multi-Scale Attention Module with Cross-Spatial Learning",
ICASSP 2023, https://arxiv.org/abs/2305.13563
"""

from typing import Literal

import torch
from torch import Tensor, nn

from ema_seg.errors import ModelError

__all__ = ["EMA"]

_LARGEST_AUTO_FACTOR = 32


class EMA(nn.Module):
    """One weight map per channel group, learned from a 1×1 and a 3×3 branch that look at each other.

    The channels are split into ``factor`` groups that are folded into the batch, so all groups share the
    same small weights. In a group ``x`` of Cg = channels / factor channels:

    1. *1×1 branch*: row means and column means of ``x`` pass one shared 1×1 convolution; their sigmoids
       gate ``x`` along both axes, and a GroupNorm with one channel per group normalises the result: ``x1``.
    2. *3×3 branch*: ``x2`` is a 3×3 convolution of ``x``.
    3. *Cross-spatial learning*: each branch, averaged over the map and passed through a softmax over its
       channels, weighs the channels of the other; the two H×W sums are added, and their sigmoid is the
       weight map that multiplies every channel of the group.

    Parameter names and semantics are those of the published module, so published state dicts load.

    Args:
        channels: number C of input (and output) channels.
        c2: ignored; the published signature has it for model parsers that pass an output width.
        factor: number of channel groups, a divisor of ``channels``, or ``"auto"`` for the largest divisor
            that is at most 32.

    Shape:
        Input and output: (B, C, H, W), floating point, any H and W ≥ 1.

    Raises:
        ModelError: ``channels`` cannot be split into ``factor`` groups, or an input does not fit.
    """

    def __init__(self, channels: int, c2: int | None = None, factor: int | Literal["auto"] = 32) -> None:
        super().__init__()
        self.groups = _number_of_groups(channels, factor)
        width = channels // self.groups
        self.gn = nn.GroupNorm(num_groups=width, num_channels=width)
        self.conv1x1 = nn.Conv2d(width, width, kernel_size=1)
        self.conv3x3 = nn.Conv2d(width, width, kernel_size=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Re-weight ``x`` (B, C, H, W) by its weight maps; same shape and dtype."""
        batch, channels, height, width = self._check(x)
        grouped = x.reshape(batch * self.groups, channels // self.groups, height, width)
        return (grouped * self._weights(grouped)).reshape(batch, channels, height, width)

    def weight_map(self, x: Tensor) -> Tensor:
        """The weights in (0, 1) by which ``forward`` multiplies ``x``: (B, factor, H, W)."""
        batch, channels, height, width = self._check(x)
        grouped = x.reshape(batch * self.groups, channels // self.groups, height, width)
        return self._weights(grouped).reshape(batch, self.groups, height, width)

    def _weights(self, x: Tensor) -> Tensor:
        """Weight map of each group: (N, Cg, H, W) to (N, 1, H, W)."""
        height, width = x.shape[2:]
        # Plain means, because the backward of adaptive average pooling is not deterministic on CUDA.
        rows = x.mean(dim=3, keepdim=True)
        columns = x.mean(dim=2, keepdim=True).transpose(2, 3)
        gates = self.conv1x1(torch.cat([rows, columns], dim=2)).sigmoid()
        row_gate, column_gate = gates.split([height, width], dim=2)

        gated = x * row_gate * column_gate.transpose(2, 3)
        # Not self.gn(gated), which refuses a single group of one pixel; its normalisation is just zero.
        x1 = torch.group_norm(gated, self.gn.num_groups, self.gn.weight, self.gn.bias, self.gn.eps)
        x2 = self.conv3x3(x)
        weights = _cross(x1, x2) + _cross(x2, x1)
        return weights.sigmoid()

    def _check(self, x: Tensor) -> torch.Size:
        channels = self.groups * self.conv1x1.in_channels
        if x.ndim != 4 or x.shape[1] != channels:
            raise ModelError(f"EMA expects an input of shape (B, {channels}, H, W), got {tuple(x.shape)}.")
        return x.shape

    def extra_repr(self) -> str:
        """Show the number of groups in ``print(model)``."""
        return f"factor={self.groups}"


def _cross(descriptor: Tensor, features: Tensor) -> Tensor:
    """Sum the channels of ``features``, weighted by the softmax of ``descriptor``'s channel means.

    Both are (N, Cg, H, W); the result is (N, 1, H, W).
    """
    count, channels, height, width = features.shape
    weights = descriptor.mean(dim=(2, 3)).softmax(dim=1).unsqueeze(1)
    return (weights @ features.reshape(count, channels, height * width)).reshape(count, 1, height, width)


def _number_of_groups(channels: int, factor: int | Literal["auto"]) -> int:
    divisors = [divisor for divisor in range(1, channels + 1) if channels % divisor == 0]
    if factor == "auto":
        return max(divisor for divisor in divisors if divisor <= _LARGEST_AUTO_FACTOR)
    if not isinstance(factor, int) or factor not in divisors:
        raise ModelError(
            f"EMA cannot split {channels} channels into factor={factor!r} groups; "
            f"valid factors are {', '.join(map(str, divisors))}, or 'auto'."
        )
    return factor
