"""Segmentation of many image files: masks, overlays and the areas of the classes, as files."""

import csv
import glob
import json
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from io import BytesIO, StringIO
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from ema_seg.inference.segmenter import Segmentation, Segmenter
from ema_seg.runtime.errors import DataError, EmaSegError
from ema_seg.runtime.files import write_file
from ema_seg.runtime.progress import CountedProgress

__all__ = ["SUFFIXES", "find_images", "segment_files"]

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")

T = TypeVar("T")


def find_images(source: str) -> tuple[list[Path], Path]:
    """Find the images that a path or pattern names.

    Args:
        source: an image; a folder, in which files with one of ``SUFFIXES`` are images at any depth; or a pattern with
            ``*``, ``?``, ``[`` or ``**``.

    Returns:
        The images, sorted, and the folder that the names of their results are relative to.

    Raises:
        DataError: nothing is there, or there are no images.
    """
    path = Path(source)
    if path.is_file():
        return [path], path.parent
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.is_file() and file.suffix.lower() in SUFFIXES)
        if not found:
            raise DataError(f"source={source}: the folder has no images ({', '.join(SUFFIXES)}); give another.")
        return found, path
    parts = path.parts
    wildcard = next((index for index, part in enumerate(parts) if glob.has_magic(part)), len(parts))
    root = Path(*parts[:wildcard])
    matches = sorted(file for file in root.glob("/".join(parts[wildcard:]) or "*") if file.is_file())
    if wildcard == len(parts) or not matches:
        raise DataError(f"source={source}: there is no such file or folder, and no file matches it as a pattern.")
    return matches, root


def segment_files(
    segmenter: Segmenter,
    images: Sequence[Path],
    root: Path,
    out: Path,
    *,
    origin: str,
    batch_size: int = 4,
    workers: int = 4,
    alpha: float = 0.5,
    probabilities: bool = False,
    weight_maps: bool = False,
    overwrite: bool = False,
) -> list[str]:
    """Segment images into ``masks/``, ``overlays/`` and ``areas.csv`` of a folder.

    Images whose results are there are left out, so that the same call goes on after an interruption. Files are read and
    written in threads beside the model.

    Args:
        segmenter: the model.
        images: the images.
        root: folder that contains them all; results have their paths below it.
        out: folder of the results.
        origin: text that names the model; results of another one are not mixed with its own.
        batch_size: images of equal size that are predicted together.
        workers: threads.
        alpha: see ``Segmentation.overlay``.
        probabilities: also write ``probabilities/``: an array ``probabilities`` in a .npz file.
        weight_maps: also write ``weight_maps/``: an array for each attention block in a .npz file.
        overwrite: predict all images, and replace results of another model.

    Returns:
        A sentence for each image that could not be read or predicted.

    Raises:
        DataError: a result cannot be written, or ``out`` has results of another model.
    """
    kinds = ["masks", "overlays", *["probabilities"] * probabilities, *["weight_maps"] * weight_maps]
    results = _Results(out, images, root, segmenter.classes, kinds)
    results.claim(origin, overwrite)
    missing = [image for image in images if overwrite or not results.has(image)]
    problems: dict[Path, str] = {}

    def compute(batch: list[tuple[Path, NDArray[np.uint8]]]) -> Iterator[tuple[Path, Segmentation]]:
        """Segment a batch; if it fails, each image by itself."""
        try:
            if probabilities or weight_maps:
                found = [segmenter(image, probabilities=probabilities, weight_maps=weight_maps) for _, image in batch]
            else:
                found = segmenter.segment_batch([image for _, image in batch])
        except EmaSegError as error:
            if len(batch) > 1:
                for single in batch:
                    yield from compute([single])
            else:
                problems[batch[0][0]] = f"{batch[0][0]}: {error}"
            return
        yield from zip([path for path, _ in batch], found, strict=True)

    with ThreadPoolExecutor(workers) as pool, CountedProgress() as progress:
        task = progress.add_task("Predicting", total=len(missing))
        writing: deque[Future[None]] = deque()
        for batch in _batches(_read_ahead(pool, segmenter.read, missing, 2 * batch_size, problems), batch_size):
            for image, result in compute(batch):
                writing.append(pool.submit(results.write, image, result, alpha))
            while len(writing) > 2 * batch_size:
                writing.popleft().result()
            progress.update(task, advance=len(batch))
        for future in writing:
            future.result()
    results.write_areas()
    return [problems[image] for image in images if image in problems]


