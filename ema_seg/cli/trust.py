"""Rule for configuration files of others: they may set everything but Hydra's own settings.

Hydra calls the names in its callbacks and logs, sets environment variables and runs a launcher's commands: a file with
such settings could run code. So everything below ``hydra`` must be as it is without the user's files: it comes from the
project's configurations, from Hydra and its plugins, or was typed. Environment variables must be typed, too: they may
hold passwords and tokens, and settings are shown, logged and saved.
"""

import re
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.resolvers import oc

from ema_seg.runtime.errors import ConfigError

__all__ = [
    "require_printable",
    "require_same_hydra_settings",
    "restrict_environment",
    "settings_of",
    "walk",
]

# Records of a composition below ``hydra``, which Hydra does not act on.
_VARYING = ("overrides", "runtime", "job.config_name", "job.override_dirname")


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


def require_same_hydra_settings(composed: DictConfig, trusted: DictConfig, files: str) -> None:
    """Reject settings of Hydra that the user's files have changed.

    The result of the composition is compared, because files reach a setting in many ways: by keys, package headers,
    packages in defaults lists, overrides of a sweep's jobs, and nodes that Hydra shares between files.

    Args:
        composed: the configuration with the user's files.
        trusted: the configuration without them, with the typed overrides of Hydra's settings.
        files: the folders of the user's files, for the message.

    Raises:
        ConfigError: a setting below ``hydra`` differs, is missing or is added.
    """
    # Hydra's schema admits no interpolation in place of the whole section.
    ours, theirs = (dict(settings_of(each.hydra)) for each in (trusted, composed))
    for path in [*theirs, *ours]:
        # Sections differ where one of their values does.
        if path.startswith(_VARYING) or all(isinstance(each.get(path), dict | list) for each in (ours, theirs)):
            continue
        if path not in ours or path not in theirs or ours[path] != theirs[path]:
            raise ConfigError(
                f"{files}: a configuration file must not change hydra.{path}, because Hydra's settings can run code; "
                "remove it, and if you trust it, type it on the command line."
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
