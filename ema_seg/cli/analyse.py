"""The command ``ema-seg analyse``: from its arguments to the analysis of a trained model."""

import sys
from pathlib import Path

from omegaconf import DictConfig

from ema_seg.cli.command_line import (
    argument,
    config_of_run_or_checkpoint,
    expand_home,
    plain_config,
    reports_errors,
    require_set,
)
from ema_seg.cli.composition import CONFIGS, compose, launch, offer_settings_of_run
from ema_seg.cli.early_checks import check_root
from ema_seg.config import Analysing, check_settings
from ema_seg.runtime.errors import ConfigError
from ema_seg.runtime.host_memory import gc_frozen_imports, keep_freed_memory

__all__ = ["main"]


@reports_errors
def main() -> None:
    """Compose the configuration on top of the run's data, and analyse."""
    keep_freed_memory()
    sys.argv = expand_home(sys.argv)
    run = argument("run")
    offer_settings_of_run(config_of_run_or_checkpoint(Path(run), key="run") if run else {}, "data")
    launch(_analyse, CONFIGS, "analyse", compose(CONFIGS, "analyse"))


@reports_errors
def _analyse(composed: DictConfig) -> None:
    config = plain_config(composed)
    require_set(config, run="the folder of a run or a checkpoint")
    check_settings(config, Analysing)
    check_root(config["data"])

    # Heavy imports only now, so that --help and --cfg answer at once.
    with gc_frozen_imports():
        from ema_seg.analyse import analyse
        from ema_seg.inference.exported import is_exported
        from ema_seg.models.checkpoint import checkpoint_path

    source = Path(config["run"])
    if config["out"] is None and not source.exists():
        raise ConfigError(f"out: must be set for run={config['run']}; give out=<a folder>.")
    checkpoint, twin = (config[key] and checkpoint_path(config[key]) for key in ("run", "twin"))
    for key, path in (("run", checkpoint), ("twin", twin)):
        if path and is_exported(path):
            raise ConfigError(
                f"{key}={config[key]}: is an exported file, whose blocks cannot be changed; give its run."
            )
    directory = Path(config["out"] or (source if source.is_dir() else source.parent) / "analysis")
    options = {key: config[key] for key in ("images", "field_images", "device", "precision")}
    analyse(checkpoint, config["data"], directory, run=config["run"], twin=twin, **options)
    print(directory / "analysis.html")
