"""Tests of bench_ema.py on inputs small enough to take seconds; no test checks a time."""

import importlib
import json
from functools import partial

import pytest
import torch
from PIL import Image

from tests.benchmarks.conftest import DISTORTING_VARIABLES

IMPLEMENTATIONS = (
    *("reference", "reference-compiled", "factorised", "factorised-compiled", "cpp", "triton", "triton-replayed"),
)
TINY = ("--shapes", "tiny", "--layouts", "channels_last", "--budget", "0.001", "--device", "cpu")


@pytest.fixture
def bench():
    return importlib.import_module("bench_ema")


@pytest.fixture
def quick_compile(monkeypatch):
    """Compile with the backend aot_eager, which traces but needs no C++ compiler."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))


def result_in(folder):
    record = json.loads((folder / "bench_ema.json").read_text(encoding="utf-8"))
    (result,) = record["results"]
    return record, result["rows"]


def test_a_run_measures_what_can_run_here_and_says_why_the_rest_cannot(run_benchmark, tmp_path):
    names = ("reference", "factorised", "cpp", "triton")
    shown = run_benchmark("bench_ema", *TINY, "--implementations", *names, "--output", tmp_path)
    record, rows = result_in(tmp_path)

    assert tuple(rows) == names
    for name in ("reference", "factorised"):
        check_measured(rows[name])
    assert rows["reference"]["forward"]["reference"]["median"] == 1
    assert "seconds" in rows["cpp"]["training"] or rows["cpp"]["training"]["not_run"]  # needs a C++ compiler
    assert "'triton' cannot be used" in rows["triton"]["forward"]["not_run"]

    assert record["schema"] == 1
    assert torch.__version__.startswith(record["run"]["packages"]["torch"])
    assert {"date", "command", "cpu", "device", "git", "python", "threads"} <= set(record["run"])
    assert all(aim["reached"] is None for aim in record["aims"])  # aims cover the shapes of decoders only

    assert shown.startswith((tmp_path / "bench_ema.md").read_text(encoding="utf-8"))
    for name in names:
        lines = [line for line in shown.splitlines() if line.startswith(f"| tiny | 2×64×7×5 /32 | {name} |")]
        assert len(lines) == 2  # one per pass
    for header, *lines in tables(shown):
        assert all(line.count(" | ") == header.count(" | ") for line in lines)
    assert Image.open(tmp_path / "bench_ema_float32.png").width > 1000


def test_a_replay_computes_each_input_set_by_its_own_graph(bench, monkeypatch):
    replayed = []

    class Graph:
        def __init__(self, call):
            self.replay = lambda: replayed.append(call())

    monkeypatch.setattr(bench, "_capture", lambda call: (Graph(call), call()))
    shape, device = bench.Shape("small", 1, 8, 4, 4, 2), torch.device("cpu")
    inputs = [bench.InputSet.random(shape, "float32", "contiguous", device) for _ in range(2)]
    replaying, eager = (
        bench.Candidate(name, shape, "float32", inputs) for name in ("factorised-replayed", "factorised")
    )

    for index in range(3):
        for which in bench.PASSES:
            result = getattr(replaying, which)(index)
            assert torch.equal(result, getattr(eager, which)(index))
            assert torch.equal(result, replayed[-1])


def test_compiled_implementations_are_measured(bench, quick_compile, tmp_path):
    names = ("reference", "reference-compiled", "factorised-compiled")
    bench.main([*TINY, "--implementations", *names, "--output", str(tmp_path)])
    _, rows = result_in(tmp_path)

    for name in names:
        check_measured(rows[name])
        assert "reference-compiled" in rows[name]["training"]


def check_measured(passes):
    for row in passes.values():
        assert row["seconds"]["lower_quartile"] <= row["seconds"]["median"] <= row["seconds"]["upper_quartile"]
        assert row["seconds"]["samples"] >= 5
        assert {"reference", "floor", "deviation", "first_call"} <= set(row)
    assert passes["training"]["saved"] >= 2 * 64 * 7 * 5 * 4


def tables(markdown):
    blocks = [[line for line in block.splitlines() if line.startswith("|")] for block in markdown.split("\n\n")]
    return [block for block in blocks if block]


def test_without_the_device_all_rows_say_so(bench, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    bench.main(["--device", "cuda", "--shapes", "tiny", "--output", str(tmp_path)])
    record = json.loads((tmp_path / "bench_ema.json").read_text(encoding="utf-8"))

    assert [result["dtype"] for result in record["results"]] == ["float32"] * 2 + ["bfloat16"] * 2
    rows = [row for result in record["results"] for passes in result["rows"].values() for row in passes.values()]
    assert rows == [{"not_run": "no CUDA device"}] * (4 * len(IMPLEMENTATIONS) * 2)
    assert len(record["aims"]) == 14
    assert all(aim["met"] is None for aim in record["aims"])
    assert capsys.readouterr().out.count("not run: no CUDA device") == len(rows)
    assert not list(tmp_path.glob("*.png"))


def test_a_failed_compilation_is_in_its_row(bench, tmp_path, monkeypatch):
    def fail(graph, inputs):
        raise RuntimeError("no code for this graph")

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=fail))
    bench.main([*TINY, "--output", str(tmp_path), "--implementations", "reference", "reference-compiled"])
    _, rows = result_in(tmp_path)

    assert "no code for this graph" in rows["reference-compiled"]["forward"]["not_run"]
    assert "no code for this graph" in rows["reference-compiled"]["training"]["not_run"]
    assert "seconds" in rows["reference"]["training"]


def test_a_wrong_result_is_not_timed(bench, tmp_path, monkeypatch):
    from ema_seg.attention.ema import operator

    monkeypatch.setattr(operator, "apply", lambda x, parameters, *_: x * sum(p.sum() for p in parameters))
    bench.main([*TINY, "--output", str(tmp_path), "--implementations", "reference", "factorised"])
    _, rows = result_in(tmp_path)

    assert "deviates from the reference" in rows["factorised"]["forward"]["not_run"]
    assert "deviates from the reference" in rows["factorised"]["training"]["not_run"]


def test_saved_bytes_count_each_storage_once_and_no_parameter(bench):
    x = torch.ones(2, 8, 3, 5)
    inputs = bench.InputSet(x, x.detach().requires_grad_(), x, x)
    candidate = bench.Candidate("reference", bench.Shape("", 2, 8, 3, 5, 4), "float32", [inputs])
    weight = candidate.parameters[0]
    candidate.function = lambda x: (x * weight[0]).sin() * x[:1]  # saves x, the product and the sine

    assert candidate.saved_bytes() == 3 * x.nbytes


class _OnItsNode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.kept = [x.clone()]
        return x.clone()

    @staticmethod
    def backward(ctx, *grads):
        return grads[0]


def test_saved_bytes_count_what_a_node_keeps_for_itself(bench):
    x = torch.ones(2, 8, 3, 5)
    inputs = bench.InputSet(x, x.detach().requires_grad_(), x, x)
    candidate = bench.Candidate("reference", bench.Shape("", 2, 8, 3, 5, 4), "float32", [inputs])
    candidate.function = lambda x: 2 * _OnItsNode.apply(x)

    assert candidate.saved_bytes() == x.nbytes


def test_the_shapes_are_those_of_the_decoders(bench):
    shapes = {shape.name: (*shape.size, shape.groups) for shape in bench.decoder_shapes()}

    assert shapes["cityscapes-b1-unet-256"] == (1, 256, 64, 128, 32)
    assert shapes["cityscapes-b1-unet-16"] == (1, 16, 1024, 2048, 2)
    assert shapes["cityscapes-b1-fpn-128"] == (1, 128, 256, 512, 16)
    assert shapes["ade20k-b8-deeplabv3plus-256"] == (8, 256, 128, 128, 32)
    assert len(shapes) == 3 * (5 + 1 + 1)
    known = {*shapes, *(shape.name for shape in bench.AWKWARD_SHAPES)}
    assert all(known.issuperset(names) for names in bench.SETS.values())


def test_aims(bench):
    faster = bench.Aim("cpu", "float32", "cpp", "forward", "reference", 1.5, bound_of_worst=1.0)
    smaller = bench.Aim("cuda", "float32", "triton", "training", "saved", 1.05)

    assert faster.is_met(1.5, 1.0)
    assert not faster.is_met(3.0, 0.9)
    assert not faster.is_met(1.4, 1.2)
    assert smaller.is_met(1.04, 1.2)
    assert not smaller.is_met(1.06, 1.06)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--shapes", "tini"], "there is no 'tini'"),
        (["--dtypes", "float8"], "invalid choice: 'float8'"),
        (["--implementations", "fast"], "invalid choice: 'fast'"),
        (["--budget", "0"], "'0' is not a positive number"),
        (["--threads", "two"], "'two' is not a positive whole number"),
        (["--speed"], "unrecognized arguments: --speed"),
    ],
)
def test_a_mistake_is_one_sentence(bench, refusal, tmp_path, arguments, said):
    text = refusal(bench.main, *arguments, "--output", tmp_path)

    assert said in text
    assert text.startswith("error: ")
    assert text.count("\n") == 1


@pytest.mark.parametrize("variable", DISTORTING_VARIABLES)
def test_what_would_distort_all_results_is_refused(bench, refusal, tmp_path, monkeypatch, variable):
    monkeypatch.setenv(variable, "1")

    assert f"{variable} is set" in refusal(bench.main, "--output", tmp_path)


def test_an_output_that_cannot_be_written_is_refused(bench, refusal, tmp_path):
    (tmp_path / "file").touch()

    assert "--output" in refusal(bench.main, "--output", tmp_path / "file" / "folder")
