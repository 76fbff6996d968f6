"""Effective squeeze-and-excitation (eSE), the attention of VoVNetV2.

Paper: Lee and Park, "CenterMask: Real-Time Anchor-Free Instance Segmentation", CVPR 2020,
https://arxiv.org/abs/1911.06667
"""

from timm.layers import EffectiveSEModule
from torch import Tensor

from ema_seg.attention.checks import check_choice, check_positive

__all__ = ["ESE"]

_GATES = ("sigmoid", "hard_sigmoid")


class ESE(EffectiveSEModule):
    """Squeeze-and-excitation without a bottleneck: one fully connected layer from all channel means to all gates.

    Args:
        channels: number C of input channels.
        gate: ``"sigmoid"`` as in the paper's equation, or ``"hard_sigmoid"`` as in the authors' code.

    Shape:
        Input and output: (B, C, H, W).

    Raises:
        ModelError: ``channels`` is not a positive whole number, or ``gate`` is unknown.
    """

    def __init__(self, channels: int, gate: str = "sigmoid") -> None:
        check_positive("eSE", "channels", channels)
        check_choice("eSE", "gate", gate, _GATES)
        super().__init__(channels, gate_layer=gate)

    def weight_map(self, x: Tensor) -> Tensor:
        """Compute the weights that ``forward`` multiplies ``x`` by: (B, C, 1, 1) in [0, 1]."""
        return self.gate(self.fc(x.mean(dim=(2, 3), keepdim=True)))
