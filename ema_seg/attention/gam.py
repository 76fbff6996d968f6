"""Global Attention Mechanism (GAM).

Paper: Liu et al., "Global Attention Mechanism: Retain Information to Enhance Channel-Spatial Interactions", 2021,
https://arxiv.org/abs/2112.05561
"""

import torch
from torch import Tensor, nn

from ema_seg.attention.checks import PARTS, check_choice, check_positive

__all__ = ["GAM"]


class GAM(nn.Module):
    """Channel gate, then spatial gate, both without pooling.

    The channel gate is a perceptron over the channels of each pixel (here two 1×1 convolutions, equivalent to
    the paper's linear layers between permutations); the spatial gate is a bottleneck of two 7×7 convolutions,
    each with a BatchNorm.

    Args:
        channels: number C of input channels.
        reduction: both bottlenecks have ``channels // reduction`` channels, and at least one; the paper uses 4.
        parts: ``"both"``, or the ``"channel"`` or ``"spatial"`` gate alone.

    Shape:
        Input and output: (B, C, H, W).

    Raises:
        ModelError: an argument has an invalid value.
    """

    def __init__(self, channels: int, reduction: int = 4, parts: str = "both") -> None:
        check_positive("GAM", "channels", channels)
        check_positive("GAM", "reduction", reduction)
        check_choice("GAM", "parts", parts, PARTS)
        super().__init__()
        hidden = max(1, channels // reduction)
        self.channel = None if parts == "spatial" else _channel_gate(channels, hidden)
        self.spatial = None if parts == "channel" else _spatial_gate(channels, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """Re-weight ``x`` (B, C, H, W)."""
        if self.channel is not None:
            x = x * self.channel(x)
        if self.spatial is not None:
            x = x * self.spatial(x)
        return x

    def weight_map(self, x: Tensor) -> Tensor:
        """Compute the weights that ``forward`` multiplies ``x`` by: (B, C, H, W) in (0, 1)."""
        weights = torch.ones_like(x) if self.channel is None else self.channel(x)
        return weights if self.spatial is None else weights * self.spatial(x * weights)


def _channel_gate(channels: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, hidden, kernel_size=1),
        nn.ReLU(),
        nn.Conv2d(hidden, channels, kernel_size=1),
        nn.Sigmoid(),
    )


def _spatial_gate(channels: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, hidden, kernel_size=7, padding=3),
        nn.BatchNorm2d(hidden),
        nn.ReLU(),
        nn.Conv2d(hidden, channels, kernel_size=7, padding=3),
        nn.BatchNorm2d(channels),
        nn.Sigmoid(),
    )
