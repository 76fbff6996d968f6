"""Masks as pictures: class ids in the colours of a palette."""

from collections.abc import Sequence
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

__all__ = ["colourise", "encode_mask"]

Palette = Sequence[Sequence[int]]


def colourise(mask: NDArray[np.integer], palette: Palette) -> NDArray[np.uint8]:
    """Paint class ids in their colours.

    Args:
        mask: integers H x W in [0, K), or 255 for ignored pixels, which become black.
        palette: K colours, (red, green, blue) from 0 to 255.

    Returns:
        A uint8 array H x W x 3.
    """
    return _all_colours(palette)[mask]


def encode_mask(mask: NDArray[np.integer], palette: Palette) -> bytes:
    """Encode a mask as a PNG of class ids with their colours as palette; 255, for ignored pixels, is black.

    Args:
        mask: class ids in [0, K) or 255, H x W.
        palette: K colours, (red, green, blue) from 0 to 255; at most 255 of them, or else 256 without ignored pixels.
    """
    image = Image.fromarray(np.asarray(mask, np.uint8))
    image.putpalette(_all_colours(palette).tobytes())
    content = BytesIO()
    # An evaluation waits for this: level 1 takes half the time of the default, and a third more space.
    image.save(content, "PNG", compress_level=1)
    return content.getvalue()


def _all_colours(palette: Palette) -> NDArray[np.uint8]:
    colours = np.zeros((256, 3), np.uint8)
    colours[: len(palette)] = palette
    return colours