def _read_ahead(
    pool: ThreadPoolExecutor, read: Callable[[Path], T], paths: Sequence[Path], ahead: int, problems: dict[Path, str]
) -> Iterator[tuple[Path, T]]:
    """Read files in threads, a few ahead; yield those that can be read, and keep the sentence of each other one."""
    waiting: deque[tuple[Path, Future[T]]] = deque()
    rest = iter(paths)
    while True:
        while len(waiting) < ahead and (path := next(rest, None)) is not None:
            waiting.append((path, pool.submit(read, path)))
        if not waiting:
            return
        path, future = waiting.popleft()
        try:
            yield path, future.result()
        except EmaSegError as error:
            problems[path] = str(error)


def _batches(
    images: Iterator[tuple[Path, NDArray[np.uint8]]], size: int
) -> Iterator[list[tuple[Path, NDArray[np.uint8]]]]:
    """Group consecutive images of one size."""
    batch: list[tuple[Path, NDArray[np.uint8]]] = []
    for path, image in images:
        if batch and (len(batch) == size or batch[0][1].shape != image.shape):
            yield batch
            batch = []
        batch.append((path, image))
    if batch:
        yield batch


class _Results:
    """Files of the results in a folder, and the areas of the classes in ``areas.csv``."""

    def __init__(
        self, out: Path, images: Sequence[Path], root: Path, classes: Sequence[str], kinds: Sequence[str]
    ) -> None:
        self._out, self._kinds, self._header = out, kinds, ["image", *classes]
        relative = [image.relative_to(root) for image in images]
        stems = Counter(path.with_suffix("") for path in relative)
        # Images that differ in their suffix alone keep it.
        self._names = {
            image: path if stems[path.with_suffix("")] > 1 else path.with_suffix("")
            for image, path in zip(images, relative, strict=True)
        }
        self._rows: dict[str, list[str]] = {}  # of areas.csv, by image

    def claim(self, origin: str, overwrite: bool) -> None:
        """Check that the folder has no results of another model, and read the areas that are known.

        Raises:
            DataError: it has; or ``areas.csv`` cannot be read.
        """
        marker = self._out / "model.json"
        known = {"model": origin, "classes": self._header[1:]}
        content = json.dumps(known, indent=1).encode()
        if marker.is_file() and not overwrite and marker.read_bytes() != content:
            raise DataError(
                f"out={self._out}: has results of another model (model.json names it); choose another folder, or set "
                "overwrite=true."
            )
        write_file(marker, content)
        areas = self._out / "areas.csv"
        if areas.is_file() and not overwrite:
            with areas.open(newline="", encoding="utf-8") as file:
                self._rows = {row[0]: row for row in csv.reader(file) if row and row != self._header}

    def has(self, image: Path) -> bool:
        """Return whether all results of an image are there."""
        return str(self._names[image]) in self._rows and all(self._path(image, kind).is_file() for kind in self._kinds)

    def write(self, image: Path, result: Segmentation, alpha: float) -> None:
        """Write the results of an image, its areas last."""
        result.save(self._path(image, "masks"))
        overlay = BytesIO()
        result.overlay(alpha).save(overlay, "JPEG", quality=90)
        write_file(self._path(image, "overlays"), overlay.getvalue())
        if result.probabilities is not None:
            write_file(self._path(image, "probabilities"), _npz({"probabilities": result.probabilities}))
        if result.weight_maps is not None:
            write_file(self._path(image, "weight_maps"), _npz(result.weight_maps))
        name = str(self._names[image])
        self._rows[name] = [name, *(f"{share:.6f}" for share in result.areas().values())]
        line = StringIO()
        csv.writer(line).writerow(self._rows[name])
        with (self._out / "areas.csv").open("a", newline="", encoding="utf-8") as file:
            file.write(line.getvalue())

    def write_areas(self) -> None:
        """Write ``areas.csv`` in the images' order."""
        text = StringIO()
        rows = csv.writer(text)
        rows.writerow(self._header)
        names = [str(name) for name in self._names.values()]
        earlier = [row for name, row in self._rows.items() if name not in set(names)]
        rows.writerows([*earlier, *(self._rows[name] for name in names if name in self._rows)])
        write_file(self._out / "areas.csv", text.getvalue().encode())

    def _path(self, image: Path, kind: str) -> Path:
        suffix = {"masks": ".png", "overlays": ".jpg"}.get(kind, ".npz")
        return self._out / kind / f"{self._names[image]}{suffix}"


def _npz(arrays: Mapping[str, NDArray[np.float32]]) -> bytes:
    content = BytesIO()
    np.savez(content, **arrays)  # type: ignore[arg-type]  # one of the names could be allow_pickle, a bool
    return content.getvalue()
