"""Efficient channel attention (ECA).

Paper: Wang et al., "ECA-Net: Efficient Channel Attention for Deep Convolutional Neural Networks", CVPR 2020,
https://arxiv.org/abs/1910.03151
"""

import math
from typing import Literal

from timm.layers import EcaModule
from torch import Tensor

from ema_seg.attention.checks import check_odd, check_positive

__all__ = ["ECA"]

_GAMMA, _B = 2, 1  # the paper's constants for all its models


class ECA(EcaModule):
    """Gate for each channel: a 1D convolution of the global means of its neighbouring channels.

    Args:
        channels: number C of input channels.
        kernel_size: number of channels that each gate depends on, odd; ``"auto"`` is the paper's rule, the odd
            number nearest to (log2 C + 1) / 2, or the larger of two equally near.

    Shape:
        Input and output: (B, C, H, W).

    Raises:
        ModelError: ``channels`` is not a positive whole number, or ``kernel_size`` not an odd one.
    """

    def __init__(self, channels: int, kernel_size: int | Literal["auto"] = "auto") -> None:
        check_positive("ECA", "channels", channels)
        if kernel_size == "auto":
            kernel_size = _adaptive_kernel_size(channels)
        check_odd("ECA", "kernel_size", kernel_size)
        # channels=None disables timm's rule, which gives 3 where the paper's gives 1, for fewer than 8 channels.
        super().__init__(channels=None, kernel_size=kernel_size)

    def weight_map(self, x: Tensor) -> Tensor:
        """Compute the weights that ``forward`` multiplies ``x`` by: (B, C, 1, 1) in (0, 1)."""
        return self.gate(self.conv(x.mean(dim=(2, 3)).unsqueeze(1))).reshape(len(x), -1, 1, 1)


def _adaptive_kernel_size(channels: int) -> int:
    below = int((math.log2(channels) + _B) / _GAMMA)
    return below if below % 2 else below + 1
