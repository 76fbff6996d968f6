"""Tests of the Triton kernels' compilation, for a GPU that is not there."""

import contextlib
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ema_seg.attention.ema import triton_launch, triton_plan

ROOT = Path(__file__).parents[2]


def run_stub(task, tmp_path):
    """Run ``stub_driver`` in a process of its own, in which Triton's kernels are not interpreted."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    result = subprocess.run(
        [sys.executable, "-m", "tests.attention.stub_driver", task],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return [json.loads(line) for line in result.stdout.splitlines()], result.stderr


@pytest.mark.slow
def test_kernels_in_float16_and_float64_and_of_dynamic_ema_compile_for_a_gpu(tmp_path):
    rows, said = run_stub("compile", tmp_path)

    assert [row["dtype"] for row in rows] == ["float64", "float16"]
    assert [row["launches"] for row in rows] == [3, 10]  # fused, and a launch for each phase
    assert said == "compiling EMA's Triton kernels, once for each size of a feature map\n"


@pytest.mark.slow
def test_the_default_training_compiles_few_kernels(tmp_path):
    ((row,), _) = run_stub("count", tmp_path)

    assert row["different"] == row["compilations"] <= 40


def test_a_device_that_cannot_launch_a_kernel_says_why(monkeypatch):
    class Broken:
        def __getitem__(self, grid):
            raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.")

    monkeypatch.setattr(triton_launch, "empty_kernel", Broken())
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)

    problem = triton_launch._launch_problem.__wrapped__(torch.device("cuda", 1))

    assert problem.startswith("Triton cannot launch a kernel on cuda:1 (Failed to find C compiler.")


@pytest.fixture
def plan_for_gpu(monkeypatch):
    """Return ``plan_work`` for a GPU with 132 multiprocessors and 50 MB of cache, without its device and options."""
    monkeypatch.setattr(triton_plan, "_device", lambda device: (132, 50 * 2**20))
    monkeypatch.setattr(triton_plan, "SMALLEST_TILE", 1024)
    options = {"taps_last": False, "dynamic": False, "eps": 1e-5}

    def plan(shape, groups, dtype=torch.bfloat16, last=True, backward=False):
        return triton_plan.plan_work(
            shape, dtype, torch.device("cuda"), last=last, groups=groups, backward=backward, **options
        )

    return plan


def test_an_empty_batch_has_a_plan(plan_for_gpu):
    work = plan_for_gpu((0, 16, 1024, 2048), 2)
    assert (work.blocks, work.wave) == (0, 1)


@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("shape", [(1, 16, 1024, 2048), (1, 16, 513, 1000), (8, 32, 256, 256), (2, 64, 97, 1025)])
def test_regions_occupy_the_device_and_none_is_empty(plan_for_gpu, shape, last):
    batch, _, height, width = shape
    work = plan_for_gpu(shape, 2, last=last, backward=True)

    rows = -(-height // work.parts)
    tiles = -(-width // work.plan.tile_columns)
    assert work.wave * work.parts * work.spans >= 132
    assert (work.parts - 1) * rows < height
    assert (work.spans - 1) * -(-tiles // work.spans) < tiles
    assert batch * 2 >= work.blocks >= 1


@pytest.fixture
def kernels(monkeypatch):
    """Import the comparison that ``make gpu`` runs; here Triton's interpreter runs the kernels."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "gpu"))
    return importlib.import_module("kernels")


def test_kernels_are_compared_with_float64_in_poisoned_memory(kernels):
    case = kernels.cases(torch.device("cpu"))[0]

    row = kernels.check(case, torch.device("cpu"))

    assert row["ok"]
    assert row["repeats"]
    assert 0 < row["y"] < kernels.LIMITS[case.dtype]


def test_a_kernel_that_fails_is_reported(kernels, monkeypatch):
    monkeypatch.setattr(kernels, "_compare", lambda *_: 1 / 0)
    row = kernels.check(kernels.cases(torch.device("cpu"))[0], torch.device("cpu"))
    assert not row["ok"]
    assert "ZeroDivisionError" in row["error"]
