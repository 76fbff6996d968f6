"""Auxiliary head on an encoder stage: its loss guides the encoder in training, and the trained model is without it.

PSPNet introduced it for segmentation: Zhao et al., "Pyramid Scene Parsing Network", CVPR 2017,
https://arxiv.org/abs/1612.01105. UPerNet and DeepLabV3 are commonly trained with it, too, with a weight of 0.4. The
head is a small FCN: Long et al., "Fully Convolutional Networks for Semantic Segmentation", CVPR 2015,
https://arxiv.org/abs/1411.4038.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ema_seg.models.head import RowLogits
from ema_seg.models.placement import run_encoder

__all__ = ["AUXILIARY", "AuxiliaryHead", "add_auxiliary_head", "auxiliary_logits"]

AUXILIARY = "auxiliary"
"""Name of the head within a segmenter, and so the prefix of its weights."""

# Index of the stage of stride 16 in smp's list of feature maps, which begins with the image. In a dilated encoder that
# stage has a smaller stride.
_STAGE = 4
_CHANNELS = 256
_DROPOUT = 0.1


class AuxiliaryHead(nn.Module):
    """Head on one of an encoder's feature maps: convolution 3×3, batch norm, ReLU, dropout, convolution 1×1.

    In training it computes its logits within the segmenter's forward pass, and keeps them until ``auxiliary_logits``
    takes them. In evaluation it computes nothing.

    Args:
        stage: index of the feature map in the encoder's list.
        channels: channels of that map.
        classes: number K of classes.
    """

    def __init__(self, stage: int, channels: int, classes: int) -> None:
        super().__init__()
        self.stage = stage
        self.layers = nn.Sequential(
            nn.Conv2d(channels, _CHANNELS, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(_CHANNELS),
            nn.ReLU(inplace=True),
            nn.Dropout(_DROPOUT),
            nn.Conv2d(_CHANNELS, classes, kernel_size=1),
        )
        self.features: Tensor | None = None
        self.logits: Tensor | None = None
        self.scale = 1.0

    def forward(self, features: Tensor) -> Tensor:
        """Compute logits (B, K, h, w) of features (B, C, h, w)."""
        return self.layers(features)

    def keep_features(self, encoder: nn.Module, inputs: tuple[Tensor], output: Any) -> None:
        """Keep the feature map, in training only; a forward hook of the encoder."""
        if self.training:
            maps = output[0] if isinstance(output, tuple) else output
            self.features = maps[self.stage]
            self.scale = inputs[0].shape[2] / self.features.shape[2]

    def keep_logits(self, *_: Any) -> None:
        """Compute the logits of the kept map; a forward hook of the segmenter, after its other dropout layers."""
        if self.features is not None:
            self.logits, self.features = self(self.features), None


def add_auxiliary_head(model: nn.Module, classes: int) -> None:
    """Add an auxiliary head to a segmenter of ``build_segmenter``, in place, before it is compiled.

    The head is on the stage of stride 16 (8 or 16 in a dilated encoder), or on the last one of an encoder with fewer
    stages. A plain vision transformer has one stride, its patch; the head is on the output of its last block. If the
    stage has an attention block, the head reads the re-weighted map.

    Args:
        model: the segmenter; all other weights stay as they are.
        classes: number K of classes.
    """
    maps = run_encoder(model)
    strided = len({tuple(features.shape[2:]) for features in maps[1:]}) > 1
    stage = min(_STAGE, len(maps) - 1) if strided else len(maps) - 1
    with torch.random.fork_rng(devices=[]):  # later random numbers are those of a training without it
        head = AuxiliaryHead(stage, maps[stage].shape[1], classes)
    parameter = next(model.parameters())
    model.add_module(AUXILIARY, head.to(parameter.device, parameter.dtype))
    model.encoder.register_forward_hook(head.keep_features)  # type: ignore[union-attr]
    model.register_forward_hook(head.keep_logits)


def auxiliary_logits(model: nn.Module) -> RowLogits | None:
    """Take the auxiliary logits of the model's last forward pass; None without a head, and in evaluation."""
    head = getattr(model, AUXILIARY, None)
    if head is None or head.logits is None:
        return None
    logits, head.logits = head.logits, None
    return RowLogits(logits, scale=head.scale)
