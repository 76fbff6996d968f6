import copy

import pytest
from hydra import compose, initialize_config_dir

from ema_seg.cli.checks import check_config, check_model
from ema_seg.cli.command_line import plain_config
from ema_seg.runtime.errors import CheckpointError, ConfigError, ModelError
from tests.conftest import QUICK, ROOT


@pytest.fixture(scope="module")
def config():
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        return plain_config(compose("train", [*QUICK, "data=camvid", "data.root=/nowhere"]))


def changed(config, **values):
    config = copy.deepcopy(config)
    for key, value in values.items():
        *path, last = key.split("__")
        node = config
        for part in path:
            node = node[part]
        node[last] = value
    return config


def test_what_can_be_trained_passes(config):
    check_config(config)
    check_config(changed(config, training__early_stopping=3, training__weight_averaging=0.9, trainer__strategy="ddp"))
    check_model(config)


@pytest.mark.parametrize(
    "values",
    [
        {"loss": {"cross_entropy": {"weight": 1.0, "class_weights": [1.0] * 11}}},
        {"trainer__max_epochs": None, "trainer__max_steps": 4},
        {"trainer__check_val_every_n_epoch": None, "trainer__val_check_interval": 2},
        {"trainer__val_check_interval": 0.5, "trainer__precision": 16},
        {"trainer__log_every_n_steps": None, "trainer__num_sanity_val_steps": None},
        {"training__early_stopping": 0, "training__weight_averaging": 0, "training__pictures_every": None},
    ],
)
def test_what_lightning_or_a_loss_takes_is_not_refused(config, values):
    check_config(changed(config, **values))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"seed": -1}, "seed: must be a whole number from 0 to 4294967295, got -1"),
        ({"seed": True}, "seed: must be a whole number from 0 to 4294967295, got True"),
        ({"data__root": None}, r"data\.root is not set"),
        (
            {"model__encoder": "tu-vit_small_patch14_dinov2.lvd142m"},
            r"model\.decoder=linknet: reads feature maps of several strides, .*; choose model=dpt, linear, unet, fpn, ",
        ),
        ({"model__auxiliary": 0}, r"model\.auxiliary: must be a number above 0, such as 0\.4, or null, got 0\."),
        ({"data__name": "camvit"}, r"data\.name='camvit'"),
        ({"data__classs": 3}, r"data\.classs=3 is not an option"),
        ({"data__batch_size": 0}, "batch_size"),
        ({"data__augmentation": {"crop": {"transform": "Cropp"}}}, "augmentation"),
        (
            {"training__weight_averaging": 1.5},
            r"training\.weight_averaging: must be a decay between 0 and 1, .* got 1\.5",
        ),
        (
            {"training__early_stopping": 1.5},
            r"training\.early_stopping: must be a number of validations, such as 10, got 1\.5",
        ),
        (
            {"training__pictures_every": -1},
            r"training\.pictures_every: must be a number of epochs, got -1; 0 draws none",
        ),
        ({"training__compile": "maybe"}, r"training\.compile: must be true or false, got 'maybe'"),
        ({"trainer__max_epochs": 2.5}, r"epochs=2\.5"),
        ({"trainer__max_epochs": 0}, "epochs=0"),
        (
            {"trainer__accumulate_grad_batches": 0},
            r"trainer\.accumulate_grad_batches: must be a whole number of at least 1, got 0",
        ),
        ({"trainer__acumulate_grad_batches": 2}, "Did you mean 'accumulate_grad_batches'"),
        ({"trainer__precision": "bf17"}, r"trainer\.precision: must be one of 32-true, .*, got 'bf17'"),
        ({"trainer__val_check_interval": 1000}, r"trainer\.val_check_interval=1000: an epoch may have fewer batches"),
        ({"trainer__overfit_batches": 1}, r"trainer\.overfit_batches=1: changes the order of the samples"),
        ({"trainer__reload_dataloaders_every_n_epochs": 1}, r"trainer\.reload_dataloaders_every_n_epochs=1: changes"),
        ({"trainer__max_time": 3}, r"trainer\.max_time: must be a time of the form days:hours:minutes:seconds, got 3"),
        ({"trainer__benchmark": 1}, r"trainer\.benchmark: must be true or false, got 1"),
        ({"trainer__gradient_clip_val": "abc"}, r"trainer\.gradient_clip_val: must be a number or null, got 'abc'"),
        ({"trainer__gradient_clip_algorithm": 3}, r"trainer\.gradient_clip_algorithm: must be norm or value, got 3"),
        ({"trainer__model_registry": [1]}, r"trainer\.model_registry: must be a name or null, got \[1\]"),
        ({"trainer__profiler": [1]}, r"trainer\.profiler: must be a name or null, got \[1\]"),
        ({"trainer__fast_dev_run": 0.5}, r"trainer\.fast_dev_run: must be a number of batches, got 0\.5"),
        ({"trainer__fast_dev_run": True}, r"trainer\.fast_dev_run=True: Lightning writes no checkpoint with it"),
        ({"trainer__fast_dev_run": 3}, r"trainer\.fast_dev_run=3: Lightning writes no checkpoint with it"),
        ({"trainer__limit_val_batches": 0}, r"trainer\.limit_val_batches=0: must be more than 0"),
        ({"trainer__limit_val_batches": 0.0}, r"trainer\.limit_val_batches=0\.0: must be more than 0"),
        ({"trainer__limit_train_batches": 0}, r"trainer\.limit_train_batches=0: must be more than 0"),
        ({"trainer__max_steps": 0}, r"trainer\.max_steps=0: must be more than 0"),
        (
            {"trainer__check_val_every_n_epoch": 3},
            r"trainer\.check_val_every_n_epoch=3: no epoch up to the last one, 2",
        ),
        (
            {"trainer__min_epochs": "two"},
            r"trainer\.min_epochs: must be a whole number of at least 0, or null, got 'two'",
        ),
        ({"optimizer__capturable": True}, "optimizer=.*'capturable': True.*torch cannot train with these"),
        ({"optimizer__differentiable": True}, "optimizer=.*'differentiable': True.*torch cannot train with these"),
        ({"optimizer__betas": [0.9]}, "optimizer: torch refuses"),
        ({"optimizer__model": 3}, r"optimizer\.model: adamw has no such option"),
        (
            {"optimizer__layer_decay": 1.5},
            r"optimizer\.layer_decay: must be a number above 0 and at most 1, or null, got",
        ),
        ({"freeze__parts": "encoder"}, r"freeze\.parts: must be a list of parts or patterns, such as \[encoder\], got"),
        ({"freeze__until": 1}, r"freeze\.until=1: has no effect without freeze\.parts"),
        ({"freeze": {"parts": ["encoder"], "until": 2}}, r"freeze\.until=2: must be less than the 2 epochs"),
        ({"freeze": {"part": ["encoder"]}}, r"freeze\.part: there is no such setting; .* Did you mean 'freeze\.parts'"),
        ({"schedule__optimizer": 3}, r"schedule\.optimizer: poly has no such option"),
        (
            {"loss": {"cross_entropy": {"label_smoothing": "x"}}},
            r"label_smoothing must be a number from 0 to 1, got 'x'",
        ),
        ({"loss": {"cross_entropy": {"label_smoothing": 7}}}, r"label_smoothing must be a number from 0 to 1, got 7"),
        (
            {"schedule": {"name": "poly", "power": -0.5}},
            r"schedule\.power=-0\.5: poly must give a learning rate from 0",
        ),
        ({"placement__encoder": "yes"}, r"placement\.encoder: must be true or false, got 'yes'"),
        ({"training__chekpoint_every": 3}, r"training\.chekpoint_every: there is no such setting"),
        ({"report": 3}, "report: must be a section of settings, got 3; set report.<name>=<value>"),
        ({"loss": {"diec": {"weight": 1}}}, r"loss\.diec"),
        ({"optimizer__momentun": 0.9}, "optimizer"),
        ({"optimizer__lr": "fast"}, r"optimizer\.lr: must be a number, got 'fast'"),
        ({"optimizer__lr": float("nan")}, r"optimizer\.lr: must be a number, got nan"),
        ({"schedule__power": "steep", "schedule__powr": 1}, r"schedule\.powr"),
        ({"logger__paper": {}}, r"logger\.paper: must be one of"),
        ({"attention__name": "emma"}, "must be one of none, ema, .* Did you mean 'ema'"),
        ({"model__decoder": "unnet"}, r"model\.decoder='unnet': must be one of unet, .* Did you mean 'unet'"),
        ({"optimizer__name": "adamv"}, r"optimizer\.name='adamv': timm has no such optimiser; .*'adam'"),
        (
            {"schedule__name": "linear"},
            r"schedule\.name='linear': must be one of constant, cosine, multistep, poly, step",
        ),
        ({"trainer__gpus": 2}, r"no such option\. Did you mean 'trainer\.devices'"),
        ({"data__workers": "two"}, r"data\.workers: must be a whole number from 0 to 1024 .*, got 'two'"),
        ({"evaluation__batch_size": 2.5}, r"evaluation\.batch_size: must be a whole number of at least 1, got 2\.5"),
        ({"evaluation__budget": "long"}, r"evaluation\.budget: must be a positive number of seconds, got 'long'"),
        (
            {"evaluation__size": [4]},
            r"evaluation\.size: must be \[height,width\] in pixels, such as \[512,1024\], got \[4\]",
        ),
        ({"evaluation__precision": "8"}, r"evaluation\.precision: must be 32-true, bf16-mixed or 16-mixed, got '8'"),
    ],
)
def test_what_cannot_is_named_without_data_or_model(config, values, message):
    with pytest.raises(ConfigError, match=message):
        check_config(changed(config, **values))


def test_a_setting_that_is_missing_is_named(config):
    config = copy.deepcopy(config)
    del config["training"]["compile"]
    with pytest.raises(ConfigError, match=r"training\.compile: missing; every configuration must have it"):
        check_config(config)


def test_another_machines_device_is_no_mistake(config):
    check_config(changed(config, trainer__accelerator="gpu", evaluation__device="cuda:7"))


def test_a_model_that_cannot_be_built_is_named(config):
    with pytest.raises(ModelError, match="factor"):
        check_model(changed(config, attention__factor=7))
    with pytest.raises(ConfigError, match=r"freeze\.parts: 'encodr' matches nothing .* Did you mean 'encoder"):
        check_model(changed(config, freeze__parts=["encodr"]))
    with pytest.raises(CheckpointError, match=r"model\.encoder_weights=/nowhere\.pth: no such file"):
        check_model(changed(config, model__encoder_weights="/nowhere.pth"))
    check_model(changed(config, model__encoder_weights="imagenet"))  # not downloaded by the check
