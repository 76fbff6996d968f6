"""Private names of Hydra that ``hydra_patches`` overrides or calls: they exist, and Hydra uses them."""

import hydra._internal.hydra as hydras_own
import pytest
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import ConfigRepository
from hydra.plugins.config_source import ConfigSource
from hydra.types import RunMode

from ema_seg.cli.composition import CONFIGS, compose
from ema_seg.cli.hydra_patches import Loader, create_config_search_path, validating_loader


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (ConfigLoaderImpl, "load_configuration"),
        (ConfigLoaderImpl, "_process_config_searchpath"),
        (ConfigRepository, "_find_object_source"),
        (ConfigRepository, "_extract_defaults_list"),
        (ConfigRepository, "_create_defaults_list"),
        (ConfigSource, "_normalize_file_name"),
        (ConfigSource, "_get_header_dict"),
    ],
)
def test_hydra_has_the_methods_that_ours_override_or_call(owner, name):
    assert callable(getattr(owner, name))


def test_hydras_main_program_takes_its_loader_by_the_name_that_is_replaced():
    assert hydras_own.ConfigLoaderImpl is ConfigLoaderImpl
    with validating_loader("train"):
        assert hydras_own.Hydra.create_main_hydra2.__globals__["ConfigLoaderImpl"].func is Loader
    assert hydras_own.ConfigLoaderImpl is ConfigLoaderImpl


def test_a_copy_of_the_checked_configuration_is_what_hydra_would_compose(monkeypatch):
    typed = ["seed=1", "+trainer.max_steps=3", "hydra.job.name=a"]
    monkeypatch.setattr("sys.argv", ["train.py", *typed])
    path, overrides = create_config_search_path(str(CONFIGS)), [*typed, "hydra.mode=RUN"]

    copy, other = (
        Loader("train", path, compose(CONFIGS, "train")).load_configuration("train", given, RunMode.RUN)
        for given in (overrides, [*overrides, "seed=2"])
    )

    assert copy == ConfigLoaderImpl(path).load_configuration("train", overrides, RunMode.RUN)
    assert (copy.seed, other.seed) == (1, 2)


def test_the_overridden_methods_are_called(monkeypatch):
    called = []
    for name in ("load_configuration", "_process_config_searchpath"):
        own = getattr(Loader, name)
        monkeypatch.setattr(Loader, name, lambda *a, own=own, name=name, **k: called.append(name) or own(*a, **k))
    monkeypatch.setattr("sys.argv", ["train.py", "seed=1"])
    compose(CONFIGS, "train")
    assert called == ["load_configuration", "_process_config_searchpath"]
