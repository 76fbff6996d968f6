import json

import pytest

from tests.conftest import QUICK


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


def test_shares_are_of_the_time_of_a_step():
    from bench_scaling import summarise

    samples = {"data": [1.0, 1.0, 1.0], "one batch": [0.9, 0.9, 0.9], "alone": [0.6, 0.6, 0.6]}

    one, four = summarise([1, 4], 8, [{**samples, "data": [0.8] * 3, "one batch": [0.8] * 3}, samples])

    assert (one["images_per_second"], four["images_per_second"]) == (10, 32)
    assert (four["speedup"], four["efficiency"]) == (pytest.approx(3.2), pytest.approx(0.8))
    assert (four["data_share"], four["communication_share"]) == (pytest.approx(0.1), pytest.approx(0.3))
    assert (one["data_share"], one["communication_share"]) == (0, 0)


def test_more_processes_than_gpus_are_refused(refusal, monkeypatch):
    import bench_scaling

    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)

    assert "--processes 4 is more than the 2 GPUs" in refusal(bench_scaling.main, "--processes", 1, 4)
