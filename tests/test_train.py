"""Trainings from the configuration to the loaded model."""

import csv

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from lightning import seed_everything

import ema_seg
from ema_seg.cli.command_line import plain_config
from ema_seg.models import load_checkpoint
from ema_seg.runtime.errors import ConfigError
from ema_seg.train import train
from ema_seg.training.module import SegmentationModule
from tests.conftest import QUICK, ROOT


@pytest.fixture
def config(camvid_root):
    """Return a function that composes a short training's configuration."""

    def composed(*overrides):
        fixed = ("data=camvid", f"data.root={camvid_root}", "schedule=constant", "training.loss_strips=8")
        with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
            config = plain_config(compose("train", [*QUICK, *fixed, *overrides]))
        config["data"] |= {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}
        return config

    return composed


def test_a_training_with_an_auxiliary_head_resumes_and_leaves_a_model_without_it(config, tmp_path):
    seed_everything(0, verbose=False)
    best = train(config("model.auxiliary=0.4"), tmp_path / "whole", quiet=True)
    seed_everything(0, verbose=False)
    train(config("model.auxiliary=0.4", "epochs=1"), tmp_path / "parts", quiet=True)
    seed_everything(0, verbose=False)
    train(config("model.auxiliary=0.4"), tmp_path / "parts", resume=True, quiet=True)

    whole, parts = (load_checkpoint(tmp_path / run / "checkpoints" / "last.ckpt") for run in ("whole", "parts"))
    assert "model.auxiliary.layers.0.weight" in whole["state_dict"]
    assert all(torch.equal(tensor, parts["state_dict"][name]) for name, tensor in whole["state_dict"].items())
    with (tmp_path / "whole" / "metrics.csv").open() as file:
        assert all(float(row["train/auxiliary_loss"]) > 0 for row in csv.DictReader(file))
    assert not any("auxiliary" in name for name in ema_seg.load(best, device="cpu").model.state_dict())
    again = SegmentationModule.load_from_checkpoint(tmp_path / "whole" / "checkpoints" / "last.ckpt")
    assert again.auxiliary_weight == 0.4
    assert torch.equal(again.model.auxiliary.layers[0].weight, whole["state_dict"]["model.auxiliary.layers.0.weight"])
    with pytest.raises(ConfigError, match=r"model\.auxiliary=None: must be 0\.4, as in the checkpoint"):
        train(config(), tmp_path / "whole", resume=True, quiet=True)


def test_a_foundation_encoder_is_trained_with_crops_that_its_patches_do_not_divide(config, tmp_path):
    transformer = ("model=linear", "model.encoder=tu-vit_small_patch14_dinov2", "model.encoder_weights=null")
    narrow = ("+model.embed_dim=32", "+model.num_heads=2", "+model.img_size=56")
    rest = ("placement=everywhere", "model.auxiliary=0.4", "trainer.precision=bf16-mixed", "epochs=1")

    best = train(config(*transformer, *narrow, *rest), tmp_path, quiet=True)

    segmenter = ema_seg.load(best, device="cpu")
    assert segmenter.stride == 14
    assert segmenter(np.zeros((45, 61, 3), np.uint8)).mask.shape == (45, 61)
