"""Gather-excite (GE).

Paper: Hu et al., "Gather-Excite: Exploiting Feature Context in Convolutional Neural Networks", NeurIPS 2018,
https://arxiv.org/abs/1810.12348
"""

from typing import Literal

from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, interpolate

from ema_seg.attention.checks import check_choice, check_positive
from ema_seg.runtime.errors import ModelError

__all__ = ["GatherExcite"]

_VARIANTS = ("theta_minus", "theta", "theta_plus")


class GatherExcite(nn.Module):
    """Gate for each block of ``extent`` × ``extent`` pixels, gathered from its surroundings.

    timm's block has these variants too, but in version 1.0.31 its variants with parameters, including the default,
    cannot be built.

    Args:
        channels: number C of input channels.
        variant: ``"theta_minus"`` gathers by averaging, without parameters; ``"theta"`` by depthwise 3×3
            convolutions of stride 2, log2 ``extent`` of them, each with a BatchNorm, with ReLUs between them;
            ``"theta_plus"`` adds a bottleneck of 1×1 convolutions before the gate, as squeeze-and-excitation has.
        extent: stride of the gathered map, a power of two from 2 on; or ``"global"``. Averages of extent e are over
            windows of 2e - 1 by 2e - 1 pixels. ``"global"`` with parameters is not offered: it would be one
            convolution as large as the map, for one size of images only.
        reduction: the bottleneck of ``"theta_plus"`` has ``channels // reduction`` channels, and at least one; the
            paper uses 16.

    Shape:
        Input and output: (B, C, H, W).

    Raises:
        ModelError: an argument has an invalid value, or ``extent`` is ``"global"`` with parameters.
    """

    def __init__(
        self,
        channels: int,
        variant: str = "theta_minus",
        extent: int | Literal["global"] = "global",
        reduction: int = 16,
    ) -> None:
        check_positive("gather-excite", "channels", channels)
        check_choice("gather-excite", "variant", variant, _VARIANTS)
        check_positive("gather-excite", "reduction", reduction)
        if extent != "global" and (type(extent) is not int or extent < 2 or extent.bit_count() != 1):
            raise ModelError(f"gather-excite: extent must be a power of two above 1, or 'global', got {extent!r}.")
        if extent == "global" and variant != "theta_minus":
            raise ModelError(
                f"gather-excite: variant={variant!r} needs a fixed extent, got extent='global'; "
                "choose an extent such as 2, 4 or 8, or variant='theta_minus'."
            )
        super().__init__()
        self.extent = extent
        self.gather = nn.Identity() if variant == "theta_minus" else _strided_convolutions(channels, int(extent))
        self.averages = variant == "theta_minus"
        self.excite = nn.Identity() if variant != "theta_plus" else _bottleneck(channels, max(1, channels // reduction))

    def forward(self, x: Tensor) -> Tensor:
        """Re-weight ``x`` (B, C, H, W)."""
        return x * self.weight_map(x)

    def weight_map(self, x: Tensor) -> Tensor:
        """Compute the weights that ``forward`` multiplies ``x`` by: (B, C, H, W), or 1 in place of H, W."""
        gate = self.excite(self._average(x) if self.averages else self.gather(x)).sigmoid()
        return gate if self.extent == "global" else interpolate(gate, size=x.shape[2:], mode="nearest")

    def _average(self, x: Tensor) -> Tensor:
        if self.extent == "global":
            return x.mean(dim=(2, 3), keepdim=True)
        size = 2 * int(self.extent) - 1
        return avg_pool2d(x, size, stride=int(self.extent), padding=size // 2, count_include_pad=False)


def _strided_convolutions(channels: int, extent: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(extent.bit_length() - 1):
        layers += [
            nn.Conv2d(channels, channels, kernel_size=3, stride=2, padding=1, groups=channels, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers[:-1])


def _bottleneck(channels: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(
        nn.ReLU(), nn.Conv2d(channels, hidden, kernel_size=1), nn.ReLU(), nn.Conv2d(hidden, channels, kernel_size=1)
    )
