"""Strip pooling module (SPM).

Paper: Hou et al., "Strip Pooling: Rethinking Spatial Pooling for Scene Parsing", CVPR 2020,
https://arxiv.org/abs/2003.13328
"""

from torch import Tensor, nn

from ema_seg.attention.checks import check_positive

__all__ = ["StripPooling"]


class StripPooling(nn.Module):
    """Gate for each position from its whole row and its whole column: x · sigmoid(f(y_row + y_column)).

    y_row and y_column are 1D convolutions with kernel 3 of the row means and of the column means; f is a 1×1
    convolution. The BatchNorms of the former and the ReLU before the latter are those of the authors' code.

    Args:
        channels: number C of input channels.

    Shape:
        Input and output: (B, C, H, W).

    Raises:
        ModelError: ``channels`` is not a positive whole number.
    """

    def __init__(self, channels: int) -> None:
        check_positive("strip pooling", "channels", channels)
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, kernel_size=(3, 1), padding=(1, 0), bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, kernel_size=(1, 3), padding=(0, 1), bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        """Re-weight ``x`` (B, C, H, W)."""
        return x * self.weight_map(x)

    def weight_map(self, x: Tensor) -> Tensor:
        """Compute the weights that ``forward`` multiplies ``x`` by: (B, C, H, W) in (0, 1)."""
        rows = self.bn1(self.conv1(x.mean(dim=3, keepdim=True)))
        columns = self.bn2(self.conv2(x.mean(dim=2, keepdim=True)))
        return self.conv3((rows + columns).relu()).sigmoid()
