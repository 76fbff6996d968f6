"""Tests of the record of versions, device, command and commit of a result."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ema_seg
from ema_seg.evaluation import environment
from ema_seg.evaluation.environment import describe_environment


def test_names_versions_device_and_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["eval.py", "checkpoint=best.ckpt"])
    found = describe_environment("cpu")
    assert json.loads(json.dumps(found)) == found
    assert found["packages"]["ema-seg"] == ema_seg.__version__
    assert found["packages"]["torch"].startswith(torch.__version__.partition("+")[0])
    assert found["packages"]["segmentation-models-pytorch"]
    assert found["device"]["type"] == "cpu"
    assert found["device"]["name"]
    assert found["threads"] >= 1
    assert found["command"] == ["eval.py", "checkpoint=best.ckpt"]


def checkout(folder: Path) -> Path:
    """Create a git repository that tracks a file with the name of the running module."""
    module = folder / Path(environment.__file__).name
    module.write_text("1")
    identity = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
    for command in (["init", "-q"], ["add", "."], [*identity, "commit", "-q", "-m", "first"]):
        subprocess.run(["git", *command], cwd=folder, check=True)
    return module


def test_git_commit_and_whether_the_code_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = checkout(tmp_path)
    monkeypatch.setattr(environment, "__file__", str(module))
    clean = describe_environment()["git"]
    assert len(clean["commit"]) == 40
    assert clean["dirty"] is False
    module.write_text("2")
    assert describe_environment()["git"] == {"commit": clean["commit"], "dirty": True}


def test_code_that_is_no_checkout_has_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "environment.py"))
    assert describe_environment()["git"] is None
    # The package is installed inside the checkout of another project, which does not track it.
    checkout(tmp_path)
    site = tmp_path / "site-packages"
    site.mkdir()
    shutil.copy(tmp_path / "environment.py", site)
    monkeypatch.setattr(environment, "__file__", str(site / "environment.py"))
    assert describe_environment()["git"] is None


def test_a_machine_without_git_has_no_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert describe_environment()["git"] is None
