"""Command-line helpers that the commands share."""

import os
import re
import sys
import traceback
from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar, cast

from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from ema_seg.config import require_plain
from ema_seg.runtime.distributed.exit_handlers import exit_if_preempted
from ema_seg.runtime.distributed.group import report_first_failure
from ema_seg.runtime.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    EmaSegError,
    Preempted,
    describe_os_error,
    one_line,
    own_cause,
)
from ema_seg.runtime.escaping import for_terminal
from ema_seg.runtime.hub import hub_address
from ema_seg.runtime.texts import read_yaml

__all__ = [
    "argument",
    "config_of_run_or_checkpoint",
    "default_folder",
    "expand_home",
    "key_of",
    "plain_config",
    "quoted",
    "read_config",
    "reports_errors",
    "require_set",
    "run_config",
    "saved_config",
]

# Sections that are read before the configuration is validated.
_SECTIONS = ("attention", "data", "evaluation", "model", "report")

# Keys that the YAML files interpolate from another key; a saved configuration holds only the values.
_LINKS = {
    "trainer.max_epochs": "epochs",
    "trainer.deterministic": "reproducible",
    "evaluation.batch_size": "data.evaluation_batch_size",
}

P = ParamSpec("P")
R = TypeVar("R")


# Read at import, because composition.launch sets the variable, too.
_WANTS_TRACEBACK = os.environ.get("HYDRA_FULL_ERROR") == "1"


def reports_errors(function: Callable[P, R]) -> Callable[P, R]:
    """Make a function print a user's error as one sentence on standard error, and exit with the error's status.

    This includes errors of Hydra and OmegaConf, and operating-system errors about files, disks and resource limits. In
    a process group only the rank that fails first prints. Ctrl-C prints "interrupted." and exits with 130; for other
    signals see ``exit_if_preempted``. With HYDRA_FULL_ERROR=1 in the user's environment a traceback precedes the
    sentence.
    """

    @wraps(function)
    def wrapped(*arguments: P.args, **keywords: P.kwargs) -> R:
        try:
            with exit_if_preempted(), report_first_failure():
                return function(*arguments, **keywords)
        except (EmaSegError, Preempted) as error:
            _report(error, str(error))
            sys.exit(error.exit_status)
        except (HydraException, OmegaConfBaseException) as error:
            _report(error, one_line(error))
            sys.exit(1)
        except OSError as error:
            if (sentence := describe_os_error(error)) is None:
                raise
            _report(error, sentence)
            sys.exit(1)
        except KeyboardInterrupt:
            print("interrupted.", file=sys.stderr)
            sys.exit(130)

    return wrapped


def _report(error: BaseException, sentence: str) -> None:
    if _WANTS_TRACEBACK:
        traceback.print_exception(error)
    print(f"error: {for_terminal(sentence)}", file=sys.stderr)


def expand_home(arguments: list[str]) -> list[str]:
    """Expand ``~`` in ``key=~/…`` to the home folder, because neither the shell nor Hydra does."""
    return [re.sub(r"^([^=]+=)~(?=/|$)", lambda match: match[1] + str(Path.home()), text) for text in arguments]


def argument(key: str) -> str | None:
    """Return the value of the last override ``key=value`` on the command line; None if missing, empty or null."""
    values = [text.removeprefix(f"{key}=").strip("'\"") for text in sys.argv[1:] if text.startswith(f"{key}=")]
    return values[-1] if values and values[-1] not in ("", "null") else None


def key_of(override: str) -> str:
    """Return the key or the group that an override sets, adds or deletes."""
    return override.lstrip("+~").partition("=")[0]


def quoted(path: Path) -> str:
    """Quote a path as the value of an override."""
    return QuotedString(str(path), Quote.single).with_quotes()


def run_config(composed: DictConfig) -> dict[str, Any]:
    """Return the resolved configuration of a run, without the ``sweep`` section."""
    config = plain_config(composed)
    config.pop("sweep", None)
    return config


def require_set(config: Mapping[str, Any], **meanings: str) -> None:
    """Check that keys are set; ``meanings`` says what each of them is, for the message.

    Raises:
        ConfigError: one of them is null.
    """
    for key, meaning in meanings.items():
        if config[key] is None:
            raise ConfigError(f"{key}: must be set; give {key}=<{meaning}>.")


