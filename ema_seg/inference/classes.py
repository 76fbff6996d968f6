"""The most likely class of each pixel, without the logits at the image's resolution."""

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from ema_seg.models.head import Logits, RowLogits, RowStream, bytes_at_once
from ema_seg.runtime.cpp import Library, load_library
from ema_seg.runtime.errors import ModelError

__all__ = ["most_likely_classes"]

_SOURCE = Path(__file__).parent / "kernels" / "classes.cpp"
_MOST_CLASSES = 256  # in a byte


@torch.no_grad()
def most_likely_classes(logits: Logits) -> Tensor:
    """Return the class with the highest logit of each pixel of an image; the first one of equals.

    The result is that of ``logits.whole().argmax(dim=1)``, but memory holds a few rows or channels of the logits.

    Args:
        logits: of one image, 1 x K x H x W.

    Returns:
        A tensor H x W on the logits' device: uint8, or int64 for more than 256 classes.
    """
    classes, height, width = logits.shape[1:]
    dtype = torch.uint8 if classes <= _MOST_CLASSES else torch.int64
    ids = torch.empty(height, width, dtype=dtype, device=logits.device)
    if isinstance(logits, RowStream) or logits.scale == 1:
        _by_rows(logits, ids)
    elif ids.device.type == "cpu" and dtype == torch.uint8 and _kernels_can(logits.features):
        _upsampled_by_kernel(logits, ids)
    else:
        _by_channels(logits, ids)
    return ids


def _by_rows(logits: Logits, ids: Tensor) -> None:
    """Fill the classes a few rows at a time."""
    for first, last, strip in logits.strips():
        if ids.device.type == "cpu" and ids.dtype == torch.uint8 and _kernels_can(strip):
            strip = strip.contiguous()
            arguments = (strip.data_ptr(), len(strip), strip[0].numel(), ids[first].data_ptr(), torch.get_num_threads())
            _kernels().loaded.highest_classes(*arguments)  # type: ignore[union-attr]
        else:
            ids[first:last] = strip.argmax(dim=0)


def _by_channels(logits: RowLogits, ids: Tensor) -> None:
    """Fill the classes a few channels at a time: interpolation treats each on its own."""
    channel = int(logits.features[0, 0].nbytes * logits.scale**2)
    count = max(1, bytes_at_once(ids.device) // channel)
    highest = None
    for first, features in enumerate(logits.features.split(count, dim=1)):
        values, found = RowLogits(features, scale=logits.scale, size=logits.size).whole()[0].max(dim=0)
        found = (found + first * count).to(ids.dtype)
        if highest is None:
            highest = values
            ids.copy_(found)
            continue
        better = ~(values <= highest) & ~highest.isnan()
        ids.copy_(found.where(better, ids))
        highest = values.where(better, highest)


def _upsampled_by_kernel(logits: RowLogits, ids: Tensor) -> None:
    height, width = logits.features.shape[2:]
    full = (int(height * logits.scale), int(width * logits.scale))
    # As PyTorch decides.
    four_taps = logits.features.is_contiguous(memory_format=torch.channels_last)
    features = logits.features.contiguous()
    failed = _kernels().loaded.highest_upsampled_classes(  # type: ignore[union-attr]
        features.data_ptr(),
        *(features.shape[1], height, width, *full, *ids.shape, four_taps),
        *(ids.data_ptr(), torch.get_num_threads()),
    )
    if failed:
        raise ModelError(f"out of memory for the classes of {ids.shape[0]} x {ids.shape[1]} pixels.")


def _kernels_can(logits: Tensor) -> bool:
    return logits.dtype == torch.float32 and _kernels().loaded is not None


@cache
def _kernels() -> Library:
    library = load_library(_SOURCE, "-ffp-contract=off")
    if library.loaded is not None:
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        library.loaded.highest_classes.argtypes = [pointer, *[number] * 2, pointer, number]
        library.loaded.highest_upsampled_classes.argtypes = [pointer, *[number] * 8, pointer, number]
    return library
