"""Composition and validation of the configuration, before Hydra acts on it."""

import inspect
import re
import sys
import traceback
from collections.abc import Mapping
from difflib import get_close_matches
from itertools import dropwhile
from pathlib import Path
from typing import Any, cast

import hydra
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode, TaskFunction
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ema_seg.cli.command_line import argument, config_of_run_or_checkpoint, expand_home, key_of
from ema_seg.cli.early_checks import options_of
from ema_seg.cli.hydra_patches import Loader, create_config_search_path, get_args_parser, validating_loader
from ema_seg.cli.sources import timm_optimizers
from ema_seg.cli.trust import restrict_environment, settings_of
from ema_seg.config import (
    Analysing,
    Demonstrating,
    Evaluating,
    Exporting,
    Predicting,
    Pushing,
    Section,
    Training,
    describe_settings,
    suggest_own,
)
from ema_seg.runtime.errors import ConfigError, EmaSegError, did_you_mean, one_line, own_cause

__all__ = ["CONFIGS", "compose", "launch", "launch_on_data_of_run", "offer_settings_of_run"]

_PACKAGE = Path(__file__).resolve().parents[1]
# The project's own configurations: inside an installed package, beside it in a clone.
CONFIGS = _PACKAGE / "configs" if (_PACKAGE / "configs").is_dir() else _PACKAGE.parent / "configs"
_SCHEMAS: dict[str, type[Section]] = {
    "Training": Training,
    "Evaluating": Evaluating,
    "Exporting": Exporting,
    "Analysing": Analysing,
    "Predicting": Predicting,
    "Demonstrating": Demonstrating,
    "Pushing": Pushing,
}
# It overrides methods of Hydra, so that its frames count as Hydra's.
_LOADER = Loader.__module__


def launch_on_data_of_run(task: TaskFunction, config_name: str) -> None:
    """Compose the configuration on top of the data of the run on the command line, and run ``task``; see ``launch``."""
    sys.argv = expand_home(sys.argv)
    run = argument("run")
    offer_settings_of_run(config_of_run_or_checkpoint(Path(run), key="run") if run else {}, "data")
    launch(task, CONFIGS, config_name, compose(CONFIGS, config_name))


def offer_settings_of_run(saved: Mapping[str, Any], *groups: str) -> None:
    """Register the sections of a run's configuration as ``of_run`` in the config groups of their names."""
    for group in groups:
        # Hydra would follow a defaults list in them, and a stranger's cache would be written to.
        section = {key: value for key, value in saved.get(group, {}).items() if key not in ("defaults", "cache")}
        ConfigStore.instance().store("of_run", section, group=group)


def compose(folder: Path, config_name: str) -> DictConfig:
    """Compose and validate the Hydra config before Hydra instantiates anything.

    Hydra has no public API that composes with its own options (``--config-dir``, ``-m``, …): hence the internal parts.

    Args:
        folder: the folder of the configurations.
        config_name: name of the primary config; if the folder has no such file, it is a run's config, and
            ``--config-name`` must not choose another.

    Returns:
        The configuration with Hydra's own settings; in a sweep, with those that all jobs share; empty for help and
        shell completion.

    Raises:
        ConfigError: an option, an override or a configuration file is invalid, or a file sets what only the user may
            (see ``ema_seg.cli.trust``).
        DataError: a configuration file cannot be read; see ``read_yaml``.
    """
    _check_options()
    options = get_args_parser().parse_args()
    restrict_environment(options.overrides)
    if options.experimental_rerun:
        raise ConfigError(
            f"--experimental-rerun {options.experimental_rerun}: a pickle can run any code; repeat a run with "
            "python train.py rerun=<its folder>."
        )
    if options.config_name and not (folder / f"{config_name}.yaml").is_file():
        raise ConfigError(
            f"--config-name {options.config_name}: the command uses the configuration of the run that it names; remove "
            "this option."
        )
    if options.config_path:
        raise ConfigError(
            f"--config-path {options.config_path}: the project's own configurations cannot be replaced; add your own "
            "folder with --config-dir."
        )
    if options.shell_completion:
        return OmegaConf.create()
    search_path = create_config_search_path(str(folder))
    if options.config_dir:
        if not Path(options.config_dir).is_dir():
            raise ConfigError(f"--config-dir {options.config_dir}: there is no such folder.")
        added = Path(options.config_dir).absolute()
        search_path.prepend("command-line", f"file://{added}", SearchPathQuery(provider="schema"))
    loader = Loader(config_name, search_path)
    mode = RunMode.MULTIRUN if options.multirun else RunMode.RUN
    name = options.config_name or config_name
    try:
        # --hydra-help has no primary config, but sets up logging from the composed settings all the same.
        composed = loader.load_configuration(None if options.hydra_help else name, options.overrides, mode)
    except EmaSegError:
        raise
    except (HydraException, OmegaConfBaseException, ValueError, OSError) as error:
        if (own := own_cause(error)) is not None:
            raise own from error
        raise ConfigError(_describe_hydra_error(error, loader, name, options.overrides)) from error
    except Exception as error:  # from the YAML reader or Hydra's internals
        text = " ".join(options.overrides) or name
        raise ConfigError(f"{text}: Hydra cannot compose this ({type(error).__name__}: {one_line(error)}).") from error
    return OmegaConf.create() if options.help or options.hydra_help else composed


