"""Clear errors for a model's input: images too small for the model, or too many for the memory."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import cv2
import torch
from torch import Tensor

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

from ema_seg.runtime.errors import ModelError

__all__ = ["describe_memory", "is_out_of_memory", "reraise_out_of_memory", "reraise_size_errors"]

# Messages of torch's CPU allocator, of OpenCV's, and of cuBLAS and cuDNN, which allocate beside torch.
_SHORT_OF_MEMORY = ("can't allocate memory", "Insufficient memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_")


@contextmanager
def reraise_size_errors(images: Tensor) -> Iterator[None]:
    """Replace torch's error about a layer's output size by one about the images' size, B x C x H x W.

    Raises:
        ModelError: the images are too small for the model.
    """
    try:
        yield
    except RuntimeError as error:
        if "Output size is too small" not in str(error):
            raise
        height, width = images.shape[-2:]
        raise ModelError(
            f"images of {height} x {width} pixels are too small: the model downsamples them to nothing; use larger "
            "crops (data.augmentation.crop.height and width) and images, or another model.decoder."
        ) from error


class _Batch(Protocol):
    @property
    def shape(self) -> torch.Size: ...

    @property
    def device(self) -> torch.device: ...


@contextmanager
def reraise_out_of_memory(images: _Batch, advice: str) -> Iterator[None]:
    """Replace an out-of-memory error by one sentence about a model's input.

    Args:
        images: the input, or anything that has its batch size, height, width and device, B x C x H x W.
        advice: the end of the sentence, which says what the user can do.

    Raises:
        ModelError: the memory does not suffice.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        batch, _, height, width = images.shape
        raise ModelError(
            f"out of memory for {batch} images of {height} x {width} pixels at once "
            f"({describe_memory(images.device)}); {advice}."
        ) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that memory is exhausted: the GPU's, the machine's or the process's limit."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError | cv2.error) and any(said in str(error) for said in _SHORT_OF_MEMORY)


def describe_memory(device: torch.device) -> str:
    """Describe a device's memory and this process's peak use; only name the device if the system reports neither."""
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
