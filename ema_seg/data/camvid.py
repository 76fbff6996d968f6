"""CamVid in its 11-class form: 480 x 360 street scenes from a driving car.

Brostow et al., "Semantic object classes in video: A high-definition ground truth database", Pattern
Recognition Letters 2009; the 11 classes are those of SegNet (Badrinarayanan et al., TPAMI 2017).
"""

from typing import ClassVar

from ema_seg.data.base import IGNORE_INDEX, Pairing, SegmentationDataset, train_id_table
from ema_seg.data.folder import pair_split_folder

__all__ = ["CamVidDataset"]

# (name, colour in the database's own label images), in the order of the mask values.
_CLASSES = (
    ("sky", (128, 128, 128)),
    ("building", (128, 0, 0)),
    ("pole", (192, 192, 128)),
    ("road", (128, 64, 128)),
    ("pavement", (0, 0, 192)),
    ("tree", (128, 128, 0)),
    ("sign symbol", (192, 128, 128)),
    ("fence", (64, 64, 128)),
    ("car", (64, 0, 128)),
    ("pedestrian", (64, 64, 0)),
    ("bicyclist", (0, 128, 192)),
)
_UNLABELLED = len(_CLASSES)


class CamVidDataset(SegmentationDataset):
    """CamVid from ``{train,val,test}/images/*.jpg`` and ``masks/*.png``, paired by stem.

    Mask values 0 to 10 are the classes, and 11, unlabelled, is ignored. The standard split has 367 images for
    training, 101 for validation and 233 for testing.
    """

    classes = tuple(name for name, _ in _CLASSES)
    palette = tuple(color for _, color in _CLASSES)
    layout: ClassVar[str] = "the CamVid folder, which holds train/, val/ or test/, each with images/ and masks/"
    train_ids = train_id_table({value: value for value in range(_UNLABELLED)} | {_UNLABELLED: IGNORE_INDEX})

    def find_pairs(self) -> Pairing:
        """Pair images and masks by stem; see :meth:`SegmentationDataset.find_pairs`."""
        return pair_split_folder(self.root, self.split, self.layout)
