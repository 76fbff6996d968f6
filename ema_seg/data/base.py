"""Base of all data sets: samples, train ids, and the pairing of images and masks.

The path of a sample is ``files -> decoded uint8 arrays -> train ids -> transform``. Every defect in the files
raises a DataError: one sentence with the file, what was found in it and what was expected.
"""

import os
import unicodedata
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol, TypedDict

import cv2
import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from ema_seg.data.decoding import decode_image, decode_mask, read_traits
from ema_seg.data.source import File
from ema_seg.runtime.errors import ConfigError, DataError

__all__ = [
    "IGNORE_INDEX",
    "INVALID",
    "Color",
    "MissingSplitError",
    "Pair",
    "Pairing",
    "Sample",
    "SegmentationDataset",
    "Submission",
    "apply_table",
    "pair_files",
    "train_id_table",
]

IGNORE_INDEX = 255
"""Train id of pixels without a class: they enter neither the loss nor the score."""

INVALID = 254
"""Entry of a train id table for a mask value that must not occur."""

Color = tuple[int, int, int]


class Sample(TypedDict):
    """A decoded image with its mask, before transforms."""

    image: NDArray[np.uint8]
    """RGB, H x W x 3."""
    mask: NDArray[np.uint8]
    """Train ids, H x W; 255 = ignore."""
    name: str
    """Unique within the split; no suffix."""


class Pair(NamedTuple):
    """Files of one sample; ``mask`` is None in a split published without labels."""

    name: str
    image: File
    mask: File | None


class Pairing(NamedTuple):
    """Pairs of a split in a fixed order, and one sentence for each file that cannot be paired."""

    pairs: list[Pair]
    unpaired: list[str]


class Submission(NamedTuple):
    """Form of the masks that a benchmark's server reads: PNG files of one channel.

    A file has the name of its sample and ``suffix``; its values are those of ``values`` by train id.
    """

    suffix: str
    values: tuple[int, ...]


class MissingSplitError(DataError):
    """Error of a root that is a data set of this kind but has no files of the requested split."""


class DecodedSamples(Protocol):
    """Decoded images and masks by index; see :class:`ema_seg.data.cache.SampleCache`."""

    def image(self, index: int) -> NDArray[np.uint8]:
        """Return an image, uint8 RGB H x W x 3."""

    def mask(self, index: int) -> NDArray[np.uint8]:
        """Return a mask as train ids, uint8 H x W."""


