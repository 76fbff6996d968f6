"""Test of bench_comparison.py on a tiny sweep: the structure of its result, not the times."""

import json


def test_a_tiny_sweep_is_measured(run_benchmark, tmp_path):
    arguments = ["--configurations", 3, "--seeds", 2, "--images", 6, "--classes", 4, "--literal", 2]
    printed = run_benchmark("bench_comparison", *arguments, "--output", tmp_path)

    record = json.loads((tmp_path / "bench_comparison.json").read_text())
    assert record["settings"] == {"configurations": 3, "seeds": 2, "images": 6, "classes": 4}
    assert list(record["result"]["seconds"]) == [
        "read",
        "statistics",
        "pictures",
        "figures, tables and page",
        "whole command",
    ]
    assert all(seconds > 0 for seconds in record["result"]["seconds"].values())
    bootstrap = record["result"]["bootstrap"]
    assert bootstrap["ratio"] == bootstrap["literal_seconds_per_replicate"] / bootstrap["seconds_per_replicate"]
    table = (tmp_path / "bench_comparison.md").read_text()
    assert table in printed
    assert "3 configurations × 2 seeds, 6 images, 4 classes" in table
