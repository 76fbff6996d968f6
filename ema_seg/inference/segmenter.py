"""A trained model, ready for use: pictures in, masks out."""

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor, nn

from ema_seg.data.decoding import decode_image, excess_depth
from ema_seg.data.folder import distinct_colors
from ema_seg.data.normalise import Normalise
from ema_seg.data.source import File, FolderSource
from ema_seg.inference.attention import attention_weights
from ema_seg.inference.classes import most_likely_classes
from ema_seg.inference.exported import ExportedModel
from ema_seg.inference.loading import load_model
from ema_seg.inference.masks import colourise, encode_mask
from ema_seg.inference.prediction import autocast, device_of, predict, segment
from ema_seg.inference.windows import OVERLAP, blend_windows
from ema_seg.models import model_stride
from ema_seg.models.checkpoint import checkpoint_path
from ema_seg.models.head import RowLogits
from ema_seg.runtime.errors import ConfigError, DataError
from ema_seg.runtime.execution import set_execution, tf32
from ema_seg.runtime.files import write_file

__all__ = ["Picture", "Segmentation", "Segmenter"]

Picture = str | PathLike[str] | Image.Image | NDArray[np.uint8]
"""Path of an image, PIL image, or uint8 array H x W x 3 (RGB), H x W (grey) or H x W x 4 (RGBA)."""

# Larger images are predicted in windows. A model's features take about 0.6 KB per pixel.
_MOST_PIXELS = 2048 * 2048
_LARGEST_WINDOW = 1024
_BYTES_OF_WINDOW = 2**27  # of its logits


@dataclass(frozen=True, eq=False)
class Segmentation:
    """Result of a ``Segmenter`` for one picture.

    Attributes:
        image: the picture, uint8 RGB H x W x 3.
        mask: class ids in [0, K), uint8 H x W.
        classes: the K class names.
        palette: their colours, (red, green, blue) from 0 to 255.
        probabilities: float32 K x H x W; None if they were not computed.
        weight_maps: weights by the name of the attention block, float32 (groups, h, w), where (h, w) is the
            size of the block's features; None if they were not computed.
    """

    image: NDArray[np.uint8]
    mask: NDArray[np.uint8]
    classes: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    probabilities: NDArray[np.float32] | None = None
    weight_maps: Mapping[str, NDArray[np.float32]] | None = None

    def areas(self) -> dict[str, float]:
        """Return the share of the picture that each class covers, from 0 to 1, by the class's name."""
        counts = np.bincount(self.mask.ravel(), minlength=len(self.classes))
        return dict(zip(self.classes, (counts / self.mask.size).tolist(), strict=True))

    def overlay(self, alpha: float = 0.5) -> Image.Image:
        """Blend the picture with the colours of its mask.

        Args:
            alpha: share of the colours, from 0 (the picture alone) to 1 (the mask alone).

        Raises:
            ConfigError: ``alpha`` is not from 0 to 1.
        """
        if not 0 <= alpha <= 1:
            raise ConfigError(f"alpha={alpha!r}: must be a number from 0 to 1.")
        colours = Image.fromarray(colourise(self.mask, self.palette))
        return Image.blend(Image.fromarray(self.image), colours, alpha)

    def save(self, path: str | PathLike[str]) -> None:
        """Write the mask as a PNG of class ids with their colours as palette.

        Raises:
            DataError: the path does not end in ``.png``, or the file cannot be written.
        """
        if Path(path).suffix.lower() != ".png":
            raise DataError(f"{path}: a mask is written as PNG, which keeps class ids; end the path in .png.")
        write_file(Path(path), encode_mask(self.mask, self.palette))


