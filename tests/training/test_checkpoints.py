"""Tests of the checkpoints to resume from: a damaged one is refused with a sentence that names the damage."""

import copy

import pytest
import torch
from torch import nn
from torch.optim import AdamW

from ema_seg.runtime.errors import CheckpointError
from ema_seg.training.checkpoints import AtomicCheckpoints, load_last, require_fitting_state
from tests.models.test_checkpoint import CHECKPOINT

NAN = float("nan")
MODEL = nn.Linear(2, 3)
LOOP = ("loops", "fit_loop")
STATE = ("optimizer_states", 0, "state", 0)
GROUP = ("optimizer_states", 0, "param_groups", 0)


def make_optimizer():
    return AdamW(MODEL.parameters(), lr=0.1)


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
        "callbacks": {
            "BestCheckpoint{'monitor': 'val/miou'}": {},
            "stopper": {"wait_count": 1, "best_score": torch.tensor(-torch.inf)},
        },
        "optimizer_states": [copy.deepcopy(optimizer.state_dict())],
        "lr_schedulers": [{"last_epoch": 3, "base_lrs": [0.1]}],
        "averaging_state": {"n_averaged": torch.tensor(3)},
    }


@pytest.fixture
def run(tmp_path):
    """Return a function that saves ``last.ckpt`` of a run with one value replaced, or deleted if it is ``...``."""
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
        ((*STATE, "exp_avg"), torch.full((3, 2), NAN), "optimizer_states.0.state.0.exp_avg holds nan"),
        ((*GROUP, "lr"), NAN, "optimizer_states.0.param_groups.0.lr holds nan"),
        (("loops",), 3, "loops must hold the progress of fit_loop"),
        (LOOP, {}, "loops must hold the progress of fit_loop"),
        (
            (*LOOP, "epoch_progress", "current", "completed"),
            -1,
            "must be a whole number of 0 or more, got -1",
        ),
        ((*LOOP, "epoch_progress", "current", "completed"), "x", "must be a whole number of 0 or more, got 'x'"),
        (("global_step",), 9, "loops must hold 9 steps, as global_step does, got 3"),
        (("epoch",), 0.5, "epoch must be a whole number of 0 or more, got 0.5"),
        (("callbacks",), [], "callbacks must hold a state for each callback"),
        (("callbacks",), {}, "callbacks must hold the record of the best checkpoint"),
        (("optimizer_states",), [], "optimizer_states must hold one state"),
        (("lr_schedulers",), [], "lr_schedulers must hold one state"),
        (("callbacks", "stopper", "wait_count"), "x", "callbacks: wait_count must be a whole number"),
        (("lr_schedulers", 0, "base_lrs"), [NAN], "lr_schedulers.0.base_lrs.0 holds nan"),
    ],
)
def test_a_damaged_state_is_refused_by_name_and_gives_way_to_the_one_before(path, value, found, run, capsys):
    folder = run(path, value)
    with pytest.raises(CheckpointError) as raised:
        load_last(folder)
    assert str(raised.value).startswith(f"ckpt={folder / 'checkpoints' / 'last.ckpt'}: ")
    assert found in str(raised.value)
    run(name="previous")
    assert load_last(folder)[0].name == "previous.ckpt"
    assert f"{raised.value} Resuming from previous.ckpt, step 3." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ((), None),
        ((*STATE, "exp_avg_sq"), torch.full((3, 2), torch.inf)),
        (("optimizer_states", 0, "state"), {}),  # before the first step
    ],
)
def test_a_state_that_training_may_leave_is_taken(path, value, run):
    assert load_last(run(path, value))[1]["global_step"] == 3


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (torch.zeros(5), r"exp_avg of a parameter must be of shape \(3, 2\), got \(5,\)"),
        ("x", "must be a tensor, got str"),
    ],
)
def test_a_state_of_the_optimiser_that_does_not_fit_is_refused_before_a_step(value, found, tmp_path):
    optimizer = make_optimizer()
    optimizer.load_state_dict(make_checkpoint()["optimizer_states"][0])
    require_fitting_state(optimizer, tmp_path / "last.ckpt")
    optimizer.state[MODEL.weight]["exp_avg"] = value
    with pytest.raises(CheckpointError, match=rf"last\.ckpt: its training state is damaged \(.*{found}"):
        require_fitting_state(optimizer, tmp_path / "last.ckpt")


def test_ctrl_c_within_a_checkpoint_does_not_abort_the_process(monkeypatch, tmp_path):
    archives = []

    class Interrupted(torch._C.PyTorchFileWriter):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            archives.append(self)
            raise KeyboardInterrupt

    monkeypatch.setattr(torch._C, "PyTorchFileWriter", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        AtomicCheckpoints().save_checkpoint({"global_step": 1}, tmp_path / "last.ckpt")
    archives.clear()  # frees the archive, which aborts the process if it cannot write its end

    assert not (tmp_path / "last.ckpt").exists()
