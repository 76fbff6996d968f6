"""Prediction of logits for images of any size."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional

from ema_seg.data.normalise import Normalise
from ema_seg.inference.classes import most_likely_classes
from ema_seg.models.head import RowLogits, row_logits
from ema_seg.runtime.errors import ConfigError, ModelError
from ema_seg.runtime.limits import reraise_out_of_memory, reraise_size_errors

__all__ = [
    "LESS_MEMORY",
    "PRECISIONS",
    "autocast",
    "device_of",
    "memory_format_of",
    "model_input",
    "pad_to_stride",
    "predict",
    "segment",
]

#: Lightning's names of the precisions, and the dtype of autocast (None: no autocast).
PRECISIONS: dict[str, torch.dtype | None] = {
    "32-true": None,
    "32": None,
    "bf16-mixed": torch.bfloat16,
    "bf16": torch.bfloat16,
    "16-mixed": torch.float16,
    "16": torch.float16,
}


LESS_MEMORY = "predict smaller batches, with precision=bf16-mixed, or on a device with more"


def autocast(device: torch.device | str, precision: str | int) -> AbstractContextManager[object]:
    """Return the autocast context for a precision by Lightning's name.

    Args:
        device: device that the model runs on.
        precision: one of ``PRECISIONS``; "32-true" uses no autocast.

    Raises:
        ConfigError: the precision is not one of ``PRECISIONS``.
    """
    if str(precision) not in PRECISIONS:
        raise ConfigError(f"precision={precision!r}: must be one of {', '.join(PRECISIONS)}.")
    dtype = PRECISIONS[str(precision)]
    return nullcontext() if dtype is None else torch.autocast(torch.device(device).type, dtype=dtype)


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the model's weights, or the CPU for a model without any."""
    parameter = next(model.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device


def memory_format_of(model: nn.Module) -> torch.memory_format:
    """Return ``torch.channels_last`` if the model's convolution weights have that layout, else contiguous.

    The weights of 1x1 convolutions fit both layouts, so they are inconclusive.
    """
    for weight in model.parameters():
        if weight.dim() == 4 and not weight.is_contiguous():
            return torch.channels_last
    return torch.contiguous_format


def model_input(model: nn.Module, images: Tensor, normalise: Normalise) -> Tensor:
    """Normalise images for a model: in the dtype that it computes in, and in its memory format.

    Args:
        model: see ``predict``.
        images: uint8 RGB B x 3 x H x W, on the model's device.
        normalise: the normalisation that the model was trained with.
    """
    if torch.is_autocast_enabled(images.device.type):
        dtype = torch.get_autocast_dtype(images.device.type)
    else:
        dtype = next((parameter.dtype for parameter in model.parameters()), torch.float32)
    return normalise(images, dtype, memory_format_of(model))


def pad_to_stride(images: Tensor, stride: int) -> Tensor:
    """Pad a batch at the bottom and right with zeros up to multiples of the stride.

    Zero is the mean colour of a normalised image.

    Args:
        images: float tensor B x C x H x W.
        stride: number that height and width must be multiples of.

    Returns:
        A tensor B x C x H' x W'; ``images`` itself if no padding is needed.
    """
    height, width = images.shape[-2:]
    bottom, right = -height % stride, -width % stride
    return functional.pad(images, (0, right, 0, bottom)) if bottom or right else images


@torch.inference_mode()
def predict(model: nn.Module, images: Sequence[Tensor], stride: int, normalise: Normalise) -> list[RowLogits]:
    """Compute the logits of images that may differ in size.

    Images of equal size are forwarded together: each such batch is normalised on the model's device and padded to the
    stride (see ``pad_to_stride``), and its logits are cropped back. The caller sets the model's mode, its device,
    its memory layout, and the autocast context around the call.

    Args:
        model: maps float B x 3 x H x W, with H and W multiples of the stride, to logits B x K x H x W.
        images: uint8 RGB tensors 3 x H x W, on any device.
        stride: the model's stride.
        normalise: the normalisation that the model was trained with.

    Returns:
        The logits 1 x K x H x W of each image, in the images' order and at their sizes, on the model's device.

    Raises:
        ModelError: the model's logits have another size than its input, or the images are too small for the model or
            do not fit into memory.
    """
    device = device_of(model)
    by_size: dict[torch.Size, list[int]] = {}
    for index, image in enumerate(images):
        by_size.setdefault(image.shape, []).append(index)

    logits: dict[int, RowLogits] = {}
    for (_, height, width), indices in by_size.items():
        batch = torch.stack([images[index].to(device, non_blocking=True) for index in indices])
        padded = pad_to_stride(model_input(model, batch, normalise), stride)
        with reraise_size_errors(padded), reraise_out_of_memory(padded, LESS_MEMORY):
            output = row_logits(model, padded)
        if output.shape[-2:] != padded.shape[-2:]:
            raise ModelError(
                f"model: logits must have the input's size {tuple(padded.shape[-2:])}, got "
                f"{tuple(output.shape[-2:])}; upsample them in its last layer."
            )
        logits.update(zip(indices, output.crop(height, width).images(), strict=True))
    return [logits[index] for index in range(len(images))]


def segment(model: nn.Module, images: Sequence[Tensor], stride: int, normalise: Normalise) -> list[Tensor]:
    """Predict the most likely class of every pixel; see ``predict``.

    Returns:
        One tensor H x W for each image, on the model's device; see ``most_likely_classes``.
    """
    return [most_likely_classes(logits) for logits in predict(model, images, stride, normalise)]
