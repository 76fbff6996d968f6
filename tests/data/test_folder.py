import pickle
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image

from ema_seg.data import FolderDataset
from ema_seg.runtime.errors import ConfigError, DataError
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


def write_one(root: Path, classes: str, mask: Image.Image, name: str = "a.png", **options: object) -> Path:
    """Write a training split of one image with this mask."""
    save(root / "train/images/a.png", random_image(0, mask.height, mask.width))
    (root / "train/masks").mkdir(parents=True)
    mask.save(root / "train/masks" / name, **options)
    (root / "classes.yaml").write_text(classes)
    return root


BLACK_RED = "[{name: background, color: [0, 0, 0]}, {name: leaf, color: [255, 0, 0]}]"
BLACK_WHITE = "[{name: background, color: [0, 0, 0]}, {name: leaf, color: [255, 255, 255]}]"


@pytest.mark.parametrize("suffix", ["png", "gif", "bmp", "tif"])
def test_colours_decide_where_classes_have_them_also_through_a_palette(tmp_path: Path, suffix: str) -> None:
    train_ids = random_mask([0, 1])
    mask = Image.fromarray(1 - train_ids)  # the palette lists leaf first, as quantisation may
    mask.putpalette([255, 0, 0, 0, 0, 0])
    root = write_one(tmp_path, BLACK_RED, mask, f"a.{suffix}", **({"optimize": False} if suffix == "gif" else {}))
    for masks, expected in (("auto", train_ids), ("color", train_ids), ("index", 1 - train_ids)):
        dataset = FolderDataset(root, masks=masks)
        np.testing.assert_array_equal(dataset[0]["mask"], expected)
        reading = "indices" if masks == "index" else "colours"
        assert dataset.notes(0) == [f"masks read as {reading} of a palette"]


def test_palettes_are_indices_where_classes_have_no_colours(tmp_path: Path) -> None:
    train_ids = random_mask([0, 1])
    mask = Image.fromarray(train_ids)
    mask.putpalette([255, 0, 0, 0, 0, 0])
    dataset = FolderDataset(write_one(tmp_path, "[background, leaf]", mask, transparency=0))
    np.testing.assert_array_equal(dataset[0]["mask"], train_ids)
    assert dataset.notes(0) == ["masks read as indices of a palette"]
    with pytest.raises(DataError, match=r"classes\.yaml: gives no colors, which data\.masks=color needs"):
        FolderDataset(tmp_path, masks="color")


def test_a_palette_of_other_colours_is_refused_with_the_key_that_reads_it(tmp_path: Path) -> None:
    mask = Image.fromarray(random_mask([0, 1]))
    mask.putpalette([0, 0, 0, 128, 0, 0])
    root = write_one(tmp_path, BLACK_RED, mask)
    with pytest.raises(DataError, match=r"mask colour \(128, 0, 0\) .* set data\.masks=index"):
        FolderDataset(root)[0]
    np.testing.assert_array_equal(FolderDataset(root, masks="index")[0]["mask"], random_mask([0, 1]))


@pytest.mark.parametrize(
    ("classes", "values", "masks", "expected"),
    [
        (BLACK_RED, [0, 1], "auto", [0, 1]),
        (BLACK_WHITE, [0, 255], "auto", [0, 1]),  # an image editor saves black and white as greyscale
        (BLACK_WHITE, [0, 1], "index", [0, 1]),
        (BLACK_WHITE, [0, 255], "index", [0, 255]),
    ],
)
def test_grey_masks_hold_values_unless_all_colours_are_grey(
    tmp_path: Path, classes: str, values: list[int], masks: str, expected: list[int]
) -> None:
    root = write_one(tmp_path, classes, Image.fromarray(np.array([values], np.uint8)))
    assert FolderDataset(root, masks=masks)[0]["mask"].tolist() == [expected]


def test_grey_masks_of_values_beside_grey_colours_are_refused(tmp_path: Path) -> None:
    root = write_one(tmp_path, BLACK_WHITE, Image.fromarray(random_mask([0, 1])))
    with pytest.raises(DataError, match=r"mask colour \(1, 1, 1\) .* set data\.masks=index"):
        FolderDataset(root)[0]