def default_folder(config: Mapping[str, Any], name: Path) -> Path:
    """Return the folder ``out``, by default ``name`` in the folder of ``run`` or beside its checkpoint.

    Raises:
        ConfigError: ``out`` is null, and ``run`` is not on this disk.
    """
    if config["out"] is not None:
        return Path(config["out"])
    source = Path(config["run"])
    if not source.exists():
        raise ConfigError(f"out: must be set for run={config['run']}; give out=<a folder>.")
    return (source if source.is_dir() else source.parent) / name


def saved_config(run: Path, key: str) -> dict[str, Any]:
    """Read a run's configuration with ``read_config``, and restore the interpolations of ``_LINKS``."""
    return cast(dict[str, Any], OmegaConf.to_container(_linked(OmegaConf.create(read_config(run, key)))))


def config_of_run_or_checkpoint(source: Path, key: str) -> dict[str, Any]:
    """Read the configuration of a run's folder, a checkpoint, or an exported or shared model, which ``key`` names.

    Raises:
        ConfigError: see ``read_config``.
        CheckpointError: there is no such file, or it is not one of this project.
    """
    is_shared = hub_address(source) is not None or (
        (source / "config.json").is_file() and not (source / "config.yaml").exists()
    )
    if not is_shared and (source.is_dir() or (key == "run" and not source.exists())):
        return saved_config(source, key)
    if not is_shared and not source.is_file():  # checked before torch is imported
        raise CheckpointError(f"{key}={source}: no such file; give the path of a checkpoint that train.py wrote.")
    from ema_seg.inference.exported import ExportedModel, is_exported
    from ema_seg.models import load_checkpoint
    from ema_seg.models.checkpoint import checkpoint_path

    if is_exported(source):
        return ExportedModel(source).metadata.config
    return cast(dict[str, Any], load_checkpoint(checkpoint_path(source))["config"])


def read_config(run: Path, key: str) -> dict[str, Any]:
    """Read the configuration in a run's folder, which the override ``key`` names.

    Raises:
        ConfigError: the file is missing or unreadable, or is not a configuration of ``train.py``.
    """
    path = run / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"{key}={run}: there is no {path}; give the folder of a run that train.py made.")
    try:
        config = read_yaml(path, advice="restore the file")
        require_plain(config)
    except (DataError, ConfigError) as error:
        raise ConfigError(f"{key}={run}: {error}") from error
    if not isinstance(config, dict) or not all(isinstance(config.get(name, {}), dict) for name in _SECTIONS):
        raise ConfigError(
            f"{key}={run}: {path} must be a configuration of train.py with the sections {', '.join(_SECTIONS)}; give "
            "the folder of a run that train.py made."
        )
    return cast(dict[str, Any], {**config, **_loggers_by_name(cast(dict[str, Any], config))})


def _loggers_by_name(config: dict[str, Any]) -> dict[str, Any]:
    """Turn the logger of earlier versions, ``{name: wandb, project: …}``, into ``{wandb: {project: …}}``."""
    logger = config.get("logger")
    if not isinstance(logger, dict) or not isinstance(logger.get("name"), str):
        return {}
    name = logger["name"]
    options = {key: value for key, value in logger.items() if key != "name"}
    return {"logger": {} if name == "none" else {name: options}}


def _linked(config: DictConfig) -> DictConfig:
    """Restore the interpolations of ``_LINKS`` where the values agree, so that overrides propagate again."""
    for key, source in _LINKS.items():
        value = OmegaConf.select(config, source)
        if value is not None and OmegaConf.select(config, key) == value:
            OmegaConf.update(config, key, f"${{{source}}}")
    return config


def count_cores(most: int) -> int:
    """Count the cores that this process may use, up to ``most``; configurations call it as ``${cores:<most>}``."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(most, available)


OmegaConf.register_new_resolver("cores", count_cores, replace=True)


def plain_config(config: DictConfig) -> dict[str, Any]:
    """Resolve a composed configuration into plain dicts and lists.

    Raises:
        ConfigError: a mandatory value is missing, or an interpolation does not resolve.
    """
    try:
        return cast(dict[str, Any], OmegaConf.to_container(config, resolve=True, throw_on_missing=True))
    except MissingMandatoryValue as error:
        key = getattr(error, "full_key", None) or str(error).rpartition(" ")[2]
        raise ConfigError(f"{key} is not set; give {key}=<value> on the command line.") from error
    except OmegaConfBaseException as error:
        if (own := own_cause(error)) is not None:
            raise own from error
        key = getattr(error, "full_key", None)
        where = f"{key}: its value" if key else "the configuration"
        raise ConfigError(f"{where} does not resolve: {str(error).splitlines()[0].rstrip('.')}.") from error
