"""Calls of the C++ kernels that count the pixels and objects of an image (``kernels/counts.cpp``)."""

import ctypes
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ema_seg.runtime.cpp import load_library
from ema_seg.runtime.errors import ModelError

__all__ = ["count_objects", "count_pixels", "countable"]

_SOURCE = Path(__file__).parent / "kernels" / "counts.cpp"


def countable(prediction: object, target: object, num_classes: int, ignore_index: int) -> bool:
    """Return whether the kernels can count these labels: uint8 arrays H x W of up to 255 classes."""
    arrays = [labels for labels in (prediction, target) if isinstance(labels, np.ndarray)]
    return (
        len(arrays) == 2
        and all(labels.dtype == np.uint8 and labels.ndim == 2 for labels in arrays)
        and arrays[0].shape == arrays[1].shape
        and num_classes <= ignore_index <= 255
        and load_library(_SOURCE).loaded is not None
    )


def count_pixels(
    prediction: NDArray[np.uint8], target: NDArray[np.uint8], num_classes: int, ignore_index: int
) -> NDArray[np.int64] | None:
    """Count the labelled pixels by true and predicted class, K x K; None if a label is out of range."""
    matrix = np.zeros((num_classes, num_classes), np.int64)
    return None if _call("count_pixels", prediction, target, num_classes, ignore_index, matrix) else matrix


def count_objects(
    prediction: NDArray[np.uint8],
    target: NDArray[np.uint8],
    num_classes: int,
    ignore_index: int,
    limits: tuple[int, int],
) -> NDArray[np.int64]:
    """Count intersection and union of each class in three strata of objects, 2 x 3 x K; see ``strata``."""
    counts = np.zeros((2, 3, num_classes), np.int64)
    failed = _call("count_objects", prediction, target, num_classes, ignore_index, np.array(limits, np.int64), counts)
    if failed:
        problem = f"out of memory for the objects of {target.shape[0]} x {target.shape[1]} pixels"
        raise ModelError(f"{problem}." if failed == 1 else f"labels and predictions must be below {num_classes}.")
    return counts


def _call(
    function: str,
    prediction: NDArray[np.uint8],
    target: NDArray[np.uint8],
    num_classes: int,
    ignore_index: int,
    *arrays: NDArray[np.int64],
) -> int:
    maps = [np.ascontiguousarray(labels) for labels in (prediction, target)]
    sizes = [ctypes.c_int64(size) for size in (*target.shape, num_classes, ignore_index)]
    before, after = ([ctypes.c_void_p(array.ctypes.data) for array in group] for group in (maps, arrays))
    return getattr(load_library(_SOURCE).loaded, function)(*before, *sizes, *after)
