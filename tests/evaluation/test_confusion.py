"""Tests of the scores against the two benchmarks' own definitions, on random and degenerate inputs."""

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from cityscapesscripts.evaluation import evalPixelLevelSemanticLabeling as cityscapes
from cityscapesscripts.helpers.labels import labels as cityscapes_labels
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ema_seg.evaluation import ConfusionMatrix
from ema_seg.runtime.errors import ConfigError, DataError, ModelError

# --- ADE20K ----------------------------------------------------------------------------------------------


def ade20k_scores(predictions: list[np.ndarray], truths: list[np.ndarray], num_classes: int) -> dict:
    """Compute the scores by the challenge's definition: labels 1..K, 0 = unlabelled; areas are summed over images."""
    intersection, predicted, labelled = (np.zeros(num_classes) for _ in range(3))
    correct = 0
    for prediction, truth in zip(predictions, truths, strict=True):
        truth = np.where(truth == 255, 0, truth.astype(int) + 1)
        prediction = (prediction.astype(int) + 1) * (truth > 0)
        hit = prediction * (prediction == truth)
        bins = {"bins": num_classes, "range": (1, num_classes + 1)}
        intersection += np.histogram(hit, **bins)[0]
        predicted += np.histogram(prediction, **bins)[0]
        labelled += np.histogram(truth, **bins)[0]
        correct += int((hit > 0).sum())
    union = predicted + labelled - intersection
    iou = [i / u if u else math.nan for i, u in zip(intersection, union, strict=True)]
    accuracy = [i / n for i, n in zip(intersection, labelled, strict=True) if n]
    total = labelled.sum()
    defined = [value for value in iou if not math.isnan(value)]
    return {
        "iou": iou,
        "miou": sum(defined) / len(defined) if defined else math.nan,
        "mean_accuracy": sum(accuracy) / len(accuracy) if accuracy else math.nan,
        "pixel_accuracy": correct / total if total else math.nan,
        "fw_iou": sum(n / total * v for n, v in zip(labelled, iou, strict=True) if n) if total else math.nan,
    }


@st.composite
def labelled_images(draw: st.DrawFn) -> tuple[int, list[np.ndarray], list[np.ndarray]]:
    num_classes = draw(st.integers(1, 150))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    classes = rng.integers(0, num_classes, size=draw(st.integers(1, 6)))
    ignored = draw(st.sampled_from([0.0, 0.3, 1.0]))
    predictions, truths = [], []
    for _ in range(draw(st.integers(1, 3))):
        shape = draw(st.tuples(st.integers(1, 12), st.integers(1, 12)))
        truth = rng.choice(classes, size=shape).astype(np.uint8)
        predictions.append(np.where(rng.random(shape) < 0.5, truth, rng.choice(classes, size=shape)))
        truths.append(np.where(rng.random(shape) < ignored, np.uint8(255), truth))
    return num_classes, predictions, truths


@settings(deadline=None)
@given(labelled_images())
def test_agrees_with_the_definition_of_ade20k(case: tuple[int, list[np.ndarray], list[np.ndarray]]) -> None:
    num_classes, predictions, truths = case
    confusion = ConfusionMatrix(num_classes)
    for prediction, truth in zip(predictions, truths, strict=True):
        confusion.update(prediction, truth)
    scores, expected = confusion.compute(), ade20k_scores(predictions, truths, num_classes)
    assert scores["iou"] == pytest.approx(expected["iou"], rel=1e-12, nan_ok=True)
    for name in ("miou", "mean_accuracy", "pixel_accuracy", "fw_iou"):
        assert scores[name] == pytest.approx(expected[name], rel=1e-12, nan_ok=True), name


# --- Cityscapes ------------------------------------------------------------------------------------------

TRAIN_TO_ID = {label.trainId: label.id for label in cityscapes_labels if 0 <= label.trainId < 255}
IGNORED_IDS = [label.id for label in cityscapes_labels if label.ignoreInEval and label.id >= 0]


