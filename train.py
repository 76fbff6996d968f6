"""Train a segmentation model with attention blocks, test its best checkpoint, report mIoU beside throughput.

python train.py --help shows what can be configured.
"""

import logging
import sys
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from configs.command_line import argument, expand_home, plain_config, reports_errors, saved_config
from ema_seg.errors import ConfigError

CONFIGS = Path(__file__).resolve().parent / "configs"


@reports_errors
def main() -> None:
    """Compose the configuration, of a resumed run from its own file, and train."""
    sys.argv = expand_home(sys.argv)
    config_name = "train"
    if run := argument("resume"):
        config_name = _register_resumed(Path(run))
    hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name=config_name)(_train)()


def _register_resumed(run: Path) -> str:
    """Make a run's own configuration the one that overrides on the command line change."""
    config = saved_config(run, key="resume")
    hydra_settings = {"run": {"dir": str(run)}, "output_subdir": None}
    ConfigStore.instance().store("resumed", {**config, "resume": None, "hydra": hydra_settings})
    return "resumed"


@reports_errors
def _train(composed: DictConfig) -> None:
    """Train, test and report one run."""
    run = Path(HydraConfig.get().runtime.output_dir)
    config = plain_config(composed)
    if not config["resume"] and (run / "checkpoints").exists():
        raise ConfigError(f"{run} holds a run already; continue it with resume={run}, or choose another hydra.run.dir.")

    # Heavy libraries only now, so that --help and --cfg answer at once.
    from lightning import seed_everything

    from ema_seg.models import encoder_normalisation
    from ema_seg.reporting import assess_checkpoint, print_report
    from ema_seg.training import fit

    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    seed_everything(config["seed"], workers=True, verbose=False)
    _complete(config["data"], encoder_normalisation(config["model"]["encoder"], config["model"]["encoder_weights"]))
    OmegaConf.save(config, run / "config.yaml")
    best = fit(config, run, resume=bool(config["resume"]))
    report = assess_checkpoint(best, config["data"], config["evaluation"], Path(config["report"]["dir"]), run=str(run))
    print_report(report)
    print(f"run: {run}")


def _complete(data: dict[str, Any], normalisation: Any) -> None:
    """Fill in the normalisation where the user has given none."""
    for key, values in normalisation._asdict().items():
        if data[key] is None:
            data[key] = list(values)


if __name__ == "__main__":
    main()