class SegmentationDataset(Dataset[Any]):
    """Base of the data sets: a split's images with their masks as train ids.

    A subclass sets the class attributes and implements :meth:`find_pairs`. Data sets can be pickled and read
    by any number of worker processes.

    Args:
        root: The data set's folder (or archive, if the subclass reads one).
        split: One of ``splits``.
        transform: Applied to each :class:`Sample`; None leaves it unchanged.
        allow_unpaired: Skip files that cannot be paired and list them in ``unpaired``, instead of raising. For
            the data check, which reports all defects together.

    Raises:
        ConfigError: The split is not one of ``splits``.
        DataError: The root is not a data set of this kind, or a file in it cannot be paired.
    """

    classes: tuple[str, ...]
    palette: tuple[Color, ...]
    splits: ClassVar[tuple[str, ...]] = ("train", "val", "test")
    layout: ClassVar[str]
    """Expected content of a root, which completes the message "expected ..."."""
    upright: bool = False
    """True if orientation tags are applied; else pixels stay as stored."""
    expects_all_classes: bool = False
    """True if a class without any pixel may be a mistake; :meth:`describe_problem` then explains it."""
    unlabelled_splits: ClassVar[tuple[str, ...]] = ()
    """Splits published without labels, or with dummy labels."""
    submission: ClassVar[Submission | None] = None
    """Form of the masks that the benchmark's server reads; None without a server."""
    without_labels: bool = False
    """True if masks are not read: all pixels are ignored."""
    makes_files: ClassVar[bool] = False
    """True if missing files are generated; no timeout applies then."""
    cache: "DecodedSamples | None" = None
    """Decoded samples to read instead of the files."""
    train_ids: NDArray[np.uint8]
    """Train id of each of the 256 possible mask values; see :func:`train_id_table`."""

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: str = "train",
        transform: Callable[[Sample], Any] | None = None,
        *,
        allow_unpaired: bool = False,
    ) -> None:
        self.check_split(split)
        self.root = Path(root).expanduser()
        self.split = split
        self.transform = transform
        if not self.root.exists():
            raise DataError(f"{self.root}: no such file or folder; expected {self.layout}.")
        self.pairs, self.unpaired = self.find_pairs()
        if self.unpaired and not allow_unpaired:
            raise DataError(_summarise(self.unpaired))

    @classmethod
    def check_split(cls, split: str) -> None:
        """Raise ConfigError unless ``split`` is one of ``splits``."""
        if split not in cls.splits:
            raise ConfigError(f"split={split!r} is not a split of this data set; choose from {', '.join(cls.splits)}.")

    @abstractmethod
    def find_pairs(self) -> Pairing:
        """Find the split's files, without opening any of them.

        Raises:
            MissingSplitError: There are no files of this split.
            DataError: The root has another layout.
        """

    @property
    def num_classes(self) -> int:
        """Number of classes, the ignored pixels not counted."""
        return len(self.classes)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Any:
        image = self.read_image(index)
        if self.without_labels:
            mask = np.full(image.shape[:2], IGNORE_INDEX, np.uint8)
        else:
            mask = self.read_mask(index)
            self.check_sizes(index, image, mask)
        sample: Sample = {"image": image, "mask": mask, "name": self.name(index)}
        return sample if self.transform is None else self.transform(sample)

    def name(self, index: int) -> str:
        """Return the sample's name, unique within the split."""
        return self.pairs[index].name

    def files(self, index: int) -> str:
        """Return the names of the sample's files, for messages."""
        pair = self.pairs[index]
        return f"{pair.image}" if pair.mask is None else f"{pair.image} or {pair.mask}"

    def read_image(self, index: int) -> NDArray[np.uint8]:
        """Read the image, uint8 RGB H x W x 3, maybe read-only; raise DataError if it cannot be decoded."""
        if self.cache is not None:
            return self.cache.image(index)
        return decode_image(self.pairs[index].image, upright=self.upright)

    def read_mask(self, index: int) -> NDArray[np.uint8]:
        """Read the mask as train ids, uint8 H x W; 255 = ignore.

        Raises:
            DataError: The split has no labels, the mask cannot be decoded, or a value in it is outside the
                class list.
        """
        if self.cache is not None:
            return self.cache.mask(index)
        file = self.pairs[index].mask
        if file is None:
            raise DataError(f"{self.root}: the split {self.split!r} has no labels; choose a split with labels.")
        return self.to_train_ids(self.decode_mask(file), file)

    def decode_mask(self, file: File) -> NDArray[np.uint8]:
        """Decode a mask to values, uint8 H x W, or to colours, uint8 H x W x 3; see :func:`decode_mask`."""
        return decode_mask(file, upright=self.upright)

    def to_train_ids(self, mask: NDArray[np.uint8], file: File) -> NDArray[np.uint8]:
        """Map a decoded mask (uint8 H x W values, or H x W x 3 colours) to train ids, uint8 H x W."""
        if mask.ndim == 3:
            raise DataError(f"{file}: is a colour image, expected one channel of class values.")
        return apply_table(mask, self.train_ids, file)

    def check_sizes(self, index: int, image: NDArray[np.uint8], mask: NDArray[np.uint8]) -> None:
        """Raise DataError unless the image and the mask at ``index`` have the same size."""
        if image.shape[:2] != mask.shape[:2]:
            pair = self.pairs[index]
            raise DataError(
                f"{pair.mask}: the mask is {_size(mask)} pixels (width x height), expected"
                f" {_size(image)} as in its image {pair.image}{self._explain_size_mismatch(pair)}."
            )

    def notes(self, index: int) -> list[str]:
        """Return notes on how the sample's files are read, for the data check to count."""
        return []

    def describe_problem(self, pixels: NDArray[np.int64]) -> str | None:
        """Return one sentence why the split cannot be trained on or scored; None if it can.

        Args:
            pixels: The split's pixels by train id, 256.
        """
        if pixels[:IGNORE_INDEX].any():
            return None
        return (
            f"{self.root}: the split {self.split!r} has no labelled pixel; expected a split with labels: choose "
            "another, or correct the class list or the masks."
        )

    def _explain_size_mismatch(self, pair: Pair) -> str:
        """Explain a size mismatch by the image's orientation tag; empty without a tag."""
        orientation = read_traits(pair.image).orientation
        if orientation == 1:
            return ""
        if self.upright:
            advice = "and was turned upright; for masks of the pixels as stored set data.orientation=ignore"
        else:
            advice = "and was not turned"
        return f", which has the orientation tag {orientation} {advice}"


