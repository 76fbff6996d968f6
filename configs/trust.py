"""What a configuration may have called, written and started: a file that somebody has shared is not a program.

Hydra calls what stands as ``_target_`` in its callbacks, and Python's logging what stands as ``class`` or ``()`` in the
settings of Hydra's logs; both follow a dotted name to anything that can be imported, ``os.system`` included, and also
from within a trusted module that has imported it. So it is not the beginning of the name that counts but all of it.
Logging also follows what looks like a URL to any object, sets attributes, and writes what it is told to any file; the
launchers run commands. What of this is not in the project's own settings counts only where it was typed. So do the
environment's variables, which may hold passwords and tokens: settings are shown, logged and saved.
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

from ema_seg.errors import ConfigError

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
# The keys whose values are called, here and by the libraries.
_CALLED = {"_target_", "()", "class"}
# It runs the commands of its settings on machines that it rents.
_RENTS = "hydra_plugins.hydra_ray_launcher.ray_aws_launcher.RayAWSLauncher"

_LOGS = ("hydra.job_logging", "hydra.hydra_logging")
# What Hydra's own settings of its logs have, as it is written there: streams, and files that cannot be chosen.
_STREAMS = ("ext://sys.stdout", "ext://sys.stderr")
_LOG_FILES = ("${hydra.runtime.output_dir}/${hydra.job.name}.log", "hydra-${hydra.job.name}.log")
# Commands and what comes before them, for processes that launchers start; "_args_" stands for any of a launcher's own.
_COMMANDS = (
    "hydra.job.env_copy",
    "hydra.job.env_set",
    *(f"hydra.launcher.{key}" for key in ("_args_", "additional_parameters", "python", "ray", "setup", "srun_args")),
)
# The project's own, of configs/launcher.
_OWN_COMMANDS = ("export SLURM_KILL_BAD_EXIT=1",)
# The sections around them, of which a reference would make what no look at the settings finds.
_AROUND = ("hydra", "hydra.job", "hydra.launcher")


def forbid_settings_from_text() -> None:
    """Take OmegaConf the resolvers that make settings out of text, in which the keys of what is called could hide.

    Their names need not stand in a configuration, which can put them together from parts, so no look at it finds them.
    Hydra's launchers hand the resolvers on to their processes.
    """
    for name in ("oc.create", "oc.decode"):
        OmegaConf.clear_resolver(name)


def restrict_environment(typed: Sequence[str]) -> None:
    """Have ``${oc.env:NAME}`` read those variables alone that the user has typed.

    The resolver checks, and not a search of the files: they can put such a text together from parts.

    Args:
        typed: the overrides of the command line.
    """
    names = frozenset(re.findall(r"\boc\.env:\s*['\"]?([^\s,}'\"]+)", " ".join(typed)))
    OmegaConf.register_new_resolver("oc.env", partial(_read_variable, names), replace=True)


def _read_variable(known: frozenset[str], name: str, *default: str | None) -> str | None:
    if name not in known:
        raise ConfigError(
            f"${{oc.env:{name}}}: configuration files must not read the environment; write the value, or type "
            f"<key>='${{oc.env:{name}}}' on the command line"
        )
    return oc.env(name, *default)


def require_harmless(config: DictConfig, typed: Sequence[str] = ()) -> None:
    """Look at everything in a composed configuration, Hydra's own settings included, that would do more than set.

    Args:
        config: with Hydra's settings; of a job of a sweep, too.
        typed: the overrides of the command line: what stands there is the user's own.

    Raises:
        ConfigError: something is called that is none of Hydra's plugins (its launchers and sweepers and this
            project's) and callbacks or of the usual handlers and formatters of Python's logging; or the logs lead to
            other objects or files than Hydra's; or there are commands or environment variables for processes that
            nobody has typed.
    """
    own = _values_of(typed)
    for path, key, value in settings_of(config):
        if key in _CALLED and str(value) not in _known(key):
            raise ConfigError(
                f"{path}={value}: a configuration may only have Hydra's plugins and callbacks and the handlers of "
                "Python's logging called, and this is none of them; take it out, and do not run files that you do not "
                "trust."
            )
        if path in _AROUND and isinstance(value, str):
            raise ConfigError(f"{path}={value!r} is one value, where there are several settings; take it out.")
        if isinstance(value, dict | list) and key != ".":
            continue
        if str(value) in own.get(path, ()):
            continue
        if _is_below(path, _LOGS):
            _check_log(path, key, value)
        elif path == "hydra.job.name" and not re.fullmatch(r"[\w.-]+", str(value)):
            raise ConfigError(f"{path}={value!r} names files; take it out, or give a plain name on the command line.")
        elif _is_below(path, _COMMANDS) and not (value in (None, *_OWN_COMMANDS) or _is_in_environment(path, value)):
            raise ConfigError(
                f"{path}={value!r}: commands and environment variables of jobs are given on the command line only; "
                "take it out, or type it there."
            )


def require_printable(launcher: DictConfig) -> None:
    """Look at a launcher's resolved settings for texts of several lines, of which a script takes each for a command.

    Raises:
        ConfigError: there is one, other than in the commands that are meant to be.
    """
    for path, _, value in settings_of(launcher):
        if not str(value).isprintable() and not _is_below(path, ("setup",)):
            raise ConfigError(f"hydra.launcher.{path}={value!r} is no single line of text; take the line breaks out.")


def _check_log(path: str, key: str, value: Any) -> None:
    if key == "filename":
        harmless = value in _LOG_FILES
    else:
        harmless = key != "." and (value in _STREAMS or not re.match(r"[a-z]+://|.*\$\{", str(value), re.DOTALL))
    if not harmless:
        raise ConfigError(
            f"{path}={value!r}: the settings of Hydra's logs may lead to no object, file or other setting but Hydra's "
            "own; take it out, or give it on the command line."
        )


def _is_in_environment(path: str, value: Any) -> bool:
    """Whether this is what Hydra copies by ``hydra.job.env_copy``: a variable as the user has it already."""
    return os.environ.get(path.removeprefix("hydra.job.env_set.")) == value


def _is_below(path: str, sections: Sequence[str]) -> bool:
    return any(path == section or path.startswith(f"{section}.") for section in sections)


def _values_of(overrides: Sequence[str]) -> Mapping[str, set[str]]:
    """The single values that overrides give, as text by path; of a sweep all of them."""
    values: dict[str, set[str]] = defaultdict(set)
    for override in _single(OverridesParser.create().parse_overrides(list(overrides))):
        for path, _, value in walk({override.key_or_group: override.value()}, ""):
            values[path].add(str(value))
    return values


def _single(overrides: Sequence[Override]) -> Iterator[Override]:
    """Overrides of one value each, in place of sweeps over several."""
    for override in overrides:
        if not override.is_sweep_override():
            yield override
        elif override.is_discrete_sweep():
            texts = [f"{override.key_or_group}={text}" for text in override.sweep_string_iterator()]
            yield from OverridesParser.create().parse_overrides(texts)


def _known(key: str) -> set[str]:
    if key != "_target_":
        return set(_LOGGING)
    return {*Plugins.instance().class_name_to_class, *_CALLBACKS} - {_RENTS}


def settings_of(config: DictConfig) -> Iterator[tuple[str, str, Any]]:
    """Path, key and value of everything in a configuration, as it is written: nothing is resolved."""
    return walk(OmegaConf.to_container(config, resolve=False), "")


def walk(node: Any, path: str) -> Iterator[tuple[str, str, Any]]:
    """Path, key and value of everything in nested dicts and lists; ``path`` is that of the node itself."""
    for key, value in node.items() if isinstance(node, dict) else enumerate(node):
        below = f"{path}.{key}" if path else str(key)
        yield below, str(key), value
        if isinstance(value, dict | list):
            yield from walk(value, below)