def _check_options() -> None:
    """Reject ``--key value`` and ``--key=value``: Hydra's parser would print its whole usage."""
    unknown = [text for text in get_args_parser().parse_known_args()[1] if text.startswith("-")]
    if unknown:
        key, _, value = unknown[0].lstrip("-").partition("=")
        value = value or next((text for text in _following(unknown[0]) if not text.startswith("-")), "<value>")
        raise ConfigError(
            f"{unknown[0]}: there is no such option; settings are given without dashes, as in {key}={value} "
            "(--help names them)."
        )


def _following(argument: str) -> list[str]:
    """Return the command-line argument after this one, as a list; empty if there is none."""
    place = sys.argv.index(argument) + 1
    return sys.argv[place : place + 1]


def launch(task: TaskFunction, folder: Path, config_name: str, composed: DictConfig | None = None) -> None:
    """Run ``task`` through ``hydra.main``, and raise errors where Hydra would print them and exit.

    Args:
        task: see ``hydra.main``.
        folder: see ``compose``.
        config_name: see ``compose``.
        composed: the result of ``compose``, if the command line has not changed since.
    """
    OmegaConf.register_new_resolver("meanings", _list_meanings, replace=True)
    try:
        with validating_loader(config_name, composed):
            hydra.main(version_base="1.3", config_path=str(folder), config_name=config_name)(task)()
    except Exception as error:
        if isinstance(error, EmaSegError | OSError) or _is_ours(error, task):
            raise
        if (own := own_cause(error)) is not None:
            raise own from error
        raise ConfigError(f"hydra.*: Hydra rejects these settings ({one_line(error)}); correct them.") from error


def _list_meanings(schema: str) -> str:
    """List the settings of a schema with their meanings, a line each, for ``--help``."""
    lines = list(describe_settings(_SCHEMAS[schema]))
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"  {name:{width}}  {meaning}" for name, meaning in lines)


