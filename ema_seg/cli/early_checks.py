"""Checks of a configuration that import no heavy library, so that a mistake is refused within a second or two."""

from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from importlib.util import find_spec
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple

from ema_seg.cli.sources import (
    plain_transformers,
    read_keys,
    read_parameters,
    read_source,
    smp_decoders,
    smp_encoders,
    timm_models,
    timm_optimizers,
    timm_schedules,
)
from ema_seg.config import Training, check_settings, suggest_own
from ema_seg.data import DATASETS
from ema_seg.runtime.errors import ConfigError, DataError, did_you_mean
from ema_seg.runtime.extras import install_command
from ema_seg.runtime.hub import hub_address

__all__ = ["check_early", "check_root", "check_source", "options_of"]

# Timeout in seconds for checking that a path exists; reading the data waits longer for a slow disk.
_DISK_TIMEOUT = 1.0
# Arguments of Lightning's Trainer that the program sets itself or rejects.
_RESERVED_OPTIONS = (
    *("callbacks", "default_root_dir", "enable_model_summary", "enable_progress_bar", "logger", "plugins"),
    *("overfit_batches", "reload_dataloaders_every_n_epochs", "use_distributed_sampler"),
)

# File whose tables name the decoders beside smp's.
_BUILD = "ema_seg/models/build.py"

# Loggers that need a package of the same name, installed as an extra.
_PACKAGES = ("mlflow", "wandb")


class _ComponentName(NamedTuple):
    """Setting that names a component, with a function that lists the valid names."""

    section: str
    key: str
    known: Callable[[], list[str]]


def _decoders() -> list[str]:
    known = smp_decoders()
    return known and [*known, *read_keys(_BUILD, "_OWN_DECODERS")]


_NAMES = (
    _ComponentName("data", "name", lambda: sorted(DATASETS)),
    _ComponentName("model", "decoder", _decoders),
    _ComponentName("attention", "name", lambda: read_keys("ema_seg/attention/__init__.py", "_BLOCKS")),
    _ComponentName("schedule", "name", timm_schedules),
)


def check_early(config: Mapping[str, Any]) -> None:
    """Check the types of all settings, and the names of all components and Trainer options.

    Args:
        config: the resolved configuration of ``train.py`` as plain data.

    Raises:
        ConfigError: a setting is missing or invalid, or names something unknown or not installed.
    """
    check_settings(config, Training)
    for section, key, find in _NAMES:
        name, known = config[section][key], find()
        if known and name not in known:
            raise ConfigError(
                f"{section}.{key}={name!r}: must be one of {', '.join(known)}; correct it.{did_you_mean(name, known)}"
            )
    losses = read_keys("ema_seg/training/losses.py", "_LOSSES")
    for name in config["loss"] if losses else ():
        if name not in losses:
            raise ConfigError(
                f"loss.{name}: there is no such loss; choose from {', '.join(losses)}.{did_you_mean(name, losses)}"
            )
    _check_encoder(config["model"]["encoder"])
    _check_pair(config["model"])
    name, optimizers = config["optimizer"]["name"], timm_optimizers()
    if optimizers and name not in optimizers:
        hint = did_you_mean(name, optimizers, most=3)
        raise ConfigError(f"optimizer.name={name!r}: timm has no such optimiser; correct it.{hint}")
    for name in config.get("logger", {}):
        if name in _PACKAGES and find_spec(name) is None:
            raise ConfigError(f"logger={name}: its package is not installed; run {install_command(name)}.")
    trainer = _trainer_options()
    for key in config["trainer"] if trainer else ():
        if key not in trainer:
            hint = suggest_own(f"trainer.{key}", lambda own: True) or did_you_mean(key, trainer)
            raise ConfigError(f"trainer.{key}: Lightning's Trainer has no such option.{hint}")


def check_root(data: Mapping[str, Any]) -> None:
    """Check that the data set's folder or archive exists.

    Args:
        data: the section ``data`` of a configuration.

    Raises:
        DataError: the path does not exist.
    """
    name, root = data["name"], data["root"]
    makes_files = "makes_files: ClassVar[bool] = True" in read_source(f"ema_seg/data/{name}.py")
    if root is not None and not makes_files and _is_missing(Path(root)):
        raise DataError(
            f"data.root={root}: no such file or folder; give the data set's folder or archive (see docs/data.md)."
        )


