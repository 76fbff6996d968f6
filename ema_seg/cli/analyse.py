"""The command ``ema-seg analyse``: from its arguments to the analysis of a trained model."""

from pathlib import Path

from omegaconf import DictConfig

from ema_seg.cli.command_line import default_folder, plain_config, reports_errors, require_set
from ema_seg.cli.composition import launch_on_data_of_run
from ema_seg.cli.early_checks import check_root
from ema_seg.config import Analysing, check_settings
from ema_seg.runtime.errors import ConfigError
from ema_seg.runtime.host_memory import gc_frozen_imports, keep_freed_memory

__all__ = ["main"]


@reports_errors
def main() -> None:
    """Compose the configuration on top of the run's data, and analyse."""
    keep_freed_memory()
    launch_on_data_of_run(_analyse, "analyse")


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

    directory = default_folder(config, Path("analysis"))
    checkpoint, twin = (config[key] and checkpoint_path(config[key]) for key in ("run", "twin"))
    for key, path in (("run", checkpoint), ("twin", twin)):
        if path and is_exported(path):
            raise ConfigError(
                f"{key}={config[key]}: is an exported file, whose blocks cannot be changed; give its run."
            )
    options = {key: config[key] for key in ("images", "field_images", "device", "precision")}
    analyse(checkpoint, config["data"], directory, run=config["run"], twin=twin, **options)
    print(directory / "analysis.html")
