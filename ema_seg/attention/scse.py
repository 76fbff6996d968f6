"""Concurrent spatial and channel squeeze-and-excitation (scSE).

Paper: Roy et al., "Concurrent Spatial and Channel Squeeze & Excitation in Fully Convolutional Networks",
MICCAI 2018, https://arxiv.org/abs/1803.02579
"""

from segmentation_models_pytorch.base.modules import SCSEModule
from torch import Tensor

from ema_seg.attention.checks import PARTS, check_choice, check_positive
from ema_seg.runtime.errors import ModelError

__all__ = ["SCSE"]


class SCSE(SCSEModule):
    """Sum of a channel-gated and a pixel-gated copy of the input.

    Args:
        channels: number C of input channels.
        reduction: the channel gate's bottleneck has ``channels // reduction`` channels; the paper uses 2.
        parts: ``"both"``; or one copy alone, the paper's cSE (``"channel"``) or sSE (``"spatial"``).

    Shape:
        Input and output: (B, C, H, W).

    Raises:
        ModelError: ``channels`` is not a positive whole number, ``reduction`` is not from 1 to ``channels``, or
            ``parts`` is unknown.
    """

    def __init__(self, channels: int, reduction: int = 2, parts: str = "both") -> None:
        check_positive("scSE", "channels", channels)
        check_choice("scSE", "parts", parts, PARTS)
        if not isinstance(reduction, int) or not 1 <= reduction <= channels:
            raise ModelError(
                f"scSE: reduction must be a whole number from 1 to the number of channels ({channels}), got "
                f"{reduction!r}."
            )
        super().__init__(channels, reduction=reduction)
        self.parts = parts
        if parts == "channel":
            del self.sSE
        if parts == "spatial":
            del self.cSE

    def forward(self, x: Tensor) -> Tensor:
        """Re-weight ``x`` (B, C, H, W)."""
        if self.parts == "both":
            return super().forward(x)
        return x * self.weight_map(x)

    def weight_map(self, x: Tensor) -> Tensor:
        """Compute the weights that ``forward`` multiplies ``x`` by: (B, C, H, W), or 1 in place of C or of H, W.

        With both parts they lie in (0, 2), because the copies are added.
        """
        if self.parts == "both":
            return self.cSE(x) + self.sSE(x)
        return self.cSE(x) if self.parts == "channel" else self.sSE(x)
