"""Check of a training before its first step: it must reach a validation, or no checkpoint is chosen."""

from typing import NamedTuple

from lightning import Trainer

from ema_seg.runtime.errors import ConfigError

__all__ = ["TrainingPlan", "explain_missing_validation", "require_validation"]


class TrainingPlan(NamedTuple):
    """Course of a training: its validations, its end and its start.

    Attributes:
        batches: batches per epoch.
        interval: batches between validations.
        every: validations run in every n-th epoch; None counts ``interval`` across epochs.
        epochs: epochs after which the training ends; None for no limit.
        steps: optimiser steps after which the training ends; None for no limit.
        accumulate: batches per optimiser step.
        epoch: completed epochs.
        batch: completed batches of the current epoch.
        total: completed batches of all epochs.
        step: completed optimiser steps.
    """

    batches: int
    interval: int
    every: int | None = 1
    epochs: int | None = None
    steps: int | None = None
    accumulate: int = 1
    epoch: int = 0
    batch: int = 0
    total: int = 0
    step: int = 0


def require_validation(trainer: Trainer) -> None:
    """Check that the training reaches a validation, as far as that does not depend on time.

    Args:
        trainer: the trainer, just before its first step.

    Raises:
        ConfigError: the training ends before its first validation.
    """
    loop = trainer.fit_loop
    if not isinstance(trainer.val_check_batch, int):
        return  # validations are timed
    progress = loop.epoch_loop.batch_progress
    course = TrainingPlan(
        batches=int(loop.max_batches),
        interval=trainer.val_check_batch,
        every=trainer.check_val_every_n_epoch,
        epochs=loop.max_epochs if (loop.max_epochs or -1) > 0 else None,
        steps=trainer.max_steps if trainer.max_steps >= 0 else None,
        accumulate=trainer.accumulate_grad_batches,
        epoch=trainer.current_epoch,
        batch=0 if progress.is_last_batch else progress.current.ready,
        total=progress.total.ready,
        step=trainer.global_step,
    )
    if obstacle := explain_missing_validation(course):
        raise ConfigError(obstacle)


def explain_missing_validation(course: TrainingPlan) -> str | None:
    """Describe the setting that prevents the first validation of a training; None if the training reaches it."""
    needed = _batches_to_validation(course)
    if course.epochs is not None:
        remaining = (course.epochs - course.epoch) * course.batches - course.batch
        if needed > remaining and course.every is None:
            return (
                f"trainer.val_check_interval={course.interval}: the training ends after {remaining} batches, before "
                f"its first validation, so that no checkpoint could be chosen; set {max(1, remaining)} or less, or "
                "raise epochs."
            )
        if needed > remaining:
            return (
                f"trainer.check_val_every_n_epoch={course.every}: no epoch from {course.epoch + 1} to the last one, "
                f"{course.epochs}, would be validated, so that no checkpoint could be chosen; set 1, or raise epochs."
            )
    if course.steps is not None and course.step + _steps(course, needed - 1) >= course.steps:
        return (
            f"trainer.max_steps={course.steps}: the training ends before its first validation, after step "
            f"{course.step + _steps(course, needed)}, so that no checkpoint could be chosen; raise it, or validate "
            "earlier (trainer.check_val_every_n_epoch, trainer.val_check_interval)."
        )
    return None


def _batches_to_validation(course: TrainingPlan) -> int:
    if course.every is None:
        return course.interval - course.total % course.interval
    if (course.epoch + 1) % course.every == 0:
        needed = course.interval - course.batch % course.interval
        if course.batch + needed <= course.batches:
            return needed
    following = (course.epoch + 1) // course.every * course.every + course.every - 1
    return (following - course.epoch) * course.batches - course.batch + course.interval


def _steps(course: TrainingPlan, batches: int) -> int:
    """Count the optimiser steps in the next ``batches`` batches; the last batch of an epoch always ends a step."""
    epochs, rest = divmod(course.batch + batches, course.batches)
    each = -(-course.batches // course.accumulate)
    return epochs * each + rest // course.accumulate - course.batch // course.accumulate
