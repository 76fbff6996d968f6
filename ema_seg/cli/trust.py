"""Allowlist of what a configuration may call, write and start: a shared config file must not run code.

Hydra calls the ``_target_`` of its callbacks, and Python's logging calls ``class`` and ``()`` in the settings of
Hydra's logs. Both resolve a dotted name to anything importable, ``os.system`` included, also through a trusted module
that has imported it. So the allowlist holds complete names, not prefixes. Logging also resolves URL-like values
(``ext://``) to any object, sets attributes, and writes to any file; the launchers run commands. Such settings are
accepted only as the project's own defaults or if the user has typed them. Environment variables must be typed, too:
they may hold passwords and tokens, and settings are shown, logged and saved.
"""

import os
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from omegaconf import DictConfig, OmegaConf
from omegaconf.resolvers import oc

from ema_seg.runtime.errors import ConfigError

__all__ = [
    "forbid_settings_from_text",
    "require_harmless",
    "require_printable",
    "restrict_environment",
    "settings_of",
    "walk",
]

_CALLBACKS = (
    "hydra.experimental.callbacks.LogJobReturnCallback",
    "hydra.experimental.callbacks.PickleJobInfoCallback",
)
_LOGGING = (
    "logging.FileHandler",
    "logging.Formatter",
    "logging.NullHandler",
    "logging.StreamHandler",
    "logging.handlers.RotatingFileHandler",
    "logging.handlers.TimedRotatingFileHandler",
    "logging.handlers.WatchedFileHandler",
    "colorlog.ColoredFormatter",
    "rich.logging.RichHandler",
)
# Keys whose values Hydra and Python's logging call.
_CALLED = {"_target_", "()", "class"}
# Not allowed: it runs the commands of its settings on machines that it rents.
_FORBIDDEN_LAUNCHER = "hydra_plugins.hydra_ray_launcher.ray_aws_launcher.RayAWSLauncher"

_LOGS = ("hydra.job_logging", "hydra.hydra_logging")
# Values of Hydra's own log settings, unresolved: streams, and fixed file names.
_STREAMS = ("ext://sys.stdout", "ext://sys.stderr")
_LOG_FILES = ("${hydra.runtime.output_dir}/${hydra.job.name}.log", "hydra-${hydra.job.name}.log")
# Commands and environment of the processes that launchers start; "_args_" may set any parameter of a launcher.
_COMMANDS = (
    "hydra.job.env_copy",
    "hydra.job.env_set",
    *(f"hydra.launcher.{key}" for key in ("_args_", "additional_parameters", "python", "ray", "setup", "srun_args")),
)
# Commands of the project's own configs/launcher.
_OWN_COMMANDS = ("export SLURM_KILL_BAD_EXIT=1",)
# Parents of checked keys; an interpolation here would bypass the check.
_PARENT_SECTIONS = ("hydra", "hydra.job", "hydra.launcher")


def forbid_settings_from_text() -> None:
    """Remove the ``oc.create`` and ``oc.decode`` resolvers: they can build a ``_target_`` node from a string.

    Searching a configuration for their names would not do, because it can assemble them from parts. Hydra's launchers
    pass the registered resolvers on to their processes.
    """
    for name in ("oc.create", "oc.decode"):
        OmegaConf.clear_resolver(name)


def restrict_environment(typed: Sequence[str]) -> None:
    """Restrict ``${oc.env:NAME}`` to the variables that the user has typed.

    The resolver itself checks the name, because configuration files can assemble it from parts.

    Args:
        typed: the overrides of the command line.
    """
    names = frozenset(re.findall(r"\boc\.env:\s*['\"]?([^\s,}'\"]+)", " ".join(typed)))
    OmegaConf.register_new_resolver("oc.env", partial(_read_variable, names), replace=True)


def _read_variable(known: frozenset[str], name: str, *default: str | None) -> str | None:
    if name not in known:
        raise ConfigError(
            f"${{oc.env:{name}}}: configuration files must not read the environment; write the value, or type "
            f"<key>='${{oc.env:{name}}}' on the command line."
        )
    return oc.env(name, *default)