def train_id_table(train_ids: Mapping[int, int]) -> NDArray[np.uint8]:
    """Build a lookup table from mask values to train ids; values that are not keys map to ``INVALID``."""
    table = np.full(256, INVALID, dtype=np.uint8)
    for value, train_id in train_ids.items():
        table[value] = train_id
    return table


def apply_table(mask: NDArray[np.uint8], table: NDArray[np.uint8], file: File) -> NDArray[np.uint8]:
    """Map mask values to train ids; raise DataError if a value is not in the table."""
    train_ids = np.asarray(cv2.LUT(mask, table), dtype=np.uint8)
    if (train_ids == INVALID).any():
        outside = np.unique(mask[train_ids == INVALID])
        raise DataError(
            f"{file}: mask value {_ranges(outside)} is outside the class list,"
            f" expected {_ranges(np.flatnonzero(table != INVALID))}."
        )
    return train_ids


def pair_files(
    images: Iterable[tuple[str, File]],
    masks: Iterable[tuple[str, File]],
    *,
    image_place: str,
    mask_place: str,
) -> Pairing:
    """Pair images and masks that have the same name.

    Args:
        images: Pairs of (sample name, file).
        masks: Pairs of (sample name, file).
        image_place: Where an image is expected, for messages.
        mask_place: Where a mask is expected, for messages.
    """
    unpaired: list[str] = []
    images_by_name = _by_name(images, unpaired)
    masks_by_name = _by_name(masks, unpaired)
    for name in sorted(images_by_name.keys() - masks_by_name.keys()):
        unpaired.append(f"{images_by_name[name]}: the image has no mask, expected one named {name} in {mask_place}.")
    for name in sorted(masks_by_name.keys() - images_by_name.keys()):
        unpaired.append(f"{masks_by_name[name]}: the mask has no image, expected one named {name} in {image_place}.")
    names = sorted(images_by_name.keys() & masks_by_name.keys())
    return Pairing([Pair(name, images_by_name[name], masks_by_name[name]) for name in names], unpaired)


def _by_name(files: Iterable[tuple[str, File]], defects: list[str]) -> dict[str, File]:
    by_name: dict[str, File] = {}
    for given, file in files:
        name = unicodedata.normalize("NFC", given)  # macOS decomposes the names of files
        if name in by_name:
            defects.append(f"{file}: has the same name {name} as {by_name[name]}, expected one file per name.")
        else:
            by_name[name] = file
    return by_name


def _summarise(defects: list[str]) -> str:
    if len(defects) == 1:
        return defects[0]
    others = f"{len(defects) - 1} more of the kind; python -m ema_seg.data.check lists all"
    return f"{defects[0].removesuffix('.')} ({others})."


def _ranges(values: NDArray[np.integer[Any]]) -> str:
    """Format sorted distinct values as ranges: ``0-18, 255``."""
    runs = np.split(values, np.flatnonzero(np.diff(values.astype(int)) > 1) + 1)
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _size(array: NDArray[np.uint8]) -> str:
    return f"{array.shape[1]} x {array.shape[0]}"
