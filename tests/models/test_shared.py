"""Tests of shared models: what a folder holds, that it loads to the bit, and that other folders are refused."""

import copy
import json
import pickle
import stat
from pathlib import Path

import pytest
import segmentation_models_pytorch as smp
import torch
from safetensors.torch import load_file, save_file

import ema_seg
from ema_seg.cli.command_line import config_of_run_or_checkpoint
from ema_seg.models import build_segmenter, load_checkpoint, load_segmenter, segmenter_from_config, shared
from ema_seg.models.card import render_card, shared_command
from ema_seg.models.checkpoint import checkpoint_path
from ema_seg.models.shared import shared_config
from ema_seg.runtime.errors import CheckpointError, ConfigError, DataError
from ema_seg.training.initial import load_trained

CONFIG = {
    "seed": 0,
    "epochs": 3,
    "data": {
        "name": "folder",
        "root": "/home/someone/secret",
        "classes": "/home/someone/classes.yaml",
        "cache": "/scratch",
        "mean": [0.5, 0.4, 0.3],
        "std": [0.25, 0.2, 0.1],
        "orientation": "ignore",
        "augmentation": {"crop": {"transform": "ScaledCrop", "height": 64, "width": 96}},
    },
    "model": {
        "decoder": "linknet",
        "encoder": "tu-test_efficientnet",
        "encoder_weights": "secret.pth",
        "auxiliary": 0.4,
    },
    "attention": {"name": "ema", "factor": "auto"},
    "placement": {"encoder": False, "decoder": True, "head": False, "encoder_stages": None},
    "optimizer": {"name": "adamw", "lr": 1e-3, "note": "C:\\secret"},
    "trainer": {"precision": "bf16-mixed", "devices": 2, "default_root_dir": "/home/someone"},
    "training": {"tf32": True, "progress_bar": "auto"},
    "evaluation": {"precision": "bf16-mixed", "channels_last": True, "device": "cuda:3"},
    "logger": {"wandb": {"project": "secret"}},
    "report": {"dir": "/home/someone/secret"},
    "init_from": "/home/someone/secret",
}
CLASSES = ["road", "sky | <b>"]


def write_checkpoint(path):
    """Write a checkpoint of a small model whose batch norms have statistics of their own; return the model."""
    torch.manual_seed(1)
    model = segmenter_from_config(CONFIG, 2, pretrained=False).eval()
    for tensor in model.state_dict().values():
        tensor.copy_(torch.rand(tensor.shape) if tensor.is_floating_point() else torch.tensor(7))
    weights = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    palette = [[1, 2, 3], [4, 5, 6]]
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": weights, "config": CONFIG, "classes": CLASSES, "palette": palette}, path)
    return model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "some.ckpt"
    write_checkpoint(path)
    return path


@pytest.fixture
def model(checkpoint):
    return load_segmenter(checkpoint)[0]


@pytest.fixture
def folder(model, tmp_path):
    model.save_pretrained(tmp_path / "shared")
    return tmp_path / "shared"


def change(folder, **values):
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, **values}))


def test_a_folder_loads_to_the_bit(checkpoint, model, folder):
    before, after = load_checkpoint(checkpoint), load_checkpoint(checkpoint_path(folder))
    segmenter = ema_seg.load(folder, device="cpu")

    for other in (segmenter.model, type(model).from_pretrained(folder)):
        expected, found = model.state_dict(), other.state_dict()
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[name], found[name]) for name in expected)
        assert all(expected[name].dtype == found[name].dtype for name in expected)
    assert before["state_dict"].keys() == after["state_dict"].keys()
    assert (segmenter.classes, segmenter.palette) == (tuple(CLASSES), ((1, 2, 3), (4, 5, 6)))
    assert (segmenter.upright, segmenter.precision, segmenter._tf32) == (False, "bf16-mixed", True)
    assert segmenter.normalise.mean == (0.5, 0.4, 0.3)
    assert {path.name for path in folder.iterdir()} == {
        *("config.json", "model.safetensors", "README.md", "written_files.json")
    }