def test_colour_masks_are_refused_as_values(tmp_path: Path) -> None:
    root = write_one(tmp_path, BLACK_RED, Image.fromarray(COLORS[random_mask([0])]))
    with pytest.raises(DataError, match=r"a\.png: is a colour image, but data\.masks=index"):
        FolderDataset(root, masks="index")[0]


@pytest.mark.parametrize(("key", "choices"), [("masks", "auto, index, color"), ("orientation", "upright, ignore")])
def test_ways_of_reading_are_known(tmp_path: Path, key: str, choices: str) -> None:
    with pytest.raises(ConfigError, match=rf"data\.{key}='colour' must be one of {choices}"):
        FolderDataset(tmp_path, **{key: "colour"})


def test_a_value_that_a_class_has_is_not_ignored(tmp_path: Path) -> None:
    classes = "[background, {name: leaf, value: 255}]"
    dataset = FolderDataset(write_one(tmp_path, classes, Image.fromarray(np.array([[0, 255]], np.uint8))))
    assert dataset[0]["mask"].tolist() == [[0, 1]]


@pytest.mark.parametrize("orientation", [3, 6])
def test_images_are_read_upright_and_masks_as_they_were_drawn(tmp_path: Path, orientation: int) -> None:
    mask = random_mask([0, 1])
    root = write_one(tmp_path, "[background, leaf]", Image.fromarray(mask))
    upright = Image.fromarray(np.repeat(mask[..., None] * 200, 3, axis=2))
    back = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90}[orientation]
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    upright.transpose(back).save(root / "train/images/a.png", exif=exif)
    dataset = FolderDataset(root)
    sample = dataset[0]
    np.testing.assert_array_equal(sample["image"][..., 0], 200 * sample["mask"])
    assert dataset.notes(0)[1:] == ["images with an orientation tag, turned upright by it"]

    stored = FolderDataset(root, orientation="ignore")
    np.testing.assert_array_equal(stored.read_image(0), np.array(upright.transpose(back)))
    assert stored.notes(0)[1:] == ["images with an orientation tag, read as stored (data.orientation=ignore)"]


def test_a_difference_in_size_names_the_orientation_tag(tmp_path: Path) -> None:
    root = write_one(tmp_path, "[background, leaf]", Image.fromarray(random_mask([0, 1])))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.fromarray(random_image(0)).save(root / "train/images/a.png", exif=exif)
    said = (
        r"a\.png: the mask is 16 x 12 pixels .*, expected 12 x 16 as in its image .*a\.png, which has the orientation "
        r"tag 6 and was turned upright; for masks of the pixels as stored set data\.orientation=ignore\."
    )
    with pytest.raises(DataError, match=said):
        FolderDataset(root)[0]
    assert FolderDataset(root, orientation="ignore")[0]["mask"].shape == (12, 16)


def test_names_in_different_unicode_forms_are_one(tmp_path: Path) -> None:
    write(tmp_path, "[background, leaf]", [0, 1])
    composed = unicodedata.normalize("NFC", "café")
    for kind, form in (("images", "NFD"), ("masks", "NFC")):
        path = next((tmp_path / "train" / kind).glob("a.*"))
        path.rename(path.with_name(unicodedata.normalize(form, composed) + path.suffix))
    assert [pair.name for pair in FolderDataset(tmp_path).pairs] == ["b", composed]


def test_subfolders_are_part_of_the_name(tmp_path: Path) -> None:
    write_split_folder(tmp_path, "train", ["ride/1", "walk/1"], [0])
    (tmp_path / "classes.yaml").write_text("[ground, sky]")
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
        ("", "expected a list of 2 to 254 classes, found None"),
        ("[]", r"expected a list of 2 to 254 classes, found \[\]"),
        ("{klasses: [a]}", "the classes file has the unknown key 'klasses', expected classes, ignore"),
        ("[a, yes]", "class 1 is True, expected a name"),
        ("[{name: 3}]", "class 0 has the name 3, expected a text"),
        ("[{name: a, value: 256}]", "class 'a' has the value 256, expected a whole number from 0 to 255"),
        ("[{name: a, colour: red}]", "class 0 has the unknown key 'colour', expected color, name, value"),
        ("[{name: a, color: [1, 2]}]", r"\[1, 2\] is not a color"),
        ("[{name: a, color: '#12345g'}]", "'#12345g' is not a color"),
        ("[leaf]", r"expected at least two classes, found only 'leaf'; .*as in \[background, leaf\]"),
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
