"""Effective receptive field: which pixels of the image the logits of its centre depend on.

Luo et al., "Understanding the Effective Receptive Field in Deep Convolutional Neural Networks", NeurIPS 2016,
https://arxiv.org/abs/1701.04128. The contribution of a pixel is the absolute gradient, summed over its colours, of a
random contrast of the logits at the centre: a sum with random weights that add up to zero, because what all classes
share does not change the prediction. The area is that of the smallest square around the centre that holds a share of
the contributions, as in Ding et al., "Scaling Up Your Kernels to 31x31", CVPR 2022, https://arxiv.org/abs/2203.06717.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ema_seg.data.normalise import Normalise
from ema_seg.inference.prediction import device_of, model_input, pad_to_stride
from ema_seg.runtime.limits import reraise_out_of_memory, reraise_size_errors

__all__ = ["SHARES", "ReceptiveField", "receptive_field"]

SHARES = (0.5, 0.95)
"""Shares of the contributions whose area is reported."""


@dataclass
class ReceptiveField:
    """Effective receptive field, the mean over images.

    Attributes:
        profile: contribution of the pixels at each distance from the centre, in steps of rows, columns and diagonals;
            they add up to 1.
        picture: contribution of each pixel of the images that have the size of the first, H x W.
        size: height and width of the first image.
    """

    profile: NDArray[np.float64]
    picture: NDArray[np.float64]
    size: tuple[int, int]

    def side(self, share: float) -> int:
        """Return the side in pixels of the smallest square around the centre that holds a share of the contributions.

        It may reach beyond the image.
        """
        return 2 * int(np.searchsorted(np.cumsum(self.profile), share * self.profile.sum())) + 1

    def area(self, share: float) -> float:
        """Return the part of that square that lies in the image, as a share of the image's area."""
        side = self.side(share)
        height, width = self.size
        return min(side, height) * min(side, width) / (height * width)


def receptive_field(
    model: nn.Module, images: Sequence[Tensor], stride: int, normalise: Normalise, seed: int = 0
) -> ReceptiveField:
    """Measure the effective receptive field of a model in evaluation mode.

    Args:
        model: a segmenter.
        images: uint8 RGB images 3 x H x W.
        stride: the model's stride.
        normalise: the normalisation that the model was trained with.
        seed: seed of the weights of the contrast, which are those of all models with as many classes.
    """
    generator = torch.Generator().manual_seed(seed)
    size = images[0].shape[1], images[0].shape[2]
    profile = np.zeros(0)
    picture = np.zeros(size)
    for image in images:
        contributions = _contributions(model, image, stride, normalise, generator)
        height, width = contributions.shape
        rows, columns = (np.abs(np.arange(length) - length // 2) for length in (height, width))
        distance = np.maximum(rows[:, None], columns)
        found = np.bincount(distance.ravel(), contributions.ravel())
        profile = np.pad(profile, (0, max(0, len(found) - len(profile))))
        profile[: len(found)] += found
        if contributions.shape == size:
            picture += contributions
    return ReceptiveField(profile / len(images), picture / len(images), size)


def _contributions(
    model: nn.Module, image: Tensor, stride: int, normalise: Normalise, generator: torch.Generator
) -> NDArray[np.float64]:
    """Return the contribution of each pixel of the image, H x W; they add up to 1."""
    height, width = image.shape[1:]
    pixels = model_input(model, image[None].to(device_of(model)), normalise).detach().requires_grad_()
    advice = "analyse with device=cpu, or smaller images"
    with torch.enable_grad(), reraise_size_errors(pixels), reraise_out_of_memory(pixels, advice):
        logits = model(pad_to_stride(pixels, stride))[0, :, height // 2, width // 2]
        weights = torch.randn(len(logits), generator=generator)
        contrast = (weights - weights.mean()).to(logits) @ logits
        (gradient,) = torch.autograd.grad(contrast, pixels)
    found: NDArray[np.float64] = gradient[0].abs().sum(dim=0).cpu().double().numpy()
    return found / max(found.sum(), np.finfo(float).tiny)
