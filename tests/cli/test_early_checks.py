"""Early refusal of a user's mistake: within seconds, in one sentence that says how to correct it."""

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import segmentation_models_pytorch as smp
import timm
import timm.optim
from lightning import Trainer
from lightning.pytorch.loggers import WandbLogger
from torch.optim import SGD

from ema_seg.attention import attention_names
from ema_seg.cli import command_line, early_checks, sources
from ema_seg.cli.command_line import read_config, reports_errors
from ema_seg.cli.early_checks import check_root, check_source
from ema_seg.cli.launch import complete_paths
from ema_seg.models import decoder_names
from ema_seg.models.vision_transformer import _MODULES
from ema_seg.runtime.errors import ConfigError, DataError
from ema_seg.training import optimisation
from ema_seg.training.losses import loss_names
from tests.conftest import ROOT
from tests.models.test_vision_transformer import EXPECTED

HEAVY = """
import contextlib, importlib, io, sys
from hydra.core.global_hydra import GlobalHydra

for script, *arguments in {commands!r}:
    sys.argv = [script + ".py", *arguments]
    GlobalHydra.instance().clear()
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            importlib.import_module("ema_seg.cli." + script).main()
    except SystemExit as end:
        assert end.code == 1
    print(said.getvalue().strip())
heavy = {{"torch", "lightning", "albumentations", "cv2", "matplotlib", "timm"}} & set(sys.modules)
assert not heavy, heavy
"""


