import copy

import pytest
import torch

from ema_seg.models import build_segmenter, load_checkpoint, load_segmenter, segmenter_from_config
from ema_seg.runtime.errors import CheckpointError, Preempted

CHECKPOINT = {
    "state_dict": {"model.head.weight": torch.zeros(1)},
    "classes": ["road", "sky"],
    "config": {
        "data": {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]},
        "model": {"decoder": "fpn", "encoder": "resnet18", "encoder_weights": None},
        "attention": {"name": "none"},
        "placement": {"encoder": False, "decoder": True, "head": False, "encoder_stages": None},
        "trainer": {},
    },
}


@pytest.fixture
def saved(tmp_path):
    def save(path="", value=None):
        checkpoint = copy.deepcopy(CHECKPOINT)
        if path:
            *sections, last = path.split(".")
            node = checkpoint
            for section in sections:
                node = node[section]
            node[last] = value
        torch.save(checkpoint, tmp_path / "some.ckpt")
        return tmp_path / "some.ckpt"

    return save


def test_a_checkpoint_of_the_right_form_is_read(saved):
    assert load_checkpoint(saved())["classes"] == ["road", "sky"]


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("config", 3, "its config must hold settings by name"),
        ("config", [], "its config must hold settings by name"),
        ("config.model", 3, "model: must be a section of settings, got 3"),
        ("config.model.decoder", {}, "model.decoder: must be a name, got {}"),
        ("config.data", 3, "data: must be a section of settings, got 3"),
        (
            "config.data.mean",
            "grey",
            "data.mean: must be three numbers, one for each of red, green and blue, got 'grey'",
        ),
        ("config.placement", None, "placement: must be a section of settings, got None"),
        ("config.trainer", "gpu", "trainer: must be a section of settings, got 'gpu'"),
        ("classes", 2, "its classes must be a list of names"),
        ("classes", [], "its classes must be a list of names"),
        ("palette", [[0, 0, 256]], "its palette must hold three numbers from 0 to 255"),
        ("state_dict", [], "its state_dict must hold weights by name"),
        ("state_dict", {1: torch.zeros(1)}, "its state_dict must hold weights by name"),
    ],
)
def test_plain_data_of_another_form_is_named(path, value, message, saved):
    with pytest.raises(CheckpointError) as raised:
        load_checkpoint(saved(path, value))
    assert str(raised.value).startswith("ckpt=")
    assert message in str(raised.value)


def test_a_setting_that_a_checkpoint_lacks_is_named(saved):
    config = {name: section for name, section in CHECKPOINT["config"].items() if name != "placement"}
    found = r"some\.ckpt: its config was not written by train\.py \(placement: missing; .*\); give another"
    with pytest.raises(CheckpointError, match=found):
        load_checkpoint(saved("config", config))


def test_a_signal_while_a_file_is_read_is_no_damage_of_it(saved, monkeypatch):
    def leave(*arguments, **keywords):
        raise Preempted("stopped by SIGTERM.")

    path = saved()
    monkeypatch.setattr(torch, "load", leave)
    with pytest.raises(Preempted):
        load_checkpoint(path)
    with pytest.raises(Preempted):
        build_segmenter("fpn", classes=2, encoder="resnet18", encoder_weights=str(path))


@pytest.mark.filterwarnings("ignore:EMA's factor")
def test_a_checkpoint_from_before_keeps_its_single_channels(tmp_path):
    """In earlier versions, factor=auto gave a decoder of 32 channels 32 groups."""
    config = {
        **CHECKPOINT["config"],
        "model": {"decoder": "linknet", "encoder": "tu-test_efficientnet", "encoder_weights": None},
        "attention": {"name": "ema", "factor": "auto"},
        "placement": {"encoder": False, "decoder": False, "head": True, "encoder_stages": None},
    }
    before = segmenter_from_config({**config, "attention": {"name": "ema", "factor": 32}}, 2).eval()
    weights = {f"model.{name}": tensor for name, tensor in before.state_dict().items()}
    torch.save({**CHECKPOINT, "state_dict": weights, "config": config}, tmp_path / "some.ckpt")
    images = torch.randn(1, 3, 64, 64)

    model, _ = load_segmenter(tmp_path / "some.ckpt")

    assert model.segmentation_head.attention.groups == 32
    assert torch.equal(model(images), before(images))
