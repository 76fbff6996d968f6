"""Transforms of samples to tensors: augmentation for training, and the conversion to uint8 tensors.

Augmentation is a list of named steps, each a class of albumentations, :class:`ScaledCrop` or
:class:`CategoryLimitedCrop`. Masks are always resampled with nearest-neighbour interpolation. By default, geometric
steps fill the area outside the image with the mean colour (0 after normalisation), and outside the mask with 255
(ignored). Images are normalised later, on the device; see :class:`ema_seg.data.normalise.Normalise`.
"""

import inspect
import os
import random
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, distribution
from typing import Any, TypedDict, TypeGuard

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ema_seg.data.base import IGNORE_INDEX, Sample
from ema_seg.runtime.distributed.ranks import rank_info
from ema_seg.runtime.errors import ConfigError, EmaSegError, did_you_mean, one_line

# Disable albumentations' check for a newer version, which uses the network on import.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

import albumentations as A
from albumentations.core.transforms_interface import BaseTransformInitSchema
from albumentations.core.type_definitions import Targets
from pydantic import Field, PositiveFloat, ValidationError

__all__ = ["CategoryLimitedCrop", "ScaledCrop", "TensorSample", "build_train_transform", "to_tensors"]

# An environment variable, so that the processes of a run do not repeat the warning.
_WARNED = "EMA_SEG_WARNED_OF_ALBUMENTATIONSX"


class TensorSample(TypedDict):
    """A sample after transforms."""

    image: Tensor
    """RGB, uint8, 3 x H x W, a view of contiguous H x W x 3."""
    mask: Tensor
    """Train ids, uint8, H x W; 255 = ignore."""
    name: str


class _CropSchema(BaseTransformInitSchema):
    height: int = Field(ge=1)
    width: int = Field(ge=1)
    max_share: float = Field(gt=0, le=1)
    tries: int = Field(ge=1)
    fill: tuple[float, float, float]
    fill_mask: int = Field(ge=0, le=255)


class ScaledCrop(A.DualTransform):
    """Random crop at a random scale, in which no class takes more than ``max_share`` of the labelled pixels.

    Up to ``tries`` places are drawn; if none is acceptable, the last one is used. This is the usual recipe for
    Cityscapes and ADE20K: it keeps large classes (road, wall, sky) from filling whole crops. Ignored pixels
    are not counted; a crop without labelled pixels is drawn again. An image smaller than the crop is padded at
    the right and the bottom.

    Scale and place are drawn as if the whole image were scaled and then cropped. But they come first, the mask alone
    decides whether the crop is accepted, and only the region of the crop is resampled: of a memory-mapped image, no
    other rows are read. The region's corners are rounded to whole pixels of the image.

    Args:
        height: Height of the crop in pixels.
        width: Width of the crop in pixels.
        scale: Smallest and largest factor of the image's size; drawn once, uniformly.
        max_share: Largest share of the labelled pixels for one class, in (0, 1]; 1 accepts any crop with a label.
        tries: Maximum number of draws, at least 1.
        fill: Colour of the padding, RGB from 0 to 255.
        fill_mask: Train id of the padding.
        p: Probability of applying the step.
    """

    _targets = (Targets.IMAGE, Targets.MASK)

    class InitSchema(_CropSchema):
        """Schema of the arguments."""

        scale: tuple[PositiveFloat, PositiveFloat]

    def __init__(
        self,
        height: int,
        width: int,
        scale: tuple[float, float] = (0.5, 2.0),
        max_share: float = 0.75,
        tries: int = 10,
        fill: tuple[float, float, float] = (0, 0, 0),
        fill_mask: int = IGNORE_INDEX,
        p: float = 1.0,
    ) -> None:
        super().__init__(p=p)
        self.height = height
        self.width = width
        self.scale = scale
        self.max_share = max_share
        self.tries = tries
        self.fill = fill
        self.fill_mask = fill_mask

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        """Draw scale and place; return the region of the image, and the mask's crop before padding."""
        low, high = self.scale
        scale = low if low == high else self.py_random.uniform(low, high)
        sides = [(length, max(1, int(length * scale))) for length in params["shape"][:2]]
        for _ in range(self.tries):
            rows, columns = (
                self._draw(*side, most) for side, most in zip(sides, (self.height, self.width), strict=True)
            )
            size = (columns[1], rows[1])
            region = (rows[0], columns[0])
            # With pixel centres aligned, as the image's linear interpolation has them.
            crop = cv2.resize(data["mask"][region], size, interpolation=cv2.INTER_NEAREST_EXACT)
            if _is_balanced(crop, self.max_share):
                break
        return {"region": region, "size": size, "mask_crop": crop}

    def _draw(self, length: int, scaled: int, most: int) -> tuple[slice, int]:
        """Draw the crop along one side.

        Args:
            length: Pixels of the image.
            scaled: Pixels of the scaled image.
            most: Pixels of the crop.

        Returns:
            The range of the image's pixels, and the number of pixels to resample it to.
        """
        kept = min(scaled, most)
        start = self.py_random.randint(0, scaled - kept)
        first = min(round(start * length / scaled), length - 1)
        end = max(round((start + kept) * length / scaled), first + 1)
        return slice(first, end), kept

    def apply(
        self, img: NDArray[np.uint8], region: tuple[slice, slice], size: tuple[int, int], **params: Any
    ) -> NDArray[np.uint8]:
        """Crop the image, uint8 H x W x 3."""
        crop = cv2.resize(img[region], size, interpolation=cv2.INTER_LINEAR)
        return _pad(np.asarray(crop, dtype=np.uint8), self.height, self.width, self.fill)

    def apply_to_mask(self, mask: NDArray[np.uint8], mask_crop: NDArray[np.uint8], **params: Any) -> NDArray[np.uint8]:
        """Return the crop of the mask, uint8 H x W."""
        return _pad(mask_crop, self.height, self.width, self.fill_mask)


