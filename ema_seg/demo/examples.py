"""Example pictures of the page: of a folder, or of the data that a run was evaluated on."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from ema_seg.config import DataArguments
from ema_seg.data import build_dataset, find_dataset_class
from ema_seg.data.base import SegmentationDataset
from ema_seg.data.loading import call_with_timeout
from ema_seg.inference.files import find_files, is_video
from ema_seg.inference.segmenter import Picture
from ema_seg.runtime.errors import DataError, EmaSegError

__all__ = ["Example", "examples_in", "examples_of_run"]

T = TypeVar("T")

_MOST = 8
_TIMEOUT = 10.0  # seconds; the page does not wait longer for a slow disk


@dataclass(frozen=True)
class Example:
    """Example picture.

    Attributes:
        name: its name on the page.
        read: returns the picture.
    """

    name: str
    read: Callable[[], Picture]


def examples_in(folder: str) -> list[Example]:
    """Return images of a folder, evenly spread over it.

    Raises:
        DataError: there is no such folder, or it has no image.
    """
    if not Path(folder).is_dir():
        raise DataError(f"examples={folder}: there is no such folder; give a folder of images.")
    images = [path for path in find_files(folder) if not is_video(path)]
    if not images:
        raise DataError(f"examples={folder}: the folder has no images; give another.")
    return [Example(path.name, partial(Path, path)) for path in _spread(images)]


def examples_of_run(data: Mapping[str, Any]) -> list[Example]:
    """Return images of a run's evaluation split, evenly spread; an empty list if its data is not there.

    The generated data set is generated if it is not there.

    Args:
        data: the section ``data`` of the run's configuration.
    """
    try:
        name, root = data["name"], data["root"]
        options = {key: value for key, value in data.items() if key not in DataArguments.model_fields}
        build = partial(build_dataset, name, root, data.get("evaluation_split", "val"), **options)
        generated = find_dataset_class(name).makes_files
        dataset: SegmentationDataset = build() if generated else call_with_timeout(_TIMEOUT, str(root), build)
    except (EmaSegError, OSError, KeyError, TypeError, ValueError):  # the configuration may be of another version
        return []
    return [Example(dataset.name(index), partial(dataset.read_image, index)) for index in _spread(range(len(dataset)))]


def _spread(items: Sequence[T]) -> list[T]:
    """Return at most ``_MOST`` items, evenly spread."""
    count = min(_MOST, len(items))
    return [items[index * len(items) // count] for index in range(count)]
