"""Bottleneck Attention Module (BAM).

Paper: Park et al., "BAM: Bottleneck Attention Module", BMVC 2018, https://arxiv.org/abs/1807.06514
"""

from torch import Tensor, nn

from ema_seg.attention.checks import PARTS, check_batch, check_choice, check_positive

__all__ = ["BAM"]


class BAM(nn.Module):
    """Gate from the sum of a channel map and a spatial map, with a residual: x + x · sigmoid(Mc + Ms).

    Mc is a perceptron of the global means, Ms a bottleneck with two dilated 3×3 convolutions; each ends in a
    BatchNorm that brings both to one scale. This is the paper's form, with the ReLUs between the layers that its
    equations omit. The authors' code multiplies Mc and Ms instead of adding them, and normalises before each ReLU
    instead of at the end.

    Args:
        channels: number C of input channels.
        reduction: both bottlenecks have ``channels // reduction`` channels, and at least one; the paper uses 16.
        dilation: dilation of the 3×3 convolutions; the paper uses 4.
        parts: ``"both"``, or the ``"channel"`` or ``"spatial"`` map alone.

    Shape:
        Input and output: (B, C, H, W); in training B ≥ 2, unless ``parts`` is ``"spatial"``.

    Raises:
        ModelError: an argument has an invalid value; or, in training with a channel map, the batch has one image.
    """

    def __init__(self, channels: int, reduction: int = 16, dilation: int = 4, parts: str = "both") -> None:
        check_positive("BAM", "channels", channels)
        check_positive("BAM", "reduction", reduction)
        check_positive("BAM", "dilation", dilation)
        check_choice("BAM", "parts", parts, PARTS)
        super().__init__()
        hidden = max(1, channels // reduction)
        self.channel = None if parts == "spatial" else _channel_map(channels, hidden)
        self.spatial = None if parts == "channel" else _spatial_map(channels, hidden, dilation)

    def forward(self, x: Tensor) -> Tensor:
        """Re-weight ``x`` (B, C, H, W)."""
        return x + x * self._gate(x)

    def weight_map(self, x: Tensor) -> Tensor:
        """Compute the weights that ``forward`` multiplies ``x`` by: (B, C, H, W), or 1 in place of C or of H, W.

        They lie in (1, 2), because of the residual.
        """
        return 1 + self._gate(x)

    def _gate(self, x: Tensor) -> Tensor:
        maps: list[Tensor] = []
        if self.channel is not None:
            if self.training:
                check_batch("BAM", x)
            maps.append(self.channel(x.mean(dim=(2, 3), keepdim=True)))
        if self.spatial is not None:
            maps.append(self.spatial(x))
        return sum(maps[1:], maps[0]).sigmoid()


def _channel_map(channels: int, hidden: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(channels, hidden, kernel_size=1),
        nn.ReLU(),
        nn.Conv2d(hidden, channels, kernel_size=1),
        nn.BatchNorm2d(channels),
    )


def _spatial_map(channels: int, hidden: int, dilation: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(channels, hidden, kernel_size=1),
        nn.ReLU(),
        nn.Conv2d(hidden, hidden, kernel_size=3, padding=dilation, dilation=dilation),
        nn.ReLU(),
        nn.Conv2d(hidden, hidden, kernel_size=3, padding=dilation, dilation=dilation),
        nn.ReLU(),
        nn.Conv2d(hidden, 1, kernel_size=1),
        nn.BatchNorm2d(1),
    )