class CategoryLimitedCrop(ScaledCrop):
    """:class:`ScaledCrop` at the image's own scale, for a crop after other geometric steps."""

    class InitSchema(_CropSchema):
        """Schema of the arguments."""

    def __init__(
        self,
        height: int,
        width: int,
        max_share: float = 0.75,
        tries: int = 10,
        fill: tuple[float, float, float] = (0, 0, 0),
        fill_mask: int = IGNORE_INDEX,
        p: float = 1.0,
    ) -> None:
        super().__init__(height, width, (1.0, 1.0), max_share, tries, fill, fill_mask, p)


def _is_balanced(mask: NDArray[np.uint8], max_share: float) -> bool:
    """Return whether a mask has labelled pixels, of which no class takes more than ``max_share``."""
    counts = cv2.calcHist([mask], [0], None, [256], [0, 256])
    counts[IGNORE_INDEX] = 0
    labelled = counts.sum()
    return bool(labelled > 0 and counts.max() <= max_share * labelled)


def _pad(array: NDArray[np.uint8], height: int, width: int, fill: float | tuple[float, ...]) -> NDArray[np.uint8]:
    """Pad at the right and the bottom."""
    bottom, right = height - array.shape[0], width - array.shape[1]
    if not bottom and not right:
        return array
    padded = cv2.copyMakeBorder(array, 0, bottom, 0, right, cv2.BORDER_CONSTANT, value=fill)
    return np.asarray(padded, dtype=np.uint8)


def build_train_transform(
    steps: Mapping[str, Mapping[str, Any] | None], mean: Sequence[float]
) -> Callable[[Sample], TensorSample]:
    """Build the training transform: the augmentation steps in their order.

    Its random numbers come from torch's generator, which the data module seeds for each sample of each epoch.

    Args:
        steps: ``{"transform": <class>, **arguments}`` by a name of the user's choice; the class is
            :class:`ScaledCrop`, :class:`CategoryLimitedCrop` or a transform of albumentations. A step that is None is
            skipped.
        mean: Colour of the area outside the image, RGB in [0, 1].

    Raises:
        ConfigError: A step has no known transform, or arguments that the transform does not accept.
    """
    transforms = {name: _build_step(name, step, mean) for name, step in steps.items() if step is not None}
    _warn_of_albumentationsx()
    return _Augmentation(transforms)


def to_tensors(sample: Sample) -> TensorSample:
    """Convert a sample's arrays to tensors; the evaluation transform."""
    # A cached image is a read-only memory map, of which torch demands a copy.
    image, mask = (np.require(sample[key], requirements=["C", "W"]) for key in ("image", "mask"))
    return {
        "image": torch.from_numpy(image).permute(2, 0, 1),
        "mask": torch.from_numpy(mask),
        "name": sample["name"],
    }


