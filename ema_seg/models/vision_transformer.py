"""Plain vision transformers of timm as encoders: DINOv2, DINOv3 and other ViTs, whose feature maps have one stride.

The DPT decoder reads such maps as they are. The linear head reads the last ones. Unet, FPN and UPerNet read a simple
feature pyramid: Li et al., "Exploring Plain Vision Transformer Backbones for Object Detection", ECCV 2022,
https://arxiv.org/abs/2203.16527.
"""

from collections.abc import Sequence
from typing import Any

import timm
from segmentation_models_pytorch.base.initialization import initialize_decoder
from segmentation_models_pytorch.decoders.dpt.decoder import ReassembleBlock
from timm.layers import LayerNorm2d
from torch import Tensor, nn

__all__ = [
    "FeaturePyramid",
    "PyramidDecoder",
    "TransformerEncoder",
    "fit_dpt_to_patch",
    "is_plain_transformer",
]

# timm's files of vision transformers that take images of any size.
_MODULES = ["deit", "eva", "vision_transformer", "vision_transformer_hybrid"]


def is_plain_transformer(encoder: str) -> bool:
    """Return whether an encoder, by its name ``tu-<name>``, is a plain vision transformer that takes any image size."""
    return encoder.startswith("tu-") and timm.models.is_model_in_modules(encoder[3:], _MODULES)


class TransformerEncoder(nn.Module):
    """Plain vision transformer of timm, without its classifier.

    The position embeddings are resampled to the size of each image.

    Args:
        name: timm's name, such as ``"vit_small_patch14_dinov2"``.
        maps: number of last blocks whose outputs are returned.
        pretrained: load timm's weights from the model hub.
        patches: the model's stride, in patches.
        **options: further keyword arguments of the timm model.

    Attributes:
        patch_size: side P of a patch, in pixels.
        output_stride: stride of the model, in pixels.
        out_channels: channels of the image and of each map.
    """

    model: Any

    def __init__(self, name: str, *, maps: int = 1, pretrained: bool = False, patches: int = 1, **options: Any) -> None:
        super().__init__()
        self.model = timm.create_model(
            name, pretrained=pretrained, **({"dynamic_img_size": True, "num_classes": 0} | options)
        )
        self.indices = self.model.prune_intermediate_layers(maps)  # without a head that nothing would train
        self.patch_size = int(self.model.feature_info[-1]["reduction"])
        self.output_stride = self.patch_size * patches
        self.out_channels = [3, *[int(self.model.embed_dim)] * maps]

    def forward(self, images: Tensor) -> list[Tensor]:
        """Compute the images (B, 3, H, W) themselves and each normalised map (B, C, H / P, W / P)."""
        maps = self.model.forward_intermediates(images, indices=self.indices, norm=True, intermediates_only=True)
        return [images, *maps]


class FeaturePyramid(nn.Module):
    """Simple feature pyramid: maps of a quarter, half, one and two patches' stride from a single map.

    With patches of 16 pixels, the strides are 4, 8, 16 and 32; with patches of 14, they are 3.5, 7, 14 and 28. The
    lateral layers of the decoder take the place of the paper's convolutions after each resampling.

    Paper: see the module.

    Args:
        channels: channels C of the map.

    Attributes:
        out_channels: channels of the list that ``forward`` returns.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        half, quarter = channels // 2, channels // 4
        self.levels = nn.ModuleList(
            [
                nn.Sequential(
                    nn.ConvTranspose2d(channels, half, kernel_size=2, stride=2),
                    LayerNorm2d(half),
                    nn.GELU(),
                    nn.ConvTranspose2d(half, quarter, kernel_size=2, stride=2),
                ),
                nn.ConvTranspose2d(channels, half, kernel_size=2, stride=2),
                nn.Identity(),
                nn.MaxPool2d(kernel_size=2),
            ]
        )
        self.out_channels = [3, 0, quarter, half, channels, channels]

    def set_in_channels(self, channels: int, pretrained: bool) -> None:
        """Do nothing: smp calls this for an encoder whose images may have another number of channels."""

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Compute the list that smp's decoders read.

        Args:
            features: images (B, 3, H, W) and the map (B, C, H / P, W / P) of patches of P pixels, both sides even.

        Returns:
            The images, an empty map of stride 2 as those of smp's hierarchical transformers, and the four levels.
        """
        images, last = features
        batch, _, height, width = images.shape
        empty = images.new_empty(batch, 0, height // 2, width // 2)
        return [images, empty, *(level(last) for level in self.levels)]


class PyramidDecoder(nn.Module):
    """Feature pyramid followed by a decoder of smp.

    The pyramid is new, and so it is no part of the encoder: it has no pretrained weights, and learns at the decoder's
    rate.
    """

    def __init__(self, pyramid: nn.Module, decoder: nn.Module) -> None:
        super().__init__()
        self.pyramid = pyramid
        self.decoder = decoder

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Decode the encoder's feature maps."""
        return self.decoder(self.pyramid(features))


def fit_dpt_to_patch(model: nn.Module) -> None:
    """Set the stride of smp's DPT model; for patches whose side is no power of two, also its factors; in place.

    The first map is upsampled to a stride of 4 pixels, and each further one has twice the stride of the one before;
    the last ones are downsampled, so that the sides of the image must be multiples of the last stride. smp's factors
    for patches of 14 pixels are rounded and do not fit together; those of 16 pixels take their place, and the head
    upsamples to the image's size.
    """
    encoder: Any = model.encoder
    decoder: Any = model.decoder
    head: Any = model.segmentation_head
    patch = encoder.output_stride
    rounded = 1 << (patch - 1).bit_length()
    blocks = decoder.reassemble_blocks
    if rounded != patch:
        for index, block in enumerate(blocks):
            first, last = block.project_to_out_channel, block.project_to_feature_dim
            blocks[index] = ReassembleBlock(
                first.in_channels, first.out_channels, last.out_channels, rounded / 2 ** (index + 2)
            )
        initialize_decoder(blocks)
        head.upsampling_factor *= patch / rounded
    encoder.output_stride = patch * max(1, 2 ** (len(blocks) + 1) // rounded)
