"""Convolutional Block Attention Module (CBAM).

Paper: Woo et al., "CBAM: Convolutional Block Attention Module", ECCV 2018, https://arxiv.org/abs/1807.06521
"""

import torch
from torch import Tensor, nn

from ema_seg.attention.checks import PARTS, check_choice, check_odd, check_positive

__all__ = ["CBAM"]


class CBAM(nn.Module):
    """Channel gate, then spatial gate, each computed from means and maxima.

    The channel gate applies one perceptron to the global means and to the global maxima, and takes the sigmoid of the
    sum. The spatial gate is the sigmoid of a convolution of the mean and the maximum over the channels. Both follow
    the paper's equations, which have neither biases nor normalisation; the authors' code has biases in the perceptron
    and a BatchNorm after the convolution. timm's block always has that BatchNorm, hence this one.

    Args:
        channels: number C of input channels.
        reduction: the perceptron has ``channels // reduction`` hidden units, and at least one; the paper uses 16.
        kernel_size: kernel size of the spatial gate's convolution, odd; the paper uses 7.
        batch_norm: put a BatchNorm after that convolution, as the authors' code does.
        parts: ``"both"``, or the ``"channel"`` or ``"spatial"`` gate alone.

    Shape:
        Input and output: (B, C, H, W).

    Raises:
        ModelError: an argument has an invalid value.
    """

    def __init__(
        self, channels: int, reduction: int = 16, kernel_size: int = 7, batch_norm: bool = False, parts: str = "both"
    ) -> None:
        check_positive("CBAM", "channels", channels)
        check_positive("CBAM", "reduction", reduction)
        check_odd("CBAM", "kernel_size", kernel_size)
        check_choice("CBAM", "batch_norm", batch_norm, (False, True))
        check_choice("CBAM", "parts", parts, PARTS)
        super().__init__()
        self.channel = nn.Identity() if parts == "spatial" else _ChannelGate(channels, reduction)
        self.spatial = nn.Identity() if parts == "channel" else _SpatialGate(kernel_size, batch_norm)

    def forward(self, x: Tensor) -> Tensor:
        """Re-weight ``x`` (B, C, H, W)."""
        return self.spatial(self.channel(x))

    def weight_map(self, x: Tensor) -> Tensor:
        """Compute the weights that ``forward`` multiplies ``x`` by: (B, C, H, W), or 1 in place of C or of H, W."""
        weights = x.new_ones(1, 1, 1, 1)
        if isinstance(self.channel, _ChannelGate):
            weights = self.channel.gate(x)
            x = x * weights
        return weights * self.spatial.gate(x) if isinstance(self.spatial, _SpatialGate) else weights


class _ChannelGate(nn.Module):
    def __init__(self, channels: int, reduction: int) -> None:
        super().__init__()
        hidden = max(1, channels // reduction)
        self.mlp = nn.Sequential(
            nn.Conv2d(channels, hidden, kernel_size=1, bias=False),
            nn.ReLU(),
            nn.Conv2d(hidden, channels, kernel_size=1, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x)

    def gate(self, x: Tensor) -> Tensor:
        mean, largest = x.mean(dim=(2, 3), keepdim=True), x.amax(dim=(2, 3), keepdim=True)
        return (self.mlp(mean) + self.mlp(largest)).sigmoid()


class _SpatialGate(nn.Module):
    def __init__(self, kernel_size: int, batch_norm: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 1, kernel_size, padding=kernel_size // 2, bias=False)
        self.norm = nn.BatchNorm2d(1) if batch_norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x)

    def gate(self, x: Tensor) -> Tensor:
        pooled = torch.cat([x.mean(dim=1, keepdim=True), x.amax(dim=1, keepdim=True)], dim=1)
        return self.norm(self.conv(pooled)).sigmoid()
