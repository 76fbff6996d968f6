"""Experiment loggers by name. ``metrics.csv`` is written in any case, see ``EpochLog``."""

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger

from ema_seg.runtime.errors import ConfigError, did_you_mean
from ema_seg.runtime.extras import install_command

__all__ = ["build_loggers", "check_loggers"]

# Class and fixed arguments by name; a class is imported only when it is used.
_LOGGERS: dict[str, tuple[str, dict[str, Any]]] = {
    "tensorboard": ("TensorBoardLogger", {"name": "", "version": "tensorboard", "default_hp_metric": False}),
    "wandb": ("WandbLogger", {}),
    "mlflow": ("MLFlowLogger", {}),
}


def check_loggers(settings: Mapping[str, Any]) -> None:
    """Raise a ConfigError unless each logger is known and its options are given by name."""
    for name, options in settings.items():
        if name not in _LOGGERS:
            raise ConfigError(
                f"logger.{name}: must be one of {', '.join(_LOGGERS)}; choose loggers with logger=<name> or "
                f"logger=[<name>,<name>].{did_you_mean(name, _LOGGERS)}"
            )
        if not isinstance(options, Mapping):
            raise ConfigError(
                f"logger.{name}={options!r}: must be the logger's options by name; set logger.{name}.<option>=<value>, "
                f"or choose loggers with logger=[…]."
            )


def build_loggers(run: Path, settings: Mapping[str, Mapping[str, Any]]) -> list[Logger]:
    """Build Lightning's loggers, writing into the run's folder.

    Args:
        run: the run's folder.
        settings: keyword arguments of each of Lightning's loggers, such as ``project`` for wandb, by name:
            ``"tensorboard"``, ``"wandb"`` or ``"mlflow"``.

    Raises:
        ConfigError: a name or an option is unknown, or the logger's package is not installed.
    """
    check_loggers(settings)
    return [_build_logger(run, name, dict(options)) for name, options in settings.items()]


def _build_logger(run: Path, name: str, options: dict[str, Any]) -> Logger:
    class_name, fixed = _LOGGERS[name]
    if name == "mlflow" and options.get("tracking_uri") is None:
        # MLflow no longer accepts Lightning's default, a folder of files.
        options["tracking_uri"] = f"sqlite:///{run / 'mlflow.db'}"
    logger_class = getattr(importlib.import_module("lightning.pytorch.loggers"), class_name)
    try:
        return logger_class(save_dir=str(run), **fixed, **options)
    except ModuleNotFoundError as error:
        raise ConfigError(f"logger={name}: its package is not installed; run {install_command(name)}.") from error
    except TypeError as error:
        raise ConfigError(f"logger.{name}: Lightning's {class_name} does not take these options: {error}.") from error