def _is_ours(error: Exception, task: TaskFunction) -> bool:
    """Return whether an error was raised in the project's code, and not in Hydra before it called the task."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    names = [str(frame.f_globals.get("__name__")) for frame in frames]
    called = dropwhile(lambda name: not name.startswith("hydra."), names)  # what called Hydra comes before
    if any(name.startswith(("ema_seg.", "hydra_plugins.ema_seg")) and name != _LOADER for name in called):
        return True
    return any(frame.f_code is getattr(inspect.unwrap(task), "__code__", None) for frame in frames)


def _describe_hydra_error(error: Exception, loader: Loader, name: str, overrides: list[str]) -> str:
    """Describe a multi-line error of Hydra in one sentence."""
    text = str(error)
    if isinstance(error, OverrideParseException):
        detail = text.partition("\nSee ")[0].removeprefix(f"Error parsing override '{error.override}'\n")
        return f"{error.override}: must have the form key=value ({_line(detail)}); quote special characters."
    if isinstance(error, MissingConfigException):
        return _missing(error)
    if match := re.match(r"Could not (?:override|delete from config\.) '(.+?)'", text):
        key = match[1]
        composed = _compose_unchecked(loader, name, overrides)
        known = composed is not None and key in [path for path, _ in settings_of(composed)]
        if match[0].startswith("Could not delete") and known:
            return f"{_override_of_key(key, overrides)}: {key} is null already; leave this out."
        given = _override_of_key(key, overrides)
        return f"{given}: there is no setting {key}.{_advice(key, given, loader, name, overrides)}"
    if text.startswith("Ambiguous value for argument"):
        given = _quoted_in(text)
        return (
            f"{given}: several values are a sweep, which needs -m before the overrides; a list is written "
            f"{given.partition('=')[0]}=[…]."
        )
    if text.startswith("Sweep parameters"):
        return f"{_quoted_in(text)}: several values are a sweep, which needs -m before the overrides."
    if text.startswith("Config group override must be"):
        wrong = [str(o.input_line) for o in _choices(loader, overrides) if not isinstance(o.value(), str | list)]
        group = key_of(wrong[0])
        return (
            f"{' '.join(wrong)}: must be the name of an option of {group}; choose from "
            f"{', '.join(loader.repository.get_group_options(group))}."
        )
    if match := re.match(r"Multiple values for (\S+?)\. ", text):
        return f"+{match[1]}=…: the group {match[1]} is chosen already; write {match[1]}=<option>, without the +."
    cause = error.__cause__
    detail = f" ({_line(str(cause).splitlines()[0])})" if cause is not None and str(cause) else ""
    return f"{_line(text)}{detail}" if text else f"{name}: this configuration cannot be composed{detail}."


def _missing(error: MissingConfigException) -> str:
    if not error.missing_cfg_file or error.options is None:
        text = re.split(r"\n(?:Config s|S)earch path:", str(error))[0]
        return f"{_line(text)}."
    group, _, option = str(error.missing_cfg_file).rpartition("/")
    known = sorted(error.options)
    text = f"{group}={option}: there is no such option; choose from {', '.join(known)}."
    if group == "optimizer" and option in timm_optimizers():
        return f"{text} timm's {option} is optimizer.name={option}."
    return text + did_you_mean(option, known)


def _advice(key: str, given: str, loader: Loader, name: str, overrides: list[str]) -> str:
    """Suggest a correction of ``given``, an override of an unknown key."""
    composed = _compose_unchecked(loader, name, overrides)
    paths = [] if composed is None else [path for path, _ in settings_of(composed)]
    if own := suggest_own(key, paths.__contains__):
        return own
    section, _, option = key.rpartition(".")
    added = _addable(section, composed) if composed is not None and given.startswith(f"{key}=") else []
    if option in added:
        return f" The configuration does not list it; add it with +{given}"
    if section in paths:
        named = [path.rpartition(".")[2] for path in paths if path.rpartition(".")[0] == section]
        within = [path for path in paths if path.startswith(f"{section}.") and path.endswith(f".{option}")]
        if len(within) == 1:
            return f" Did you mean {within[0]!r}?"
        close = get_close_matches(option, [*named, *added], n=1)
        if close:
            return f" Did you mean '{'' if close[0] in named else '+'}{section}.{close[0]}'?"
        return f" If the configuration does not list this option, add it with +{given}"
    ends = [path for path in paths if path.endswith(f".{key}")]
    # Hydra's own settings are close matches of too many keys.
    own_paths = [path for path in paths if path.startswith("hydra") <= key.startswith("hydra")]
    return f" Did you mean {ends[0]!r}?" if len(ends) == 1 else did_you_mean(key, own_paths)


def _addable(section: str, composed: DictConfig) -> list[str]:
    """Return the options that may be added to a section."""
    settings = cast(dict[str, Any], OmegaConf.to_container(composed, resolve=False))
    try:
        return options_of(section, settings)
    except (KeyError, TypeError):  # malformed settings; a later check rejects them
        return []


def _compose_unchecked(loader: Loader, name: str, overrides: list[str]) -> DictConfig | None:
    """Compose without the overrides of single keys, with the chosen groups if possible; None if that fails."""
    chosen = [str(o.input_line) for o in _choices(loader, overrides)]
    for groups in (chosen, []):
        try:
            # Only the key names are needed, for suggestions.
            return loader.load_unchecked(name, groups)
        except (HydraException, OmegaConfBaseException, ValueError):
            continue
    return None


def _choices(loader: Loader, overrides: list[str]) -> list[Override]:
    """Return the overrides that choose an option of a group."""
    parsed = OverridesParser.create(config_loader=loader).parse_overrides(overrides)
    return [override for override in parsed if loader.repository.group_exists(override.key_or_group)]


def _override_of_key(key: str, overrides: list[str]) -> str:
    """Return the override of this key; the key itself if there is none."""
    return next((text for text in overrides if key_of(text) == key), key)


def _quoted_in(text: str) -> str:
    return text.split("'", 1)[1].splitlines()[0].rpartition("'")[0]


def _line(text: str) -> str:
    return " ".join(text.split()).rstrip(".")
