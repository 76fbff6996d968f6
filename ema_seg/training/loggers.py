"""Experiment loggers by name. ``metrics.csv`` is written in any case, see ``EpochLog``."""

import importlib
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger

from ema_seg.errors import ConfigError

__all__ = ["build_logger", "check_logger"]

# Name: the class, and its fixed arguments. Loaded only when named.
_LOGGERS: dict[str, tuple[str, dict[str, Any]]] = {
    "tensorboard": ("TensorBoardLogger", {"name": "", "version": "tensorboard", "default_hp_metric": False}),
    "wandb": ("WandbLogger", {}),
    "mlflow": ("MLFlowLogger", {}),
}


def check_logger(name: str | None) -> None:
    """A ConfigError if there is no logger of this name."""
    if name not in (None, "none", *_LOGGERS):
        raise ConfigError(f"logger.name: unknown logger {name!r}; choose among {', '.join(_LOGGERS)}, none.")


def build_logger(run: Path, /, *, name: str | None, **options: Any) -> Logger | bool:
    """The Lightning logger called ``name``, writing into the run's folder; False for ``"none"``.

    Args:
        run: the run's folder.
        name: ``"tensorboard"``, ``"wandb"``, ``"mlflow"`` or ``"none"``.
        **options: further arguments of Lightning's logger, such as ``project`` for wandb.

    Raises:
        ConfigError: the name or an option is unknown, or the logger's package is not installed.
    """
    check_logger(name)
    if name in (None, "none"):
        return False
    class_name, fixed = _LOGGERS[name]
    if name == "mlflow" and options.get("tracking_uri") is None:
        # Lightning's default, a folder of files, is one that MLflow itself refuses by now.
        options["tracking_uri"] = f"sqlite:///{run / 'mlflow.db'}"
    logger_class = getattr(importlib.import_module("lightning.pytorch.loggers"), class_name)
    try:
        return logger_class(save_dir=str(run), **fixed, **options)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"logger={name} needs a package that is not installed; run pip install 'ema-seg[{name}]'."
        ) from error
    except TypeError as error:
        raise ConfigError(f"logger: Lightning's {class_name} does not take these options: {error}.") from error
