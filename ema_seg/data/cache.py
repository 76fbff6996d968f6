"""Cache of decoded samples, which all processes and runs share.

A cache is a folder with the raw pixels of a split in one file, and an index of it. Processes map the file into memory:
a crop reads the rows that it needs, and the system's page cache holds them once for all workers. (Compressed chunks,
of blosc2 or zarr, take about half of the space, but several times as long to read.)
"""

import hashlib
import json
import shutil
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from ema_seg.data.base import SegmentationDataset
from ema_seg.data.decoding import read_size
from ema_seg.data.loading import read_each
from ema_seg.data.source import File
from ema_seg.runtime.distributed.ranks import rank_info
from ema_seg.runtime.errors import DataError
from ema_seg.runtime.progress import track

__all__ = ["SampleCache", "open_cache"]

# Part of every fingerprint: increase it with every change to decoding or to the layout.
_VERSION = 1
_ENTRY = np.dtype([("offset", np.int64), ("height", np.int32), ("width", np.int32)])
_BYTES_PER_PIXEL = 4  # three of the image, one of the mask


class SampleCache:
    """Decoded images and masks of a split, as read-only views of a memory-mapped file.

    Args:
        folder: The cache's folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        description = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        self.fingerprint: str = description["fingerprint"]
        self.unreadable = {int(index): reason for index, reason in description["unreadable"].items()}
        self.entries = np.load(folder / "index.npy")
        self._mapped: NDArray[np.uint8] | None = None

    def image(self, index: int) -> NDArray[np.uint8]:
        """Return the image, uint8 RGB H x W x 3.

        Raises:
            DataError: The sample could not be decoded.
        """
        offset, height, width = self._entry(index)
        return self._pixels()[offset : offset + 3 * height * width].reshape(height, width, 3)

    def mask(self, index: int) -> NDArray[np.uint8]:
        """Return the mask as train ids, uint8 H x W; 255 = ignore.

        Raises:
            DataError: The sample could not be decoded.
        """
        offset, height, width = self._entry(index)
        start = offset + 3 * height * width
        return self._pixels()[start : start + height * width].reshape(height, width)

    def _entry(self, index: int) -> tuple[int, int, int]:
        if index in self.unreadable:
            raise DataError(self.unreadable[index])
        return tuple(self.entries[index].tolist())

    def _pixels(self) -> NDArray[np.uint8]:
        if self._mapped is None:
            self._mapped = np.asarray(np.memmap(self.folder / "pixels.bin", np.uint8, "r"))
        return self._mapped

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_mapped": None}  # each process maps the file itself


def open_cache(
    folder: Path, dataset: SegmentationDataset, name: str, options: Mapping[str, Any], *, workers: int, timeout: float
) -> SampleCache:
    """Open the cache of a split; build it if it is missing, or if the split's files have changed since.

    One process builds it while others wait; it appears as a whole or not at all.

    Args:
        folder: Parent of all caches.
        dataset: The split, without a transform.
        name: The data set's name in configs.
        options: The data set's own options.
        workers: Processes that decode.
        timeout: Seconds that the disk may take for a sample.

    Raises:
        DataError: The disk has too little space, or the folder cannot be written.
    """
    identity = json.dumps([str(dataset.root.resolve()), dict(options)], sort_keys=True, default=str)
    place = folder / f"{name}-{dataset.split}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"
    fingerprint = _fingerprint(dataset)
    if cache := _load(place, fingerprint):
        return cache
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / f"{place.name}.lock")
        try:
            held = lock.acquire(timeout=0)
        except Timeout:
            if rank_info().rank == 0:
                print(f"{place}: waiting for the process that builds this cache.", file=sys.stderr, flush=True)
            held = lock.acquire()
        with held:
            if cache := _load(place, fingerprint):
                return cache
            _build(place, dataset, fingerprint, workers, timeout)
    except OSError as error:
        raise DataError(
            f"data.cache={folder}: the cache cannot be written ({error.strerror or error}); choose another folder, or "
            "set data.cache=null."
        ) from error
    return SampleCache(place)


def _load(place: Path, fingerprint: str) -> SampleCache | None:
    try:
        cache = SampleCache(place)
    except (OSError, KeyError, ValueError):
        return None
    return cache if cache.fingerprint == fingerprint else None


def _fingerprint(dataset: SegmentationDataset) -> str:
    """Return a hash of the files' names, sizes and times, and of all that turns masks into train ids."""
    digest = hashlib.sha256(repr((_VERSION, dataset.classes, dataset.palette)).encode())
    digest.update(dataset.train_ids.tobytes())
    for pair in dataset.pairs:
        digest.update(repr((pair.name, _stamp(pair.image), pair.mask and _stamp(pair.mask))).encode())
    return digest.hexdigest()


