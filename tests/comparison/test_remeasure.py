"""Costs that were measured on a machine of another speed, and their measurement again."""

import json
import time

import pytest
import torch
from torch import nn

from ema_seg.comparison.__main__ import main
from ema_seg.comparison.compare import compare_runs
from ema_seg.comparison.remeasure import with_costs
from ema_seg.comparison.runs import read_folder, read_runs
from ema_seg.comparison.tables import comparison_as_markdown
from ema_seg.data.normalise import Normalise
from ema_seg.inference.loading import LoadedModel
from ema_seg.runtime.errors import DataError
from tests.comparison.runs_on_disk import write_run

SECONDS = {"none": 0.01, "ema": 0.03}


class Sleeper(nn.Module):
    """Model whose forward takes a known time."""

    def __init__(self, seconds):
        super().__init__()
        self.seconds = seconds
        self.shapes = set()

    def forward(self, images):
        self.shapes.add((tuple(images.shape), torch.is_autocast_enabled("cpu")))
        time.sleep(self.seconds)
        return images


@pytest.fixture
def models(monkeypatch):
    """Replace the models of checkpoints by sleepers; return them by the name of the run's folder."""
    loaded = {}

    def load(path, device_name, key):
        name = path.parents[1].name
        loaded[name] = Sleeper(SECONDS[name.split("_")[0]])
        normalise = Normalise((0, 0, 0), (1, 1, 1))
        return LoadedModel(loaded[name], torch.device("cpu"), {}, 32, normalise, None)

    monkeypatch.setattr("ema_seg.comparison.remeasure.load_model", load)
    monkeypatch.setattr("ema_seg.comparison.remeasure._PAUSE", 0)
    return loaded


def write(folder, attention, seed=0, reference=None):
    run = write_run(folder / f"{attention}_{seed}", attention, seed)
    path = run / "report/report.json"
    report = json.loads(path.read_text())
    if reference:
        report["throughput"]["forward"][-1]["reference"] = reference
    path.write_text(json.dumps(report))
    (run / "checkpoints").mkdir()
    (run / "checkpoints/best.ckpt").touch()
    return run


def test_rows_of_a_slower_machine_are_marked(tmp_path):
    write(tmp_path, "none", reference=0.0040)
    write(tmp_path, "ema", reference=0.0043)
    write(tmp_path, "se", reference=0.0060)
    comparison = compare_runs(read_folder(tmp_path), replicates=50)
    assert {row["label"]: row["slowed"] for row in comparison["rows"]} == {"none": False, "ema": False, "se": True}
    (note,) = [note for note in comparison["notes"] if "reference computation" in note]
    assert "took 4 to 6 ms" in note and "remeasure=true" in note
    cells = {line.split(" | ")[0]: line for line in comparison_as_markdown(comparison).splitlines() if "| 123" in line}
    assert "123 †" in cells["| se"] and "†" not in cells["| ema"]


def test_equal_or_unknown_speeds_are_not_marked(tmp_path):
    write(tmp_path, "none", reference=0.004)
    write(tmp_path, "ema")
    comparison = compare_runs(read_folder(tmp_path), replicates=50)
    assert not any(row["slowed"] for row in comparison["rows"])
    assert not any("reference" in note for note in comparison["notes"])


def test_all_configurations_are_measured_in_turns(tmp_path, models):
    for attention in SECONDS:
        for seed in (0, 1):
            write(tmp_path, attention, seed, reference=0.004 * (1 + seed))
    comparison = compare_runs(with_costs(read_folder(tmp_path), rounds=3), replicates=50)
    assert sorted(models) == ["ema_0", "none_0"]  # one run for all seeds
    for row in comparison["rows"]:
        latency = row["cost"]["latency"]
        assert latency["n"] == 2 and latency["sd"] == 0
        assert SECONDS[row["label"]] <= latency["mean"] < SECONDS[row["label"]] + 0.1
        assert row["cost"]["images_per_second"]["mean"] == pytest.approx(8 / latency["mean"])
        assert row["cost"]["memory"]["mean"] is None  # the reports' is that of another device
        assert row["cost_batch_size"] == 8
        assert row["cost"]["reference"]["n"] == 2
    ((shape, autocast),) = models["ema_0"].shapes
    assert shape[:2] == (8, 3) and autocast  # as the reports say
    assert any("3 forward passes of each configuration, in turns, on" in note for note in comparison["notes"])


def test_the_command_measures_again(tmp_path, models, blank_figures, capsys):
    runs = [write(tmp_path, attention) for attention in SECONDS]
    arguments = ["compare", *map(str, runs), "remeasure=true", f"output={tmp_path / 'out'}"]
    assert main(arguments) == 0
    assert "were measured again" in " ".join(capsys.readouterr().out.split())


def test_a_missing_checkpoint_is_named(tmp_path):
    run = write_run(tmp_path / "none")
    with pytest.raises(DataError, match=r"report.json: its checkpoint .*best.ckpt is missing"):
        with_costs(read_runs([run]))