class Segmenter:
    """Trained model with all that it needs to segment pictures.

    Args:
        model: segmenter in evaluation mode, on the device.
        classes: names of its K classes.
        palette: their colours, (red, green, blue) from 0 to 255.
        normalise: the normalisation that the model was trained with.
        stride: number that height and width of the model's input must be multiples of; None for ``model_stride``.
        upright: apply the orientation tags of files and PIL images; else take pixels as stored.
        precision: see ``ema_seg.inference.autocast``.
        multiply_in_tf32: see ``training.tf32``.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        classes: Sequence[str],
        palette: Sequence[Sequence[int]],
        normalise: Normalise,
        stride: int | None = None,
        upright: bool = True,
        precision: str = "32-true",
        multiply_in_tf32: bool | None = None,
    ) -> None:
        self.model = model
        self.classes = tuple(classes)
        self.palette = tuple((int(red), int(green), int(blue)) for red, green, blue in palette)
        self.normalise = normalise
        self.stride = stride or model_stride(model)
        self.upright = upright
        self.precision = precision
        self._tf32 = multiply_in_tf32
        autocast("cpu", precision)  # checks the name

    @classmethod
    def load(
        cls,
        source: str | PathLike[str],
        *,
        device: str = "auto",
        precision: str | None = None,
        compile: bool = False,
    ) -> "Segmenter":
        """Load the model of a run, a checkpoint or an exported file; see ``ema_seg.load``."""
        path = checkpoint_path(source)
        loaded = load_model(path, device, "device")
        if loaded.exported and (precision or compile):
            raise ConfigError(f"{path}: an exported model computes as its file says; remove precision and compile.")
        config, classes = loaded.saved["config"], loaded.saved["classes"]
        evaluation = {} if loaded.exported else config.get("evaluation") or {}
        set_execution(loaded.model, channels_last=bool(evaluation.get("channels_last")), compile=compile)
        return cls(
            loaded.model,
            classes=classes,
            palette=loaded.saved.get("palette") or distinct_colors(len(classes)),
            normalise=loaded.normalise,
            stride=loaded.stride,
            upright=config["data"].get("orientation", "upright") == "upright",
            precision=precision or evaluation.get("precision", "32-true"),
            multiply_in_tf32=(config.get("training") or {}).get("tf32"),
        )

    @overload
    def __call__(self, images: Picture, *, probabilities: bool = ..., weight_maps: bool = ...) -> Segmentation: ...

    @overload
    def __call__(
        self, images: list[Picture] | tuple[Picture, ...], *, probabilities: bool = ..., weight_maps: bool = ...
    ) -> list[Segmentation]: ...

    def __call__(
        self,
        images: Picture | list[Picture] | tuple[Picture, ...],
        *,
        probabilities: bool = False,
        weight_maps: bool = False,
    ) -> Segmentation | list[Segmentation]:
        """Segment a picture, or a list of pictures that may differ in size.

        Masks are those of an evaluation of the same image, to the last pixel on a CPU. Images of more than 4 megapixels
        are predicted in windows that overlap, so that memory does not grow with the image.

        Args:
            images: see ``Picture``. Grey pictures get three equal channels; the alpha channel of RGBA is left out.
            probabilities: compute the probability of each class at each pixel, too.
            weight_maps: compute the weight maps of attention blocks, too; not in windows.

        Returns:
            A ``Segmentation``, or a list of them for a list.

        Raises:
            DataError: a picture cannot be read, or is none of those above.
            ConfigError: weight maps of a picture in windows.
            ModelError: a picture is too small for the model, or does not fit into memory.
        """
        if isinstance(images, list | tuple):
            return [self._segment(image, probabilities, weight_maps) for image in images]
        return self._segment(images, probabilities, weight_maps)

    def segment_batch(self, images: Sequence[NDArray[np.uint8]]) -> list[Segmentation]:
        """Segment RGB arrays H x W x 3, those of one size together; see ``__call__``."""
        if any(image.shape[0] * image.shape[1] > _MOST_PIXELS for image in images):
            return [self._segment(image, False, False) for image in images]
        tensors = [_as_tensor(image) for image in images]
        with self._computing():
            masks = segment(self.model, tensors, self.stride, self.normalise)
        return [
            Segmentation(image, mask.cpu().numpy(), self.classes, self.palette)
            for image, mask in zip(images, masks, strict=True)
        ]

    def read(self, picture: Picture) -> NDArray[np.uint8]:
        """Read a picture as uint8 RGB H x W x 3, as ``__call__`` does.

        Raises:
            DataError: see ``__call__``.
        """
        if isinstance(picture, str | PathLike):
            path = Path(picture)
            return decode_image(File(FolderSource(path.parent), path.name), upright=self.upright)
        if isinstance(picture, Image.Image):
            if depth := excess_depth(picture):
                raise DataError(f"the PIL image has {depth}; expected 8 bits a channel: scale it to 0 … 255.")
            turned = ImageOps.exif_transpose(picture) if self.upright else picture
            picture = np.array(turned.convert("RGB"))
        array = np.asarray(picture)
        if array.dtype != np.uint8 or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)):
            raise DataError(
                f"the picture is {array.dtype} of shape {array.shape}; expected uint8 H x W x 3 (RGB), H x W (grey) or "
                "H x W x 4 (RGBA), a path or a PIL image."
            )
        if not array.size:
            raise DataError(f"the picture of shape {array.shape} has no pixel; expected one at least.")
        return np.repeat(array[..., None], 3, axis=2) if array.ndim == 2 else np.ascontiguousarray(array[..., :3])

    def _segment(self, picture: Picture, probabilities: bool, weight_maps: bool) -> Segmentation:
        image = self.read(picture)
        tensor = _as_tensor(image)
        in_windows = tensor[0].numel() > _MOST_PIXELS
        if isinstance(self.model, ExportedModel):
            if weight_maps:
                raise ConfigError("weight_maps: an exported model does not return them; load the run or a checkpoint.")
            if probabilities and self.model.metadata.processing:
                raise ConfigError("probabilities: the exported model returns classes; export it with processing=false.")
        if in_windows and weight_maps:
            raise ConfigError(
                f"weight_maps: the picture has {image.shape[1]} x {image.shape[0]} pixels and is predicted in windows, "
                "which have maps of their own; give a picture of at most 4 megapixels."
            )
        with self._computing():
            whole = self._predict_windows if in_windows else self._predict_whole
            mask, found = whole(tensor, probabilities)
            maps = self._weight_maps(tensor) if weight_maps else None
        return Segmentation(image, mask, self.classes, self.palette, found, maps)

    def _computing(self) -> AbstractContextManager[Any]:
        stack = ExitStack()
        stack.enter_context(torch.inference_mode())
        stack.enter_context(tf32(self._tf32))
        stack.enter_context(autocast(device_of(self.model), self.precision))
        return stack

    def _predict_whole(self, image: Tensor, probabilities: bool) -> tuple[NDArray[np.uint8], Any]:
        (logits,) = predict(self.model, [image], self.stride, self.normalise)
        found = logits.whole()[0].float().softmax(dim=0).cpu().numpy() if probabilities else None
        return most_likely_classes(logits).cpu().numpy(), found

    def _predict_windows(self, image: Tensor, probabilities: bool) -> tuple[NDArray[np.uint8], Any]:
        height, width = image.shape[1:]
        mask = np.empty((height, width), np.uint8)
        found = np.empty((len(self.classes), height, width), np.float32) if probabilities else None

        def predict_window(part: Tensor) -> Tensor:
            (logits,) = predict(self.model, [part], self.stride, self.normalise)
            if isinstance(self.model, ExportedModel) and self.model.metadata.processing:  # windows vote
                votes = torch.eye(len(self.classes), device=logits.device)[most_likely_classes(logits).int()]
                return votes.permute(2, 0, 1)
            return logits.whole()[0].float()

        for top, left, logits in blend_windows(image, self._window(), predict_window):
            place = slice(top, top + logits.shape[1]), slice(left, left + logits.shape[2])
            mask[place] = most_likely_classes(RowLogits(logits[None])).cpu().numpy()
            if found is not None:
                found[:, *place] = logits.softmax(dim=0).cpu().numpy()
        return mask, found

    def _window(self) -> int:
        """Return the size of a window: smaller for many classes."""
        return max(2 * OVERLAP, min(_LARGEST_WINDOW, math.isqrt(_BYTES_OF_WINDOW // (4 * len(self.classes)))))

    def _weight_maps(self, image: Tensor) -> dict[str, NDArray[np.float32]]:
        found = attention_weights(self.model, image, self.stride, self.normalise)
        return {name: maps.cpu().numpy() for name, maps in found.items()}


def _as_tensor(image: NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(image if image.flags.writeable else image.copy()).permute(2, 0, 1)
