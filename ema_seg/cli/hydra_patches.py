"""Hydra's internals that the command line needs, each with its reason (Hydra 1.3).

Hydra composes a configuration and acts on it in one call: it imports packages of its search path, sets environment
variables and instantiates plugins. There is no public hook between the two, so our own config loader takes the place
of Hydra's.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import hydra._internal.hydra as hydras_own
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import CachingConfigRepository, ConfigRepository
from hydra._internal.utils import create_config_search_path, get_args_parser
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.types import Override
from hydra.core.utils import JobRuntime
from hydra.plugins.config_source import ConfigResult, ConfigSource
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from ema_seg.cli.command_line import key_of
from ema_seg.cli.trust import require_same_hydra_settings, walk
from ema_seg.runtime.errors import ConfigError
from ema_seg.runtime.texts import read_yaml

__all__ = ["Loader", "create_config_search_path", "get_args_parser", "validating_loader"]

_MOST_BRACKETS = 50
# Hydra's name for the source of --config-dir.
_USERS = "command-line"
# Groups of Hydra's settings among whose options a file may choose.
_CHOSEN = ("launcher", "hydra/launcher", "hydra/sweeper")
# Overrides that Hydra adds to every command, and the sweepers to every job.
_ADDED = ("hydra.mode", "hydra.sweep.dir", "hydra.sweep.subdir")


@contextmanager
def validating_loader(primary: str, checked: DictConfig | None = None) -> Iterator[None]:
    """Have Hydra use ``Loader``, and raise errors that it would print; for the duration of the block.

    Args:
        primary: see ``Loader``.
        checked: see ``Loader``.
    """
    earlier = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"
    hydras_own.ConfigLoaderImpl = partial(Loader, primary, checked=checked)  # type: ignore[misc, assignment]  # a class's name
    try:
        yield
    finally:
        if earlier is None:
            os.environ.pop("HYDRA_FULL_ERROR", None)
        else:
            os.environ["HYDRA_FULL_ERROR"] = earlier
        hydras_own.ConfigLoaderImpl = ConfigLoaderImpl  # type: ignore[misc]


class Repository(ConfigRepository):
    """Config repository that reads files with ``read_yaml`` and rejects paths outside the search path."""

    def load_config(self, config_path: str) -> ConfigResult | None:
        """Load a configuration file; see ConfigRepository.

        Raises:
            ConfigError: the path is outside the search path, or the file's content is not a configuration.
            DataError: see ``read_yaml``.
        """
        if os.path.normpath(config_path).startswith((os.pardir, "/")):
            raise ConfigError(
                f"{config_path}: must be below a folder of the config search path; put the file there, or add its "
                "folder with --config-dir."
            )
        source = self._find_object_source(config_path, ObjectType.CONFIG)
        if source is None or source.scheme() != "file":
            return super().load_config(config_path)
        path = Path(source.path, source._normalize_file_name(config_path))
        loaded = _read_config(path, f"file://{source.path}", source.provider)
        defaults = self._extract_defaults_list(config_path, loaded.config)
        loaded.defaults_list = self._create_defaults_list(config_path, defaults)
        return loaded


def _read_config(path: Path, place: str, provider: str) -> ConfigResult:
    content = read_yaml(path, advice="correct the configuration")
    content = {} if content is None else content
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: a configuration must have keys with values, got {content!r:.80}; correct it.")
    for key, value in walk(content, ""):
        # OmegaConf's parser takes seconds for nested brackets, and overflows the stack for more.
        if isinstance(value, str) and "${" in value and len(re.findall(r"[\[{(]", value)) > _MOST_BRACKETS:
            raise ConfigError(
                f"{path}: {key} must have at most {_MOST_BRACKETS} opening brackets in an interpolation; simplify it."
            )
    with path.open(encoding="utf-8-sig") as file:
        header = ConfigSource._get_header_dict(file.read(512))
    return ConfigResult(config=OmegaConf.create(content), path=place, provider=provider, header=header)


class Loader(ConfigLoaderImpl):
    """Config loader that checks every config it composes, in this process and in those of a launcher.

    Hydra composes a run twice more. It then receives copies of the configuration that was checked first: a defaults
    list may choose its files by time, and a composition takes a tenth of a second.

    Args:
        primary: name of the command's own primary config.
        config_search_path: see ConfigLoaderImpl.
        checked: the configuration of the command line, if it was composed and checked before.
    """

    def __init__(self, primary: str, config_search_path: ConfigSearchPath, checked: DictConfig | None = None) -> None:
        super().__init__(config_search_path)
        self._primary = primary
        self._checked = checked
        self.repository = Repository(config_search_path)
        # Parse the command line here: the processes of a launcher do not have it.
        options = get_args_parser().parse_args()
        self._typed = options.overrides
        self._completes = options.shell_completion
        self._sweeps = options.multirun and not (options.help or options.hydra_help)
        self._run = None if options.multirun else (options.config_name or primary, self._typed)
        searched = [text for text in self._typed if key_of(text) == "hydra.searchpath"]
        self._files = ", ".join([*filter(None, [options.config_dir]), *searched])

    def load_configuration(
        self, config_name: str | None, overrides: list[str], run_mode: RunMode, *options: Any, **named: Any
    ) -> DictConfig:
        """Compose a configuration, and reject settings of Hydra that the user's files have changed."""
        mode = f"hydra.mode={run_mode.name}"  # Hydra adds it to the command line
        if self._checked and self._run == (config_name, [text for text in overrides if text != mode]):
            return self._copy_checked(mode if mode in overrides else None)
        composed = super().load_configuration(config_name, overrides, run_mode, *options, **named)
        if not self._completes:  # nothing acts on what completion composes
            if self._files:
                trusted = self._load_trusted(composed, config_name, overrides, run_mode)
                require_same_hydra_settings(composed, trusted, self._files)
            _check_plugins(composed, self._sweeps)
        return composed

    def _copy_checked(self, mode: str | None) -> DictConfig:
        copy = deepcopy(self._checked)
        assert copy is not None
        if copy.hydra.job.name == "UNKNOWN_NAME":  # composed before hydra.main was called
            copy.hydra.job.name = JobRuntime.instance().get("name")
        if mode:
            copy.hydra.mode = mode.partition("=")[2]
            copy.hydra.overrides.hydra.append(mode)
        return copy

    def load_unchecked(self, config_name: str, overrides: list[str]) -> DictConfig:
        """Compose a configuration that nothing acts on."""
        return super().load_configuration(config_name, overrides, RunMode.MULTIRUN)

    def _load_trusted(
        self, composed: DictConfig, config_name: str | None, overrides: list[str], run_mode: RunMode
    ) -> DictConfig:
        """Compose the same without the user's files, with Hydra's settings that were typed.

        The files may choose among the launchers and sweepers of the project, so their choices are kept.
        """
        path = deepcopy(self.config_search_path)
        path.get_path()[:] = [each for each in path.get_path() if each.provider != _USERS]
        loader = ConfigLoaderImpl(path)
        loader.repository = Repository(path)
        chosen = [f"{group}={option}" for group, option in composed.hydra.runtime.choices.items() if group in _CHOSEN]
        typed = [
            text
            for text in overrides
            if re.match(r"hydra\b", key_of(text)) and (text in self._typed or key_of(text) in _ADDED)
        ]
        kept = {key_of(text): text for text in [*chosen, *typed]}
        searched = kept.pop("hydra.searchpath", None)
        # Without an option of the user's own the settings differ, as they must.
        known = [text for key, text in kept.items() if not _is_group(key) or _exists(loader, text)]
        own_primary = config_name is None or loader.repository.config_exists(config_name)
        trusted = loader.load_configuration(config_name if own_primary else self._primary, known, run_mode)
        if searched:
            trusted.hydra.searchpath = composed.hydra.searchpath
        return trusted

    def _process_config_searchpath(
        self, config_name: str | None, parsed_overrides: list[Override], repo: CachingConfigRepository
    ) -> None:
        """Follow ``hydra.searchpath`` of the command line, but not of a file: Hydra imports packages from it.

        Raises:
            ConfigError: an override of a sweep's job sets it.
        """
        for override in parsed_overrides:
            typed = self._completes or override.input_line in self._typed
            if override.get_key_element() == "hydra.searchpath" and not typed:
                raise ConfigError(
                    f"{override.input_line}: a job of a sweep must not set hydra.searchpath, because Hydra imports "
                    "packages from it; type it on the command line."
                )
        super()._process_config_searchpath(None, parsed_overrides, repo)


def _is_group(key: str) -> bool:
    return key == "launcher" or "/" in key


def _exists(loader: ConfigLoaderImpl, choice: str) -> bool:
    """Return whether the option of a group that an override chooses is there."""
    return bool(loader.repository.config_exists(choice.lstrip("+").replace("=", "/", 1)))


def _check_plugins(composed: DictConfig, multirun: bool) -> None:
    """Reject ``-m`` without one of our sweepers, which alone check jobs, and the launcher that rents machines."""
    settings = OmegaConf.to_container(composed.hydra, resolve=False)
    assert isinstance(settings, dict)
    sweeps = multirun or settings["mode"] not in (None, RunMode.RUN)
    if sweeps and not str(settings["sweeper"]["_target_"]).startswith("hydra_plugins.ema_seg_sweepers."):
        raise ConfigError(
            "-m (hydra.mode=MULTIRUN): works only with train.py and the sweepers of this project; run python train.py "
            "-m sweep=grid …, or remove it."
        )
    if str(settings["launcher"]["_target_"]).endswith(".RayAWSLauncher"):
        raise ConfigError(
            "hydra/launcher=ray_aws: a launcher that rents machines is not supported; write launcher=ray, and join a "
            "cluster with hydra.launcher.ray.init.address."
        )
