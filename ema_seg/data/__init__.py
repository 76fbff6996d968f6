"""Data sets and the data module: files to samples to batches."""

import inspect
import os
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

from ema_seg.runtime.errors import ConfigError
from ema_seg.runtime.lazy import lazy_attributes

if TYPE_CHECKING:
    from ema_seg.data.ade20k import ADE20KDataset
    from ema_seg.data.base import IGNORE_INDEX, Sample, SegmentationDataset
    from ema_seg.data.camvid import CamVidDataset
    from ema_seg.data.cityscapes import CityscapesDataset
    from ema_seg.data.datamodule import SegmentationDataModule
    from ema_seg.data.folder import FolderDataset
    from ema_seg.data.street import StreetDataset

__all__ = [
    "DATASETS",
    "IGNORE_INDEX",
    "ADE20KDataset",
    "CamVidDataset",
    "CityscapesDataset",
    "FolderDataset",
    "Sample",
    "SegmentationDataModule",
    "SegmentationDataset",
    "StreetDataset",
    "build_dataset",
    "check_dataset",
    "find_dataset_class",
]

DATASETS = {
    "ade20k": "ADE20KDataset",
    "camvid": "CamVidDataset",
    "cityscapes": "CityscapesDataset",
    "folder": "FolderDataset",
    "street": "StreetDataset",
}
"""Class names by the data set's name in configs; each class is defined in the module of that name."""

# Imported lazily: `import ema_seg.data` must load neither torch nor OpenCV.
_MODULES = {
    "IGNORE_INDEX": "base",
    "Sample": "base",
    "SegmentationDataset": "base",
    "SegmentationDataModule": "datamodule",
} | {class_name: name for name, class_name in DATASETS.items()}


def build_dataset(
    name: str,
    root: str | os.PathLike[str] | None,
    split: str = "train",
    transform: Callable[["Sample"], Any] | None = None,
    **options: Any,
) -> "SegmentationDataset":
    """Build a data set by its name in configs.

    Args:
        name: A key of :data:`DATASETS`.
        root: The data set's folder or archive; None only for the generated data set.
        split: "train", "val" or "test".
        transform: Applied to each sample.
        **options: The class's own keyword arguments.

    Raises:
        ConfigError: The name, the split or an option is unknown, or the root is not given.
        DataError: The files are not a data set of this kind.
    """
    check_dataset(name, root, options)
    return find_dataset_class(name)(root, split, transform, **options)  # type: ignore[arg-type]  # some take no root


def check_dataset(name: str, root: str | os.PathLike[str] | None, options: Mapping[str, Any]) -> None:
    """Check the arguments of ``build_dataset`` without reading files.

    Raises:
        ConfigError: The name or an option is unknown, or the root is not given.
    """
    dataset_class = find_dataset_class(name)
    parameters = inspect.signature(dataset_class).parameters
    if root is None and parameters["root"].default is inspect.Parameter.empty:
        raise ConfigError(f"data.root is not set; expected {dataset_class.layout}.")
    known = list(parameters)[3:]  # after root, split and transform
    for option in options:
        if option not in known:
            raise ConfigError(
                f"data.{option}={options[option]!r} is not an option of the data set {name!r};"
                f" its options: {', '.join(known)}."
            )


def find_dataset_class(name: str) -> "type[SegmentationDataset]":
    """Return a data set's class by its name in configs; raise ConfigError if the name is unknown."""
    if name not in DATASETS:
        raise ConfigError(f"data.name={name!r} is not a data set; choose from {', '.join(sorted(DATASETS))}.")
    return getattr(import_module(f"{__name__}.{name}"), DATASETS[name])


__getattr__ = lazy_attributes(__name__, _MODULES)
