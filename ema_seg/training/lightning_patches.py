"""Lightning's internals that a training needs, each with its reason (Lightning 2.6)."""

import warnings

from lightning import Trainer

__all__ = ["ignore_warnings", "patch_trainer", "validates_next"]

# Warnings of the libraries about themselves, or about behaviour that is intended here.
_IGNORED = (
    r".*isinstance\(treespec, LeafSpec\)",
    r"Checkpoint directory .* exists and is not empty",
    r"The number of training batches .* is smaller than the logging interval",
    r"The '.*_dataloader' does not have many workers",
    r"You're resuming from a checkpoint that ended before the epoch ended",  # the data module resumes within the epoch
    r"`broadcast_buffers` is deprecated",  # some supported versions of torch lack the new name
    r"Found \d+ module\(s\) in eval mode at the start of training",  # those that freeze.parts names
    r"Grad strides do not match bucket view strides",  # single-channel weights: strides are ambiguous
    r"It is recommended to use `self.log\(.*sync_dist=True\)`",  # the values are equal on all ranks
)


def ignore_warnings() -> None:
    """Ignore warnings of the libraries that are no concern of the user."""
    for message in _IGNORED:
        warnings.filterwarnings("ignore", message)


def patch_trainer(trainer: Trainer) -> None:
    """Override three private hooks that Lightning has no setting for.

    - ``register_signal_handlers``: :class:`Preemption` handles the signals. Lightning's handler ends a training without
      a checkpoint, and broadcasts the signal to the other ranks, even in the middle of another collective.
    - ``_broadcast_sigterm_tensor``: before every step it broadcasts whether rank 0 got a signal, and so synchronises
      the GPU with the CPU.
    - ``_iteration_based_training``: a training with max_steps resumes at the end of an epoch like any other. Lightning
      would end that epoch again.
    """
    for owner, name, answer in (
        (trainer._signal_connector, "register_signal_handlers", None),
        (trainer.fit_loop.epoch_loop, "_broadcast_sigterm_tensor", None),
        (trainer.fit_loop, "_iteration_based_training", False),
    ):
        assert callable(getattr(owner, name))
        vars(owner)[name] = lambda answer=answer: answer


def validates_next(trainer: Trainer) -> bool:
    """Return whether a validation follows the batch that has just ended; a checkpoint before it would skip it."""
    loop = trainer.fit_loop
    return loop.epoch_loop._should_check_val_fx(loop._data_fetcher)  # type: ignore[arg-type]  # not None by now
