"""EMA without some of its parts, for ablation studies."""

from typing import Literal

import torch
from torch import Tensor, nn

from ema_seg.attention.checks import check_choice
from ema_seg.attention.ema.module import number_of_groups
from ema_seg.attention.ema.reference import cross, normalise
from ema_seg.runtime.errors import ModelError

__all__ = ["AblatedEMA"]

_BRANCHES = ("both", "pointwise", "spatial")


class AblatedEMA(nn.Module):
    """EMA in its published form, optionally without a branch or without the normalisation.

    A single branch weighs its own channels, by the softmax of its own channel means. Removed parts have no
    parameters; the others keep EMA's names. With nothing removed, the block computes the same as EMA's
    implementation ``"reference"``.

    Args:
        channels: number C of input channels.
        branches: ``"both"``; ``"pointwise"`` for the 1×1 branch x1 alone, whose weight map is
            sigmoid(softmax(mean x1) · x1); or ``"spatial"`` for the 3×3 branch x2 alone, likewise.
        normalisation: False removes the GroupNorm of the 1×1 branch. (If the 1×1 branch is alone and keeps it, the
            softmax is of the means of normalised channels: the same for every image.)
        factor: number of channel groups, a divisor of ``channels``, or ``"auto"``, see ``EMA``.

    Shape:
        Input and output: (B, C, H, W).

    Raises:
        ModelError: an argument has an invalid value; or ``normalisation=False`` without the 1×1 branch, which alone
            has a normalisation.
    """

    def __init__(
        self,
        channels: int,
        branches: str = "both",
        normalisation: bool = True,
        factor: int | Literal["auto"] = "auto",
    ) -> None:
        check_choice("ablated EMA", "branches", branches, _BRANCHES)
        check_choice("ablated EMA", "normalisation", normalisation, (True, False))
        if branches == "spatial" and not normalisation:
            raise ModelError(
                "ablated EMA: normalisation=False needs the 1x1 branch, got branches='spatial', which has no "
                "normalisation; set normalisation=True."
            )
        super().__init__()
        self.groups = number_of_groups(channels, factor)
        width = channels // self.groups
        # In EMA's order, so that the same seed gives both blocks the same weights.
        self.gn = nn.GroupNorm(width, width) if branches != "spatial" and normalisation else None
        self.conv1x1 = nn.Conv2d(width, width, kernel_size=1) if branches != "spatial" else None
        self.conv3x3 = nn.Conv2d(width, width, kernel_size=3, padding=1) if branches != "pointwise" else None

    def forward(self, x: Tensor) -> Tensor:
        """Re-weight ``x`` (B, C, H, W)."""
        grouped = self._grouped(x)
        return (grouped * self._weights(grouped).sigmoid()).reshape(x.shape)

    def weight_map(self, x: Tensor) -> Tensor:
        """Compute the weights that ``forward`` multiplies ``x`` by: (B, factor, H, W) in (0, 1), one map per group."""
        return self._weights(self._grouped(x)).sigmoid().reshape(len(x), self.groups, *x.shape[2:])

    def _grouped(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        return x.reshape(batch * self.groups, channels // self.groups, height, width)

    def _weights(self, grouped: Tensor) -> Tensor:
        """Compute the weight map's logits (N, 1, H, W) from the groups (N, Cg, H, W)."""
        if self.conv3x3 is None:
            x1 = self._pointwise_branch(grouped)
            return cross(x1, x1)
        x2 = self.conv3x3(grouped)
        if self.conv1x1 is None:
            return cross(x2, x2)
        x1 = self._pointwise_branch(grouped)
        return cross(x1, x2) + cross(x2, x1)

    def _pointwise_branch(self, grouped: Tensor) -> Tensor:
        """Gate ``grouped`` (N, Cg, H, W) along rows and columns, and normalise it if there is a GroupNorm."""
        rows = grouped.mean(dim=3, keepdim=True)
        columns = grouped.mean(dim=2, keepdim=True).transpose(2, 3)
        gates = self.conv1x1(torch.cat([rows, columns], dim=2)).sigmoid()  # type: ignore[misc]
        row_gate, column_gate = gates.split(grouped.shape[2:], dim=2)
        gated = grouped * row_gate * column_gate.transpose(2, 3)
        return gated if self.gn is None else normalise(gated, self.gn.weight, self.gn.bias, self.gn.eps)

    def extra_repr(self) -> str:
        """Show the number of groups in ``print(model)``."""
        return f"factor={self.groups}"
