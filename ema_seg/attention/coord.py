"""Coordinate attention.

Paper: Hou et al., "Coordinate Attention for Efficient Mobile Network Design", CVPR 2021,
https://arxiv.org/abs/2103.02907
"""

import torch
from torch import Tensor, nn

from ema_seg.attention.checks import check_positive

__all__ = ["CoordinateAttention"]

_FEWEST_HIDDEN = 8


class CoordinateAttention(nn.Module):
    """Row gates and column gates for each channel.

    The row means and the column means pass one bottleneck together; one 1×1 convolution then computes the row gates,
    another the column gates.

    Args:
        channels: number C of input channels.
        reduction: the bottleneck has ``channels // reduction`` channels, and at least 8 as in the authors' code;
            the paper uses 32.

    Shape:
        Input and output: (B, C, H, W).

    Raises:
        ModelError: an argument is not a positive whole number.
    """

    def __init__(self, channels: int, reduction: int = 32) -> None:
        check_positive("coordinate attention", "channels", channels)
        check_positive("coordinate attention", "reduction", reduction)
        super().__init__()
        hidden = max(_FEWEST_HIDDEN, channels // reduction)
        self.conv1 = nn.Conv2d(channels, hidden, kernel_size=1)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.act = nn.Hardswish()  # the paper does not name the activation; this is the authors' code's
        self.conv_h = nn.Conv2d(hidden, channels, kernel_size=1)
        self.conv_w = nn.Conv2d(hidden, channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        """Re-weight ``x`` (B, C, H, W)."""
        rows, columns = self._gates(x)
        return x * rows * columns

    def weight_map(self, x: Tensor) -> Tensor:
        """Compute the weights that ``forward`` multiplies ``x`` by: (B, C, H, W) in (0, 1)."""
        rows, columns = self._gates(x)
        return rows * columns

    def _gates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the gates of the rows (B, C, H, 1) and of the columns (B, C, 1, W)."""
        height, width = x.shape[2:]
        rows = x.mean(dim=3, keepdim=True)
        columns = x.mean(dim=2, keepdim=True).transpose(2, 3)
        both = self.act(self.bn1(self.conv1(torch.cat([rows, columns], dim=2))))
        rows, columns = both.split([height, width], dim=2)
        return self.conv_h(rows).sigmoid(), self.conv_w(columns.transpose(2, 3)).sigmoid()
