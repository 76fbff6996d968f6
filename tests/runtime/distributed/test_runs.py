"""Behaviour of a run in one of several ranks; rank and world size are patched, and no process is started."""

import pytest
import torch

from ema_seg.cli import launch
from ema_seg.inference import device
from ema_seg.runtime.distributed.ranks import RankInfo
from ema_seg.runtime.errors import ConfigError, Preempted, TrainingError
from ema_seg.training.parallel import strategy


@pytest.fixture
def group(monkeypatch):
    """Pretend that this process is rank 1 of 2, on a machine with two GPUs."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for module in (launch, strategy, device):
        monkeypatch.setattr(module, "rank_info", lambda: RankInfo(1, 2, 1, 2))


@pytest.mark.parametrize(("accelerator", "expected"), [("cpu", "cpu"), ("auto", "cuda"), ("gpu", "cuda")])
def test_processes_are_tested_on_the_devices_that_they_train_on(group, accelerator, expected):
    config = {"trainer": {"accelerator": accelerator, "devices": 2}, "evaluation": {"device": "auto", "budget": 1}}

    assert launch._evaluation(config) == {"device": expected, "budget": 1}


@pytest.mark.parametrize(
    ("accelerator", "device", "message"),
    [
        ("auto", "cuda:1", "evaluation.device: must have no device number for 2 processes, got cuda:1"),
        ("cpu", "gpu", "evaluation.device=gpu: the 2 processes train on the CPU and would share one device"),
    ],
)
def test_processes_do_not_share_a_device_of_the_evaluation(group, monkeypatch, accelerator, device, message):
    monkeypatch.setattr(torch, "empty", lambda *_, device: None)

    with pytest.raises(ConfigError, match=f"^{message}"):
        launch._evaluation({"trainer": {"accelerator": accelerator, "devices": 2}, "evaluation": {"device": device}})


def test_a_run_that_goes_on_has_the_batch_that_the_first_process_reads(group, monkeypatch, tmp_path):
    """The other ranks must not read the batch size from the file, because rank 0 rewrites it."""
    monkeypatch.setattr(launch, "broadcast", lambda value: 6)

    assert launch._batch_size({}, tmp_path, {"resume": True}) == 6


@pytest.mark.parametrize("earlier", [True, False])
def test_a_report_that_was_there_before_is_not_taken_for_the_result(monkeypatch, tmp_path, earlier):
    if earlier:
        (tmp_path / "report.json").write_text("{}")
    monkeypatch.setattr(launch, "run_together", lambda *arguments: None)

    with pytest.raises(TrainingError, match=r"report\.json: not written, although all 2 processes exited"):
        launch._run_and_load_report(print, 2, tmp_path)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_signal_that_comes_after_the_report_comes_too_late(processes, monkeypatch, tmp_path):
    def work(text):
        if text:
            (tmp_path / "new").write_text(text)
            (tmp_path / "new").replace(tmp_path / "report.json")
        raise Preempted("stopped by SIGTERM.")

    monkeypatch.setattr(launch, "run_together", lambda work, count, *arguments: work(*arguments))
    (tmp_path / "report.json").write_text("{}")
    monkeypatch.setattr(launch, "load_report", lambda path: path.read_text())

    with pytest.raises(Preempted):
        launch._run_and_load_report(work, processes, tmp_path, "")
    assert launch._run_and_load_report(work, processes, tmp_path, '{"miou": 1}') == '{"miou": 1}'
