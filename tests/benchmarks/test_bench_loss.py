import importlib
import json

import pytest


@pytest.fixture
def bench():
    return importlib.import_module("bench_loss")


def test_both_ways_give_one_loss_and_their_costs(bench, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench, "SHAPES", {"cityscapes": (19, 64, 48)})
    monkeypatch.setattr("ema_seg.models.head._BYTES_AT_ONCE", {"cpu": 8 * 19 * 48 * 4})
    monkeypatch.setattr(bench, "keep_freed_memory", lambda: None)

    command = ["--shapes", "cityscapes", "--heads", "unet", "fpn", "--budget", "0.01", "--output", str(tmp_path)]
    bench.main(command)

    results = json.loads((tmp_path / "bench_loss.json").read_text())["results"]["cityscapes"]
    assert list(results) == ["cross_entropy", "cross_entropy_dice"]
    for by_head in results.values():
        assert list(by_head) == ["unet", "fpn"]
        for ways in by_head.values():
            assert all(row["seconds"]["median"] > 0 for row in ways.values())
            assert ways["whole"]["ratio"]["median"] == 1
            assert ways["strips"]["peak"] < ways["whole"]["peak"]
            assert all(row["saved"] > 0 for row in ways.values())
    assert (tmp_path / "bench_loss.md").read_text().strip() in capsys.readouterr().out
