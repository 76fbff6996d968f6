"""Corruptions: the same images for every model, worse with each severity."""

import itertools
import pickle

import cv2
import numpy as np
import pytest

from ema_seg.data import build_dataset
from ema_seg.data.corruptions import CORRUPTIONS, SEVERITIES, CorruptedDataset, corrupt
from ema_seg.runtime.errors import ConfigError
from tests.data.builders import random_image, write_split_folder


@pytest.fixture(scope="module")
def scene():
    """Return a smooth picture with edges, of which each corruption destroys something."""
    image = cv2.resize(random_image(0, 9, 12), (160, 120), interpolation=cv2.INTER_CUBIC)
    cv2.rectangle(image, (30, 30), (90, 80), (200, 40, 40), 3)
    return image // 2 + 40


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_the_image_is_damaged_more_with_each_severity(kind, scene):
    before = scene.copy()
    versions = [corrupt(scene, "name", kind, severity) for severity in SEVERITIES]
    assert np.array_equal(scene, before)
    assert all(version.shape == scene.shape and version.dtype == np.uint8 for version in versions)
    errors = [np.abs(version.astype(float) - scene).mean() for version in versions]
    assert errors[0] > 0 and errors[-1] > 1.5 * errors[0]
    assert all(later > 0.75 * earlier for earlier, later in itertools.pairwise(errors))


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_random_numbers_depend_on_the_name_alone(kind, scene):
    np.random.seed(1)
    first = corrupt(scene, "name", kind, 3)
    np.random.seed(2)
    assert np.array_equal(first, corrupt(scene, "name", kind, 3))
    if CORRUPTIONS[kind].group == "noise":
        assert not np.array_equal(first, corrupt(scene, "other", kind, 3))


@pytest.mark.parametrize("size", [(8, 8), (7, 300), (33, 20)])
def test_images_of_any_size_are_corrupted(size):
    image = random_image(0, *size)
    for kind in CORRUPTIONS:
        for severity in SEVERITIES:
            assert corrupt(image, "name", kind, severity).shape == image.shape


def test_an_image_of_one_pixel_is_named():
    with pytest.raises(ConfigError, match="cannot be applied to dot, 1 x 1 pixels"):
        corrupt(random_image(0, 1, 1), "dot", "rain", 5)


def test_the_data_set_holds_each_image_with_each_corruption(tmp_path):
    (tmp_path / "classes.yaml").write_text("[a, b]")
    write_split_folder(tmp_path, "val", ["one", "two"], [0, 1], ".png")
    dataset = build_dataset("folder", tmp_path, "val", None)
    corrupted = pickle.loads(pickle.dumps(CorruptedDataset(dataset, [0, 1])))
    assert len(corrupted) == 2 * len(CORRUPTIONS) * len(SEVERITIES)
    names = [corrupted.name(index) for index in range(len(corrupted))]
    assert names[0] == "gaussian noise/1/one" and names[-1] == "pixelation/5/two" and len(set(names)) == len(names)
    for index in (0, 7, 61, len(corrupted) - 1):
        sample = corrupted[index]
        kind, severity, name = sample["name"].split("/")
        (clean,) = (item for item in dataset if item["name"] == name)
        expected = corrupt(clean["image"], name, kind, int(severity))
        assert np.array_equal(sample["image"].permute(1, 2, 0).numpy(), expected)
        assert np.array_equal(sample["mask"].numpy(), clean["mask"])
        assert corrupted.files(index) == dataset.files(["one", "two"].index(name))
    second = CorruptedDataset(dataset, [1])
    assert len(second) == len(corrupted) // 2 and second.name(0) == "gaussian noise/1/two"
