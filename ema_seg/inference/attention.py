"""Weight maps of attention blocks."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ema_seg.data.normalise import Normalise
from ema_seg.inference.prediction import segment

__all__ = ["attention_weights", "without_padding"]


def attention_weights(model: nn.Module, image: Tensor, stride: int, normalise: Normalise) -> dict[str, Tensor]:
    """Compute the weight maps of a model's attention blocks for one image.

    Args:
        model: a segmenter.
        image: uint8 RGB image (3, H, W).
        stride: the model's stride.
        normalise: the normalisation that the model was trained with.

    Returns:
        Weights by the name of the block within the model, in the order of execution: float32 (groups, h, w), where
        (h, w) is the size of the block's features for the image padded to the stride. Blocks without a method
        ``weight_map``, and those whose weights are the same at all positions, are omitted.
    """
    maps: dict[str, Tensor] = {}

    def keep(name: str, block: nn.Module, features: Tensor) -> None:
        weights = block.weight_map(features)[0].float()  # type: ignore[operator]
        if weights.shape[1:] != (1, 1) or features.shape[2:] == (1, 1):
            maps[name] = weights

    blocks = {name: block for name, block in model.named_modules() if hasattr(block, "weight_map")}
    if not blocks:
        return maps
    handles = [
        block.register_forward_pre_hook(lambda block, inputs, name=name: keep(name, block, inputs[0]))
        for name, block in blocks.items()
    ]
    try:
        # A compiled model ignores hooks that are registered after its compilation.
        with torch.compiler.set_stance("force_eager"):
            segment(model, [image], stride, normalise)
    finally:
        for handle in handles:
            handle.remove()
    return maps


def without_padding(groups: Tensor, size: Sequence[int], stride: int) -> Tensor:
    """Crop the padding off a map (groups, h, w) of an image of this height and width."""
    height, width = (
        math.ceil(cells * length / (length + -length % stride))
        for cells, length in zip(groups.shape[-2:], size, strict=True)
    )
    return groups[:, :height, :width]
