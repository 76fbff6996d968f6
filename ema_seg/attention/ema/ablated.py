"""EMA with parts taken away: which of them does the work?"""

from typing import Literal

import torch
from torch import Tensor, nn

from ema_seg.attention.checks import check_choice
from ema_seg.attention.ema.module import number_of_groups
from ema_seg.attention.ema.reference import cross, normalise
from ema_seg.errors import ModelError

__all__ = ["AblatedEMA"]

_BRANCHES = ("both", "pointwise", "spatial")


class AblatedEMA(nn.Module):
    """EMA, in its published form, from which a branch or the normalisation can be taken away.

    With one branch left there is nothing to look at but itself: its own channel means, through the softmax, weigh
    its channels. What is taken away has no parameters; what remains has EMA's names. With nothing taken away the
    block computes what EMA's implementation ``"reference"`` does.

    Args:
        channels: number C of input channels.
        branches: ``"both"``; ``"pointwise"`` for the 1×1 branch x1 alone, whose weight map is
            sigmoid(softmax(mean x1) · x1); or ``"spatial"`` for the 3×3 branch x2 alone, likewise.
        normalisation: False leaves out the GroupNorm of the 1×1 branch. (With it, and the 1×1 branch alone, the
            means that the softmax sees are those of normalised channels: the same for every image.)
        factor: number of channel groups, a divisor of ``channels``, or ``"auto"``, see ``EMA``.

    Shape:
        Input and output: (B, C, H, W).

    Raises:
        ModelError: an argument is none of these; or ``normalisation=False`` has nothing to take away, because the
            1×1 branch is not there.
    """

    def __init__(
        self,
        channels: int,
        branches: str = "both",
        normalisation: bool = True,
        factor: int | Literal["auto"] = "auto",
    ) -> None:
        check_choice("EMA with parts taken away", "branches", branches, _BRANCHES)
        check_choice("EMA with parts taken away", "normalisation", normalisation, (True, False))
        if branches == "spatial" and not normalisation:
            raise ModelError(
                "EMA with branches='spatial' has no normalisation that normalisation=False could take away; "
                "leave normalisation=True."
            )
        super().__init__()
        self.groups = number_of_groups(channels, factor)
        width = channels // self.groups
        # In EMA's order, so that the same seed gives both the same weights.
        self.gn = nn.GroupNorm(width, width) if branches != "spatial" and normalisation else None
        self.conv1x1 = nn.Conv2d(width, width, kernel_size=1) if branches != "spatial" else None
        self.conv3x3 = nn.Conv2d(width, width, kernel_size=3, padding=1) if branches != "pointwise" else None

    def forward(self, x: Tensor) -> Tensor:
        """Re-weight ``x`` (B, C, H, W)."""
        batch, channels, height, width = x.shape
        grouped = x.reshape(batch * self.groups, channels // self.groups, height, width)
        return (grouped * self._weights(grouped).sigmoid()).reshape(x.shape)

    def _weights(self, grouped: Tensor) -> Tensor:
        """What the sigmoid is taken of, (N, 1, H, W), from the groups (N, Cg, H, W)."""
        if self.conv3x3 is None:
            x1 = self._pointwise_branch(grouped)
            return cross(x1, x1)
        x2 = self.conv3x3(grouped)
        if self.conv1x1 is None:
            return cross(x2, x2)
        x1 = self._pointwise_branch(grouped)
        return cross(x1, x2) + cross(x2, x1)

    def _pointwise_branch(self, grouped: Tensor) -> Tensor:
        """``grouped`` (N, Cg, H, W) gated along rows and columns, and normalised."""
        rows = grouped.mean(dim=3, keepdim=True)
        columns = grouped.mean(dim=2, keepdim=True).transpose(2, 3)
        gates = self.conv1x1(torch.cat([rows, columns], dim=2)).sigmoid()  # type: ignore[misc]
        row_gate, column_gate = gates.split(grouped.shape[2:], dim=2)
        gated = grouped * row_gate * column_gate.transpose(2, 3)
        return gated if self.gn is None else normalise(gated, self.gn.weight, self.gn.bias, self.gn.eps)

    def extra_repr(self) -> str:
        """Show the number of groups in ``print(model)``."""
        return f"factor={self.groups}"
