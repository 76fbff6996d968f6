import importlib
import json

import pytest
import torch
from hydra import compose, initialize_config_dir
from torch import distributed

from ema_seg.cli.command_line import plain_config
from ema_seg.data.normalise import Normalise
from ema_seg.runtime.distributed import ranks
from ema_seg.runtime.distributed.ranks import RankInfo
from tests.conftest import QUICK, ROOT


@pytest.fixture
def bench():
    return importlib.import_module("bench_scaling")


def test_steps_are_timed_with_data_without_and_alone(run_benchmark, camvid_root, tmp_path):
    out = run_benchmark(
        "bench_scaling", *QUICK, "data=camvid", f"data.root={camvid_root}", "--processes", 1, 2, "--batch", 2,
        "--rounds", 1, "--steps", 1, "--accelerator", "cpu", "--output", tmp_path,
    )  # fmt: skip

    record = json.loads((tmp_path / "bench_scaling.json").read_text())
    one, two = record["result"]
    assert (one["processes"], two["processes"]) == (1, 2)
    assert one["speedup"] == one["efficiency"] == 1
    assert one["communication_share"] == 0
    assert two["efficiency"] == pytest.approx(two["speedup"] / 2)
    assert all(len(samples[way]) == 1 for samples in record["samples"] for way in ("data", "one batch", "alone"))
    assert record["run"]["processes"] == 2
    assert out.startswith("# Training on more devices\n")


class Workers:
    """Simulated loader with its own clock: a worker takes ``loading`` seconds per batch and prefetches two batches."""

    def __init__(self, loading):
        self.loading, self.now, self.ready = loading, 0.0, [loading, 2 * loading]

    def __iter__(self):
        return self

    def __next__(self):
        self.now = max(self.now, self.ready.pop(0))
        self.ready.append(max(self.now, *self.ready) + self.loading)

    def pass_time(self, seconds):
        self.now += seconds


@pytest.mark.parametrize(("loading", "expected"), [(0.0, 1.0), (0.5, 1.0), (1.5, 1.5), (5.0, 5.0)])
def test_what_workers_have_ready_does_not_hide_that_they_are_slow(bench, monkeypatch, loading, expected):
    batches = Workers(loading)
    batches.pass_time(100)  # the worker prefetches during a pause
    monkeypatch.setattr(bench.time, "perf_counter", lambda: batches.now)

    def step(batch):
        batches.pass_time(1)

    found = bench.time_with_data(batches, step, 1, 2, steps=2, rounds=3, device=torch.device("cpu"))

    assert found == [expected] * 3


def test_a_process_that_steps_alone_exchanges_nothing(bench, monkeypatch):
    """The process group of two ranks is faked, and its all-reduces are recorded."""
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        config = plain_config(compose("train", [*QUICK, "attention=emau", "data=camvid", "data.root=none"]))
    exchanged = []
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(distributed, "all_reduce", exchanged.append)
    monkeypatch.setattr(ranks, "rank_from_environment", lambda: RankInfo(0, 2, 0, 2))
    batch = {"image": torch.zeros(2, 3, 64, 64, dtype=torch.uint8), "mask": torch.zeros(2, 64, 64, dtype=torch.uint8)}
    normalise = Normalise((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))

    bench.stepper(config, 11, normalise, torch.device("cpu"), together=False)(batch)

    assert ranks.rank_info().size == 2
    assert exchanged == []


def test_shares_are_of_the_time_of_a_step(bench):
    samples = {"data": [1.0, 1.0, 1.0], "one batch": [0.9, 0.9, 0.9], "alone": [0.6, 0.6, 0.6]}

    one, four = bench.summarise([1, 4], 8, [{**samples, "data": [0.8] * 3, "one batch": [0.8] * 3}, samples])

    assert (one["images_per_second"], four["images_per_second"]) == (10, 32)
    assert (four["speedup"], four["efficiency"]) == (pytest.approx(3.2), pytest.approx(0.8))
    assert (four["data_share"], four["communication_share"]) == (pytest.approx(0.1), pytest.approx(0.3))
    assert (one["data_share"], one["communication_share"]) == (0, 0)


def test_more_processes_than_gpus_are_refused(bench, refusal, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)

    assert "--processes 4 is more than the 2 GPUs" in refusal(bench.main, "--processes", 1, 4)
