from collections.abc import Callable
from pathlib import Path
from typing import Any

import albumentations as A
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from ema_seg.data.base import IGNORE_INDEX, Sample
from ema_seg.data.transforms import (
    CategoryLimitedCrop,
    TensorSample,
    build_eval_transform,
    build_train_transform,
)
from ema_seg.runtime.errors import ConfigError, Preempted
from tests.data.builders import random_image, random_mask

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
STEPS: dict[str, dict[str, Any] | None] = {
    "scale": {"transform": "RandomScale", "scale_limit": [-0.5, 1.0], "p": 1},
    "crop": {"transform": "CategoryLimitedCrop", "height": 24, "width": 32, "max_share": 0.75},
    "flip": {"transform": "HorizontalFlip", "p": 0.5},
    "photometric": {"transform": "ColorJitter", "brightness": [0.5, 1.5], "p": 0.5},
}


def make_sample(height: int = 48, width: int = 64, values: tuple[int, ...] = (0, 3, 7, 255)) -> Sample:
    mask = random_mask(list(values), 0, height, width)
    return {"image": random_image(0, height, width), "mask": mask, "name": "a"}


class Repeated(Dataset[TensorSample]):
    """Data set of one sample, transformed anew at every index."""

    def __init__(self, transform: Callable[[Sample], TensorSample], length: int) -> None:
        self.transform = transform
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> TensorSample:
        return self.transform(make_sample())


def fingerprints(loader: DataLoader[Any]) -> list[float]:
    return [float(sample["image"].double().sum()) for sample in loader]


def test_evaluation_only_normalises() -> None:
    sample = make_sample(values=(0, 3, 255))
    transformed = build_eval_transform(MEAN, STD)(sample)
    expected = (sample["image"] / 255 - np.array(MEAN)) / np.array(STD)
    assert transformed["image"].dtype == torch.float32 and transformed["image"].is_contiguous()
    torch.testing.assert_close(
        transformed["image"].permute(1, 2, 0).double(), torch.from_numpy(expected), atol=1e-5, rtol=0
    )
    assert transformed["mask"].dtype == torch.int64
    np.testing.assert_array_equal(transformed["mask"], sample["mask"])
    assert transformed["name"] == "a"


def test_training_samples_have_the_crop_size_and_only_known_train_ids() -> None:
    transform = build_train_transform(STEPS, MEAN, STD)
    for _ in range(20):
        transformed = transform(make_sample())
        assert transformed["image"].shape == (3, 24, 32) and transformed["image"].is_contiguous()
        assert transformed["mask"].shape == (24, 32)
        assert set(transformed["mask"].unique().tolist()) <= {0, 3, 7, 255}


@pytest.mark.parametrize("name", ["Rotate", "Affine", "ElasticTransform", "PadIfNeeded", "GridDistortion"])
def test_geometric_steps_ignore_what_lies_outside_the_image(name: str) -> None:
    arguments: dict[str, Any] = {"Rotate": {"limit": [45, 45]}, "Affine": {"translate_percent": 0.3}}.get(name, {})
    arguments |= {"min_height": 60, "min_width": 90} if name == "PadIfNeeded" else {}
    step = {"transform": name, "p": 1, "mask_interpolation": 1, **arguments}
    if name == "PadIfNeeded":
        del step["mask_interpolation"]
    transform = build_train_transform({"step": step}, MEAN, STD)
    mask = transform(make_sample(values=(20, 200)))["mask"]
    assert set(mask.unique().tolist()) <= {20, 200, 255}
    if name in {"Rotate", "Affine", "PadIfNeeded"}:
        assert (mask == IGNORE_INDEX).any()


def test_a_null_step_is_left_out_and_order_is_kept() -> None:
    transform = build_train_transform({"scale": None, "photometric": None}, MEAN, STD)
    torch.testing.assert_close(
        transform(make_sample())["image"], build_eval_transform(MEAN, STD)(make_sample())["image"]
    )