def cityscapes_scores(folder: Path, predictions: list[np.ndarray], truths: list[np.ndarray]) -> dict:
    """Score PNG files of label ids with the benchmark's script; arguments are train ids, 255 = ignored."""
    ids = np.zeros(256, np.uint8)
    for train_id, label_id in TRAIN_TO_ID.items():
        ids[train_id] = label_id
    rng = np.random.default_rng(0)
    files: tuple[list[str], list[str]] = ([], [])
    for index, (prediction, truth) in enumerate(zip(predictions, truths, strict=True)):
        truth_ids = np.where(truth == 255, rng.choice(IGNORED_IDS, truth.shape), ids[truth])
        for kind, array, names in zip(("pred", "gt"), (ids[prediction], truth_ids), files, strict=True):
            path = folder / f"{kind}_{index}.png"
            Image.fromarray(array.astype(np.uint8)).save(path)
            names.append(str(path))
    arguments = copy.copy(cityscapes.args)
    arguments.evalInstLevelScore, arguments.JSONOutput, arguments.quiet = False, False, True
    return cityscapes.evaluateImgLists(*files, arguments)


def cityscapes_cases() -> dict[str, tuple[list[np.ndarray], list[np.ndarray]]]:
    rng = np.random.default_rng(3)
    shape = (37, 53)
    truth = rng.integers(0, 19, shape)
    some = np.where(rng.random(shape) < 0.4, 255, truth)
    noisy = np.where(rng.random(shape) < 0.5, truth, rng.integers(0, 19, shape))
    few = rng.choice([0, 7, 13], shape)
    constant = np.full(shape, 4)
    return {
        "random": ([noisy], [some]),
        "several images": ([noisy, few, truth], [some, truth, few]),
        "perfect": ([truth], [truth]),
        "classes missing from truth": ([noisy], [few]),
        "classes missing from both": ([few], [np.where(few == 7, 255, few)]),
        "one class": ([constant], [constant]),
        "nothing right": ([constant], [np.full(shape, 5)]),
        "nothing labelled": ([noisy], [np.full(shape, 255)]),
        "one pixel": ([np.array([[3]])], [np.array([[3]])]),
    }


@pytest.mark.parametrize("name", cityscapes_cases())
def test_agrees_with_the_script_of_cityscapes(name: str, tmp_path: Path) -> None:
    predictions, truths = cityscapes_cases()[name]
    theirs = cityscapes_scores(tmp_path, predictions, truths)
    confusion = ConfusionMatrix(19)
    for prediction, truth in zip(predictions, truths, strict=True):
        confusion.update(prediction, truth)

    order = [TRAIN_TO_ID[train_id] for train_id in range(19)]
    assert confusion.matrix.tolist() == np.array(theirs["confMatrix"])[np.ix_(order, order)].tolist()
    names = {label.id: label.name for label in cityscapes_labels}
    scores = confusion.compute()
    assert scores["iou"] == pytest.approx([theirs["classScores"][names[i]] for i in order], abs=0, nan_ok=True)
    assert scores["miou"] == pytest.approx(theirs["averageScoreClasses"], rel=1e-12, nan_ok=True)


# --- By hand ---------------------------------------------------------------------------------------------


