"""Tests of predicting, from numbers of epochs, batches and steps, whether a training reaches a validation."""

import itertools

import pytest

from ema_seg.training.validation import TrainingPlan, explain_missing_validation


@pytest.mark.parametrize(
    ("course", "obstacle"),
    [
        (TrainingPlan(4, 4, epochs=1), None),
        (TrainingPlan(4, 2, epochs=1), None),
        (TrainingPlan(4, 4, every=3, epochs=3), None),
        (
            TrainingPlan(4, 4, every=4, epochs=3),
            "trainer.check_val_every_n_epoch=4: no epoch from 1 to the last one, 3,",
        ),
        (TrainingPlan(4, 4, every=4, epochs=3, epoch=1, total=4, step=4), "no epoch from 2 to the last one, 3,"),
        (TrainingPlan(4, 4, every=2, epochs=3, epoch=2, total=8, step=8), "no epoch from 3 to the last one, 3,"),
        (TrainingPlan(4, 4, steps=4), None),
        (
            TrainingPlan(4, 4, steps=3),
            "trainer.max_steps=3: the training ends before its first validation, after step 4,",
        ),
        (TrainingPlan(4, 4, steps=1, epochs=9), "trainer.max_steps=1"),
        (TrainingPlan(4, 2, steps=2), None),
        (TrainingPlan(4, 4, every=2, steps=7), "after step 8"),
        (TrainingPlan(5, 5, steps=2, accumulate=2), "after step 3"),
        (TrainingPlan(5, 5, steps=3, accumulate=2), None),
        (TrainingPlan(4, 4, epochs=1, batch=3, total=3, step=3), None),
        (TrainingPlan(4, 3, epochs=1, batch=3, total=3, step=3), "check_val_every_n_epoch=1"),
        (TrainingPlan(4, 10, every=None, epochs=3), None),
        (
            TrainingPlan(4, 13, every=None, epochs=3),
            "trainer.val_check_interval=13: the training ends after 12 batches,",
        ),
        (TrainingPlan(4, 10, every=None, steps=9), "trainer.max_steps=9"),
    ],
)
def test_a_training_without_a_validation_is_known(course, obstacle):
    found = explain_missing_validation(course)
    assert found is None if obstacle is None else obstacle in found


def test_what_is_known_is_what_happens():
    """The prediction holds for every small training, simulated batch by batch as Lightning runs it."""
    for batches, interval, every, epochs, steps, accumulate in itertools.product(
        (1, 3, 4), (1, 2, 3, 5), (None, 1, 2, 3), (1, 2, 4), (None, 1, 3, 6), (1, 2)
    ):
        if every is not None and interval > batches:
            continue  # Lightning rejects such an interval
        course = TrainingPlan(batches, interval, every, epochs, steps, accumulate)
        assert (explain_missing_validation(course) is None) == validates(course), course


def validates(course):
    step = 0
    for total, (epoch, batch) in enumerate(itertools.product(range(course.epochs), range(course.batches)), 1):
        if step == course.steps:
            return False
        step += (batch + 1) % course.accumulate == 0 or batch + 1 == course.batches
        reached = total if course.every is None else batch + 1
        if (course.every is None or (epoch + 1) % course.every == 0) and reached % course.interval == 0:
            return True
    return False
