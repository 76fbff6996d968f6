"""Normalisation of images on the device that the model runs on."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ema_seg.runtime.errors import ConfigError, ModelError

__all__ = ["Normalise"]


class Normalise:
    """Conversion of uint8 images to a model's input: ``(image / 255 - mean) / std``.

    Images stay uint8 until they are on the device: float32 would be four times the bytes through the loader's workers,
    page-locked memory and the bus.

    Args:
        mean: Mean of each RGB channel, for images in [0, 1].
        std: Standard deviation of each RGB channel, for images in [0, 1].

    Raises:
        ConfigError: One of them is not three numbers, or a standard deviation is not positive.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise ConfigError(
                f"mean={list(mean)} and std={list(std)} must be three numbers each, for red, green and blue, and those"
                " of std positive."
            )
        self.mean, self.std = tuple(mean), tuple(std)
        # By device: a copy to the device in each step would wait for it.
        self._constants: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def __call__(
        self,
        images: Tensor,
        dtype: torch.dtype = torch.float32,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> Tensor:
        """Normalise images on their device; computed in float32, or in float64 for that dtype.

        Args:
            images: uint8 RGB, ... x 3 x H x W.
            dtype: Floating-point dtype of the result.
            memory_format: Memory format of the result.

        Raises:
            ModelError: The images are not uint8.
        """
        if images.dtype != torch.uint8:
            raise ModelError(f"images: must be uint8 RGB from 0 to 255, got {images.dtype}; they are normalised here.")
        mean, std = self._on(images.device)
        computed = torch.promote_types(dtype, torch.float32)
        normalised = images.to(computed, memory_format=memory_format).sub_(mean).div_(std)
        return normalised.to(dtype)

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if device not in self._constants:
            mean, std = (
                torch.tensor(values, dtype=torch.float32).mul_(255)[:, None, None].to(device)
                for values in (self.mean, self.std)
            )
            self._constants[device] = mean, std
        return self._constants[device]
