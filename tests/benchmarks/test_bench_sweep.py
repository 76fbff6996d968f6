import json

TINY = ("model=linknet", "model.encoder=tu-test_efficientnet")


def test_the_overhead_of_a_sweep_is_measured_against_single_runs(run_benchmark, tmp_path):
    out = run_benchmark(
        "bench_sweep", "--attention", "none", "--seeds", "1", "--overrides", *TINY, "--output", tmp_path
    )

    result = json.loads((tmp_path / "bench_sweep.json").read_text())["result"]
    assert result["jobs"] == 1
    for way in result["ways"].values():
        assert 0 < way["trained"] < way["seconds"]
        assert way["overhead"] > 0
    assert "one run after the other" in out
    assert (tmp_path / "bench_sweep.md").read_text().strip() in out
