"""Checks of a configuration before anything is trained."""

import inspect
import json
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from lightning import Trainer
from torch import nn
from torch.optim import Optimizer

from ema_seg.cli.early_checks import check_early
from ema_seg.data import SegmentationDataModule, check_dataset
from ema_seg.data.datamodule import check_batch_divides
from ema_seg.inference.protocol import check_protocol
from ema_seg.models import segmenter_from_config
from ema_seg.runtime.distributed.ranks import single_process
from ema_seg.runtime.errors import ConfigError, did_you_mean, one_line
from ema_seg.training.freezing import find_parts
from ema_seg.training.loggers import check_loggers
from ema_seg.training.losses import build_loss
from ema_seg.training.optimisation import build_optimizer, build_schedule
from ema_seg.training.parallel.strategy import requested_world_size

__all__ = ["check_config", "check_model"]

# Placeholder: the number of classes is not known without the data, and only the model's head depends on it.
_CLASSES = 2
# Lightning's options that change the order of the samples.
_REORDERING_OPTIONS = ("overfit_batches", "reload_dataloaders_every_n_epochs")
# Lightning's options that at 0 skip all training or all validation.
_NONZERO_OPTIONS = ("limit_train_batches", "limit_val_batches", "max_steps")
# Placeholder above any warm-up: the number of steps is not known without the data.
_STEPS = 2**40


def check_config(config: Mapping[str, Any]) -> None:
    """Check all settings that can be checked without the data's files, the model and the machine.

    Args:
        config: the resolved configuration of ``train.py``; ``data.mean`` and ``data.std`` may be None.

    Raises:
        ConfigError: a setting is missing, unknown or invalid, or two settings contradict each other.
    """
    check_early(config)
    _check_data(config["data"])
    _check_trainer(config["trainer"], resumed=bool(config["resume"]))
    if config["trainer"].get("strategy") == "fsdp" and config["training"]["weight_averaging"]:
        raise ConfigError(
            "training.weight_averaging: the average would be a second, unsharded model on every device, which "
            "trainer.strategy=fsdp avoids; set it to null, or use trainer=ddp."
        )
    processes = requested_world_size(config["trainer"])
    if config["data"]["batch_size"] != "auto":
        check_batch_divides(config["data"]["batch_size"], processes)
    _check_freeze(config)
    _check_evaluation(config["evaluation"])
    _check_loss(config["loss"])
    build_schedule(_check_optimizer(config["optimizer"]), _STEPS, **config["schedule"])
    check_loggers(config.get("logger", {}))


def check_model(config: Mapping[str, Any]) -> None:
    """Check that the model can be built, with its encoder's weights unless they come from the model hub.

    Results are cached in this process, so that the other seeds of a sweep cost nothing.

    Raises:
        EmaSegError: see ``segmenter_from_config``.
    """
    settings = {key: config[key] for key in ("model", "attention", "placement")}
    frozen = (config.get("freeze") or {}).get("parts") or []
    _build_model(json.dumps({**settings, "init_from": bool(config.get("init_from")), "freeze": frozen}))


@cache
def _build_model(text: str) -> None:
    config = json.loads(text)
    pretrained = not config["init_from"] and config["model"].get("encoder_weights") != "imagenet"
    model = segmenter_from_config(config, _CLASSES, pretrained=pretrained)
    find_parts(model, config["freeze"])


def _check_data(settings: Mapping[str, Any]) -> None:
    complete = {key: settings[key] or [0.5, 0.5, 0.5] for key in ("mean", "std")}
    batch_size = 1 if settings["batch_size"] == "auto" else settings["batch_size"]
    module = SegmentationDataModule(**{**settings, **complete, "batch_size": batch_size})
    check_dataset(module.dataset_name, module.root, module.options)


def _check_freeze(config: Mapping[str, Any]) -> None:
    settings = config.get("freeze") or {}
    until, epochs = settings.get("until"), config["trainer"].get("max_epochs")
    if until is not None and not settings.get("parts"):
        raise ConfigError(
            f"freeze.until={until}: has no effect without freeze.parts; set that, as in freeze.parts=[encoder], or "
            "remove it."
        )
    if until is not None and epochs not in (None, -1) and until >= epochs:
        raise ConfigError(
            f"freeze.until={until}: must be less than the {epochs} epochs of the training; lower it, or set null to "
            "keep the parts frozen."
        )


