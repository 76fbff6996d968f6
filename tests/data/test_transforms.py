from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import albumentations as A
import numpy as np
import pytest
import torch
from scipy.stats import ks_2samp
from torch.utils.data import DataLoader, Dataset

from ema_seg.data.base import IGNORE_INDEX, Sample
from ema_seg.data.transforms import (
    CategoryLimitedCrop,
    ScaledCrop,
    TensorSample,
    build_train_transform,
    to_tensors,
)
from ema_seg.runtime.errors import ConfigError, Preempted
from tests.data.builders import random_image, random_mask

MEAN = (0.485, 0.456, 0.406)
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


def test_an_evaluation_sample_is_the_files_bytes() -> None:
    sample = make_sample(values=(0, 3, 255))
    sample["image"].setflags(write=False)  # as in a cache
    transformed = to_tensors(sample)
    assert transformed["image"].dtype == transformed["mask"].dtype == torch.uint8
    np.testing.assert_array_equal(transformed["image"].permute(1, 2, 0), sample["image"])
    np.testing.assert_array_equal(transformed["mask"], sample["mask"])
    assert transformed["name"] == "a"


def test_training_samples_have_the_crop_size_and_only_known_train_ids() -> None:
    transform = build_train_transform(STEPS, MEAN)
    for _ in range(20):
        transformed = transform(make_sample())
        assert transformed["image"].shape == (3, 24, 32)
        assert transformed["image"].permute(1, 2, 0).is_contiguous()
        assert transformed["mask"].shape == (24, 32)
        assert set(transformed["mask"].unique().tolist()) <= {0, 3, 7, 255}


@pytest.mark.parametrize("name", ["Rotate", "Affine", "ElasticTransform", "PadIfNeeded", "GridDistortion"])
def test_geometric_steps_ignore_what_lies_outside_the_image(name: str) -> None:
    arguments: dict[str, Any] = {"Rotate": {"limit": [45, 45]}, "Affine": {"translate_percent": 0.3}}.get(name, {})
    arguments |= {"min_height": 60, "min_width": 90} if name == "PadIfNeeded" else {}
    step = {"transform": name, "p": 1, "mask_interpolation": 1, **arguments}
    if name == "PadIfNeeded":
        del step["mask_interpolation"]
    transform = build_train_transform({"step": step}, MEAN)
    mask = transform(make_sample(values=(20, 200)))["mask"]
    assert set(mask.unique().tolist()) <= {20, 200, 255}
    if name in {"Rotate", "Affine", "PadIfNeeded"}:
        assert (mask == IGNORE_INDEX).any()


def test_a_null_step_is_left_out_and_order_is_kept() -> None:
    transform = build_train_transform({"scale": None, "photometric": None}, MEAN)
    assert torch.equal(transform(make_sample())["image"], to_tensors(make_sample())["image"])


@pytest.mark.parametrize(
    "options", [{"transform": "CategoryLimitedCrop"}, {"transform": "ScaledCrop", "scale": [1, 1]}]
)
def test_smaller_images_are_padded_at_the_right_and_the_bottom(options: dict[str, Any]) -> None:
    steps = {"crop": {**options, "height": 60, "width": 80}}
    transformed = build_train_transform(steps, MEAN)(make_sample(values=(0, 3)))
    outside = torch.ones(60, 80, dtype=torch.bool)
    outside[:48, :64] = False
    assert torch.equal(transformed["mask"] == IGNORE_INDEX, outside)
    padding = torch.tensor(MEAN).mul(255).round()[:, None]
    assert torch.equal(transformed["image"][:, outside].float(), padding.expand(3, int(outside.sum())))
    np.testing.assert_array_equal(transformed["mask"][:48, :64], make_sample(values=(0, 3))["mask"])


CROPS = [CategoryLimitedCrop, partial(ScaledCrop, scale=(1, 1))]


def crop_once(crop_class: Callable[..., A.DualTransform], mask: np.ndarray, **arguments: Any) -> np.ndarray:
    crop = crop_class(height=8, width=8, **arguments)
    return crop(image=np.zeros((*mask.shape, 3), np.uint8), mask=mask)["mask"]


def largest_share(mask: np.ndarray) -> float:
    counts = np.bincount(mask[mask != IGNORE_INDEX], minlength=1)
    return counts.max() / max(counts.sum(), 1)


@pytest.mark.parametrize("crop", CROPS)
def test_crops_with_too_much_of_one_class_are_drawn_again(crop: Callable[..., A.DualTransform]) -> None:
    mask = np.zeros((8, 64), np.uint8)  # left half: one class; right half: two classes in stripes
    mask[::2, 32:] = 1
    assert all(largest_share(crop_once(crop, mask, tries=50)) <= 0.75 for _ in range(30))
    assert any(largest_share(crop_once(crop, mask, tries=1)) > 0.75 for _ in range(30))


@pytest.mark.parametrize("crop", CROPS)
def test_the_last_crop_stands_where_none_would_do(crop: Callable[..., A.DualTransform]) -> None:
    assert (crop_once(crop, np.full((20, 20), 4, np.uint8)) == 4).all()


