"""Efficient Local Attention (ELA).

Paper: Xu and Wan, "ELA: Efficient Local Attention for Deep Convolutional Neural Networks", 2024,
https://arxiv.org/abs/2403.01123
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ema_seg.attention.checks import check_choice, check_positive, largest_divisor

__all__ = ["ELA"]


class _Variant(NamedTuple):
    kernel_size: int
    channels_per_group: int  # of the convolution
    groups: int  # of the normalisation


_VARIANTS = {
    "tiny": _Variant(5, 1, 32),
    "base": _Variant(7, 1, 16),
    "small": _Variant(5, 8, 16),
    "large": _Variant(7, 8, 16),
}


class ELA(nn.Module):
    """Row gates and column gates for each channel, without a bottleneck.

    The row means and the column means each pass the same 1D convolution, GroupNorm and sigmoid.

    Args:
        channels: number C of input channels.
        variant: the paper's ELA-T (``"tiny"``: kernel 5, depthwise, 32 groups of normalisation), ELA-B (``"base"``:
            7, depthwise, 16), ELA-S (``"small"``: 5, groups of 8 channels, 16) or ELA-L (``"large"``: 7, groups of
            8 channels, 16). A group size or number of groups that does not divide ``channels`` is replaced by the
            largest smaller number that does.

    Shape:
        Input and output: (B, C, H, W).

    Raises:
        ModelError: ``channels`` is not a positive whole number, or ``variant`` is unknown.
    """

    def __init__(self, channels: int, variant: str = "base") -> None:
        check_positive("ELA", "channels", channels)
        check_choice("ELA", "variant", variant, tuple(_VARIANTS))
        super().__init__()
        kernel_size, channels_per_group, groups = _VARIANTS[variant]
        self.conv = nn.Conv1d(
            channels,
            channels,
            kernel_size,
            padding=kernel_size // 2,
            groups=channels // largest_divisor(channels, channels_per_group),
            bias=False,
        )
        self.gn = nn.GroupNorm(largest_divisor(channels, groups), channels)

    def forward(self, x: Tensor) -> Tensor:
        """Re-weight ``x`` (B, C, H, W)."""
        return x * self._gates(x.mean(dim=3)).unsqueeze(3) * self._gates(x.mean(dim=2)).unsqueeze(2)

    def weight_map(self, x: Tensor) -> Tensor:
        """Compute the weights that ``forward`` multiplies ``x`` by: (B, C, H, W) in (0, 1)."""
        return self._gates(x.mean(dim=3)).unsqueeze(3) * self._gates(x.mean(dim=2)).unsqueeze(2)

    def _gates(self, means: Tensor) -> Tensor:
        # The module's forward rejects one value per group in a batch of one; torch.group_norm normalises it to zero.
        norm = self.gn
        return torch.group_norm(self.conv(means), norm.num_groups, norm.weight, norm.bias, norm.eps).sigmoid()