def test_a_folder_goes_where_a_checkpoint_goes(checkpoint, folder):
    whole, taken = load_trained(str(checkpoint)), load_trained(str(folder))

    assert whole.tensors.keys() == taken.tensors.keys()
    assert taken.classes == CLASSES
    assert config_of_run_or_checkpoint(folder, "ckpt") == shared_config(CONFIG)
    assert checkpoint_path(folder / "model.safetensors") == checkpoint_path(folder)


def test_what_is_private_stays_here(folder):
    written = "".join((folder / name).read_text() for name in ("config.json", "README.md"))
    config = json.loads((folder / "config.json").read_text())["config"]

    for word in ("secret", "someone", "scratch", "wandb", "cuda:3"):
        assert word not in written
    assert config["data"]["root"] == "???"  # an evaluation asks for it
    assert config["model"]["encoder_weights"] == config["optimizer"]["note"] == "file"
    assert config["model"]["auxiliary"] is None
    assert config["trainer"] == {"precision": "bf16-mixed"}
    assert config["data"]["mean"] == CONFIG["data"]["mean"]


def test_a_command_is_shown_without_paths():
    command = ["/home/me/train.py", "data=camvid", "data.root=secret", "model.encoder_weights=x.pth", "init_from=run"]
    command += ["logger=wandb", "+logger.wandb.project=secret", "hydra.run.dir=secret", "--config-dir", "/secret"]
    command += [
        "++data.extra=a/b",
        "resume=secret",
        "optimizer.lr=1e-3",
        "data.size=[1, 2]",
        "-m",
        "data={root:secret}",
    ]
    command += ["trainer.default_root_dir=secret", "sweep.folder=secret", "--config-dir=secret", "trainer.devices=2"]
    command += ["~data.augmentation.flip", "trainer=gpu"]

    assert shared_command(command) == (
        "python train.py data=camvid data.root=… model.encoder_weights=… init_from=… ++data.extra=… resume=… "
        "optimizer.lr=1e-3 'data.size=[1, 2]' -m data=… trainer.devices=2 '~data.augmentation.flip' trainer=gpu"
    )
    assert shared_command(["/home/me/bin/ema-seg train", "epochs=1"]) == "ema-seg train epochs=1"
    assert shared_command(["/home/me/ema_seg/__main__.py train"]) == "python -m ema_seg train"


def test_the_card_of_a_model_that_is_saved_again_knows_its_start(folder, tmp_path):
    ema_seg.load(folder, device="cpu").model.save_pretrained(tmp_path / "again")

    assert "- start: another model's weights\n" in (tmp_path / "again" / "README.md").read_text()


def test_a_loss_that_is_switched_off_is_not_in_the_card():
    card = render_card(config=CONFIG | {"loss": {"cross_entropy": {"weight": 1}, "dice": None}}, classes=CLASSES)

    assert "- loss: cross_entropy\n" in card


def test_names_of_classes_are_no_markup_in_the_card(folder):
    card = (folder / "README.md").read_text()

    assert r"road, sky \| \<b>" in card
    assert "Scores were not measured for these weights." in card
    assert "Not stated." in card
    assert "crops of 64 x 96 pixels" in card
    assert "- seed: 0\n" in card
    assert "- start: another model's weights\n" in card


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"schema": "ema-seg.model/2"}, r"must be a model with the schema 'ema-seg.model/1', got 'ema-seg.model/2'"),
        ({"schema": None}, "must be a model with the schema 'ema-seg.model/1', got None"),
        ({"classes": ["road"] * 3, "palette": None}, "its weights do not fit the model of its config"),
        ({"classes": "road"}, "its classes must be a list of names"),
        ({"palette": [[0, 0, 256], [0, 0, 0]]}, "its palette must hold three numbers"),
        ({"config": {}}, "its config was not written by train.py .*missing"),
        ({"config": {**shared_config(CONFIG), "seed": "${oc.env:HOME}"}}, "the interpolation"),
    ],
)
def test_a_folder_of_another_form_is_one_sentence(values, message, folder):
    change(folder, **values)

    with pytest.raises(CheckpointError, match=message) as raised:
        ema_seg.load(folder, device="cpu")
    assert str(folder) in str(raised.value)


