"""Global context (GC) block.

Paper: Cao et al., "GCNet: Non-local Networks Meet Squeeze-Excitation Networks and Beyond", ICCV Workshops 2019,
https://arxiv.org/abs/1904.11492
"""

from collections.abc import Callable

from timm.layers import GlobalContext
from torch import Tensor, nn

from ema_seg.attention.checks import check_choice, check_positive

__all__ = ["GC"]

_POOLINGS = ("attention", "average")
_FUSIONS = ("add", "scale")
_FEWEST_HIDDEN = 4


class GC(GlobalContext):
    """Global context vector, added to every pixel: a bottleneck of the attention-weighted mean of all pixels.

    This is timm's block with the paper's settings; timm's defaults are fusion by multiplication and a reduction by 8.
    With ``fusion="add"`` the block starts as the identity (the last layer is zero), as in the authors' code.

    Args:
        channels: number C of input channels.
        reduction: the bottleneck has ``channels // reduction`` channels; the paper uses 16. At least 4, because
            the bottleneck's LayerNorm would erase a single channel.
        pooling: ``"attention"`` weighs the pixels by a softmax over them, ``"average"`` weighs them equally.
        fusion: ``"add"`` adds the vector, ``"scale"`` multiplies by its sigmoid.

    Shape:
        Input and output: (B, C, H, W).

    Raises:
        ModelError: an argument has an invalid value.
    """

    def __init__(self, channels: int, reduction: int = 16, pooling: str = "attention", fusion: str = "add") -> None:
        check_positive("GC", "channels", channels)
        check_positive("GC", "reduction", reduction)
        check_choice("GC", "pooling", pooling, _POOLINGS)
        check_choice("GC", "fusion", fusion, _FUSIONS)
        super().__init__(
            channels,
            use_attn=pooling == "attention",
            fuse_add=fusion == "add",
            fuse_scale=fusion == "scale",
            rd_channels=max(_FEWEST_HIDDEN, channels // reduction),
        )
        if fusion == "add":  # timm sets only the weight to zero
            nn.init.zeros_(self.mlp_add.fc2.bias)  # type: ignore[arg-type]

    @property
    def weight_map(self) -> Callable[[Tensor], Tensor]:
        """Function that computes the weights that ``forward`` multiplies ``x`` by: (B, C, 1, 1) in (0, 1).

        Raises:
            AttributeError: the block adds a vector, so it has no weights.
        """
        if self.mlp_scale is None:
            raise AttributeError("weight_map: only with fusion='scale'.")
        return lambda x: self.gate(self.mlp_scale(self._context(x)))

    def _context(self, x: Tensor) -> Tensor:
        """Compute the mean over the pixels (B, C, 1, 1), weighted if the block pools by attention."""
        if self.conv_attn is None:
            return x.mean(dim=(2, 3), keepdim=True)
        attention = self.conv_attn(x).flatten(2).softmax(dim=2)
        return (x.flatten(2) @ attention.transpose(1, 2)).unsqueeze(3)