def _stamp(file: File) -> tuple[str, tuple[int, int]]:
    return str(file), file.source.stamp(file.name)


def _build(place: Path, dataset: SegmentationDataset, fingerprint: str, workers: int, timeout: float) -> None:
    unfinished, stale = (place.with_name(f".{place.name}.{state}") for state in ("unfinished", "stale"))
    for leftover in (unfinished, stale):  # of a process that was killed: the lock is ours
        shutil.rmtree(leftover, ignore_errors=True)
    read = partial(read_each, dataset, split=dataset.split, workers=workers, timeout=timeout)

    sizes = list(track(read(_read_size), "Reading sizes"))
    entries = np.zeros(len(dataset), _ENTRY)
    entries["height"], entries["width"] = np.array([(0, 0) if isinstance(size, str) else size for size in sizes]).T
    pixels = entries["height"].astype(np.int64) * entries["width"] * _BYTES_PER_PIXEL
    entries["offset"] = np.cumsum(pixels) - pixels
    _check_space(place.parent, dataset, int(pixels.sum()))

    unfinished.mkdir()
    try:
        with (unfinished / "pixels.bin").open("wb") as file:
            file.truncate(int(pixels.sum()))
        decode = partial(_decode, path=unfinished / "pixels.bin", entries=entries)
        outcomes = track(read(decode), "Decoding")
        failures = {str(index): reason for index, reason in enumerate(outcomes) if reason}
        np.save(unfinished / "index.npy", entries)
        description = {"fingerprint": fingerprint, "unreadable": failures}
        (unfinished / "index.json").write_text(json.dumps(description), encoding="utf-8")
        if place.exists():
            place.rename(stale)  # processes that have mapped it keep its pages
        unfinished.rename(place)
    finally:
        for leftover in (unfinished, stale):
            shutil.rmtree(leftover, ignore_errors=True)


def _check_space(folder: Path, dataset: SegmentationDataset, needed: int) -> None:
    """Print the size of a cache before it is built; raise DataError if the disk has less space."""
    free = shutil.disk_usage(folder).free
    split = f"the {len(dataset)} samples of {dataset.root}, split {dataset.split!r}"
    if needed > free:
        raise DataError(
            f"data.cache={folder}: {split}, need {needed / 1e9:.1f} GB, but the disk has {free / 1e9:.1f} GB free; "
            "choose another folder, or set data.cache=null."
        )
    print(f"data.cache={folder}: decoding {split}: {needed / 1e9:.2f} GB", file=sys.stderr, flush=True)


def _read_size(dataset: SegmentationDataset, index: int) -> tuple[int, int] | str:
    """Return height and width of an image, or the reason why they cannot be read."""
    try:
        return read_size(dataset.pairs[index].image, upright=dataset.upright)
    except DataError as error:
        return str(error)


def _decode(dataset: SegmentationDataset, index: int, *, path: Path, entries: NDArray[Any]) -> str:
    """Decode a sample into the file; return an empty text, or the reason why it cannot be decoded."""
    try:
        image, mask = dataset.read_image(index), dataset.read_mask(index)
        dataset.check_sizes(index, image, mask)
    except DataError as error:
        return str(error)
    offset, height, width = entries[index].tolist()
    if image.shape != (height, width, 3):
        return f"{dataset.files(index)}: has changed while it was decoded; start again."
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(image.tobytes())
        file.write(mask.tobytes())
    return ""