def test_smaller_images_are_padded_at_the_right_and_the_bottom() -> None:
    steps = {"crop": {"transform": "CategoryLimitedCrop", "height": 60, "width": 80}}
    transformed = build_train_transform(steps, MEAN, STD)(make_sample(values=(0, 3)))
    outside = torch.ones(60, 80, dtype=torch.bool)
    outside[:48, :64] = False
    assert torch.equal(transformed["mask"] == IGNORE_INDEX, outside)
    assert transformed["image"][:, outside].abs().max() < 0.01  # the mean colour, rounded to a byte
    np.testing.assert_array_equal(transformed["mask"][:48, :64], make_sample(values=(0, 3))["mask"])


def crop_once(mask: np.ndarray, **arguments: Any) -> np.ndarray:
    crop = CategoryLimitedCrop(height=8, width=8, **arguments)
    return crop(image=np.zeros((*mask.shape, 3), np.uint8), mask=mask)["mask"]


def largest_share(mask: np.ndarray) -> float:
    counts = np.bincount(mask[mask != IGNORE_INDEX], minlength=1)
    return counts.max() / max(counts.sum(), 1)


def test_crops_with_too_much_of_one_class_are_drawn_again() -> None:
    mask = np.zeros((8, 64), np.uint8)  # left half: one class; right half: two classes in stripes
    mask[::2, 32:] = 1
    assert all(largest_share(crop_once(mask, tries=50)) <= 0.75 for _ in range(30))
    assert any(largest_share(crop_once(mask, tries=1)) > 0.75 for _ in range(30))


def test_the_last_crop_stands_where_none_would_do() -> None:
    assert (crop_once(np.full((20, 20), 4, np.uint8)) == 4).all()


def test_ignored_pixels_do_not_count_in_the_share() -> None:
    mask = np.full((8, 8), IGNORE_INDEX, np.uint8)
    mask[0, :2] = (1, 2)
    assert CategoryLimitedCrop(8, 8)._is_acceptable(mask)
    mask[0, 1] = 1
    assert not CategoryLimitedCrop(8, 8)._is_acceptable(mask)
    assert CategoryLimitedCrop(8, 8, max_share=1)._is_acceptable(mask)
    mask[:] = IGNORE_INDEX
    assert not CategoryLimitedCrop(8, 8, max_share=1)._is_acceptable(mask)


@pytest.mark.parametrize("workers", [0, 2])
def test_torch_seed_decides_the_augmentation(workers: int) -> None:
    transform = build_train_transform(STEPS, MEAN, STD)

    def epochs(seed: int) -> list[list[float]]:
        torch.manual_seed(seed)
        loader = DataLoader(
            Repeated(transform, 8), batch_size=None, num_workers=workers, persistent_workers=workers > 0
        )
        return [fingerprints(loader) for _ in range(2)]

    first, again, other = epochs(1), epochs(1), epochs(2)
    assert first == again
    drawn = [value for run in (first, other) for epoch in run for value in epoch]
    assert len(set(drawn)) == len(drawn)  # all draws differ, across workers, epochs and seeds


