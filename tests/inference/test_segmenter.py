"""Tests of the segmenter: pictures of all kinds to masks."""

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from ema_seg.inference import segmenter as segmenter_module
from ema_seg.inference.prediction import segment
from ema_seg.runtime.errors import ConfigError, DataError
from tests.inference.conftest import CLASSES, NORMALISE, PALETTE


@pytest.fixture
def picture():
    return np.random.default_rng(0).integers(0, 256, (70, 90, 3), np.uint8)


def expected(segmenter, image):
    tensor = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)
    return segment(segmenter.model, [tensor], segmenter.stride, NORMALISE)[0].numpy()


def test_paths_pil_images_and_arrays_give_the_mask_of_an_evaluation(segmenter, picture, tmp_path):
    path = tmp_path / "picture.png"
    Image.fromarray(picture).save(path)

    results = segmenter([path, str(path), Image.open(path), picture])

    for result in results:
        assert np.array_equal(result.mask, expected(segmenter, picture))
        assert np.array_equal(result.image, picture)
    assert results[0].mask.dtype == np.uint8
    assert results[0].probabilities is results[0].weight_maps is None


def test_grey_pictures_get_equal_channels_and_alpha_is_left_out(segmenter, picture):
    grey = picture[..., 0]
    rgba = np.dstack([picture, picture[..., :1]])

    assert np.array_equal(segmenter(grey).image, np.stack([grey] * 3, axis=-1))
    assert np.array_equal(segmenter(Image.fromarray(grey)).image, np.stack([grey] * 3, axis=-1))
    for result in segmenter([rgba, Image.fromarray(rgba)]):
        assert np.array_equal(result.image, picture)
        assert np.array_equal(result.mask, expected(segmenter, picture))


@pytest.mark.parametrize("upright", [True, False])
def test_orientation_tags_are_applied_or_not(segmenter, picture, tmp_path, monkeypatch, upright):
    monkeypatch.setattr(segmenter, "upright", upright)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise
    path = tmp_path / "phone.png"
    Image.fromarray(picture).save(path, exif=exif)

    for result in segmenter([path, Image.open(path)]):
        assert np.array_equal(result.image, np.rot90(picture, -1) if upright else picture)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (np.zeros((4, 4, 3)), r"float64 of shape \(4, 4, 3\); expected uint8"),
        (np.zeros((4, 4, 2), np.uint8), r"shape \(4, 4, 2\)"),
        (np.zeros((3, 0, 3), np.uint8), "has no pixel"),
        (Image.new("I;16", (4, 4)), "mode I;16; expected 8 bits a channel"),
        (Image.new("RGB", (0, 4)), "has no pixel"),
        ("nowhere.png", "nowhere.png"),
    ],
)
def test_what_is_no_picture_is_refused_in_a_sentence(segmenter, wrong, message):
    with pytest.raises(DataError, match=message):
        segmenter(wrong)


def test_a_pil_image_of_16_bits_a_channel_is_refused(segmenter, tmp_path):
    cv2.imwrite(str(tmp_path / "deep.png"), np.zeros((4, 4, 3), np.uint16))

    with pytest.raises(DataError, match="the PIL image has 16 bits a channel; expected 8 bits"):
        segmenter(Image.open(tmp_path / "deep.png"))


def test_arrays_in_any_order_of_memory_are_taken(segmenter, picture):
    turned = picture[::-1, :, ::-1]

    assert np.array_equal(segmenter(turned).mask, segmenter(turned.copy()).mask)


def test_probabilities_and_weight_maps_come_on_request(segmenter, picture):
    result = segmenter(picture, probabilities=True, weight_maps=True)

    assert result.probabilities.shape == (3, 70, 90)
    assert np.array_equal(result.probabilities.argmax(axis=0), result.mask)
    assert np.allclose(result.probabilities.sum(axis=0), 1, atol=1e-5)
    assert all(maps.min() > 0 and maps.max() < 1 and maps.ndim == 3 for maps in result.weight_maps.values())
    assert result.weight_maps


def test_a_result_has_areas_an_overlay_and_a_file(segmenter, picture, tmp_path):
    result = segmenter(picture)
    result.save(tmp_path / "mask.png")
    saved = Image.open(tmp_path / "mask.png")

    assert result.areas() == {name: (result.mask == index).mean() for index, name in enumerate(CLASSES)}
    assert np.array_equal(np.array(saved), result.mask)
    assert saved.getpalette()[:9] == [value for colour in PALETTE for value in colour]
    assert np.array_equal(np.array(result.overlay(0)), picture)
    assert np.array_equal(np.array(result.overlay(1)), np.array(PALETTE, np.uint8)[result.mask])
    with pytest.raises(ConfigError, match="alpha=2: must be a number from 0 to 1"):
        result.overlay(2)
    with pytest.raises(DataError, match=r"mask\.jpg: a mask is written as PNG"):
        result.save(tmp_path / "mask.jpg")


def test_a_large_picture_is_predicted_in_windows(segmenter, monkeypatch):
    # Smooth, so that what lies beyond a window changes its logits little.
    rows, columns = np.mgrid[0:600, 0:700]
    picture = np.stack([rows // 3, columns // 3, (rows + columns) // 6], axis=-1).astype(np.uint8)
    whole = segmenter(picture, probabilities=True)
    monkeypatch.setattr(segmenter_module, "_MOST_PIXELS", 1000)
    monkeypatch.setattr(segmenter_module, "_LARGEST_WINDOW", 384)

    found = segmenter(picture, probabilities=True)

    assert found.mask.shape == whole.mask.shape
    assert (found.mask == whole.mask).mean() > 0.9
    assert np.array_equal(found.probabilities.argmax(axis=0), found.mask)
    with pytest.raises(ConfigError, match="700 x 600 pixels and is predicted in windows"):
        segmenter(picture, weight_maps=True)
