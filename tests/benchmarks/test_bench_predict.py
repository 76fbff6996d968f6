"""Test of bench_predict.py on a few small images; no test checks a time."""

import importlib
import json


def test_the_command_is_measured_against_the_forward(monkeypatch, tmp_path, capsys):
    bench = importlib.import_module("bench_predict")
    monkeypatch.setattr(bench, "HEIGHT", 36)
    monkeypatch.setattr(bench, "WIDTH", 48)
    size = ["--images", "3", "--batch", "2", "--encoder", "tu-test_efficientnet", "--budget", "0.01"]

    bench.main([*size, "--output", str(tmp_path), "--device", "cpu"])

    result = json.loads((tmp_path / "bench_predict.json").read_text())["result"]
    assert list(result["seconds"]) == ["forward", "predict"]
    assert all(spread["median"] > 0 for spread in result["seconds"].values())
    assert (tmp_path / "bench_predict.md").read_text().strip() in capsys.readouterr().out