def check_source(source: str | None) -> None:
    """Check that the run, checkpoint or shared model of ``init_from`` exists; of one on the Hub check the address.

    Raises:
        ConfigError: the path does not exist, or the folder has no model; or the address is malformed.
    """
    if source is None or hub_address(source) is not None:
        return
    if _is_missing(Path(source)):
        raise ConfigError(
            f"init_from={source}: no such file or folder; give the folder of a run, or a checkpoint of train.py."
        )
    models = ("checkpoints/best.ckpt", "config.json")
    if _ask(Path(source).is_dir) and all(_is_missing(Path(source) / file) for file in models):
        raise ConfigError(
            f"init_from={source}: the folder has no checkpoints/best.ckpt; give the folder of a run that has "
            "validated, or a checkpoint."
        )


def options_of(section: str, config: Mapping[str, Any]) -> list[str]:
    """List the options of the component that a section of the configuration selects; empty if they are not known.

    Args:
        section: the dotted name of the section, such as ``"trainer"`` or ``"logger.wandb"``.
        config: the configuration, which names the decoder and the optimiser.
    """
    first, _, rest = section.partition(".")
    if section == "trainer":
        return [option for option in _trainer_options() if option not in _RESERVED_OPTIONS]
    if section == "model":
        decoder = str(config["model"]["decoder"])
        ours = decoder in read_keys(_BUILD, "_OWN_DECODERS")
        folder = f"ema_seg/models/{decoder}.py" if ours else "segmentation_models_pytorch/decoders"
        return read_parameters(folder, decoder)
    if section == "optimizer":
        name = str(config["optimizer"]["name"])
        return read_parameters("torch/optim", name) or read_parameters("timm/optim", name)
    if first == "logger" and rest:
        return read_parameters("lightning/pytorch/loggers", f"{rest}logger")
    if first == "loss" and rest in read_keys("ema_seg/training/losses.py", "_LOSSES"):
        return ["weight", "class_weights"]
    return ["transform"] if section.startswith("data.augmentation.") else []


def _trainer_options() -> list[str]:
    return read_parameters("lightning/pytorch/trainer/trainer.py", "Trainer")


def _check_encoder(name: str) -> None:
    known, models = smp_encoders(), timm_models()
    if not (known and models):
        return
    architecture = name.removeprefix("tu-").partition(".")[0]
    if architecture not in models if name.startswith("tu-") else name not in known:
        hint = did_you_mean(name, [*known, *(f"tu-{model}" for model in models)], most=3)
        raise ConfigError(
            f"model.encoder: neither smp nor timm has an encoder {name!r}; timm's are named 'tu-<name>'.{hint}"
        )


def _check_pair(model: Mapping[str, Any]) -> None:
    """Reject a decoder that does not read a plain vision transformer's feature maps, which have one stride."""
    decoder, encoder = model["decoder"], model["encoder"]
    fitting = read_keys(_BUILD, "_TRANSFORMER_DECODERS")
    is_plain = encoder.startswith("tu-") and encoder[3:].partition(".")[0] in plain_transformers()
    if fitting and is_plain and decoder not in fitting:
        raise ConfigError(
            f"model.decoder={decoder}: reads feature maps of several strides, which the vision transformer "
            f"model.encoder={encoder} does not have; choose model={', '.join(fitting)}, or another encoder."
        )


def _is_missing(path: Path) -> bool:
    """Return whether a path does not exist; False if the disk does not answer in time."""
    return _ask(path.exists) is False


def _ask(question: Callable[[], bool]) -> bool | None:
    """Return the answer to a question about a path; None if the disk does not answer in time."""
    answer: Future[bool] = Future()
    Thread(target=lambda: answer.set_result(question()), daemon=True).start()
    return answer.result() if wait([answer], _DISK_TIMEOUT).done else None
