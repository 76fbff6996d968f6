"""Triplet attention.

Paper: Misra et al., "Rotate to Attend: Convolutional Triplet Attention Module", WACV 2021,
https://arxiv.org/abs/2010.03045
"""

import torch
from torch import Tensor, nn

from ema_seg.attention.checks import PARTS, check_choice, check_odd, check_positive

__all__ = ["TripletAttention"]


class TripletAttention(nn.Module):
    """Mean of three copies of the input, gated across channels and width, channels and height, height and width.

    Each gate is a convolution of the maximum and the mean over the remaining dimension, a BatchNorm and a sigmoid.

    Args:
        channels: number C of input channels; no weight depends on it.
        kernel_size: kernel size of the convolutions, odd; the paper uses 7.
        parts: ``"both"`` for all three branches, ``"channel"`` for the two across channels, ``"spatial"`` for the
            one across height and width.

    Shape:
        Input and output: (B, C, H, W).

    Raises:
        ModelError: an argument has an invalid value.
    """

    def __init__(self, channels: int, kernel_size: int = 7, parts: str = "both") -> None:
        check_positive("triplet attention", "channels", channels)
        check_odd("triplet attention", "kernel_size", kernel_size)
        check_choice("triplet attention", "parts", parts, PARTS)
        super().__init__()
        self.parts = parts
        if parts != "spatial":
            self.cw = _gate(kernel_size)
            self.hc = _gate(kernel_size)
        if parts != "channel":
            self.hw = _gate(kernel_size)

    def forward(self, x: Tensor) -> Tensor:
        """Re-weight ``x`` (B, C, H, W)."""
        return x * self.weight_map(x)

    def weight_map(self, x: Tensor) -> Tensor:
        """Compute the weights that ``forward`` multiplies ``x`` by: (B, C, H, W) in (0, 1), or 1 in place of C."""
        gates = []
        if self.parts != "spatial":
            gates.append(self.cw(_z_pool(x, 2)).transpose(1, 2))  # (B, C, 1, W)
            gates.append(self.hc(_z_pool(x, 3).transpose(2, 3)).permute(0, 3, 2, 1))  # (B, C, H, 1)
        if self.parts != "channel":
            gates.append(self.hw(_z_pool(x, 1)))  # (B, 1, H, W)
        return sum(gates[1:], gates[0]) / len(gates)


def _z_pool(x: Tensor, dim: int) -> Tensor:
    """Stack the maximum and the mean over one dimension as the two channels of a map of the others."""
    return torch.stack([x.amax(dim), x.mean(dim)], dim=1)


def _gate(kernel_size: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 1, kernel_size, padding=kernel_size // 2, bias=False),
        nn.BatchNorm2d(1, momentum=0.01),
        nn.Sigmoid(),
    )
