"""Predicted masks in the form that a benchmark's server reads."""

from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ema_seg.data.base import SegmentationDataset
from ema_seg.runtime.distributed.ranks import barrier, rank_info
from ema_seg.runtime.errors import ConfigError, DataError
from ema_seg.runtime.files import write_file

__all__ = ["SubmissionWriter", "check_submission"]


def check_submission(directory: Path, dataset: type[SegmentationDataset], name: str) -> None:
    """Check that a folder can receive the masks of a data set.

    Args:
        directory: the folder; it may not exist.
        dataset: the data set's class.
        name: its name, for errors.

    Raises:
        ConfigError: the data set has no benchmark's server, or the folder has files, which a server would count.
        DataError: the folder cannot be read.
    """
    if dataset.submission is None:
        raise ConfigError(
            f"evaluation.submission={directory}: {name} has no benchmark's server; predictions/ in the report's folder "
            "has the masks of all data sets."
        )
    try:
        occupied = next(directory.iterdir(), None) if directory.exists() else None
    except OSError as error:
        raise DataError(
            f"evaluation.submission={directory}: cannot be read ({error.strerror}); choose another folder."
        ) from error
    if occupied:
        raise ConfigError(f"evaluation.submission={directory}: is not empty ({occupied.name}); choose a new folder.")


class SubmissionWriter:
    """Writer of masks for a benchmark's server; see ``ema_seg.data.base.Submission``.

    With several ranks, each writes the masks of its share of the images.

    Args:
        directory: the folder, created if missing.
        dataset: the data set.
        name: its name, for errors.

    Raises:
        EmaSegError: see ``check_submission``.
    """

    def __init__(self, directory: Path, dataset: SegmentationDataset, name: str) -> None:
        if rank_info().rank == 0:
            check_submission(directory, type(dataset), name)
        barrier()
        assert dataset.submission is not None
        self._directory = directory
        self._suffix, values = dataset.submission
        self._values = np.array(values, np.uint8)

    def __call__(self, name: str, prediction: NDArray[np.integer]) -> None:
        """Write an image's mask: class ids in [0, K), H x W.

        Raises:
            DataError: the mask cannot be written.
        """
        content = BytesIO()
        Image.fromarray(self._values[prediction]).save(content, "PNG")
        write_file(self._directory / f"{name}{self._suffix}", content.getvalue())
