"""Runs that start from a trained model, and runs with frozen parts, as a user starts them."""

import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from lightning import Callback, seed_everything

from ema_seg.cli.command_line import plain_config
from ema_seg.cli.launch import complete_config
from ema_seg.train import train as train_seeded
from tests.conftest import QUICK, ROOT, made_once


@pytest.fixture(scope="module")
def trained(camvid_root, tmp_path_factory):
    """Return a run of one epoch, without its report."""
    overrides = ("epochs=1", "data.mean=[0.1,0.2,0.3]", "data.std=[0.5,0.5,0.5]", "attention=none")
    return made_once(tmp_path_factory, "trained", lambda folder: train(settings(camvid_root, *overrides), folder))


def settings(root, *overrides):
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        config = plain_config(compose("train", [*QUICK, "data=camvid", f"data.root={root}", *overrides]))
    complete_config(config)
    return config


def train(config, run, **options):
    seed_everything(config["seed"], workers=True, verbose=False)
    train_seeded(config, run, **options)


def last(run):
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)


class Snapshots(Callback):
    """Callback that keeps the checkpoint to resume from before each step."""

    def __init__(self, run, folder):
        self.run, self.folder = run, folder

    def on_train_batch_start(self, trainer, module, batch, batch_index):
        if trainer.global_step:
            shutil.copy(self.run / "checkpoints" / "last.ckpt", self.folder / f"{trainer.global_step}.ckpt")


def test_a_run_that_unfreezes_resumes_to_the_bit_without_its_source(trained, camvid_root, tmp_path):
    source = shutil.copytree(trained, tmp_path / "source")
    config = settings(
        camvid_root,
        f"init_from={source}",
        "freeze.parts=[encoder]",
        "freeze.until=1",
        "optimizer.layer_decay=0.5",
        "training.weight_averaging=0.9",
        "training.checkpoint_every=1",
    )
    run = tmp_path / "run"
    train(config, run, callbacks=[Snapshots(run, tmp_path)])
    shutil.rmtree(source)
    whole = last(run)

    # Two steps in each of two epochs: within the frozen epoch, before and after the first step of the other one.
    for step in (1, 2, 3):
        snapshot = torch.load(tmp_path / f"{step}.ckpt", weights_only=True)
        encoder = sum(name.startswith("model.encoder.") for name, _ in parameters(snapshot))
        state = snapshot["optimizer_states"][0]["state"]
        assert len(state) == len(parameters(snapshot)) - (encoder if step <= 2 else 0)
        resumed = tmp_path / f"run_{step}"
        shutil.copytree(run, resumed)
        shutil.copy(tmp_path / f"{step}.ckpt", resumed / "checkpoints" / "last.ckpt")
        train(config, resumed, resume=True)
        again = last(resumed)
        for key in ("state_dict", "current_model_state", "averaging_state", "optimizer_states", "lr_schedulers"):
            assert equal(again[key], whole[key]), (step, key)
    initial, frozen = (
        torch.load(path, weights_only=True)["state_dict"] for path in (best(trained), tmp_path / "2.ckpt")
    )
    kept = [name for name in initial if name.startswith("model.encoder.")]
    assert kept
    assert all(torch.equal(initial[name], frozen[name]) for name in kept)
    assert not all(torch.equal(initial[name], whole["state_dict"][name]) for name in kept)


def best(run):
    return Path(run) / "checkpoints" / "best.ckpt"


def parameters(checkpoint):
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    return [(name, value) for name, value in checkpoint["state_dict"].items() if not name.endswith(statistics)]


def equal(first, second):
    """Return whether two nested states are equal bit by bit."""
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(equal(first[key], second[key]) for key in first)
    if isinstance(first, list):
        return len(first) == len(second) and all(map(equal, first, second))
    return first == second


def test_a_command_starts_from_a_run_and_says_what_it_took(trained, camvid_root, tmp_path, run_script, monkeypatch):
    monkeypatch.chdir(trained.parent)
    run = tmp_path / "run"

    # The weights of the hub are not needed: the run gives the encoder.
    overrides = ("data=camvid", f"data.root={camvid_root}", f"hydra.run.dir={run}", "epochs=1")
    hub = ("model.encoder_weights=imagenet", "attention=eca", f"init_from={trained.name}", "freeze.parts=[encoder]")
    status, _, err = run_script("train", *QUICK, *overrides, *hub)

    assert status == 0, err
    table = (run / "init_from.txt").read_text()
    assert table in err
    assert re.search(r"^  encoder +80 +0 +0$", table, re.MULTILINE)
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["init_from"] == str(trained)
    assert config["data"]["mean"] == [0.1, 0.2, 0.3]
    state = last(run)["optimizer_states"][0]["state"]
    assert len(state) == len([name for name, _ in parameters(last(run)) if not name.startswith("model.encoder.")])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["init_from=missing"], "init_from=missing: no such file or folder"),
        (["init_from={root}"], "init_from=.*: the folder has no checkpoints/best.ckpt"),
        (["init_from={root}/val/masks/val_0.png"], "val_0.png: the file is truncated or not a checkpoint"),
        (["freeze.parts=[encodr]"], "freeze.parts: 'encodr' matches nothing in the model; .* Did you mean 'encoder'"),
        (["freeze.parts=[encoder,decoder,head,attention]"], "freeze.parts=.*: nothing would be left to train"),
        (["resume={run}", "init_from={run}"], "resume=.*: continues with the weights of that run, .* remove one"),
    ],
)
def test_a_mistake_ends_in_one_sentence(overrides, message, trained, camvid_root, tmp_path, run_script):
    filled = [text.replace("{root}", str(camvid_root)).replace("{run}", str(trained)) for text in overrides]
    common = [*QUICK, "data=camvid", f"data.root={camvid_root}", f"hydra.run.dir={tmp_path / 'run'}"]

    status, _, err = run_script("train", *common, *filled)

    assert status == 1
    (line,) = err.splitlines()
    assert re.search(message, line), line
    assert not (tmp_path / "run" / "checkpoints").exists()
