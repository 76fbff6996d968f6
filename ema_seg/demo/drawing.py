"""Tables and pictures of the page: areas with their legend, weight maps over the picture."""

import math
from collections.abc import Sequence
from html import escape
from io import BytesIO

import numpy as np
from matplotlib import colormaps
from numpy.typing import NDArray
from PIL import Image

from ema_seg.demo.comparing import Difference
from ema_seg.inference.masks import encode_mask
from ema_seg.inference.segmenter import Segmentation
from ema_seg.runtime.escaping import printable

__all__ = ["areas_table", "as_html", "difference_table", "draw_mask", "draw_weights", "range_bar", "reduced"]

_MOST_SHOWN = 1600  # longer side in pixels of the pictures on the page, except of masks
_MAP_SHARE = 0.65


def as_html(text: str) -> str:
    """Escape an untrusted name or message for HTML."""
    return escape(printable(text))


def reduced(image: Image.Image) -> Image.Image:
    """Scale a picture down to a size for the page."""
    if max(image.size) <= _MOST_SHOWN:
        return image
    smaller = image.copy()
    smaller.thumbnail((_MOST_SHOWN, _MOST_SHOWN))
    return smaller


def draw_mask(result: Segmentation) -> Image.Image:
    """Return the mask in its own size: class ids with the classes' colours as palette."""
    return Image.open(BytesIO(encode_mask(result.mask, result.palette)))


def areas_table(result: Segmentation) -> str:
    """Return an HTML table of the classes in the picture with colour and share, largest first; then all other classes.

    It is the legend of mask and overlay.
    """
    areas = result.areas()
    colours = dict(zip(result.classes, result.palette, strict=True))
    found = sorted((name for name in areas if areas[name]), key=lambda name: -areas[name])
    missing = [name for name in areas if not areas[name]]
    rows = "".join(
        f"<tr><td>{_swatch(colours[name])}{as_html(name)}</td><td>{areas[name]:.2%}</td></tr>" for name in found
    )
    text = f'<table class="areas"><tr><th>class</th><th>area</th></tr>{rows}</table>'
    if missing:
        names = " ".join(f"<span>{_swatch(colours[name])}{as_html(name)}</span>" for name in missing)
        summary = f"<summary>not found: {len(missing)} of {len(areas)} classes</summary>"
        text += f'<details class="missing">{summary}{names}</details>'
    return text


def difference_table(difference: Difference, names: Sequence[str]) -> str:
    """Return the share of differing pixels and a table of the most frequent pairs of classes as HTML.

    Args:
        difference: the difference.
        names: names of the two models.
    """
    if not difference.compared.any():
        return "<p>No pixel has a class that both models know.</p>"
    text = f'<p class="share"><b>{difference.share:.2%}</b> of the pixels differ.'
    left_out = 1 - difference.compared.mean()
    if left_out:
        text += f" {left_out:.2%} of the picture (black) has a class that one model does not know, and is not compared."
    text += "</p>"
    if difference.pairs:
        head = "".join(f"<th>{as_html(name)}</th>" for name in names)
        rows = "".join(
            f"<tr><td>{as_html(ours)}</td><td>{as_html(other)}</td><td>{share:.2%}</td></tr>"
            for ours, other, share in difference.pairs
        )
        text += f'<table class="pairs"><tr>{head}<th>pixels</th></tr>{rows}</table>'
    return text


def draw_weights(
    image: NDArray[np.uint8], weights: NDArray[np.float32], stride: int
) -> tuple[Image.Image, float, float]:
    """Draw a weight map in colours over the grey picture, on the map's own scale.

    Args:
        image: the picture, uint8 RGB H x W x 3.
        weights: the map, (h, w), of the picture padded to the stride.
        stride: the model's stride.

    Returns:
        The drawing, and the smallest and largest weight within the picture.
    """
    height, width = image.shape[:2]
    padded = height + -height % stride, width + -width % stride
    rows, columns = (
        math.ceil(cells * length / whole)
        for cells, length, whole in zip(weights.shape, (height, width), padded, strict=True)
    )
    inside = weights[:rows, :columns]
    low, high = float(inside.min()), float(inside.max())
    scaled = np.clip((weights - low) / max(high - low, 1e-12), 0, 1).astype(np.float32)
    # Both reduced before the map is enlarged: the page shows no more.
    shown = reduced(Image.fromarray(image).convert("L").convert("RGB"))
    factors = shown.width / width, shown.height / height
    size = max(1, round(padded[1] * factors[0])), max(1, round(padded[0] * factors[1]))
    enlarged = Image.fromarray(scaled).resize(size, Image.Resampling.BILINEAR)
    values = np.asarray(enlarged.crop((0, 0, *shown.size)))
    colours = Image.fromarray((colormaps["viridis"](values)[..., :3] * 255).astype(np.uint8))
    return Image.blend(shown, colours, _MAP_SHARE), low, high


def range_bar(low: float, high: float) -> str:
    """Return a bar of the colours of ``draw_weights`` with the smallest and largest weight as HTML."""
    stops = ", ".join(
        "rgb({}, {}, {})".format(*(round(255 * part) for part in colormaps["viridis"](step / 8)[:3]))
        for step in range(9)
    )
    return (
        f'<div class="range"><span>{low:.4f}</span><i style="background: linear-gradient(to right, {stops})"></i>'
        f"<span>{high:.4f}</span></div>"
    )


def _swatch(colour: Sequence[int]) -> str:
    red, green, blue = colour
    return f'<i class="swatch" style="background: rgb({red}, {green}, {blue})"></i>'
