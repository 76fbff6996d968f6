"""Comparison of the masks of two models on one picture."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ema_seg.inference.segmenter import Segmentation
from ema_seg.runtime.errors import ConfigError

__all__ = ["Difference", "compare", "require_common_classes"]

_MOST_PAIRS = 5
_DIFFERING = (255, 0, 160)  # no palette of the project has this colour
_UNKNOWN = 255


@dataclass(frozen=True, eq=False)
class Difference:
    """Difference of two masks of one picture.

    Pixels are compared if both models know both classes by name.

    Attributes:
        differing: bool H x W: the pixel is compared and its classes differ.
        compared: bool H x W: the pixel is compared.
        pairs: the most frequent pairs of differing classes: (name by the first model, name by the second, share of the
            compared pixels).
    """

    differing: NDArray[np.bool_]
    compared: NDArray[np.bool_]
    pairs: tuple[tuple[str, str, float], ...]

    @property
    def share(self) -> float:
        """Share of the compared pixels that differ, from 0 to 1; NaN if no pixel is compared."""
        return float(self.differing.sum() / self.compared.sum()) if self.compared.any() else float("nan")

    def draw(self, image: NDArray[np.uint8]) -> Image.Image:
        """Draw the differing pixels over the grey picture; pixels that are not compared become black.

        Args:
            image: the picture, uint8 RGB H x W x 3.
        """
        drawn = np.array(Image.fromarray(image).convert("L").convert("RGB")) // 2 + 64
        drawn[self.differing] = _DIFFERING
        drawn[~self.compared] = 0
        return Image.fromarray(drawn)


def require_common_classes(first: Sequence[str], second: Sequence[str]) -> None:
    """Check that two models have a class name in common.

    Raises:
        ConfigError: they have none.
    """
    if not set(first) & set(second):
        names, others = (f"{', '.join(known[:3])}{', …' if len(known) > 3 else ''}" for known in (first, second))
        raise ConfigError(
            f"other: has no class of the same name as run ({others} instead of {names}); give a model of the same data."
        )


def compare(first: Segmentation, second: Segmentation) -> Difference:
    """Compare the masks of two models by the names of their classes.

    Raises:
        ConfigError: the models have read different pixels: one of them ignores the picture's orientation tag.
    """
    if not np.array_equal(first.image, second.image):
        raise ConfigError(
            "the models read this picture in different orientations (data.orientation); give a picture without an "
            "orientation tag to compare them."
        )
    shared = [name for name in first.classes if name in second.classes]
    ours, others = (_to_shared(result, shared) for result in (first, second))
    compared = (ours != _UNKNOWN) & (others != _UNKNOWN)
    differing = compared & (ours != others)
    count = max(1, len(shared))
    pairs = np.bincount(ours[differing].astype(np.int64) * count + others[differing], minlength=count * count)
    frequent = [pair for pair in np.argsort(-pairs, kind="stable")[:_MOST_PAIRS].tolist() if pairs[pair]]
    total = max(1, int(compared.sum()))
    return Difference(
        differing,
        compared,
        tuple((shared[pair // count], shared[pair % count], float(pairs[pair] / total)) for pair in frequent),
    )


def _to_shared(result: Segmentation, shared: Sequence[str]) -> NDArray[np.uint8]:
    """Replace class ids by positions in the shared names, and ids of other classes by 255."""
    table = np.full(256, _UNKNOWN, np.uint8)
    for index, name in enumerate(result.classes):
        if name in shared:
            table[index] = shared.index(name)
    return table[result.mask]