def _check_evaluation(settings: Mapping[str, Any]) -> None:
    check_protocol(settings)
    if settings.get("submission") is not None:
        raise ConfigError(
            f"evaluation.submission={settings['submission']}: must be null in a training; set it for eval.py."
        )


def _check_loss(terms: Mapping[str, Any]) -> None:
    """Build the loss and compute it once: torch checks some of its settings only then."""
    classes = _weighted_classes(terms) or _CLASSES
    try:
        with single_process():
            build_loss(terms, classes)(torch.zeros(1, classes, 2, 2), torch.zeros(1, 2, 2, dtype=torch.int64))
    except ConfigError:
        raise
    except (ArithmeticError, TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"loss={dict(terms)}: torch cannot compute this loss ({one_line(error)}); correct it."
        ) from error


def _check_optimizer(settings: Mapping[str, Any]) -> Optimizer:
    """Build the optimiser and take a step: torch checks some of its settings only then."""
    layer = nn.Linear(1, 1)
    optimizer = build_optimizer(layer, **settings, stages={})
    layer(torch.zeros(1, 1)).sum().backward()
    try:
        optimizer.step()
    except Exception as error:  # torch asserts, unpacks and computes: any type
        raise ConfigError(
            f"optimizer={dict(settings)}: torch cannot train with these options ({one_line(error)}); correct them."
        ) from error
    return optimizer


def _weighted_classes(terms: Mapping[str, Any]) -> int | None:
    """Return the number of class weights in the loss, which only the data can confirm; None without weights."""
    weights = [options.get("class_weights") for options in terms.values() if isinstance(options, Mapping)]
    return next((len(values) for values in weights if isinstance(values, list) and values), None)


def _check_trainer(settings: Mapping[str, Any], *, resumed: bool) -> None:
    """Check the names of all Trainer options, and reject values that no run can train, validate or resume with."""
    known = list(inspect.signature(Trainer).parameters)
    for key in settings:
        if key not in known:
            raise ConfigError(f"trainer.{key}: Lightning's Trainer has no such option.{did_you_mean(key, known)}")
    for key in _REORDERING_OPTIONS:
        if settings.get(key):
            raise ConfigError(
                f"trainer.{key}={settings[key]!r}: changes the order of the samples, which a resumed run could not "
                "restore; remove it."
            )
    interval = settings.get("val_check_interval")
    if type(interval) is int and settings.get("check_val_every_n_epoch", 1) is not None:
        raise ConfigError(
            f"trainer.val_check_interval={interval}: an epoch may have fewer batches; set a fraction of an epoch such "
            "as 0.5, or trainer.check_val_every_n_epoch=null to count batches across epochs."
        )
    epochs, every = settings.get("max_epochs"), settings.get("check_val_every_n_epoch")
    # None and -1 leave the end to another option, such as max_steps.
    if epochs not in (None, -1) and not _is_whole(epochs, 1):
        raise ConfigError(f"epochs={epochs!r} (trainer.max_epochs): must be a whole number of at least 1.")
    for key in _NONZERO_OPTIONS:
        if settings.get(key) == 0:
            raise ConfigError(
                f"trainer.{key}={settings[key]!r}: must be more than 0, because no checkpoint could be chosen without "
                "training and validation; remove it for no limit."
            )
    if settings.get("fast_dev_run"):
        raise ConfigError(
            f"trainer.fast_dev_run={settings['fast_dev_run']!r}: Lightning writes no checkpoint with it, so that there "
            "would be nothing to evaluate; try a run with epochs=1 +trainer.limit_train_batches=2 "
            "+trainer.limit_val_batches=2."
        )
    # A resumed run may have a best checkpoint already; see ``require_validation``.
    if not resumed and every is not None and epochs not in (None, -1) and every > epochs:
        raise ConfigError(
            f"trainer.check_val_every_n_epoch={every}: no epoch up to the last one, {epochs}, would be validated, so "
            f"that no checkpoint could be chosen; set {epochs} or less."
        )


def _is_whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
