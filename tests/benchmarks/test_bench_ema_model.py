"""Tests of bench_ema_model.py on a model small enough to take seconds."""

import importlib
import json

import pytest
import torch

SMALL = ("--encoder", "tu-test_efficientnet", "--batch", "2", "--budget", "0.001")
ATTENTIONS = ["none", "none, again", "EMA, reference", "EMA, auto"]


@pytest.fixture
def bench():
    return importlib.import_module("bench_ema_model")


def test_each_attention_has_its_rates_and_overheads(run_benchmark, tmp_path):
    arguments = (*SMALL, "--device", "cpu", "--decoders", "fpn", "--layouts", "channels_last", "--size", 64, 32)
    shown = run_benchmark("bench_ema_model", *arguments, "--output", tmp_path)
    record = json.loads((tmp_path / "bench_ema_model.json").read_text(encoding="utf-8"))
    (result,) = record["results"]

    assert list(result["rows"]) == ATTENTIONS
    for passes in result["rows"].values():
        for row in passes.values():
            assert row["seconds"]["samples"] >= 15
            assert row["images_per_second"]["median"] * row["seconds"]["median"] == pytest.approx(2)
            assert row["overhead"]["median"] > -1
    assert result["rows"]["none"]["training"]["overhead"]["median"] == 0
    assert result["auto"] in ("factorised", "cpp")
    assert [aim["at_most"] for aim in record["aims"]] == [0.1, 0.1]
    assert record["settings"] == {
        "encoder": "tu-test_efficientnet",
        "batch": 2,
        "size": [64, 32],
        "precision": "32-true",
    }
    lines = [line for line in shown.splitlines() if line.startswith("| fpn | channels_last | eager |")]
    assert len(lines) == 2 * len(ATTENTIONS)
    assert len({line.count("|") for line in lines}) == 1
    assert sum("≤ 10: " in line for line in lines) == 2
    assert shown.startswith((tmp_path / "bench_ema_model.md").read_text(encoding="utf-8"))


def test_without_the_device_all_rows_say_so(bench, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    bench.main(["--device", "cuda", "--decoders", "unet", "--modes", "eager", "compiled", "--output", str(tmp_path)])
    record = json.loads((tmp_path / "bench_ema_model.json").read_text(encoding="utf-8"))

    assert len(record["results"]) == 4
    assert capsys.readouterr().out.count("not run: no CUDA device") == 4 * 2 * len(ATTENTIONS)
    assert {aim["met"] for aim in record["aims"]} == {None}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--size", "350", "480"], "multiples of 32"),
        (["--encoder", "tu-mobilenet_v9"], "tu-mobilenet_v9"),
        (["--decoders", "unet9"], "invalid choice: 'unet9'"),
        (["--precision", "8"], "invalid choice: '8'"),
    ],
)
def test_a_mistake_is_one_sentence(bench, refusal, tmp_path, arguments, said):
    text = refusal(bench.main, *SMALL, *arguments, "--device", "cpu", "--output", tmp_path)

    assert said in text
    assert text.startswith("error: ")
    assert text.count("\n") == 1
