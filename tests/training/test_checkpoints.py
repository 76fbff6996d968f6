"""Checkpoints that a training goes on from: whole, or refused in a sentence."""

import copy

import pytest
import torch
from lightning import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import nn
from torch.optim import SGD, AdamW

from ema_seg.errors import CheckpointError
from ema_seg.training.checkpoints import explain_restoring, load_last, restoring
from tests.models.test_checkpoint import CHECKPOINT

NAN = float("nan")
MODEL = nn.Linear(2, 3)
LOOP = ("loops", "fit_loop")
STATE = ("optimizer_states", 0, "state", 0)
GROUP = ("optimizer_states", 0, "param_groups", 0)


def make_optimizer(kind=AdamW):
    return kind(MODEL.parameters(), lr=0.1)


def make_checkpoint():
    optimizer = make_optimizer()
    MODEL(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    progress = {"ready": 3, "completed": 3}
    return {
        **copy.deepcopy(CHECKPOINT),
        "epoch": 0,
        "global_step": 3,
        "loops": {
            "fit_loop": {
                "epoch_progress": {"current": {**progress}},
                "epoch_loop.batch_progress": {"current": {**progress}, "is_last_batch": False},
                "epoch_loop.automatic_optimization.optim_progress": {"optimizer": {"step": {"total": {**progress}}}},
            }
        },
        "callbacks": {"stopper": {"wait_count": 1, "best_score": torch.tensor(-torch.inf)}},
        "optimizer_states": [copy.deepcopy(optimizer.state_dict())],
        "lr_schedulers": [{"last_epoch": 3, "base_lrs": [0.1]}],
        "averaging_state": {"n_averaged": torch.tensor(3)},
    }


@pytest.fixture
def run(tmp_path):
    """Save ``last.ckpt`` with some values changed, or deleted by ``...``, in the folder of a run."""
    (tmp_path / "checkpoints").mkdir()

    def save(path=(), value=None, name="last"):
        checkpoint = make_checkpoint()
        if path:
            *sections, last = path
            node = checkpoint
            for section in sections:
                node = node[section]
            if value is ...:
                del node[last]
            else:
                node[last] = value
        torch.save(checkpoint, tmp_path / "checkpoints" / f"{name}.ckpt")
        return tmp_path

    return save


@pytest.mark.parametrize(
    ("path", "value", "found"),
    [
        (("state_dict", "model.head.weight"), torch.tensor([0.0, NAN]), "model.head.weight holds nan"),
        (("state_dict", "model.head.weight"), torch.tensor([-torch.inf]), "model.head.weight holds -inf"),
        (("state_dict", "model.head.weight"), 1.0, "model.head.weight must be a tensor, got float"),
        (("averaging_state", "n_averaged"), torch.tensor(NAN), "averaging_state.n_averaged holds nan"),
        (("optimizer_states",), [], "optimizer_states must hold one optimiser's state and param_groups"),
        (("optimizer_states",), ["x"], "optimizer_states must hold one optimiser's state and param_groups"),
        ((*STATE, "exp_avg"), torch.full((3, 2), NAN), "optimizer_states.0.state.0.exp_avg holds nan"),
        ((*STATE, "exp_avg"), torch.zeros(5), "state.0.exp_avg must be of shape (3, 2), got (5,)"),
        ((*STATE, "exp_avg"), "x", "state.0.exp_avg must be a tensor or a number, got str"),
        ((*STATE, "exp_avg"), ..., "optimizer_states.0.state.0 must hold exp_avg"),
        (("optimizer_states", 0, "state", 7), {"step": 1, "exp_avg": 0, "exp_avg_sq": 0}, "belongs to no parameter"),
        ((*GROUP, "lr"), "fast", "param_groups.0.lr must be like 0.1"),
        ((*GROUP, "lr"), ..., "param_groups.0.lr must be like 0.1"),
        ((*GROUP, "lr"), NAN, "optimizer_states.0.param_groups.0.lr holds nan"),
        ((*GROUP, "betas"), 0.9, "param_groups.0.betas must be like (0.9, 0.999)"),
        ((*GROUP, "params"), [0], "optimizer_states must have as many parameters as the model"),
        (("loops",), 3, "loops must hold the progress of fit_loop"),
        (LOOP, {}, "loops must hold the progress of fit_loop"),
        (
            (*LOOP, "epoch_progress", "current", "completed"),
            -1,
            "must be a whole number of 0 or more, got -1",
        ),
        ((*LOOP, "epoch_progress", "current", "completed"), "x", "must be a whole number of 0 or more, got 'x'"),
        (("global_step",), 9, "loops must have counted the 9 steps of global_step, got 3"),
        (("epoch",), 0.5, "epoch must be a whole number of 0 or more, got 0.5"),
        (("callbacks",), [], "callbacks must hold a state for each callback"),
        (("callbacks", "stopper", "wait_count"), "x", "callbacks.stopper.wait_count must be a whole number"),
        (("lr_schedulers", 0, "base_lrs"), [NAN], "lr_schedulers.0.base_lrs.0 holds nan"),
    ],
)
def test_a_damaged_state_is_refused_by_name_and_gives_way_to_the_one_before(path, value, found, run, capsys):
    folder = run(path, value)
    with pytest.raises(CheckpointError) as raised:
        load_last(folder, make_optimizer())
    assert str(raised.value).startswith(f"ckpt={folder / 'checkpoints' / 'last.ckpt'}: ")
    assert found in str(raised.value)
    run(name="previous")
    assert load_last(folder, make_optimizer())[0].name == "previous.ckpt"
    assert f"{raised.value} Going on from previous.ckpt, of step 3." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ((), None),
        ((*GROUP, "decoupled_weight_decay"), ...),  # which earlier versions of torch do not have
        ((*STATE, "exp_avg_sq"), torch.full((3, 2), torch.inf)),
        (("optimizer_states", 0, "state"), {}),  # before the first step
    ],
)
def test_a_state_that_training_may_leave_is_taken(path, value, run):
    assert load_last(run(path, value), make_optimizer())[1]["global_step"] == 3


def test_an_optimiser_of_another_kind_is_refused(run):
    with pytest.raises(CheckpointError, match=r"param_groups\.0\.momentum must be like 0"):
        load_last(run(), make_optimizer(SGD))


@pytest.mark.parametrize("key", ["state_dict", "lr_schedulers", "callbacks", "optimizer_states", "loops"])
def test_garbage_that_only_lightning_finds_is_a_sentence(key, tmp_path):
    def make_trainer():
        options = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        return Trainer(max_epochs=1, limit_train_batches=1, limit_val_batches=0, default_root_dir=tmp_path, **options)

    trainer, path = make_trainer(), tmp_path / "last.ckpt"
    trainer.fit(BoringModel())
    trainer.save_checkpoint(path)
    torch.save({**torch.load(path, weights_only=True), key: 3}, path)
    resumed = make_trainer()
    explain_restoring(resumed, path)
    with pytest.raises(CheckpointError, match=r"last\.ckpt: the state of the training in it is damaged \("):
        resumed.fit(BoringModel(), ckpt_path=path, weights_only=True)


def test_only_what_is_about_the_state_becomes_an_error_of_the_checkpoint(tmp_path):
    for error in (OSError(5, "lost"), CheckpointError("known"), torch.OutOfMemoryError("no room")):
        with pytest.raises(type(error), match=str(error).replace("[", r"\[")), restoring(tmp_path):
            raise error
