"""Shuffle attention of SA-Net.

Paper: Zhang and Yang, "SA-Net: Shuffle Attention for Deep Convolutional Neural Networks", ICASSP 2021,
https://arxiv.org/abs/2102.00056
"""

from typing import Literal

import torch
from torch import Tensor, nn

from ema_seg.attention.checks import check_positive, largest_divisor
from ema_seg.runtime.errors import ModelError

__all__ = ["ShuffleAttention"]

_PUBLISHED_GROUPS = 64


class ShuffleAttention(nn.Module):
    """Gates for channel groups: one half gated by its global means, the other by its normalised values.

    The groups share their weights. The channels are shuffled at the end, so that the halves mix in the next layer.

    Args:
        channels: number C of input channels, even.
        groups: number of groups, a divisor of ``channels / 2``; the paper uses 64. ``"auto"`` takes the largest
            divisor up to 64.

    Shape:
        Input and output: (B, C, H, W).

    Raises:
        ModelError: ``channels`` is not a positive even number, or ``groups`` does not divide ``channels / 2``.
    """

    def __init__(self, channels: int, groups: int | Literal["auto"] = "auto") -> None:
        check_positive("shuffle attention", "channels", channels)
        if channels % 2:
            raise ModelError(f"shuffle attention: needs an even number of channels, got {channels}.")
        if groups == "auto":
            groups = largest_divisor(channels // 2, _PUBLISHED_GROUPS)
        check_positive("shuffle attention", "groups", groups)
        if channels % (2 * groups):
            raise ModelError(
                f"shuffle attention: groups must be a divisor of {channels // 2}, half the number of channels, "
                f"or 'auto', got {groups}."
            )
        super().__init__()
        self.groups = groups
        half = channels // (2 * groups)
        self.cweight = nn.Parameter(torch.zeros(1, half, 1, 1))
        self.cbias = nn.Parameter(torch.ones(1, half, 1, 1))
        self.sweight = nn.Parameter(torch.zeros(1, half, 1, 1))
        self.sbias = nn.Parameter(torch.ones(1, half, 1, 1))
        self.gn = nn.GroupNorm(half, half)

    def forward(self, x: Tensor) -> Tensor:
        """Re-weight and shuffle ``x`` (B, C, H, W)."""
        first, second, first_gate, second_gate = self._halves(x)
        # Autocast leaves the products with the weights in float32.
        first, second = first * first_gate.to(x.dtype), second * second_gate.to(x.dtype)
        return self.shuffle(torch.cat([first, second], dim=1).reshape(x.shape))

    def weight_map(self, x: Tensor) -> Tensor:
        """Compute the weights by which ``forward`` multiplies ``x`` before the shuffle: (B, C, H, W) in (0, 1)."""
        first, second, first_gate, second_gate = self._halves(x)
        return torch.cat([first_gate.expand_as(first), second_gate.expand_as(second)], dim=1).reshape(x.shape)

    def shuffle(self, x: Tensor) -> Tensor:
        """Permute the channels as ``forward`` does after the re-weighting."""
        batch, channels, height, width = x.shape
        halves = x.reshape(batch, 2, channels // 2, height, width)
        return halves.transpose(1, 2).reshape(x.shape)

    def _halves(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the two halves of each group of ``x`` and their gates."""
        batch, channels, height, width = x.shape
        grouped = x.reshape(batch * self.groups, channels // self.groups, height, width)
        first, second = grouped.chunk(2, dim=1)
        first_gate = (self.cweight * first.mean(dim=(2, 3), keepdim=True) + self.cbias).sigmoid()
        second_gate = (self.sweight * self._normalise(second) + self.sbias).sigmoid()
        return first, second, first_gate, second_gate

    def _normalise(self, features: Tensor) -> Tensor:
        # The module's forward rejects one value per group in a batch of one; torch.group_norm normalises it to zero.
        return torch.group_norm(features, self.gn.num_groups, self.gn.weight, self.gn.bias, self.gn.eps)

    def extra_repr(self) -> str:
        """Show the number of groups in ``print(model)``."""
        return f"groups={self.groups}"
