"""Predicted masks as files, for pictures side by side long after the evaluation."""

import shutil
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ema_seg.errors import DataError
from ema_seg.reporting.files import file_names

__all__ = ["PredictionWriter", "encode_mask"]


class PredictionWriter:
    """Writes predicted masks into ``predictions/`` of a report's folder, one at a time.

    A context manager: the masks gather beside an earlier report's, and take their place when all are there.

    Args:
        directory: the report's folder.
        names: the images' names, in the order in which their masks come.
        palette: K colours, (red, green, blue) from 0 to 255.

    Attributes:
        paths: path of each image's mask, relative to ``directory``.
    """

    def __init__(self, directory: Path, names: Sequence[str], palette: Sequence[Sequence[int]]) -> None:
        self._final = directory / "predictions"
        self._partial = directory / "predictions.partial"
        self._palette = palette
        self._names = file_names(names)
        self._written = 0
        self.paths = [f"{self._final.name}/{name}.png" for name in self._names]

    def __enter__(self) -> "PredictionWriter":
        try:
            shutil.rmtree(self._partial, ignore_errors=True)
            self._partial.mkdir(parents=True)
        except OSError as error:
            raise DataError(f"{self._partial}: the folder cannot be made ({error.strerror}).") from error
        return self

    def __call__(self, name: str, prediction: NDArray[np.integer]) -> None:
        """Write the next image's mask: class ids in [0, K), H x W."""
        path = self._partial / f"{self._names[self._written]}.png"
        path.write_bytes(encode_mask(prediction, self._palette))
        self._written += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            shutil.rmtree(self._final, ignore_errors=True)
            self._partial.replace(self._final)
        else:
            shutil.rmtree(self._partial, ignore_errors=True)


def encode_mask(mask: NDArray[np.integer], palette: Sequence[Sequence[int]]) -> bytes:
    """A PNG whose pixels are class ids and whose palette is their colours; 255, for ignored pixels, is black.

    Args:
        mask: class ids in [0, K) or 255, H x W.
        palette: K colours, (red, green, blue) from 0 to 255; at most 255 of them, or else 256 without ignored pixels.
    """
    colours = np.zeros((256, 3), np.uint8)
    colours[: len(palette)] = palette
    image = Image.fromarray(np.asarray(mask, np.uint8))
    image.putpalette(colours.tobytes())
    content = BytesIO()
    # The lowest level takes half of the time of the default and a third more space: an evaluation waits for it.
    image.save(content, "PNG", compress_level=1)
    return content.getvalue()