@pytest.mark.parametrize("crop", CROPS)
def test_ignored_pixels_do_not_count_in_the_share(crop: Callable[..., A.DualTransform]) -> None:
    mask = np.full((8, 16), IGNORE_INDEX, np.uint8)
    mask[0, :2] = mask[1, 8] = 1
    mask[0, 0] = 2  # balanced only in crops with the first two columns
    assert all({1, 2} <= set(crop_once(crop, mask, tries=200)[0]) for _ in range(5))
    assert all((crop_once(crop, mask, max_share=1, tries=200) != IGNORE_INDEX).any() for _ in range(5))


def regions(steps: dict[str, Any], count: int) -> np.ndarray:
    """Draw crops of an image whose colours are its coordinates; return first row, first column and scale of each."""
    rows, columns = np.mgrid[:200, :240].astype(np.uint8)
    mask = np.zeros((200, 240), np.uint8)
    mask[:, 170:] = 1  # crops left of it are drawn again
    sample: Sample = {"image": np.stack([rows, columns, columns], -1), "mask": mask, "name": "a"}
    transform = build_train_transform(steps, MEAN)
    images = [transform(sample)["image"].double() for _ in range(count)]
    return np.array([(x[0, 0, 0], x[1, 0, 0], 63 / (x[0, 63, 0] - x[0, 0, 0])) for x in images])


def test_scale_and_place_are_distributed_as_if_the_whole_image_were_scaled() -> None:
    steps = {
        "scale": {"transform": "RandomScale", "scale_limit": [-0.5, 1.0], "p": 1},
        "crop": {"transform": "CategoryLimitedCrop", "height": 64, "width": 80},
    }
    whole = regions(steps, 1500)
    scaled = regions({"crop": {"transform": "ScaledCrop", "height": 64, "width": 80, "scale": [0.5, 2.0]}}, 1500)

    for first, second in zip(whole.T, scaled.T, strict=True):
        assert ks_2samp(first, second).pvalue > 0.01
    assert scaled[:, 2].min() < 0.55 and scaled[:, 2].max() > 1.9


def test_only_the_region_of_the_crop_is_resampled() -> None:
    """An image and a mask that both show their coordinates stay aligned, at every scale."""
    rows, columns = np.mgrid[:96, :128].astype(np.uint8)
    sample: Sample = {"image": np.stack([rows, columns, rows], -1), "mask": columns % 100, "name": "a"}
    for scale in (0.5, 0.8, 1.0, 1.7, 2.0):
        steps = {"crop": {"transform": "ScaledCrop", "height": 40, "width": 48, "scale": [scale, scale]}}
        crop = build_train_transform(steps, MEAN)(sample)
        inner = np.s_[2:-2, 2:-2]
        away = (crop["image"][1].int() % 100 - crop["mask"].int())[inner].abs()
        assert away[(away < 90) & (crop["mask"][inner] < 99)].max() <= np.ceil(0.5 / scale)


@pytest.mark.parametrize("workers", [0, 2])
def test_torch_seed_decides_the_augmentation(workers: int) -> None:
    transform = build_train_transform(STEPS, MEAN)

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
    transform = build_train_transform(steps, (0, 0, 0))
    image = make_sample()["image"][..., 0]
    corners = {int(corner) for corner in (image[0, 0], image[0, -1], image[-1, 0], image[-1, -1])}
    torch.manual_seed(0)
    seen = {int(transform(make_sample())["image"][0, 0, 0]) for _ in range(60)}
    assert seen == corners  # neither flip, either one, and both


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (
            {"transform": "HorizontalFlipp"},
            r"augmentation\.s\.transform='HorizontalFlipp'.*Did you mean 'HorizontalFlip'\?",
        ),
        (
            {"transform": "Compose"},
            r"augmentation\.s\.transform='Compose': must be ScaledCrop, CategoryLimitedCrop or a",
        ),
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
        (
            {"transform": "ScaledCrop", "height": 8, "width": 8, "scale": [0, 2]},
            r"augmentation\.s \(ScaledCrop\): scale=0: .*greater",
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
        build_train_transform({"s": step}, MEAN)


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
    transform = build_train_transform({"s": {**step, "p": 1}}, MEAN)
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
        build_train_transform(steps, [0.5] * 3)(sample)


@pytest.mark.parametrize("error", [Preempted("stopped by SIGTERM."), MemoryError()])
def test_what_is_no_fault_of_a_step_passes(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **keywords: Any) -> None:
        raise error

    monkeypatch.setattr(A.HorizontalFlip, "apply", fail)
    sample: Sample = {"image": np.zeros((8, 8, 3), np.uint8), "mask": np.zeros((8, 8), np.uint8), "name": "street_1"}
    with pytest.raises(type(error)):
        build_train_transform({"flip": {"transform": "HorizontalFlip", "p": 1.0}}, [0.5] * 3)(sample)


def test_the_package_that_takes_albumentations_place_is_named_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EMA_SEG_WARNED_OF_ALBUMENTATIONSX", "")
    monkeypatch.delenv("EMA_SEG_WARNED_OF_ALBUMENTATIONSX")
    build_train_transform({}, MEAN)
    assert capsys.readouterr().err == ""
    (tmp_path / "albumentationsx-2.0.0.dist-info").mkdir()
    (tmp_path / "albumentationsx-2.0.0.dist-info" / "METADATA").write_text("Name: albumentationsx\nVersion: 2.0.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    for _ in range(2):
        build_train_transform({}, MEAN)
    told = capsys.readouterr().err
    assert told.count("warning: this environment holds albumentationsx (AGPL)") == 1
    assert "pip uninstall albumentationsx && pip install --force-reinstall 'albumentations" in told
