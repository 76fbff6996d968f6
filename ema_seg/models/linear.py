"""Linear head: batch norm and a 1×1 convolution on an encoder's last feature maps, upsampled to the image.

It measures what an encoder's features hold: Oquab et al., "DINOv2: Learning Robust Visual Features without
Supervision", TMLR 2024, https://arxiv.org/abs/2304.07193, section 7.4.
"""

from collections.abc import Sequence
from typing import Any

import torch
from segmentation_models_pytorch.base import SegmentationHead, SegmentationModel
from segmentation_models_pytorch.encoders import get_encoder
from torch import Tensor, nn

from ema_seg.models.vision_transformer import TransformerEncoder, is_plain_transformer

__all__ = ["Linear", "LinearDecoder"]


class LinearDecoder(nn.Module):
    """Concatenation of the encoder's last feature maps, and batch norm.

    Args:
        channels: channels of each of these maps.
    """

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        self.maps = len(channels)
        self.norm = nn.BatchNorm2d(sum(channels))

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Compute normalised features (B, C, h, w) from the encoder's list of maps."""
        last = features[-self.maps :]
        return self.norm(torch.cat(list(last), dim=1) if self.maps > 1 else last[0])


class Linear(SegmentationModel):
    """Segmentation model with a linear head; smp's way of naming the arguments.

    Args:
        encoder_name: see ``build_segmenter``.
        encoder_weights: None, or ``"imagenet"`` for those on the model hub.
        classes: number K of classes.
        decoder_maps: number of last blocks of a vision transformer whose outputs are concatenated; 1 for other
            encoders.
        **options: options of a timm encoder.

    Raises:
        ValueError: ``decoder_maps`` is not a whole number of at least 1, or is more than 1 and the maps have
            different strides.
    """

    def __init__(
        self,
        encoder_name: str,
        encoder_weights: str | None = None,
        classes: int = 1,
        decoder_maps: int = 1,
        **options: Any,
    ) -> None:
        super().__init__()
        if type(decoder_maps) is not int or decoder_maps < 1:
            raise ValueError(f"decoder_maps must be a whole number of at least 1, got {decoder_maps!r}")
        if is_plain_transformer(encoder_name):
            pretrained = encoder_weights is not None
            self.encoder = TransformerEncoder(encoder_name[3:], maps=decoder_maps, pretrained=pretrained, **options)
        elif decoder_maps > 1:
            raise ValueError("decoder_maps must be 1: only the maps of a vision transformer have one stride")
        else:
            self.encoder = get_encoder(encoder_name, weights=encoder_weights, **options)
        self.decoder = LinearDecoder(self.encoder.out_channels[-decoder_maps:])
        self.segmentation_head = SegmentationHead(
            self.decoder.norm.num_features, classes, kernel_size=1, upsampling=self.encoder.output_stride
        )
        self.classification_head = None
        self.initialize()
