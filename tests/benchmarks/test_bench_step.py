import importlib
import json

import pytest
import torch


@pytest.fixture
def bench():
    return importlib.import_module("bench_step")


@pytest.mark.slow
def test_both_ways_take_the_same_steps_and_the_parts_make_up_a_step(bench, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench, "keep_freed_memory", lambda: None)
    models = []
    build = bench.build
    monkeypatch.setattr(bench, "build", lambda *arguments: models.append(build(*arguments)) or models[-1])
    size = ["--batch", "2", "--height", "32", "--width", "64", "--steps", "2"]
    model = ["model.encoder=tu-test_resnet", "model.encoder_weights=null", "attention=none"]

    bench.main([*size, "--overrides", *model, "--output", str(tmp_path)])

    record = json.loads((tmp_path / "bench_step.json").read_text())
    assert list(record["ways"]) == ["train.py", "bare"]
    assert record["ways"]["bare"]["ratio"]["median"] == 1
    assert len(record["parts"]) == 6
    assert all(seconds > 0 for seconds in record["parts"].values())
    assert (tmp_path / "bench_step.md").read_text().strip() in capsys.readouterr().out
    of_trainer, of_loop, _ = ([weight.detach() for weight in model.parameters()] for model, *_ in models)
    for own, other in zip(of_trainer, of_loop, strict=True):
        torch.testing.assert_close(own, other)
