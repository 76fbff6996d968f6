"""Decoding of files to arrays: images to RGB, masks to values or colours.

A DataError refuses files that decoders would change silently: more than 8 bits a channel, a damaged JPEG, a mask with
lossy compression or transparent pixels.
"""

import io
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import numpy as np
import simplejpeg
from kornia_rs.io import decode_image_png_u8
from numpy.typing import NDArray
from PIL import ExifTags, Image, TiffImagePlugin, UnidentifiedImageError

from ema_seg.data.source import IMAGE_FORMATS, File
from ema_seg.runtime.errors import DataError

__all__ = ["Traits", "decode_image", "decode_mask", "read_size", "read_traits"]

Pixels = NDArray[np.uint8]

_JPEG = {"JPEG", "MPO"}  # MPO: several JPEGs in one file, as phones write them; the first one is read

# Transforms from stored to upright pixels, by orientation tag (EXIF 2.32, tag 0x0112); 1 is upright already.
_TURNS: Mapping[int, Callable[[Pixels], Pixels]] = {
    2: np.fliplr,
    3: lambda pixels: np.rot90(pixels, 2),
    4: np.flipud,
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: np.rot90(pixels, 2).swapaxes(0, 1),
    8: np.rot90,
}
_INVERSE = {6: 8, 8: 6}
# kornia-rs's names of Pillow's raw modes of 8 bits a channel; it decodes a palette to its indices.
_PNG_MODES: Mapping[object, str] = {"RGB": "rgb", "L": "mono", "P": "mono"}
# Keywords of the texts in a PNG in which Pillow looks for an orientation tag.
_PNG_KEYWORDS = (b"Raw profile type", b"XML:com.adobe.xmp")


class Traits(NamedTuple):
    """Properties of an image file that its decoded pixels no longer show."""

    orientation: int
    """The orientation tag, 1 to 8; 1 if there is none."""
    palette: bool
    grey: bool


def read_traits(file: File) -> Traits:
    """Read a file's traits; raise DataError if it is not an image."""
    with _opened(file, "an image") as (image, data):
        return Traits(_orientation(image, data), image.mode == "P", _is_grey(image.mode))


def read_size(file: File, *, upright: bool = False) -> tuple[int, int]:
    """Read height and width from an image's header; raise DataError if it is not an image.

    Args:
        file: The file.
        upright: Return the size after the orientation tag is applied.
    """
    with _opened(file, "an image") as (image, data):
        swapped = _orientation(image, data) >= 5
        if swapped and image.format == "TIFF":  # Pillow's size is that of the turned image
            height, width, _ = decode_image(file, upright=upright).shape
            return height, width
        return (image.width, image.height) if swapped and upright else (image.height, image.width)


def decode_image(file: File, *, upright: bool = False) -> Pixels:
    """Decode an image of one of ``IMAGE_FORMATS``, of any colour mode, to RGB.

    Args:
        file: The file.
        upright: Apply the orientation tag, as viewers do; else return the pixels as stored.

    Returns:
        uint8 RGB, H x W x 3.

    Raises:
        DataError: The file is unreadable, damaged, of another format, or has more than 8 bits a channel.
    """
    with _opened(file, "an image") as (image, data):
        if depth := excess_depth(image):
            raise DataError(f"{file}: the image has {depth}; expected 8 bits a channel: scale its values to 0 … 255.")
        orientation = _orientation(image, data)  # after the depth: it may load a PNG, and Pillow then forgets the depth
        if image.format in _JPEG:
            pixels = _decode_jpeg(image, data)
        elif image.mode == "RGB":
            pixels = _stored_pixels(image, data)
        else:
            pixels = np.array(image.convert("RGB"))
        return _turn(pixels, image, orientation, upright)


