"""Test of the data sets at full size, and of the benchmark that reads them."""

import json

import pytest

from ema_seg.data import build_dataset


@pytest.mark.slow
def test_the_input_is_measured_on_data_sets_of_full_size(run_benchmark, tmp_path):
    run_benchmark("full_size", tmp_path, "--train", "2", "--val", "1")

    for root in ("cityscapes", "cityscapes_zip"):
        dataset = build_dataset("cityscapes", tmp_path / root)
        assert len(dataset) == 2
        sample = dataset[0]
        assert sample["image"].shape == (1024, 2048, 3)
        assert len(set(sample["mask"].ravel()[::97]) - {255}) > 5
        assert 1.5e6 < len(dataset.pairs[0].image.read()) < 4e6
    dataset = build_dataset("ade20k", tmp_path / "ADEChallengeData2016", "val")
    assert 512 in dataset[0]["image"].shape

    out = run_benchmark("bench_input", tmp_path, "--names", "ade20k", "--budget", "0.01", "--output", tmp_path / "out")

    (result,) = json.loads((tmp_path / "out" / "bench_input.json").read_text())["results"].values()
    assert result["crop"] == [512, 512]
    assert list(result["rows"]) == ["cached", "files", "whole image", "albumentations", "torchvision"]
    assert result["rows"]["cached"]["bytes_per_pixel"] == 4
    assert result["rows"]["whole image"]["bytes_per_pixel"] == 20
    assert all(row["seconds"]["median"] > 0 for row in result["rows"].values())
    assert (tmp_path / "out" / "bench_input.md").read_text().strip() in out
