"""Squeeze-and-excitation (SE).

Paper: Hu et al., "Squeeze-and-Excitation Networks", CVPR 2018, https://arxiv.org/abs/1709.01507
"""

from timm.layers import SEModule
from torch import Tensor

from ema_seg.attention.checks import check_positive
from ema_seg.runtime.errors import ModelError

__all__ = ["SE"]


class SE(SEModule):
    """Gate for each channel, computed from the global means of all channels.

    Args:
        channels: number C of input channels.
        reduction: the bottleneck has ``channels // reduction`` channels, and at least one; the paper
            uses 16.

    Shape:
        Input and output: (B, C, H, W).

    Raises:
        ModelError: ``channels`` or ``reduction`` is not a positive whole number.
    """

    def __init__(self, channels: int, reduction: int = 16) -> None:
        check_positive("SE", "channels", channels)
        if not isinstance(reduction, int) or reduction < 1:
            raise ModelError(f"SE: reduction must be a whole number of at least 1, got {reduction!r}.")
        super().__init__(channels, rd_channels=max(1, channels // reduction))

    def weight_map(self, x: Tensor) -> Tensor:
        """Compute the weights that ``forward`` multiplies ``x`` by: (B, C, 1, 1) in (0, 1)."""
        return self.gate(self.fc2(self.act(self.bn(self.fc1(x.mean(dim=(2, 3), keepdim=True))))))
