"""Models of the page: pictures to results, one at a time."""

import time
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

import numpy as np
from numpy.typing import NDArray

from ema_seg.inference.segmenter import Picture, Segmentation, Segmenter

__all__ = ["Model", "model_names"]

# Models share the cores or the GPU, and a model must not run in two threads at once: it keeps state in hooks.
_ONE_AT_A_TIME = Lock()
_WARM_UP = 256  # pixels


@dataclass(frozen=True, eq=False)
class Model:
    """Model of the page.

    Attributes:
        name: its name on the page.
        segmenter: the model.
    """

    name: str
    segmenter: Segmenter

    @property
    def has_weight_maps(self) -> bool:
        """Return whether an attention block of the model has weight maps."""
        return any(hasattr(module, "weight_map") for module in self.segmenter.model.modules())

    def warm_up(self) -> None:
        """Segment a grey picture, so that the first one of the user takes no longer than the others."""
        self.segment(np.full((_WARM_UP, _WARM_UP, 3), 128, np.uint8))

    def segment(self, picture: Picture) -> tuple[Segmentation, float]:
        """Segment a picture and measure the time in seconds, without that of reading the file.

        Raises:
            EmaSegError: see ``Segmenter.__call__``.
        """
        image = self.segmenter.read(picture)
        with _ONE_AT_A_TIME:
            start = time.perf_counter()
            result = self.segmenter(image)
            return result, time.perf_counter() - start

    def weight_maps(self, image: NDArray[np.uint8]) -> dict[str, NDArray[np.float32]]:
        """Compute the weight maps of the attention blocks.

        Args:
            image: uint8 RGB H x W x 3.

        Returns:
            See ``Segmentation.weight_maps``.

        Raises:
            EmaSegError: see ``Segmenter.__call__``.
        """
        with _ONE_AT_A_TIME:
            return dict(self.segmenter(image, weight_maps=True).weight_maps or {})


def model_names(sources: list[str]) -> list[str]:
    """Name models by their runs and checkpoints, or by their paths as given if two of those names are the same."""
    names = [_short_name(Path(source)) for source in sources]
    return names if len(set(names)) == len(names) else sources


def _short_name(path: Path) -> str:
    if path.is_dir():
        return path.resolve().name
    run = path.resolve().parent
    return f"{run.parent.name}/{path.name}" if run.name == "checkpoints" else path.name
