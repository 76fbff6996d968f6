"""Tests of counting in a thread of its own."""

import threading
from contextlib import closing

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from ema_seg.evaluation.counter import Counter
from ema_seg.models.head import RowLogits
from ema_seg.runtime.errors import DataError, ModelError


def logits_of(label: int) -> RowLogits:
    features = torch.zeros(1, 3, 4, 5)
    features[0, label] = 1
    return RowLogits(features)


def test_results_come_in_order_from_another_thread() -> None:
    def count(name: str, prediction: NDArray[np.integer], truth: NDArray[np.integer]) -> tuple[str, int, bool]:
        assert threading.current_thread() is not threading.main_thread()
        return name, int(prediction.max()), bool((prediction == truth).all())

    with closing(Counter(3, count)) as counter:
        for index in range(40):  # more than may wait
            counter.add(str(index), logits_of(index % 3), torch.full((4, 5), index % 3, dtype=torch.uint8))
        assert counter.results() == [(str(index), index % 3, True) for index in range(40)]
        assert counter.results() == []


def test_a_mistake_in_an_image_ends_the_evaluation_with_its_name() -> None:
    def count(name: str, prediction: NDArray[np.integer], truth: NDArray[np.integer]) -> None:
        if truth.max() > 2:
            raise DataError("got 3.")

    with closing(Counter(3, count)) as counter:
        counter.add("first", logits_of(0), torch.zeros(4, 5))
        counter.add("second", logits_of(0), torch.full((4, 5), 3))
        with pytest.raises(DataError, match=r"^second: got 3\.$"):
            counter.results()


def test_another_number_of_classes_is_named() -> None:
    counter = Counter(4, lambda *_: None)
    with closing(counter), pytest.raises(ModelError, match="predicts 3 classes but the data set has 4"):
        counter.add("x", logits_of(0), torch.zeros(4, 5))
