"""Segmentation of many image files: masks, overlays and the areas of the classes, as files."""

import glob
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from ema_seg.inference.results import KINDS, Results
from ema_seg.runtime.errors import DataError, EmaSegError
from ema_seg.runtime.progress import CountedProgress

__all__ = ["SUFFIXES", "VIDEO_SUFFIXES", "find_files", "is_video", "segment_files", "tell_left_out"]

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
VIDEO_SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ts", ".webm")

T = TypeVar("T")


def is_video(path: Path) -> bool:
    """Return whether a file is a video by its suffix."""
    return path.suffix.lower() in VIDEO_SUFFIXES


def find_files(source: str, out: Path | None = None) -> dict[Path, str]:
    """Find the images and videos that a path or pattern names.

    Args:
        source: an image or video; a folder, in which files with one of ``SUFFIXES`` or ``VIDEO_SUFFIXES`` count, at any
            depth, but for hidden ones; or a pattern with ``*``, ``?``, ``[`` or ``**``.
        out: folder of the results, which are no images of the source even if they are inside of it.

    Returns:
        The files, sorted, each with the name of its results: its path below the folder, without the suffix unless
        results of two files would share a name.

    Raises:
        DataError: nothing is there, or there are no images and videos.
    """
    path = Path(source)
    if path.is_file():
        return _names([path], path.parent)
    if path.is_dir():
        known = {*SUFFIXES, *VIDEO_SUFFIXES}
        files = (file for file in path.rglob("*") if file.suffix.lower() in known)
        found = _without_results(files, path, out)
        if not found:
            raise DataError(
                f"source={source}: the folder has no images ({', '.join(SUFFIXES)}) and no videos "
                f"({', '.join(VIDEO_SUFFIXES)}); give another."
            )
        return _names(found, path)
    parts = path.parts
    wildcard = next((index for index, part in enumerate(parts) if glob.has_magic(part)), len(parts))
    root = Path(*parts[:wildcard])
    matches = _without_results(root.glob("/".join(parts[wildcard:]) or "*"), root, out)
    if wildcard == len(parts) or not matches:
        raise DataError(f"source={source}: there is no such file or folder, and no file matches it as a pattern.")
    return _names(matches, root)


def _without_results(files: Iterable[Path], source: Path, out: Path | None) -> list[Path]:
    """Sort files, without hidden ones and those in the folders of results inside of ``source``."""

    def is_hidden(file: Path) -> bool:
        return any(part.startswith(".") for part in file.relative_to(source).parts)

    results = [] if out is None else [out.resolve() / kind for kind in KINDS]
    inside = [folder for folder in results if folder.is_relative_to(source.resolve()) and folder != source.resolve()]
    return sorted(
        file
        for file in files
        if file.is_file() and not is_hidden(file) and not any(map(file.resolve().is_relative_to, inside))
    )


def _names(files: Sequence[Path], root: Path) -> dict[Path, str]:
    """Name the results of files: paths below ``root``, with their suffixes where results would share a name."""
    relative = {file: file.relative_to(root) for file in files}
    names = {file: path.with_suffix("") for file, path in relative.items()}
    while True:
        counts = Counter(names.values())
        folders = {folder for name in names.values() for folder in name.parents}
        shared = [
            file
            for file, name in names.items()
            # The frames of a video are in a folder of its name.
            if name != relative[file] and (counts[name] > 1 or (is_video(file) and name in folders))
        ]
        if not shared:
            return {file: str(name) for file, name in names.items()}
        names |= {file: relative[file] for file in shared}


def tell_left_out(count: int) -> None:
    """Say on stderr how many files are left out because their results are there."""
    if count:
        print(f"{count} left out, because their results are there; overwrite=true predicts them again", file=sys.stderr)


def segment_files(
    images: Mapping[Path, str], results: Results, *, batch_size: int = 4, workers: int = 4, overwrite: bool = False
) -> list[str]:
    """Segment image files.

    Images whose results are there are left out, so that the same call goes on after an interruption. Files are read and
    written in threads beside the model.

    Args:
        images: the images with the names of their results; see ``find_files``.
        results: the results, which this process has claimed.
        batch_size: images of equal size that are predicted together.
        workers: threads.
        overwrite: predict all images.

    Returns:
        A sentence for each image that could not be read or predicted.

    Raises:
        DataError: a result cannot be written.
    """
    missing = [image for image, name in images.items() if overwrite or not results.has(name, image)]
    tell_left_out(len(images) - len(missing))
    problems: dict[Path, str] = {}
    with ThreadPoolExecutor(workers) as pool, CountedProgress() as progress:
        task = progress.add_task("Predicting", total=len(missing))
        writing: deque[Future[None]] = deque()
        files = _read_ahead(pool, results.read, missing, 2 * batch_size, problems)
        for batch in _batches(files, batch_size):
            for (image, _), result in zip(batch, results.segment([pixels for _, pixels in batch]), strict=True):
                if isinstance(result, EmaSegError):
                    problems[image] = f"{image}: {result}"
                else:
                    writing.append(pool.submit(results.write_image, images[image], image, result))
            while len(writing) > 2 * batch_size:
                writing.popleft().result()
            progress.update(task, advance=len(batch))
        for future in writing:
            future.result()
    results.finish()
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
