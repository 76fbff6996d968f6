"""Which classes a configuration may have called: a file that somebody has shared is not a program.

Hydra calls what stands as ``_target_`` in its callbacks, and Python's logging what stands as ``class`` or ``()`` in the
settings of Hydra's logs; both follow a dotted name to anything that can be imported, ``os.system`` included, and also
from within a trusted module that has imported it. So it is not the beginning of the name that counts but all of it.
"""

from collections.abc import Iterator
from typing import Any

from hydra.core.plugins import Plugins
from omegaconf import DictConfig, OmegaConf

from ema_seg.errors import ConfigError

__all__ = ["forbid_settings_from_text", "require_harmless", "settings_of"]

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


def forbid_settings_from_text() -> None:
    """Take OmegaConf the resolvers that make settings out of text, in which the keys of what is called could hide.

    Their names need not stand in a configuration, which can put them together from parts, so no look at it finds them.
    Hydra's launchers hand the resolvers on to their processes.
    """
    for name in ("oc.create", "oc.decode"):
        OmegaConf.clear_resolver(name)


def require_harmless(config: DictConfig) -> None:
    """Look for everything in a composed configuration, Hydra's own settings included, that would be called.

    Raises:
        ConfigError: something is none of Hydra's plugins (its launchers and sweepers and this project's) and callbacks
            or of the usual handlers and formatters of Python's logging.
    """
    for path, key, value in settings_of(config):
        if key in _CALLED and str(value) not in _known(key):
            raise ConfigError(
                f"{path}={value}: a configuration may only have Hydra's plugins and callbacks and the handlers of "
                "Python's logging called, and this is none of them; take it out, and do not run files that you do not "
                "trust."
            )


def _known(key: str) -> set[str]:
    return {*Plugins.instance().class_name_to_class, *_CALLBACKS} if key == "_target_" else set(_LOGGING)


def settings_of(config: DictConfig) -> Iterator[tuple[str, str, Any]]:
    """Path, key and value of everything in a configuration, as it is written: nothing is resolved."""
    return _walk(OmegaConf.to_container(config, resolve=False), "")


def _walk(node: Any, path: str) -> Iterator[tuple[str, str, Any]]:
    for key, value in node.items() if isinstance(node, dict) else enumerate(node):
        below = f"{path}.{key}" if path else str(key)
        yield below, str(key), value
        if isinstance(value, dict | list):
            yield from _walk(value, below)
