from pathlib import Path

import numpy as np
import pytest

from ema_seg.data import CamVidDataset, build_dataset
from ema_seg.data.base import MissingSplitError
from ema_seg.runtime.errors import ConfigError, DataError
from tests.data.builders import random_image, random_mask, save, truncate, write_split_folder

VALUES = list(range(12))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_split_folder(tmp_path, "train", ["0001TP_1", "0001TP_2", "0006R0_3"], VALUES)
    return write_split_folder(tmp_path, "val", ["0016E5_1"], VALUES)


def test_reads_samples_as_rgb_and_train_ids(root: Path) -> None:
    dataset = CamVidDataset(root=root, split="train")
    assert [sample["name"] for sample in dataset] == ["0001TP_1", "0001TP_2", "0006R0_3"]
    sample = dataset[1]
    assert sample["image"].shape == (12, 16, 3) and sample["image"].dtype == np.uint8
    stored = random_mask(VALUES, seed=1)
    np.testing.assert_array_equal(sample["mask"], np.where(stored == 11, 255, stored))
    assert sample["mask"].dtype == np.uint8


def test_has_the_eleven_classes() -> None:
    assert len(CamVidDataset.classes) == len(CamVidDataset.palette) == len(set(CamVidDataset.palette)) == 11
    assert (CamVidDataset.classes[3], CamVidDataset.palette[3]) == ("road", (128, 64, 128))


def test_the_transform_gets_the_sample(root: Path) -> None:
    assert CamVidDataset(root, "val", transform=lambda sample: sample["name"])[0] == "0016E5_1"


def test_a_root_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere: no such file or folder; expected the CamVid folder"):
        CamVidDataset(tmp_path / "nowhere")


def test_a_root_of_another_layout_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no images in train/images/, expected the CamVid folder"):
        CamVidDataset(tmp_path)


def test_a_split_that_is_not_there_is_named_with_those_that_are(root: Path) -> None:
    with pytest.raises(MissingSplitError, match=r"no images in test/images/; splits with images: train, val"):
        CamVidDataset(root, "test")


def test_an_unknown_split_is_a_config_error(root: Path) -> None:
    with pytest.raises(ConfigError, match=r"split='validation'.*train, val, test"):
        CamVidDataset(root, "validation")


def test_missing_halves_of_pairs_are_named(root: Path) -> None:
    (root / "train/masks/0001TP_1.png").unlink()
    with pytest.raises(DataError, match=r"0001TP_1\.jpg: the image has no mask, expected one named 0001TP_1"):
        CamVidDataset(root)
    (root / "train/images/0001TP_2.jpg").unlink()
    with pytest.raises(DataError, match=r"0001TP_1\.jpg.*\(1 more of the kind; .*check lists all\)"):
        CamVidDataset(root)
    dataset = CamVidDataset(root, allow_unpaired=True)
    assert [pair.name for pair in dataset.pairs] == ["0006R0_3"]
    assert "0001TP_2.png: the mask has no image" in dataset.unpaired[1]


def test_two_images_of_one_name_are_named(root: Path) -> None:
    save(root / "val/images/0016E5_1.png", random_image(0))
    with pytest.raises(DataError, match=r"0016E5_1\.png: has the same name 0016E5_1 as .*0016E5_1\.jpg"):
        CamVidDataset(root, "val")


def test_a_file_that_is_no_image_is_named_but_hidden_files_are_not(root: Path) -> None:
    (root / "val/images/.DS_Store").write_bytes(b"")
    CamVidDataset(root, "val")
    (root / "val/images/notes.txt").write_text("mine")
    with pytest.raises(DataError, match=r"notes\.txt: is not an image file"):
        CamVidDataset(root, "val")


def test_a_size_mismatch_is_named(root: Path) -> None:
    save(root / "val/masks/0016E5_1.png", random_mask([0], height=10, width=16))
    with pytest.raises(DataError, match=r"0016E5_1\.png: the mask is 16 x 10 pixels .*expected 16 x 12"):
        CamVidDataset(root, "val")[0]


def test_values_outside_the_class_list_are_named(root: Path) -> None:
    save(root / "val/masks/0016E5_1.png", random_mask([0, 12, 13, 200]))
    with pytest.raises(DataError, match=r"0016E5_1\.png: mask value 12-13, 200 .*expected 0-11\."):
        CamVidDataset(root, "val")[0]


def test_a_colour_mask_is_refused(root: Path) -> None:
    save(root / "val/masks/0016E5_1.png", random_image(0))
    with pytest.raises(DataError, match=r"0016E5_1\.png: is a colour image, expected one channel"):
        CamVidDataset(root, "val")[0]


def test_a_truncated_file_is_named(root: Path) -> None:
    truncate(root / "val/images/0016E5_1.jpg")
    with pytest.raises(DataError, match=r"0016E5_1\.jpg: cannot be decoded as an image"):
        CamVidDataset(root, "val")[0]


def test_build_dataset_names_what_it_does_not_know(root: Path) -> None:
    assert len(build_dataset("camvid", root, "val")) == 1
    with pytest.raises(ConfigError, match=r"data\.name='pascal' .*ade20k, camvid, cityscapes, folder, street"):
        build_dataset("pascal", root)
    with pytest.raises(ConfigError, match=r"data\.coarse=True is not an option of the data set 'camvid'"):
        build_dataset("camvid", root, coarse=True)