@pytest.mark.slow
def test_a_refusal_that_needs_no_heavy_library_imports_none(tmp_path):
    refused = {
        ("train", "epochs=ten"): "error: epochs: must be a whole number of at least 1, got 'ten'",
        ("train", "model.encoder=resnet81"): "error: model.encoder: neither smp nor timm has an encoder 'resnet81'",
        ("train", "data=folder", "data.root=missing"): "error: data.root=missing: no such file or folder",
        ("train", "data=street", "init_from=missing"): "error: init_from=missing: no such file or folder",
        ("train", "data=street", "init_from=."): "error: init_from=.: the folder has no checkpoints/best.ckpt",
        (
            "train",
            "data=street",
            "init_from=hf://me",
        ): "error: hf://me: must be hf://user/name or hf://user/name@revision",
        ("train", "resume=run", "init_from=run"): "error: resume=run: continues with the weights of that run",
        ("train", "optimizer.name=adamv"): "error: optimizer.name='adamv': timm has no such optimiser",
        ("train", "schedule.name=cosin"): "error: schedule.name='cosin': must be one of constant, cosine",
        ("train", "resume=auto", "data=folder", "data.root=missing"): "error: data.root=missing: no such file",
        ("train", "logger=[tensorboard,mlflow]"): "error: logger=mlflow: its package is not installed; run pip install",
        ("eval", "ckpt=missing.ckpt"): "error: ckpt=missing.ckpt: no such file",
    }
    commands = [(*command, f"hydra.run.dir={tmp_path}") for command in refused]

    done = subprocess.run(
        [sys.executable, "-c", HEAVY.format(commands=commands)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )

    assert done.returncode == 0, done.stderr
    for line, said in zip(done.stdout.splitlines(), refused.values(), strict=True):
        assert line.startswith(said)


def test_names_read_from_source_files_are_those_of_the_libraries():
    assert set(sources.timm_models()) == set(timm.models._registry._model_entrypoints)
    assert set(timm.list_models(module=_MODULES)) <= set(sources.plain_transformers()) < set(sources.timm_models())
    assert set(early_checks._decoders()) == set(decoder_names())
    assert sources.read_keys(early_checks._BUILD, "_TRANSFORMER_DECODERS") == list(EXPECTED)
    assert early_checks.options_of("model", {"model": {"decoder": "linear"}})[-1] == "decoder_maps"
    assert sorted(sources.smp_encoders()) == sorted(smp.encoders.encoders)
    assert sources.smp_decoders() == list(smp.MODEL_ARCHITECTURES_MAPPING)
    assert tuple(sources.read_keys("ema_seg/attention/__init__.py", "_BLOCKS")) == attention_names()
    assert set(sources.timm_optimizers()) == set(timm.optim.list_optimizers())
    assert sources.timm_schedules() == ["constant", *sorted(optimisation._schedules())]
    assert tuple(sources.read_keys("ema_seg/training/losses.py", "_LOSSES")) == loss_names()
    for folder, part in (
        ("lightning/pytorch/trainer/trainer.py", Trainer),
        ("segmentation_models_pytorch/decoders", smp.DeepLabV3Plus),
        ("torch/optim", SGD),
    ):
        assert sources.read_parameters(folder, part.__name__.lower()) == [
            name
            for name, parameter in inspect.signature(part).parameters.items()
            if parameter.kind.name != "VAR_KEYWORD"
        ]
    assert set(sources.read_parameters("lightning/pytorch/loggers", "wandblogger")) < {
        *inspect.signature(WandbLogger).parameters
    }


def test_files_of_another_form_leave_it_to_the_libraries(monkeypatch):
    assert sources.read_keys("ema_seg/attention/__init__.py", "_NOT_THERE") == []
    assert sources.read_keys("no_such_package/__init__.py", "_BLOCKS") == []
    assert sources.read_parameters("torch/optim", "no_such_optimiser") == []
    monkeypatch.setattr(early_checks, "timm_models", list)

    early_checks._check_encoder("resnet81")


def test_a_root_that_is_made_or_does_not_answer_is_no_missing_one(monkeypatch, tmp_path):
    check_root({"name": "street", "root": str(tmp_path / "missing")})
    check_root({"name": "camvid", "root": str(tmp_path)})
    with pytest.raises(DataError, match=r"data\.root=.*missing: no such file or folder"):
        check_root({"name": "camvid", "root": str(tmp_path / "missing")})
    monkeypatch.setattr(early_checks, "_DISK_TIMEOUT", 0.0)
    monkeypatch.setattr(early_checks, "Thread", lambda **_: type("Stuck", (), {"start": lambda self: None})())

    check_root({"name": "camvid", "root": str(tmp_path / "missing")})


@pytest.mark.parametrize(
    ("script", "overrides", "said"),
    [
        ("train", ["trainer.limit_train_batches=2"], r"add it with \+trainer\.limit_train_batches=2$"),
        (
            "train",
            ["model.decoder_atrous_rates=[1,2,3]", "model=deeplabv3plus"],
            r"add it with \+model\.decoder_atrous",
        ),
        ("train", ["optimizer.amsgrat=true"], r"Did you mean '\+optimizer\.amsgrad'\?$"),
        ("train", ["optimizer.name=lion", "optimizer.beta=1"], r"Did you mean '\+optimizer\.betas'\?$"),
        ("train", ["optimizer=lion"], r"choose from adamw, sgd\. timm's lion is optimizer\.name=lion\.$"),
        ("train", ["freeze_encoder=true"], r"Did you mean 'freeze\.parts'\?$"),
        ("train", ["loss.lovasz.weight=1"], r"add it with \+loss\.lovasz\.weight=1$"),
        ("train", ["logger.project=x", "logger=wandb"], r"Did you mean 'logger\.wandb\.project'\?$"),
        ("train", ["ckpt_path=a.ckpt"], r"resume=<folder of a run> goes on with a run; python eval\.py ckpt=<file>"),
        ("eval", ["ckpt_path=a.ckpt"], r"Did you mean 'ckpt'\?$"),
        ("train", ["+model=fpn"], r"the group model is chosen already; write model=<option>, without the \+\.$"),
        ("train", ["--epochs", "3"], r"^error: --epochs: there is no such option; .* as in epochs=3 "),
        ("train", ["logger=false"], r"option of logger; choose from csv, mlflow, none, tensorboard, wandb\.$"),
        ("train", ["+experiment=nosuch"], r"experiment=nosuch: there is no such option; choose from camvid\.$"),
    ],
)
def test_a_habit_of_other_programs_leads_to_the_setting(script, overrides, said, run_script):
    status, _, err = run_script(script, *overrides)

    assert status == 1
    (line,) = err.splitlines()
    assert re.search(said, line), line


@pytest.mark.parametrize(
    ("saved", "read"),
    [
        ("{name: wandb, project: leaves}", {"wandb": {"project": "leaves"}}),
        ("{name: none}", {}),
        ("{tensorboard: {}}", {"tensorboard": {}}),
    ],
)
def test_a_logger_that_an_earlier_version_saved_is_read(saved, read, tmp_path):
    (tmp_path / "config.yaml").write_text(f"logger: {saved}\n")

    assert read_config(tmp_path, key="resume")["logger"] == read


@pytest.mark.parametrize("wanted", [True, False])
def test_the_users_own_variable_brings_the_traceback(wanted, monkeypatch, capsys):
    monkeypatch.setattr(command_line, "_WANTS_TRACEBACK", wanted)

    @reports_errors
    def refuse():
        raise ConfigError("epochs=ten is no number.")

    with pytest.raises(SystemExit):
        refuse()

    lines = capsys.readouterr().err.splitlines()
    assert lines[-1] == "error: epochs=ten is no number."
    assert (lines[0] == "Traceback (most recent call last):") is wanted
    assert (len(lines) > 1) is wanted


def test_a_source_is_a_run_a_shared_model_or_an_address(tmp_path):
    (tmp_path / "config.json").touch()

    for source in (None, str(tmp_path), "hf://user/name", "hf://user/name@v1"):
        check_source(source)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"the folder has no checkpoints/best\.ckpt"):
        check_source(str(tmp_path))


def test_an_address_of_the_hub_is_no_path_of_a_run():
    config = {"data": {"root": "data", "classes": None}, "init_from": "hf://user/name"}

    complete_paths(config)

    assert config == {"data": {"root": str(Path("data").absolute()), "classes": None}, "init_from": "hf://user/name"}