def test_steps_are_drawn_independently() -> None:
    steps = {
        "flip": {"transform": "HorizontalFlip", "p": 0.5},
        "turn": {"transform": "VerticalFlip", "p": 0.5},
    }
    transform = build_train_transform(steps, (0, 0, 0), (1, 1, 1))
    image = make_sample()["image"][..., 0] / 255
    corners = {str(round(float(corner), 4)) for corner in (image[0, 0], image[0, -1], image[-1, 0], image[-1, -1])}
    torch.manual_seed(0)
    seen = {str(round(float(transform(make_sample())["image"][0, 0, 0]), 4)) for _ in range(60)}
    assert seen == corners  # neither flip, either one, and both


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (
            {"transform": "HorizontalFlipp"},
            r"augmentation\.s\.transform='HorizontalFlipp'.*Did you mean 'HorizontalFlip'\?",
        ),
        ({"transform": "Compose"}, r"augmentation\.s\.transform='Compose': must be CategoryLimitedCrop or a transform"),
        ({"p": 1}, r"augmentation\.s=\{'p': 1\} must be a mapping with the key transform"),
        (
            {"transform": "HorizontalFlip", "prob": 1},
            r"augmentation\.s\.prob=1 is not an argument of HorizontalFlip",
        ),
        (
            {"transform": "CategoryLimitedCrop", "height": 8, "width": 8, "max_shar": 1},
            r"augmentation\.s\.max_shar=1 .*Did you mean 'max_share'\?",
        ),
        (
            {"transform": "CategoryLimitedCrop", "height": 0, "width": 8},
            r"augmentation\.s \(Cat.*height=0: .*greater",
        ),
        (
            {"transform": "CategoryLimitedCrop", "width": 8},
            r"augmentation\.s \(CategoryLimitedCrop\): .*height",
        ),
        ({"transform": "HorizontalFlip", "p": 1.5}, r"augmentation\.s \(HorizontalFlip\): p=1\.5: "),
        (
            {"transform": "RandomScale", "scale_limit": "big"},
            r"augmentation\.s \(RandomScale\): scale_limit='big'",
        ),
    ],
)
def test_a_mistake_in_a_step_is_named(step: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_train_transform({"s": step}, MEAN, STD)


@pytest.mark.parametrize(("mean", "std"), [((0.5,), (0.5,)), ((0, 0, 0), (1, 0, 1))])
def test_mean_and_std_must_be_three_numbers(mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    with pytest.raises(ConfigError, match=r"mean=.* and std=.* must be three numbers each"):
        build_eval_transform(mean, std)


@pytest.mark.parametrize(
    "step",
    [
        {"transform": "Normalize"},
        {"transform": "ToFloat"},
        {"transform": "ToTensorV2"},
        {"transform": "ToGray", "num_output_channels": 1},
    ],
)
def test_steps_that_convert_the_image_are_refused(step: dict[str, Any]) -> None:
    transform = build_train_transform({"s": {**step, "p": 1}}, MEAN, STD)
    with pytest.raises(ConfigError, match=r"data\.augmentation: a step returned an image that is not uint8"):
        transform(make_sample())


@pytest.mark.parametrize(
    "step",
    [
        {"transform": "Mosaic"},
        {"transform": "RandomCropNearBBox", "max_part_shift": 0.1},
        {"transform": "RandomCrop", "height": 4000, "width": 4000, "pad_if_needed": False},
    ],
)
def test_a_step_that_cannot_be_applied_is_named_with_the_sample(step: dict[str, Any]) -> None:
    steps = {"flip": {"transform": "HorizontalFlip"}, "mine": {**step, "p": 1.0}}
    sample: Sample = {"image": np.zeros((8, 8, 3), np.uint8), "mask": np.zeros((8, 8), np.uint8), "name": "street_1"}
    with pytest.raises(ConfigError, match=r"^data\.augmentation\.mine: cannot be applied to street_1 \("):
        build_train_transform(steps, [0.5] * 3, [0.25] * 3)(sample)


@pytest.mark.parametrize("error", [Preempted("stopped by SIGTERM."), MemoryError()])
def test_what_is_no_fault_of_a_step_passes(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **keywords: Any) -> None:
        raise error

    monkeypatch.setattr(A.HorizontalFlip, "apply", fail)
    sample: Sample = {"image": np.zeros((8, 8, 3), np.uint8), "mask": np.zeros((8, 8), np.uint8), "name": "street_1"}
    with pytest.raises(type(error)):
        build_train_transform({"flip": {"transform": "HorizontalFlip", "p": 1.0}}, [0.5] * 3, [0.25] * 3)(sample)


def test_the_package_that_takes_albumentations_place_is_named_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EMA_SEG_WARNED_OF_ALBUMENTATIONSX", "")
    monkeypatch.delenv("EMA_SEG_WARNED_OF_ALBUMENTATIONSX")
    build_eval_transform(MEAN, STD)
    assert capsys.readouterr().err == ""
    (tmp_path / "albumentationsx-2.0.0.dist-info").mkdir()
    (tmp_path / "albumentationsx-2.0.0.dist-info" / "METADATA").write_text("Name: albumentationsx\nVersion: 2.0.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    for _ in range(2):
        build_eval_transform(MEAN, STD)
    told = capsys.readouterr().err
    assert told.count("warning: this environment holds albumentationsx (AGPL)") == 1
    assert "pip uninstall albumentationsx && pip install --force-reinstall 'albumentations" in told
