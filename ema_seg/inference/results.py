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

__all__ = ["KINDS", "Results"]

KINDS = ("masks", "overlays", "probabilities", "weight_maps")
"""Folders of the results."""
_LONGEST_SIDE = 65500  # pixels of a JPEG, in Pillow
_ERRORS = "surrogateescape"  # names of files may have bytes that are not UTF-8


class Results:
    """Files of the results in a folder, and the areas of the classes in ``areas.csv``.

    ``sources.csv`` notes which file each result is of, by its path, bytes and time of modification (nanoseconds since
    1970), and ``model.json`` the model.

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
        self._areas = _Table(out / "areas.csv", ["image", *segmenter.classes])
        self._sources = _Table(out / "sources.csv", ["image", "source", "bytes", "modified"])

    def claim(self, origin: Mapping[str, str], *, overwrite: bool = False) -> None:
        """Check that the folder has no results of another model, and read what is there.

        Args:
            origin: what identifies the model.
            overwrite: forget the results of another model.

        Raises:
            DataError: it has; or a file cannot be written.
        """
        marker = self.out / "model.json"
        content = json.dumps({**origin, "classes": self.segmenter.classes}, indent=1).encode()
        differs = marker.is_file() and marker.read_bytes() != content
        if differs and not overwrite:
            raise DataError(
                f"out={self.out}: has results of another model (model.json names it); choose another folder, or set "
                "overwrite=true."
            )
        for table in (self._areas, self._sources):
            table.open(forget=differs)
        write_file(marker, content)

    def has(self, name: str, source: Path) -> bool:
        """Return whether all results of an image are there, and are those of this very file."""
        return self.has_source(name, source) and self._has_files(name, self.kinds)

    def has_source(self, name: str, source: Path) -> bool:
        """Return whether the results of this name are those of this very file; see ``write_source``."""
        return self._sources.rows.get(name) == _source_row(name, source)

    def has_frame(self, name: str) -> bool:
        """Return whether all results of a frame are there but for its overlay."""
        return self._has_files(name, [kind for kind in self.kinds if kind != "overlays"])

    def _has_files(self, name: str, kinds: Sequence[str]) -> bool:
        return name in self._areas.rows and all(self._path(name, kind).is_file() for kind in kinds)

    def read(self, path: Path) -> NDArray[np.uint8]:
        """Read an image as RGB H x W x 3.

        Raises:
            DataError: it cannot be read, or is too large for an overlay.
        """
        image = self.segmenter.read(path)
        if max(image.shape[:2]) > _LONGEST_SIDE:
            raise DataError(
                f"{path}: has {image.shape[1]} x {image.shape[0]} pixels, and its overlay, a JPEG, at most "
                f"{_LONGEST_SIDE} a side; cut the image."
            )
        return image

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

    def write_image(self, name: str, source: Path, result: Segmentation) -> None:
        """Write the results of an image file."""
        overlay = BytesIO()
        result.overlay(self.alpha).save(overlay, "JPEG", quality=90)
        write_file(self._path(name, "overlays"), overlay.getvalue())
        self.write(name, result)
        self.write_source(name, source)

    def write(self, name: str, result: Segmentation) -> None:
        """Write the results of an image or a frame but for its overlay, its areas last."""
        result.save(self._path(name, "masks"))
        if result.probabilities is not None:
            write_file(self._path(name, "probabilities"), _npz({"probabilities": result.probabilities}))
        if result.weight_maps is not None:
            write_file(self._path(name, "weight_maps"), _npz(result.weight_maps))
        self._areas.append([name, *(f"{share:.6f}" for share in result.areas().values())])

    def write_source(self, name: str, source: Path) -> None:
        """Note, after all results of a name, which file they are of."""
        self._sources.append(_source_row(name, source))

    def finish(self) -> None:
        """Sort the rows of the tables by name."""
        self._areas.write()
        self._sources.write()

    def _path(self, name: str, kind: str) -> Path:
        suffix = {"masks": ".png", "overlays": ".jpg"}.get(kind, ".npz")
        return self.out / kind / f"{name}{suffix}"


def _npz(arrays: Mapping[str, NDArray[np.float32]]) -> bytes:
    content = BytesIO()
    np.savez(content, **arrays)  # type: ignore[arg-type]  # one of the names could be allow_pickle, a bool
    return content.getvalue()


class _Table:
    """CSV file with a row for each name, appended row by row.

    Attributes:
        rows: the rows by their first cell.
    """

    def __init__(self, path: Path, header: list[str]) -> None:
        self._path, self._header = path, header
        self.rows: dict[str, list[str]] = {}

    def open(self, *, forget: bool = False) -> None:
        """Read the rows of an earlier command, without a last one that was cut; or forget them all."""
        if not self._path.is_file():
            return
        with self._path.open(newline="", encoding="utf-8", errors=_ERRORS) as file:
            rows = [row for row in csv.reader(file) if len(row) == len(self._header) and row != self._header]
        self.rows = {} if forget else {row[0]: row for row in rows}
        self.write()

    def append(self, row: list[str]) -> None:
        """Add a row to the file."""
        self.rows[row[0]] = row
        with self._path.open("a", newline="", encoding="utf-8", errors=_ERRORS) as file:
            file.write(_csv([row] if file.tell() else [self._header, row]))

    def write(self) -> None:
        """Write the file again, sorted by name."""
        rows = [self.rows[name] for name in sorted(self.rows)]
        write_file(self._path, _csv([self._header, *rows]).encode(errors=_ERRORS))


def _csv(rows: Sequence[Sequence[str]]) -> str:
    text = StringIO()
    csv.writer(text).writerows(rows)
    return text.getvalue()


def _source_row(name: str, source: Path) -> list[str]:
    found = source.stat()
    return [name, str(source.resolve()), str(found.st_size), str(found.st_mtime_ns)]
