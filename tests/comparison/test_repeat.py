"""Tests of ``reproducible=true`` and ``rerun``: a repeated run is bitwise identical, or the difference is reported."""

import json
import shutil

import pytest
import torch
import yaml

from ema_seg.models import load_checkpoint
from ema_seg.reporting import load_report
from tests.conftest import QUICK, made_once

REPRODUCIBLE = (*QUICK, "data=camvid", "attention=ema", "reproducible=true", "training.weight_averaging=0.9")


@pytest.fixture(scope="module")
def original(tmp_path_factory, entry, camvid_root):
    def make(folder):
        status, err = entry.run(*REPRODUCIBLE, f"data.root={camvid_root}", f"hydra.run.dir={folder / 'run'}")
        assert status == 0, err

    return made_once(tmp_path_factory, "repeat", make) / "run"


def test_the_same_command_gives_the_same_bits(original, entry, tmp_path):
    (root,) = [load_report(original / "report" / "report.json")["data"]["root"]]

    status, err = entry.run(*REPRODUCIBLE, f"data.root={root}", f"hydra.run.dir={tmp_path / 'run'}", "data.workers=2")

    assert status == 0, err
    for name in ("best.ckpt", "last.ckpt"):
        first, second = (load_checkpoint(run / "checkpoints" / name) for run in (original, tmp_path / "run"))
        assert first["config"]["trainer"]["deterministic"] is True
        assert first["state_dict"].keys() == second["state_dict"].keys()
        for key, tensor in first["state_dict"].items():
            assert tensor.numpy().tobytes() == second["state_dict"][key].numpy().tobytes()
    reports = [load_report(run / "report" / "report.json") for run in (original, tmp_path / "run")]
    for key in ("confusion_matrix", "miou", "iou", "size_iou", "images"):
        assert json.dumps(reports[0][key]) == json.dumps(reports[1][key])


def test_a_run_is_repeated_from_its_configuration_and_environment(original, entry, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.yaml", "environment.json"):
        shutil.copy(original / name, bare)

    status, err = entry.run(f"rerun={original}", f"hydra.run.dir={tmp_path / 'again'}")
    assert status == 0, err
    assert entry.out.rstrip().endswith("scores   identical")
    assert json.loads((tmp_path / "again" / "rerun.json").read_text()) == {
        "original": str(original),
        "weights": "identical",
        "metrics": "identical",
        "scores": "identical",
        "environment": {},
    }

    status, err = entry.run(f"rerun={bare}", f"hydra.run.dir={tmp_path / 'from_bare'}")
    assert status == 0, err
    assert entry.out.count("not compared: missing in the original") == 3
    weights = [
        load_checkpoint(run / "checkpoints" / "last.ckpt")["state_dict"] for run in (original, tmp_path / "from_bare")
    ]
    assert all(torch.equal(tensor, weights[1][key]) for key, tensor in weights[0].items())


def test_a_run_that_comes_out_otherwise_is_told_so(original, entry, tmp_path):
    changed = shutil.copytree(original, tmp_path / "changed")
    config = yaml.safe_load((changed / "config.yaml").read_text())
    config["optimizer"]["lr"] *= 2
    (changed / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    environment = json.loads((changed / "environment.json").read_text())
    environment["packages"]["torch"] = "1.0"
    (changed / "environment.json").write_text(json.dumps(environment))

    status, err = entry.run(f"rerun={changed}", f"hydra.run.dir={tmp_path / 'again'}")

    assert status == 1
    assert err.splitlines()[-1].startswith(
        f"error: rerun={changed}: {tmp_path / 'again'} must be bitwise identical, but differs; see "
    )
    out = entry.out
    assert "tensors differ, most by" in out
    assert "metrics  epoch 1: " in out
    assert "packages.torch was 1.0, is " in out


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["epochs=3"], "epochs=3 would make it a different run"),
        (["resume=auto"], "repeats one run from its start"),
        (["-m"], "repeats one run from its start"),
        (["--config-name", "train"], "--config-name train: the command uses the configuration of the run"),
    ],
)
def test_a_repetition_changes_nothing(overrides, message, original, run_script):
    status, _, err = run_script("train", f"rerun={original}", *overrides)

    assert status == 1
    assert message in err


def test_the_configuration_of_a_repetition_can_be_looked_at(original, run_script):
    status, out, err = run_script("train", f"rerun={original}", "--cfg", "job")

    assert status == 0, err
    assert yaml.safe_load(out)["rerun"] == str(original)
