"""Channel attention of the Normalization-based Attention Module (NAM).

Paper: Liu et al., "NAM: Normalization-based Attention Module", NeurIPS 2021 Workshop, https://arxiv.org/abs/2111.12419
"""

from torch import Tensor, nn

from ema_seg.attention.checks import check_positive

__all__ = ["NAM"]


class NAM(nn.Module):
    """Channel gate from BatchNorm scales: x · sigmoid(w · BN(x)), w the channel's share of the summed scales.

    As in the authors' code, the shares use absolute values and receive no gradient. The paper's spatial attention is
    not offered: it has a scale for each pixel, which fixes the size of the map. (The authors' code disables it by
    default, and has a ReLU before the sigmoid that the paper does not have.)

    Args:
        channels: number C of input channels.

    Shape:
        Input and output: (B, C, H, W).

    Raises:
        ModelError: ``channels`` is not a positive whole number.
    """

    def __init__(self, channels: int) -> None:
        check_positive("NAM", "channels", channels)
        super().__init__()
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Re-weight ``x`` (B, C, H, W)."""
        return x * self.weight_map(x)

    def weight_map(self, x: Tensor) -> Tensor:
        """Compute the weights that ``forward`` multiplies ``x`` by: (B, C, H, W) in (0, 1)."""
        scale = self.bn.weight.detach().abs()
        share = (scale / scale.sum()).to(x.dtype)
        return (share[:, None, None] * self.bn(x)).sigmoid()