def require_harmless(config: DictConfig, typed: Sequence[str] = ()) -> None:
    """Reject settings that could run code, open files or start commands.

    Args:
        config: a composed configuration with Hydra's settings, also that of a sweep's job.
        typed: the overrides of the command line; their values are trusted, except for names that are called.

    Raises:
        ConfigError: a name to be called is not on the allowlist (Hydra's plugins, which include this project's
            sweepers; Hydra's callbacks; the usual handlers and formatters of Python's logging); log settings refer to
            objects or files other than Hydra's; a launcher's commands or environment variables were not typed; the
            job's name is not a plain file name; or a section that holds checked keys is a single value.
    """
    own = _values_of(typed)
    for path, key, value in settings_of(config):
        if key in _CALLED and str(value) not in _known(key):
            raise ConfigError(
                f"{path}={value}: not on the allowlist; a configuration may call only Hydra's plugins and callbacks "
                "and Python's logging handlers; remove it, and do not run files that you do not trust."
            )
        if path in _PARENT_SECTIONS and isinstance(value, str):
            raise ConfigError(f"{path}: must be a section of settings, got {value!r}; remove it.")
        if isinstance(value, dict | list) and key != ".":
            continue
        if str(value) in own.get(path, ()):
            continue
        if _is_below(path, _LOGS):
            _check_log(path, key, value)
        elif path == "hydra.job.name" and not re.fullmatch(r"[\w.-]+", str(value)):
            raise ConfigError(
                f"{path}: must consist of letters, digits, _, . and -, because files are named after it, got "
                f"{value!r}; remove it, or set it on the command line."
            )
        elif _is_below(path, _COMMANDS) and not (value in (None, *_OWN_COMMANDS) or _is_in_environment(path, value)):
            raise ConfigError(
                f"{path}={value!r}: commands and environment variables of jobs must be typed on the command line; "
                "remove it, or type it there."
            )


def require_printable(launcher: DictConfig) -> None:
    """Reject line breaks in a launcher's resolved settings: each line of an sbatch script is a command.

    Raises:
        ConfigError: a setting outside ``setup`` has a line break or another non-printable character.
    """
    for path, _, value in settings_of(launcher):
        if not str(value).isprintable() and not _is_below(path, ("setup",)):
            raise ConfigError(
                f"hydra.launcher.{path}: must be one line of printable text, got {value!r}; remove line breaks and "
                "control characters."
            )


def _check_log(path: str, key: str, value: Any) -> None:
    if key == "filename":
        harmless = value in _LOG_FILES
    else:
        harmless = key != "." and (value in _STREAMS or not re.match(r"[a-z]+://|.*\$\{", str(value), re.DOTALL))
    if not harmless:
        raise ConfigError(
            f"{path}={value!r}: Hydra's log settings must not refer to objects, files or settings other than Hydra's "
            "own; remove it, or set it on the command line."
        )


def _is_in_environment(path: str, value: Any) -> bool:
    """Return whether this is a variable with the value it has in the environment, as ``hydra.job.env_copy`` sets it."""
    return os.environ.get(path.removeprefix("hydra.job.env_set.")) == value


def _is_below(path: str, sections: Sequence[str]) -> bool:
    return any(path == section or path.startswith(f"{section}.") for section in sections)


def _values_of(overrides: Sequence[str]) -> Mapping[str, set[str]]:
    """Return the values that overrides set, as text by path; all values of a discrete sweep."""
    values: dict[str, set[str]] = defaultdict(set)
    for override in _single(OverridesParser.create().parse_overrides(list(overrides))):
        for path, _, value in walk({override.key_or_group: override.value()}, ""):
            values[path].add(str(value))
    return values


def _single(overrides: Sequence[Override]) -> Iterator[Override]:
    """Expand discrete sweeps into overrides of one value each; drop other sweeps."""
    for override in overrides:
        if not override.is_sweep_override():
            yield override
        elif override.is_discrete_sweep():
            texts = [f"{override.key_or_group}={text}" for text in override.sweep_string_iterator()]
            yield from OverridesParser.create().parse_overrides(texts)


def _known(key: str) -> set[str]:
    if key != "_target_":
        return set(_LOGGING)
    return {*Plugins.instance().class_name_to_class, *_CALLBACKS} - {_FORBIDDEN_LAUNCHER}


def settings_of(config: DictConfig) -> Iterator[tuple[str, str, Any]]:
    """Yield path, key and value of every node of a configuration, unresolved."""
    return walk(OmegaConf.to_container(config, resolve=False), "")


def walk(node: Any, path: str) -> Iterator[tuple[str, str, Any]]:
    """Yield path, key and value of every node in nested dicts and lists; ``path`` is that of ``node``."""
    for key, value in node.items() if isinstance(node, dict) else enumerate(node):
        below = f"{path}.{key}" if path else str(key)
        yield below, str(key), value
        if isinstance(value, dict | list):
            yield from walk(value, below)
