"""Cityscapes: urban street scenes of 2048 x 1024 pixels, 19 classes (https://www.cityscapes-dataset.com).

Cordts et al., "The Cityscapes Dataset for Semantic Urban Scene Understanding", CVPR 2016.
"""

import os
from collections.abc import Callable
from pathlib import PurePosixPath
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ema_seg.data.base import (
    IGNORE_INDEX,
    MissingSplitError,
    Pair,
    Pairing,
    Sample,
    SegmentationDataset,
    Submission,
    apply_table,
    pair_files,
    train_id_table,
)
from ema_seg.data.source import File, FolderSource, Source, ZipSource
from ema_seg.runtime.errors import DataError

__all__ = ["CityscapesDataset"]

# (name, id in *_labelIds.png, colour), in the order of the train ids.
_CLASSES = (
    ("road", 7, (128, 64, 128)),
    ("sidewalk", 8, (244, 35, 232)),
    ("building", 11, (70, 70, 70)),
    ("wall", 12, (102, 102, 156)),
    ("fence", 13, (190, 153, 153)),
    ("pole", 17, (153, 153, 153)),
    ("traffic light", 19, (250, 170, 30)),
    ("traffic sign", 20, (220, 220, 0)),
    ("vegetation", 21, (107, 142, 35)),
    ("terrain", 22, (152, 251, 152)),
    ("sky", 23, (70, 130, 180)),
    ("person", 24, (220, 20, 60)),
    ("rider", 25, (255, 0, 0)),
    ("car", 26, (0, 0, 142)),
    ("truck", 27, (0, 0, 70)),
    ("bus", 28, (0, 60, 100)),
    ("train", 31, (0, 80, 100)),
    ("motorcycle", 32, (0, 0, 230)),
    ("bicycle", 33, (119, 11, 32)),
)
# Ids 0 to 33, and -1 (license plate), which is 255 in a uint8 mask; ids without a class are ignored.
_LABEL_IDS = dict.fromkeys([*range(34), 255], IGNORE_INDEX) | {
    label_id: train_id for train_id, (_, label_id, _) in enumerate(_CLASSES)
}
_TRAIN_IDS = {train_id: train_id for train_id in range(len(_CLASSES))} | {IGNORE_INDEX: IGNORE_INDEX}

_IMAGE_SUFFIX = "_leftImg8bit.png"


class CityscapesDataset(SegmentationDataset):
    """Cityscapes with fine labels, from the folders or from the official zip archives read in place.

    The root holds ``leftImg8bit/`` or ``leftImg8bit_trainvaltest.zip``, and ``gtFine/`` or
    ``gtFine_trainvaltest.zip``; if a split is in both, the folder is read. A mask is the published
    ``*_gtFine_labelIds.png``, whose ids are mapped to the 19 train ids and 255, or else a ready-made
    ``*_gtFine_labelTrainIds.png``. The published test labels are dummies: every pixel is ignored.

    Args:
        root: See above.
        split: "train" (2975 images), "val" (500) or "test" (1525).
        transform: Applied to each sample.
        coarse: Add the 19998 coarsely labelled images to the train split, from ``leftImg8bit/train_extra/``
            with ``gtCoarse/train_extra/``, or from ``leftImg8bit_trainextra.zip`` with ``gtCoarse.zip``.
        allow_unpaired: See :class:`SegmentationDataset`.
    """

    classes = tuple(name for name, _, _ in _CLASSES)
    palette = tuple(color for _, _, color in _CLASSES)
    layout: ClassVar[str] = (
        "the Cityscapes folder, which holds leftImg8bit/ and gtFine/, or leftImg8bit_trainvaltest.zip and"
        " gtFine_trainvaltest.zip"
    )
    unlabelled_splits: ClassVar[tuple[str, ...]] = ("test",)
    submission: ClassVar[Submission | None] = Submission(_IMAGE_SUFFIX, tuple(label_id for _, label_id, _ in _CLASSES))
    train_ids = train_id_table(_LABEL_IDS)
    ready_train_ids = train_id_table(_TRAIN_IDS)

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: str = "train",
        transform: Callable[[Sample], Any] | None = None,
        *,
        coarse: bool = False,
        allow_unpaired: bool = False,
    ) -> None:
        self.coarse = coarse
        super().__init__(root, split, transform, allow_unpaired=allow_unpaired)

    def find_pairs(self) -> Pairing:
        """Pair images and labels, coarse ones included if set; see :meth:`SegmentationDataset.find_pairs`."""
        fine = self._pair(self.split, "leftImg8bit_trainvaltest.zip", "gtFine", "gtFine_trainvaltest.zip")
        if not self.coarse or self.split != "train":
            return fine
        coarse = self._pair("train_extra", "leftImg8bit_trainextra.zip", "gtCoarse", "gtCoarse.zip")
        return Pairing(fine.pairs + coarse.pairs, fine.unpaired + coarse.unpaired)

    def to_train_ids(self, mask: NDArray[np.uint8], file: File) -> NDArray[np.uint8]:
        """Map label ids, or ready-made train ids by the file's suffix; see :meth:`SegmentationDataset.to_train_ids`."""
        if mask.ndim == 2 and file.name.endswith("_labelTrainIds.png"):
            return apply_table(mask, self.ready_train_ids, file)
        return super().to_train_ids(mask, file)

    def _pair(self, split: str, image_archive: str, labels: str, label_archive: str) -> Pairing:
        """Pair a split's images with the label files of one kind (``labels`` is "gtFine" or "gtCoarse")."""
        image_folder, label_folder = f"leftImg8bit/{split}", f"{labels}/{split}"
        images = self._files(image_folder, image_archive, (_IMAGE_SUFFIX,))
        # If both label files exist, the later suffix wins: the published one.
        suffixes = (f"_{labels}_labelTrainIds.png", f"_{labels}_labelIds.png")
        masks = self._files(label_folder, label_archive, suffixes)
        if not images:
            raise self._no_images(image_folder, image_archive)
        if not masks and split == "test":
            return Pairing([Pair(name, image, None) for name, image in sorted(images.items())], [])
        if not masks:
            expected = f"*{suffixes[1]} in {label_folder}/<city>/ or in {label_archive}"
            raise DataError(f"{self.root}: the split {split!r} has images but no labels, expected {expected}.")
        return pair_files(
            images.items(),
            masks.items(),
            image_place=f"{image_folder}/<city>/*{_IMAGE_SUFFIX}",
            mask_place=f"{label_folder}/<city>/*{suffixes[1]}",
        )

    def _files(self, folder: str, archive: str, suffixes: tuple[str, ...]) -> dict[str, File]:
        """Return the files under ``folder`` that end in one of ``suffixes``, by ``city_sequence_frame``."""
        source = self._source(folder, archive)
        names = source.files(folder)
        return {
            PurePosixPath(name).name.removesuffix(suffix): File(source, name)
            for suffix in suffixes
            for name in names
            if name.endswith(suffix)
        }

    def _source(self, folder: str, archive: str) -> Source:
        if not (self.root / folder).is_dir() and (self.root / archive).is_file():
            return ZipSource(self.root / archive)
        return FolderSource(self.root)

    def _no_images(self, folder: str, archive: str) -> DataError:
        if (self.root / "leftImg8bit").is_dir() or (self.root / archive).is_file():
            return MissingSplitError(f"{self.root}: has no images that match {folder}/<city>/*{_IMAGE_SUFFIX}.")
        return DataError(f"{self.root}: has neither leftImg8bit/ nor {archive}; expected {self.layout}.")
