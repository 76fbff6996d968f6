"""What a configuration file may decide: everything but Hydra's own settings.

Hydra calls what its callbacks and logs name, sets environment variables and runs a launcher's commands: a file with
such settings could run code. One rule covers them all: what stands under ``hydra.`` comes from the project's own
configurations, from Hydra and its plugins, or was typed. Environment variables must be typed, too: they may hold
passwords and tokens, and settings are shown, logged and saved.
"""

import re
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.resolvers import oc

from ema_seg.runtime.errors import ConfigError

__all__ = [
    "require_no_hydra_settings",
    "require_printable",
    "require_typed",
    "restrict_environment",
    "settings_of",
    "walk",
]

# Overrides that Hydra adds to every command, and the sweepers to every job.
_ADDED = ("hydra.mode", "hydra.sweep.dir", "hydra.sweep.subdir")


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


def require_no_hydra_settings(file: str, content: DictConfig) -> None:
    """Reject Hydra's settings in a file that is not the project's.

    Args:
        file: the file, for the message.
        content: its settings, at their place in the configuration: a defaults list or a ``@package`` header may have
            moved them there.

    Raises:
        ConfigError: the file sets ``hydra`` or a key below.
    """
    keys = [path for path, _ in settings_of(content) if path == "hydra" or path.startswith("hydra.")]
    if keys:
        raise ConfigError(
            f"{file}: a configuration file must not set {max(keys, key=lambda key: key.count('.'))}, because Hydra's "
            "settings can run code; remove it, and if you trust it, type it on the command line."
        )


def require_typed(overrides: Sequence[str], typed: Sequence[str]) -> None:
    """Reject overrides of Hydra's settings that come from a file, such as from the variants of a sweep.

    Raises:
        ConfigError: an override of ``hydra`` or of a key below is not among those of the command line.
    """
    for text in overrides:
        key = text.lstrip("+~").partition("=")[0]
        if re.match(r"hydra\b", key) and text not in typed and key not in _ADDED:
            raise ConfigError(
                f"{text}: a job of a sweep must not set {key}, because Hydra's settings can run code; remove it, or "
                "type it on the command line, for all jobs."
            )


def require_printable(launcher: DictConfig) -> None:
    """Reject line breaks in a launcher's resolved settings: each line of an sbatch script is a command.

    Raises:
        ConfigError: a setting outside ``setup`` has a line break or another non-printable character.
    """
    for path, value in settings_of(launcher):
        if not str(value).isprintable() and path.partition(".")[0] != "setup":
            raise ConfigError(
                f"hydra.launcher.{path}: must be one line of printable text, got {value!r}; remove line breaks and "
                "control characters."
            )


def settings_of(config: DictConfig) -> Iterator[tuple[str, Any]]:
    """Yield path and value of every node of a configuration, unresolved."""
    return walk(OmegaConf.to_container(config, resolve=False), "")


def walk(node: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Yield path and value of every node in nested dicts and lists; ``path`` is that of ``node``."""
    for key, value in node.items() if isinstance(node, dict) else enumerate(node):
        below = f"{path}.{key}" if path else str(key)
        yield below, value
        if isinstance(value, dict | list):
            yield from walk(value, below)
