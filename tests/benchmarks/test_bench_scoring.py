import importlib
import json

import pytest
import torch

from ema_seg.models.head import RowLogits


@pytest.fixture
def bench():
    return importlib.import_module("bench_scoring")


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(1, 19, 16, 24, generator=generator)
    truth = torch.randint(19, (62, 94), generator=generator, dtype=torch.uint8)
    return [(RowLogits(features, scale=4, size=(62, 94)), truth)]


def test_both_ways_give_the_same_scores_and_their_costs(bench, images, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench, "keep_freed_memory", lambda: None)
    monkeypatch.setattr(bench, "read_images", lambda *_: images)
    monkeypatch.setattr(bench, "read_palette", lambda *_: [(index, index, index) for index in range(19)])

    bench.main([str(tmp_path), "--data", "cityscapes", "--budget", "0.01", "--output", str(tmp_path)])

    results = json.loads((tmp_path / "bench_scoring.json").read_text())["results"]["cityscapes"]
    assert list(results) == ["fpn", "pspnet"]
    for ways in results.values():
        assert ways["whole"]["speedup"]["median"] == 1
        assert 0 < ways["strips"]["peak"] < ways["whole"]["peak"]
    assert (tmp_path / "bench_scoring.md").read_text().strip() in capsys.readouterr().out


def test_ways_that_differ_are_not_compared(bench, images, monkeypatch):
    monkeypatch.setattr(bench, "most_likely_classes", lambda logits: torch.zeros(logits.shape[2:], dtype=torch.uint8))
    with pytest.raises(AssertionError, match="the ways differ"):
        bench.measure(images, [(0, 0, 0)] * 19, torch.device("cpu"), 0.01)
