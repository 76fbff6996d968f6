import pickle
from pathlib import Path

import numpy as np
import pytest

from ema_seg.data import FolderDataset
from ema_seg.errors import DataError
from tests.data.builders import random_image, random_mask, save, write_split_folder

LEAVES = """
classes:
  - {name: background, value: 0, color: [0, 0, 0]}
  - {name: leaf, value: 7, color: "#22cc44"}
  - {name: stem, value: 9, color: [200, 100, 0]}
ignore: [255, "#ffffff"]
"""
COLORS = np.array([[0, 0, 0], [0x22, 0xCC, 0x44], [200, 100, 0], [255, 255, 255]], dtype=np.uint8)


def write(root: Path, classes: str, values: list[int], suffix: str = ".jpg") -> Path:
    write_split_folder(root, "train", ["a", "b"], values, suffix)
    (root / "classes.yaml").write_text(classes)
    return root


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif", ".webp", ".bmp", ".JPG"])
def test_a_list_of_names_reads_values_as_positions(tmp_path: Path, suffix: str) -> None:
    dataset = FolderDataset(root=write(tmp_path, "[background, leaf]", [0, 1, 255], suffix), split="train")
    assert dataset.classes == ("background", "leaf")
    assert len(set(dataset.palette)) == 2 and (0, 0, 0) not in dataset.palette
    sample = dataset[1]
    assert sample["name"] == "b" and sample["image"].shape == (12, 16, 3)
    np.testing.assert_array_equal(sample["mask"], random_mask([0, 1, 255], seed=1))


def test_values_of_indexed_masks_become_train_ids(tmp_path: Path) -> None:
    dataset = FolderDataset(write(tmp_path, LEAVES, [0, 7, 9, 255]))
    assert dataset.palette == ((0, 0, 0), (0x22, 0xCC, 0x44), (200, 100, 0))
    stored = random_mask([0, 7, 9, 255])
    expected = np.select([stored == 0, stored == 7, stored == 9], [0, 1, 2], 255)
    np.testing.assert_array_equal(dataset[0]["mask"], expected)


def test_colours_of_colour_coded_masks_become_train_ids(tmp_path: Path) -> None:
    write(tmp_path, LEAVES, [0])
    train_ids = random_mask([0, 1, 2, 3])
    save(tmp_path / "train/masks/a.png", COLORS[train_ids])
    dataset = pickle.loads(pickle.dumps(FolderDataset(tmp_path)))
    np.testing.assert_array_equal(dataset[0]["mask"], np.where(train_ids == 3, 255, train_ids))


def test_subfolders_are_part_of_the_name(tmp_path: Path) -> None:
    write_split_folder(tmp_path, "train", ["ride/1", "walk/1"], [0])
    (tmp_path / "classes.yaml").write_text("[ground]")
    assert [pair.name for pair in FolderDataset(tmp_path).pairs] == ["ride/1", "walk/1"]


def test_the_classes_file_can_be_elsewhere(tmp_path: Path) -> None:
    write(tmp_path / "data", "[wrong]", [0, 1])
    (tmp_path / "mine.yaml").write_text("classes:\n- name: x\n- y\n")
    assert FolderDataset(tmp_path / "data", classes=tmp_path / "mine.yaml").classes == ("x", "y")


def test_ignored_values_replace_the_default(tmp_path: Path) -> None:
    dataset = FolderDataset(write(tmp_path, "{classes: [a, b], ignore: [200, 201]}", [0, 1, 200, 201]))
    assert set(np.unique(dataset[0]["mask"])) == {0, 1, 255}
    save(tmp_path / "train/masks/a.png", random_mask([0, 255]))
    with pytest.raises(DataError, match=r"a\.png: mask value 255 .*expected 0-1, 200-201"):
        dataset[0]


def test_a_colour_outside_the_classes_is_named(tmp_path: Path) -> None:
    write(tmp_path, LEAVES, [0])
    mask = COLORS[random_mask([0, 1])]
    mask[3, 5] = (0x22, 0xCC, 0x45)
    save(tmp_path / "train/masks/b.png", mask)
    with pytest.raises(DataError, match=r"b\.png: mask colour \(34, 204, 69\) \(row 3, column 5.*classes\.yaml"):
        FolderDataset(tmp_path)[1]


def test_a_colour_mask_without_colours_is_named(tmp_path: Path) -> None:
    write(tmp_path, "[a, b]", [0])
    save(tmp_path / "train/masks/a.png", random_image(0))
    with pytest.raises(DataError, match=r"a\.png: is a colour image, but .*classes\.yaml gives .* no colors"):
        FolderDataset(tmp_path)[0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[a, b", "is not valid YAML"),
        ("", "expected a list of 1 to 254 classes, found None"),
        ("[]", r"expected a list of 1 to 254 classes, found \[\]"),
        ("{klasses: [a]}", "the classes file has the unknown key 'klasses', expected classes, ignore"),
        ("[a, yes]", "class 1 is True, expected a name"),
        ("[{name: 3}]", "class 0 has the name 3, expected a text"),
        ("[{name: a, value: 256}]", "class 'a' has the value 256, expected a whole number from 0 to 255"),
        ("[{name: a, colour: red}]", "class 0 has the unknown key 'colour', expected color, name, value"),
        ("[{name: a, color: [1, 2]}]", r"\[1, 2\] is not a color"),
        ("[{name: a, color: '#12345g'}]", "'#12345g' is not a color"),
        ("[a, a]", "the name 'a' occurs twice"),
        ("[a, {name: b, value: 0}]", "the value 0 occurs twice"),
        ("{classes: [a, b], ignore: 1}", "the value 1 occurs twice"),
        ("[{name: a, color: '#000000'}, {name: b, color: [0, 0, 0]}]", r"the color \(0, 0, 0\) occurs twice"),
        ("[{name: a, color: '#000000'}, b]", "class 'b' has no color but others have"),
    ],
)
def test_a_mistake_in_the_classes_file_is_named(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(DataError, match=rf"classes\.yaml: .*{message}"):
        FolderDataset(write(tmp_path, content, [0]))


def test_a_missing_classes_file_is_named(tmp_path: Path) -> None:
    write_split_folder(tmp_path, "train", ["a"], [0])
    with pytest.raises(DataError, match=r"classes\.yaml: the classes file cannot be read"):
        FolderDataset(tmp_path)


def test_classes_without_colours_get_distinct_ones(tmp_path: Path) -> None:
    dataset = FolderDataset(write(tmp_path, f"[{', '.join(f'c{index}' for index in range(254))}]", [0, 253]))
    assert len(set(dataset.palette)) == 254 and (0, 0, 0) not in dataset.palette
    assert dataset[0]["mask"].max() == 253
