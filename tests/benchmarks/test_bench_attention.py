"""Tests of bench_attention.py on inputs and a model small enough to take seconds."""

import importlib
import json

import pytest
import torch

from ema_seg.attention import attention_names

NAMES = ("ema", "cbam")
SMALL = ("--encoder", "tu-test_efficientnet", "--batch", "2", "--size", "64", "32", "--device", "cpu")
QUICK = (*SMALL, "--budget", "0.001", "--layouts", "channels_last")


@pytest.fixture
def bench():
    return importlib.import_module("bench_attention")


def result_in(folder):
    return json.loads((folder / "bench_attention.json").read_text(encoding="utf-8"))


def test_each_block_has_its_costs_alone_and_in_a_model(run_benchmark, tmp_path):
    shown = run_benchmark("bench_attention", *QUICK, "--names", *NAMES, "--shapes", "2x16x7x5", "--output", tmp_path)
    record = result_in(tmp_path)
    (alone,), (model,) = record["blocks"], record["models"]

    assert alone["shape"] == [2, 16, 7, 5]
    assert alone["bytes_of_x"] == 2 * 16 * 7 * 5 * 4
    assert list(alone["rows"]) == list(NAMES)
    for row in alone["rows"].values():
        assert row["macs"] > 0
        assert row["saved"] >= alone["bytes_of_x"]
        assert row["peak"] >= 2 * alone["bytes_of_x"]
        for which in ("inference", "training"):
            assert row[which]["seconds"]["samples"] >= 15
            assert row[which]["copy"]["median"] > 0
    assert alone["rows"]["cbam"]["parameters"] == 2 * 16 + 2 * 7 * 7

    assert list(model["rows"]) == ["none", "none, again", *NAMES]
    for row in model["rows"].values():
        assert row["macs"] >= model["rows"]["none"]["macs"]
        for which in ("inference", "training"):
            assert row[which]["images_per_second"]["median"] * row[which]["seconds"]["median"] == pytest.approx(2)
            assert row[which]["overhead"]["median"] > -1
    assert model["rows"]["none"]["training"]["overhead"]["median"] == 0
    assert record["settings"]["options"]["cbam"]["reduction"] == 16

    assert shown.startswith((tmp_path / "bench_attention.md").read_text(encoding="utf-8"))
    for name in NAMES:
        first, second = (line for line in shown.splitlines() if line.startswith(f"| {name} |"))
        assert (first.count("|"), second.count("|")) == (10, 8)


def test_every_block_of_the_table_is_measured_unless_some_are_chosen(bench):
    assert {*bench.BLOCKS, "none"} == set(attention_names())


def test_what_cannot_run_says_why(bench, tmp_path):
    bench.main([*QUICK, "--names", "shuffle", "se", "--shapes", "1x3x2x2", "--output", str(tmp_path)])
    record = result_in(tmp_path)

    assert "needs an even number of channels" in record["blocks"][0]["rows"]["shuffle"]["not_run"]
    assert "seconds" in record["blocks"][0]["rows"]["se"]["training"]
    assert "seconds" in record["models"][0]["rows"]["shuffle"]["inference"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--names", "semu"], "invalid choice: 'semu'"),
        (["--shapes", "4x64x64"], "'4x64x64' is not a shape like 4x64x64x64"),
        (["--shapes", "--size", "350", "480"], "multiples of 32"),
        (["--shapes", "--encoder", "tu-mobilenet_v9"], "tu-mobilenet_v9"),
        (["--device", "cuda"], "no CUDA device"),
    ],
)
def test_a_mistake_is_one_sentence(bench, refusal, tmp_path, monkeypatch, arguments, said):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    text = refusal(bench.main, *QUICK, *arguments, "--output", tmp_path)

    assert said in text
    assert text.startswith("error: ")
    assert text.count("\n") == 1
