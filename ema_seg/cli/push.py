"""The command ``ema-seg push``: from its arguments to a shared model."""

import sys
from pathlib import Path

from omegaconf import DictConfig

from ema_seg.cli.command_line import expand_home, plain_config, reports_errors, require_set
from ema_seg.cli.composition import CONFIGS, compose, launch
from ema_seg.config import Pushing, check_settings
from ema_seg.runtime.errors import DataError
from ema_seg.runtime.host_memory import gc_frozen_imports
from ema_seg.runtime.hub import hub_address

__all__ = ["main"]


@reports_errors
def main() -> None:
    """Compose the configuration and share the model."""
    sys.argv = expand_home(sys.argv)
    launch(_push, CONFIGS, "push", compose(CONFIGS, "push"))


@reports_errors
def _push(composed: DictConfig) -> None:
    config = plain_config(composed)
    check_settings(config, Pushing)
    require_set(config, run="the folder of a run or a checkpoint", to="a folder or hf://user/name")
    hub_address(config["to"])  # checks the address
    if hub_address(config["run"]) is None and not Path(config["run"]).exists():
        raise DataError(f"run={config['run']}: no such folder or file; give the folder of a run, or a checkpoint.")

    # Heavy imports only now, so that --help and --cfg answer at once.
    with gc_frozen_imports():
        from ema_seg.reporting.push import push

    options = {key: config[key] for key in ("license", "private", "overwrite")}
    result = push(config["run"], config["to"], **options)
    scores = result["scores"]
    if scores is None:
        print("scores: not measured (ema-seg eval run=<run> writes the report of a run's best checkpoint)")
    else:
        miou = "undefined" if scores["miou"] is None else f"{scores['miou']:.2%}"
        print(f"mIoU: {miou} on {scores['images']} images of {scores['data']} {scores['split']}")
    print(result["place"])
