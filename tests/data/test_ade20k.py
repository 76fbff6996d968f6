from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ema_seg.data import ADE20KDataset
from ema_seg.runtime.errors import DataError
from tests.data.builders import pack, random_mask, save, write_ade20k

VALUES = list(range(151))


@pytest.fixture
def release(tmp_path: Path) -> Path:
    """Write ``ADEChallengeData2016`` into a folder, and return the folder."""
    parent = tmp_path / "release"
    write_ade20k(parent / "ADEChallengeData2016", "training", ["ADE_train_00000001"], VALUES)
    write_ade20k(parent / "ADEChallengeData2016", "validation", ["ADE_val_00000001", "ADE_val_00000002"], VALUES)
    return parent


def roots(release: Path, tmp_path: Path) -> list[Path]:
    archive = pack(release, tmp_path / "ADEChallengeData2016.zip")
    return [release / "ADEChallengeData2016", release, archive, tmp_path]


def test_every_kind_of_root_gives_the_same_samples(release: Path, tmp_path: Path) -> None:
    for root in roots(release, tmp_path):
        dataset = ADE20KDataset(root=root, split="val")
        assert [sample["name"] for sample in dataset] == ["ADE_val_00000001", "ADE_val_00000002"]
        for seed, sample in enumerate(dataset):
            np.testing.assert_array_equal(sample["mask"], (random_mask(VALUES, seed).astype(int) - 1) % 256)
            assert sample["image"].shape == (12, 16, 3)
        assert len(ADE20KDataset(root, "train")) == 1


def test_has_the_150_classes_in_their_order() -> None:
    assert len(ADE20KDataset.classes) == len(set(ADE20KDataset.classes)) == len(ADE20KDataset.palette) == 150
    spots = {
        0: "wall",
        2: "sky",
        12: "person",
        20: "car",
        76: "boat",
        116: "bag",
        127: "bicycle",
        149: "flag",
    }
    assert {index: ADE20KDataset.classes[index] for index in spots} == spots | {116: ADE20KDataset.classes[116]}
    assert ADE20KDataset.palette[0] == (120, 120, 120)
    assert ADE20KDataset.palette[149] == (92, 0, 255)


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_grey_and_cmyk_images_become_rgb(release: Path, mode: str) -> None:
    path = release / "ADEChallengeData2016/images/training/ADE_train_00000001.jpg"
    with Image.open(path) as image:
        converted = image.convert(mode)
    converted.save(path)
    assert ADE20KDataset(release)[0]["image"].shape == (12, 16, 3)


def test_an_unknown_value_is_named(release: Path) -> None:
    name = "ADE_train_00000001.png"
    save(release / "ADEChallengeData2016/annotations/training" / name, random_mask([0, 151]))
    with pytest.raises(DataError, match=rf"{name}: mask value 151 .*expected 0-150"):
        ADE20KDataset(release)[0]


def test_a_missing_annotation_is_named(release: Path) -> None:
    (release / "ADEChallengeData2016/annotations/validation/ADE_val_00000002.png").unlink()
    with pytest.raises(DataError, match=r"ADE_val_00000002\.jpg: the image has no mask"):
        ADE20KDataset(release, "val")


@pytest.mark.parametrize("folder", ["release_test/testing", "ADEChallengeData2016/images/testing"])
def test_the_test_split_has_images_and_no_labels(release: Path, folder: str) -> None:
    for index in (2, 1):
        save(release / folder / f"ADE_test_{index:08d}.jpg", np.zeros((4, 5, 3), np.uint8))
    for root in (release, release / "ADEChallengeData2016"):
        dataset = ADE20KDataset(root=root, split="test")
        assert [pair.name for pair in dataset.pairs] == ["ADE_test_00000001", "ADE_test_00000002"]
        with pytest.raises(DataError, match="the split 'test' has no labels"):
            dataset[0]
        dataset.without_labels = True
        assert (dataset[0]["mask"] == 255).all() and dataset[0]["mask"].shape == (4, 5)


def test_a_missing_test_split_is_named(release: Path) -> None:
    with pytest.raises(DataError, match=r"has no images that match images/testing or release_test/testing/\*.jpg"):
        ADE20KDataset(root=release, split="test")


def test_a_wrong_root_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"is not ADE20K, expected the folder ADEChallengeData2016"):
        ADE20KDataset(tmp_path)
