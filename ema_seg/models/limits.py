"""What a model cannot be given: images too small for it, or more of them than the memory holds."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import cv2
import torch
from torch import Tensor

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

from ema_seg.errors import ModelError

__all__ = ["describe_memory", "explained_memory", "explained_sizes", "is_out_of_memory"]

# Of torch's allocator on the CPU, of OpenCV's, and of the libraries that take memory of a GPU beside torch's.
_SHORT_OF_MEMORY = ("can't allocate memory", "Insufficient memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_")


@contextmanager
def explained_sizes(images: Tensor) -> Iterator[None]:
    """Tell in one sentence that images B x C x H x W are too small, where torch names a layer's features.

    Raises:
        ModelError: they are.
    """
    try:
        yield
    except RuntimeError as error:
        if "Output size is too small" not in str(error):
            raise
        height, width = images.shape[-2:]
        raise ModelError(
            f"images of {height} x {width} pixels are too small for this model, which has no pixel left of them on its "
            "way; take larger crops (data.augmentation.crop.height and width) and images, or another model.decoder."
        ) from error


@contextmanager
def explained_memory(images: Tensor, advice: str) -> Iterator[None]:
    """Tell in one sentence that the memory does not suffice for a model's input.

    Args:
        images: the input, B x C x H x W.
        advice: what there is to do.

    Raises:
        ModelError: it does not.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        batch, _, height, width = images.shape
        raise ModelError(
            f"the memory does not suffice for {batch} images of {height} x {width} pixels at once "
            f"({describe_memory(images.device)}); {advice}."
        ) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory is short: of a GPU, of this machine, or of what the process may have."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError | cv2.error) and any(said in str(error) for said in _SHORT_OF_MEMORY)


def describe_memory(device: torch.device) -> str:
    """How much memory the device has, and how much of it this process has had at its peak, where the system tells."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        peak = torch.cuda.max_memory_allocated(device)
    elif resource is None or not hasattr(os, "sysconf"):
        return str(device)
    else:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        unit = 1 if sys.platform == "darwin" else 1024
        peak = unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return f"{device} has {total / 2**30:.1f} GiB, and the peak was {peak / 2**30:.1f}"
