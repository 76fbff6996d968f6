"""Protocols of papers: sliding windows, several scales and flips.

The definitions are those of mmsegmentation (https://github.com/open-mmlab/mmsegmentation): its slide mode, and its
test-time augmentation. Whole images at one scale, without a flip, are the plain protocol.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ema_seg.data.normalise import Normalise
from ema_seg.inference.prediction import device_of, predict
from ema_seg.models.head import Logits, RowLogits, RowStream
from ema_seg.runtime.errors import ConfigError

__all__ = ["PLAIN", "PredictionProtocol", "check_protocol"]

Strips = Iterable[tuple[int, int, Tensor]]


@dataclass(frozen=True)
class PredictionProtocol:
    """How an image is predicted.

    With windows, the logits of a pixel are the mean over the windows that cover it. With scales or flips, its
    probabilities are the mean over them: an image is resized bilinearly, predicted, and its logits are resized back and
    normalised by softmax. Memory holds, besides a forward, the logits of a row of windows, and with scales or flips the
    probabilities of one image.

    Attributes:
        window: height and width of a window, at each scale; None for whole images. A window that exceeds the image is
            as large as the image.
        window_stride: stride of the windows in rows and columns, at most their size; None for two thirds of it. The
            last windows are aligned to the border.
        scales: factors of the image's size.
        flip: predict the mirrored image, too.
    """

    window: tuple[int, int] | None = None
    window_stride: tuple[int, int] | None = None
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> "PredictionProtocol":
        """Build the protocol of the section ``evaluation`` or of a report; missing settings are plain."""
        window, stride, scales = (settings.get(key) for key in ("window", "window_stride", "scales"))
        if window and not stride:
            stride = [max(1, 2 * length // 3) for length in window]
        return cls(
            window=tuple(window) if window else None,
            window_stride=tuple(stride) if window and stride else None,
            scales=tuple(float(scale) for scale in scales or (1.0,)),
            flip=bool(settings.get("flip")),
        )

    @property
    def plain(self) -> bool:
        """True if each image is predicted whole, once, at its own size."""
        return self == PLAIN

    @property
    def averages(self) -> bool:
        """True if probabilities are averaged over several predictions."""
        return len(self.scales) > 1 or self.scales[0] != 1 or self.flip

    def settings(self) -> dict[str, Any]:
        """Return the protocol as plain values."""
        return asdict(self)

    def predict(
        self, model: nn.Module, images: Sequence[Tensor], stride: int, normalise: Normalise
    ) -> Iterator[Logits]:
        """Predict images by the protocol; see ``ema_seg.inference.prediction.predict``.

        Yields:
            The logits of each image, in order. Those of windows are computed while they are read.
        """
        if self.plain:
            yield from predict(model, images, stride, normalise)
            return
        device = device_of(model)

        def forward(part: Tensor) -> RowLogits:
            return predict(model, [part], stride, normalise)[0]

        for image in images:
            on_device = image.to(device)
            yield self._average(on_device, forward) if self.averages else self._predict_once(on_device, forward)

    def _predict_once(self, image: Tensor, forward: Callable[[Tensor], RowLogits]) -> Logits:
        height, width = image.shape[1:]
        if self.window is None or (self.window[0] >= height and self.window[1] >= width):
            return forward(image)
        assert self.window_stride is not None
        rows = _slide(image, self.window, self.window_stride, forward)
        first = next(rows)  # its shape has the number of classes
        return RowStream(torch.Size((1, len(first[2]), height, width)), first[2].device, chain([first], rows))

    @torch.inference_mode()
    def _average(self, image: Tensor, forward: Callable[[Tensor], RowLogits]) -> RowLogits:
        height, width = image.shape[1:]
        total: Tensor | None = None
        for scale in self.scales:
            scaled = _resize(image, int(height * scale + 0.5), int(width * scale + 0.5))
            for flipped in (False, True) if self.flip else (False,):
                logits = self._predict_once(scaled.flip(2) if flipped else scaled, forward)
                for first, last, rows in _resized_strips(logits.strips(), scaled.shape[1], (height, width)):
                    probabilities = rows.softmax(dim=0)
                    if total is None:
                        total = probabilities.new_zeros(len(rows), height, width)
                    total[:, first:last] += probabilities.flip(2) if flipped else probabilities
        assert total is not None
        total /= len(self.scales) * (1 + self.flip)
        # Logarithms of probabilities are logits, too; the smallest number keeps them finite.
        return RowLogits(total.clamp_min_(torch.finfo(total.dtype).tiny).log_()[None])


PLAIN = PredictionProtocol()


def check_protocol(settings: Mapping[str, Any]) -> None:
    """Check the settings of a protocol against each other.

    Raises:
        ConfigError: there is a stride but no window, windows leave pixels out, or a model would be compiled for each
            scale.
    """
    window, stride = settings.get("window"), settings.get("window_stride")
    if settings.get("compile") and PredictionProtocol.from_settings(settings).scales != (1.0,):
        raise ConfigError(
            "evaluation.compile: must be false with evaluation.scales, because a compiled model is compiled anew for "
            "each size; remove one of them."
        )
    if stride is None:
        return
    if window is None:
        raise ConfigError(
            f"evaluation.window_stride={stride}: must come with a window; set evaluation.window=[height,width], too."
        )
    if any(distance > size for distance, size in zip(stride, window, strict=True)):
        raise ConfigError(
            f"evaluation.window_stride={stride}: must be at most the window, {window[0]} x {window[1]} pixels, so that "
            "windows cover all pixels; lower it."
        )


def _slide(
    image: Tensor, window: tuple[int, int], stride: tuple[int, int], forward: Callable[[Tensor], RowLogits]
) -> Iterator[tuple[int, int, Tensor]]:
    """Predict an image in windows; yield strips of the mean logits as soon as no further window covers them."""
    height, width = image.shape[1:]
    (tops, rows), (lefts, columns) = (
        _place_windows(*side) for side in zip((height, width), window, stride, strict=True)
    )
    down, across = _coverage(tops, rows, image.device), _coverage(lefts, columns, image.device)
    carried: Tensor | None = None  # sums of the rows that further windows cover, too
    for top, following in zip(tops, [*tops[1:], height], strict=True):
        with torch.inference_mode():
            band: Tensor | None = None
            for left in lefts:
                part = forward(image[:, top : top + rows, left : left + columns]).whole()[0].float()
                if band is None:
                    band = part.new_zeros(len(part), rows, width)
                band[:, :, left : left + columns] += part
            assert band is not None
            if carried is not None:
                band[:, : carried.shape[1]] += carried
            done, carried = band[:, : following - top], band[:, following - top :]
            mean = done / (down[top:following, None] * across)
        yield top, following, mean


def _place_windows(length: int, window: int, stride: int) -> tuple[list[int], int]:
    """Return the first pixels of the windows along a side, and their size."""
    size = min(window, length)
    count = -(-(length - size) // stride) + 1
    return [min(index * stride, length - size) for index in range(count)], size


def _coverage(starts: Sequence[int], size: int, device: torch.device) -> Tensor:
    """Return the number of windows that cover each pixel along a side."""
    counts = torch.zeros(starts[-1] + size, device=device)
    for start in starts:
        counts[start : start + size] += 1
    return counts


def _resize(image: Tensor, height: int, width: int) -> Tensor:
    """Resize a uint8 image 3 x H x W bilinearly, to at least one pixel."""
    size = (max(1, height), max(1, width))
    if image.shape[1:] == size:
        return image
    resized = F.interpolate(image[None].float(), size=size, mode="bilinear", align_corners=False)[0]
    return resized.round().clamp(0, 255).to(torch.uint8)


def _resized_strips(strips: Strips, height: int, size: tuple[int, int]) -> Strips:
    """Resize strips of K x height x width to a size bilinearly, as ``interpolate`` does without aligned corners."""
    rows_wanted = size[0]
    kept: Tensor | None = None  # rows from ``start`` on that the next strip depends on
    start = done = 0
    position: Tensor | None = None
    for _, last, rows in strips:
        if rows.shape[2] != size[1]:
            wide = F.interpolate(rows[None], size=(rows.shape[1], size[1]), mode="bilinear", align_corners=False)
            rows = wide[0]
        if height == rows_wanted:
            yield last - rows.shape[1], last, rows
            continue
        if position is None:
            places = torch.arange(rows_wanted, device=rows.device, dtype=rows.dtype)
            position = ((places + 0.5) * height / rows_wanted - 0.5).clamp(0, height - 1)
        kept = rows if kept is None else torch.cat([kept, rows], dim=1)
        ready = rows_wanted if last == height else int((position <= last - 1).sum())
        if ready > done:
            wanted = position[done:ready]
            above = wanted.long()
            below = (above + 1).clamp_max(last - 1)
            yield done, ready, torch.lerp(kept[:, above - start], kept[:, below - start], (wanted - above)[:, None])
            done = ready
        if done < rows_wanted:
            first = min(int(position[done]), last)
            kept, start = kept[:, first - start :], first
