"""Tests that the private names of Lightning that we override exist, and are replaced."""

import pytest
from lightning import Trainer

from ema_seg.training.lightning_patches import patch_trainer


@pytest.fixture
def trainer(tmp_path):
    return Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, default_root_dir=tmp_path)


def test_the_hooks_are_there_and_replaced(trainer):
    hooks = [
        (trainer._signal_connector, "register_signal_handlers", None),
        (trainer.fit_loop.epoch_loop, "_broadcast_sigterm_tensor", None),
        (trainer.fit_loop, "_iteration_based_training", False),
    ]
    for owner, name, _ in hooks:
        assert callable(getattr(type(owner), name))
    patch_trainer(trainer)
    for owner, name, answer in hooks:
        assert getattr(owner, name)() is answer


def test_a_checkpoint_can_tell_whether_a_validation_follows(trainer):
    assert callable(trainer.fit_loop.epoch_loop._should_check_val_fx)
    assert hasattr(trainer.fit_loop, "_data_fetcher")
