"""Tests of what ``make gpu`` runs, on a CPU: everything but the device."""

import importlib
import json
import sys

import pytest

from tests.conftest import ROOT, is_alive

FOLDER = ROOT / "benchmarks" / "gpu"


@pytest.fixture
def programs(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module


def test_a_step_that_fails_hangs_or_has_no_time_ends_neither_the_others_nor_the_page(
    programs, monkeypatch, tmp_path, capsys
):
    gpu = programs("run")

    def step(name, code, limit=60.0, results=()):
        return gpu.Step(name, limit, [sys.executable, "-c", code], results)

    write = f"import pathlib; pathlib.Path({str(tmp_path / 'good.csv')!r}).write_text('a,b')"
    groups = [[step("good", write, results=["good.csv"]), step("bad", "import sys; print('why'); sys.exit(3)")]]
    child = f"import os, time; open({str(tmp_path / 'child')!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    hanging = f"import subprocess, sys; print('here', flush=True); subprocess.run([sys.executable, '-c', {child!r}])"
    groups += [[step("hanging", hanging, limit=5.5)]]
    groups += [[step("late", "pass", limit=1)]]
    monkeypatch.setattr(gpu, "all_steps", lambda *_: groups)

    with pytest.raises(SystemExit) as end:
        gpu.main(["--output", str(tmp_path)])

    assert end.value.code == 1
    record = json.loads((tmp_path / "gpu.json").read_text())
    assert [row["status"] for row in record["steps"]] == [
        "ok", "failed with status 3", "stopped after 6 s", "no time left"
    ]  # fmt: skip
    assert not is_alive(int((tmp_path / "child").read_text()))
    assert record["results"] == {"good.csv": "a,b"}
    page = (tmp_path / "gpu.md").read_text()
    assert "| bad | failed with status 3 |" in page
    assert "why" in page
    assert "here" in page
    assert "bad: failed with status 3" in capsys.readouterr().out


def test_the_steps_after_the_kernels_run_on_a_cpu(entry, tmp_path, camvid_root):
    steps = ["machine", "reproducible", "rerun", "synchronisations", "bench_step", "camvid"]
    command = ["--device", "cpu", "--output", tmp_path / "out", "--camvid", camvid_root, "--steps", *steps]

    status, error = entry.run(*command, script="benchmarks/gpu/run")

    assert status == 0, entry.out + error
    record = json.loads((tmp_path / "out" / "gpu.json").read_text())
    assert [row["step"] for row in record["steps"]] == steps
    results = record["results"]
    assert results["machine.json"]["copy_bytes_per_second"]
    assert results["synchronisations.json"] == {
        "training step": {"total": 0, "lines": []},
        "validation batch": {"total": 0, "lines": []},
    }
    first, second = (results[f"{run}/metrics.csv"].splitlines()[1].split(",")[2] for run in ("reproducible", "rerun"))
    assert first == second
    page = (tmp_path / "out" / "gpu.md").read_text()
    assert "## Waits for the device" in page
    assert "## A training step" in page