class _Augmentation:
    """Albumentations steps, seeded from torch's generator."""

    def __init__(self, transforms: Mapping[str, A.BasicTransform]) -> None:
        self.names = list(transforms)
        self.compose = A.Compose(list(transforms.values()), mask_interpolation=cv2.INTER_NEAREST)

    def __call__(self, sample: Sample) -> TensorSample:
        self._seed()
        try:
            augmented = self.compose(image=sample["image"], mask=sample["mask"])
        except (EmaSegError, MemoryError):
            raise
        except Exception as error:  # albumentations raises exceptions of any type
            raise ConfigError(
                f"data.augmentation{self._failing_step_key(error)}: cannot be applied to {sample['name']} "
                f"({one_line(error)}); correct its settings, or remove it."
            ) from error
        image = augmented["image"]
        if getattr(image, "dtype", None) != np.uint8 or image.shape[2:] != (3,):
            raise ConfigError(
                "data.augmentation: a step returned an image that is not uint8 with 3 channels; remove steps that"
                " convert or normalise (the model's input is normalised on its device)."
            )
        return to_tensors({**sample, "image": image, "mask": augmented["mask"]})

    def _failing_step_key(self, error: Exception) -> str:
        """Return the end of the key of the step that raised an exception; empty if none did."""
        inside = [frame.f_locals.get("self") for frame, _ in traceback.walk_tb(error.__traceback__)]
        steps = zip(self.names, self.compose.transforms, strict=True)
        return next((f".{name}" for name, step in steps if any(step is one for one in inside)), "")

    def _seed(self) -> None:
        # Albumentations 2 has its own generators: torch's seed does not reach them, and all workers inherit the
        # same state. Its `seed` argument seeds every transform alike: a flip and a blur of probability 0.5 would
        # always come together. So all transforms share one new generator per sample, seeded from torch's.
        seed = int(torch.randint(2**63 - 1, ()))
        self.compose.set_random_state(np.random.default_rng(seed), random.Random(seed))


_OWN: dict[str, type[A.BasicTransform]] = {"ScaledCrop": ScaledCrop, "CategoryLimitedCrop": CategoryLimitedCrop}


def _build_step(name: str, step: Mapping[str, Any], mean: Sequence[float]) -> A.BasicTransform:
    if not isinstance(step, Mapping) or not isinstance(step.get("transform"), str):
        raise ConfigError(f"data.augmentation.{name}={step!r} must be a mapping with the key transform, a class.")
    arguments = {key: value for key, value in step.items() if key != "transform"}
    transform_class = _find_transform(name, step["transform"])
    parameters = inspect.signature(transform_class).parameters
    for key, value in arguments.items():
        if key not in parameters:
            raise ConfigError(
                f"data.augmentation.{name}.{key}={value!r} is not an argument of {step['transform']}; "
                f"its arguments: {', '.join(parameters)}.{did_you_mean(key, parameters)}"
            )
    defaults = {key: parameter.default for key, parameter in parameters.items()}
    try:
        return transform_class(**_outside_fill(defaults, mean) | arguments)
    except (TypeError, ValueError) as error:  # pydantic's ValidationError is a ValueError
        raise ConfigError(f"data.augmentation.{name} ({step['transform']}): {_explain(error)}.") from error


def _find_transform(name: str, class_name: str) -> type[A.BasicTransform]:
    if class_name in _OWN:
        return _OWN[class_name]
    found = getattr(A, class_name, None)
    if _is_transform(found):
        return found
    known = [key for key, value in vars(A).items() if _is_transform(value)]
    raise ConfigError(
        f"data.augmentation.{name}.transform={class_name!r}: must be {', '.join(_OWN)} or a transform of "
        f"albumentations; correct it.{did_you_mean(class_name, [*known, *_OWN])}"
    )


def _is_transform(value: object) -> TypeGuard[type[A.BasicTransform]]:
    return inspect.isclass(value) and issubclass(value, A.BasicTransform)


def _outside_fill(defaults: Mapping[str, Any], mean: Sequence[float]) -> dict[str, Any]:
    """Return the fill arguments of a transform for the area outside the image.

    The ``fill_mask`` of geometric transforms is 0 by default, which is a class here. That of dropout transforms
    is None, which leaves the mask unchanged; they keep their defaults.
    """
    if defaults.get("fill_mask") not in (0, IGNORE_INDEX):
        return {}
    return {"fill_mask": IGNORE_INDEX, "fill": tuple(round(255 * channel) for channel in mean)}


def _explain(error: Exception) -> str:
    """Return the error in one line; of a pydantic error, only each argument with its fault."""
    if isinstance(error.__cause__, ValidationError):
        return ", ".join(
            f"{'.'.join(map(str, fault['loc'][:1]))}={fault['input']!r}: {fault['msg']}"
            for fault in error.__cause__.errors()
        )
    return one_line(error).removesuffix(".")


def _warn_of_albumentationsx() -> None:
    """Warn once if albumentationsx, a package of another licence, has replaced albumentations."""
    if _WARNED in os.environ or rank_info().rank:
        return
    try:
        distribution("albumentationsx")
    except PackageNotFoundError:
        return
    os.environ[_WARNED] = "1"
    print(
        "warning: this environment holds albumentationsx (AGPL), which is imported in place of albumentations (MIT); "
        "to go back: pip uninstall albumentationsx && pip install --force-reinstall 'albumentations>=2.0.8,<2.1'.",
        file=sys.stderr,
        flush=True,
    )
