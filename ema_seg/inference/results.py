"""Results of a prediction as files in a folder: masks, overlays, and the areas of the classes."""

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from io import BytesIO, StringIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ema_seg.inference.segmenter import Segmentation, Segmenter
from ema_seg.runtime.errors import DataError, EmaSegError
from ema_seg.runtime.files import write_file

__all__ = ["Results"]


class Results:
    """Files of the results in a folder, and the areas of the classes in ``areas.csv``.

    Args:
        out: the folder.
        segmenter: the model.
        alpha: see ``Segmentation.overlay``.
        probabilities: also write ``probabilities/``: an array ``probabilities`` in a .npz file.
        weight_maps: also write ``weight_maps/``: an array for each attention block in a .npz file.
    """

    def __init__(
        self,
        out: Path,
        segmenter: Segmenter,
        *,
        alpha: float = 0.5,
        probabilities: bool = False,
        weight_maps: bool = False,
    ) -> None:
        self.out, self.segmenter, self.alpha = out, segmenter, alpha
        self._details = {"probabilities": probabilities, "weight_maps": weight_maps}
        self.kinds = ("masks", "overlays", *(kind for kind, wanted in self._details.items() if wanted))
        self._header = ["image", *segmenter.classes]
        self._rows: dict[str, list[str]] = {}  # of areas.csv, by name

    def claim(self, origin: str, *, overwrite: bool = False) -> None:
        """Check that the folder has no results of another model, and read the areas that are known.

        Args:
            origin: text that names the model.
            overwrite: replace all results.

        Raises:
            DataError: it has; or a file cannot be written.
        """
        marker = self.out / "model.json"
        content = json.dumps({"model": origin, "classes": self._header[1:]}, indent=1).encode()
        if marker.is_file() and not overwrite and marker.read_bytes() != content:
            raise DataError(
                f"out={self.out}: has results of another model (model.json names it); choose another folder, or set "
                "overwrite=true."
            )
        write_file(marker, content)
        areas = self.out / "areas.csv"
        if areas.is_file() and not overwrite:
            with areas.open(newline="", encoding="utf-8") as file:
                self._rows = {row[0]: row for row in csv.reader(file) if row and row != self._header}

    def has(self, name: str) -> bool:
        """Return whether all results of an image are there."""
        return name in self._rows and all(self._path(name, kind).is_file() for kind in self.kinds)

    def segment(self, images: Sequence[NDArray[np.uint8]]) -> Iterator[Segmentation | EmaSegError]:
        """Segment images of equal size, RGB H x W x 3; if that fails, each by itself.

        Yields:
            The result of each image, or the error that it ends with.
        """
        try:
            if any(self._details.values()):
                yield from [self.segmenter(image, **self._details) for image in images]
            else:
                yield from self.segmenter.segment_batch(images)
        except EmaSegError as error:
            if len(images) == 1:
                yield error
            else:
                for image in images:
                    yield from self.segment([image])

    def write_image(self, name: str, result: Segmentation) -> None:
        """Write the results of an image, its areas last."""
        overlay = BytesIO()
        result.overlay(self.alpha).save(overlay, "JPEG", quality=90)
        write_file(self._path(name, "overlays"), overlay.getvalue())
        self.write(name, result)

    def write(self, name: str, result: Segmentation) -> None:
        """Write the results of an image or a frame but for its overlay, its areas last."""
        result.save(self._path(name, "masks"))
        if result.probabilities is not None:
            write_file(self._path(name, "probabilities"), _npz({"probabilities": result.probabilities}))
        if result.weight_maps is not None:
            write_file(self._path(name, "weight_maps"), _npz(result.weight_maps))
        self._rows[name] = [name, *(f"{share:.6f}" for share in result.areas().values())]
        line = StringIO()
        csv.writer(line).writerow(self._rows[name])
        with (self.out / "areas.csv").open("a", newline="", encoding="utf-8") as file:
            file.write(line.getvalue())

    def write_areas(self) -> None:
        """Write ``areas.csv`` again, with its header and sorted by name."""
        text = StringIO()
        rows = csv.writer(text)
        rows.writerow(self._header)
        rows.writerows(self._rows[name] for name in sorted(self._rows))
        write_file(self.out / "areas.csv", text.getvalue().encode())

    def _path(self, name: str, kind: str) -> Path:
        suffix = {"masks": ".png", "overlays": ".jpg"}.get(kind, ".npz")
        return self.out / kind / f"{name}{suffix}"


def _npz(arrays: Mapping[str, NDArray[np.float32]]) -> bytes:
    content = BytesIO()
    np.savez(content, **arrays)  # type: ignore[arg-type]  # one of the names could be allow_pickle, a bool
    return content.getvalue()
