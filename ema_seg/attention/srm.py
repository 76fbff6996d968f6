"""Style-based recalibration module (SRM).

Paper: Lee et al., "SRM: A Style-based Recalibration Module for Convolutional Neural Networks", ICCV 2019,
https://arxiv.org/abs/1903.10829
"""

import torch
from torch import Tensor, nn

from ema_seg.attention.checks import check_batch, check_positive

__all__ = ["SRM"]


class SRM(nn.Module):
    """Gate for each channel from its mean and standard deviation: two weights per channel, a BatchNorm, a sigmoid.

    The standard deviation is the paper's, with H·W in the denominator (the authors' code has H·W - 1). The weights
    start at zero, as in the authors' code.

    Args:
        channels: number C of input channels.

    Shape:
        Input and output: (B, C, H, W); in training B ≥ 2.

    Raises:
        ModelError: ``channels`` is not a positive whole number; or, in training, the batch has one image.
    """

    def __init__(self, channels: int) -> None:
        check_positive("SRM", "channels", channels)
        super().__init__()
        self.cfc = nn.Parameter(torch.zeros(channels, 2))
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Re-weight ``x`` (B, C, H, W)."""
        if self.training:
            check_batch("SRM", x)
        return x * self.weight_map(x)

    def weight_map(self, x: Tensor) -> Tensor:
        """Compute the weights that ``forward`` multiplies ``x`` by: (B, C, 1, 1) in (0, 1)."""
        # The 1e-5 avoids the square root's infinite gradient at zero, for a constant channel.
        deviation = (x.var(dim=(2, 3), correction=0) + 1e-5).sqrt()
        style = torch.stack([x.mean(dim=(2, 3)), deviation], dim=2)
        gate = self.bn((style * self.cfc).sum(dim=2)[:, :, None, None]).sigmoid()
        return gate.to(x.dtype)  # autocast leaves the products with the weights in float32