def decode_mask(
    file: File, *, palette_colors: bool = False, grey_colors: bool = False, upright: bool = False
) -> Pixels:
    """Decode a mask without changing its values.

    Args:
        file: The file.
        palette_colors: Return the colours of a mask with a palette, instead of its indices.
        grey_colors: Return the colours of a grey mask (v, v, v), instead of its values.
        upright: Apply the orientation tag; else return the pixels as stored.

    Returns:
        uint8, H x W values, or H x W x 3 for colours.

    Raises:
        DataError: The file is unreadable or truncated, its compression is lossy, its mode is not grey, palette or RGB,
            it has transparent pixels (allowed in a palette read as indices), a value is outside 0 to 255, or colours
            have more than 8 bits a channel.
    """
    with _opened(file, "a mask") as (image, data):
        if lossy := _lossy_compression(image, data):
            raise DataError(
                f"{file}: the mask is {lossy}, a lossy compression that changes mask values; expected a lossless "
                "format: export the masks again as PNG."
            )
        if not (image.mode in {"P", "RGB", "RGBA"} or _is_grey(image.mode)):
            raise DataError(f"{file}: the mask has mode {image.mode}, expected grey, palette or RGB.")
        as_colors = palette_colors if image.mode == "P" else grey_colors if _is_grey(image.mode) else True
        depth, scale, orientation = excess_depth(image), _grey_scale(image, file), _orientation(image, data)
        if image.mode in {"RGBA", "LA"} or (as_colors and "transparency" in image.info):
            _require_opaque(image, file)
        if as_colors:
            if depth:
                raise DataError(f"{file}: the mask has {depth}; expected 8 bits a channel.")
            if image.mode == "P":
                _require_colors(image, file)
            colors = _stored_pixels(image, data) if image.mode == "RGB" else np.array(image.convert("RGB"))
            return _turn(colors, image, orientation, upright)
        values = np.array(image.convert("L")) if image.mode == "LA" else _stored_pixels(image, data)
        if values.dtype not in (np.uint8, np.bool_) and (values.min() < 0 or values.max() > 255):
            worst = values.max() if values.max() > 255 else values.min()
            raise DataError(f"{file}: mask value {worst} is outside the class list, expected values from 0 to 255.")
        return _turn(values.astype(np.uint8, copy=False) // scale, image, orientation, upright)


@contextmanager
def _opened(file: File, kind: str) -> Iterator[tuple[Image.Image, bytes]]:
    """Open a file with Pillow, which reads only its header; turn errors of decoders into DataErrors."""
    data = file.read()
    try:
        with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
            yield image, data
    except DataError:
        raise
    except Exception as error:  # Pillow's readers raise OSError, SyntaxError, ValueError, struct.error, ...
        raise DataError(f"{file}: cannot be decoded as {kind} ({_first_line(error)}).") from error


def _decode_jpeg(image: Image.Image, data: bytes) -> Pixels:
    """Decode a JPEG; raise an error for damaged data, which Pillow and OpenCV accept silently."""
    if image.mode in {"L", "RGB"}:
        return np.asarray(simplejpeg.decode_jpeg(data, "RGB", fastdct=False, fastupsample=False))
    simplejpeg.decode_jpeg(data, "CMYK")  # only for its errors; Pillow handles inverted CMYK
    return np.array(image.convert("RGB"))


def _stored_pixels(image: Image.Image, data: bytes) -> NDArray[Any]:
    """Decode an image without a change of its mode; PNGs of 8 bits two to seven times as fast as Pillow and OpenCV."""
    raw_mode = next(iter(_decoder_arguments(image)), None)
    if image.format == "PNG" and raw_mode in _PNG_MODES:
        # kornia-rs raises no other type. What it refuses, Pillow decodes, or says what is wrong.
        with suppress(Exception):
            pixels = decode_image_png_u8(data, (image.height, image.width), _PNG_MODES[raw_mode])
            return np.asarray(pixels if image.mode == "RGB" else pixels[..., 0])
    return np.array(image)


def _orientation(image: Image.Image, data: bytes) -> int:
    # Pillow decodes a PNG as a whole to find metadata after its pixels.
    if image.format == "PNG" and not _has_metadata(data):
        return 1
    try:
        tag = int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # Pillow's parser raises errors of any type; viewers, too, ignore damaged metadata
        return 1
    return tag if tag in _TURNS else 1


def _has_metadata(png: bytes) -> bool:
    """Return whether a PNG has a chunk that may hold an orientation tag (PNG specification, 3rd edition, section 5)."""
    at = 8
    while at + 8 <= len(png):
        length, kind = struct.unpack_from(">I4s", png, at)
        if kind == b"eXIf" or png.startswith(_PNG_KEYWORDS, at + 8):
            return True
        at += 12 + length
    return False


def _turn(pixels: Pixels, image: Image.Image, orientation: int, upright: bool) -> Pixels:
    """Turn decoded pixels upright, or back to their stored orientation."""
    if image.format == "TIFF":  # Pillow has already turned it upright
        turn = 1 if upright else _INVERSE.get(orientation, orientation)
    else:
        turn = orientation if upright else 1
    return np.ascontiguousarray(_TURNS[turn](pixels)) if turn in _TURNS else pixels


def excess_depth(image: Image.Image) -> str | None:
    """Describe a depth above 8 bits a channel, which Pillow would cut to the high byte; None for 8 bits or less."""
    if image.mode.startswith(("I", "F")):
        return f"mode {image.mode}"
    arguments = _decoder_arguments(image)
    # Not BMP: its "BGR;16" is 16 bits a pixel.
    if image.format in {"PNG", "TIFF"} and arguments and ";16" in str(arguments[0]):
        return "16 bits a channel"
    if image.format == "PPM" and isinstance(arguments[-1], int) and arguments[-1] > 255:
        return f"values up to {arguments[-1]}"
    return None


def _grey_scale(image: Image.Image, file: File) -> int:
    """Return the factor by which Pillow stretches grey values of 2 or 4 bits to 8 bits.

    Call it before the pixels are loaded: Pillow then forgets their raw mode.
    """
    arguments = _decoder_arguments(image)
    if image.format == "PPM" and isinstance(arguments[-1], int):
        raise DataError(
            f"{file}: the mask's header has the maximum value {arguments[-1]}, so its values would be rescaled; "
            "expected 255: save it as PNG."
        )
    return {"L;2": 85, "L;4": 17}.get(str(arguments[0]) if arguments else "", 1)


def _decoder_arguments(image: Image.Image) -> tuple[object, ...]:
    """Return Pillow's decoder arguments; the first is the raw mode ("RGB;16B")."""
    tiles = getattr(image, "tile", None)
    arguments = tiles[0][3] if tiles else ()
    return arguments if isinstance(arguments, tuple) else (arguments,)


def _is_grey(mode: str) -> bool:
    return mode in {"1", "L", "LA"} or mode.startswith("I")


def _require_opaque(image: Image.Image, file: File) -> None:
    transparent = np.count_nonzero(np.array(image.convert("RGBA").getchannel("A")) < 255)
    if transparent:
        raise DataError(
            f"{file}: the mask has {transparent} transparent pixels, whose hidden colour would count as a class; "
            "expected an opaque mask: fill them with a class's colour or an ignored one."
        )


def _require_colors(image: Image.Image, file: File) -> None:
    """Refuse indices beyond the end of the palette, which Pillow would show as black."""
    indices, colors = np.array(image), len(image.getpalette() or ()) // 3
    if indices.max() >= colors:
        raise DataError(
            f"{file}: the mask has the palette index {indices.max()}, but its palette has {colors} colours; export it "
            "again, or set data.masks=index if its indices are class values."
        )


def _lossy_compression(image: Image.Image, data: bytes) -> str | None:
    if image.format in _JPEG:
        return "a JPEG"
    if image.format == "WEBP" and _is_lossy_webp(data):
        return "a lossy WebP"
    if isinstance(image, TiffImagePlugin.TiffImageFile) and image.info.get("compression") in {"jpeg", "tiff_jpeg"}:
        return "a TIFF with JPEG compression"
    return None


def _is_lossy_webp(data: bytes) -> bool:
    """Check whether the first frame is VP8 instead of VP8L.

    https://developers.google.com/speed/webp/docs/riff_container
    """
    at = 12  # after "RIFF", the size and "WEBP"
    while at + 8 <= len(data):
        kind, size = struct.unpack_from("<4sI", data, at)
        if kind in {b"VP8 ", b"VP8L"}:
            return bool(kind == b"VP8 ")
        # An animation frame has a header of 16 bytes before its chunks.
        at += 24 if kind == b"ANMF" else 8 + size + size % 2
    return True


def _first_line(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):  # its text has the address of a buffer
        return "not an image of a known format"
    return str(error).splitlines()[0] if str(error) else type(error).__name__
