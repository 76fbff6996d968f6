"""Predicted masks as files, for pictures that are drawn long after the evaluation."""

import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from ema_seg.inference.masks import encode_mask
from ema_seg.reporting.report import report_manifest
from ema_seg.runtime.distributed.ranks import barrier, rank_info
from ema_seg.runtime.errors import DataError
from ema_seg.runtime.files import file_names, write_file

__all__ = ["PredictionWriter", "lock_report"]

_FOLDER = "predictions"
# Seconds between broadcasts of rank 0 to the other ranks while it waits for the lock.
_LOCK_BROADCAST_SECONDS = 30.0


@contextmanager
def lock_report(directory: Path) -> Iterator[None]:
    """Hold the lock of a report's folder; wait for another evaluation that holds it.

    Rank 0 holds the lock for all ranks. On a file system without locks nothing is locked.

    Raises:
        DataError: the folder cannot be created or written to.
    """
    from ema_seg.runtime.distributed.collectives import broadcast  # imports torch, which reading masks does not need

    lock = FileLock(directory / "report.lock")
    first = rank_info().rank == 0
    timeout = 0.5
    while not broadcast(_acquire(lock, directory, timeout) if first else True):
        if first and timeout < _LOCK_BROADCAST_SECONDS:
            print(f"waiting for another evaluation that writes to {directory}", file=sys.stderr, flush=True)
        timeout = _LOCK_BROADCAST_SECONDS
    try:
        yield
    finally:
        lock.release()


def _acquire(lock: FileLock, directory: Path, timeout: float) -> bool:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=timeout)
    except Timeout:
        return False
    except NotImplementedError:
        return True
    except OSError as error:
        raise DataError(
            f"{directory}: the folder cannot be created or written to ({error.strerror}); choose another report.dir."
        ) from error
    return True


class PredictionWriter:
    """Writer of predicted masks into ``predictions/`` of a report's folder, one at a time.

    A context manager: masks are written beside an earlier report's and replace them when the block ends without an
    error; files that no report has written stay. With several ranks, each writes the
    masks of its share of the images.

    Args:
        directory: the report's folder.
        names: the names of all images.
        palette: K colours, (red, green, blue) from 0 to 255.

    Attributes:
        paths: path of each image's mask, relative to ``directory``, by the image's name.
    """

    def __init__(self, directory: Path, names: Sequence[str], palette: Sequence[Sequence[int]]) -> None:
        self._directory = directory
        self._partial = directory / f".{_FOLDER}.partial"
        self._palette = palette
        files = file_names(names)
        self._first = rank_info().rank == 0
        self._files = {name: f"{file}.png" for name, file in zip(names, files, strict=True)}
        self.paths = {name: f"{_FOLDER}/{file}" for name, file in self._files.items()}

    def __enter__(self) -> "PredictionWriter":
        if self._first:
            report_manifest(self._directory).check(self.paths.values())
            try:
                shutil.rmtree(self._partial, ignore_errors=True)
                self._partial.mkdir(parents=True)
            except OSError as error:
                raise DataError(
                    f"{self._partial}: the folder cannot be created ({error.strerror}); choose another report.dir."
                ) from error
        barrier()
        return self

    def __call__(self, name: str, prediction: NDArray[np.integer]) -> None:
        """Write an image's mask: class ids in [0, K), H x W.

        Raises:
            DataError: the mask cannot be written.
        """
        path = self._partial / self._files[name]
        write_file(path, encode_mask(prediction, self._palette))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is not None:
            shutil.rmtree(self._partial, ignore_errors=True)
            return
        barrier()
        if self._first:
            self._move()

    def _move(self) -> None:
        written = {f"{_FOLDER}/{path.name}" for path in self._partial.iterdir()}  # skipped images have none
        manifest = report_manifest(self._directory)
        manifest.claim(written)
        (self._directory / _FOLDER).mkdir(exist_ok=True)
        for file in written:
            (self._partial / Path(file).name).replace(self._directory / file)
        self._partial.rmdir()
        manifest.remove({file for file in manifest.files if file.startswith(f"{_FOLDER}/")} - written)
