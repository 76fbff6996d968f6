import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from cityscapesscripts.helpers.labels import id2label, trainId2label
from torch.utils.data import DataLoader

from ema_seg.data import CityscapesDataset
from ema_seg.data.base import MissingSplitError
from ema_seg.runtime.errors import DataError
from tests.data.builders import pack, random_image, random_mask, save, write_cityscapes

IDS = [*range(34), 255]
NAMES = ["aachen_000000_000019", "aachen_000001_000019", "bochum_000000_000313"]


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    root = tmp_path / "folders"
    write_cityscapes(root, "train", NAMES, IDS)
    write_cityscapes(root, "val", ["munster_000000_000019"], IDS)
    write_cityscapes(root, "test", ["berlin_000000_000019"], [0, 3])
    write_cityscapes(root, "train_extra", ["erlangen_000000_000000"], IDS, labels="gtCoarse")
    return root


@pytest.fixture
def archives(folders: Path, tmp_path: Path) -> Path:
    """Pack the official archives, with the members' names as published."""
    root = tmp_path / "archives"
    root.mkdir()
    extra = tmp_path / "extra"
    shutil.move(folders / "leftImg8bit/train_extra", extra / "leftImg8bit/train_extra")
    pack(extra, root / "leftImg8bit_trainextra.zip")
    pack(folders, root / "leftImg8bit_trainvaltest.zip", below="leftImg8bit")
    pack(folders, root / "gtFine_trainvaltest.zip", below="gtFine")
    pack(folders, root / "gtCoarse.zip", below="gtCoarse")
    return root


@pytest.fixture(params=["folders", "archives"])
def root(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


def official_train_ids(label_ids: np.ndarray) -> np.ndarray:
    """Map label ids to train ids by the benchmark's own table; a byte of 255 is the id -1."""
    table = [id2label[value].trainId if value < 34 else 255 for value in range(256)]
    return np.array([value if value >= 0 else 255 for value in table], dtype=np.uint8)[label_ids]


def test_classes_and_palette_are_the_official_ones() -> None:
    official = [trainId2label[train_id] for train_id in range(19)]
    assert CityscapesDataset.classes == tuple(label.name for label in official)
    assert CityscapesDataset.palette == tuple(label.color for label in official)


def test_reads_images_and_maps_label_ids(root: Path) -> None:
    dataset = CityscapesDataset(root=root, split="train")
    assert [sample["name"] for sample in dataset] == NAMES
    for seed, sample in enumerate(dataset):
        np.testing.assert_array_equal(sample["image"], random_image(seed))
        np.testing.assert_array_equal(sample["mask"], official_train_ids(random_mask(IDS, seed)))


@pytest.mark.parametrize("split", ["val", "test"])
def test_reads_the_other_splits(root: Path, split: str) -> None:
    dataset = CityscapesDataset(root, split)
    assert len(dataset) == 1
    assert split == "val" or (dataset[0]["mask"] == 255).all()


def test_coarse_adds_to_the_train_split_only(root: Path) -> None:
    dataset = CityscapesDataset(root, "train", coarse=True)
    assert [pair.name for pair in dataset.pairs] == [*NAMES, "erlangen_000000_000000"]
    np.testing.assert_array_equal(dataset[3]["mask"], official_train_ids(random_mask(IDS)))
    assert len(CityscapesDataset(root, "val", coarse=True)) == 1


def test_reads_ready_made_train_ids(tmp_path: Path) -> None:
    values = [*range(19), 255]
    write_cityscapes(tmp_path, "val", ["munster_000000_000019"], values, kind="labelTrainIds")
    np.testing.assert_array_equal(CityscapesDataset(tmp_path, "val")[0]["mask"], random_mask(values))


def test_prefers_the_published_label_ids(tmp_path: Path) -> None:
    write_cityscapes(tmp_path, "val", ["munster_000000_000019"], [0, 18], kind="labelTrainIds")
    write_cityscapes(tmp_path, "val", ["munster_000000_000019"], [7])
    assert (CityscapesDataset(tmp_path, "val")[0]["mask"] == 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_archives_are_read_by_workers_of_every_start_method(archives: Path, method: str) -> None:
    dataset = CityscapesDataset(archives, "train")
    expected = [dataset[index] for index in range(len(dataset))]  # also opens the archives before the fork
    loader = DataLoader(dataset, batch_size=None, num_workers=2, multiprocessing_context=method)
    for sample, same in zip(loader, expected, strict=True):
        assert sample["name"] == same["name"]
        np.testing.assert_array_equal(sample["image"], same["image"])
        np.testing.assert_array_equal(sample["mask"], same["mask"])


def test_pickles(root: Path) -> None:
    dataset = CityscapesDataset(root)
    first = dataset[0]
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(dataset))[0]["image"], first["image"])


def test_a_wrong_root_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has neither leftImg8bit/ nor leftImg8bit_trainvaltest\.zip; expected"):
        CityscapesDataset(tmp_path)


def test_a_missing_split_is_named(tmp_path: Path) -> None:
    write_cityscapes(tmp_path, "val", ["munster_000000_000019"], [7])
    with pytest.raises(MissingSplitError, match=r"no images that match leftImg8bit/train/<city>/\*_leftImg8bit\.png"):
        CityscapesDataset(tmp_path, "train")


def test_a_split_without_labels_is_named(folders: Path) -> None:
    shutil.rmtree(folders / "gtFine")
    with pytest.raises(DataError, match=r"the split 'val' has images but no labels, expected .*labelIds\.png"):
        CityscapesDataset(folders, "val")
    test = CityscapesDataset(folders, "test")
    np.testing.assert_array_equal(test.read_image(0), random_image(0))
    with pytest.raises(DataError, match="the split 'test' has no labels"):
        test[0]


def test_a_missing_label_file_is_named(folders: Path) -> None:
    (folders / "gtFine/train/aachen" / f"{NAMES[0]}_gtFine_labelIds.png").unlink()
    with pytest.raises(DataError, match=rf"{NAMES[0]}_leftImg8bit\.png: the image has no mask"):
        CityscapesDataset(folders)


def test_an_unknown_label_id_is_named_with_the_archive(folders: Path, tmp_path: Path) -> None:
    save(folders / "gtFine/val/munster/munster_000000_000019_gtFine_labelIds.png", random_mask([7, 34]))
    pack(folders, tmp_path / "leftImg8bit_trainvaltest.zip", below="leftImg8bit")
    pack(folders, tmp_path / "gtFine_trainvaltest.zip", below="gtFine")
    expected = r"gtFine_trainvaltest\.zip.gtFine.val.*labelIds\.png: mask value 34 .*expected 0-33, 255"
    with pytest.raises(DataError, match=expected):
        CityscapesDataset(tmp_path, "val")[0]