def test_scores_of_a_case_worked_out_by_hand() -> None:
    confusion = ConfusionMatrix(4)
    # Truth: 3 pixels of class 0, 1 of class 1. Class 2 is only predicted; class 3 only at an ignored pixel.
    confusion.update(torch.tensor([0, 0, 2, 1, 3]), torch.tensor([0, 0, 0, 1, 255]))
    scores = confusion.compute()
    assert confusion.matrix.tolist() == [[2, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert scores["iou"] == pytest.approx([2 / 3, 1.0, 0.0, math.nan], nan_ok=True)
    assert scores["miou"] == pytest.approx((2 / 3 + 1 + 0) / 3)
    assert scores["mean_accuracy"] == pytest.approx((2 / 3 + 1) / 2)
    assert scores["pixel_accuracy"] == pytest.approx(3 / 4)
    assert scores["fw_iou"] == pytest.approx(3 / 4 * 2 / 3 + 1 / 4)
    assert confusion.absent == [3]
    assert confusion.intersection.tolist() == [2, 1, 0, 0]
    assert confusion.union.tolist() == [3, 1, 1, 0]


def test_nothing_labelled_has_no_score() -> None:
    confusion = ConfusionMatrix(2)
    confusion.update(np.zeros((2, 2), int), np.full((2, 2), 255))
    confusion.update(np.zeros((0, 3), int), np.zeros((0, 3), int))
    assert all(np.isnan(value).all() for value in confusion.compute().values())
    assert confusion.absent == [0, 1]


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.int64])
def test_arrays_and_tensors_of_any_integer_type_and_layout_count_alike(dtype: type) -> None:
    rng = np.random.default_rng(0)
    truth, prediction = rng.integers(0, 150, (2, 8, 6)), rng.integers(0, 150, (2, 8, 6))
    truth[0, 0, :3] = 255
    expected = ConfusionMatrix(150)
    expected.update(torch.from_numpy(prediction), torch.from_numpy(truth))
    assert int(expected.matrix.sum()) == 2 * 8 * 6 - 3

    variants = ConfusionMatrix(150)
    variants.update(prediction.astype(dtype)[:, ::-1].transpose(0, 2, 1), truth.astype(dtype)[:, ::-1].swapaxes(1, 2))
    assert torch.equal(variants.matrix, expected.matrix)
    tensors = ConfusionMatrix(150)
    tensors.update(torch.from_numpy(prediction.astype(dtype)).mT, torch.from_numpy(truth).mT)
    assert torch.equal(tensors.matrix, expected.matrix)


def test_inputs_are_left_as_they_were() -> None:
    truth = torch.tensor([0, 255, 1], dtype=torch.uint8)
    ConfusionMatrix(2).update(truth, truth)
    assert truth.tolist() == [0, 255, 1]


def test_merging_equals_counting_together() -> None:
    rng = np.random.default_rng(1)
    pairs = [rng.integers(0, 3, (2, 5, 5)) for _ in range(4)]
    together, merged = ConfusionMatrix(3), ConfusionMatrix(3)
    for prediction, truth in pairs:
        together.update(prediction, truth)
        part = ConfusionMatrix(3)
        part.update(prediction, truth)
        merged.merge(part)
    assert torch.equal(together.matrix, merged.matrix)
    assert merged.matrix.dtype == torch.int64
    with pytest.raises(ConfigError, match="same number of classes, got 3 and 4"):
        merged.merge(ConfusionMatrix(4))


def test_ignore_index_can_be_another() -> None:
    confusion = ConfusionMatrix(2, ignore_index=-1)
    confusion.update(np.array([0, 1, 1]), np.array([0, 1, -1]))
    assert confusion.matrix.tolist() == [[1, 0], [0, 1]]


def test_a_prediction_where_truth_is_ignored_may_be_anything() -> None:
    truth = np.array([[0, 255]], np.uint8)
    confusion = ConfusionMatrix(1)
    confusion.update(truth, truth)
    assert confusion.compute()["miou"] == 1.0


@pytest.mark.parametrize(
    ("prediction", "truth", "error", "message"),
    [
        ([2], [1], ModelError, "prediction must hold classes from 0 to 1, got 2"),
        ([-1], [1], ModelError, "prediction must hold classes from 0 to 1, got -1"),
        ([0], [7], DataError, "target must hold .* or the ignore index 255, got 7"),
        ([0, 1], [0], ModelError, r"target's shape \(1,\), got \(2,\)"),
        ([0.0], [0], ModelError, "prediction must have an integer dtype .*, got float64"),
        (
            torch.zeros(1),
            torch.zeros(1, dtype=torch.long),
            ModelError,
            "prediction must have an integer dtype .*, got torch.float32",
        ),
    ],
)
def test_mistakes_are_named(prediction: object, truth: object, error: type[Exception], message: str) -> None:
    confusion = ConfusionMatrix(2)
    with pytest.raises(error, match=message):
        confusion.update(prediction, truth)
    assert confusion.matrix.sum() == 0


def test_no_classes_is_an_error() -> None:
    with pytest.raises(ConfigError, match="num_classes=0"):
        ConfusionMatrix(0)
