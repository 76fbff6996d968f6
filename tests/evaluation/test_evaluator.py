"""Tests of the evaluation of a model over a loader, and of the choice of examples."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ema_seg.data.normalise import Normalise
from ema_seg.evaluation import STRATA, ConfusionMatrix, choose_examples, predict_examples, score_images
from ema_seg.runtime.errors import DataError, ModelError

CLASSES = ("road", "car", "sky")
NORMALISE = Normalise((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


class Brightest(nn.Module):
    """Model that predicts the index of the brightest channel."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.modes: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        self.modes.append(self.training)
        return x * self.scale


def make_samples() -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    samples = []
    for index, size in enumerate([(6, 5), (4, 9), (6, 5), (3, 3)]):
        image = torch.randint(85, (3, *size), generator=generator, dtype=torch.uint8) * 3
        image += torch.arange(3, dtype=torch.uint8)[:, None, None]  # no two channels are equal
        mask = image.argmax(0).byte()
        mask[: index + 1, 0] = (mask[: index + 1, 0] + 1) % 3
        mask[0, -1] = 255
        samples.append({"image": image, "mask": mask, "name": f"image_{index}"})
    return samples


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    return {key: [sample[key] for sample in samples] for key in samples[0]}


def batches(samples: list[dict[str, Any]], size: int) -> list[dict[str, Any]]:
    return [collate(samples[start : start + size]) for start in range(0, len(samples), size)]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_counts_every_pixel_once_whatever_the_batches(batch_size: int) -> None:
    samples, model = make_samples(), Brightest().train()
    result = score_images(model, batches(samples, batch_size), CLASSES, stride=4, normalise=NORMALISE, device="cpu")
    expected = ConfusionMatrix(3)
    for sample in samples:
        expected.update(sample["image"].argmax(0), sample["mask"])
    assert torch.equal(result.confusion.matrix, expected.matrix)
    assert model.training
    assert not any(model.modes)


def test_records_rebuild_the_whole() -> None:
    samples = make_samples()
    result = score_images(Brightest(), batches(samples, 2), CLASSES, stride=4, normalise=NORMALISE, device="cpu")
    assert [record["name"] for record in result.images] == [sample["name"] for sample in samples]
    assert np.sum([record["intersection"] for record in result.images], axis=0).tolist() == (
        result.confusion.intersection.tolist()
    )
    assert np.sum([record["union"] for record in result.images], axis=0).tolist() == (result.confusion.union.tolist())
    alone = ConfusionMatrix(3)
    alone.update(samples[1]["image"].argmax(0), samples[1]["mask"])
    assert result.images[1]["miou"] == alone.compute()["miou"]
    assert result.images[1]["pixel_accuracy"] == alone.compute()["pixel_accuracy"]


def test_mistakes_are_named() -> None:
    samples = make_samples()
    with pytest.raises(ModelError, match="predicts 3 classes but the data set has 2"):
        score_images(Brightest(), batches(samples, 2), CLASSES[:2], stride=4, normalise=NORMALISE, device="cpu")
    samples[2]["mask"][0, 0] = 9
    with pytest.raises(DataError, match=r"image_2: the target must hold .*, got 9"):
        score_images(Brightest(), batches(samples, 2), CLASSES, stride=4, normalise=NORMALISE, device="cpu")
    with pytest.raises(DataError, match="no image"):
        score_images(Brightest(), [], CLASSES, stride=4, normalise=NORMALISE, device="cpu")


def records(*scores: float) -> list[Any]:
    return [{"name": str(index), "miou": score} for index, score in enumerate(scores)]


def test_examples_are_best_median_and_worst() -> None:
    chosen = choose_examples(records(0.4, 0.9, math.nan, 0.1, 0.5, 0.6))
    assert chosen == {"best": 1, "median": 4, "worst": 3}
    assert list(chosen) == ["best", "median", "worst"]


def test_examples_do_not_repeat_an_image() -> None:
    assert choose_examples(records(0.2, 0.3)) == {"best": 1, "worst": 0}
    assert choose_examples(records(0.2)) == {"best": 0}
    assert choose_examples(records(math.nan)) == {}


def test_examples_are_predicted_again() -> None:
    samples, model = make_samples(), Brightest()
    result = score_images(model, batches(samples, 2), CLASSES, stride=4, normalise=NORMALISE, device="cpu")
    examples = predict_examples(model, samples, result.images, stride=4, normalise=NORMALISE, device="cpu")
    assert len(examples) == 3
    for (label, index), example in zip(choose_examples(result.images).items(), examples, strict=True):
        sample = samples[index]
        assert example["title"].startswith(f"{label}: {sample['name']}")
        assert np.array_equal(example["prediction"], sample["image"].argmax(0).numpy())
        assert np.array_equal(example["truth"], sample["mask"].numpy())
        assert np.array_equal(example["image"], sample["image"].permute(1, 2, 0))


def test_predictions_are_handed_over_one_by_one() -> None:
    samples = make_samples()
    handed: list[tuple[str, np.ndarray]] = []
    result = score_images(
        Brightest(),
        batches(samples, 2),
        CLASSES,
        stride=4,
        normalise=NORMALISE,
        device="cpu",
        on_prediction=lambda name, prediction: handed.append((name, prediction)),
    )
    assert [name for name, _ in handed] == [record["name"] for record in result.images]
    for sample, (_, prediction), record in zip(samples, handed, result.images, strict=True):
        assert np.array_equal(prediction, sample["image"].argmax(0).numpy())
        for key in ("intersection", "union"):
            assert np.sum([record["strata"][name][key] for name in STRATA], axis=0).tolist() == record[key]
