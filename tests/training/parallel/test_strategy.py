"""Tests of the choice of GPUs for a training; the GPUs are simulated, and nothing is computed on them."""

import pytest
import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import nn

from ema_seg.runtime.distributed.ranks import RankInfo
from ema_seg.runtime.errors import ConfigError
from ema_seg.training import resolve_world_size, set_cuda_device
from ema_seg.training.parallel import strategy
from ema_seg.training.parallel.sharded import ShardedStrategy


@pytest.fixture
def machine(monkeypatch):
    """Return a function that simulates a number of GPUs and the rank of this process."""

    def pretend(gpus, place=None):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(strategy, "rank_info", lambda: place or RankInfo())

    return pretend


@pytest.mark.parametrize(
    ("devices", "processes"), [("auto", 4), (-1, 4), (None, 4), (2, 2), ("3", 3), ([3], 1), ([0, 3], 2)]
)
def test_a_process_for_each_gpu(machine, devices, processes):
    machine(4)

    assert resolve_world_size({"accelerator": "gpu", "devices": devices}) == processes


@pytest.mark.parametrize(
    ("devices", "message"),
    [(5, "devices=5: must be at most 4, the number of GPUs"), ([1, 4], "are 0 to 3, got 4")],
)
def test_gpus_that_are_not_there_are_refused(machine, devices, message):
    machine(4)

    with pytest.raises(ConfigError, match=message):
        resolve_world_size({"accelerator": "auto", "devices": devices})


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (RankInfo(1, 2, 1, 2), "2 processes on this machine, but each sees 1 GPU; .*--gpus-per-node"),
        (RankInfo(2, 3, 0, 2), "has started 2 of 3 processes on this machine; start the same number on each"),
    ],
)
def test_groups_that_do_not_fit_the_machines_are_refused(machine, place, message):
    machine(1, place)

    with pytest.raises(ConfigError, match=message):
        resolve_world_size({"accelerator": "auto", "devices": "auto"}, "Slurm")


@pytest.mark.parametrize(
    ("place", "devices", "expected"),
    [
        (RankInfo(), 1, "cuda:0"),
        (RankInfo(), [3], "cuda:3"),
        (RankInfo(1, 2, 1, 2), 2, "cuda:1"),
        (RankInfo(3, 4, 1, 2), [0, 2], "cuda:2"),
    ],
)
def test_a_gpu_without_a_number_is_the_one_of_the_training(machine, monkeypatch, place, devices, expected):
    """A model is then tested on the GPU that it was trained on, and each rank has its own GPU."""
    taken = []
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    machine(4, place)

    set_cuda_device({"accelerator": "auto", "devices": devices})
    set_cuda_device({"accelerator": "cpu", "devices": 2})

    assert taken == [torch.device(expected)]


def test_a_process_by_itself_is_the_first_whatever_rank_the_environment_has(monkeypatch):
    monkeypatch.setattr(rank_zero_only, "rank", 3)  # Lightning reads it from RANK at import

    strategy.trainer_arguments({"devices": 1})

    assert rank_zero_only.rank == 0


def test_a_model_in_pieces_has_no_wrapper_on_gpus_either(monkeypatch):
    monkeypatch.setattr(ShardedStrategy, "root_device", torch.device("cuda", 0))
    sharded = ShardedStrategy()
    sharded._model = nn.Linear(2, 2)

    sharded._register_ddp_hooks()

    assert type(sharded.model) is nn.Linear
