import importlib
import json

import pytest


@pytest.fixture
def bench():
    return importlib.import_module("bench_step")


@pytest.mark.slow
def test_both_ways_take_the_same_steps_and_the_parts_make_up_a_step(bench, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench, "keep_freed_memory", lambda: None)
    weights = {}
    for way in ("seconds_of_trainer", "bare_loop"):
        monkeypatch.setattr(bench, way, remember_weights(bench, getattr(bench, way), weights, way))
    size = ["--batch", "2", "--height", "32", "--width", "64", "--steps", "1", "--rounds", "1"]
    model = ["model.encoder=tu-test_resnet", "model.encoder_weights=null", "attention=none"]

    bench.main([*size, "--overrides", *model, "--output", str(tmp_path)])

    record = json.loads((tmp_path / "bench_step.json").read_text())
    assert list(record["ways"]) == ["train.py", "bare"]
    assert record["ways"]["bare"]["ratio"]["median"] == 1
    assert len(record["parts"]) == 6
    assert all(seconds > 0 for seconds in record["parts"].values())
    assert (tmp_path / "bench_step.md").read_text().strip() in capsys.readouterr().out
    assert weights["seconds_of_trainer"] == pytest.approx(weights["bare_loop"], rel=1e-4)


def remember_weights(bench, function, weights, way):
    """Wrap a way of training, so that the norm of its last gradient is kept."""
    built = bench.build

    def wrapped(*arguments, **options):
        models = []
        bench.build = lambda *inner: models.append(built(*inner)) or models[-1]
        result = function(*arguments, **options)
        if way == "bare_loop":
            result = iter(list(result))
        weights[way] = sum(float(weight.detach().norm()) for weight in models[0][0].parameters())
        return result

    return wrapped
