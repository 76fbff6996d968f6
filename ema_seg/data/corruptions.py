"""Corruptions of images: noise, blur, weather and digital loss at five severities.

The kinds follow Hendrycks & Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and
Perturbations", ICLR 2019 (https://arxiv.org/abs/1903.12261), applied to segmentation by Kamann & Rother, CVPR 2020
(https://arxiv.org/abs/1908.05005). They are transforms of albumentations that move no pixel, so that masks stay valid;
sizes are in pixels, whatever the image's size. The random numbers of a corrupted image depend on the kind, the severity
and the image's name alone: every model sees the same images.
"""

import random
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from ema_seg.data.base import SegmentationDataset
from ema_seg.data.transforms import A, TensorSample, to_tensors
from ema_seg.runtime.errors import ConfigError, one_line

__all__ = ["CORRUPTIONS", "SEVERITIES", "CorruptedDataset", "Corruption", "corrupt"]

SEVERITIES = (1, 2, 3, 4, 5)


class Corruption(NamedTuple):
    """Kind of corruption: its group, and the transform of each severity from its value."""

    group: str
    build: Callable[[Any], A.BasicTransform]
    values: Sequence[Any]


def _downscale(factor: float) -> A.BasicTransform:
    pair = {"downscale": cv2.INTER_AREA, "upscale": cv2.INTER_NEAREST}
    return A.Downscale(scale_range=(factor, factor), interpolation_pair=pair, p=1)


def _rain(strength: tuple[str, float]) -> A.BasicTransform:
    kind, brightness = strength
    return A.RandomRain(rain_type=kind, brightness_coefficient=brightness, blur_value=3, p=1)


def _fog(strength: float) -> A.BasicTransform:
    brighter, flatter = (strength, strength), (-strength, -strength)
    return A.PlasmaBrightnessContrast(brightness_range=brighter, contrast_range=flatter, roughness=0.5, p=1)


def _snow(strength: float) -> A.BasicTransform:
    cover = (strength / 4, strength / 4)
    return A.RandomSnow(brightness_coeff=1 + strength, snow_point_range=cover, method="bleach", p=1)


def _contrast(factor: float) -> A.BasicTransform:
    same = (1, 1)
    return A.ColorJitter(brightness=same, contrast=(factor, factor), saturation=same, hue=(0, 0), p=1)


CORRUPTIONS: Mapping[str, Corruption] = {
    "gaussian noise": Corruption(
        "noise", lambda deviation: A.GaussNoise(std_range=(deviation, deviation), p=1), (0.04, 0.06, 0.08, 0.12, 0.18)
    ),
    "shot noise": Corruption(
        "noise", lambda scale: A.ShotNoise(scale_range=(scale, scale), p=1), (0.01, 0.02, 0.04, 0.08, 0.16)
    ),
    "impulse noise": Corruption(
        "noise", lambda share: A.SaltAndPepper(amount=(share, share), p=1), (0.01, 0.02, 0.04, 0.07, 0.12)
    ),
    "defocus blur": Corruption(
        "blur", lambda radius: A.Defocus(radius=(radius, radius), alias_blur=(0.1, 0.1), p=1), (1, 2, 3, 4, 6)
    ),
    "motion blur": Corruption(
        "blur", lambda length: A.MotionBlur(blur_limit=(length, length), allow_shifted=False, p=1), (3, 5, 9, 13, 17)
    ),
    "gaussian blur": Corruption(
        "blur", lambda sigma: A.GaussianBlur(sigma_limit=(sigma, sigma), p=1), (0.7, 1.0, 1.5, 2.0, 3.0)
    ),
    "rain": Corruption(
        "weather",
        _rain,
        (("drizzle", 0.95), ("drizzle", 0.85), ("heavy", 0.85), ("torrential", 0.85), ("torrential", 0.6)),
    ),
    "fog": Corruption("weather", _fog, (0.2, 0.3, 0.4, 0.5, 0.65)),
    "snow": Corruption("weather", _snow, (0.2, 0.4, 0.7, 1.1, 1.6)),
    "contrast": Corruption("digital", _contrast, (0.75, 0.5, 0.4, 0.3, 0.15)),
    "jpeg": Corruption(
        "digital", lambda quality: A.ImageCompression(quality_range=(quality, quality), p=1), (40, 25, 15, 10, 5)
    ),
    "pixelation": Corruption("digital", _downscale, (0.7, 0.5, 0.4, 0.3, 0.2)),
}
"""The standard set, by name."""


def corrupt(image: NDArray[np.uint8], name: str, kind: str, severity: int) -> NDArray[np.uint8]:
    """Corrupt an image.

    Args:
        image: uint8 RGB H x W x 3.
        name: the image's name, which seeds the random numbers.
        kind: a key of ``CORRUPTIONS``.
        severity: one of ``SEVERITIES``.

    Raises:
        ConfigError: the transform cannot be applied to this image, such as one of a few pixels.
    """
    corruption = CORRUPTIONS[kind]
    transform = A.Compose([corruption.build(corruption.values[severity - 1])])
    seed = zlib.crc32(f"{kind}/{severity}/{name}".encode(errors="surrogateescape"))
    transform.set_random_state(np.random.default_rng(seed), random.Random(seed))
    try:
        corrupted = transform(image=np.ascontiguousarray(image))["image"]
    except Exception as error:  # albumentations raises exceptions of any type
        raise ConfigError(
            f"evaluation.corruptions: {kind} cannot be applied to {name}, {image.shape[1]} x {image.shape[0]} pixels "
            f"({one_line(error)}); evaluate without corruptions."
        ) from error
    return np.asarray(corrupted, dtype=np.uint8)


class CorruptedDataset(Dataset[TensorSample]):
    """All corruptions of a data set's images, one image after the other.

    The name of a sample is ``<kind>/<severity>/<the image's name>``.

    Args:
        dataset: the data set; its transform is not applied.
        indices: the images to corrupt.
    """

    def __init__(self, dataset: SegmentationDataset, indices: Sequence[int]) -> None:
        self.dataset = dataset
        self._indices = indices
        self._variants = [(kind, severity) for kind in CORRUPTIONS for severity in SEVERITIES]

    def __len__(self) -> int:
        return len(self._indices) * len(self._variants)

    def __getitem__(self, index: int) -> TensorSample:
        place, (kind, severity) = self._find(index)
        image, mask = self.dataset.read_image(place), self.dataset.read_mask(place)
        self.dataset.check_sizes(place, image, mask)
        corrupted = corrupt(image, self.dataset.name(place), kind, severity)
        return to_tensors({"image": corrupted, "mask": mask, "name": self.name(index)})

    def name(self, index: int) -> str:
        """Return the sample's name."""
        place, (kind, severity) = self._find(index)
        return f"{kind}/{severity}/{self.dataset.name(place)}"

    def files(self, index: int) -> str:
        """Return the names of the sample's files, for messages."""
        return self.dataset.files(self._find(index)[0])

    def _find(self, index: int) -> tuple[int, tuple[str, int]]:
        """Return the index of a sample's image in the data set, and the kind and severity of its corruption."""
        place, variant = divmod(index, len(self._variants))
        return self._indices[place], self._variants[variant]