def test_a_missing_or_damaged_file_is_one_sentence(folder):
    weights, config = folder / "model.safetensors", folder / "config.json"
    tensors = {name: tensor.clone() for name, tensor in load_file(weights).items()}
    name = next(name for name, tensor in tensors.items() if tensor.is_floating_point())
    content = weights.read_bytes()
    for wrong, message in (
        (content[:1000], "is truncated or not a safetensors file"),
        (b"", "is truncated or not a safetensors file"),
        (pickle.dumps({"a": 1}), "is truncated or not a safetensors file"),
    ):
        weights.write_bytes(wrong)
        with pytest.raises(CheckpointError, match=rf"model\.safetensors: {message}"):
            load_checkpoint(checkpoint_path(folder))
    save_file({**tensors, name: torch.full_like(tensors[name], torch.nan)}, weights)
    with pytest.raises(CheckpointError, match=f"model.{name} holds nan"):
        load_checkpoint(checkpoint_path(folder))
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors: no such file; get the model again"):
        load_checkpoint(checkpoint_path(folder))
    for wrong in ('{"schema": NaN}', "[" * 1000, "{}", "[]"):
        config.write_text(wrong)
        with pytest.raises(CheckpointError, match=r"config\.json: (is not JSON|must be a model)"):
            load_checkpoint(checkpoint_path(folder))
    config.unlink()
    with pytest.raises(DataError, match=r"the folder has no checkpoints/best\.ckpt"):
        checkpoint_path(folder)


def test_code_in_a_folder_does_not_run(folder, tmp_path):
    for name in ("model.py", "__init__.py", "modeling.py"):
        (folder / name).write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    change(folder, auto_map={"AutoModel": "model.Model"}, _model_class="os.system")

    ema_seg.load(folder, device="cpu")

    assert not (tmp_path / "ran").exists()


def test_smp_does_not_take_the_folder_for_one_of_its_own(folder):
    with pytest.raises(AttributeError, match=r"no attribute 'ema_seg\.load'"):
        smp.from_pretrained(folder)
    with pytest.raises(TypeError):
        smp.Linknet.from_pretrained(folder, encoder_name="tu-test_efficientnet", encoder_weights=None)


def test_models_whose_classes_are_not_known_and_other_architectures_are_refused(folder, tmp_path):
    built = build_segmenter("fpn", classes=2, encoder="tu-test_efficientnet")

    with pytest.raises(ConfigError, match=r"save_pretrained: the model has no class names .* ema_seg\.load"):
        built.save_pretrained(tmp_path / "built")
    assert not (tmp_path / "built").exists()
    with pytest.raises(CheckpointError, match=r"is a Linknet, expected a FPN; load it with ema_seg\.load"):
        type(built).from_pretrained(folder)
    with pytest.raises(ConfigError, match="generate_model_card"):
        built.generate_model_card()


def test_models_are_still_of_smp_and_can_be_pickled_and_copied(model):
    assert isinstance(model, smp.Linknet)
    for other in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert type(other) is type(model)
        assert other.origin == model.origin


def test_changed_weights_are_saved_as_they_are(model, tmp_path):
    with torch.no_grad():
        model.segmentation_head[0].bias.add_(1)
    model.to(memory_format=torch.channels_last).save_pretrained(tmp_path / "shared")

    found = ema_seg.load(tmp_path / "shared", device="cpu").model

    assert all(map(torch.equal, model.state_dict().values(), found.state_dict().values()))


