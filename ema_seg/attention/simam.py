"""SimAM: attention without parameters.

Paper: Yang et al., "SimAM: A Simple, Parameter-Free Attention Module for Convolutional Neural Networks", ICML 2021,
https://proceedings.mlr.press/v139/yang21o.html
"""

from torch import Tensor, nn

from ema_seg.attention.checks import check_positive
from ema_seg.runtime.errors import ModelError

__all__ = ["SimAM"]


class SimAM(nn.Module):
    """Gate for each value from its distance to the channel's mean: x · sigmoid((x - μ)² / 4(v + λ) + 1/2).

    μ and v are the mean and the variance of the channel in the image. The variance has H·W - 1 in the denominator;
    for a single pixel it is zero.

    Args:
        channels: number C of input channels; not used.
        e_lambda: the paper's λ.

    Shape:
        Input and output: (B, C, H, W).

    Raises:
        ModelError: ``channels`` is not a positive whole number, or ``e_lambda`` not a positive number.
    """

    def __init__(self, channels: int, e_lambda: float = 1e-4) -> None:
        check_positive("SimAM", "channels", channels)
        if not isinstance(e_lambda, float | int) or not 0 < e_lambda < float("inf"):
            raise ModelError(f"SimAM: e_lambda must be a number above 0, such as 1e-4, got {e_lambda!r}.")
        super().__init__()
        self.e_lambda = e_lambda

    def forward(self, x: Tensor) -> Tensor:
        """Re-weight ``x`` (B, C, H, W)."""
        return x * self.weight_map(x)

    def weight_map(self, x: Tensor) -> Tensor:
        """Compute the weights that ``forward`` multiplies ``x`` by: (B, C, H, W) in (0, 1)."""
        deviation = (x - x.mean(dim=(2, 3), keepdim=True)).square()
        variance = deviation.sum(dim=(2, 3), keepdim=True) / max(x.shape[2] * x.shape[3] - 1, 1)
        return (deviation / (4 * (variance + self.e_lambda)) + 0.5).sigmoid()

    def extra_repr(self) -> str:
        """Show λ in ``print(model)``."""
        return f"e_lambda={self.e_lambda}"