def test_a_folder_of_others_is_left_alone(model, folder, tmp_path):
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "README.md").write_text("mine")
    (tmp_path / "file").touch()
    before = (folder / "config.json").stat().st_mtime_ns

    with pytest.raises(DataError, match=r"foreign: has files that ema-seg did not write as a model, such as README"):
        model.save_pretrained(foreign, overwrite=True)
    with pytest.raises(DataError, match=r"shared: has a model already; .* overwrite=true"):
        model.save_pretrained(folder)
    with pytest.raises(DataError, match="file: is a file; give a folder"):
        model.save_pretrained(tmp_path / "file")
    assert [path.name for path in foreign.iterdir()] == ["README.md"]
    assert (folder / "config.json").stat().st_mtime_ns == before
    assert {path.name for path in tmp_path.iterdir()} == {"shared", "foreign", "file"}


def test_a_folder_may_be_the_present_one_a_link_or_empty(model, tmp_path, monkeypatch):
    for name in ("present", "target"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "target")
    monkeypatch.chdir(tmp_path / "present")

    for folder in (".", tmp_path / "link"):
        model.save_pretrained(folder)
        model.save_pretrained(folder, overwrite=True)
        assert ema_seg.load(folder, device="cpu").classes == tuple(CLASSES)
    assert (tmp_path / "link").is_symlink()


def test_a_model_that_came_from_the_hub_can_be_replaced(model, folder):
    (folder / "written_files.json").unlink()  # is not uploaded

    model.save_pretrained(folder, overwrite=True)

    assert ema_seg.load(folder, device="cpu").classes == tuple(CLASSES)


def test_a_revision_is_one_of_the_hub(model, folder, hub):
    kind, (_, calls) = type(model), hub
    model.push_to_hub("me/street")
    assert 'ema_seg.load("hf://me/street")' in (hub[0] / "README.md").read_text()

    for source in ("me/street", "hf://me/street"):
        kind.from_pretrained(source, revision="v1")
    kind.from_pretrained("hf://me/street@v1")
    assert [call[:3] for call in calls[1:]] == [("download", "me/street", "v1")] * 3
    for source in (folder, "hf://me/street@v2"):
        with pytest.raises(ConfigError, match=r"revision=v1: .* is a folder or has a revision; remove one of the two"):
            kind.from_pretrained(source, revision="v1")
    with pytest.raises(DataError, match="no such folder or file"):
        kind.from_pretrained(folder / "missing")


def test_an_earlier_model_is_replaced_and_other_files_stay(model, folder):
    (folder / "notes.txt").write_text("mine")
    (folder / "panel.png").write_text("mine")
    with torch.no_grad():
        model.segmentation_head[0].bias.add_(1)

    model.save_pretrained(folder, overwrite=True)

    assert (folder / "notes.txt").read_text() == (folder / "panel.png").read_text() == "mine"
    found = ema_seg.load(folder, device="cpu").model
    assert torch.equal(found.segmentation_head[0].bias, model.segmentation_head[0].bias)
    modes = {stat.S_IMODE(path.stat().st_mode) & 0o044 for path in folder.iterdir() if path.name != "notes.txt"}
    assert modes == {0o044}


def test_a_folder_is_written_whole_or_not_at_all(model, folder, tmp_path, monkeypatch):
    def fail(*_):
        raise DataError("disk full")

    monkeypatch.setattr(shared, "write_file", fail)
    for target, options in ((tmp_path / "new", {}), (folder, {"overwrite": True})):
        with pytest.raises(DataError, match="disk full"):
            model.save_pretrained(target, **options)

    assert [path.name for path in tmp_path.iterdir()] == ["shared"]
    assert ema_seg.load(folder, device="cpu").classes == tuple(CLASSES)


def test_an_interrupted_replacement_is_no_mixture_and_can_be_repeated(model, folder, monkeypatch):
    def interrupt(path, target):
        if target.name == "model.safetensors":
            raise OSError(28, "No space left on device")
        return replace(path, target)

    replace = Path.replace
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", interrupt)
        with pytest.raises(DataError, match="shared: cannot be written"):
            model.save_pretrained(folder, overwrite=True)
    with pytest.raises(DataError, match="the folder has no"):
        ema_seg.load(folder)

    model.save_pretrained(folder, overwrite=True)
    assert ema_seg.load(folder, device="cpu").classes == tuple(CLASSES)
